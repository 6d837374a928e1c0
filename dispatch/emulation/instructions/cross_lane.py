"""Decodes instructions that move values between the lanes of a wave, without memory.

DPP and SDWA are modifiers of vector instructions, not instructions of this module.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

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
    modifiers = dict(instruction.modifiers)
    operands = [parse_operand(text) for text in instruction.operands]
    semantics = make(instruction, operands, modifiers, target.wave_size)
    if modifiers:
        raise UnknownInstruction(f"the modifiers {', '.join(modifiers)} are not known")
    return semantics


#: Makes the semantics of an instruction from its operands, the modifiers, of which it removes those
#: that it knows, and the number of lanes.
_Decoder = Callable[[Instruction, list[Operand], dict[str, str], int], Semantics]


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


def _readlane(
    _: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    destination, source, number = operands
    write, read = scalar_writer(destination, U32), _plain_vector(source)
    index = _lane_index(number, lanes)

    def execute(group: WaveGroup) -> None:
        write(group, read(group)[index(group)])

    return Semantics(execute)


def _readfirstlane(
    _: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    destination, source = operands
    write, read = scalar_writer(destination, U32), _plain_vector(source)

    def execute(group: WaveGroup) -> None:
        if group.full:
            write(group, read(group)[:, 0])
        else:  # lane 0 if no lane executes
            first = group.exec.argmax(axis=1)
            write(group, read(group)[np.arange(group.num_waves), first])

    return Semantics(execute)


def _writelane(
    _: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """EXEC has no effect."""
    destination, source, number = operands
    target, read = _plain_vector(destination), scalar_reader(source, U32)
    index = _lane_index(number, lanes)

    def execute(group: WaveGroup) -> None:
        target(group)[index(group)] = read(group)

    return Semantics(execute)


# Rows of 16 lanes ---------------------------------------------------------------------------------
def _permlane16(
    instruction: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """Each lane reads the lane of its row, or of the other row of a pair, that the sources name."""
    destination, source, *selectors = operands
    crosses = "permlanex16" in instruction.opcode
    read, write = _plain_vector(source), vector_writer(destination, U32)
    old = _plain_vector(destination)
    sources = (
        _sources_in_lanes(selectors[0], crosses, lanes)
        if instruction.opcode.endswith("_var_b32")
        else _sources_in_scalars(selectors[0], selectors[1], crosses, lanes)
    )
    reads_inactive, zeroes = ast.literal_eval(modifiers.pop("op_sel", "[0,0]"))

    def execute(group: WaveGroup) -> None:
        index = sources(group)
        value = _picked(read(group), index)
        if not reads_inactive and not group.full:
            is_active = _picked(group.exec, index)
            value = np.where(is_active, value, np.uint32(0) if zeroes else old(group))
        write(group, value)

    return Semantics(execute)


def _sources_in_scalars(low: Operand, high: Operand, crosses: bool, lanes: int) -> Reader:
    reads = [scalar_reader(each, U32) for each in (low, high)]
    if low.registers is None and high.registers is None:
        constants = [np.atleast_1d(read(None)) for read in reads]  # type: ignore[arg-type]
        index = permlane16_sources(constants[0], constants[1], crosses, lanes)
        return lambda group: index

    def sources(group: WaveGroup) -> NDArray[np.int64]:
        words = [np.broadcast_to(read(group), group.ids.shape) for read in reads]
        return permlane16_sources(words[0], words[1], crosses, lanes)

    return sources


def _sources_in_lanes(selector: Operand, crosses: bool, lanes: int) -> Reader:
    read = _plain_vector(selector)
    rows = np.arange(lanes) // 16 * 16 ^ (16 if crosses else 0)
    return lambda group: (read(group) & np.uint32(15)).astype(np.int64) + rows


def _permlane_swap(
    instruction: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """Swap the second half of each row pair, or of the wave, with the first half of the source.

    `fi` and `bound_ctrl` are for lanes that do not execute.
    """
    half = 16 if "16" in instruction.opcode else 32
    first, second = (_plain_vector(each) for each in operands)
    for name in ("fi", "bound_ctrl"):
        modifiers.pop(name, None)

    def execute(group: WaveGroup) -> None:
        if not group.full:
            raise UnknownInstruction(f"{instruction.opcode} with lanes that do not execute")
        shape = (group.num_waves, -1, 2, half)
        upper, lower = first(group).reshape(shape)[:, :, 1], second(group).reshape(shape)[:, :, 0]
        kept = upper.copy()
        upper[...], lower[...] = lower, kept

    return Semantics(execute)


# Any lane, by the data path of LDS ----------------------------------------------------------------
def _lds_semantics(
    instruction: Instruction, operands: list[Operand], value_of: Callable[[WaveGroup], Any]
) -> Semantics:
    """An operation that is counted as one of LDS, though it accesses none."""
    destination, *sources = operands
    write, ids = vector_writer(destination, U32), frozenset(destination.require_registers().ids)
    source_ids = frozenset(i for each in sources for i in each.require_registers().ids)

    def execute(group: WaveGroup) -> None:
        write(group, value_of(group))
        issue(group, instruction, "lds", ids)

    return Semantics(execute, ids, source_ids)


def _active_or_zero(group: WaveGroup, value: Any) -> Any:
    return value if group.full else np.where(group.exec, value, np.uint32(0))


def _bpermute(
    instruction: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """Each lane reads the lane at a byte address, 4 a lane; 0 if that one does not execute."""
    _, address, data = operands
    lane, read = _lane_of_address(address, modifiers, lanes), _plain_vector(data)

    def value_of(group: WaveGroup) -> Any:
        return _picked(_active_or_zero(group, read(group)), lane(group))

    return _lds_semantics(instruction, operands, value_of)


def _permute(
    instruction: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """Each lane that executes writes to a lane; the last one wins, and the other lanes are 0."""
    _, address, data = operands
    lane, read = _lane_of_address(address, modifiers, lanes), _plain_vector(data)

    def value_of(group: WaveGroup) -> Any:
        result = np.zeros(group.exec.shape, np.uint32)
        wave = np.arange(group.num_waves)[:, None]
        # NumPy assigns in order.
        result[group.active(wave), group.active(lane(group))] = group.active(read(group))
        return result

    return _lds_semantics(instruction, operands, value_of)


def _lane_of_address(address: Operand, modifiers: dict[str, str], lanes: int) -> Reader:
    read, offset = _plain_vector(address), np.uint32(int(modifiers.pop("offset", "0"), 0))
    two, mask = np.uint32(2), np.uint32(lanes - 1)
    if not offset:
        return lambda group: (read(group) >> two & mask).astype(np.int64)
    return lambda group: (read(group) + offset >> two & mask).astype(np.int64)


def _swizzle(
    instruction: Instruction, operands: list[Operand], modifiers: dict[str, str], lanes: int
) -> Semantics:
    """Each lane reads a fixed lane; 0 from lanes that do not execute."""
    _, data = operands
    read, index = _plain_vector(data), swizzle_sources(modifiers.pop("offset", "0"), lanes)
    return _lds_semantics(
        instruction, operands, lambda group: _active_or_zero(group, read(group))[:, index]
    )


_DECODERS: dict[str, _Decoder] = {
    "v_readlane_b32": _readlane,
    "v_readfirstlane_b32": _readfirstlane,
    "v_writelane_b32": _writelane,
    "v_permlane16_b32": _permlane16,
    "v_permlanex16_b32": _permlane16,
    "v_permlane16_var_b32": _permlane16,
    "v_permlanex16_var_b32": _permlane16,
    "v_permlane16_swap_b32": _permlane_swap,
    "v_permlane32_swap_b32": _permlane_swap,
    "ds_bpermute_b32": _bpermute,
    "ds_permute_b32": _permute,
    "ds_swizzle_b32": _swizzle,
}
#: The instructions of this module.
OPCODES = frozenset(_DECODERS)
