"""The recovery path: when a backend raises, the next one serves the same call.

This holds for backends that were picked automatically; if the user required one, its exception is
raised. A failure is recorded only after another backend has served the same call. If every backend
raises, the call is invalid: `InvalidInputError` is raised and nothing is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from attn_dispatch.errors import (
    AttnDispatchError,
    BackendFailure,
    InvalidInputError,
    UnsupportedError,
    summary_of,
)
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.log import logger
from attn_dispatch.platforms.device_errors import (
    device_wait_of,
    is_capturing,
    is_device_lost,
    is_out_of_memory,
)
from attn_dispatch.platforms.libraries import BrokenLibraryWarning
from attn_dispatch.runtime.guard import FinalFailure
from attn_dispatch.selection import failure_record
from attn_dispatch.selection.failure_record import Failure
from attn_dispatch.selection.overrides import Mode
from attn_dispatch.selection.resolve import SelectionContext
from attn_dispatch.selection.selector import phases_of
from attn_dispatch.selection.version import library_broke_since

__all__ = ["AttemptFailed", "raise_attempt_failed", "with_fallback"]

T = TypeVar("T")


class AttemptFailed(Exception):
    """A backend raised; `__cause__` is what it raised. It never leaves the library.

    `phase` and `doing` are those of `Failure`; phase is None too if it is not known. `version` is
    that of the context in which the backend was selected.
    """

    def __init__(self, backend: str, phase: Phase | None, doing: str, version: int) -> None:
        super().__init__(backend, phase, doing)
        self.backend, self.phase, self.doing, self.version = backend, phase, doing, version


def raise_attempt_failed(
    error: Exception, backend: str, phase: Phase | None, doing: str, version: int
) -> NoReturn:
    """Raise AttemptFailed from an exception; if no backend may try again, the exception itself."""
    if isinstance(error, AttemptFailed) or _is_final(error):
        raise error
    raise AttemptFailed(backend, phase, doing, version) from error


def with_fallback(
    spec: AttentionSpec,
    context: SelectionContext,
    attempt: Callable[[SelectionContext], T],
    failed: AttemptFailed | None = None,
    *,
    phase: Phase | None = None,
) -> T:
    """Return what `attempt` returns, with the first backends that do not raise.

    An attempt may repeat what an earlier one did in part: the same keys and values go to the same
    slots, and all of the output is written.

    Args:
        spec: the layer.
        context: its device and overrides.
        attempt: selects backends in the context that it gets, which excludes the failed ones, and
            runs them. It raises AttemptFailed for what they raise.
        failed: how an earlier attempt ended.
        phase: the only phase of the call; None for all phases of the layer.

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
        if failed is not None:
            error = failed.__cause__
            assert error is not None
            if library_broke_since(failed.version):  # selection rejects what needs it from now on
                text = f"{summary_of(error)}. It is not used from now on."
                logger.warning(text)
                warnings.warn(text, BrokenLibraryWarning, stacklevel=3)
            else:
                failure = Failure(
                    failed.backend,
                    spec.replace(kv_cache_layout=None, kv_strides=None),
                    context.device.arch,
                    failed.phase or phase,
                    failed.doing,
                    summary_of(error),
                )
                _check_may_go_on(spec, context, failure, error)
                if failure in failures:
                    raise BackendFailure(
                        f"{failure}. It was selected again after it had failed, which is a bug of "
                        f"attn-dispatch. Exclude it by the override -{failure.backend}."
                    ) from error
                failures.append(failure)
                causes.append(error)
                _check_another_is_left(spec, context, failures, causes)
        try:
            context = context.after(failures)
            result = attempt(context)
        except AttemptFailed as raised:
            failed = raised
        else:
            _record(spec, context, failures)
            return result


def _phases(spec: AttentionSpec, failure: Failure) -> tuple[Phase, ...]:
    return phases_of(spec) if failure.phase is None else (failure.phase,)


def _check_may_go_on(
    spec: AttentionSpec, context: SelectionContext, failure: Failure, error: BaseException
) -> None:
    for phase in _phases(spec, failure):
        rules = (rule for rule in context.rules if rule.applies(phase, spec.kind))
        first = next((rule for rule in rules if rule.name == failure.backend), None)
        if first is not None and first.mode is Mode.REQUIRE:  # rules of a lower rank do not count
            raise BackendFailure(
                f"{failure}. The backend is required by {first}, so there is no fallback. Fix the "
                "backend, remove the override, or make it a preference with "
                f"{failure.backend}?."
            ) from error
    if is_capturing():
        raise BackendFailure(
            f"{failure}. This call is being captured or traced, and what is captured so far cannot "
            "be taken back. Run each step once before it is captured: there another backend can "
            "take its place."
        ) from error


def _check_another_is_left(
    spec: AttentionSpec,
    context: SelectionContext,
    failures: Sequence[Failure],
    causes: Sequence[BaseException],
) -> None:
    """Raise if no backend is left without these failures."""
    phase = failures[-1].phase
    context = context.after(failures)
    try:
        for each in _phases(spec, failures[-1]):
            context.select(spec, each)
    except UnsupportedError as rejection:
        tried = [f for f in failures if phase is None or f.phase in (None, phase)]
        if len({each.backend for each in tried}) > 1:
            causes_text = "; ".join(f"{f.backend} {f.doing}: {f.cause}" for f in tried)
            raise InvalidInputError(
                f"Every backend raised on this call, so its arguments are invalid: {causes_text}. "
                "Check the values, layouts and devices of what was passed."
            ) from causes[-1]
        raise BackendFailure(
            f"{failures[-1]}. No other backend can take its place. {rejection}"
        ) from causes[-1]


def _record(spec: AttentionSpec, context: SelectionContext, failures: Sequence[Failure]) -> None:
    """Record the failures before another backend served the call, and warn."""
    for failure in failures:
        if failure_record.record(failure):  # else another thread has recorded it, and warned
            names = [context.select(spec, each).name for each in _phases(spec, failure)]
            failure_record.warn_once(failure, " and ".join(dict.fromkeys(names)))


def _is_final(error: Exception) -> bool:
    """Whether no other backend may try: the caller's mistake, the machine's limit, or a wait."""
    if isinstance(error, AttnDispatchError) and not isinstance(error, BackendFailure):
        return True
    if isinstance(error, FinalFailure) or device_wait_of(error) is not None:
        return True
    return is_out_of_memory(error) or is_device_lost(error)
