"""The decision: which backend computes exactly this request here, and why.

`select` is pure: everything that it depends on is an argument. `resolve`, `get_attn_backend` and
`explain` are its fronts: they read the overrides in force, the device and the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import Reason, ReasonCode, compare
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.overrides import FailureExclusion, Mode, Rule, Source
from attn_dispatch.selection.priorities import backend_order
from attn_dispatch.selection.registry import Candidate, registry
from attn_dispatch.selection.report import Report, Selection, Verdict
from attn_dispatch.selection.substitutes import compatible_substitutes
from attn_dispatch.selection.timings.policy import (
    PhaseCandidates,
    TimingEvidence,
    evaluate_timings,
    times_for,
)
from attn_dispatch.selection.timings.table import LayerTimes, Table

if TYPE_CHECKING:
    from attn_dispatch.interface.backend import AttentionBackend

__all__ = ["phases_of", "select"]


def select(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None = None,
    rules: Iterable[Rule] = (),
    candidates: Mapping[str, Candidate] | None = None,
    tables: Sequence[Table] = (),
) -> Selection:
    """Pick the backend for a request. Pure: no environment, no clock, no device is read.

    Args:
        spec: the request.
        device: where, with the libraries that are there.
        phase: prefill or decode; None for one backend that serves both.
        rules: the overrides in force, most authoritative first.
        candidates: the backends to choose from; those that are registered if None.
        tables: of measured times, the most telling first; see `tuning`.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused. Its report holds
            every reason.
        InvalidInputError: phase is neither prefill nor decode.
    """
    if candidates is None:
        candidates = registry.candidates()
    report = decide(spec, device, phase=phase, rules=rules, candidates=candidates, tables=tables)
    if report.picked is None:
        raise UnsupportedError(str(report), report)
    backend_cls = candidates[report.picked].backend_cls
    assert backend_cls is not None
    return Selection(backend_cls, report)


def decide(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None,
    rules: Iterable[Rule],
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table] = (),
) -> Report:
    """`select` as a report, also of a failure. Pure."""
    phase = _as_phase(phase)
    rules = [rule for rule in rules if rule.applies(phase, spec.kind)]
    order = backend_order(device, phase, tuple(candidates))
    verdicts = {name: _evaluate(candidates[name], spec, device) for name in order}
    for name in {rule.name for rule in rules} - set(verdicts):
        verdicts[name] = Verdict(name, (_NO_CANDIDATE,))

    def conclude(
        picked: str | None,
        source: Source | None,
        because: str,
        measured: TimingEvidence | None = None,
    ) -> Report:
        cls = candidates[picked].backend_cls if picked else None
        full_cls_name = cls.full_cls_name() if cls else None
        found = tuple(verdicts.values())
        return Report(spec, device, phase, picked, source, because, full_cls_name, found, measured)

    settled: set[str] = set()  # a higher rule has spoken of these; lower ones no longer count
    passed_over = []
    for rule in rules:
        if rule.name in settled:
            continue
        settled.add(rule.name)
        if rule.mode is Mode.EXCLUDE:
            code, field = ReasonCode.EXCLUDED, "override"
            if isinstance(rule, FailureExclusion):
                code, field = ReasonCode.FAILED, "backend"
            reason = Reason(code=code, field=field, asked=str(rule))
            verdict = verdicts[rule.name]
            verdicts[rule.name] = Verdict(rule.name, (*verdict.reasons, reason))
        elif verdicts[rule.name].supported:
            return conclude(rule.name, rule.source, f"{rule} asks for it")
        elif rule.mode is Mode.REQUIRE:
            return conclude(None, rule.source, _required_but_refused(rule, verdicts))
        else:
            passed_over.append(f"; {rule} prefers {rule.name}, which is refused")
    able = [name for name in order if verdicts[name].supported]
    if not able:
        return conclude(None, None, "No registered backend computes exactly this request here:")
    told = "".join(passed_over)
    measured = _measured(able, spec, device, phase, candidates, tables)
    if measured is not None and measured.pick != able[0]:
        return conclude(measured.pick, Source.MEASURED, measured.because + told, measured)
    if measured is not None:
        told = f"; {measured.because}{told}"
    because = f"first in this platform's order that supports it{told}"
    return conclude(able[0], Source.PLATFORM, because, measured)


def _measured(
    able: Sequence[str],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table],
) -> TimingEvidence | None:
    """What the tables say of those who are able, in the platform's order; None if nothing."""
    times = times_for(tables, spec)
    if times is None:
        return None
    classes = {name: cls for name in able if (cls := candidates[name].backend_cls)}
    changed = _served_by_others(times, classes, spec, device)
    if able[0] in changed:
        return None
    admitted = compatible_substitutes(
        able,
        classes,
        spec,
        lambda name, each: _evaluate(candidates[name], each, device).supported,
    )
    side = PhaseCandidates(able[0], admitted - changed)
    return evaluate_timings(times, side, phase, captured=spec.cuda_graph)


def _served_by_others(
    times: LayerTimes,
    classes: Mapping[str, type[AttentionBackend]],
    spec: AttentionSpec,
    device: DeviceProfile,
) -> set[str]:
    """The backends that would call another package's kernels here than those that were timed."""
    changed = set()
    for name in times.kernel_provider.keys() & classes.keys():
        try:
            who = classes[name].kernel_provider(spec, device)
        except Exception:  # a plugin's own words may raise anything at all: then nobody knows
            who = ""
        if who != times.kernel_provider[name]:
            changed.add(name)
    return changed


_NO_CANDIDATE = Reason(code=ReasonCode.LOAD, field="backend", asked="it is not a candidate")


def _as_phase(phase: Phase | str | None) -> Phase | None:
    try:
        return None if phase is None else Phase(phase)
    except ValueError as error:
        raise InvalidInputError(f"phase={phase!r} is neither 'prefill' nor 'decode'.") from error


def _evaluate(candidate: Candidate, spec: AttentionSpec, device: DeviceProfile) -> Verdict:
    cls = candidate.backend_cls
    if cls is None:
        assert candidate.problem is not None
        return Verdict(candidate.name, (candidate.problem,))
    try:
        reasons = compare(spec, cls.capabilities, device)
        # Fields that are refused one by one need no word on how they combine.
        return Verdict(candidate.name, tuple(reasons or cls.check_combination(spec, device)))
    except Exception as error:  # a plugin's own checks may raise anything at all
        asked = f"its check of the request raises {type(error).__name__}: {error}"
        problem = Reason(code=ReasonCode.LOAD, field="backend", asked=asked)
        return Verdict(candidate.name, (problem,))


def _required_but_refused(rule: Rule, verdicts: Mapping[str, Verdict]) -> str:
    able = [verdict.name for verdict in verdicts.values() if verdict.supported]
    remedy = "Nothing else could either: change the request."
    if able:
        remedy = (
            f"What could: {', '.join(able)}. Drop the override, or soften it to {rule.name}? "
            "(prefer)."
        )
    return f"{rule} requires {rule.name}, which cannot compute this request. {remedy} The reasons:"


def phases_of(spec: AttentionSpec) -> tuple[Phase, ...]:
    """The phases that a layer goes through: an encoder has only a prefill."""
    if AttentionType(spec.attn_type).has_kv_cache:
        return (Phase.PREFILL, Phase.DECODE)
    return (Phase.PREFILL,)
