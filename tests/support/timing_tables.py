"""Tables of times to test with: points in a few words, and tables that hold on this machine."""

from __future__ import annotations

from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.timings.store import machine_of, write_table
from attn_dispatch.selection.timings.table import (
    BatchKind,
    LayerTimes,
    Machine,
    Point,
    Table,
    layer_key,
)

MEASURED = "2026-11-22T12:00:00+00:00"

#: A machine that is elsewhere.
H200 = Machine("NVIDIA H200", "sm90", "570.1", (("torch", "2.11.0+cu130"), ("triton", "3.6.0")))


def point(step, requests, tokens, keys, host_us=(), failed=(), **times_us):
    """A batch of equal requests: their number, new tokens and keys of each. A__B names "A+B"."""
    times = {name.replace("__", "+"): float(us) for name, us in times_us.items()}
    return Point(
        BatchKind(step), requests, requests * tokens, requests * keys, times, dict(host_us), failed
    )


#: On a CPU the order is TORCH_SDPA, REFERENCE.
FAST_REFERENCE = [point("decode", 4, 1, 64, REFERENCE=10, TORCH_SDPA=20)]


def times_of(*points):
    return LayerTimes(tuple(points), "a test", "CPU", MEASURED)


def table_of(layers, machine=None):
    """A table: request -> points."""
    machine = machine or machine_of(detect_device("cpu"))
    found = {layer_key(spec): times_of(*points) for spec, points in layers.items()}
    return Table(machine, MEASURED, found, "a test")


def in_force(monkeypatch, path, layers, machine=None):
    """Make a table the one that counts."""
    write_table(table_of(layers, machine), path)
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(path))
