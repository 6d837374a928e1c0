"""Instructions that access LDS: loads, stores and atomic operations on integers.

AMD's ISA manuals, "data share operations". CDNA calls loads `ds_read_...` and stores
`ds_write_...`, RDNA `ds_load_...` and `ds_store_...`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    ATOMICS,
    LOADS,
    STORES,
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

__all__ = ["decode", "forms"]

_ONE, _TWO = ("offset",), ("offset0", "offset1")


@dataclass(frozen=True)
class _Form:
    """A load or store.

    Attributes:
        is_load: otherwise it is a store.
        transfer: of each value.
        offsets: the modifier of each value that has its offset.
        step: bytes by which the offsets count.
        transposes: whether the lanes exchange what they load.
    """

    is_load: bool
    transfer: Transfer
    offsets: tuple[str, ...] = _ONE
    step: int = 1
    transposes: bool = False


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


@cache
def forms(target: Target) -> dict[str, _Form | _Atomic]:
    """What this module decodes, by opcode."""
    known: dict[str, _Form | _Atomic] = {}
    cdna = target.is_cdna
    load, store = ("read", "write") if cdna else ("load", "store")
    for is_load, name in ((True, load), (False, store)):
        for suffix, transfer in (LOADS if is_load else STORES)["lds"].items():
            known[f"ds_{name}_{suffix}"] = _Form(is_load, transfer)
        two, strided = (f"{name}2", "st64") if cdna else (f"{name}_2addr", "_stride64")
        for size in (4, 8):
            transfer, end = Transfer(size), f"_b{8 * size}"
            known[f"ds_{two}{end}"] = _Form(is_load, transfer, _TWO, size)
            known[f"ds_{two}{strided}{end}"] = _Form(is_load, transfer, _TWO, 64 * size)
    swap, compare = ("wrxchg_b", "cmpst_b") if cdna else ("storexchg_b", "cmpstore_b")
    for operation, name in (ATOMICS | {"swap": swap, "cmpswap": compare}).items():
        verb, _, kind = name.partition("_")
        for size in (4, 8):
            for returns in (False, True) if operation != "swap" else (True,):
                opcode = f"ds_{verb}_{'rtn_' * returns}{kind}{8 * size}"
                known[opcode] = _Atomic(operation, Transfer(size), returns)
    if target.name == "gfx950":
        known["ds_read_b64_tr_b16"] = _Form(True, Transfer(8), transposes=True)
    return known


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """Decode an access of LDS; None for other instructions."""
    form = forms(target).get(instruction.opcode)
    if form is None:
        return None
    if isinstance(form, _Atomic):
        check_modifiers(instruction, _ONE)
        return _atomic(instruction, form, target)
    check_modifiers(instruction, form.offsets)
    return _load(instruction, form) if form.is_load else _store(instruction, form)


def _load(instruction: Instruction, form: _Form) -> Semantics:
    to, address = instruction.operands
    offsets = _offsets(instruction, address, form.offsets, form.step)
    count = len(form.offsets)
    size, words = form.transfer.size, form.transfer.words
    # The registers of the second value follow those of the first one.
    write = data_writer(to, form.transfer if count == 1 else Transfer(2 * size))
    results = register_ids([to])

    def load(group: WaveGroup) -> None:
        workgroups = _repeated(group.active_workgroups, count)
        waves = _repeated(group.active_waves, count)
        values, access = group.shared.lds.load(workgroups, offsets(group), size, waves)
        # (words, values, k) -> (values, words, k)
        values = values.reshape(words, count, -1).swapaxes(0, 1).reshape(count * words, -1)
        if form.transposes:
            values = _transposed(values, group, instruction)
        write(group, values)
        issue(group, instruction, "lds", results, access)

    return Semantics(load, results, register_ids([address]))


def _store(instruction: Instruction, form: _Form) -> Semantics:
    address, *data = instruction.operands
    offsets = _offsets(instruction, address, form.offsets, form.step)
    count = len(form.offsets)
    if len(data) != count:
        raise UnknownInstruction(f"{len(data)} operands of data")
    read, size = [data_reader(each, form.transfer) for each in data], form.transfer.size

    def store(group: WaveGroup) -> None:
        workgroups = _repeated(group.active_workgroups, count)
        waves = _repeated(group.active_waves, count)
        values = np.concatenate([each(group) for each in read], axis=1)
        access = group.shared.lds.store(workgroups, offsets(group), values, size, waves)
        issue(group, instruction, "lds", access=access)

    return Semantics(store)


def _atomic(instruction: Instruction, form: _Atomic, target: Target) -> Semantics:
    operands = list(instruction.operands)
    to = operands.pop(0) if form.returns else ""
    address, *data = operands
    if len(data) != 1 + (form.operation == "cmpswap"):
        raise UnknownInstruction(f"{len(data)} operands of data")
    if target.is_cdna:  # what "cmpst" compares with comes before the new value
        data.reverse()
    offsets, read = _offsets(instruction, address), [data_reader(x, form.transfer) for x in data]
    write = data_writer(to, form.transfer) if to else None
    results = register_ids([to]) if to else frozenset()

    def atomic(group: WaveGroup) -> None:
        found, access = group.shared.lds.atomic(
            form.operation,
            group.active_workgroups,
            offsets(group),
            np.concatenate([each(group) for each in read]),
            form.transfer.size,
            group.active_waves,
        )
        if write:
            write(group, found)
        issue(group, instruction, "lds", results, access)

    return Semantics(atomic, results, register_ids(operands))


def _offsets(
    instruction: Instruction, address: str, names: tuple[str, ...] = _ONE, step: int = 1
) -> Callable[[WaveGroup], NDArray[np.int64]]:
    """Reads where lanes access LDS, (values * k,): the first values of all lanes come first."""
    register = registers_of(address, "v", 1).first
    added = [np.uint32(step * integer_modifier(instruction, name)) for name in names]

    def offsets(group: WaveGroup) -> NDArray[np.int64]:
        first = group.active(group.v_u32[register])  # the sum with an offset has 32 bits
        return np.concatenate([first + each for each in added]).astype(np.int64)

    return offsets


def _repeated(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return values if count == 1 else np.concatenate([values] * count)


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
