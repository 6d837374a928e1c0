"""Vector instructions that compute one result: moves, integers, bits, float32 and float16.

The semantics are those of the pseudo-code in AMD's instruction set manuals. An instruction has the
same meaning on all targets that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import bits, numerics
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.instructions import vector_masks
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
from attn_dispatch.emulation.instructions.semantics import Operation, Semantics
from attn_dispatch.emulation.targets import Target

__all__ = ["FORMS", "SPECIAL", "decode"]

_Function = Callable[..., Any]
_U24 = np.uint32(0xFFFFFF)
_5_BITS = np.uint32(31)


# Integers and bits --------------------------------------------------------------------------------
def _shift_left(amount: Any, value: Any) -> Any:
    """The amount counts modulo the bits of the value; so in the other shifts."""
    return value << _amount(amount, value)


def _shift_right(amount: Any, value: Any) -> Any:
    return value >> _amount(amount, value)


def _amount(amount: Any, value: Any) -> Any:
    size = amount.dtype.type(8 * value.dtype.itemsize - 1)
    return (amount & size).astype(value.dtype)


def _signed_24(a: Any) -> Any:
    return (a << np.int32(8)) >> np.int32(8)


def _multiply_high(a: Any, b: Any) -> Any:
    """The upper half of the product of 32-bit integers."""
    wide = np.dtype(f"{a.dtype.kind}8").type
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _pack(low: Any, high: Any) -> Any:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


# Floats -------------------------------------------------------------------------------------------
_LARGER, _SMALLER = numerics.maximum_number, numerics.minimum_number


def _multiply_add_flushed(a: Any, b: Any, c: Any) -> Any:
    """v_mac_f32 and v_mad_f32: two roundings; they have no denormals in any mode."""
    flush = numerics.flush_denormals
    return flush(flush(flush(a) * flush(b)) + flush(c))


def _multiply_zero_wins(a: Any, b: Any) -> Any:
    """0 times anything is 0, also infinity and NaN."""
    return np.where((a == 0) | (b == 0), np.float32(0), a * b)


def _maximum(a: Any, b: Any) -> Any:
    """The larger of two floats; NaN wins, and 0 is more than -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))


def _minimum(a: Any, b: Any) -> Any:
    return np.where(a == b, np.where(np.signbit(a), a, b), np.minimum(a, b))


def _then(first: _Function, second: _Function) -> _Function:
    """second(first(a, b), c)."""
    return lambda a, b, c: second(first(a, b), c)


# Tables -------------------------------------------------------------------------------------------
# The end of an opcode in these tables is the kind of its result and of all sources. RDNA4 writes
# `_num` where a number wins over NaN; both spellings have one meaning.
_OF_ONE: dict[str, _Function] = {
    "v_mov_b32 v_mov_b16 v_mov_b64": lambda a: a,
    "v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32": lambda a: a,
    "v_not_b32 v_not_b16": np.invert,
    "v_bfrev_b32": bits.reverse_bits,
    "v_ffbh_u32 v_clz_i32_u32": bits.leading_zeros,
    "v_ffbl_b32 v_ctz_i32_b32": bits.trailing_zeros,
    "v_floor_f32 v_floor_f16": np.floor,
    "v_ceil_f32 v_ceil_f16": np.ceil,
    "v_trunc_f32 v_trunc_f16": np.trunc,
    "v_rndne_f32 v_rndne_f16": np.rint,
    "v_fract_f32": numerics.fraction,
    "v_frexp_mant_f32 v_frexp_mant_f16": numerics.frexp_mantissa,
    "v_sin_f32": numerics.sine,
    "v_cos_f32": numerics.cosine,
    "v_exp_f32": numerics.exp2,
    "v_log_f32": numerics.log2,
    "v_rcp_f32 v_rcp_iflag_f32": numerics.reciprocal,
    "v_rsq_f32": numerics.reciprocal_sqrt,
    "v_sqrt_f32": numerics.sqrt,
}

#: They saturate with `clamp`.
_INTEGER_SUMS: dict[str, _Function] = {
    "v_add_u32 v_add_nc_u32 v_add_i32 v_add_nc_i32 v_add_u16 v_add_nc_u16": np.add,
    "v_sub_u32 v_sub_nc_u32 v_sub_i32 v_sub_nc_i32 v_sub_u16 v_sub_nc_u16": np.subtract,
    "v_subrev_u32 v_subrev_nc_u32 v_subrev_u16": lambda a, b: b - a,
}
#: The same, and they keep the other half of the register.
_INTEGER_SUMS_IN_HALVES: dict[str, _Function] = {
    "v_add_i16 v_add_nc_i16": np.add,
    "v_sub_i16 v_sub_nc_i16": np.subtract,
}

