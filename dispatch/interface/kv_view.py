"""KVCacheView: a paged cache of any engine, as one tensor of keys and one of values."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.overlap import overlap, overlaps_itself
from attn_dispatch.interface.tensors import check_dense, wrong_form

__all__ = [
    "KVCache",
    "KVCacheView",
    "as_kv_cache",
    "check_kv_cache",
    "fits_heads",
    "form_of",
    "keys_and_values",
    "kv_strides_of",
    "parts_of",
    "storages_of",
]

#: No kernel needs addresses to be multiples of more bytes; more would only tell caches apart.
_LARGEST_ALIGNMENT = 16


class KVCacheView:
    """Keys and values of a paged cache as two tensors, over the memory of the engine that owns it.

    Every function and layer that takes a `kv_cache` takes this, or the plain pair (key, value), in
    place of one tensor (num_blocks, 2, block_size, num_kv_heads, head_size). Nothing is copied:
    keys and values are read and written where they are.

    Args:
        key: (num_blocks, block_size, num_kv_heads, head_size), any strides but 1 in the last
            dimension. For an int8 cache the last dimension is quantization.stored_head_size.
        value: the same for values; its last dimension may have another size.

    Attributes:
        shape: (num_blocks, 2, block_size, num_kv_heads, the larger head size), as of one tensor.
        dtype, device: of both tensors.

    Raises:
        InvalidInputError: the tensors differ in dtype, device, blocks or heads; an element has two
            places, or two elements one; or the elements of a head are not contiguous.

    Example:
        >>> keys, values = torch.zeros(2, 64, 16, 8, 128).unbind(0)  # two halves of one allocation
        >>> KVCacheView(keys, values).shape
        torch.Size([64, 2, 16, 8, 128])
    """

    __slots__ = ("__weakref__", "device", "dtype", "form", "key", "shape", "storages", "value")

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, part in (("key", key), ("value", value)):
            check_dense(f"The {name} of a KVCacheView", part, meta=True)
            if part.dim() != 4:
                wanted = "(num_blocks, block_size, num_kv_heads, head_size)"
                raise wrong_form(f"The {name} of a KVCacheView", part, wanted)
            if part.shape[-1] > 1 and part.stride(-1) != 1:
                raise InvalidInputError(
                    f"The {name} of a KVCacheView has strides {part.stride()}; the elements of a "
                    "head must be contiguous, a stride of 1 in the last dimension."
                )
            if overlaps_itself(part):
                raise InvalidInputError(
                    f"The {name} of a KVCacheView overlaps itself: shape {tuple(part.shape)}, "
                    f"strides {part.stride()}. Each slot needs memory of its own."
                )
        mine, its = ((part.shape[:3], part.dtype, part.device) for part in (key, value))
        if mine != its:
            raise InvalidInputError(
                f"The key of a KVCacheView is {tuple(key.shape)} {key.dtype} on {key.device}, and "
                f"its value {tuple(value.shape)} {value.dtype} on {value.device}. Both need the "
                "same blocks, block size, heads, dtype and device."
            )
        if not key.is_meta and overlap(key, value):
            raise InvalidInputError(
                "The key and the value of a KVCacheView share memory. Give views of disjoint parts."
            )
        self.key = key
        self.value = value
        size = max(key.shape[3], value.shape[3])
        self.shape = torch.Size((key.shape[0], 2, *key.shape[1:3], size))
        self.dtype = key.dtype
        self.device = key.device
        #: What the checks of a call read, and the addresses of both allocations.
        self.form = (self.shape, self.dtype, self.device, *_memory_of(key), *_memory_of(value))
        self.storages = tuple(part.untyped_storage().data_ptr() for part in (key, value))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return (
            f"KVCacheView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"strides={self.key.stride()} and {self.value.stride()})"
        )


#: What a `kv_cache` can be: one tensor in the logical shape, with any strides, or two.
KVCache: TypeAlias = "torch.Tensor | KVCacheView"


def as_kv_cache(kv_cache: Any, name: str = "kv_cache") -> Any:
    """A cache that a caller gave; a pair (key, value) becomes a KVCacheView.

    Raises:
        InvalidInputError: a pair's tensors do not fit each other, or it is not a pair.
    """
    if not isinstance(kv_cache, (tuple, list)):
        return kv_cache
    if len(kv_cache) != 2:
        raise InvalidInputError(
            f"{name}={shown(kv_cache)} has {len(kv_cache)} members; give one tensor, or the pair "
            "(key, value)."
        )
    return KVCacheView(*kv_cache)


def check_kv_cache(name: str, kv_cache: Any, *, meta: bool = False) -> None:
    """Check that it is a cache with data; on the meta device only where `meta` allows that.

    Raises:
        InvalidInputError: it is neither a dense tensor nor a KVCacheView.
    """
    if not isinstance(kv_cache, KVCacheView):
        check_dense(name, kv_cache, "a dense torch.Tensor with data, or a KVCacheView", meta=meta)
    elif kv_cache.device.type == "meta" and not meta:
        raise InvalidInputError(f"{name} is a KVCacheView on the meta device, without data.")


def fits_heads(kv_cache: KVCache, stored: int, stored_v: int) -> bool:
    """Whether rows of a cache hold heads that take this many elements, of keys and of values.

    In one tensor all rows have the larger size. In two, each may have its own.
    """
    largest = max(stored, stored_v)
    if isinstance(kv_cache, KVCacheView):
        sizes = kv_cache.key.shape[3], kv_cache.value.shape[3]
        return sizes[0] in (stored, largest) and sizes[1] in (stored_v, largest)
    return kv_cache.shape[4] == largest


def parts_of(kv_cache: KVCache) -> tuple[torch.Tensor, ...]:
    """The tensors of a cache: itself, or keys and values."""
    if isinstance(kv_cache, KVCacheView):
        return kv_cache.key, kv_cache.value
    return (kv_cache,)


def keys_and_values(kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_blocks, block_size, num_kv_heads, size) each, of a cache that was checked."""
    if isinstance(kv_cache, KVCacheView):
        return kv_cache.key, kv_cache.value
    keys, values = kv_cache.unbind(1)
    return keys, values


