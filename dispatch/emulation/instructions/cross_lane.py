"""Decodes instructions that move values between the lanes of a wave, without memory.

DPP and SDWA are modifiers of vector instructions, not instructions of this module.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.lanes import permlane16_sources, swizzle_sources
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    U32,
    Operand,
    Reader,
    constant,
    parse_operand,
    scalar_reader,
    scalar_writer,
    vector_reader,
    vector_writer,
)
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["OPCODES", "decode"]


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """What an instruction across lanes does; None for an instruction of another family.

    Raises:
        UnknownInstruction: the form of its operands is not known.
    """
    make = _DECODERS.get(instruction.opcode)
    if make is None:
        return None
    operands = [parse_operand(text) for text in instruction.operands]
    parsed = _Parsed(instruction, operands, dict(instruction.modifiers), target.wave_size)
    semantics = make(parsed)
    if parsed.modifiers:
        raise UnknownInstruction(f"the modifiers {', '.join(parsed.modifiers)} are not known")
    return semantics


class _Parsed(NamedTuple):
    """An instruction, its operands, its modifiers that are not yet decoded, and lanes of a wave."""

    instruction: Instruction
    operands: list[Operand]
    modifiers: dict[str, str]
    lanes: int


def _plain_vector(operand: Operand) -> Reader:
    """The lanes of a vector register, (waves, lanes)."""
    operand.require_registers("va")
    if operand.negate or operand.absolute or operand.half is not None:
        raise UnknownInstruction(f"the modifiers of {operand.text} are not known")
    return vector_reader(operand, U32)


def _picked(values: Any, lanes: NDArray[np.int64]) -> Any:
    """The values (waves, lanes) of other lanes of the same wave, (1 or waves, lanes)."""
    if len(lanes) == 1:
        return values[:, lanes[0]]
    starts = np.arange(len(values))[:, None] * values.shape[1]
    return values.take(lanes + starts)


# One lane -----------------------------------------------------------------------------------------
def _lane_index(operand: Operand, lanes: int) -> Callable[[WaveGroup], tuple[Any, Any]]:
    """The index of one lane in (waves, lanes): its number is modulo the number of lanes."""
    read = scalar_reader(operand, U32)
    if operand.registers is None:
        index = slice(None), int(constant(operand.text, U32)) % lanes
        return lambda group: index
    mask = np.uint32(lanes - 1)
    return lambda group: (np.arange(group.num_waves), read(group) & mask)


def _readlane(parsed: _Parsed) -> Semantics:
    destination, source, number = parsed.operands
    write, read = scalar_writer(destination, U32), _plain_vector(source)
    index = _lane_index(number, parsed.lanes)

    def execute(group: WaveGroup) -> None:
        write(group, read(group)[index(group)])

    return Semantics(execute)


def _readfirstlane(parsed: _Parsed) -> Semantics:
    destination, source = parsed.operands
    write, read = scalar_writer(destination, U32), _plain_vector(source)

    def execute(group: WaveGroup) -> None:
        if group.full:
            write(group, read(group)[:, 0])
        else:  # lane 0 if no lane executes
            first = group.exec.argmax(axis=1)
            write(group, read(group)[np.arange(group.num_waves), first])

    return Semantics(execute)


def _writelane(parsed: _Parsed) -> Semantics:
    """EXEC has no effect."""
    destination, source, number = parsed.operands
    target, read = _plain_vector(destination), scalar_reader(source, U32)
    index = _lane_index(number, parsed.lanes)

    def execute(group: WaveGroup) -> None:
        target(group)[index(group)] = read(group)

    return Semantics(execute)


# Rows of 16 lanes ---------------------------------------------------------------------------------
def _permlane16(parsed: _Parsed) -> Semantics:
    """Each lane reads the lane of its row, or of the other row of a pair, that the sources name."""
    destination, source, low_half, high_half = parsed.operands
    read, old = _plain_vector(source), _plain_vector(destination)
    write = vector_writer(destination, U32)
    selectors = [scalar_reader(each, U32) for each in (low_half, high_half)]
    crosses, lanes = "permlanex16" in parsed.instruction.opcode, parsed.lanes
    reads_inactive, zeroes = ast.literal_eval(parsed.modifiers.pop("op_sel", "[0,0]"))

    def execute(group: WaveGroup) -> None:
        words = [each(group) for each in selectors]
        by_wave = [each.tolist() if each.ndim else [int(each)] * group.num_waves for each in words]
        pairs = list(zip(*by_wave, strict=True))
        if len(set(pairs)) == 1:  # as in kernels
            del pairs[1:]
        index = np.array([permlane16_sources(low, high, crosses, lanes) for low, high in pairs])
        value = _picked(read(group), index)
        if not reads_inactive and not group.full:
            is_active = _picked(group.exec, index)
            value = np.where(is_active, value, np.uint32(0) if zeroes else old(group))
        write(group, value)

    return Semantics(execute)


def _permlane_swap(parsed: _Parsed) -> Semantics:
    """Swap the second half of each row pair, or of the wave, with the first half of the source.

    `fi` and `bound_ctrl` are for lanes that do not execute.
    """
    half = 16 if "16" in parsed.instruction.opcode else 32
    first, second = (_plain_vector(each) for each in parsed.operands)
    for name in ("fi", "bound_ctrl"):
        parsed.modifiers.pop(name, None)

    def execute(group: WaveGroup) -> None:
        if not group.full:
            raise UnknownInstruction(f"{parsed.instruction.opcode} with lanes that do not execute")
        shape = (group.num_waves, -1, 2, half)
        upper, lower = first(group).reshape(shape)[:, :, 1], second(group).reshape(shape)[:, :, 0]
        kept = upper.copy()
        upper[...], lower[...] = lower, kept

    return Semantics(execute)


# Any lane, by the data path of LDS ----------------------------------------------------------------
def _lds_semantics(parsed: _Parsed, value_of: Callable[[WaveGroup], Any]) -> Semantics:
    """An operation that is counted as one of LDS, though it accesses none."""
    destination, *sources = parsed.operands
    write, ids = vector_writer(destination, U32), frozenset(destination.require_registers().ids)
    source_ids = frozenset(i for each in sources for i in each.require_registers().ids)

    def execute(group: WaveGroup) -> None:
        write(group, value_of(group))
        issue(group, parsed.instruction, "lds", ids)

    return Semantics(execute, ids, source_ids)


def _active_or_zero(group: WaveGroup, value: Any) -> Any:
    return value if group.full else np.where(group.exec, value, np.uint32(0))


def _bpermute(parsed: _Parsed) -> Semantics:
    """Each lane reads the lane at a byte address, 4 a lane; 0 if that one does not execute."""
    _, address, data = parsed.operands
    lane, read = _lane_of_address(parsed, address), _plain_vector(data)
    return _lds_semantics(
        parsed, lambda group: _picked(_active_or_zero(group, read(group)), lane(group))
    )


def _permute(parsed: _Parsed) -> Semantics:
    """Each lane that executes writes to a lane; the last one wins, and the other lanes are 0."""
    _, address, data = parsed.operands
    lane, read = _lane_of_address(parsed, address), _plain_vector(data)

    def value_of(group: WaveGroup) -> Any:
        result = np.zeros(group.exec.shape, np.uint32)
        wave = np.arange(group.num_waves)[:, None]
        # NumPy assigns in order.
        result[group.active(wave), group.active(lane(group))] = group.active(read(group))
        return result

    return _lds_semantics(parsed, value_of)


def _lane_of_address(parsed: _Parsed, address: Operand) -> Reader:
    """The lane at a byte address, (waves, lanes)."""
    read, offset = _plain_vector(address), np.uint32(int(parsed.modifiers.pop("offset", "0"), 0))
    two, mask = np.uint32(2), np.uint32(parsed.lanes - 1)
    return lambda group: (read(group) + offset >> two & mask).astype(np.int64)


def _swizzle(parsed: _Parsed) -> Semantics:
    """Each lane reads a fixed lane; 0 from lanes that do not execute."""
    _, data = parsed.operands
    read, index = (
        _plain_vector(data),
        swizzle_sources(parsed.modifiers.pop("offset", "0"), parsed.lanes),
    )
    return _lds_semantics(parsed, lambda group: _active_or_zero(group, read(group))[:, index])


_DECODERS: dict[str, Callable[[_Parsed], Semantics]] = {
    "v_readlane_b32": _readlane,
    "v_readfirstlane_b32": _readfirstlane,
    "v_writelane_b32": _writelane,
    "v_permlane16_b32": _permlane16,
    "v_permlanex16_b32": _permlane16,
    "v_permlane16_swap_b32": _permlane_swap,
    "v_permlane32_swap_b32": _permlane_swap,
    "ds_bpermute_b32": _bpermute,
    "ds_permute_b32": _permute,
    "ds_swizzle_b32": _swizzle,
}
#: The instructions of this module.
OPCODES = frozenset(_DECODERS)
