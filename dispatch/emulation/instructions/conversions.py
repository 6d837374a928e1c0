"""Vector instructions that convert between number formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import fp8, numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.instructions.modifiers import Form, by_opcode, decode_form
from attn_dispatch.emulation.instructions.operands import F16, F32, I16, I32, U16, U32, U64, Kind
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.targets import Target

__all__ = ["ENCODING", "FORMS", "SATURATING", "decode", "fp8_forms"]

_Function = Callable[..., Any]
_16, _BYTE = np.uint32(16), np.uint32(0xFF)


def _as(kind: Kind) -> _Function:
    """Rounds to nearest even, if it rounds."""
    return lambda a: a.astype(kind.dtype)


def _to_integer(kind: Kind) -> _Function:
    """Rounds toward zero."""
    return lambda a: numerics.to_integer(a, kind.dtype)


def _byte(index: int) -> _Function:
    shift = np.uint32(8 * index)
    return lambda a: ((a >> shift) & _BYTE).astype(np.float32)


def _pair(low: Any, high: Any) -> Any:
    """One word of two values with 16 bits."""
    words = (np.asarray(each).view(np.uint16).astype(np.uint32) for each in (low, high))
    return next(words) | next(words) << _16


def _packed(convert: _Function) -> _Function:
    """Two sources, converted to 16 bits each, in one word."""
    return lambda a, b: _pair(convert(a), convert(b))


#: Opcode -> what it computes.
FORMS: dict[str, Form] = by_opcode(
    {
        "v_cvt_f32_i32": Form(F32, (I32,), _as(F32)),
        "v_cvt_f32_u32": Form(F32, (U32,), _as(F32)),
        "v_cvt_f64_f32": Form(U64, (F32,), lambda a: a.astype(np.float64).view(np.uint64)),
        "v_cvt_f32_f16": Form(F32, (F16,), _as(F32)),
        "v_cvt_f16_f32": Form(F16, (F32,), _as(F16)),
        "v_cvt_f16_i16": Form(F16, (I16,), _as(F16)),
        "v_cvt_f16_u16": Form(F16, (U16,), _as(F16)),
        "v_cvt_i32_f32": Form(I32, (F32,), _to_integer(I32)),
        "v_cvt_u32_f32": Form(U32, (F32,), _to_integer(U32)),
        "v_cvt_i16_f16": Form(I16, (F16,), _to_integer(I16)),
        "v_cvt_u16_f16": Form(U16, (F16,), _to_integer(U16)),
        "v_cvt_i32_i16": Form(I32, (I16,), _as(I32)),
        "v_cvt_u32_u16": Form(U32, (U16,), _as(U32)),
        **{f"v_cvt_f32_ubyte{i}": Form(F32, (U32,), _byte(i)) for i in range(4)},
        "v_cvt_f32_bf16": Form(F32, (U16,), numerics.from_bfloat16),
        "v_cvt_pk_bf16_f32": Form(U32, (F32, F32), _packed(numerics.to_bfloat16)),
        "v_cvt_pk_f16_f32": Form(U32, (F32, F32), _packed(_as(F16))),
        "v_cvt_pkrtz_f16_f32 v_cvt_pk_rtz_f16_f32": Form(
            U32, (F32, F32), _packed(numerics.to_float16_toward_zero)
        ),
    }
)


def _to_largest_float16(a: Any) -> Any:
    """float16 to nearest even, and the largest where a finite number overflows."""
    largest = np.finfo(np.float16).max
    return np.where(np.isinf(a), a, np.clip(a, -largest, largest)).astype(np.float16)


#: Opcode -> what it computes if the mode saturates.
SATURATING: dict[str, Form] = {
    "v_cvt_f16_f32": Form(F16, (F32,), _to_largest_float16),
    "v_cvt_pk_f16_f32": Form(U32, (F32, F32), _packed(_to_largest_float16)),
}


# 8-bit floats -------------------------------------------------------------------------------------
def _codes(pair: Any) -> Any:
    """The two bytes of 16-bit words, as a last axis."""
    return np.ascontiguousarray(pair)[..., None].view(np.uint8)


def _decode_two(format: str) -> _Function:
    """Two codes as two float32 in one uint64."""
    table = fp8.decode_table(format)
    return lambda pair: table[_codes(pair)].view(np.uint64)[..., 0]


def _encode_two(format: str, split: _Function, saturates: bool) -> _Function:
    def encode(*sources: Any) -> Any:
        low, high = [fp8.encode(each, format, saturates) for each in split(*sources)]
        return (low | high << np.uint32(8)).astype(np.uint16)

    return encode


def _power_of_two(scale: Any) -> Any:
    """The exponent of float32 as a factor; its sign and mantissa do not count."""
    exponent = ((scale.view(np.uint32) >> np.uint32(23)) & _BYTE).astype(np.int32)
    return np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127))


def _decode_two_scaled(format: str, result: str) -> _Function:
    """Two codes times a power of two, as two numbers of the result's format in one word."""
    table = fp8.decode_table(format).astype(np.float64)
    encode: _Function = {
        "f32": lambda exact: exact.astype(np.float32),
        "f16": lambda exact: exact.astype(np.float16),
        "bf16": lambda exact: numerics.to_bfloat16(exact.astype(np.float32)),
    }[result]
    word: Any = np.uint64 if result == "f32" else np.uint32

    def decode(pair: Any, scale: Any) -> Any:
        exact = table[_codes(pair)] * np.asarray(_power_of_two(scale))[..., None]
        return np.ascontiguousarray(encode(exact)).view(word)[..., 0]

    return decode