_OF_TWO: dict[str, _Function] = {
    "v_mul_lo_u32 v_mul_lo_i32 v_mul_lo_u16": np.multiply,
    "v_mul_hi_u32 v_mul_hi_i32": _multiply_high,
    "v_min_u32 v_min_i32 v_min_u16 v_min_i16": np.minimum,
    "v_max_u32 v_max_i32 v_max_u16 v_max_i16": np.maximum,
    "v_and_b32 v_and_b16": np.bitwise_and,
    "v_or_b32 v_or_b16": np.bitwise_or,
    "v_xor_b32 v_xor_b16": np.bitwise_xor,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: b << (a & _5_BITS),
    "v_lshrrev_b32": lambda a, b: b >> (a & _5_BITS),
    "v_ashrrev_i32": lambda a, b: b >> (a & np.int32(31)),
    "v_lshlrev_b16": _shift_left,
    "v_lshrrev_b16 v_ashrrev_i16": _shift_right,
    "v_bfm_b32": bits.bit_mask_32,
    "v_bcnt_u32_b32": lambda a, b: bits.count_bits(a) + b,
    "v_add_f32 v_add_f16": np.add,
    "v_sub_f32 v_sub_f16": np.subtract,
    "v_subrev_f32 v_subrev_f16": lambda a, b: b - a,
    "v_mul_f32 v_mul_f16": np.multiply,
    "v_mul_legacy_f32 v_mul_dx9_zero_f32": _multiply_zero_wins,
    "v_max_f32 v_max_f16 v_max_num_f32 v_max_num_f16": _LARGER,
    "v_min_f32 v_min_f16 v_min_num_f32 v_min_num_f16": _SMALLER,
    "v_maximum_f32 v_maximum_f16": _maximum,
    "v_minimum_f32 v_minimum_f16": _minimum,
}

_OF_THREE: dict[str, _Function] = {
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_mad_u16 v_mad_i16": lambda a, b, c: a * b + c,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xor3_b32": lambda a, b, c: a ^ b ^ c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_lshl_add_u32": lambda a, b, c: (a << (b & _5_BITS)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & _5_BITS),
    "v_lshl_or_b32": lambda a, b, c: (a << (b & _5_BITS)) | c,
    "v_bfe_u32": lambda a, b, c: bits.extract_bits(a, b, c & _5_BITS),
    "v_bfi_b32": lambda mask, a, b: (mask & a) | (~mask & b),
    "v_alignbit_b32": bits.align_bits,
    "v_perm_b32": bits.permute_bytes,
    "v_max3_i32 v_max3_u32 v_max3_i16 v_max3_u16": _then(np.maximum, np.maximum),
    "v_min3_i32 v_min3_u32 v_min3_i16 v_min3_u16": _then(np.minimum, np.minimum),
    "v_maxmin_i32 v_maxmin_u32 v_maxmin_i16 v_maxmin_u16": _then(np.maximum, np.minimum),
    "v_minmax_i32 v_minmax_u32 v_minmax_i16 v_minmax_u16": _then(np.minimum, np.maximum),
    "v_med3_i32 v_med3_u32 v_med3_i16 v_med3_u16": numerics.median,
    "v_fma_f32 v_fmamk_f32 v_fmaak_f32": numerics.fused_multiply_add,
    "v_fma_f16 v_fmamk_f16 v_fmaak_f16": numerics.fused_multiply_add,
    "v_mad_f32 v_madmk_f32 v_madak_f32": _multiply_add_flushed,
    "v_max3_f32 v_max3_f16 v_max3_num_f32 v_max3_num_f16": _then(_LARGER, _LARGER),
    "v_min3_f32 v_min3_f16 v_min3_num_f32 v_min3_num_f16": _then(_SMALLER, _SMALLER),
    "v_maxmin_f32 v_maxmin_f16 v_maxmin_num_f32 v_maxmin_num_f16": _then(_LARGER, _SMALLER),
    "v_minmax_f32 v_minmax_f16 v_minmax_num_f32 v_minmax_num_f16": _then(_SMALLER, _LARGER),
    "v_med3_f32 v_med3_f16 v_med3_num_f32 v_med3_num_f16": numerics.median,
    "v_maximum3_f32 v_maximum3_f16": _then(_maximum, _maximum),
    "v_minimum3_f32 v_minimum3_f16": _then(_minimum, _minimum),
    "v_div_fixup_f32": numerics.division_fixup,
}

#: The third source is the register of the result.
_ACCUMULATING: dict[str, _Function] = {
    "v_fmac_f32 v_fmac_f16": numerics.fused_multiply_add,
    "v_mac_f32": _multiply_add_flushed,
}

