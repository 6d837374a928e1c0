"""Where a block's keys, values and scales are in a cache, for libraries that move blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from attn_dispatch.arguments import as_int
from attn_dispatch.interface.quantization import has_token_scales, token_scales
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["KVRegion", "regions_of"]


@dataclass(frozen=True)
class KVRegion:
    """The bytes of one kind of content in a layer's cache: in every block, pieces of one size.

    Offsets count from the cache's first byte, `kv_cache.data_ptr()`. In block b the pieces start
    at offset + b * block_stride + i[0] * strides[0] + i[1] * strides[1] + ..., for each i with
    0 <= i[n] < counts[n].

    Attributes:
        layer: the layer that owns the cache.
        content: "key", "value", "key_scale", "value_scale", "latent" (an entry of multi-head
            latent attention), "padding" (bytes with arbitrary contents) or "block" (all of it).
        num_blocks: of the cache.
        block_stride: bytes from a block to the next one.
        offset: bytes before the first piece of block 0.
        size: bytes of a piece.
        counts: pieces along each dimension, outermost first; () for a single piece.
        strides: bytes between pieces along each dimension.
    """

    layer: str
    content: str
    num_blocks: int
    block_stride: int
    offset: int
    size: int
    counts: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    @property
    def bytes_per_block(self) -> int:
        """The bytes of this content in one block."""
        return self.size * math.prod(self.counts)

    def ranges(self, block: int) -> list[tuple[int, int]]:
        """(offset, size) in bytes of each piece in a block, in ascending order.

        Raises:
            InvalidInputError: the cache has no such block.
        """
        first = self.offset + as_int("block", block, 0, self.num_blocks - 1) * self.block_stride
        steps = (
            range(0, count * stride, stride)
            for count, stride in zip(self.counts, self.strides, strict=True)
        )
        return [(first + sum(step), self.size) for step in itertools.product(*steps)]


def regions_of(
    layer: str,
    spec: AttentionSpec,
    shape: Sequence[int],
    stride_order: Sequence[int],
    dtype: torch.dtype,
    *,
    split: bool = True,
) -> list[KVRegion]:
    """The regions of a layer's cache.

    Args:
        layer: its name.
        spec: its spec.
        shape: the logical shape of the cache, blocks first.
        stride_order: the order of the dimensions in memory.
        dtype: of the cache.
        split: False for one region with content "block".
    """
    strides = _strides(shape, stride_order, dtype.itemsize)
    if not split:
        parts = [("block", 0, 0, shape[1], shape[-1])]
    elif spec.mla is not None:
        parts = [("latent", 0, 0, shape[1], shape[-1])]
    else:
        parts = [
            (content, index, first, 1, size)
            for index, name in enumerate(("key", "value"))
            for content, first, size in _row_parts(name, spec, shape[-1], dtype)
        ]
    regions = []
    for content, index, first, length, size in parts:
        dims = zip((length, *shape[2:-1], size), strides[1:], strict=True)
        counts, steps, piece = _pieces(dims, dtype.itemsize)
        offset = index * strides[1] + first * strides[-1]
        regions.append(KVRegion(layer, content, shape[0], strides[0], offset, piece, counts, steps))
    return regions


def _strides(shape: Sequence[int], stride_order: Sequence[int], itemsize: int) -> list[int]:
    """The strides in bytes of a cache from allocate_kv_cache."""
    strides, step = [0] * len(shape), itemsize
    for dim in reversed(stride_order):
        strides[dim] = step
        step *= shape[dim]
    return strides


def _row_parts(
    name: str, spec: AttentionSpec, stored: int, dtype: torch.dtype
) -> list[tuple[str, int, int]]:
    """(content, first element, elements) of the parts of one token's row of one head."""
    used = spec.head_size if name == "key" else spec.head_size_v
    parts = [(name, 0, used)]
    if has_token_scales(dtype):
        row = torch.empty(stored, dtype=dtype, device="meta")
        scale = token_scales(row)  # only quantization.py knows where in a row it is
        itemsize = scale.element_size()
        first = int(scale.storage_offset()) * itemsize
        parts.append(("padding", used, first - used))
        parts.append((f"{name}_scale", first, itemsize))
        used = first + itemsize
    parts.append(("padding", used, stored - used))
    return [part for part in parts if part[2]]


def _pieces(
    dims: Iterable[tuple[int, int]], size: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Counts and strides of the pieces, outermost first, and their size; as few as possible.

    Args:
        dims: (length, stride in bytes) of each dimension.
        size: bytes of an element.
    """
    pieces: list[tuple[int, int]] = []
    for length, stride in sorted(dims, key=lambda dim: dim[1]):
        if length == 1:
            continue
        if not pieces and stride == size:
            size *= length
        elif pieces and stride == math.prod(pieces[-1]):
            pieces[-1] = (pieces[-1][0] * length, pieces[-1][1])
        else:
            pieces.append((length, stride))
    pieces.reverse()
    return tuple(length for length, _ in pieces), tuple(stride for _, stride in pieces), size
