"""Vector instructions: results by AMD's published pseudo-code, worked out by hand."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest

from attn_dispatch.emulation import vector, vector_masks
from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.decode import decode
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.operands import parse_operand
from attn_dispatch.emulation.targets import target_named
from support.emulation import (
    Row,
    check_register,
    check_row,
    execute,
    f16,
    f32,
    group_of,
    i16,
    i32,
    i64,
    mask,
    register,
    u16,
    u32,
    u64,
)

NAN, INF = math.nan, math.inf
M = 0xFFFFFFFF
VCC_IDS = parse_operand("vcc").require_registers().ids
TOP = 0x80000000
CDNA, RDNA, RDNA4 = "gfx942", "gfx1100", "gfx1201"


INTEGERS = [
    Row(CDNA, "v_mov_b32_e32 v0, v2", (u32(1, M),), u32(1, M)),
    Row(CDNA, "v_mov_b32_e32 v0, 1.0", (), f32(1)),
    Row(CDNA, "v_mov_b32_e32 v0, -16", (), i32(-16)),
    Row(CDNA, "v_mov_b32_e32 v0, s5", (), u32(7), {"s5": 7}),
    Row(CDNA, "v_mov_b64_e32 v[0:1], v[2:3]", (u64(1 << 40 | 3),), u64(1 << 40 | 3)),
    Row(CDNA, "v_mov_b64_e32 v[0:1], -1", (), u64(2**64 - 1)),
    Row(RDNA, "v_mov_b16_e32 v0.h, v2.l", (u32(0xAAAA5555),), u32(0x55551111), {"v0": 0x11111111}),
    Row(CDNA, "v_accvgpr_write_b32 a0, v2", (u32(3, 4),), {"a0": u32(3, 4)}),
    Row(CDNA, "v_accvgpr_read_b32 v0, a1", (), u32(5), {"a1": 5}),
    Row(CDNA, "v_accvgpr_mov_b32 a2, a1", (), {"a2": u32(5)}, {"a1": 5}),
    Row(CDNA, "v_add_u32_e32 v0, v2, v4", (u32(1, M), u32(2, 1)), u32(3, 0)),
    Row(RDNA, "v_add_nc_u32_e32 v0, v2, v4", (u32(1, M), u32(2, 1)), u32(3, 0)),
    Row(RDNA, "v_add_nc_u32_e64 v0, v2, v4 clamp", (u32(1, M), u32(2, 1)), u32(3, M)),
    Row(CDNA, "v_sub_u32_e32 v0, v2, v4", (u32(3, 0), u32(1, 1)), u32(2, M)),
    Row(CDNA, "v_sub_u32_e64 v0, v2, 2 clamp", (u32(3, 1, TOP),), u32(1, 0, TOP - 2)),
    Row(RDNA, "v_sub_nc_u32_e64 v0, v2, 2 clamp", (u32(3, 1),), u32(1, 0)),
    Row(CDNA, "v_subrev_u32_e32 v0, v2, v4", (u32(1, 3), u32(3, 1)), u32(2, M - 1)),
    Row(RDNA, "v_subrev_nc_u32_e32 v0, s5, v4", ((0), u32(3, 1)), u32(2, 0), {"s5": 1}),
    Row(CDNA, "v_add_i32 v0, v2, v4", (i32(-1, 2**31 - 1), i32(-1, 1)), i32(-2, -(2**31))),
    Row(
        RDNA,
        "v_add_nc_i32 v0, v2, v4 clamp",
        (i32(-(2**31), 2**31 - 1), i32(-1, 1)),
        i32(-(2**31), 2**31 - 1),
    ),
    Row(CDNA, "v_sub_i32 v0, v2, v4 clamp", (i32(-(2**31), 5), i32(1, 7)), i32(-(2**31), -2)),
    Row(RDNA, "v_sub_nc_i32 v0, v2, v4", (i32(-(2**31), 5), i32(1, 7)), i32(2**31 - 1, -2)),
    Row(CDNA, "v_add3_u32 v0, v2, v4, v6", (u32(M), u32(2), u32(3)), u32(4)),
    Row(CDNA, "v_mul_lo_u32 v0, v2, v4", (u32(0x10001), u32(0x10001)), u32(0x20001)),
    Row(CDNA, "v_mul_lo_i32 v0, v2, v4", (i32(-3), i32(5)), i32(-15)),
    Row(CDNA, "v_mul_hi_u32 v0, v2, v4", (u32(M, 3), u32(M, 5)), u32(M - 1, 0)),
    Row(CDNA, "v_mul_hi_i32 v0, v2, v4", (i32(-1, 2**30), i32(3, 16)), i32(-1, 4)),
    Row(CDNA, "v_mul_u32_u24_e32 v0, v2, v4", (u32(0xFF000003), u32(5)), u32(15)),
    Row(CDNA, "v_mul_i32_i24_e32 v0, v2, v4", (u32(0xFFFFFF, 3), u32(7, 0x1000005)), i32(-7, 15)),
    Row(CDNA, "v_mad_u32_u24 v0, v2, 3, v6", (u32(0xFF000002), 0, u32(9)), u32(15)),
    Row(CDNA, "v_mad_i32_i24 v0, v2, v4, v6", (u32(0xFFFFFF), u32(2), u32(1)), i32(-1)),
    Row(CDNA, "v_min_u32_e32 v0, v2, v4", (u32(1, M), u32(2, 1)), u32(1, 1)),
    Row(CDNA, "v_max_u32_e32 v0, v2, v4", (u32(1, M), u32(2, 1)), u32(2, M)),
    Row(CDNA, "v_min_i32_e32 v0, v2, v4", (i32(1, -1), i32(2, 1)), i32(1, -1)),
    Row(CDNA, "v_max_i32_e32 v0, v2, v4", (i32(1, -1), i32(2, 1)), i32(2, 1)),
    Row(CDNA, "v_sad_u32 v0, v2, v4, v6", (u32(3, 8), u32(5, 1), u32(10)), u32(12, 17)),
]
BITS = [
    Row(CDNA, "v_and_b32_e32 v0, v2, v4", (u32(12), u32(10)), u32(8)),
    Row(CDNA, "v_or_b32_e32 v0, v2, v4", (u32(12), u32(10)), u32(14)),
    Row(CDNA, "v_xor_b32_e32 v0, v2, v4", (u32(12), u32(10)), u32(6)),
    Row(CDNA, "v_xnor_b32_e32 v0, v2, v4", (u32(12), u32(10)), u32(M - 6)),
    Row(CDNA, "v_not_b32_e32 v0, v2", (u32(12),), u32(M - 12)),
    Row(RDNA, "v_and_b16 v0.l, v2.h, v4.l", (u32(12 << 16), u32(10)), u16(8)),
    Row(RDNA, "v_or_b16 v0.l, v2.l, v4.l", (u32(12), u32(10)), u16(14)),
    Row(RDNA, "v_xor_b16 v0.l, v2.l, v4.l", (u32(12), u32(10)), u16(6)),
    Row(RDNA, "v_not_b16_e32 v0.l, v2.l", (u32(12),), u16(0xFFF3)),
    Row(CDNA, "v_and_or_b32 v0, v2, v4, v6", (u32(12), u32(10), u32(1)), u32(9)),
    Row(CDNA, "v_or3_b32 v0, v2, v4, v6", (u32(1), u32(2), u32(4)), u32(7)),
    Row(RDNA, "v_xor3_b32 v0, v2, v4, v6", (u32(1), u32(3), u32(4)), u32(6)),
    Row(CDNA, "v_xad_u32 v0, v2, v4, v6", (u32(5), u32(3), u32(10)), u32(16)),
    Row(CDNA, "v_lshl_add_u32 v0, v2, v4, v6", (u32(3), u32(33), u32(1)), u32(7)),
    Row(CDNA, "v_add_lshl_u32 v0, v2, v4, v6", (u32(3), u32(1), u32(2)), u32(16)),
    Row(CDNA, "v_lshl_or_b32 v0, v2, v4, v6", (u32(3), u32(4), u32(1)), u32(49)),
    Row(
        CDNA, "v_lshl_add_u64 v[0:1], v[2:3], 3, v[6:7]",
        (u64(1 << 31), 0, u64(5)), u64((1 << 34) + 5),
    ),
    Row(CDNA, "v_lshlrev_b32_e32 v0, v2, v4", (u32(4, 33), u32(3)), u32(48, 6)),
    Row(CDNA, "v_lshrrev_b32_e32 v0, v2, v4", (u32(4, 33), u32(TOP)), u32(TOP >> 4, TOP >> 1)),
    Row(CDNA, "v_ashrrev_i32_e32 v0, v2, v4", (u32(4, 31), i32(-256)), i32(-16, -1)),
    Row(CDNA, "v_lshlrev_b64 v[0:1], v2, v[4:5]", (u32(33, 64), u64(1)), u64(1 << 33, 1)),
    Row(CDNA, "v_lshrrev_b64 v[0:1], 36, v[4:5]", (0, u64(1 << 40)), u64(16)),
    Row(CDNA, "v_ashrrev_i64 v[0:1], v2, v[4:5]", (u32(4, 63), i64(-(2**40))), i64(-(2**36), -1)),
    Row(CDNA, "v_lshlrev_b16_e32 v0, 8, v4", (0, u32(0x1234)), u32(0x3400)),
    Row(RDNA, "v_lshlrev_b16 v0.h, 8, v4.h", (0, u32(0x12345678)), u32(0x34000001), {"v0": 1}),
    Row(CDNA, "v_lshrrev_b16_e32 v0, v2, v4", (u32(4, 17), u32(0xFFFF8000)), u32(0x800, 0x4000)),
    Row(CDNA, "v_ashrrev_i16_e32 v0, 8, v4", (0, u32(0x8123)), u32(0xFF81)),
    Row(RDNA, "v_ashrrev_i16 v0.h, 4, v4.l", (0, u32(0x8000)), u32(0xF8000001), {"v0": 1}),
    Row(CDNA, "v_bfe_u32 v0, v2, 8, 4", (u32(0xABCDE),), u32(0xC)),
    Row(CDNA, "v_bfe_u32 v0, v2, v4, v6", (u32(0xABCDE), u32(36), u32(32, 8)), u32(0, 0xCD)),
    Row(CDNA, "v_bfe_i32 v0, v2, 8, 4", (u32(0xABCDE, 0xAB3DE),), i32(-4, 3)),
    Row(CDNA, "v_bfi_b32 v0, v2, v4, v6", (u32(0xFF00), u32(0x1234), u32(0x5678)), u32(0x1278)),
    Row(CDNA, "v_bfm_b32 v0, v2, v4", (u32(4, 32), u32(8)), u32(0xF00, 0)),
    Row(CDNA, "v_bfrev_b32_e32 v0, v2", (u32(1, 6),), u32(TOP, 0x60000000)),
    Row(CDNA, "v_bfrev_b32_e32 v0, 1", (), u32(TOP)),
    Row(CDNA, "v_bcnt_u32_b32 v0, v2, v4", (u32(0xF0F), u32(2)), u32(10)),
    Row(CDNA, "v_ffbh_u32_e32 v0, v2", (u32(1, TOP, 0),), u32(31, 0, M)),
    Row(RDNA, "v_clz_i32_u32_e32 v0, v2", (u32(0xFF, 0),), u32(24, M)),
    Row(CDNA, "v_ffbh_i32_e32 v0, v2", (i32(1, -1, 0, -2),), u32(31, M, M, 31)),
    Row(RDNA, "v_cls_i32_e32 v0, v2", (i32(-256),), u32(24)),
    Row(CDNA, "v_ffbl_b32_e32 v0, v2", (u32(8, 0),), u32(3, M)),
    Row(RDNA, "v_ctz_i32_b32_e32 v0, v2", (u32(TOP),), u32(31)),
    Row(CDNA, "v_alignbit_b32 v0, v2, v4, v6", (u32(0x12), u32(0x34567890), u32(8)),
        u32(0x12345678)),
    Row(CDNA, "v_alignbyte_b32 v0, v2, v4, 1", (u32(0x12), u32(0x34567890)), u32(0x12345678)),
    Row(
        CDNA, "v_perm_b32 v0, v2, v4, v6",
        (u32(0x77665544), u32(0x33221180), u32(0x07040300, 0x0C0D0908)),
        u32(0x77443380, 0x00FF0000),
    ),
    Row(CDNA, "v_pack_b32_f16 v0, v2, v4", (u32(0xAAAA1111), u32(0xBBBB2222)), u32(0x22221111)),
    Row(
        CDNA, "v_pack_b32_f16 v0, v2, -v4 op_sel:[1,0,0]",
        (u32(0xAAAA1111), u32(0x3C00)), u32(0xBC00AAAA),
    ),
    Row(
        "gfx950", "v_bitop3_b32 v0, v2, v4, v6 bitop3:0x6c",
        (u32(0b11110000), u32(0b11001100), u32(0b10101010)), u32(0x6C),
    ),
    Row("gfx950", "v_bitop3_b32 v0, v2, 0, v6 bitop3:0xf6", (u32(12), 0, u32(10)), u32(14)),
    Row(
        "gfx950", "v_bitop3_b16 v0, v2, v4, v6 bitop3:0xc8",
        (u32(0b11110000), u32(0b11001100), u32(0b10101010)), u32(0xFFFF00C8),
    ),
    Row(
        CDNA, "v_mbcnt_lo_u32_b32 v0, s5, 3", (), u32(*[3 + min(i, 2) for i in range(64)]),
        {"s5": 3},
    ),
    Row(
        CDNA, "v_mbcnt_hi_u32_b32 v0, s5, v2", (u32(1),),
        u32(*[1 + (i > 32) + (i > 63) for i in range(64)]), {"s5": 0x80000001},
    ),
    Row(CDNA, "v_swap_b32 v0, v2", (u32(1, 2),), {"v0": u32(1, 2), "v2": u32(9)}, {"v0": 9}),
    Row(
        RDNA, "v_swap_b16 v0.h, v2.l", (u32(0x12345678),),
        {"v0": u32(0x56780000), "v2": u32(0x12349999)}, {"v0": 0x99990000},
    ),
]  # fmt: skip
SMALL_INTEGERS = [
    Row(CDNA, "v_add_u16_e32 v0, v2, v4", (u32(0xAAAAFFFF), u32(2)), u32(1)),
    Row(CDNA, "v_add_u16_e64 v0, v2, v4 clamp", (u32(0xFFFF), u32(2)), u32(0xFFFF)),
    Row(CDNA, "v_sub_u16_e32 v0, v2, v4", (u32(1), u32(2)), u32(0xFFFF)),
    Row(CDNA, "v_subrev_u16_e32 v0, v2, v4", (u32(1), u32(3)), u32(2)),
    Row(RDNA, "v_add_nc_u16 v0, v2, v4", (u32(0xFFFF), u32(2)), u32(0x70001), {"v0": 0x70000}),
    Row(RDNA, "v_sub_nc_u16 v0, v2, v4 op_sel:[1,0,1]", (u32(5 << 16), u32(2)), u32(3 << 16 | 7),
        {"v0": 7}),
    Row(CDNA, "v_add_i16 v0, v2, v4 clamp", (i16(32767), i16(1)), u32(0x77FFF), {"v0": 0x70000}),
    Row(RDNA, "v_add_nc_i16 v0, v2, v4", (i16(-1), i16(3)), i16(2)),
    Row(CDNA, "v_sub_i16 v0, v2, v4 clamp", (i16(-32768), i16(1)), i16(-32768)),
    Row(RDNA, "v_sub_nc_i16 v0, v2, v4", (i16(1), i16(3)), i16(-2)),
    Row(CDNA, "v_mul_lo_u16_e32 v0, v2, v4", (u32(0x101), u32(0x101)), u32(0x201)),
    Row(CDNA, "v_mad_u16 v0, v2, v4, v6", (u32(3), u32(5), u32(2)), u32(0x70011), {"v0": 0x70000}),
    Row(CDNA, "v_mad_i16 v0, v2, v4, v6", (i16(-3), i16(5), i16(2)), i16(-13)),
    Row(CDNA, "v_min_u16_e32 v0, v2, v4", (u16(1, 0xFFFF), u16(2, 1)), u32(1, 1)),
    Row(CDNA, "v_max_u16_e32 v0, v2, v4", (u16(1, 0xFFFF), u16(2, 1)), u32(2, 0xFFFF)),
    Row(CDNA, "v_min_i16_e32 v0, v2, v4", (i16(1, -1), i16(2, 1)), u32(1, 0xFFFF)),
    Row(CDNA, "v_max_i16_e32 v0, v2, v4", (i16(1, -1), i16(2, 1)), u32(2, 1)),
]  # fmt: skip

#: A denormal number, and the largest number.
SMALL, LARGE = 2.0**-140, 3.4028234663852886e38
FLOATS = [
    Row(CDNA, "v_add_f32_e32 v0, v2, v4", (f32(1, SMALL, INF), f32(2, SMALL, -INF)),
        f32(3, 2 * SMALL, NAN)),
    Row(CDNA, "v_add_f32_e64 v0, -v2, |v4|", (f32(1, 2), f32(-2, -0.0)), f32(1, -2)),
    Row(CDNA, "v_add_f32_e64 v0, v2, v4 clamp", (f32(1, -5, NAN, 0.25), f32(2, 1, 1, 0.25)),
        f32(1, 0, 0, 0.5)),
    Row(CDNA, "v_sub_f32_e32 v0, v2, v4", (f32(1, 0.0), f32(3, 0.0)), f32(-2, 0.0)),
    Row(CDNA, "v_subrev_f32_e32 v0, v2, v4", (f32(1), f32(3)), f32(2)),
    Row(CDNA, "v_mul_f32_e32 v0, v2, v4", (f32(3, -0.0, LARGE), f32(0.5, 2, 2)),
        f32(1.5, -0.0, INF)),
    Row(CDNA, "v_mul_legacy_f32 v0, v2, v4", (f32(0, 3), f32(NAN, -2)), f32(0, -6)),
    Row(RDNA, "v_mul_dx9_zero_f32_e32 v0, v2, v4", (f32(INF, 3), f32(0, -2)), f32(0, -6)),
    Row(CDNA, "v_fma_f32 v0, v2, v4, -v6", (f32(1 + 2.0**-12), f32(1 + 2.0**-12),
        f32(1 + 2.0**-11)), f32(2.0**-24)),
    Row(CDNA, "v_fmac_f32_e32 v0, v2, v4", (f32(3), f32(2)), f32(7), {"v0": f32(1)}),
    Row(RDNA, "v_dual_fmac_f32 v0, v2, v4 :: v_dual_mov_b32 v1, 2", (f32(3), f32(2)),
        {"v0": f32(7), "v1": u32(2)}, {"v0": f32(1)}),
    Row(RDNA, "v_fmamk_f32 v0, v2, 0x40000000, v6", (f32(3), 0, f32(1)), f32(7)),
    Row(RDNA, "v_fmaak_f32 v0, v2, v4, 0x40000000", (f32(3), f32(5)), f32(17)),
    Row("gfx90a", "v_mac_f32_e32 v0, v2, v4", (f32(3, SMALL), f32(2, 1)), f32(7, 0),
        {"v0": f32(1, SMALL)}),
    Row("gfx90a", "v_mad_f32 v0, v2, v4, v6", (f32(1 + 2.0**-12), f32(1 + 2.0**-12),
        f32(-1 - 2.0**-11)), f32(0)),
    Row("gfx90a", "v_madmk_f32 v0, v2, 0x40000000, v6", (f32(3), 0, f32(1)), f32(7)),
    Row("gfx90a", "v_madak_f32 v0, v2, v4, 0x40000000", (f32(3), f32(5)), f32(17)),
    Row(CDNA, "v_exp_f32_e32 v0, v2", (f32(3, -INF, -140, NAN),), f32(8, 0, 0, NAN)),
    Row(CDNA, "v_log_f32_e32 v0, v2", (f32(8, 0, SMALL, -1),), f32(3, -INF, -INF, NAN)),
    Row(CDNA, "v_rcp_f32_e32 v0, v2", (f32(4, -0.0, INF, SMALL),), f32(0.25, -INF, 0, INF)),
    Row(CDNA, "v_rcp_iflag_f32_e32 v0, v2", (f32(4),), f32(0.25)),
    Row(CDNA, "v_rsq_f32_e32 v0, v2", (f32(4, 0),), f32(0.5, INF)),
    Row(CDNA, "v_sqrt_f32_e32 v0, v2", (f32(4, -0.0, -1),), f32(2, -0.0, NAN)),
    Row(CDNA, "v_sin_f32_e32 v0, v2", (f32(0.25, 0),), f32(1, 0)),
    Row(CDNA, "v_cos_f32_e32 v0, v2", (f32(0.5, 0),), f32(-1, 1)),
    Row(CDNA, "v_fract_f32_e32 v0, v2", (f32(1.25, -0.25, -SMALL),), f32(0.25, 0.75, 1 - 2.0**-24)),
    Row(CDNA, "v_ldexp_f32 v0, v2, v4", (f32(3, 1, 1), i32(2, -149, 200)), f32(12, 2.0**-149, INF)),
    Row(CDNA, "v_div_fixup_f32 v0, v2, v4, v6",
        (f32(2, 9, 9, 9), f32(1.5, 0, INF, INF), f32(-3, 1, -1, INF)), f32(-2, INF, -0.0, NAN)),
    Row(CDNA, "v_add_f16_e32 v0, v2, v4", (f16(1, 65504), f16(2.0**-24, 65504)), f16(1, INF)),
    Row(CDNA, "v_add_f16_e64 v0, v2, v4 clamp", (f16(1), f16(2)), u32(0x3C00)),
    Row(CDNA, "v_sub_f16_e32 v0, v2, v4", (f16(1), f16(3)), f16(-2)),
    Row(CDNA, "v_subrev_f16_e32 v0, v2, v4", (f16(1), f16(3)), f16(2)),
    Row(RDNA, "v_mul_f16_e32 v0.h, 0x4000, v4.l", (0, f16(3)), u32(0x46000007), {"v0": 7}),
    Row(CDNA, "v_fma_f16 v0, v2, v4, v6", (f16(1 + 2.0**-6), f16(1 - 2.0**-6), f16(-1)),
        f16(-(2.0**-12))),
    Row(RDNA, "v_fmac_f16_e32 v0, v2, v4", (f16(3), f16(2)), u32(0x7 << 16 | 0x4700),
        {"v0": 0x7 << 16 | 0x3C00}),
    Row(RDNA, "v_fmamk_f16 v0, v2, 0x4000, v6", (f16(3), 0, f16(1)), f16(7)),
    Row(RDNA, "v_fmaak_f16 v0, v2, v4, 0x4000", (f16(3), f16(5)), f16(17)),
    Row(CDNA, "v_exp_f16_e32 v0, v2", (f16(3, -24),), f16(8, 2.0**-24)),
    Row(CDNA, "v_log_f16_e32 v0, v2", (f16(8, 0),), f16(3, -INF)),
    Row(CDNA, "v_rcp_f16_e32 v0, v2", (f16(4, 0),), f16(0.25, INF)),
    Row(CDNA, "v_rsq_f16_e32 v0, v2", (f16(4),), f16(0.5)),
    Row(CDNA, "v_sqrt_f16_e32 v0, v2", (f16(4),), f16(2)),
    Row(CDNA, "v_ldexp_f16_e32 v0, v2, v4", (f16(3, 1), i16(2, 16)), f16(12, INF)),
]  # fmt: skip

ONE = [1.5, -1.5, 2.5, -0.0, INF, NAN]
UNARY = {
    "floor": [1, -2, 2, -0.0, INF, NAN],
    "ceil": [2, -1, 3, -0.0, INF, NAN],
    "trunc": [1, -1, 2, -0.0, INF, NAN],
    "rndne": [2, -2, 2, -0.0, INF, NAN],
    "frexp_mant": [0.75, -0.75, 0.625, -0.0, INF, NAN],
}
#: Columns of three sources: increasing, decreasing, with NaN, and zeros.
THREE = [[1, 4, NAN, -0.0], [2, 3, 1, 0.0], [3, 2, 2, -0.0]]
OF_THREE = {
    "max": [2, 4, 1, 0.0],
    "min": [1, 3, 1, -0.0],
    "maximum": [2, 4, NAN, 0.0],
    "minimum": [1, 3, NAN, -0.0],
    "max3": [3, 4, 2, 0.0],
    "min3": [1, 2, 1, -0.0],
    "maxmin": [2, 2, 1, -0.0],
    "minmax": [3, 3, 2, -0.0],
    "med3": [2, 3, 1, 0.0],
    "maximum3": [3, 4, NAN, 0.0],
    "minimum3": [1, 2, NAN, -0.0],
    "maximumminimum": [2, 2, NAN, -0.0],
    "minimummaximum": [3, 3, NAN, -0.0],
}
OF_NUMBERS = {f"{name}_num": OF_THREE[name] for name in OF_THREE if "imum" not in name}
BINARY = ("max", "min", "max_num", "min_num", "maximum", "minimum")
#: The same, of integers.
INTEGER_THREE = [[1, 4, 5], [2, 3, 1], [3, 2, 4]]
OF_INTEGERS = {
    "max3": [3, 4, 5],
    "min3": [1, 2, 1],
    "maxmin": [2, 2, 4],
    "minmax": [3, 3, 4],
    "med3": [2, 3, 4],
}


def _same_for_kinds():
    for kind, dtype, exponent in (("f32", f32, i32), ("f16", f16, i16)):
        for name, expected in UNARY.items():
            text = f"v_{name}_{kind}_e32 v0, v2"
            yield Row(CDNA, text, (dtype(*ONE),), dtype(*expected))
        text = f"v_frexp_exp_{exponent.__name__}_{kind}_e32 v0, v2"
        yield Row(CDNA, text, (dtype(*ONE),), exponent(1, 1, 2, 0, 0, 0))
        sources = tuple(dtype(*each) for each in THREE)
        for name, expected in (OF_THREE | OF_NUMBERS).items():
            has_three = name not in BINARY
            text = f"v_{name}_{kind} v0, v2, v4{', v6' if has_three else ''}"
            target = RDNA4 if "num" in name or "imum" in name else RDNA
            yield Row(target, text, sources, dtype(*expected))
    for kind, dtype in (("i32", i32), ("u32", u32), ("i16", i16), ("u16", u16)):
        shift = -3 if kind[0] == "i" else 0  # negative numbers, too
        sources = tuple(dtype(*(value + shift for value in each)) for each in INTEGER_THREE)
        for name, expected in OF_INTEGERS.items():
            result = dtype(*(value + shift for value in expected))
            yield Row(RDNA, f"v_{name}_{kind} v0, v2, v4, v6", sources, result)


A = u32(1, M, 0x7FFFFFFF)
MASKS = [
    Row(CDNA, "v_cndmask_b32_e32 v0, v2, v4, vcc", (u32(1), u32(2)), u32(1, 2),
        {"vcc": 0xAAAAAAAAAAAAAAAA}),
    Row(RDNA, "v_cndmask_b32_e64 v0, 0, 1.0, s5", (), f32(1, 0), {"s5": 0x55555555}),
    Row(CDNA, "v_cndmask_b32_e64 v0, -v2, |v4|, s[6:7]", (f32(1), f32(-2)), f32(-1, 2),
        {"s6": np.uint64(0xAAAAAAAAAAAAAAAA)}),
    Row(RDNA, "v_dual_cndmask_b32 v0, v2, v4 :: v_dual_add_f32 v1, v2, v4", (f32(1), f32(2)),
        {"v0": f32(2, 1), "v1": f32(3)}, {"vcc": 0x55555555}),
    Row(RDNA, "v_cndmask_b16 v0.h, v2.l, v4.h, vcc_lo", (u32(1), u32(2 << 16)),
        u32(2 << 16 | 7, 1 << 16 | 7), {"vcc": 0x55555555, "v0": 7}),
    Row(CDNA, "v_add_co_u32_e32 v0, vcc, v2, v4", (A, u32(1)),
        {"v0": u32(2, 0, TOP), "vcc": mask(0, 1, 0)}),
    Row(CDNA, "v_add_co_u32_e64 v0, s[4:5], v2, v4", (A, u32(1)),
        {"v0": u32(2, 0, TOP), "s4": mask(0, 1, 0)}),
    Row(RDNA, "v_add_co_u32 v0, null, v2, v4", (A, u32(1)), u32(2, 0, TOP)),
    Row(CDNA, "v_sub_co_u32_e32 v0, vcc, v2, v4", (A, u32(2)),
        {"v0": u32(M, M - 2, 0x7FFFFFFD), "vcc": mask(1, 0, 0)}),
    Row(CDNA, "v_subrev_co_u32_e32 v0, vcc, v2, v4", (u32(2), A),
        {"v0": u32(M, M - 2, 0x7FFFFFFD), "vcc": mask(1, 0, 0)}),
    Row(CDNA, "v_addc_co_u32_e32 v0, vcc, v2, v4, vcc", (u32(M, M), u32(0, M)),
        {"v0": u32(0, M), "vcc": mask(1)}, {"vcc": 2**64 - 1}),
    Row(CDNA, "v_addc_co_u32_e64 v0, s[4:5], 0, v4, s[6:7]", (0, u32(M, 5)),
        {"v0": u32(0, 5), "s4": mask(1, 0)}, {"s6": np.uint64(0x5555555555555555)}),
    Row(CDNA, "v_subb_co_u32_e32 v0, vcc, v2, v4, vcc", (u32(1, 0), u32(0, 0)),
        {"v0": u32(0, M), "vcc": mask(0, 1)}, {"vcc": 2**64 - 1}),
    Row(CDNA, "v_subbrev_co_u32_e64 v0, s[4:5], v2, v4, s[6:7]", (u32(0), u32(1, 0)),
        {"v0": u32(0, M), "s4": mask(0, 1)}, {"s6": np.uint64(2**64 - 1)}),
    Row(RDNA, "v_add_co_ci_u32_e32 v0, vcc_lo, v2, v4, vcc_lo", (u32(M, M), u32(0, M)),
        {"v0": u32(0, M), "vcc": mask(1)}, {"vcc": M}),
    Row(RDNA, "v_sub_co_ci_u32_e64 v0, null, v2, v4, s5", (u32(1, 0), u32(0, 0)), u32(0, M),
        {"s5": M}),
    Row(RDNA, "v_subrev_co_ci_u32_e64 v0, s4, v2, v4, s5", (u32(0), u32(1, 0)),
        {"v0": u32(0, M), "s4": mask(0, 1)}, {"s5": M}),
    Row(CDNA, "v_mad_u64_u32 v[0:1], s[4:5], v2, v4, v[6:7]",
        (u32(M), u32(M), u64(1, 2**64 - 1)),
        {"v0": u64((2**32 - 1) ** 2 + 1, (2**32 - 1) ** 2 - 1), "s4": mask(0, 1)}),
    Row(RDNA, "v_mad_i64_i32 v[0:1], null, v2, v4, 0", (i32(-3), i32(2**30)), i64(-3 * 2**30)),
    Row(CDNA, "v_mad_i64_i32 v[0:1], s[4:5], v2, v4, v[6:7]",
        (i32(-1, 1, 1), i32(1), i64(-(2**63), 2**63 - 1, -5)),
        {"v0": i64(2**63 - 1, -(2**63), -4), "s4": mask(1, 0, 1)}),
    Row(RDNA4, "v_mad_co_u64_u32 v[0:1], null, v2, v4, v[6:7]", (u32(3), u32(5), u64(1)), u64(16)),
    Row(RDNA4, "v_mad_co_i64_i32 v[0:1], null, v2, v4, v[6:7]", (i32(-3), i32(5), i64(1)),
        i64(-14)),
    Row(CDNA, "v_div_scale_f32 v0, vcc, v2, v4, v6",
        (f32(2, LARGE), f32(2, 1), f32(3, LARGE)), {"v0": f32(2, LARGE), "vcc": mask(0, 1)}),
    Row(CDNA, "v_div_scale_f32 v0, s[4:5], v2, v4, v6",
        (f32(1, 0), f32(1, 0), f32(LARGE, 1)), {"v0": f32(2.0**64, NAN), "s4": mask(1, 0)}),
    Row(CDNA, "v_div_fmas_f32 v0, v2, v4, v6", (f32(3), f32(2), f32(1)), f32(7, 7 * 2.0**-64),
        {"vcc": 0xAAAAAAAAAAAAAAAA}),
    # signaling and quiet NaN, -inf, -1, -denormal, -0, 0, denormal, 1, inf
    *(
        Row(CDNA, f"v_cmp_class_f32_e64 s[4:5], v2, 0x{1 << bit:x}",
            (u32(0x7F800001, 0x7FC00000, 0xFF800000, 0xBF800000, TOP + 1, TOP, 0, 1, 0x3F800000,
                 0x7F800000),),
            {"s4": mask(*(bit == i for i in range(10)))})
        for bit in range(10)
    ),
    Row(CDNA, "v_cmp_class_f16_e32 vcc, v2, v4", (u32(0x7C01, 0xBC00, 1, 0x7C00), u32(0x81)),
        {"vcc": mask(1, 0, 1, 0)}),
    Row(RDNA, "v_cmpx_class_f32_e64 v2, 0x204", (f32(INF, -INF, 1, NAN),),
        {"exec": mask(1, 1, 0, 0)}),
    Row(RDNA, "v_cmpx_class_f16_e64 v2, 3", (f16(NAN, 1),), {"exec": mask(1, 0)}),
]  # fmt: skip

ROWS = [*INTEGERS, *BITS, *SMALL_INTEGERS, *FLOATS, *_same_for_kinds(), *MASKS]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.target}-{row.text}" for row in ROWS])
def test_result(row):
    check_row(row)


#: Python's comparisons; one with NaN is false.
COMPARE = {
    "lt": operator.lt,
    "eq": operator.eq,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "ne": operator.ne,
    "lg": lambda a, b: a < b or a > b,
    "o": lambda a, b: not (math.isnan(a) or math.isnan(b)),
    "u": lambda a, b: math.isnan(a) or math.isnan(b),
    "nge": lambda a, b: not a >= b,
    "nlg": lambda a, b: not (a < b or a > b),
    "ngt": lambda a, b: not a > b,
    "nle": lambda a, b: not a <= b,
    "neq": lambda a, b: a != b,
    "nlt": lambda a, b: not a < b,
}
MAKE = {"f32": f32, "f16": f16, "i16": i16, "u16": u16, "i32": i32, "u32": u32, "i64": i64,
        "u64": u64}  # fmt: skip


@pytest.mark.parametrize("opcode", sorted(vector_masks.COMPARISONS))
def test_comparison(opcode):
    *_, name, kind = opcode.split("_")
    if kind[0] == "f":
        values = [1.0, 2.0, -0.0, 0.0, INF, -INF, NAN]
    else:
        top = 1 << (int(kind[1:]) - 1)
        values = [0, 1, top - 1, *([-1, -top] if kind[0] == "i" else [top, 2 * top - 1])]
    pairs = [(a, b) for a in values for b in values]
    left, right = zip(*pairs, strict=True)
    expected = [bool(COMPARE[name](a, b)) for a, b in pairs]
    for start in range(0, len(pairs), 32):
        part = slice(start, start + 32)
        sources = (MAKE[kind](*left[part]), MAKE[kind](*right[part]))
        texts = ("v[2:3], v[4:5]" if kind[1:] == "64" else "v2, v4",)
        if opcode.startswith("v_cmpx"):
            check_row(
                Row(RDNA, f"{opcode}_e64 {texts[0]}", sources, {"exec": mask(*expected[part])})
            )
        else:
            result = {"vcc": mask(*expected[part])}
            check_row(Row(RDNA, f"{opcode}_e32 vcc_lo, {texts[0]}", sources, result))


def test_cmpx_of_cdna_writes_a_mask_too():
    group = group_of(CDNA, v2=u32(*range(64)), exec=0xFF)
    execute(group, "v_cmpx_gt_u32_e32 vcc, 4, v2")
    expected = np.arange(64) < 4
    check_register(group, "vcc", expected)
    check_register(group, "exec", expected)


def test_every_opcode_has_a_row():
    tested = {parse_instruction(row.text).opcode for row in ROWS}
    known = [vector.FORMS, vector_masks.CLASSES, vector_masks.SELECTIONS, vector_masks.CARRIES]
    known += [vector_masks.OTHERS, vector.SPECIAL]
    assert {opcode for table in known for opcode in table} - tested == {"v_nop"}


def test_dual_issued_selection_reads_vcc_without_its_name():
    text = "v_dual_cndmask_b32 v0, v2, v4 :: v_dual_mov_b32 v1, v3"
    assert set(VCC_IDS) <= decode(parse_instruction(text), target_named(RDNA)).reads


@pytest.mark.parametrize("selector", [0x05040100, 0x03020706, 0x00010203, 0x07060302, 0x0C0D0B08])
def test_permute_with_one_selector_for_all_lanes(selector):
    bytes_of = bytes.fromhex("80112233445566f7")  # of v4 (0 to 3) and v2 (4 to 7)
    low, high = np.frombuffer(bytes_of, np.uint32)
    constants = {8: 0x00, 11: 0xFF, 12: 0x00, 13: 0xFF}
    expected = [
        constants[byte] if byte > 7 else bytes_of[byte] for byte in selector.to_bytes(4, "little")
    ]
    result = u32(int.from_bytes(expected, "little"))
    for text in (f"v_perm_b32 v0, v2, v4, {selector:#x}", "v_perm_b32 v0, v2, v4, s5"):
        check_row(Row(CDNA, text, (u32(high), u32(low)), result, {"s5": selector}))
    varies = u32(selector, 0x03020100)
    row = Row(CDNA, "v_perm_b32 v0, v2, v4, v6", (u32(high), u32(low), varies),
              u32(result[0], low))  # fmt: skip
    check_row(row)


def test_permute_with_a_selector_for_each_wave():
    group = group_of(CDNA, v2=0x77665544, v4=0x33221100, s5=u32(0x03020100, 0x07060504))
    execute(group, "v_perm_b32 v0, v2, v4, s5")
    assert register(group, "v0")[:, 0].tolist() == [0x33221100, 0x77665544]


def test_nop_changes_nothing():
    group = group_of(CDNA, v0=3)
    before = group.v_u32.copy()
    execute(group, "v_nop")
    np.testing.assert_array_equal(group.v_u32, before)


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


def test_masks_have_0_outside_of_exec():
    group = group_of(CDNA, v2=u32(1), exec=0xF0, vcc=2**64 - 1)
    execute(group, "v_cmp_eq_u32_e32 vcc, 1, v2")
    check_register(group, "vcc", (np.arange(64) >= 4) & (np.arange(64) < 8))
    group = group_of(RDNA, v2=u32(M), exec=0xF0, vcc=M)
    execute(group, "v_add_co_u32 v0, vcc_lo, v2, v2")
    check_register(group, "vcc", (np.arange(32) >= 4) & (np.arange(32) < 8))


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
        Row(CDNA, "v_or_b32_sdwa v0, v2, v4 dst_sel:BYTE_0 dst_unused:UNUSED_SEXT "
            "src0_sel:BYTE_2 src1_sel:BYTE_1", (u32(0x810000), u32(0x0400)), u32(0xFFFFFF85)),
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
    [("", 99), (" bound_ctrl:1", 0), (" fi:1", None), (" bound_ctrl:1 fi:1", None)],
)
def test_dpp_source_outside_of_exec(suffix, of_inactive):
    lanes = np.arange(32)
    group = group_of(RDNA, v0=99, v2=lanes.astype(np.uint32), exec=0xFFFF00FF)
    execute(group, f"v_mov_b32_dpp v0, v2 row_xmask:8 {ALL}{suffix}")
    partner = lanes ^ 8
    expected = np.where(lanes < 16, partner if of_inactive is None else of_inactive, partner)
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
        Row(RDNA, "v_mov_b32_dpp v0, v2 dpp8:[1,0,2,3,4,5,6,7]", (u32(*range(8)),),
            u32(1, 0, *range(2, 8))),
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
        (RDNA, "v_cmpx_eq_u32_e64 s4, v2, v4"),
        (RDNA, "v_add_co_ci_u32_e64 v0, null, v1, v2"),
        (RDNA, "v_no_such_thing v0, v1"),
    ],
)
def test_unknown_forms_are_rejected(target, text):
    with pytest.raises(UnknownInstruction, match="line 7"):
        decode(parse_instruction(text, 7), target_named(target))
