"""Vector instructions on two values at a time, and on halves of registers as float32.

For each of the two results, `op_sel` and `op_sel_hi` say which half of each source is taken, and
`neg_lo` and `neg_hi` change its sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions import vector
from attn_dispatch.emulation.instructions.modifiers import (
    Form,
    applied,
    selections,
    with_clamp,
)
from attn_dispatch.emulation.instructions.operands import (
    F16,
    F32,
    U32,
    Kind,
    Reader,
    constant,
    parse_operand,
    vector_reader,
    vector_writer,
)
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.registers import Registers
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["FORMS", "MIXED", "decode"]

#: The high result is the second source: one word of each.
_MOVE = Form(U32, (U32, U32), lambda first, second: first)
#: Opcode -> what it computes for each of the two values: the same as the instruction on one.
FORMS: dict[str, Form] = {
    f"v_pk_{name}": vector.FORMS[f"v_{name}"]
    for name in (
        "add_f16", "mul_f16", "fma_f16", "min_f16", "max_f16", "min_num_f16", "max_num_f16",
        "add_u16", "sub_u16", "add_i16", "sub_i16", "mul_lo_u16", "mad_u16", "mad_i16",
        "min_u16", "max_u16", "min_i16", "max_i16", "lshlrev_b16", "lshrrev_b16", "ashrrev_i16",
        "add_f32", "mul_f32", "fma_f32",
    )
} | {"v_pk_mov_b32": _MOVE}  # fmt: skip


def _mixed_multiply_add(a: Any, b: Any, c: Any) -> Any:
    return numerics.fused_multiply_add(a, b, c).astype(np.float16)


#: Opcode of a fused multiply-add of float32, or float16 as float32 -> kind and half of its result,
#: and what it computes.
MIXED: dict[str, tuple[Kind, int, Callable[..., Any]]] = {
    "v_fma_mix_f32": (F32, 0, numerics.fused_multiply_add),
    "v_fma_mixlo_f16": (F16, 0, _mixed_multiply_add),
    "v_fma_mixhi_f16": (F16, 1, _mixed_multiply_add),
}


class _Modifiers:
    """op_sel, op_sel_hi, neg_lo and neg_hi: a bit for each source; and whether to clamp."""

    def __init__(self, instruction: Instruction, count: int, default_high: int = 1) -> None:
        left = dict(instruction.modifiers)
        self.low = selections(left.pop("op_sel", None), count)
        self.high = selections(left.pop("op_sel_hi", None), count, default_high)
        self.negate_low = selections(left.pop("neg_lo", None), count)
        self.negate_high = selections(left.pop("neg_hi", None), count)
        self.clamps = left.pop("clamp", None) is not None
        if left or instruction.encoding not in ("", "e64"):
            raise UnknownInstruction(f"{instruction.encoding} {', '.join(left)}".strip())


# Two values ---------------------------------------------------------------------------------------
def _part_reader(text: str, kind: Kind, which: int, negates: int) -> Reader:
    """Reads one of two registers, or a half of one."""
    operand = parse_operand(text)
    registers = operand.registers
    if negates and not kind.is_float:
        raise UnknownInstruction(f"the sign of the integer {text}")
    if not kind.words:
        if operand.negate or operand.absolute or operand.half is not None:
            raise UnknownInstruction(f"the operand {text} with a sign or half of its own")
    elif registers is None:
        # A constant has a value for the first one only, but 0 has two.
        if which and constant(operand.text, kind) != 0:
            raise UnknownInstruction(f"the upper half of the constant {text}")
    elif registers.count != 2:
        raise UnknownInstruction(f"{text} is not two registers")
    else:
        one = Registers(registers.file, registers.first + which, 1)
        operand = replace(operand, registers=one)
    return vector_reader(replace(operand, negate=operand.negate ^ bool(negates)), kind, which)


def _decode_pair(instruction: Instruction, form: Form) -> Operation:
    modifiers = _Modifiers(instruction, len(form.sources))
    result, *sources = instruction.operands
    kind = form.sources[0]

    def part(compute: Callable[..., Any], selected: list[int], negated: list[int]) -> Reader:
        texts = zip(sources, selected, negated, strict=True)
        readers = [_part_reader(text, kind, which, negates) for text, which, negates in texts]
        return applied(compute, readers)

    compute = with_clamp(form) if modifiers.clamps else form.compute
    low = part(compute, modifiers.low, modifiers.negate_low)
    high = (
        part(lambda first, second: second, modifiers.low, modifiers.negate_high)
        if form is _MOVE
        else part(compute, modifiers.high, modifiers.negate_high)
    )
    registers = parse_operand(result).require_registers("va")
    if kind.words and registers.count != 2:
        raise UnknownInstruction(f"{result} is not two registers")
    name, first = f"{registers.file}_{kind.name}", registers.first

    def both(group: WaveGroup) -> Any:
        # Copies: a value may be a view of a register that is written first.
        pair = np.empty((2, *group.exec.shape), kind.dtype)
        pair[0], pair[1] = low(group), high(group)
        return pair

    def commit(group: WaveGroup, pair: Any) -> None:
        file = getattr(group, name)
        parts = file[first : first + 2] if kind.words else np.moveaxis(file[first], -1, 0)
        group.put(parts, pair)

    return Operation(both, commit)


# Mixed precision ----------------------------------------------------------------------------------
def _decode_mixed(
    instruction: Instruction, kind: Kind, half: int, compute: Callable[..., Any]
) -> Operation:
    """`op_sel_hi` says which sources are float16, and `op_sel` which half they are in."""
    modifiers = _Modifiers(instruction, 3, default_high=0)
    result, *sources = instruction.operands
    readers = []
    for i, text in enumerate(sources):
        operand = parse_operand(text)
        if modifiers.high[i]:
            read = _widened(vector_reader(operand, F16, modifiers.low[i]))
        elif modifiers.low[i]:
            raise UnknownInstruction(f"op_sel of the 32-bit operand {text}")
        else:
            read = vector_reader(operand, F32)
        if modifiers.negate_high[i]:  # as in the encoding, this is the absolute value
            raise UnknownInstruction(f"neg_hi of the operand {text}")
        readers.append(_negative(read) if modifiers.negate_low[i] else read)
    if modifiers.clamps:
        compute = with_clamp(Form(kind, (F32, F32, F32), compute))
    return Operation(applied(compute, readers), vector_writer(parse_operand(result), kind, half))


def _negative(read: Reader) -> Reader:
    return lambda group: -read(group)


def _widened(read: Reader) -> Reader:
    return lambda group: read(group).astype(np.float32)


def decode(instruction: Instruction, target: Target) -> Operation | None:
    """Decode a packed or mixed instruction.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
        ValueError: it has another number of operands.
    """
    form = FORMS.get(instruction.opcode)
    if form is not None:
        return _decode_pair(instruction, form)
    if instruction.opcode in MIXED:
        return _decode_mixed(instruction, *MIXED[instruction.opcode])
    return None
