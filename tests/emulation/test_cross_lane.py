"""Moves between the lanes of a wave, against values that follow from AMD's pseudo-code."""

from pathlib import Path

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction, WaitFault
from attn_dispatch.emulation.instructions.cross_lane import OPCODES
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.waits import check_registers
from support.emulation import execute, group_of, put_register, register

LANES_64, LANES_32 = np.arange(64, dtype=np.uint32), np.arange(32, dtype=np.uint32)
#: EXEC of the tests in which some lanes do not execute.
SOME = 0x5A5A_5A5A_F0F0_3C01


def test_every_opcode_has_a_test():
    text = Path(__file__).read_text()
    assert [
        opcode for opcode in OPCODES if f"{opcode} " not in text and f'"{opcode}"' not in text
    ] == []


def bits_of(mask, lanes=64):
    return np.array([mask >> i & 1 for i in range(lanes)], bool)


def values_by_lane(lanes=64, waves=2):
    """Different in all lanes of all waves."""
    return (np.arange(waves)[:, None] * 1000 + np.arange(lanes)).astype(np.uint32)


# One lane -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("operand", "expected"),
    [
        ("5", (5, 1005)),
        ("s1", (3, 1060)),
        ("m0", (63, 1063)),
        ("68", (4, 1004)),
        ("-1", (63, 1063)),
    ],
)
def test_readlane_ignores_exec(operand, expected):
    group = group_of("gfx942", v0=values_by_lane(), s1=np.array([67, 60], np.uint32), m0=63, exec=2)
    execute(group, f"v_readlane_b32 s4, v0, {operand}")
    assert tuple(group.s_u32[4]) == expected


def test_readlane_takes_the_number_modulo_the_lanes():
    group = execute(group_of("gfx1100", v0=values_by_lane(32)), "v_readlane_b32 vcc_lo, v0, 35")
    assert group.s_u32[106].tolist() == [3, 1003]


def test_readlane_of_an_accumulation_register():
    group = execute(group_of("gfx942", a3=values_by_lane()), "v_readlane_b32 s4, a3, 7")
    assert group.s_u32[4].tolist() == [7, 1007]


@pytest.mark.parametrize(
    ("exec_", "lane"), [(0, 0), (1 << 63, 63), (0b1100, 2), ((1 << 64) - 1, 0), (1 << 32, 32)]
)
def test_readfirstlane(exec_, lane):
    group = group_of("gfx942", v0=values_by_lane(), exec=exec_)
    execute(group, "v_readfirstlane_b32 s4, v0")
    assert group.s_u32[4].tolist() == [lane, 1000 + lane]


@pytest.mark.parametrize("operand", ["9", "s1"])
def test_writelane_ignores_exec(operand):
    group = group_of("gfx942", v0=values_by_lane(), s1=9, s2=np.array([7, 8], np.uint32), exec=0)
    execute(group, f"v_writelane_b32 v0, s2, {operand}")
    expected = values_by_lane()
    expected[:, 9] = 7, 8
    np.testing.assert_array_equal(register(group, "v0"), expected)


def test_writelane_of_a_constant():
    group = execute(group_of("gfx1201", v0=values_by_lane(32)), "v_writelane_b32 v0, -1, 33")
    assert register(group, "v0")[:, 1].tolist() == [0xFFFFFFFF] * 2


# Rows of 16 lanes ---------------------------------------------------------------------------------
REVERSED = (0x89ABCDEF, 0x01234567)


@pytest.mark.parametrize("opcode", ["v_permlane16_b32", "v_permlanex16_b32"])
@pytest.mark.parametrize("selectors", ["0x89abcdef, 0x01234567", "s1, s2", "s1, 0x01234567"])
def test_permlane16(opcode, selectors):
    group = group_of("gfx1100", v0=values_by_lane(32), s1=REVERSED[0], s2=REVERSED[1])
    execute(group, f"{opcode} v1, v0, {selectors}")
    source = LANES_32 ^ (31 if "x16" in opcode else 15)
    np.testing.assert_array_equal(register(group, "v1"), values_by_lane(32)[:, source])


def test_permlanex16_with_constants_in_all_bits():
    group = execute(
        group_of("gfx1100", v0=values_by_lane(32)), "v_permlanex16_b32 v1, v0, -1, -1 op_sel:[1,0]"
    )
    expected = values_by_lane(32)[:, np.where(LANES_32 < 16, 31, 15)]
    np.testing.assert_array_equal(register(group, "v1"), expected)


def test_permlane16_selects_by_wave():
    group = group_of("gfx1201", v0=values_by_lane(32), s1=np.array([0, 0x33333333], np.uint32))
    execute(group, "v_permlane16_b32 v1, v0, s1, s1")
    rows = LANES_32 // 16 * 16
    np.testing.assert_array_equal(register(group, "v1"), [rows, 1000 + rows + 3])


@pytest.mark.parametrize(
    ("op_sel", "reads_inactive", "zeroes"),
    [("", 0, 0), (" op_sel:[1,0]", 1, 0), (" op_sel:[0,1]", 0, 1), (" op_sel:[1,1]", 1, 1)],
)
def test_permlane16_from_lanes_that_do_not_execute(op_sel, reads_inactive, zeroes):
    values, old = values_by_lane(32), np.full((2, 32), 77, np.uint32)
    group = group_of("gfx1100", v0=values, v1=old, exec=SOME & 0xFFFFFFFF)
    execute(group, f"v_permlanex16_b32 v1, v0, 0x89abcdef, 0x01234567{op_sel}")
    active, source = bits_of(SOME, 32), LANES_32 ^ 31
    expected = old.copy()
    for lane in range(32):
        if active[lane]:
            if reads_inactive or active[source[lane]]:
                expected[:, lane] = values[:, source[lane]]
            elif zeroes:
                expected[:, lane] = 0
    np.testing.assert_array_equal(register(group, "v1"), expected)


