"""`attn-dispatch tune`: measure backends on this device, for selection to use the times."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.options import (
    Backends,
    Config,
    Device,
    check_seconds,
    device_to_run_on,
    rounds_option,
    split_list,
)
from attn_dispatch.cli.output import (
    facts_table,
    make_console,
    noise_to_stderr,
    progress,
    text_table,
)
from attn_dispatch.cli.spec_flags import fields_from_flags, requested_layers, with_spec_flags
from attn_dispatch.cli.tune_split import device_of_rank, ranks_of_launch, tune_split
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from attn_dispatch.bench.cases import Case
    from attn_dispatch.selection.timings.table import Table
    from attn_dispatch.tuning.measure import Grid, Measured, Task, Tuner

__all__ = ["tune"]

#: Digits of a number in --requests or --lengths.
_MAX_DIGITS = 18


#: Why an engine's layout is not measured.
_OWN_LAYOUT = (
    "Tables of times are for this library's own layout: leave it out. `bench --kv-layout` measures "
    "an engine's."
)


@with_spec_flags
def tune(
    config: Config = None,
    cases: Annotated[
        Path | None,
        typer.Option(help="Measure these batches instead of a grid: a case file of `bench`."),
    ] = None,
    device: Device = None,
    backends: Backends = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Any of prefill, ragged, decode, verify, mixed. Default: all."
        ),
    ] = None,
    requests: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes. Default: 1,4,16,64,256.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Keys of a request. Default: 256,1k,4k,16k,64k."),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            callback=check_seconds,
            help="Start no new measurement after this many seconds; the next run continues.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        rounds_option("Calls of each backend at a point. Default: as many as take 0.1 s."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The table's file. Default: this device's, in the cache folder."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what the file already contains.")
    ] = False,
    context_parallel: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="W",
            help="Measure layers whose keys are split over W processes, and one process with all "
            "keys; with torchrun.",
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Only show which tables are used for this device.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Only show which backend is picked where, with times.")
    ] = False,
    **flags: Any,
) -> None:
    """Measure every backend that supports a layer, over a grid of batches, and store the times.

    Describe a layer by flags, or give a model's --config, or --cases. A wrong result is never
    stored. Each measurement is stored at once, and an interrupted run continues when it is started
    again. Exits with 1 if a backend was wrong or failed.
    """
    from attn_dispatch.platforms.detect import detect_device, resolve_device
    from attn_dispatch.selection.timings.reader import read_table
    from attn_dispatch.selection.timings.store import (
        forget_tables,
        machine_of,
        table_path,
        tables_for,
    )
    from attn_dispatch.tuning.measure import Tuner

    console = make_console()
    with noise_to_stderr():
        if context_parallel is not None:
            device = device_of_rank(device)
        torch_device = resolve_device(device)
        profile = detect_device(torch_device)
    if listing or show:
        named = () if output is None else (read_table(output),)
        _print_tables(console, named or tables_for(profile), torch_device, whole=show)
        return
    if context_parallel is not None:
        if backends is not None:
            raise InvalidInputError(
                "--backends does not go with --context-parallel: selection picks them. Use the "
                "override ATTN_DISPATCH_BACKEND."
            )
        grid = _grid(steps or "decode", requests or "1,4,16,64", lengths or "4k,16k,64k,128k")
        with noise_to_stderr():
            chosen, notes = _choose_cases(cases, config, fields_from_flags(flags), grid)
            ranks = ranks_of_launch(context_parallel, torch_device)
            path = output or table_path(machine_of(profile))
        is_complete = tune_split(
            chosen,
            notes,
            torch_device,
            path,
            ranks,
            fresh=fresh,
            rounds=rounds,
            time_budget=time_budget,
            replaces_unreadable=output is None,
        )
        raise typer.Exit(0 if is_complete else 1)
    grid = _grid(steps, requests, lengths)
    with noise_to_stderr():
        device_to_run_on(str(torch_device))
        path = output or table_path(machine_of(profile))
        tuner = Tuner(
            torch_device,
            path,
            None if backends is None else split_list(backends.upper()),
            fresh=fresh,
            rounds=rounds,
            replaces_unreadable=output is None,
        )
        if tuner.unreadable:
            print(f"{tuner.unreadable} It is measured again.", file=sys.stderr)
        chosen, notes = _choose_cases(cases, config, fields_from_flags(flags), grid)
        tasks, more = tuner.tasks(chosen)
        done, complete = _run(tuner, tasks, time_budget)
    forget_tables()
    for note in notes + more:
        console.print(note)
    _print_outcome(console, path, len(tasks), done)
    if path.exists():
        _print_tables(console, (read_table(path),), torch_device, whole=False)
    if any(each.problems for each in done):
        raise typer.Exit(1)
    if not complete:
        raise typer.Exit(130)


def _grid(steps: str | None, requests: str | None, lengths: str | None) -> Grid:
    from attn_dispatch.selection.timings.table import BatchKind
    from attn_dispatch.tuning.measure import Grid

    given: dict[str, Any] = {}
    if steps is not None:
        known = {str(step): step for step in BatchKind}
        names = split_list(steps)
        if not names or not known.keys() >= set(names):
            raise InvalidInputError(f"--steps {steps}: name some of {', '.join(known)}.")
        given["steps"] = tuple(known[name] for name in names)
    for flag, text in (("requests", requests), ("lengths", lengths)):
        if text is not None:
            given[flag] = _numbers(flag, text)
    return Grid(**given)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "1,4k" -> (1, 4096)."""
    numbers = []
    for part in split_list(text):
        digits, kilo = part.lower().removesuffix("k"), part.lower().endswith("k")
        if not digits.isdecimal() or not digits.strip("0"):
            raise InvalidInputError(f"--{flag} {text}: {part!r} is not a number such as 16 or 4k.")
        if len(digits) > _MAX_DIGITS:
            raise InvalidInputError(f"--{flag} has a number of {len(digits)} digits. Give fewer.")
        numbers.append(int(digits) << 10 * kilo)
    if not numbers:
        raise InvalidInputError(f"--{flag} needs a number, or several with commas between them.")
    return tuple(sorted(set(numbers)))


