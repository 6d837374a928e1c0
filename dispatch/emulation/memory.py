"""Global memory: the regions that a kernel may access, and what is written or in flight in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.access import Bytes, WrittenBytes
from attn_dispatch.emulation.atomics import apply_atomic
from attn_dispatch.emulation.errors import EmulationError, MemoryFault, UnwrittenRead, WaitFault

__all__ = ["GlobalMemory", "Region", "StoresInFlight"]

#: Owners of a byte: no store in flight, a wave's number + 1, or stores of several waves. A byte of
#: several waves stays theirs until one of them is retired; then the others mark it again.
_FREE, _SEVERAL = 0, -1
_ALIGNMENT = 256
_ALL_BITS = (1 << 64) - 1


@dataclass(eq=False)
class _Store:
    """A store instruction: what its lanes wrote, and which of them are still in flight.

    Attributes:
        region: the region it wrote to.
        starts: int64 (k,) offsets in the region.
        waves: int64 (k,).
        size: bytes of each lane.
        low, high: [low, high) contains all the bytes.
        live: bool (k,), whether the lane's store is still in flight.
        marked: whether `Region._owners` has all bytes of the lanes in flight.
    """

    region: Region
    starts: NDArray[np.int64]
    waves: NDArray[np.int64]
    size: int
    low: int
    high: int
    live: NDArray[np.bool_]
    marked: bool = False

    def bytes_of(self, lanes: NDArray[Any]) -> NDArray[np.int64]:
        """(lanes, size): the offset in the region of each byte."""
        return self.starts[lanes, None] + np.arange(self.size)


@dataclass(frozen=True, eq=False)
class StoresInFlight:
    """Stores that no wave has waited for yet; a record to give to `GlobalMemory.retire`."""

    _parts: tuple[tuple[_Store, NDArray[np.int64]], ...] = ()

    def only(self, waves: NDArray[np.int64]) -> StoresInFlight:
        """The stores of some waves, given by their numbers."""
        parts = [(store, lanes[np.isin(store.waves[lanes], waves)]) for store, lanes in self._parts]
        return StoresInFlight(tuple(part for part in parts if part[1].size))

    def joined(self, other: StoresInFlight) -> StoresInFlight:
        """The stores of both."""
        return StoresInFlight(self._parts + other._parts)


@dataclass(eq=False)
class Region:
    """Memory of one tensor, or of the emulator: a range of addresses that may be accessed.

    Attributes:
        address: of the first byte.
        data: uint8 (num_bytes,), the memory itself.
        name: for messages.
    """

    address: int
    data: NDArray[np.uint8]
    name: str
    _written: WrittenBytes | None = None
    _stores: list[_Store] = field(default_factory=list)
    _owners: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        self.bytes = Bytes(self.data)

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.data.size

    def write(self, offset: int, content: bytes | NDArray[np.uint8]) -> None:
        """Write from the host: the bytes count as written."""
        raw = np.frombuffer(content, np.uint8)
        if offset < 0 or offset + raw.size > self.data.size:
            raise EmulationError(
                f"{raw.size} bytes at offset {offset} do not fit in {self.name!r}, which has "
                f"{self.data.size} bytes."
            )
        self.data[offset : offset + raw.size] = raw
        if self._written is not None:
            self._written.mark_range(offset, offset + raw.size)

    def _load(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        self._check_read(starts, size, waves, "load")
        return self.bytes.gather(starts, size)

    def _store(
        self,
        starts: NDArray[np.int64],
        values: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
    ) -> _Store:
        self.bytes.scatter(starts, values, size)
        if self._written is not None:
            self._written.mark(starts, size)
        low, high = int(starts.min()), int(starts.max()) + size
        store = _Store(self, starts, waves, size, low, high, np.ones(starts.size, np.bool_))
        self._stores.append(store)
        return store

    def _check_read(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> None:
        """Check that what is read was written, and that the writer has waited for it."""
        if self._written is not None:
            unwritten = self._written.first_unwritten(starts, size)
            if unwritten is not None:
                lane, byte = unwritten
                raise UnwrittenRead(
                    f"{self._access(kind, int(starts[lane]), size, int(waves[lane]))} reads byte "
                    f"{byte} of {self.name!r}, which was never written."
                )
        if self._stores:
            self._check_in_flight(starts, size, waves, kind)

    def _check_in_flight(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> None:
        low, high = int(starts.min()), int(starts.max()) + size
        if not any(store.low < high and low < store.high for store in self._stores):
            return
        owners = self._mark_owners()
        for byte in range(size):
            owner = owners[starts + byte]
            wrong = (owner != _FREE) & (owner != waves + 1)
            if wrong.any():
                lane = int(wrong.argmax())
                start, code = int(starts[lane]), int(owner[lane])
                storing = "several waves" if code == _SEVERAL else f"wave {code - 1}"
                raise WaitFault(
                    f"{self._access(kind, start, size, int(waves[lane]))} reads byte "
                    f"{start + byte} of {self.name!r}, but a store to it by {storing} is still in "
                    "flight: the storing wave has not waited for it."
                )

    def _mark_owners(self) -> NDArray[np.int32]:
        """The owner of each byte, (num_bytes,), after the stores that were not marked yet."""
        if self._owners is None:
            self._owners = np.zeros(self.data.size, np.int32)
        for store in self._stores:
            if store.marked:
                continue
            touched = store.bytes_of(store.live).reshape(-1)
            code = np.repeat((store.waves[store.live] + 1).astype(np.int32), store.size)
            before = self._owners[touched]
            after = np.where((before == _FREE) | (before == code), code, np.int32(_SEVERAL))
            self._owners[touched] = after
            # Waves of one instruction that stored to the same byte: only one of them is there.
            self._owners[touched[self._owners[touched] != after]] = _SEVERAL
            store.marked = True
        return self._owners

    def _retire(self, store: _Store, lanes: NDArray[np.int64]) -> None:
        store.live[lanes] = False
        if self._owners is not None:
            self._owners[store.bytes_of(lanes)] = _FREE
            # The same bytes may be in flight for another store: it has to mark them again.
            for other in self._stores:
                if other.low < store.high and store.low < other.high:
                    other.marked = False
        if not store.live.any() and store in self._stores:
            self._stores.remove(store)

    def _access(self, kind: str, start: int, size: int, wave: int) -> str:
        return _access(kind, size, self.address + start, wave)


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
        region = Region(address, data, name, None if written else WrittenBytes(data.size))
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
        if region in self._regions:
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
        parts = self._parts(addresses, size, waves, "load")
        if len(parts) == 1:
            region, _ = parts[0]
            return region._load(addresses - region.address, size, waves)
        values = np.zeros((max(size // 4, 1), addresses.size), np.uint32)
        for region, lanes in parts:
            starts = addresses[lanes] - region.address
            values[:, lanes] = region._load(starts, size, waves[lanes])
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
        stores = [
            (
                region._store(
                    addresses[lanes] - region.address, values[:, lanes], size, waves[lanes]
                ),
                np.arange(addresses.size) if isinstance(lanes, slice) else np.arange(lanes.size),
            )
            for region, lanes in self._parts(addresses, size, waves, "store")
        ]
        return StoresInFlight(tuple(stores))

    def retire(self, in_flight: StoresInFlight) -> None:
        """The waves have waited for these stores: other waves may read what was stored."""
        for store, lanes in in_flight._parts:
            store.region._retire(store, lanes)

    def atomic(
        self,
        operation: str,
        addresses: NDArray[np.int64],
        operand: NDArray[np.uint32],
        compare: NDArray[np.uint32] | None,
        size: int,
        waves: NDArray[np.int64],
    ) -> NDArray[np.uint32]:
        """Apply an atomic operation lane by lane; its result is in memory at once.

        Args:
            operation: one of `atomics.ATOMIC_OPERATIONS`.
            addresses: int64 (k,).
            operand: uint32 (words, k).
            compare: uint32 (words, k), what "cmpswap" expects in memory.
            size: 4 or 8 bytes.
            waves: int64 (k,).

        Returns:
            What each lane found in memory, uint32 (words, k).

        Raises:
            MemoryFault, UnwrittenRead, WaitFault: as for a load; MemoryFault also if an address is
                not a multiple of the size.
            EmulationError: unknown operation.
        """
        misaligned = addresses & (size - 1) != 0
        if misaligned.any():
            lane = int(misaligned.argmax())
            start = int(addresses[lane])
            raise MemoryFault(
                f"{_access('atomic operation', size, start, int(waves[lane]))} is not aligned: the "
                f"address must be a multiple of {size}."
            )
        found = np.empty((size // 4, addresses.size), np.uint32)
        for region, lanes in self._parts(addresses, size, waves, "atomic operation"):
            starts = addresses[lanes] - region.address
            region._check_read(starts, size, waves[lanes], "atomic operation")
            expected = None if compare is None else compare[:, lanes]
            source = operand[:, lanes]
            found[:, lanes] = apply_atomic(region.bytes, operation, starts, source, expected, size)
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
                f"{_access(kind, size, start, int(waves[lane]))} is "
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


def _access(kind: str, size: int, address: int, wave: int) -> str:
    return f"The {kind} of {size} bytes at {address & _ALL_BITS:#x} by wave {wave}"


def _extent(region: Region) -> str:
    return f"{region.name!r} ({region.data.size} bytes from {region.address:#x})"