@pytest.mark.parametrize(
    ("width", "opcode"), [(16, "v_permlane16_swap_b32"), (32, "v_permlane32_swap_b32")]
)
@pytest.mark.parametrize("encoding", ["_e32 v0, v1", "_e64 v0, v1 bound_ctrl:1 fi:1"])
def test_permlane_swap(width, opcode, encoding):
    first, second = values_by_lane(), values_by_lane() + np.uint32(500)
    group = execute(group_of("gfx950", v0=first, v1=second), f"{opcode}{encoding}")
    in_first_half = LANES_64 % (2 * width) < width
    from_second = second[:, (LANES_64 - width) % 64]
    from_first = first[:, (LANES_64 + width) % 64]
    np.testing.assert_array_equal(
        register(group, "v0"), np.where(in_first_half, first, from_second)
    )
    np.testing.assert_array_equal(
        register(group, "v1"), np.where(in_first_half, from_first, second)
    )


def test_permlane_swap_needs_all_lanes():
    with pytest.raises(UnknownInstruction, match="lanes that do not execute"):
        execute(group_of("gfx950", exec=1), "v_permlane32_swap_b32_e32 v0, v1")


# Any lane, by the data path of LDS ----------------------------------------------------------------
@pytest.mark.parametrize("target", ["gfx942", "gfx1100", "gfx1201"])
@pytest.mark.parametrize("exec_", [(1 << 64) - 1, SOME])
@pytest.mark.parametrize("offset", [0, 8])
def test_bpermute(target, exec_, offset):
    group = group_of(target)
    lanes = group.lanes
    exec_ &= (1 << lanes) - 1
    address = ((np.arange(lanes) * 7 + 5) * 4 + 3 + 1024).astype(np.uint32)
    old = np.full((2, lanes), 77, np.uint32)
    for name, value in (("v0", address), ("v1", values_by_lane(lanes)), ("v2", old)):
        put_register(group, name, value)
    put_register(group, "exec", exec_)
    execute(group, f"ds_bpermute_b32 v2, v0, v1 offset:{offset}")
    active = bits_of(exec_, lanes)
    source = (address + offset) // 4 % lanes
    read = np.where(active[source], values_by_lane(lanes)[:, source], 0)
    np.testing.assert_array_equal(register(group, "v2"), np.where(active, read, old))


@pytest.mark.parametrize("exec_", [(1 << 64) - 1, SOME])
@pytest.mark.parametrize("offset", [0, 8])
def test_permute(exec_, offset):
    # Two lanes write to each of 32 lanes: the last one that executes wins.
    old = np.full((2, 64), 77, np.uint32)
    address = (LANES_64 % 32 * 8 + 256).astype(np.uint32)
    group = group_of("gfx942", v0=address, v1=values_by_lane(), v2=old, exec=exec_)
    execute(group, f"ds_permute_b32 v2, v0, v1 offset:{offset}")
    active = bits_of(exec_, 64)
    written = np.zeros((2, 64), np.uint32)
    for lane in np.flatnonzero(active):
        written[:, (address[lane] + offset) // 4 % 64] = values_by_lane()[:, lane]
    np.testing.assert_array_equal(register(group, "v2"), np.where(active, written, old))


@pytest.mark.parametrize("exec_", [(1 << 64) - 1, SOME])
def test_swizzle(exec_):
    old = np.full((2, 64), 77, np.uint32)
    group = group_of("gfx942", v1=values_by_lane(), v2=old, exec=exec_)
    execute(group, "ds_swizzle_b32 v2, v1 offset:swizzle(SWAP,16)")
    active, source = bits_of(exec_), LANES_64 ^ 16
    read = np.where(active[source], values_by_lane()[:, source], 0)
    np.testing.assert_array_equal(register(group, "v2"), np.where(active, read, old))


@pytest.mark.parametrize(
    "text",
    [
        "ds_bpermute_b32 v2, v0, v1",
        "ds_permute_b32 v2, v0, v1",
        "ds_swizzle_b32 v2, v1 offset:swizzle(SWAP,16)",
    ],
)
def test_result_is_used_before_the_wait(text):
    group = execute(group_of("gfx942", v0=LANES_64, v1=LANES_64), text)
    decoded = decode(parse_instruction("v_mov_b32_e32 v3, v2"), group.shared.target)
    with pytest.raises(WaitFault, match="v2 is used before the wait"):
        check_registers(group, decoded.text, decoded.reads, decoded.writes)
    execute(group, "s_waitcnt lgkmcnt(0)")
    assert not group.pending


@pytest.mark.parametrize(
    "text",
    [
        "v_readlane_b32 s0, s1, 0",
        "v_readlane_b32 s0, -v1, 0",
        "v_readlane_b32 v0, v1, 0",
        "v_readfirstlane_b32 s0, v1 clamp",
        "v_writelane_b32 s0, s1, 0",
        "v_permlanex16_b32 v1, v0, s1, s2 row_mask:0xf",
        "ds_bpermute_b32 v2, v0, v1 gds",
        "ds_swizzle_b32 v2, v1 offset:swizzle(UNKNOWN,1)",
    ],
)
def test_unknown_form(text):
    with pytest.raises(UnknownInstruction):
        execute(group_of("gfx1100"), text)
