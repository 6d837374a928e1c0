"""`attn-dispatch tune`: measure this device, so that selection knows who is fastest at what."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.device_flag import device_to_run_on
from attn_dispatch.cli.output import (
    MAX_ROUNDS,
    check_seconds,
    facts_table,
    make_console,
    noise_to_stderr,
    text_table,
)
from attn_dispatch.cli.spec_flags import fields_from_flags, spec_from_fields, with_spec_flags
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from attn_dispatch.bench.cases import Case
    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.selection.timings.table import Table
    from attn_dispatch.tuning.measure import Grid, Measured, Task, Tuner

__all__ = ["register"]

#: Of a number in a list.
_MAX_DIGITS = 18


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="tune")(tune)


@with_spec_flags
def tune(
    config: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face config.json, or a folder that holds one: all layers."),
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(help="Measure these batches instead of a grid: a case file of `bench`."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu. Default: the accelerator if any.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Those who take part. Default: all but the references."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Of prefill, decode, verify, mixed. Default: all."),
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
            help="Start no new point after this many seconds; the next run continues.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_ROUNDS,
            help="Calls of each backend at a point. Default: a tenth of a second.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table's file. Default: this device's in the cache."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what the file has already.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Only show which tables count for this device.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Only show who is chosen where, and the times.")
    ] = False,
    **flags: Any,
) -> None:
    """Measure every backend that computes a layer, over a grid of batches, and keep the times.

    Describe a layer by flags, give a model's --config, or --cases. A result that is wrong is never
    listed. What is measured is kept at once, and a run that was cut short goes on when it is
    started again. Exits with 1 if a backend was wrong or failed.
    """
    from attn_dispatch.platforms.detect import detect_device, resolve_device
    from attn_dispatch.selection.timings.store import (
        forget_tables,
        machine_of,
        table_path,
        tables_for,
    )
    from attn_dispatch.tuning.measure import Tuner

    console = make_console()
    with noise_to_stderr():
        torch_device = resolve_device(device)
        profile = detect_device(torch_device)
    if listing or show:
        named = () if output is None else (_read(output),)
        _print_tables(console, named or tables_for(profile), torch_device, whole=show)
        return
    grid = _grid(steps, requests, lengths)
    with noise_to_stderr():
        device_to_run_on(str(torch_device))
        path = output or table_path(machine_of(profile))
        names = None if backends is None else [n.upper() for n in _split(backends)]
        tuner = Tuner(
            torch_device,
            path,
            names,
            fresh=fresh,
            rounds=rounds,
            replaces_unreadable=output is None,
        )
        if output is None:
            _tell_if_unreadable(path)
        chosen, notes = _cases(cases, config, fields_from_flags(flags), grid)
        tasks, more = tuner.tasks(chosen)
        notes += more
        done, complete = _run(tuner, tasks, time_budget)
    forget_tables()
    for note in notes:
        console.print(note)
    _print_outcome(console, path, len(tasks), done)
    if path.exists():
        _print_tables(console, (_read(path),), torch_device, whole=False)
    if any(each.problems for each in done):
        raise typer.Exit(1)
    if not complete:
        raise typer.Exit(130)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _read(path: Path) -> Table:
    from attn_dispatch.selection.timings.reader import read_table

    return read_table(path)


def _tell_if_unreadable(path: Path) -> None:
    """Say so if the cache's own file is to be replaced, because it cannot be read."""
    try:
        if path.exists():
            _read(path)
    except InvalidInputError as error:
        print(f"{error} It is measured again.", file=sys.stderr)


