"""The assembly text of a kernel, as LLVM prints it: descriptor, arguments, instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from attn_dispatch.emulation.errors import EmulationError

__all__ = ["Argument", "Assembly", "Instruction", "parse_instruction"]

#: Instructions after which another one than the next may follow, or a wave may have to wait.
_ENDS_BLOCK = re.compile(r"s_(c?branch|endpgm|barrier(_wait)?$)")
#: Bits of an encoding or of an opcode's name that say nothing about what is computed.
_ENCODING = re.compile(r"_(e32|e64|e64_dpp|dpp|e32_dpp|sdwa)$")
#: What separates operands, and an operand from modifiers: not what is in brackets.
_COMMA, _SPACE = re.compile(r",(?![^(\[]*[)\]])"), re.compile(r"\s+(?![^(\[]*[)\]])")
_LABEL = re.compile(r"([\w.$]+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction, or one half of a dual-issued one.

    Attributes:
        line: its number in the text, from 1.
        text: as it is written, without a comment.
        opcode: its name without the encoding (`_e32`, `_e64`, `_dpp`, `_sdwa`).
        encoding: that part of the name, or "".
        operands: destinations and sources, in order.
        modifiers: name -> value, "" for those that have none.
        source: the place in the Python file that it comes from, or "".
        second: the other half of a dual-issued instruction.
    """

    line: int
    text: str
    opcode: str
    encoding: str
    operands: tuple[str, ...]
    modifiers: Mapping[str, str]
    source: str = ""
    second: Instruction | None = None

    def __str__(self) -> str:
        place = f" ({self.source})" if self.source else ""
        return f"line {self.line}: {self.text}{place}"


def parse_instruction(text: str, line: int = 0, source: str = "") -> Instruction:
    """Parse one line without its comment; `a :: b` is one instruction with a second half."""
    text = text.strip()
    first, _, other = text.partition("::")
    second = parse_instruction(other, line, source) if other else None
    name, _, rest = first.strip().partition(" ")
    operands, modifiers = [], {}
    for part in _COMMA.split(rest):
        # A modifier before any operand, as in `s_waitcnt vmcnt(0)`, counts as the operand.
        operand, *words = _SPACE.split(part.strip())
        if operand:
            operands.append(operand)
        for word in words:
            key, _, value = word.partition(":")
            modifiers[key] = value
    opcode, encoding = _opcode_and_encoding(name)
    return Instruction(line, text, opcode, encoding, tuple(operands), modifiers, source, second)


@functools.cache
def _opcode_and_encoding(name: str) -> tuple[str, str]:
    found = _ENCODING.search(name)
    opcode = name[: found.start()] if found else name
    return opcode.replace("v_dual_", "v_"), found[1] if found else ""


@dataclass(frozen=True)
class Argument:
    """An argument in the kernel's argument segment.

    Attributes:
        offset: in bytes.
        size: in bytes.
        kind: LLVM's `value_kind`: "global_buffer", "by_value", or "hidden_...".
    """

    offset: int
    size: int
    kind: str


class Assembly:
    """The text of one kernel.

    Args:
        text: as LLVM prints it.

    Attributes:
        name: the kernel's.
        target_name: the architecture that it was compiled for, such as gfx942.
        arguments: those that the caller gives, in order.
        hidden_arguments: those that the runtime adds.
        instructions: all of them, in order.
        blocks: the instructions by basic block: control enters at the first and leaves at the last.
        block_of_label: label -> the index of the block that begins there.

    Raises:
        EmulationError: it has no kernel descriptor.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.name = self._first(r"^\s*\.amdhsa_kernel (\S+)")
        if not self.name:
            raise EmulationError(
                "This is no assembly of an AMD kernel: it has no .amdhsa_kernel. Give the text of "
                'compiled.asm["amdgcn"].'
            )
        self.target_name = self._first(r'\.amdgcn_target "[^"]*-(gfx\w+)[:"]')
        pattern = r"\.offset: +(\d+)\n\s+\.size: +(\d+)\n\s+\.value_kind: +(\w+)"
        found = re.findall(pattern, text)
        arguments = [Argument(int(offset), int(size), kind) for offset, size, kind in found]
        self.hidden_arguments = [each for each in arguments if each.kind.startswith("hidden_")]
        self.arguments = [each for each in arguments if each not in self.hidden_arguments]
        self.instructions, labels = self._body()
        end = len(self.instructions)
        ends = [i for i, each in enumerate(self.instructions, 1) if _ENDS_BLOCK.match(each.opcode)]
        starts = sorted({0, *ends, *labels.values()} - {end})
        bounds = zip(starts, [*starts[1:], end], strict=True)
        self.blocks = [self.instructions[first:last] for first, last in bounds]
        index = {start: i for i, start in enumerate(starts)}
        self.block_of_label = {label: index[at] for label, at in labels.items() if at < end}

    def _first(self, pattern: str) -> str:
        found = re.search(pattern, self.text, re.MULTILINE)
        return found[1] if found else ""

    def descriptor(self, key: str) -> int:
        """A field of the kernel descriptor, `.amdhsa_KEY`; 0 if it is not there."""
        return int(self._first(rf"\.amdhsa_{key} (\d+)") or 0)

    def _body(self) -> tuple[list[Instruction], dict[str, int]]:
        """The instructions, and the index of the one that each label is before."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        inside, source = False, ""
        for number, whole in enumerate(self.text.splitlines(), 1):
            code, _, comment = whole.partition(";")
            code = code.strip()
            label = _LABEL.fullmatch(code) if code.endswith(":") else None
            if label and label[1] == self.name:
                inside = True
            elif not inside or not code:
                continue
            elif label:
                labels[label[1]] = len(instructions)
            elif code.startswith(".section"):
                break
            elif code.startswith(".loc"):
                source = comment.split("@")[0].strip()
            elif not code.startswith("."):
                instructions.append(parse_instruction(code, number, source))
        return instructions, labels
