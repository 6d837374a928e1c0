"""A Triton driver whose GPU is emulated.

Triton asks its active driver for the target, compiles for it, and calls the driver's launcher. So
kernels run unchanged: with autotuning, heuristics, launch hooks, `tl.num_programs`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.launch import LaunchReport, kernel_arguments, memory_of
from attn_dispatch.emulation.machine import Kernel, WaveOrder
from attn_dispatch.emulation.targets import TARGETS, Target

__all__ = ["EmulatedDriver", "Emulation", "current", "installed"]

#: Triton keeps compiled kernels by the number of the device. Those of no real device are used, and
#: others for each target and for each of its settings, so that kernels are never mixed.
_FIRST_DEVICE = 1000
#: Arguments that Triton adds to every kernel: pointers to scratch memory, which are null.
_SCRATCH_POINTERS = 2
#: Decoded kernels that are kept. One takes up to 20 MB.
_MAX_KERNELS = 64

#: Launches run one at a time, whatever threads do.
_one_launch = threading.RLock()


class _EmulatedTarget(GPUTarget):  # type: ignore[misc]
    """A class of its own for its repr, which is part of the keys of Triton's caches on disk.

    So what the autotuner finds here is not taken for a measurement on a GPU.
    """


class Emulation:
    """What is emulated within `emulated`.

    Attributes:
        target: the GPU.
        wave_order: the order in which the waves of a program run.
        buffer_ops: whether Triton may use buffer instructions.
        unwritten: names of arguments whose memory counts as never written at launch.
        launches: a report for each launch that ended, in order.
    """

    def __init__(
        self, target: Target, wave_order: WaveOrder, unwritten: Sequence[str], buffer_ops: bool
    ) -> None:
        self.target, self.wave_order, self.buffer_ops = target, wave_order, buffer_ops
        self.unwritten = frozenset(unwritten)
        self.launches: list[LaunchReport] = []
        self._thread = threading.get_ident()
        self._names: set[str] = set()

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread began it."""
        return self._thread == threading.get_ident()

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        metadata: Any,
        signature: Mapping[Any, Any],
        values: Sequence[Any],
    ) -> None:
        """Run a kernel, and add its report to `launches`.

        Args:
            kernel: the kernel.
            grid: programs in each dimension.
            metadata: Triton's, of the compiled kernel.
            signature, values: as for `kernel_arguments`.

        Raises:
            EmulationError: the kernel cannot be emulated with these arguments, or it is wrong.
        """
        if min(grid) < 0:
            raise EmulationError(f"A grid of {grid} programs cannot be launched.")
        arguments = kernel_arguments(signature, values)
        self._names.update(argument.name for argument in arguments)
        encoded = [argument.encoded() for argument in arguments]
        expected = len(kernel.assembly.arguments) - _SCRATCH_POINTERS
        if len(encoded) != expected:
            raise EmulationError(
                f"{kernel.name} takes {expected} arguments, and Triton {triton.__version__} gives "
                f"{len(encoded)}: this version is not supported. 3.6 to 3.9 are."
            )
        memory = memory_of(arguments, self.unwritten)
        start = time.perf_counter()
        counts = kernel.launch(
            grid, metadata.num_warps, metadata.shared, encoded, memory, wave_order=self.wave_order
        )
        self.launches.append(
            LaunchReport(
                kernel=kernel.name,
                target=self.target.name,
                grid=grid,
                num_warps=metadata.num_warps,
                vgprs=kernel.vgprs,
                agprs=kernel.agprs,
                lds_bytes=metadata.shared,
                scratch_bytes=kernel.scratch_bytes,
                counts=counts,
                seconds=time.perf_counter() - start,
            )
        )

    def check_unwritten(self) -> None:
        """Raise EmulationError if a name in `unwritten` was the argument of no launch."""
        unknown = sorted(self.unwritten - self._names)
        if unknown and self.launches:
            raise EmulationError(
                f"unwritten={', '.join(unknown)}: no launch had such an argument. The arguments "
                f"were: {', '.join(sorted(self._names))}."
            )


