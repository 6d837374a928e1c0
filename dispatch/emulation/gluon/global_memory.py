"""The memory of a launch as an interpreted Gluon kernel reads it: by pointers, and by TMA."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.ordering import Clock, Releases, Stamps
from attn_dispatch.emulation.gluon.values import (
    Array,
    Pointer,
    Tensor,
    as_tensor,
    from_bits,
    rounded,
    stored_type,
    to_bits,
)

__all__ = ["Descriptor", "Memory"]

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int32: gl.int32,
    torch.int64: gl.int64,
    torch.int8: gl.int8,
    torch.uint8: gl.uint8,
    torch.bool: gl.int1,
}


class Memory:
    """The memory of a launch: the storages of its tensors. Accesses outside of them are errors.

    Attributes:
        names: of tasks by their numbers, for messages.
        releases: see `ordering.Releases`.
    """

    def __init__(self) -> None:
        self._parts: dict[int, Array] = {}
        self._stamps: dict[int, Stamps] = {}
        self.names: dict[int, str] = {}
        self.releases = Releases()

    def add(self, tensor: Any) -> None:
        """Make the memory of a tensor accessible."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.add_bytes(storage.data_ptr(), storage.nbytes())

    def add_bytes(self, address: int, size: int) -> None:
        """Make bytes accessible."""
        if len(self._parts.get(address, ())) < size:
            block = (ctypes.c_uint8 * size).from_address(address)
            self._parts[address] = np.ctypeslib.as_array(block)

    def pointer(self, tensor: Any) -> Pointer:
        """What a kernel is given for a tensor."""
        self.add(tensor)
        return Pointer(tensor.data_ptr(), _DTYPES.get(tensor.dtype, gl.uint8))

    def load(self, pointer: Pointer, mask: Array, other: Any, clock: Clock | None = None) -> Tensor:
        """Elements where mask is true; memory elsewhere is not read.

        With a task's clock it is an error if others stored what the task need not see.
        """
        dtype = pointer.dtype.element_ty
        result = np.zeros(mask.shape, stored_type(dtype))
        if other is not None:
            result[...] = to_bits(rounded(as_tensor(other).data, dtype), dtype)
        addresses = np.broadcast_to(pointer.data, mask.shape)
        for start, chosen, view, places in self._places(addresses, mask, dtype):
            result[chosen] = view[places]
            if clock is not None and start in self._stamps:
                self._stamps[start].check(clock, places * view.itemsize, self.names)
        return Tensor(from_bits(result, dtype), dtype, pointer.layout)

    def store(self, pointer: Pointer, value: Tensor, mask: Array, clock: Clock) -> None:
        """Write elements where mask is true, as the task with this clock."""
        dtype = pointer.dtype.element_ty
        shape = np.broadcast_shapes(mask.shape, value.data.shape)
        bits = np.broadcast_to(to_bits(rounded(value.data, dtype), dtype), shape)
        addresses, mask = np.broadcast_to(pointer.data, shape), np.broadcast_to(mask, shape)
        for start, chosen, view, places in self._places(addresses, mask, dtype):
            view[places] = bits[chosen]
            if start not in self._stamps:
                self._stamps[start] = Stamps(len(self._parts[start]))
            self._stamps[start].store(clock, places * view.itemsize)

    def number_at(self, pointer: Pointer) -> tuple[int, int]:
        """(address, integer there)."""
        return int(pointer.data), int(self.load(pointer, np.array(True), None))

    def add_to(self, pointer: Pointer, value: Tensor) -> Tensor:
        """Add to one number, at once; return what it was."""
        before = self.load(pointer, np.array(True), None)
        dtype, addresses = pointer.dtype.element_ty, pointer.data[None]
        for _, _, view, places in self._places(addresses, np.array([True]), dtype):
            view[places] = to_bits(rounded(before.data + value.data, dtype), dtype)
        return before

    def _places(
        self, addresses: Array, mask: Array, dtype: Any
    ) -> Iterator[tuple[int, Array, Array, Array]]:
        """(start of a part, which elements are in it, the part as this dtype, where they are)."""
        width, left = stored_type(dtype).itemsize, mask.copy()
        for start, part in self._parts.items():
            inside = left & (addresses >= start) & (addresses + width <= start + len(part))
            if inside.any():
                offsets = addresses[inside] - start
                if (offsets % width).any():
                    raise EmulationError(f"An address is no multiple of {width} bytes.")
                usable = len(part) // width * width
                yield start, inside, part[:usable].view(stored_type(dtype)), offsets // width
                left &= ~inside
        if left.any():
            raise EmulationError(
                f"{int(left.sum())} addresses are outside of all tensors, e.g. "
                f"{int(addresses[left].flat[0]):#x}."
            )

    def box(self, address: int, steps: Sequence[int], limits: Sequence[int], first: list[int],
            shape: Sequence[int], dtype: Any) -> Array:  # fmt: skip
        """A box of a matrix as TMA reads it: zeros outside. Steps are in elements."""
        width = stored_type(dtype).itemsize
        at, mask = np.array(address, np.int64), np.array(True)
        for start, size, step, limit in zip(first, shape, steps, limits, strict=True):
            index = start + np.arange(size)
            at = at[..., None] + index * step * width
            mask = mask[..., None] & (index >= 0) & (index < limit)
        return self.load(Pointer(at, dtype), mask, None).data


class Descriptor:
    """A TMA descriptor in a kernel."""

    def __init__(self, host: Any, memory: Memory) -> None:
        base = host.base
        self.dtype = _DTYPES[base.dtype]
        self.address = base.data_ptr()
        self.shape, self.strides = list(host.shape), list(host.strides)
        self.layout = host.layout
        self.block_type = types.SimpleNamespace(shape=list(host.block_shape))
        self.memory = memory
        if isinstance(base, torch.Tensor):
            memory.add(base)
        else:
            elements = 1 + sum(
                (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
            )
            memory.add_bytes(self.address, elements * stored_type(self.dtype).itemsize)
        if self.address % 16:
            raise EmulationError("TMA reads from multiples of 16 bytes.")
