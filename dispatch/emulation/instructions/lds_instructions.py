"""Instructions that access LDS: loads, stores, atomic operations.

AMD's ISA manuals, "data share operations". CDNA calls loads `ds_read_...` and stores
`ds_write_...`, RDNA `ds_load_...` and `ds_store_...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    LDS_LOADS,
    LDS_STORES,
    Transfer,
    check_modifiers,
    data_reader,
    data_writer,
    integer_modifier,
    register_ids,
    registers_of,
)
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode", "opcodes"]

_Offsets = Callable[["WaveGroup"], NDArray[np.int64]]


@dataclass(frozen=True)
class _One:
    """A load or store of one value, at `offset`.

    Attributes:
        is_load: otherwise it is a store.
        transfer: of the value.
        transposes: whether the lanes exchange what they load.
    """

    is_load: bool
    transfer: Transfer
    transposes: bool = False


@dataclass(frozen=True)
class _Two:
    """A load or store of two values.

    Attributes:
        is_load: otherwise it is a store.
        transfer: of each value.
        step: bytes by which `offset0` and `offset1` count.
    """

    is_load: bool
    transfer: Transfer
    step: int


@dataclass(frozen=True)
class _Atomic:
    """An atomic operation.

    Attributes:
        operation: one of `atomics.ATOMIC_OPERATIONS`.
        transfer: of the value.
        returns: whether it returns what it found in memory.
    """

    operation: str
    transfer: Transfer
    returns: bool


#: Operations on integers by their name without the number of bits.
_INTEGER_ATOMICS = {
    "add_u": "add", "sub_u": "sub", "inc_u": "inc", "dec_u": "dec", "min_i": "min_i",
    "max_i": "max_i", "min_u": "min_u", "max_u": "max_u", "and_b": "and", "or_b": "or",
    "xor_b": "xor",
}  # fmt: skip
#: Additions of floats, with the targets that have them.
_FLOAT_ATOMICS = {
    "add_f32": (4, ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
    "add_f64": (8, ("gfx90a", "gfx942", "gfx950")),
    "pk_add_f16": (4, ("gfx942", "gfx950", "gfx1201")),
    "pk_add_bf16": (4, ("gfx942", "gfx950", "gfx1201")),
}


@cache
def _forms(target: Target) -> dict[str, _One | _Two | _Atomic]:
    """What this module decodes, by opcode."""
    forms: dict[str, _One | _Two | _Atomic] = {}
    cdna = target.is_cdna
    names = (("read", LDS_LOADS), ("write", LDS_STORES))
    if not cdna:
        names = (("load", LDS_LOADS), ("store", LDS_STORES))
    for name, transfers in names:
        is_load = transfers is LDS_LOADS
        for suffix, transfer in transfers.items():
            forms[f"ds_{name}_{suffix}"] = _One(is_load, transfer)
        two = f"ds_{name}2" if cdna else f"ds_{name}_2addr"
        for size in (4, 8):
            forms[f"{two}_b{8 * size}"] = _Two(is_load, Transfer(size), size)
            strided = "st64" if cdna else "_stride64"
            forms[f"{two}{strided}_b{8 * size}"] = _Two(is_load, Transfer(size), 64 * size)
    if target.name == "gfx950":
        forms["ds_read_b64_tr_b16"] = _One(True, Transfer(8), transposes=True)
    return forms | _atomic_forms(target)


def _atomic_forms(target: Target) -> dict[str, _One | _Two | _Atomic]:
    forms: dict[str, _One | _Two | _Atomic] = {}
    compare, swap = ("cmpst", "wrxchg") if target.is_cdna else ("cmpstore", "storexchg")
    both_forms = {
        name: (operation, size)
        for size in (4, 8)
        for name, operation in (
            *((f"{name}{8 * size}", operation) for name, operation in _INTEGER_ATOMICS.items()),
            (f"{compare}_b{8 * size}", "cmpswap"),
        )
    }
    for name, (size, targets) in _FLOAT_ATOMICS.items():
        if target.name in targets:
            both_forms[name] = (name, size)
    for name, (operation, size) in both_forms.items():
        forms[f"ds_{name}"] = _Atomic(operation, Transfer(size), returns=False)
        returning = re.sub(r"_([a-z]+\d+)$", r"_rtn_\1", name)
        forms[f"ds_{returning}"] = _Atomic(operation, Transfer(size), returns=True)
    for size in (4, 8):
        forms[f"ds_{swap}_rtn_b{8 * size}"] = _Atomic("swap", Transfer(size), returns=True)
    return forms


def opcodes(target: Target) -> frozenset[str]:
    """The opcodes that this module decodes for a target."""
    return frozenset(_forms(target))


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """Decode an access of LDS; None for other instructions."""
    form = _forms(target).get(instruction.opcode)
    if form is None:
        return None
    if isinstance(form, _Two):
        check_modifiers(instruction, ("offset0", "offset1"))
        return _load_two(instruction, form) if form.is_load else _store_two(instruction, form)
    check_modifiers(instruction, ("offset",))
    if isinstance(form, _Atomic):
        return _atomic(instruction, form, target)
    return _load(instruction, form) if form.is_load else _store(instruction, form.transfer)


def _offsets(address: str, offset: int) -> _Offsets:
    """Reads where each lane accesses LDS; the sum with the offset has 32 bits."""
    register, added = registers_of(address, "v", 1).first, np.uint32(offset)
    if not offset:
        return lambda group: group.active(group.v_u32[register]).astype(np.int64)
    return lambda group: group.active(group.v_u32[register] + added).astype(np.int64)


def _load(instruction: Instruction, form: _One) -> Semantics:
    to, address = instruction.operands
    offsets = _offsets(address, integer_modifier(instruction, "offset"))
    write, size = data_writer(to, form.transfer), form.transfer.size
    results = register_ids([to])

    def load(group: WaveGroup) -> None:
        workgroups, waves = group.active_workgroups, group.active_waves
        values, access = group.shared.lds.load(workgroups, offsets(group), size, waves)
        if form.transposes:
            values = _transposed(values, group, instruction)
        write(group, values)
        issue(group, instruction, "lds", results, access)

    return Semantics(load, results, register_ids([address]))


def _transposed(
    values: NDArray[np.uint32], group: WaveGroup, instruction: Instruction
) -> NDArray[np.uint32]:
    """What lanes hold after the exchange of ds_read_b64_tr_b16, (2, k).

    Each 16 lanes load 4 rows of 16 values of 16 bits, 4 lanes a row, and keep a column each.
    """
    if not group.full:
        raise UnknownInstruction(f"{instruction}: lanes that EXEC leaves out are not known here.")
    rows = np.ascontiguousarray(values.T).view(np.uint16).reshape(-1, 4, 16)
    columns = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1, 4)
    exchanged: NDArray[np.uint32] = columns.view(np.uint32).T
    return exchanged


def _store(instruction: Instruction, transfer: Transfer) -> Semantics:
    address, data = instruction.operands
    offsets = _offsets(address, integer_modifier(instruction, "offset"))
    read, size = data_reader(data, transfer), transfer.size

    def store(group: WaveGroup) -> None:
        workgroups, waves = group.active_workgroups, group.active_waves
        access = group.shared.lds.store(workgroups, offsets(group), read(group), size, waves)
        issue(group, instruction, "lds", access=access)

    return Semantics(store)


def _load_two(instruction: Instruction, form: _Two) -> Semantics:
    to, address = instruction.operands
    offsets = _two_offsets(instruction, address, form.step)
    # The registers of the second value follow those of the first one.
    size, words = form.transfer.size, form.transfer.words
    write, results = data_writer(to, Transfer(2 * size)), register_ids([to])

    def load(group: WaveGroup) -> None:
        workgroups, waves = _twice(group.active_workgroups), _twice(group.active_waves)
        values, access = group.shared.lds.load(workgroups, offsets(group), size, waves)
        # (words, 2 values, k) -> (2 values, words, k)
        values = values.reshape(words, 2, -1).swapaxes(0, 1).reshape(2 * words, -1)
        write(group, values)
        issue(group, instruction, "lds", results, access)

    return Semantics(load, results, register_ids([address]))


def _store_two(instruction: Instruction, form: _Two) -> Semantics:
    address, first, second = instruction.operands
    offsets = _two_offsets(instruction, address, form.step)
    size = form.transfer.size
    read = [data_reader(each, form.transfer) for each in (first, second)]

    def store(group: WaveGroup) -> None:
        workgroups, waves = _twice(group.active_workgroups), _twice(group.active_waves)
        values = np.concatenate([each(group) for each in read], axis=1)
        access = group.shared.lds.store(workgroups, offsets(group), values, size, waves)
        issue(group, instruction, "lds", access=access)

    return Semantics(store)


def _two_offsets(instruction: Instruction, address: str, step: int) -> _Offsets:
    """(2 * k,): the first accesses of all lanes, then their second ones."""
    first, second = (
        _offsets(address, step * integer_modifier(instruction, name))
        for name in ("offset0", "offset1")
    )
    return lambda group: np.concatenate([first(group), second(group)])


def _twice(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([values, values])


def _atomic(instruction: Instruction, form: _Atomic, target: Target) -> Semantics:
    operands = list(instruction.operands)
    to = operands.pop(0) if form.returns else None
    address, *data = operands
    if len(data) != 1 + (form.operation == "cmpswap"):
        raise UnknownInstruction(f"{len(data)} operands of data")
    offsets = _offsets(address, integer_modifier(instruction, "offset"))
    read = [data_reader(each, form.transfer) for each in data]
    if form.operation == "cmpswap" and target.is_cdna:  # what it compares with comes first
        read.reverse()
    write = data_writer(to, form.transfer) if to else None
    results = register_ids([to] if to else [])
    size, operation = form.transfer.size, form.operation

    def atomic(group: WaveGroup) -> None:
        operand, *compare = (each(group) for each in read)
        found, access = group.shared.lds.atomic(
            operation,
            group.active_workgroups,
            offsets(group),
            operand,
            compare[0] if compare else None,
            size,
            group.active_waves,
        )
        if write:
            write(group, found)
        issue(group, instruction, "lds", results, access)

    return Semantics(atomic, results, register_ids(operands))
