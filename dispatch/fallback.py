"""Moving on at run time: a backend that fails is passed over, and the next one takes its place.

That holds for what was picked automatically; who requires a backend gets its error. A failure is
recorded for the process, so that no layer like the one where it showed tries the backend again.
`failures` tells what is recorded, `forget_failures` lets all of it be tried again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_dispatch.device import DeviceProfile
from attn_dispatch.errors import AttnDispatchError, BackendFailure, UnsupportedError
from attn_dispatch.interface import Phase
from attn_dispatch.overrides import Mode, Rule
from attn_dispatch.spec import AttentionSpec

if TYPE_CHECKING:
    from attn_dispatch.batch import AttentionBatch

__all__ = [
    "BackendFallbackWarning",
    "Failure",
    "PassedOver",
    "beside",
    "blamed",
    "blaming",
    "failures",
    "failures_for",
    "forget_failures",
    "generation",
    "give_up",
    "is_capturing",
    "is_lost",
    "phase_of",
]


class BackendFallbackWarning(UserWarning):
    """A backend that was picked automatically failed, and another serves its layers from now on."""


@dataclass(frozen=True)
class Failure:
    """A backend that failed.

    Attributes:
        backend: its name.
        spec: the layers that it failed for, the layout of their cache left open.
        arch: of the device.
        phase: of the requests that it failed on; None if it is of no use in either.
        doing: when it failed, e.g. "at its launch".
        cause: the error's type and first line.
    """

    backend: str
    spec: AttentionSpec
    arch: str
    phase: Phase | None
    doing: str
    cause: str

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it the same failure, whatever the cause."""
        return self.backend, self.spec, self.arch, self.phase

    def __str__(self) -> str:
        return f"{self.backend} failed {self.doing}: {self.cause}"


_lock = threading.RLock()
_failures: dict[tuple[object, ...], Failure] = {}
_told: set[tuple[str, str]] = set()
_generation = 0


def generation() -> int:
    """Changes whenever a failure is recorded or forgotten."""
    return _generation


def failures() -> tuple[Failure, ...]:
    """Every failure that is recorded in this process, in their order."""
    with _lock:
        return tuple(_failures.values())


def forget_failures() -> None:
    """Let every backend be tried again, by layers that have moved on too, and warn anew."""
    global _generation
    with _lock:
        _failures.clear()
        _told.clear()
        _generation += 1


def failures_for(
    spec: AttentionSpec, device: DeviceProfile, phase: Phase | None = None
) -> tuple[Failure, ...]:
    """What is recorded for layers like this one on such a device; None for either phase."""
    if not _failures:
        return ()
    open_spec = spec.replace(kv_cache_layout=None)
    return tuple(
        failure
        for failure in failures()
        if (failure.spec, failure.arch) == (open_spec, device.arch)
        and (phase is None or failure.phase in (None, phase))
    )


# --- What selection makes of failures ---------------------------------------------------------


@dataclass(frozen=True)
class PassedOver(Rule):
    """An exclusion that a failure demands; its text says why."""

    def __str__(self) -> str:
        return self.text


def beside(
    rules: Sequence[Rule], spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
) -> tuple[Rule, ...]:
    """The rules in force with those that failures add: what failed is excluded unless required.

    So is whoever cannot take the place of the one that would be picked if it had not failed: the
    cache may have been planned for that one, see `tuning.stand_ins`.
    """
    failed = {failure.backend: failure for failure in failures_for(spec, device, phase)}
    if not failed:
        return tuple(rules)
    found = {
        name: f"it failed {each.doing}: {each.cause} ({_REMEDY})" for name, each in failed.items()
    }
    for unfit, first in _unfit(rules, spec, device, phase, failed):
        text = f"{first}, which failed, has another layout of the cache or other buffers of graphs"
        found.setdefault(unfit, text)
    kept = [rule for rule in rules if rule.mode is not Mode.PREFER or rule.name not in failed]
    return (*kept, *(PassedOver(Mode.EXCLUDE, name, text=text) for name, text in found.items()))


_REMEDY = "attn_dispatch.fallback.forget_failures() lets it be tried again"


def _unfit(
    rules: Sequence[Rule],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    failed: dict[str, Failure],
) -> Iterator[tuple[str, str]]:
    """Who cannot take the first one's place, and the first; nobody if that one has not failed."""
    from attn_dispatch.registry import registry
    from attn_dispatch.selector import decide
    from attn_dispatch.tuning.stand_ins import stand_ins

    candidates = registry.candidates()
    report = decide(spec, device, phase=phase, rules=rules, candidates=candidates)
    first = report.picked
    if first is None or first not in failed:
        return

    def supports(name: str, each: AttentionSpec) -> bool:
        told = decide(each, device, phase=phase, rules=(), candidates=candidates).verdicts
        return any(verdict.name == name and verdict.supported for verdict in told)

    able = (first, *report.others)
    classes = {name: cls for name in able if (cls := candidates[name].backend_cls)}
    fitting = stand_ins(able, classes, spec, supports)
    yield from ((name, first) for name in able if name not in fitting)


# --- What becomes of an error -----------------------------------------------------------------

