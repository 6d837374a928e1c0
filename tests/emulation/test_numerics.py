"""Arithmetic of the emulator, against exact arithmetic and AMD's pseudo-code."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from attn_dispatch.emulation.arithmetic import bits, numerics
from support.emulation import f32, u32


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


def random_floats(count, seed):
    """Any bits: subnormal, huge, infinite and NaN values too."""
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32).view(np.float32)


def nearest(exact, mantissa_bits, step_exponent, largest):
    """A fraction rounded to nearest even; 2 ** step_exponent is the smallest subnormal number."""
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    step = Fraction(2) ** max(exponent - mantissa_bits, step_exponent)
    rounded = round(magnitude / step) * step  # Python rounds halves to even
    return math.copysign(float(rounded) if rounded <= largest else math.inf, exact)


def nearest_float32(exact):
    return nearest(exact, 23, -149, Fraction(2) ** 128 - Fraction(2) ** 104)


def nearest_float16(exact):
    return nearest(exact, 10, -24, 65504)


# Fused multiply-add -------------------------------------------------------------------------------
def hard_triples(dtype, seed):
    """Operands whose sums are near midpoints, cancel, underflow or overflow: three (k,) arrays."""
    rng = np.random.default_rng(seed)
    half = dtype is np.float16
    digits, low, high = (11, -14, 16) if half else (24, -126, 128)
    k = 1500

    def numbers(bits, start, stop):
        significand = rng.integers(2 ** (bits - 1), 2**bits, k) * rng.choice([-1, 1], k)
        return np.ldexp(significand.astype(np.float64), rng.integers(start, stop, k) - bits + 1)

    short = digits // 2 + 1  # such a product has one bit too many: often a midpoint
    around = (3, 8) if half else (-3, 3)
    a, b = numbers(short, *around), numbers(digits - short + 1, *around)
    groups = [
        (numbers(digits, -5, 5), numbers(digits, -5, 5), numbers(digits, -10, 10)),
        (a, b, numbers(digits, low, low // 2)),  # just off a midpoint
        (a, b, np.zeros(k)),
        (a, b, -(a * b).astype(dtype)),  # leaves the rounding error of the product
        (numbers(digits, low // 2 - 6, low // 2), numbers(digits, low // 2 - 6, low // 2),
         numbers(digits, low - 6, low)),
        (numbers(short, low // 2 - 6, low // 2), numbers(short, low // 2 - 6, low // 2),
         numbers(3, low - digits + 1, low - digits + 4)),
        (numbers(digits, high // 2 - 2, high // 2 + 1), numbers(digits, high // 2 - 2, high // 2),
         numbers(digits, high - 3, high)),
    ]  # fmt: skip
    return [np.concatenate(parts).astype(dtype) for parts in zip(*groups, strict=True)]


def exact_sums(operands):
    triples = zip(*(operand.tolist() for operand in operands), strict=True)
    return [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in triples]


@pytest.mark.parametrize(
    ("dtype", "wider", "rounded"),
    [(np.float32, np.float64, nearest_float32), (np.float16, np.float32, nearest_float16)],
    ids=["float32", "float16"],
)
def test_fused_multiply_add_rounds_once(dtype, wider, rounded):
    operands = hard_triples(dtype, seed=1)
    operands = [o[np.logical_and.reduce([np.isfinite(p) for p in operands])] for o in operands]
    expected = np.array([rounded(exact) for exact in exact_sums(operands)], dtype)
    result = numerics.fused_multiply_add(*operands)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, expected)
    # The cases are hard enough: wider arithmetic with two roundings fails.
    a, b, c = (o.astype(wider) for o in operands)
    assert ((a * b + c).astype(dtype) != expected).sum() > 20


def test_fused_multiply_add_special_values():
    inf, nan = math.inf, math.nan
    a = f32(inf, inf, 0, 1, nan, -0.0, 3e38)
    b = f32(2, 0, inf, 1, 1, 1, 3e38)
    c = f32(1, 1, 1, -inf, 1, -0.0, -inf)
    expected = f32(inf, nan, nan, -inf, nan, -0.0, -inf)
    result = numerics.fused_multiply_add(a, b, c)
    np.testing.assert_array_equal(result, expected)
    assert np.signbit(result[5])
    assert numerics.fused_multiply_add(np.float32(2), np.float32(3), np.float32(4)) == 10


# Other floating point -----------------------------------------------------------------------------
def test_transcendental_functions_flush_denormals():
    tiny = np.float32(2.0**-130)
    zeros = numerics.flush_denormals(f32(tiny, -tiny, 2.0**-126, -0.0, 1, np.nan))
    np.testing.assert_array_equal(zeros, f32(0, -0.0, 2.0**-126, -0.0, 1, np.nan))
    assert np.signbit(zeros).tolist()[:4] == [False, True, False, True]
    np.testing.assert_array_equal(numerics.exp2(f32(0, 3, -126, -127, 128, tiny)),
                                  f32(1, 8, 2.0**-126, 0, np.inf, 1))  # fmt: skip
    np.testing.assert_array_equal(numerics.log2(f32(8, 2.0**-126, tiny, 0, -1)),
                                  f32(3, -126, -np.inf, -np.inf, np.nan))  # fmt: skip
    np.testing.assert_array_equal(numerics.reciprocal(f32(4, tiny, -tiny, 2.0**127, np.inf)),
                                  f32(0.25, np.inf, -np.inf, 0, 0))  # fmt: skip
    np.testing.assert_array_equal(numerics.reciprocal_sqrt(f32(16, tiny, 2.0**-126, -1)),
                                  f32(0.25, np.inf, 2.0**63, np.nan))  # fmt: skip
    np.testing.assert_array_equal(numerics.sqrt(f32(16, tiny, 2.0**-126, -1)),
                                  f32(4, 0, 2.0**-63, np.nan))  # fmt: skip


def test_transcendental_functions_are_rounded_to_nearest():
    x = np.abs(random_floats(4000, seed=2))
    x = x[np.isfinite(x) & (x >= 2.0**-126) & (x < 2.0**126)]
    inverse = [nearest_float32(1 / Fraction(v)) for v in x.tolist()]
    assert numerics.reciprocal(x).tolist() == inverse
    # A float64 square root is exact enough to decide the rounding of float32.
    root = np.sqrt(x.astype(np.float64))
    assert numerics.sqrt(x).tolist() == root.astype(np.float32).tolist()
    assert numerics.reciprocal_sqrt(x).tolist() == (1 / root).astype(np.float32).tolist()
    for function, exact in ((numerics.log2, math.log2), (numerics.exp2, lambda v: 2.0**v)):
        y = f32(*np.random.default_rng(3).uniform(0.1, 20, 500))
        expected = np.array([exact(v) for v in y.tolist()])
        assert (
            np.abs(function(y) - expected).max()
            <= (np.spacing(expected.astype(np.float32)) / 2).max()
        )


def test_angles_are_in_turns():
    # V_SIN_F32: sin(S0 * 2 pi).
    turns = f32(0, 0.25, 0.5, 0.125, -0.25, 1000.25)
    np.testing.assert_allclose(numerics.sine(turns), [0, 1, 0, math.sqrt(0.5), -1, 1], atol=1e-7)
    np.testing.assert_allclose(numerics.cosine(turns), [1, 0, -1, math.sqrt(0.5), 0, 0], atol=1e-7)


def test_fraction_is_below_one():
    x = f32(2.75, -2.75, 3, -1e-10, 0)
    expected = f32(0.75, 0.25, 0, 1 - 2.0**-24, 0)
    np.testing.assert_array_equal(numerics.fraction(x), expected)


def test_maximum_and_minimum_numbers():
    # V_MAX_F32, V_MAX_NUM_F32: a number wins over NaN, and +0 > -0.
    nan = math.nan
    a = f32(1, nan, 2, nan, 0.0, -0.0, -math.inf)
    b = f32(2, 3, nan, nan, -0.0, 0.0, 5)
    for x, y in ((a, b), (b, a)):
        largest, smallest = numerics.maximum_number(x, y), numerics.minimum_number(x, y)
        np.testing.assert_array_equal(largest, f32(2, 3, 2, nan, 0, 0, 5))
        np.testing.assert_array_equal(smallest, f32(1, 3, 2, nan, 0, 0, -math.inf))
        assert not np.signbit(largest[4:6]).any()
        assert np.signbit(smallest[4:6]).all()
    halves = numerics.maximum_number(a.astype(np.float16), b.astype(np.float16))
    assert halves.dtype == np.float16


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_median(order):
    values = [f32(1, -3, 5, math.inf), f32(2, -3, 5, -math.inf), f32(3, 4, 7, 0)]
    result = numerics.median(*(values[i] for i in order))
    np.testing.assert_array_equal(result, f32(2, -3, 5, 0))
    words = [np.array(v, np.int32) for v in ([-5, 3], [7, 3], [0, -9])]
    assert numerics.median(*(words[i] for i in order)).tolist() == [0, 3]
    # V_MED3_F32: with a NaN, the minimum of the numbers.
    with_nan = [f32(math.nan), f32(4), f32(-2)]
    assert numerics.median(*(with_nan[i] for i in order)).tolist() == [-2]


def test_exponents():
    x = f32(1, 0, -0.75, 10, 2.0**-140, math.inf, math.nan)
    np.testing.assert_array_equal(
        numerics.frexp_mantissa(x), f32(0.5, 0, -0.75, 0.625, 0.5, math.inf, math.nan)
    )
    assert numerics.frexp_exponent(x).tolist() == [1, 0, 0, 4, -139, 0, 0]
    assert numerics.frexp_exponent(x).dtype == np.int32
    scaled = numerics.load_exponent(
        f32(1.5, 1, 3, 1, 1), np.array([4, -149, -150, 200, -200], np.int32)
    )
    # 3 * 2 ** -150 is between two subnormal numbers: to even.
    np.testing.assert_array_equal(scaled, f32(24, 2.0**-149, 2.0**-148, math.inf, 0))
    half = numerics.load_exponent(np.array([1.5], np.float16), np.array([3], np.int16))
    assert (half.dtype, half.tolist()) == (np.float16, [12.0])


# Conversions --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint16])
def test_floats_become_integers(dtype):
    # V_CVT_I32_F32: toward zero, out of range becomes the limit, NaN becomes 0.
    limits = np.iinfo(dtype)
    x = f32(1.9, -1.9, 2.5, math.nan, math.inf, -math.inf, 1e20, -1e20, 255.999)
    low = -1 if limits.min else 0
    expected = [1, low, 2, 0, limits.max, limits.min, limits.max, limits.min, 255]
    result = numerics.to_integer(x, dtype)
    assert (result.dtype, result.tolist()) == (dtype, expected)
    assert numerics.to_integer(np.float16([-7.9]), np.int16).tolist() == [-7]


def test_bfloat16_is_rounded_to_nearest_even():
    words = u32(0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7F0000)
    expected = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0xFF7F]
    result = numerics.to_bfloat16(words.view(np.float32))
    assert (result.dtype, result.tolist()) == (np.uint16, expected)
    # A NaN stays NaN, even if its bits are in the lower half.
    assert numerics.to_bfloat16(u32(0x7F800001, 0xFFFFFFFF).view(np.float32)).tolist() == [
        0x7FC0,
        0xFFFF,
    ]


def test_bfloat16_round_trip():
    codes = np.arange(65536, dtype=np.uint16)
    values = numerics.from_bfloat16(codes)
    assert np.array_equal(values.view(np.uint32), codes.astype(np.uint32) << 16)
    number = ~np.isnan(values)
    assert np.array_equal(numerics.to_bfloat16(values)[number], codes[number])


def test_float16_toward_zero():
    # V_CVT_PKRTZ_F16_F32: no rounding away from zero, so no overflow to infinity.
    x = random_floats(20000, seed=4)
    x = np.concatenate(
        [x, np.ldexp(x / np.ldexp(f32(1), np.frexp(x)[1]), np.arange(len(x)) % 40 - 25)]
    )
    x = np.concatenate([x, f32(65520, -1e6, 65504, 2.0**-25, -(2.0**-24), math.inf, -math.inf)])
    x = x[~np.isnan(x)].astype(np.float32)
    result = numerics.to_float16_toward_zero(x)
    wide = result.astype(np.float32)
    assert (np.abs(wide) <= np.abs(x)).all()
    assert (np.signbit(wide) == np.signbit(x)).all()
    # The next float16 away from zero is larger than x, or infinite.
    beyond = (result.view(np.uint16) + np.uint16(1)).view(np.float16).astype(np.float32)
    finite = np.isfinite(x)
    assert (np.abs(beyond[finite]) > np.abs(x[finite])).all()
    assert np.isfinite(result[finite]).all()
    assert np.isinf(result[~finite]).all()
    assert np.isnan(numerics.to_float16_toward_zero(f32(math.nan))).all()


# Division -----------------------------------------------------------------------------------------
def divide(numerator, denominator):
    """n / d as LLVM computes it on AMD GPUs, with denormals."""
    d, _ = numerics.division_scale(denominator, denominator, numerator)
    n, flag = numerics.division_scale(numerator, denominator, numerator)
    one = np.float32(1)
    fma = numerics.fused_multiply_add
    inverse = numerics.reciprocal(d)
    inverse = fma(fma(-d, inverse, one), inverse, inverse)
    quotient = n * inverse
    quotient = fma(fma(-d, quotient, n), inverse, quotient)
    quotient = numerics.division_fmas(fma(-d, quotient, n), inverse, quotient, flag)
    return numerics.division_fixup(quotient, denominator, numerator)


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 3.0, -7.0, 2.0**-149, 2.0**-126]
SPECIAL += [1.5 * 2.0**-140, 2.0**126, 1.5 * 2.0**126, 2.0**127, 3.4028235e38]


@pytest.mark.parametrize("spread", [0.1, 1, 10, 25])
def test_division_of_common_numbers_is_correctly_rounded(spread):
    rng = np.random.default_rng(7)
    numerator, denominator = np.exp2(rng.normal(scale=spread, size=(2, 20000))).astype(np.float32)
    numerator *= rng.choice(f32(-1, 1), 20000)
    result = divide(numerator, denominator)
    assert np.array_equal(bits_of(result), bits_of(numerator / denominator))


def test_division_is_correctly_rounded():
    special = f32(*SPECIAL)
    numerator = np.concatenate([random_floats(100000, 5), np.repeat(special, len(special))])
    denominator = np.concatenate([random_floats(100000, 6), np.tile(special, len(special))])
    expected = numerator / denominator
    result = divide(numerator, denominator)
    wrong = np.flatnonzero((bits_of(result) != bits_of(expected)) & ~np.isnan(expected))
    assert [(numerator[i], denominator[i], result[i], expected[i]) for i in wrong[:5]] == []
    assert np.array_equal(np.isnan(result), np.isnan(expected))


@pytest.mark.parametrize(
    ("numerator", "denominator", "exponents", "flag"),
    [
        (1.0, 3.0, (0, 0), False),
        (2.0**60, 2.0**-40, (0, 64), True),  # the quotient is near overflow
        (1.0, 2.0**-130, (0, 64), True),
        (2.0**-60, 2.0**-130, (64, 64), False),  # a subnormal denominator
        (1.0, 1.5 * 2.0**126, (0, -64), True),  # inverse and quotient are subnormal
        (2.0**40, 1.5 * 2.0**126, (-64, -64), False),  # only the inverse is
        (2.0**-100, 2.0**40, (64, 0), True),  # only the quotient is
        (2.0**-110, 2.0**-100, (64, 64), False),  # a tiny numerator
    ],
)
def test_division_scale(numerator, denominator, exponents, flag):
    n, d = f32(numerator), f32(denominator)
    for x, exponent in ((n, exponents[0]), (d, exponents[1])):
        scaled, flags = numerics.division_scale(x, d, n)
        assert scaled.tolist() == [float(x[0]) * 2.0**exponent]
        assert flags.tolist() == [flag]


def test_division_scale_of_zero_is_nan():
    for n, d in ((0.0, 1.0), (1.0, 0.0)):
        scaled, flag = numerics.division_scale(f32(n), f32(d), f32(n))
        assert np.isnan(scaled).all()
        assert not flag.any()


def test_division_fmas_scales_and_rounds_once():
    one = f32(1)
    assert numerics.division_fmas(one, one, f32(4), np.array([True])).tolist() == [5 * 2.0**64]
    assert numerics.division_fmas(one, one, f32(4), np.array([False])).tolist() == [5]
    # c * 2 ** -64 is a midpoint of subnormal numbers; the product is less than c's last bit.
    c, small = f32(2.0**-85 + 2.0**-86), f32(2.0**-60)
    for a, expected in ((small, 2.0**-148), (0 * small, 2.0**-148), (-small, 2.0**-149)):
        assert numerics.division_fmas(a, small, c, np.array([True])).tolist() == [expected]


# Shapes -------------------------------------------------------------------------------------------
_WORD_ARGUMENTS = (u32(0xDEADBEEF, 5, 0), u32(0x12345678, 40, 7), u32(0x0C050009, 9, 2))
_FLOAT_ARGUMENTS = (f32(1.5, -2, 1e-40), f32(-3, 0.1, 7), f32(0.5, 6, 3e38))
_LONG_WORDS = np.array([2**63 + 5, 2**40 + 3, 7], np.uint64)
_FLAG = np.array([True, False, True])
ARGUMENTS = {
    name: _WORD_ARGUMENTS[:count]
    for count, names in {
        1: "count_bits leading_zeros leading_sign_bits trailing_zeros reverse_bits",
        2: "to_u64 bit_mask_32",
        3: "extract_bits extract_signed_bits align_bits permute_bytes",
    }.items()
    for name in names.split()
}
ARGUMENTS |= {
    name: _FLOAT_ARGUMENTS[:count]
    for count, names in {
        1: "flush_denormals exp2 log2 reciprocal reciprocal_sqrt sqrt sine cosine fraction "
        "frexp_mantissa frexp_exponent to_bfloat16 to_float16_toward_zero",
        2: "maximum_number minimum_number",
        3: "fused_multiply_add median division_scale division_fixup",
    }.items()
    for name in names.split()
}
ARGUMENTS |= {
    "low32": (_LONG_WORDS,),
    "high32": (_LONG_WORDS,),
    "from_bfloat16": (_WORD_ARGUMENTS[0],),
    "bitwise_ternary": (0x1B, *_WORD_ARGUMENTS),
    "to_integer": (_FLOAT_ARGUMENTS[0], np.int32),
    "load_exponent": (_FLOAT_ARGUMENTS[0], np.array([3, -4, 5], np.int32)),
    "division_fmas": (*_FLOAT_ARGUMENTS, _FLAG),
}


def same(result, expected):
    return np.array_equal(result, expected, equal_nan=np.asarray(expected).dtype.kind == "f")


@pytest.mark.parametrize("name", [*bits.__all__, *numerics.__all__])
def test_shapes_broadcast(name):
    """A function of arrays of any shape, and of values without dimensions, is elementwise."""
    module = bits if name in bits.__all__ else numerics
    function, arguments = getattr(module, name), ARGUMENTS[name]

    def values(each):
        given = [each(x, i) if isinstance(x, np.ndarray) else x for i, x in enumerate(arguments)]
        result = function(*given)
        return result if isinstance(result, tuple) else (result,)

    whole = values(lambda x, _: x)
    for i in range(3):
        for result, expected in zip(values(lambda x, _, i=i: x[i]), whole, strict=True):
            assert result.shape == ()
            assert result.dtype == expected.dtype
            assert same(result, expected[i])
    # The first array varies along the rows, the others along the columns.
    arrays = [i for i, x in enumerate(arguments) if isinstance(x, np.ndarray)]
    table = values(lambda x, i: x[:, None] if i == arrays[0] else x)
    for result, expected in zip(table, whole, strict=True):
        assert result.shape == (3, 3 if len(arrays) > 1 else 1)
        assert same(np.diagonal(result) if len(arrays) > 1 else result[:, 0], expected)