def storages_of(kv_cache: KVCache) -> tuple[int, ...]:
    """The addresses of the allocations that a cache is in."""
    if isinstance(kv_cache, KVCacheView):
        return kv_cache.storages
    return (kv_cache.untyped_storage().data_ptr(),)


def form_of(kv_cache: KVCache) -> tuple[Any, ...]:
    """Shape, dtype, device, strides and alignment of a cache: what checks of a call depend on."""
    if isinstance(kv_cache, KVCacheView):
        return kv_cache.form
    return (
        kv_cache.shape,
        kv_cache.dtype,
        kv_cache.device,
        kv_cache.stride(),
        kv_cache.storage_offset() % 4,
    )


def kv_strides_of(kv_cache: KVCache) -> KVStrides | None:
    """Where a cache's keys and values are; None if it is laid out as this library does.

    Its own caches are one tensor, NHD or HND, whose blocks are each one dense piece.
    """
    if not isinstance(kv_cache, KVCacheView) and _has_dense_blocks(kv_cache):
        return None
    keys, values = keys_and_values(kv_cache)
    return KVStrides(
        key=_byte_strides(keys),
        value=_byte_strides(values),
        alignment=min(_alignment_of(keys), _alignment_of(values)),
        separate=isinstance(kv_cache, KVCacheView),
    )


def _has_dense_blocks(kv_cache: torch.Tensor) -> bool:
    if not len(kv_cache):
        return True
    block = kv_cache[0]  # the stride between blocks may be anything
    return block.is_contiguous() or block.transpose(1, 2).is_contiguous()


def _byte_strides(part: torch.Tensor) -> tuple[int, int, int]:
    size = part.element_size()
    block, token, head = (
        0 if part.shape[dim] == 1 else part.stride(dim) * size for dim in range(3)
    )
    return block, token, head


def _alignment_of(part: torch.Tensor) -> int:
    address = part.storage_offset() * part.element_size()
    if not part.is_meta:
        address = part.data_ptr()
    return int(min(address & -address, _LARGEST_ALIGNMENT)) or _LARGEST_ALIGNMENT


def _memory_of(part: torch.Tensor) -> tuple[Any, ...]:
    return part.shape, part.stride(), part.storage_offset() % 4
