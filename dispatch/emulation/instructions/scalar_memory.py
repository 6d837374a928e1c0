"""Decodes scalar loads: s_load_* and s_buffer_load_*."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.bits import to_u64
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import KernelFault, MemoryFault, UnknownInstruction
from attn_dispatch.emulation.instructions.operands import U32, parse_operand, scalar_reader
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]

_LOAD = re.compile(
    r"s_(?P<buffer>buffer_)?load_(?:dword(?:x(?P<words>2|4|8|16))?"
    r"|b(?P<bits>32|64|96|128|256|512)|(?P<small>[ui](?:8|16)))"
)
#: Caches and their coherence have no part in the emulator.
_NO_EFFECT = {"glc", "slc", "dlc", "scope", "th", "nv"}


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What a scalar load does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the form of its operands is not known.
    """
    match = _LOAD.fullmatch(instruction.opcode)
    if match is None:
        return None
    unknown = set(instruction.modifiers) - _NO_EFFECT - {"offset"}
    if unknown:
        raise UnknownInstruction(f"the modifiers {', '.join(sorted(unknown))} are not known")
    destination, base, offset = (parse_operand(text) for text in instruction.operands)
    size = _size(match)
    words = max(size // 4, 1)
    registers = destination.require_registers("s")
    if registers.count != words:
        raise UnknownInstruction(f"{destination.text} are {registers.count} registers, not {words}")
    if base.require_registers("s").count != (4 if match["buffer"] else 2):
        raise UnknownInstruction(f"{base.text} is no base of {instruction.opcode}")
    at, first = base.require_registers("s").first, registers.first
    ids = frozenset(registers.ids)
    sources = frozenset(i for each in (base, offset) if each.registers for i in each.registers.ids)
    read_offset = _offset_reader(offset.text, instruction.modifiers.get("offset", "0"))
    load = _buffer_load if match["buffer"] else _load
    extend = _sign_extension(match["small"])

    def execute(group: WaveGroup) -> None:
        values = load(group, at, read_offset(group), size)
        group.s_u32[first : first + words] = extend(values) if extend else values
        issue(group, instruction, "scalar", ids)

    return Semantics(execute, ids, sources)


def _size(match: re.Match[str]) -> int:
    """Bytes that are loaded."""
    if match["small"]:
        return int(match["small"][1:]) // 8
    return int(match["bits"]) // 8 if match["bits"] else 4 * int(match["words"] or 1)


def _sign_extension(small: str | None) -> Callable[[NDArray[np.uint32]], NDArray[np.uint32]] | None:
    if small is None or small[0] == "u":
        return None
    narrow = np.dtype(f"int{small[1:]}")
    return lambda values: values.astype(narrow).astype(np.int32).view(np.uint32)


def _offset_reader(text: str, immediate: str) -> Callable[[WaveGroup], Any]:
    """The sum of the offset operand and the `offset:` modifier, as int64."""
    operand, added = parse_operand(text), np.int64(int(immediate, 0))
    if operand.registers is None:
        value = np.int64(0 if text == "null" else int(text, 0)) + added
        return lambda group: value
    read = scalar_reader(operand, U32)
    return lambda group: read(group).astype(np.int64) + added


def _check_alignment(base: Any, offset: Any, size: int) -> None:
    """Hardware leaves out the lower bits of both; no compiler relies on that."""
    if (np.asarray(base | offset) & (min(size, 4) - 1)).any():
        wrong = int(np.broadcast_to(base + offset, np.shape(base)).flat[0])
        raise MemoryFault(
            f"A scalar load of {size} bytes is not aligned: its address is {wrong:#x}."
        )


def _load(group: WaveGroup, at: int, offset: Any, size: int) -> NDArray[np.uint32]:
    base = to_u64(group.s_u32[at], group.s_u32[at + 1]).view(np.int64)
    _check_alignment(base, offset, size)
    return group.shared.memory.load(base + offset, size, group.ids)


def _buffer_load(group: WaveGroup, at: int, offset: Any, size: int) -> NDArray[np.uint32]:
    """Each word that is not within the buffer is 0."""
    descriptor = group.s_u32[at : at + 4]
    if (descriptor[1] >> np.uint32(16)).any():
        raise KernelFault("A scalar load from a buffer with a stride is not emulated.")
    base = to_u64(descriptor[0], descriptor[1]).view(np.int64)
    _check_alignment(base, offset, size)
    words, step = max(size // 4, 1), min(size, 4)
    starts = np.arange(words)[:, None] * 4 + np.broadcast_to(offset, base.shape)
    inside = (starts >= 0) & (starts + step <= descriptor[2].astype(np.int64))
    waves = np.broadcast_to(group.ids, starts.shape)
    values = np.zeros(starts.shape, np.uint32)
    if inside.any():
        values[inside] = group.shared.memory.load((base + starts)[inside], step, waves[inside])[0]
    return values
