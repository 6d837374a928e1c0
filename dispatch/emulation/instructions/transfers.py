"""What memory instructions move between the registers of a lane and memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import parse_operand
from attn_dispatch.emulation.registers import Registers
from attn_dispatch.emulation.waves import WaveGroup

__all__ = [
    "ATOMICS",
    "CACHE_MODIFIERS",
    "LOADS",
    "STORES",
    "Transfer",
    "check_modifiers",
    "data_reader",
    "data_writer",
    "integer_modifier",
    "register_ids",
    "registers_of",
]

#: Which caches an access uses, and how far its order is seen. The emulator has no caches.
CACHE_MODIFIERS = frozenset({"glc", "slc", "dlc", "sc0", "sc1", "nt", "scope", "th"})


@dataclass(frozen=True)
class Transfer:
    """A value in memory and in registers.

    Attributes:
        size: bytes in memory: 1, 2, 4, 8, 12 or 16.
        signed: a load of 1 or 2 bytes extends by the sign, otherwise with zeros.
        half: 0 or 1 for a value in half of a register; a load leaves the other half as it is.
    """

    size: int
    signed: bool = False
    half: int | None = None

    @property
    def words(self) -> int:
        """Registers of a lane."""
        return max(self.size // 4, 1)


#: What is loaded, by the end of the opcode: on CDNA, on RDNA, and from LDS on both.
_WIDE = [
    ("dword", "b32", "b32", Transfer(4)),
    ("dwordx2", "b64", "b64", Transfer(8)),
    ("dwordx3", "b96", "b96", Transfer(12)),
    ("dwordx4", "b128", "b128", Transfer(16)),
]
_LOADS = [
    *_WIDE,
    ("ubyte", "u8", "u8", Transfer(1)),
    ("sbyte", "i8", "i8", Transfer(1, signed=True)),
    ("ushort", "u16", "u16", Transfer(2)),
    ("sshort", "i16", "i16", Transfer(2, signed=True)),
    ("ubyte_d16", "d16_u8", "u8_d16", Transfer(1, half=0)),
    ("ubyte_d16_hi", "d16_hi_u8", "u8_d16_hi", Transfer(1, half=1)),
    ("sbyte_d16", "d16_i8", "i8_d16", Transfer(1, signed=True, half=0)),
    ("sbyte_d16_hi", "d16_hi_i8", "i8_d16_hi", Transfer(1, signed=True, half=1)),
    ("short_d16", "d16_b16", "u16_d16", Transfer(2, half=0)),
    ("short_d16_hi", "d16_hi_b16", "u16_d16_hi", Transfer(2, half=1)),
]
#: The same for stores.
_STORES = [
    *_WIDE,
    ("byte", "b8", "b8", Transfer(1)),
    ("short", "b16", "b16", Transfer(2)),
    ("byte_d16_hi", "d16_hi_b8", "b8_d16_hi", Transfer(1, half=1)),
    ("short_d16_hi", "d16_hi_b16", "b16_d16_hi", Transfer(2, half=1)),
]
#: "cdna", "rdna" or "lds" -> end of the opcode -> what it loads or stores.
LOADS, STORES = (
    {name: {row[i]: row[3] for row in rows} for i, name in enumerate(("cdna", "rdna", "lds"))}
    for rows in (_LOADS, _STORES)
)
#: Atomic operations on integers by their names on CDNA -> on RDNA, without the number of bits.
ATOMICS = {
    "swap": "swap_b", "cmpswap": "cmpswap_b", "add": "add_u", "sub": "sub_u", "smin": "min_i",
    "umin": "min_u", "smax": "max_i", "umax": "max_u", "and": "and_b", "or": "or_b",
    "xor": "xor_b",
}  # fmt: skip


# Operands and modifiers ---------------------------------------------------------------------------


def registers_of(text: str, file: str, count: int) -> Registers:
    """The `count` registers of an operand, of file "v" or "s", or "va" for vector or accumulation.

    Raises:
        UnknownInstruction: it is something else.
    """
    operand = parse_operand(text)
    registers = operand.require_registers(file)
    if registers.count != count or operand.half is not None or operand.negate or operand.absolute:
        raise UnknownInstruction(f"{text} where {count} registers are expected")
    return registers


def register_ids(texts: Collection[str]) -> frozenset[int]:
    """`Registers.ids` of operands; those that are no registers have none."""
    found = (parse_operand(text).registers for text in texts)
    return frozenset(i for registers in found if registers for i in registers.ids)


def integer_modifier(instruction: Instruction, name: str) -> int:
    """The value of a modifier such as `offset:16`; 0 if the instruction has none."""
    return int(instruction.modifiers.get(name, "0"), 0)


def check_modifiers(instruction: Instruction, known: Collection[str]) -> None:
    """Raise `UnknownInstruction` if an instruction has other modifiers."""
    unknown = [name for name in instruction.modifiers if name not in known]
    if unknown:
        raise UnknownInstruction(f"the modifier {unknown[0]} is not known here")


# Registers ----------------------------------------------------------------------------------------


def data_reader(text: str, transfer: Transfer) -> Callable[[WaveGroup], NDArray[np.uint32]]:
    """Reads what the lanes in EXEC store, uint32 (words, k), from vector or accumulation registers.

    A store of 1 or 2 bytes ignores the bits above them.
    """
    name, rows = _rows(registers_of(text, "va", transfer.words))

    def read(group: WaveGroup) -> NDArray[np.uint32]:
        values: NDArray[np.uint32] = getattr(group, name)[rows]
        return values.reshape(transfer.words, -1) if group.full else values[:, group.exec]

    if transfer.half != 1:
        return read
    return lambda group: read(group) >> np.uint32(16)


def data_writer(text: str, transfer: Transfer) -> Callable[[WaveGroup, NDArray[np.uint32]], None]:
    """Writes what the lanes in EXEC have loaded, uint32 (words, k), extended with zeros."""
    registers, half = registers_of(text, "va", transfer.words), transfer.half
    name, rows = _rows(registers)
    if half is not None:
        name = f"{registers.file}_u16"
    extended: Any = np.dtype(np.uint32 if half is None else np.uint16)
    signed: Any = np.dtype(f"i{transfer.size}") if transfer.signed else None

    def write(group: WaveGroup, values: NDArray[Any]) -> None:
        if signed is not None:
            values = values.astype(signed)
        if signed is not None or half is not None:
            values = values.astype(extended)
        target = getattr(group, name)[rows]
        if half is not None:
            target = target[..., half]
        if group.full:
            target[...] = values.reshape(target.shape)
        else:
            target[:, group.exec] = values

    return write


def _rows(registers: Registers) -> tuple[str, slice]:
    """The attribute of a group that has these registers, and their rows."""
    return f"{registers.file}_u32", slice(registers.first, registers.first + registers.count)
