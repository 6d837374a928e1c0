"""Instructions that access global memory, buffers and private memory.

`global_...`, `flat_...`, `scratch_...` and `buffer_...`: loads, stores and atomic operations. AMD's
ISA manuals, "vector memory operations" and "flat memory instructions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.address_spaces import (
    AddressSpace,
    GlobalSpace,
    PrivateSpace,
)
from attn_dispatch.emulation.instructions.buffer import BufferSpace
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    CACHE_MODIFIERS,
    CDNA_LOADS,
    CDNA_STORES,
    RDNA_LOADS,
    RDNA_STORES,
    Transfer,
    check_modifiers,
    data_reader,
    data_writer,
    integer_modifier,
    register_ids,
    registers_of,
)
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue, publish
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode", "opcodes"]


@dataclass(frozen=True)
class _Form:
    """A memory instruction.

    Attributes:
        space: "global", "flat", "scratch" or "buffer".
        kind: "load", "store" or "atomic".
        transfer: of the value.
        operation: of an atomic operation, one of `atomics.ATOMIC_OPERATIONS`.
    """

    space: str
    kind: str
    transfer: Transfer
    operation: str = ""


_SPACES = ("global", "flat", "scratch", "buffer")
_CDNA_ATOMICS = {
    "swap": "swap", "cmpswap": "cmpswap", "add": "add", "sub": "sub", "smin": "min_i",
    "umin": "min_u", "smax": "max_i", "umax": "max_u", "and": "and", "or": "or", "xor": "xor",
    "inc": "inc", "dec": "dec",
}  # fmt: skip
_RDNA_ATOMICS = {
    "swap_b": "swap", "cmpswap_b": "cmpswap", "add_u": "add", "sub_u": "sub", "min_i": "min_i",
    "min_u": "min_u", "max_i": "max_i", "max_u": "max_u", "and_b": "and", "or_b": "or",
    "xor_b": "xor", "inc_u": "inc", "dec_u": "dec",
}  # fmt: skip
_CDNA = ("gfx90a", "gfx942", "gfx950")
#: Additions of floats, with the targets and the spaces that have them.
_FLOAT_ATOMICS: dict[str, tuple[int, dict[str, tuple[str, ...]]]] = {
    "add_f32": (4, {
        "global": (*_CDNA, "gfx1100", "gfx1201"), "buffer": (*_CDNA, "gfx1100", "gfx1201"),
        "flat": ("gfx942", "gfx950", "gfx1100", "gfx1201"),
    }),
    "add_f64": (8, {"global": _CDNA, "buffer": _CDNA, "flat": _CDNA}),
    "pk_add_f16": (4, {
        "global": (*_CDNA, "gfx1201"), "buffer": (*_CDNA, "gfx1201"),
        "flat": ("gfx942", "gfx950", "gfx1201"),
    }),
    "pk_add_bf16": (4, {
        "global": ("gfx942", "gfx950", "gfx1201"), "buffer": ("gfx950", "gfx1201"),
        "flat": ("gfx942", "gfx950", "gfx1201"),
    }),
}  # fmt: skip


@cache
def _forms(target: Target) -> dict[str, _Form]:
    """What this module decodes, by opcode."""
    loads, stores = (CDNA_LOADS, CDNA_STORES) if target.is_cdna else (RDNA_LOADS, RDNA_STORES)
    forms = {}
    for space in _SPACES:
        for kind, transfers in (("load", loads), ("store", stores)):
            for suffix, transfer in transfers.items():
                forms[f"{space}_{kind}_{suffix}"] = _Form(space, kind, transfer)
        if space != "scratch":
            for name, operation, size in _atomics(space, target):
                form = _Form(space, "atomic", Transfer(size), operation)
                forms[f"{space}_atomic_{name}"] = form
    return forms


def _atomics(space: str, target: Target) -> list[tuple[str, str, int]]:
    """(end of the opcode, operation, bytes) of each atomic operation."""
    found = []
    for size in (4, 8):
        for name, operation in (_CDNA_ATOMICS if target.is_cdna else _RDNA_ATOMICS).items():
            if target.is_cdna:
                found.append((name if size == 4 else f"{name}_x2", operation, size))
            else:
                found.append((f"{name}{8 * size}", operation, size))
    for name, (size, targets) in _FLOAT_ATOMICS.items():
        if target.name in targets[space]:
            found.append((name, name, size))
    return found


def opcodes(target: Target) -> frozenset[str]:
    """The opcodes that this module decodes for a target."""
    return frozenset(_forms(target))


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """Decode an access of memory; None for other instructions."""
    form = _forms(target).get(instruction.opcode)
    if form is None:
        return None
    known = {"offset", *CACHE_MODIFIERS} | ({"offen"} if form.space == "buffer" else set())
    check_modifiers(instruction, known)
    if form.kind == "load":
        return _load(instruction, form, target)
    if form.kind == "store":
        return _store(instruction, form, target)
    return _atomic(instruction, form, target)


def _space(instruction: Instruction, form: _Form, where: list[str], target: Target) -> AddressSpace:
    """The memory that an instruction accesses.

    Args:
        instruction: the instruction.
        form: which it is.
        where: operands that say where: all but the data.
        target: whose instruction set it is.
    """
    offset = integer_modifier(instruction, "offset")
    if form.space == "flat":
        (vector,) = where
        return GlobalSpace(vector, "off", offset)
    if form.space == "buffer":
        vector, descriptor, scalar = where
        if ("offen" in instruction.modifiers) != (vector != "off"):
            raise UnknownInstruction(f"the offset {vector} with or without offen")
        return BufferSpace(vector, descriptor, scalar, offset, target)
    vector, scalar = where
    if form.space == "global":
        return GlobalSpace(vector, scalar, offset)
    return PrivateSpace(vector, scalar, offset)


def _load(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    to, *where = instruction.operands
    space, write = _space(instruction, form, where, target), data_writer(to, form.transfer)
    size, results = form.transfer.size, register_ids([to])
    kind = "flat" if form.space == "flat" else "load"

    def load(group: WaveGroup) -> None:
        write(group, space.load(group, size))
        issue(group, instruction, kind, results)

    return Semantics(load, results, register_ids(where))


def _store(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    where = list(instruction.operands)
    data = where.pop(0 if form.space == "buffer" else 1)
    space, read = _space(instruction, form, where, target), data_reader(data, form.transfer)
    size, kind = form.transfer.size, "flat_store" if form.space == "flat" else "store"

    def store(group: WaveGroup) -> None:
        in_flight = space.store(group, read(group), size)
        issue(group, instruction, kind, access=in_flight)

    return Semantics(store)


def _atomic(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    where = list(instruction.operands)
    returns = _returns(instruction, target)
    compares, transfer = form.operation == "cmpswap", form.transfer
    if form.space == "buffer":  # the data's registers take the result
        data = where.pop(0)
        to = _first_half(data, transfer.words) if compares else data
    else:
        to = where.pop(0) if returns else ""
        data = where.pop(1)
    space = _space(instruction, form, where, target)
    # What is compared with follows the new value.
    read = data_reader(data, Transfer(2 * transfer.size) if compares else transfer)
    write = data_writer(to, transfer) if returns else None
    results = register_ids([to]) if returns else frozenset()
    operation, size, words = form.operation, transfer.size, transfer.words
    kind = "load" if returns else "store"
    if form.space == "flat":
        kind = "flat" if returns else "flat_store"

    def atomic(group: WaveGroup) -> None:
        publish(group, only_active=True)
        values = read(group)
        compare = values[words:] if compares else None
        found = space.atomic(group, operation, values[:words], compare, size)
        if write:
            write(group, found)
        issue(group, instruction, kind, results)

    return Semantics(atomic, results, register_ids([*where, data]))


def _returns(instruction: Instruction, target: Target) -> bool:
    """Whether an atomic operation returns what was in memory."""
    if target.generation >= 12:
        return "RETURN" in instruction.modifiers.get("th", "")
    return ("glc" if target.name in ("gfx90a", "gfx1100") else "sc0") in instruction.modifiers


def _first_half(text: str, words: int) -> str:
    """The first half of the registers of an operand: v[4:7] -> v[4:5]."""
    registers = registers_of(text, "va", 2 * words)
    return f"{registers.file}[{registers.first}:{registers.first + words - 1}]"
