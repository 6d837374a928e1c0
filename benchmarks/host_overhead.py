"""What attn-dispatch costs on the host: importing it, and asking it for a backend.

    python benchmarks/host_overhead.py [--json] [--rounds N]

Exits with 1 if the import takes more than 60 ms on top of PyTorch's, or a warm call of
`get_attn_backend` more than 20 µs on top of an empty Python function.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import attn_dispatch

IMPORT_LIMIT_MS = 60.0
CALL_LIMIT_US = 20.0

#: What a fresh interpreter does, PyTorch being imported already; it prints the milliseconds.
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
    """The median time of each import, in fresh interpreters that take turns."""
    # As an installed package: its bytecode is written by the first round, which does not count.
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
    """The median time of one call, over runs that take turns with an empty function's."""
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


def machine() -> dict[str, Any]:
    """Where this was measured."""
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
    """Everything that is measured, as data."""
    imports, calls = import_times_ms(rounds), call_times_us(rounds * 4)
    empty = calls["an empty function"]
    return {
        "machine": machine(),
        "import_ms": imports,
        "call_us": calls,
        "import_within_limit": imports["import attn_dispatch"] <= IMPORT_LIMIT_MS,
        "call_within_limit": calls["get_attn_backend(...), warm"] - empty < CALL_LIMIT_US,
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
    }
    for unit, times in (("ms", result["import_ms"]), ("µs", result["call_us"])):
        for name, value in times.items():
            lines.append(f"| `{name}` | {value:.2f} {unit} | {limits.get(name, '')} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--rounds", type=int, default=7, help="fresh interpreters per import")
    options = parser.parse_args(arguments)
    result = measure(options.rounds)
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0 if result["import_within_limit"] and result["call_within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
