"""Scalar loads: sizes, offsets, alignment, and the wait for their results."""

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import MemoryFault, UnknownInstruction, WaitFault
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.targets import target_named
from attn_dispatch.emulation.waits import check_registers
from support.emulation import execute, group_of, put_register, shared_by


def wide(*values):
    """Values of two registers, one for each wave."""
    return np.array(values, np.uint64)


def memory_of(words):
    memory = GlobalMemory()
    region = memory.allocate(np.asarray(words, np.uint32).view(np.uint8), "the words")
    return memory, region.address


def loading_group(target="gfx942", count=32, **registers):
    memory, address = memory_of(np.arange(count) * 0x01010101)
    shared = shared_by(target_named(target), 2, memory=memory)
    group = group_of(target, 2, shared=shared, **registers)
    put_register(group, "s2", wide(address, address + 16))
    return group, address


@pytest.mark.parametrize(
    ("opcode", "words"),
    [
        *[(f"s_load_dword{suffix}", n) for suffix, n in
          (("", 1), ("x2", 2), ("x4", 4), ("x8", 8), ("x16", 16))],
        *[(f"s_load_b{32 * n}", n) for n in (1, 2, 3, 4, 8, 16)],
    ],
)  # fmt: skip
def test_load(opcode, words):
    group, _ = loading_group()
    destination = "s8" if words == 1 else f"s[8:{7 + words}]"
    execute(group, f"{opcode} {destination}, s[2:3], 0x8")
    expected = (np.arange(words)[:, None] + np.array([2, 6])) * 0x01010101
    np.testing.assert_array_equal(group.s_u32[8 : 8 + words], expected)
    assert [each.kind for each in group.pending] == ["scalar"]
    assert group.pending_registers == set(range(8, 8 + words))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s_load_dword s8, s[2:3], s5", 3),
        ("s_load_b32 s8, s[2:3], s5 offset:0x10", 7),
        ("s_load_b32 s8, s[2:3], null offset:0x10", 4),
        ("s_load_b32 s8, s[2:3], null", 0),
        ("s_load_b32 s8, s[2:3], 0x4 glc", 1),
        ("s_load_b32 s8, s[2:3], 0x4 scope:SCOPE_SYS th:TH_LOAD_NT", 1),
    ],
)
def test_load_offset(text, place):
    group, _ = loading_group(s5=12)
    execute(group, text)
    assert group.s_u32[8].tolist() == [place * 0x01010101, (place + 4) * 0x01010101]


@pytest.mark.parametrize(
    ("opcode", "offset", "value"),
    [
        ("s_load_u8", 1, 0x83), ("s_load_i8", 1, 0xFFFFFF83),
        ("s_load_u16", 2, 0x8584), ("s_load_i16", 2, 0xFFFF8584),
    ],
)  # fmt: skip
def test_load_of_less_than_a_word(opcode, offset, value):
    memory, address = memory_of([0x85848382])
    group = group_of("gfx1201", shared=shared_by(target_named("gfx1201"), 2, memory=memory))
    put_register(group, "s2", wide(address))
    execute(group, f"{opcode} s8, s[2:3], {offset}")
    assert group.s_u32[8].tolist() == [value, value]


@pytest.mark.parametrize(
    ("opcode", "offset"), [("s_load_b32", 2), ("s_load_b64", 1), ("s_load_u16", 1)]
)
def test_load_must_be_aligned(opcode, offset):
    group, _ = loading_group("gfx1201")
    destination = "s[8:9]" if opcode.endswith("64") else "s8"
    with pytest.raises(MemoryFault, match="is not aligned"):
        execute(group, f"{opcode} {destination}, s[2:3], {offset}")


def test_load_outside_of_memory():
    with pytest.raises(MemoryFault):
        execute(loading_group()[0], "s_load_dword s8, s[2:3], 0x74")


def test_load_into_its_own_address():
    group, _ = loading_group()
    execute(group, "s_load_dwordx2 s[2:3], s[2:3], 0x0")
    assert group.s_u32[2:4].tolist() == [[0, 4 * 0x01010101], [0x01010101, 5 * 0x01010101]]


def test_result_of_a_load_is_used_before_the_wait():
    group, _ = loading_group()
    execute(group, "s_load_dword s8, s[2:3], 0x0")
    for text in ("s_add_u32 s9, s8, 1", "s_mov_b32 s8, 0"):
        decoded = decode(parse_instruction(text), group.shared.target)
        with pytest.raises(WaitFault, match="s8 is used before the wait"):
            check_registers(group, decoded.text, decoded.reads, decoded.writes)
    execute(group, "s_waitcnt lgkmcnt(0)")
    assert not group.pending


@pytest.mark.parametrize(
    "text",
    [
        "s_load_dwordx2 s[9:10], s[2:3], 0x0",
        "s_load_dwordx4 s[6:9], s[2:3], 0x0",
        "s_load_dwordx2 s8, s[2:3], 0x0",
        "s_load_dword s8, s[4:7], 0x0",
        "s_load_dword s8, s[2:3], 0x0 lds",
        "s_buffer_load_dword s8, s[4:7], 0x0",
    ],
)
def test_unknown_form_of_a_load(text):
    with pytest.raises(UnknownInstruction):
        execute(loading_group()[0], text)
