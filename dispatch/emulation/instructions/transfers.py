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
    "CACHE_MODIFIERS",
    "CDNA_LOADS",
    "CDNA_STORES",
    "LDS_LOADS",
    "LDS_STORES",
    "RDNA_LOADS",
    "RDNA_STORES",
    "DataReader",
    "DataWriter",
    "Transfer",
    "check_modifiers",
    "data_reader",
    "data_writer",
    "integer_modifier",
    "register_ids",
    "registers_of",
]

#: Reads the values that the lanes in EXEC store: uint32 (words, k).
DataReader = Callable[["WaveGroup"], NDArray[np.uint32]]
#: Writes the values (words, k) that the lanes in EXEC have loaded.
DataWriter = Callable[["WaveGroup", NDArray[np.uint32]], None]

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


_WIDE = (4, 8, 12, 16)
_CDNA_WIDE = dict(
    zip(("dword", "dwordx2", "dwordx3", "dwordx4"), map(Transfer, _WIDE), strict=True)
)
_RDNA_WIDE = dict(zip(("b32", "b64", "b96", "b128"), map(Transfer, _WIDE), strict=True))

#: What an opcode loads or stores, by the end of its name.
CDNA_LOADS: dict[str, Transfer] = _CDNA_WIDE | {
    "ubyte": Transfer(1),
    "sbyte": Transfer(1, signed=True),
    "ushort": Transfer(2),
    "sshort": Transfer(2, signed=True),
    "ubyte_d16": Transfer(1, half=0),
    "ubyte_d16_hi": Transfer(1, half=1),
    "sbyte_d16": Transfer(1, signed=True, half=0),
    "sbyte_d16_hi": Transfer(1, signed=True, half=1),
    "short_d16": Transfer(2, half=0),
    "short_d16_hi": Transfer(2, half=1),
}
CDNA_STORES: dict[str, Transfer] = _CDNA_WIDE | {
    "byte": Transfer(1),
    "short": Transfer(2),
    "byte_d16_hi": Transfer(1, half=1),
    "short_d16_hi": Transfer(2, half=1),
}
RDNA_LOADS: dict[str, Transfer] = _RDNA_WIDE | {
    "u8": Transfer(1),
    "i8": Transfer(1, signed=True),
    "u16": Transfer(2),
    "i16": Transfer(2, signed=True),
    "d16_u8": Transfer(1, half=0),
    "d16_hi_u8": Transfer(1, half=1),
    "d16_i8": Transfer(1, signed=True, half=0),
    "d16_hi_i8": Transfer(1, signed=True, half=1),
    "d16_b16": Transfer(2, half=0),
    "d16_hi_b16": Transfer(2, half=1),
}
RDNA_STORES: dict[str, Transfer] = _RDNA_WIDE | {
    "b8": Transfer(1),
    "b16": Transfer(2),
    "d16_hi_b8": Transfer(1, half=1),
    "d16_hi_b16": Transfer(2, half=1),
}
LDS_LOADS: dict[str, Transfer] = _RDNA_WIDE | {
    "u8": Transfer(1),
    "i8": Transfer(1, signed=True),
    "u16": Transfer(2),
    "i16": Transfer(2, signed=True),
    "u8_d16": Transfer(1, half=0),
    "u8_d16_hi": Transfer(1, half=1),
    "i8_d16": Transfer(1, signed=True, half=0),
    "i8_d16_hi": Transfer(1, signed=True, half=1),
    "u16_d16": Transfer(2, half=0),
    "u16_d16_hi": Transfer(2, half=1),
}
LDS_STORES: dict[str, Transfer] = _RDNA_WIDE | {
    "b8": Transfer(1),
    "b16": Transfer(2),
    "b8_d16_hi": Transfer(1, half=1),
    "b16_d16_hi": Transfer(2, half=1),
}


# Operands and modifiers ---------------------------------------------------------------------------


def registers_of(text: str, file: str, count: int) -> Registers:
    """The registers of an operand.

    Args:
        text: the operand.
        file: "v", "s", or "va" if accumulation registers are possible, too.
        count: how many registers it must have.

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
    """Check that an instruction has no other modifiers.

    Raises:
        UnknownInstruction: it has.
    """
    unknown = [name for name in instruction.modifiers if name not in known]
    if unknown:
        raise UnknownInstruction(f"the modifier {unknown[0]} is not known here")


# Registers ----------------------------------------------------------------------------------------


def data_reader(text: str, transfer: Transfer) -> DataReader:
    """Reads what is stored, from vector or accumulation registers."""
    registers = registers_of(text, "va", transfer.words)
    name, first, last = _rows(registers)

    def read(group: WaveGroup) -> NDArray[np.uint32]:
        rows: NDArray[np.uint32] = getattr(group, name)[first:last]
        return rows.reshape(last - first, -1) if group.full else rows[:, group.exec]

    if transfer.half != 1:
        return read
    return lambda group: read(group) >> np.uint32(16)


def data_writer(text: str, transfer: Transfer) -> DataWriter:
    """Writes what was loaded, which is extended with zeros, to vector or accumulation registers."""
    registers = registers_of(text, "va", transfer.words)
    if transfer.half is not None:
        return _half_writer(registers, transfer)
    name, first, last = _rows(registers)

    def write(group: WaveGroup, values: NDArray[np.uint32]) -> None:
        rows = getattr(group, name)[first:last]
        if group.full:
            rows[...] = values.reshape(rows.shape)
        else:
            rows[:, group.exec] = values

    if not transfer.signed:
        return write
    narrow: Any = {1: np.int8, 2: np.int16}[transfer.size]

    def write_signed(group: WaveGroup, values: NDArray[np.uint32]) -> None:
        write(group, values.astype(narrow).astype(np.int32).view(np.uint32))

    return write_signed


def _half_writer(registers: Registers, transfer: Transfer) -> DataWriter:
    name, first, half = f"{registers.file}_u16", registers.first, transfer.half
    narrow: Any = np.int8 if transfer.signed else np.uint16

    def write_half(group: WaveGroup, values: NDArray[np.uint32]) -> None:
        halves = getattr(group, name)[first][..., half]
        extended = values[0].astype(narrow).astype(np.uint16)
        if group.full:
            halves[...] = extended.reshape(halves.shape)
        else:
            halves[group.exec] = extended

    return write_half


def _rows(registers: Registers) -> tuple[str, int, int]:
    """The attribute of a group that has these registers, and the range of rows."""
    return f"{registers.file}_u32", registers.first, registers.first + registers.count
