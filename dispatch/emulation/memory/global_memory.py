"""Global memory: all regions that a kernel may access."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import EmulationError, MemoryFault
from attn_dispatch.emulation.memory.atomics import apply_atomic
from attn_dispatch.emulation.memory.regions import Region, StoresInFlight, access_text

__all__ = ["GlobalMemory", "Region", "StoresInFlight"]

_ALIGNMENT = 256


class GlobalMemory:
    """Regions at the addresses that their data has on the host: nothing is copied.

    Accesses have k lanes (those that EXEC enables) of any waves. `addresses` are int64 (k,),
    `waves` are int64 (k,), the number of each lane's wave, `size` is 1, 2 or a multiple of 4 bytes,
    and values are uint32 (max(size // 4, 1), k). Addresses of loads and stores need no alignment.
    If lanes of a store have the same address, the last lane's value is kept.
    """

    def __init__(self) -> None:
        self._regions: list[Region] = []  # by address
        self._starts: list[int] = []

    @property
    def regions(self) -> Sequence[Region]:
        """All regions, by address."""
        return tuple(self._regions)

    def add(self, address: int, data: NDArray[np.uint8], name: str, written: bool = True) -> Region:
        """Allow accesses to memory that exists already, such as a tensor's storage.

        Args:
            address: of the first byte.
            data: uint8 (num_bytes,), contiguous, used in place.
            name: for messages.
            written: whether its content counts as written. Otherwise a load before a store to the
                same byte is an `UnwrittenRead`.

        Returns:
            The region; if one with this address and length exists already, that one.

        Raises:
            EmulationError: it overlaps another region, or the data has another layout.
        """
        if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
            raise EmulationError(
                f"The data of {name!r} must be a contiguous array of uint8 with one dimension."
            )
        region = Region(address, data, name, written)
        if not data.size:
            return region  # no address is in it
        at = bisect_right(self._starts, address)
        for other in self._regions[max(at - 1, 0) : at + 1]:
            if other.address == address and other.data.size == data.size:
                return other
            if other.address < region.end and address < other.end:
                raise EmulationError(
                    f"{_extent(region)} overlaps {_extent(other)}. Add the whole memory once."
                )
        self._regions.insert(at, region)
        self._starts.insert(at, address)
        return region

    def allocate(
        self, content: int | NDArray[np.uint8], name: str, written: bool = False
    ) -> Region:
        """New memory of the emulator, at a multiple of 256 bytes.

        Args:
            content: its size in bytes, for memory filled with 0xFF; or uint8 (num_bytes,) to copy,
                which counts as written.
            name: for messages.
            written: whether the 0xFF bytes count as written.
        """
        nbytes = content if isinstance(content, int) else content.size
        raw = np.full(nbytes + _ALIGNMENT, 0xFF, np.uint8)
        skipped = -raw.ctypes.data % _ALIGNMENT
        data = raw[skipped : skipped + nbytes]
        if not isinstance(content, int):
            data[:], written = content, True
        return self.add(raw.ctypes.data + skipped, data, name, written)

    def remove(self, region: Region) -> None:
        """Allow no more accesses to a region."""
        if region.data.size:  # one without bytes was never among the others
            at = self._regions.index(region)
            del self._regions[at], self._starts[at]

    def region_at(self, address: int) -> Region:
        """The region that an address is in.

        Raises:
            MemoryFault: it is in none.
        """
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._regions[at].end:
            raise MemoryFault(f"The address {address:#x} is {self._nearest(address, 1)}")
        return self._regions[at]

    def load(
        self, addresses: NDArray[np.int64], size: int, waves: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        """The values at the addresses, uint32 (words, k); 1 and 2 bytes are extended with zeros.

        Raises:
            MemoryFault: an access is not within one region.
            UnwrittenRead: a byte was never written.
            WaitFault: another wave's store to a byte is in flight.
        """
        values = np.empty((max(size // 4, 1), addresses.size), np.uint32)
        for region, lanes in self._parts(addresses, size, waves, "load"):
            starts = addresses[lanes] - region.address
            region.check_read(starts, size, waves[lanes], "load")
            values[:, lanes] = region.bytes.gather(starts, size)
        return values

    def store(
        self,
        addresses: NDArray[np.int64],
        values: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
    ) -> StoresInFlight:
        """Store values (words, k), and keep them in flight until the record is retired.

        Raises:
            MemoryFault: an access is not within one region.
        """
        parts = []
        for region, lanes in self._parts(addresses, size, waves, "store"):
            starts = addresses[lanes] - region.address
            store = region.store(starts, values[:, lanes], size, waves[lanes])
            parts.append((store, np.arange(starts.size)))
        return StoresInFlight(tuple(parts))

    def retire(self, in_flight: StoresInFlight) -> None:
        """The waves have waited for these stores: other waves may read what was stored."""
        for store, lanes in in_flight.parts:
            store.region.retire(store, lanes)

    def atomic(
        self,
        operation: str,
        addresses: NDArray[np.int64],
        operand: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
    ) -> NDArray[np.uint32]:
        """Apply an atomic operation lane by lane; its result is in memory at once.

        Args:
            operation: one of `atomics.ATOMIC_OPERATIONS`.
            addresses, waves: int64 (k,).
            operand: uint32 (words, k); for "cmpswap" (2 * words, k), first the new value, then what
                it expects in memory.
            size: 4 or 8 bytes.

        Returns:
            What each lane found in memory, uint32 (words, k).

        Raises:
            MemoryFault, UnwrittenRead, WaitFault: as for a load; MemoryFault also if an address is
                not a multiple of the size.
        """
        misaligned = addresses & (size - 1) != 0
        if misaligned.any():
            lane = int(misaligned.argmax())
            access = access_text("atomic operation", size, addresses[lane], waves[lane])
            raise MemoryFault(f"{access} is not aligned: the address must be a multiple of {size}.")
        found = np.empty((size // 4, addresses.size), np.uint32)
        for region, lanes in self._parts(addresses, size, waves, "atomic operation"):
            starts = addresses[lanes] - region.address
            region.check_read(starts, size, waves[lanes], "atomic operation")
            found[:, lanes] = apply_atomic(region.bytes, operation, starts, operand[:, lanes], size)
        return found

    def _parts(
        self, addresses: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> list[tuple[Region, Any]]:
        """The regions of an access, each with its lanes (a slice or numbers)."""
        if not addresses.size:
            return []
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = bisect_right(self._starts, low) - 1
        if at >= 0 and high <= self._regions[at].end:
            return [(self._regions[at], slice(None))]
        index = np.searchsorted(np.array(self._starts, np.int64), addresses, side="right") - 1
        ends = np.array([region.end for region in self._regions] or [0], np.int64)
        outside = (index < 0) | (addresses > ends[index] - size)
        if outside.any():
            lane = int(outside.argmax())
            start, count = int(addresses[lane]), int(outside.sum())
            others = f" {count} of {outside.size} lanes access such memory." if count > 1 else ""
            raise MemoryFault(
                f"{access_text(kind, size, start, waves[lane])} is "
                f"{self._nearest(start, size)}{others}"
            )
        return [(self._regions[at], np.flatnonzero(index == at)) for at in np.unique(index)]

    def _nearest(self, start: int, size: int) -> str:
        """Where an access is that is in no region, as the end of a sentence."""
        if not self._regions:
            return "outside of all regions: there is none."

        def missed(region: Region) -> int:
            return max(region.address - start, start + size - region.end)

        region = min(self._regions, key=missed)
        where = (
            f"begins {missed(region)} bytes before"
            if start < region.address
            else f"ends {missed(region)} bytes after the end of"
        )
        return f"outside of all regions: it {where} the nearest one, {_extent(region)}."


def _extent(region: Region) -> str:
    return f"{region.name!r} ({region.data.size} bytes from {region.address:#x})"