_OF_SEVERAL_KINDS = {
    "v_mul_u32_u24": Form(U32, (U32, U32), lambda a, b: (a & _U24) * (b & _U24)),
    "v_mul_i32_i24": Form(I32, (I32, I32), lambda a, b: _signed_24(a) * _signed_24(b)),
    "v_mad_u32_u24": Form(U32, (U32, U32, U32), lambda a, b, c: (a & _U24) * (b & _U24) + c),
    "v_mad_i32_i24": Form(I32, (I32, I32, I32), lambda a, b, c: _signed_24(a) * _signed_24(b) + c),
    "v_lshl_add_u64": Form(
        U64, (U64, U32, U64), lambda a, b, c: (a << (b & np.uint32(7)).astype(np.uint64)) + c
    ),
    "v_lshlrev_b64": Form(U64, (U32, U64), _shift_left),
    "v_lshrrev_b64": Form(U64, (U32, U64), _shift_right),
    "v_ashrrev_i64": Form(I64, (U32, I64), _shift_right),
    "v_bfe_i32": Form(
        U32, (U32, U32, U32), lambda a, b, c: bits.extract_signed_bits(a, b, c & _5_BITS)
    ),
    "v_ffbh_i32 v_cls_i32": Form(U32, (U32,), bits.leading_sign_bits),
    "v_pack_b32_f16": Form(U32, (U16, U16), _pack),
    "v_frexp_exp_i32_f32": Form(I32, (F32,), numerics.frexp_exponent),
    "v_frexp_exp_i32_f64": Form(I32, (U64,), lambda a: numerics.frexp_exponent(a.view(np.float64))),
    "v_frexp_exp_i16_f16": Form(I16, (F16,), lambda a: numerics.frexp_exponent(a).astype(np.int16)),
    "v_ldexp_f32": Form(F32, (F32, I32), numerics.load_exponent),
    "v_ldexp_f16": Form(F16, (F16, I16), numerics.load_exponent),
}

_KINDS = {
    "b16": U16, "b32": U32, "b64": U64, "u16": U16, "u32": U32, "i16": I16, "i32": I32,
    "f16": F16, "f32": F32,
}  # fmt: skip


def _of_one_kind(
    num_sources: int, table: Mapping[str, _Function], **options: bool
) -> dict[str, Form]:
    """The forms of a table of functions."""
    return {
        opcode: Form(kind, (kind,) * num_sources, compute, **options)
        for opcode, compute in by_opcode(table).items()
        for kind in [_KINDS[opcode[-3:]]]
    }


#: Opcode -> what it computes.
FORMS: dict[str, Form] = {
    **_of_one_kind(1, _OF_ONE),
    **_of_one_kind(2, _OF_TWO),
    **_of_one_kind(2, _INTEGER_SUMS, saturates=True),
    **_of_one_kind(2, _INTEGER_SUMS_IN_HALVES, saturates=True, keeps_half=True),
    **_of_one_kind(3, _OF_THREE, keeps_half=True),
    **_of_one_kind(3, _ACCUMULATING, keeps_half=True, accumulates=True),
    **by_opcode(_OF_SEVERAL_KINDS),
}


# Instructions that need more than their sources ---------------------------------------------------
def _decode_bitop3(instruction: Instruction, target: Target) -> Operation:
    """The table of the function is a modifier."""
    modifiers = dict(instruction.modifiers)
    table = int(modifiers.pop("bitop3", "0"), 0)
    kind = _KINDS[instruction.opcode[-3:]]
    form = Form(
        kind,
        (kind, kind, kind),
        lambda a, b, c: bits.bitwise_ternary(table, a, b, c),
        keeps_half=True,
    )
    return decode_form(replace(instruction, modifiers=modifiers), target, form)


def _decode_mbcnt(instruction: Instruction, target: Target) -> Operation:
    """Counts the bits of a mask that belong to lower lanes."""
    below = (np.uint64(1) << np.arange(target.wave_size, dtype=np.uint64)) - np.uint64(1)
    word = bits.low32(below) if "_lo_" in instruction.opcode else bits.high32(below)
    form = Form(U32, (U32, U32), lambda a, b: bits.count_bits(a & word) + b)
    return decode_form(instruction, target, form)


#: Opcode -> how it is decoded.
SPECIAL: dict[str, Callable[[Instruction, Target], Operation | Semantics]] = {
    "v_bitop3_b32": _decode_bitop3,
    "v_bitop3_b16": _decode_bitop3,
    "v_mbcnt_lo_u32_b32": _decode_mbcnt,
    "v_mbcnt_hi_u32_b32": _decode_mbcnt,
    "v_nop": lambda instruction, target: Semantics(lambda group: None),
}


def decode(instruction: Instruction, target: Target) -> Operation | Semantics | None:
    """Decode a vector instruction that is neither packed nor a conversion.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
        ValueError: it has another number of operands.
    """
    form = FORMS.get(instruction.opcode)
    if form is not None:
        return decode_form(instruction, target, form)
    special = SPECIAL.get(instruction.opcode)
    if special is not None:
        return special(instruction, target)
    return vector_masks.decode(instruction, target)
