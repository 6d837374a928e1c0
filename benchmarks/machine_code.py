"""Find registers that the machine code of an NVIDIA kernel reads and never wrote.

ptxas 12.8 compiled a kernel for Hopper wrongly: it computed the descriptor of a wgmma before a
loop, in uniform registers, and used it also on a path around that loop. The PTX was right, so only
the machine code shows it. nvdisasm lists that code, and a data-flow analysis (definite assignment:
what every path to an instruction has written) finds the reads of registers that a path left unset.

It finds reads of uniform registers (UR) and of predicates (P, UP). Uniform arithmetic on an unset
register is no finding, since ptxas leaves dead copies in right code: its result is unset, and what
reads that outside of uniform arithmetic is a finding.

It cannot find wrong values, such as the one that an earlier use left in a register: of 60 writes to
uniform registers, deleted one by one from a right kernel, 9 were noticed. A write under a predicate
counts as a write, even if the predicate is false. Vector registers are not checked: right code
reads unset ones, such as one half of a packed pair. Every branch may go either way, so a read that
only a path with contradictory conditions reaches would be a false finding.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Instruction", "UnsetRead", "disassembled", "find_nvdisasm", "unset_reads"]

_ENTRY = re.compile(r'\s*\.other\s+(\S+),@"STO_CUDA_ENTRY')
_LABEL = re.compile(r"(\S+):$")
_CODE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+((?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?))\s*;")
_TARGET = re.compile(r"`\((\S+)\)|(\.L_\w+)")  # the second in the comment after BRX
_COMMA = re.compile(r",\s*(?![^\[]*\])")
_REGISTER = re.compile(r"\b(UR|UP|P)(\d+)\b")
_PREDICATE = re.compile(r"U?P[\dT]$")

# What an instruction reads and writes -------------------------------------------------------------

#: Instructions that write none of these registers, though their first operand may be one.
_NO_RESULT = re.compile(
    r"B(RA|RX|REAK|SSY|SYNC|MOV|AR)|CALL|EXIT|KILL|RET|WARPSYNC|YIELD|NANOSLEEP|UTMA|UBLK"
    r"|UTC(?!ATOM)|UVIRTCOUNT|USETMAXREG\.DEALLOC|UGETNEXT|UCGABAR|UMEMSETS"
)
#: Instructions that write one predicate. Others may write two: ISETP.GT.AND P0, PT, R1, R2, PT.
_ONE_PREDICATE = re.compile(r"VOTE")
#: Instructions that write a register after predicates: ELECT P0, UR4, PT.
_PREDICATES_FIRST = re.compile(r"ELECT|R2UR|UTCATOMSWS|ULOP3|UV?IMNMX")
#: Arithmetic that reads and writes nothing but uniform registers and predicates.
_ARITHMETIC = re.compile(
    r"U(MOV|IADD3?|IABS|IMAD|V?IMNMX3?|SHF|SGXT|LOP3|PLOP3|LEA|SEL|PRMT|ISETP|FLO|POPC|BREV|BMSK"
    r"|I2F|F2F|F2I|FADD|FMUL|FFMA|FSEL|FSETP|FMNMX)\b"
)
#: How many registers a result and a plain source take, by the first pattern in the opcode, or else
#: one. Too few for a result or too many for a source would make false findings.
_RESULTS = ((r"SHF|\.HI\b", 1), (r"\.128\b", 4), (r"\.[SU]?64\b|\.WIDE\b|CS2UR", 2))
_SOURCES = ((r"SHF|\.HI\b", 1), (r"\.[SU]?64\b", 2))
#: What an operand in brackets reads: opcode, place, how the operand begins, and the first and the
#: last register, counted from the one that is named. Else that one.
_BRACKETS = (
    (r"[A-Z]GMMA", 1, "gdesc[", 0, 3),  # the descriptors of both matrices
    (r"[A-Z]GMMA", 2, "gdesc[", 2, 3),  # of the second: the first is in vector registers
    (r"UTC", None, "gdesc[", 0, 1),
    # An address in shared memory, a barrier, and a coordinate for each dimension.
    *((rf"UTMALDG\.{n}D", 0, "[", 0, n + 1) for n in range(1, 6)),
    (r"UTMA(LD|ST|RED)G", 1, "[", 0, 1),
    (r"", None, "desc[", 0, 1),
)


@dataclass(frozen=True)
class Instruction:
    """A line of a listing. Of registers, it has uniform ones and predicates only.

    Attributes:
        address: hexadecimal, as in the listing.
        text: all of it, without the address.
        name: the opcode without suffixes.
        operands: as text.
        labels: that it branches to, calls, or (BSSY) waits at.
        is_conditional: it has a guard, or is a branch with a condition as an operand.
        is_arithmetic: it only computes uniform registers from others.
        writes: what it writes, by name.
        reads: what it reads, its guard included.
    """

    address: str
    text: str
    name: str
    operands: tuple[str, ...]
    labels: tuple[str, ...]
    is_conditional: bool
    is_arithmetic: bool
    writes: frozenset[str]
    reads: frozenset[str]

    @classmethod
    def of(cls, line: str) -> Instruction | None:
        """The instruction on a line, if there is one."""
        found = _CODE.match(line)
        if found is None:
            return None
        address, text, guard, opcode, rest = found.groups(default="")
        operands = tuple(_COMMA.split(rest.replace(".reuse", ""))) if rest else ()
        results = _num_results(opcode, operands)
        sources = enumerate(operands[results:], results)
        is_branch = opcode.startswith("BRA")
        return cls(
            address=address,
            text=" ".join(text.split()),
            name=opcode.partition(".")[0],
            operands=operands,
            labels=tuple(quoted or bare for quoted, bare in _TARGET.findall(rest)),
            is_conditional=guard != "" or (is_branch and len(operands) > 1),
            is_arithmetic=_ARITHMETIC.match(opcode) is not None,
            writes=frozenset(r for each in operands[:results] for r in _written(opcode, each)),
            reads=frozenset(_names(_REGISTER.findall(guard))).union(
                *(_read(opcode, place, each) for place, each in sources)
            ),
        )


def _num_results(opcode: str, operands: Sequence[str]) -> int:
    """How many operands, from the first on, are written."""
    if not operands or "[" in operands[0] or _NO_RESULT.match(opcode):
        return 0
    register_first = 0 if _PREDICATE.match(operands[0]) else 1
    most = register_first + (1 if _ONE_PREDICATE.match(opcode) else 2)
    count = register_first
    while count < min(most, len(operands)) and _PREDICATE.match(operands[count]):
        count += 1
    return count + (not register_first and _PREDICATES_FIRST.match(opcode) is not None)


def _written(opcode: str, operand: str) -> Iterable[str]:
    if operand in ("PR", "UPR"):  # some of the predicates, by a mask
        return [operand[:-1] + str(n) for n in range(8)]
    return _names(_REGISTER.findall(operand), 0, _first(_RESULTS, opcode) - 1)


def _read(opcode: str, place: int, operand: str) -> Iterable[str]:
    registers = _REGISTER.findall(operand)
    if not registers or "[" not in operand:
        return _names(registers, 0, _first(_SOURCES, opcode) - 1)
    for pattern, at, beginning, low, high in _BRACKETS:
        if at in (None, place) and operand.startswith(beginning) and re.match(pattern, opcode):
            return _names(registers, low, high)
    return _names(registers)


def _first(widths: Sequence[tuple[str, int]], opcode: str) -> int:
    return next((width for pattern, width in widths if re.search(pattern, opcode)), 1)


def _names(registers: Sequence[tuple[str, str]], low: int = 0, high: int = 0) -> list[str]:
    """Names of registers; of the first, if it is uniform, from low to high counted from it."""
    names = [kind + number for kind, number in registers]
    if registers and registers[0][0] == "UR":
        first = int(registers[0][1])
        names[:1] = [f"UR{n}" for n in range(first + low, first + high + 1)]
    return names


# Following the code -------------------------------------------------------------------------------

#: Barriers and calls that execution will return to, by name, with an index: the last comes first.
_Stack = tuple[tuple[str, int], ...]
_Place = tuple[int, _Stack]
#: Registers that are read, by an instruction's index.
_Reads = dict[int, frozenset[str]]

_ENDS = ("EXIT", "KILL", "BPT")
_CONTROL = (*_ENDS, "BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "BSSY", "BSYNC")


@dataclass(frozen=True)
class UnsetRead:
    """An instruction that reads registers which some path to it leaves unset."""

    instruction: Instruction
    registers: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.registers)
        where = f"0x{self.instruction.address} reads {names}"
        return f"{where}, which a path to it does not write: {self.instruction.text}"


class _Program:
    """The instructions of a listing by nvdisasm -c, its labels, and where kernels begin."""

    def __init__(self, listing: str) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        entries = []
        for line in listing.splitlines():
            if instruction := Instruction.of(line):
                self.code.append(instruction)
            elif label := _LABEL.match(line):
                self.labels[label[1]] = len(self.code)
            elif entry := _ENTRY.match(line):
                entries.append(entry[1])
        self.entries = [self.labels[name] for name in entries]
        self.joins = set(self.labels.values())

    def follow(self, place: _Place, have: set[str]) -> tuple[list[_Place], _Reads]:
        """Go on to the next join or fork, and add to have what is written.

        Returns:
            The places that are next, and what is read but not in have, by the instruction's index.
        """
        found: _Reads = {}
        while True:
            each = self.code[place[0]]
            missing = each.reads - have
            if missing and each.is_arithmetic:
                have -= frozenset() if each.is_conditional else each.writes
            else:
                have |= each.writes
                found |= {place[0]: missing} if missing else {}
            after = self.after(place)
            if len(after) != 1 or after[0][0] != place[0] + 1 or after[0][0] in self.joins:
                return after, found
            place = after[0]

    def after(self, place: _Place) -> list[_Place]:
        """Where the instruction of a place may go on."""
        index, stack = place
        each = self.code[index]
        if each.name not in _CONTROL:
            return [(index + 1, stack)]
        places = [(self.labels[label], stack) for label in each.labels if label in self.labels]
        barrier = next((operand for operand in each.operands if operand.startswith("B")), "")
        if each.name == "BSSY":
            return [(index + 1, _pushed(stack, barrier, places[0][0]))]
        if each.name == "BSYNC":
            places = _popped(stack, barrier) or [(index + 1, stack)]
        elif each.name == "RET":
            places = _popped(stack, "CALL")
        elif each.name == "CALL" and not places:  # a function that is not in the listing
            places = [(index + 1, stack)]
        elif each.name == "CALL" and not each.labels[0].startswith(".L_"):  # else it is a jump
            places = [(to, _pushed(stack, f"CALL {index}", index + 1)) for to, _ in places]
        if not places and each.name not in _ENDS:
            raise ValueError(f"0x{each.address} goes to an unknown place: {each.text}")
        return places + ([(index + 1, stack)] if each.is_conditional else [])


def _pushed(stack: _Stack, name: str, index: int) -> _Stack:
    return ((name, index), *(entry for entry in stack if entry[0] != name))


def _popped(stack: _Stack, name: str) -> list[_Place]:
    """Where the last entry of a name, or the last call, returns to, with the entries below it."""
    places = ((to, stack[i + 1 :]) for i, (own, to) in enumerate(stack) if own.split()[0] == name)
    return list(itertools.islice(places, 1))


def unset_reads(listing: str) -> list[UnsetRead]:
    """Reads of registers that a path leaves unset, in the order of their addresses.

    Args:
        listing: what nvdisasm -c prints of a cubin.

    Raises:
        ValueError: there is no kernel in it, or a branch has no known targets.
    """
    program = _Program(listing)
    if not program.entries:
        raise ValueError("the listing has no kernel.")
    written: dict[_Place, frozenset[str]] = {(entry, ()): frozenset() for entry in program.entries}
    waiting = list(written)
    while waiting:
        place = waiting.pop()
        have = set(written[place])
        for after in program.follow(place, have)[0]:
            now = written.get(after, frozenset(have)) & have
            if now != written.get(after):
                written[after] = now
                waiting.append(after)
    found: dict[int, set[str]] = {}
    for place, known in written.items():
        for index, registers in program.follow(place, set(known))[1].items():
            found.setdefault(index, set()).update(registers)
    return [
        UnsetRead(program.code[index], tuple(sorted(registers, key=_number)))
        for index, registers in sorted(found.items())
    ]


def _number(register: str) -> tuple[str, int]:
    kind, number = _REGISTER.findall(register)[0]
    return kind, int(number)


def find_nvdisasm() -> str | None:
    """The path of Triton's nvdisasm, or None where it has none that runs."""
    from triton import knobs

    try:
        return str(knobs.nvidia.nvdisasm.path)
    except (RuntimeError, OSError):
        return None


def disassembled(cubin: bytes, nvdisasm: str) -> str:
    """What nvdisasm, by its path, prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
