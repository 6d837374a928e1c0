"""Vector instructions that compute one result: moves, integers, bits, float32 and float16.

The semantics are those of the pseudo-code in AMD's instruction set manuals. An instruction has the
same meaning on all targets that have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import numerics
from attn_dispatch.emulation.arithmetic.lanes import mbcnt_masks
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.instructions import vector_masks
from attn_dispatch.emulation.instructions.modifiers import (
    Form,
    VectorOperands,
    applied,
    by_opcode,
    decode_form,
)
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
    parse_operand,
    vector_reader,
    vector_writer,
)
from attn_dispatch.emulation.instructions.semantics import Operation, Semantics
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["FORMS", "SPECIAL", "decode"]

_Function = Callable[..., Any]
_U24 = np.uint32(0xFFFFFF)
_5_BITS = np.uint32(31)
_32 = np.uint64(32)


def _unchanged(a: Any) -> Any:
    return a


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


def _multiply_high_u32(a: Any, b: Any) -> Any:
    return ((a.astype(np.uint64) * b.astype(np.uint64)) >> _32).astype(np.uint32)


def _multiply_high_i32(a: Any, b: Any) -> Any:
    return ((a.astype(np.int64) * b.astype(np.int64)) >> np.int64(32)).astype(np.int32)


def _absolute_difference_add(a: Any, b: Any, c: Any) -> Any:
    return np.where(a > b, a - b, b - a) + c


def _pack(low: Any, high: Any) -> Any:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _permute(high: Any, low: Any, selector: Any) -> Any:
    """v_perm_b32; quicker where all lanes select the same bytes, as kernels mostly do."""
    selectors = np.asarray(selector)
    is_scalar = selectors.ndim == 0 or selectors.shape[-1] == 1
    if is_scalar and (selectors == selectors.flat[0]).all():
        chosen = [int(selectors.flat[0]) >> 8 * i & 0xFF for i in range(4)]
        if max(chosen) < 8:
            return _permute_uniformly(high, low, chosen)
    return numerics.permute_bytes(high, low, selector)


def _permute_uniformly(high: Any, low: Any, chosen: list[int]) -> Any:
    """A word of four bytes, each from `low` (0 to 3) or `high` (4 to 7)."""
    masks: dict[tuple[bool, int], int] = {}  # of the bytes that come from one word by one shift
    for i, byte in enumerate(chosen):
        key = (byte >= 4, 8 * (i - byte % 4))
        masks[key] = masks.get(key, 0) | 0xFF << 8 * i
    result = np.uint32(0)
    for (is_high, shift), mask in masks.items():
        word = high if is_high else low
        moved = word << np.uint32(shift) if shift >= 0 else word >> np.uint32(-shift)
        result = result | (moved & np.uint32(mask))
    return result


# Floats -------------------------------------------------------------------------------------------
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


def _in_float64(compute: _Function) -> _Function:
    """A float16 function of one argument, rounded once."""
    return lambda a: compute(a.astype(np.float64)).astype(np.float16)


_INTEGERS = {
    "v_mov_b32 v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32": Form(
        U32, (U32,), _unchanged
    ),
    "v_mov_b64": Form(U64, (U64,), _unchanged),
    "v_mov_b16": Form(U16, (U16,), _unchanged),
    "v_add_u32 v_add_nc_u32": Form(U32, (U32, U32), np.add, saturates=True),
    "v_sub_u32 v_sub_nc_u32": Form(U32, (U32, U32), np.subtract, saturates=True),
    "v_subrev_u32 v_subrev_nc_u32": Form(U32, (U32, U32), lambda a, b: b - a, saturates=True),
    "v_add_i32 v_add_nc_i32": Form(I32, (I32, I32), np.add, saturates=True),
    "v_sub_i32 v_sub_nc_i32": Form(I32, (I32, I32), np.subtract, saturates=True),
    "v_add3_u32": Form(U32, (U32, U32, U32), lambda a, b, c: a + b + c),
    "v_mul_lo_u32": Form(U32, (U32, U32), np.multiply),
    "v_mul_lo_i32": Form(I32, (I32, I32), np.multiply),
    "v_mul_hi_u32": Form(U32, (U32, U32), _multiply_high_u32),
    "v_mul_hi_i32": Form(I32, (I32, I32), _multiply_high_i32),
    "v_mul_u32_u24": Form(U32, (U32, U32), lambda a, b: (a & _U24) * (b & _U24)),
    "v_mul_i32_i24": Form(I32, (I32, I32), lambda a, b: _signed_24(a) * _signed_24(b)),
    "v_mad_u32_u24": Form(U32, (U32, U32, U32), lambda a, b, c: (a & _U24) * (b & _U24) + c),
    "v_mad_i32_i24": Form(I32, (I32, I32, I32), lambda a, b, c: _signed_24(a) * _signed_24(b) + c),
    "v_min_u32": Form(U32, (U32, U32), np.minimum),
    "v_max_u32": Form(U32, (U32, U32), np.maximum),
    "v_min_i32": Form(I32, (I32, I32), np.minimum),
    "v_max_i32": Form(I32, (I32, I32), np.maximum),
    "v_sad_u32": Form(U32, (U32, U32, U32), _absolute_difference_add),
}

_BITS = {
    "v_and_b32": Form(U32, (U32, U32), np.bitwise_and),
    "v_or_b32": Form(U32, (U32, U32), np.bitwise_or),
    "v_xor_b32": Form(U32, (U32, U32), np.bitwise_xor),
    "v_xnor_b32": Form(U32, (U32, U32), lambda a, b: ~(a ^ b)),
    "v_not_b32": Form(U32, (U32,), np.invert),
    "v_and_b16": Form(U16, (U16, U16), np.bitwise_and),
    "v_or_b16": Form(U16, (U16, U16), np.bitwise_or),
    "v_xor_b16": Form(U16, (U16, U16), np.bitwise_xor),
    "v_not_b16": Form(U16, (U16,), np.invert),
    "v_and_or_b32": Form(U32, (U32, U32, U32), lambda a, b, c: (a & b) | c),
    "v_or3_b32": Form(U32, (U32, U32, U32), lambda a, b, c: a | b | c),
    "v_xor3_b32": Form(U32, (U32, U32, U32), lambda a, b, c: a ^ b ^ c),
    "v_xad_u32": Form(U32, (U32, U32, U32), lambda a, b, c: (a ^ b) + c),
    "v_lshl_add_u32": Form(U32, (U32, U32, U32), lambda a, b, c: (a << (b & _5_BITS)) + c),
    "v_add_lshl_u32": Form(U32, (U32, U32, U32), lambda a, b, c: (a + b) << (c & _5_BITS)),
    "v_lshl_or_b32": Form(U32, (U32, U32, U32), lambda a, b, c: (a << (b & _5_BITS)) | c),
    "v_lshl_add_u64": Form(
        U64, (U64, U32, U64), lambda a, b, c: (a << (b & np.uint32(7)).astype(np.uint64)) + c
    ),
    "v_lshlrev_b32": Form(U32, (U32, U32), lambda a, b: b << (a & _5_BITS)),
    "v_lshrrev_b32": Form(U32, (U32, U32), lambda a, b: b >> (a & _5_BITS)),
    "v_ashrrev_i32": Form(I32, (I32, I32), lambda a, b: b >> (a & np.int32(31))),
    "v_lshlrev_b64": Form(U64, (U32, U64), _shift_left),
    "v_lshrrev_b64": Form(U64, (U32, U64), _shift_right),
    "v_ashrrev_i64": Form(I64, (U32, I64), _shift_right),
    "v_lshlrev_b16": Form(U16, (U16, U16), _shift_left),
    "v_lshrrev_b16": Form(U16, (U16, U16), _shift_right),
    "v_ashrrev_i16": Form(I16, (U16, I16), _shift_right),
    "v_bfe_u32": Form(
        U32, (U32, U32, U32), lambda a, b, c: numerics.extract_bits(a, b, c & _5_BITS)
    ),
    "v_bfe_i32": Form(
        U32, (U32, U32, U32), lambda a, b, c: numerics.extract_signed_bits(a, b, c & _5_BITS)
    ),
    "v_bfi_b32": Form(U32, (U32, U32, U32), numerics.insert_bits),
    "v_bfm_b32": Form(U32, (U32, U32), numerics.bit_mask_32),
    "v_bfrev_b32": Form(U32, (U32,), numerics.reverse_bits),
    "v_bcnt_u32_b32": Form(U32, (U32, U32), lambda a, b: numerics.count_bits(a) + b),
    "v_ffbh_u32 v_clz_i32_u32": Form(U32, (U32,), numerics.leading_zeros),
    "v_ffbh_i32 v_cls_i32": Form(U32, (U32,), numerics.leading_sign_bits),
    "v_ffbl_b32 v_ctz_i32_b32": Form(U32, (U32,), numerics.trailing_zeros),
    "v_alignbit_b32": Form(U32, (U32, U32, U32), numerics.align_bits),
    "v_alignbyte_b32": Form(U32, (U32, U32, U32), numerics.align_bytes),
    "v_perm_b32": Form(U32, (U32, U32, U32), _permute),
    "v_pack_b32_f16": Form(U32, (U16, U16), _pack),
}

_SMALL_INTEGERS = {
    "v_add_u16": Form(U16, (U16, U16), np.add, saturates=True),
    "v_sub_u16": Form(U16, (U16, U16), np.subtract, saturates=True),
    "v_subrev_u16": Form(U16, (U16, U16), lambda a, b: b - a, saturates=True),
    "v_add_nc_u16": Form(U16, (U16, U16), np.add, saturates=True),
    "v_sub_nc_u16": Form(U16, (U16, U16), np.subtract, saturates=True),
    "v_add_i16 v_add_nc_i16": Form(I16, (I16, I16), np.add, saturates=True, keeps_half=True),
    "v_sub_i16 v_sub_nc_i16": Form(I16, (I16, I16), np.subtract, saturates=True, keeps_half=True),
    "v_mul_lo_u16": Form(U16, (U16, U16), np.multiply),
    "v_mad_u16": Form(U16, (U16, U16, U16), lambda a, b, c: a * b + c, keeps_half=True),
    "v_mad_i16": Form(I16, (I16, I16, I16), lambda a, b, c: a * b + c, keeps_half=True),
    "v_min_u16": Form(U16, (U16, U16), np.minimum),
    "v_max_u16": Form(U16, (U16, U16), np.maximum),
    "v_min_i16": Form(I16, (I16, I16), np.minimum),
    "v_max_i16": Form(I16, (I16, I16), np.maximum),
}

_FLOAT32 = {
    "v_add_f32": Form(F32, (F32, F32), np.add),
    "v_sub_f32": Form(F32, (F32, F32), np.subtract),
    "v_subrev_f32": Form(F32, (F32, F32), lambda a, b: b - a),
    "v_mul_f32": Form(F32, (F32, F32), np.multiply),
    "v_mul_legacy_f32 v_mul_dx9_zero_f32": Form(F32, (F32, F32), _multiply_zero_wins),
    "v_fma_f32 v_fmamk_f32 v_fmaak_f32": Form(F32, (F32, F32, F32), numerics.fused_multiply_add),
    "v_fmac_f32": Form(F32, (F32, F32, F32), numerics.fused_multiply_add, accumulates=True),
    "v_mad_f32 v_madmk_f32 v_madak_f32": Form(F32, (F32, F32, F32), _multiply_add_flushed),
    "v_mac_f32": Form(F32, (F32, F32, F32), _multiply_add_flushed, accumulates=True),
    "v_exp_f32": Form(F32, (F32,), numerics.exp2),
    "v_log_f32": Form(F32, (F32,), numerics.log2),
    "v_rcp_f32 v_rcp_iflag_f32": Form(F32, (F32,), numerics.reciprocal),
    "v_rsq_f32": Form(F32, (F32,), numerics.reciprocal_sqrt),
    "v_sqrt_f32": Form(F32, (F32,), numerics.sqrt),
    "v_sin_f32": Form(F32, (F32,), numerics.sine),
    "v_cos_f32": Form(F32, (F32,), numerics.cosine),
    "v_fract_f32": Form(F32, (F32,), numerics.fraction),
    "v_div_fixup_f32": Form(F32, (F32, F32, F32), numerics.division_fixup),
}

_FLOAT16 = {
    "v_add_f16": Form(F16, (F16, F16), np.add),
    "v_sub_f16": Form(F16, (F16, F16), np.subtract),
    "v_subrev_f16": Form(F16, (F16, F16), lambda a, b: b - a),
    "v_mul_f16": Form(F16, (F16, F16), np.multiply),
    "v_fma_f16 v_fmamk_f16 v_fmaak_f16": Form(
        F16, (F16, F16, F16), numerics.fused_multiply_add, keeps_half=True
    ),
    "v_fmac_f16": Form(
        F16, (F16, F16, F16), numerics.fused_multiply_add, accumulates=True, keeps_half=True
    ),
    "v_exp_f16": Form(F16, (F16,), _in_float64(np.exp2)),
    "v_log_f16": Form(F16, (F16,), _in_float64(np.log2)),
    "v_rcp_f16": Form(F16, (F16,), _in_float64(np.reciprocal)),
    "v_rsq_f16": Form(F16, (F16,), _in_float64(lambda a: 1 / np.sqrt(a))),
    "v_sqrt_f16": Form(F16, (F16,), _in_float64(np.sqrt)),
}


def _both_floats() -> dict[str, Form]:
    """What float32 and float16 have in common."""
    largest, smallest = numerics.maximum_number, numerics.minimum_number
    unary = {
        "floor": np.floor,
        "ceil": np.ceil,
        "trunc": np.trunc,
        "rndne": np.rint,
        "frexp_mant": numerics.frexp_mantissa,
    }
    # RDNA4 writes `_num` where a number wins over NaN; both spellings have one meaning.
    binary = {"max": largest, "min": smallest, "max_num": largest, "min_num": smallest}
    propagating = {"maximum": _maximum, "minimum": _minimum}
    ternary = {
        "max3": _then(largest, largest),
        "min3": _then(smallest, smallest),
        "maxmin": _then(largest, smallest),
        "minmax": _then(smallest, largest),
        "med3": numerics.median,
    }
    ternary |= {f"{name}_num": compute for name, compute in ternary.items()}
    ternary |= {
        "maximum3": _then(_maximum, _maximum),
        "minimum3": _then(_minimum, _minimum),
        "maximumminimum": _then(_maximum, _minimum),
        "minimummaximum": _then(_minimum, _maximum),
    }
    forms = {}
    for kind, exponent in ((F32, I32), (F16, I16)):
        functions = [(unary, 1), (binary | propagating, 2), (ternary, 3)]
        for table, count in functions:
            for name, compute in table.items():
                keeps = count == 3
                forms[f"v_{name}_{kind.name}"] = Form(
                    kind, (kind,) * count, compute, keeps_half=keeps
                )
        forms[f"v_ldexp_{kind.name}"] = Form(kind, (kind, exponent), numerics.load_exponent)
        forms[f"v_frexp_exp_{exponent.name}_{kind.name}"] = Form(
            exponent, (kind,), _exponent_as(exponent)
        )
    return forms


def _exponent_as(kind: Kind) -> _Function:
    return lambda a: numerics.frexp_exponent(a).astype(kind.dtype)


def _integer_combinations() -> dict[str, Form]:
    """Minimum, maximum and median of three integers."""
    functions = {
        "max3": _then(np.maximum, np.maximum),
        "min3": _then(np.minimum, np.minimum),
        "maxmin": _then(np.maximum, np.minimum),
        "minmax": _then(np.minimum, np.maximum),
        "med3": numerics.median,
    }
    return {
        f"v_{name}_{kind.name}": Form(kind, (kind,) * 3, compute, keeps_half=True)
        for kind in (I32, U32, I16, U16)
        for name, compute in functions.items()
    }


#: Opcode -> what it computes.
FORMS: dict[str, Form] = by_opcode(
    _INTEGERS
    | _BITS
    | _SMALL_INTEGERS
    | _FLOAT32
    | _FLOAT16
    | _both_floats()
    | _integer_combinations()
)


# Instructions that need more than their sources ---------------------------------------------------
def _decode_bitop3(instruction: Instruction, target: Target) -> Operation:
    """The table of the function is a modifier."""
    kind, keeps_half = (U32, False) if instruction.opcode.endswith("b32") else (U16, True)
    operands = VectorOperands(instruction, target, 3)
    table = int(operands.take("bitop3") or "0", 0)
    result, *sources = instruction.operands
    readers = [operands.source(i, sources[i], kind) for i in range(3)]
    compute = applied(lambda a, b, c: numerics.bitwise_ternary(table, a, b, c), readers)
    return operands.operation(result, kind, compute, keeps_half)


def _decode_mbcnt(instruction: Instruction, target: Target) -> Operation:
    """Counts the bits of a mask that belong to lower lanes."""
    low, high = mbcnt_masks(target.wave_size)
    below = low if "_lo_" in instruction.opcode else high
    form = Form(U32, (U32, U32), lambda a, b: numerics.count_bits(a & below) + b)
    return decode_form(instruction, target, form)


def _decode_swap(instruction: Instruction, target: Target) -> Semantics:
    kind = U32 if instruction.opcode.endswith("b32") else U16
    first, second = (parse_operand(text) for text in instruction.operands)
    VectorOperands(instruction, target, 1).finish()
    read_first, read_second = vector_reader(first, kind), vector_reader(second, kind)
    write_first, write_second = (vector_writer(each, kind, 0) for each in (first, second))

    def swap(group: WaveGroup) -> None:
        value = read_first(group).copy()
        write_first(group, read_second(group))
        write_second(group, value)

    return Semantics(swap)


#: Opcode -> how it is decoded.
SPECIAL: dict[str, Callable[[Instruction, Target], Operation | Semantics]] = {
    "v_bitop3_b32": _decode_bitop3,
    "v_bitop3_b16": _decode_bitop3,
    "v_mbcnt_lo_u32_b32": _decode_mbcnt,
    "v_mbcnt_hi_u32_b32": _decode_mbcnt,
    "v_swap_b32": _decode_swap,
    "v_swap_b16": _decode_swap,
    "v_nop": lambda instruction, target: Semantics(lambda group: None),
}


def decode(instruction: Instruction, target: Target) -> Operation | Semantics | None:
    """Decode a vector instruction that is neither packed nor a conversion.

    Returns:
        None: the instruction is not of this family.

    Raises:
        UnknownInstruction: its form is not known.
    """
    form = FORMS.get(instruction.opcode)
    if form is not None:
        return decode_form(instruction, target, form)
    special = SPECIAL.get(instruction.opcode)
    if special is not None:
        return special(instruction, target)
    return vector_masks.decode(instruction, target)
