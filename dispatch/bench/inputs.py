"""The tensors of a case: queries, keys and values, and a cache with its blocks in random order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_checks import slots_of
from attn_dispatch.interface.impl import get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv, write_kv_cache, write_mla_cache
from attn_dispatch.interface.kv_cache import (
    STRIDE_ORDERS,
    allocate_kv_cache,
    kv_cache_shape,
    view_kv_cache,
)
from attn_dispatch.interface.kv_layout_table import kv_layout_named
from attn_dispatch.interface.kv_view import KVCache, kv_strides_of
from attn_dispatch.interface.quantization import (
    KVScales,
    has_token_scales,
    is_fp8,
    kv_cache_torch_dtype,
    stored_head_size,
)
from attn_dispatch.platforms.detect import detect_device

__all__ = ["Inputs", "LatentInputs", "alibi_slopes"]

#: Tokens whose keys are made and written at a time.
_CHUNK_TOKENS = 1 << 16

#: The largest value that an fp8 cache can hold, in standard deviations of keys and of values, as
#: calibration on such numbers would find. They differ, so that exchanged scales show.
_K_RANGE, _V_RANGE = 6.0, 5.0


@dataclass(frozen=True)
class LatentInputs:
    """What a whole layer of multi-head latent attention gets.

    Attributes:
        query: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim), of which Inputs.query
            is the absorbed form.
        kv_b_proj: (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank).
        kv_c, k_pe: (num_tokens, kv_lora_rank) and (num_tokens, qk_rope_head_dim), the new latents.
            The cache has them already: their slots are −1.
    """

    query: torch.Tensor
    kv_b_proj: torch.Tensor
    kv_c: torch.Tensor
    k_pe: torch.Tensor


class Inputs:
    """A case with tensors, made from a seed; the same on every run on the same device.

    Attributes:
        case, spec, device: of the tensors.
        query: (num_tokens, num_heads, head_size); of latent attention, the absorbed ones.
        key, value: (num_tokens, num_kv_heads, head_size), the new ones; None if only the cache has
            them. A cache always has them: their slots are −1.
        kv_cache: (num_blocks, 2, block_size, num_kv_heads, stored head size), NHD; or a cache with
            the case's layout; or None. Of latent attention (num_blocks, block_size, head_size).
        latent: what a layer of latent attention gets in addition, or None.
        block_table: (num_reqs, max_blocks) int32, or None.
        query_start_loc: (num_reqs + 1,) int32.
        seq_lens: (num_reqs,) int32.
        batch: as an engine would give it.
        layer: has the scales of the cache.
        slopes: (num_heads,) float32, or None.
        sinks: (num_heads,) float32, or None; of bfloat16's precision, which some kernels need.
    """

    key: Any = None
    value: Any = None
    kv_cache: Any = None
    block_table: Any = None
    sinks: torch.Tensor | None = None
    latent: LatentInputs | None = None

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.spec, self.device = case, case.spec(), device
        self._host = torch.Generator("cpu").manual_seed(seed)
        self._random = torch.Generator(device).manual_seed(seed)
        if case.mla is None:
            self.query = self._normal(case.num_tokens, case.num_heads)
        else:
            self.latent = self._make_latent()
            self.query = _absorbed(self.latent, case)
        self.layer = KVScales()
        self.layer.to(device)
        self.slopes = alibi_slopes(case.num_heads).to(device) if case.alibi else None
        if case.sinks:
            sinks = torch.randn(case.num_heads, generator=self._host, device="cpu")
            self.sinks = sinks.bfloat16().float().to(device)
        if case.has_kv_cache:
            self._make_cache()
        else:
            self.key = self._normal(case.num_tokens, case.num_kv_heads)
            self.value = self._normal(case.num_tokens, case.num_kv_heads)
        self.batch = AttentionBatch.create(
            case.query_lens,
            case.seq_lens,
            block_table=self.block_table,
            block_size=case.block_size if case.causal else None,
            slot_mapping=torch.full((case.num_tokens,), -1, device="cpu")
            if case.brings_keys or case.mla is not None
            else None,
            max_decode_query_len=max(case.query_lens) if case.kind == "decode" else 1,
            device=device,
        )
        self.query_start_loc, self.seq_lens = self.batch.query_start_loc, self.batch.seq_lens

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(
            *shape if len(shape) == 3 else (*shape, self.case.head_size),
            generator=self._random,
            dtype=self.case.torch_dtype,
            device=self.device,
        )

    def _make_latent(self) -> LatentInputs:
        """Projections that give absorbed queries and expanded values a variance of 1."""
        case, dims = self.case, self.case.mla_dims
        assert dims is not None
        nope, rope, rank = dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.kv_lora_rank
        up_k = self._normal(case.num_heads, nope, rank) * nope**-0.5
        up_v = self._normal(case.num_heads, dims.v_head_dim, rank) * rank**-0.5
        return LatentInputs(
            query=self._normal(case.num_tokens, case.num_heads, nope + rope),
            kv_b_proj=torch.cat([up_k, up_v], 1).flatten(0, 1),
            kv_c=self._normal(1, case.num_tokens, rank)[0],
            k_pe=self._normal(1, case.num_tokens, rope)[0],
        )

    def _make_cache(self) -> None:
        case, dims = self.case, self.case.mla_dims
        needed = [-(-n // case.block_size) for n in case.seq_lens]
        order = torch.randperm(sum(needed), generator=self._host, device="cpu").int()
        table = torch.nn.utils.rnn.pad_sequence(list(order.split(needed)), batch_first=True)
        dtype = kv_cache_torch_dtype(
            case.kv_cache_dtype, case.torch_dtype, detect_device(self.device).arch
        )
        if is_fp8(dtype):
            largest = torch.finfo(dtype).max
            self.layer.set(_K_RANGE / largest, _V_RANGE / largest, ((),), self.device)
        self.kv_cache = self._allocate(sum(needed), dtype)
        seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32, device="cpu")
        slots = slots_of(seq_lens, seq_lens, table, case.block_size)
        for some in slots.split(_CHUNK_TOKENS):
            if dims is not None:
                sizes = [dims.kv_lora_rank, dims.qk_rope_head_dim]
                kv_c, k_pe = self._normal(len(some), 1)[:, 0].split(sizes, dim=-1)
                place = some.to(self.device)
                write_mla_cache(kv_c, k_pe, self.kv_cache, place, self.layer._k_scale)
                continue
            key = self._normal(len(some), case.num_kv_heads)
            value = self._normal(len(some), case.num_kv_heads)
            scales = (self.layer._k_scale, self.layer._v_scale)
            write_kv_cache(key, value, self.kv_cache, some.to(self.device), *scales)
        self.block_table = table.to(self.device)
        if case.brings_keys:
            self.key, self.value = self._rows(case.query_lens)

    def _allocate(self, num_blocks: int, dtype: torch.dtype) -> KVCache:
        case = self.case
        if case.kv_layout is not None:
            arch = detect_device(self.device).arch
            layout = kv_layout_named(case.kv_layout)
            found = layout.allocate(self.spec, num_blocks, self.device, arch=arch)
            self.spec = self.spec.replace(kv_strides=kv_strides_of(found))
            return found
        if case.mla is not None:
            shape: tuple[int, ...] = (num_blocks, case.block_size, case.head_size)
            return torch.zeros(shape, dtype=dtype, device=self.device)
        size = stored_head_size(case.kv_cache_dtype, case.head_size)
        shape = kv_cache_shape(num_blocks, case.block_size, case.num_kv_heads, size)
        return allocate_kv_cache(shape, STRIDE_ORDERS["NHD"], dtype, self.device)

    def keys_and_values(
        self, request: int, keys: slice, heads: slice, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of a request's keys and values as the cache holds them, scales applied.

        Args:
            request: its number.
            keys: from a multiple of block_size, to any end.
            heads: of the KV heads.
            dtype: of the result.

        Returns:
            Two of (num_keys, num_heads, head_size). Of latent attention, the entries and their
            latents: (num_keys, 1, head_size) and (num_keys, 1, kv_lora_rank).
        """
        case = self.case
        if self.kv_cache is None:
            start = self.batch.query_start_list[request]
            rows = slice(start + keys.start, start + keys.stop)
            return self.key[rows, heads].to(dtype), self.value[rows, heads].to(dtype)
        blocks = self.block_table[request, keys.start // case.block_size :]
        if case.mla is not None:
            num_keys, entry_scale = keys.stop - keys.start, self.layer._k_scale
            with_head = self.kv_cache[:, :, None]
            entries = gather_kv(with_head, blocks, num_keys, entry_scale, dtype)
            return entries, entries[..., : case.head_size_v]
        stored = view_kv_cache(self.kv_cache, case.head_size, case.head_size)
        found = []
        for part, scale in zip(stored, get_kv_scales(self.layer, self.kv_cache), strict=True):
            own = scale[:, :, heads] if has_token_scales(part.dtype) else scale
            num_keys = keys.stop - keys.start
            found.append(gather_kv(part[:, :, heads], blocks, num_keys, own, dtype))
        return found[0], found[1]

    def ragged_keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values without a cache, (sum of seq_lens, num_kv_heads, head_size) each."""
        if self.kv_cache is None:
            return self.key, self.value
        return self._rows(self.case.seq_lens)

    def _rows(self, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last keys and values of each request, this many, one request after another."""
        keys, values = [], []
        for request, (count, num_keys) in enumerate(zip(lengths, self.case.seq_lens, strict=True)):
            whole = (slice(0, num_keys), slice(None), self.case.torch_dtype)
            key, value = self.keys_and_values(request, *whole)
            keys.append(key[num_keys - count :])
            values.append(value[num_keys - count :])
        return torch.cat(keys), torch.cat(values)

    def key_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32: where each request starts in `ragged_keys_and_values`."""
        starts = [0, *itertools.accumulate(self.case.seq_lens)]
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    def empty_output(self) -> torch.Tensor:
        """An output full of NaN, so that elements that are not written show.

        (num_tokens, num_heads, head_size); of latent attention, kv_lora_rank elements for a head.
        """
        return self._empty(self.case.head_size_v)

    def empty_layer_output(self) -> torch.Tensor:
        """The same for a whole layer: of latent attention, v_head_dim elements for a head."""
        dims = self.case.mla_dims
        return self._empty(self.case.head_size_v if dims is None else dims.v_head_dim)

    def _empty(self, size: int) -> torch.Tensor:
        shape = (*self.query.shape[:2], size)
        return self.query.new_full(shape, float("nan"))


def _absorbed(latent: LatentInputs, case: Case) -> torch.Tensor:
    """(num_tokens, num_heads, head_size) queries that are compared with the cache's entries."""
    dims = case.mla_dims
    assert dims is not None
    up_k = latent.kv_b_proj.view(case.num_heads, -1, dims.kv_lora_rank)[:, : dims.qk_nope_head_dim]
    nope, rotated = latent.query.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=-1)
    absorbed = torch.bmm(nope.transpose(0, 1), up_k).transpose(0, 1)
    return torch.cat([absorbed, rotated], -1).contiguous()


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """(num_heads,) float32 on the host: the slopes of the ALiBi paper, arXiv:2108.12409.

    2^(-8/n), its square, and so on, for n heads, n a power of two; further heads have every second
    slope of 2n heads.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (num_heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
