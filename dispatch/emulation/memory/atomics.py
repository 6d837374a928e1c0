"""Atomic operations of many lanes on one array of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.numerics import from_bfloat16, to_bfloat16
from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.memory.access import Bytes

__all__ = ["ATOMIC_OPERATIONS", "apply_atomic"]

_Unsigned = NDArray[np.unsignedinteger[Any]]
_Operation = Callable[[_Unsigned, _Unsigned, _Unsigned], _Unsigned]


def apply_atomic(
    memory: Bytes,
    operation: str,
    starts: NDArray[np.int64],
    operand: NDArray[np.uint32],
    compare: NDArray[np.uint32] | None,
    size: int,
) -> NDArray[np.uint32]:
    """Apply an atomic operation lane by lane, in the order of the lanes.

    Lanes with different starts do not affect each other, so each pass applies one lane per start.

    Args:
        memory: changed in place.
        operation: one of `ATOMIC_OPERATIONS`.
        starts: int64 (k,), within bounds and multiples of size.
        operand: uint32 (words, k).
        compare: uint32 (words, k), what "cmpswap" expects in memory.
        size: 4 or 8 bytes.

    Returns:
        What each lane found in memory, uint32 (words, k).

    Raises:
        EmulationError: unknown operation, or one that does not exist in this size.
    """
    function = _function(operation, size)
    if operation == "cmpswap" and compare is None:
        raise EmulationError('The atomic operation "cmpswap" needs the values to compare with.')
    source = _join(operand, size)
    expected = source if compare is None else _join(compare, size)
    view, index = memory.views[size], starts >> (2 if size == 4 else 3)
    found = np.empty_like(source)
    for lanes in _passes(index):
        old = view[index[lanes]]
        found[lanes] = old
        view[index[lanes]] = function(old, source[lanes], expected[lanes])
    rows: NDArray[np.uint32] = found.view(np.uint32).reshape(starts.size, size // 4)
    return np.ascontiguousarray(rows.T)


def _passes(index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Lanes cut into passes without duplicates; a later lane is in a later pass."""
    if not index.size:
        return []
    order = np.argsort(index, kind="stable")
    position = np.arange(index.size)
    first = np.concatenate([[True], np.diff(index[order]) != 0])
    rank = position - np.maximum.accumulate(np.where(first, position, 0))
    by_rank = np.argsort(rank, kind="stable")
    ends = np.cumsum(np.bincount(rank))[:-1]
    return np.split(order[by_rank], ends)


def _join(words: NDArray[np.uint32], size: int) -> _Unsigned:
    """uint32 (words, k) as k integers of `size` bytes."""
    rows = words[: size // 4].T
    return np.ascontiguousarray(rows).view(np.uint32 if size == 4 else np.uint64)[:, 0]


def _signed(function: Callable[..., NDArray[Any]]) -> _Operation:
    """The operation on the same bits as signed integers."""

    def apply(old: _Unsigned, source: _Unsigned, _: _Unsigned) -> _Unsigned:
        dtype = np.int32 if old.itemsize == 4 else np.int64
        chosen: _Unsigned = function(old.view(dtype), source.view(dtype)).view(old.dtype)
        return chosen

    return apply


def _add_as(dtype: type[np.floating[Any]]) -> _Operation:
    """Addition of floats, or of packs of floats; subnormal numbers are kept."""

    def apply(old: _Unsigned, source: _Unsigned, _: _Unsigned) -> _Unsigned:
        total: _Unsigned = (old.view(dtype) + source.view(dtype)).view(old.dtype)
        return total

    return apply


def _add_bfloat16_pair(old: _Unsigned, source: _Unsigned, _: _Unsigned) -> _Unsigned:
    """Addition of two bfloat16 numbers each, rounded to nearest even.

    The sum is rounded to float32 first. That changes nothing: 24 bits >= 2 * 8 + 2.
    """
    total = from_bfloat16(old.view(np.uint16)) + from_bfloat16(source.view(np.uint16))
    return to_bfloat16(total).view(np.uint32)


#: Integer operations, of 4 and 8 bytes: (memory, operand, compare) -> memory.
_INTEGER: dict[str, _Operation] = {
    "add": lambda old, source, _: old + source,
    "sub": lambda old, source, _: old - source,
    "and": lambda old, source, _: old & source,
    "or": lambda old, source, _: old | source,
    "xor": lambda old, source, _: old ^ source,
    "min_i": _signed(np.minimum),
    "max_i": _signed(np.maximum),
    "min_u": lambda old, source, _: np.minimum(old, source),
    "max_u": lambda old, source, _: np.maximum(old, source),
    "swap": lambda _, source, __: source,
    "cmpswap": lambda old, source, compare: np.where(old == compare, source, old),
    # These two wrap at the operand, not at a power of two.
    "inc": lambda old, source, _: np.where(old >= source, 0, old + 1).astype(old.dtype),
    "dec": lambda old, source, _: np.where((old == 0) | (old > source), source, old - 1),
}
#: Operations on floats and their only size in bytes.
_FLOAT: dict[str, tuple[int, _Operation]] = {
    "add_f32": (4, _add_as(np.float32)),
    "add_f64": (8, _add_as(np.float64)),
    "pk_add_f16": (4, _add_as(np.float16)),
    "pk_add_bf16": (4, _add_bfloat16_pair),
}
ATOMIC_OPERATIONS = (*_INTEGER, *_FLOAT)


def _function(operation: str, size: int) -> _Operation:
    """The operation on k integers of `size` bytes."""
    if size in (4, 8) and operation in _INTEGER:
        return _INTEGER[operation]
    if operation in _FLOAT and _FLOAT[operation][0] == size:
        return _FLOAT[operation][1]
    raise EmulationError(
        f"There is no atomic operation {operation!r} of {size} bytes. "
        f"The operations are: {', '.join(ATOMIC_OPERATIONS)}."
    )
