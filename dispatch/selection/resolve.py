"""Selection under the overrides, failures and measured times that are in force now."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import Reason, ReasonCode
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.failure_record import Failure, failures
from attn_dispatch.selection.overrides import FailureExclusion, Mode, Rule, Source, current_rules
from attn_dispatch.selection.priorities import LAST_RESORT
from attn_dispatch.selection.registry import Candidate, registry
from attn_dispatch.selection.report import Report, Selection
from attn_dispatch.selection.selector import compatible_substitutes, decide, phases_of
from attn_dispatch.selection.timings.store import tables_for
from attn_dispatch.selection.timings.table import Table
from attn_dispatch.selection.version import version

__all__ = [
    "ReferenceFallbackWarning",
    "SelectionContext",
    "explain",
    "explained_device",
    "reasons_against",
    "resolve",
]


class ReferenceFallbackWarning(UserWarning):
    """Automatic selection on a GPU found nothing faster than the reference backend."""


#: Contexts by everything that they were made of, and how many are kept; as well for selections.
_contexts: dict[tuple[Any, ...], SelectionContext] = {}
_MAX_CONTEXTS = 64
_MAX_SELECTIONS = 4096


@dataclass(frozen=True)
class SelectionContext:
    """What a decision depends on, apart from the layer and its phase; with the decisions so far.

    Attributes:
        device: where the layer runs.
        rules: the overrides, most authoritative first.
        candidates: the registered backends by name.
        tables: of measured times, in the order in which they are consulted.
        failures: of backends at run time: the recorded ones, then those of the call in progress.
        version: `version()` when the context was made.
    """

    device: DeviceProfile
    rules: tuple[Rule, ...]
    candidates: Mapping[str, Candidate]
    tables: tuple[Table, ...]
    failures: tuple[Failure, ...]
    version: int
    _selections: dict[tuple[AttentionSpec, Phase | None], Selection] = field(
        default_factory=dict, init=False
    )

    @classmethod
    def current(
        cls,
        device: torch.device | str | DeviceProfile | None = None,
        backend: str | None = None,
        *,
        rules: tuple[Rule, ...] | None = None,
    ) -> SelectionContext:
        """The context of a call that is made now. Equal calls get the same object.

        Arguments and errors are those of `resolve`. `rules` replace the overrides in force, for a
        layer that was made under them.
        """
        if rules is None:
            rules = current_rules(backend, registry.names())
        if not isinstance(device, DeviceProfile):
            device = resolve_device(device)
        tuning = environment.tuning()
        folder = "" if tuning else environment.cache_folder()
        now = version()
        texts = [rule.text for rule in rules]  # which do not count when rules are compared
        key = (device, rules, *texts, tuning, folder, now)
        context = _contexts.get(key)
        if context is None:
            profile = device if isinstance(device, DeviceProfile) else detect_device(device)
            tables = tables_for(profile)
            context = cls(profile, rules, registry.candidates(), tables, failures(), now)
            if len(_contexts) >= _MAX_CONTEXTS:
                _contexts.clear()
            _contexts[key] = context
        return context

    def after(self, unrecorded: Sequence[Failure]) -> SelectionContext:
        """The context as it is now, and with these failures of the call in progress."""
        if not unrecorded and self.version == version():
            return self
        context = self.current(self.device, rules=self.rules)
        return dataclasses.replace(context, failures=(*context.failures, *unrecorded))

    def report(self, spec: AttentionSpec, phase: Phase | None = None) -> Report:
        """The decision for a layer, also if every backend is rejected; phase as for `resolve`.

        Raises:
            InvalidInputError: phase is None, and the rules differ by phase.
        """
        rules = self._rules_for(spec, phase)
        if phase is not None or not any(
            rule.phase and rule.kind in (None, spec.kind) for rule in rules
        ):
            return self._decide(spec, phase, rules, self.tables)
        # One backend is wanted for both phases, and a rule is for one phase: the picks must agree.
        # Times differ by phase too, but are no reason to reject the call, so they are left out.
        reports = [self._decide(spec, each, rules) for each in phases_of(spec)]
        if all(report.picked for report in reports) and len({r.picked for r in reports}) > 1:
            picks = " and ".join(f"{report.picked} for {report.phase}" for report in reports)
            raise InvalidInputError(
                f"The overrides in force pick {picks}. Pass phase= to choose one of them."
            )
        return next((report for report in reports if report.picked is None), reports[0])

    def select(self, spec: AttentionSpec, phase: Phase | None = None) -> Selection:
        """The backend for a layer, as `resolve` returns it."""
        key = (spec, phase)
        selection = self._selections.get(key)
        if selection is None:
            report = self.report(spec, phase)
            if report.picked is None:
                raise UnsupportedError(str(report), report)
            _warn_of_last_resort(report)
            selection = Selection(self.candidates[report.picked].loaded_cls, report)
            if len(self._selections) >= _MAX_SELECTIONS:
                self._selections.clear()
            self._selections[key] = selection
        return selection

    def failures_of(self, spec: AttentionSpec, phase: Phase | None = None) -> tuple[Failure, ...]:
        """The failures that count for a layer; phase None for both phases."""
        if not self.failures:
            return ()
        layer = (spec.replace(kv_cache_layout=None, kv_strides=None), self.device.arch)
        return tuple(
            failure
            for failure in self.failures
            if (failure.spec, failure.arch) == layer
            and (phase is None or failure.phase in (None, phase))
        )

    def _decide(
        self,
        spec: AttentionSpec,
        phase: Phase | None,
        rules: Sequence[Rule],
        tables: Sequence[Table] = (),
    ) -> Report:
        return decide(
            spec, self.device, phase=phase, rules=rules, candidates=self.candidates, tables=tables
        )

    def _rules_for(self, spec: AttentionSpec, phase: Phase | None) -> tuple[Rule, ...]:
        """The rules, and exclusions that a rule that requires the same backend outranks.

        Excluded are backends that failed, and those that cannot replace the one that would be
        picked if it had not failed: the cache may have been planned for that one, see
        `compatible_substitutes`.
        """
        failed = {failure.backend: failure for failure in self.failures_of(spec, phase)}
        if not failed:
            return self.rules
        texts = {
            name: f"it failed {each.doing}: {each.cause} (attn_dispatch.forget_failures() lets it "
            "be tried again)"
            for name, each in failed.items()
        }
        report = self._decide(spec, phase, self.rules)
        if report.picked in failed:
            able = (report.picked, *report.others)
            fit = compatible_substitutes(able, self.candidates, spec, self.device)
            text = (
                f"{report.picked}, which failed, has another layout of the cache or other buffers "
                "of graphs"
            )
            texts = {name: text for name in able if name not in fit} | texts
        kept = [r for r in self.rules if r.mode is not Mode.PREFER or r.name not in failed]
        excluded = (FailureExclusion(Mode.EXCLUDE, name, text=text) for name, text in texts.items())
        return (*kept, *excluded)


#: Each warning is given once in a process, however many layers it is about.
_warned: set[str] = set()


def _is_for_others(reason: Reason) -> bool:
    """Whether a backend is for other devices, or for attention with latents or only without."""
    if reason.code is ReasonCode.DEVICE:
        return True
    return reason.field == "mla" and reason.code is not ReasonCode.COMBINATION


def _warn_of_last_resort(report: Report) -> None:
    if report.source is not Source.PLATFORM or report.picked not in LAST_RESORT:
        return
    # Backends for other devices are omitted, and those for the other kind of attention.
    here = [v for v in report.verdicts if not any(map(_is_for_others, v.reasons))]
    rejected = [f"  {v.name}: {r}" for v in here for r in v.reasons if v.name not in LAST_RESORT]
    text = (
        f"{report.picked} serves this layer on {report.device.name}: right, but slow. "
        "Faster backends were rejected:\n" + "\n".join(rejected)
    )
    if report.device.is_gpu and rejected and text not in _warned:
        _warned.add(text)
        warnings.warn(text, ReferenceFallbackWarning, stacklevel=4)


def resolve(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    phase: Phase | None = None,
    backend: str | None = None,
) -> Selection:
    """Pick the backend for a request under the overrides, failures and times in force now.

    It warns if a GPU is left with the last resort.

    Args:
        spec: the request.
        device: a torch device of this machine, or a profile; None for the default device.
        phase: prefill or decode; None for one backend that serves both.
        backend: an override with the authority of an argument, in overrides' grammar.

    Raises:
        UnsupportedError: the required backend, or every backend, is rejected.
        UnknownBackendError: an override names a backend that is not registered.
        InvalidInputError: an override or the device is malformed, or phase is None and the
            overrides differ by phase.
    """
    return SelectionContext.current(device, backend).select(spec, phase)


def explain(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    backend: str | None = None,
    phase: Phase | None = None,
) -> tuple[Report, ...]:
    """The decision for each phase of a request, with the reasons why backends are rejected.

    It does not raise if every backend is rejected: the report of that phase states it.

    Args:
        spec: the request.
        device: a torch device of this machine, a profile, or the name of a known device that may
            be elsewhere ("gfx942", "H200"): every optional library is assumed to be there.
        backend: an override with the authority of an argument.
        phase: for this phase only; None for all that the layer goes through.

    Raises:
        UnknownBackendError, InvalidInputError: as for `resolve`.
    """
    context = SelectionContext.current(explained_device(device), backend)
    phases = phases_of(spec) if phase is None else (phase,)
    return tuple(context.report(spec, each) for each in phases)


def explained_device(
    device: torch.device | str | DeviceProfile | None, without: Iterable[str] = ()
) -> DeviceProfile:
    """The profile that `explain` uses; `without` names libraries that count as missing."""
    if isinstance(device, str) and not is_torch_device(device):
        device = dataclasses.replace(known_device(device), other_libraries="assumed")
    if not isinstance(device, DeviceProfile):
        device = detect_device(device)
    return device.with_libraries(*(Library(name) for name in without))


def is_torch_device(name: str) -> bool:
    """Whether a name is that of a PyTorch device and not of a known device."""
    return name.split(":", maxsplit=1)[0] in ("cpu", "cuda", "mps", "xpu")


def reasons_against(
    spec: AttentionSpec, device: torch.device | str | DeviceProfile | None = None
) -> list[str]:
    """Why no backend computes a layer on a device, one sentence each; empty if one does.

    Backends for other devices are left out. Arguments and errors are those of `explain`.
    """
    found: dict[str, None] = {}
    for report in explain(spec, device):
        if report.picked is None:
            found[report.because.removesuffix(":")] = None
            for each in report.verdicts:
                if all(reason.code is not ReasonCode.DEVICE for reason in each.reasons):
                    found |= dict.fromkeys(f"{each.name}: {reason}" for reason in each.reasons)
    return list(found)
