"""Where buffer instructions access memory: a descriptor with a range, and an offset in it.

AMD's ISA manuals, "buffer resource descriptor" and "range checking". Only raw buffers are known:
without stride, index or swizzle. Each 32 bits of an access are compared with the range on their
own, as LLVM's AMDGPU usage guide says of "relaxed buffer OOB mode".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.address_spaces import load_private, store_private
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.transfers import integer_modifier, registers_of
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


class _Descriptor(NamedTuple):
    """The descriptors of the waves of a group: address and bytes of the range, int64 (waves, 1)."""

    base: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    is_private: bool


class BufferSpace:
    """A buffer, with the same methods as the spaces in address_spaces.py.

    Args:
        instruction: with `offset:`, and `offen` if there is a vector register.
        where: its operands: a register with an offset, or "off"; four scalar registers with a
            descriptor; a scalar offset, which is known for private memory only.
        target: whose instruction set it is.
    """

    def __init__(self, instruction: Instruction, where: list[str], target: Target) -> None:
        vector, descriptor, scalar = where
        if ("offen" in instruction.modifiers) != (vector != "off"):
            raise UnknownInstruction(f"the offset {vector} with or without offen")
        self._lane = None if vector == "off" else registers_of(vector, "v", 1).first
        self._first = registers_of(descriptor, "s", 4).first
        operand = parse_operand(scalar)
        self._read_scalar = None if scalar in ("0", "null") else scalar_reader(operand, U32)
        self._offset, self._target = np.int64(integer_modifier(instruction, "offset")), target
        # Most descriptors stay the same: the last one's words and what they mean.
        self._last: tuple[bytes, _Descriptor] | None = None

    def load(self, group: WaveGroup, size: int) -> _U32Array:
        """Values of `size` bytes; 0 where they are out of range."""
        buffer, offsets = self._descriptor(group), self._offsets(group)
        if buffer.is_private:
            return load_private(group, self._private_offsets(group, offsets), size)
        memory, waves = group.shared.memory, group.active_waves
        values = np.zeros((max(size // 4, 1), waves.size), np.uint32)
        for part, rows, lanes, at in self._parts(group, buffer, offsets, size):
            values[rows, lanes] = memory.load(at[lanes], part, waves[lanes])
        return values

    def store(self, group: WaveGroup, values: _U32Array, size: int) -> StoresInFlight | None:
        """Store values where they are in range."""
        buffer, offsets = self._descriptor(group), self._offsets(group)
        if buffer.is_private:
            store_private(group, self._private_offsets(group, offsets), values, size)
            return None
        memory, waves = group.shared.memory, group.active_waves
        stored = StoresInFlight()
        for part, rows, lanes, at in self._parts(group, buffer, offsets, size):
            stored = stored.joined(memory.store(at[lanes], values[rows, lanes], part, waves[lanes]))
        return stored

    def atomic(self, group: WaveGroup, operation: str, operand: _U32Array, size: int) -> _U32Array:
        """Apply an atomic operation where it is in range as a whole; elsewhere the result is 0."""
        buffer, waves = self._descriptor(group), group.active_waves
        if buffer.is_private:
            raise UnknownInstruction("An atomic operation on private memory is not known.")
        _, _, lanes, at = next(self._parts(group, buffer, self._offsets(group), size))
        found = np.zeros((size // 4, waves.size), np.uint32)
        found[:, lanes] = group.shared.memory.atomic(
            operation, at[lanes], operand[:, lanes], size, waves[lanes]
        )
        return found

    def _offsets(self, group: WaveGroup) -> NDArray[np.int64]:
        """The sum of the vector's and the instruction's offset, in more than 32 bits."""
        if self._lane is None:
            return np.broadcast_to(self._offset, group.exec.shape)
        offsets: NDArray[np.int64] = group.v_u32[self._lane].astype(np.int64) + self._offset
        return offsets

    def _private_offsets(self, group: WaveGroup, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k,); the scalar offset counts the bytes of all lanes."""
        if self._read_scalar:
            scalar = np.asarray(self._read_scalar(group)).astype(np.int64).reshape(-1, 1)
            offsets = offsets + scalar // group.lanes
        return group.active(offsets)

    def _parts(
        self, group: WaveGroup, buffer: _Descriptor, offsets: NDArray[np.int64], size: int
    ) -> Iterator[tuple[int, slice, Any, NDArray[np.int64]]]:
        """What is in range: size, rows of values, lanes of those in EXEC, addresses (k,).

        Whole accesses come first, then single words of those that are partly in range.
        """
        if self._read_scalar:
            raise UnknownInstruction(
                "A buffer access with a scalar offset is not known: LLVM says that it does not "
                "count in the range check, AMD's manuals of CDNA that it does."
            )
        addresses = group.active(buffer.base + offsets)
        whole = group.active(offsets + size <= buffer.num_bytes)
        if whole.all():
            yield size, slice(None), slice(None), addresses
            return
        yield size, slice(None), np.flatnonzero(whole), addresses
        for word in range(size // 4 if size > 4 else 0):
            inside = group.active(offsets + 4 * word + 4 <= buffer.num_bytes) & ~whole
            if inside.any():
                rows = slice(word, word + 1)
                yield 4, rows, np.flatnonzero(inside), addresses + 4 * word

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
        return _Descriptor(address[:, None], num_bytes.astype(np.int64)[:, None], is_private)
