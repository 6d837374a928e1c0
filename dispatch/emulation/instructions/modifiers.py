"""What vector instructions have in common: op_sel, clamp, DPP and SDWA, for every opcode.

A family describes its instructions as `Form`s; `decode_form` reads the operands and modifiers of
an instruction, whatever its encoding.

Denormals are allowed, as in the kernels that Triton compiles. Hardware then ignores output
modifiers (mul:2, mul:4, div:2), and compilers do not use them: they are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.lanes import dpp_sources, row_bank_lanes
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    U32,
    Kind,
    Reader,
    mask_reader,
    mask_writer,
    parse_operand,
    vector_reader,
    vector_writer,
    with_signs,
)
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["Form", "applied", "by_opcode", "decode_form", "selections", "with_clamp"]

_Entry = TypeVar("_Entry")

#: Where the parts of a word that SDWA selects begin, and the bits that they have.
_PARTS = {
    "DWORD": (0, 32),
    **{f"WORD_{i}": (16 * i, 16) for i in range(2)},
    **{f"BYTE_{i}": (8 * i, 8) for i in range(4)},
}
_DPP_CONTROL = re.compile(r"quad_perm|wave_\w+|row_(?!mask)\w+")  # row_shr, row_bcast and others


@dataclass(frozen=True)
class Form:
    """What a vector instruction computes.

    Attributes:
        result: what it writes to vector registers; None if it only writes a lane mask.
        sources: what it reads.
        compute: takes an array or a NumPy scalar for each source; they broadcast.
        accumulates: the register of the result is its last source.
        saturates: with `clamp`, the integer result is the nearest one that its kind has.
        keeps_half: on CDNA, a 16-bit result leaves the other half of its register as it was. Most
            instructions write 0 there, as before GFX9; RDNA always keeps it.
        reads_mask: `compute` takes a lane mask after the sources. It is VCC if the text names none.
        writes_mask: `compute` returns a lane mask as well as the result, or only the mask.
    """

    result: Kind | None
    sources: tuple[Kind, ...]
    compute: Callable[..., Any]
    accumulates: bool = False
    saturates: bool = False
    keeps_half: bool = False
    reads_mask: bool = False
    writes_mask: bool = False


def by_opcode(table: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """A table whose keys may be several opcodes, separated by spaces, with one opcode a key."""
    return {opcode: entry for names, entry in table.items() for opcode in names.split()}


def with_clamp(form: Form) -> Callable[..., Any]:
    """The function of a form whose instruction has the modifier `clamp`.

    Raises:
        UnknownInstruction: the instruction has no such modifier.
    """
    compute, kind = form.compute, form.result
    if kind is None or form.writes_mask or not (kind.is_float or form.saturates):
        raise UnknownInstruction("clamp of this result")
    if kind.is_float:
        return lambda *values: _between_0_and_1(compute(*values))
    dtype, limits = kind.dtype, np.iinfo(kind.dtype)

    def saturated(*values: Any) -> Any:
        exact = compute(*[value.astype(np.int64) for value in values])
        return np.clip(exact, limits.min, limits.max).astype(dtype)

    return saturated


def _between_0_and_1(value: Any) -> Any:
    """NaN and -0 become 0."""
    kind = value.dtype.type
    return np.where(value > 0, np.minimum(value, kind(1)), kind(0))


def applied(compute: Callable[..., Any], readers: Sequence[Reader]) -> Reader:
    """A function of operands as a function of a group of waves."""
    if len(readers) == 1:
        (first,) = readers
        return lambda group: compute(first(group))
    if len(readers) == 2:
        first, second = readers
        return lambda group: compute(first(group), second(group))
    if len(readers) == 3:  # a list would take 1 us more
        first, second, third = readers
        return lambda group: compute(first(group), second(group), third(group))
    return lambda group: compute(*[read(group) for read in readers])


def selections(text: str | None, count: int, default: int = 0) -> list[int]:
    """The bits of a modifier such as `op_sel:[0,1]`, filled up to a count."""
    bits = [int(bit) for bit in re.findall(r"[01]", text or "")]
    if len(bits) > count:
        raise UnknownInstruction(f"{len(bits)} selections for {count} operands")
    return bits + [default] * (count - len(bits))


class _Dpp:
    """The first source comes from another lane.

    Attributes:
        writes_all: whether every lane in EXEC is written.
    """

    def __init__(self, modifiers: dict[str, str], wave_size: int) -> None:
        controls = [name for name in modifiers if _DPP_CONTROL.fullmatch(name)]
        if len(controls) != 1:
            raise UnknownInstruction(f"DPP with {len(controls)} controls")
        value = modifiers.pop(controls[0])
        sources = dpp_sources(f"{controls[0]}:{value}" if value else controls[0], wave_size)
        masks = [int(modifiers.pop(f"{name}_mask", "0xf"), 0) for name in ("row", "bank")]
        self._lanes = row_bank_lanes(masks[0], masks[1], wave_size)
        # `bound_ctrl:0` is how older assemblers write the same bit.
        self._zero_if_invalid = modifiers.pop("bound_ctrl", None) is not None
        self._in_range = sources >= 0
        self._all_in_range = bool(self._in_range.all())
        self._sources = np.maximum(sources, 0)
        self.writes_all = self._zero_if_invalid and bool(self._lanes.all())

    def _valid(self, group: WaveGroup) -> NDArray[np.bool_]:
        """Lanes that have a source: it exists, and executes."""
        if group.full:
            return self._in_range
        return self._in_range & group.exec.take(self._sources, axis=1)

    def reader(self, read: Reader) -> Reader:
        """What each lane takes of what `read` reads; 0 if its source is not valid."""

        def fetch(group: WaveGroup) -> Any:
            whole = np.broadcast_to(read(group), group.exec.shape)
            value = whole.take(self._sources, axis=1)
            if self._all_in_range and group.full:
                return value
            return np.where(self._valid(group), value, value.dtype.type(0))

        return fetch

    def merged(self, compute: Reader, old: Reader) -> Reader:
        """The result, and what the register holds before in lanes that are not written."""

        def merge(group: WaveGroup) -> Any:
            lanes = self._lanes
            if not self._zero_if_invalid:
                lanes = lanes & self._valid(group)
            return np.where(lanes, compute(group), old(group))

        return merge


class _Operands:
    """Readers and writers for the operands of one vector instruction.

    Every modifier must be taken before `finish`.
    """

    def __init__(self, instruction: Instruction, target: Target, form: Form) -> None:
        self._left = dict(instruction.modifiers)
        self._is_sdwa = instruction.encoding == "sdwa"
        is_dpp = "dpp" in instruction.encoding
        self._dpp = _Dpp(self._left, target.wave_size) if is_dpp else None
        *halves, of_result = selections(self.take("op_sel"), len(form.sources) + 1)
        self._halves = halves
        #: The half that a 16-bit result goes to; None if the other one becomes 0.
        self._half_of_result: int | None = of_result
        kind = form.result
        if kind is None or kind.words or (target.is_cdna and not form.keeps_half):
            if of_result:
                raise UnknownInstruction("op_sel of this result")
            self._half_of_result = None

    def take(self, name: str) -> str | None:
        """The value of a modifier, None if the instruction does not have it."""
        return self._left.pop(name, None)

    def finish(self) -> None:
        """Check that no modifier is left."""
        if self._left:
            raise UnknownInstruction(f"the modifier {', '.join(self._left)}")

    def source(self, index: int, text: str, kind: Kind) -> Reader:
        """Reads a source, given its place among the sources."""
        operand, half = parse_operand(text), self._halves[index]
        if half and kind.words:
            raise UnknownInstruction(f"op_sel of the 32-bit operand {text}")
        if self._is_sdwa:
            return self._selected(index, text, kind)
        if operand.sign_extend:
            raise UnknownInstruction(f"{text} without SDWA")
        if self._dpp is None or index:
            return vector_reader(operand, kind, half)
        plain = replace(operand, negate=False, absolute=False)
        return with_signs(operand, kind, self._dpp.reader(vector_reader(plain, kind, half)))

    def _selected(self, index: int, text: str, kind: Kind) -> Reader:
        """Reads the part of a register that SDWA selects."""
        operand = parse_operand(text)
        start, bits = _PARTS[self.take(f"src{index}_sel") or "DWORD"]
        if kind.words == 2 or (operand.registers is None and kind.words == 0):
            raise UnknownInstruction(f"SDWA of the operand {text}")
        word = vector_reader(replace(operand, negate=False, absolute=False), U32)
        signed: Any = np.int32 if operand.sign_extend else np.uint32
        unsigned: Any = np.uint32 if kind.words else np.uint16
        up, down = signed(32 - bits - start), signed(32 - bits)

        def part(group: WaveGroup) -> Any:
            value = (word(group).view(signed) << up) >> down
            return value.astype(unsigned).view(kind.dtype)

        return with_signs(operand, kind, part)

    def old_result(self, text: str, kind: Kind) -> Reader:
        """Reads what the register of the result holds before."""
        return vector_reader(parse_operand(text), kind, self._half_of_result or 0)

    def operation(self, text: str, kind: Kind, compute: Reader) -> Operation:
        """The instruction that writes what `compute` returns."""
        if self._is_sdwa and (kind.words != 2 or "dst_sel" in self._left):
            compute, kind = self._placed(text, kind, compute), U32
        if self._dpp is not None and not self._dpp.writes_all:
            compute = self._dpp.merged(compute, self.old_result(text, kind))
        self.finish()
        return Operation(compute, vector_writer(parse_operand(text), kind, self._half_of_result))

    def _placed(self, text: str, kind: Kind, compute: Reader) -> Reader:
        """The word with a result at the place that SDWA selects."""
        start, bits = _PARTS[self.take("dst_sel") or "DWORD"]
        unused = self.take("dst_unused") or "UNUSED_PAD"
        if kind.words == 2 or unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
            raise UnknownInstruction(f"dst_unused:{unused} of a result of {kind.name}")
        unsigned: Any = np.uint32 if kind.words else np.uint16
        shift, mask = np.uint32(start), np.uint32((1 << bits) - 1)
        old = vector_reader(parse_operand(text), U32)

        def word(group: WaveGroup) -> Any:
            value = np.asarray(compute(group)).view(unsigned).astype(np.uint32) & mask
            if unused == "UNUSED_PRESERVE":
                return (old(group) & ~(mask << shift)) | (value << shift)
            return value << shift

        return word

    def mask_operation(self, text: str, kind: Kind | None, compute: Reader, mask: str) -> Operation:
        """The instruction that writes a value and a lane mask, or only a mask."""
        if self._dpp is not None and not self._dpp.writes_all:
            # What goes to the bits of these lanes is not known.
            raise UnknownInstruction("DPP that leaves out lanes of a lane mask")
        write_mask = mask_writer(parse_operand(mask))
        if kind is None:
            self.finish()
            return Operation(compute, write_mask)
        if self._is_sdwa and (self.take("dst_sel") or "DWORD") != "DWORD":
            raise UnknownInstruction("dst_sel of this result")
        self.take("dst_unused")
        self.finish()
        write = vector_writer(parse_operand(text), kind)

        def commit(group: WaveGroup, results: Any) -> None:
            write(group, results[0])
            write_mask(group, results[1])

        return Operation(compute, commit)


def decode_form(instruction: Instruction, target: Target, form: Form) -> Operation:
    """Decode an instruction in any encoding.

    Raises:
        UnknownInstruction: a modifier is not known for it.
        ValueError: it has another number of operands.
    """
    operands = _Operands(instruction, target, form)
    texts = list(instruction.operands)
    result = texts.pop(0) if form.result else ""
    written_mask = texts.pop(0) if form.writes_mask else ""
    kinds = form.sources[:-1] if form.accumulates else form.sources
    read_mask = texts.pop() if form.reads_mask and len(texts) > len(kinds) else "vcc_lo"
    readers = [
        operands.source(i, text, kind)
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    ]
    if form.accumulates:
        readers.append(operands.old_result(result, form.sources[-1]))
    if form.reads_mask:
        readers.append(mask_reader(parse_operand(read_mask)))
    clamps = operands.take("clamp") is not None
    compute = applied(with_clamp(form) if clamps else form.compute, readers)
    if form.result is None or form.writes_mask:
        return operands.mask_operation(result, form.result, compute, written_mask)
    return operands.operation(result, form.result, compute)
