"""The paged KV cache that all backends share: shape, layout, writing, reading, moving blocks.

Logically a cache is (num_blocks, 2, block_size, num_kv_heads, head_size), keys at index 0 and
values at 1 of the second dimension; multi-head latent attention's is (num_blocks, block_size,
kv_lora_rank + qk_rope_head_dim). A block is one contiguous piece of memory in either layout.
Where key and value heads differ in size, a head takes the larger of the two. A head of an int8
cache takes more, since its scale stands beside it: quantization.stored_head_size says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.quantization import (
    dequantize,
    dequantize_rows,
    has_token_scales,
    indexable,
    is_fp8,
    quantize,
    quantize_rows,
    token_scales,
)

if TYPE_CHECKING:
    from attn_dispatch.batch import AttentionBatch
    from attn_dispatch.interface import AttentionImpl, AttentionLayer

__all__ = [
    "STRIDE_ORDERS",
    "allocate_kv_cache",
    "copy_blocks",
    "gather_kv",
    "kv_cache_shape",
    "kv_scales_of",
    "read_kv_cache",
    "split_kv_cache",
    "split_token_scales",
    "swap_blocks",
    "write_kv_cache",
    "write_mla_cache",
    "write_new_kv",
]

#: The order of the logical dimensions in memory: tokens before heads, or heads before tokens.
STRIDE_ORDERS: dict[str, tuple[int, ...]] = {"NHD": (0, 1, 2, 3, 4), "HND": (0, 1, 3, 2, 4)}


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, int, int, int, int]:
    """The logical shape of a cache.

    Args:
        num_blocks: blocks.
        block_size: tokens per block.
        num_kv_heads: key and value heads.
        head_size: of a stored head: quantization.stored_head_size of the larger of key's and
            value's, which is that larger size itself but for int8.
    """
    return num_blocks, 2, block_size, num_kv_heads, head_size


def allocate_kv_cache(
    shape: Sequence[int],
    stride_order: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A zeroed cache of this logical shape, contiguous in the physical order.

    Args:
        shape: as a backend's get_kv_cache_shape gives it.
        stride_order: as its get_kv_cache_stride_order gives it.
        dtype: of its elements.
        device: where.
    """
    physical = [shape[dim] for dim in stride_order]
    inverse = [list(stride_order).index(dim) for dim in range(len(shape))]
    # Bytes, because not every device has an fp8 fill.
    memory = torch.zeros(
        *physical[:-1], physical[-1] * dtype.itemsize, dtype=torch.uint8, device=device
    )
    return memory.view(dtype).permute(inverse)


