"""Instructions that access global memory, buffers and private memory.

`global_...`, `flat_...`, `scratch_...` and `buffer_...`: loads, stores and atomic operations. AMD's
ISA manuals, "vector memory operations" and "flat memory instructions". Flat addresses of LDS and of
private memory are not known: they are outside of all regions of global memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.instructions.address_spaces import GlobalSpace, PrivateSpace
from attn_dispatch.emulation.instructions.buffer import BufferSpace
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    ATOMICS,
    CACHE_MODIFIERS,
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
from attn_dispatch.emulation.targets import TARGETS, Target
from attn_dispatch.emulation.waits import issue, publish
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode", "forms"]


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

    def operands(self, instruction: Instruction) -> list[str]:
        """The operands; a flat instruction has no base, as a global one with "off"."""
        return [*instruction.operands, *(["off"] if self.space == "flat" else [])]

    def pending(self, kind: str) -> str:
        """What waits for the operation, a kind of `waits.issue`."""
        return f"flat_{kind}" if self.space == "flat" else kind


_CDNA = ("gfx90a", "gfx942", "gfx950")
_PACKED = ("gfx942", "gfx950", "gfx1201")
#: Additions of floats by their names: bytes, and the targets that have them in a space.
_FLOAT_ATOMICS: dict[str, tuple[int, dict[str, tuple[str, ...]]]] = {
    "add_f32": (4, {
        "global": tuple(TARGETS), "buffer": tuple(TARGETS), "flat": (*_PACKED, "gfx1100"),
    }),
    "add_f64": (8, {"global": _CDNA, "buffer": _CDNA, "flat": _CDNA}),
    "pk_add_f16": (4, {
        "global": ("gfx90a", *_PACKED), "buffer": ("gfx90a", *_PACKED), "flat": _PACKED,
    }),
    "pk_add_bf16": (4, {"global": _PACKED, "buffer": ("gfx950", "gfx1201"), "flat": _PACKED}),
}  # fmt: skip


@cache
def forms(target: Target) -> dict[str, _Form]:
    """What this module decodes, by opcode."""
    known, names = {}, "cdna" if target.is_cdna else "rdna"
    for space in ("global", "flat", "scratch", "buffer"):
        for kind, transfers in (("load", LOADS[names]), ("store", STORES[names])):
            for suffix, transfer in transfers.items():
                known[f"{space}_{kind}_{suffix}"] = _Form(space, kind, transfer)
    for space in ("global", "flat", "buffer"):
        for cdna, rdna in ATOMICS.items():
            for size, suffix in ((4, ""), (8, "_x2")):
                name = f"{cdna}{suffix}" if target.is_cdna else f"{rdna}{8 * size}"
                known[f"{space}_atomic_{name}"] = _Form(space, "atomic", Transfer(size), cdna)
        for name, (size, targets) in _FLOAT_ATOMICS.items():
            if target.name in targets[space]:
                known[f"{space}_atomic_{name}"] = _Form(space, "atomic", Transfer(size), name)
    return known


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """Decode an access of memory; None for other instructions."""
    form = forms(target).get(instruction.opcode)
    if form is None:
        return None
    known = {"offset", *CACHE_MODIFIERS} | ({"offen"} if form.space == "buffer" else set())
    check_modifiers(instruction, known)
    if form.kind == "load":
        return _load(instruction, form, target)
    if form.kind == "store":
        return _store(instruction, form, target)
    return _atomic(instruction, form, target)


def _space(
    instruction: Instruction, form: _Form, where: list[str], target: Target
) -> GlobalSpace | PrivateSpace | BufferSpace:
    """The memory that an instruction accesses; `where` are all operands but the data."""
    if form.space == "buffer":
        return BufferSpace(instruction, where, target)
    vector, scalar = where
    space = PrivateSpace if form.space == "scratch" else GlobalSpace
    return space(vector, scalar, integer_modifier(instruction, "offset"))


def _load(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    to, *where = form.operands(instruction)
    space, write = _space(instruction, form, where, target), data_writer(to, form.transfer)
    size, results, pending = form.transfer.size, register_ids([to]), form.pending("load")

    def load(group: WaveGroup) -> None:
        write(group, space.load(group, size))
        issue(group, instruction, pending, results)

    return Semantics(load, results, register_ids(where))


def _store(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    where = form.operands(instruction)
    data = where.pop(0 if form.space == "buffer" else 1)
    space, read = _space(instruction, form, where, target), data_reader(data, form.transfer)
    size, pending = form.transfer.size, form.pending("store")

    def store(group: WaveGroup) -> None:
        in_flight = space.store(group, read(group), size)
        issue(group, instruction, pending, access=in_flight)

    return Semantics(store)


def _atomic(instruction: Instruction, form: _Form, target: Target) -> Semantics:
    where, returns = form.operands(instruction), _returns(instruction, target)
    size, operation, words = form.transfer.size, form.operation, form.transfer.words
    # What "cmpswap" compares with follows the new value.
    transfer = Transfer(2 * size) if operation == "cmpswap" else form.transfer
    space: BufferSpace | GlobalSpace
    if form.space == "buffer":  # the first registers of the data take the result
        data = where.pop(0)
        registers = registers_of(data, "va", transfer.words)
        to = f"{registers.file}[{registers.first}:{registers.first + words - 1}]"
        space = BufferSpace(instruction, where, target)
    else:
        to = where.pop(0) if returns else ""
        data = where.pop(1)
        vector, base = where
        space = GlobalSpace(vector, base, integer_modifier(instruction, "offset"))
    read, write = data_reader(data, transfer), data_writer(to, form.transfer) if returns else None
    results = register_ids([to]) if returns else frozenset()
    pending = form.pending("load" if returns else "store")

    def atomic(group: WaveGroup) -> None:
        publish(group, only_active=True)
        found = space.atomic(group, operation, read(group), size)
        if write:
            write(group, found)
        issue(group, instruction, pending, results)

    return Semantics(atomic, results, register_ids([*where, data]))


def _returns(instruction: Instruction, target: Target) -> bool:
    """Whether an atomic operation returns what was in memory."""
    if target.generation >= 12:
        return "RETURN" in instruction.modifiers.get("th", "")
    return ("glc" if target.name in ("gfx90a", "gfx1100") else "sc0") in instruction.modifiers
