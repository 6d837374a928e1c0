"""The bandwidth and arithmetic of the device, measured in the same run, to compare times with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attn_dispatch.bench.timing import Clock, Timing, measure

__all__ = ["Ceilings", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """Bandwidth and arithmetic of a device.

    Attributes:
        copy_tb_s: of a copy, bytes read plus bytes written.
        read_tb_s: of the fastest of some reductions.
        matmul_tflops: of a square product.
        matmul_dtype, matmul_size: of that product.
        read_by: the fastest reduction.
    """

    copy_tb_s: float
    read_tb_s: float
    matmul_tflops: float
    matmul_dtype: str
    matmul_size: int
    read_by: str


def measure_ceilings(
    device: torch.device, clock: Clock, *, seconds: float = 0.3, small: bool | None = None
) -> Ceilings:
    """Measure them: buffers of 1 GiB and bfloat16 8192³ on a GPU, 64 MiB and 1024³ elsewhere.

    Elsewhere the product is the faster of bfloat16's and float32's.

    Args:
        device: the device.
        clock: its clock.
        seconds: about how long for each measurement.
        small: use the smaller sizes; by default, on devices other than GPUs.
    """
    small = device.type != "cuda" if small is None else small
    num_bytes, size = (64 << 20, 1024) if small else (1 << 30, 8192)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    halves, rows = source.view(torch.bfloat16), source.view(-1, 1 << 14)
    reads: dict[str, Callable[[], object]] = {
        "float32 sum": source.sum,
        "float32 sum of rows": lambda: rows.sum(1),
        "float32 amax": source.amax,
        "bfloat16 sum": halves.sum,
        "bfloat16 amax": halves.amax,
    }
    moved_us = _medians({"copy": lambda: target.copy_(source), **reads}, clock, seconds)
    read_by = min(reads, key=lambda name: moved_us[name])
    products: dict[str, Callable[[], object]] = {}
    # A GPU has matrix cores for bfloat16; on a CPU attention may use either dtype.
    for dtype in ("bfloat16", "float32") if small else ("bfloat16",):
        factors = (torch.randn(size, size, device=device) for _ in range(2))
        products[dtype] = functools.partial(
            torch.matmul, *(each.to(getattr(torch, dtype)) for each in factors)
        )
    product_us = _medians(products, clock, seconds)
    matmul_dtype = min(products, key=lambda name: product_us[name])
    return Ceilings(
        copy_tb_s=2 * num_bytes / moved_us["copy"] / 1e6,
        read_tb_s=num_bytes / moved_us[read_by] / 1e6,
        matmul_tflops=2 * size**3 / product_us[matmul_dtype] / 1e6,
        matmul_dtype=matmul_dtype,
        matmul_size=size,
        read_by=read_by,
    )


def _medians(
    calls: Mapping[str, Callable[[], object]], clock: Clock, seconds: float
) -> dict[str, float]:
    """Microseconds of each call."""
    for call in calls.values():
        call()
    medians = {}
    for name, timing in measure(calls, clock, budget_s=seconds / len(calls)).items():
        if not isinstance(timing, Timing):
            raise timing
        medians[name] = timing.median_us
    return medians
