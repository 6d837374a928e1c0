"""Where buffer instructions access memory: a descriptor with a range, and an offset in it.

AMD's ISA manuals, "buffer resource descriptor" and "range checking". Only raw buffers are known:
without stride, index or swizzle. Each 32 bits of an access are compared with the range on their
own, as LLVM's AMDGPU usage guide says of "relaxed buffer OOB mode".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.errors import MemoryFault, UnknownInstruction
from attn_dispatch.emulation.instructions.address_spaces import load_private, store_private
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.transfers import registers_of
from attn_dispatch.emulation.launch_abi import SCRATCH_DESCRIPTOR_BASE
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["BufferSpace"]

_U32Array = NDArray[np.uint32]

#: Bits of the second word above the base address: the stride, and how the buffer is swizzled.
_STRIDE_AND_SWIZZLE = np.uint32(0xFFFF0000)
#: In the fourth word: the lane's number counts as an index; what the descriptor describes.
_ADDS_LANE, _TYPE = np.uint32(1 << 23), np.uint32(3 << 30)
#: RDNA: which range check the hardware does, 3 for that of a raw buffer.
_RANGE_CHECK = np.uint32(3 << 28)


@dataclass(frozen=True)
class _Descriptor:
    """The descriptors of the waves of a group.

    Attributes:
        base: the address, int64 for all waves or (waves, 1).
        num_bytes: of the range, int64 for all waves or (waves, 1).
        is_private: it describes private memory.
    """

    base: Any
    num_bytes: Any
    is_private: bool


class BufferSpace:
    """A buffer.

    Args:
        vector: a register with an offset, or "off".
        descriptor: four scalar registers.
        scalar: an offset that does not count in the range check: a scalar register or a constant.
        offset: in bytes.
        target: whose instruction set it is.
    """

    def __init__(
        self, vector: str, descriptor: str, scalar: str, offset: int, target: Target
    ) -> None:
        self._lane = None if vector == "off" else registers_of(vector, "v", 1).first
        self._first = registers_of(descriptor, "s", 4).first
        operand = parse_operand(scalar)
        self._read_scalar = None if scalar in ("0", "null") else scalar_reader(operand, U32)
        self._offset, self._target = np.int64(offset), target
        # Most descriptors stay the same: the last one's words and what they mean.
        self._last: tuple[bytes, _Descriptor] | None = None

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes; 0 where they are out of range."""
        buffer, addresses, inside = self._accesses(group, size)
        if buffer.is_private:
            return load_private(group, addresses, size)
        memory, waves = group.shared.memory, group.active_waves
        if inside is None:
            return memory.load(addresses, size, waves)
        values = np.zeros((max(size // 4, 1), addresses.size), np.uint32)
        for part, at, rows, chosen in _parts(addresses, size, inside):
            values[rows, chosen] = memory.load(at[chosen], part, waves[chosen])
        return values

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store values where they are in range."""
        buffer, addresses, inside = self._accesses(group, size)
        if buffer.is_private:
            store_private(group, addresses, values, size)
            return None
        memory, waves = group.shared.memory, group.active_waves
        if inside is None:
            return memory.store(addresses, values, size, waves)
        stored = None
        for part, at, rows, chosen in _parts(addresses, size, inside):
            more = memory.store(at[chosen], values[rows, chosen], part, waves[chosen])
            stored = more if stored is None else stored.joined(more)
        return stored

    def atomic(
        self,
        group: WaveGroup,
        operation: str,
        operand: _U32Array,
        compare: _U32Array | None,
        size: int,
    ) -> _U32Array:
        """Apply an atomic operation where it is in range; elsewhere the result is 0."""
        buffer, addresses, inside = self._accesses(group, size)
        if buffer.is_private:
            raise UnknownInstruction(
                f"The atomic operation {operation} on private memory is not known."
            )
        # An atomic operation is in range as a whole or not at all.
        chosen = slice(None) if inside is None else inside.all(axis=0)
        found = np.zeros((size // 4, addresses.size), np.uint32)
        expected = None if compare is None else compare[:, chosen]
        waves = group.active_waves[chosen]
        found[:, chosen] = group.shared.memory.atomic(
            operation, addresses[chosen], operand[:, chosen], expected, size, waves
        )
        return found

    def _accesses(
        self, group: WaveGroup, size: int
    ) -> tuple[_Descriptor, NDArray[np.int64], NDArray[np.bool_] | None]:
        """What the lanes in EXEC access.

        Returns:
            The descriptor; the addresses (k,), or offsets in private memory; and what is in range:
            None for everything, (1, k) for whole accesses, (words, k) for words.
        """
        buffer = self._descriptor(group)
        offsets = self._offsets(group)
        scalar: Any = None
        if self._read_scalar:
            column = np.asarray(self._read_scalar(group)).astype(np.int64).reshape(-1, 1)
            scalar = group.active(column)
        if buffer.is_private:
            # The scalar offset counts the bytes of all lanes.
            return buffer, offsets if scalar is None else offsets + scalar // group.lanes, None
        base, limit = _per_lane(group, buffer.base), _per_lane(group, buffer.num_bytes)
        whole = offsets + size <= limit
        inside = None if whole.all() else whole[None]
        if inside is not None and size > 4 and (whole != (offsets + 4 <= limit)).any():
            inside = _words_in_range(offsets, size, limit)
        if scalar is not None:
            self._check_scalar_offset(offsets, offsets + scalar, size, limit)
            offsets = offsets + scalar
        return buffer, base + offsets, inside

    def _offsets(self, group: WaveGroup) -> NDArray[np.int64]:
        """The sum (k,) of the vector's and the instruction's offset, in more than 32 bits."""
        if self._lane is None:
            return group.active(self._offset)
        offsets = group.active(group.v_u32[self._lane]).astype(np.int64)
        return offsets + self._offset if self._offset else offsets

    def _check_scalar_offset(
        self, without: NDArray[np.int64], total: NDArray[np.int64], size: int, limit: Any
    ) -> None:
        """Check that the range check has one result, with the scalar offset and without it.

        LLVM says that the scalar offset does not count, AMD's manuals of CDNA that it does.
        """
        results = [_words_in_range(offsets, size, limit) for offsets in (without, total)]
        if (results[0] != results[1]).any():
            raise MemoryFault(
                "A buffer access is in range without its scalar offset and out of range with it. "
                f"What {self._target.name} does is not known."
            )

    def _descriptor(self, group: WaveGroup) -> _Descriptor:
        words = group.s_u32[self._first : self._first + 4]
        key = words.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = key, self._decode(words)
        return self._last[1]

    def _decode(self, words: _U32Array) -> _Descriptor:
        base, high, num_bytes, last = words
        is_private = self._target.is_cdna and bool((high == SCRATCH_DESCRIPTOR_BASE).all())
        if (high & _STRIDE_AND_SWIZZLE).any():
            raise UnknownInstruction("A buffer with a stride or swizzle is not known.")
        if (last & (_ADDS_LANE | _TYPE)).any():
            raise UnknownInstruction("A buffer that adds the lane's number is not known.")
        if not self._target.is_cdna and ((last & _RANGE_CHECK) != _RANGE_CHECK).any():
            raise UnknownInstruction("Only the range check of raw buffers (3) is known.")
        address = to_u64(base, high & ~_STRIDE_AND_SWIZZLE).view(np.int64)
        return _Descriptor(_uniform(address), _uniform(num_bytes.astype(np.int64)), is_private)


def _uniform(values: NDArray[np.int64]) -> Any:
    """One value if it is the same for all waves, otherwise (waves, 1)."""
    return values[0] if (values == values[0]).all() else values[:, None]


def _per_lane(group: WaveGroup, values: Any) -> Any:
    """One value for all lanes in EXEC, or (k,)."""
    return values if np.ndim(values) == 0 else group.active(values)


def _words_in_range(offsets: NDArray[np.int64], size: int, num_bytes: Any) -> NDArray[np.bool_]:
    """(words, k): which 32 bits of an access are within the range."""
    unit = min(size, 4)
    words = [offsets + first + unit <= num_bytes for first in range(0, size, unit)]
    return np.stack(words)


def _parts(
    addresses: NDArray[np.int64], size: int, inside: NDArray[np.bool_]
) -> list[tuple[int, NDArray[np.int64], slice, NDArray[np.int64]]]:
    """An access cut into (size, addresses (k,), rows of values, lanes that are in range)."""
    whole = inside[0] if len(inside) == 1 else np.logical_and.reduce(inside)
    parts = [(size, addresses, slice(None), np.flatnonzero(whole))]
    if len(inside) > 1:  # some lanes are partly in range
        for word, chosen in enumerate(inside):
            lanes = np.flatnonzero(chosen & ~whole)
            parts.append((4, addresses + 4 * word, slice(word, word + 1), lanes))
    return parts
