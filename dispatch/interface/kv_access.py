"""Reading and writing the rows of a paged KV cache."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch

from attn_dispatch import environment
from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.contents import check_slots
from attn_dispatch.interface.kv_cache import split_token_scales, view_kv_cache
from attn_dispatch.interface.kv_view import (
    KVCache,
    KVCacheView,
    as_kv_cache,
    check_kv_cache,
    fits_heads,
    parts_of,
)
from attn_dispatch.interface.overlap import check_no_inference, overlap, overlaps_itself
from attn_dispatch.interface.quantization import (
    as_indexable_bytes,
    dequantize,
    dequantize_rows,
    has_token_scales,
    is_fp8,
    quantize,
    quantize_rows,
    stored_head_size,
)
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD
from attn_dispatch.interface.tensors import INTEGERS, check_dense, wrong_form

__all__ = ["gather_kv", "read_kv_cache", "write_kv_cache", "write_mla_cache"]


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: KVCache | tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> None:
    """Store new keys and values in their slots; rows with slot −1 are skipped.

    Args:
        key: (num_tokens, num_kv_heads, head_size).
        value: (num_tokens, num_kv_heads, head_size_v).
        kv_cache: in the logical shape, any layout; or a KVCacheView, or its pair. Written.
        slot_mapping: (num_tokens,) int64; a slot is block * block_size + offset.
        k_scale: a number, or () or (num_kv_heads,) float32; used where the cache is fp8. An int8
            cache gets a scale with each row that is written.
        v_scale: the same for values.

    Raises:
        InvalidInputError: an argument does not fit, and nothing has been written. Slots on a
            device are read only under ATTN_DISPATCH_CHECK=1.
    """
    cache: KVCache = as_kv_cache(kv_cache)
    check_kv_cache("kv_cache", cache)
    is_int8 = has_token_scales(cache.dtype)
    is_cache = len(cache.shape) == 5 and cache.shape[1] == 2
    if not is_cache or not (cache.dtype.is_floating_point or is_int8):
        wanted = "(num_blocks, 2, block_size, num_kv_heads, head_size), floating point or int8"
        raise wrong_form("kv_cache", cache, wanted)
    heads = int(cache.shape[3])
    for name, rows in (("key", key), ("value", value)):
        _check_rows(name, rows, 3, cache)
        if rows.shape[1] != heads or not rows.shape[2]:
            raise wrong_form(name, rows, f"(num_tokens, {heads}, head_size) for this cache")
    form = INT8_PER_TOKEN_HEAD if is_int8 else "auto"
    stored = [stored_head_size(form, rows.shape[2]) for rows in (key, value)]
    if not fits_heads(cache, *stored):
        found = " and ".join(str(part.shape[-1]) for part in parts_of(cache))
        raise InvalidInputError(
            f"kv_cache has heads of {found} elements; key and value, of "
            f"{key.shape[2]} and {value.shape[2]}, take {max(stored)}."
        )
    if len(key) != len(value) or key.dtype != value.dtype:
        raise InvalidInputError(
            f"key has {len(key)} rows of {key.dtype} and value {len(value)} of {value.dtype}. Give "
            "both for the same tokens, in one dtype."
        )
    if is_int8:
        split_token_scales(cache)
    k_scale = _checked_scale("k_scale", k_scale, ((), (heads,)), cache)
    v_scale = _checked_scale("v_scale", v_scale, ((), (heads,)), cache)
    num_slots = cache.shape[0] * cache.shape[2]
    _check_written(cache, slot_mapping, num_slots, key=key, value=value)
    write_rows(key, value, cache, slot_mapping.long(), k_scale, v_scale)


def write_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: KVCache,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """The same for arguments that were checked."""
    keys, values = view_kv_cache(kv_cache, key.shape[-1], value.shape[-1])
    if has_token_scales(kv_cache.dtype):
        k_scale, v_scale = split_token_scales(kv_cache)
    if not len(slot_mapping):
        return
    places = _places_of(slot_mapping, keys.shape[1])
    _scatter(key, keys, places, k_scale)
    _scatter(value, values, places, v_scale)


def write_mla_cache(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Store new latents in their slots; rows with slot −1 are skipped.

    Args:
        kv_c_normed: (num_tokens, kv_lora_rank).
        k_pe: (num_tokens, qk_rope_head_dim).
        kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), written.
        slot_mapping: (num_tokens,) int64.
        scale: a number or () float32; used where the cache is fp8.

    Raises:
        InvalidInputError: as for write_kv_cache; or the cache is int8, whose rows have no place
            for a scale here.
    """
    check_dense("kv_cache", kv_cache)
    if has_token_scales(kv_cache.dtype):
        raise InvalidInputError(
            "A cache of latents cannot be int8. Give it the layer's dtype, or an fp8 type."
        )
    if kv_cache.dim() != 3 or not kv_cache.dtype.is_floating_point:
        wanted = "(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), floating point"
        raise wrong_form("kv_cache", kv_cache, wanted)
    new = {"kv_c_normed": kv_c_normed, "k_pe": k_pe}
    for name, rows in new.items():
        _check_rows(name, rows, 2, kv_cache)
    if (
        len(kv_c_normed) != len(k_pe)
        or kv_c_normed.dtype != k_pe.dtype
        or kv_c_normed.shape[1] + k_pe.shape[1] != kv_cache.shape[2]
    ):
        raise InvalidInputError(
            f"kv_c_normed is {tuple(kv_c_normed.shape)} {kv_c_normed.dtype} and k_pe "
            f"{tuple(k_pe.shape)} {k_pe.dtype}; a cache with entries of {kv_cache.shape[2]} takes "
            "both for the same tokens, in one dtype, with this many elements together."
        )
    scale = _checked_scale("scale", scale, ((),), kv_cache)
    _check_written(kv_cache, slot_mapping, kv_cache.shape[0] * kv_cache.shape[1], **new)
    if not len(slot_mapping):
        return
    latents = torch.cat([kv_c_normed, k_pe], dim=-1)
    places = _places_of(slot_mapping.long(), kv_cache.shape[1])
    _scatter(latents[:, None], kv_cache[:, :, None], places, scale)


