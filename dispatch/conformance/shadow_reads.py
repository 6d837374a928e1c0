"""What the shadow check reads of a call: its cache, its backends, and the reference's result."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.kv_view import KVCache, KVCacheView, parts_of
from attn_dispatch.interface.quantization import as_indexable_bytes
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_impl import MLABuilder, MLAMetadata
from attn_dispatch.runtime.mla_layer import MLAAttention
from attn_dispatch.runtime.routing import RoutedMetadata

__all__ = ["backend_of", "by_reference", "cached_of", "copy_of_blocks"]


def copy_of_blocks(kv_cache: KVCache, batch: AttentionBatch) -> tuple[KVCache, AttentionBatch]:
    """A cache of only the blocks that the batch uses, and the batch with their new places."""
    table, slots = batch.block_table, batch.slot_mapping
    if table is None:
        raise InvalidInputError("The batch has no block_table. Give it one to use a cache.")
    if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 3:  # of latents
        parts: tuple[torch.Tensor, ...] = (kv_cache,)
        block_size = kv_cache.shape[1]
    else:
        parts, block_size = parts_of(kv_cache), kv_cache.shape[2]
    lens = batch.seq_lens.to(table.device)
    columns = torch.arange(table.shape[1], device=table.device)
    used = columns * block_size < lens[:, None]
    stored = used.new_zeros(0) if slots is None else slots >= 0
    own = table[used].long()
    new = own[:0] if slots is None else slots[stored]
    blocks, places = torch.cat([own, new // block_size]).unique(return_inverse=True)
    table = torch.zeros_like(table).masked_scatter(used, places[: len(own)].to(table.dtype))
    if slots is not None:
        moved = places[len(own) :] * block_size + new % block_size
        slots = slots.masked_scatter(stored, moved)
    copies = [as_indexable_bytes(part)[blocks].view(part.dtype) for part in parts]
    copy = KVCacheView(*copies) if isinstance(kv_cache, KVCacheView) else copies[0]
    return copy, dataclasses.replace(batch, block_table=table, slot_mapping=slots)


def cached_of(
    layer: Attention, kv_cache: KVCache, batch: AttentionBatch, request: int
) -> tuple[torch.Tensor, ...]:
    """What a cache holds of a request, scales applied, float64 on the CPU.

    Returns:
        Keys and values, (seq_len, num_kv_heads, size) each; of latent attention only the entries,
        (seq_len, kv_lora_rank + qk_rope_head_dim).
    """
    spec = layer.spec
    assert batch.block_table is not None
    blocks, seq_len = batch.block_table[request], int(batch.seq_lens[request])
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    if spec.mla is not None:
        assert isinstance(kv_cache, torch.Tensor)
        entries = gather_kv(kv_cache[:, :, None], blocks, seq_len, layer._k_scale, dtype)
        return (entries[:, 0].cpu().double(),)
    views = view_kv_cache(kv_cache, spec.head_size, spec.head_size_v)
    scales = get_kv_scales(layer, kv_cache)
    return tuple(
        gather_kv(view, blocks, seq_len, scale, dtype).cpu().double()
        for view, scale in zip(views, scales, strict=True)
    )


def backend_of(layer: Attention, metadata: Any, batch: AttentionBatch, request: int) -> str:
    """The backend that computed a request of a call with this metadata."""
    phase = batch.phases[request]
    if isinstance(metadata, MLAMetadata):
        dense = layer.prefill_selection if isinstance(layer, MLAAttention) else None
        if dense is not None and request in _expanded(metadata, batch):
            return dense.name
        metadata = metadata.absorbed
    if isinstance(metadata, RoutedMetadata):
        return next(part.backend for part in metadata.parts if part.phase in (None, phase))
    return next(iter(layer.selections.values())).name


def _expanded(metadata: MLAMetadata, batch: AttentionBatch) -> list[int]:
    builder = metadata.builder
    assert isinstance(builder, MLABuilder)
    return [] if metadata.expanded is None else builder.expanded_requests(batch)


def by_reference(
    layer: Attention,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    batch: AttentionBatch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse) of a call by the reference, which writes to only this cache."""
    spec = layer.spec.replace(output_quant=None, returns_lse=True, cuda_graph=False)
    reference: type[AttentionBackend] = ReferenceBackend
    if spec.mla is not None:
        reference, spec = ReferenceMLABackend, spec.replace(batch_invariant=False)
    impl = reference.make_impl(spec, **layer._impl_arguments())
    metadata = reference.make_builder(spec, query.device).build(batch)
    found = impl.forward(layer, query, key, value, kv_cache, metadata)
    assert isinstance(found, tuple)
    return found
