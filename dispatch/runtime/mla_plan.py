"""Which requests of a batch are computed in expanded form, and the chunks of their earlier keys.

See backends/mla.py for the two forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.host_copies import pack_to_device
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import Phase

__all__ = [
    "PREFILL_WORKSPACE_BYTES",
    "ExpandedPlan",
    "KeyRanges",
    "bytes_per_key",
    "chunk_size",
    "dense_spec",
    "expanded_requests",
    "is_expanded_faster",
    "plan_expanded",
    "why_absorbed",
]

#: The default bound of what the expansion of earlier keys takes.
PREFILL_WORKSPACE_BYTES = 256 * 2**20

#: Fields that the expanded form does not compute; with them prefills are absorbed.
_ABSORBED = ("sliding_window", "window_size", "attention_chunk", "alibi", "sinks", "custom_mask",
             "bidirectional_ranges", "key_positions", "batch_invariant")  # fmt: skip


def why_absorbed(spec: AttentionSpec) -> str:
    """Why a layer's prefills cannot be expanded, as a sentence; "" if they can."""
    found = [name for name in _ABSORBED if getattr(spec, name) not in (None, False)]
    if not found:
        return ""
    return f"Prefills are absorbed: the expanded form does not compute {', '.join(found)}."


def dense_spec(spec: AttentionSpec, *, earlier: bool = False) -> AttentionSpec:
    """The layer that computes prefills in expanded form: dense attention, no paged cache.

    Args:
        spec: with mla.
        earlier: the one for the keys in the cache, which every new query sees.
    """
    assert spec.mla is not None
    return AttentionSpec(
        num_heads=spec.num_heads,
        head_size=spec.mla.qk_nope_head_dim + spec.mla.qk_rope_head_dim,
        head_size_v=spec.mla.v_head_dim,
        dtype=spec.dtype,
        causal=spec.causal and not earlier,
        logits_soft_cap=spec.logits_soft_cap,
        returns_lse=True,
    )


def bytes_per_key(spec: AttentionSpec) -> int:
    """What the expansion of one earlier key takes: its latent, its product, its key of all heads.

    The value is a part of the product. Indices take 48 bytes. A quantized latent is there twice
    more, as it is stored and in the layer's dtype before it is scaled.
    """
    mla: MLADims | None = spec.mla
    assert mla is not None
    entry = mla.kv_lora_rank + mla.qk_rope_head_dim
    product = spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    key = spec.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    quantized = 0 if spec.kv_cache_dtype == "auto" else 2 * entry
    return (entry + quantized + product + key) * spec.dtype.itemsize + 6 * torch.int64.itemsize


def chunk_size(spec: AttentionSpec, workspace_bytes: int) -> int:
    """How many earlier keys are expanded at a time.

    Raises:
        InvalidInputError: not one fits.
    """
    size = workspace_bytes // bytes_per_key(spec)
    if not size:
        raise InvalidInputError(
            f"prefill_workspace_bytes={workspace_bytes} has no room for one expanded key, which "
            f"takes {bytes_per_key(spec)} bytes. Give more, or prefill='absorbed'."
        )
    return size


def is_expanded_faster(mla: MLADims, query_len: int, num_earlier: int) -> bool:
    """Whether the expanded form of a request takes fewer multiplications than the absorbed one.

    New keys cost the same to expand as queries and outputs to absorb. An earlier key costs
    kv_lora_rank * (qk_nope_head_dim + v_head_dim) for each head to expand, and saves the difference
    of the widths for each query that sees it.
    """
    rank, rope, nope, v = (
        mla.kv_lora_rank, mla.qk_rope_head_dim, mla.qk_nope_head_dim, mla.v_head_dim,
    )  # fmt: skip
    saved = (2 * rank + rope) - (nope + rope + v)
    return num_earlier * rank * (nope + v) < query_len * (num_earlier + query_len / 2) * saved


