"""Runs the kernels of AMD GPUs from their assembly text.

A workgroup's waves run together: an instruction is executed for all waves that are at the same
place, as NumPy operations on arrays of (waves, lanes). Waves that branch differently become groups
of their own; the group that is farthest behind runs first, so that groups meet again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Assembly
from attn_dispatch.emulation.errors import EmulationError, KernelFault, WaveOrderFault, add_note
from attn_dispatch.emulation.instructions.decode import Decoded, decode
from attn_dispatch.emulation.launch_abi import argument_segment, initial_waves
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.memory.lds import Lds, LdsAccess
from attn_dispatch.emulation.memory.scratch import Scratch
from attn_dispatch.emulation.registers import EXEC, VCC
from attn_dispatch.emulation.shared import Shared
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import check_registers, finish_all
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["Kernel", "LaunchCounts", "WaveOrder"]

#: "lockstep": all waves go on together. "forward" and "backward": workgroups run one after another,
#: and the waves of a workgroup one after another from barrier to barrier, the first or the last one
#: first. "both": the launch runs in either order, from the same memory, and the results must be
#: equal.
WaveOrder = Literal["lockstep", "forward", "backward", "both"]

#: Waves that run at a time: enough that NumPy's time per call is small, and that the registers of
#: all of them stay in a CPU's cache.
_WAVES_AT_ONCE = 64
#: Instructions that waves which run together may execute, counted once for a group of them. A
#: kernel that executes more is taken for one that does not end.
_LIMIT = 20_000_000


@dataclass
class LaunchCounts:
    """What a launch executed.

    Attributes:
        instructions: opcode -> how often waves executed it. A dual-issued one counts as two, with
            names that begin with "v_dual_".
        lines: line of the assembly -> how often waves executed it.
        sources: place in the Python source -> instructions that waves executed there.
        waves: that ran.
        lds_bytes_read, lds_bytes_written: by all lanes.
        scratch_bytes_read, scratch_bytes_written: private memory, which is mostly spilled
            registers.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    waves: int = 0
    lds_bytes_read: int = 0
    lds_bytes_written: int = 0
    scratch_bytes_read: int = 0
    scratch_bytes_written: int = 0

    @property
    def total(self) -> int:
        """Instructions of all waves."""
        return sum(self.instructions.values())


