"""What loads, stores and atomic operations of the emulator should do, one lane at a time.

Plain Python on bytes and integers, written independently of the instructions under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.memory.scratch import Scratch
from attn_dispatch.emulation.registers import EXEC
from attn_dispatch.emulation.targets import target_named

from .emulation import group_of, shared_by


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


#: What is loaded, by the end of the opcode: on CDNA, on RDNA, and from LDS on both.
_WIDE = [
    ("dword", "b32", "b32", Value(4)),
    ("dwordx2", "b64", "b64", Value(8)),
    ("dwordx3", "b96", "b96", Value(12)),
    ("dwordx4", "b128", "b128", Value(16)),
]
LOADS = [
    *_WIDE,
    ("ubyte", "u8", "u8", Value(1)),
    ("sbyte", "i8", "i8", Value(1, signed=True)),
    ("ushort", "u16", "u16", Value(2)),
    ("sshort", "i16", "i16", Value(2, signed=True)),
    ("ubyte_d16", "d16_u8", "u8_d16", Value(1, half=0)),
    ("ubyte_d16_hi", "d16_hi_u8", "u8_d16_hi", Value(1, half=1)),
    ("sbyte_d16", "d16_i8", "i8_d16", Value(1, signed=True, half=0)),
    ("sbyte_d16_hi", "d16_hi_i8", "i8_d16_hi", Value(1, signed=True, half=1)),
    ("short_d16", "d16_b16", "u16_d16", Value(2, half=0)),
    ("short_d16_hi", "d16_hi_b16", "u16_d16_hi", Value(2, half=1)),
]
STORES = [
    *_WIDE,
    ("byte", "b8", "b8", Value(1)),
    ("short", "b16", "b16", Value(2)),
    ("byte_d16_hi", "d16_hi_b8", "b8_d16_hi", Value(1, half=1)),
    ("short_d16_hi", "d16_hi_b16", "b16_d16_hi", Value(2, half=1)),
]
CDNA, RDNA = ("gfx90a", "gfx942", "gfx950"), ("gfx1100", "gfx1201")


def lanes(*numbers):
    return np.array(numbers, np.int64)


def random_words(rng, size, k):
    """Values of `size` bytes for k lanes, uint32 (words, k)."""
    values = rng.integers(0, 1 << 32, (max(size // 4, 1), k), dtype=np.uint32)
    return values & np.uint32((1 << (8 * size)) - 1) if size < 4 else values


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
        values = (rng.integers(-64, 65, count) / 8).astype(f"f{size}")
        return [int(x) for x in values.view(f"u{size}")]
    return [int.from_bytes(rng.bytes(size), "little") for _ in range(count)]


def operand(file: str, first: int, count: int) -> str:
    """The text of consecutive registers."""
    return f"{file}{first}" if count == 1 else f"{file}[{first}:{first + count - 1}]"


# Vector memory ------------------------------------------------------------------------------------

NUM_BYTES = 8192
SCRATCH_BYTES = 256
#: The last word of a descriptor: on RDNA, the range check of raw buffers.
_LAST_WORD = {True: 0x00027000, False: 0x31004000}


def descriptor(target, address, num_bytes):
    """The words of a buffer's descriptor."""
    last = _LAST_WORD[target.is_cdna]
    return [address & 0xFFFFFFFF, address >> 32, num_bytes, last]


