"""Runs Gluon kernels for Hopper on the CPU: their Python functions, with other names for `gl`."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from triton.experimental.gluon import _runtime
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import ConstexprFunction, JITFunction

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.global_memory import Descriptor, Memory
from attn_dispatch.emulation.gluon.language import Language, Program
from attn_dispatch.emulation.gluon.scheduler import Scheduler, Task
from attn_dispatch.emulation.gluon.triton_interpreter import triton_interpreted
from attn_dispatch.emulation.gluon.values import Tensor, as_tensor

__all__ = ["interpret", "interpreted"]

_NO_LIMIT = 1 << 30


class _Aggregate:
    """An instance of a class of a kernel; its methods are interpreted."""

    def __init__(self, cls: _AggregateClass, values: Sequence[Any]) -> None:
        self._cls = cls
        if len(values) != len(cls.fields):
            raise EmulationError(f"{cls.__name__} has {len(cls.fields)} fields.")
        for name, value in zip(cls.fields, values, strict=True):
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        method = self._cls.method(name)
        return lambda *args, **kwargs: method(self, *args, **kwargs)


class _AggregateClass:
    def __init__(self, cls: Any, module: _Module) -> None:
        self.__name__ = cls.__name__
        self.fields = cls.FIELDS
        self._cls, self._module = cls, module

    def method(self, name: str) -> Any:
        found = getattr(self._cls, name, None)
        if not isinstance(found, JITFunction):
            raise AttributeError(f"{self.__name__} has no {name!r}")
        return self._module.translated(found)

    def __call__(self, *values: Any) -> _Aggregate:
        return _Aggregate(self, values)


class _Module:
    """Translates what kernels name, once each."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._known: dict[int, tuple[Any, Any]] = {}
        barriers = types.SimpleNamespace(
            init=language.init_barrier,
            expect=language.expect,
            arrive=language.arrive,
            wait=language.wait_barrier,
            MBarrierLayout=hopper.mbarrier.MBarrierLayout,
        )
        descriptor: Any = gl.shared_memory_descriptor
        copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
        barrier = getattr(gl, "thread_barrier", None) or gl.barrier
        reinterpret = getattr(descriptor, "reinterpret", None) or descriptor._reinterpret
        for real, own in (
            (gl, language),
            (hopper.mbarrier, barriers),
            (copy, language.load_tile),
            (barrier, language.barrier),
            (reinterpret, lambda memory, *args: memory.reinterpret(*args)),
            (hopper.fence_async_shared, language.fence_async_shared),
            (hopper.warpgroup_mma, language.warpgroup_mma),
            (hopper.warpgroup_mma_wait, language.warpgroup_mma_wait),
        ):
            self._known[id(real)] = (real, own)

    def translated(self, value: Any) -> Any:
        """What a name of a kernel is when it is interpreted."""
        if isinstance(value, gl.constexpr):
            return self.translated(value.value)
        found = self._known.get(id(value))
        if found is None:
            found = self._known[id(value)] = (value, self._translate(value))
        return found[1]

    def _translate(self, value: Any) -> Any:
        if isinstance(value, ConstexprFunction):
            return value.fn
        if isinstance(value, JITFunction):
            return self._function(value)
        if getattr(value, "__triton_aggregate__", False):
            return _AggregateClass(value, self)
        if isinstance(value, (int, float, str, bool, tuple, type(None), type)):
            return value
        if getattr(value, "__triton_builtin__", False) or isinstance(value, types.ModuleType):
            raise EmulationError(f"The interpreter of Gluon does not have {value!r}.")
        return value

    def _function(self, kernel: Any) -> Callable[..., Any]:
        function = kernel.fn
        names: dict[str, Any] = {"range": _range, "__builtins__": __builtins__}

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(names) == 2:
                for name in _names_of(function.__code__):
                    if name in function.__globals__:
                        names[name] = self.translated(function.__globals__[name])
            return own(*args, **kwargs)

        defaults = tuple(map(self.translated, function.__defaults__ or ())) or None
        own = types.FunctionType(
            function.__code__, names, function.__name__, defaults, function.__closure__
        )
        call.__name__ = function.__name__
        return call


def _names_of(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names_of, inner))


def _range(*args: Any) -> Iterator[Tensor]:
    """A loop of a kernel: its variable is a number of the kernel."""
    return map(as_tensor, range(*map(int, args)))


def interpret(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    *,
    seed: int = 0,
    lateness: float = 0.5,
) -> None:
    """Run a launch: all programs at the same time, in an order that depends on the seed.

    Args:
        kernel: a @gluon.jit function.
        grid: programs in each dimension.
        args: its arguments up to the first constexpr. Tensors are on the CPU, and changed in place.
        constants: its constexpr arguments, by name.
        seed, lateness: see `Scheduler`.

    Raises:
        EmulationError: programs wait for each other, access what no tensor has, use a product
            before it was waited for, or use what is not interpreted.
    """
    scheduler, memory = Scheduler(seed, lateness), Memory()
    module = _Module(Language(scheduler))
    values = [_argument(each, memory) for each in args]
    function = module.translated(kernel)
    programs = [*grid, 1, 1][:3]
    for ids in itertools.product(*map(range, programs)):
        program = Program(scheduler, memory, tuple(programs), ids)  # type: ignore[arg-type]

        def run() -> None:
            function(*values, **constants)

        scheduler.start(Task(f"program {ids}", program, run))
    scheduler.run()


def _argument(value: Any, memory: Memory) -> Any:
    if isinstance(value, torch.Tensor):
        return memory.pointer(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value, memory)
    return as_tensor(value)


@contextlib.contextmanager
def interpreted(
    *, seed: int = 0, lateness: float = 0.5, programs: int | None = None
) -> Iterator[list[str]]:
    """Inside of this, launches of Gluon kernels with CPU tensors are interpreted.

    So are those of Triton kernels, by Triton's own interpreter, also if Triton compiles kernels in
    this process, as it does without TRITON_INTERPRET=1. All tensors must be on the CPU.

    Args:
        seed, lateness: see `Scheduler`.
        programs: launch at most this many in the first dimension; for persistent kernels.

    Yields:
        The names of the Gluon kernels that were launched.
    """
    launched: list[str] = []

    def run(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            launched.append(kernel.__name__)
            own = {name: named[name] for name in kernel.arg_names if name in named}
            first, *rest = grid
            interpret(
                kernel, (min(first, programs or _NO_LIMIT), *rest), args, own, seed=seed,
                lateness=lateness,
            )  # fmt: skip

        return launch

    with mock.patch.object(_runtime.GluonJITFunction, "__getitem__", run), triton_interpreted():
        yield launched
