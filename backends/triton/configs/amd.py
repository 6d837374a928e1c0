"""How the Triton kernels are launched on AMD's GPUs, by architecture.

Chosen by what the compiler reports (docs/kernels.md), not by measuring: tiles are as large as they
can be with two programs of four waves on a CU, without spills where that is possible. LDS is 64 KiB
for a program but on gfx950.
"""

from __future__ import annotations

from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch

__all__ = ["ARCHS", "CDNA2", "CDNA3", "CDNA4", "RDNA3", "RDNA4", "table_for"]

_CDNA_DECODE = {
    64: DecodeLaunch(block_n=64, num_warps=2, num_stages=2, programs_per_sm=4),
    128: DecodeLaunch(block_n=32, num_warps=4, num_stages=2, programs_per_sm=2, min_tiles=8),
    256: DecodeLaunch(block_n=16, num_warps=4, num_stages=2, programs_per_sm=2, min_tiles=16),
    512: DecodeLaunch(
        block_n=16, num_warps=4, num_stages=2, programs_per_sm=2, min_tiles=16, max_rows=32
    ),
    1024: DecodeLaunch(
        block_n=16, num_warps=4, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=16
    ),
}
_CDNA_PREFILL = {
    64: PrefillLaunch(block_m=128, block_n=64, num_warps=4, num_stages=2),
    128: PrefillLaunch(block_m=128, block_n=32, num_warps=4, num_stages=2),
    256: PrefillLaunch(block_m=64, block_n=32, num_warps=4, num_stages=1),
    512: PrefillLaunch(block_m=32, block_n=16, num_warps=4, num_stages=1),
    1024: PrefillLaunch(block_m=32, block_n=16, num_warps=8, num_stages=1),
}

CDNA2 = LaunchTable(decode=_CDNA_DECODE, prefill=_CDNA_PREFILL)
CDNA3 = LaunchTable(decode=_CDNA_DECODE, prefill=_CDNA_PREFILL, native_fp8=("e4m3fnuz", "e5m2fnuz"))
CDNA4 = LaunchTable(decode=_CDNA_DECODE, prefill=_CDNA_PREFILL, native_fp8=("e4m3", "e5m2"))

#: Its matrix instructions want each operand twice in the registers: from head size 256 on the
#: queries alone fill them, and something spills whatever the tile.
RDNA3 = LaunchTable(
    decode={
        64: DecodeLaunch(block_n=32, num_warps=2, num_stages=1, programs_per_sm=4, min_tiles=8),
        128: DecodeLaunch(block_n=32, num_warps=4, num_stages=1, programs_per_sm=2, min_tiles=8),
        256: DecodeLaunch(
            block_n=16, num_warps=8, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=32
        ),
        512: DecodeLaunch(
            block_n=16, num_warps=16, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=16
        ),
        1024: DecodeLaunch(
            block_n=16, num_warps=16, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=16
        ),
    },
    prefill={
        64: PrefillLaunch(block_m=128, block_n=32, num_warps=8, num_stages=1),
        128: PrefillLaunch(
            block_m=64, block_n=16, num_warps=4, num_stages=1, options={"waves_per_eu": 4}
        ),
        256: PrefillLaunch(block_m=32, block_n=16, num_warps=8, num_stages=1),
        512: PrefillLaunch(block_m=32, block_n=16, num_warps=16, num_stages=1),
        1024: PrefillLaunch(block_m=16, block_n=16, num_warps=16, num_stages=1),
    },
)
RDNA4 = LaunchTable(
    decode={
        64: DecodeLaunch(block_n=32, num_warps=2, num_stages=1, programs_per_sm=4, min_tiles=8),
        128: DecodeLaunch(block_n=32, num_warps=4, num_stages=1, programs_per_sm=2, min_tiles=8),
        256: DecodeLaunch(
            block_n=16, num_warps=4, num_stages=1, programs_per_sm=2, min_tiles=16, max_rows=32
        ),
        512: DecodeLaunch(
            block_n=16, num_warps=16, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=16
        ),
        1024: DecodeLaunch(
            block_n=16, num_warps=16, num_stages=1, programs_per_sm=1, min_tiles=16, max_rows=16
        ),
    },
    prefill={
        64: PrefillLaunch(block_m=128, block_n=32, num_warps=4, num_stages=1),
        128: PrefillLaunch(block_m=64, block_n=32, num_warps=4, num_stages=1),
        256: PrefillLaunch(block_m=64, block_n=16, num_warps=8, num_stages=1),
        512: PrefillLaunch(block_m=32, block_n=16, num_warps=16, num_stages=1),
        1024: PrefillLaunch(block_m=16, block_n=16, num_warps=16, num_stages=1),
    },
)

_TABLES = {
    "gfx90a": CDNA2,
    "gfx942": CDNA3,
    "gfx950": CDNA4,
    "gfx1100": RDNA3,
    "gfx1101": RDNA3,
    "gfx1102": RDNA3,
    "gfx1151": RDNA3,
    "gfx1200": RDNA4,
    "gfx1201": RDNA4,
}
#: The architectures that kernels are compiled for; others were never tried.
ARCHS = tuple(_TABLES)


def table_for(arch: str) -> LaunchTable:
    """The table for one of ARCHS.

    Raises:
        KeyError: it is none of them.
    """
    return _TABLES[arch]
