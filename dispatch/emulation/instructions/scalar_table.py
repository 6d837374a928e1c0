"""What instructions on scalar registers compute: a table.

The semantics are AMD's, from the pseudo-code in its instruction set manuals.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic import bits, numerics
from attn_dispatch.emulation.instructions.operands import F32, I32, U32, U64, Kind

__all__ = ["EXEC_TABLE", "PAIR", "PLACES", "SIGNED_16", "TABLE", "UNSIGNED_16", "Scalar"]

#: Two registers as an array of (2, waves): fewer steps than to join them to 64 bits.
PAIR = Kind("pair", np.uint32, 2)
#: The 16-bit constants of instructions with a "k" in their names.
SIGNED_16, UNSIGNED_16 = Kind("signed constant", np.int32), Kind("unsigned constant", np.uint32)

#: The number of a bit of a register or pair, of which the lower 5 or 6 bits count, in the type of
#: what is shifted: by that type.
PLACES = {U32: Kind("place in 32", np.uint32), U64: Kind("place in 64", np.uint64)}


@dataclass(frozen=True)
class Scalar:
    """What an instruction computes.

    Attributes:
        result: of the destination; None if the result is SCC, and there is no destination.
        sources: of the operands.
        compute: of the sources, then of the destination's value if `reads_result`, then of SCC if
            `reads_scc`. All are (waves,), or (2, waves) for `PAIR`, or constants.
        scc: the new SCC, of the result and then all that `compute` takes; None if it stays.
        reads_result: the destination is a source, too.
        reads_scc: so is SCC.
    """

    result: Kind | None
    sources: tuple[Kind, ...]
    compute: Callable[..., Any]
    scc: Callable[..., Any] | None = None
    reads_result: bool = False
    reads_scc: bool = False


#: By name; an instruction has several if the instruction sets call it differently.
TABLE: dict[str, Scalar] = {}
#: Instructions that save EXEC in their destination and change it: the kind of all registers, the
#: new EXEC of the source and the old one, and the new SCC of the new EXEC.
EXEC_TABLE: dict[str, tuple[Kind, Callable[[Any, Any], Any], Callable[..., Any]]] = {}


def _add(
    names: str,
    result: Kind | None,
    sources: tuple[Kind, ...],
    compute: Callable[..., Any],
    scc: Callable[..., Any] | None = None,
    *,
    reads_result: bool = False,
    reads_scc: bool = False,
) -> None:
    """Put an instruction in the table."""
    scalar = Scalar(result, sources, compute, scc, reads_result, reads_scc)
    TABLE.update(dict.fromkeys(names.split(), scalar))


# SCC ----------------------------------------------------------------------------------------------
def _nonzero(result: Any, *_: Any) -> Any:
    return result != 0


def _pair_nonzero(result: Any, *_: Any) -> Any:
    return (result[0] | result[1]) != 0


def _sum_overflows(result: Any, a: Any, b: Any) -> Any:
    return ((a ^ result) & (b ^ result)) < 0


def _difference_overflows(result: Any, a: Any, b: Any) -> Any:
    return ((a ^ b) & (a ^ result)) < 0


# Moves and selections -----------------------------------------------------------------------------
def _same(a: Any) -> Any:
    return a


def _select(a: Any, b: Any, scc: Any) -> Any:
    return np.where(scc, a, b)


_add("s_mov_b32", U32, (U32,), _same)
_add("s_mov_b64", PAIR, (PAIR,), _same)
_add("s_movk_i32", I32, (SIGNED_16,), _same)
_add("s_cselect_b32", U32, (U32, U32), _select, reads_scc=True)
_add("s_cselect_b64", PAIR, (PAIR, PAIR), _select, reads_scc=True)

# Bitwise ------------------------------------------------------------------------------------------
#: Names without "s_" and the width -> function.
_BITWISE: dict[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
    "andn2": lambda a, b: a & ~b,
    "and_not1": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "or_not1": lambda a, b: a | ~b,
}
for _width, _kind, _is_set in ((32, U32, _nonzero), (64, PAIR, _pair_nonzero)):
    _add(f"s_not_b{_width}", _kind, (_kind,), operator.invert, _is_set)
    for _name, _function in _BITWISE.items():
        _add(f"s_{_name}_b{_width}", _kind, (_kind, _kind), _function, _is_set)
        EXEC_TABLE[f"s_{_name}_saveexec_b{_width}"] = _kind, _function, _is_set


# Integer arithmetic -------------------------------------------------------------------------------
def _add_shifted_sum(shift: int) -> None:
    """(a << shift) + b."""
    places, wide_places, limit = np.uint32(shift), np.uint64(shift), np.uint64(1 << 32)
    _add(
        f"s_lshl{shift}_add_u32", U32, (U32, U32),
        lambda a, b: (a << places) + b,
        lambda _, a, b: (a.astype(np.uint64) << wide_places) + b >= limit,
    )  # fmt: skip


_add("s_add_u32 s_add_co_u32", U32, (U32, U32), operator.add, lambda r, a, b: r < a)
_add("s_sub_u32 s_sub_co_u32", U32, (U32, U32), operator.sub, lambda r, a, b: a < b)
_add("s_add_i32 s_add_co_i32", I32, (I32, I32), operator.add, _sum_overflows)
_add("s_sub_i32 s_sub_co_i32", I32, (I32, I32), operator.sub, _difference_overflows)
_add("s_addk_i32 s_addk_co_i32", I32, (SIGNED_16,), operator.add, _sum_overflows, reads_result=True)
_add(
    "s_addc_u32 s_add_co_ci_u32", U32, (U32, U32),
    lambda a, b, carry: a + b + carry.astype(np.uint32),
    lambda r, a, b, carry: (r < a) | (carry & (r == a)),
    reads_scc=True,
)  # fmt: skip
_add(
    "s_subb_u32 s_sub_co_ci_u32", U32, (U32, U32),
    lambda a, b, borrow: a - b - borrow.astype(np.uint32),
    lambda r, a, b, borrow: (a < b) | (borrow & (a == b)),
    reads_scc=True,
)  # fmt: skip
_add("s_mul_i32", U32, (U32, U32), operator.mul)
_add("s_mulk_i32", I32, (SIGNED_16,), operator.mul, reads_result=True)
_add(
    "s_mul_hi_u32", U32, (U32, U32),
    lambda a, b: bits.high32(a.astype(np.uint64) * b.astype(np.uint64)),
)  # fmt: skip
_add(
    "s_mul_hi_i32", I32, (I32, I32),
    lambda a, b: (a.astype(np.int64) * b.astype(np.int64) >> np.int64(32)).astype(np.int32),
)  # fmt: skip
_add("s_add_nc_u64", U64, (U64, U64), operator.add)
_add("s_sub_nc_u64", U64, (U64, U64), operator.sub)
_add("s_mul_u64", U64, (U64, U64), operator.mul)
_add("s_min_i32", I32, (I32, I32), np.minimum, lambda r, a, b: a < b)
_add("s_min_u32", U32, (U32, U32), np.minimum, lambda r, a, b: a < b)
_add("s_max_i32", I32, (I32, I32), np.maximum, lambda r, a, b: a >= b)
_add("s_max_u32", U32, (U32, U32), np.maximum, lambda r, a, b: a >= b)
_add("s_abs_i32", I32, (I32,), np.abs, _nonzero)
for _shift in (1, 2, 3, 4):
    _add_shifted_sum(_shift)


# Shifts and bit fields ----------------------------------------------------------------------------
def _field(extract: Callable[..., Any], a: Any, b: Any) -> Any:
    """The bits of `a` from the number in the lower bits of `b` on; their count is 16 bits above."""
    return extract(a, b, b >> np.uint32(16) & np.uint32(127))


def _add_bit_fields(width: int, kind: Kind) -> None:
    place, signed, one = PLACES[kind], np.dtype(f"int{width}").type, kind.dtype(1)
    _add(f"s_lshl_b{width}", kind, (kind, place), operator.lshift, _nonzero)
    _add(f"s_lshr_b{width}", kind, (kind, place), operator.rshift, _nonzero)
    _add(
        f"s_ashr_i{width}", kind, (kind, place),
        lambda a, b: a.view(signed) >> b.view(signed), _nonzero,
    )  # fmt: skip
    _add(f"s_bfe_u{width}", kind, (kind, U32), partial(_field, bits.extract_bits), _nonzero)
    _add(f"s_bfe_i{width}", kind, (kind, U32), partial(_field, bits.extract_signed_bits), _nonzero)
    _add(f"s_bitset0_b{width}", kind, (place,), lambda b, old: old & ~(one << b), reads_result=True)
    _add(f"s_bitset1_b{width}", kind, (place,), lambda b, old: old | one << b, reads_result=True)
    _add(f"s_bitcmp0_b{width}", None, (kind, place), lambda a, b: (a & one << b) == 0)
    _add(f"s_bitcmp1_b{width}", None, (kind, place), lambda a, b: (a & one << b) != 0)


_add_bit_fields(32, U32)
_add_bit_fields(64, U64)
_add("s_bfm_b32", U32, (U32, U32), bits.bit_mask_32)


# Bit counts, searches and halves ------------------------------------------------------------------
for _width, _kind in ((32, U32), (64, U64)):
    _add(f"s_bcnt1_i32_b{_width}", U32, (_kind,), bits.count_bits, _nonzero)
    _add(f"s_ff1_i32_b{_width} s_ctz_i32_b{_width}", U32, (_kind,), bits.trailing_zeros)
    _add(f"s_flbit_i32_b{_width} s_clz_i32_u{_width}", U32, (_kind,), bits.leading_zeros)
    _add(f"s_brev_b{_width}", _kind, (_kind,), bits.reverse_bits)
_add("s_flbit_i32 s_cls_i32", U32, (U32,), bits.leading_sign_bits)
_add("s_sext_i32_i8", I32, (I32,), lambda a: a.astype(np.int8).astype(np.int32))
_add("s_sext_i32_i16", I32, (I32,), lambda a: a.astype(np.int16).astype(np.int32))
_LOW, _HIGH, _HALF = np.uint32(0xFFFF), np.uint32(0xFFFF0000), np.uint32(16)
_add("s_pack_ll_b32_b16", U32, (U32, U32), lambda a, b: a & _LOW | b << _HALF)
_add("s_pack_lh_b32_b16", U32, (U32, U32), lambda a, b: a & _LOW | b & _HIGH)
_add("s_pack_hl_b32_b16", U32, (U32, U32), lambda a, b: a >> _HALF | b << _HALF)
_add("s_pack_hh_b32_b16", U32, (U32, U32), lambda a, b: a >> _HALF | b & _HIGH)

# Comparisons --------------------------------------------------------------------------------------
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}
for _name, _function in {**_COMPARE, "lg": operator.ne}.items():
    _add(f"s_cmp_{_name}_i32", None, (I32, I32), _function)
    _add(f"s_cmp_{_name}_u32", None, (U32, U32), _function)
    _add(f"s_cmpk_{_name}_i32", None, (I32, SIGNED_16), _function)
    _add(f"s_cmpk_{_name}_u32", None, (U32, UNSIGNED_16), _function)
#: "n...": not. They differ from the opposite comparison if an operand is NaN.
_COMPARE_FLOATS: dict[str, Callable[[Any, Any], Any]] = {
    **_COMPARE,
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": operator.ne,
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
}
for _name, _function in _COMPARE_FLOATS.items():
    _add(f"s_cmp_{_name}_f32", None, (F32, F32), _function)
_add("s_cmp_eq_u64", None, (PAIR, PAIR), lambda a, b: ~_pair_nonzero(a ^ b))
_add("s_cmp_lg_u64", None, (PAIR, PAIR), lambda a, b: _pair_nonzero(a ^ b))


# Floating point: RDNA -----------------------------------------------------------------------------
_add("s_add_f32", F32, (F32, F32), operator.add)
_add("s_sub_f32", F32, (F32, F32), operator.sub)
_add("s_mul_f32", F32, (F32, F32), operator.mul)
_add("s_min_f32 s_min_num_f32", F32, (F32, F32), numerics.minimum_number)
_add("s_max_f32 s_max_num_f32", F32, (F32, F32), numerics.maximum_number)
_add("s_fmac_f32", F32, (F32, F32), numerics.fused_multiply_add, reads_result=True)
_add("s_fmaak_f32 s_fmamk_f32", F32, (F32, F32, F32), numerics.fused_multiply_add)
_add("s_ceil_f32", F32, (F32,), np.ceil)
_add("s_floor_f32", F32, (F32,), np.floor)
_add("s_trunc_f32", F32, (F32,), np.trunc)
_add("s_rndne_f32", F32, (F32,), np.rint)
_add("s_cvt_f32_i32", F32, (I32,), lambda a: a.astype(np.float32))
_add("s_cvt_f32_u32", F32, (U32,), lambda a: a.astype(np.float32))
_add("s_cvt_i32_f32", I32, (F32,), lambda a: numerics.to_integer(a, np.int32))
_add("s_cvt_u32_f32", U32, (F32,), lambda a: numerics.to_integer(a, np.uint32))

# The vector unit computes these for a scalar, on RDNA4.
_add("v_s_exp_f32", F32, (F32,), numerics.exp2)
_add("v_s_log_f32", F32, (F32,), numerics.log2)
_add("v_s_rcp_f32", F32, (F32,), numerics.reciprocal)
_add("v_s_rsq_f32", F32, (F32,), numerics.reciprocal_sqrt)
_add("v_s_sqrt_f32", F32, (F32,), numerics.sqrt)
