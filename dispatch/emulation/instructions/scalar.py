"""Decodes instructions on scalar registers, which compute one value for a wave."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic.bits import high32, low32
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    U32,
    U64,
    Kind,
    Operand,
    Reader,
    Writer,
    constant,
    parse_operand,
    scalar_reader,
    scalar_writer,
)
from attn_dispatch.emulation.instructions.scalar_table import (
    EXEC_TABLE,
    PAIR,
    PLACES,
    SIGNED_16,
    TABLE,
    UNSIGNED_16,
    Scalar,
)
from attn_dispatch.emulation.instructions.semantics import Execute, Semantics
from attn_dispatch.emulation.registers import EXEC
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]

#: Why the emulator does not know these.
_REJECTED = {
    **dict.fromkeys(
        ("s_getpc_b64", "s_setpc_b64", "s_swappc_b64", "s_call_b64", "s_rfe_b64"),
        "instructions have no addresses here, so a kernel cannot call functions",
    ),
    **dict.fromkeys(
        ("s_getreg_b32", "s_setreg_b32"),
        "hardware registers, such as the rounding mode, are not emulated",
    ),
    **dict.fromkeys(("s_memtime", "s_memrealtime"), "there is no clock"),
    "s_trap": "there is no trap handler",
}

_SET_OVERFLOW = re.compile(
    r"s_setreg_imm32_b32 hwreg\(HW_REG_(?:WAVE_)?MODE, 23, 1\), (0|1|0x0|0x1)"
)
#: The two fields of rounding, of float32 and of the other floats.
_ROUND_TO_NEAREST = re.compile(
    r"s_setreg_imm32_b32 hwreg\(HW_REG_(?:WAVE_)?MODE, (?:0|2), 2\), (?:0|0x0)"
)


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What an instruction on scalar registers does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the form of its operands is not known.
    """
    opcode = instruction.opcode
    if opcode in _REJECTED:
        raise UnknownInstruction(_REJECTED[opcode])
    if opcode == "s_setreg_imm32_b32":
        return Semantics(_set_mode(instruction))
    if opcode not in TABLE and opcode not in EXEC_TABLE:
        return None
    if instruction.modifiers:
        raise UnknownInstruction(f"the modifiers {', '.join(instruction.modifiers)} are not known")
    operands = [parse_operand(text) for text in instruction.operands]
    if opcode in EXEC_TABLE:
        return Semantics(_execute_with_exec(opcode, operands, target))
    return Semantics(_execute(TABLE[opcode], operands))


def _set_mode(instruction: Instruction) -> Execute:
    """Bit 23 of MODE, FP16_OVFL, is the only one that is emulated; floats round to nearest."""
    if _ROUND_TO_NEAREST.fullmatch(instruction.text):
        return lambda group: None
    found = _SET_OVERFLOW.fullmatch(instruction.text)
    if found is None:
        raise UnknownInstruction(_REJECTED["s_setreg_b32"])
    saturates = int(found[1], 0) == 1
    return lambda group: setattr(group, "saturates", saturates)


def _execute(scalar: Scalar, operands: list[Operand]) -> Execute:
    compute, new_scc = scalar.compute, scalar.scc
    sources = operands if scalar.result is None else operands[1:]
    readers = [
        _reader(operand, kind) for operand, kind in zip(sources, scalar.sources, strict=True)
    ]
    if scalar.reads_result and scalar.result is not None:
        readers.append(_reader(operands[0], scalar.result))
    if scalar.reads_scc:
        readers.append(lambda group: group.scc)
    if scalar.result is None:
        return lambda group: _set_scc(group, compute(*[read(group) for read in readers]))
    write = _writer(operands[0], scalar.result)
    if new_scc is None:
        return lambda group: write(group, compute(*[read(group) for read in readers]))

    def execute(group: WaveGroup) -> None:
        values = [read(group) for read in readers]
        result = compute(*values)
        # Before the result is written: the values may be views of its registers.
        _set_scc(group, new_scc(result, *values))
        write(group, result)

    return execute


def _set_scc(group: WaveGroup, value: Any) -> None:
    # Of constants only, it is a single value and not one for each wave.
    is_single = np.shape(value) != group.ids.shape
    group.scc = np.broadcast_to(value, group.ids.shape) if is_single else value


def _execute_with_exec(opcode: str, operands: list[Operand], target: Target) -> Execute:
    kind, compute, is_set = EXEC_TABLE[opcode]
    destination, source = operands
    if kind.words != target.wave_size // 32:
        raise UnknownInstruction(f"EXEC has {target.wave_size} bits")
    exec_ = parse_operand("exec" if kind is PAIR else "exec_lo")
    read, read_exec = _reader(source, kind), _reader(exec_, kind)
    write, write_exec = _writer(destination, kind), _writer(exec_, kind)

    def execute(group: WaveGroup) -> None:
        old = read_exec(group)
        new = compute(read(group), old)
        group.scc = is_set(new)
        write(group, old)
        write_exec(group, new)

    return execute


def _reader(operand: Operand, kind: Kind) -> Reader:
    if kind in (SIGNED_16, UNSIGNED_16):
        number = int(operand.text, 0)
        if not -(1 << 15) <= number < 1 << 16:
            raise UnknownInstruction(f"{operand.text} is no 16-bit constant")
        narrow = np.int16 if kind is SIGNED_16 else np.uint16
        value = kind.dtype(np.array(number).astype(narrow))
        return lambda group: value
    if kind in PLACES.values():
        _check_count(operand, U32)
        dtype, read = np.dtype(kind.dtype), scalar_reader(operand, U32)
        mask = np.uint32(8 * dtype.itemsize - 1)
        return lambda group: (read(group) & mask).astype(dtype)
    _check_count(operand, kind)
    if kind is not PAIR:
        return scalar_reader(operand, kind)
    if operand.registers is None:
        joined = np.asarray(constant(operand.text, U64))
        words = np.stack([low32(joined), high32(joined)])[:, None]
        return lambda group: words
    first = operand.require_registers("s").first
    return lambda group: group.s_u32[first : first + 2]


def _check_count(operand: Operand, kind: Kind) -> None:
    registers, count = operand.registers, max(kind.words, 1)
    if registers is not None and registers.count != count:
        raise UnknownInstruction(f"{operand.text} are {registers.count} registers, not {count}")


def _writer(operand: Operand, kind: Kind) -> Writer:
    _check_count(operand, kind)
    if kind is not PAIR or operand.text == "null":
        return scalar_writer(operand, kind)
    first = operand.require_registers("s").first

    def write(group: WaveGroup, value: Any) -> None:
        group.s_u32[first : first + 2] = value
        if first == EXEC:
            group.exec_changed()

    return write
