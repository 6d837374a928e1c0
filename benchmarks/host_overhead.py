"""Host overhead of attn-dispatch: its import, selecting a backend, making layers, routing batches.

    python benchmarks/host_overhead.py [--json] [--rounds N]

Exits with 1 if the import takes more than 60 ms after PyTorch's, a warm call of
`get_attn_backend` more than 20 µs longer than an empty Python function, making a layer more than
0.3 ms after an equal one, or routing a batch more than 10 µs in addition to the backend's own
builder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import attn_dispatch
from attn_dispatch import AttentionBatch, Phase
from attn_dispatch.backends.reference.torch_ref import (
    ReferenceBackend,
    ReferenceImpl,
    ReferenceMetadata,
)
from attn_dispatch.runtime.routing import RoutedBuilder, RoutedImpl, Router
from attn_dispatch.selection.timings.policy import PhaseCandidates, routes_of
from attn_dispatch.selection.timings.table import BatchKind, LayerTimes, Point

IMPORT_LIMIT_MS = 60.0
CALL_LIMIT_US = 20.0
ROUTING_LIMIT_US = 10.0
LAYER_LIMIT_US = 3.0
MAKING_LIMIT_MS = 0.3

#: Code that is timed in a new interpreter, after the import of PyTorch.
IMPORTS = {
    "import attn_dispatch": "import attn_dispatch",
    "from attn_dispatch import *": "from attn_dispatch import *",
    "import attn_dispatch; first get_attn_backend(...)": (
        "import attn_dispatch\n"
        "attn_dispatch.get_attn_backend(128, torch.bfloat16, num_heads=32, num_kv_heads=8)"
    ),
}
_TIMED = """
import time, torch
start = time.perf_counter()
{code}
print((time.perf_counter() - start) * 1e3)
"""

SPEC = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}


def import_times_ms(rounds: int) -> dict[str, float]:
    """The median time of each import, in new interpreters that take turns."""
    # As for an installed package, bytecode is cached; the first round writes it and is discarded.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(1 + rounds):
        for name, code in IMPORTS.items():
            command = [sys.executable, "-c", _TIMED.format(code=code)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            times[name].append(float(done.stdout))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def call_times_us(rounds: int, calls: int = 1000) -> dict[str, float]:
    """The median time of one call, in runs that take turns with an empty function."""
    spec = attn_dispatch.AttentionSpec(**SPEC, block_size=16)
    timed: dict[str, Callable[[], Any]] = {
        "an empty function": lambda: None,
        "get_attn_backend(...), warm": lambda: attn_dispatch.get_attn_backend(
            128, torch.bfloat16, "auto", 16, num_heads=32, num_kv_heads=8
        ),
        'get_attn_backend(..., device="cpu"), warm': lambda: attn_dispatch.get_attn_backend(
            128, torch.bfloat16, "auto", 16, num_heads=32, num_kv_heads=8, device="cpu"
        ),
        "resolve(spec), warm": lambda: attn_dispatch.resolve(spec),
        "AttentionSpec(...)": lambda: attn_dispatch.AttentionSpec(**SPEC, block_size=16),
    }
    return _medians_us(timed, rounds, calls)


def _medians_us(
    timed: Mapping[str, Callable[[], Any]], rounds: int, calls: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in timed}
    for function in timed.values():
        function()
    for _ in range(rounds):
        for name, function in timed.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


#: Requests as (number, new tokens, keys), and the maximum of new tokens in a decode request.
BATCHES: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "1 decode": ([(1, 1, 1000)], 1),
    "64 decodes": ([(64, 1, 1000)], 1),
    "256 decodes": ([(256, 1, 1000)], 1),
    "8 prompts": ([(8, 512, 600)], 1),
    "64 verified drafts": ([(64, 4, 1000)], 4),
    "63 decodes, 1 prompt": ([(63, 1, 1000), (1, 512, 600)], 1),
    "255 decodes, 1 prompt": ([(255, 1, 1000), (1, 512, 600)], 1),
    "248 decodes, 8 prompts": ([(248, 1, 1000), (8, 512, 600)], 1),
    "248 decodes and 8 prompts, interleaved": ([(31, 1, 1000), (1, 512, 600)] * 8, 1),
}


class _Builder(ReferenceBackend.builder_cls):
    """Returns a finished plan, so that only the work before it is timed."""

    def build(self, batch: AttentionBatch) -> ReferenceMetadata:
        return _PLANNED


class _Impl(ReferenceImpl):
    """Computes nothing, so that only the work before it is timed."""

    def forward(self, *arguments: Any, **more: Any) -> None:
        return None

    def write_kv(self, *arguments: Any, **more: Any) -> None:
        return None


_SPEC = attn_dispatch.AttentionSpec(**SPEC, block_size=16)
_PLANNED = ReferenceBackend.builder_cls(_SPEC, torch.device("cpu")).build(
    AttentionBatch.create([1], [1])
)


def _batch(name: str) -> AttentionBatch:
    requests, longest = BATCHES[name]
    lens = [(query, seq) for count, query, seq in requests for _ in range(count)]
    return AttentionBatch.create(
        [query for query, _ in lens],
        [seq for _, seq in lens],
        block_table=torch.zeros(len(lens), 64, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(query for query, _ in lens), dtype=torch.int64),
        max_decode_query_len=longest,
    )


def _routers() -> dict[str, Router]:
    """Routers by a timing table, with A faster in prefill and B in decode, and by rules.

    If one backend serves all batches, there is no router.
    """
    steps = (
        (BatchKind.PREFILL, 512, 5.0),
        (BatchKind.DECODE, 1, 20.0),
        (BatchKind.VERIFY, 4, 20.0),
    )
    grid = itertools.product(steps, (1, 8, 64, 256), (512, 1024))
    points = tuple(
        Point(step, n, n * tokens, n * keys, {"A": us, "B": 10.0})
        for (step, tokens, us), n, keys in grid
    )
    times = LayerTimes(points, "a benchmark", "CPU", "2026-01-01")
    candidates = dict.fromkeys(Phase, PhaseCandidates("A", frozenset("AB")))
    return {
        "by a table": Router(
            dict.fromkeys(Phase, "A"), routes_of(times, candidates, captured=False)
        ),
        "by rules": Router({Phase.PREFILL: "A", Phase.DECODE: "B"}),
    }


def routing_times_us(rounds: int, calls: int = 200) -> dict[str, float]:
    """The median time before a backend's own builder, for each batch and router.

    Cached properties of a batch are already computed: every backend's builder needs them too.
    """
    builders = {name: _Builder(_SPEC, torch.device("cpu")) for name in "AB"}
    timed: dict[str, Callable[[], Any]] = {}
    for (how, router), name in itertools.product(_routers().items(), BATCHES):
        build = RoutedBuilder(builders, router).build
        timed[f"routing {name}, {how}"] = functools.partial(build, _batch(name))
    return _medians_us(timed, rounds, calls)


def layer_times_us(rounds: int, calls: int = 200) -> dict[str, float]:
    """The median time before a backend's own impl, in each layer of a batch."""
    impl = _Impl(32, 128, 1.0, 8)
    routed = RoutedImpl(dict.fromkeys("AB", impl), dict.fromkeys("AB", ReferenceBackend))
    query, key = torch.zeros(3, 32, 128), torch.zeros(3, 8, 128)
    cache, output = torch.zeros(1, 2, 16, 8, 128), torch.zeros(3, 32, 128)
    whole, split = (
        RoutedBuilder({name: _Builder(_SPEC, torch.device("cpu")) for name in "AB"}, router).build(
            AttentionBatch.create(
                [1, 2],
                [9, 2],
                block_table=torch.zeros(2, 1, dtype=torch.int32),
                slot_mapping=torch.arange(3),
            )
        )
        for router in (
            Router(dict.fromkeys(Phase, "A")),
            Router({Phase.PREFILL: "A", Phase.DECODE: "B"}),
        )
    )
    arguments = (None, query, key, key, cache)
    return _medians_us(
        {
            "a layer, one backend": lambda: impl.forward(*arguments, _PLANNED, output),
            "a layer, routed whole": lambda: routed.forward(*arguments, whole, output),
            "a layer, routed in two parts": lambda: routed.forward(*arguments, split, output),
        },
        rounds,
        calls,
    )


