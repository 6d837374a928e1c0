"""A region of global memory: its bytes, which were written, and which stores are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import EmulationError, UnwrittenRead, WaitFault
from attn_dispatch.emulation.memory.access import Bytes, WrittenBytes

__all__ = ["Region", "SavedRegion", "Store", "StoresInFlight", "access_text"]

#: Owners of a byte: no store in flight, a wave's number + 1, or stores of several waves. A byte of
#: several waves stays theirs until one of them is retired; then the others mark it again.
_FREE, _SEVERAL = 0, -1
_ALL_BITS = (1 << 64) - 1


@dataclass(eq=False)
class Store:
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

    parts: tuple[tuple[Store, NDArray[np.int64]], ...] = ()

    def only(self, waves: NDArray[np.int64]) -> StoresInFlight:
        """The stores of some waves, given by their numbers."""
        parts = [(store, lanes[np.isin(store.waves[lanes], waves)]) for store, lanes in self.parts]
        return StoresInFlight(tuple(part for part in parts if part[1].size))

    def joined(self, other: StoresInFlight) -> StoresInFlight:
        """The stores of both."""
        return StoresInFlight(self.parts + other.parts)


class SavedRegion(NamedTuple):
    """Copies of a region's bytes and of which were written (None: all count as written)."""

    data: NDArray[np.uint8]
    written: WrittenBytes | None


class Region:
    """Memory of one tensor, or of the emulator: a range of addresses that may be accessed.

    Accesses have k lanes: `starts` are int64 (k,), offsets that the caller has compared with the
    bounds; `waves` are int64 (k,); values are uint32 (max(size // 4, 1), k).

    Args:
        address: of the first byte.
        data: uint8 (num_bytes,), contiguous, used in place.
        name: for messages.
        written: whether its content counts as written.

    Attributes:
        address: of the first byte.
        data: uint8 (num_bytes,), the memory itself.
        name: for messages.
        bytes: the same memory, for accesses of lanes.
    """

    def __init__(
        self, address: int, data: NDArray[np.uint8], name: str, written: bool = True
    ) -> None:
        self.address, self.data, self.name = address, data, name
        self.bytes = Bytes(data)
        self._written = None if written else WrittenBytes(data.size)
        self._stores: list[Store] = []
        # Only needed if a wave loads while stores are in flight near by.
        self._owners: NDArray[np.int32] | None = None

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

    def saved(self) -> SavedRegion:
        """A copy, for `restore`."""
        return SavedRegion(
            self.data.copy(), None if self._written is None else self._written.copy()
        )

    def restore(self, saved: SavedRegion) -> None:
        """Go back to a copy; no store is in flight then."""
        self.data[:] = saved.data
        self._written = None if saved.written is None else saved.written.copy()
        self._stores, self._owners = [], None

    def load(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        """The values from each start on.

        Raises:
            UnwrittenRead, WaitFault: as `check_read`.
        """
        self.check_read(starts, size, waves, "load")
        return self.bytes.gather(starts, size)

    def store(
        self,
        starts: NDArray[np.int64],
        values: NDArray[np.uint32],
        size: int,
        waves: NDArray[np.int64],
    ) -> Store:
        """Store values; the result is in flight until `retire`."""
        self.bytes.scatter(starts, values, size)
        if self._written is not None:
            self._written.mark(starts, size)
        low, high = int(starts.min()), int(starts.max()) + size
        store = Store(self, starts, waves, size, low, high, np.ones(starts.size, np.bool_))
        self._stores.append(store)
        return store

    def check_read(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> None:
        """Check that what is read was written, and that the writer has waited for it.

        Raises:
            UnwrittenRead: a byte was never written.
            WaitFault: another wave's store to a byte is in flight.
        """
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
                    "flight: the storing wave has not waited for it, or has come to no barrier and "
                    "done no atomic operation after the wait."
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

    def retire(self, store: Store, lanes: NDArray[np.int64]) -> None:
        """The waves of some lanes of a store have waited for it."""
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
        return access_text(kind, size, self.address + start, wave)


def access_text(kind: str, size: int, address: int, wave: int) -> str:
    """The first words of a message about an access."""
    return f"The {kind} of {size} bytes at {address & _ALL_BITS:#x} by wave {wave}"
