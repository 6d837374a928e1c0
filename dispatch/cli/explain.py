"""`attn-dispatch explain`: what would be picked for a layer or a model, where, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.options import AsJson, Config
from attn_dispatch.cli.output import (
    facts_table,
    make_console,
    noise_to_stderr,
    print_json,
    text_table,
)
from attn_dispatch.cli.spec_flags import fields_from_flags, requested_layers, with_spec_flags
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from attn_dispatch.models.config import LayerGroup
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.selection.report import Report

__all__ = ["explain"]


@dataclass(frozen=True)
class _Section:
    """One kind of layer and its decisions; name and indices are those in the model, if any."""

    name: str | None
    group: LayerGroup
    reports: tuple[Report, ...]

    def asdict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layers": list(self.group.layers),
            "spec": self.group.spec.asdict(),
            "reports": [report.asdict() for report in self.reports],
        }


@with_spec_flags
def explain(
    config: Config = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1: a device of this machine. gfx942, sm90, H200: any device, "
            "with every optional library installed. Default: this machine's."
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Assume that this library is missing; repeatable.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="An override, e.g. REFERENCE, prefill=TORCH_SDPA? or -TORCH_SDPA."),
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only this phase.")] = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Show which backend is picked for a layer or a model, why, and why the others are not.

    Describe a layer by flags, or give a model's --config. Flags for what the config does not
    decide, such as --block-size, can be added to it. Exits with 1 if a phase has no backend.
    """
    from attn_dispatch.selection.registry import registry
    from attn_dispatch.selection.resolve import explained_device, is_torch_device

    with noise_to_stderr():
        layers = requested_layers(config, fields_from_flags(flags))
        libraries = registry.library_names()
        missing = [_library_name(text, libraries) for text in without or ()]
        profile = explained_device(device, missing)
        sections = _explain_all(layers, profile, backend, phase, named=config is not None)
    assumed = device is not None and not is_torch_device(device)
    complete = all(report.picked for section in sections for report in section.reports)
    if as_json:
        print_json(
            {
                "device": profile.with_libraries(*map(profile.library, libraries)).asdict(),
                "assumes_libraries": assumed,
                "without": missing,
                "config": None if config is None else str(config),
                "complete": complete,
                "sections": [section.asdict() for section in sections],
            }
        )
    else:
        console = make_console()
        _print_head(console, profile, config, _describe_libraries(assumed, missing))
        if len(sections) > 1:
            _print_overview(console, sections)
        for section in sections:
            _print_section(console, section, phase)
    if not complete:
        raise typer.Exit(1)


def _library_name(text: str, known: Sequence[str]) -> str:
    """The library's module, from the name of the module or of the package."""
    from packaging.requirements import InvalidRequirement

    from attn_dispatch.platforms.libraries import library_name

    try:
        name = library_name(text)
    except InvalidRequirement:
        name = text
    if name not in known:
        raise InvalidInputError(
            f"--without {text}: no backend uses such a library. Known are: {', '.join(known)}."
        )
    return name


def _explain_all(
    layers: dict[str, LayerGroup],
    profile: DeviceProfile,
    backend: str | None,
    phase: Phase | None,
    *,
    named: bool,
) -> list[_Section]:
    from attn_dispatch.selection.resolve import explain as explain_spec
    from attn_dispatch.selection.selector import phases_of

    sections = []
    for name, group in layers.items():
        reports: tuple[Report, ...] = ()
        if phase is None or phase in phases_of(group.spec):
            reports = explain_spec(group.spec, profile, backend=backend, phase=phase)
        sections.append(_Section(name if named else None, group, reports))
    if not any(section.reports for section in sections):
        raise InvalidInputError(
            f"No requested layer has a {phase} phase: an encoder only has a prefill. "
            "Leave --phase out."
        )
    return sections


def _describe_libraries(assumed: bool, missing: Sequence[str]) -> str:
    names = ", ".join(missing)
    if assumed:
        return "every optional library is assumed" + (f", except {names}" if missing else "")
    return "as installed here" + (f", without {names}" if missing else "")


def _print_head(
    console: Console, profile: DeviceProfile, config: Path | None, libraries: str
) -> None:
    facts = facts_table()
    facts.add_row("Device", f"{profile.name} ({profile.arch})")
    facts.add_row("Libraries", libraries)
    if config is not None:
        facts.add_row("Model", str(config))
    console.print(facts)


def _print_overview(console: Console, sections: Sequence[_Section]) -> None:
    """One line for each kind of layer: its backend in each phase."""
    table = text_table("Kind of layer", "Layers", *map(str, Phase), narrow=0)
    for section in sections:
        picked = {report.phase: report.picked or "none" for report in section.reports}
        cells = (picked.get(phase, "-") for phase in Phase)
        style = "red" if "none" in picked.values() else ""
        table.add_row(section.name, str(len(section.group.layers)), *cells, style=style)
    console.print()
    console.print(table)


def _print_section(console: Console, section: _Section, phase: Phase | None) -> None:
    console.print()
    if section.name is not None:
        console.print(section.name, style="bold underline", end="")
        layers = section.group.layers
        console.print(f", layer{'' if len(layers) == 1 else 's'} {_indices(layers)}")
    console.print(str(section.group.spec))
    console.print()
    if not section.reports:
        console.print(f"These layers have no {phase} phase.", style="dim")
        return
    table = text_table("Phase", "Pick", "Decided by", narrow=2)
    for (pick, why), phases in _by_phase(section.reports).items():
        table.add_row(phases, pick or "none", why, style="green" if pick else "red")
    console.print(table)
    _print_notes(console, section.reports)
    _print_others(console, section.reports)


def _by_phase(reports: Sequence[Report]) -> dict[tuple[str | None, str], str]:
    """(pick, what decided) -> the phases with this result."""
    phases: dict[tuple[str | None, str], list[str]] = {}
    for report in reports:
        # The reasons that the sentence announces are in a table of their own.
        because = report.because.removesuffix(" The reasons:").removesuffix(":")
        why = f"{report.source}: {because}" if report.source else because
        phases.setdefault((report.picked, why), []).append(str(report.phase))
    return {key: ", ".join(names) for key, names in phases.items()}


def _print_notes(console: Console, reports: Sequence[Report]) -> None:
    """Print what keeps the fastest kernels of the picks from the layer, each note once."""
    phases: dict[tuple[str | None, str], list[str]] = {}
    for report in reports:
        for note in report.notes:
            phases.setdefault((report.picked, note), []).append(str(report.phase))
    for (pick, note), names in phases.items():
        console.print(f"{', '.join(names)}: {pick}: {note}.", style="yellow")


def _print_others(console: Console, reports: Sequence[Report]) -> None:
    """Print every candidate that is not picked, in the order considered, and why."""
    others: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        for verdict in report.verdicts:
            if verdict.name == report.picked:
                continue
            able = "also supported, but ranks lower" if report.picked else "supported"
            for text in [str(reason) for reason in verdict.reasons] or [able]:
                why = others.setdefault(verdict.name, {})
                why.setdefault(text, []).append(str(report.phase))
    if not others:
        return
    table = text_table("Not picked", "Why not")
    for name, why in others.items():
        for index, (text, phases) in enumerate(why.items()):
            where = "" if len(phases) == len(reports) else f"{', '.join(phases)}: "
            table.add_row("" if index else name, where + text)
    console.print()
    console.print(table)


def _indices(layers: Sequence[int]) -> str:
    """Layer indices in short: "0-4, 6-10, ..." or "0, 2, 4, ..., 40"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(texts) > 6:
        texts = [*texts[:3], "...", texts[-1]]
    return ", ".join(texts)