def making_times_ms(rounds: int, layers: int = 60) -> dict[str, float]:
    """The median time of making one layer of a model, when an equal layer was made before."""

    def make() -> None:
        attn_dispatch.Attention(32, 128, num_kv_heads=8, dtype=torch.float32, device="cpu")

    times = _medians_us({"Attention(...), after an equal one": make}, rounds, layers)
    return {name: us / 1e3 for name, us in times.items()}


def batch_times_us(rounds: int) -> dict[str, float]:
    """The median time of work that is done once per batch, for all layers."""
    found: dict[str, float] = {}
    for name in BATCHES:
        batch = _batch(name)
        steps: dict[str, Callable[[AttentionBatch], Any]] = {
            f"any metadata of {name}": lambda each: ReferenceMetadata.of(each, _PLANNED.builder)
        }
        if len(batch.parts) > 1:
            steps[f"taking {name} apart"] = lambda each: each.parts
        times: dict[str, list[float]] = {what: [] for what in steps}
        for _ in range(rounds * 10):
            fresh = dataclasses.replace(batch)
            for what, step in steps.items():
                start = time.perf_counter()
                step(fresh)
                times[what].append((time.perf_counter() - start) * 1e6)
        found |= {what: statistics.median(values) for what, values in times.items()}
    return found


