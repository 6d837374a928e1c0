"""The decision: which backend computes exactly this request here, and why.

`select` is pure: everything that it depends on is an argument. `resolve.SelectionContext` calls it
with the overrides, failures and measured times that are in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import Reason, ReasonCode, compare
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.overrides import FailureExclusion, Mode, Rule, Source
from attn_dispatch.selection.priorities import backend_order
from attn_dispatch.selection.registry import Candidate, registry
from attn_dispatch.selection.report import Report, Selection, Verdict
from attn_dispatch.selection.timings.policy import (
    PhaseCandidates,
    TimingEvidence,
    evaluate_timings,
    times_for,
)
from attn_dispatch.selection.timings.table import LayerTimes, Table

__all__ = ["compatible_substitutes", "decide", "phases_of", "select"]


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
        device: where, with its libraries.
        phase: prefill or decode; None for one backend that serves both.
        rules: the overrides in force, most authoritative first.
        candidates: the backends to choose from; the registered ones if None.
        tables: of measured times, in the order in which they are consulted; see `tuning`.

    Raises:
        UnsupportedError: the required backend, or every backend, is rejected. Its report holds
            every reason.
        InvalidInputError: phase is neither prefill nor decode.
    """
    if candidates is None:
        candidates = registry.candidates()
    report = decide(spec, device, phase=phase, rules=rules, candidates=candidates, tables=tables)
    if report.picked is None:
        raise UnsupportedError(str(report), report)
    return Selection(candidates[report.picked].loaded_cls, report)


def decide(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None,
    rules: Iterable[Rule],
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table] = (),
) -> Report:
    """The report of `select`, also if no backend is picked. Pure."""
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
        full_cls_name = candidates[picked].loaded_cls.full_cls_name() if picked else None
        notes = _kernel_notes(candidates[picked], spec, device, phase) if picked else ()
        return Report(
            spec,
            device,
            phase,
            picked,
            source,
            because,
            full_cls_name,
            tuple(verdicts.values()),
            measured,
            notes,
        )

    decided: set[str] = set()  # already decided by a higher-priority rule
    unmet = ""
    for rule in rules:
        if rule.name in decided:
            continue
        decided.add(rule.name)
        if rule.mode is Mode.EXCLUDE:
            code, field = ReasonCode.EXCLUDED, "override"
            if isinstance(rule, FailureExclusion):
                code, field = ReasonCode.FAILED, "backend"
            reason = Reason(code=code, field=field, asked=str(rule))
            verdict = verdicts[rule.name]
            verdicts[rule.name] = Verdict(rule.name, (*verdict.reasons, reason))
        elif verdicts[rule.name].supported:
            return conclude(rule.name, rule.source, f"selected by {rule}")
        elif rule.mode is Mode.REQUIRE:
            return conclude(None, rule.source, _required_but_rejected(rule, verdicts))
        else:
            unmet += f"; {rule} prefers {rule.name}, which is rejected"
    able = [name for name in order if verdicts[name].supported]
    if not able:
        return conclude(None, None, "No registered backend computes exactly this request here:")
    measured = _timing_evidence(able, spec, device, phase, candidates, tables)
    if measured is not None and measured.pick != able[0]:
        return conclude(measured.pick, Source.MEASURED, measured.because + unmet, measured)
    because = "first in this platform's order that supports it"
    if measured is not None:
        because += f"; {measured.because}"
    return conclude(able[0], Source.PLATFORM, because + unmet, measured)


def _kernel_notes(
    candidate: Candidate, spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
) -> tuple[str, ...]:
    try:
        return tuple(candidate.loaded_cls.kernel_notes(spec, device, phase))
    except Exception as error:  # a plug-in's code may raise anything; the pick is right without it
        return (f"its kernel_notes raises {type(error).__name__}: {error}",)


def _timing_evidence(
    able: Sequence[str],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table],
) -> TimingEvidence | None:
    """What the tables state about the supported backends; `able` is in the platform's order."""
    times = times_for(tables, spec)
    if times is None:
        return None
    others = _other_providers(times, able, candidates, spec, device)
    if able[0] in others:
        return None
    fit = compatible_substitutes(able, candidates, spec, device)
    return evaluate_timings(
        times, PhaseCandidates(able[0], fit - others), phase, captured=spec.cuda_graph
    )


def compatible_substitutes(
    able: Sequence[str],
    candidates: Mapping[str, Candidate],
    spec: AttentionSpec,
    device: DeviceProfile,
) -> frozenset[str]:
    """The backends that can serve single batches in place of the first, and the first.

    Block size and heads are in the request, which all of `able` support. The layout may be open: a
    substitute must take every layout that the first takes, since the cache was planned for the
    first. The buffers of captured graphs are made by the first's state class: a substitute must
    have the same one, and it must be the common one, which holds only batches. `able` are the
    backends that support the request, in the platform's order.
    """
    first, *others = able
    layouts = () if spec.kv_cache_layout else STRIDE_ORDERS
    laid = [spec.replace(kv_cache_layout=layout) for layout in layouts]
    needed = [each for each in laid if _evaluate(candidates[first], each, device).supported]

    def has_common_state(name: str) -> bool:
        return candidates[name].loaded_cls.get_state_cls() is CommonAttentionState

    def fits(name: str) -> bool:
        if spec.cuda_graph and not (has_common_state(first) and has_common_state(name)):
            return False
        return all(_evaluate(candidates[name], each, device).supported for each in needed)

    return frozenset([first, *filter(fits, others)])


def _other_providers(
    times: LayerTimes,
    able: Sequence[str],
    candidates: Mapping[str, Candidate],
    spec: AttentionSpec,
    device: DeviceProfile,
) -> set[str]:
    """The backends that would call another package's kernels here than those that were timed."""
    found = set()
    for name in times.kernel_provider.keys() & set(able):
        try:
            provider = candidates[name].loaded_cls.kernel_provider(spec, device)
        except Exception:  # third-party code may raise anything; treat the provider as unknown
            provider = ""
        if provider != times.kernel_provider[name]:
            found.add(name)
    return found


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
        # Skip the combination check if a single field already failed.
        return Verdict(candidate.name, tuple(reasons or cls.check_combination(spec, device)))
    except Exception as error:  # a plug-in's checks may raise anything
        asked = f"its check of the request raises {type(error).__name__}: {error}"
        problem = Reason(code=ReasonCode.LOAD, field="backend", asked=asked)
        return Verdict(candidate.name, (problem,))


def _required_but_rejected(rule: Rule, verdicts: Mapping[str, Verdict]) -> str:
    able = [verdict.name for verdict in verdicts.values() if verdict.supported]
    remedy = "No other backend can either: change the request."
    if able:
        remedy = (
            f"Others can: {', '.join(able)}. Remove the override, or make it a preference with "
            f"{rule.name}?."
        )
    return f"{rule} requires {rule.name}, which cannot compute this request. {remedy} The reasons:"


def phases_of(spec: AttentionSpec) -> tuple[Phase, ...]:
    """The phases that a layer goes through: an encoder has only a prefill."""
    if AttentionType(spec.attn_type).has_kv_cache:
        return (Phase.PREFILL, Phase.DECODE)
    return (Phase.PREFILL,)
