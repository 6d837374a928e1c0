"""Selection under the overrides, failures and measured times that are in force here."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection import exclusions, failure_record, overrides
from attn_dispatch.selection.failure_record import Failure
from attn_dispatch.selection.overrides import Rule, Source
from attn_dispatch.selection.priorities import LAST_RESORT
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Report, Selection
from attn_dispatch.selection.selector import decide, phases_of, select
from attn_dispatch.selection.timings.store import tables_for
from attn_dispatch.selection.version import version

if TYPE_CHECKING:
    import torch


__all__ = ["ReferenceFallbackWarning", "explain", "resolve"]


class ReferenceFallbackWarning(UserWarning):
    """Automatic selection on a GPU found nothing faster than the reference backend."""


# Decisions by everything that they depend on, overrides and environment as they stand included.
_decided: dict[tuple[Any, ...], Selection] = {}


_DECIDED_MAX = 4096


def resolve(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    phase: Phase | None = None,
    backend: str | None = None,
) -> Selection:
    """Pick the backend for a request under the overrides that are in force here and now.

    Args:
        spec: the request.
        device: a torch device of this machine, or a profile; None for the default device.
        phase: prefill or decode; None for one backend that serves both.
        backend: an override with the authority of an argument, in overrides' grammar.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused.
        UnknownBackendError: an override names a backend that is not registered.
        InvalidInputError: an override or the device is malformed.
    """
    overrides.check_override(backend)
    if not isinstance(device, DeviceProfile):
        device = resolve_device(device)
    generations = (version(), failure_record.generation())
    named = environment.tuning()
    tuning = (named, "" if named else environment.cache_folder())
    key = (spec, device, phase, backend, overrides.current_texts(), tuning, generations)
    selection = _decided.get(key)
    if selection is None:
        profile = device if isinstance(device, DeviceProfile) else detect_device(device)
        rules = overrides.current_rules(backend, registry.names())
        selection = resolve_uncached(spec, profile, phase=phase, rules=rules)
        if len(_decided) >= _DECIDED_MAX:
            _decided.clear()
        _decided[key] = selection
    return selection


def resolve_uncached(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None,
    rules: tuple[Rule, ...],
    unrecorded: Sequence[Failure] = (),
) -> Selection:
    """`select` over the registry and this device's tables of times, without what failed here.

    It warns if a GPU is left with the last resort, or if a table is set aside.

    Args:
        spec: the request.
        device: where it runs.
        phase: as for `resolve`.
        rules: the overrides in force.
        unrecorded: failures of the call in progress, which are not recorded yet.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused.
        InvalidInputError: phase is None, and the rules differ by phase.
    """
    rules = exclusions.exclude_failed(rules, spec, device, phase, unrecorded)
    selection = _select_one(spec, device, phase, rules)
    _warn_of_last_resort(selection)
    return selection


def _select_one(
    spec: AttentionSpec, device: DeviceProfile, phase: Phase | None, rules: tuple[Rule, ...]
) -> Selection:
    if phase is not None or not any(
        rule.phase and rule.kind in (None, spec.kind) for rule in rules
    ):
        return select(spec, device, phase=phase, rules=rules, tables=tables_for(device))
    # One backend is wanted for both phases, and somebody spoke of one phase: they must agree.
    # Times differ by phase too, and are no reason to refuse: they are left out.
    picks = [select(spec, device, phase=each, rules=rules) for each in phases_of(spec)]
    if len({pick.name for pick in picks}) > 1:
        told = " and ".join(f"{pick.name} for {pick.report.phase}" for pick in picks)
        raise InvalidInputError(
            f"The overrides in force pick {told}. Pass phase= to say which one is meant."
        )
    return picks[0]


#: Each warning is given once in a process, however many layers it is about.
_warned: set[str] = set()


def _warn_of_last_resort(selection: Selection) -> None:
    report = selection.report
    if report.source is not Source.PLATFORM or report.picked not in LAST_RESORT:
        return
    # What is for other devices did not stand in the way here.
    here = [v for v in report.verdicts if all(r.code is not ReasonCode.DEVICE for r in v.reasons)]
    refused = [f"  {v.name}: {r}" for v in here for r in v.reasons if v.name not in LAST_RESORT]
    text = (
        f"{report.picked} serves this layer on {report.device.name}: right, but slow. "
        "What stood in the way of faster backends:\n" + "\n".join(refused)
    )
    if report.device.is_gpu and refused and text not in _warned:
        _warned.add(text)
        warnings.warn(text, ReferenceFallbackWarning, stacklevel=4)


def explain(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    backend: str | None = None,
    phase: Phase | None = None,
) -> tuple[Report, ...]:
    """What would be picked for a request and why, phase by phase, refusals included.

    Never raises because of a refusal: the report of a phase that nothing can serve says so.

    Args:
        spec: the request.
        device: a torch device of this machine, a profile, or the name of a known device that may
            be elsewhere ("gfx942", "H200"): then every optional library is assumed to be there.
        backend: an override with the authority of an argument.
        phase: for this phase alone; None for all that the layer goes through.

    Raises:
        UnknownBackendError, InvalidInputError: as for `resolve`.
    """
    profile = explained_device(device)
    rules = overrides.current_rules(backend, registry.names())
    candidates = registry.candidates()
    tables = tables_for(profile)
    phases = phases_of(spec) if phase is None else (phase,)

    def report(each: Phase) -> Report:
        allowed = exclusions.exclude_failed(rules, spec, profile, each)
        return decide(
            spec, profile, phase=each, rules=allowed, candidates=candidates, tables=tables
        )

    return tuple(map(report, phases))


def explained_device(
    device: torch.device | str | DeviceProfile | None, without: Iterable[str] = ()
) -> DeviceProfile:
    """The profile that `explain` speaks of; `without` names libraries to be taken as missing."""
    if isinstance(device, str) and not is_torch_device(device):
        device = dataclasses.replace(known_device(device), other_libraries="assumed")
    if not isinstance(device, DeviceProfile):
        device = detect_device(device)
    return device.with_libraries(*(Library(name) for name in without))


def is_torch_device(name: str) -> bool:
    """Whether the name is that of a PyTorch device of this machine, not of a known device."""
    return name.split(":", maxsplit=1)[0] in ("cpu", "cuda", "mps", "xpu")
