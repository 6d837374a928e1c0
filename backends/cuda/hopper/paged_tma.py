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

__all__ = ["PageMatrix", "tma_descriptor"]

#: Columns of a box: 128 bytes, the width that shared memory swizzles.
_COLUMNS = 64
#: Rows of a box: tokens of one page, a power of two up to this.
_ROWS = 64


@dataclass(frozen=True)
class PageMatrix:
    """A cache as a matrix whose rows are the tokens of a block, one after the other.

    Attributes:
        block_size: tokens of a block.
        descriptor: of the matrix, in boxes of 16, 32 or 64 rows by 64 columns.
        block_rows, value_rows, head_rows, head_columns: rows or columns of the matrix between one
            block and the next, keys and values, one KV head and the next.
    """

    block_size: int
    descriptor: Any
    block_rows: int
    value_rows: int
    head_rows: int
    head_columns: int

    @classmethod
    def of(cls, cache: KVSource) -> PageMatrix | None:
        """The matrix; None if values are not 16-bit or strides do not meet TMA's requirements."""
        rows = math.gcd(cache.block_size, _ROWS)
        num_blocks, _, num_heads, size = cache.k.shape
        block, token, head = cache.k_strides
        values = (cache.v.data_ptr() - cache.k.data_ptr()) // cache.k.element_size()
        if rows < 16 or cache.k.element_size() != 2:
            return None
        if not (suits_tma(cache.k) and suits_tma(cache.v)):
            return None
        if block % token or values % token or values <= 0:
            return None
        head_rows, head_columns = divmod(head, token) if num_heads > 1 else (0, 0)
        columns = head_columns * (num_heads - 1) + size
        if columns > token or (head_rows and head_columns):
            return None
        block_rows, value_rows = block // token, values // token
        last = block_rows * (num_blocks - 1) + value_rows + head_rows * (num_heads - 1)
        shape = (last + cache.block_size, columns)
        if shape[0] > torch.iinfo(torch.int32).max:  # the kernel's and TMA's limit
            return None
        descriptor = tma_descriptor(cache.k, shape, token, (rows, _COLUMNS))
        return cls(cache.block_size, descriptor, block_rows, value_rows, head_rows, head_columns)


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
