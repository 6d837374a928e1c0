"""The four 8-bit floating point formats of AMD GPUs, on NumPy arrays.

"e4m3" and "e5m2" are those of arXiv:2209.05433 (OCP FP8): gfx950 and gfx12 have them. "e4m3fnuz"
and "e5m2fnuz" are those of arXiv:2206.02915, which gfx942 has: no infinities, no negative zero, and
one NaN, 0x80.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMATS", "Fp8Format", "decode_table", "encode", "format_of"]


@dataclass(frozen=True)
class Fp8Format:
    """One 8-bit format.

    Attributes:
        mantissa_bits: below the 7 - mantissa_bits bits of the exponent.
        bias: of the exponent.
        largest_code: of the largest finite value.
        has_infinities: the code after the largest is infinity.
        is_fnuz: NaN is 0x80 only, and there is no negative zero.
    """

    mantissa_bits: int
    bias: int
    largest_code: int
    has_infinities: bool = False
    is_fnuz: bool = False


FORMATS: dict[str, Fp8Format] = {
    "e4m3": Fp8Format(mantissa_bits=3, bias=7, largest_code=0x7E),
    "e5m2": Fp8Format(mantissa_bits=2, bias=15, largest_code=0x7B, has_infinities=True),
    "e4m3fnuz": Fp8Format(mantissa_bits=3, bias=8, largest_code=0x7F, is_fnuz=True),
    "e5m2fnuz": Fp8Format(mantissa_bits=2, bias=16, largest_code=0x7F, is_fnuz=True),
}


def format_of(name: str, has_fnuz: bool) -> str:
    """The format that "fp8" or "bf8" in the name of an instruction means on a target."""
    return {"fp8": "e4m3", "bf8": "e5m2"}[name] + ("fnuz" if has_fnuz else "")


@cache
def decode_table(format: str) -> NDArray[np.float32]:
    """The value of each code: float32, (256,), read-only.

    Args:
        format: a key of `FORMATS`.
    """
    layout = FORMATS[format]
    codes = np.arange(256)
    magnitudes = codes & 0x7F
    exponents = magnitudes >> layout.mantissa_bits
    mantissas = magnitudes & ((1 << layout.mantissa_bits) - 1)
    # A normal number has a leading one; subnormal numbers have the exponent of the smallest normal.
    significands = np.where(exponents > 0, mantissas + (1 << layout.mantissa_bits), mantissas)
    shifts = np.maximum(exponents, 1) - layout.bias - layout.mantissa_bits
    values: NDArray[np.float32] = np.ldexp(significands.astype(np.float32), shifts.astype(np.int32))
    values[magnitudes > layout.largest_code] = np.nan
    if layout.has_infinities:
        values[magnitudes == layout.largest_code + 1] = np.inf
    values = np.copysign(values, np.where(codes >= 0x80, np.float32(-1), np.float32(1)))
    if layout.is_fnuz:
        values[0x80] = np.nan
    values.setflags(write=False)
    return values


def encode(x: NDArray[Any], format: str, saturates: bool = False) -> NDArray[np.uint32]:
    """Codes of float32 values, rounded to nearest even (v_cvt_pk_fp8_f32, v_cvt_pk_bf8_f32).

    A finite value that rounds beyond the largest becomes an infinity, or NaN in a format without
    infinities, unless it saturates.

    Args:
        x: float32.
        format: a key of `FORMATS`.
        saturates: a finite value that rounds beyond the largest becomes the largest. Infinities
            stay infinite: an assumption, no document was found that says it of 8-bit floats.

    Returns:
        uint32 in 0 to 255. The sign of a NaN stays, but for the fnuz formats.
    """
    layout = FORMATS[format]
    x = np.asarray(x, np.float32)
    magnitude = np.abs(x)
    bits = magnitude.view(np.uint32)
    drop = 23 - layout.mantissa_bits
    kept = bits >> np.uint32(drop)
    # Adding half of the last place, less one bit if that place is even, rounds to nearest even.
    rounded = (bits + np.uint32((1 << (drop - 1)) - 1) + (kept & np.uint32(1))) >> np.uint32(drop)
    normal = rounded - np.uint32((127 - layout.bias) << layout.mantissa_bits)
    # Below the smallest normal number, codes are multiples of one step. The product is exact.
    step_exponent = 1 - layout.bias - layout.mantissa_bits
    is_small = magnitude < np.float32(2.0 ** (1 - layout.bias))
    steps = np.rint(np.where(is_small, magnitude, np.float32(0)) * np.float32(2.0**-step_exponent))
    code = np.where(is_small, steps.astype(np.uint32), normal)
    # Codes after the largest: infinity, or NaN. In the fnuz formats NaN is 0x80 for both signs.
    beyond = np.uint32(layout.largest_code + 1)
    overflows = np.uint32(layout.largest_code) if saturates else beyond
    code = np.where(code > layout.largest_code, overflows, code)
    code = np.where(np.isinf(x), beyond, code)
    code = np.where(np.isnan(x), np.uint32(0x80 if layout.is_fnuz else 0x7F), code)
    has_sign = np.signbit(x)
    if layout.is_fnuz:  # neither zero nor NaN has a sign
        has_sign &= (code != 0) & (code != 0x80)
    signed: NDArray[np.uint32] = code | np.where(has_sign, np.uint32(0x80), np.uint32(0))
    return signed
