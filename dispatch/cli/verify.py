"""`attn-dispatch verify`: hold a backend, ours or not, to everything that it declares."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attn_dispatch.cli.device_flag import device_to_run_on
from attn_dispatch.cli.output import (
    check_json_output,
    make_console,
    noise_to_stderr,
    text_table,
    write_output,
)
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.conformance import Conformance

__all__ = ["register"]

#: Failures that are told in full; of a backend that fails everywhere the first say enough.
_TOLD = 20


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="verify")(verify)


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered backend.")],
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1. Default: the accelerator if there is one."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One value of each field, few pairs, no compiler.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything to this file.")
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only checks whose group/name contains this.")
    ] = "",
) -> None:
    """Test a backend against a float64 oracle, by checks made from what it declares.

    Every declared value alone and features in pairs, what is not declared, inputs that must have
    an effect, garbage that must have none, what is written to the cache. Exits with 1 if a check
    fails.
    """
    if json_path is not None:
        check_json_output(json_path, "backend", "outcomes")
    with noise_to_stderr():
        report = _run(name, device, quick=quick, only=only)
    if json_path is not None:
        _write_json(report, json_path)
    _print_report(make_console(), report)
    if not report.passed:
        raise typer.Exit(1)


def _run(name: str, device: str | None, *, quick: bool, only: str) -> Conformance:
    from attn_dispatch.conformance import Conformance, backend_named, checks_for, run

    backend_cls, torch_device = backend_named(name), device_to_run_on(device)
    checks = checks_for(backend_cls, torch_device, quick=quick)
    chosen = [check for check in checks if only in check.full_name]
    if not chosen:
        groups = ", ".join(dict.fromkeys(check.group for check in checks))
        raise InvalidInputError(
            f"--only {only}: no check has that in its name. The groups are: {groups}."
        )
    report = Conformance(backend_cls.get_name(), str(torch_device))
    with _progress(len(chosen)) as show:
        for check in chosen:
            show(check.full_name)
            report.outcomes.append(run(check))
    return report


def _write_json(report: Conformance, path: Path) -> None:
    write_output(path, json.dumps(report.asdict(), indent=1, allow_nan=False) + "\n")


def _print_report(console: Console, report: Conformance) -> None:
    table = text_table("Group", "Checks", "Passed", "Failed", "Skipped", "Largest error", "Allowed")
    for row in report.groups():
        numbers = ("-" if row[k] is None else f"{row[k]:.2g}" for k in ("largest_error", "allowed"))
        counts = (str(row[k]) for k in ("checks", "passed", "failed", "skipped"))
        table.add_row(row["group"], *counts, *numbers, style="red" if row["failed"] else "")
    console.print(table)
    failures = report.failures
    for outcome in failures[:_TOLD]:
        console.print(f"\n{outcome.check.full_name}", style="red")
        console.print(f"  {outcome.message}")
        console.print(f"  {outcome.check.spec}", style="dim")
    if len(failures) > _TOLD:
        console.print(f"\nand {len(failures) - _TOLD} more; --json FILE has all of them.")
    skipped = {o.message: o.check.full_name for o in report.outcomes if o.status == "skipped"}
    for reason, example in skipped.items():
        console.print(f"\nskipped, e.g. {example}: {reason}.")
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    verdict = f"{report.backend} on {report.device}: {len(report.outcomes)} checks, "
    verdict += f"{len(failures)} failed" if failures else "none failed"
    console.print(f"\n{verdict} ({seconds:.1f} s)", style="red" if failures else "green")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that shows which check begins: a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield lambda name: None
        return
    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = iter(range(total))
        yield lambda name: bar.update(task, completed=next(begun), description=name)
