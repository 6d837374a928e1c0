"""The failures of backends at run time, and what selection makes of them.

A backend that was picked automatically and fails on a call that another backend then serves is
recorded here (see `recovery`), so that no layer with the same spec tries it again. `failures` lists
what is recorded, and `forget_failures` clears it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.platforms.device import DeviceProfile

__all__ = [
    "BackendFallbackWarning",
    "Failure",
    "failures",
    "failures_for",
    "forget_failures",
    "generation",
    "record",
    "warn_once",
]

#: Failures that are kept. Beyond it the oldest is dropped, and its backend may be tried again.
MAX_FAILURES = 256


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


_lock = ForkSafeLock()
_failures: dict[tuple[object, ...], Failure] = {}
_already_warned: set[tuple[str, str]] = set()
_generation = 0


def generation() -> int:
    """Changes whenever a failure is recorded or forgotten."""
    return _generation


def failures() -> tuple[Failure, ...]:
    """Every failure that is recorded in this process, oldest first; at most MAX_FAILURES."""
    with _lock:
        return tuple(_failures.values())


def forget_failures() -> None:
    """Clear the record: every layer may try every backend again, and warnings are repeated."""
    global _generation
    with _lock:
        _failures.clear()
        _already_warned.clear()
        _generation += 1


def record(failure: Failure) -> bool:
    """Record a failure; False if the same one was recorded before."""
    global _generation
    with _lock:
        if failure.key in _failures:
            return False
        while len(_failures) >= MAX_FAILURES:
            del _failures[next(iter(_failures))]
        _failures[failure.key] = failure
        _generation += 1
    return True


def warn_once(failure: Failure, successor: str) -> None:
    """Warn that a backend failed and which one serves now; once for each backend and cause."""
    with _lock:
        if (failure.backend, failure.cause) in _already_warned:
            return
        if len(_already_warned) >= MAX_FAILURES:
            _already_warned.clear()
        _already_warned.add((failure.backend, failure.cause))
    which = "" if failure.phase is None else f" in {failure.phase}"
    warnings.warn(
        f"{failure}. From now on {successor} serves its layers{which}: {failure.spec}. To have an "
        f"error instead, require it by the override {failure.backend}; to leave it out from the "
        f"start, exclude it by -{failure.backend}.",
        BackendFallbackWarning,
        stacklevel=4,
    )


def failures_for(
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None = None,
    unrecorded: Sequence[Failure] = (),
) -> tuple[Failure, ...]:
    """The failures that count for layers with this spec on such a device.

    Args:
        spec: the layer.
        device: where it runs.
        phase: only those that count in this phase; None for all.
        unrecorded: failures of the call in progress, which count like recorded ones.
    """
    if not _failures and not unrecorded:
        return ()
    open_spec = spec.replace(kv_cache_layout=None)
    return tuple(
        failure
        for failure in (*failures(), *unrecorded)
        if (failure.spec, failure.arch) == (open_spec, device.arch)
        and (phase is None or failure.phase in (None, phase))
    )


# --- What selection makes of failures ---------------------------------------------------------