class Kernel:
    """A kernel that can be launched.

    Args:
        text: its assembly, as LLVM prints it.
        target: the GPU that it was compiled for.

    Attributes:
        name: the kernel's.
        assembly: its text in parts.
        vgprs: vector registers of a lane, without accumulation registers.
        agprs: accumulation registers of a lane.
        scratch_bytes: private memory of a lane.

    Raises:
        EmulationError: the text is no kernel's, or another target's.
    """

    def __init__(self, text: str, target: Target) -> None:
        self.assembly, self.target = Assembly(text), target
        self.name = self.assembly.name
        compiled_for = self.assembly.target_name
        if compiled_for != target.name:
            raise EmulationError(
                f"{self.name} was compiled for {compiled_for}, and cannot run on {target.name}."
            )
        registers = self.assembly.descriptor("next_free_vgpr")
        self.vgprs = self.assembly.descriptor("accum_offset") or registers
        self.agprs = max(registers - self.vgprs, 0)
        self.scratch_bytes = self.assembly.descriptor("private_segment_fixed_size")
        self._decoded: dict[int, list[Decoded]] = {}

    def block(self, index: int) -> list[Decoded]:
        """The instructions of a basic block, decoded at the first use.

        Raises:
            UnknownInstruction: the emulator does not know one of them.
        """
        if index not in self._decoded:
            instructions = self.assembly.blocks[index]
            self._decoded[index] = [decode(each, self.target) for each in instructions]
        return self._decoded[index]

    def launch(
        self,
        grid: tuple[int, int, int],
        num_waves: int,
        lds_bytes: int,
        arguments: Sequence[int],
        memory: GlobalMemory,
        *,
        wave_order: WaveOrder = "lockstep",
    ) -> LaunchCounts:
        """Run all workgroups of a grid.

        Args:
            grid: workgroups in each dimension.
            num_waves: of a workgroup.
            lds_bytes: of a workgroup.
            arguments: the bits of those that are not hidden, in order; addresses are `memory`'s.
            memory: what the kernel may access.
            wave_order: in which order the waves of a workgroup run.

        Raises:
            EmulationError: the launch is impossible on the target.
            UnknownInstruction: the emulator does not know an instruction.
            KernelFault: the kernel did what the hardware forbids or leaves undefined.
        """
        lds_bytes = max(lds_bytes, self.assembly.descriptor("group_segment_fixed_size"))
        if lds_bytes > self.target.lds_bytes:
            raise EmulationError(
                f"{self.name} needs {lds_bytes} bytes of LDS; {self.target.name} has "
                f"{self.target.lds_bytes}."
            )
        if wave_order == "both":
            run = partial(self.launch, grid, num_waves, lds_bytes, arguments, memory)
            return _in_both_orders(run, memory)
        lanes, counts = self.target.wave_size, LaunchCounts()
        workgroups = np.arange(grid[0] * grid[1] * grid[2])
        if wave_order == "backward":
            workgroups = workgroups[::-1]
        at_once = max(1, _WAVES_AT_ONCE // num_waves) if wave_order == "lockstep" else 1
        segment = memory.allocate(
            argument_segment(self.assembly, grid, num_waves * lanes, arguments),
            f"the arguments of {self.name}",
        )
        try:
            for first in range(0, len(workgroups), at_once):
                part = workgroups[first : first + at_once]
                lds = Lds(len(part), lds_bytes)
                scratch = Scratch(len(part) * num_waves, lanes, self.scratch_bytes)
                shared = Shared(self.target, grid, part, num_waves, memory, lds, scratch)
                registers = (self.vgprs, self.agprs)
                waves = initial_waves(self.assembly, shared, registers, segment.address)
                with np.errstate(all="ignore"):
                    executed = _run(self, _by_order(waves, wave_order))
                self._count(executed, shared, counts)
        finally:
            memory.remove(segment)
        return counts

    def _count(self, executed: Counter[int], shared: Shared, counts: LaunchCounts) -> None:
        """Add what waves executed; `executed`: index of a block -> how often."""
        for index, times in executed.items():
            for each in self.block(index):
                counts.lines[each.text.line] += times
                counts.sources[each.text.source.rpartition(":")[0]] += times
                for opcode in each.opcodes:
                    is_dual = each.text.second is not None
                    counts.instructions[f"v_dual_{opcode[2:]}" if is_dual else opcode] += times
        counts.waves += shared.num_waves
        counts.lds_bytes_read += shared.lds.bytes_read
        counts.lds_bytes_written += shared.lds.bytes_written
        counts.scratch_bytes_read += shared.scratch.bytes_read
        counts.scratch_bytes_written += shared.scratch.bytes_written


def _in_both_orders(run: Callable[..., LaunchCounts], memory: GlobalMemory) -> LaunchCounts:
    """Run forward, then backward from the same memory, and compare all memory."""
    before = [region.saved() for region in memory.regions]
    run(wave_order="forward")
    first = [region.data.copy() for region in memory.regions]
    for region, saved in zip(memory.regions, before, strict=True):
        region.restore(saved)
    counts = run(wave_order="backward")
    for region, expected in zip(memory.regions, first, strict=True):
        if not np.array_equal(region.data, expected):
            byte = int((region.data != expected).argmax())
            raise WaveOrderFault(
                f"Byte {byte} of {region.name!r} depends on the order in which waves run: "
                f"{expected[byte]:#04x} if the first wave of a workgroup runs first, "
                f"{region.data[byte]:#04x} if the last one does."
            )
    return counts


def _by_order(waves: WaveGroup, order: WaveOrder) -> list[WaveGroup]:
    """One group in lockstep; else one for each wave of the only workgroup, with its rank."""
    if order == "lockstep":
        return [waves]
    groups = [waves.only(waves.ids == number) for number in waves.ids]
    for number, group in enumerate(groups):
        group.rank = -number if order == "backward" else number
    return groups


def _run(kernel: Kernel, groups: list[WaveGroup]) -> Counter[int]:
    """Run until all waves have ended; returns index of a block -> how often waves executed it."""
    executed: Counter[int] = Counter()
    num_instructions = 0
    while groups:
        ready = [group for group in groups if not group.waits_at_barrier]
        if not ready:
            _release(groups)
            continue
        group = min(ready, key=lambda each: (each.rank, each.block))
        groups.remove(group)
        for other in ready:
            if other is not group and group.joins(other):
                groups.remove(other)
                group = group.joined(other)
        executed[group.block] += group.num_waves
        num_instructions += len(kernel.block(group.block))
        if num_instructions > _LIMIT:
            raise KernelFault(
                f"{kernel.name} does not end: it has executed {num_instructions} instructions. It "
                "may wait for a workgroup that does not run at the same time."
            )
        _execute_block(kernel, group)
        groups += _next(kernel.assembly, group)
    return executed


def _execute_block(kernel: Kernel, group: WaveGroup) -> None:
    """Execute the basic block of a group, all but the choice of the next one."""
    for instruction in kernel.block(group.block):
        try:
            if group.pending and not instruction.registers.isdisjoint(group.pending_registers):
                check_registers(group, instruction.text, instruction.reads, instruction.writes)
            instruction.execute(group)
        except Exception as error:
            add_note(error, f"{kernel.name} on {kernel.target.name}, {instruction.text}")
            raise


def _next(assembly: Assembly, group: WaveGroup) -> list[WaveGroup]:
    """The group at the block that comes next; none if it has ended, two if waves differ."""
    last = assembly.blocks[group.block][-1]
    group.block += 1
    if last.opcode == "s_endpgm":
        finish_all(group)
        return []
    if last.opcode in ("s_barrier", "s_barrier_wait"):
        group.waits_at_barrier = True
    elif last.opcode == "s_branch":
        group.block = assembly.block_of_label[last.operands[0]]
    elif last.opcode in _CONDITIONS:
        taken = _CONDITIONS[last.opcode](group)
        differ = taken.any() and not taken.all()
        parts = [group.only(taken), group.only(~taken)] if differ else [group]
        if taken.any():
            parts[0].block = assembly.block_of_label[last.operands[0]]
        return parts
    return [group]


def _release(groups: Sequence[WaveGroup]) -> None:
    """Let all waves pass their barrier."""
    in_flight = []
    for group in groups:
        # RDNA4: accesses after the signal are not ordered with other waves' after the barrier.
        late = (*[each.access for each in group.pending], *(group.after_signal or ()))
        in_flight += [access for access in late if isinstance(access, LdsAccess)]
        group.waits_at_barrier, group.after_signal = False, None
    groups[0].shared.lds.new_epoch(in_flight)


def _any_bit(group: WaveGroup, first: int) -> NDArray[np.bool_]:
    """(waves,) whether a scalar register, or a pair if waves have 64 lanes, is not 0."""
    return np.asarray(group.s_u32[first : first + group.lanes // 32].any(axis=0))


#: Which waves take a branch, (waves,) bool.
_CONDITIONS: dict[str, Callable[[WaveGroup], NDArray[np.bool_]]] = {
    "s_cbranch_scc0": lambda group: ~group.scc,
    "s_cbranch_scc1": lambda group: group.scc,
    "s_cbranch_vccz": lambda group: ~_any_bit(group, VCC),
    "s_cbranch_vccnz": lambda group: _any_bit(group, VCC),
    "s_cbranch_execz": lambda group: ~_any_bit(group, EXEC),
    "s_cbranch_execnz": lambda group: _any_bit(group, EXEC),
}
