"""Changes of one instruction of an AMD kernel, as a bug of a compiler or of a GPU would make."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from attn_dispatch.emulation.assembly import Instruction, parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.machine import Kernel

__all__ = ["KINDS", "Change", "changes_of", "is_memory_or_control"]

_NOTHING = "s_nop 0"
#: A kind of change: the texts that an instruction of a kernel may become.
_Rewrite = Callable[[Instruction, Kernel], Iterator[str]]


@dataclass(frozen=True)
class Change:
    """A change of a kernel's assembly.

    Attributes:
        kernel: that is changed.
        kind: one of `KINDS`.
        line: of the instruction that is replaced.
        before, after: its text.
        removed: lines of instructions that are removed as well.
    """

    kernel: Kernel
    kind: str
    line: int
    before: str
    after: str
    removed: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel.name} line {self.line}, {self.kind}: {self.before}  ->  {self.after}"


def changes_of(kernel: Kernel, lines: Collection[int], kinds: Collection[str]) -> list[Change]:
    """The changes of some kinds to the instructions in some lines.

    Left out are those that change nothing in the text, and those whose result is no instruction
    that the emulator knows.
    """
    found, signal = [], 0
    for instruction in kernel.assembly.instructions:
        if instruction.opcode == "s_barrier_signal":
            signal = instruction.line
        if instruction.line not in lines:
            continue
        for kind in kinds:
            for after in KINDS[kind](instruction, kernel):
                if after != instruction.text and _is_known(after, kernel):
                    # RDNA4 has two instructions for a barrier.
                    is_half = kind == "barrier" and instruction.opcode == "s_barrier_wait"
                    removed = (signal,) if is_half else ()
                    line, text = instruction.line, instruction.text
                    found.append(Change(kernel, kind, line, text, after, removed))
    return found


def _is_known(text: str, kernel: Kernel) -> bool:
    try:
        decode(parse_instruction(text), kernel.target)
    except UnknownInstruction:
        return False
    return True


def is_memory_or_control(instruction: Instruction) -> bool:
    """Whether it accesses memory or says what comes next: its effect is not only in registers."""
    return bool(_MEMORY_OR_CONTROL.match(instruction.opcode))


_MEMORY_OR_CONTROL = re.compile(
    r"(ds|global|flat|buffer|scratch)_|s_(load|buffer|c?branch|barrier|endpgm)"
)
#: What the emulator ignores, and kinds of their own.
_NOT_DROPPED = re.compile(
    r"s_(nop|wait|barrier|c?branch|endpgm|clause|delay_alu|set_?prio|sleep|sched|inst_pref|code_end)"
    r"|buffer_(gl|inv|wb)|global_(inv|wb)"
)


def _by_patterns(*pairs: tuple[str, str]) -> _Rewrite:
    """Replace each pattern that the text begins with."""

    def rewrite(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
        for pattern, replacement in pairs:
            if re.match(pattern, instruction.text):
                yield re.sub(pattern, replacement, instruction.text, count=1)

    return rewrite


_V, _S = r"^(v_(?:dual_|pk_)?)", r"^(s_)"
_THREE = r"(\S+), (\S+), ([^\s,]+)"


def _offset(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    """16 bytes away; the offsets of two accesses count elements."""
    for name, by in (("offset", 16), ("offset0", 1), ("offset1", 1)):
        found = re.search(rf"\b{name}:(-?\d+)\b", instruction.text)
        if found:
            start, end = found.span(1)
            yield f"{instruction.text[:start]}{int(found[1]) + by}{instruction.text[end:]}"
    if re.match(r"s_(buffer_)?load", instruction.opcode):
        found = re.search(r", 0x([0-9a-f]+)$", instruction.text)
        if found:
            yield f"{instruction.text[: found.start()]}, {int(found[1], 16) + 4:#x}"


_REGISTER = re.compile(r"\b([vsa])(?:(\d+)\b|\[(\d+):(\d+)\])")


def _register(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    """The next registers in place of the last ones that the text names."""
    first_half = instruction.text.partition("::")[0]
    found = list(_REGISTER.finditer(first_half, first_half.find(",") + 1))
    if not found:
        return
    last = found[-1]
    file, low, high = last[1], int(last[2] or last[3]), int(last[2] or last[4])
    by = 1 if low == high else 2 if file != "s" else high - low + 1
    if high + by >= {"v": kernel.vgprs, "a": kernel.agprs, "s": 102}[file]:
        return
    new = f"{file}{low + by}" if last[2] else f"{file}[{low + by}:{high + by}]"
    yield instruction.text[: last.start()] + new + instruction.text[last.end() :]


def _lanes(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    """Another lane of DPP, a swizzle or a permutation."""
    text = instruction.text
    if "quad_perm:[" in text:
        other = "2,3,0,1" if "quad_perm:[1,0,3,2]" in text else "1,0,3,2"
        yield re.sub(r"quad_perm:\[[\d,]+\]", f"quad_perm:[{other}]", text)
    counted = re.search(r"row_(?:shr|shl|ror|share|newbcast|xmask):(\d+)", text)
    if counted:
        lane = int(counted[1])
        yield text[: counted.start(1)] + str(lane // 2 or 2) + text[counted.end(1) :]
    swapped = re.search(r"swizzle\(SWAP,(\d+)\)", text)
    if swapped:
        yield text.replace(swapped[0], f"swizzle(SWAP,{int(swapped[1]) // 2 or 2})")
    if instruction.opcode == "v_readlane_b32" and instruction.operands[-1].isdigit():
        yield re.sub(r"\d+$", str(int(instruction.operands[-1]) ^ 1), text)
    for one, other in (
        ("row_mirror", "row_half_mirror"),
        ("row_half_mirror", "row_mirror"),
        ("row_bcast:15", "row_bcast:31"),
        ("row_mask:0xf", "row_mask:0xa"),
        ("v_permlanex16_", "v_permlane16_"),
        ("v_permlane16_b32", "v_permlanex16_b32"),
        ("v_permlane32_swap", "v_permlane16_swap"),
        ("v_permlane16_swap", "v_permlane32_swap"),
    ):
        if re.search(rf"\b{one}", text):
            yield re.sub(rf"\b{one}", other, text)


def _mask(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    """EXEC stays as it is."""
    if re.match(r"s_\w+_b(32|64) exec(_lo)?,", instruction.text):
        yield _NOTHING
    saved = re.match(r"s_\w+_saveexec_b(32|64) (\S+),", instruction.text)
    if saved:
        yield f"s_mov_b{saved[1]} {saved[2]}, exec{'_lo' if saved[1] == '32' else ''}"


def _dropped(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    if not _NOT_DROPPED.match(instruction.opcode):
        yield _NOTHING


def _barrier(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    if instruction.opcode in ("s_barrier", "s_barrier_wait"):
        yield _NOTHING


_COUNTER = re.compile(r"(?:vm|lgkm)cnt\((\d+)\)")
_ONE_COUNTER = re.compile(r"s_wait(?:cnt_vs|_load|_store|_ds|_km)cnt .*?(0x[0-9a-f]+|\d+)$")
_TWO_COUNTERS = re.compile(r"s_wait_(?:load|store)cnt_dscnt (0x[0-9a-f]+|\d+)$")


def _limits(text: str) -> list[tuple[re.Match[str], tuple[int, ...]]]:
    """The numbers of a wait, each with what allows one operation more of a counter."""
    both, one = _TWO_COUNTERS.match(text), _ONE_COUNTER.match(text)
    if both:
        return [(both, (1, 0x100))]
    return [(found, (1,)) for found in ([one] if one else _COUNTER.finditer(text))]


def _dropped_wait(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    if _limits(instruction.text):
        yield _NOTHING


def _weaker_wait(instruction: Instruction, kernel: Kernel) -> Iterator[str]:
    """One operation more may be left, of one of the counters."""
    text = instruction.text
    for found, steps in _limits(text):
        start, end = found.span(1)
        for step in steps:
            yield f"{text[:start]}{int(found[1], 0) + step}{text[end:]}"


#: Kind -> what it makes of an instruction.
KINDS: dict[str, _Rewrite] = {
    "operation": _by_patterns(
        (_V + "add_f32", r"\1sub_f32"),
        (_V + "sub_f32", r"\1add_f32"),
        (_V + "mul_f32", r"\1add_f32"),
        (_V + "max((?:_num)?_f32)", r"\1min\2"),
        (_V + "lshlrev_b32", r"\1lshrrev_b32"),
        (_V + "or_b32", r"\1and_b32"),
        (_V + "and_b32", r"\1or_b32"),
        (_V + "add((?:_nc)?_u32)", r"\1sub\2"),
        (_V + "lshl_add_u32", r"\1add_lshl_u32"),
        (_V + "add_lshl_u32", r"\1lshl_add_u32"),
        (_S + "add(_co)?_([iu]32)", r"\1sub\2_\3"),
        (_S + "mul_i32", r"\1add_i32"),
        (_S + "lshl_b32", r"\1lshr_b32"),
        (_S + "lshr_b32", r"\1lshl_b32"),
        (_S + "(and|or)_b(32|64) (?!exec)", r"\1xor_b\3 "),
        (_S + "min_([iu]32)", r"\1max_\2"),
        (_S + "max_([iu]32)", r"\1min_\2"),
    ),
    "comparison": _by_patterns(
        (r"^([vs]_cmpx?_)gt_", r"\1lt_"),
        (r"^([vs]_cmpx?_)lt_", r"\1ge_"),
        (r"^([vs]_cmpx?_)le_", r"\1gt_"),
        (r"^([vs]_cmpx?_)ge_", r"\1lt_"),
        (r"^(v_cmpx?_)eq_([iu])", r"\1ne_\2"),
        (r"^(v_cmpx?_)ne_([iu])", r"\1eq_\2"),
        (r"^(s_cmp_)eq_", r"\1lg_"),
        (r"^(s_cmp_)lg_", r"\1eq_"),
        (r"^(s_cbranch_\w+)nz ", r"\1z "),
        (r"^(s_cbranch_(?:vcc|exec))z ", r"\1nz "),
        (r"^s_cbranch_scc0 ", "s_cbranch_scc1 "),
        (r"^s_cbranch_scc1 ", "s_cbranch_scc0 "),
        (r"^(v_cndmask_b32\S*) (\S+), (\S+), (\S+),", r"\1 \2, \4, \3,"),
    ),
    "operands": _by_patterns(
        (r"^(v_(?:mfma|wmma)\S+) " + _THREE, r"\1 \2, \4, \3"),
        (r"^(v_perm_b32) " + _THREE, r"\1 \2, \4, \3"),
        (r"^(v_(?:dual_)?sub(?:_nc)?_[fu]32\S*) " + _THREE, r"\1 \2, \4, \3"),
        (r"^(s_(?:lshl|lshr|ashr|sub)_\S+) " + _THREE, r"\1 \2, \4, \3"),
        (r"^(v_fma_f32) (\S+), (\S+), (\S+), (\S+)", r"\1 \2, \3, \5, \4"),
    ),
    "offset": _offset,
    "register": _register,
    "lanes": _lanes,
    "mask": _mask,
    "instruction": _dropped,
    "dropped wait": _dropped_wait,
    "weaker wait": _weaker_wait,
    "barrier": _barrier,
}
