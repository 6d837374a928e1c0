"""The paged cache as TMA reads it for decodes: one matrix, in which a page is a block of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.triton.operands import KVSource
from attn_dispatch.platforms.libraries import import_library

__all__ = ["PageMatrix", "PagedTma", "box_columns", "page_problem", "tma_descriptor"]

#: Columns of a box, at most: 128 bytes, the width that shared memory swizzles.
_COLUMNS = 64
#: Rows of a box: tokens of one page, a power of two from the first to the second.
_MIN_ROWS, _ROWS = 16, 64


def box_columns(size: int) -> int:
    """Columns of the boxes in which a head of this size is loaded."""
    return math.gcd(size, _COLUMNS)


def page_problem(
    block_size: int,
    num_heads: int,
    row_bytes: int,
    element_bytes: int,
    strides: Sequence[int],
    address: int,
) -> str:
    """What keeps TMA from reading pages as rows of a matrix, as a sentence; "" if it can.

    Args:
        block_size: tokens of a page.
        num_heads: KV heads.
        row_bytes: of the elements of a head.
        element_bytes: of one of them.
        strides: (block, token, head), in bytes; 0 where there is only one.
        address: of the first element, or a power of two that divides it.
    """
    if element_bytes != 2:
        return f"it reads elements of 16 bits, and these have {8 * element_bytes}"
    if math.gcd(block_size, _ROWS) < _MIN_ROWS:
        return f"it reads blocks of a multiple of {_MIN_ROWS} tokens, and these have {block_size}"
    block, token, head = strides
    if any(number % 16 for number in (*strides, address)):
        return "it reads heads that begin at multiples of 16 bytes"
    if block % token:
        return (
            f"it reads blocks that are a multiple of the stride of tokens apart: {block} is none "
            f"of {token} bytes"
        )
    rows, rest = divmod(head, token)
    if (rows and rest) or rest * (num_heads - 1) + row_bytes > token:
        return (
            "it reads heads within the stride of tokens, or multiples of it apart: "
            f"{num_heads} heads, {head} bytes apart, do not fit {token} bytes"
        )
    return ""


@dataclass(frozen=True)
class PageMatrix:
    """Keys or values of a cache as a matrix: its rows are tokens of a block, one after the other.

    Attributes:
        descriptor: of the matrix, in boxes of 16, 32 or 64 rows by 32 or 64 columns.
        block_rows, head_rows, head_columns: rows or columns of the matrix between one block and the
            next, and one KV head and the next.
    """

    descriptor: Any
    block_rows: int
    head_rows: int
    head_columns: int

    @property
    def steps(self) -> tuple[int, int, int]:
        """(block_rows, head_rows, head_columns), as the kernels take them."""
        return self.block_rows, self.head_rows, self.head_columns

    @classmethod
    def of(cls, part: torch.Tensor, max_rows: int = _ROWS) -> PageMatrix | None:
        """The matrix of (num_blocks, block_size, num_kv_heads, head_size); see `PagedTma.of`.

        Boxes have at most max_rows rows.
        """
        num_blocks, block_size, num_heads, size = part.shape
        width, steps = part.element_size(), part.stride()[:3]
        block, token, head = (0 if part.shape[dim] == 1 else steps[dim] for dim in range(3))
        strides, address = (block * width, token * width, head * width), part.data_ptr()
        if not part.numel() or part.stride(3) != 1:
            return None
        if page_problem(block_size, num_heads, size * width, width, strides, address):
            return None
        head_rows, head_columns = divmod(head, token)
        block_rows = block // token
        last = block_rows * (num_blocks - 1) + head_rows * (num_heads - 1)
        shape = (last + block_size, head_columns * (num_heads - 1) + size)
        if shape[0] > torch.iinfo(torch.int32).max:  # the kernel's and TMA's limit
            return None
        descriptor = tma_descriptor(
            part, shape, (token,), (math.gcd(block_size, max_rows), box_columns(size))
        )
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
    tensor: Any, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> Any:
    """A TMA descriptor of 16-bit values whose rows are contiguous, loaded in boxes.

    Args:
        tensor: only `data_ptr()` and `dtype` are used.
        shape, box: of the tensor, and of a load.
        strides: of all dimensions but the last, in elements.
    """
    descriptor_cls, layout = _in_boxes(*box[-2:], rank=len(box))
    return descriptor_cls(tensor, [*shape], [*strides, 1], [*box], layout)


@functools.cache
def _in_boxes(rows: int, columns: int, rank: int) -> tuple[Any, Any]:
    gluon = import_library("triton.experimental.gluon.language")
    hopper = import_library("triton.experimental.gluon.nvidia.hopper")
    width = min(columns, _COLUMNS)
    layout = gluon.NVMMASharedLayout(swizzle_byte_width=2 * width, element_bitwidth=16, rank=rank)
    return hopper.TensorDescriptor, layout
