"""Lane permutations of the emulator, against the definitions in AMD's instruction set manuals."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.arithmetic import lanes
from attn_dispatch.emulation.errors import UnknownInstruction

every_size = pytest.mark.parametrize("wave_size", [32, 64])

#: The source of lane n, as the manuals define it ("pix[n].srca = pix[...].srca"); None for none.
DPP = {
    "quad_perm:[1,0,3,2]": lambda n, size: (n & ~3) + [1, 0, 3, 2][n & 3],
    "quad_perm:[2,2,0,1]": lambda n, size: (n & ~3) + [2, 2, 0, 1][n & 3],
    "row_shl:1": lambda n, size: n + 1 if (n & 15) < 15 else None,
    "row_shl:8": lambda n, size: n + 8 if (n & 15) < 8 else None,
    "row_shr:1": lambda n, size: n - 1 if (n & 15) >= 1 else None,
    "row_shr:15": lambda n, size: n - 15 if (n & 15) >= 15 else None,
    "row_ror:4": lambda n, size: n - 4 if (n & 15) >= 4 else n + 16 - 4,
    "row_mirror": lambda n, size: (n & ~15) + 15 - (n & 15),
    "row_half_mirror": lambda n, size: (n & ~7) + 7 - (n & 7),
    "row_bcast:15": lambda n, size: (n & 0x30) - 1 if n > 15 else None,
    "row_bcast:31": lambda n, size: (n & 0x20) - 1 if n > 31 else None,
    "row_share:3": lambda n, size: (n & ~15) + 3,
    "row_newbcast:12": lambda n, size: (n & ~15) + 12,
    "row_xmask:5": lambda n, size: (n & ~15) + ((n & 15) ^ 5),
    "wave_shr:1": lambda n, size: n - 1 if n > 0 else None,
    "wave_shl:1": lambda n, size: n + 1 if n < size - 1 else None,
    "wave_ror:1": lambda n, size: n - 1 if n > 0 else size - 1,
    "wave_rol:1": lambda n, size: n + 1 if n < size - 1 else 0,
}


@every_size
@pytest.mark.parametrize("control", DPP)
def test_dpp_sources(control, wave_size):
    expected = [DPP[control](n, wave_size) for n in range(wave_size)]
    sources = lanes.dpp_sources(control, wave_size)
    assert sources.tolist() == [-1 if source is None else source for source in expected]
    assert lanes.dpp_sources(control, wave_size) is sources
    with pytest.raises(ValueError, match="read-only"):
        sources[0] = 1


@pytest.mark.parametrize(
    "control",
    [
        "quad_perm:[0,1,2]",
        "quad_perm:[0,1,2,4]",
        "row_shl:0",
        "row_shr:16",
        "row_share:16",
        "row_bcast:7",
        "row_mirror:1",
        "row_shl:x",
        "sideways",
    ],
)
def test_unknown_dpp_controls_are_rejected(control):
    with pytest.raises(UnknownInstruction, match="DPP control"):
        lanes.dpp_sources(control, 64)


def test_row_and_bank_masks():
    # Bit r of the row mask is for the lanes 16 r to 16 r + 15, bit b of the bank mask for the
    # lanes 4 b to 4 b + 3 of each row.
    assert lanes.row_bank_lanes(0xF, 0xF, 64).all()
    assert not lanes.row_bank_lanes(0xF, 0, 32).any()
    assert np.flatnonzero(lanes.row_bank_lanes(0xA, 0xF, 64)).tolist() == [
        *range(16, 32),
        *range(48, 64),
    ]
    assert np.flatnonzero(lanes.row_bank_lanes(0x2, 0x9, 32)).tolist() == [
        *range(16, 20),
        *range(28, 32),
    ]
    with pytest.raises(ValueError, match="read-only"):
        lanes.row_bank_lanes(0xF, 0xF, 64)[0] = False


#: Texts and the source of lane n within its 32 lanes.
SWIZZLES = {
    "swizzle(SWAP,16)": lambda n: n ^ 16,
    "swizzle(SWAP,1)": lambda n: n ^ 1,
    "swizzle(REVERSE,8)": lambda n: n // 8 * 8 + 7 - n % 8,
    "swizzle(REVERSE,32)": lambda n: 31 - n,
    "swizzle(BROADCAST,4,1)": lambda n: n // 4 * 4 + 1,
    "swizzle(BROADCAST,32,31)": lambda n: 31,
    "swizzle(QUAD_PERM,1,0,3,3)": lambda n: n // 4 * 4 + (1, 0, 3, 3)[n % 4],
    'swizzle(BITMASK_PERM,"ppppp")': lambda n: n,
    'swizzle(BITMASK_PERM,"00p11")': lambda n: (n & 4) | 3,
    'swizzle(BITMASK_PERM, "i0p1i")': lambda n: ((n & 16) ^ 16) | (n & 4) | 2 | ((n & 1) ^ 1),
}


@every_size
@pytest.mark.parametrize("text", SWIZZLES)
def test_swizzle_sources(text, wave_size):
    expected = [(n & 32) + SWIZZLES[text](n & 31) for n in range(wave_size)]
    sources = lanes.swizzle_sources(text, wave_size)
    assert sources.tolist() == expected
    with pytest.raises(ValueError, match="read-only"):
        sources[0] = 1


@pytest.mark.parametrize(
    "text",
    [
        "swizzle(SWAP,3)",
        "swizzle(SWAP,32)",
        "swizzle(SWAP,x)",
        "swizzle(REVERSE,64)",
        "swizzle(BROADCAST,4,4)",
        "swizzle(BROADCAST,4)",
        "swizzle(QUAD_PERM,1,0,3,4)",
        "swizzle(QUAD_PERM,1,0,3)",
        'swizzle(BITMASK_PERM,"0p11")',
        'swizzle(BITMASK_PERM,"00x11")',
        "swizzle(FFT,1)",
        "0x401f",
        "sideways",
    ],
)
def test_unknown_swizzles_are_rejected(text):
    with pytest.raises(UnknownInstruction, match="swizzle"):
        lanes.swizzle_sources(text, 32)


@every_size
@pytest.mark.parametrize("crosses", [False, True])
def test_permlane16_follows_the_pseudo_code(crosses, wave_size):
    # V_PERMLANE16_B32: lanesel = {S2, S1}; lane i of a row takes lanesel[4 i + 3 : 4 i] of the row,
    # V_PERMLANEX16_B32 of the row whose lowest number bit is inverted.
    pairs = ((0x76543210, 0xFEDCBA98), (0x01234567, 0x89ABCDEF), (0xF0E1D2C3, 0x00FF7788))
    for low, high in pairs:
        sources = lanes.permlane16_sources(low, high, crosses, wave_size)
        assert sources.shape == (wave_size,)
        select = high << 32 | low
        for lane in range(wave_size):
            row, i = divmod(lane, 16)
            expected = (row ^ 1 if crosses else row) * 16 + (select >> (4 * i) & 15)
            assert sources[lane] == expected
