"""Vector instructions on two values at a time, and on halves of registers as float32.

For each of the two results, `op_sel` and `op_sel_hi` say which half of each source is taken, and
`neg_lo` and `neg_hi` change its sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.modifiers import (
    Form,
    applied,
    by_opcode,
    clamped,
    saturated,
    selections,
)
from attn_dispatch.emulation.instructions.operands import (
    F16,
    F32,
    I16,
    U16,
    U32,
    Kind,
    Operand,
    Reader,
    constant,
    parse_operand,
    vector_reader,
    vector_writer,
    with_signs,
)
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["FORMS", "MIXED", "decode"]

_SMALLER, _LARGER = numerics.minimum_number, numerics.maximum_number


def _shift_left(amount: Any, value: Any) -> Any:
    return value << (amount & value.dtype.type(15))


def _shift_right(amount: Any, value: Any) -> Any:
    return value >> (amount & value.dtype.type(15))


#: Opcode -> what it computes for each of the two values. The kind of the result is also that of
#: all sources.
FORMS: dict[str, Form] = by_opcode(
    {
        "v_pk_add_f16": Form(F16, (F16, F16), np.add),
        "v_pk_mul_f16": Form(F16, (F16, F16), np.multiply),
        "v_pk_fma_f16": Form(F16, (F16, F16, F16), numerics.fused_multiply_add),
        "v_pk_min_f16 v_pk_min_num_f16": Form(F16, (F16, F16), _SMALLER),
        "v_pk_max_f16 v_pk_max_num_f16": Form(F16, (F16, F16), _LARGER),
        "v_pk_add_u16": Form(U16, (U16, U16), np.add, saturates=True),
        "v_pk_sub_u16": Form(U16, (U16, U16), np.subtract, saturates=True),
        "v_pk_add_i16": Form(I16, (I16, I16), np.add, saturates=True),
        "v_pk_sub_i16": Form(I16, (I16, I16), np.subtract, saturates=True),
        "v_pk_mul_lo_u16": Form(U16, (U16, U16), np.multiply),
        "v_pk_mad_u16": Form(U16, (U16, U16, U16), lambda a, b, c: a * b + c),
        "v_pk_mad_i16": Form(I16, (I16, I16, I16), lambda a, b, c: a * b + c),
        "v_pk_min_u16": Form(U16, (U16, U16), np.minimum),
        "v_pk_max_u16": Form(U16, (U16, U16), np.maximum),
        "v_pk_min_i16": Form(I16, (I16, I16), np.minimum),
        "v_pk_max_i16": Form(I16, (I16, I16), np.maximum),
        "v_pk_lshlrev_b16": Form(U16, (U16, U16), _shift_left),
        "v_pk_lshrrev_b16": Form(U16, (U16, U16), _shift_right),
        "v_pk_ashrrev_i16": Form(I16, (I16, I16), _shift_right),
        "v_pk_add_f32": Form(F32, (F32, F32), np.add),
        "v_pk_mul_f32": Form(F32, (F32, F32), np.multiply),
        "v_pk_fma_f32": Form(F32, (F32, F32, F32), numerics.fused_multiply_add),
    }
)

#: Opcode of a fused multiply-add of float32, or float16 as float32 -> kind and half of its result.
MIXED: dict[str, tuple[Kind, int]] = {
    "v_fma_mix_f32": (F32, 0),
    "v_fma_mixlo_f16": (F16, 0),
    "v_fma_mixhi_f16": (F16, 1),
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

    def halves(self, index: int) -> tuple[int, int]:
        """The halves of a source that the two results take."""
        return self.low[index], self.high[index]

    def signs(self, index: int) -> tuple[int, int]:
        """Whether the two results change the sign of a source."""
        return self.negate_low[index], self.negate_high[index]


# Two 16-bit values in a register ------------------------------------------------------------------
def _constant_halves(text: str, kind: Kind) -> Any:
    """Both halves of a constant. An inline float of 16 bits has 0 in the upper half."""
    if kind.is_float and "." in text:
        return np.array([constant(text, kind), 0], kind.dtype)
    return np.asarray(constant(text, U32)).reshape(1).view(kind.dtype)


def _halves_reader(
    operand: Operand, kind: Kind, halves: tuple[int, int], signs: tuple[int, int]
) -> Reader:
    """Reads (waves, lanes, 2), the lower result first; or what broadcasts to it."""
    if operand.negate or operand.absolute or operand.half is not None:
        raise UnknownInstruction(f"the operand {operand.text} with a sign or half of its own")
    chosen = {
        (0, 0): slice(0, 1),
        (0, 1): slice(0, 2),
        (1, 0): slice(None, None, -1),
        (1, 1): slice(1, 2),
    }[halves]
    if any(signs) and not kind.is_float:
        raise UnknownInstruction(f"the sign of the integer {operand.text}")
    flips = np.array(signs, np.uint16) << np.uint16(15)
    registers = operand.registers
    if registers is None:
        value = _constant_halves(operand.text, kind)[chosen]
        if any(signs):
            value = (value.view(np.uint16) ^ flips).view(kind.dtype)
        return lambda group: value
    first = registers.first
    file = "column" if registers.file == "s" else registers.file
    name, bits = f"{file}_{kind.name}", f"{file}_u16"
    if not any(signs):
        return lambda group: getattr(group, name)[first][..., chosen]
    # Without the sign operation, which would be slower for float16.
    return lambda group: (getattr(group, bits)[first][..., chosen] ^ flips).view(kind.dtype)


def _decode_halves(instruction: Instruction, form: Form) -> Operation:
    kind, count = form.result, len(form.sources)
    modifiers = _Modifiers(instruction, count)
    result, *sources = instruction.operands
    readers = [
        _halves_reader(parse_operand(text), kind, modifiers.halves(i), modifiers.signs(i))
        for i, text in enumerate(sources)
    ]
    compute = form.compute
    if modifiers.clamps and not kind.is_float and not form.saturates:
        raise UnknownInstruction("clamp of this integer result")
    if modifiers.clamps and not kind.is_float:
        compute = saturated(compute, kind)
    both = applied(compute, readers)
    clamps = modifiers.clamps and kind.is_float

    def words(group: WaveGroup) -> Any:
        values = both(group)
        if clamps:
            values = clamped(values)
        if values.shape[-1] == 1:
            values = np.broadcast_to(values, (*values.shape[:-1], 2))
        return np.ascontiguousarray(values).view(np.uint32)[..., 0]

    return Operation(words, vector_writer(parse_operand(result), U32))


# Two registers ------------------------------------------------------------------------------------
def _word_reader(operand: Operand, kind: Kind, which: int) -> Reader:
    """Reads one of two registers. A constant has a value for the first one only, but 0 has two."""
    registers = operand.registers
    if registers is None:
        value = constant(operand.text, kind)
        if which and value != 0:
            raise UnknownInstruction(f"the upper half of the constant {operand.text}")
        return lambda group: value
    if registers.count != 2:
        raise UnknownInstruction(f"{operand.text} is not two registers")
    name = f"{'column' if registers.file == 's' else registers.file}_{kind.name}"
    index = registers.first + which
    return lambda group: getattr(group, name)[index]


def _decode_words(instruction: Instruction, form: Form) -> Operation:
    modifiers = _Modifiers(instruction, len(form.sources))
    result, *sources = instruction.operands

    def half(selected: list[int], negated: list[int]) -> Reader:
        readers = []
        for text, which, negate in zip(sources, selected, negated, strict=True):
            operand = parse_operand(text)
            read = _word_reader(operand, F32, which)
            read = with_signs(operand, F32, read)
            readers.append(_negative(read) if negate else read)
        return applied(form.compute, readers)

    low = half(modifiers.low, modifiers.negate_low)
    high = half(modifiers.high, modifiers.negate_high)
    return _two_words(result, F32, low, high, clamped if modifiers.clamps else None)


def _negative(read: Reader) -> Reader:
    return lambda group: -read(group)


def _two_words(
    result: str, kind: Kind, low: Reader, high: Reader, finish: Callable[[Any], Any] | None = None
) -> Operation:
    """Writes two registers."""
    registers = parse_operand(result).require_registers("va")
    if registers.count != 2:
        raise UnknownInstruction(f"{result} is not two registers")
    name, first = f"{registers.file}_{kind.name}", registers.first

    def compute(group: WaveGroup) -> Any:
        # Copies: a value may be a view of a register that is written first.
        pair = np.empty((2, *group.exec.shape), kind.dtype)
        pair[0], pair[1] = low(group), high(group)
        return pair if finish is None else finish(pair)

    def commit(group: WaveGroup, pair: Any) -> None:
        group.put(getattr(group, name)[first : first + 2], pair)

    return Operation(compute, commit)


def _decode_move(instruction: Instruction) -> Operation:
    """v_pk_mov_b32: one word of each source."""
    modifiers = _Modifiers(instruction, 2)
    if modifiers.clamps or any(modifiers.negate_low + modifiers.negate_high):
        raise UnknownInstruction("a sign or clamp of a move")
    result, first, second = instruction.operands
    low = _word_reader(parse_operand(first), U32, modifiers.low[0])
    high = _word_reader(parse_operand(second), U32, modifiers.low[1])
    return _two_words(result, U32, low, high)


# Mixed precision ----------------------------------------------------------------------------------
def _decode_mixed(instruction: Instruction, kind: Kind, half: int) -> Operation:
    """`op_sel_hi` says which sources are float16, and `op_sel` which half they are in."""
    modifiers = _Modifiers(instruction, 3, default_high=0)
    result, *sources = instruction.operands
    readers = []
    for i, text in enumerate(sources):
        operand = parse_operand(text)
        if modifiers.high[i]:
            read = _as_float32(vector_reader(operand, F16, modifiers.low[i]))
        elif modifiers.low[i]:
            raise UnknownInstruction(f"op_sel of the 32-bit operand {text}")
        else:
            read = vector_reader(operand, F32)
        if modifiers.negate_high[i]:  # as in the encoding, this is the absolute value
            raise UnknownInstruction(f"neg_hi of the operand {text}")
        readers.append(_negative(read) if modifiers.negate_low[i] else read)
    exact = applied(numerics.fused_multiply_add, readers)
    clamps = modifiers.clamps

    def compute(group: WaveGroup) -> Any:
        value = exact(group).astype(kind.dtype)
        return clamped(value) if clamps else value

    return Operation(compute, vector_writer(parse_operand(result), kind, half))


def _as_float32(read: Reader) -> Reader:
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
        if len(instruction.operands) != 1 + len(form.sources):
            raise UnknownInstruction(f"{len(instruction.operands)} operands")
        return (
            _decode_words(instruction, form)
            if form.result is F32
            else _decode_halves(instruction, form)
        )
    if instruction.opcode == "v_pk_mov_b32":
        return _decode_move(instruction)
    if instruction.opcode in MIXED:
        return _decode_mixed(instruction, *MIXED[instruction.opcode])
    return None
