"""`attn-dispatch explain`: what would be picked for a layer or a model, where, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.output import (
    facts_table,
    make_console,
    noise_to_stderr,
    print_json,
    text_table,
)
from attn_dispatch.cli.spec_flags import fields_from_flags, spec_from_fields, with_spec_flags
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.selection.report import Report

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="explain")(explain)


@dataclass(frozen=True)
class _Section:
    """One kind of layer: its name and indices in the model, if there is one, and its decisions."""

    name: str | None
    layers: tuple[int, ...]
    spec: AttentionSpec
    reports: tuple[Report, ...]

    def asdict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layers": list(self.layers),
            "spec": self.spec.asdict(),
            "reports": [report.asdict() for report in self.reports],
        }


@with_spec_flags
def explain(
    config: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face config.json, or a folder that holds one: all layers."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1: of this machine. gfx942, sm90, H200: anywhere, with every "
            "optional library. Default: this machine's."
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Take this library as missing; repeatable.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="An override, e.g. REFERENCE, prefill=TORCH_SDPA? or -TORCH_SDPA."),
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="This phase alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    **flags: Any,
) -> None:
    """Show which backend would serve a layer or a model, why, and what every other one lacks.

    Describe a layer by flags, or give a model's --config; flags that the config leaves open, such
    as --block-size, may go with it. Exits with 1 if some phase has no backend.
    """
    from attn_dispatch.selection.resolve import explained_device, is_torch_device

    with noise_to_stderr():
        requests = _requests(config, fields_from_flags(flags))
        missing = _library_names(without or [])
        profile = explained_device(device, missing)
        sections = _explain_all(requests, profile, backend, phase)
    assumed = device is not None and not is_torch_device(device)
    complete = all(report.picked for section in sections for report in section.reports)
    if as_json:
        print_json(
            {
                "device": _with_libraries(profile).asdict(),
                "assumes_libraries": assumed,
                "without": missing,
                "config": None if config is None else str(config),
                "complete": complete,
                "sections": [section.asdict() for section in sections],
            }
        )
    else:
        console = make_console()
        _print_head(console, profile, config, _on_libraries(assumed, missing))
        if len(sections) > 1:
            _print_overview(console, sections)
        for section in sections:
            _print_section(console, section, phase)
    if not complete:
        raise typer.Exit(1)


def _requests(
    config: Path | None, fields: dict[str, Any]
) -> list[tuple[str | None, tuple[int, ...], AttentionSpec]]:
    """What is asked: (name, layers, request) for each kind of layer."""
    if config is None:
        return [(None, (), spec_from_fields(fields))]
    from attn_dispatch.models.config import layers_from_config
    from attn_dispatch.models.hf import load_config

    groups = layers_from_config(load_config(config), **fields)
    return [(name, group.layers, group.spec) for name, group in groups.items()]


def _with_libraries(profile: DeviceProfile) -> DeviceProfile:
    """The profile with everything that selection may ask about its libraries."""
    from attn_dispatch.selection.registry import registry

    return profile.with_libraries(*map(profile.library, registry.library_names()))


def _library_names(given: Sequence[str]) -> list[str]:
    """The libraries' modules, whether module or package was named; each must be one that counts."""
    from packaging.requirements import InvalidRequirement

    from attn_dispatch.platforms.libraries import library_name
    from attn_dispatch.selection.registry import registry

    known = registry.library_names()
    names = []
    for text in given:
        try:
            name = library_name(text)
        except InvalidRequirement:
            name = text
        if name not in known:
            raise InvalidInputError(
                f"--without {text}: no backend and nothing here uses such a library. "
                f"Known are: {', '.join(known)}."
            )
        names.append(name)
    return names


def _explain_all(
    requests: Sequence[tuple[str | None, tuple[int, ...], AttentionSpec]],
    profile: DeviceProfile,
    backend: str | None,
    phase: Phase | None,
) -> list[_Section]:
    from attn_dispatch.selection.resolve import explain as explain_spec
    from attn_dispatch.selection.selector import phases_of

    sections = []
    for name, layers, spec in requests:
        reports: tuple[Report, ...] = ()
        if phase is None or phase in phases_of(spec):
            reports = explain_spec(spec, profile, backend=backend, phase=phase)
        sections.append(_Section(name, layers, spec, reports))
    if not any(section.reports for section in sections):
        raise InvalidInputError(
            f"Nothing asked about goes through {phase}: an encoder only has a prefill. "
            "Leave --phase out."
        )
    return sections


def _on_libraries(assumed: bool, missing: Sequence[str]) -> str:
    """What the answer takes for granted about libraries."""
    exception = ", ".join(missing)
    if assumed:
        return "every optional library is assumed" + (f", but for {exception}" * bool(missing))
    return f"as installed here, without {exception}" if missing else "as installed here"


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
    """One line for each kind of layer: what it gets in each phase."""
    table = text_table("Kind of layer", "Layers", *map(str, Phase), narrow=0)
    for section in sections:
        picked = {report.phase: report.picked or "none" for report in section.reports}
        cells = (picked.get(phase, "-") for phase in Phase)
        style = "red" if "none" in picked.values() else ""
        table.add_row(section.name, str(len(section.layers)), *cells, style=style)
    console.print()
    console.print(table)


def _print_section(console: Console, section: _Section, phase: Phase | None) -> None:
    console.print()
    if section.name is not None:
        console.print(section.name, style="bold underline", end="")
        plural = "" if len(section.layers) == 1 else "s"
        console.print(f", layer{plural} {_indices(section.layers)}")
    console.print(str(section.spec))
    console.print()
    if not section.reports:
        console.print(f"These layers do not go through {phase}.", style="dim")
        return
    table = text_table("Phase", "Pick", "Decided by", narrow=2)
    for (pick, why), phases in _by_phase(section.reports).items():
        table.add_row(phases, pick or "none", why, style="green" if pick else "red")
    console.print(table)
    _print_others(console, section.reports)


def _by_phase(reports: Sequence[Report]) -> dict[tuple[str | None, str], str]:
    """(pick, what decided) -> the phases in which it is so."""
    phases: dict[tuple[str | None, str], list[str]] = {}
    for report in reports:
        # The reasons that the sentence announces stand in a table of their own.
        because = report.because.removesuffix(" The reasons:").removesuffix(":")
        why = f"{report.source}: {because}" if report.source else because
        phases.setdefault((report.picked, why), []).append(str(report.phase))
    return {key: ", ".join(names) for key, names in phases.items()}


def _print_others(console: Console, reports: Sequence[Report]) -> None:
    """Every candidate that is not picked, in the order of consideration: its refusals, if any."""
    others: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        for verdict in report.verdicts:
            if verdict.name == report.picked:
                continue
            able = "would do too, but ranks lower" if report.picked else "would do"
            for text in [str(reason) for reason in verdict.reasons] or [able]:
                said = others.setdefault(verdict.name, {})
                said.setdefault(text, []).append(str(report.phase))
    if not others:
        return
    table = text_table("Not picked", "Why not")
    for name, said in others.items():
        for index, (text, phases) in enumerate(said.items()):
            where = "" if len(phases) == len(reports) else f"{', '.join(phases)}: "
            table.add_row("" if index else name, where + text)
    console.print()
    console.print(table)


def _indices(layers: Sequence[int]) -> str:
    """Layer indices as a reader would note them: "0-4, 6-10, ..." or "0, 2, 4, ..., 40"."""
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
