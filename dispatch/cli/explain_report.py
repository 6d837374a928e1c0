"""How `attn-dispatch explain` prints: an overview, then for each kind of layer what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_dispatch.cli.output import facts_table, text_table
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.priorities import LAST_RESORT

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from attn_dispatch.cli.spec_flags import RequestedModel
    from attn_dispatch.distributed.advice import SplitAdvice
    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.models.layers import LayerGroup
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.runtime.mla_dense import ExpandedPrefills
    from attn_dispatch.selection.report import Report, Verdict

__all__ = ["Section", "print_head", "print_overview", "print_sections"]

#: backend -> reason -> the phases with it.
_Why = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Section:
    """One kind of layer and its decisions; name and indices are those in the model, if any.

    `expanded` has the dense backend of the prefills of latent attention; `ranks` is how many share
    the keys, and `split` the sentences on that.
    """

    name: str | None
    group: LayerGroup
    reports: tuple[Report, ...]
    expanded: ExpandedPrefills | None = None
    ranks: int | None = None
    split: tuple[str, ...] = ()
    advice: tuple[SplitAdvice, ...] = ()

    def asdict(self) -> dict[str, Any]:
        """The section as JSON-ready data."""
        return {
            "name": self.name,
            "layers": list(self.group.layers),
            "scale": self.group.scale,
            "spec": self.group.spec.asdict(),
            "reports": [report.asdict() for report in self.reports],
            "expanded_prefills": None if self.expanded is None else self.expanded.asdict(),
            "context_parallel": None
            if self.ranks is None
            else {
                "ranks": self.ranks,
                "notes": list(self.split),
                "batches": [each.asdict() for each in self.advice],
            },
        }


def print_head(
    console: Console,
    profile: DeviceProfile,
    device: str | None,
    config: Path | None,
    libraries: str,
    notes: Sequence[str],
) -> None:
    """Print what the answer is about, and what was left out or assumed.

    Args:
        device: the name that the user gave; devices of the same kind share a profile.
    """
    facts = facts_table()
    name = f"{profile.name} ({profile.arch})"
    given = (device or "").lower()
    if given and given != profile.arch and given not in name.lower() and ":" not in given:
        name = f"{device}, which is treated as {name}"
    facts.add_row("Device", name)
    facts.add_row("Libraries", libraries)
    if config is not None:
        facts.add_row("Model", str(config))
    for index, note in enumerate(notes):
        facts.add_row("" if index else "Notes", note)
    console.print(facts)


def print_overview(console: Console, sections: Sequence[Section], model: RequestedModel) -> None:
    """One line for each kind of layer: its backend in each phase."""
    table = text_table("Kind of layer", "Layers", *map(str, Phase), narrow=0)
    for section in sections:
        picked = {report.phase: report.picked or "none" for report in section.reports}
        cells = (picked.get(phase, "-") for phase in Phase)
        style = "red" if "none" in picked.values() else ""
        table.add_row(section.name, str(len(section.group.layers)), *cells, style=style)
    for name, layers in model.others.items():
        table.add_row(name, str(len(layers)), *("not dispatched" for _ in Phase), style="dim")
    console.print()
    console.print(table)
    for reason, layers in model.rejected.items():
        console.print(f"Layers {_indices(layers)} cannot be described: {reason}.", style="red")


def print_sections(
    console: Console,
    sections: Sequence[Section],
    phase: Phase | None,
    profile: DeviceProfile,
    *,
    verbose: bool,
) -> None:
    """Print each kind of layer; what is equal for all of them is printed once, at the end."""
    whys = [_others(section.reports, every=verbose) for section in sections]
    shared: _Why = {}
    if len(whys) > 1 and not verbose:
        known = [why for why, section in zip(whys, sections, strict=True) if section.reports]
        shared = {
            name: texts
            for name, texts in known[0].items()
            if all(why.get(name) == texts for why in known)
        }
    able = [_able(section.reports) for section in sections]
    all_able = able[0] if len(able) > 1 and all(each == able[0] for each in able) else {}
    first: LayerGroup | None = None
    for section, why, others in zip(sections, whys, able, strict=True):
        _print_section(console, section, phase, None if verbose else first)
        _print_reference(console, section, profile)
        own = {name: texts for name, texts in why.items() if name not in shared}
        _print_others(console, own, len(section.reports), "Not picked")
        if not verbose and not all_able:
            _print_able(console, others, "Also supported")
        first = first or section.group
    _print_others(console, shared, len(sections[0].reports), "Not picked, for all of these")
    if not verbose and all_able:
        console.print()
        _print_able(console, all_able, "Also supported, for all of these")
    if not verbose:
        _print_folded(console, sections)


def _able(reports: Sequence[Report]) -> dict[tuple[str, ...], str]:
    """The backends that are supported and rank lower -> the phases, if not all of them."""
    phases: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        if report.others:
            phases.setdefault(report.others, []).append(str(report.phase))
    return {
        names: "" if len(where) == len(reports) else f" ({', '.join(where)})"
        for names, where in phases.items()
    }


def _print_able(console: Console, able: Mapping[tuple[str, ...], str], title: str) -> None:
    for names, where in able.items():
        console.print(f"{title}{where}: {', '.join(names)}", style="dim")


def _print_folded(console: Console, sections: Sequence[Section]) -> None:
    """Print in a line each which backends are for other devices, and for other kinds of layer."""
    verdicts = [v for section in sections for report in section.reports for v in report.verdicts]
    device = dict.fromkeys(v.name for v in verdicts if _is_for_other_devices(v))
    kind = dict.fromkeys(v.name for v in verdicts if _is_for_other_kinds(v))
    console.print()
    if device:
        console.print(f"For other devices: {', '.join(device)}", style="dim")
    names = [name for name in kind if name not in device]
    if names:
        latent = all(section.group.spec.mla is not None for section in sections)
        text = "Not for latent attention (MLA)" if latent else "Only for latent attention (MLA)"
        console.print(f"{text}: {', '.join(names)}", style="dim")
    console.print("Every reason: --verbose", style="dim")


def _print_section(
    console: Console, section: Section, phase: Phase | None, first: LayerGroup | None
) -> None:
    spec = section.group.spec
    console.print()
    if section.name is not None:
        console.print(section.name, style="bold underline", end="")
        layers = section.group.layers
        console.print(f", layer{'' if len(layers) == 1 else 's'} {_indices(layers)}")
    text = str(spec) if first is None else _difference(spec, first.spec)
    if section.group.scale is not None and (first is None or section.group.scale != first.scale):
        text += f", scale {section.group.scale:.6g}"
    console.print(text)
    console.print()
    if not section.reports:
        console.print(f"These layers have no {phase} phase.", style="dim")
        return
    table = text_table("Phase", "Pick", "Decided by", narrow=2)
    for (pick, why), phases in _by_phase(section.reports).items():
        table.add_row(phases, pick or "none", why, style="green" if pick else "red")
    console.print(table)
    _print_notes(console, section.reports)
    if section.split:
        console.print()
        console.print(f"Keys split over {section.ranks} ranks", style="bold")
        for each in section.split:
            console.print(each)
    if section.expanded is not None:
        console.print()
        console.print(str(section.expanded))


def _difference(spec: AttentionSpec, first: AttentionSpec) -> str:
    """The fields in which a spec differs from the first kind of layer's."""
    own, other = spec.asdict(), first.asdict()
    changed = [f"{name}={value}" for name, value in own.items() if value != other[name]]
    return f"as the first, with {', '.join(changed)}" if changed else "as the first"


