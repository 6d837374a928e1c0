"""Launch tables: the sizes of tiles, and the numbers of warps, stages and programs, as data.

A table belongs to a set of devices. Its rows are by head size; the smallest that fits is used. The
rows of Hopper were measured for heads of 64, 128 and 256 (benchmarks/NOTES.md). All others were
chosen by what the compiler reports (docs/kernels.md), AMD's also by what the kernels execute on
emulated GPUs, because no such GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecodeLaunch", "LaunchTable", "PrefillLaunch"]


@dataclass(frozen=True)
class PrefillLaunch:
    """How the prefill kernel is launched.

    Attributes:
        block_m: rows (tokens times query heads of a KV head) in a tile.
        block_n: keys in a tile.
        num_warps, num_stages: options of Triton's compiler.
        options: those of one vendor only, e.g. waves_per_eu.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, Any]:
        """The options of Triton's compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}


@dataclass(frozen=True)
class DecodeLaunch:
    """How the decode kernel is launched.

    Attributes:
        block_n: keys in a tile.
        num_warps, num_stages: options of Triton's compiler.
        programs_per_sm: programs that share the work, for each SM or CU.
        min_tiles: a program that works has at least this many tiles of keys.
        max_rows: rows (tokens times query heads of a KV head) in a tile, at most.
        num_stages_8bit: num_stages for a cache with one byte per element; None for num_stages.
        lengths_per_load: lengths of requests that a program reads at a time; more take more code.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_tiles: int = 4
    max_rows: int = 64
    num_stages_8bit: int | None = None
    lengths_per_load: int = 256


@dataclass(frozen=True, kw_only=True)
class LaunchTable:
    """How the kernels are launched on a set of devices.

    Attributes:
        decode, prefill: largest head size -> launch.
        latents: largest kv_lora_rank -> rows of a tile -> launch, of the decode kernel over a cache
            of latents; `max_rows` is not read.
        decode_few: as `decode`, for batches with fewer KV heads, over all requests, than programs;
            a size without a row uses that of `decode`.
        native_fp8: the formats of kernels/fp8.py that the compiler converts in hardware.
        descriptors: tensor descriptors are faster than pointers (TMA).
        fast_tanh: there is an instruction for tanh.
        warp_size: threads of a warp, or lanes of a wave.
        gather_from: from this many query tokens for each key on, pages are gathered first.
    """

    decode: Mapping[int, DecodeLaunch]
    prefill: Mapping[int, PrefillLaunch]
    latents: Mapping[int, Mapping[int, DecodeLaunch]]
    decode_few: Mapping[int, DecodeLaunch] = field(default_factory=dict)
    native_fp8: tuple[str, ...] = ()
    descriptors: bool = False
    fast_tanh: bool = False
    warp_size: int = 32
    gather_from: int = 256

    def decode_for(self, head_size: int, element_bytes: int, is_few: bool = False) -> DecodeLaunch:
        """The row for heads of this size; float32 uses that of twice the size."""
        largest = _largest_size(self.decode, head_size, element_bytes)
        return (self.decode_few if is_few else self.decode).get(largest, self.decode[largest])

    def latents_for(
        self, kv_lora_rank: int, element_bytes: int, rows: int
    ) -> tuple[int, DecodeLaunch]:
        """(rows of a tile, launch) for latents of this size, if there are this many rows."""
        launches = self.latents[_largest_size(self.latents, kv_lora_rank, element_bytes)]
        fits = next((each for each in sorted(launches) if rows <= each), max(launches))
        return fits, launches[fits]

    def prefill_for(self, head_size: int, element_bytes: int) -> PrefillLaunch:
        """The same for prefill."""
        return self.prefill[_largest_size(self.prefill, head_size, element_bytes)]


def _largest_size(rows: Mapping[int, Any], head_size: int, element_bytes: int) -> int:
    size = head_size * max(1, element_bytes // 2)
    return next((largest for largest in sorted(rows) if size <= largest), max(rows))