# What errors say, in small letters and nothing else.
_OUT_OF_MEMORY = ("outofmemory", "memoryallocation", "tallocatememory", "notenoughmemory")
#: A device in such a state answers no later call either.
_LOST_DEVICE = (
    "illegalmemoryaccess",
    "illegaladdress",
    "devicesideassert",
    "cudaerrorassert",
    "misalignedaddress",
    "illegalinstruction",
    "invalidprogramcounter",
    "unspecifiedlaunchfailure",
    "launchfailed",
    "launchtimedout",
    "hardwarestackerror",
    "uncorrectable",
    "memoryaccessfault",
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _says(error: Exception, texts: Sequence[str]) -> bool:
    """Whether an error, or one that it comes of, says one of these."""
    said = ("".join(filter(str.isalpha, str(each).lower())) for each in _chain(error))
    return any(text in each for each in said for text in texts)


def is_lost(error: Exception) -> bool:
    """Whether an error leaves the device in a state in which every later call fails."""
    return _says(error, _LOST_DEVICE)


def _must_be_seen(error: Exception) -> bool:
    """Whether no other backend may try: the mistake is the caller's, or the machine cannot."""
    import torch

    if isinstance(error, AttnDispatchError) and not isinstance(error, BackendFailure):
        return True
    no_memory = (MemoryError, torch.OutOfMemoryError)
    return (
        any(isinstance(each, no_memory) for each in _chain(error))
        or _says(error, _OUT_OF_MEMORY)
        or is_lost(error)
    )


def is_capturing() -> bool:
    """Whether this call is being captured into a CUDA graph, or traced by torch.compile."""
    import torch

    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_NOTE = "_attn_dispatch_blamed"


class blaming:
    """A context that notes on an error which backend raised it, on requests of which phase."""

    __slots__ = ("_backend", "_batch")

    def __init__(self, backend: str, batch: AttentionBatch) -> None:
        self._backend, self._batch = backend, batch

    def __enter__(self) -> None:
        """Nothing is done unless there is an error."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Note it; the error goes on."""
        if error is not None:
            error.__dict__[_NOTE] = (self._backend, phase_of(self._batch))


def blamed(error: Exception) -> tuple[str, Phase | None] | None:
    """What `blaming` noted on an error."""
    noted: tuple[str, Phase | None] | None = error.__dict__.get(_NOTE)
    return noted


def phase_of(batch: AttentionBatch) -> Phase | None:
    """The phase that all requests are in, or None if there are both."""
    phases = set(batch.phases)
    return phases.pop() if len(phases) == 1 else None


def give_up(
    error: Exception,
    backend: str,
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    *,
    doing: str,
    rules: Sequence[Rule],
    known: Sequence[Failure],
) -> None:
    """Record that a backend failed, and warn; a selection with `beside` then passes it over.

    Args:
        error: what it raised.
        backend: its name.
        spec: the layer.
        device: where.
        phase: of the requests that it failed on; None if that is not known, or for both.
        doing: when it failed.
        rules: the overrides in force.
        known: the failures that were recorded for such layers when the backend was selected.

    Raises:
        BackendFailure: the backend is required, nobody else can take its place, or the call is
            being captured or traced, so that a graph would get the work of two backends.
        Exception: `error` itself, if it is no fault of the backend's, or if it leaves nothing that
            another could work with.
    """
    from attn_dispatch.selector import phases_of, select_and_warn

    if _must_be_seen(error):
        raise error
    cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    open_spec = spec.replace(kv_cache_layout=None)
    failure = Failure(backend, open_spec, device.arch, phase, doing, cause)
    phases = phases_of(spec) if phase is None else (phase,)
    rule = _requirement(rules, backend, spec, phases)
    if rule is not None:
        raise BackendFailure(
            f"{failure}. {rule} requires it, so nobody takes its place. Repair it, drop the "
            f"override, or soften it to {backend}? (prefer)."
        ) from error
    if is_capturing():
        raise BackendFailure(
            f"{failure}. This call is being captured or traced, and what is captured so far cannot "
            "be taken back. Run each step once before it is captured: there another backend can "
            "take its place."
        ) from error
    if not _record(failure, known):
        return  # another thread was faster, and has warned
    try:
        names = [
            select_and_warn(spec, device, phase=each, rules=tuple(rules)).name for each in phases
        ]
    except UnsupportedError as refusal:
        raise BackendFailure(f"{failure}. Nobody can take its place. {refusal}") from error
    _warn(failure, " and ".join(dict.fromkeys(names)))


def _requirement(
    rules: Sequence[Rule], backend: str, spec: AttentionSpec, phases: Sequence[Phase]
) -> Rule | None:
    """The rule that demands this backend and no other, if there is one."""
    for phase in phases:
        named = (r for r in rules if r.name == backend and r.applies(phase, spec.kind))
        first = next(named, None)  # what ranks lower no longer counts
        if first is not None and first.mode is Mode.REQUIRE:
            return first
    return None


def _record(failure: Failure, known: Sequence[Failure]) -> bool:
    """Record a failure; False if that was done since the backend had been selected."""
    global _generation
    if any(each.key == failure.key for each in known):
        raise BackendFailure(
            f"{failure}. It failed before, and was selected all the same. That is a bug of "
            f"attn-dispatch; exclude it by the override -{failure.backend}."
        )
    with _lock:
        if failure.key in _failures:
            return False
        _failures[failure.key] = failure
        _generation += 1
    return True


def _warn(failure: Failure, successor: str) -> None:
    """Say once in a process what failed for which cause, and what serves now."""
    with _lock:
        if (failure.backend, failure.cause) in _told:
            return
        _told.add((failure.backend, failure.cause))
    which = "" if failure.phase is None else f" in {failure.phase}"
    warnings.warn(
        f"{failure}. From now on {successor} serves its layers{which}: {failure.spec}. To have an "
        f"error instead, require it by the override {failure.backend}; to leave it out from the "
        f"start, exclude it by -{failure.backend}.",
        BackendFallbackWarning,
        stacklevel=4,
    )