def _choose_cases(
    path: Path | None, config: Path | None, fields: dict[str, Any], grid: Grid
) -> tuple[list[Case], list[str]]:
    """The batches to measure, and notes on the layers that cannot be measured.

    Raises:
        InvalidInputError: there is nothing to measure, or a layer is described in two ways.
    """
    from attn_dispatch.bench.cases import load_cases
    from attn_dispatch.interface.types import AttentionType
    from attn_dispatch.selection.timings.table import LAYER_FIELDS, layer_key
    from attn_dispatch.tuning.measure import cases_of

    if path is not None:
        if config is not None or fields:
            raise InvalidInputError(
                "--cases has layers of its own: leave out --config and the flags of a layer."
            )
        loaded = load_cases(path)
        if any(case.kv_layout is not None for case in loaded):
            raise InvalidInputError(f"A case of {path} has a kv_layout. {_OWN_LAYOUT}")
        return loaded, []
    if "kv_strides" in fields:
        raise InvalidInputError(f"--kv-layout is given. {_OWN_LAYOUT}")
    found, notes = [], []
    for name, group in requested_layers(config, fields).items():
        spec = group.spec
        if spec.block_size is None and AttentionType(spec.attn_type).has_kv_cache:
            spec = spec.replace(block_size=16)
        if layer_key(spec) is None:
            notes.append(
                f"{name} is not measured: {spec} has fields other than {', '.join(LAYER_FIELDS)}."
            )
        else:
            found.append(cases_of(name, spec, grid))
    if not any(found):
        raise InvalidInputError(" ".join(["There is nothing to measure.", *notes]))
    # The kinds of layer take turns, so that a short run measures all of them.
    turns = itertools.zip_longest(*found)
    return [case for turn in turns for case in turn if case is not None], notes


def _run(tuner: Tuner, tasks: list[Task], budget_s: float | None) -> tuple[list[Measured], bool]:
    """What was measured, and whether the run was not interrupted."""
    from attn_dispatch.selection.timings.store import TuningWarning

    done: list[Measured] = []
    start = time.monotonic()
    with progress("tune", len(tasks)) as show, warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)  # it recommends to measure again
        results = tuner.run(tasks)
        try:
            for index, task in enumerate(tasks):
                if budget_s is not None and time.monotonic() - start > budget_s:
                    break
                show(task.case.name, index)
                done.append(next(results))
        except KeyboardInterrupt:
            return done, False
    return done, True


def _print_outcome(console: Console, path: Path, planned: int, done: list[Measured]) -> None:
    facts = facts_table()
    kept = sum(each.point is not None for each in done)
    facts.add_row("Table", str(path))
    facts.add_row("Points", f"{kept} measured now, {planned - kept} still to do")
    console.print(facts)
    for each in done:
        if each.skipped:
            console.print(f"{each.task.case.name}: not measured, {each.skipped}")
        for row in each.problems:
            text = f"{each.task.case.name}: {row.name} is left out, {row.status}: {row.detail}"
            console.print(text, style="red")


def _print_tables(
    console: Console, tables: tuple[Table, ...], device: torch.device, *, whole: bool
) -> None:
    """Print each table, and the picks for its layers: all points, or those that differ."""
    from attn_dispatch.tuning.measure import chosen_in

    if not tables:
        console.print("No table is used for this device: the platform's order decides.")
    for table in tables:
        facts = facts_table()
        facts.add_row("From", table.origin)
        facts.add_row("Measured", f"{table.measured} on {table.machine.device}")
        versions = ", ".join(f"{name} {version}" for name, version in table.machine.versions)
        facts.add_row("With", versions)
        console.print()
        console.print(facts)
        for spec, comparisons in chosen_in(table, device):
            console.print()
            console.print(str(spec), style="bold")
            if not comparisons:
                console.print("No point has a time of this device's default backend.")
                continue
            gains = [each for each in comparisons if each.picked != each.default]
            console.print(
                f"{len(comparisons)} points; a backend other than the default is picked at "
                f"{len(gains)}."
            )
            if whole or gains:
                rows = text_table("Batch", "Picked", "us", "Default", "us", narrow=0)
                for each in comparisons if whole else gains:
                    chosen = (each.picked, f"{each.picked_us:.1f}")
                    first = (each.default, f"{each.default_us:.1f}")
                    rows.add_row(each.point.describe(), *chosen, *first)
                console.print(rows)
