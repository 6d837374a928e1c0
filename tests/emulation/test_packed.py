"""Packed instructions: results by AMD's published pseudo-code, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions import packed
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
    halves,
    i16,
    pair,
    u16,
    u32,
    u64,
)

NAN, INF = math.nan, math.inf
CDNA, RDNA, RDNA4 = "gfx942", "gfx1100", "gfx1201"


ROWS = [
    Row(CDNA, "v_pk_add_f16 v0, v2, v4", (halves(f16, 1, 2), halves(f16, 10, 20)),
        halves(f16, 11, 22)),
    # The bits of op_sel and op_sel_hi say which half of a source the two results take.
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 op_sel:[1,0] op_sel_hi:[0,1]",
        (halves(f16, 1, 2), halves(f16, 10, 20)), halves(f16, 12, 21)),
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 op_sel_hi:[1,0]",
        (halves(f16, 1, 2), halves(f16, 10, 20)), halves(f16, 11, 12)),
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 op_sel:[1,1]",
        (halves(f16, 1, 2), halves(f16, 10, 20)), halves(f16, 22, 22)),
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 op_sel_hi:[0,0]",
        (halves(f16, 1, 2), halves(f16, 10, 20)), halves(f16, 11, 11)),
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 neg_lo:[1,0] neg_hi:[0,1]",
        (halves(f16, 1, 2), halves(f16, 10, 20)), halves(f16, 9, -18)),
    Row(CDNA, "v_pk_add_f16 v0, v2, v4 clamp",
        (halves(f16, 1, NAN), halves(f16, 10, 1)), halves(f16, 1, 0)),
    Row(CDNA, "v_pk_add_f16 v0, v2, s4 op_sel_hi:[1,0]", (halves(f16, 1, 2),),
        halves(f16, 4, 5), {"s4": 0x4200}),
    # A literal has 32 bits; an inline float has 16, and 0 above.
    Row(RDNA, "v_pk_mul_f16 v0, 0x5c00, v4 op_sel_hi:[0,1]", (0, halves(f16, 1, -0.0)),
        halves(f16, 256, -0.0)),
    Row(RDNA, "v_pk_mul_f16 v0, 0x40003c00, v4", (0, halves(f16, 3, 3)), halves(f16, 3, 6)),
    Row(CDNA, "v_pk_add_f16 v0, v2, 1.0", (halves(f16, 1, 2),), halves(f16, 2, 2)),
    Row(CDNA, "v_pk_add_f16 v0, v2, 1.0 op_sel_hi:[1,0]", (halves(f16, 1, 2),), halves(f16, 2, 3)),
    Row(CDNA, "v_pk_add_f16 v0, v2, 1.0 op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]",
        (halves(f16, 1, 2),), halves(f16, 0, 1)),
    Row(CDNA, "v_pk_mul_f16 v0, v2, v4", (halves(f16, 2.0**-24, 300), halves(f16, 1, 300)),
        halves(f16, 2.0**-24, INF)),
    Row(CDNA, "v_pk_fma_f16 v0, v2, v4, v6",
        (halves(f16, 1 + 2.0**-6, 3), halves(f16, 1 - 2.0**-6, 5), halves(f16, -1, 1)),
        halves(f16, -(2.0**-12), 16)),
    Row(CDNA, "v_pk_min_f16 v0, v2, v4", (halves(f16, NAN, 0.0), halves(f16, 1, -0.0)),
        halves(f16, 1, -0.0)),
    Row(CDNA, "v_pk_max_f16 v0, v2, v4", (halves(f16, NAN, -0.0), halves(f16, 1, 0.0)),
        halves(f16, 1, 0.0)),
    Row(RDNA4, "v_pk_min_num_f16 v0, v2, v4", (halves(f16, 3, NAN), halves(f16, 1, 2)),
        halves(f16, 1, 2)),
    Row(RDNA4, "v_pk_max_num_f16 v0, v2, v4", (halves(f16, 3, NAN), halves(f16, 1, 2)),
        halves(f16, 3, 2)),
    Row(CDNA, "v_pk_add_u16 v0, v2, v4", (halves(u16, 1, 0xFFFF), halves(u16, 2, 1)),
        halves(u16, 3, 0)),
    Row(CDNA, "v_pk_add_u16 v0, v2, v4 clamp", (halves(u16, 1, 0xFFFF), halves(u16, 2, 1)),
        halves(u16, 3, 0xFFFF)),
    Row(CDNA, "v_pk_add_u16 v0, v2, -1", (halves(u16, 1, 5),), halves(u16, 0, 4)),
    Row(CDNA, "v_pk_sub_u16 v0, v2, v4 clamp", (halves(u16, 1, 3), halves(u16, 2, 1)),
        halves(u16, 0, 2)),
    Row(CDNA, "v_pk_add_i16 v0, v2, v4 clamp", (halves(i16, 32767, -5), halves(i16, 2, 1)),
        halves(i16, 32767, -4)),
    Row(CDNA, "v_pk_sub_i16 v0, v2, v4", (halves(i16, -32768, -5), halves(i16, 1, 1)),
        halves(i16, 32767, -6)),
    Row(CDNA, "v_pk_mul_lo_u16 v0, v2, v4", (halves(u16, 0x101, 3), halves(u16, 0x101, 5)),
        halves(u16, 0x201, 15)),
    Row(CDNA, "v_pk_mad_u16 v0, v2, v4, v6",
        (halves(u16, 2, 3), halves(u16, 5, 7), halves(u16, 1, 2)), halves(u16, 11, 23)),
    Row(CDNA, "v_pk_mad_i16 v0, v2, v4, v6",
        (halves(i16, -2, 3), halves(i16, 5, -7), halves(i16, 1, 2)), halves(i16, -9, -19)),
    Row(CDNA, "v_pk_min_u16 v0, v2, v4", (halves(u16, 1, 0xFFFF), halves(u16, 2, 1)),
        halves(u16, 1, 1)),
    Row(CDNA, "v_pk_max_u16 v0, v2, v4", (halves(u16, 1, 0xFFFF), halves(u16, 2, 1)),
        halves(u16, 2, 0xFFFF)),
    Row(CDNA, "v_pk_min_i16 v0, v2, v4", (halves(i16, 1, -1), halves(i16, 2, 1)),
        halves(i16, 1, -1)),
    Row(CDNA, "v_pk_max_i16 v0, v2, v4", (halves(i16, 1, -1), halves(i16, 2, 1)),
        halves(i16, 2, 1)),
    Row(RDNA, "v_pk_lshlrev_b16 v0, 8, v4 op_sel_hi:[0,1]", (0, halves(u16, 0x1234, 0x5678)),
        halves(u16, 0x3400, 0x7800)),
    # Without op_sel_hi, the upper half of a small constant is 0.
    Row(RDNA, "v_pk_lshlrev_b16 v0, 8, v4", (0, halves(u16, 0x1234, 0x5678)),
        halves(u16, 0x3400, 0x5678)),
    Row(RDNA, "v_pk_lshlrev_b16 v0, 0x40008, v4", (0, halves(u16, 0x1234, 0x5678)),
        halves(u16, 0x3400, 0x6780)),
    Row(RDNA, "v_pk_lshrrev_b16 v0, v2, v4", (halves(u16, 4, 17), halves(u16, 0x8000, 0x8000)),
        halves(u16, 0x800, 0x4000)),
    Row(RDNA, "v_pk_ashrrev_i16 v0, v2, v4", (halves(u16, 4, 15), halves(u16, 0x8000, 0x8000)),
        halves(u16, 0xF800, 0xFFFF)),
    Row(CDNA, "v_pk_add_f32 v[0:1], v[2:3], v[4:5]", (pair(1, 2), pair(10, 20)), pair(11, 22)),
    Row(CDNA, "v_pk_add_f32 v[0:1], v[2:3], v[4:5] op_sel:[0,1] op_sel_hi:[1,0]",
        (pair(1, 2), pair(10, 20)), pair(21, 12)),
    Row(CDNA, "v_pk_add_f32 v[0:1], v[2:3], v[4:5] neg_lo:[0,1] neg_hi:[1,0]",
        (pair(1, 2), pair(10, 20)), pair(-9, 18)),
    Row(CDNA, "v_pk_add_f32 v[0:1], v[2:3], 1.0 op_sel_hi:[1,0]", (pair(1, 2),), pair(2, 3)),
    Row(CDNA, "v_pk_add_f32 v[0:1], v[2:3], v[4:5] clamp", (pair(NAN, 0.25), pair(1, 0.5)),
        pair(0, 0.75)),
    Row(CDNA, "v_pk_mul_f32 v[0:1], s[4:5], v[4:5] op_sel_hi:[0,1]", (0, pair(10, 20)),
        pair(30, 60), {"s4": pair(3, 4)[0]}),
    Row(CDNA, "v_pk_mul_f32 v[0:1], v[2:3], v[4:5]", (pair(-0.0, 2.0**-140), pair(1, 2)),
        pair(-0.0, 2.0**-139)),
    # The sources are read before the result is written.
    Row(CDNA, "v_pk_mul_f32 v[2:3], v[2:3], v[2:3] op_sel:[1,0] op_sel_hi:[0,1]", (pair(3, 5),),
        {"v2": pair(15, 15)}),
    Row(CDNA, "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel_hi:[1,0,1]",
        (pair(2, 3), pair(10, 20), pair(1, 2)), pair(21, 32)),
    Row(CDNA, "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] neg_lo:[0,0,1] neg_hi:[0,0,1]",
        (pair(1 + 2.0**-12, 3), pair(1 + 2.0**-12, 20), pair(1 + 2.0**-11, 2)),
        pair(2.0**-24, 58)),
    Row(CDNA, "v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,0]",
        (u64(1 | 2 << 32), u64(3 | 4 << 32)), u64(2 | 3 << 32)),
    Row(CDNA, "v_pk_mov_b32 v[2:3], v[2:3], v[2:3] op_sel:[1,0]", (u64(1 | 2 << 32),),
        {"v2": u64(2 | 1 << 32)}),
    Row(CDNA, "v_pk_mov_b32 v[0:1], 0, 0", (), u64(0)),
    Row(CDNA, "v_fma_mix_f32 v0, v2, v4, v6 op_sel:[1,0,0] op_sel_hi:[1,1,0]",
        (halves(f16, 9, 3), halves(f16, 5, 9), f32(0.5)), f32(15.5)),
    Row(CDNA, "v_fma_mix_f32 v0, v2, -v4, |v6| op_sel_hi:[0,1,0]",
        (f32(3), halves(f16, 5, 9), f32(-0.5)), f32(-14.5)),
    Row(CDNA, "v_fma_mixlo_f16 v0, v2, v4, neg(0)", (f32(3, -0.0), f32(1 / 3, 1)),
        u32(0x77773C00, 0x77778000), {"v0": 0x77777777}),
    Row(RDNA, "v_fma_mixhi_f16 v0, v2, v4, 0 op_sel_hi:[0,1,0]", (f32(3), halves(f16, 2, 9)),
        u32(0x46007777), {"v0": 0x77777777}),
    Row(CDNA, "v_fma_mixhi_f16 v0, v2, v4, 1.0 clamp", (f32(3, NAN), f32(2)),
        u32(0x3C007777, 0x7777), {"v0": 0x77777777}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.target}-{row.text}" for row in ROWS])
def test_result(row):
    check_row(row)


def test_every_opcode_has_a_row():
    tested = {parse_instruction(row.text).opcode for row in ROWS}
    assert tested == {*packed.FORMS, *packed.MIXED}


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("v_pk_add_f16 v0, v2, v2", 0, None),
        ("v_pk_add_f32 v[0:1], v[2:3], v[2:3]", 0, 0),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[2:3]", 0, 0),
        ("v_fma_mixlo_f16 v0, v2, v2, 0", 0x77770000, None),
    ],
)
def test_lanes_outside_of_exec_stay(text, low, high):
    group = group_of(CDNA, v0=0x77777777, v1=0x77777777, v2=0, v3=0, exec=0xF0)
    execute(group, text)
    executes = (np.arange(64) >= 4) & (np.arange(64) < 8)
    for name, value in (("v0", low), ("v1", high)):
        expected = np.where(executes & (value is not None), value or 0, 0x77777777)
        check_register(group, name, expected.astype(np.uint32))


@pytest.mark.parametrize(
    "text",
    [
        "v_pk_mul_lo_u16 v0, v1, v2 clamp",
        "v_pk_add_u16 v0, v1, v2 neg_lo:[1,0]",
        "v_pk_add_f16 v0, v1, -v2",
        "v_pk_add_f16 v0, v1, v2 op_sel:[0,0,1,0]",
        "v_pk_add_f16 v0, v1, v2 mul:2",
        "v_pk_add_f16 v0, v1",
        "v_pk_add_f32 v[0:1], v[2:3], 1.0",
        "v_pk_add_f32 v0, v[2:3], v[4:5]",
        "v_pk_mul_f32 v[0:1], v2, v[4:5]",
        "v_pk_mov_b32 v[0:1], v[2:3], v[4:5] neg_lo:[1,0]",
        "v_fma_mix_f32 v0, v1, v2, v3 op_sel:[1,0,0]",
        "v_fma_mix_f32 v0, v1, v2, v3 neg_hi:[1,0,0]",
    ],
)
def test_unknown_forms_are_rejected(text):
    with pytest.raises(UnknownInstruction, match="line 7"):
        decode(parse_instruction(text, 7), target_named(CDNA))
