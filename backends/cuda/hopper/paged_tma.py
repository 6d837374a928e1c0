"""The paged cache as TMA reads it for decodes: one matrix, in which a page is a block of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.triton.operands import KVSource, suits_tma
from attn_dispatch.platforms.libraries import import_library

__all__ = ["PageMatrix", "PagedTma", "tma_descriptor"]

#: Columns of a box: 128 bytes, the width that shared memory swizzles.
_COLUMNS = 64
#: Rows of a box: tokens of one page, a power of two up to this.
_ROWS = 64


@dataclass(frozen=True)
class PageMatrix:
    """Keys or values of a cache as a matrix: its rows are tokens of a block, one after the other.

    Attributes:
        descriptor: of the matrix, in boxes of 16, 32 or 64 rows by 64 columns.
        block_rows, head_rows, head_columns: rows or columns of the matrix between one block and the
            next, and one KV head and the next.
    """

    descriptor: Any
    block_rows: int
    head_rows: int
    head_columns: int

    @classmethod
    def of(cls, part: torch.Tensor) -> PageMatrix | None:
        """The matrix of (num_blocks, block_size, num_kv_heads, head_size); see `PagedTma.of`."""
        num_blocks, block_size, num_heads, size = part.shape
        rows = math.gcd(block_size, _ROWS)
        block, token, head = part.stride()[:3]
        if rows < 16 or part.element_size() != 2 or not suits_tma(part) or block % token:
            return None
        head_rows, head_columns = divmod(head, token) if num_heads > 1 else (0, 0)
        columns = head_columns * (num_heads - 1) + size
        if columns > token or (head_rows and head_columns):
            return None
        block_rows = block // token
        last = block_rows * (num_blocks - 1) + head_rows * (num_heads - 1)
        shape = (last + block_size, columns)
        if shape[0] > torch.iinfo(torch.int32).max:  # the kernel's and TMA's limit
            return None
        descriptor = tma_descriptor(part, shape, token, (rows, _COLUMNS))
        return cls(descriptor, block_rows, head_rows, head_columns)


@dataclass(frozen=True)
class PagedTma:
    """A cache as the decode kernel reads it: a matrix of keys, and one of values.

    Attributes:
        block_size: tokens of a block.
        keys, values: the matrices; in one tensor they overlap, and begin at different addresses.
    """

    block_size: int
    keys: PageMatrix
    values: PageMatrix

    @classmethod
    def of(cls, cache: KVSource) -> PagedTma | None:
        """The matrices; None if values are not 16-bit or strides do not meet TMA's requirements."""
        keys, values = PageMatrix.of(cache.k), PageMatrix.of(cache.v)
        if keys is None or values is None:
            return None
        return cls(cache.block_size, keys, values)


def tma_descriptor(
    tensor: torch.Tensor, shape: Sequence[int], row_stride: int, box: tuple[int, int]
) -> Any:
    """A TMA descriptor of 16-bit values as a matrix of contiguous rows, loaded in boxes."""
    descriptor_cls, layout = _in_boxes(*box)
    return descriptor_cls(tensor, [*shape], [row_stride, 1], [*box], layout)


@functools.cache
def _in_boxes(rows: int, columns: int) -> tuple[Any, Any]:
    gluon = import_library("triton.experimental.gluon.language")
    hopper = import_library("triton.experimental.gluon.nvidia.hopper")
    # The layout depends only on the width of the element type.
    layout = gluon.NVMMASharedLayout.get_default_for([rows, columns], gluon.float16)
    return hopper.TensorDescriptor, layout
