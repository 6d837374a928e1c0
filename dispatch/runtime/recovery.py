"""The recovery path: when a backend raises, the next one serves the same call.

That holds for backends that were picked automatically; if the user required one, its exception is
raised. A failure is recorded only after another backend has served the same call. If every backend
raises, the call is invalid: `InvalidInputError` is raised and nothing is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch

from attn_dispatch.errors import (
    AttnDispatchError,
    BackendFailure,
    InvalidInputError,
    UnsupportedError,
    summary_of,
)
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.device_errors import (
    _OUT_OF_MEMORY,
    error_chain,
    is_capturing,
    is_device_lost,
    mentions,
)
from attn_dispatch.runtime.guard import InputsModified
from attn_dispatch.selection import failure_record
from attn_dispatch.selection.failure_record import Failure
from attn_dispatch.selection.overrides import Mode, Rule
from attn_dispatch.selection.resolve import resolve_uncached
from attn_dispatch.selection.selector import phases_of

if TYPE_CHECKING:
    from attn_dispatch.interface.batch import AttentionBatch

__all__ = ["AttemptFailed", "Request", "single_phase", "raise_attempt_failed", "with_fallback"]

T = TypeVar("T")


class AttemptFailed(Exception):
    """A backend raised; `__cause__` is what it raised. It never leaves the library.

    Attributes:
        backend: its name.
        phase: of the requests that it failed on; None for both, or if that is not known.
        doing: when it failed, e.g. "at its launch".
        libraries: `libraries.generation()` when the backend was selected.
    """

    def __init__(self, backend: str, phase: Phase | None, doing: str, libraries: int) -> None:
        super().__init__(backend, phase, doing)
        self.backend, self.phase, self.doing, self.libraries = backend, phase, doing, libraries


def raise_attempt_failed(
    error: Exception, backend: str, phase: Phase | None, doing: str, libraries: int
) -> NoReturn:
    """Raise AttemptFailed from an exception, or the exception itself if no backend may try again.

    The arguments are those of AttemptFailed. One that is AttemptFailed already is raised as it is.
    """
    if isinstance(error, AttemptFailed) or _is_final(error):
        raise error
    raise AttemptFailed(backend, phase, doing, libraries) from error


@dataclass(frozen=True)
class Request:
    """What a call asks for, as far as recovery needs to know.

    Attributes:
        spec: the layer.
        device: where it runs.
        rules: the overrides in force.
        phase: the only phase that counts, for a call of one phase; None for all of the layer.
    """

    spec: AttentionSpec
    device: torch.device
    rules: tuple[Rule, ...]
    phase: Phase | None = None

    @property
    def profile(self) -> DeviceProfile:
        """Of the device, with its libraries as they are known by now."""
        return detect_device(self.device)


def with_fallback(
    request: Request,
    attempt: Callable[[tuple[Failure, ...]], T],
    failed: AttemptFailed | None = None,
) -> T:
    """Return what `attempt` returns, with the first backends that do not raise.

    An attempt may repeat what an earlier one did in part: the same keys and values go to the same
    slots, and all of the output is written.

    Args:
        request: the call.
        attempt: selects backends without the failures that it is given, and runs them. It raises
            AttemptFailed for what they raise.
        failed: how an attempt without failures has ended before.

    Raises:
        UnsupportedError: no backend computes the request.
        InvalidInputError: every backend raised, so the call is invalid.
        BackendFailure: the backend that raised is required, or it is the only one; or the call is
            being captured or traced, so that a graph would get the work of two backends.
        Exception: what a backend raised, if no other may try: the caller's mistake, out of memory,
            a lost device.
    """
    failures: list[Failure] = []
    causes: list[BaseException] = []
    while True:
        if failed is None:
            try:
                result = attempt(tuple(failures))
            except AttemptFailed as raised:
                failed = raised
            else:
                _record(request, failures)
                return result
        error, generation = failed.__cause__, failed.libraries
        assert error is not None
        if generation != libraries.generation():
            # A library turned out to be broken: selection refuses what needs it from now on.
            warnings.warn(
                f"{summary_of(error)}. It is not used from now on.",
                libraries.BrokenLibraryWarning,
                stacklevel=3,
            )
            failed = None
            continue
        phase = request.phase if failed.phase is None else failed.phase
        spec = request.spec.replace(kv_cache_layout=None)
        failure = Failure(
            failed.backend, spec, request.profile.arch, phase, failed.doing, summary_of(error)
        )
        _check_may_go_on(request, failure, error)
        if any(each.key == failure.key for each in failures):
            raise BackendFailure(
                f"{failure}. It was selected again after it had failed, which is a bug of "
                f"attn-dispatch. Exclude it by the override -{failure.backend}."
            ) from error
        failures.append(failure)
        causes.append(error)
        _check_another_is_left(request, failures, causes)
        failed = None


def _check_may_go_on(request: Request, failure: Failure, error: BaseException) -> None:
    rule = _requirement(request, failure)
    if rule is not None:
        raise BackendFailure(
            f"{failure}. The backend is required by {rule}, so there is no fallback. Fix the "
            f"backend, remove the override, or make it a preference with {failure.backend}?."
        ) from error
    if is_capturing():
        raise BackendFailure(
            f"{failure}. This call is being captured or traced, and what is captured so far cannot "
            "be taken back. Run each step once before it is captured: there another backend can "
            "take its place."
        ) from error


def _check_another_is_left(
    request: Request, failures: Sequence[Failure], causes: Sequence[BaseException]
) -> None:
    """Raise if the selection without these failures is empty."""
    phase = failures[-1].phase
    try:
        for each in phases_of(request.spec) if phase is None else (phase,):
            resolve_uncached(
                request.spec,
                request.profile,
                phase=each,
                rules=request.rules,
                unrecorded=failures,
            )
    except UnsupportedError as refusal:
        tried = [f for f in failures if phase is None or f.phase in (None, phase)]
        if len({each.backend for each in tried}) > 1:
            causes_text = "; ".join(f"{f.backend} {f.doing}: {f.cause}" for f in tried)
            raise InvalidInputError(
                f"Every backend raised on this call, so its arguments are invalid: {causes_text}. "
                "Check the values, layouts and devices of what was passed."
            ) from causes[-1]
        raise BackendFailure(
            f"{failures[-1]}. No other backend can take its place. {refusal}"
        ) from causes[-1]


def _requirement(request: Request, failure: Failure) -> Rule | None:
    """The rule that requires the backend in a phase of the failure, if there is one."""
    for phase in phases_of(request.spec) if failure.phase is None else (failure.phase,):
        named = (
            rule
            for rule in request.rules
            if rule.name == failure.backend and rule.applies(phase, request.spec.kind)
        )
        first = next(named, None)  # rules of a lower rank do not count
        if first is not None and first.mode is Mode.REQUIRE:
            return first
    return None


def _record(request: Request, failures: Sequence[Failure]) -> None:
    """Record what failed before another backend served the call, and warn."""
    for failure in failures:
        if not failure_record.record(failure):
            continue  # another thread was faster, and has warned
        phases = phases_of(request.spec) if failure.phase is None else (failure.phase,)
        names = [
            resolve_uncached(
                request.spec,
                request.profile,
                phase=each,
                rules=request.rules,
                unrecorded=failures,
            ).name
            for each in phases
        ]
        failure_record.warn_once(failure, " and ".join(dict.fromkeys(names)))


# --- What an exception means ------------------------------------------------------------------


def _is_final(error: Exception) -> bool:
    """Whether no other backend may try: the caller's mistake, or the machine's limit."""
    if isinstance(error, AttnDispatchError) and not isinstance(error, BackendFailure):
        return True
    if isinstance(error, InputsModified):
        return True
    no_memory = (MemoryError, torch.OutOfMemoryError)
    return (
        any(isinstance(each, no_memory) for each in error_chain(error))
        or mentions(error, _OUT_OF_MEMORY)
        or is_device_lost(error)
    )


def single_phase(batch: AttentionBatch) -> Phase | None:
    """The phase that all requests are in, or None if there are both."""
    phases = set(batch.phases)
    return phases.pop() if len(phases) == 1 else None
