"""`attn-dispatch bench`: time backends and other packages, next to the limits of the device."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from attn_dispatch.cli.options import (
    Backends,
    Device,
    JsonFile,
    check_seconds,
    device_to_run_on,
    rounds_option,
    split_list,
)
from attn_dispatch.cli.output import (
    check_folder,
    check_json_file,
    make_console,
    noise_to_stderr,
    progress,
    write_json_file,
)
from attn_dispatch.cli.spec_flags import flag_name
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable

if TYPE_CHECKING:
    from attn_dispatch.bench.cases import Case
    from attn_dispatch.bench.peers.registry import Peer
    from attn_dispatch.bench.report import BenchReport

__all__ = ["bench"]

#: The name of this library's own layout in --kv-layout.
_OURS = "ours"

#: Columns of the table if stdout is not a terminal.
_WIDTH = 110

#: The default layer of a sweep.
_SWEEP_LAYER = {
    "name": "sweep",
    "query_lens": [1],
    "seq_lens": [1],
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_size": 128,
}

_PANEL = "The layer of a sweep; default: that of the first case, else 32 heads, 8 KV heads of 128"

_LayerSize: TypeAlias = Annotated[int | None, typer.Option(rich_help_panel=_PANEL)]
_LayerDtype: TypeAlias = Annotated[str | None, typer.Option(rich_help_panel=_PANEL)]


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
    backends: Backends = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Also measure FlashAttention, FlashInfer, vLLM and PyTorch themselves."
        ),
    ] = False,
    kv_layout: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Run each case over these layouts of an engine's cache, such as ours,vllm,sglang: "
            "ours is this library's.",
        ),
    ] = None,
    device: Device = None,
    time_budget: Annotated[
        float,
        typer.Option(
            min=0.0,
            callback=check_seconds,
            help="About this many seconds for each implementation in each case.",
        ),
    ] = 0.25,
    rounds: Annotated[
        int | None, rounds_option("Make this many calls of each, whatever time they take.")
    ] = None,
    json_path: JsonFile = None,
    plot_path: Annotated[
        Path | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw a chart; needs matplotlib."),
    ] = None,
    num_heads: _LayerSize = None,
    num_kv_heads: _LayerSize = None,
    head_size: _LayerSize = None,
    block_size: _LayerSize = None,
    dtype: _LayerDtype = None,
    kv_cache_dtype: _LayerDtype = None,
) -> None:
    """Time the attention of one layer; each result is compared with float64 before it counts.

    A wrong result is listed as WRONG, without a time. Exits with 1 if a backend is wrong, or fails
    on a case that it supports.
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
    if kv_layout is not None:
        chosen = _over_layouts(chosen, split_list(kv_layout))
    if json_path is not None:
        check_json_file(json_path, "format_version", "ceilings", "cases")
    if plot_path is not None:
        check_folder(plot_path)
        check_writable(plot_path)
        from attn_dispatch.bench.plot import check_format

        check_format(plot_path)  # before the work: matplotlib may be missing

    with noise_to_stderr():
        report = _run(
            chosen,
            device=device,
            backends=None if backends is None else split_list(backends.upper()),
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
        flag = flag_name(next(iter(given)))
        raise InvalidInputError(f"{flag} describes the layer of a --sweep; cases have their own.")
    found = [] if path is None else load_cases(path)
    if name_filter is not None and path is not None:
        found = [case for case in found if name_filter in case.name]
        if not found:
            raise InvalidInputError(f"--filter {name_filter}: no case of {path} has that name.")
    if sweep is None:
        return found
    fields = found[0].asdict() if found else _SWEEP_LAYER
    (first,) = parse_cases([{**fields, **given}], "the layer of the sweep")
    return sweep_cases(sweep, first)


def _over_layouts(cases: list[Case], names: list[str]) -> list[Case]:
    """The cases that have a cache, one after another over each of these layouts.

    Raises:
        InvalidInputError: a layout is not known, or no case has a cache.
    """
    from attn_dispatch.interface.kv_layout_table import kv_layout_named

    layouts = [None if name == _OURS else kv_layout_named(name).name for name in names]
    with_cache = [case for case in cases if case.has_kv_cache]
    if not layouts:
        raise InvalidInputError("--kv-layout names no layout. Give one, such as vllm.")
    if not with_cache:
        raise InvalidInputError(
            "--kv-layout: no case has a KV cache. Pick others by --filter, or leave it out."
        )
    return [dataclasses.replace(case, kv_layout=each) for case in with_cache for each in layouts]


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
    with progress("bench", len(cases)) as show:
        show("ceilings", 0)
        ceilings = measure_ceilings(torch_device, bench.clock)
        found = {p.name: {"provider": p.provider, "version": p.version} for p in peers}
        report = BenchReport(machine, ceilings, found, missing, planned=len(cases))
        results = bench.run(cases)
        try:
            for done, case in enumerate(cases):
                show(case.name, done)
                report.results.append(next(results))
                if json_path is not None:  # after each case, because a run may be interrupted
                    write_json_file(json_path, report.asdict())
        except KeyboardInterrupt:
            pass  # the results so far are printed
    return report


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