def _check_rows(name: str, rows: torch.Tensor, rank: int, kv_cache: KVCache) -> None:
    check_dense(name, rows)
    is_number = rows.dtype.is_floating_point and rows.dtype.itemsize > 1
    if rows.dim() != rank or not is_number or rows.device != kv_cache.device:
        wanted = f"floating point of 16 bits or more with {rank} dimensions on {kv_cache.device}"
        raise wrong_form(name, rows, wanted)


def _check_written(
    kv_cache: KVCache, slot_mapping: torch.Tensor, num_slots: int, **new: torch.Tensor
) -> None:
    """Check where new rows go: the slots, and that the cache can be written."""
    num_rows = len(next(iter(new.values())))
    check_dense("slot_mapping", slot_mapping)
    is_integer, on_device = slot_mapping.dtype in INTEGERS, slot_mapping.device == kv_cache.device
    if slot_mapping.shape != (num_rows,) or not is_integer or not on_device:
        wanted = f"({num_rows},) int64 on {kv_cache.device}"
        raise wrong_form("slot_mapping", slot_mapping, wanted, "−1 is for a row without a slot.")
    check_writable("kv_cache", kv_cache)
    for name, tensor in new.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InvalidInputError(
                f"{name} requires grad, and a cache keeps no gradients. Write to it inside of "
                "torch.inference_mode() or torch.no_grad()."
            )
        if any(overlap(tensor, part) for part in parts_of(kv_cache)):
            raise InvalidInputError(
                f"{name} shares memory with kv_cache. Give {name} memory of its own."
            )
    if kv_cache.device.type == "cpu" or environment.check_mode():
        check_slots(slot_mapping, num_slots)


def check_writable(name: str, kv_cache: KVCache) -> None:
    """Check that PyTorch lets a cache be written, element by element."""
    for part in parts_of(kv_cache):
        if torch.is_grad_enabled() and part.requires_grad:
            raise InvalidInputError(f"{name} requires grad; a cache is written without autograd.")
        check_no_inference(**{name: part})
    if not isinstance(kv_cache, KVCacheView) and overlaps_itself(kv_cache):
        raise InvalidInputError(
            f"{name} overlaps itself: shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}. "
            "Each slot needs memory of its own; make the cache by allocate_kv_cache."
        )


