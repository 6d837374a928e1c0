"""8-bit floating point of the emulator, against torch's dtypes and the formats' definitions."""

from __future__ import annotations

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
every_format = pytest.mark.parametrize("format", DTYPES)


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


def test_instructions_name_formats():
    names = [fp8.format_of(name, fnuz) for fnuz in (False, True) for name in ("fp8", "bf8")]
    assert names == list(DTYPES)
