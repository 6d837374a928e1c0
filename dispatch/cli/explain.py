"""`attn-dispatch explain`: what would be picked for a layer or a model, where, and why."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.explain_report import Section, print_head, print_overview, print_sections
from attn_dispatch.cli.options import AsJson, Config
from attn_dispatch.cli.output import make_console, noise_to_stderr, print_json
from attn_dispatch.cli.spec_flags import fields_from_flags, requested_model, with_spec_flags
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import AttentionType, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from attn_dispatch.cli.spec_flags import RequestedModel
    from attn_dispatch.models.layers import LayerGroup
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.selection.report import Report

__all__ = ["explain"]


#: Tokens per block of the cache that is assumed for a model: all backends for it accept these.
_BLOCK_SIZE, _MLA_BLOCK_SIZE = 16, 64


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
    context_parallel: Annotated[
        int | None,
        typer.Option(min=2, metavar="W", help="Whether W ranks that share the keys are faster."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every backend's reasons, for each layer.")
    ] = False,
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
        model = requested_model(config, fields_from_flags(flags))
        model, assumption = _assume_block_size(model, config, flags)
        libraries = registry.library_names()
        missing = [_library_name(text, libraries) for text in without or ()]
        profile = explained_device(device, missing)
        sections = _explain_all(model.groups, profile, backend, phase, named=config is not None)
        if context_parallel is not None:
            sections = [_with_split(each, profile, context_parallel) for each in sections]
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
                "others": {name: list(layers) for name, layers in model.others.items()},
                "rejected": {name: list(layers) for name, layers in model.rejected.items()},
                "notes": [*model.notes, *assumption],
            }
        )
    else:
        console = make_console()
        libraries_text = _describe_libraries(assumed, missing)
        print_head(console, profile, device, config, libraries_text, (*model.notes, *assumption))
        if config is not None:
            print_overview(console, sections, model)
        print_sections(console, sections, phase, profile, verbose=verbose)
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
    layers: Mapping[str, LayerGroup],
    profile: DeviceProfile,
    backend: str | None,
    phase: Phase | None,
    *,
    named: bool,
) -> list[Section]:
    from attn_dispatch.runtime.mla_dense import explain_expanded
    from attn_dispatch.selection.resolve import explain as explain_spec
    from attn_dispatch.selection.selector import phases_of

    sections = []
    for name, group in layers.items():
        reports: tuple[Report, ...] = ()
        if phase is None or phase in phases_of(group.spec):
            reports = explain_spec(group.spec, profile, backend=backend, phase=phase)
        expanded = None
        if group.spec.mla is not None and phase in (None, Phase.PREFILL):
            expanded = explain_expanded(group.spec, profile, backend=backend)
        sections.append(Section(name if named else None, group, reports, expanded))
    if not any(section.reports for section in sections):
        raise InvalidInputError(
            f"No requested layer has a {phase} phase: an encoder only has a prefill. "
            "Leave --phase out."
        )
    return sections


def _with_split(section: Section, profile: DeviceProfile, ranks: int) -> Section:
    """The section with what is known of ranks that share the layer's keys."""
    from attn_dispatch.distributed.advice import advice_for, describe_split, why_not_split

    transport = "nccl" if profile.is_gpu else "gloo"
    spec = section.group.spec
    is_able = why_not_split(spec, ranks, sharded_heads=False) is None
    return dataclasses.replace(
        section,
        ranks=ranks,
        split=tuple(describe_split(spec, profile, ranks, transport)),
        advice=tuple(advice_for(spec, profile, ranks, transport)) if is_able else (),
    )


def _describe_libraries(assumed: bool, missing: Sequence[str]) -> str:
    names = ", ".join(missing)
    if assumed:
        return "every optional library is assumed" + (f", except {names}" if missing else "")
    return "as installed here" + (f", without {names}" if missing else "")


def _assume_block_size(
    model: RequestedModel, config: Path | None, flags: Mapping[str, Any]
) -> tuple[RequestedModel, tuple[str, ...]]:
    """The model with a paged cache, and a note that says so, unless a flag is about the cache."""
    if config is None or flags.get("block_size") is not None:
        return model, ()
    groups, sizes = {}, []
    for name, group in model.groups.items():
        spec = group.spec
        if spec.block_size is None and AttentionType(spec.attn_type).has_kv_cache:
            spec = spec.replace(block_size=_BLOCK_SIZE if spec.mla is None else _MLA_BLOCK_SIZE)
            sizes.append(spec.block_size)
        groups[name] = dataclasses.replace(group, spec=spec)
    if not sizes:
        return model, ()
    numbers = " and ".join(map(str, sorted({size for size in sizes if size is not None})))
    note = f"A paged cache with blocks of {numbers} tokens is assumed; --block-size changes that."
    return dataclasses.replace(model, groups=groups), (note,)
