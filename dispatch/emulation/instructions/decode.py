"""From an instruction's text to what it does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attn_dispatch.emulation.assembly import Assembly, Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions import (
    conversions,
    cross_lane,
    lds_instructions,
    loads_to_lds,
    matrix_instructions,
    packed,
    scalar,
    scalar_memory,
    vector,
    vector_memory,
)
from attn_dispatch.emulation.instructions.operands import check_alignment, parse_operand
from attn_dispatch.emulation.instructions.semantics import Execute, Operation, Semantics
from attn_dispatch.emulation.registers import VCC
from attn_dispatch.emulation.targets import Target, target_named
from attn_dispatch.emulation.waits import decode_wait
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["Decoded", "decode", "unknown_instructions"]

#: What the emulator has no part for: caches, the instruction fetch, timing and power; and what ends
#: a block, which the machine does.
_NO_EFFECT = {
    "s_nop", "s_sleep", "s_clause", "s_delay_alu", "s_setprio", "s_waitcnt_depctr", "s_wait_alu",
    "s_wait_event", "s_set_inst_prefetch_distance", "s_inst_prefetch", "s_prefetch_inst",
    "s_prefetch_data", "s_code_end", "s_icache_inv", "s_dcache_inv", "s_dcache_wb", "s_sendmsg",
    "s_sethalt", "s_version", "s_round_mode", "buffer_gl0_inv", "buffer_gl1_inv", "buffer_inv",
    "buffer_wbl2", "buffer_wbinvl1", "buffer_wbinvl1_vol", "global_inv", "global_wb",
    "global_wbinv", "s_endpgm", "s_branch",
    "s_cbranch_scc0", "s_cbranch_scc1", "s_cbranch_vccz", "s_cbranch_vccnz", "s_cbranch_execz",
    "s_cbranch_execnz",
}  # fmt: skip

_NOTHING, _NO_REGISTERS = Semantics(lambda group: None), frozenset[int]()

#: The modules that know instructions, by how their names begin; the first that knows one counts.
_FAMILIES: dict[str, tuple[Callable[[Instruction, Target], Semantics | Operation | None], ...]] = {
    "s": (scalar.decode, scalar_memory.decode),
    "v": (
        vector.decode,
        packed.decode,
        conversions.decode,
        cross_lane.decode,
        matrix_instructions.decode,
        scalar.decode,  # v_s_exp_f32 and others
    ),
    "ds": (lds_instructions.decode, cross_lane.decode),
    "global": (loads_to_lds.decode, vector_memory.decode),
    "flat": (loads_to_lds.decode, vector_memory.decode),
    "scratch": (vector_memory.decode,),
    "buffer": (loads_to_lds.decode, vector_memory.decode),
}


@dataclass(frozen=True, eq=False)
class Decoded:
    """An instruction that can be executed.

    Attributes:
        text: as it was parsed.
        execute: changes the state of waves as the instruction does.
        reads: `Registers.ids` that it reads, or writes at once.
        writes: those that it writes when it is finished: results of loads.
        registers: both.
        opcodes: its name, or two of a dual-issued one.
    """

    text: Instruction
    execute: Execute
    reads: frozenset[int]
    writes: frozenset[int]
    registers: frozenset[int]
    opcodes: tuple[str, ...]


def decode(instruction: Instruction, target: Target) -> Decoded:
    """Decode an instruction of a target.

    Raises:
        UnknownInstruction: the emulator does not know it, or not in this form.
    """
    halves = [instruction] if instruction.second is None else [instruction, instruction.second]
    found = [_semantics(each, target) for each in halves]
    named = _NO_REGISTERS.union(*[_registers(each, target) for each in halves])
    semantics = [each for each in found if isinstance(each, Semantics)]
    writes = _NO_REGISTERS.union(*[each.results for each in semantics])
    sources = _NO_REGISTERS.union(*[each.sources for each in semantics])
    return Decoded(
        instruction,
        _together(found, instruction),
        reads=named - writes | sources,
        writes=writes,
        registers=named | sources,
        opcodes=tuple(each.opcode for each in halves),
    )


def _semantics(instruction: Instruction, target: Target) -> Semantics | Operation:
    if instruction.opcode.startswith(("s_wait", "s_barrier")):
        wait = decode_wait(instruction)
        if wait is not None:
            return Semantics(wait)
    if instruction.opcode in _NO_EFFECT:
        return _NOTHING
    try:
        for operand in instruction.operands:
            _checked_ids(operand, target.is_cdna)
        for family in _FAMILIES.get(instruction.opcode.split("_")[0], ()):
            found = family(instruction, target)
            if found is not None:
                return found
    except UnknownInstruction as error:
        raise UnknownInstruction(f"{instruction}: {error}.") from None
    except (IndexError, KeyError, ValueError) as error:
        raise UnknownInstruction(
            f"{instruction}: this form is not known ({type(error).__name__}: {error})."
        ) from error
    raise UnknownInstruction(f"{instruction}: {instruction.opcode} is not known on {target.name}.")


@functools.cache
def _checked_ids(text: str, has_even_vectors: bool) -> frozenset[int]:
    """The `Registers.ids` of an operand, whose alignment is checked."""
    registers = parse_operand(text).registers
    if registers is None:
        return frozenset()
    check_alignment(registers, has_even_vectors)
    return frozenset(registers.ids)


def _together(found: list[Semantics | Operation], instruction: Instruction) -> Execute:
    """One function. Both halves of a dual-issued instruction read before either one writes."""
    if len(found) == 1:
        return found[0].execute
    first, second = found
    if not (isinstance(first, Operation) and isinstance(second, Operation)):
        raise UnknownInstruction(f"{instruction}: this pair is not known.")

    def both(group: WaveGroup) -> None:
        # A result may be a view of a register that the other half writes.
        one, two = np.copy(first.compute(group)), second.compute(group)
        second.commit(group, two)
        first.commit(group, one)

    return both


def _registers(instruction: Instruction, target: Target) -> frozenset[int]:
    """All registers that the text names, and VCC where an instruction uses it without its name.

    A wave of 32 lanes uses the lower half of VCC; its upper half is a register like any other.
    """
    ids = [_checked_ids(text, target.is_cdna) for text in instruction.operands]
    named = _NO_REGISTERS.union(*ids)
    opcode, is_short = instruction.opcode, len(instruction.operands) == 3
    uses_vcc = "vcc" in opcode or opcode.startswith("v_div_fmas")
    uses_vcc |= opcode == "v_cndmask_b32" and is_short  # dual-issued
    return named | set(range(VCC, VCC + target.wave_size // 32)) if uses_vcc else named


def unknown_instructions(text: str, arch: str) -> list[str]:
    """What the emulator does not know of a kernel: one message for each opcode.

    Args:
        text: the kernel's assembly.
        arch: the target that it was compiled for.

    Raises:
        EmulationError: the target is not emulated, or the text is no kernel's.
    """
    target = target_named(arch)
    found: dict[str, str] = {}
    # One of each form: the numbers of registers do not matter, but how many there are.
    forms = {_form(each.text): each for each in reversed(Assembly(text).instructions)}
    for instruction in forms.values():
        try:
            decode(instruction, target)
        except UnknownInstruction as error:
            found.setdefault(instruction.opcode, str(error))
    return list(found.values())


def _form(text: str) -> str:
    """An instruction without the numbers of registers, and with the sizes of groups of them."""
    opcode, _, operands = text.partition(" ")
    return (
        f"{opcode} {_NUMBERS.sub(lambda m: str(int(m[2]) - int(m[1])) if m[1] else '', operands)}"
    )


_NUMBERS = re.compile(r"(?<=[vsap]\[)(\d+):(\d+)|(?<=[vsap])\d+")
