"""What loads, stores and atomic operations of the emulator should do, one lane at a time.

Plain Python on bytes and integers, written independently of the instructions under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Value:
    """What a memory instruction moves: bytes in memory, and where they are in registers.

    Attributes:
        size: bytes.
        signed: whether a load extends by the sign.
        half: 0 or 1 if it is half of a register.
    """

    size: int
    signed: bool = False
    half: int | None = None

    @property
    def words(self) -> int:
        return max(self.size // 4, 1)

    def loaded(self, raw: bytes, before: Sequence[int]) -> list[int]:
        """The registers after a load of these bytes."""
        if self.size >= 4:
            return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, self.size, 4)]
        value = int.from_bytes(raw, "little", signed=self.signed)
        if self.half is None:
            return [value & 0xFFFFFFFF]
        if self.half:
            return [(value & 0xFFFF) << 16 | before[0] & 0xFFFF]
        return [before[0] & 0xFFFF0000 | value & 0xFFFF]

    def stored(self, registers: Sequence[int]) -> bytes:
        """The bytes that a store of these registers writes."""
        raw = b"".join(int(word).to_bytes(4, "little") for word in registers)
        return raw[2 * (self.half or 0) :][: self.size]


def _wraps(value: int, size: int) -> int:
    return value & ((1 << (8 * size)) - 1)


def _signed(value: int, size: int) -> int:
    return value - (1 << (8 * size)) if value >> (8 * size - 1) else value


def _add_floats(dtype: str) -> Callable[[int, int, int], int]:
    def add(old: int, new: int, size: int) -> int:
        parts = [np.frombuffer(x.to_bytes(size, "little"), dtype) for x in (old, new)]
        return int.from_bytes((parts[0] + parts[1]).tobytes(), "little")

    return add


def _add_bfloat16(old: int, new: int, size: int) -> int:
    """The values of the tests have few bits: their sums need no rounding."""
    total = 0
    for shift in (0, 16):
        parts = [np.uint32((x >> shift & 0xFFFF) << 16).view(np.float32) for x in (old, new)]
        bits = int((parts[0] + parts[1]).view(np.uint32))
        assert not bits & 0xFFFF
        total |= (bits >> 16) << shift
    return total


#: Operation -> (memory, operand, size) -> memory.
ATOMIC_RESULTS: dict[str, Callable[[int, int, int], int]] = {
    "swap": lambda old, new, size: new,
    "add": lambda old, new, size: _wraps(old + new, size),
    "sub": lambda old, new, size: _wraps(old - new, size),
    "smin": lambda old, new, size: min(old, new, key=lambda x: _signed(x, size)),
    "smax": lambda old, new, size: max(old, new, key=lambda x: _signed(x, size)),
    "umin": lambda old, new, size: min(old, new),
    "umax": lambda old, new, size: max(old, new),
    "and": lambda old, new, size: old & new,
    "or": lambda old, new, size: old | new,
    "xor": lambda old, new, size: old ^ new,
    "inc": lambda old, new, size: 0 if old >= new else old + 1,
    "dec": lambda old, new, size: new if old == 0 or old > new else old - 1,
    "add_f32": _add_floats("<f4"),
    "add_f64": _add_floats("<f8"),
    "pk_add_f16": _add_floats("<f2"),
    "pk_add_bf16": _add_bfloat16,
}


def atomic_operands(operation: str, size: int, count: int, rng: np.random.Generator) -> list[int]:
    """Operands, or contents of memory: integers, or small floats that are exact in any format."""
    if operation.startswith("pk_add"):
        halves = rng.integers(-8, 9, (count, 2)).astype(np.float32) / 2
        if operation == "pk_add_f16":
            return [int(x) for x in halves.astype(np.float16).view(np.uint32)[:, 0]]
        bits = halves.view(np.uint32) >> 16
        return [int(low | high << 16) for low, high in bits]
    if operation.startswith("add_f"):
        dtype = np.float32 if size == 4 else np.float64
        values = (rng.integers(-64, 65, count) / 8).astype(dtype)
        return [int(x) for x in values.view(f"u{size}")]
    return [int.from_bytes(rng.bytes(size), "little") for _ in range(count)]


def operand(file: str, first: int, count: int) -> str:
    """The text of consecutive registers."""
    return f"{file}{first}" if count == 1 else f"{file}[{first}:{first + count - 1}]"
