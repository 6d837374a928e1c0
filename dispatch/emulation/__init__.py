"""Runs Triton kernels for AMD GPUs on a CPU: an emulated instruction set, not hardware.

The assembly that Triton compiles for a GPU is executed instruction by instruction on NumPy arrays.
That finds wrong results, accesses outside of memory, reads of memory that was never written, races
in LDS and missing waits. It shows nothing of speed, caches or the hardware's own faults.

    report = emulate_launch(kernel, (64,), [x, y, out, n], arch="gfx942", BLOCK=256)

    with emulated("gfx942") as emulation:
        kernel[(64,)](x, y, out, n, BLOCK=256)  # CPU tensors
    print(emulation.launches[0])

The names are imported when they are first used. They need NumPy, PyTorch and Triton:
`pip install 'attn-dispatch[emulate]'`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dispatch.emulation.emulate import emulate_launch as emulate_launch
    from attn_dispatch.emulation.emulate import emulated as emulated
    from attn_dispatch.emulation.errors import EmulationError as EmulationError
    from attn_dispatch.emulation.errors import KernelFault as KernelFault
    from attn_dispatch.emulation.errors import MemoryFault as MemoryFault
    from attn_dispatch.emulation.errors import RaceFault as RaceFault
    from attn_dispatch.emulation.errors import UnknownInstruction as UnknownInstruction
    from attn_dispatch.emulation.errors import UnwrittenRead as UnwrittenRead
    from attn_dispatch.emulation.errors import WaitFault as WaitFault
    from attn_dispatch.emulation.errors import WaveOrderFault as WaveOrderFault
    from attn_dispatch.emulation.launch import LaunchReport as LaunchReport
    from attn_dispatch.emulation.targets import TARGETS as TARGETS
    from attn_dispatch.emulation.targets import Target as Target
    from attn_dispatch.emulation.targets import target_named as target_named
    from attn_dispatch.emulation.triton_driver import Emulation as Emulation

_HOMES = {
    "errors": "EmulationError KernelFault MemoryFault RaceFault UnknownInstruction UnwrittenRead "
    "WaitFault WaveOrderFault",
    "launch": "LaunchReport",
    "targets": "TARGETS Target target_named",
    "triton_driver": "Emulation",
    "emulate": "emulate_launch emulated",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605

_NEEDED = ("numpy", "torch", "triton")


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME_OF[name]}")
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise ModuleNotFoundError(
            f"Emulation needs {error.name}: pip install 'attn-dispatch[emulate]'.",
            name=error.name,
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
