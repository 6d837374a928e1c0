"""Where the keys and values of a cache are in memory, as a value that backends can decide by."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KVStrides"]


@dataclass(frozen=True, kw_only=True)
class KVStrides:
    """The memory of a cache whose layout is not this library's own.

    Strides are in bytes, from one block, token and KV head to the next; 0 where there is only one.

    Attributes:
        key: (block, token, head), of keys.
        value: the same of values.
        alignment: the largest power of two, up to 16, that divides both addresses, in bytes.
        separate: keys and values are in two tensors, a KVCacheView.
    """

    key: tuple[int, int, int]
    value: tuple[int, int, int]
    alignment: int
    separate: bool

    @property
    def is_aligned(self) -> bool:
        """Whether every head begins at a multiple of 16 bytes."""
        return not any(number % 16 for number in (*self.key, *self.value, self.alignment))

    @property
    def is_equal(self) -> bool:
        """Whether keys and values have the same strides."""
        return self.key == self.value

    def __str__(self) -> str:
        tensors = "two tensors" if self.separate else "one tensor"
        same = f", of values {self.value}" if not self.is_equal else ""
        return f"{tensors} with strides {self.key}{same} in bytes"