def _grid(steps: str | None, requests: str | None, lengths: str | None) -> Grid:
    from attn_dispatch.selection.timings.table import BatchKind
    from attn_dispatch.tuning.measure import Grid

    given: dict[str, Any] = {}
    if steps is not None:
        known = {str(step): step for step in BatchKind}
        unknown = [name for name in _split(steps) if name not in known]
        if unknown or not _split(steps):
            raise InvalidInputError(f"--steps {steps}: name some of {', '.join(known)}.")
        given["steps"] = tuple(known[name] for name in _split(steps))
    for flag, text in (("requests", requests), ("lengths", lengths)):
        if text is not None:
            given[flag] = _numbers(flag, text)
    return Grid(**given)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "1,4k" -> (1, 4096)."""
    numbers = []
    for part in _split(text):
        digits, kilo = part.lower().removesuffix("k"), part.lower().endswith("k")
        if not digits.isdecimal() or not digits.strip("0"):
            raise InvalidInputError(f"--{flag} {text}: {part!r} is not a number such as 16 or 4k.")
        if len(digits) > _MAX_DIGITS:
            raise InvalidInputError(f"--{flag} has a number of {len(digits)} digits. Give fewer.")
        numbers.append(int(digits) << 10 * kilo)
    if not numbers:
        raise InvalidInputError(f"--{flag} needs a number, or several with commas between them.")
    return tuple(sorted(set(numbers)))


def _cases(
    path: Path | None, config: Path | None, fields: dict[str, Any], grid: Grid
) -> tuple[list[Case], list[str]]:
    """What to measure, and what cannot be, as sentences.

    Raises:
        InvalidInputError: nothing can, or a layer is described in two ways.
    """
    from attn_dispatch.bench.cases import load_cases
    from attn_dispatch.selection.timings.table import LAYER_FIELDS, layer_key
    from attn_dispatch.tuning.measure import cases_of

    if path is not None:
        if config is not None or fields:
            raise InvalidInputError("--cases has layers of its own: leave out what describes one.")
        return load_cases(path), []
    found, notes = [], []
    for name, spec in _layers(config, fields).items():
        if layer_key(spec) is None:
            notes.append(
                f"{name} is not measured: {spec} has more to it than {', '.join(LAYER_FIELDS)}."
            )
        else:
            found.append(cases_of(name, spec, grid))
    if not any(found):
        raise InvalidInputError(" ".join(["There is nothing to measure.", *notes]))
    longest = max(map(len, found))  # kinds of layer take turns, so that each has its share
    return [each[i] for i in range(longest) for each in found if i < len(each)], notes


def _layers(config: Path | None, fields: dict[str, Any]) -> dict[str, AttentionSpec]:
    """Name -> request; where there is a cache and nobody says so, in blocks of 16."""
    from attn_dispatch.interface.types import AttentionType

    if config is None:
        spec = spec_from_fields(fields)
        found = {spec.kind: spec}
    else:
        from attn_dispatch.models.config import layers_from_config
        from attn_dispatch.models.hf import load_config

        groups = layers_from_config(load_config(config), **fields)
        found = {name: group.spec for name, group in groups.items()}
    return {
        name: spec.replace(block_size=16)
        if spec.block_size is None and AttentionType(spec.attn_type).has_kv_cache
        else spec
        for name, spec in found.items()
    }


def _run(tuner: Tuner, tasks: list[Task], budget_s: float | None) -> tuple[list[Measured], bool]:
    """What was measured, and whether nobody interrupted it."""
    from attn_dispatch.selection.timings.store import TuningWarning

    done: list[Measured] = []
    start = time.monotonic()
    with _progress(len(tasks)) as show, warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)  # measuring anew is what it asks for
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


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A function that shows which point is measured: a bar on a terminal, else lines, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield lambda name, done: console.print(f"[{done}/{total}] {name}")
        return
    columns = (
        TextColumn("tune"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, done: bar.update(task, completed=done, description=name)


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
    """Each table, and for each of its layers what is chosen: in words, or point by point."""
    from attn_dispatch.tuning.measure import chosen_in

    if not tables:
        console.print("No table counts for this device here: the platform's order decides.")
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
                console.print("No point has a time of the first in this device's order.")
                continue
            gains = [each for each in comparisons if each.picked != each.declared]
            console.print(
                f"{len(comparisons)} points; another than the first in the order is chosen at "
                f"{len(gains)}."
            )
            if whole or gains:
                rows = text_table("Batch", "Chosen", "us", "First in the order", "us", narrow=0)
                for each in comparisons if whole else gains:
                    chosen = (each.picked, f"{each.picked_us:.1f}")
                    first = (each.declared, f"{each.declared_us:.1f}")
                    rows.add_row(each.point.words, *chosen, *first)
                console.print(rows)
