"""The four 8-bit floating point formats of AMD GPUs, on NumPy arrays.

"e4m3" and "e5m2" are those of arXiv:2209.05433 (OCP FP8): gfx950 and gfx12 have them. "e4m3fnuz"
and "e5m2fnuz" are those of arXiv:2206.02915, which gfx942 has: no infinities, no negative zero, and
one NaN, 0x80.

Values are only decoded. Instructions that encode them (v_cvt_pk_fp8_f32) are not emulated: their
overflow depends on the FP16_OVFL bit of the MODE register, which Triton sets in kernels that cast
to fp8 themselves. The kernels of backends/triton clamp and round in integer arithmetic
(`encode_fp8`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMATS", "Fp8Format", "decode_table", "format_of"]


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
