"""What a task is sure to see in global memory: of stores of others only what was released to it.

Vector clocks (Fidge 1988, Mattern 1989). A task's stores have the number of its epoch, which ends
with a barrier of its threads: the one thread that releases orders what all threads stored before
the last barrier, and what it acquires is known to all after the next one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.values import Array

__all__ = ["Clock", "Releases", "Stamps", "join"]

#: A stamp has the number of the task above this many bits of its epoch.
_BITS = 32
#: Bytes that share a stamp.
_BYTES = 2

Seen = dict[int, int]


def join(seen: Seen, other: Seen) -> None:
    """Add what another task has seen: by task, the last epoch of which all stores are seen."""
    for number, epoch in other.items():
        seen[number] = max(seen.get(number, 0), epoch)


@dataclass
class Clock:
    """What a task has stored and seen.

    Attributes:
        number: the task's.
        epoch: of its stores.
        seen: of others, see `join`.
        acquired: what one thread has seen; the others do after the next barrier.
    """

    number: int
    epoch: int = 1
    seen: Seen = field(default_factory=dict)
    acquired: Seen = field(default_factory=dict)

    def barrier(self) -> None:
        """All threads have come this far."""
        self.epoch += 1
        join(self.seen, self.acquired)

    def all_seen(self, epoch: int | None = None) -> Seen:
        """What those see that this task releases to: its own stores too, up to an epoch."""
        return self.seen | {self.number: self.epoch if epoch is None else epoch}


class Releases:
    """What was released to the addresses of atomics."""

    def __init__(self) -> None:
        self._released: dict[int, Seen] = defaultdict(dict)

    def atomic(self, clock: Clock, address: int, sem: str, scope: str) -> None:
        """An atomic operation that reads and writes.

        Raises:
            EmulationError: its semantics or scope is not interpreted.
        """
        if sem not in ("acquire", "release", "acq_rel", "relaxed") or scope not in ("gpu", "sys"):
            raise EmulationError(f"Atomics with {sem=} and {scope=} are not interpreted.")
        released = self._released[address]
        if sem in ("acquire", "acq_rel"):
            join(clock.acquired, released)
        if sem in ("release", "acq_rel"):
            join(released, clock.all_seen(clock.epoch - 1))


class Stamps:
    """Who stored the elements of a part of memory last, and when; nothing is known at first."""

    def __init__(self, size: int) -> None:
        self._stamps = np.zeros(size // _BYTES + 1, np.int64)

    def store(self, clock: Clock, places: Array) -> None:
        """A task stores to bytes."""
        self._stamps[places // _BYTES] = clock.number << _BITS | clock.epoch

    def check(self, clock: Clock, places: Array, names: dict[int, str]) -> None:
        """Raise EmulationError if a task loads bytes that it may not see.

        `names` are the tasks'.
        """
        stamps = self._stamps[places // _BYTES]
        others: Any = stamps[(stamps != 0) & (stamps >> _BITS != clock.number)]
        for stamp in np.unique(others).tolist():
            number, epoch = stamp >> _BITS, stamp & ((1 << _BITS) - 1)
            if clock.seen.get(number, 0) < epoch:
                raise EmulationError(
                    f"{names[clock.number]} loads what {names[number]} stored, and need not see "
                    "it: a barrier, a release or an acquire is missing between the two."
                )