def machine() -> dict[str, Any]:
    """The machine of the measurement."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attn_dispatch": attn_dispatch.__version__,
    }


def measure(rounds: int) -> dict[str, Any]:
    """All measurements, as data."""
    imports, calls = import_times_ms(rounds), call_times_us(rounds * 4)
    routing, layers = routing_times_us(rounds * 4), layer_times_us(rounds * 4)
    making = making_times_ms(rounds * 4)
    in_layer = layers["a layer, routed whole"] - layers["a layer, one backend"]
    return {
        "machine": machine(),
        "import_ms": imports,
        "call_us": calls,
        "routing_us": routing,
        "layer_us": layers,
        "making_ms": making,
        "batch_us": batch_times_us(rounds),
        "import_within_limit": imports["import attn_dispatch"] <= IMPORT_LIMIT_MS,
        "call_within_limit": calls["get_attn_backend(...), warm"] - calls["an empty function"]
        < CALL_LIMIT_US,
        "routing_within_limit": max(routing.values()) < ROUTING_LIMIT_US,
        "layer_within_limit": in_layer < LAYER_LIMIT_US,
        "making_within_limit": max(making.values()) < MAKING_LIMIT_MS,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["machine"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores; Python {where['python']}, "
        f"PyTorch {where['torch']}, attn-dispatch {where['attn_dispatch']}",
        "",
        "| what | median | limit |",
        "| --- | ---: | ---: |",
    ]
    limits = {
        "import attn_dispatch": f"{IMPORT_LIMIT_MS:.0f} ms",
        "get_attn_backend(...), warm": f"{CALL_LIMIT_US:.0f} µs over an empty function",
        "Attention(...), after an equal one": f"{MAKING_LIMIT_MS:.1f} ms",
        "a layer, routed whole": f"{LAYER_LIMIT_US:.0f} µs over one backend",
    } | dict.fromkeys(result["routing_us"], f"{ROUTING_LIMIT_US:.0f} µs")
    for part, times in result.items():
        unit = {"ms": "ms", "us": "µs"}.get(part.rpartition("_")[2])
        for name, value in times.items() if unit else ():
            lines.append(f"| `{name}` | {value:.2f} {unit} | {limits.get(name, '')} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--rounds", type=int, default=7, help="fresh interpreters per import")
    options = parser.parse_args(arguments)
    result = measure(options.rounds)
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0 if all(kept for name, kept in result.items() if name.endswith("_within_limit")) else 1


if __name__ == "__main__":
    sys.exit(main())
