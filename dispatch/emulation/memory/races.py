"""Which waves have accessed each byte of LDS since the last barrier, and what is a race."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.memory.access import Bytes, repeated, unit_indices

__all__ = ["AccessKind", "Conflict", "RaceDetector"]

#: A byte of the detector is 0 (no wave), 1 + the number of a wave, or 255 (several waves).
_SEVERAL = 255

AccessKind = Literal["load", "store", "atomic operation"]
#: What each kind of access does to its bytes, and what of other waves it is in conflict with.
_DOES: dict[AccessKind, str] = {"load": "read", "store": "written", "atomic operation": "changed"}
_CONFLICTS: dict[AccessKind, tuple[str, ...]] = {
    "load": ("written", "changed"),
    "store": ("written", "read", "changed"),
    "atomic operation": ("written", "read"),
}


class Conflict(NamedTuple):
    """Two accesses that nothing orders.

    Attributes:
        lane: of the later access.
        byte: a byte of both.
        wave: of the earlier access, None for several.
        done: "read", "written", or "changed" by an atomic operation; by the earlier access.
    """

    lane: int
    byte: int
    wave: int | None
    done: str


class RaceDetector:
    """Shadows of an array of bytes: the waves that have accessed them since the last barrier.

    An access is a conflict if another wave has written a byte of it, or if it writes a byte that
    another wave has read. It is none if it stores the value that is already there, unless by an
    atomic operation, or if both are atomic operations: no order of the waves changes what is there
    at the end.

    The methods look at the shadows in the largest unit that fits the access, 8 bytes at most. Where
    the bytes of a unit differ they look again at single bytes.
    """

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        # By what was done; that of atomic operations is added by the first one.
        self._shadows = {done: Bytes(np.zeros_like(memory.data)) for done in ("written", "read")}
        self._last: tuple[NDArray[np.int64], NDArray[np.uint64]] | None = None  # waves, their codes

    def forget(self, stride: int, rows: NDArray[np.int64] | slice) -> None:
        """Forget the accesses to some rows of `stride` bytes."""
        for shadow in self._shadows.values():
            shadow.data.reshape(-1, stride)[rows] = 0

    def conflict(
        self,
        kind: AccessKind,
        starts: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        values: NDArray[np.uint32] | None = None,
    ) -> Conflict | None:
        """The first conflict of an access with the accesses noted so far.

        Args:
            kind: of the access.
            starts, waves: int64 (k,), within the bounds.
            size: bytes of each lane.
            values: uint32 (words, k) that a store writes.
        """
        unit, codes = self._memory.unit(starts, size), self._codes(waves)
        found = self._conflict_of_units(unit, kind, starts, size, codes, values)
        return found and self._conflict_of_units(1, kind, starts, size, codes, values)

    def note(
        self, kind: AccessKind, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64]
    ) -> None:
        """Note an access of lanes."""
        done = _DOES[kind]
        if done not in self._shadows:
            self._shadows[done] = Bytes(np.zeros_like(self._memory.data))
        shadow = self._shadows[done]
        unit, codes = shadow.unit(starts, size), self._codes(waves)
        if not _note_units(shadow, unit, starts, size, codes):
            _note_units(shadow, 1, starts, size, codes)

    def _codes(self, waves: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The code of each wave, in each byte of an integer of 8 bytes."""
        if self._last is None or self._last[0] is not waves:  # most often the same array
            if waves.size and int(waves.max()) > _SEVERAL - 2:
                raise EmulationError(f"At most {_SEVERAL - 1} waves can run at the same time.")
            self._last = waves, (waves + 1).astype(np.uint64) * repeated(1, 8)
        return self._last[1]

    def _conflict_of_units(
        self,
        unit: int,
        kind: AccessKind,
        starts: NDArray[np.int64],
        size: int,
        codes: NDArray[np.uint64],
        values: NDArray[np.uint32] | None,
    ) -> Conflict | None:
        """A conflict in units of some bytes; it is certain if the unit is 1."""
        own: NDArray[Any] = codes.astype(self._memory.views[unit].dtype)
        shadows = {
            done: self._shadows[done].views[unit]
            for done in _CONFLICTS[kind]
            if done in self._shadows
        }
        for step, index in enumerate(unit_indices(starts, size, unit)):
            for done, shadow in shadows.items():
                earlier = shadow.take(index, mode="clip")
                wrong = (earlier != own) & (earlier != 0)
                if unit == 1 and values is not None and done != "changed":
                    stored = values[step // 4] >> np.uint32(8 * (step % 4)) & np.uint32(0xFF)
                    wrong &= self._memory.data[index] != stored
                if wrong.any():
                    lane = int(wrong.argmax())
                    code = int(earlier[lane])
                    wave = None if code == _SEVERAL else code - 1
                    return Conflict(lane, int(index[lane]) * unit, wave, done)
        return None


def _note_units(
    shadow: Bytes, unit: int, starts: NDArray[np.int64], size: int, codes: NDArray[np.uint64]
) -> bool:
    """Note an access; False if the bytes of a unit differ, so that it must be noted by byte."""
    view = shadow.views[unit]
    own: NDArray[Any] = codes.astype(view.dtype)
    several, each_byte = repeated(_SEVERAL, unit), repeated(1, unit)
    for index in unit_indices(starts, size, unit):
        before, after = view.take(index, mode="clip"), own
        if before.any():
            if ((before == own) | (before == several)).all():  # most often noted before
                continue
            if unit > 1 and (before != (before & repeated(0xFF, 1)) * each_byte).any():
                return False
            after = np.where((before == own) | (before == 0), own, several)
        view[index] = after
        mixed = view.take(index, mode="clip") != after
        if mixed.any():  # several waves of this access
            view[index[mixed]] = several
    return True
