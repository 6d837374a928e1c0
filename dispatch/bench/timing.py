"""Clocks: how long a call takes on its device, and how long it keeps the host.

On a GPU a call is timed by events, after its L2 cache was overwritten. Implementations take turns
call by call, so that a drift of the device's clocks affects all of them equally.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Clock", "CudaClock", "Timing", "clock_for", "host_time_us", "measure"]

#: The least and the most calls of each implementation.
MIN_CALLS, MAX_CALLS = 3, 300

#: Bytes that are overwritten between two calls, unless twice the L2 cache is more.
_FLUSH_BYTES = 256 << 20

#: The longest time for which a device waits for the host.
_MAX_HEAD_START_US = 5000.0

#: Cycles per microsecond, if the device's clock rate is not known.
_CYCLES_PER_US = 2000.0


@dataclass(frozen=True)
class Timing:
    """Calls of one implementation, in microseconds: median, and a fifth from either end."""

    median_us: float
    low_us: float
    high_us: float
    calls: int

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        """The summary of single calls."""
        ordered = sorted(samples_us)
        fifth = len(ordered) // 5
        return cls(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], len(ordered))


class Clock:
    """Wall-clock time of calls that are finished when they return, and the base of other clocks.

    Args:
        now: seconds on the host.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def time_us(self, call: Callable[[], object], host_us: float = 0.0) -> float:
        """Microseconds that a call takes on its device.

        Args:
            call: the call.
            host_us: about how long it keeps the host.
        """
        start = self.now()
        call()
        return (self.now() - start) * 1e6

    def wait(self) -> None:
        """Wait until the device has finished all work."""


class CudaClock(Clock):
    """Events on the current stream, on a GPU whose L2 cache has no data of the call.

    Args:
        device: a CUDA or ROCm device.
        cuda: torch.cuda, or a fake of it.
        align: is called before the clock starts, with the device still waiting for the host. It
            may queue work, such as a collective that devices begin together after.
    """

    def __init__(
        self,
        device: torch.device,
        cuda: Any = torch.cuda,
        align: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self._cuda, self._device, self._align = cuda, device, align
        properties = cuda.get_device_properties(device)
        size = max(_FLUSH_BYTES, 2 * int(getattr(properties, "L2_cache_size", 0)))
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._cycles_per_us = float(getattr(properties, "clock_rate", 0)) / 1e3 or _CYCLES_PER_US

    def time_us(self, call: Callable[[], object], host_us: float = 0.0) -> float:
        """See Clock."""
        start = self._cuda.Event(enable_timing=True)
        end = self._cuda.Event(enable_timing=True)
        self._flush.zero_()
        # The device starts when the host has launched everything, or it would wait in between. A
        # busy host sometimes takes twice as long.
        head_start_us = min(3 * host_us + 50, _MAX_HEAD_START_US)
        self._cuda._sleep(int(head_start_us * self._cycles_per_us))
        if self._align is not None:
            self._align()
        start.record()
        call()
        end.record()
        self.wait()
        return float(start.elapsed_time(end)) * 1e3

    def wait(self) -> None:
        """Wait for the device, and raise its errors."""
        self._cuda.synchronize(self._device)


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else Clock()


def host_time_us(
    call: Callable[[], object], clock: Clock, seconds: float = 0.1, batch: int = 10
) -> float:
    """Microseconds for which a call keeps the host, without waiting for the device.

    The median over batches of calls; the device is idle before each, so that no queue fills up. A
    call that takes long on the device is a batch of its own.
    """
    samples: list[float] = []
    clock.wait()
    began = clock.now()
    call()
    clock.wait()
    if clock.now() - began > seconds / batch:
        batch = 1
    while not samples or (clock.now() - began < seconds and len(samples) < 20):
        start = clock.now()
        for _ in range(batch):
            call()
        samples.append((clock.now() - start) / batch * 1e6)
        clock.wait()
    return statistics.median(samples)


def measure(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    budget_s: float,
    rounds: int | None = None,
    host_us: Mapping[str, float] | None = None,
) -> dict[str, Timing | Exception]:
    """Time several calls in turn.

    Args:
        calls: name -> a call that has run before.
        clock: of their device.
        budget_s: about how long to spend on each.
        rounds: this many calls of each instead.
        host_us: name -> see Clock.time_us.

    Returns:
        Name -> the timing, or the exception of the call.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    failed: dict[str, Exception] = {}

    def needs_more(name: str) -> bool:
        taken = len(samples[name])
        if name in failed:
            return False
        if rounds is not None:
            return taken < rounds
        # One sample is enough of a call that takes the whole budget.
        enough = 1 if spent[name] > budget_s * MIN_CALLS else MIN_CALLS
        return taken < enough or (spent[name] < budget_s and taken < MAX_CALLS)

    turn = 0
    names = list(calls)
    while names:
        shift = turn % len(names)  # the order changes, too
        for name in names[shift:] + names[:shift]:
            start = clock.now()
            try:
                samples[name].append(clock.time_us(calls[name], (host_us or {}).get(name, 0.0)))
            except Exception as error:  # a peer's kernel may raise anything
                failed[name] = error
            spent[name] += clock.now() - start
        names = [name for name in names if needs_more(name)]
        turn += 1
    return {name: failed.get(name) or Timing.of(samples[name]) for name in calls}
