"""LDS, the memory that the waves of a workgroup share, with a detector of races."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import MemoryFault, RaceFault, UnwrittenRead, WaitFault
from attn_dispatch.emulation.memory.access import ByteFlags, Bytes
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
        kind: of the access; a load into LDS is a store.
        arrives_later: a load into LDS, which is not ordered with other accesses of its wave before
            the wait for it.
    """

    starts: NDArray[np.int64]
    waves: NDArray[np.int64]
    size: int
    kind: AccessKind
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

    Accesses have k lanes of any workgroups: `workgroups`, `offsets` and `waves` are int64 (k,), and
    values are uint32 (max(size // 4, 1), k).

    A race is an access to a byte that another wave of the workgroup has written since the last
    barrier, or a write of a byte that another wave has read. Two exceptions do not change what is
    there at the next barrier: a store of the value which is already there (Triton lets several
    waves write the same copy of a small tensor), and atomic operations on the same byte. Different
    values that two lanes of one instruction write to the same byte are a race as well.

    Args:
        num_workgroups: that run.
        bytes_each: LDS of a workgroup.

    Attributes:
        bytes_read, bytes_written: by all lanes so far.
    """

    def __init__(self, num_workgroups: int, bytes_each: int) -> None:
        self.bytes_each = bytes_each
        self.bytes_read = self.bytes_written = 0
        self._stride = (bytes_each + 15) // 16 * 16
        num_bytes = num_workgroups * self._stride
        self._bytes = Bytes(np.full(num_bytes, 0xFF, np.uint8))
        self._written = ByteFlags(num_bytes)
        self._races = RaceDetector(self._bytes)
        # 0 for bytes that a load into LDS may write later; most kernels have no such loads.
        self._arrived: ByteFlags | None = None

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
        access = LdsAccess(starts, waves, size, "load")
        self._check_written(access)
        self._check_race(access)
        self._check_arrived(access)
        self._races.note("load", starts, size, waves)
        self.bytes_read += size * starts.size
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
        access = LdsAccess(starts, waves, size, "store", arrives_later=arriving)
        self._check_race(access, values)
        if not arriving:  # loads into LDS arrive in order
            self._check_arrived(access)
        self._bytes.scatter(starts, values, size)
        kept = values & np.uint32((1 << (8 * size)) - 1) if size < 4 else values
        differs = self._bytes.gather(starts, size) != kept
        if differs.any():
            lane = int(differs.any(axis=0).argmax())
            raise RaceFault(
                f"{self._text(access, lane)} has another lane of the same instruction that writes "
                "a different value to the same byte."
            )
        self._races.note("store", starts, size, waves)
        self._written.mark(starts, size)
        self.bytes_written += size * starts.size
        if arriving:
            if self._arrived is None:
                self._arrived = ByteFlags(self._bytes.data.size, 1)
            self._arrived.mark(starts, size, 0)
        return access

    def atomic(
        self,
        operation: str,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        operand: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], LdsAccess]:
        """Apply an atomic operation lane by lane.

        Args:
            operation: one of `atomics.ATOMIC_OPERATIONS`.
            workgroups, offsets, waves: int64 (k,).
            operand: uint32 (words, k); for "cmpswap" (2 * words, k), first the new value, then what
                it expects in memory.
            size: 4 or 8 bytes.

        Returns:
            What each lane found in memory, uint32 (words, k), and a record of the access.

        Raises:
            MemoryFault: an access is not within the LDS of the workgroup, or its offset is not a
                multiple of the size.
            UnwrittenRead: a byte was never written.
            RaceFault: another wave has read or written a byte since the last barrier, other than by
                an atomic operation.
            WaitFault: nothing has waited for a load into LDS that writes a byte.
        """
        starts = self._starts(workgroups, offsets, size, waves, "atomic operation")
        access = LdsAccess(starts, waves, size, "atomic operation")
        misaligned = starts & (size - 1) != 0
        if misaligned.any():
            raise MemoryFault(
                f"{self._text(access, int(misaligned.argmax()))} is not aligned: the offset must "
                f"be a multiple of {size}."
            )
        self._check_written(access)
        self._check_race(access)
        self._check_arrived(access)
        self._races.note("atomic operation", starts, size, waves)
        self.bytes_read += size * starts.size
        self.bytes_written += size * starts.size
        return apply_atomic(self._bytes, operation, starts, operand, size), access

    def arrived(self, access: LdsAccess) -> None:
        """A wait has finished a load into LDS."""
        if self._arrived is not None:
            self._arrived.mark(access.starts, access.size)

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
        if self._stride:
            chosen: Any = slice(None) if workgroups is None else workgroups
            self._races.forget(self._stride, chosen)
        for access in in_flight:
            self._races.note(access.kind, access.starts, access.size, access.waves)

    def _starts(
        self,
        workgroups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        size: int,
        waves: NDArray[np.int64],
        kind: str,
    ) -> NDArray[np.int64]:
        """Where the accesses begin in the memory of all workgroups."""
        outside = (offsets < 0) | (offsets > self.bytes_each - size)
        if outside.any():
            lane = int(outside.argmax())
            raise MemoryFault(
                f"The {kind} of {size} bytes at offset {offsets[lane]} by wave {waves[lane]} "
                f"is outside of its LDS of {self.bytes_each} bytes."
            )
        return workgroups * self._stride + offsets

    def _check_written(self, access: LdsAccess) -> None:
        unwritten = self._written.first_clear(access.starts, access.size)
        if unwritten is not None:
            lane, byte = unwritten
            raise UnwrittenRead(
                f"{self._text(access, lane)} reads byte {byte % self._stride}, which was never "
                "written."
            )

    def _check_race(self, access: LdsAccess, values: NDArray[np.uint32] | None = None) -> None:
        found = self._races.conflict(access.kind, access.starts, access.size, access.waves, values)
        if found is None:
            return
        other = "several waves have" if found.wave is None else f"wave {found.wave} has"
        raise RaceFault(
            f"{self._text(access, found.lane)} races: {other} {found.done} byte "
            f"{found.byte % self._stride} since the last barrier. A barrier must be between the "
            "two, and the first must have waited for its access."
        )

    def _check_arrived(self, access: LdsAccess) -> None:
        """Check that an access does not depend on when loads into LDS arrive."""
        if self._arrived is None:
            return
        pending = self._arrived.first_clear(access.starts, access.size)
        if pending is not None:
            raise WaitFault(
                f"{self._text(access, pending[0])} is before the wait for the load into LDS that "
                "writes the same bytes."
            )

    def _text(self, access: LdsAccess, lane: int) -> str:
        """The first words of a message about an access."""
        workgroup, offset = divmod(int(access.starts[lane]), self._stride)
        return (
            f"The {access.kind} of {access.size} bytes at offset {offset} of the LDS of workgroup "
            f"{workgroup} by wave {access.waves[lane]}"
        )
