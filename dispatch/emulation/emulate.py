"""The two ways to run Triton kernels on an emulated GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.launch import LaunchReport
from attn_dispatch.emulation.machine import WaveOrder
from attn_dispatch.emulation.targets import target_named
from attn_dispatch.emulation.triton_driver import EmulatedDriver, Emulation, current, installed

__all__ = ["emulate_launch", "emulated"]


@contextlib.contextmanager
def emulated(
    arch: str,
    *,
    wave_order: WaveOrder = "lockstep",
    unwritten: Sequence[str] = (),
    buffer_ops: bool = True,
) -> Iterator[Emulation]:
    """Run every Triton kernel on an emulated AMD GPU: `kernel[grid](...)` with CPU tensors.

    Triton has one driver for all threads of a process: within the context every thread's launches
    are emulated, one at a time. Contexts of one thread may be nested; two threads cannot emulate at
    the same time. Autotuned kernels run each configuration and keep the first that can be launched,
    also for later launches on a GPU in the same process.

    Args:
        arch: gfx90a, gfx942, gfx950, gfx1100 or gfx1201.
        wave_order: "lockstep": all waves of a program go on together. "forward" and "backward": one
            after another from barrier to barrier, the first or the last one first. "both": forward
            and then backward, from the same memory; a result that differs is a fault, and shows
            that a barrier is missing.
        unwritten: names of arguments whose memory counts as never written when a kernel starts, so
            that reading it before writing is a fault. An element of a tuple is `name[0]`, of a
            named tuple `name.field`.
        buffer_ops: let Triton use buffer instructions for tensors in storages under 2 GiB, as it
            does by default; else all loads and stores are global ones.

    Yields:
        The emulation; its `launches` are reports.

    Raises:
        EmulationError: the target is unknown; kernels are interpreted in this process; another
            thread emulates; at the end: no launch had an argument of a name in `unwritten`. A
            launch raises it for what cannot be emulated, and its subclasses for faults.
        triton.runtime.errors.OutOfResources: a launch raises it, as on a GPU, for a kernel that
            needs more LDS than the target has.

    Example:
        >>> with emulated("gfx942") as emulation:
        ...     kernel[(64,)](x, y, out, n, BLOCK=256)
        >>> emulation.launches[0].instructions
    """
    if wave_order not in get_args(WaveOrder):
        orders = ", ".join(get_args(WaveOrder))
        raise EmulationError(f"wave_order={wave_order!r} is not one of: {orders}.")
    emulation = Emulation(target_named(arch), wave_order, unwritten, buffer_ops)
    _require_compiler()
    outer = current()
    if outer is not None and not outer.is_of_this_thread:
        raise EmulationError(
            f"Another thread emulates {outer.target.name}, and Triton has one driver for all "
            "threads. Wait for its end, or use a process."
        )
    before = installed()
    with triton.knobs.amd.scope():
        triton.knobs.amd.use_buffer_ops = buffer_ops
        triton.runtime.driver.set_active(EmulatedDriver(emulation))
        try:
            yield emulation
        finally:
            triton.runtime.driver.set_active(before)
    emulation.check_unwritten()


def _require_compiler() -> None:
    """Raise EmulationError where @triton.jit makes kernels that Triton interprets."""
    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise EmulationError(
            "TRITON_INTERPRET=1 is or was set, so Triton interprets kernels instead of compiling "
            "them. Unset it and start a new process."
        )


def emulate_launch(
    kernel: Any,
    grid: Any,
    args: Sequence[Any],
    *,
    arch: str,
    wave_order: WaveOrder = "lockstep",
    unwritten: Sequence[str] = (),
    buffer_ops: bool = True,
    **more: Any,
) -> LaunchReport:
    """Launch a Triton kernel on an emulated AMD GPU.

    Args:
        kernel: a @triton.jit function, also with autotuning or heuristics.
        grid: programs in each dimension, or a function of the constants, as in `kernel[grid]`.
        args: the first arguments, in order; tensors are on the CPU, and are changed in place.
        arch, wave_order, unwritten, buffer_ops: as for `emulated`.
        **more: further arguments, constants, and options such as num_warps.

    Returns:
        The report; the last one, if the kernel is autotuned.

    Raises:
        EmulationError, OutOfResources: as for `emulated`.

    Example:
        >>> emulate_launch(kernel, (64,), [x, y, out, n], arch="gfx942", BLOCK=256, num_warps=4)
    """
    settings: Any = {"wave_order": wave_order, "unwritten": unwritten, "buffer_ops": buffer_ops}
    with emulated(arch, **settings) as emulation:
        kernel[grid](*args, **more)
    if not emulation.launches:
        raise EmulationError(
            f"{getattr(kernel, '__name__', kernel)} launched nothing. If it was defined while "
            "TRITON_INTERPRET=1 was set, unset it and start a new process."
        )
    return emulation.launches[-1]
