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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic.lanes import dpp_sources, row_bank_lanes
from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.operands import (
    U32,
    Kind,
    Reader,
    Writer,
    parse_operand,
    vector_reader,
    vector_writer,
    with_signs,
)
from attn_dispatch.emulation.instructions.semantics import Operation
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waves import WaveGroup

__all__ = [
    "Form",
    "VectorOperands",
    "applied",
    "by_opcode",
    "clamped",
    "decode_form",
    "saturated",
    "selections",
]

#: Where the parts of a word that SDWA selects begin, and the bits that they have.
_PARTS = {
    "DWORD": (0, 0xFFFFFFFF),
    **{f"WORD_{i}": (16 * i, 0xFFFF) for i in range(2)},
    **{f"BYTE_{i}": (8 * i, 0xFF) for i in range(4)},
}
_DPP_CONTROL = re.compile(
    r"quad_perm|dpp8|wave_\w+|row_(?!mask)\w+"  # row_shr, row_bcast and others
)


@dataclass(frozen=True)
class Form:
    """What a vector instruction computes.

    Attributes:
        result: what it writes.
        sources: what it reads.
        compute: takes an array or a NumPy scalar for each source; they broadcast.
        accumulates: the register of the result is its last source.
        saturates: with `clamp`, the integer result is the nearest one that its kind has.
        keeps_half: on CDNA, a 16-bit result leaves the other half of its register as it was. Most
            instructions write 0 there, as before GFX9; RDNA always keeps it.
    """

    result: Kind
    sources: tuple[Kind, ...]
    compute: Callable[..., Any]
    accumulates: bool = False
    saturates: bool = False
    keeps_half: bool = False


def by_opcode(table: Mapping[str, Form]) -> dict[str, Form]:
    """A table whose keys may be several opcodes, separated by spaces, with one opcode a key."""
    return {opcode: form for names, form in table.items() for opcode in names.split()}


def clamped(value: Any) -> Any:
    """A float between 0 and 1; NaN and -0 become 0."""
    kind = value.dtype.type
    return np.where(value > 0, np.minimum(value, kind(1)), kind(0))


