"""How the Triton kernels are launched on NVIDIA GPUs, by compute capability.

Rows are head size: DecodeLaunch(block_n, num_warps, num_stages, programs_per_sm, ...) and head
size: PrefillLaunch(block_m, block_n, num_warps, num_stages).
"""

from __future__ import annotations

import dataclasses

from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch

__all__ = ["AMPERE", "BLACKWELL", "HOPPER", "table_for"]

HOPPER = LaunchTable(
    decode={
        64: DecodeLaunch(32, 1, 5, 6, min_tiles=8),
        128: DecodeLaunch(64, 2, 3, 4, num_stages_8bit=5),
        256: DecodeLaunch(32, 4, 5, 2, min_tiles=8),
        512: DecodeLaunch(32, 8, 2, 1, min_tiles=8, max_rows=32),
        1024: DecodeLaunch(16, 8, 2, 1, min_tiles=8, max_rows=16),
    },
    # Little work is bound by latency: fewer programs, each with more in flight.
    decode_few={128: DecodeLaunch(64, 2, 5, 2, lengths_per_load=64)},
    prefill={
        64: PrefillLaunch(64, 128, 4, 2),
        128: PrefillLaunch(64, 64, 4, 3),
        256: PrefillLaunch(64, 64, 4, 2),
        512: PrefillLaunch(64, 32, 8, 2),
        1024: PrefillLaunch(16, 16, 4, 1),
    },
    latents={
        256: {
            16: DecodeLaunch(64, 4, 3, 1),
            32: DecodeLaunch(64, 4, 3, 1),
            64: DecodeLaunch(64, 8, 3, 1),
        },
        512: {
            16: DecodeLaunch(32, 4, 2, 2),
            32: DecodeLaunch(32, 8, 3, 1),
            64: DecodeLaunch(32, 8, 3, 1),
        },
        1024: {16: DecodeLaunch(16, 8, 1, 1)},
    },
    native_fp8=("e4m3",),
    descriptors=True,
    fast_tanh=True,
)

#: B200 has the shared memory of Hopper, and matrix instructions for 128 rows. Nothing was measured
#: there: these rows were chosen by what the compiler reports (docs/kernels.md).
BLACKWELL = dataclasses.replace(
    HOPPER,
    latents={
        256: {16: DecodeLaunch(64, 4, 3, 1), 64: DecodeLaunch(32, 8, 3, 1)},
        512: {16: DecodeLaunch(32, 4, 2, 2), 64: DecodeLaunch(32, 8, 2, 1)},
        1024: {16: DecodeLaunch(16, 8, 1, 1)},
    },
    prefill={
        64: PrefillLaunch(128, 64, 4, 2),
        128: PrefillLaunch(128, 64, 8, 2),
        256: PrefillLaunch(128, 32, 8, 2),
        512: PrefillLaunch(64, 32, 8, 2),
        1024: PrefillLaunch(16, 16, 4, 1),
    },
)

#: sm80, and GPUs with 99 KB of shared memory: sm86, sm89, sm120. Nothing was measured there. Chosen
#: by what the compiler reports, so that two programs fit where possible, and none spills.
AMPERE = LaunchTable(
    decode={
        64: DecodeLaunch(32, 1, 4, 4, min_tiles=8),
        128: DecodeLaunch(32, 2, 2, 4, min_tiles=8),
        256: DecodeLaunch(32, 4, 2, 2, min_tiles=8),
        512: DecodeLaunch(16, 4, 2, 1, min_tiles=8, max_rows=32),
        1024: DecodeLaunch(16, 8, 1, 1, min_tiles=8, max_rows=16),
    },
    prefill={
        64: PrefillLaunch(64, 64, 4, 2),
        128: PrefillLaunch(64, 32, 4, 2),
        256: PrefillLaunch(64, 32, 8, 2),
        512: PrefillLaunch(32, 16, 8, 2),
        1024: PrefillLaunch(16, 16, 4, 1),
    },
    latents={
        256: {16: DecodeLaunch(32, 4, 3, 1), 32: DecodeLaunch(32, 8, 3, 1)},
        512: {16: DecodeLaunch(32, 4, 3, 1), 32: DecodeLaunch(16, 8, 3, 1)},
        1024: {16: DecodeLaunch(16, 8, 1, 1)},
    },
    fast_tanh=True,
)

ADA = dataclasses.replace(AMPERE, native_fp8=("e4m3",))


def table_for(capability: tuple[int, int]) -> LaunchTable:
    """The table for a compute capability."""
    if (9, 0) <= capability < (10, 0):
        return HOPPER
    if (10, 0) <= capability < (12, 0):
        return BLACKWELL
    return ADA if capability >= (8, 9) else AMPERE