def _checked_scale(
    name: str, scale: Any, shapes: tuple[tuple[int, ...], ...], kv_cache: KVCache
) -> torch.Tensor:
    """A scale of a cache as a float32 tensor; one on a device is not read."""
    if not isinstance(scale, torch.Tensor):
        is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
        try:
            value = float(scale) if is_number else 0.0
        except OverflowError:
            value = math.inf
        if not 0 < value < math.inf:
            raise InvalidInputError(
                f"{name}={shown(scale)} is not a finite number above 0, nor a tensor."
            )
        return torch.full((), value, dtype=torch.float32, device=kv_cache.device)
    check_dense(name, scale)
    is_float32 = scale.dtype == torch.float32
    if tuple(scale.shape) not in shapes or not is_float32 or scale.device != kv_cache.device:
        wanted = f"{' or '.join(map(str, shapes))} torch.float32 on {kv_cache.device}"
        raise wrong_form(name, scale, wanted)
    if scale.device.type == "cpu" and not bool((scale.isfinite() & (scale > 0)).all()):
        raise InvalidInputError(f"{name} is {scale.tolist()}; scales are finite and above 0.")
    return scale


class _Places(NamedTuple):
    """Where new rows go.

    Attributes:
        rows: which of the new rows are stored; None for all, in their order.
        blocks, offsets: of each of these.
        is_stored: on a device, whether a row has a slot; else what is there is written again.
    """

    rows: torch.Tensor | None
    blocks: torch.Tensor
    offsets: torch.Tensor
    is_stored: torch.Tensor | None


