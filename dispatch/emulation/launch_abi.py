"""What a wave finds when it starts: the arguments in memory, and the first registers.

LLVM's AMDGPU usage guide, "kernel argument segment" and "initial kernel execution state".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Argument, Assembly
from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.registers import TTMP0
from attn_dispatch.emulation.shared import Shared
from attn_dispatch.emulation.waves import WaveGroup, new_registers

__all__ = ["SCRATCH_DESCRIPTOR_BASE", "argument_segment", "initial_registers"]

#: User registers in the order in which they are given out, with how many each takes.
_USER_REGISTERS = (
    ("private_segment_buffer", 4),
    ("dispatch_ptr", 2),
    ("queue_ptr", 2),
    ("kernarg_segment_ptr", 2),
    ("dispatch_id", 2),
    ("flat_scratch_init", 2),
    ("private_segment_size", 1),
)
#: Upper half of the base address in the buffer descriptor of private memory. Memory instructions
#: recognize private memory by it: no other buffer begins there.
SCRATCH_DESCRIPTOR_BASE = 0x5C00


def argument_segment(
    assembly: Assembly,
    grid: tuple[int, int, int],
    workgroup_size: int,
    arguments: Sequence[int],
) -> NDArray[np.uint8]:
    """The bytes of the argument segment.

    Args:
        assembly: the kernel.
        grid: workgroups in each dimension.
        workgroup_size: lanes of a workgroup.
        arguments: the bits of the arguments that are not hidden, as integers; those that are left
            out are 0.

    Raises:
        EmulationError: there are more values than arguments, or one does not fit.
    """
    visible = [each for each in assembly.arguments if not each.is_hidden]
    if len(arguments) > len(visible):
        raise EmulationError(
            f"{assembly.name} takes {len(visible)} arguments; {len(arguments)} were given."
        )
    segment = np.zeros(assembly.descriptor("kernarg_size"), np.uint8)
    for argument, value in zip(visible, arguments, strict=False):
        _put(segment, argument, _as_bytes(argument, value))
    for argument in assembly.arguments:
        value = _hidden_value(argument, grid, workgroup_size)
        if value:
            _put(segment, argument, _as_bytes(argument, value))
    return segment


def _as_bytes(argument: Argument, value: int) -> bytes:
    bits = 8 * argument.size
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise EmulationError(
            f"The argument at offset {argument.offset} has {bits} bits; {value} does not fit."
        )
    return (value & ((1 << bits) - 1)).to_bytes(argument.size, "little")


def _put(segment: NDArray[np.uint8], argument: Argument, data: bytes) -> None:
    segment[argument.offset : argument.offset + argument.size] = np.frombuffer(data, np.uint8)


def _hidden_value(argument: Argument, grid: tuple[int, int, int], workgroup_size: int) -> int:
    """What the runtime puts there; 0 for what the emulator has not, such as a queue."""
    name, _, axis = argument.kind.removeprefix("hidden_").rpartition("_")
    if argument.kind == "hidden_grid_dims":
        return 3
    if not argument.is_hidden or axis not in "xyz":
        return 0
    dimension = "xyz".index(axis)
    values = {"block_count": grid[dimension], "group_size": 1 if dimension else workgroup_size}
    return values.get(name, 0)


def initial_registers(
    assembly: Assembly, shared: Shared, registers: tuple[int, int], argument_address: int
) -> WaveGroup:
    """All waves that run at a time, before their first instruction.

    Args:
        assembly: the kernel.
        shared: which workgroups run.
        registers: vector and accumulation registers of a lane.
        argument_address: of the argument segment, in the memory.
    """
    target, waves = shared.target, shared.num_waves
    files = new_registers(waves, target.wave_size, *registers)
    group = WaveGroup(shared, np.arange(waves), files, np.zeros(waves, np.bool_))
    scalar = group.s_u32
    _user_registers(assembly, scalar, shared.memory, argument_address)
    number = group.ids % shared.waves_per_workgroup
    workgroup = shared.workgroups[group.workgroups]
    width, height, _ = shared.grid
    place = (workgroup % width, workgroup // width % height, workgroup // (width * height))
    if target.generation >= 12:
        scalar[TTMP0 + 9] = place[0]
        scalar[TTMP0 + 7] = place[1] | place[2] << 16
        scalar[TTMP0 + 8] = number << 25
    else:
        _workgroup_registers(assembly, scalar, place)
    group.v_u32[0] = (number * target.wave_size)[:, None] + np.arange(target.wave_size)
    return group


def _user_registers(
    assembly: Assembly, scalar: NDArray[Any], memory: GlobalMemory, address: int
) -> None:
    at = 0
    for name, count in _USER_REGISTERS:
        if not assembly.descriptor(f"user_sgpr_{name}"):
            continue
        if name == "private_segment_buffer":
            scalar[at], scalar[at + 1], scalar[at + 2 : at + 4] = 0, SCRATCH_DESCRIPTOR_BASE, 0
        elif name == "kernarg_segment_ptr":
            scalar[at], scalar[at + 1] = address & 0xFFFFFFFF, address >> 32
        at += count
    preloaded = assembly.descriptor("user_sgpr_kernarg_preload_length")
    if preloaded:
        first = 4 * assembly.descriptor("user_sgpr_kernarg_preload_offset")
        words = memory.region_at(address + first).data[first : first + 4 * preloaded]
        scalar[at : at + preloaded] = words.view(np.uint32)[:, None]


def _workgroup_registers(
    assembly: Assembly, scalar: NDArray[Any], place: Sequence[NDArray[Any]]
) -> None:
    at = assembly.descriptor("user_sgpr_count")
    for axis, value in zip("xyz", place, strict=True):
        if assembly.descriptor(f"system_sgpr_workgroup_id_{axis}"):
            scalar[at] = value
            at += 1
    if assembly.descriptor("enable_private_segment"):
        scalar[at] = 0  # where the wave's private memory begins
