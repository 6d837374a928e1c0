"""`attn-dispatch bench`: time backends, and peers, against each other and against the device."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.device_flag import device_to_run_on
from attn_dispatch.cli.output import (
    MAX_ROUNDS,
    check_json_output,
    check_seconds,
    make_console,
    noise_to_stderr,
    write_output,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable

if TYPE_CHECKING:
    from attn_dispatch.bench.cases import Case
    from attn_dispatch.bench.peers.registry import Peer
    from attn_dispatch.bench.report import BenchReport

__all__ = ["register"]

#: Columns of the table where no terminal says how many there are.
_WIDTH = 110

#: The layer that a sweep is over if nothing else is said.
_SWEEP_LAYER = {
    "name": "sweep",
    "query_lens": [1],
    "seq_lens": [1],
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_size": 128,
}

_PANEL = "The layer of a sweep; default: that of the first case, else 32 heads, 8 KV heads of 128"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="bench")(bench)


def bench(
    cases: Annotated[
        Path | None,
        typer.Option(help="JSON list of cases, e.g. the repository's benchmarks/cases.json."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="context|batch",
            help="Decode over contexts of 1k to 1M keys, or batches of 1 to 1024 requests.",
        ),
    ] = None,
    name_filter: Annotated[
        str | None, typer.Option("--filter", help="Only cases whose name contains this.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="These backends. Default: all that run on the device, but for the references.",
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Other packages too: FlashAttention, FlashInfer, vLLM, PyTorch."
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cuda:1, cpu. Default: the accelerator if there is one."),
    ] = None,
    time_budget: Annotated[
        float,
        typer.Option(
            min=0.0,
            callback=check_seconds,
            help="Seconds to time each contestant in each case, about.",
        ),
    ] = 0.25,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=MAX_ROUNDS, help="This many calls of each instead.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write everything to this file.")
    ] = None,
    plot_path: Annotated[
        Path | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw a chart; needs matplotlib."),
    ] = None,
    num_heads: Annotated[int | None, typer.Option(rich_help_panel=_PANEL)] = None,
    num_kv_heads: Annotated[int | None, typer.Option(rich_help_panel=_PANEL)] = None,
    head_size: Annotated[int | None, typer.Option(rich_help_panel=_PANEL)] = None,
    block_size: Annotated[int | None, typer.Option(rich_help_panel=_PANEL)] = None,
    dtype: Annotated[str | None, typer.Option(rich_help_panel=_PANEL)] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(rich_help_panel=_PANEL)] = None,
) -> None:
    """Time attention of one layer, and hold every result against float64 before it counts.

    What is wrong is listed as WRONG, without a time. Exits with 1 if a backend is wrong, or fails
    on a case that it says it computes.
    """
    layer = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": head_size,
        "block_size": block_size,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
    }
    chosen = _choose_cases(cases, name_filter, sweep, layer)
    if json_path is not None:
        check_json_output(json_path, "format_version", "ceilings", "cases")
    if plot_path is not None:
        if not plot_path.absolute().parent.is_dir():
            raise InvalidInputError(
                f"{plot_path}: there is no folder {plot_path.absolute().parent}."
            )
        check_writable(plot_path)
        from attn_dispatch.bench.plot import check_format

        check_format(plot_path)  # what is missing shows before the work

    with noise_to_stderr():
        report = _run(
            chosen,
            device=device,
            backends=None if backends is None else _split(backends),
            with_peers=peers,
            budget_s=time_budget,
            rounds=rounds,
            json_path=json_path,
        )
    from attn_dispatch.bench.report import print_report

    console = make_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    print_report(console, report)
    if plot_path is not None:
        from attn_dispatch.bench.plot import plot_report

        plot_report(report, plot_path, sweep)
    if report.failed:
        raise typer.Exit(1)
    if len(report.results) < report.planned:
        raise typer.Exit(130)


def _split(names: str) -> list[str]:
    return [name.strip().upper() for name in names.split(",") if name.strip()]


def _choose_cases(
    path: Path | None, name_filter: str | None, sweep: str | None, layer: dict[str, Any]
) -> list[Case]:
    """The cases to run.

    Raises:
        InvalidInputError: there is none, or flags contradict each other.
    """
    from attn_dispatch.bench.cases import load_cases, parse_cases, sweep_cases

    given = {key: value for key, value in layer.items() if value is not None}
    if path is None and sweep is None:
        raise InvalidInputError(
            "Nothing to run: name a file by --cases (the repository has benchmarks/cases.json), or "
            "give --sweep context or --sweep batch."
        )
    if given and sweep is None:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise InvalidInputError(f"{flag} describes the layer of a --sweep; cases have their own.")
    found = [] if path is None else load_cases(path)
    if name_filter is not None and path is not None:
        found = [case for case in found if name_filter in case.name]
        if not found:
            raise InvalidInputError(f"--filter {name_filter}: no case of {path} has that name.")
    if sweep is None:
        return found
    fields = _SWEEP_LAYER if not found else found[0].asdict()
    (first,) = parse_cases([{**fields, **given}], "the layer of the sweep")
    return sweep_cases(sweep, first)


def _run(
    cases: list[Case],
    *,
    device: str | None,
    backends: list[str] | None,
    with_peers: bool,
    budget_s: float,
    rounds: int | None,
    json_path: Path | None,
) -> BenchReport:
    from attn_dispatch.bench.report import BenchReport, describe_machine
    from attn_dispatch.bench.roofline import measure_ceilings
    from attn_dispatch.bench.runner import Bench

    torch_device = device_to_run_on(device)
    machine = describe_machine(torch_device)
    peers, missing = _load_peers(torch_device.type) if with_peers else ([], {})
    bench = Bench(torch_device, backends=backends, peers=peers, budget_s=budget_s, rounds=rounds)
    with _progress(len(cases)) as show:
        show("ceilings", 0)
        ceilings = measure_ceilings(torch_device, bench.clock)
        found = {p.name: {"provider": p.provider, "version": p.version} for p in peers}
        report = BenchReport(machine, ceilings, found, missing, planned=len(cases))
        results = bench.run(cases)
        try:
            for index, case in enumerate(cases):
                show(case.name, index)
                report.results.append(next(results))
                if json_path is not None:  # after each case: a run may be cut short
                    _write_json(report, json_path)
        except KeyboardInterrupt:
            pass  # what is there is shown
    return report


def _write_json(report: BenchReport, path: Path) -> None:
    """Write everything; lists of numbers stay on one line."""
    text = json.dumps(report.asdict(), indent=1, allow_nan=False)
    text = re.sub(r"\[[\d,\s]+\]", lambda found: "".join(found[0].split()), text)
    write_output(path, text + "\n")


def _load_peers(device_type: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be imported, and why the others cannot."""
    from attn_dispatch.bench.peers.registry import PEERS, PeerMissing

    peers, missing = [], {}
    for cls in PEERS:
        peer = cls()
        if device_type != "cuda":
            missing[peer.name] = "it needs a GPU"
            continue
        try:
            peer.load()
        except PeerMissing as problem:
            missing[peer.name] = str(problem)
        else:
            peers.append(peer)
    return peers, missing


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A function that shows which case is running: a bar on a terminal, else lines, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield lambda name, done: console.print(f"[{done}/{total}] {name}")
        return
    columns = (
        TextColumn("bench"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, done: bar.update(task, completed=done, description=name)
