"""`attn-dispatch verify`: check a built-in or third-party backend against its declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attn_dispatch.cli.options import Addressing, Device, Emulate, JsonFile, device_to_run_on
from attn_dispatch.cli.output import (
    check_json_file,
    make_console,
    noise_to_stderr,
    progress,
    text_table,
    write_json_file,
)
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.conformance import Conformance
    from attn_dispatch.conformance.emulated import EmulatedDevice

__all__ = ["verify"]

#: Failures that are printed in full; a backend that fails everywhere has many similar ones.
_MAX_FAILURES = 20


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered backend.")],
    device: Device = None,
    emulate: Emulate = None,
    addressing: Addressing = "buffer",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One value of each field, few pairs, without torch.compile."),
    ] = False,
    json_path: JsonFile = None,
    only: Annotated[
        str,
        typer.Option(
            metavar="TEXT,...", help="Only checks whose group/name contains one of these texts."
        ),
    ] = "",
) -> None:
    """Test a backend against a float64 oracle, by checks generated from what it declares.

    The checks cover every declared value, pairs of features, what is not declared, inputs that
    must have an effect, garbage that must have none, and the writes to the cache. Exits with 1 if
    a check fails.

    With --emulate, Triton compiles the backend's kernels for an AMD GPU, and their instructions are
    executed on the CPU. For sm90 the kernels, Gluon's too, are interpreted instead, without a
    compiler. It needs `pip install 'attn-dispatch[emulate]'`.
    """
    if emulate is not None and device is not None:
        raise InvalidInputError("--emulate runs on the CPU: give it or --device, not both.")
    if emulate is None and addressing != "buffer":
        raise InvalidInputError("--addressing is that of an emulated GPU: give --emulate, too.")
    if json_path is not None:
        check_json_file(json_path, "backend", "outcomes")
    with noise_to_stderr():
        emulated = None if emulate is None else _emulated_device(emulate, addressing)
        report = _run(name, device, emulated, quick=quick, only=only)
    if json_path is not None:
        write_json_file(json_path, report.asdict())
    console = make_console()
    _print_report(console, report)
    if emulated is not None:
        console.print(emulated.summary())
    if not report.passed:
        raise typer.Exit(1)


def _emulated_device(arch: str, addressing: str) -> EmulatedDevice:
    from attn_dispatch.conformance.emulated import EmulatedDevice

    return EmulatedDevice.named(arch, addressing)


def _run(
    name: str, device: str | None, emulated: EmulatedDevice | None, *, quick: bool, only: str
) -> Conformance:
    from attn_dispatch.conformance import Conformance, backend_named, checks_for, run

    backend_cls = backend_named(name)
    torch_device = device_to_run_on(device) if emulated is None else None
    checks = checks_for(backend_cls, torch_device, quick=quick, emulate=emulated)
    chosen = [check for check in checks if check.is_among(only)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(check.group for check in checks))
        raise InvalidInputError(
            f"--only {only}: no check has that in its name. The groups are: {groups}."
        )
    report = Conformance(backend_cls.get_name(), str(emulated or torch_device))
    with progress("verify", len(chosen), lines=False) as show:
        for done, check in enumerate(chosen):
            show(check.full_name, done)
            report.outcomes.append(run(check))
    return report


def _print_report(console: Console, report: Conformance) -> None:
    table = text_table("Group", "Checks", "Passed", "Failed", "Skipped", "Largest error", "Allowed")
    for row in report.groups():
        numbers = ("-" if row[k] is None else f"{row[k]:.2g}" for k in ("largest_error", "allowed"))
        counts = (str(row[k]) for k in ("checks", "passed", "failed", "skipped"))
        table.add_row(row["group"], *counts, *numbers, style="red" if row["failed"] else "")
    console.print(table)
    failures = report.failures
    for outcome in failures[:_MAX_FAILURES]:
        console.print(f"\n{outcome.check.full_name}", style="red")
        console.print(f"  {outcome.message}")
        console.print(f"  {outcome.check.spec}", style="dim")
    if len(failures) > _MAX_FAILURES:
        console.print(f"\nand {len(failures) - _MAX_FAILURES} more; --json FILE has all of them.")
    skipped = {o.message: o.check.full_name for o in report.outcomes if o.status == "skipped"}
    for reason, example in skipped.items():
        console.print(f"\nskipped, e.g. {example}: {reason}.")
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    verdict = f"{report.backend} on {report.device}: {len(report.outcomes)} checks, "
    verdict += f"{len(failures)} failed" if failures else "none failed"
    console.print(f"\n{verdict} ({seconds:.1f} s)", style="red" if failures else "green")
