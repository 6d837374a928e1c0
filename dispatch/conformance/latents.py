"""Multi-head latent attention for the oracle: a case whose cache holds latents, and its tensors.

The oracle computes the expanded form of DeepSeek-V2 (arXiv:2405.04434), section 2.1, in float64:
the definition of the layer, with keys and values of each head. PyTorch's own attention, whose error
decides how much is allowed, computes the absorbed form in the layer's dtype, as backends do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.cases import Case, CaseTensors, output_size, query_size
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.kv_encoding import as_stored, dequantized, layer_with, nan_cache
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import MLADims

__all__ = [
    "LatentStep",
    "LatentTensors",
    "absorbed_by_pytorch",
    "expanded",
    "projections",
    "step_for",
]


def projections(kv_b_proj: torch.Tensor, mla: MLADims) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK (num_heads, qk_nope_head_dim, rank) and W_UV (num_heads, v_head_dim, rank), views."""
    per_head = kv_b_proj.unflatten(0, (-1, mla.qk_nope_head_dim + mla.v_head_dim))
    up_k, up_v = per_head.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
    return up_k, up_v


def expanded(
    entries: torch.Tensor, kv_b_proj: torch.Tensor, mla: MLADims
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of all heads.

    Args:
        entries: (num_keys, kv_lora_rank + qk_rope_head_dim) float64.
        kv_b_proj: (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank) of any dtype.
        mla: the sizes.

    Returns:
        (num_keys, num_heads, qk_nope_head_dim + qk_rope_head_dim) and
        (num_keys, num_heads, v_head_dim) float64.
    """
    up_k, up_v = projections(kv_b_proj.double(), mla)
    latents, rotated = entries.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
    nope = torch.einsum("kr,hnr->khn", latents, up_k)
    shared = rotated[:, None].expand(-1, len(up_k), -1)
    return torch.cat([nope, shared], -1), torch.einsum("kr,hvr->khv", latents, up_v)


def absorbed_by_pytorch(
    query: torch.Tensor,
    entries: torch.Tensor,
    kv_b_proj: torch.Tensor,
    mla: MLADims,
    *,
    scale: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """One request in absorbed form by PyTorch, in the dtype of the query, on its device.

    Args:
        query: (num_queries, num_heads, qk_nope_head_dim + qk_rope_head_dim).
        entries: as for `expanded`, of any dtype.
        kv_b_proj: as for `expanded`.
        mla: the sizes.
        scale: factor on the scores.
        seen: (num_queries, num_keys) bool.

    Returns:
        (num_queries, num_heads, v_head_dim) of the query's dtype.
    """
    up_k, up_v = projections(kv_b_proj.to(query), mla)
    nope, rotated = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
    queries = torch.cat([torch.einsum("qhn,hnr->qhr", nope, up_k), rotated], -1)
    keys = entries.to(query)[:, None]
    values = keys[..., : mla.kv_lora_rank]
    mixed = oracle.sdpa_of_request(queries, keys, values, scale=scale, seen=seen)
    return torch.einsum("qhr,hvr->qhv", mixed, up_v)


@dataclass(eq=False, kw_only=True)
class LatentTensors(CaseTensors):
    """The tensors of a call of latent attention.

    `keys` and `values` are those of all heads, expanded from the entries.

    Attributes:
        entries: (seq_len, kv_lora_rank + qk_rope_head_dim) float64 on the CPU of each request: the
            numbers that the cache holds, the scale applied.
        kv_b_proj: (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank).
    """

    entries: list[torch.Tensor]
    kv_b_proj: torch.Tensor

    @classmethod
    def of_entries(
        cls, entries: Sequence[torch.Tensor], kv_b_proj: torch.Tensor, **given: Any
    ) -> LatentTensors:
        """Those with the keys and values of these entries; `given` are the other attributes."""
        made = cls(keys=[], values=[], entries=[*entries], kv_b_proj=kv_b_proj, **given)
        made.expand_entries()
        return made

    @property
    def mla(self) -> MLADims:
        """The layer's sizes."""
        assert self.spec.mla is not None
        return self.spec.mla

    def has_infinite_latents(self, request: int) -> bool:
        """Whether a latent of a request is infinite.

        The keys of all heads are infinite with both signs then, and scores and LSE are NaN in
        expanded form. In absorbed form such a score is infinite, and the LSE may be finite. The
        output is NaN in both.
        """
        latents = self.entries[request][:, : self.mla.kv_lora_rank]
        return bool(latents.isinf().any())

    def expand_entries(self) -> None:
        """Make `keys` and `values` those of the entries."""
        weight = self.kv_b_proj.cpu()
        pairs = [expanded(entries, weight, self.mla) for entries in self.entries]
        self.keys, self.values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def pytorch(self) -> torch.Tensor:
        """(num_tokens, num_heads, v_head_dim): absorbed, by PyTorch, in the layer's dtype."""
        spec = self.spec
        outputs = [torch.zeros(0, spec.num_heads, output_size(spec), dtype=spec.dtype)]
        for request, (query, entries) in enumerate(zip(self.queries, self.entries, strict=True)):
            found = absorbed_by_pytorch(
                query.to(self.device, spec.dtype),
                entries.to(self.device),
                self.kv_b_proj,
                self.mla,
                scale=self.scale,
                seen=self.seen_by(request).to(self.device),
            )
            outputs.append(found.cpu())
        return torch.cat(outputs)


class LatentStep(LatentTensors, EngineStep):
    """A step of latent attention with tensors that are made up for it; see EngineStep.

    `key` and `value` are what `forward` gets in their places: the latents of the new tokens,
    (num_tokens, kv_lora_rank), and their rotated key parts, (num_tokens, qk_rope_head_dim). They
    are always given. If the cache holds all entries, other numbers are given, with slots −1.

    The cache is (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim). Expanded keys and values
    have a variance of 1.

    Args:
        case, device, arch: as for EngineStep; the case's layer has `mla`. Planted "key" numbers are
            in the rotated parts, and planted "value" numbers in the latents.
    """

    parts = ("latents", "rotated key parts")

    def __init__(self, case: Case, device: torch.device | str = "cpu", arch: str = "") -> None:
        spec, device = case.spec, torch.device(device)
        self.case, self.arch = case, arch
        self._random = torch.Generator().manual_seed(case.seed)
        self.new_lens = case.new_lens or case.query_lens
        per_head, scales = self._make_per_head(device), self._make_scales()
        mla, size = self.mla, query_size(spec)
        queries = [self._new(n, spec.num_heads, size) for n in case.query_lens]
        entries = [self._new(n, 1, spec.head_size) for n in case.seq_lens]
        self._plant(queries, entries)
        query = self._lay(queries, spec.num_heads, size, device)
        new = self._last([self._replaced(entry) for entry in entries])
        widths = [mla.kv_lora_rank, mla.qk_rope_head_dim]
        rows = zip(*(each.split(widths, dim=-1) for each in new), strict=True)
        laid = [
            self._lay(part, 1, width, device)[:, 0]
            for part, width in zip(list(rows) or [(), ()], widths, strict=True)
        ]
        self.key, self.value = laid
        dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)
        self.kv_cache = self._make_latent_cache(entries, scales[0], dtype).to(device)
        shape = (spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        same = torch.Generator().manual_seed(0)  # one layer computes steps of several seeds
        weight = torch.randn(*shape, generator=same, dtype=torch.float64)
        weight *= mla.kv_lora_rank**-0.5
        LatentTensors.__init__(
            self,
            case=case,
            layer=layer_with([scales[0]] * 2, device),
            scale=0.8 * size**-0.5,
            query=query,
            queries=[each.double() for each in queries],
            keys=[],
            values=[],
            entries=[dequantized(each, scales[0], dtype).double()[:, 0] for each in entries],
            kv_b_proj=weight.to(device, spec.dtype),
            masks=self._make_masks() if spec.custom_mask else None,
            **per_head,
        )
        self.exact_keys = self.exact_values = entries
        self.expand_entries()
        self.batch = self._make_batch()

    def _plant(self, queries: Sequence[torch.Tensor], entries: Sequence[torch.Tensor]) -> None:
        for name, request, first, end, number in self.case.planted:
            if name == "query":
                queries[request][first:end, 0, 0] = number
            else:
                column = self.mla.kv_lora_rank if name == "key" else 0
                entries[request][first:end, 0, column] = number

    def _replaced(self, entries: torch.Tensor) -> torch.Tensor:
        """What the step brings: other numbers for a layer that must not store or use them."""
        if self.case.brings_keys and not self.spec.kv_sharing:
            return entries
        return self._normal(*entries.shape).to(entries)

    def _make_latent_cache(
        self, entries: Sequence[torch.Tensor], scale: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A cache on the CPU with the entries that are older than the step."""
        num_blocks, older = self._place_requests()
        cache = nan_cache((num_blocks, self.block_size, self.spec.head_size), None, dtype)
        stored = cache.view(torch.uint8) if dtype.itemsize == 1 else cache
        for own, old in zip(entries, older, strict=True):
            content = as_stored(own[: len(old)], scale, dtype)[:, 0]
            stored[old // self.block_size, old % self.block_size] = content.view(stored.dtype)
        return cache

    def part_of(self, kv_cache: torch.Tensor, index: int) -> torch.Tensor:
        """(num_blocks, block_size, ...), the latents (0) or the rotated key parts (1)."""
        rank = self.mla.kv_lora_rank
        return kv_cache[..., rank:] if index else kv_cache[..., :rank]

    def bytes_by_slot(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """(number of slots, bytes of a slot) uint8, a copy."""
        return kv_cache.contiguous().flatten(0, 1).view(torch.uint8).clone()

    def wider_cache(self) -> torch.Tensor:
        """A cache with an element more for each token."""
        num_blocks, block_size, width = self.kv_cache.shape
        cache: torch.Tensor = self.kv_cache
        return cache.new_empty(num_blocks, block_size, width + 1)

    def change_cached(self, index: int, position: int = 2) -> None:
        """Replace the latent (0) or rotated key part (1) of a token of the first request."""
        block, offset = self._table[0, position // self.block_size], position % self.block_size
        cached = self.part_of(self.kv_cache, index)
        own = self.part_of(self.entries[0], index)[position]
        row = (-3 * own).to(cached.dtype)
        own.copy_(row)
        cached[int(block), offset] = row.to(cached.device)
        self.expand_entries()

    def double_cache_scale(self, index: int) -> None:
        """Double all entries by their scale, of which there is one; the step brings none."""
        self.layer = layer_with([2 * self.layer._k_scale] * 2, self.device)
        self.entries = [2 * each for each in self.entries]
        self.expand_entries()

    def change_weight(self, change: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        """Change the W_UK and W_UV that the layer has, in place."""
        change(*projections(self.kv_b_proj, self.mla))
        self.expand_entries()

    def _batch_slots(self) -> torch.Tensor | None:
        """The slots of new tokens; −1 where the cache holds all entries."""
        if self.spec.kv_sharing:
            return None
        return self._slots if self.case.brings_keys else torch.full_like(self._slots, -1)

    def impl_arguments(self) -> dict[str, Any]:
        """As EngineStep's, with the sizes and the projection."""
        return {**super().impl_arguments(), "mla": self.mla, "kv_b_proj": self.kv_b_proj}


def step_for(case: Case, device: torch.device, arch: str) -> EngineStep:
    """The step of a case, with or without latents."""
    return (EngineStep if case.spec.mla is None else LatentStep)(case, device, arch)
