"""8-bit floating point of the emulator, against torch's dtypes and the formats' definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_dispatch.emulation.arithmetic import fp8

DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e4m3fnuz": 240.0, "e5m2fnuz": 57344.0}

every_format = pytest.mark.parametrize("format", DTYPES)


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def f32(*values):
    return np.array(values, np.float32)


def torch_codes(x, format):
    return torch.from_numpy(x).to(DTYPES[format]).view(torch.uint8).numpy().astype(np.uint32)


def test_every_format_is_tested():
    assert set(fp8.FORMATS) == set(DTYPES)


@every_format
def test_decode_table_is_that_of_torch(format):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(DTYPES[format]).float().numpy()
    table = fp8.decode_table(format)
    np.testing.assert_array_equal(table, expected)
    assert table.dtype == np.float32
    zeros = table == 0
    assert np.array_equal(np.signbit(table)[zeros], np.signbit(expected)[zeros])
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


@every_format
def test_codes_survive_a_round_trip(format):
    table = fp8.decode_table(format)
    number = ~np.isnan(table)
    codes = fp8.encode(table, format)
    assert codes.dtype == np.uint32
    assert np.array_equal(codes[number], np.arange(256)[number])
    assert np.isnan(table[codes[~number]]).all()


@every_format
def test_every_float16_is_rounded_as_torch_does(format):
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    x = halves.astype(np.float32)
    codes = fp8.encode(x, format)
    in_range = np.abs(x) <= LARGEST[format]  # torch versions differ in what is beyond
    assert np.array_equal(codes[in_range], torch_codes(x, format)[in_range])
    assert np.isnan(fp8.decode_table(format)[codes[np.isnan(x)]]).all()


@every_format
def test_float32_near_midpoints_is_rounded_to_nearest_even(format):
    values = fp8.decode_table(format)[: fp8.FORMATS[format].largest_code + 1].astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact
    below, above = np.nextafter(middle, f32(0)), np.nextafter(middle, f32(np.inf))
    lower = np.arange(len(middle))
    assert np.array_equal(fp8.encode(below, format), lower)
    assert np.array_equal(fp8.encode(above, format), lower + 1)
    assert np.array_equal(fp8.encode(middle, format), lower + lower % 2)
    negative = fp8.encode(-above, format)
    assert np.array_equal(negative, (lower + 1) | 0x80)


@every_format
def test_random_float32_is_rounded_as_torch_does(format):
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 50000, np.uint32).view(np.float32)
    common = np.ldexp(rng.uniform(-1, 1, 50000).astype(np.float32), rng.integers(-20, 20, 50000))
    x = np.concatenate([any_bits, common.astype(np.float32)])
    x = x[np.abs(x) <= LARGEST[format]]
    assert len(x) > 50000
    assert np.array_equal(fp8.encode(x, format), torch_codes(x, format))


#: Codes of a value that rounds beyond the largest, of infinity and of NaN.
OVERFLOW = {
    "e4m3": [0x7F, 0x7F, 0x7F],
    "e5m2": [0x7C, 0x7C, 0x7F],
    "e4m3fnuz": [0x80, 0x80, 0x80],
    "e5m2fnuz": [0x80, 0x80, 0x80],
}


@every_format
def test_overflow(format):
    expected = np.array(OVERFLOW[format], np.uint32)
    x = f32(1e6, math.inf, math.nan)
    assert fp8.encode(x, format).tolist() == expected.tolist()
    assert fp8.encode(-x, format).tolist() == (expected | 0x80).tolist()
    # A value that rounds to the largest does not overflow.
    largest = LARGEST[format]
    step = largest - float(fp8.decode_table(format)[fp8.FORMATS[format].largest_code - 1])
    edge = f32(largest + step / 2)
    inside = np.nextafter(edge, f32(0))
    assert fp8.encode(inside, format).tolist() == [fp8.FORMATS[format].largest_code]
    assert fp8.encode(np.nextafter(edge, f32(np.inf)), format)[0] == expected[0]


@every_format
def test_saturation(format):
    x = f32(1e6, LARGEST[format], 1, math.inf, math.nan)
    plain = fp8.encode(x, format).tolist()
    saturated = [fp8.FORMATS[format].largest_code, *plain[1:]]
    assert fp8.encode(x, format, saturates=True).tolist() == saturated
    negative = fp8.encode(-x, format, saturates=True).tolist()
    assert negative == [code | 0x80 for code in saturated]


@every_format
def test_zeros(format):
    negative = 0 if format.endswith("fnuz") else 0x80
    tiny = 2.0**-30
    assert fp8.encode(f32(0.0, -0.0, tiny, -tiny), format).tolist() == [0, negative] * 2
    assert fp8.encode(np.float32(1), format).shape == ()


def test_instructions_name_formats():
    names = [fp8.format_of(name, fnuz) for fnuz in (False, True) for name in ("fp8", "bf8")]
    assert names == list(DTYPES)