def saturated(compute: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """The integer function, without overflow: out of range, it gives the nearest value."""
    limits = np.iinfo(kind.dtype)

    def nearest(*values: Any) -> Any:
        exact = compute(*[value.astype(np.int64) for value in values])
        return np.clip(exact, limits.min, limits.max).astype(kind.dtype)

    return nearest


def applied(compute: Callable[..., Any], readers: Sequence[Reader]) -> Reader:
    """A function of operands as a function of a group of waves."""
    if len(readers) == 1:
        (first,) = readers
        return lambda group: compute(first(group))
    if len(readers) == 2:
        first, second = readers
        return lambda group: compute(first(group), second(group))
    if len(readers) == 3:
        first, second, third = readers
        return lambda group: compute(first(group), second(group), third(group))
    raise UnknownInstruction(f"{len(readers)} sources")


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
        self._reads_inactive = modifiers.pop("fi", "0") == "1"
        self._in_range = sources >= 0
        self._all_in_range = bool(self._in_range.all())
        self._sources = np.maximum(sources, 0)
        self.writes_all = self._zero_if_invalid and bool(self._lanes.all())

    def _valid(self, group: WaveGroup) -> NDArray[np.bool_]:
        """Lanes that have a source: it exists, and executes."""
        if group.full or self._reads_inactive:
            return self._in_range
        return self._in_range & group.exec.take(self._sources, axis=1)

    def reader(self, read: Reader) -> Reader:
        """What each lane takes of what `read` reads; 0 if its source is not valid."""

        def fetch(group: WaveGroup) -> Any:
            whole = np.broadcast_to(read(group), group.exec.shape)
            value = whole.take(self._sources, axis=1)
            if self._all_in_range and (group.full or self._reads_inactive):
                return value
            return np.where(self._valid(group), value, value.dtype.type(0))

        return fetch

    def written(self, group: WaveGroup) -> NDArray[np.bool_]:
        """The lanes that may be written, of those in EXEC."""
        return self._lanes if self._zero_if_invalid else self._lanes & self._valid(group)


class VectorOperands:
    """Readers and writers for the operands of one vector instruction.

    Every modifier must be taken before `finish`.

    Args:
        instruction: the instruction.
        target: the GPU.
        num_sources: how many sources it reads, without a mask.
    """

    def __init__(self, instruction: Instruction, target: Target, num_sources: int) -> None:
        self._target = target
        self._left = dict(instruction.modifiers)
        self._is_sdwa = instruction.encoding == "sdwa"
        self._dpp: _Dpp | None = None
        if "dpp" in instruction.encoding:
            self._dpp = _Dpp(self._left, target.wave_size)
        *halves, of_result = selections(self.take("op_sel"), num_sources + 1)
        self._halves, self._half_of_result = halves, of_result

    def take(self, name: str) -> str | None:
        """The value of a modifier, None if the instruction does not have it."""
        return self._left.pop(name, None)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            UnknownInstruction: a modifier was not taken.
        """
        if self._left:
            raise UnknownInstruction(f"the modifier {', '.join(self._left)}")

    def source(self, index: int, text: str, kind: Kind) -> Reader:
        """Reads a source.

        Args:
            index: among the sources.
            text: the operand.
            kind: what is read.
        """
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
        start, mask = _PARTS[self.take(f"src{index}_sel") or "DWORD"]
        if kind.words == 2 or (operand.registers is None and kind.words == 0):
            raise UnknownInstruction(f"SDWA of the operand {text}")
        word = vector_reader(replace(operand, negate=False, absolute=False), U32)
        bits = mask.bit_length()
        up, down = np.int32(32 - bits - start), np.int32(32 - bits)
        unsigned: Any = np.uint32 if kind.words else np.uint16

        def part(group: WaveGroup) -> Any:
            if operand.sign_extend:
                value = ((word(group).view(np.int32) << up) >> down).view(np.uint32)
            else:
                value = (word(group) >> np.uint32(start)) & np.uint32(mask)
            return value.astype(unsigned).view(kind.dtype)

        return with_signs(operand, kind, part)

    def _half(self, kind: Kind, keeps_half: bool) -> int | None:
        """The half that a 16-bit result goes to; None if the other one becomes 0."""
        if kind.words:
            if self._half_of_result:
                raise UnknownInstruction("op_sel of a 32-bit result")
            return None
        if not self._target.is_cdna or keeps_half:
            return self._half_of_result
        if self._half_of_result:
            raise UnknownInstruction("op_sel of this result")
        return None

    def result_reader(self, text: str, kind: Kind, keeps_half: bool = False) -> Reader:
        """Reads what the register of the result holds before."""
        return vector_reader(parse_operand(text), kind, self._half(kind, keeps_half) or 0)

    def operation(
        self, text: str, kind: Kind, compute: Reader, keeps_half: bool = False
    ) -> Operation:
        """The instruction that writes what `compute` returns.

        Args:
            text: the operand of the result.
            kind: of the result.
            compute: broadcasts to (waves, lanes).
            keeps_half: as in `Form`.

        Raises:
            UnknownInstruction: a modifier is left.
        """
        half = self._half(kind, keeps_half)
        if self._is_sdwa and (kind.words != 2 or "dst_sel" in self._left):
            compute, kind = self._placed(text, kind, compute), U32
        dpp = self._dpp
        if dpp is not None and not dpp.writes_all:
            old, whole = vector_reader(parse_operand(text), kind, half or 0), compute
            written = dpp.written

            def merged(group: WaveGroup) -> Any:
                return np.where(written(group), whole(group), old(group))

            compute = merged
        self.finish()
        return Operation(compute, vector_writer(parse_operand(text), kind, half))

    def two_results(self, text: str, kind: Kind, compute: Reader, write_mask: Writer) -> Operation:
        """The instruction that writes a value and a lane mask, which `compute` returns.

        Raises:
            UnknownInstruction: a modifier is left, or the instruction does not write all lanes.
        """
        self.require_all_lanes()
        if self._is_sdwa and (self.take("dst_sel") or "DWORD") != "DWORD":
            raise UnknownInstruction("dst_sel of this result")
        self.take("dst_unused")
        self.finish()
        write = vector_writer(parse_operand(text), kind)

        def commit(group: WaveGroup, results: Any) -> None:
            write(group, results[0])
            write_mask(group, results[1])

        return Operation(compute, commit)

    def require_all_lanes(self) -> None:
        """Check that DPP leaves no lane out: what goes to its bit of a lane mask is not known.

        Raises:
            UnknownInstruction: it does.
        """
        if self._dpp is not None and not self._dpp.writes_all:
            raise UnknownInstruction("DPP that leaves out lanes of a lane mask")

    def _placed(self, text: str, kind: Kind, compute: Reader) -> Reader:
        """The word with a result at the place that SDWA selects."""
        start, mask = _PARTS[self.take("dst_sel") or "DWORD"]
        unused = self.take("dst_unused") or "UNUSED_PAD"
        if kind.words == 2:
            raise UnknownInstruction("dst_sel of a 64-bit result")
        unsigned: Any = np.uint32 if kind.words else np.uint16
        shift, bits = np.uint32(start), np.uint32(mask)
        up = np.int32(32 - mask.bit_length())
        old = vector_reader(parse_operand(text), U32)

        def word(group: WaveGroup) -> Any:
            value = np.asarray(compute(group)).view(unsigned).astype(np.uint32) & bits
            if unused == "UNUSED_PRESERVE":
                return (old(group) & ~(bits << shift)) | (value << shift)
            if unused == "UNUSED_SEXT":
                extended = ((value.view(np.int32) << up) >> up).view(np.uint32)
                return extended << shift
            return value << shift

        if unused not in ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"):
            raise UnknownInstruction(f"dst_unused:{unused}")
        return word


def decode_form(instruction: Instruction, target: Target, form: Form) -> Operation:
    """Decode an instruction with one result, in any encoding.

    Raises:
        UnknownInstruction: a modifier is not known for it.
        ValueError: it has another number of operands.
    """
    operands = VectorOperands(instruction, target, len(form.sources))
    result, *sources = instruction.operands
    kinds = form.sources[:-1] if form.accumulates else form.sources
    readers = [
        operands.source(i, text, kind)
        for i, (text, kind) in enumerate(zip(sources, kinds, strict=True))
    ]
    if form.accumulates:
        readers.append(operands.result_reader(result, form.sources[-1], form.keeps_half))
    compute = form.compute
    if operands.take("clamp") is not None:
        compute = _with_clamp(form)
    return operands.operation(result, form.result, applied(compute, readers), form.keeps_half)


def _with_clamp(form: Form) -> Callable[..., Any]:
    if form.result.is_float:
        compute = form.compute
        return lambda *values: clamped(compute(*values))
    if not form.saturates:
        raise UnknownInstruction("clamp of this integer result")
    return saturated(form.compute, form.result)
