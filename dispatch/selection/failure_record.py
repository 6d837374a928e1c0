"""The record of backends that failed at run time.

A backend that was picked automatically and fails on a call that another backend then serves is
recorded here (see `recovery`), so that no layer with the same spec tries it again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.log import logger
from attn_dispatch.selection.version import changed

__all__ = [
    "BackendFallbackWarning",
    "Failure",
    "failures",
    "forget_failures",
    "record",
    "warn_once",
]

#: Failures that are kept. Beyond it the oldest is dropped, and its backend may be tried again.
MAX_FAILURES = 256


class BackendFallbackWarning(UserWarning):
    """A backend that was picked automatically failed, and another serves its layers from now on."""


@dataclass(frozen=True)
class Failure:
    """A backend that failed. Failures that differ only in `doing` or `cause` are equal.

    Attributes:
        backend: its name.
        spec: the layers that it failed for, the layout of their cache left open.
        arch: of the device.
        phase: of the requests that it failed on; None if it can serve neither phase.
        doing: when it failed, e.g. "at its launch".
        cause: the error's type and first line.
    """

    backend: str
    spec: AttentionSpec
    arch: str
    phase: Phase | None
    doing: str = field(compare=False)
    cause: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.backend} failed {self.doing}: {self.cause}"


_lock = ForkSafeLock()
_failures: dict[Failure, None] = {}  # the keys, oldest first
_already_warned: set[tuple[str, str]] = set()


def failures() -> tuple[Failure, ...]:
    """Every failure that is recorded in this process, oldest first; at most MAX_FAILURES."""
    with _lock:
        return tuple(_failures)


def forget_failures() -> None:
    """Clear the record: every layer may try every backend again, and warnings are repeated."""
    with _lock:
        _failures.clear()
        _already_warned.clear()
        changed()


def record(failure: Failure) -> bool:
    """Record a failure; False if the same one was recorded before."""
    with _lock:
        if failure in _failures:
            return False
        while len(_failures) >= MAX_FAILURES:
            del _failures[next(iter(_failures))]
        _failures[failure] = None
        changed()
    return True


def warn_once(failure: Failure, successor: str) -> None:
    """Log that a backend failed and which one replaces it; warn once for each backend and cause."""
    which = "" if failure.phase is None else f" in {failure.phase}"
    text = f"{failure}. From now on {successor} serves its layers{which}: {failure.spec}."
    logger.warning(text)
    with _lock:
        if (failure.backend, failure.cause) in _already_warned:
            return
        if len(_already_warned) >= MAX_FAILURES:
            _already_warned.clear()
        _already_warned.add((failure.backend, failure.cause))
    warnings.warn(
        f"{text} To have an error instead, require it by the override {failure.backend}; to leave "
        f"it out from the start, exclude it by -{failure.backend}.",
        BackendFallbackWarning,
        stacklevel=4,
    )
