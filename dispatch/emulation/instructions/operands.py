"""Operands of instructions: what their text means, how they are read and written.

A reader or writer is made once for all instructions with the same operand, and is called for each
group of waves that executes one of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic.bits import high32, low32, to_u64
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.registers import EXEC, M0, TTMP0, VCC, Registers
from attn_dispatch.emulation.waves import WaveGroup

__all__ = [
    "F16",
    "F32",
    "I16",
    "I32",
    "I64",
    "U16",
    "U32",
    "U64",
    "Kind",
    "Operand",
    "Reader",
    "Writer",
    "check_alignment",
    "constant",
    "mask_reader",
    "mask_writer",
    "parse_operand",
    "scalar_reader",
    "scalar_writer",
    "vector_reader",
    "vector_writer",
    "with_signs",
]

#: Reads an operand of all waves of a group.
Reader = Callable[[WaveGroup], Any]
#: Writes a value for all waves of a group.
Writer = Callable[[WaveGroup, Any], None]

#: Name -> the first scalar register, and how many.
_NAMED = {"m0": (M0, 1)} | {
    f"{name}{end}": (first + offset, count)
    for name, first in (("flat_scratch", 102), ("xnack_mask", 104), ("vcc", VCC), ("exec", EXEC))
    for end, offset, count in (("", 0, 2), ("_lo", 0, 1), ("_hi", 1, 1))
}


@dataclass(frozen=True, eq=False)
class Kind:
    """What the bits of an operand mean.

    Attributes:
        name: such as "f32".
        dtype: of the arrays that readers return and writers take.
        words: 32-bit registers that it takes; 0 for a half of one.
    """

    name: str
    dtype: Any
    words: int = 1

    @property
    def is_float(self) -> bool:
        """Whether `-x` and `|x|` mean the float's sign."""
        return self.name.startswith("f")


U32, I32, F32 = Kind("u32", np.uint32), Kind("i32", np.int32), Kind("f32", np.float32)
U64, I64 = Kind("u64", np.uint64, 2), Kind("i64", np.int64, 2)
U16, I16, F16 = Kind("u16", np.uint16, 0), Kind("i16", np.int16, 0), Kind("f16", np.float16, 0)