def split_kv_cache(
    kv_cache: torch.Tensor, head_size: int, head_size_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values, (num_blocks, block_size, num_kv_heads, their head size).

    Of an int8 cache they are the integers alone; `split_token_scales` has the scales.
    """
    keys, values = kv_cache.unbind(1)
    return keys[..., :head_size], values[..., :head_size_v]


def split_token_scales(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the scales in an int8 cache, of keys and of values.

    Args:
        kv_cache: in the logical shape, any layout, int8.

    Returns:
        (num_blocks, block_size, num_kv_heads) float32 each, over the cache's own memory.
    """
    keys, values = token_scales(kv_cache).unbind(1)
    return keys, values


def kv_scales_of(
    layer: AttentionLayer, kv_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of keys and values, as `gather_kv` takes them.

    Those in the cache if it is int8, else those of the layer: () or (num_kv_heads,) float32.
    """
    if has_token_scales(kv_cache.dtype):
        return split_token_scales(kv_cache)
    return layer._k_scale, layer._v_scale


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store new keys and values in their slots; what has slot −1 is skipped.

    Args:
        key: (num_tokens, num_kv_heads, head_size).
        value: (num_tokens, num_kv_heads, head_size_v).
        kv_cache: in the logical shape, any layout, written.
        slot_mapping: (num_tokens,) int64; a slot is block * block_size + offset.
        k_scale: () or (num_kv_heads,) float32; used where the cache is fp8. An int8 cache gets
            a scale with each row that is written.
        v_scale: the same for values.
    """
    keys, values = split_kv_cache(kv_cache, key.shape[-1], value.shape[-1])
    if has_token_scales(kv_cache.dtype):
        k_scale, v_scale = split_token_scales(kv_cache)
    _scatter(key, keys, slot_mapping, k_scale)
    _scatter(value, values, slot_mapping, v_scale)


def write_mla_cache(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Store new latents in their slots; what has slot −1 is skipped.

    Args:
        kv_c_normed: (num_tokens, kv_lora_rank).
        k_pe: (num_tokens, qk_rope_head_dim).
        kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), written.
        slot_mapping: (num_tokens,) int64.
        scale: () float32; used where the cache is fp8.

    Raises:
        InvalidInputError: the cache is int8, whose rows have no place for a scale here.
    """
    if has_token_scales(kv_cache.dtype):
        raise InvalidInputError(
            "A cache of latents cannot be int8. Give it the layer's dtype, or an fp8 type."
        )
    latents = torch.cat([kv_c_normed, k_pe], dim=-1)
    _scatter(latents[:, None], kv_cache[:, :, None], slot_mapping, scale)


def _scatter(
    new: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor
) -> None:
    """Write (num_tokens, heads, size) rows into a (num_blocks, block_size, heads, size) view.

    Of an int8 cache, `scale` are its own, (num_blocks, block_size, heads), and written too.
    """
    kept = (slots >= 0).nonzero().squeeze(1)
    slots, new = slots[kept], new[kept]
    blocks, offsets = slots // cache.shape[1], slots % cache.shape[1]
    if has_token_scales(cache.dtype):
        cache[blocks, offsets], scale[blocks, offsets] = quantize_rows(new)
        return
    stored = (
        quantize(new, _per_head(scale), cache.dtype) if is_fp8(cache.dtype) else new.to(cache.dtype)
    )
    indexable(cache)[blocks, offsets] = indexable(stored)


def write_new_kv(
    impl: AttentionImpl[Any],
    layer: AttentionLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """Store a batch's new keys and values, unless the layer shares another's cache.

    The arguments are those of AttentionImpl.forward, checked by validation.check_forward.
    """
    if impl.kv_sharing_target_layer_name is not None:
        return
    slots = batch.slot_mapping
    assert slots is not None  # check_forward saw to it
    rows = len(slots)
    write_kv_cache(key[:rows], value[:rows], kv_cache, slots, layer._k_scale, layer._v_scale)


def read_kv_cache(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Entries of one view of `split_kv_cache`, as they are stored.

    A view of a whole int8 cache, `kv_cache[:, 0]`, gives rows with their scale in them, which
    quantization.token_scales finds, and is read faster than the integers alone.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        blocks: any shape, int64; the block of each entry.
        offsets: the same shape; its place in the block.

    Returns:
        (*blocks.shape, num_kv_heads, size), dtype of the cache.
    """
    stored, num_heads, size = indexable(cache), cache.shape[2], cache.shape[3]
    by_block, by_offset, by_head, by_element = stored.stride()
    row = num_heads * size if by_head == size else size
    if by_element != 1 or by_block % row or by_offset % row or (row == size and by_head % row):
        return stored[blocks, offsets].view(cache.dtype)
    # Whole rows by one index: several times faster on a CPU than indexing by block and offset.
    index = blocks * (by_block // row) + offsets * (by_offset // row)
    if row == size:
        heads = torch.arange(num_heads, device=index.device) * (by_head // row)
        index = index[..., None] + heads
    last = sum((n - 1) * stride for n, stride in zip(stored.shape, stored.stride(), strict=True))
    rows = stored.as_strided(((last + 1) // row, row), (row, 1)).index_select(0, index.flatten())
    return rows.view(cache.dtype).view(*blocks.shape, num_heads, size)


def gather_kv(
    cache: torch.Tensor,
    block_table_row: torch.Tensor,
    seq_len: int,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One request's entries of one view of `split_kv_cache`, times their scale if it has 8 bits.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        block_table_row: (max_blocks,) the request's blocks.
        seq_len: how many entries.
        scale: that of `kv_scales_of`: () or (num_kv_heads,) float32, or those in an int8 cache.
        dtype: of the result.

    Returns:
        (seq_len, num_kv_heads, size)

    Raises:
        InvalidInputError: the cache is int8, and the scale is not the cache's own.
    """
    positions = torch.arange(seq_len, device=cache.device)
    blocks = block_table_row.long()[positions // cache.shape[1]]
    offsets = positions % cache.shape[1]
    stored = read_kv_cache(cache, blocks, offsets)
    if has_token_scales(cache.dtype):
        if scale.shape != cache.shape[:-1]:
            raise InvalidInputError(
                f"An int8 cache of {tuple(cache.shape)} has a scale for each token and head, not "
                f"one of shape {tuple(scale.shape)}. Take the scales of kv_cache.kv_scales_of."
            )
        return dequantize_rows(stored, scale[blocks, offsets], dtype)
    if is_fp8(cache.dtype):
        return dequantize(stored, _per_head(scale), dtype)
    return stored.to(dtype)


def _per_head(scale: torch.Tensor) -> torch.Tensor:
    """A scale shaped to multiply (..., heads, size)."""
    return scale[:, None] if scale.dim() else scale


def copy_blocks(kv_caches: Sequence[torch.Tensor], src_to_dists: torch.Tensor) -> None:
    """Copy blocks within each cache: for a prefix that requests share, say.

    All sources are read before anything is written, so pairs may overlap.

    Args:
        kv_caches: one cache for each layer.
        src_to_dists: (num_pairs, 2) integers: source block and destination block.

    Raises:
        InvalidInputError: the pairs are not such a tensor, or name blocks that do not exist.
    """
    for kv_cache in kv_caches:
        _check_pairs(src_to_dists, kv_cache, kv_cache)
    for kv_cache in kv_caches:
        _move(kv_cache, kv_cache, src_to_dists)


def swap_blocks(
    src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor
) -> None:
    """Copy blocks from one cache to another, on the same device or not (to the host and back).

    Args:
        src_kv_cache: read.
        dst_kv_cache: written; the same shape but for num_blocks, and the same dtype.
        src_to_dst: (num_pairs, 2) integers: block of src and block of dst.

    Raises:
        InvalidInputError: caches or pairs do not fit; nothing has been written then.
    """
    if src_kv_cache.shape[1:] != dst_kv_cache.shape[1:] or src_kv_cache.dtype != dst_kv_cache.dtype:
        raise InvalidInputError(
            f"Blocks of {tuple(src_kv_cache.shape[1:])} {src_kv_cache.dtype} do not fit into a "
            f"cache with blocks of {tuple(dst_kv_cache.shape[1:])} {dst_kv_cache.dtype}. Both "
            "caches must come from the same plan."
        )
    _check_pairs(src_to_dst, src_kv_cache, dst_kv_cache)
    _move(src_kv_cache, dst_kv_cache, src_to_dst)


def _check_pairs(pairs: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(
            f"Pairs of blocks have shape {tuple(pairs.shape)} and dtype {pairs.dtype}; give "
            "(num_pairs, 2) of int32 or int64: source and destination."
        )
    if pairs.device.type != "cpu" or not len(pairs):
        return  # reading them would wait for the device
    sources, destinations = pairs[:, 0], pairs[:, 1]
    for name, blocks, limit in (
        ("source", sources, src.shape[0]),
        ("destination", destinations, dst.shape[0]),
    ):
        if int(blocks.min()) < 0 or int(blocks.max()) >= limit:
            raise InvalidInputError(
                f"A {name} block is out of range: blocks go from {int(blocks.min())} to "
                f"{int(blocks.max())}, and the cache has {limit}."
            )
    if len(destinations.unique()) != len(destinations):
        raise InvalidInputError("A destination block is named twice; its content would be chance.")


def _move(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    sources = pairs[:, 0].to(src.device, torch.int64)
    destinations = pairs[:, 1].to(dst.device, torch.int64)
    indexable(dst)[destinations] = indexable(src)[sources].to(dst.device)
