"""Decodes matrix instructions: v_mfma_* and v_wmma_*."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.matrix import (
    MatrixShape,
    multiply_cdna,
    multiply_rdna3,
    multiply_rdna4,
    shape_of,
)
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    F16,
    F32,
    I32,
    Operand,
    Reader,
    constant,
    parse_operand,
)
from attn_dispatch.emulation.instructions.semantics import Execute, Semantics
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]

#: What the constants of C mean. bfloat16 constants are not known.
_ACCUMULATORS = {"f32": F32, "i32": I32, "f16": F16}


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What a matrix instruction does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the emulator does not know this matrix instruction.
    """
    opcode, modifiers = instruction.opcode, dict(instruction.modifiers)
    if not opcode.startswith(("v_mfma_", "v_wmma_", "v_smfmac_", "v_swmmac_")):
        return None
    if opcode.startswith("v_mfma_"):
        cbsz, abid, blgp = (int(modifiers.pop(name, "0")) for name in ("cbsz", "abid", "blgp"))
        shape, in_upper_half = shape_of(opcode, target, cbsz=cbsz, abid=abid, blgp=blgp), False
    else:
        neg_lo = _flags(modifiers.pop("neg_lo", "[0,0,0]"))
        shape = shape_of(opcode, target, neg_lo=neg_lo)
        in_upper_half = _writes_upper_half(modifiers.pop("op_sel", "[0,0,0]"), shape)
    if modifiers:
        raise UnknownInstruction(f"the modifiers {', '.join(modifiers)} are not known")
    return Semantics(_execute(instruction, target, shape, in_upper_half))


def _flags(text: str) -> tuple[int, ...]:
    return tuple(ast.literal_eval(text))


def _writes_upper_half(op_sel: str, shape: MatrixShape) -> bool:
    """RDNA3 has 16-bit accumulators in one half of each register, which `op_sel[2]` chooses."""
    flags = _flags(op_sel)
    if any(flags[:2]) or (any(flags) and not (shape.is_duplicated and _is_16_bits(shape))):
        raise UnknownInstruction(f"op_sel:{op_sel} is not known for {shape.accumulator} results")
    return bool(flags[2])


def _is_16_bits(shape: MatrixShape) -> bool:
    return shape.accumulator.endswith("16")


def _execute(
    instruction: Instruction, target: Target, shape: MatrixShape, in_upper_half: bool
) -> Execute:
    files = "va" if target.is_cdna else "v"
    destination, *sources = (parse_operand(text) for text in instruction.operands)
    read_a, read_b = (_words(each, shape.input_registers, files) for each in sources[:2])
    read_c = _accumulators(sources[2], shape, files)
    read_d = _words(destination, shape.accumulator_registers, files)
    multiply: Callable[[WaveGroup], Any]
    if target.is_cdna:

        def multiply(group: WaveGroup) -> Any:
            return multiply_cdna(shape, read_a(group), read_b(group), read_c(group))

    elif target.generation == 11:
        keeps_half = _is_16_bits(shape)

        def multiply(group: WaveGroup) -> Any:
            old = read_d(group) if keeps_half else None
            a, b, c = read_a(group), read_b(group), read_c(group)
            return multiply_rdna3(shape, a, b, c, old, in_upper_half)

    else:

        def multiply(group: WaveGroup) -> Any:
            return multiply_rdna4(shape, read_a(group), read_b(group), read_c(group))

    needs_all_lanes = not target.is_cdna

    def execute(group: WaveGroup) -> None:
        if needs_all_lanes and not group.full:
            raise KernelFault("A WMMA instruction needs all lanes in EXEC.")
        read_d(group)[...] = multiply(group)

    return execute


def _words(operand: Operand, count: int, files: str) -> Callable[[WaveGroup], NDArray[np.uint32]]:
    """The registers themselves, (count, waves, lanes): EXEC has no part in matrix instructions."""
    registers = operand.require_registers(files)
    if registers.count != count:
        raise UnknownInstruction(f"{operand.text} are {registers.count} registers, not {count}")
    name, first, end = f"{registers.file}_u32", registers.first, registers.first + count
    return lambda group: getattr(group, name)[first:end]


def _accumulators(operand: Operand, shape: MatrixShape, files: str) -> Reader:
    if operand.negate or operand.absolute:
        raise UnknownInstruction(f"the sign of {operand.text} is not known")
    if operand.registers is not None:
        return _words(operand, shape.accumulator_registers, files)
    kind = _ACCUMULATORS.get(shape.accumulator)
    if kind is None and operand.text != "0":
        raise UnknownInstruction(f"{operand.text} is not known as a {shape.accumulator}")
    value = float(constant(operand.text, kind)) if kind else 0.0
    return lambda group: value
