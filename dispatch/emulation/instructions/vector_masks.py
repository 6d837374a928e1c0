"""Vector instructions with lane masks: comparisons, selections, carries, steps of divisions.

A lane mask is a scalar register (two for waves of 64 lanes) with a bit for each lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.modifiers import VectorOperands, clamped
from attn_dispatch.emulation.instructions.operands import (
    F16,
    F32,
    I16,
    I32,
    I64,
    U16,
    U32,
    U64,
    Kind,
    Reader,
    mask_reader,
    mask_writer,
    parse_operand,
)
from attn_dispatch.emulation.instructions.semantics import Operation, Semantics
from attn_dispatch.emulation.registers import EXEC, VCC
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["CARRIES", "CLASSES", "COMPARISONS", "OTHERS", "SELECTIONS", "decode"]

_Function = Callable[..., Any]


# Comparisons --------------------------------------------------------------------------------------
def _ordered(a: Any, b: Any) -> Any:
    return ~(np.isnan(a) | np.isnan(b))


def _less_or_greater(a: Any, b: Any) -> Any:
    return (a < b) | (a > b)


def _not(compare: _Function) -> _Function:
    return lambda a, b: ~compare(a, b)


_ORDER: dict[str, _Function] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OF_INTEGERS: dict[str, _Function] = {**_ORDER, "ne": np.not_equal}
#: With NaN, `nge` is not `lt`: it is true.
_OF_FLOATS: dict[str, _Function] = {
    **_ORDER,
    "lg": _less_or_greater,
    "o": _ordered,
    "u": _not(_ordered),
    "nge": _not(np.greater_equal),
    "nlg": _not(_less_or_greater),
    "ngt": _not(np.greater),
    "nle": _not(np.less_equal),
    "neq": np.not_equal,
    "nlt": _not(np.less),
}

#: Opcode -> kind of both sources and function; `v_cmpx_...` writes EXEC.
COMPARISONS: dict[str, tuple[Kind, _Function]] = {
    f"v_cmp{x}_{name}_{kind.name}": (kind, compare)
    for kind in (F32, F16, I16, U16, I32, U32, I64, U64)
    for name, compare in (_OF_FLOATS if kind.is_float else _OF_INTEGERS).items()
    for x in ("", "x")
}


def _class_bit(value: Any) -> Any:
    """The number of the class that a float belongs to, from 0: signaling NaN to 9: infinity."""
    word = np.uint32 if value.dtype == np.float32 else np.uint16
    quiet = word(1 << (np.finfo(value.dtype).nmant - 1))
    negative = np.signbit(value)
    return np.select(
        [
            np.isnan(value),
            np.isinf(value),
            np.abs(value) >= np.finfo(value.dtype).smallest_normal,
            value != 0,
        ],
        [
            np.where(value.view(word) & quiet, 1, 0),
            np.where(negative, 2, 9),
            np.where(negative, 3, 8),
            np.where(negative, 4, 7),
        ],
        np.where(negative, 5, 6),
    )


def _is_in_classes(value: Any, classes: Any) -> Any:
    """Whether a float belongs to one of the classes, one bit for each."""
    return (classes.astype(np.int64) >> _class_bit(value)) & 1 != 0


#: Opcode -> kinds of the sources.
CLASSES: dict[str, tuple[Kind, Kind]] = {
    "v_cmp_class_f32": (F32, U32),
    "v_cmpx_class_f32": (F32, U32),
    "v_cmp_class_f16": (F16, U16),
    "v_cmpx_class_f16": (F16, U16),
}


def _decode_comparison(
    instruction: Instruction, target: Target, kinds: tuple[Kind, Kind], compare: _Function
) -> Operation:
    operands = VectorOperands(instruction, target, 2)
    *results, first, second = instruction.operands
    read_first, read_second = (
        operands.source(i, text, kind)
        for i, (text, kind) in enumerate(zip((first, second), kinds, strict=True))
    )
    operands.require_all_lanes()
    operands.finish()
    writers = [mask_writer(parse_operand(text)) for text in results]
    writes_exec = instruction.opcode.startswith("v_cmpx")
    # On RDNA, v_cmpx writes nothing but EXEC; on CDNA, a mask too.
    if len(writers) != (0 if writes_exec and not target.is_cdna else 1):
        raise UnknownInstruction(f"{len(instruction.operands)} operands")
    if writes_exec:
        writers.append(lambda group, value: group.put_lane_mask(EXEC, value))
    if len(writers) == 1:
        return Operation(lambda group: compare(read_first(group), read_second(group)), writers[0])

    def commit(group: WaveGroup, value: Any) -> None:
        for write in writers:
            write(group, value)

    return Operation(lambda group: compare(read_first(group), read_second(group)), commit)


# Selections ---------------------------------------------------------------------------------------
#: Opcode -> kind of what is selected.
SELECTIONS: dict[str, Kind] = {"v_cndmask_b32": U32, "v_cndmask_b16": U16}


def _decode_selection(instruction: Instruction, target: Target, kind: Kind) -> Operation:
    operands = VectorOperands(instruction, target, 2)
    result, first, second, *mask = instruction.operands
    # A dual-issued instruction does not name VCC.
    read_mask = mask_reader(parse_operand(mask[0] if mask else "vcc_lo"))
    if_unset, if_set = operands.source(0, first, kind), operands.source(1, second, kind)
    return operands.operation(
        result,
        kind,
        lambda group: np.where(read_mask(group), if_set(group), if_unset(group)),
    )


# Carries ------------------------------------------------------------------------------------------
def _add(a: Any, b: Any, carry: Any) -> Any:
    """The sum and its carry; `carry` is None or comes in. So in the other functions."""
    total = a + b
    if carry is None:
        return total, total < a
    result = total + carry
    return result, (total < a) | (result < total)


def _subtract(a: Any, b: Any, borrow: Any) -> Any:
    difference = a - b
    if borrow is None:
        return difference, a < b
    return difference - borrow, (a < b) | (difference < borrow)


def _subtract_reversed(a: Any, b: Any, borrow: Any) -> Any:
    return _subtract(b, a, borrow)


#: Opcode -> function of uint32 sources, and whether a carry comes in.
CARRIES: dict[str, tuple[_Function, bool]] = {
    "v_add_co_u32": (_add, False),
    "v_sub_co_u32": (_subtract, False),
    "v_subrev_co_u32": (_subtract_reversed, False),
    # CDNA
    "v_addc_co_u32": (_add, True),
    "v_subb_co_u32": (_subtract, True),
    "v_subbrev_co_u32": (_subtract_reversed, True),
    # RDNA
    "v_add_co_ci_u32": (_add, True),
    "v_sub_co_ci_u32": (_subtract, True),
    "v_subrev_co_ci_u32": (_subtract_reversed, True),
}


def _decode_carry(
    instruction: Instruction, target: Target, compute: _Function, takes_carry: bool
) -> Operation:
    operands = VectorOperands(instruction, target, 2)
    result, carry_out, first, second, *carry_in = instruction.operands
    if len(carry_in) != takes_carry:
        raise UnknownInstruction(f"{len(instruction.operands)} operands")
    read_first, read_second = operands.source(0, first, U32), operands.source(1, second, U32)
    read_carry = mask_reader(parse_operand(carry_in[0])) if takes_carry else None

    def both(group: WaveGroup) -> Any:
        carry = None if read_carry is None else read_carry(group)
        return compute(read_first(group), read_second(group), carry)

    return operands.two_results(result, U32, both, mask_writer(parse_operand(carry_out)))


# 64-bit multiplication, division ------------------------------------------------------------------
def _multiply_add_u64(a: Any, b: Any, c: Any) -> Any:
    """The sum and bit 64 of it."""
    total = a.astype(np.uint64) * b.astype(np.uint64) + c
    return total, total < c


def _multiply_add_i64(a: Any, b: Any, c: Any) -> Any:
    """The sum and bit 64 of it, which is the sign of the exact sum."""
    product = a.astype(np.int64) * b.astype(np.int64)
    total = product + c
    overflows = ((product ^ total) & (c ^ total)) < 0
    return total, (total < 0) ^ overflows


def _read(operands: VectorOperands, texts: list[str], kinds: tuple[Kind, ...]) -> list[Reader]:
    pairs = enumerate(zip(texts, kinds, strict=True))
    return [operands.source(i, text, kind) for i, (text, kind) in pairs]


def _decode_multiply_add(instruction: Instruction, target: Target) -> Operation:
    operands = VectorOperands(instruction, target, 3)
    result, carry_out, *sources = instruction.operands
    is_signed = instruction.opcode.endswith("i32")
    kind, compute = (I64, _multiply_add_i64) if is_signed else (U64, _multiply_add_u64)
    a, b, c = _read(operands, sources, (I32, I32, I64) if is_signed else (U32, U32, U64))
    return operands.two_results(
        result,
        kind,
        lambda group: compute(a(group), b(group), c(group)),
        mask_writer(parse_operand(carry_out)),
    )


def _decode_division_scale(instruction: Instruction, target: Target) -> Operation:
    operands = VectorOperands(instruction, target, 3)
    result, scaled, *sources = instruction.operands
    a, b, c = _read(operands, sources, (F32, F32, F32))
    return operands.two_results(
        result,
        F32,
        lambda group: numerics.division_scale(a(group), b(group), c(group)),
        mask_writer(parse_operand(scaled)),
    )


def _decode_division_fmas(instruction: Instruction, target: Target) -> Operation:
    """VCC, which the text does not name, has what v_div_scale wrote."""
    operands = VectorOperands(instruction, target, 3)
    result, *sources = instruction.operands
    a, b, c = _read(operands, sources, (F32, F32, F32))
    clamps = operands.take("clamp") is not None

    def compute(group: WaveGroup) -> Any:
        flag = group.lane_mask(VCC)
        value = numerics.division_fmas(a(group), b(group), c(group), flag)
        return clamped(value) if clamps else value

    return operands.operation(result, F32, compute)


#: Opcode -> how it is decoded.
OTHERS: dict[str, Callable[[Instruction, Target], Operation]] = {
    "v_mad_u64_u32": _decode_multiply_add,
    "v_mad_i64_i32": _decode_multiply_add,
    "v_mad_co_u64_u32": _decode_multiply_add,
    "v_mad_co_i64_i32": _decode_multiply_add,
    "v_div_scale_f32": _decode_division_scale,
    "v_div_fmas_f32": _decode_division_fmas,
}


def decode(instruction: Instruction, target: Target) -> Operation | Semantics | None:
    """Decode a vector instruction with a lane mask.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
        ValueError: it has another number of operands.
    """
    opcode = instruction.opcode
    if opcode in COMPARISONS:
        kind, compare = COMPARISONS[opcode]
        return _decode_comparison(instruction, target, (kind, kind), compare)
    if opcode in CLASSES:
        return _decode_comparison(instruction, target, CLASSES[opcode], _is_in_classes)
    if opcode in SELECTIONS:
        return _decode_selection(instruction, target, SELECTIONS[opcode])
    if opcode in CARRIES:
        return _decode_carry(instruction, target, *CARRIES[opcode])
    if opcode in OTHERS:
        return OTHERS[opcode](instruction, target)
    return None
