"""The paged KV cache that all backends share: shape, layout, writing, reading, moving blocks.

Logically a cache is (num_blocks, 2, block_size, num_kv_heads, head_size), keys at index 0 and
values at 1 of the second dimension; multi-head latent attention's is (num_blocks, block_size,
kv_lora_rank + qk_rope_head_dim). A block is one contiguous piece of memory in either layout.
Where key and value heads differ in size, a head takes the larger of the two. A head of an int8
cache takes more, since its scale stands beside it: quantization.stored_head_size says how much.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch import environment
from attn_dispatch.aliases import groups_of
from attn_dispatch.arguments import INT64_MAX, as_int, shown
from attn_dispatch.contents import check_slots
from attn_dispatch.device import usable_device
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.overlap import overlap, overlaps_itself
from attn_dispatch.quantization import (
    dequantize,
    dequantize_rows,
    has_token_scales,
    indexable,
    is_fp8,
    quantize,
    quantize_rows,
    stored_head_size,
    token_scales,
)
from attn_dispatch.spec import INT8_PER_TOKEN_HEAD

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
    "layout_of",
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

_INTEGERS = (torch.int32, torch.int64)


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

    Raises:
        InvalidInputError: an argument is no integer, or out of range.
    """
    return (
        as_int("num_blocks", num_blocks, 0),
        2,
        as_int("block_size", block_size, 1),
        as_int("num_kv_heads", num_kv_heads, 1),
        as_int("head_size", head_size, 1),
    )


def layout_of(kv_cache: torch.Tensor) -> str | None:
    """The layout that a cache has in memory, one of STRIDE_ORDERS; None if both or neither."""
    _, _, tokens, heads, _ = kv_cache.shape
    _, _, by_token, by_head, _ = kv_cache.stride()
    if tokens == 1 or heads == 1:
        return None
    if by_token >= heads * by_head:
        return "NHD"
    return "HND" if by_head >= tokens * by_token else None


