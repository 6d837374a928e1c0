"""A region of global memory: its bytes, which were written, and which stores are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import UnwrittenRead, WaitFault
from attn_dispatch.emulation.memory.access import ByteFlags, Bytes

__all__ = ["Region", "Store", "StoresInFlight", "access_text"]

#: Owners of a byte: no store in flight, a wave's number + 1, or stores of several waves.
_FREE, _SEVERAL = 0, -1


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
    """

    region: Region
    starts: NDArray[np.int64]
    waves: NDArray[np.int64]
    size: int
    low: int
    high: int
    live: NDArray[np.bool_]

    def put_owners(self, owners: NDArray[np.int64], first: int) -> None:
        """Note the waves of the lanes in flight as owners of the region's bytes from `first` on."""
        touched = (self.starts[self.live, None] + np.arange(-first, self.size - first)).reshape(-1)
        inside = (touched >= 0) & (touched < owners.size)
        touched, code = touched[inside], np.repeat(self.waves[self.live] + 1, self.size)[inside]
        before = owners[touched]
        after = np.where((before == _FREE) | (before == code), code, _SEVERAL)
        owners[touched] = after
        # Waves of one instruction that stored to the same byte: only one of them is there.
        owners[touched[owners[touched] != after]] = _SEVERAL


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
        bytes: the same memory, for accesses of lanes.
    """

    def __init__(
        self, address: int, data: NDArray[np.uint8], name: str, written: bool = True
    ) -> None:
        self.address, self.data, self.name = address, data, name
        self.bytes = Bytes(data)
        self._written = None if written else ByteFlags(data.size)
        self._stores: list[Store] = []

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.data.size

    def saved(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """A copy of the bytes and of which were written, for `restore`."""
        return self.data.copy(), None if self._written is None else self._written.data.copy()

    def restore(self, saved: tuple[NDArray[np.uint8], NDArray[np.uint8] | None]) -> None:
        """Go back to a copy; no store is in flight then."""
        self.data[:], written = saved
        if self._written is not None and written is not None:
            self._written.data[:] = written
        self._stores = []

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

    def retire(self, store: Store, lanes: NDArray[np.int64]) -> None:
        """The waves of some lanes of a store have waited for it."""
        store.live[lanes] = False
        if not store.live.any():
            self._stores.remove(store)

    def check_read(
        self, starts: NDArray[np.int64], size: int, waves: NDArray[np.int64], kind: str
    ) -> None:
        """Check that what is read was written, and that the writer has waited for it.

        Raises:
            UnwrittenRead: a byte was never written.
            WaitFault: another wave's store to a byte is in flight.
        """
        if self._written is not None:
            unwritten = self._written.first_clear(starts, size)
            if unwritten is not None:
                lane, byte = unwritten
                access = access_text(kind, size, self.address + starts[lane], waves[lane])
                raise UnwrittenRead(
                    f"{access} reads byte {byte} of {self.name!r}, which was never written."
                )
        if not self._stores:
            return
        low, high = int(starts.min()), int(starts.max()) + size
        near = [store for store in self._stores if store.low < high and low < store.high]
        if not near:
            return
        owners = np.zeros(high - low, np.int64)
        for store in near:
            store.put_owners(owners, low)
        owner = owners[starts[:, None] + np.arange(-low, size - low)]
        wrong = np.argwhere((owner != _FREE) & (owner != waves[:, None] + 1))
        if wrong.size:
            lane, byte = wrong[0]
            code = owner[lane, byte]
            storing = "several waves" if code == _SEVERAL else f"wave {code - 1}"
            raise WaitFault(
                f"{access_text(kind, size, self.address + starts[lane], waves[lane])} reads byte "
                f"{starts[lane] + byte} of {self.name!r}, but a store to it by {storing} is still "
                "in flight: the storing wave has not waited for it, or has come to no barrier and "
                "done no atomic operation after the wait."
            )


def access_text(kind: str, size: int, address: Any, wave: Any) -> str:
    """The first words of a message about an access."""
    return f"The {kind} of {size} bytes at {int(address) % (1 << 64):#x} by wave {wave}"
