"""What vector instructions have in common: EXEC, halves of registers, SDWA, DPP, modifiers."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.targets import target_named
from support.emulation import (
    Row,
    check_register,
    check_row,
    execute,
    f16,
    f32,
    group_of,
    i32,
    mask,
    register,
    u16,
    u32,
    u64,
)

M = 0xFFFFFFFF
CDNA, RDNA = "gfx942", "gfx1100"


# EXEC ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "text", "value"),
    [
        (CDNA, "v_mov_b32_e32 v0, 3", u32(3)),
        (CDNA, "v_mov_b64_e32 v[0:1], 3", u64(3)),
        (CDNA, "v_add_f16_e32 v0, 0, v2", u32(0)),
        (RDNA, "v_add_f16_e32 v0, 0, v2", u16(0)),
        (CDNA, "v_add_u32_sdwa v0, v2, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD "
         "src1_sel:DWORD", u32(0)),
        (CDNA, "v_mov_b32_dpp v0, v2 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1", u32(0)),
    ],
)  # fmt: skip
def test_lanes_outside_of_exec_stay(target, text, value):
    lanes = np.arange(target_named(target).wave_size)
    old = u64(0x1111111111111111)
    group = group_of(target, v0=np.broadcast_to(old, (2, len(lanes))), v2=0, exec=0x0F0F)
    execute(group, text)
    executes = np.isin(lanes, [*range(4), *range(8, 12)])
    was = old.view(value.dtype)[0]
    check_register(group, "v0", np.where(executes, value[0], was))


def test_waves_have_their_own_scalars():
    group = execute(group_of(CDNA, s4=u32(3, 5), v2=10), "v_add_u32_e32 v0, s4, v2")
    assert register(group, "v0")[:, 0].tolist() == [13, 15]


# Encodings ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "row",
    [
        # The other half of a 16-bit result: 0 on CDNA, kept on RDNA.
        Row(CDNA, "v_add_f16_e32 v0, 1.0, v2", (f16(1),), u32(0x4000), {"v0": 0x70000}),
        Row(RDNA, "v_add_f16_e32 v0, 1.0, v2", (f16(1),), u32(0x74000), {"v0": 0x70000}),
        Row(CDNA, "v_fma_f16 v0, v2, 1.0, 1.0", (f16(1),), u32(0x74000), {"v0": 0x70000}),
        Row(CDNA, "v_fma_f16 v0, v2, v4, v6 op_sel:[1,0,0,1]",
            (u32(0x40000000), f16(3), f16(1)), u32(0x47000009), {"v0": 9}),
        Row(RDNA, "v_add_f16_e64 v0, v2, |v4| op_sel:[0,1,1]", (f16(1), u32(0xC0000000)),
            u32(0x42000009), {"v0": 9}),
        # SDWA
        Row(CDNA, "v_or_b32_sdwa v0, v2, v4 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 "
            "src1_sel:BYTE_3", (u32(0x11223301), u32(0x10223344)), u32(0x1100), {"v0": M}),
        Row(CDNA, "v_or_b32_sdwa v0, v2, v4 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE "
            "src0_sel:WORD_1 src1_sel:DWORD", (u32(0x11220000), u32(0x33440004)), u32(0x1126FFFF),
            {"v0": M}),
        Row(CDNA, "v_add_u32_sdwa v0, v2, sext(v4) dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:BYTE_1", (u32(5), u32(0xFE00)), u32(3)),
        Row(CDNA, "v_lshlrev_b32_sdwa v0, v2, v4 dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:WORD_1", (u32(4), u32(0x12345678)), u32(0x12340)),
        Row(CDNA, "v_ashrrev_i16_sdwa v0, v2, v4 dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:WORD_1", (u32(4), u32(0x80000000)), u32(0xF800)),
        Row(CDNA, "v_add_f16_sdwa v0, v2, -v4 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE "
            "src0_sel:WORD_1 src1_sel:WORD_0", (u32(0x40000000), f16(1)), u32(0x3C000007),
            {"v0": 7}),
        Row(CDNA, "v_cndmask_b32_sdwa v0, v2, v4, vcc dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:WORD_1", (u32(3), u32(0x50000)), u32(5, 3),
            {"vcc": 0x5555555555555555}),
        Row(CDNA, "v_cmp_ne_u16_sdwa s[4:5], v2, v4 src0_sel:BYTE_0 src1_sel:WORD_1",
            (u32(0x105, 0x106), u32(0x50000)), {"s4": mask(0, 1)}),
        Row(CDNA, "v_and_b32_sdwa v0, v2, s5 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 "
            "src1_sel:DWORD", (u32(0x12345678),), u32(0x1230), {"s5": 0xFFF0}),
        Row("gfx950", "v_add_co_u32_sdwa v0, vcc, v2, v4 dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:BYTE_0", (u32(M, 1), u32(0x101)),
            {"v0": u32(0, 2), "vcc": mask(1, 0)}),
    ],
    ids=lambda row: f"{row.target}-{row.text}",
)  # fmt: skip
def test_halves_and_sdwa(row):
    check_row(row)


LANES = np.arange(64)
ROW, PLACE = LANES // 16 * 16, LANES % 16
ALL = "row_mask:0xf bank_mask:0xf"


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (f"quad_perm:[1,0,3,2] {ALL}", LANES ^ 1),
        (f"row_ror:8 {ALL}", LANES ^ 8),
        (f"row_mirror {ALL}", ROW + 15 - PLACE),
        (f"row_half_mirror {ALL}", LANES ^ 7),
        (f"row_shr:1 {ALL}", np.where(PLACE >= 1, LANES - 1, 99)),
        (f"row_shr:1 {ALL} bound_ctrl:1", np.where(PLACE >= 1, LANES - 1, 0)),
        (f"row_shl:4 {ALL}", np.where(PLACE < 12, LANES + 4, 99)),
        ("row_bcast:15 row_mask:0xa bank_mask:0xf",
         np.where(LANES // 16 % 2 == 1, ROW - 1, 99)),
        ("row_bcast:31 row_mask:0xc bank_mask:0xf", np.where(LANES >= 32, 31, 99)),
        ("row_shl:8 row_mask:0xf bank_mask:0x3", np.where(PLACE < 8, LANES + 8, 99)),
        ("quad_perm:[0,0,0,0] row_mask:0x5 bank_mask:0xc bound_ctrl:1",
         np.where((LANES // 16 % 2 == 0) & (PLACE >= 8), LANES // 4 * 4, 99)),
    ],
)  # fmt: skip
def test_dpp_moves_lanes(control, expected):
    group = group_of(CDNA, v0=99, v2=LANES.astype(np.uint32))
    execute(group, f"v_mov_b32_dpp v0, v2 {control}")
    check_register(group, "v0", expected.astype(np.uint32))


@pytest.mark.parametrize(
    ("suffix", "of_inactive"),
    [("", 99), (" bound_ctrl:1", 0)],
)
def test_dpp_source_outside_of_exec(suffix, of_inactive):
    lanes = np.arange(32)
    group = group_of(RDNA, v0=99, v2=lanes.astype(np.uint32), exec=0xFFFF00FF)
    execute(group, f"v_mov_b32_dpp v0, v2 row_xmask:8 {ALL}{suffix}")
    partner = lanes ^ 8
    expected = np.where(lanes < 16, of_inactive, partner)
    expected = np.where((lanes >= 8) & (lanes < 16), 99, expected)
    check_register(group, "v0", expected.astype(np.uint32))


@pytest.mark.parametrize(
    "row",
    [
        # Only the first source comes from another lane; its sign changes afterwards.
        Row(CDNA, f"v_add_f32_dpp v0, -v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (f32(1, 2), f32(10, 20)), f32(8, 19)),
        Row(CDNA, f"v_max_i32_dpp v0, v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (i32(-1, 2), i32(1, -5)), i32(2, -1)),
        Row(RDNA, f"v_add3_u32_e64_dpp v0, v2, v4, v6 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (u32(1, 2), u32(10), u32(100)), u32(112, 111)),
        Row(RDNA, f"v_add_co_u32_e64_dpp v0, s4, v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (u32(M, 0), u32(1)), {"v0": u32(1, 0), "s4": mask(0, 1)}),
        Row(CDNA, f"v_cndmask_b32_dpp v0, v2, v4, vcc quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (u32(1, 2), u32(7)), u32(7, 1), {"vcc": 0x5555555555555555}),
        Row(RDNA, f"v_cmp_eq_u32_e64_dpp s4, v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (u32(1, 2), u32(2)), {"s4": mask(1, 0)}),
        Row(RDNA, f"v_add_f16_dpp v0, v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (f16(1, 2), f16(1)), f16(3, 2)),
        Row(RDNA, f"v_fmac_f32_dpp v0, v2, v4 quad_perm:[1,0,3,2] {ALL} bound_ctrl:1",
            (f32(1, 2), f32(10)), f32(25, 15), {"v0": f32(5)}),
    ],
    ids=lambda row: row.text,
)  # fmt: skip
def test_dpp_of_other_instructions(row):
    check_row(row)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (CDNA, "v_add_f32_e64 v0, v1, v2 mul:2"),
        (CDNA, "v_add_f32_e64 v0, v1, v2 wrong:1"),
        (CDNA, "v_add_f32_e64 v0, v1, v2 op_sel:[1,0,0]"),
        (CDNA, "v_add_f16_e64 v0, v1, v2 op_sel:[0,0,1]"),
        (CDNA, "v_mul_lo_u32 v0, v1, v2 clamp"),
        (CDNA, "v_add_f32_e32 v0, v1"),
        (CDNA, "v_add_f32_e32 v0, v1, v2, v3"),
        (CDNA, "v_add_u32_e32 v0, sext(v1), v2"),
        (CDNA, "v_mov_b32_dpp v0, v1 row_mask:0xf bank_mask:0xf"),
        (CDNA, "v_mov_b32_dpp v0, v1 row_shr:16 row_mask:0xf bank_mask:0xf"),
        (CDNA, "v_mov_b64_sdwa v[0:1], v[2:3] src0_sel:WORD_1"),
        (RDNA, "v_cmp_eq_u32_e64_dpp s4, v2, v4 row_shr:1 row_mask:0xf bank_mask:0xf"),
        (CDNA, "v_or_b32_sdwa v0, v2, v4 dst_sel:BYTE_0 dst_unused:UNUSED_SEXT"),
        (RDNA, "v_mov_b32_dpp v0, v1 dpp8:[1,0,2,3,4,5,6,7]"),
        (RDNA, "v_mov_b32_dpp v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf fi:1"),
        (RDNA, "v_cmpx_eq_u32_e64 s4, v2, v4"),
        (CDNA, "v_div_scale_f32 v0, vcc, v1, v2, v3 clamp"),
        (RDNA, "v_add_co_ci_u32_e64 v0, null, v1, v2"),
        (RDNA, "v_no_such_thing v0, v1"),
    ],
)
def test_unknown_forms_are_rejected(target, text):
    with pytest.raises(UnknownInstruction, match="line 7"):
        decode(parse_instruction(text, 7), target_named(target))
