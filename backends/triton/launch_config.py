"""Launch tables: how large the tiles are, and how many warps, stages and programs, as data.

A table belongs to a set of devices; its rows are by head size, the smallest that fits. Those of
Hopper were measured for heads of 64, 128 and 256 (benchmarks/NOTES.md); all others were chosen by
what the compiler reports (docs/kernels.md), for want of such GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecodeLaunch", "LaunchTable", "PrefillLaunch"]


@dataclass(frozen=True, kw_only=True)
class DecodeLaunch:
    """How the decode kernel is launched.

    Attributes:
        block_n: keys in a tile.
        num_warps, num_stages: Triton's.
        programs_per_sm: how many programs share the work, for each SM or CU.
        min_tiles: a program that works gets so many tiles of keys at least.
        max_rows: rows (tokens times query heads of a KV head) in a tile, at most.
        num_stages_8bit: num_stages for a cache of one byte an element; None for num_stages.
        lengths_per_load: lengths of requests that a program reads at a time; more are more code.
        options: what only this vendor's compiler knows, e.g. waves_per_eu.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_tiles: int = 4
    max_rows: int = 64
    num_stages_8bit: int | None = None
    lengths_per_load: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, Any]:
        """What Triton's compiler takes."""
        return _compile_options(self)


@dataclass(frozen=True, kw_only=True)
class PrefillLaunch:
    """How the prefill kernel is launched: a tile is block_m rows by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, Any]:
        """What Triton's compiler takes."""
        return _compile_options(self)


@dataclass(frozen=True, kw_only=True)
class LaunchTable:
    """How the kernels are launched on a set of devices.

    Attributes:
        decode: largest head size -> launch.
        decode_few: the same for batches with fewer KV heads, over all requests, than programs; a
            size without a row takes that of `decode`.
        prefill: the same.
        native_fp8: the formats of elements.py that the compiler converts in hardware.
        descriptors: tensor descriptors are faster than pointers (TMA).
        fast_tanh: there is an instruction for tanh.
        gather_from: from so many query tokens for each key on, pages are gathered first.
    """

    decode: Mapping[int, DecodeLaunch]
    prefill: Mapping[int, PrefillLaunch]
    decode_few: Mapping[int, DecodeLaunch] = field(default_factory=dict)
    native_fp8: tuple[str, ...] = ()
    descriptors: bool = False
    fast_tanh: bool = False
    gather_from: int = 256

    def decode_for(self, head_size: int, element_bytes: int, is_few: bool = False) -> DecodeLaunch:
        """The row for heads of this size; float32 takes that of twice the size."""
        size = head_size * max(1, element_bytes // 2)
        row: DecodeLaunch = _row(self.decode, size)
        largest = next(key for key, value in self.decode.items() if value is row)
        return self.decode_few.get(largest, row) if is_few else row

    def prefill_for(self, head_size: int, element_bytes: int) -> PrefillLaunch:
        """The same for prefill."""
        row: PrefillLaunch = _row(self.prefill, head_size * max(1, element_bytes // 2))
        return row


def _row(rows: Mapping[int, Any], size: int) -> Any:
    return next((row for largest, row in sorted(rows.items()) if size <= largest), rows[max(rows)])


def _compile_options(row: DecodeLaunch | PrefillLaunch) -> dict[str, Any]:
    return {"num_warps": row.num_warps, "num_stages": row.num_stages, **row.options}
