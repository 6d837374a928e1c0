"""The bandwidth and arithmetic of the device, measured in the same run, to compare times with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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

    def asdict(self) -> dict[str, float | int | str]:
        """As JSON-ready data."""
        return dataclasses.asdict(self)


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
    bandwidth_us = _bandwidth_us(device, clock, seconds, num_bytes)
    # A GPU has matrix cores for bfloat16; on a CPU attention may use either dtype.
    dtypes = (torch.bfloat16, torch.float32) if small else (torch.bfloat16,)
    product_us = _product_us(device, clock, seconds, size, dtypes)
    dtype = min(dtypes, key=lambda each: product_us[str(each)])
    copy_us = bandwidth_us.pop("copy")
    read_by = min(bandwidth_us, key=lambda name: bandwidth_us[name])
    return Ceilings(
        copy_tb_s=2 * num_bytes / copy_us / 1e6,
        read_tb_s=num_bytes / bandwidth_us[read_by] / 1e6,
        matmul_tflops=2 * size**3 / product_us[str(dtype)] / 1e6,
        matmul_dtype=str(dtype).removeprefix("torch."),
        matmul_size=size,
        read_by=read_by,
    )


def _product_us(
    device: torch.device, clock: Clock, seconds: float, size: int, dtypes: tuple[torch.dtype, ...]
) -> dict[str, float]:
    """Microseconds of a square product in each dtype, by its name."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[str(dtype)] = functools.partial(torch.matmul, left, right)
    return _medians(calls, clock, seconds)


def _bandwidth_us(
    device: torch.device, clock: Clock, seconds: float, num_bytes: int
) -> dict[str, float]:
    """Microseconds to copy the bytes, and to read them in several ways."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    halves, rows = source.view(torch.bfloat16), source.view(-1, 1 << 14)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "float32 sum": source.sum,
        "float32 sum of rows": lambda: rows.sum(1),
        "float32 amax": source.amax,
        "bfloat16 sum": halves.sum,
        "bfloat16 amax": halves.amax,
    }
    return _medians(calls, clock, seconds)


def _medians(
    calls: dict[str, Callable[[], object]], clock: Clock, seconds: float
) -> dict[str, float]:
    for call in calls.values():
        call()
    timings = measure(calls, clock, budget_s=seconds / len(calls))
    medians = {}
    for name, timing in timings.items():
        if not isinstance(timing, Timing):
            raise timing
        medians[name] = timing.median_us
    return medians
