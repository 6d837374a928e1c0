"""What a run found: as data, and as text."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.bench.roofline import Ceilings
from attn_dispatch.bench.runner import CaseResult, Row
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.libraries import LIBRARIES
from attn_dispatch.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["BenchReport", "describe_machine", "print_report", "rate_of"]

#: Of the JSON that `asdict` makes; goes up when a reader would break.
FORMAT_VERSION = 1


@dataclass
class BenchReport:
    """A run.

    Attributes:
        machine: see `describe_machine`.
        ceilings: of the device, from this run.
        peers: name -> where it was found and in which version.
        missing: peer -> why it is not measured.
        results: one for each case so far.
        planned: how many cases there are to be.
    """

    machine: dict[str, Any]
    ceilings: Ceilings
    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: list[CaseResult] = field(default_factory=list)
    planned: int = 0

    @property
    def names(self) -> list[str]:
        """The contestants of all cases, each once, backends first."""
        rows = [row for result in self.results for row in result.rows]
        rows.sort(key=lambda row: row.kind)  # "backend", "peer"; the order is kept otherwise
        return list(dict.fromkeys(row.name for row in rows))

    @property
    def failed(self) -> list[tuple[str, Row]]:
        """(case, row) of backends that said they compute a case, and did not."""
        return [(result.case.name, row) for result in self.results for row in result.failed]

    def asdict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "format_version": FORMAT_VERSION,
            "machine": self.machine,
            "ceilings": self.ceilings.asdict(),
            "peers": self.peers,
            "missing_peers": self.missing,
            "complete": len(self.results) == self.planned,
            "cases": [result.asdict(self.ceilings) for result in self.results],
        }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, its driver, versions, the command and the time."""
    profile = detect_device(device)
    return {
        "device": profile.name,
        "arch": profile.arch,
        "torch_device": str(device),
        "driver": _driver(profile.vendor),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "libraries": {
            name: version for name in LIBRARIES if (version := profile.library(name).version)
        },
        "attn_dispatch": __version__,
        "command": shlex.join(["attn-dispatch", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _driver(vendor: str) -> str | None:
    """The version of NVIDIA's driver, if its tool is there to tell."""
    if vendor != "nvidia":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model n")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def rate_of(result: CaseResult, row: Row) -> str:
    """What bounds the case, per second: bytes for decode, else arithmetic."""
    if row.timing is None:
        return ""
    amount, unit = (
        (result.case.bytes, "B/s")
        if result.case.kind == "decode"
        else (result.case.flops, "FLOP/s")
    )
    per_s = amount / row.timing.median_us * 1e6
    return f"{per_s / 1e12:.2f} T{unit}" if per_s >= 1e11 else f"{per_s / 1e9:.3g} G{unit}"


def _time(microseconds: float) -> str:
    if microseconds < 1e4:
        return f"{microseconds:.1f} µs" if microseconds < 100 else f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms"


def print_report(console: Console, report: BenchReport) -> None:
    """Print ceilings, a table of all cases, and what is not in it, with reasons."""
    machine, ceilings = report.machine, report.ceilings
    console.print(
        f"{machine['device']}, torch {machine['torch']}; in this run: copy "
        f"{_bandwidth(ceilings.copy_tb_s)} (read and written), read "
        f"{_bandwidth(ceilings.read_tb_s)}, {ceilings.matmul_dtype} "
        f"{ceilings.matmul_size}³ matmul {_arithmetic(ceilings.matmul_tflops)}"
    )
    console.print()
    table = _table()
    for result in report.results:
        table.add_row(result.case.name, *[""] * 6, style="bold")
        _add_rows(table, result, ceilings)
    console.print(table)
    _print_summary(console, report)
    _print_notes(console, report)


def _bandwidth(tb_s: float) -> str:
    return f"{tb_s:.2f} TB/s" if tb_s >= 0.1 else f"{tb_s * 1e3:.1f} GB/s"


def _arithmetic(tflops: float) -> str:
    return f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{tflops * 1e3:.0f} GFLOP/s"


def _table() -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Case", overflow="fold")
    for column in ("Time", "Rate", "Of ceiling", "To best", "Error", "Host"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_rows(table: Table, result: CaseResult, ceilings: Ceilings) -> None:
    if result.skipped:
        table.add_row("  skipped", *["-"] * 6)
        return
    best = [row for name in result.names if (row := result.best(name)) is not None]
    times = [row.timing.median_us for row in best if row.timing is not None]
    fastest = min(times, default=0.0)
    picked = result.best(result.picked_row) if result.picked_row else None
    for row in best:
        table.add_row(
            f"  {_label(row)}", *_cells(result, row, ceilings, fastest), style=_style(row)
        )
    if picked is None:
        table.add_row("  picked: none", *["-"] * 6)
    else:
        cells = _cells(result, picked, ceilings, fastest)
        table.add_row(f"  picked: {picked.name}", *cells, style=_style(picked) or "green")


def _label(row: Row) -> str:
    return f"{row.name} ({row.variant})" if row.variant and row.status == "ok" else row.name


def _style(row: Row) -> str:
    return {"ok": "", "refused": "dim"}.get(row.status, "red")


def _cells(result: CaseResult, row: Row, ceilings: Ceilings, fastest: float) -> list[str]:
    if row.timing is None:
        shown = {"refused": "-", "wrong": "WRONG", "error": "error"}[row.status]
        error = "-" if row.error is None else f"{row.error:.1e}"
        return [shown, "-", "-", "-", error, "-"]
    share = result.share(row, ceilings)
    return [
        _time(row.timing.median_us),
        rate_of(result, row),
        "" if share is None else f"{share:.0%}",
        f"{row.timing.median_us / fastest:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.host_us is None else _time(row.host_us),
    ]


def _print_summary(console: Console, report: BenchReport) -> None:
    """How good the picks were."""
    ratios = []
    for result in report.results:
        timings = [row.timing.median_us for row in result.rows if row.timing is not None]
        picked = result.best(result.picked_row)
        if picked is not None and picked.timing is not None:
            ratios.append(picked.timing.median_us / min(timings))
    if ratios:
        console.print(
            f"\nWhat is picked is the fastest, or within 2% of it, in "
            f"{sum(ratio <= 1.02 for ratio in ratios)} of {len(ratios)} cases; at worst it takes "
            f"{max(ratios):.2f} times as long."
        )


def _print_notes(console: Console, report: BenchReport) -> None:
    for name, why in report.missing.items():
        console.print(f"\n{name} is not measured: {why}", style="dim", end="")
    notes: dict[tuple[str, str, str], list[str]] = {}
    for result in report.results:
        if result.skipped:
            notes.setdefault(("skipped", "", result.skipped), []).append(result.case.name)
        for row in result.rows:
            if row.status != "ok":
                name = f"{row.name} ({row.variant})" if row.variant else row.name
                notes.setdefault((row.status, name, row.detail), []).append(result.case.name)
    words = {"refused": "does not compute", "wrong": "is WRONG on", "error": "fails on"}
    for (status, name, detail), cases in sorted(notes.items(), key=lambda item: item[0][0]):
        where = ", ".join(cases) if len(cases) <= 6 else f"{', '.join(cases[:5])} and others"
        start = f"Skipped: {where}" if status == "skipped" else f"{name} {words[status]} {where}"
        style = "dim" if status in ("refused", "skipped") else "red"
        console.print(f"\n{start}: {detail}", style=style, end="")
    console.print()
