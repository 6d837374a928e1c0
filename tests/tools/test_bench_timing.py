"""The benchmark's clocks: the order of calls, their times, and the ceilings of a device."""

from __future__ import annotations

import itertools
import types

import pytest

from attn_dispatch.bench import timing
from attn_dispatch.bench.roofline import measure_ceilings
from attn_dispatch.bench.timing import Clock, CudaClock, Timing, host_time_us, measure
from support.bench_cases import CPU


class FakeTime:
    """A clock that only calls advance."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def __call__(self):
        return self.seconds

    def call(self, name, *durations_us):
        durations = itertools.cycle(durations_us)

        def run():
            self.log.append(name)
            self.seconds += next(durations) * 1e-6

        return run


def test_calls_alternate_and_the_median_is_reported():
    now = FakeTime()
    calls = {"a": now.call("a", 10, 30, 20), "b": now.call("b", 5)}
    timings = measure(calls, Clock(now), budget_s=1, rounds=6)
    assert timings["a"].median_us == pytest.approx(20)
    assert (timings["a"].low_us, timings["a"].high_us) == pytest.approx((10, 30))
    assert timings["b"].median_us == pytest.approx(5)
    assert timings["b"].calls == 6
    assert now.log == ["a", "b", "b", "a"] * 3


def test_the_budget_bounds_the_calls():
    now = FakeTime()
    calls = {name: now.call(name, us) for name, us in (("quick", 1), ("slow", 3e5), ("worst", 4e6))}
    timings = measure(calls, Clock(now), budget_s=1.0)
    assert timings["quick"].calls == timing.MAX_CALLS
    assert timings["slow"].calls == 4
    assert timings["worst"].calls == 1


def test_a_call_that_raises_does_not_stop_the_others():
    now = FakeTime()

    def broken():
        raise RuntimeError("no such kernel")

    timings = measure({"a": now.call("a", 5), "x": broken}, Clock(now), budget_s=1, rounds=3)
    assert timings["a"].calls == 3
    assert str(timings["x"]) == "no such kernel"


def test_host_time_is_measured_in_a_short_queue():
    now = FakeTime()
    waits = []
    clock = Clock(now)
    clock.wait = lambda: waits.append(len(now.log))
    assert host_time_us(now.call("a", 40), clock, seconds=0.1) == pytest.approx(40)
    assert waits == [0, *(1 + 10 * i for i in range(21))]
    slow = FakeTime()
    assert host_time_us(slow.call("a", 9e6), Clock(slow)) == pytest.approx(9e6)
    assert len(slow.log) == 2


class FakeCuda:
    """Records the calls of torch.cuda."""

    def __init__(self):
        self.log = log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.number = sum(e == "event" for e in log)
                log.append("event")

            def record(self):
                log.append(f"record {self.number % 2}")

            def elapsed_time(self, end):
                return 0.25  # milliseconds

        self.Event = Event

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=1 << 20, clock_rate=1_000_000)

    def synchronize(self, device):
        self.log.append("wait")

    def _sleep(self, cycles):
        self.log.append(f"sleep {cycles}")


def test_gpu_clock_flushes_l2_and_gives_the_host_a_head_start(monkeypatch):
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1000)
    cuda = FakeCuda()
    clock = CudaClock(CPU, cuda)
    clock._flush.fill_(1)
    assert clock._flush.numel() == 2 << 20  # twice the L2 cache

    def call():
        assert not clock._flush.any()
        cuda.log.append("call")

    assert clock.time_us(call, host_us=10) == 250
    assert cuda.log == [
        "event", "event", "sleep 80000", "record 0", "call", "record 1", "wait",
    ]  # fmt: skip


def test_ceilings_are_measured():
    found = measure_ceilings(CPU, Clock(), seconds=0.01)
    assert 0 < found.read_tb_s < 10
    assert 0 < found.copy_tb_s < 10
    assert 0 < found.matmul_tflops < 100
    assert found.read_by in ("float32 sum", "float32 sum of rows") or "a" in found.read_by


def test_timing_summary():
    assert Timing.of([5.0, 1.0, 3.0]) == Timing(3.0, 1.0, 5.0, 3)
