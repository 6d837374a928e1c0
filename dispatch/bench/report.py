"""The results of a run, as data and as text."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.bench.implementations import LAYER
from attn_dispatch.bench.roofline import Ceilings
from attn_dispatch.bench.runner import CaseResult, Row
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.libraries import LIBRARIES
from attn_dispatch.selection.timings.store import cpu_model, driver_version
from attn_dispatch.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["BenchReport", "describe_machine", "print_report", "rate_of"]

#: Version of the JSON that `asdict` makes; raised when a change would break a reader.
FORMAT_VERSION = 1


@dataclass
class BenchReport:
    """The results of a run.

    Attributes:
        machine: see `describe_machine`.
        ceilings: of the device, measured in this run.
        peers: name -> the module it was found in, and its version.
        missing: peer -> why it is not measured.
        results: one for each case so far.
        planned: the number of cases.
    """

    machine: dict[str, Any]
    ceilings: Ceilings
    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: list[CaseResult] = field(default_factory=list)
    planned: int = 0

    @property
    def names(self) -> list[str]:
        """The implementations of all cases, each once, backends first."""
        rows = [row for result in self.results for row in result.rows]
        rows.sort(key=lambda row: row.kind)  # "backend" before "peer"; the sort is stable
        return list(dict.fromkeys(row.name for row in rows))

    @property
    def failed(self) -> list[tuple[str, Row]]:
        """(case, row) of backends that declare a case, and do not compute it right."""
        return [(result.case.name, row) for result in self.results for row in result.failed]

    def asdict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "format_version": FORMAT_VERSION,
            "machine": self.machine,
            "ceilings": dataclasses.asdict(self.ceilings),
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
        "driver": driver_version(profile.vendor),
        "cpu": cpu_model(),
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


def rate_of(result: CaseResult, row: Row) -> str:
    """Bytes per second for decode, arithmetic operations per second for the rest."""
    if row.timing is None:
        return ""
    case = result.case
    amount, unit = (case.bytes, "B/s") if case.kind == "decode" else (case.flops, "FLOP/s")
    per_s = amount / row.median_us * 1e6
    return f"{per_s / 1e12:.2f} T{unit}" if per_s >= 1e11 else f"{per_s / 1e9:.3g} G{unit}"


def _time(microseconds: float) -> str:
    if microseconds < 1e4:
        return f"{microseconds:.1f} µs" if microseconds < 100 else f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms"


def print_report(console: Console, report: BenchReport) -> None:
    """Print ceilings, a table of all cases, and the reasons why others are not in it."""
    machine, ceilings = report.machine, report.ceilings
    copy, read = (
        f"{tb_s:.2f} TB/s" if tb_s >= 0.1 else f"{tb_s * 1e3:.1f} GB/s"
        for tb_s in (ceilings.copy_tb_s, ceilings.read_tb_s)
    )
    tflops = ceilings.matmul_tflops
    matmul = f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{tflops * 1e3:.0f} GFLOP/s"
    console.print(
        f"{machine['device']}, torch {machine['torch']}; in this run: copy {copy} (read and "
        f"written), read {read}, {ceilings.matmul_dtype} {ceilings.matmul_size}³ matmul {matmul}"
    )
    console.print()
    table = _table()
    for result in report.results:
        layout = "" if result.case.kv_layout is None else f", {result.case.kv_layout}"
        table.add_row(result.case.name + layout, *[""] * 6, style="bold")
        _add_rows(table, result, ceilings)
    console.print(table)
    _print_summary(console, report)
    _print_notes(console, report)


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
    styles = {"ok": "", "refused": "dim", "wrong": "red", "error": "red"}
    for row in _listed(result):
        label = _name_of(row) if row.status == "ok" else row.name
        table.add_row(f"  {label}", *_cells(result, row, ceilings), style=styles[row.status])
    picked = result.best(result.picked_row)
    if picked is None:
        table.add_row("  picked: none", *["-"] * 6)
    else:
        style = styles[picked.status] or "green"
        table.add_row(f"  picked: {picked.name}", *_cells(result, picked, ceilings), style=style)


def _listed(result: CaseResult) -> Iterator[Row]:
    """The fastest variant of each implementation; of latent attention also a backend's layer."""
    for name in result.names:
        row = result.best(name)
        assert row is not None
        yield row
        own = (each for each in result.rows if each.name == name and each.variant == LAYER)
        yield from (each for each in own if each is not row)


def _name_of(row: Row) -> str:
    return f"{row.name} ({row.variant})" if row.variant else row.name


def _cells(result: CaseResult, row: Row, ceilings: Ceilings) -> list[str]:
    if row.timing is None:
        shown = {"refused": "-", "wrong": "WRONG", "error": "error"}[row.status]
        error = "-" if row.error is None else f"{row.error:.1e}"
        return [shown, "-", "-", "-", error, "-"]
    share = result.share(row, ceilings)
    return [
        _time(row.median_us),
        rate_of(result, row),
        "" if share is None else f"{share:.0%}",
        f"{row.median_us / result.fastest_us:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.host_us is None else _time(row.host_us),
    ]


def _print_summary(console: Console, report: BenchReport) -> None:
    """The times of the picks, relative to the fastest implementations."""
    ratios = [
        picked.median_us / result.fastest_us
        for result in report.results
        if (picked := result.best(result.picked_row)) is not None and picked.timing is not None
    ]
    if ratios:
        console.print(
            f"\nThe pick is the fastest, or within 2% of it, in "
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
                key = (row.status, _name_of(row), row.detail)
                notes.setdefault(key, []).append(result.case.name)
    words = {"refused": "does not compute", "wrong": "is WRONG on", "error": "fails on"}
    for (status, name, detail), cases in sorted(notes.items(), key=lambda item: item[0][0]):
        where = ", ".join(cases) if len(cases) <= 6 else f"{', '.join(cases[:5])} and others"
        start = f"Skipped: {where}" if status == "skipped" else f"{name} {words[status]} {where}"
        style = "dim" if status in ("refused", "skipped") else "red"
        console.print(f"\n{start}: {detail}", style=style, end="")
    console.print()
