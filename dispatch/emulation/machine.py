"""Runs the kernels of AMD GPUs from their assembly text.

A workgroup's waves run together: an instruction is executed for all waves that are at the same
place, as NumPy operations on arrays of (waves, lanes). Waves that branch differently become groups
of their own; the group that is farthest behind runs first, so that groups meet again.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Assembly, Instruction
from attn_dispatch.emulation.errors import (
    EmulationError,
    KernelFault,
    WaveOrderFault,
    add_note,
)
from attn_dispatch.emulation.instructions.decode import Decoded, decode
from attn_dispatch.emulation.launch_abi import argument_segment, initial_registers
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.memory.lds import Lds, LdsAccess
from attn_dispatch.emulation.memory.scratch import Scratch
from attn_dispatch.emulation.registers import EXEC, VCC
from attn_dispatch.emulation.shared import Shared
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import check_registers, finish_all, publish
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["Kernel", "LaunchCounts", "Run", "WaveOrder"]

#: "lockstep": all waves go on together. "forward" and "backward": workgroups run one after another,
#: and the waves of a workgroup one after another from barrier to barrier, the first or the last one
#: first. "both": the launch runs in either order, from the same memory, and the results must be
#: equal.
WaveOrder = Literal["lockstep", "forward", "backward", "both"]

#: Waves that run at a time: enough that NumPy's time per call is small, and that the registers of
#: all of them stay in a CPU's cache.
_WAVES_AT_ONCE = 64
#: Instructions that one group of waves may execute. A kernel that takes more is taken for one that
#: does not end: it may wait for a workgroup that does not run at the same time.
_LIMIT = 20_000_000


@dataclass
class LaunchCounts:
    """What a launch executed.

    Attributes:
        instructions: opcode -> how often waves executed it; a dual-issued one counts as two.
        lines: line of the assembly -> how often waves executed it.
        sources: place in the Python source -> instructions that waves executed there.
        waves: that ran.
        lds_bytes_read, lds_bytes_written: by all lanes.
        scratch_bytes_read, scratch_bytes_written: private memory, which is mostly spilled
            registers.
        seconds: that the emulation took.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    waves: int = 0
    lds_bytes_read: int = 0
    lds_bytes_written: int = 0
    scratch_bytes_read: int = 0
    scratch_bytes_written: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Instructions of all waves."""
        return sum(self.instructions.values())


class Kernel:
    """A kernel that can be launched.

    Args:
        text: its assembly, as LLVM prints it.
        target: the GPU that it was compiled for.

    Raises:
        EmulationError: the text is no kernel's, or another target's.
    """

    def __init__(self, text: str, target: Target) -> None:
        self.assembly, self.target = Assembly(text), target
        compiled_for = self.assembly.target_name
        if compiled_for != target.name:
            raise EmulationError(
                f"{self.name} was compiled for {compiled_for}, and cannot run on {target.name}."
            )
        self._decoded: dict[int, list[Decoded]] = {}

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.assembly.name

    @cached_property
    def scratch_bytes(self) -> int:
        """Private memory of a lane."""
        return self.assembly.descriptor("private_segment_fixed_size")

    @cached_property
    def vgprs(self) -> int:
        """Vector registers of a lane, without accumulation registers."""
        offset = self.assembly.descriptor("accum_offset")
        return offset or self.assembly.descriptor("next_free_vgpr")

    @cached_property
    def agprs(self) -> int:
        """Accumulation registers of a lane."""
        if not self.assembly.descriptor("accum_offset"):
            return 0
        return max(self.assembly.descriptor("next_free_vgpr") - self.vgprs, 0)

    def block(self, index: int) -> list[Decoded]:
        """The instructions of a basic block, decoded at the first use.

        Raises:
            UnknownInstruction: the emulator does not know one of them.
        """
        found = self._decoded.get(index)
        if found is None:
            with _no_garbage_collection():
                found = [decode(each, self.target) for each in self.assembly.blocks[index]]
            self._decoded[index] = found
        return found

    @cached_property
    def first_block(self) -> int:
        """The block at which waves start.

        With preloaded arguments, hardware skips the first 256 bytes, which load them in software.
        """
        if not self.assembly.descriptor("user_sgpr_kernarg_preload_length"):
            return 0
        branch = next(each for each in self.assembly.instructions if each.opcode == "s_branch")
        return self.assembly.block_of_label[branch.operands[0]]

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
        if wave_order not in get_args(WaveOrder):
            names = ", ".join(get_args(WaveOrder))
            raise EmulationError(f"{wave_order!r} is no order of waves. Give one of {names}.")
        lds_bytes = max(lds_bytes, self.assembly.descriptor("group_segment_fixed_size"))
        if lds_bytes > self.target.lds_bytes:
            raise EmulationError(
                f"{self.name} needs {lds_bytes} bytes of LDS; {self.target.name} has "
                f"{self.target.lds_bytes}."
            )
        if wave_order == "both":
            return self._launch_in_both_orders(grid, num_waves, lds_bytes, arguments, memory)
        start = time.perf_counter()
        segment = memory.allocate(
            argument_segment(self.assembly, grid, num_waves * self.target.wave_size, arguments),
            f"the arguments of {self.name}",
        )
        counts = LaunchCounts()
        workgroups = np.arange(grid[0] * grid[1] * grid[2])
        if wave_order == "backward":
            workgroups = workgroups[::-1]
        at_once = max(1, _WAVES_AT_ONCE // num_waves) if wave_order == "lockstep" else 1
        try:
            for first in range(0, len(workgroups), at_once):
                part = workgroups[first : first + at_once]
                lds = Lds(len(part), lds_bytes)
                lanes = self.target.wave_size
                scratch = Scratch(len(part) * num_waves, lanes, self.scratch_bytes)
                shared = Shared(self.target, grid, part, num_waves, memory, lds, scratch)
                Run(self, shared, wave_order).finish(segment.address, counts)
        finally:
            memory.remove(segment)
        counts.seconds = time.perf_counter() - start
        return counts

    def _launch_in_both_orders(
        self,
        grid: tuple[int, int, int],
        num_waves: int,
        lds_bytes: int,
        arguments: Sequence[int],
        memory: GlobalMemory,
    ) -> LaunchCounts:
        """Run forward, then backward from the same memory, and compare all memory."""

        def run(order: WaveOrder) -> LaunchCounts:
            return self.launch(grid, num_waves, lds_bytes, arguments, memory, wave_order=order)

        before = [region.saved() for region in memory.regions]
        run("forward")
        first = [region.data.copy() for region in memory.regions]
        for region, saved in zip(memory.regions, before, strict=True):
            region.restore(saved)
        counts = run("backward")
        for region, expected in zip(memory.regions, first, strict=True):
            if not np.array_equal(region.data, expected):
                byte = int((region.data != expected).argmax())
                raise WaveOrderFault(
                    f"Byte {byte} of {region.name!r} depends on the order in which waves run: "
                    f"{expected[byte]:#04x} if the first wave of a workgroup runs first, "
                    f"{region.data[byte]:#04x} if the last one does."
                )
        return counts


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python looks for cycles after some number of new objects: half of the time to decode."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Run:
    """Runs workgroups of a launch at the same time.

    Args:
        kernel: the kernel.
        shared: which workgroups, and what their waves share.
        wave_order: in which order the waves of a workgroup run.
    """

    def __init__(self, kernel: Kernel, shared: Shared, wave_order: WaveOrder) -> None:
        self.kernel, self.shared, self._order = kernel, shared, wave_order
        self._executed: Counter[int] = Counter()

    def finish(self, argument_address: int, counts: LaunchCounts) -> None:
        """Run until all waves have ended, and add what they executed to the counts."""
        registers = (self.kernel.vgprs, self.kernel.agprs)
        group = initial_registers(self.kernel.assembly, self.shared, registers, argument_address)
        group.block = self.kernel.first_block
        counts.waves += group.num_waves
        with np.errstate(all="ignore"):
            self._run(self._by_order(group))
        for index, times in self._executed.items():
            for each in self.kernel.block(index):
                counts.lines[each.text.line] += times
                counts.sources[each.text.source.rpartition(":")[0]] += times
                for name in each.opcodes:
                    counts.instructions[name] += times
        counts.lds_bytes_read += self.shared.lds.bytes_read
        counts.lds_bytes_written += self.shared.lds.bytes_written
        counts.scratch_bytes_read += self.shared.scratch.bytes_read
        counts.scratch_bytes_written += self.shared.scratch.bytes_written

    def _by_order(self, group: WaveGroup) -> list[WaveGroup]:
        """The group, or one for each wave number if waves run one after another."""
        if self._order == "lockstep":
            return [group]
        number = group.ids % self.shared.waves_per_workgroup
        return [group.only(number == i) for i in range(self.shared.waves_per_workgroup)]

    def _rank(self, group: WaveGroup) -> int:
        """Groups of the lowest rank run first, until they wait or end."""
        if self._order == "lockstep":
            return 0
        number = int(group.ids[0] % self.shared.waves_per_workgroup)
        return number if self._order == "forward" else -number

    def _run(self, groups: list[WaveGroup]) -> None:
        executed = 0
        while groups:
            ready = [group for group in groups if not group.waits_at_barrier]
            if not ready:
                self._release(groups)
                continue
            group = min(ready, key=lambda each: (self._rank(each), each.block))
            groups.remove(group)
            for other in ready:
                is_next = other is not group and self._rank(other) == self._rank(group)
                if is_next and group.joins(other):
                    groups.remove(other)
                    group = group.joined(other)
            is_alone = not any(self._rank(each) == self._rank(group) for each in groups)
            while True:
                executed += self._execute_block(group)
                if executed > _LIMIT:
                    raise KernelFault(
                        f"{self.kernel.name} does not end: it has executed {executed} instructions."
                    )
                parts = self._next(group)
                if len(parts) != 1 or not is_alone or parts[0].waits_at_barrier:
                    groups += parts
                    break
                (group,) = parts

    def _execute_block(self, group: WaveGroup) -> int:
        """Execute a basic block up to its last instruction; returns how many instructions."""
        block = self.kernel.block(group.block)
        self._executed[group.block] += group.num_waves
        for instruction in block:
            try:
                if group.pending and not instruction.registers.isdisjoint(group.pending_registers):
                    parsed, reads, writes = instruction.text, instruction.reads, instruction.writes
                    check_registers(group, parsed, reads, writes)
                instruction.execute(group)
            except Exception as error:
                target = self.shared.target.name
                add_note(error, f"{self.kernel.name} on {target}, {instruction.text}")
                raise
        return len(block)

    def _next(self, group: WaveGroup) -> list[WaveGroup]:
        """The group at the block that comes next; none if it has ended, two if waves differ."""
        last = self.kernel.assembly.blocks[group.block][-1]
        following = group.block + 1
        if last.opcode == "s_endpgm":
            finish_all(group)
            return []
        if last.opcode == "s_branch":
            group.block = self._block_at(last)
            return [group]
        if last.opcode in ("s_barrier", "s_barrier_wait"):
            if last.opcode == "s_barrier":
                publish(group)
            group.block, group.waits_at_barrier = following, True
            return [group]
        if not last.opcode.startswith("s_cbranch"):
            group.block = following
            return [group]
        taken = _CONDITIONS[last.opcode](group)
        if taken.all() or not taken.any():
            group.block = self._block_at(last) if taken.all() else following
            return [group]
        jump, stay = group.only(taken), group.only(~taken)
        jump.block, stay.block = self._block_at(last), following
        return [jump, stay]

    def _block_at(self, branch: Instruction) -> int:
        return self.kernel.assembly.block_of_label[branch.operands[0]]

    def _release(self, groups: Iterable[WaveGroup]) -> None:
        """Let all waves pass their barrier."""
        in_flight = []
        for group in groups:
            # RDNA4: accesses after the signal are not ordered with other waves' after the barrier.
            late = (*group.pending, *(group.after_signal or ()))
            in_flight += [each.access for each in late if isinstance(each.access, LdsAccess)]
            group.waits_at_barrier, group.after_signal = False, None
        self.shared.lds.new_epoch(in_flight)


def _vcc_is_set(group: WaveGroup) -> NDArray[np.bool_]:
    words = group.s_u32[VCC : VCC + group.lanes // 32]
    return np.asarray((words != 0).any(axis=0))


def _exec_is_set(group: WaveGroup) -> NDArray[np.bool_]:
    words = group.s_u32[EXEC : EXEC + group.lanes // 32]
    return np.asarray((words != 0).any(axis=0))


#: Which waves take a branch, (waves,) bool.
_CONDITIONS: dict[str, Callable[[WaveGroup], NDArray[np.bool_]]] = {
    "s_cbranch_scc0": lambda group: ~group.scc,
    "s_cbranch_scc1": lambda group: group.scc,
    "s_cbranch_vccz": lambda group: ~_vcc_is_set(group),
    "s_cbranch_vccnz": _vcc_is_set,
    "s_cbranch_execz": lambda group: ~_exec_is_set(group),
    "s_cbranch_execnz": _exec_is_set,
}
