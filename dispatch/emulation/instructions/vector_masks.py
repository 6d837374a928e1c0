"""Vector instructions with lane masks: comparisons, selections, carries, steps of divisions.

A lane mask is a scalar register (two for waves of 64 lanes) with a bit for each lane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.modifiers import Form, by_opcode, decode_form
from attn_dispatch.emulation.instructions.operands import (
    F16,
    F32,
    I16,
    I32,
    I64,
    U16,
    U32,
    U64,
)
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.registers import EXEC
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["CLASSES", "COMPARISONS", "FORMS", "decode"]

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


#: Opcode -> test of the class of a float; `v_cmpx_...` writes EXEC.
CLASSES: dict[str, Form] = {
    f"v_cmp{x}_class_{kind.name}": Form(None, (kind, bits), _is_in_classes, writes_mask=True)
    for kind, bits in ((F32, U32), (F16, U16))
    for x in ("", "x")
}

#: Opcode -> comparison; `v_cmpx_...` writes EXEC.
COMPARISONS: dict[str, Form] = {
    f"v_cmp{x}_{name}_{kind.name}": Form(None, (kind, kind), compare, writes_mask=True)
    for kind in (F32, F16, I16, U16, I32, U32, I64, U64)
    for name, compare in (_OF_FLOATS if kind.is_float else _OF_INTEGERS).items()
    for x in ("", "x")
}


# Carries ------------------------------------------------------------------------------------------
def _add(a: Any, b: Any) -> Any:
    """The sum and its carry."""
    total = a + b
    return total, total < a


def _add_carry(a: Any, b: Any, carry: Any) -> Any:
    total = a + b
    result = total + carry
    return result, (total < a) | (result < total)


def _subtract(a: Any, b: Any) -> Any:
    """The difference and its borrow."""
    return a - b, a < b


def _subtract_borrow(a: Any, b: Any, borrow: Any) -> Any:
    difference = a - b
    return difference - borrow, (a < b) | (difference < borrow)


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


def _carry(compute: _Function, takes_carry: bool = False) -> Form:
    return Form(U32, (U32, U32), compute, reads_mask=takes_carry, writes_mask=True)


def _select(if_unset: Any, if_set: Any, mask: Any) -> Any:
    return np.where(mask, if_set, if_unset)


#: Opcode -> what it computes. Of two names of a carry, RDNA has the second.
FORMS: dict[str, Form] = by_opcode(
    {
        "v_cndmask_b32": Form(U32, (U32, U32), _select, reads_mask=True),
        "v_cndmask_b16": Form(U16, (U16, U16), _select, reads_mask=True),
        "v_add_co_u32": _carry(_add),
        "v_sub_co_u32": _carry(_subtract),
        "v_subrev_co_u32": _carry(lambda a, b: _subtract(b, a)),
        "v_addc_co_u32 v_add_co_ci_u32": _carry(_add_carry, True),
        "v_subb_co_u32 v_sub_co_ci_u32": _carry(_subtract_borrow, True),
        "v_subbrev_co_u32 v_subrev_co_ci_u32": _carry(
            lambda a, b, borrow: _subtract_borrow(b, a, borrow), True
        ),
        "v_mad_u64_u32 v_mad_co_u64_u32": Form(
            U64, (U32, U32, U64), _multiply_add_u64, writes_mask=True
        ),
        "v_mad_i64_i32 v_mad_co_i64_i32": Form(
            I64, (I32, I32, I64), _multiply_add_i64, writes_mask=True
        ),
        "v_div_scale_f32": Form(F32, (F32, F32, F32), numerics.division_scale, writes_mask=True),
        # The text does not name VCC, which has what v_div_scale wrote.
        "v_div_fmas_f32": Form(F32, (F32, F32, F32), numerics.division_fmas, reads_mask=True),
    }
)


def decode(instruction: Instruction, target: Target) -> Operation | None:
    """Decode a vector instruction with a lane mask.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
        ValueError: it has another number of operands.
    """
    opcode = instruction.opcode
    form = FORMS.get(opcode) or COMPARISONS.get(opcode) or CLASSES.get(opcode)
    if form is None:
        return None
    operands = instruction.operands
    if form.reads_mask and form.writes_mask and len(operands) != 5:
        raise UnknownInstruction(f"{len(operands)} operands")
    if not opcode.startswith("v_cmpx_"):
        return decode_form(instruction, target, form)
    if not target.is_cdna:
        return decode_form(replace(instruction, operands=("exec", *operands)), target, form)
    # CDNA writes a mask as well as EXEC.
    comparison = decode_form(instruction, target, form)

    def commit(group: WaveGroup, mask: Any) -> None:
        comparison.commit(group, mask)
        group.put_lane_mask(EXEC, mask)

    return Operation(comparison.compute, commit)
