"""How the Triton kernels are launched on AMD GPUs, by architecture.

No AMD GPU measured them. They were chosen by what the compiler reports, and by what the kernels
execute on an emulated GPU (docs/kernels.md, benchmarks/amd_counts.py): few instructions for each
pair of a query and a key, few spills, and enough waves on a SIMD. A tile should give each wave
whole matrix instructions of its own: waves that share one repeat it. A program has 64 KiB of LDS,
on gfx950 more.

Rows are head size: DecodeLaunch(block_n, num_warps, num_stages, programs_per_sm, ...) and head
size: PrefillLaunch(block_m, block_n, num_warps, num_stages).
"""

from __future__ import annotations

import dataclasses

from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch

__all__ = ["ARCHS", "CDNA2", "CDNA3", "CDNA4", "RDNA3", "RDNA4", "table_for"]

_CDNA_DECODE = {
    64: DecodeLaunch(32, 1, 2, 8, min_tiles=8),
    128: DecodeLaunch(32, 2, 2, 4, min_tiles=8),
    256: DecodeLaunch(16, 4, 2, 2, min_tiles=16),
    512: DecodeLaunch(16, 4, 2, 2, min_tiles=16, max_rows=32),
    1024: DecodeLaunch(16, 4, 1, 1, min_tiles=16, max_rows=16),
}
_CDNA_PREFILL = {
    64: PrefillLaunch(128, 32, 4, 2),
    128: PrefillLaunch(128, 32, 4, 2),
    256: PrefillLaunch(64, 16, 4, 1),
    512: PrefillLaunch(32, 16, 4, 1),
    1024: PrefillLaunch(32, 16, 8, 1),
}
_CDNA_LATENTS = {
    256: {16: DecodeLaunch(32, 4, 2, 1), 32: DecodeLaunch(32, 4, 2, 1)},
    512: {16: DecodeLaunch(16, 4, 2, 1), 32: DecodeLaunch(16, 4, 2, 1)},
    1024: {16: DecodeLaunch(16, 4, 1, 1)},
}
#: On gfx90a 64 rows spill.
_CDNA3_LATENTS = {
    **_CDNA_LATENTS,
    256: {**_CDNA_LATENTS[256], 64: DecodeLaunch(16, 4, 2, 1)},
    512: {**_CDNA_LATENTS[512], 64: DecodeLaunch(16, 4, 2, 1)},
}

CDNA2 = LaunchTable(decode=_CDNA_DECODE, prefill=_CDNA_PREFILL, latents=_CDNA_LATENTS, warp_size=64)
CDNA3 = dataclasses.replace(CDNA2, latents=_CDNA3_LATENTS, native_fp8=("e4m3fnuz", "e5m2fnuz"))
CDNA4 = dataclasses.replace(CDNA3, native_fp8=("e4m3", "e5m2"))

_RDNA_LATENTS = {
    256: {16: DecodeLaunch(16, 8, 1, 1), 32: DecodeLaunch(16, 8, 1, 1)},
    512: {16: DecodeLaunch(16, 16, 1, 1), 32: DecodeLaunch(16, 16, 1, 1)},
    1024: {16: DecodeLaunch(16, 16, 1, 1)},
}

#: Its matrix instructions need each operand twice in registers: from head size 256 on the queries
#: fill them, and every tile size of prefill spills.
RDNA3 = LaunchTable(
    decode={
        64: DecodeLaunch(32, 2, 1, 4, min_tiles=8),
        128: DecodeLaunch(32, 4, 1, 2, min_tiles=8),
        256: DecodeLaunch(16, 8, 1, 1, min_tiles=16, max_rows=32),
        512: DecodeLaunch(16, 16, 1, 1, min_tiles=16, max_rows=16),
        1024: DecodeLaunch(16, 16, 1, 1, min_tiles=16, max_rows=16),
    },
    prefill={
        64: PrefillLaunch(128, 32, 8, 1),
        128: PrefillLaunch(64, 16, 4, 1, options={"waves_per_eu": 4}),
        256: PrefillLaunch(64, 16, 8, 1),
        512: PrefillLaunch(64, 16, 16, 1),
        1024: PrefillLaunch(16, 16, 16, 1),
    },
    latents=_RDNA_LATENTS,
)
RDNA4 = LaunchTable(
    decode={
        64: DecodeLaunch(32, 2, 1, 4, min_tiles=8),
        128: DecodeLaunch(32, 4, 1, 2, min_tiles=8),
        256: DecodeLaunch(16, 4, 1, 2, min_tiles=16, max_rows=32),
        512: DecodeLaunch(16, 16, 1, 1, min_tiles=16, max_rows=16),
        1024: DecodeLaunch(16, 16, 1, 1, min_tiles=16, max_rows=16),
    },
    prefill={
        64: PrefillLaunch(128, 32, 4, 1),
        128: PrefillLaunch(64, 32, 4, 1),
        256: PrefillLaunch(64, 16, 4, 1),
        512: PrefillLaunch(64, 16, 16, 1),
        1024: PrefillLaunch(16, 16, 16, 1),
    },
    latents=_RDNA_LATENTS,
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
#: The architectures that kernels are compiled for. No other one was tried.
ARCHS = tuple(_TABLES)


def table_for(arch: str) -> LaunchTable:
    """The table for one of ARCHS.

    Raises:
        KeyError: it is not one of them.
    """
    return _TABLES[arch]
