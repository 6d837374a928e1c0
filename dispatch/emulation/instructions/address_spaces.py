"""Where vector memory instructions access memory: global and private memory.

Each space has the same three methods, which access memory for the lanes in EXEC. Buffers are in
buffer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.transfers import registers_of
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.waves import WaveGroup

__all__ = [
    "AddressSpace",
    "GlobalSpace",
    "PrivateSpace",
    "active_lanes",
    "load_private",
    "store_private",
]

_U32Array = NDArray[np.uint32]


class AddressSpace(Protocol):
    """Accesses of one instruction; k is the number of lanes in EXEC."""

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes, uint32 (words, k), extended with zeros."""
        ...

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store uint32 (words, k); returns stores that have to be waited for."""
        ...

    def atomic(
        self,
        group: WaveGroup,
        operation: str,
        operand: _U32Array,
        compare: _U32Array | None,
        size: int,
    ) -> _U32Array:
        """Apply an atomic operation; returns what was in memory, uint32 (words, k)."""
        ...


class GlobalSpace:
    """Global memory, by 64-bit addresses.

    An address of flat instructions may lie in LDS or private memory. None does here: kernels take
    such addresses from `src_shared_base` and `src_private_base`, which operands.py rejects.

    Args:
        vector: a pair of registers with the address; one with an offset if there is a base.
        base: a scalar pair with the address, or "off".
        offset: in bytes, with its sign.
    """

    def __init__(self, vector: str, base: str, offset: int) -> None:
        self._addresses = _global_addresses(vector, base, offset)

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes."""
        return group.shared.memory.load(self._addresses(group), size, group.active_waves)

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store values."""
        return group.shared.memory.store(self._addresses(group), values, size, group.active_waves)

    def atomic(
        self,
        group: WaveGroup,
        operation: str,
        operand: _U32Array,
        compare: _U32Array | None,
        size: int,
    ) -> _U32Array:
        """Apply an atomic operation."""
        addresses, waves = self._addresses(group), group.active_waves
        return group.shared.memory.atomic(operation, addresses, operand, compare, size, waves)


def _global_addresses(
    vector: str, base: str, offset: int
) -> Callable[[WaveGroup], NDArray[np.int64]]:
    """Reads the address of each lane in EXEC, (k,)."""
    added = np.int64(offset)
    if base in ("off", "null"):
        low = registers_of(vector, "v", 2).first

        def from_vector(group: WaveGroup) -> NDArray[np.int64]:
            addresses = to_u64(group.v_u32[low], group.v_u32[low + 1]).view(np.int64)
            return group.active(addresses + added if offset else addresses)

        return from_vector
    lane, low = registers_of(vector, "v", 1).first, registers_of(base, "s", 2).first

    def from_base(group: WaveGroup) -> NDArray[np.int64]:
        begin = to_u64(group.s_u32[low], group.s_u32[low + 1]).view(np.int64) + added
        return group.active(begin[:, None] + group.v_u32[lane])

    return from_base


class PrivateSpace:
    """Private memory, by 32-bit offsets in the memory of a lane.

    Args:
        vector: a register with an offset, or "off".
        scalar: a scalar register with an offset, or "off".
        offset: in bytes, with its sign.
    """

    def __init__(self, vector: str, scalar: str, offset: int) -> None:
        lane = None if vector == "off" else registers_of(vector, "v", 1).first
        added: Any = np.uint32(offset & 0xFFFFFFFF)
        read_scalar = None if scalar == "off" else scalar_reader(parse_operand(scalar), U32)

        def offsets(group: WaveGroup) -> NDArray[np.int64]:
            total = added
            if read_scalar:
                total = np.asarray(read_scalar(group) + total).reshape(-1, 1)
            if lane is not None:
                total = group.v_u32[lane] + total
            return group.active(total).astype(np.int64)

        self._offsets = offsets

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes."""
        return load_private(group, self._offsets(group), size)

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store values; no other lane can see them, so that there is nothing to wait for."""
        store_private(group, self._offsets(group), values, size)
        return None

    def atomic(
        self,
        group: WaveGroup,
        operation: str,
        operand: _U32Array,
        compare: _U32Array | None,
        size: int,
    ) -> _U32Array:
        """There are none.

        Raises:
            UnknownInstruction: always.
        """
        raise UnknownInstruction(
            f"The atomic operation {operation} on private memory is not known."
        )


def load_private(group: WaveGroup, offsets: NDArray[np.int64], size: int) -> _U32Array:
    """Values of `size` bytes at offsets (k,) of the private memory of the lanes in EXEC."""
    return group.shared.scratch.load(group.active_waves, active_lanes(group), offsets, size)


def store_private(
    group: WaveGroup, offsets: NDArray[np.int64], values: _U32Array, size: int
) -> None:
    """Store values (words, k) at offsets (k,) of the private memory of the lanes in EXEC."""
    group.shared.scratch.store(group.active_waves, active_lanes(group), offsets, values, size)


def active_lanes(group: WaveGroup) -> NDArray[np.int64]:
    """(k,) the number of each lane in EXEC in its wave."""
    return group.active(np.arange(group.lanes))
