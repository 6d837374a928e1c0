"""Decodes scalar loads: s_load_*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import MemoryFault
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    CACHE_MODIFIERS,
    check_modifiers,
    integer_modifier,
    register_ids,
    registers_of,
)
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]

#: Opcode -> what is loaded: type and count.
_LOADS: dict[str, tuple[Any, int]] = {
    "s_load_dword": (np.uint32, 1),
    **{f"s_load_dwordx{count}": (np.uint32, count) for count in (2, 4, 8, 16)},
    **{f"s_load_b{32 * count}": (np.uint32, count) for count in (1, 2, 3, 4, 8, 16)},
    "s_load_u8": (np.uint8, 1),
    "s_load_i8": (np.int8, 1),
    "s_load_u16": (np.uint16, 1),
    "s_load_i16": (np.int16, 1),
}


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What a scalar load does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the form of its operands is not known.
    """
    if instruction.opcode not in _LOADS:
        return None
    check_modifiers(instruction, {"offset", *CACHE_MODIFIERS})
    dtype, words = _LOADS[instruction.opcode]
    unit = np.dtype(dtype).itemsize
    size = unit * words
    destination, base, offset = instruction.operands
    first, low = registers_of(destination, "s", words).first, registers_of(base, "s", 2).first
    results = register_ids([destination])
    read_offset = _offset_reader(offset, integer_modifier(instruction, "offset"))

    def execute(group: WaveGroup) -> None:
        begin = to_u64(group.s_u32[low], group.s_u32[low + 1]).view(np.int64)
        more = read_offset(group)
        # Hardware leaves out the lower bits of both; no compiler relies on that.
        wrong = (begin | more) & (unit - 1) != 0
        if wrong.any():
            address = (begin + more)[wrong][0]
            raise MemoryFault(
                f"A scalar load of {size} bytes is not aligned: its address is {address:#x}."
            )
        values = group.shared.memory.load(begin + more, size, group.ids)
        group.s_u32[first : first + words] = values.astype(dtype, copy=False)
        issue(group, instruction, "scalar", results)

    return Semantics(execute, results, register_ids([base, offset]))


def _offset_reader(text: str, added: int) -> Callable[[WaveGroup], Any]:
    """The sum of the offset operand and the `offset:` modifier, as int64."""
    operand = parse_operand(text)
    if operand.registers is None:
        value = np.int64(0 if text == "null" else int(text, 0)) + added
        return lambda group: value
    read = scalar_reader(operand, U32)
    return lambda group: read(group).astype(np.int64) + added
