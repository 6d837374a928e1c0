"""Decodes matrix instructions: v_mfma_* and v_wmma_*."""

from __future__ import annotations

import ast
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.matrix import MatrixShape, multiply, shape_of
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    F32,
    I32,
    Operand,
    Reader,
    constant,
    parse_operand,
)
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What a matrix instruction does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the emulator does not know this matrix instruction.
    """
    opcode, modifiers = instruction.opcode, dict(instruction.modifiers)
    if not opcode.startswith(("v_mfma_", "v_wmma_", "v_smfmac_", "v_swmmac_")):
        return None
    cbsz, blgp = (int(modifiers.pop(name, "0")) for name in ("cbsz", "blgp"))
    neg_lo = tuple(ast.literal_eval(modifiers.pop("neg_lo", "[0,0,0]")))
    shape = shape_of(opcode, target, cbsz=cbsz, blgp=blgp, neg_lo=neg_lo)
    if modifiers:
        raise UnknownInstruction(f"the modifiers {', '.join(modifiers)} are not known")

    files = "va" if target.is_cdna else "v"
    destination, *sources = (parse_operand(text) for text in instruction.operands)
    read_a, read_b = (_words(each, shape.input_registers, files) for each in sources[:2])
    read_c = _accumulators(sources[2], shape, files)
    read_d = _words(destination, shape.accumulator_registers, files)
    needs_all_lanes = not target.is_cdna

    def execute(group: WaveGroup) -> None:
        if needs_all_lanes and not group.full:
            raise KernelFault("A WMMA instruction needs all lanes in EXEC.")
        read_d(group)[...] = multiply(shape, read_a(group), read_b(group), read_c(group))

    return Semantics(execute)


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
    value = float(constant(operand.text, I32 if shape.accumulator == "i32" else F32))
    return lambda group: value