def _forms_of_format(name: str, format: str) -> dict[str, Form]:
    """The conversions of one format.

    Args:
        name: "fp8" or "bf8".
        format: which format that is on the target.
    """
    table = fp8.decode_table(format)
    forms = {
        f"v_cvt_f32_{name}": Form(F32, (U32,), lambda a: table[a & _BYTE]),
        f"v_cvt_pk_f32_{name}": Form(U64, (U16,), _decode_two(format)),
    }
    for result, kind in (("f32", U64), ("f16", U32), ("bf16", U32)):
        compute = _decode_two_scaled(format, result)
        forms[f"v_cvt_scalef32_pk_{result}_{name}"] = Form(kind, (U16, F32), compute)
    return forms


@cache
def fp8_forms(has_fnuz: bool) -> dict[str, Form]:
    """Opcode -> what it computes, of conversions from 8-bit floats.

    Args:
        has_fnuz: which formats the target has.
    """
    return {
        opcode: form
        for name in ("fp8", "bf8")
        for opcode, form in _forms_of_format(name, fp8.format_of(name, has_fnuz)).items()
    }


def _divided(x: Any, scale: Any) -> Any:
    """float32, divided by the power of two of the scale; finite numbers stay finite."""
    exact = x.astype(np.float64) / _power_of_two(scale)
    limit = np.finfo(np.float32).max
    return np.where(np.isinf(x), exact, np.clip(exact, -limit, limit)).astype(np.float32)


def _two_divided(to_float32: _Function) -> _Function:
    """Splits a word of two 16-bit floats."""

    def split(word: Any, scale: Any) -> Any:
        pair = to_float32(np.ascontiguousarray(word)[..., None].view(np.uint16))
        return _divided(pair[..., 0], scale), _divided(pair[..., 1], scale)

    return split


#: Opcode, without the format -> its sources, and the two float32 that they mean.
_TWO_FLOATS: dict[str, tuple[tuple[Kind, ...], _Function]] = {
    "v_cvt_pk_{}_f32": ((F32, F32), lambda a, b: (a, b)),
    "v_cvt_scalef32_pk_{}_f32": (
        (F32, F32, F32),
        lambda a, b, scale: (_divided(a, scale), _divided(b, scale)),
    ),
    "v_cvt_scalef32_pk_{}_f16": (
        (U32, F32),
        _two_divided(lambda halves: halves.view(np.float16).astype(np.float32)),
    ),
    "v_cvt_scalef32_pk_{}_bf16": ((U32, F32), _two_divided(numerics.from_bfloat16)),
}
#: Opcode -> name of the format that it encodes, its sources, and the two float32 that they mean.
ENCODING = {
    opcode.format(name): (name, *entry)
    for opcode, entry in _TWO_FLOATS.items()
    for name in ("fp8", "bf8")
}


def _decode_encoding(instruction: Instruction, target: Target) -> Operation:
    name, sources, split = ENCODING[instruction.opcode]
    format = fp8.format_of(name, target.has_fnuz)
    plain, saturating = (
        Form(U16, sources, _encode_two(format, split, saturates), keeps_half=True)
        for saturates in (False, True)
    )
    return _decode_by_mode(instruction, target, plain, saturating)


def _decode_by_mode(
    instruction: Instruction, target: Target, plain: Form, saturating: Form
) -> Operation:
    """Whether it saturates depends on the mode of the waves."""
    operation, saturated = (decode_form(instruction, target, each) for each in (plain, saturating))
    return Operation(
        lambda group: (saturated if group.saturates else operation).compute(group),
        operation.commit,
    )


def _with_byte_selection(instruction: Instruction, form: Form) -> tuple[Instruction, Form]:
    """RDNA4 selects the byte of one code by a modifier, CDNA by SDWA."""
    modifiers = dict(instruction.modifiers)
    shift = np.uint32(8 * int(modifiers.pop("byte_sel")))
    compute = form.compute
    form = replace(form, compute=lambda word: compute(word >> shift))
    return replace(instruction, modifiers=modifiers), form


#: Targets without instructions for 8-bit floats.
_WITHOUT_FP8 = ("gfx90a", "gfx1100")


def decode(instruction: Instruction, target: Target) -> Operation | None:
    """Decode a conversion.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
    """
    opcode = instruction.opcode
    if opcode in SATURATING:
        return _decode_by_mode(instruction, target, FORMS[opcode], SATURATING[opcode])
    form = FORMS.get(opcode)
    if form is None and target.name not in _WITHOUT_FP8:
        if opcode in ENCODING:
            return _decode_encoding(instruction, target)
        form = fp8_forms(target.has_fnuz).get(opcode)
        if form is not None and form.sources == (U32,) and "byte_sel" in instruction.modifiers:
            instruction, form = _with_byte_selection(instruction, form)
    return None if form is None else decode_form(instruction, target, form)
