"""Atomic operations of many lanes on one array of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.numerics import from_bfloat16, to_bfloat16
from attn_dispatch.emulation.memory.access import Bytes

__all__ = ["ATOMIC_OPERATIONS", "apply_atomic"]

_Unsigned = NDArray[np.unsignedinteger[Any]]


def _as(kind: str, function: Callable[..., NDArray[Any]], size: int = 0) -> Callable[..., Any]:
    """An operation on the same bits as signed integers ("i") or floats ("f").

    Each has `size` bytes, or by default those of the operand.
    """

    def apply(old: _Unsigned, source: _Unsigned, _: _Unsigned) -> _Unsigned:
        dtype = f"{kind}{size or old.itemsize}"
        return function(old.view(dtype), source.view(dtype)).view(old.dtype)

    return apply


def _add_bfloat16(old: NDArray[np.uint16], source: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The sum is rounded to float32 first. That changes nothing: 24 bits >= 2 * 8 + 2."""
    return to_bfloat16(from_bfloat16(old) + from_bfloat16(source))


#: By their names on CDNA: (memory, operand, what is compared with memory) -> memory.
ATOMIC_OPERATIONS: dict[str, Callable[[_Unsigned, _Unsigned, _Unsigned], Any]] = {
    "add": lambda old, source, _: old + source,
    "sub": lambda old, source, _: old - source,
    "and": lambda old, source, _: old & source,
    "or": lambda old, source, _: old | source,
    "xor": lambda old, source, _: old ^ source,
    "smin": _as("i", np.minimum),
    "smax": _as("i", np.maximum),
    "umin": lambda old, source, _: np.minimum(old, source),
    "umax": lambda old, source, _: np.maximum(old, source),
    "swap": lambda _, source, __: source,
    "cmpswap": lambda old, source, compare: np.where(old == compare, source, old),
    "add_f32": _as("f", np.add),  # subnormal numbers are kept
    "add_f64": _as("f", np.add),
    "pk_add_f16": _as("f", np.add, 2),
    "pk_add_bf16": _as("u", _add_bfloat16, 2),
}


def apply_atomic(
    memory: Bytes,
    operation: str,
    starts: NDArray[np.int64],
    operand: NDArray[np.uint32],
    size: int,
) -> NDArray[np.uint32]:
    """Apply an atomic operation lane by lane, in the order of the lanes.

    Lanes with different starts do not affect each other, so each pass applies one lane per start.

    Args:
        memory: changed in place.
        operation: one of `ATOMIC_OPERATIONS`.
        starts: int64 (k,), within bounds and multiples of size.
        operand: uint32 (words, k); for "cmpswap" (2 * words, k), first the new value, then what it
            expects in memory.
        size: 4 or 8 bytes.

    Returns:
        What each lane found in memory, uint32 (words, k).
    """
    words, function = size // 4, ATOMIC_OPERATIONS[operation]
    source, expected = (
        np.ascontiguousarray(rows.T).view(f"u{size}")[:, 0]
        for rows in (operand[:words], operand[-words:])
    )
    view, index = memory.views[size], starts // size
    found = np.empty_like(source)
    for lanes in _passes(index):
        old = view[index[lanes]]
        found[lanes] = old
        view[index[lanes]] = function(old, source[lanes], expected[lanes])
    return np.ascontiguousarray(found.view(np.uint32).reshape(-1, words).T)


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
