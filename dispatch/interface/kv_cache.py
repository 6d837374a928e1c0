"""The paged KV cache that all backends share: its shape, its layout, and views of its parts.

Logically a cache is (num_blocks, 2, block_size, num_kv_heads, head_size), keys at index 0 and
values at 1 of the second dimension; multi-head latent attention's is (num_blocks, block_size,
kv_lora_rank + qk_rope_head_dim). A block is one contiguous piece of memory in either layout.
Where key and value heads differ in size, a head takes the larger of the two. A head of an int8
cache takes more, because its scale is stored after it: see quantization.stored_head_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.arguments import INT64_MAX, as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, KVCacheView, keys_and_values
from attn_dispatch.interface.quantization import token_scales
from attn_dispatch.platforms.detect import usable_device

__all__ = [
    "STRIDE_ORDERS",
    "allocate_kv_cache",
    "kv_cache_shape",
    "layout_of",
    "view_kv_cache",
    "split_token_scales",
]

#: The order of the logical dimensions in memory: tokens before heads, or heads before tokens.
STRIDE_ORDERS: dict[str, tuple[int, ...]] = {"NHD": (0, 1, 2, 3, 4), "HND": (0, 1, 3, 2, 4)}


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
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
        InvalidInputError: an argument has another type or is out of range, or the host lacks
            memory. On a GPU that is PyTorch's OutOfMemoryError.
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
            "fewer blocks; KVCachePlan.num_blocks is the number that fits."
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
        raise  # engines handle it
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


def view_kv_cache(
    kv_cache: KVCache, head_size: int, head_size_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values, (num_blocks, block_size, num_kv_heads, their head size).

    Of an int8 cache they are the integers; `split_token_scales` returns the scales.

    Raises:
        InvalidInputError: the cache has another shape, or smaller heads.
    """
    cause: Exception | None = None
    try:  # on every layer's call, so an error is explained only after it happened
        keys, values = keys_and_values(kv_cache)
        fits = keys.dim() == 4 and 0 < head_size <= keys.shape[-1]
        if fits and 0 < head_size_v <= values.shape[-1]:
            return keys[..., :head_size], values[..., :head_size_v]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        cause = error
    is_cache = isinstance(kv_cache, (torch.Tensor, KVCacheView))
    found = tuple(kv_cache.shape) if is_cache else shown(kv_cache)
    raise InvalidInputError(
        f"kv_cache is {found} and cannot be split into heads of {shown(head_size)} and "
        f"{shown(head_size_v)} elements. A cache is (num_blocks, 2, block_size, num_kv_heads, "
        "head_size), with heads of the larger size or more, or a KVCacheView."
    ) from cause


def split_token_scales(kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the scales in an int8 cache, of keys and of values.

    Args:
        kv_cache: in the logical shape, any layout, or a KVCacheView; int8.

    Returns:
        (num_blocks, block_size, num_kv_heads) float32 each, over the cache's own memory.

    Raises:
        InvalidInputError: the cache is not int8, or float32 scales cannot be read from it.
    """
    cause: Exception | None = None
    try:  # as in view_kv_cache
        if kv_cache.dtype == torch.int8 and len(kv_cache.shape) == 5:
            keys, values = (token_scales(part) for part in keys_and_values(kv_cache))
            return keys, values
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        cause = error
    found = shown(kv_cache)
    if isinstance(kv_cache, (torch.Tensor, KVCacheView)):
        found = f"{tuple(kv_cache.shape)} {kv_cache.dtype}"
    raise InvalidInputError(
        f"kv_cache is {found}; scales are in an int8 cache, (num_blocks, 2, block_size, "
        "num_kv_heads, stored_head_size), in rows without gaps whose sizes and addresses are "
        "multiples of 4 bytes. Make the cache by allocate_kv_cache."
    ) from cause
