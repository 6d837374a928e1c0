"""Which waves have accessed each byte of LDS since the last barrier, and what is a race."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.memory.access import Bytes, repeated, unit_indices

__all__ = ["AccessKind", "Conflict", "RaceDetector"]

AccessKind = Literal["load", "store", "atomic operation"]


class Conflict(NamedTuple):
    """Two accesses that nothing orders.

    Attributes:
        lane: of the later access.
        byte: a byte of both.
        wave: of the earlier access, None for several.
        done: "read" or "written", by the earlier access.
    """

    lane: int
    byte: int
    wave: int | None
    done: str


#: A byte of the detector is 0 (no wave), 1 + wave % 126 (one wave) or 127 (several). The waves of a
#: workgroup have consecutive numbers and there are at most 32, so the codes are unique in it.
_CODES, _SEVERAL = 126, 127
#: Is set in addition where only atomic operations have written.
_ATOMIC = 128


class RaceDetector:
    """Two shadows of an array of bytes: the waves that wrote and that read since the last barrier.

    An access is a conflict if another wave has written a byte of it, or if it writes a byte that
    another wave has read. It is none if it writes the value that is already there, or if it and all
    earlier writes are atomic operations: no order of the waves changes what they see.

    The methods look at the shadows in the largest unit that fits the access, 8 bytes at most. Where
    the bytes of a unit differ they look again at single bytes.
    """

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self._writers = Bytes(np.zeros_like(memory.data))
        self._readers = Bytes(np.zeros_like(memory.data))
        self._code_table = np.zeros(0, np.uint64)
        self._last: tuple[NDArray[np.int64], NDArray[np.uint64]] | None = None  # waves, their codes

    def forget(self, stride: int, rows: NDArray[np.int64] | slice, low: int, high: int) -> None:
        """Forget the accesses to the columns [low, high) of some rows of `stride` bytes."""
        for shadow in (self._writers, self._readers):
            shadow.data.reshape(-1, stride)[rows, low:high] = 0

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
        unit, codes = self._writers.unit(starts, size), self._codes(waves)
        if self._first_conflict(unit, kind, starts, size, codes, None) is None:
            return None
        found = self._first_conflict(1, kind, starts, size, codes, values)
        if found is None:
            return None
        lane, byte, code, done = found
        return Conflict(lane, byte, _wave(code, int(waves[lane])), done)

    def note_read(self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64]) -> None:
        """Note that lanes have read."""
        self._note(self._readers, starts, size, waves, 0)

    def note_write(
        self,
        starts: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        atomic: bool = False,
    ) -> None:
        """Note that lanes have written, or read and written by an atomic operation."""
        self._note(self._writers, starts, size, waves, _ATOMIC if atomic else 0)

    def _codes(self, waves: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The code of each wave, in each byte of an integer of 8 bytes."""
        if self._last is not None and self._last[0] is waves:  # most often the same array
            return self._last[1]
        # A table, because the remainder of a division takes longer than all else.
        if waves.size and int(waves.max()) >= self._code_table.size:
            code = np.arange(2 * int(waves.max()) + 1, dtype=np.uint64) % np.uint64(_CODES)
            self._code_table = (code + np.uint64(1)) * np.uint64(repeated(1, 8))
        codes = self._code_table[waves]
        self._last = waves, codes
        return codes

    def _first_conflict(
        self,
        unit: int,
        kind: AccessKind,
        starts: NDArray[np.int64],
        size: int,
        codes: NDArray[np.uint64],
        values: NDArray[np.uint32] | None,
    ) -> tuple[int, int, int, str] | None:
        """(lane, byte, code of the other wave, what it has done); exact if the unit is 1."""
        writers, readers = self._writers.views[unit], self._readers.views[unit]
        own, atomic = codes.astype(writers.dtype), repeated(_ATOMIC, unit)
        for step, index in enumerate(unit_indices(starts, size, unit)):
            writer = writers.take(index, mode="clip")
            wrong = np.zeros(starts.size, np.bool_)
            if writer.any():
                wrong = (writer & ~atomic != own) & (writer != 0)
                if kind == "atomic operation":
                    wrong &= writer & atomic != atomic
            reader = None
            if kind != "load":
                reader = readers.take(index, mode="clip")
                if reader.any():
                    wrong |= (reader != own) & (reader != 0)
            if unit == 1 and values is not None:
                stored = values[step // 4] >> np.uint32(8 * (step % 4)) & np.uint32(0xFF)
                wrong &= self._memory.data[index] != stored
            if wrong.any():
                lane = int(wrong.argmax())
                done, code = "written", int(writer[lane]) & ~_ATOMIC
                if reader is not None and code in (0, int(own[lane])):
                    done, code = "read", int(reader[lane])
                return lane, int(index[lane]) * unit, code, done
        return None

    def _note(
        self,
        shadow: Bytes,
        starts: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        mark: int,
    ) -> None:
        unit, codes = shadow.unit(starts, size), self._codes(waves)
        if not _note_units(shadow, unit, starts, size, codes, mark):
            _note_units(shadow, 1, starts, size, codes, mark)


def _note_units(
    shadow: Bytes,
    unit: int,
    starts: NDArray[np.int64],
    size: int,
    codes: NDArray[np.uint64],
    mark: int,
) -> bool:
    """Note an access; False if the bytes of a unit differ, so that it must be noted by byte."""
    view = shadow.views[unit]
    plain: NDArray[Any] = codes.astype(view.dtype)
    own = plain | repeated(mark, unit) if mark else plain
    several = repeated(_SEVERAL, unit)
    for index in unit_indices(starts, size, unit):
        before: NDArray[Any] = view.take(index, mode="clip")
        after = own
        if before.any():
            if ((before == own) | (before == several)).all():  # most often noted before
                continue
            mine = before & ~repeated(_ATOMIC, unit) == plain
            free = mine | (before == 0)
            if (
                mark
            ):  # a wave's atomic operation does not make its earlier plain write an atomic one
                after = np.where(mine, before & own, own)
            if not free.all():
                if unit > 1 and (before != (before & repeated(0xFF, 1)) * repeated(1, unit)).any():
                    return False
                others = several | (before & repeated(mark, unit)) if mark else several
                after = np.where(free, after, others)
        view[index] = after
        mixed = view.take(index, mode="clip") != after
        if mixed.any():  # several waves of this access
            view[index[mixed]] = several | repeated(mark, unit)
    return True


def _wave(code: int, near: int) -> int | None:
    """The wave with a code, in the workgroup of a wave; None for several."""
    if code == _SEVERAL:
        return None
    away = (code - 1 - near) % _CODES
    return near + (away - _CODES if away > _CODES // 2 else away)
