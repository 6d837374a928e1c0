"""What a Gluon kernel finds under the names of `gl`, `mbarrier` and `tma`, as Python functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon import products, ptx
from attn_dispatch.emulation.gluon.global_memory import Descriptor, Memory
from attn_dispatch.emulation.gluon.ordering import join
from attn_dispatch.emulation.gluon.scheduler import Scheduler, Task
from attn_dispatch.emulation.gluon.shared_memory import Barrier, Barriers, SharedMemory, allocate
from attn_dispatch.emulation.gluon.values import (
    Array,
    Pointer,
    Tensor,
    as_tensor,
    combine,
    rounded,
)

__all__ = ["Language", "Program"]


@dataclass
class Program:
    """A program of the grid.

    Attributes:
        grid, ids: programs, and which one, in each dimension.
        allocations: of shared memory.
    """

    scheduler: Scheduler
    memory: Memory
    grid: tuple[int, int, int]
    ids: tuple[int, int, int]
    allocations: list[Any] = field(default_factory=list)

    def allocate(self, dtype: Any, shape: Any, layout: Any) -> Any:
        """Shared memory, or barriers."""
        name = f"allocation {len(self.allocations) + 1} of program {self.ids}"
        found = allocate(name, dtype, list(map(int, shape)), layout, self._running)
        self.allocations.append(found)
        return found

    def _running(self) -> int:
        return self.scheduler.task.clock.number

    def fence(self) -> None:
        """What the running task has stored can be seen by copies and products."""
        for each in self.allocations:
            if isinstance(each, SharedMemory):
                each.memory.fence()
            else:
                for barrier in each.items if isinstance(each, Barriers) else [each]:
                    barrier.is_fenced = bool(barrier.count)


def _reduced(x: Tensor, axis: int, function: Callable[..., Array]) -> Tensor:
    data = function(x.data, axis=axis)
    layout = gl.SliceLayout(axis, x.layout) if x.data.ndim > 1 else None
    return Tensor(data, x.dtype, layout)


def _elementwise(function: Callable[[Array], Array]) -> Callable[[Any], Tensor]:
    def apply(x: Any) -> Tensor:
        value = as_tensor(x)
        return Tensor(function(value.data).astype(value.data.dtype), value.dtype, value.layout)

    return apply


class Language:
    """The functions, bound to a scheduler; `gl`'s layouts and dtypes are as they are."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        value = getattr(gl, name)
        if isinstance(value, (type, gl.dtype)):
            return value
        raise EmulationError(f"The interpreter of Gluon does not have gl.{name}.")

    @property
    def _task(self) -> Task:
        return self._scheduler.task

    @property
    def _program(self) -> Program:
        program: Program = self._task.program
        return program

    # Values

    @staticmethod
    def constexpr(value: Any) -> Any:
        """A constant."""
        return value

    @staticmethod
    def static_range(*args: Any) -> range:
        """Of a loop that is unrolled."""
        return range(*map(int, args))

    @staticmethod
    def static_assert(condition: Any, message: str = "") -> None:
        """Fail if it is false."""
        if not condition:
            raise EmulationError(f"A static assertion failed: {message}.")

    to_tensor = staticmethod(as_tensor)

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        """[start, end) as int32."""
        return Tensor(np.arange(start, end, dtype=np.int32), gl.int32, layout)

    @staticmethod
    def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
        """One number in all elements."""
        data = np.broadcast_to(rounded(as_tensor(value).data, dtype), tuple(map(int, shape)))
        return Tensor(data.copy(), dtype, layout)

    def zeros(self, shape: Any, dtype: Any, layout: Any = None) -> Tensor:
        """Zeros."""
        return self.full(shape, 0, dtype, layout)

    def zeros_like(self, x: Tensor) -> Tensor:
        """Zeros."""
        return self.full(x.shape, 0, x.dtype, x.layout)

    @staticmethod
    def convert_layout(x: Tensor, layout: Any, **_: Any) -> Tensor:
        """The same values in other threads."""
        return Tensor(x.data, x.dtype, layout)

    @staticmethod
    def where(condition: Any, one: Any, two: Any) -> Tensor:
        """One value or the other."""
        both = combine(lambda a, b: np.broadcast_arrays(a, b)[0], one, two)
        a = rounded(as_tensor(one).data, both.dtype)
        b = rounded(as_tensor(two).data, both.dtype)
        test = as_tensor(condition)
        layout = test.layout if test.data.ndim >= both.data.ndim else both.layout
        return Tensor(np.where(test.data, a, b), both.dtype, layout or both.layout)

    @staticmethod
    def maximum(one: Any, two: Any) -> Tensor:
        """Of a NaN and a number, the number, as fmaxf."""
        return combine(np.fmax, one, two)

    @staticmethod
    def minimum(one: Any, two: Any) -> Tensor:
        """Of a NaN and a number, the number."""
        return combine(np.fmin, one, two)

    exp2 = staticmethod(_elementwise(np.exp2))
    floor = staticmethod(_elementwise(np.floor))
    log2 = staticmethod(_elementwise(np.log2))
    exp = staticmethod(_elementwise(np.exp))
    abs = staticmethod(_elementwise(np.abs))

    @staticmethod
    def max(x: Tensor, axis: int) -> Tensor:
        """Of one dimension."""
        return _reduced(x, axis, np.fmax.reduce)

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        """Of one dimension; of integers of fewer than 32 bits as int32."""
        if not x.dtype.is_floating() and x.dtype.primitive_bitwidth < 32:
            x = x.to(gl.int32)
        return _reduced(x, axis, lambda data, axis: data.sum(axis, dtype=data.dtype))

    @staticmethod
    def associative_scan(x: Tensor, axis: int, combine_fn: Callable[..., Tensor]) -> Tensor:
        """For each element, those up to it combined, along one dimension: by doubling."""
        data, step = np.moveaxis(x.data, axis, 0).copy(), 1
        while step < len(data):
            earlier, later = (Tensor(part, x.dtype) for part in (data[:-step], data[step:]))
            data = np.concatenate([data[:step], combine_fn(earlier, later).data])
            step *= 2
        return Tensor(np.moveaxis(data, 0, axis), x.dtype, x.layout)

    @staticmethod
    def permute(x: Any, order: tuple[int, ...]) -> Any:
        """Dimensions in another order."""
        return Tensor(x.data.transpose(order), x.dtype, None)

    @staticmethod
    def reshape(x: Tensor, shape: Any) -> Tensor:
        """Another shape."""
        return Tensor(x.data.reshape([int(n) for n in shape]), x.dtype, None)

    @staticmethod
    def expand_dims(x: Tensor, axis: int) -> Tensor:
        """One more dimension."""
        return Tensor(np.expand_dims(x.data, axis), x.dtype, getattr(x.layout, "parent", None))

    @staticmethod
    def join(one: Tensor, two: Tensor) -> Tensor:
        """Both in a new last dimension."""
        return Tensor(np.stack([one.data, two.data], -1), one.dtype, None)

    @staticmethod
    def inline_asm_elementwise(
        asm: str, constraints: str, args: Sequence[Any], dtype: Any, **_: Any
    ) -> Any:
        """PTX, see `ptx.py`."""
        return ptx.elementwise(asm, constraints, [as_tensor(each) for each in args], dtype)

    # Memory

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Tensor:
        """Elements of memory."""
        chosen = np.array(True) if mask is None else as_tensor(mask).data
        shape = np.broadcast_shapes(pointer.data.shape, chosen.shape)
        mask = np.broadcast_to(chosen, shape)
        return self._program.memory.load(pointer, mask, other, self._task.clock)

    def store(self, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
        """Write elements of memory."""
        chosen = np.array(True) if mask is None else as_tensor(mask).data
        shape = np.broadcast_shapes(pointer.data.shape, chosen.shape)
        mask = np.broadcast_to(chosen, shape)
        self._program.memory.store(pointer, as_tensor(value), mask, self._task.clock)

    def atomic_add(
        self, pointer: Pointer, value: Any, *, sem: str = "acq_rel", scope: str = "gpu"
    ) -> Tensor:
        """Add to one number of memory; return what it was. Others may run before.

        Adding 0 again and again is a wait: what it finds twice is waited for to change.
        """
        if pointer.data.shape != ():
            raise EmulationError("Atomics are interpreted on single numbers.")
        task, memory, value = self._task, self._program.memory, as_tensor(value)
        found = functools.partial(memory.number_at, pointer)
        self._scheduler.wait(lambda: True, "its turn")
        if not value.data and task.polled == found():
            why = f"a change of the {task.polled[1]} at {task.polled[0]:#x}"
            self._scheduler.wait(lambda: task.polled != found(), why)
        task.polled = found()
        memory.releases.atomic(task.clock, task.polled[0], sem, scope)
        return memory.add_to(pointer, value)

    def program_id(self, axis: int) -> Tensor:
        """Which program this is."""
        return as_tensor(self._program.ids[axis])

    def num_programs(self, axis: int) -> Tensor:
        """Programs of the grid."""
        return as_tensor(self._program.grid[axis])

    def allocate_shared_memory(self, dtype: Any, shape: Any, layout: Any) -> Any:
        """Shared memory, or barriers."""
        return self._program.allocate(dtype, shape, layout)

    def barrier(self, **_: Any) -> None:
        """Of the threads of one task, which run together here."""
        self._task.clock.barrier()

    thread_barrier = barrier

    def warp_specialize(self, functions: Any, warps: Any, registers: Any) -> None:
        """Run functions at the same time, and wait for all."""
        if len(warps) != len(functions) - 1 or len(registers) != len(warps):
            raise EmulationError("warp_specialize needs warps and registers for all but the first.")
        tasks = []
        for i, (function, args) in enumerate(functions):
            name = f"{function.__name__} ({i}) of program {self._program.ids}"
            run = functools.partial(function, *args)
            tasks.append(Task(name, self._program, run))
        own = self._task.clock
        for each in tasks:
            self._scheduler.start(each)
            each.clock.seen = own.all_seen()
        self._scheduler.wait(lambda: all(each.has_ended for each in tasks), "its warps")
        for each in tasks:
            join(own.seen, each.clock.all_seen())

    # Barriers, copies and products

    def fence_async_shared(self, **_: Any) -> None:
        """What this task has stored can be seen by copies and products."""
        self._program.fence()

    def init_barrier(self, barrier: Barrier, count: int, **_: Any) -> None:
        """mbarrier.init."""
        barrier.init(int(count))

    def expect(self, barrier: Barrier, size: int, pred: Any = True, **_: Any) -> None:
        """mbarrier.expect: announce bytes, and arrive."""
        if pred:
            barrier.arrive(1, int(size), self._task.clock)

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True, **_: Any) -> None:
        """mbarrier.arrive."""
        if pred:
            barrier.arrive(int(count), 0, self._task.clock)

    def wait_barrier(self, barrier: Barrier, phase: Any, pred: Any = True, **_: Any) -> None:
        """mbarrier.wait."""
        parity = int(phase)
        if pred:
            why = f"phase {parity} of {barrier.name}"
            self._scheduler.wait(lambda: barrier.has_ended(parity), why)
            join(self._task.clock.seen, barrier.released)

    def load_tile(
        self,
        desc: Descriptor,
        coord: Any,
        barrier: Barrier,
        result: SharedMemory,
        pred: Any = True,
        **_: Any,
    ) -> None:
        """tma.async_copy_global_to_shared."""
        if not pred:
            return
        barrier.check_fenced()
        shape, first = desc.block_type.shape, [int(each) for each in coord]
        if list(result.shape) != list(shape) or result.dtype != desc.dtype:
            raise EmulationError(f"A box of {shape} was loaded to {result.shape}.")

        def land() -> None:
            box = desc.memory.box(desc.address, desc.strides, desc.shape, first, shape, desc.dtype)
            result.put(Tensor(box, desc.dtype))
            barrier.complete(result.num_bytes)

        self._scheduler.copy(land)

    def warpgroup_mma(
        self, a: Any, b: SharedMemory, acc: Tensor, *, use_acc: bool = True,
        is_async: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        """A product of matrices."""
        return products.issue(self._task, a, b, acc, use_acc=bool(use_acc), waits=not is_async)

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Any = None) -> Any:
        """Wait for products; return `deps`."""
        if len(self._task.products) > int(num_outstanding):
            self._scheduler.pause()
        products.wait(self._task, int(num_outstanding))
        return deps[0] if len(deps) == 1 else tuple(deps)