@dataclass
class KeyRanges:
    """Keys of consecutive requests, a range of positions of each, and the batch that attends to
    them.

    Attributes:
        rows: of query, among those of the plan.
        batch: of the dense layer: these requests' queries and these keys.
        on_device: (3, num_requests) the first position, where the keys start in the chunk, and how
            many there are.
        num_keys: of all requests.
        table: their rows of the block table.
    """

    rows: slice
    batch: AttentionBatch
    on_device: tuple[torch.Tensor, ...]
    num_keys: int
    table: torch.Tensor
    _places: tuple[int, torch.Tensor, torch.Tensor] | None = None
    _metadata: dict[Any, Any] = field(default_factory=dict)

    def places(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The block and the offset in it of each key, (num_keys,) int64; kept for other layers."""
        if self._places is None or self._places[0] != block_size:
            firsts, starts, lens = self.on_device
            device = firsts.device
            owner = torch.repeat_interleave(
                torch.arange(len(lens), device=device), lens, output_size=self.num_keys
            )
            positions = torch.arange(self.num_keys, device=device) + (firsts - starts)[owner]
            blocks = self.table[owner, positions // block_size].long()
            self._places = (block_size, blocks, positions % block_size)
        return self._places[1:]

    def metadata_for(self, layer: Any) -> Any:
        """The dense layer's metadata, made once for all layers with its backends."""
        key = layer._require_binding().metadata_key
        found = self._metadata.get(key)
        if found is None:
            found = layer.build_metadata(self.batch)
            # Under the key of the backends that built it; a failure may have replaced the others.
            self._metadata[layer._require_binding().metadata_key] = found
        return found


@dataclass
class ExpandedPlan:
    """The dense attention of requests in expanded form.

    Attributes:
        new: each request's new keys.
        earlier: chunks of the keys before them, each of up to the workspace's size.
    """

    new: KeyRanges
    earlier: list[KeyRanges]


def _ranges(
    batch: AttentionBatch, first: int, firsts: Sequence[int], lens: Sequence[int]
) -> KeyRanges:
    """The ranges of the requests from `first` on."""
    device = batch.seq_lens.device
    end = first + len(lens)
    key_lens = torch.tensor(lens, dtype=torch.int64, device="cpu")
    starts = key_lens.cumsum(0) - key_lens
    positions = torch.tensor(firsts, dtype=torch.int64, device="cpu")
    dense = AttentionBatch.create(
        batch.query_lens[first:end], list(lens), key_lens=list(lens), device=device
    )
    assert batch.block_table is not None
    return KeyRanges(
        slice(batch.query_start_list[first], batch.query_start_list[end]),
        dense,
        tuple(pack_to_device(device, positions, starts, key_lens)),
        sum(lens),
        batch.block_table[first:end],
    )


def plan_expanded(batch: AttentionBatch, chunk: int) -> ExpandedPlan:
    """Plan requests in expanded form, with chunks of at most this many earlier keys."""
    query_lens, seq_lens = batch.query_lens, batch.seq_lens_list
    earlier = [seq - query for seq, query in zip(seq_lens, query_lens, strict=True)]
    new = _ranges(batch, 0, earlier, query_lens)
    chunks: list[KeyRanges] = []
    room, begin, firsts, lens = chunk, 0, list[int](), list[int]()
    for request, total in enumerate(earlier):
        done = 0
        while True:
            if not lens:
                begin = request
            taken = min(room, total - done)
            firsts.append(done)
            lens.append(taken)
            done, room = done + taken, room - taken
            if room and done == total:
                break
            chunks.append(_ranges(batch, begin, firsts, lens))
            room, firsts, lens = chunk, [], []
            if done == total:
                break
    if any(lens):
        chunks.append(_ranges(batch, begin, firsts, lens))
    return ExpandedPlan(new, chunks)


def expanded_requests(batch: AttentionBatch, mla: MLADims, *, always: bool) -> list[int]:
    """The requests of a batch that are computed in expanded form.

    Args:
        batch: any.
        mla: the sizes.
        always: every prefill, and not only those that take fewer multiplications so.
    """
    if batch.lengths != "exact" or batch.key_positions is not None or batch.block_table is None:
        return []
    lens = zip(batch.phases, batch.query_lens, batch.seq_lens_list, strict=True)
    return [
        index
        for index, (phase, query, seq) in enumerate(lens)
        if phase is Phase.PREFILL
        and query
        and (always or is_expanded_faster(mla, query, seq - query))
    ]