def allocate_kv_cache(
    shape: Sequence[int],
    stride_order: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = "cpu",
) -> torch.Tensor:
    """A zeroed cache of this logical shape, contiguous in the physical order.

    Args:
        shape: as a backend's get_kv_cache_shape gives it.
        stride_order: as its get_kv_cache_stride_order gives it.
        dtype: of its elements.
        device: where; None for the default device.

    Raises:
        InvalidInputError: an argument is of another type or out of range, or the host has not
            this much memory. On a GPU that is PyTorch's OutOfMemoryError.
    """
    sizes = [as_int(f"shape[{dim}]", size, 0) for dim, size in enumerate(_listed("shape", shape))]
    order = [as_int("stride_order", dim, 0) for dim in _listed("stride_order", stride_order)]
    if not sizes or sorted(order) != list(range(len(sizes))):
        raise InvalidInputError(
            f"stride_order={shown(order)} does not name each of the {len(sizes)} dimensions of the "
            "shape once. Take a backend's get_kv_cache_stride_order, or one of STRIDE_ORDERS."
        )
    if not isinstance(dtype, torch.dtype) or dtype.is_complex or dtype == torch.bool:
        raise InvalidInputError(
            f"dtype={shown(dtype)} is not a real torch.dtype. Take that of kv_cache_torch_dtype."
        )
    num_bytes = math.prod(sizes) * dtype.itemsize
    if num_bytes > INT64_MAX:
        raise InvalidInputError(
            f"A cache of shape {shown(tuple(sizes))} and {dtype} is larger than any memory. Give "
            "fewer blocks: KVCachePlan.num_blocks says how many fit."
        )
    device = usable_device(device)
    physical = [sizes[dim] for dim in order]
    inverse = [order.index(dim) for dim in range(len(sizes))]
    try:
        # Bytes, because not every device has an fp8 fill.
        memory = torch.zeros(
            *physical[:-1], physical[-1] * dtype.itemsize, dtype=torch.uint8, device=device
        )
    except torch.OutOfMemoryError:
        raise  # engines know it
    except RuntimeError as error:
        raise InvalidInputError(
            f"A cache of {num_bytes} bytes cannot be allocated on {device}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return memory.view(dtype).permute(inverse)


def _listed(name: str, values: Any) -> list[Any]:
    """A sequence of integers as a list."""
    if isinstance(values, (str, torch.Tensor)) or not isinstance(values, Sequence):
        raise InvalidInputError(f"{name}={shown(values)} is not a sequence of integers.")
    return list(values)


def split_kv_cache(
    kv_cache: torch.Tensor, head_size: int, head_size_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values, (num_blocks, block_size, num_kv_heads, their head size).

    Of an int8 cache they are the integers alone; `split_token_scales` has the scales.

    Raises:
        InvalidInputError: the cache has another shape, or smaller heads.
    """
    try:  # every layer's call goes through here: what is wrong is found out afterwards
        keys, values = kv_cache.unbind(1)
        fits = keys.dim() == 4 and 0 < head_size <= keys.shape[-1]
        if fits and 0 < head_size_v <= keys.shape[-1]:
            return keys[..., :head_size], values[..., :head_size_v]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _cannot_be_split(kv_cache, head_size, head_size_v) from error
    raise _cannot_be_split(kv_cache, head_size, head_size_v)


def _cannot_be_split(kv_cache: Any, head_size: Any, head_size_v: Any) -> InvalidInputError:
    found = tuple(kv_cache.shape) if isinstance(kv_cache, torch.Tensor) else shown(kv_cache)
    return InvalidInputError(
        f"kv_cache is {found} and cannot be split into heads of {shown(head_size)} and "
        f"{shown(head_size_v)} elements. A cache is (num_blocks, 2, block_size, num_kv_heads, "
        "head_size), with heads of the larger size or more."
    )


def split_token_scales(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the scales in an int8 cache, of keys and of values.

    Args:
        kv_cache: in the logical shape, any layout, int8.

    Returns:
        (num_blocks, block_size, num_kv_heads) float32 each, over the cache's own memory.

    Raises:
        InvalidInputError: the cache is not int8, or float32 scales cannot be read from it.
    """
    try:  # as in split_kv_cache
        if kv_cache.dtype == torch.int8 and kv_cache.dim() == 5:
            keys, values = token_scales(kv_cache).unbind(1)
            return keys, values
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _has_no_scales(kv_cache) from error
    raise _has_no_scales(kv_cache)


def _has_no_scales(kv_cache: Any) -> InvalidInputError:
    found = shown(kv_cache)
    if isinstance(kv_cache, torch.Tensor):
        found = f"{tuple(kv_cache.shape)} {kv_cache.dtype}"
    return InvalidInputError(
        f"kv_cache is {found}; scales are in an int8 cache, (num_blocks, 2, block_size, "
        "num_kv_heads, stored_head_size), in rows without gaps whose sizes and addresses are "
        "multiples of 4 bytes. Make the cache by allocate_kv_cache."
    )


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
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> None:
    """Store new keys and values in their slots; what has slot −1 is skipped.

    Args:
        key: (num_tokens, num_kv_heads, head_size).
        value: (num_tokens, num_kv_heads, head_size_v).
        kv_cache: in the logical shape, any layout, written.
        slot_mapping: (num_tokens,) int64; a slot is block * block_size + offset.
        k_scale: a number, or () or (num_kv_heads,) float32; used where the cache is fp8. An int8
            cache gets a scale with each row that is written.
        v_scale: the same for values.

    Raises:
        InvalidInputError: an argument does not fit, and nothing has been written. What slots on a
            device hold is not checked unless under ATTN_DISPATCH_CHECK=1.
    """
    _check_cache("kv_cache", kv_cache)
    heads = int(kv_cache.shape[3])
    for name, rows in (("key", key), ("value", value)):
        _check_rows(name, rows, 3, kv_cache)
        if rows.shape[1] != heads or not rows.shape[2]:
            raise InvalidInputError(
                f"{name} has shape {tuple(rows.shape)}; a cache of {heads} heads takes "
                f"(num_tokens, {heads}, head_size)."
            )
    size = max(key.shape[2], value.shape[2])
    is_int8 = has_token_scales(kv_cache.dtype)
    stored = stored_head_size(INT8_PER_TOKEN_HEAD, size) if is_int8 else size
    if kv_cache.shape[4] != stored:
        raise InvalidInputError(
            f"kv_cache has heads of {kv_cache.shape[4]} elements; key and value, of "
            f"{key.shape[2]} and {value.shape[2]}, take {stored}."
        )
    if len(key) != len(value) or key.dtype != value.dtype:
        raise InvalidInputError(
            f"key has {len(key)} rows of {key.dtype} and value {len(value)} of {value.dtype}. Give "
            "both for the same tokens, in one dtype."
        )
    if is_int8:
        split_token_scales(kv_cache)
    k_scale = _checked_scale("k_scale", k_scale, ((), (heads,)), kv_cache)
    v_scale = _checked_scale("v_scale", v_scale, ((), (heads,)), kv_cache)
    num_slots = kv_cache.shape[0] * kv_cache.shape[2]
    _check_written(kv_cache, slot_mapping, num_slots, key=key, value=value)
    _write_kv_cache(key, value, kv_cache, slot_mapping.long(), k_scale, v_scale)


def _write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """The same for arguments that were checked."""
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
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Store new latents in their slots; what has slot −1 is skipped.

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
    _check_tensor("kv_cache", kv_cache)
    if has_token_scales(kv_cache.dtype):
        raise InvalidInputError(
            "A cache of latents cannot be int8. Give it the layer's dtype, or an fp8 type."
        )
    if kv_cache.dim() != 3 or not kv_cache.dtype.is_floating_point:
        raise InvalidInputError(
            f"kv_cache is {tuple(kv_cache.shape)} {kv_cache.dtype}; a cache of latents is "
            "(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), floating point."
        )
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
    latents = torch.cat([kv_c_normed, k_pe], dim=-1)
    _scatter(latents[:, None], kv_cache[:, :, None], slot_mapping.long(), scale)


def _check_tensor(name: str, value: object) -> None:
    """Check that it is a tensor with memory of its own."""
    if not isinstance(value, torch.Tensor):
        raise InvalidInputError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor.")
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        raise InvalidInputError(
            f"{name} is sparse, nested or on the meta device; it must be a dense tensor with data."
        )


def _check_cache(name: str, kv_cache: object) -> None:
    """Check that it is a cache in the logical shape, of a type that caches have."""
    _check_tensor(name, kv_cache)
    assert isinstance(kv_cache, torch.Tensor)
    if kv_cache.dim() != 5 or kv_cache.shape[1] != 2:
        raise InvalidInputError(
            f"{name} has shape {tuple(kv_cache.shape)}; a cache is "
            "(num_blocks, 2, block_size, num_kv_heads, head_size)."
        )
    if not (kv_cache.dtype.is_floating_point or has_token_scales(kv_cache.dtype)):
        raise InvalidInputError(
            f"{name} is {kv_cache.dtype}; it must be a floating-point type, or torch.int8 with a "
            "scale for each token and head."
        )


def _check_rows(name: str, rows: object, rank: int, kv_cache: torch.Tensor) -> None:
    """Check new rows of a cache: dimensions, dtype and device."""
    _check_tensor(name, rows)
    assert isinstance(rows, torch.Tensor)
    is_number = rows.dtype.is_floating_point and rows.dtype.itemsize > 1
    if rows.dim() != rank or not is_number or rows.device != kv_cache.device:
        raise InvalidInputError(
            f"{name} is {tuple(rows.shape)} {rows.dtype} on {rows.device}; it must have {rank} "
            f"dimensions, be floating point of 16 bits or more, and on {kv_cache.device}, where "
            "the cache is."
        )


def _check_written(
    kv_cache: torch.Tensor, slot_mapping: object, num_slots: int, **new: torch.Tensor
) -> None:
    """Check where new rows go: the slots, and that the cache can be written."""
    rows = next(iter(new.values()))
    _check_tensor("slot_mapping", slot_mapping)
    assert isinstance(slot_mapping, torch.Tensor)
    if (
        slot_mapping.shape != (len(rows),)
        or slot_mapping.dtype not in _INTEGERS
        or slot_mapping.device != kv_cache.device
    ):
        raise InvalidInputError(
            f"slot_mapping is {tuple(slot_mapping.shape)} {slot_mapping.dtype} on "
            f"{slot_mapping.device}; it must be ({len(rows)},) int64 on {kv_cache.device}: a slot "
            "for each row, or −1 for one that is not written."
        )
    _check_writable("kv_cache", kv_cache)
    for name, tensor in new.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InvalidInputError(
                f"{name} requires grad, and a cache keeps no gradients. Write to it inside of "
                "torch.inference_mode() or torch.no_grad()."
            )
        if overlap(tensor, kv_cache):
            raise InvalidInputError(
                f"{name} shares memory with kv_cache. Give {name} memory of its own."
            )
    if kv_cache.device.type == "cpu" or environment.check_mode():
        check_slots(slot_mapping, num_slots)


def _check_writable(name: str, kv_cache: torch.Tensor) -> None:
    """Check that PyTorch lets a cache be written, element by element."""
    if torch.is_grad_enabled() and kv_cache.requires_grad:
        raise InvalidInputError(f"{name} requires grad; a cache is written without autograd.")
    if kv_cache.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidInputError(
            f"{name} was created under torch.inference_mode(), and this call is outside of it, "
            "where such a tensor cannot be written. Call under torch.inference_mode(), or make "
            f"{name} outside."
        )
    if overlaps_itself(kv_cache):
        raise InvalidInputError(
            f"{name} overlaps itself: shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}. "
            "Each slot needs memory of its own; make the cache by allocate_kv_cache."
        )


def _checked_scale(
    name: str, scale: Any, shapes: tuple[tuple[int, ...], ...], kv_cache: torch.Tensor
) -> torch.Tensor:
    """A scale of a cache as a float32 tensor; a tensor on a device is not read."""
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
        return torch.tensor(value, dtype=torch.float32, device=kv_cache.device)
    _check_tensor(name, scale)
    if (
        tuple(scale.shape) not in shapes
        or scale.dtype != torch.float32
        or scale.device != kv_cache.device
    ):
        raise InvalidInputError(
            f"{name} is {tuple(scale.shape)} {scale.dtype} on {scale.device}; it must be "
            f"{' or '.join(map(str, shapes))} torch.float32 on {kv_cache.device}."
        )
    if scale.device.type == "cpu" and not bool((scale.isfinite() & (scale > 0)).all()):
        raise InvalidInputError(f"{name} is {scale.tolist()}; scales are finite and above 0.")
    return scale


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
    _write_kv_cache(key[:rows], value[:rows], kv_cache, slots, layer._k_scale, layer._v_scale)


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

    Raises:
        InvalidInputError: an argument has another shape or dtype, or blocks or offsets on the host
            are out of range.
    """
    _check_places(cache, blocks, offsets)
    return _read_kv_cache(cache, blocks, offsets)


def _check_places(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
    for name, tensor in (("cache", cache), ("blocks", blocks), ("offsets", offsets)):
        _check_tensor(name, tensor)
    if cache.dim() != 4 or blocks.shape != offsets.shape:
        raise InvalidInputError(
            f"cache has shape {tuple(cache.shape)}, blocks {tuple(blocks.shape)} and offsets "
            f"{tuple(offsets.shape)}. Give a view of split_kv_cache, (num_blocks, block_size, "
            "num_kv_heads, size), and a block and an offset for each entry."
        )
    for name, tensor, limit in (
        ("blocks", blocks, cache.shape[0]),
        ("offsets", offsets, cache.shape[1]),
    ):
        if tensor.dtype != torch.int64 or tensor.device != cache.device:
            raise InvalidInputError(
                f"{name} are {tensor.dtype} on {tensor.device}; they must be int64 on "
                f"{cache.device}, where the cache is."
            )
        if tensor.device.type == "cpu" and tensor.numel():
            least, most = (int(end) for end in tensor.aminmax())
            if least < 0 or most >= limit:
                raise InvalidInputError(
                    f"{name} go from {least} to {most}, and the cache has {limit} of them."
                )


def _read_kv_cache(
    cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The same for arguments that were checked."""
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
        InvalidInputError: an argument does not fit, the row has too few blocks or on the host one
            that does not exist; or the cache is int8, and the scale is not the cache's own.
    """
    for name, tensor in (("cache", cache), ("block_table_row", block_table_row)):
        _check_tensor(name, tensor)
    seq_len = as_int("seq_len", seq_len, 0)
    if cache.dim() != 4 or block_table_row.dim() != 1 or block_table_row.dtype not in _INTEGERS:
        raise InvalidInputError(
            f"cache has shape {tuple(cache.shape)}, and block_table_row is "
            f"{tuple(block_table_row.shape)} {block_table_row.dtype}. Give a view of "
            "split_kv_cache, and (max_blocks,) int32 or int64."
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
        _check_tensor("scale", scale)
    stored = _read_kv_cache(cache, blocks, offsets)
    if has_token_scales(cache.dtype):
        if scale.shape != cache.shape[:-1]:
            raise InvalidInputError(
                f"An int8 cache of {tuple(cache.shape)} has a scale for each token and head, not "
                f"one of shape {tuple(scale.shape)}. Take the scales of kv_cache.kv_scales_of."
            )
        return dequantize_rows(stored, scale[blocks, offsets], dtype)
    if is_fp8(cache.dtype):
        _checked_scale("scale", scale, ((), (cache.shape[2],)), cache)
        return dequantize(stored, _per_head(scale), dtype)
    return stored.to(dtype)


def _per_head(scale: torch.Tensor) -> torch.Tensor:
    """A scale shaped to multiply (..., heads, size)."""
    return scale[:, None] if scale.dim() else scale


def copy_blocks(kv_caches: Iterable[torch.Tensor], src_to_dists: torch.Tensor) -> None:
    """Copy blocks within each cache: for a prefix that requests share, say.

    All sources are read before anything is written, so pairs may overlap. Caches may share memory,
    as those of layers that share one: each pair is applied once to each piece of memory.

    Args:
        kv_caches: one cache for each layer.
        src_to_dists: (num_pairs, 2) integers: source block and destination block.

    Raises:
        InvalidInputError: the caches cannot be written, or a block of one overlaps another block
            of another; the pairs are not such a tensor, or name blocks that do not exist. Nothing
            has been written then. Pairs on a device are not read unless under
            ATTN_DISPATCH_CHECK=1.
    """
    if isinstance(kv_caches, (str, Mapping, torch.Tensor)) or not isinstance(kv_caches, Iterable):
        raise InvalidInputError(
            f"kv_caches is a {type(kv_caches).__name__}; it must be a list of caches."
        )
    caches = list(kv_caches)
    for index, kv_cache in enumerate(caches):
        _check_blocks(f"kv_caches[{index}]", kv_cache)
        _check_writable(f"kv_caches[{index}]", kv_cache)
    for fewest in sorted({len(kv_cache) for kv_cache in caches})[:1]:
        _check_pairs(src_to_dists, fewest, fewest)
    for group in groups_of(caches):
        together = [caches[index] for index in group]
        found = [_take(kv_cache, src_to_dists) for kv_cache in together]
        for kv_cache, blocks in zip(together, found, strict=True):
            _put(kv_cache, src_to_dists, blocks)


def swap_blocks(
    src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor
) -> None:
    """Copy blocks from one cache to another, on the same device or not (to the host and back).

    All sources are read before anything is written: both may be the same cache, or share memory.

    Args:
        src_kv_cache: read.
        dst_kv_cache: written; the same shape but for num_blocks, and the same dtype.
        src_to_dst: (num_pairs, 2) integers: block of src and block of dst.

    Raises:
        InvalidInputError: caches or pairs do not fit; nothing has been written then.
    """
    _check_blocks("src_kv_cache", src_kv_cache)
    _check_blocks("dst_kv_cache", dst_kv_cache)
    if src_kv_cache.shape[1:] != dst_kv_cache.shape[1:] or src_kv_cache.dtype != dst_kv_cache.dtype:
        raise InvalidInputError(
            f"Blocks of {tuple(src_kv_cache.shape[1:])} {src_kv_cache.dtype} do not fit into a "
            f"cache with blocks of {tuple(dst_kv_cache.shape[1:])} {dst_kv_cache.dtype}. Both "
            "caches must come from the same plan."
        )
    _check_writable("dst_kv_cache", dst_kv_cache)
    _check_pairs(src_to_dst, len(src_kv_cache), len(dst_kv_cache))
    _put(dst_kv_cache, src_to_dst, _take(src_kv_cache, src_to_dst))


def _check_blocks(name: str, kv_cache: object) -> None:
    """Check that it is a cache of blocks, of keys and values or of latents."""
    _check_tensor(name, kv_cache)
    assert isinstance(kv_cache, torch.Tensor)
    if kv_cache.dim() < 2 or kv_cache.is_complex() or kv_cache.is_quantized:
        raise InvalidInputError(
            f"{name} is {tuple(kv_cache.shape)} {kv_cache.dtype}; a cache has its blocks along the "
            "first dimension and what they hold along others."
        )


def _check_pairs(pairs: object, num_sources: int, num_destinations: int) -> None:
    _check_tensor("The pairs of blocks", pairs)
    assert isinstance(pairs, torch.Tensor)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in _INTEGERS:
        raise InvalidInputError(
            f"Pairs of blocks have shape {tuple(pairs.shape)} and dtype {pairs.dtype}; give "
            "(num_pairs, 2) of int32 or int64: source and destination."
        )
    if not len(pairs) or (pairs.device.type != "cpu" and not environment.check_mode()):
        return  # reading them would wait for the device
    sources, destinations = pairs[:, 0], pairs[:, 1]
    for name, blocks, limit in (
        ("source", sources, num_sources),
        ("destination", destinations, num_destinations),
    ):
        if int(blocks.min()) < 0 or int(blocks.max()) >= limit:
            raise InvalidInputError(
                f"A {name} block is out of range: blocks go from {int(blocks.min())} to "
                f"{int(blocks.max())}, and the cache has {limit}."
            )
    if len(destinations.unique()) != len(destinations):
        raise InvalidInputError("A destination block is named twice; its content would be chance.")


def _take(kv_cache: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """A copy of the source blocks."""
    return indexable(kv_cache)[pairs[:, 0].to(kv_cache.device, torch.int64)]


def _put(kv_cache: torch.Tensor, pairs: torch.Tensor, blocks: torch.Tensor) -> None:
    """Write the destination blocks."""
    destinations = pairs[:, 1].to(kv_cache.device, torch.int64)
    indexable(kv_cache)[destinations] = blocks.to(kv_cache.device)
