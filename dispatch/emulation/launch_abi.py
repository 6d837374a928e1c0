"""What a wave finds when it starts: the arguments in memory, and the first registers.

LLVM's AMDGPU usage guide, "kernel argument segment" and "initial kernel execution state".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Assembly
from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.registers import TTMP0
from attn_dispatch.emulation.shared import Shared
from attn_dispatch.emulation.waves import WaveGroup, new_registers

__all__ = ["SCRATCH_DESCRIPTOR_BASE", "argument_segment", "initial_waves"]

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
        EmulationError: there are more values than arguments.
    """
    if len(arguments) > len(assembly.arguments):
        raise EmulationError(
            f"{assembly.name} takes {len(assembly.arguments)} arguments; {len(arguments)} were "
            "given."
        )
    hidden = {"hidden_grid_dims": 3}  # what else a runtime gives, such as a queue, is 0 here
    for axis, programs, lanes in zip("xyz", grid, (workgroup_size, 1, 1), strict=True):
        hidden[f"hidden_block_count_{axis}"] = programs
        hidden[f"hidden_group_size_{axis}"] = lanes
    values = list(zip(assembly.arguments, arguments, strict=False))
    values += [(each, hidden.get(each.kind, 0)) for each in assembly.hidden_arguments]
    segment = bytearray(assembly.descriptor("kernarg_size"))
    for argument, value in values:
        end = argument.offset + argument.size
        segment[argument.offset : end] = value.to_bytes(argument.size, "little")
    return np.frombuffer(segment, np.uint8)


def initial_waves(
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
    group.block = _first_block(assembly)
    group.v_u32[0] = (number * target.wave_size)[:, None] + np.arange(target.wave_size)
    return group


def _first_block(assembly: Assembly) -> int:
    """The block at which waves start.

    With preloaded arguments, hardware skips the first 256 bytes, which load them in software.
    """
    if not assembly.descriptor("user_sgpr_kernarg_preload_length"):
        return 0
    branch = next(each for each in assembly.instructions if each.opcode == "s_branch")
    return assembly.block_of_label[branch.operands[0]]


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
