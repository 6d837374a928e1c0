"""Private memory of each lane: what a kernel spills, and arrays with a computed index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import MemoryFault, UnwrittenRead
from attn_dispatch.emulation.memory.access import ByteFlags, Bytes

__all__ = ["Scratch"]


class Scratch:
    """Private memory of the lanes of all waves of a run.

    Attributes:
        bytes_each: bytes of each lane.
        bytes_read, bytes_written: by all lanes so far.
    """

    def __init__(self, num_waves: int, lanes: int, bytes_each: int) -> None:
        self.bytes_each = bytes_each
        self.bytes_read = self.bytes_written = 0
        self._lanes, self._stride = lanes, (bytes_each + 15) // 16 * 16
        num_bytes = num_waves * lanes * self._stride
        self._bytes, self._written = Bytes(np.zeros(num_bytes, np.uint8)), ByteFlags(num_bytes)

    def load(
        self,
        waves: NDArray[np.int64],
        lanes: NDArray[np.int64],
        offsets: NDArray[np.int64],
        size: int,
    ) -> NDArray[np.uint32]:
        """The values at the offsets (k,) in the memory of the lanes (k,) of the waves (k,).

        Returns:
            uint32 (max(size // 4, 1), k); 1 and 2 bytes are extended with zeros.

        Raises:
            MemoryFault: an access is not within the memory of the lane.
            UnwrittenRead: a byte was never written.
        """
        starts = self._starts(waves, lanes, offsets, size, "load")
        unwritten = self._written.first_clear(starts, size)
        if unwritten is not None:
            at, byte = unwritten
            raise UnwrittenRead(
                f"The load of {size} bytes at offset {offsets[at]} of private memory by lane "
                f"{lanes[at]} of wave {waves[at]} reads byte {byte % self._stride}, which was "
                "never written."
            )
        self.bytes_read += size * starts.size
        return self._bytes.gather(starts, size)

    def store(
        self,
        waves: NDArray[np.int64],
        lanes: NDArray[np.int64],
        offsets: NDArray[np.int64],
        values: NDArray[np.uint32],
        size: int,
    ) -> None:
        """Store values (words, k) at the offsets (k,) in the memory of the lanes of the waves.

        Raises:
            MemoryFault: an access is not within the memory of the lane.
        """
        starts = self._starts(waves, lanes, offsets, size, "store")
        self._bytes.scatter(starts, values, size)
        self._written.mark(starts, size)
        self.bytes_written += size * starts.size

    def _starts(
        self,
        waves: NDArray[np.int64],
        lanes: NDArray[np.int64],
        offsets: NDArray[np.int64],
        size: int,
        kind: str,
    ) -> NDArray[np.int64]:
        last = self.bytes_each - size
        if offsets.size and (int(offsets.min()) < 0 or int(offsets.max()) > last):
            at = int(((offsets < 0) | (offsets > last)).argmax())
            raise MemoryFault(
                f"The {kind} of {size} bytes at offset {offsets[at]} by lane {lanes[at]} of wave "
                f"{waves[at]} is outside of its private memory of {self.bytes_each} bytes."
            )
        return (waves * self._lanes + lanes) * self._stride + offsets