def _print_reference(console: Console, section: Section, profile: DeviceProfile) -> None:
    """Warn where a slow reference backend would serve a GPU."""
    reports = [*section.reports]
    if section.expanded is not None and section.expanded.report is not None:
        reports.append(section.expanded.report)
    slow = sorted({r.picked for r in reports if r.picked in LAST_RESORT})
    if slow and profile.arch != "cpu":
        console.print(
            f"Warning: {', '.join(slow)} is for correctness and slow on a GPU. The reasons below "
            "say what keeps faster backends from these layers.",
            style="yellow",
        )


def _others(reports: Sequence[Report], *, every: bool) -> _Why:
    """Every candidate that is not picked, in the order considered, and why.

    Without `every`, those are left out that are supported, or for other devices or kinds of layer.
    """
    others: _Why = {}
    for report in reports:
        for verdict in report.verdicts:
            folded = verdict.supported or _is_for_other_devices(verdict)
            folded = folded or _is_for_other_kinds(verdict)
            if verdict.name == report.picked or (folded and report.picked and not every):
                continue
            able = "also supported, but ranks lower" if report.picked else "supported"
            for text in [str(reason) for reason in verdict.reasons] or [able]:
                why = others.setdefault(verdict.name, {})
                why.setdefault(text, []).append(str(report.phase))
    return others


def _is_for_other_devices(verdict: Verdict) -> bool:
    return any(reason.code is ReasonCode.DEVICE for reason in verdict.reasons)


def _is_for_other_kinds(verdict: Verdict) -> bool:
    return any(reason.field == "mla" for reason in verdict.reasons)


def _print_others(
    console: Console, others: Mapping[str, Any], num_reports: int, title: str
) -> None:
    if not others:
        return
    table = text_table(title, "Why not")
    for name, why in others.items():
        for index, (text, phases) in enumerate(why.items()):
            where = "" if len(phases) == num_reports else f"{', '.join(phases)}: "
            table.add_row("" if index else name, where + text)
    console.print()
    console.print(table)


def _by_phase(reports: Sequence[Report]) -> dict[tuple[str | None, str], str]:
    """(pick, what decided) -> the phases with this result."""
    phases: dict[tuple[str | None, str], list[str]] = {}
    for report in reports:
        # The reasons that the sentence announces are in a table of their own.
        because = report.because.removesuffix(" The reasons:").removesuffix(":")
        repeats = because.startswith("first in this platform's order")
        why = because if repeats or not report.source else f"{report.source}: {because}"
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
