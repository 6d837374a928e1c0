"""Arithmetic of AMD GPUs as pure functions on NumPy arrays.

Inputs broadcast against each other. Registers are uint32; callers view them as float32 or int32.
The semantics are those of the pseudo-code in AMD's instruction set manuals (CDNA3, RDNA3, RDNA4),
with denormals enabled and rounding to nearest even, as Triton compiles kernels. Transcendental
functions are computed in float64 and rounded: hardware may differ in the last bit.

Callers silence NumPy's floating point warnings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "cosine",
    "division_fixup",
    "division_fmas",
    "division_scale",
    "exp2",
    "flush_denormals",
    "fraction",
    "frexp_exponent",
    "frexp_mantissa",
    "from_bfloat16",
    "fused_multiply_add",
    "load_exponent",
    "log2",
    "maximum_number",
    "median",
    "minimum_number",
    "reciprocal",
    "reciprocal_sqrt",
    "sine",
    "sqrt",
    "to_bfloat16",
    "to_float16_toward_zero",
    "to_integer",
]

_F32 = NDArray[np.float32]
_Array = NDArray[Any]

_BELOW_ONE = np.float32(1 - 2.0**-24)
_SMALLEST_NORMAL = np.float32(2.0**-126)
#: In float64, a midpoint of two float32 or float16 values ends in at least this many zero bits.
_MIDPOINT_ZEROS = np.int64((1 << 28) - 1)


# Floating point -----------------------------------------------------------------------------------
def flush_denormals(x: _Array, smallest: Any = _SMALLEST_NORMAL) -> _Array:
    """float32 with subnormal numbers replaced by zeros of the same sign.

    Args:
        x: float32, or another float.
        smallest: the smallest normal number of its dtype.
    """
    flushed: _Array = x * (np.abs(x) >= smallest)  # NaN times zero is NaN
    return flushed


def _multiply_add_wide(a: _Array, b: _Array, c: _Array) -> NDArray[np.float64]:
    """a * b + c in float64, so that rounding it to 24 bits or fewer gives the right result.

    The product of two float32 is exact. A rounded sum misleads the second rounding only if it is a
    midpoint of two narrower values and the exact sum is not: then it moves by one bit towards the
    exact sum. (The error of the sum is exact: Knuth's two-sum.)
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    bits = total.view(np.int64)
    suspect = (bits & _MIDPOINT_ZEROS) == 0
    if not suspect.any():
        return total
    addend_part = total - product
    error = (product - (total - addend_part)) + (addend - addend_part)
    suspect &= np.abs(error) > 0  # the error of an infinity is NaN
    if not suspect.any():
        return total
    step = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(suspect, bits + step, bits).view(np.float64)


def fused_multiply_add(a: _Array, b: _Array, c: _Array) -> _Array:
    """a * b + c, rounded once, for float32 or float16 operands of one dtype (v_fma_f32, v_fma_f16).

    Returns:
        An array of the operands' dtype.
    """
    return _multiply_add_wide(a, b, c).astype(a.dtype)


def exp2(x: _Array) -> _F32:
    """2 ** x in float32; flushes denormal inputs and results (v_exp_f32)."""
    return flush_denormals(np.exp2(flush_denormals(x).astype(np.float64)).astype(np.float32))


def log2(x: _Array) -> _F32:
    """Logarithm to base 2 in float32; flushes denormal inputs (v_log_f32)."""
    return np.log2(flush_denormals(x).astype(np.float64)).astype(np.float32)


def reciprocal(x: _Array) -> _F32:
    """1 / x in float32; flushes denormal inputs and results (v_rcp_f32, v_rcp_iflag_f32)."""
    return flush_denormals(np.float32(1) / flush_denormals(x))


def reciprocal_sqrt(x: _Array) -> _F32:
    """1 / sqrt(x) in float32; flushes denormal inputs (v_rsq_f32)."""
    return (1.0 / np.sqrt(flush_denormals(x).astype(np.float64))).astype(np.float32)


def sqrt(x: _Array) -> _F32:
    """Square root in float32; flushes denormal inputs (v_sqrt_f32)."""
    return np.sqrt(flush_denormals(x))


def _radians(turns: _Array) -> NDArray[np.float64]:
    """An angle in float64; removing whole turns from it is exact."""
    wide = turns.astype(np.float64)
    angle: NDArray[np.float64] = (wide - np.rint(wide)) * (2 * np.pi)
    return angle


def sine(turns: _Array) -> _F32:
    """Sine of an angle in turns, in float32 (v_sin_f32)."""
    return np.sin(_radians(turns)).astype(np.float32)


def cosine(turns: _Array) -> _F32:
    """Cosine of an angle in turns, in float32 (v_cos_f32)."""
    return np.cos(_radians(turns)).astype(np.float32)


def fraction(x: _Array) -> _F32:
    """x - floor(x) in float32, always below 1 (v_fract_f32)."""
    part: _F32 = np.minimum(x - np.floor(x), _BELOW_ONE)
    return part


def frexp_mantissa(x: _Array) -> _Array:
    """The significand, of magnitude 0.5 up to 1; zero, infinity and NaN stay (v_frexp_mant)."""
    return np.where(np.isfinite(x), np.frexp(x)[0], x)


def frexp_exponent(x: _Array) -> NDArray[np.int32]:
    """The int32 exponent that belongs to `frexp_mantissa`; 0 for zero, infinity and NaN."""
    return np.where(np.isfinite(x), np.frexp(x)[1], 0).astype(np.int32)


def maximum_number(a: _Array, b: _Array) -> _Array:
    """The larger of two floats; a number wins over NaN, and 0 over -0 (v_max_f32, v_max_num_f32).

    A signaling NaN counts as a quiet one. With IEEE mode, which Triton sets before RDNA4, hardware
    returns it as a quiet NaN, but LLVM quiets inputs before it relies on a maximum.
    """
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def minimum_number(a: _Array, b: _Array) -> _Array:
    """The smaller of two floats; a number wins over NaN, and -0 over 0 (v_min_f32, v_min_num_f32).

    A signaling NaN counts as a quiet one, as in `maximum_number`.
    """
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def median(a: _Array, b: _Array, c: _Array) -> _Array:
    """The middle of three floats or integers (v_med3_f32, v_med3_i32, v_med3_u32).

    If a float is NaN, the result is the smallest number, as in AMD's pseudo-code.
    """
    if a.dtype.kind != "f":
        return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    largest = maximum_number(maximum_number(a, b), c)
    middle = np.where(
        largest == a,
        maximum_number(b, c),
        np.where(largest == b, maximum_number(a, c), maximum_number(a, b)),
    )
    has_nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(has_nan, minimum_number(minimum_number(a, b), c), middle)


def load_exponent(x: _Array, exponent: _Array) -> _Array:
    """x * 2 ** exponent, rounded once, in x's dtype; the exponent is int32 or int16 (v_ldexp)."""
    return np.ldexp(x, exponent.astype(np.int32)).astype(x.dtype)


# Conversions --------------------------------------------------------------------------------------
def to_integer(x: _Array, dtype: DTypeLike) -> _Array:
    """Floats truncated to integers of up to 32 bits; saturates, and NaN becomes 0 (v_cvt_i32_f32).

    Args:
        x: float16 or float32.
        dtype: int32, uint32, int16, uint16, int8 or uint8.
    """
    limits = np.iinfo(np.dtype(dtype))
    whole = np.trunc(x.astype(np.float64))
    return np.clip(np.where(np.isnan(whole), 0.0, whole), limits.min, limits.max).astype(dtype)


def to_bfloat16(x: _Array) -> NDArray[np.uint16]:
    """float32 as bits of bfloat16, to nearest even; NaN becomes quiet (v_cvt_pk_bf16_f32)."""
    bits = np.asarray(x).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    narrow: _Array = np.where(np.isnan(x), upper | np.uint32(0x40), rounded)
    return narrow.astype(np.uint16)


def from_bfloat16(bits: _Array) -> _F32:
    """Bits of bfloat16 (the lower 16 of any unsigned integer) as float32."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16_toward_zero(x: _Array) -> NDArray[np.float16]:
    """float32 as float16, rounded toward zero: what is too large becomes 65504 (v_cvt_pkrtz)."""
    nearest = np.asarray(x.astype(np.float16))
    # The next value towards zero has the previous bits; that of infinity is the largest number.
    too_large = np.abs(nearest.astype(np.float32)) > np.abs(x)
    rounded: NDArray[np.uint16] = nearest.view(np.uint16) - too_large.astype(np.uint16)
    return rounded.view(np.float16)


# Division -----------------------------------------------------------------------------------------
# LLVM divides n / d in float32 as follows: scale both with division_scale, find the quotient with
# Newton's method, do the last step with division_fmas, and let division_fixup treat special cases.
def _exponent_bits(x: _Array) -> Any:
    """The biased exponent of float32."""
    bits = np.asarray(x).view(np.uint32) >> np.uint32(23)
    return (bits & np.uint32(0xFF)).astype(np.int32)


def _are_ordinary(*operands: _Array) -> bool:
    """Whether float32 operands of a division are far from overflow and underflow."""
    return all(bool((np.abs(_exponent_bits(x) - 127) < 48).all()) for x in operands)


def _is_denormal(x: _Array) -> Any:
    """Whether float32 is subnormal, and not zero."""
    return (np.abs(x) < _SMALLEST_NORMAL) & (x != 0)


def division_scale(
    x: _Array, denominator: _Array, numerator: _Array
) -> tuple[_F32, NDArray[np.bool_]]:
    """The first step of a float32 division: avoids overflow and underflow (v_div_scale_f32).

    If the reciprocal of the denominator and the quotient are both subnormal, the denominator is
    scaled down. AMD's pseudo-code scales it up, which overflows and cannot give the right quotient.

    Args:
        x: the denominator or the numerator: which of them to scale.

    Returns:
        x, perhaps scaled by 2 ** 64 or 2 ** -64, and what goes to VCC: whether `division_fmas` has
        to scale the quotient.
    """
    x, denominator, numerator = np.broadcast_arrays(x, denominator, numerator)
    if _are_ordinary(denominator, numerator):
        return x, np.zeros(x.shape, np.bool_)
    difference = _exponent_bits(numerator) - _exponent_bits(denominator)
    of_denominator, of_numerator = x == denominator, x == numerator
    inverse_denormal = np.abs(denominator) > np.float32(2.0**126)
    quotient_denormal = _is_denormal(numerator / denominator)
    up, down, same = 64, -64, 0
    # (condition, exponent of the scale, flag) in AMD's order: the first that holds counts.
    cases: list[tuple[_Array, _Array | int, bool]] = [
        (difference >= 96, np.where(of_denominator, up, same), True),
        (_is_denormal(denominator), up, False),
        (inverse_denormal & quotient_denormal, np.where(of_denominator, down, same), True),
        (inverse_denormal, down, False),
        (quotient_denormal, np.where(of_numerator, up, same), True),
        (_exponent_bits(numerator) <= 23, up, False),  # a tiny numerator
    ]
    conditions = [case[0] for case in cases]
    exponent = np.select(conditions, [np.asarray(case[1]) for case in cases], same)
    flag = np.select(conditions, [np.asarray(case[2]) for case in cases], False)
    has_zero = (numerator == 0) | (denominator == 0)
    scaled = np.where(has_zero, np.float32(np.nan), load_exponent(x, exponent))
    return scaled, flag & ~has_zero


def division_fmas(a: _Array, b: _Array, c: _Array, flag: _Array) -> _F32:
    """a * b + c, scaled where the flag of `division_scale` is set, rounded once (v_div_fmas_f32).

    The scale is 2 ** 64 for a quotient c of 2 or more, otherwise 2 ** -64: the denominator was
    scaled up, or the numerator. (RDNA's pseudo-code has 2 ** 32 for both.)
    """
    scale = np.where(_exponent_bits(c) > 127, 2.0**64, 2.0**-64)
    return (_multiply_add_wide(a, b, c) * np.where(flag, scale, 1.0)).astype(np.float32)


def division_fixup(quotient: _Array, denominator: _Array, numerator: _Array) -> _F32:
    """The last step of a float32 division: special cases and the sign (v_div_fixup_f32).

    An infinite or NaN quotient of finite numbers is an overflow: infinity.
    """
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    sign = np.where(negative, np.float32(-1), np.float32(1))
    if _are_ordinary(quotient, denominator, numerator):
        ordinary: _F32 = np.copysign(quotient, sign)
        return ordinary
    infinite = np.isinf(numerator) | (denominator == 0)
    zero = np.isinf(denominator) | (numerator == 0)
    underflow = _exponent_bits(numerator) - _exponent_bits(denominator) < -150
    magnitude = np.select(
        [infinite & zero, infinite, zero | underflow, ~np.isfinite(quotient)],
        [np.float32(np.nan), np.float32(np.inf), np.float32(0), np.float32(np.inf)],
        np.abs(quotient),
    )
    result = np.copysign(magnitude, sign)
    result = np.where(np.isnan(denominator), denominator, result)
    return np.where(np.isnan(numerator), numerator, result).astype(np.float32)