class LanesCase:
    """Waves with random registers.

    Attributes:
        addresses: (waves, lanes) values of v1, by `place`.
        exec: (waves, lanes), before the instruction.
    """

    def __init__(self, target, rng, shared, exec_words):
        self.target, self.rng, self.lanes = target, rng, target.wave_size
        self.group = group_of(target, shared.num_waves, shared=shared)
        for file in ("v", "a"):
            array = getattr(self.group, f"{file}_u32")
            array[...] = rng.integers(0, 1 << 32, array.shape, dtype=np.uint32)
        if exec_words:
            self.group.s_u32[EXEC : EXEC + self.lanes // 32] = exec_words
            self.group.exec_changed()
        self.exec = self.group.exec.copy()

    def place(self, addresses):
        """Give the lanes other addresses."""
        self.addresses = self.group.v_u32[1] = addresses

    def active(self):
        """(wave, lane, address) of each lane in EXEC, in order."""
        return [
            (wave, lane, int(self.addresses[wave, lane])) for wave, lane in np.argwhere(self.exec)
        ]

    def words(self, file, first, count):
        return getattr(self.group, f"{file}_u32")[first : first + count].copy()


class MemoryCase(LanesCase):
    """Two waves, a region of random bytes, and a random offset in it for each lane.

    v1 has the offset, v[2:3] the address, s[4:5] that of the region, s[8:11] its descriptor.
    """

    def __init__(self, target, space, partial=True):
        rng, target, self.space = np.random.default_rng(11), target_named(target), space
        self.memory = GlobalMemory()
        self.region = self.memory.allocate(rng.integers(0, 256, NUM_BYTES, dtype=np.uint8), "x")
        self.scratch = Scratch(2, target.wave_size, SCRATCH_BYTES)
        shared = shared_by(target, 2, memory=self.memory, scratch=self.scratch)
        super().__init__(target, rng, shared, [0x88010F35, 0xFFFFFFFE] if partial else None)
        self.fill_scratch()
        self.group.s_u32[4] = self.region.address & 0xFFFFFFFF
        self.group.s_u32[5] = self.region.address >> 32
        for i, word in enumerate(descriptor(target, self.region.address, NUM_BYTES)):
            self.group.s_u32[8 + i] = word
        count = 2 * self.lanes
        within = SCRATCH_BYTES // 16 - 4 if space == "scratch" else count
        self.place(16 * (rng.permutation(count) % within).reshape(2, -1) + 16)

    def place(self, addresses):
        super().place(addresses)
        absolute = self.region.address + addresses.astype(np.int64)
        self.group.v_u32[2], self.group.v_u32[3] = absolute & 0xFFFFFFFF, absolute >> 32

    def fill_scratch(self):
        shape = (2, self.lanes, SCRATCH_BYTES // 4)
        words = self.rng.integers(0, 1 << 32, shape, dtype=np.uint32)
        waves, lanes, places = (each.reshape(-1) for each in np.indices(shape))
        self.scratch.store(waves, lanes, 4 * places, words.reshape(1, -1), 4)

    def contents(self):
        """Memory as a function (wave, lane) -> bytearray: the region, or a lane's private bytes."""
        if self.space != "scratch":
            shared = bytearray(self.region.data.tobytes())
            return lambda wave, lane: shared
        shape = (2, self.lanes, SCRATCH_BYTES)
        waves, lanes, places = (each.reshape(-1) for each in np.indices(shape))
        values = self.scratch.load(waves, lanes, places, 1).astype(np.uint8).reshape(shape)
        private = [[bytearray(lane.tobytes()) for lane in wave] for wave in values]
        return lambda wave, lane: private[wave][lane]

    def bytes_of(self, contents):
        return [bytes(contents(wave, lane)) for wave, lane in np.ndindex(2, self.lanes)]

    def text(self, opcode, data, offset=0, returns=""):
        """An instruction at the lanes' offsets; `returns` is where a result goes."""
        kind = opcode.split("_")[1]
        where = {"global": ["v[2:3]", "off"], "flat": ["v[2:3]"], "scratch": ["v1", "off"]}
        if self.space == "buffer":
            parts = [data, "v1", "s[8:11]", "0"]
        else:
            parts = where[self.space].copy()
            parts.insert(0 if kind == "load" else 1, data)
            parts[:0] = [returns] if returns else []
        modifiers = " offen" if self.space == "buffer" else ""
        modifiers += f" offset:{offset}" if offset else ""
        return f"{opcode} {', '.join(parts)}{modifiers}"
