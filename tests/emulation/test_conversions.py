"""Conversions: results by AMD's published pseudo-code, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions import conversions
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
    i32,
    pair,
    u16,
    u32,
)

NAN, INF = math.nan, math.inf
CDNA, CDNA4, RDNA, RDNA4 = "gfx942", "gfx950", "gfx1100", "gfx1201"


ROWS = [
    Row(CDNA, "v_cvt_f32_i32_e32 v0, v2", (i32(-3, 2**24 + 1, 2**24 + 3),),
        f32(-3, 2**24, 2**24 + 4)),
    Row(CDNA, "v_cvt_f32_i32_sdwa v0, sext(v2) dst_sel:DWORD dst_unused:UNUSED_PAD "
        "src0_sel:BYTE_3", (u32(0x80FFFFFF, 0x7F000000),), f32(-128, 127)),
    Row(CDNA, "v_cvt_f32_u32_e32 v0, v2", (u32(3, 0xFFFFFFFF),), f32(3, 2.0**32)),
    Row(CDNA, "v_cvt_f32_f16_e32 v0, v2", (f16(1.5, 2.0**-24, NAN),), f32(1.5, 2.0**-24, NAN)),
    Row(CDNA, "v_cvt_f32_f16_sdwa v0, -v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1",
        (halves(f16, 1, 2),), f32(-2)),
    Row(RDNA, "v_cvt_f32_f16_e32 v0, v2.h", (halves(f16, 1, 2),), f32(2)),
    Row(RDNA, "v_cvt_f32_f16_e64 v0, v2 op_sel:[1,0]", (halves(f16, 1, 2),), f32(2)),
    Row(CDNA, "v_cvt_f16_f32_e32 v0, v2", (f32(1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e6, 2.0**-25),),
        u32(0x3C00, 0x3C02, 0x7C00, 0)),
    Row(RDNA, "v_cvt_f16_f32_e32 v0.h, v2", (f32(1),), u32(0x3C000007), {"v0": 7}),
    Row(CDNA, "v_cvt_f16_f32_sdwa v0, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD",
        (f32(1),), u32(0x3C000007), {"v0": 7}),
    Row(RDNA, "v_cvt_f16_i16_e32 v0, v2", (i16(-3, 2049),), f16(-3, 2048)),
    Row(RDNA, "v_cvt_f16_i16_e64 v0.h, v2.h", (halves(i16, 1, -2),), u32(0xC0000007), {"v0": 7}),
    Row(CDNA, "v_cvt_f16_u16_e32 v0, v2", (u16(3, 0xFFFF),), f16(3, INF)),
    Row(CDNA, "v_cvt_i32_f32_e32 v0, v2", (f32(-1.9, 3e9, -3e9, NAN, INF),),
        i32(-1, 2**31 - 1, -(2**31), 0, 2**31 - 1)),
    Row(CDNA, "v_cvt_u32_f32_e32 v0, v2", (f32(1.9, -1, 5e9, NAN),), u32(1, 0, 2**32 - 1, 0)),
    Row(CDNA, "v_cvt_i32_f32_sdwa v0, v2 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:DWORD",
        (f32(-2),), u32(0xFE00)),
    Row(CDNA, "v_cvt_i16_f16_e32 v0, v2", (f16(-1.5, 4e4),), u32(0xFFFF, 0x7FFF)),
    Row(CDNA, "v_cvt_u16_f16_e32 v0, v2", (f16(1.5, -1, INF),), u32(1, 0, 0xFFFF)),
    Row(RDNA, "v_cvt_i32_i16_e32 v0, v2", (u32(0x7FFF8000),), i32(-32768)),
    Row(RDNA, "v_cvt_u32_u16_e32 v0, v2.h", (u32(0x80001234),), u32(0x8000)),
    Row(CDNA, "v_cvt_f32_ubyte0_e32 v0, v2", (u32(0x80402010),), f32(16)),
    Row(CDNA, "v_cvt_f32_ubyte1_e32 v0, v2", (u32(0x80402010),), f32(32)),
    Row(CDNA, "v_cvt_f32_ubyte2_e32 v0, v2", (u32(0x80402010),), f32(64)),
    Row(CDNA, "v_cvt_f32_ubyte3_e32 v0, v2", (u32(0x80402010),), f32(128)),
    Row(CDNA4, "v_cvt_f32_bf16_e32 v0, v2", (u32(0x3F80, 0xFF80),), f32(1, -INF)),
    Row(CDNA4, "v_cvt_pk_bf16_f32 v0, v2, v4",
        (f32(1 + 2.0**-8, 1 + 3 * 2.0**-8, -INF), f32(-2, 3.4e38, 2.0**-133)),
        u32(0xC0003F80, 0x7F803F82, 0x0001FF80)),
    Row(CDNA4, "v_cvt_pk_bf16_f32 v0, -v2, s4", (f32(1),), u32(0x4000BF80), {"s4": np.float32(2)}),
    Row(CDNA4, "v_cvt_pk_f16_f32 v0, v2, v4", (f32(1 + 2.0**-11), f32(65520)), u32(0x7C003C00)),
    Row(CDNA, "v_cvt_pkrtz_f16_f32 v0, v2, v4", (f32(1 + 2.0**-10 + 2.0**-11, 1e6), f32(-1e-8)),
        u32(0x80003C01, 0x80007BFF)),
    Row(RDNA, "v_cvt_pk_rtz_f16_f32_e32 v0, v2, v4", (f32(1), f32(2)), u32(0x40003C00)),
    # 0x38 is 1 in OCP's e4m3, and 0.5 in e4m3fnuz, whose bias is larger.
    Row(CDNA, "v_cvt_f32_fp8_e32 v0, v2", (u32(0x11111138, 0x80),), f32(0.5, NAN)),
    Row(CDNA, "v_cvt_f32_fp8_sdwa v0, v2 src0_sel:BYTE_2", (u32(0x40380000),), f32(0.5)),
    Row(CDNA4, "v_cvt_f32_fp8_e32 v0, v2", (u32(0x38, 0x7E, 0x7F, 0x80),), f32(1, 448, NAN, -0.0)),
    Row(CDNA, "v_cvt_f32_bf8_e32 v0, v2", (u32(0x3C, 0x80),), f32(0.5, NAN)),
    Row(CDNA4, "v_cvt_f32_bf8_e32 v0, v2", (u32(0x3C3C3C7C),), f32(INF)),
    Row(CDNA, "v_cvt_pk_f32_fp8_e32 v[0:1], v2", (u32(0x11114038),), pair(0.5, 1)),
    Row(CDNA, "v_cvt_pk_f32_fp8_sdwa v[0:1], v2 src0_sel:WORD_1", (u32(0xC0381111),),
        pair(0.5, -1)),
    Row(CDNA4, "v_cvt_pk_f32_fp8_sdwa v[0:1], v2 src0_sel:WORD_1", (u32(0xC0381111),),
        pair(1, -2)),
    Row(RDNA4, "v_cvt_pk_f32_fp8_e64 v[0:1], v2 op_sel:[1,0]", (u32(0xC0381111),), pair(1, -2)),
    Row(CDNA4, "v_cvt_pk_f32_bf8_e32 v[0:1], v2", (u32(0xFC3C),), pair(1, -INF)),
    Row(CDNA, "v_cvt_pk_fp8_f32 v0, v2, v4", (f32(0.5), f32(-1)), u32(0x7777C038),
        {"v0": 0x77777777}),
    Row(CDNA4, "v_cvt_pk_fp8_f32 v0, v2, v4 op_sel:[0,0,1]", (f32(1.0625), f32(NAN)),
        u32(0x7F387777), {"v0": 0x77777777}),
    Row(CDNA4, "v_cvt_pk_bf8_f32 v0, v2, v4", (f32(1.125), f32(-INF)), u32(0x7777FC3C),
        {"v0": 0x77777777}),
    Row(RDNA4, "v_cvt_pk_fp8_f32 v0.h, v2, v4", (f32(448), f32(-1e9)), u32(0xFF7E7777),
        {"v0": 0x77777777}),
    Row(RDNA4, "v_cvt_f32_fp8_e64 v0, v2 byte_sel:2", (u32(0x11C01111),), f32(-2)),
    Row(RDNA4, "v_cvt_f32_bf8_e64 v0, v2 byte_sel:3", (u32(0x3C111111),), f32(1)),
    Row(CDNA4, "v_cvt_scalef32_pk_fp8_f32 v0, v2, v4, v6", (f32(2, INF), f32(-4, 1), f32(4, 0.5)),
        u32(0x7777B830, 0x7777407F), {"v0": 0x77777777}),
    Row(CDNA4, "v_cvt_scalef32_pk_bf8_f32 v0, v2, v4, 2.0 op_sel:[0,0,0,1]", (f32(2), f32(NAN)),
        u32(0x7F3C7777), {"v0": 0x77777777}),
    Row(CDNA4, "v_cvt_scalef32_pk_fp8_f16 v0, v2, 1.0", (halves(f16, 1, -2),), u32(0xC038),
        {"v0": 0}),
    Row(CDNA4, "v_cvt_scalef32_pk_bf8_f16 v0, v2, 1.0", (halves(f16, 1, -2),), u32(0xC03C),
        {"v0": 0}),
    Row(CDNA4, "v_cvt_scalef32_pk_fp8_bf16 v0, v2, 1.0 op_sel:[0,0,1]", (u32(0xC0003F80),),
        u32(0xC0387777), {"v0": 0x77777777}),
    Row(CDNA4, "v_cvt_scalef32_pk_bf8_bf16 v0, v2, v4", (u32(0xC0003F80), f32(0.5)), u32(0xC440),
        {"v0": 0}),
    Row(CDNA, "v_cvt_f64_f32_e32 v[0:1], v2", (f32(1.5, -INF),),
        np.array([1.5, -INF]).view(np.uint64)),
    # Only the exponent of the scale counts.
    Row(CDNA4, "v_cvt_scalef32_pk_f32_fp8 v[0:1], v2, v4", (u32(0x4038), f32(4)), pair(4, 8)),
    Row(CDNA4, "v_cvt_scalef32_pk_f32_bf8 v[0:1], v2, v4 op_sel:[1,0,0]",
        (u32(0xC03C1111), f32(1.75)), pair(1, -2)),
    Row(CDNA4, "v_cvt_scalef32_pk_f16_fp8 v0, v2, 1.0", (u32(0xC038),), halves(f16, 1, -2)),
    Row(CDNA4, "v_cvt_scalef32_pk_f16_bf8 v0, v2, 2.0 op_sel:[1,0,0]", (u32(0x7C3C0000),),
        halves(f16, 2, INF)),
    Row(CDNA4, "v_cvt_scalef32_pk_bf16_fp8 v0, v2, 1.0 op_sel:[1,0,0]", (u32(0xC0380000),),
        u32(0xC0003F80)),
    Row(CDNA4, "v_cvt_scalef32_pk_bf16_bf8 v0, v2, v4", (u32(0x403C), u32(0x7F800000, 0)),
        u32(0x7FC07FC0, 0x00800040)),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.target}-{row.text}" for row in ROWS])
def test_result(row):
    check_row(row)


def test_every_opcode_has_a_row():
    tested = {parse_instruction(row.text).opcode for row in ROWS}
    of_fp8 = {*conversions.fp8_forms(has_fnuz=False), *conversions.ENCODING}
    assert tested == {*conversions.FORMS, *of_fp8}


@pytest.mark.parametrize(
    ("target", "name", "opcode", "codes"),
    [
        (CDNA, "MODE", "v_cvt_pk_fp8_f32", 0x80FF),
        (CDNA4, "MODE", "v_cvt_pk_fp8_f32", 0x7FFE),
        (CDNA4, "MODE", "v_cvt_scalef32_pk_fp8_f32", 0x7FFE),
        (RDNA4, "WAVE_MODE", "v_cvt_pk_bf8_f32", 0x7CFB),
    ],
)
def test_mode_saturates(target, name, opcode, codes):
    group = group_of(target, v2=f32(-1e6), v4=f32(INF), v6=f32(2.0**-120))
    scale = ", v6" if "scale" in opcode else ""
    instruction = f"{opcode} v0, v2, v4{scale}"
    execute(group, f"s_setreg_imm32_b32 hwreg(HW_REG_{name}, 23, 1), 1")
    # Parts of a group have its mode; groups of two modes do not join.
    part, other = group.only(group.ids == 0), group.only(group.ids == 1)
    assert part.joins(other)
    execute(part.joined(other), instruction)
    execute(part, f"s_setreg_imm32_b32 hwreg(HW_REG_{name}, 23, 1), 0")
    assert not part.joins(other)
    execute(part, instruction)
    execute(other, instruction)
    assert (other.v_u16[0, ..., 0] == codes).all()
    overflow = {"gfx942": 0x80, "gfx950": 0xFF, "gfx1201": 0xFC}[part.shared.target.name]
    assert (part.v_u16[0, ..., 0] == (codes & 0xFF00 | overflow)).all()


@pytest.mark.parametrize(
    ("target", "text", "word"),
    [
        (CDNA, "v_cvt_f16_f32_e32 v0, v2", 0xFBFF),
        (CDNA, "v_cvt_f16_f32_e32 v0, v4", 0x7C00),
        (CDNA4, "v_cvt_pk_f16_f32 v0, v2, v4", 0x7C00FBFF),
    ],
)
def test_mode_saturates_float16(target, text, word):
    group = group_of(target, v0=0, v2=f32(-1e6), v4=f32(INF))
    execute(group, "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1", text)
    assert (group.v_u32[0] == word).all()


def test_lanes_outside_of_exec_stay():
    group = group_of(CDNA, v0=9, v1=9, v2=0x4038, exec=0xF0)
    execute(group, "v_cvt_pk_f32_fp8_e32 v[0:1], v2")
    executes = (np.arange(64) >= 4) & (np.arange(64) < 8)
    check_register(group, "v1", np.where(executes, np.float32(1).view(np.uint32), np.uint32(9)))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("gfx90a", "v_cvt_pk_f32_fp8_e32 v[0:1], v2"),
        (RDNA, "v_cvt_f32_fp8_e64 v0, v2"),
        (RDNA4, "v_cvt_pk_f32_fp8_e64 v[0:1], v2 byte_sel:1"),
        (RDNA4, "v_cvt_f32_fp8_e64 v0, v2 op_sel:[1,0]"),
        (CDNA, "v_cvt_i32_f32_e64 v0, v2 clamp"),
    ],
)
def test_unknown_forms_are_rejected(target, text):
    with pytest.raises(UnknownInstruction, match="line 7"):
        decode(parse_instruction(text, 7), target_named(target))
