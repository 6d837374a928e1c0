"""The fp8 formats, in integer arithmetic that every GPU has.

"e4m3" and "e5m2" are those of arXiv:2209.05433 (OCP FP8), "e4m3fnuz" and "e5m2fnuz" those of
arXiv:2206.02915. With `NATIVE` the compiler converts in hardware, which is faster. Both ways give
the same bits, NaN included.
"""

import triton
import triton.language as tl

__all__ = ["decode_fp8", "encode_fp8", "largest"]


@triton.constexpr_function
def _mantissa_bits(FORMAT):
    return 3 if FORMAT.startswith("e4m3") else 2


@triton.constexpr_function
def _bias(FORMAT):
    return {"e4m3": 7, "e4m3fnuz": 8, "e5m2": 15, "e5m2fnuz": 16}[FORMAT]


@triton.constexpr_function
def largest(FORMAT):
    """The largest finite value of a format."""
    return {"e4m3": 448.0, "e4m3fnuz": 240.0, "e5m2": 57344.0, "e5m2fnuz": 57344.0}[FORMAT]


@triton.jit
def decode_fp8(x, dtype: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """The values of fp8 elements.

    Args:
        x: bytes, uint8.
        dtype: of the result.
        FORMAT: which fp8.
        NATIVE: the compiler converts in hardware.
    """
    if NATIVE:
        if FORMAT == "e4m3":
            return x.to(tl.float8e4nv, bitcast=True).to(dtype)
        elif FORMAT == "e5m2":
            return x.to(tl.float8e5, bitcast=True).to(dtype)
        elif FORMAT == "e4m3fnuz":
            return x.to(tl.float8e4b8, bitcast=True).to(dtype)
        else:
            return x.to(tl.float8e5b16, bitcast=True).to(dtype)
    elif FORMAT == "e5m2":
        # The upper byte of a float16.
        return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)
    elif FORMAT == "e5m2fnuz":
        # Its largest exponent is that of float16's infinity, so through float32.
        bits = ((x & 0x7F).to(tl.uint32) << 21) | ((x & 0x80).to(tl.uint32) << 24)
        value = bits.to(tl.float32, bitcast=True) * 1.298074214633707e33  # 2 ** (127 - 16) / 2
        return tl.where(x == 0x80, float("nan"), value * 2.0).to(dtype)
    else:
        # Placed in float16's exponent, a number is too small by the difference of the biases.
        bits = ((x & 0x7F).to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
        by: tl.constexpr = 256.0 if FORMAT == "e4m3" else 128.0
        value = bits.to(tl.float16, bitcast=True) * by
        is_nan = ((x & 0x7F) == 0x7F) if FORMAT == "e4m3" else (x == 0x80)
        return tl.where(is_nan, float("nan"), value).to(dtype)


@triton.jit
def encode_fp8(x, FORMAT: tl.constexpr):
    """float32 values as fp8 bytes, rounded to nearest even and clamped; NaN stays NaN."""
    M: tl.constexpr = _mantissa_bits(FORMAT)
    BIAS: tl.constexpr = _bias(FORMAT)
    FNUZ: tl.constexpr = FORMAT.endswith("fnuz")
    LARGEST: tl.constexpr = largest(FORMAT)
    NAN_CODE: tl.constexpr = 0x80 if FNUZ else 0x7F
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    # Adding a number whose last bit is one step of the subnormals rounds to these steps.
    STEPS: tl.constexpr = 2.0 ** (24 - BIAS - M)
    STEPS_BITS: tl.constexpr = (24 - BIAS - M + 127) << 23
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (22 - M)) - 1) + ((bits >> (23 - M)) & 1)
    normal = (rounded >> (23 - M)) - ((127 - BIAS) << M)
    subnormal = (magnitude + STEPS).to(tl.int32, bitcast=True) - STEPS_BITS
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    if FNUZ:  # no negative zero: its code is NaN
        sign = tl.where(code == 0, 0, sign)
    return tl.where(x != x, NAN_CODE, code | sign).to(tl.uint8)
