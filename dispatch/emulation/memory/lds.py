"""LDS, the memory that the waves of a workgroup share, with a detector of races."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import MemoryFault, RaceFault, UnwrittenRead, WaitFault
from attn_dispatch.emulation.memory.access import Bytes, WrittenBytes, repeated, unit_indices
from attn_dispatch.emulation.memory.atomics import apply_atomic
from attn_dispatch.emulation.memory.races import AccessKind, RaceDetector

__all__ = ["Lds", "LdsAccess"]


@dataclass(frozen=True, eq=False)
class LdsAccess:
    """An access that may still be in flight when its wave reaches a barrier.

    Attributes:
        starts: int64 (k,) first byte in the memory of all workgroups.
        waves: int64 (k,).
        size: bytes of each lane.
        is_read, is_write: both for an atomic operation.
        arrives_later: a load into LDS, which is not ordered with other accesses of its wave before
            the wait for it.
    """

    starts: NDArray[np.int64]
    waves: NDArray[np.int64]
    size: int
    is_read: bool
    is_write: bool
    arrives_later: bool = False

    def only(self, waves: NDArray[np.int64]) -> LdsAccess:
        """The accesses of some waves, given by their numbers."""
        chosen = np.isin(self.waves, waves)
        return replace(self, starts=self.starts[chosen], waves=self.waves[chosen])

    def joined(self, other: LdsAccess) -> LdsAccess:
        """The accesses of both, which are of the same instruction."""
        starts = np.concatenate([self.starts, other.starts])
        return replace(self, starts=starts, waves=np.concatenate([self.waves, other.waves]))


class Lds:
    """The LDS of all workgroups of a run; at first all bytes are 0xFF and unwritten.

    Accesses have k lanes of any workgroups: `workgroups`, `offsets` and `waves` are int64 (k,).
    The waves of a workgroup must have consecutive numbers. Values are uint32
    (max(size // 4, 1), k).

    A race is an access to a byte that another wave of the workgroup has written since the last
    barrier, or a write of a byte that another wave has read. Two exceptions do not change what any
    wave sees: a write of the value which is already there (Triton lets several waves write the same
    copy of a small tensor), and atomic operations on the same byte. Different values that two lanes
    of one instruction write to the same byte are a race as well.

    Args:
        num_workgroups: that run.
        bytes_each: LDS of a workgroup.
        banks: of 4 bytes, for bank conflicts: 32, on gfx950 64.
        count_conflicts: whether to count bank conflicts.

    Attributes:
        bytes_read, bytes_written: by all lanes so far.
        bank_conflicts: an estimate of the extra cycles of accesses of 4 bytes: for each 32 lanes,
            the most different words in one bank, less 1. The GPUs' own rules differ.
    """

    def __init__(
        self, num_workgroups: int, bytes_each: int, banks: int = 32, count_conflicts: bool = False
    ) -> None:
        self.bytes_each = bytes_each
        self.bytes_read = self.bytes_written = self.bank_conflicts = 0
        self._banks, self._count_conflicts = banks, count_conflicts
        self._stride = (bytes_each + 15) // 16 * 16
        num_bytes = num_workgroups * self._stride
        self._bytes = Bytes(np.full(num_bytes, 0xFF, np.uint8))
        self._written = WrittenBytes(num_bytes)
        self._races = RaceDetector(self._bytes)
        self._arriving = Bytes(np.zeros(0, np.uint8))  # 1 for bytes that a load may write later
        self._used = (bytes_each, 0)  # the offsets [low, high) contain all that it has noted

    def load(
        self,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], LdsAccess]:
        """The values at the offsets, and a record of the access.

        Raises:
            MemoryFault: an access is not within the LDS of the workgroup.
            UnwrittenRead: a byte was never written.
            RaceFault: another wave has written a byte since the last barrier.
            WaitFault: nothing has waited for a load into LDS that writes a byte.
        """
        starts = self._starts(workgroups, offsets, size, waves, "load")
        self._check_written(starts, size, waves, "load")
        self._check_race("load", starts, size, waves)
        self._check_arrived("load", starts, size, waves)
        self._races.note_read(starts, size, waves)
        self.bytes_read += size * starts.size
        access = LdsAccess(starts, waves, size, is_read=True, is_write=False)
        return self._bytes.gather(starts, size), access

    def store(
        self,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        values: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
        *,
        arriving: bool = False,
    ) -> LdsAccess:
        """Store values (words, k), and return a record of the access.

        Args:
            workgroups, offsets, waves: int64 (k,).
            values: uint32 (words, k).
            size: bytes of each lane.
            arriving: a load into LDS, whose values may arrive at any time until `arrived`.

        Raises:
            MemoryFault: an access is not within the LDS of the workgroup.
            RaceFault: another wave has read or written a byte since the last barrier, or two lanes
                write different values to one byte.
            WaitFault: nothing has waited for a load into LDS that writes a byte.
        """
        starts = self._starts(workgroups, offsets, size, waves, "store")
        self._check_race("store", starts, size, waves, values)
        if not arriving:  # loads into LDS arrive in order
            self._check_arrived("store", starts, size, waves)
        self._bytes.scatter(starts, values, size)
        differs = self._bytes.gather(starts, size) != _kept(values, size)
        if differs.any():
            lane = int(differs.any(axis=0).argmax())
            raise RaceFault(
                f"{self._access('store', starts, size, waves, lane)} has another lane of the same "
                "instruction that writes a different value to the same byte."
            )
        self._races.note_write(starts, size, waves)
        self._written.mark(starts, size)
        self.bytes_written += size * starts.size
        if arriving:
            self._mark_arriving(starts, size, 1)
        return LdsAccess(starts, waves, size, False, True, arriving)

    def atomic(
        self,
        operation: str,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        operand: NDArray[np.uint32],
        compare: NDArray[np.uint32] | None,
        size: int,
        waves: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], LdsAccess]:
        """Apply an atomic operation lane by lane.

        Args:
            operation: one of `atomics.ATOMIC_OPERATIONS`.
            workgroups, offsets, waves: int64 (k,).
            operand: uint32 (words, k).
            compare: uint32 (words, k), what "cmpswap" expects in memory.
            size: 4 or 8 bytes.

        Returns:
            What each lane found in memory, uint32 (words, k), and a record of the access.

        Raises:
            MemoryFault: an access is not within the LDS of the workgroup, or not aligned.
            UnwrittenRead: a byte was never written.
            RaceFault: another wave has read or written a byte since the last barrier, other than by
                an atomic operation.
            WaitFault: nothing has waited for a load into LDS that writes a byte.
            EmulationError: unknown operation.
        """
        starts = self._starts(workgroups, offsets, size, waves, "atomic operation")
        misaligned = starts & (size - 1) != 0
        if misaligned.any():
            lane = int(misaligned.argmax())
            raise MemoryFault(
                f"{self._access('atomic operation', starts, size, waves, lane)} is not aligned: "
                f"the offset must be a multiple of {size}."
            )
        self._check_written(starts, size, waves, "atomic operation")
        self._check_race("atomic operation", starts, size, waves)
        self._check_arrived("atomic operation", starts, size, waves)
        found = apply_atomic(self._bytes, operation, starts, operand, compare, size)
        self._races.note_write(starts, size, waves, atomic=True)
        self.bytes_read += size * starts.size
        self.bytes_written += size * starts.size
        return found, LdsAccess(starts, waves, size, is_read=True, is_write=True)

    def arrived(self, access: LdsAccess) -> None:
        """A wait has finished a load into LDS."""
        self._mark_arriving(access.starts, access.size, 0)

    def new_epoch(
        self,
        in_flight: Iterable[LdsAccess] = (),
        workgroups: NDArray[np.int64] | None = None,
    ) -> None:
        """Waves have passed a barrier: what came before it is ordered with what follows.

        Args:
            in_flight: accesses that no wave had waited for at the barrier, so that they may happen
                after it. They count as accesses of the new epoch too.
            workgroups: those whose waves have passed, all by default.
        """
        low, high = self._used
        if low < high:
            chosen: Any = slice(None) if workgroups is None else workgroups
            self._races.forget(self._stride, chosen, low, high)
        if workgroups is None:
            self._used = (self.bytes_each, 0)
        for access in in_flight:
            if not access.starts.size:
                continue
            offsets = access.starts % self._stride
            self._note_use(int(offsets.min()), int(offsets.max()) + access.size)
            if access.is_write:
                self._races.note_write(access.starts, access.size, access.waves, access.is_read)
            else:
                self._races.note_read(access.starts, access.size, access.waves)

    # Bounds and what was written ------------------------------------------------------------------

    def _starts(
        self,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        kind: str,
    ) -> NDArray[np.int64]:
        """Where the accesses begin in the memory of all workgroups."""
        if offsets.size:
            low, high = int(offsets.min()), int(offsets.max()) + size
            if low < 0 or high > self.bytes_each:
                lane = int(((offsets < 0) | (offsets > self.bytes_each - size)).argmax())
                raise MemoryFault(
                    f"The {kind} of {size} bytes at offset {offsets[lane]} by wave {waves[lane]} "
                    f"is outside of its LDS of {self.bytes_each} bytes."
                )
            self._note_use(low, high)
        starts = workgroups * self._stride + offsets
        if self._count_conflicts and size == 4 and offsets.size:
            self.bank_conflicts += _bank_conflicts(starts, waves, self._banks)
        return starts

    def _note_use(self, low: int, high: int) -> None:
        self._used = (min(low, self._used[0]), max(high, self._used[1]))

    def _check_written(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> None:
        unwritten = self._written.first_unwritten(starts, size)
        if unwritten is not None:
            lane, byte = unwritten
            raise UnwrittenRead(
                f"{self._access(kind, starts, size, waves, lane)} reads byte "
                f"{byte % self._stride}, which was never written."
            )

    def _check_race(
        self,
        kind: AccessKind,
        starts: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        values: NDArray[np.uint32] | None = None,
    ) -> None:
        found = self._races.conflict(kind, starts, size, waves, values)
        if found is None:
            return
        lane, byte, wave, done = found
        other = "several waves have" if wave is None else f"wave {wave} has"
        raise RaceFault(
            f"{self._access(kind, starts, size, waves, lane)} races: {other} {done} byte "
            f"{byte % self._stride} since the last barrier. A barrier must be between the two, and "
            "the first must have waited for its access."
        )

    def _mark_arriving(self, starts: NDArray[np.int64], size: int, flag: int) -> None:
        if not self._arriving.data.size:  # most kernels have no such loads
            self._arriving = Bytes(np.zeros_like(self._bytes.data))
        unit = self._arriving.unit(starts, size)
        for index in unit_indices(starts, size, unit):
            self._arriving.views[unit][index] = repeated(flag, unit)

    def _check_arrived(
        self, kind: str, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64]
    ) -> None:
        """Check that an access does not depend on when loads into LDS arrive."""
        if not self._arriving.data.size:
            return
        arriving = self._arriving.gather(starts, size)
        if arriving.any():
            lane = int(arriving.any(axis=0).argmax())
            raise WaitFault(
                f"{self._access(kind, starts, size, waves, lane)} is before the wait for the load "
                "into LDS that writes the same bytes."
            )

    def _access(
        self,
        kind: str,
        starts: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        lane: int,
    ) -> str:
        workgroup, offset = divmod(int(starts[lane]), self._stride)
        return (
            f"The {kind} of {size} bytes at offset {offset} of the LDS of workgroup {workgroup} by "
            f"wave {waves[lane]}"
        )


def _kept(values: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """Values without the bits that a store of 1 or 2 bytes leaves out."""
    return values & np.uint32((1 << (8 * size)) - 1) if size < 4 else values


def _bank_conflicts(starts: NDArray[np.int64], waves: NDArray[np.int64], banks: int) -> int:
    """Extra cycles: for each 32 lanes of a wave, the most different words in one bank, less 1."""
    position = np.arange(starts.size)
    first = np.concatenate([[True], np.diff(waves) != 0])
    in_wave = position - np.maximum.accumulate(np.where(first, position, 0))
    group = np.cumsum(in_wave % 32 == 0) - 1
    word = starts >> 2
    pairs = np.unique(np.stack([group, word]), axis=1)
    in_bank = np.zeros((int(group[-1]) + 1, banks), np.int64)
    np.add.at(in_bank, (pairs[0], pairs[1] % banks), 1)
    return int((in_bank.max(axis=1) - 1).sum())
