"""Where vector memory instructions access memory: global and private memory.

The spaces have the same methods, which access memory for the lanes in EXEC; k is their number.
Private memory has no atomic operations.
Buffers are in buffer.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.transfers import registers_of
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["GlobalSpace", "PrivateSpace", "active_lanes", "load_private", "store_private"]

_U32Array = NDArray[np.uint32]


class GlobalSpace:
    """Global memory, by 64-bit addresses.

    Args:
        vector: a pair of registers with the address; one with an offset if there is a base.
        base: a scalar pair with the address, or "off".
        offset: in bytes, with its sign.
    """

    def __init__(self, vector: str, base: str, offset: int) -> None:
        self._offset = np.int64(offset)
        self._base = None if base in ("off", "null") else registers_of(base, "s", 2).first
        self._vector = registers_of(vector, "v", 2 if self._base is None else 1).first

    def _addresses(self, group: WaveGroup) -> NDArray[np.int64]:
        low: Any = group.v_u32[self._vector]
        if self._base is None:
            begin = to_u64(low, group.v_u32[self._vector + 1]).view(np.int64)
            return group.active(begin + self._offset)
        begin = to_u64(group.s_u32[self._base], group.s_u32[self._base + 1]).view(np.int64)
        return group.active((begin + self._offset)[:, None] + low)

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes, uint32 (words, k), extended with zeros."""
        return group.shared.memory.load(self._addresses(group), size, group.active_waves)

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store uint32 (words, k); returns stores that have to be waited for."""
        return group.shared.memory.store(self._addresses(group), values, size, group.active_waves)

    def atomic(self, group: WaveGroup, operation: str, operand: _U32Array, size: int) -> _U32Array:
        """Apply an atomic operation; returns what was in memory, uint32 (words, k)."""
        addresses, waves = self._addresses(group), group.active_waves
        return group.shared.memory.atomic(operation, addresses, operand, size, waves)


class PrivateSpace:
    """Private memory, by 32-bit offsets in the memory of a lane.

    Args:
        vector: a register with an offset, or "off".
        scalar: a scalar register with an offset, or "off".
        offset: in bytes, with its sign.
    """

    def __init__(self, vector: str, scalar: str, offset: int) -> None:
        self._lane = None if vector == "off" else registers_of(vector, "v", 1).first
        self._offset = np.uint32(offset & 0xFFFFFFFF)
        operand = parse_operand(scalar)
        self._read_scalar = None if scalar == "off" else scalar_reader(operand, U32)

    def _offsets(self, group: WaveGroup) -> NDArray[np.int64]:
        total: Any = self._offset
        if self._read_scalar:
            total = np.asarray(self._read_scalar(group) + total).reshape(-1, 1)
        if self._lane is not None:
            total = group.v_u32[self._lane] + total
        return group.active(total).astype(np.int64)

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes, as in global memory."""
        return load_private(group, self._offsets(group), size)

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> None:
        """Store values; no other lane can see them, so that there is nothing to wait for."""
        store_private(group, self._offsets(group), values, size)


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
