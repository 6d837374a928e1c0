"""Memory operations that are not finished, and the instructions that wait for them.

A wave issues memory operations and goes on. Each adds one to a counter, and is finished at the
latest when an `s_waitcnt` (on RDNA4 `s_wait_loadcnt` and others) says that at most n of its counter
may be left. Until then its result registers have no defined value, and its stores may not have
arrived. AMD's ISA manuals, "data dependency resolution"; the order in which operations of a counter
finish is that of LLVM's AMDGPU usage guide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction, WaitFault
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.memory.lds import LdsAccess
from attn_dispatch.emulation.pending import ORDER_OF_OPCODE, Pending
from attn_dispatch.emulation.registers import name_of
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["check_registers", "decode_wait", "finish_all", "issue", "publish"]

#: Generation -> kind of operation -> the counter that it adds to.
_COUNTERS: dict[int, dict[str, str]] = {
    9: {"load": "vmcnt", "store": "vmcnt", "lds": "lgkmcnt", "scalar": "lgkmcnt"},
    11: {"load": "vmcnt", "store": "vscnt", "lds": "lgkmcnt", "scalar": "lgkmcnt"},
    12: {"load": "loadcnt", "store": "storecnt", "lds": "dscnt", "scalar": "kmcnt"},
}


def issue(
    group: WaveGroup,
    instruction: Instruction,
    kind: str,
    registers: Iterable[int] = (),
    access: StoresInFlight | LdsAccess | None = None,
) -> None:
    """Add an operation of all waves of a group to what is pending.

    Args:
        group: the waves.
        instruction: that they execute.
        kind: "load" (also atomics that return a value), "store", "lds" or "scalar"; "flat_load" and
            "flat_store" also add to the counter of LDS.
        registers: `Registers.ids` that it will write.
        access: of memory, if it is watched.
    """
    counters, is_flat = _COUNTERS[group.shared.target.generation], kind.startswith("flat_")
    counter, registers = counters[kind[5:] if is_flat else kind], frozenset(registers)
    made = Pending(instruction, kind, counter, registers, access)
    group.set_pending((*group.pending, made))
    if is_flat:
        made = Pending(instruction, kind, counters["lds"], registers)
        group.set_pending((*group.pending, made))
    if group.after_signal is not None and isinstance(access, LdsAccess):
        group.after_signal += (access,)


def check_registers(
    group: WaveGroup, instruction: Instruction, reads: frozenset[int], writes: frozenset[int]
) -> None:
    """Check that an instruction uses no register that a pending operation will write.

    Args:
        group: the waves that are about to execute it.
        instruction: the instruction.
        reads: `Registers.ids` that it reads, and those that it writes at once.
        writes: those that it writes when it is finished, which is after earlier operations of the
            same order.

    Raises:
        WaitFault: it does.
    """
    order = ORDER_OF_OPCODE.get(instruction.opcode.split("_")[0])
    for each in group.pending:
        is_before = order is not None and each.order == order
        used = each.registers & (reads if is_before else reads | writes)
        if used:
            raise WaitFault(
                f"{name_of(min(used))} is used before the wait for the operation that writes it: "
                f"{each.instruction}"
            )


# Instructions that wait ---------------------------------------------------------------------------

_RDNA4 = re.compile(r"s_wait_(load|store|ds|km|sample|bvh|exp)cnt(_dscnt)?")


def decode_wait(instruction: Instruction) -> Callable[[WaveGroup], None] | None:
    """What a wait or a barrier does; None if the instruction is none.

    Raises:
        UnknownInstruction: a named barrier, or a wait that names no counter.
    """
    if instruction.opcode == "s_barrier":
        return publish
    if instruction.opcode in ("s_barrier_signal", "s_barrier_wait"):
        if instruction.operands != ("-1",):
            raise UnknownInstruction(f"{instruction}: only the barrier -1 is known.")
        return _signal if instruction.opcode == "s_barrier_signal" else _wait_for_signals
    limits = _limits(instruction)
    if limits is None:
        return None

    def wait(group: WaveGroup) -> None:
        if group.pending:
            for counter, limit in limits.items():
                _wait(group, counter, limit)

    return wait


def _limits(instruction: Instruction) -> dict[str, int] | None:
    """Counter -> how many operations may be left; also counters that nothing here adds to."""
    opcode = instruction.opcode
    if opcode == "s_waitcnt":
        found = re.findall(r"(\w+)\((\d+)\)", instruction.text)
        if not found:
            raise UnknownInstruction(f"{instruction}: it names no counter.")
        return {name: int(count) for name, count in found}
    if opcode == "s_waitcnt_vscnt":
        return {"vscnt": int(instruction.operands[1], 0)}
    if opcode == "s_wait_idle":
        return dict.fromkeys(("loadcnt", "storecnt", "dscnt", "kmcnt"), 0)
    name = _RDNA4.fullmatch(opcode)
    if not name:
        return None
    value = int(instruction.operands[0], 0)
    if name[2]:  # two counters in one: the second in the lower six bits
        return {f"{name[1]}cnt": value >> 8 & 63, "dscnt": value & 63}
    return {f"{name[1]}cnt": value}


def _wait(group: WaveGroup, counter: str, limit: int) -> None:
    """Finish all operations that must be finished if at most `limit` of a counter are left."""
    left = []
    unfinished = Counter(each.order for each in group.pending if each.counter == counter)
    for each in group.pending:
        # If it were not finished, neither would be those that finish only after it.
        if each.counter != counter or (unfinished[each.order] if each.order else 1) <= limit:
            left.append(each)
        else:
            _finish(group, each)
        unfinished[each.order] -= each.counter == counter
    group.set_pending(tuple(left))


def _signal(group: WaveGroup) -> None:
    """Other waves may pass the barrier, whether what is pending has finished or not (RDNA4)."""
    if group.after_signal is not None:
        raise KernelFault("A wave signals a barrier again, and has not waited for the last one.")
    publish(group)
    accesses = [each.access for each in group.pending]
    group.after_signal = tuple([each for each in accesses if isinstance(each, LdsAccess)])


def _wait_for_signals(group: WaveGroup) -> None:
    if group.after_signal is None:
        raise KernelFault("A wave waits at a barrier that it has not signalled: it never ends.")


def finish_all(group: WaveGroup) -> None:
    """Finish everything, as at the end of a wave."""
    for each in group.pending:
        _finish(group, each)
    group.set_pending(())
    publish(group)


def publish(group: WaveGroup, *, only_active: bool = False) -> None:
    """Let other waves read what waves have stored and waited for.

    To be called when waves come to a barrier, or do an atomic operation on global memory: what
    other waves do later may be ordered with these stores. A wait by itself orders nothing.

    Args:
        group: the waves.
        only_active: only those with lanes in EXEC.
    """
    now, left = group.unpublished, StoresInFlight()
    if only_active and not group.full:
        chosen = np.asarray(group.exec.any(axis=1))
        now, left = now.only(group.ids[chosen]), now.only(group.ids[~chosen])
    group.shared.memory.retire(now)
    group.unpublished = left


def _finish(group: WaveGroup, operation: Pending) -> None:
    if isinstance(operation.access, StoresInFlight):
        group.unpublished = group.unpublished.joined(operation.access)
    elif operation.access is not None and operation.access.arrives_later:
        group.shared.lds.arrived(operation.access)
