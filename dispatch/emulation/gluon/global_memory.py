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
    """The memory of a launch: the storages of its tensors. Accesses outside of them are errors."""

    def __init__(self) -> None:
        self._parts: dict[int, Array] = {}

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

    def load(self, pointer: Pointer, mask: Array, other: Any) -> Tensor:
        """Elements where mask is true; memory elsewhere is not read."""
        dtype = pointer.dtype.element_ty
        result = np.zeros(mask.shape, stored_type(dtype))
        if other is not None:
            result[...] = to_bits(rounded(as_tensor(other).data, dtype), dtype)
        addresses = np.broadcast_to(pointer.data, mask.shape)
        for chosen, view, places in self._places(addresses, mask, dtype):
            result[chosen] = view[places]
        return Tensor(from_bits(result, dtype), dtype, pointer.layout)

    def store(self, pointer: Pointer, value: Tensor, mask: Array) -> None:
        """Write elements where mask is true."""
        dtype = pointer.dtype.element_ty
        shape = np.broadcast_shapes(mask.shape, value.data.shape)
        bits = np.broadcast_to(to_bits(rounded(value.data, dtype), dtype), shape)
        addresses, mask = np.broadcast_to(pointer.data, shape), np.broadcast_to(mask, shape)
        for chosen, view, places in self._places(addresses, mask, dtype):
            view[places] = bits[chosen]

    def _places(
        self, addresses: Array, mask: Array, dtype: Any
    ) -> Iterator[tuple[Array, Array, Array]]:
        """(which elements, a part of the memory as this dtype, where they are in it)."""
        width, left = stored_type(dtype).itemsize, mask.copy()
        for start, part in self._parts.items():
            inside = left & (addresses >= start) & (addresses + width <= start + len(part))
            if inside.any():
                offsets = addresses[inside] - start
                if (offsets % width).any():
                    raise EmulationError(f"An address is no multiple of {width} bytes.")
                usable = len(part) // width * width
                yield inside, part[:usable].view(stored_type(dtype)), offsets // width
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
