"""Shared memory of an interpreted program: bytes, where layouts place elements, and barriers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.ordering import Clock, join
from attn_dispatch.emulation.gluon.values import Array, Tensor, from_bits, stored_type, to_bits

__all__ = ["Allocation", "Barrier", "Barriers", "SharedMemory", "allocate"]


@functools.lru_cache(maxsize=256)
def _offsets(shape: tuple[int, ...], width: int, layout: Any) -> Array:
    """The byte of each element, from the beginning of the allocation.

    With NVMMASharedLayout the columns of a tile are in blocks as wide as the swizzle, one block
    after the other; in each, the 16-byte chunks of a row are permuted by the row's number (PTX ISA,
    "Tensor swizzling modes"). All else is in order.
    """
    count = int(np.prod(shape))
    if isinstance(layout, gl.SwizzledSharedLayout):
        if layout.max_phase != 1 or list(layout.order) != list(range(len(layout.order)))[::-1]:
            raise EmulationError(f"The interpreter of Gluon does not have {layout}.")
    elif not isinstance(layout, gl.NVMMASharedLayout):
        raise EmulationError(f"The interpreter of Gluon has no shared memory in {layout}.")
    if not getattr(layout, "swizzle_byte_width", 0):
        in_order: Array = np.arange(count).reshape(shape) * width
        return in_order
    span = layout.swizzle_byte_width
    outer, columns = shape[: -layout.rank], shape[-1]
    rows = int(np.prod(shape[-layout.rank : -1]))
    per_block = span // width
    if columns % per_block:
        raise EmulationError(f"{columns} columns are no multiple of the {per_block} of a block.")
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    block, byte = column // per_block, column % per_block * width
    turn = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[span]
    tile = block * (rows * span) + row * span + ((byte // 16) ^ turn) * 16 + byte % 16
    number = np.arange(int(np.prod(outer)))[:, None, None]
    placed: Array = (number * (rows * columns * width) + tile).reshape(shape)
    return placed


@dataclass(eq=False)
class Allocation:
    """Bytes of shared memory.

    Attributes:
        data: the bytes.
        unfenced: for each byte that begins an element, who stored it last; 0 if a fence came since,
            so that copies and products see it.
        writer: the number of the task that runs now; from 1 on.
    """

    data: Array
    unfenced: Array
    writer: Callable[[], int]

    def fence(self) -> None:
        """What the running task has stored can be seen by copies and products."""
        self.unfenced[self.unfenced == self.writer()] = 0


@dataclass
class SharedMemory:
    """A descriptor: a part of an allocation, under a shape, a dtype and a layout."""

    memory: Allocation
    offsets: Array
    dtype: Any
    layout: Any

    @property
    def shape(self) -> list[int]:
        """Elements in each dimension."""
        return list(self.offsets.shape)

    @property
    def type(self) -> SharedMemory:
        """What kernels ask for a shape and a layout."""
        return self

    def index(self, i: Any) -> SharedMemory:
        """One of the first dimension."""
        number = int(i)
        if not 0 <= number < self.offsets.shape[0]:
            raise EmulationError(f"Index {number} is outside of {self.shape}.")
        return SharedMemory(self.memory, self.offsets[number], self.dtype, self.layout)

    def slice(self, start: Any, length: int, dim: int = 0) -> SharedMemory:
        """A part of one dimension."""
        if not 0 <= int(start) <= self.offsets.shape[dim] - length:
            raise EmulationError(f"[{int(start)}, + {length}) is outside of {self.shape}.")
        part = np.take(self.offsets, np.arange(int(start), int(start) + length), axis=dim)
        return SharedMemory(self.memory, part, self.dtype, self.layout)

    def permute(self, order: tuple[int, ...]) -> SharedMemory:
        """The same elements with dimensions in another order."""
        return SharedMemory(self.memory, self.offsets.transpose(order), self.dtype, self.layout)

    def reinterpret(self, dtype: Any, shape: Any, layout: Any) -> SharedMemory:
        """The same bytes under another shape, dtype and layout."""
        width, begin = stored_type(dtype).itemsize, int(self.offsets.min())
        size = self.offsets.size * stored_type(self.dtype).itemsize
        if int(np.prod(shape)) * width != size:
            raise EmulationError(
                f"{list(shape)} of {dtype} are not the {size} bytes of {self.shape}."
            )
        offsets = begin + _offsets(tuple(map(int, shape)), width, layout)
        return SharedMemory(self.memory, offsets, dtype, layout)

    def load(self, layout: Any = None) -> Tensor:
        """All elements, as a tensor."""
        stored = self._elements()[self._places()]
        return Tensor(from_bits(stored, self.dtype), self.dtype, layout)

    def store(self, value: Tensor) -> None:
        """Write all elements, as the running task."""
        self._write(value, self.memory.writer())

    def put(self, value: Tensor) -> None:
        """Write all elements, as an asynchronous copy."""
        self._write(value, 0)

    def _write(self, value: Tensor, writer: int) -> None:
        if value.dtype != self.dtype or list(value.shape) != self.shape:
            raise EmulationError(
                f"{value.shape} of {value.dtype} were stored in {self.shape} of {self.dtype}."
            )
        self._elements()[self._places()] = to_bits(value.data, self.dtype)
        self.memory.unfenced[self.offsets] = writer

    def check_fenced(self) -> None:
        """Raise EmulationError if a product would not see what was stored, for lack of a fence."""
        if self.memory.unfenced[self.offsets].any():
            raise EmulationError(
                f"A product reads {self.shape} of {self.dtype} in shared memory that was stored "
                "without a fence_async_shared since."
            )

    def _elements(self) -> Array:
        elements: Array = self.memory.data.view(stored_type(self.dtype))
        return elements

    def _places(self) -> Array:
        places: Array = self.offsets // stored_type(self.dtype).itemsize
        return places

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return int(self.offsets.size * stored_type(self.dtype).itemsize)


@dataclass
class Barrier:
    """An mbarrier (PTX ISA): a phase ends when all have arrived and all expected bytes too."""

    name: str
    count: int = 0
    pending: int = 0
    bytes_left: int = 0
    phase: int = 0
    is_fenced: bool = False
    released: dict[int, int] = field(default_factory=dict)

    def init(self, count: int) -> None:
        """Set how many arrivals end a phase."""
        if self.count:
            raise EmulationError(f"Barrier {self.name} was initialized twice.")
        self.count = self.pending = count

    def arrive(self, number: int = 1, expected: int = 0, clock: Clock | None = None) -> None:
        """Arrive, and announce bytes. Those who wait see what a task with this clock has stored."""
        if not self.count:
            raise EmulationError(f"Barrier {self.name} was used before it was initialized.")
        if self.pending < number:
            raise EmulationError(f"More than {self.count} arrived at {self.name} in one phase.")
        if clock is not None:
            join(self.released, clock.all_seen())
        self.pending -= number
        self.bytes_left += expected
        self._end_phase()

    def check_fenced(self) -> None:
        """Raise EmulationError if a copy would not see that it was initialized."""
        if not self.is_fenced:
            raise EmulationError(
                f"A copy reports to barrier {self.name}, which was initialized without a "
                "fence_async_shared since."
            )

    def complete(self, number: int) -> None:
        """Bytes have landed."""
        self.bytes_left -= number
        if self.bytes_left < 0:
            raise EmulationError(f"More bytes landed than {self.name} expects.")
        self._end_phase()

    def has_ended(self, parity: int) -> bool:
        """What a wait for this parity of a phase waits for."""
        return self.phase % 2 != parity

    def _end_phase(self) -> None:
        if not self.pending and not self.bytes_left:
            self.phase += 1
            self.pending = self.count


@dataclass
class Barriers:
    """An allocation of barriers."""

    name: str
    items: list[Barrier] = field(default_factory=list)

    def index(self, i: Any) -> Barrier:
        """One of them."""
        return self.items[int(i)]


def allocate(
    name: str, dtype: Any, shape: list[int], layout: Any, writer: Callable[[], int]
) -> Any:
    """An allocation, whose bytes are those of NaN; or barriers, for their layout.

    `writer` is that of `Allocation`.
    """
    if type(layout).__name__ == "MBarrierLayout":
        if len(shape) == 1:
            return Barrier(name)
        return Barriers(name, [Barrier(f"{name}[{i}]") for i in range(shape[0])])
    width = stored_type(dtype).itemsize
    size = int(np.prod(shape)) * width
    memory = Allocation(np.full(size, 0xFF, np.uint8), np.zeros(size, np.uint16), writer)
    return SharedMemory(memory, _offsets(tuple(map(int, shape)), width, layout), dtype, layout)
