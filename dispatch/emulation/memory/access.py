"""Bytes that the lanes of many waves access in one step, and flags of single bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByteFlags", "Bytes", "repeated", "unit_indices"]

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}


class Bytes:
    """An array of bytes, with views of 2, 4 and 8 bytes where its address allows them.

    The methods expect starts that are within the array: the caller has compared them with its
    bounds. Where two lanes store to the same start, the last one's value is kept.

    Attributes:
        data: uint8 (num_bytes,).
        views: the same memory as unsigned integers, by their size in bytes.
    """

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        address = data.ctypes.data | 8
        self._alignment = address & -address
        self.views: dict[int, NDArray[np.unsignedinteger[Any]]] = {
            unit: data[: data.size // unit * unit].view(dtype)
            for unit, dtype in _UNSIGNED.items()
            if unit <= self._alignment
        }

    def unit(self, starts: NDArray[np.int64], size: int) -> int:
        """The largest of 1, 2, 4 and 8 bytes that divides the size and every start."""
        bits = int(np.bitwise_or.reduce(starts)) | size | self._alignment
        return bits & -bits

    def gather(self, starts: NDArray[np.int64], size: int) -> NDArray[np.uint32]:
        """The `size` bytes from each start (k,), as uint32 (max(size // 4, 1), k)."""
        words, unit = max(size // 4, 1), self.unit(starts, size)
        if unit >= 4:
            values = np.empty((words, starts.size), np.uint32)
            for word, index in enumerate(unit_indices(starts, size, 4)):
                # The bounds were checked: mode="clip" only leaves out NumPy's own check.
                self.views[4].take(index, out=values[word], mode="clip")
            return values
        if unit == size:
            return self.views[unit].take(starts >> (unit - 1), mode="clip").astype(np.uint32)[None]
        raw = np.zeros((starts.size, 4 * words), np.uint8)
        for byte in range(size):
            raw[:, byte] = self.data.take(starts + byte, mode="clip")
        return np.ascontiguousarray(raw.view(np.uint32).T)

    def scatter(self, starts: NDArray[np.int64], values: NDArray[np.uint32], size: int) -> None:
        """Store the first `size` bytes of each column of uint32 (words, k) from its start on."""
        unit = self.unit(starts, size)
        if unit >= 4:
            for word, index in enumerate(unit_indices(starts, size, 4)):
                self.views[4][index] = values[word]
        elif unit == size:
            self.views[unit][starts >> (unit - 1)] = values[0].astype(_UNSIGNED[unit])
        else:
            raw = np.ascontiguousarray(values.T).view(np.uint8)
            for byte in range(size):
                self.data[starts + byte] = raw[:, byte]


class ByteFlags(Bytes):
    """A flag of 1 or 0 for each byte of an array, such as whether it was written."""

    def __init__(self, num_bytes: int, flag: int = 0) -> None:
        super().__init__(np.full(num_bytes, flag, np.uint8))

    def mark(self, starts: NDArray[np.int64], size: int, flag: int = 1) -> None:
        """Set the flags of the `size` bytes from each start (k,)."""
        unit = self.unit(starts, size)
        for index in unit_indices(starts, size, unit):
            self.views[unit][index] = repeated(flag, unit)

    def first_clear(self, starts: NDArray[np.int64], size: int) -> tuple[int, int] | None:
        """(lane, byte) of an access to a byte whose flag is 0."""
        unit = self.unit(starts, size)
        for index in unit_indices(starts, size, unit):
            clear = self.views[unit].take(index, mode="clip") != repeated(1, unit)
            if clear.any():
                lane = int(clear.argmax())
                start = int(starts[lane])
                return lane, start + int(self.data[start : start + size].argmin())
        return None


def unit_indices(starts: NDArray[np.int64], size: int, unit: int) -> Iterator[NDArray[np.int64]]:
    """For each unit of an access, its index (k,) in the view of this unit."""
    index = starts >> (unit.bit_length() - 1)
    for step in range(size // unit):
        yield index + step if step else index


@functools.cache
def repeated(code: int, unit: int) -> np.unsignedinteger[Any]:
    """An integer of `unit` bytes, each of which is `code`."""
    value: np.unsignedinteger[Any] = _UNSIGNED[unit](int.from_bytes(bytes([code] * unit), "little"))
    return value