def _places_of(slots: torch.Tensor, block_size: int) -> _Places:
    """The places of (num_tokens,) int64 slots; there is at least one."""
    if slots.device.type == "cpu":
        rows = None
        if int(slots.min()) < 0:
            rows = (slots >= 0).nonzero().squeeze(1)
            slots = slots[rows]
        return _Places(rows, slots // block_size, slots % block_size, None)
    # To leave rows out would wait for the device. A row without a slot repeats the first row
    # with one; if there is none, what is in slot 0 is written there again.
    has_slot = slots >= 0
    index = torch.arange(len(slots), device=slots.device)
    rows = torch.where(has_slot, index, has_slot.int().argmax())
    slots = slots[rows]
    is_stored, slots = slots >= 0, slots.clamp(min=0)
    return _Places(rows, slots // block_size, slots % block_size, is_stored)


def _scatter(new: torch.Tensor, cache: torch.Tensor, at: _Places, scale: torch.Tensor) -> None:
    """Write (num_tokens, heads, size) rows into a (num_blocks, block_size, heads, size) view.

    The scales of an int8 cache, (num_blocks, block_size, heads), are written too.
    """
    if at.rows is not None:
        new = new[at.rows]

    def store(target: torch.Tensor, content: torch.Tensor) -> None:
        if at.is_stored is not None:
            kept = at.is_stored.view(-1, *[1] * (content.dim() - 1))
            content = torch.where(kept, content, target[at.blocks, at.offsets])
        target[at.blocks, at.offsets] = content

    if has_token_scales(cache.dtype):
        integers, scales = quantize_rows(new)
        store(cache, integers)
        store(scale, scales)
        return
    stored = (
        quantize(new, _per_head(scale), cache.dtype) if is_fp8(cache.dtype) else new.to(cache.dtype)
    )
    store(as_indexable_bytes(cache), as_indexable_bytes(stored))


def read_kv_cache(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Entries of one view of `view_kv_cache`, as they are stored.

    A view of a whole int8 cache, `kv_cache[:, 0]`, gives rows with their scale in them, which
    quantization.token_scales finds, and is read faster than only the integers.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        blocks: any shape, int64; the block of each entry.
        offsets: the same shape; its place in the block.

    Returns:
        (*blocks.shape, num_kv_heads, size), dtype of the cache.

    Raises:
        InvalidInputError: an argument has another shape or dtype, or blocks or offsets on the host
            are out of range.
    """
    _check_places(cache, blocks, offsets)
    return read_rows(cache, blocks, offsets)


def _check_places(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
    for name, tensor in (("cache", cache), ("blocks", blocks), ("offsets", offsets)):
        check_dense(name, tensor)
    if cache.dim() != 4 or blocks.shape != offsets.shape:
        raise InvalidInputError(
            f"cache has shape {tuple(cache.shape)}, blocks {tuple(blocks.shape)} and offsets "
            f"{tuple(offsets.shape)}. Give a view of view_kv_cache, (num_blocks, block_size, "
            "num_kv_heads, size), and a block and an offset for each entry."
        )
    for name, tensor, limit in (
        ("blocks", blocks, cache.shape[0]),
        ("offsets", offsets, cache.shape[1]),
    ):
        if tensor.dtype != torch.int64 or tensor.device != cache.device:
            raise wrong_form(name, tensor, f"int64 on {cache.device}")
        if tensor.device.type == "cpu" and tensor.numel():
            least, most = (int(end) for end in tensor.aminmax())
            if least < 0 or most >= limit:
                raise InvalidInputError(
                    f"{name} go from {least} to {most}, and the cache has {limit} of them."
                )


def read_rows(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same for arguments that were checked."""
    stored, num_heads, size = as_indexable_bytes(cache), cache.shape[2], cache.shape[3]
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
    """One request's entries of a view of `view_kv_cache`, times their scale if they have 8 bits.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        block_table_row: (max_blocks,) the request's blocks.
        seq_len: how many entries.
        scale: that of `get_kv_scales`: () or (num_kv_heads,) float32, or those in an int8 cache.
        dtype: of the result.

    Returns:
        (seq_len, num_kv_heads, size)

    Raises:
        InvalidInputError: an argument does not fit, the row has too few blocks or, on the host,
            one that does not exist; or the cache is int8 and the scale is not its own.
    """
    for name, tensor in (("cache", cache), ("block_table_row", block_table_row)):
        check_dense(name, tensor)
    seq_len = as_int("seq_len", seq_len, 0)
    if cache.dim() != 4 or block_table_row.dim() != 1 or block_table_row.dtype not in INTEGERS:
        raise InvalidInputError(
            f"cache has shape {tuple(cache.shape)}, and block_table_row is "
            f"{tuple(block_table_row.shape)} {block_table_row.dtype}. Give a view of "
            "view_kv_cache, and (max_blocks,) int32 or int64."
        )
    if seq_len > len(block_table_row) * cache.shape[1]:
        raise InvalidInputError(
            f"block_table_row has {len(block_table_row)} blocks of {cache.shape[1]} tokens, too "
            f"few for {seq_len} entries."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(f"dtype={shown(dtype)} is not a floating-point torch.dtype.")
    positions = torch.arange(seq_len, device=cache.device)
    blocks = block_table_row.long()[positions // cache.shape[1]]
    offsets = positions % cache.shape[1]
    _check_places(cache, blocks, offsets)
    if has_token_scales(cache.dtype) or is_fp8(cache.dtype):
        check_dense("scale", scale)
    stored = read_rows(cache, blocks, offsets)
    if has_token_scales(cache.dtype):
        if scale.shape != cache.shape[:-1]:
            raise InvalidInputError(
                f"An int8 cache of {tuple(cache.shape)} has a scale for each token and head, not "
                f"one of shape {tuple(scale.shape)}. Take the scales of kv_cache.get_kv_scales."
            )
        return dequantize_rows(stored, scale[blocks, offsets], dtype)
    if is_fp8(cache.dtype):
        _checked_scale("scale", scale, ((), (cache.shape[2],)), cache)
        return dequantize(stored, _per_head(scale), dtype)
    return stored.to(dtype)


def _per_head(scale: torch.Tensor) -> torch.Tensor:
    """A scale shaped to multiply (..., heads, size)."""
    return scale[:, None] if scale.dim() else scale