#: Registers of an operand -> the type of its float constants, and of the bits of constants.
_FLOATS: dict[int, tuple[Any, Any]] = {
    0: (np.float16, np.uint16), 1: (np.float32, np.uint32), 2: (np.float64, np.uint64),
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A parsed operand: registers, or a constant.

    Attributes:
        text: of the registers or the constant, without what is around it.
        registers: None for a constant.
        negate: `-x` or `neg(x)`.
        absolute: `|x|` or `abs(x)`.
        sign_extend: `sext(x)`, of SDWA.
        half: 0 for `.l` and 1 for `.h`, None if the text names no half.
    """

    text: str
    registers: Registers | None
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    half: int | None = None

    def __hash__(self) -> int:
        return hash(self.text)  # quicker than that of all fields

    def require_registers(self, file: str = "vas") -> Registers:
        """The registers.

        Raises:
            UnknownInstruction: it is a constant, or in none of these files.
        """
        if self.registers is None or self.registers.file not in file:
            raise UnknownInstruction(f"{self.text} is no register of the kinds {', '.join(file)}")
        return self.registers


@functools.cache
def parse_operand(text: str) -> Operand:
    """Parse the text of an operand, without modifiers that follow it."""
    flags: dict[str, Any] = {}
    inner = text.strip()
    while True:
        around = (
            re.fullmatch(r"(neg|abs|sext)\((.*)\)", inner)
            or re.fullmatch(r"(-)(?=[vsa|\[t])(.*)", inner)
            or re.fullmatch(r"(\|)(.*)\|", inner)
        )
        if not around:
            break
        name = {"neg": "negate", "-": "negate", "abs": "absolute", "|": "absolute"}
        flags[name.get(around[1], "sign_extend")] = True
        inner = around[2]
    if inner.endswith((".l", ".h")):
        flags["half"] = int(inner.endswith(".h"))
        inner = inner[:-2]
    return Operand(inner, _registers(inner), **flags)


def _registers(text: str) -> Registers | None:
    if text in _NAMED:
        first, count = _NAMED[text]
        return Registers("s", first, count)
    found = re.fullmatch(r"([vsa]|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])", text)
    if not found:
        return None
    first = int(found[2] or found[3])
    count = int(found[4] or first) - first + 1
    if found[1] == "ttmp":
        return Registers("s", TTMP0 + first, count)
    return Registers(found[1], first, count)


def check_alignment(registers: Registers, has_even_vectors: bool) -> None:
    """Check where registers begin.

    Args:
        registers: of an operand.
        has_even_vectors: two or more vector registers begin at an even number (gfx90a and later
            CDNA).

    Raises:
        UnknownInstruction: the instruction set has no such operand.
    """
    unit = 1
    if registers.file == "s" and registers.count > 1:
        unit = 2 if registers.count == 2 else 4
    elif registers.file in "va" and registers.count > 1 and has_even_vectors:
        unit = 2
    if registers.first % unit:
        raise UnknownInstruction(
            f"{registers.count} registers of the kind {registers.file} begin at "
            f"{registers.first}, not at a multiple of {unit}"
        )


def constant(text: str, kind: Kind) -> Any:
    """A constant as a NumPy scalar of the kind.

    A float constant of an integer operand is its bits. A 32-bit literal of a signed 64-bit operand
    is extended by its sign.

    Raises:
        UnknownInstruction: the text is no constant.
    """
    text = "0" if text in ("null", "off") else text
    literal = re.fullmatch(r"lit\((.*)\)", text)
    text = literal[1] if literal else text
    if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text):
        if kind.is_float:
            return kind.dtype(text)
        floating, unsigned_type = _FLOATS[kind.words]
        as_float: Any = floating(text)
        return as_float.view(unsigned_type).astype(kind.dtype)
    try:
        value = int(text, 0)
    except ValueError:
        raise UnknownInstruction(f"{text} is neither a register nor a constant") from None
    if kind is I64 and text.startswith("0x") and 1 << 31 <= value < 1 << 32:
        value -= 1 << 32
    bits = 32 * kind.words or 16
    unsigned = _FLOATS[kind.words][1](value & ((1 << bits) - 1))
    return unsigned.view(kind.dtype)


@functools.cache
def vector_reader(operand: Operand, kind: Kind, half: int = 0) -> Reader:
    """Reads an operand of a vector instruction: an array that broadcasts to (waves, lanes).

    Args:
        operand: registers of any file, or a constant.
        kind: what is read; `-x` and `|x|` of an integer change the sign bit of a float's bits.
        half: of a 16-bit operand that names none, from `op_sel`.
    """
    return with_signs(operand, kind, _reader(operand, kind, half, "column"))


@functools.cache
def scalar_reader(operand: Operand, kind: Kind) -> Reader:
    """Reads an operand of a scalar instruction: an array that broadcasts to (waves,)."""
    if operand.text in ("scc", "src_scc"):
        return lambda group: group.scc.astype(kind.dtype)
    if operand.registers is not None:
        operand.require_registers("s")
    return with_signs(operand, kind, _reader(operand, kind, 0, "s"))


def _reader(operand: Operand, kind: Kind, half: int, scalars: str) -> Reader:
    """Reads registers or a constant; "s" or "column" is the shape of scalar registers."""
    registers, dtype = operand.registers, kind.dtype
    if registers is None:
        value = constant(operand.text, kind)
        if not kind.words and half and operand.half is None:
            # The upper half of a 32-bit constant; an inline float of 16 bits has 0 there.
            whole = 0 if "." in operand.text else int(constant(operand.text, U32)) >> 16
            value = np.uint16(whole).view(dtype)
        return lambda group: value
    first, file = registers.first, scalars if registers.file == "s" else registers.file
    name = f"{file}_{'u32' if kind.words == 2 else kind.name}"
    if kind.words == 2 and file == "s":  # with fewer calls of NumPy

        def read_pairs(group: WaveGroup) -> Any:
            pairs = np.ascontiguousarray(group.s_u32[first : first + 2].T)
            return pairs.view(dtype)[:, 0]

        return read_pairs
    if kind.words == 2:

        def read_two(group: WaveGroup) -> Any:
            array = getattr(group, name)
            return to_u64(array[first], array[first + 1]).view(dtype)

        return read_two
    if not kind.words:
        place = half if operand.half is None else operand.half
        return lambda group: getattr(group, name)[first][..., place]
    return lambda group: getattr(group, name)[first]


def with_signs(operand: Operand, kind: Kind, read: Reader) -> Reader:
    """A reader of what `read` reads, with the signs that the operand has around it."""
    if kind.is_float:
        if operand.absolute and operand.negate:
            return lambda group: -np.abs(read(group))
        if operand.absolute:
            return lambda group: np.abs(read(group))
        if operand.negate:
            return lambda group: -read(group)
        return read
    if not (operand.absolute or operand.negate):
        return read
    if kind not in (U16, U32, U64):
        raise UnknownInstruction(f"the sign of an integer operand {operand.text}")
    # An instruction that moves bits, such as v_cndmask_b32, also takes these signs.
    sign = kind.dtype(1 << (8 * np.dtype(kind.dtype).itemsize - 1))
    kept = ~sign if operand.absolute else ~kind.dtype(0)
    flipped = sign if operand.negate else kind.dtype(0)
    return lambda group: (read(group) & kept) ^ flipped


@functools.cache
def vector_writer(operand: Operand, kind: Kind, half: int | None = None) -> Writer:
    """Writes a result, broadcast to (waves, lanes), where EXEC is set.

    Args:
        operand: vector or accumulation registers.
        kind: of the result, whose dtype the value has.
        half: of a 16-bit result: the half that is written while the other one stays; None writes 0
            into the other half, if the operand names none.
    """
    registers = operand.require_registers("va")
    first, file = registers.first, registers.file
    if kind.words == 2:

        def write_two(group: WaveGroup, value: Any) -> None:
            array = getattr(group, f"{file}_u32")
            value = np.asarray(value).view(np.uint64)
            group.put(array[first], low32(value))
            group.put(array[first + 1], high32(value))

        return write_two
    name = f"{file}_{kind.name}"
    if not kind.words:
        place = operand.half if operand.half is not None else half

        def write_half(group: WaveGroup, value: Any) -> None:
            halves = getattr(group, name)[first]
            group.put(halves[..., place or 0], value)
            if place is None:
                group.put(halves[..., 1], kind.dtype(0))

        return write_half

    def write(group: WaveGroup, value: Any) -> None:
        if group.full:
            getattr(group, name)[first] = value
        else:
            np.copyto(getattr(group, name)[first], value, where=group.exec)

    return write


@functools.cache
def scalar_writer(operand: Operand, kind: Kind) -> Writer:
    """Writes a result, broadcast to (waves,); a write to EXEC takes effect at once."""
    if operand.text == "null":
        return lambda group, value: None
    registers = operand.require_registers("s")
    first = registers.first
    if kind.words == 2:

        def write_two(group: WaveGroup, value: Any) -> None:
            pairs = np.ascontiguousarray(value).view(np.uint32).reshape(-1, 2)
            group.s_u32[first : first + 2] = pairs.T
            if first == EXEC:
                group.exec_changed()

        return write_two
    name = f"s_{kind.name}"

    def write(group: WaveGroup, value: Any) -> None:
        getattr(group, name)[first] = value
        if first >= EXEC:
            group.exec_changed()

    return write


@functools.cache
def mask_reader(operand: Operand) -> Reader:
    """Reads a lane mask, one bit a lane, as (waves, lanes) bool."""
    if operand.registers is None:
        value = bool(int(constant(operand.text, I32)))
        return lambda group: np.full(group.exec.shape, value)
    first = operand.require_registers("s").first
    return lambda group: group.lane_mask(first)


@functools.cache
def mask_writer(operand: Operand) -> Writer:
    """Writes (waves, lanes) bool as a lane mask, with 0 for lanes that EXEC leaves out."""
    if operand.text == "null":
        return lambda group, value: None
    first = operand.require_registers("s").first
    return lambda group, value: group.put_lane_mask(first, value)
