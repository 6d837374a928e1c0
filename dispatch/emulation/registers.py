"""Registers: their files, their numbers, and those with a name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXEC", "M0", "NUM_SGPRS", "TTMP0", "VCC", "Registers", "name_of"]

#: Scalar registers with a name, by number.
VCC, TTMP0, M0, EXEC = 106, 108, 125, 126
NUM_SGPRS = 128

#: The first register of each file in the numbers by which pending registers are known.
_FILES = {"s": 0, "v": 1000, "a": 2000}


@dataclass(frozen=True)
class Registers:
    """Consecutive registers.

    Attributes:
        file: "v" for vector, "a" for accumulation, "s" for scalar registers.
        first: the number of the first one.
        count: how many.
    """

    file: str
    first: int
    count: int

    @property
    def ids(self) -> range:
        """Numbers that are unique over all files."""
        start = _FILES[self.file] + self.first
        return range(start, start + self.count)


def name_of(number: int) -> str:
    """The name of a register by its number in `Registers.ids`."""
    return f"{'sva'[number // 1000]}{number % 1000}"
