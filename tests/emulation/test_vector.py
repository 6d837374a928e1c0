"""Vector instructions: results by AMD's published pseudo-code, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.instructions import vector
from support.emulation import (
    Row,
    check_row,
    execute,
    f16,
    f32,
    group_of,
    i16,
    i32,
    i64,
    register,
    u16,
    u32,
    u64,
)

NAN, INF = math.nan, math.inf
M = 0xFFFFFFFF
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
    Row(CDNA, "v_frexp_exp_i32_f64_e32 v0, v[2:3]",
        (np.array([1.5, -(2.0**-140), 0, INF]).view(np.uint64),), i32(1, -139, 0, 0)),
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


ROWS = [*INTEGERS, *BITS, *SMALL_INTEGERS, *FLOATS, *_same_for_kinds()]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.target}-{row.text}" for row in ROWS])
def test_result(row):
    check_row(row)


def test_every_opcode_has_a_row():
    tested = {parse_instruction(row.text).opcode for row in ROWS}
    assert {*vector.FORMS, *vector.SPECIAL} - tested == {"v_nop"}


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
