"""How the Triton kernels are launched on NVIDIA's GPUs, by compute capability."""

from __future__ import annotations

from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch

__all__ = ["AMPERE", "BLACKWELL", "HOPPER", "table_for"]

HOPPER = LaunchTable(
    decode={
        64: DecodeLaunch(block_n=32, num_warps=1, num_stages=5, programs_per_sm=6, min_tiles=8),
        128: DecodeLaunch(
            block_n=64, num_warps=2, num_stages=3, programs_per_sm=4, num_stages_8bit=5
        ),
        256: DecodeLaunch(block_n=32, num_warps=4, num_stages=5, programs_per_sm=2, min_tiles=8),
        512: DecodeLaunch(
            block_n=32, num_warps=8, num_stages=2, programs_per_sm=1, min_tiles=8, max_rows=32
        ),
        1024: DecodeLaunch(
            block_n=16, num_warps=8, num_stages=2, programs_per_sm=1, min_tiles=8, max_rows=16
        ),
    },
    # Little work is bound by latency: fewer programs, each with more in flight.
    decode_few={
        128: DecodeLaunch(
            block_n=64, num_warps=2, num_stages=5, programs_per_sm=2, lengths_per_load=64
        ),
    },
    prefill={
        64: PrefillLaunch(block_m=64, block_n=128, num_warps=4, num_stages=2),
        128: PrefillLaunch(block_m=64, block_n=64, num_warps=4, num_stages=3),
        256: PrefillLaunch(block_m=64, block_n=64, num_warps=4, num_stages=2),
        512: PrefillLaunch(block_m=64, block_n=32, num_warps=8, num_stages=2),
        1024: PrefillLaunch(block_m=16, block_n=16, num_warps=4, num_stages=1),
    },
    native_fp8=("e4m3",),
    descriptors=True,
    fast_tanh=True,
)

#: B200 has Hopper's shared memory, and matrix instructions that want 128 rows. Nothing was measured
#: there: prefill was chosen by what the compiler reports (docs/kernels.md).
BLACKWELL = LaunchTable(
    decode=HOPPER.decode,
    decode_few=HOPPER.decode_few,
    prefill={
        64: PrefillLaunch(block_m=128, block_n=64, num_warps=4, num_stages=2),
        128: PrefillLaunch(block_m=128, block_n=64, num_warps=8, num_stages=2),
        256: PrefillLaunch(block_m=128, block_n=32, num_warps=8, num_stages=2),
        512: PrefillLaunch(block_m=64, block_n=32, num_warps=8, num_stages=2),
        1024: PrefillLaunch(block_m=16, block_n=16, num_warps=4, num_stages=1),
    },
    native_fp8=("e4m3",),
    descriptors=True,
    fast_tanh=True,
)

#: sm80, and what has 99 KB of shared memory: sm86, sm89, sm120. Nothing was measured there: chosen
#: by what the compiler reports, so that two programs fit where they can, and none spills.
AMPERE = LaunchTable(
    decode={
        64: DecodeLaunch(block_n=32, num_warps=1, num_stages=4, programs_per_sm=4, min_tiles=8),
        128: DecodeLaunch(block_n=32, num_warps=2, num_stages=2, programs_per_sm=4, min_tiles=8),
        256: DecodeLaunch(block_n=32, num_warps=4, num_stages=2, programs_per_sm=2, min_tiles=8),
        512: DecodeLaunch(
            block_n=16, num_warps=4, num_stages=2, programs_per_sm=1, min_tiles=8, max_rows=32
        ),
        1024: DecodeLaunch(
            block_n=16, num_warps=8, num_stages=1, programs_per_sm=1, min_tiles=8, max_rows=16
        ),
    },
    prefill={
        64: PrefillLaunch(block_m=64, block_n=64, num_warps=4, num_stages=2),
        128: PrefillLaunch(block_m=64, block_n=32, num_warps=4, num_stages=2),
        256: PrefillLaunch(block_m=64, block_n=32, num_warps=8, num_stages=2),
        512: PrefillLaunch(block_m=32, block_n=16, num_warps=8, num_stages=2),
        1024: PrefillLaunch(block_m=16, block_n=16, num_warps=4, num_stages=1),
    },
    fast_tanh=True,
)

ADA = LaunchTable(
    decode=AMPERE.decode,
    prefill=AMPERE.prefill,
    native_fp8=("e4m3",),
    fast_tanh=True,
)


def table_for(capability: tuple[int, int]) -> LaunchTable:
    """The table for a compute capability."""
    if (9, 0) <= capability < (10, 0):
        return HOPPER
    if (10, 0) <= capability < (12, 0):
        return BLACKWELL
    return ADA if capability >= (8, 9) else AMPERE