class _Launcher:
    """What Triton calls to launch a compiled kernel, as its launcher for AMD GPUs.

    Triton makes it for a kernel and keeps it; so it refers to no `Emulation`.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self._signature, self._metadata = src.signature, metadata
        self._name = src.name
        for size in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, size, 0):
                raise EmulationError(
                    f"{self._name} needs {getattr(metadata, size)} bytes of Triton's "
                    f"{size.removesuffix('_size').replace('_', ' ')} memory, which is not emulated."
                )
        if metadata.num_ctas != 1:
            raise EmulationError(
                f"{self._name} has num_ctas={metadata.num_ctas}; clusters are not emulated."
            )

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: Any,
        function: Any,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], Any] | None,
        exit_hook: Callable[[Any], Any] | None,
        *values: Any,
    ) -> None:
        emulation, metadata = current(), self._metadata
        if emulation is None or emulation.target.name != metadata.target.arch:
            raise EmulationError(
                f"{self._name} was compiled to be emulated on {metadata.target.arch}. Launch it "
                f'within `emulated("{metadata.target.arch}")`.'
            )
        kernel = _kernel(metadata.hash, self._name, emulation.target)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        grid = (int(grid_x), int(grid_y), int(grid_z))
        with _one_launch:
            emulation.launch(kernel, grid, metadata, self._signature, values)
        if exit_hook is not None:
            exit_hook(launch_metadata)


@functools.lru_cache(maxsize=_MAX_KERNELS)
def _kernel(key: str, name: str, target: Target) -> Kernel:
    """The kernel with this key in Triton's cache."""
    group = get_cache_manager(key).get_group(f"{name[:150]}.json") or {}
    paths = [path for file, path in group.items() if file.endswith(".amdgcn")]
    if not paths:
        raise EmulationError(
            f"The assembly of {name} is not in Triton's cache. Unset TRITON_STORE_BINARY_ONLY, and "
            "remove what was cached with it."
        )
    return Kernel(Path(paths[0]).read_text(encoding="utf-8"), target)


class _Utilities:
    """The driver's `utils`."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Load nothing: the launcher has the assembly.

        The module is None, so that Triton does not ask the driver of that time to unload it.

        Returns:
            module, function, registers, spilled registers, threads that a program can have.
        """
        registers, spilled = (_note(binary, key) for key in (b".vgpr_count", b".vgpr_spill_count"))
        return None, None, registers, spilled, 1024

    def get_device_properties(self, device: int) -> dict[str, Any]:
        """What Triton and authors of kernels look up; clocks are 0, because there are none."""
        target = self._target
        return {
            "arch": target.name,
            "warpSize": target.wave_size,
            "max_shared_mem": target.lds_bytes,
            "max_num_regs": 256 * 256,  # of 256 lanes, on the SIMDs of a compute unit
            "multiprocessor_count": 1,
            "cooperativeLaunch": 0,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }


def _note(binary: bytes, key: bytes) -> int:
    """An integer of the kernel's metadata, which is MessagePack in a note of the ELF file."""
    _, found, rest = binary.partition(key)
    if not found:
        return 0
    length = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(rest[0], 0)
    return int.from_bytes(rest[1 : 1 + length], "big") if length else rest[0]


class EmulatedDriver(DriverBase):  # type: ignore[misc]
    """Triton's driver of an emulated GPU; tensors are on the CPU.

    Args:
        emulation: what launches are part of.
    """

    launcher_cls = _Launcher

    def __init__(self, emulation: Emulation) -> None:
        super().__init__()
        self.emulation = emulation
        self.utils = _Utilities(emulation.target)
        number = list(TARGETS).index(emulation.target.name)
        self._device = _FIRST_DEVICE + 2 * number + emulation.buffer_ops

    @classmethod
    def is_active(cls) -> bool:
        """Whether Triton should choose it by itself: never."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        target = self.emulation.target
        return _EmulatedTarget("hip", target.name, target.wave_size)

    def get_current_device(self) -> int:
        """The number of the device; one for each target."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """The default stream; launches have ended when they return."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The device of the tensors."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """PyTorch's module for the device."""
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Any]:
        """What the autotuner times a kernel with."""
        return _benchmark

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The type in C++; only Triton's launchers in C need it.

        Raises:
            EmulationError: always.
        """
        raise EmulationError(f"No C++ code is generated for an emulated GPU, nor for its {ty}.")


def _benchmark(kernel_call: Callable[[], Any], quantiles: Any = None, **more: Any) -> Any:
    """Run a kernel once; every time is 1, because emulation measures none.

    So the autotuner runs each configuration, and chooses the first that can be launched. It keeps
    this function: outside of `emulated` the function of the driver of that time is called.
    """
    if current() is None:
        return triton.runtime.driver.active.get_benchmarker()(
            kernel_call, quantiles=quantiles, **more
        )
    kernel_call()
    return 1.0 if quantiles is None else [1.0] * len(quantiles)


def current() -> Emulation | None:
    """The emulation whose driver is active in Triton."""
    active = installed()
    return active.emulation if isinstance(active, EmulatedDriver) else None


def installed() -> Any:
    """Triton's driver, or None if Triton has not chosen one yet.

    `driver.active` would choose one, which fails on a machine without a GPU.
    """
    return getattr(triton.runtime.driver, "_active", None)
