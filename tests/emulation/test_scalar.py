"""Instructions on scalar registers against values that follow from AMD's pseudo-code."""

import numpy as np
import pytest

from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.scalar_table import EXEC_TABLE, TABLE
from support.emulation import execute, group_of, put_register

ONES, TOP = 0xFFFFFFFF, 0x80000000
ONES64, TOP64 = (1 << 64) - 1, 1 << 63
NAN, INF = float("nan"), float("inf")


def wide(*values):
    """Values of two registers, one for each wave."""
    return np.array([value & ONES64 for value in values], np.uint64)


def floats(*values):
    return np.array(values, np.float32)


#: Instruction (names that mean the same with "|"), registers before for two waves, registers after.
#: SCC is 1 in the first wave and 0 in the second one before; where it is not given, it stays.
ROWS = [
    # Moves and selections
    ("s_mov_b32 s0, s1", {"s1": (5, ONES)}, {"s0": (5, ONES)}),
    ("s_mov_b32 s0, 0x80000001", {}, {"s0": TOP + 1}),
    ("s_mov_b32 s0, 1.0", {}, {"s0": 0x3F800000}),
    ("s_mov_b32 s0, -4", {}, {"s0": 0xFFFFFFFC}),
    ("s_mov_b64 s[0:1], s[2:3]", {"s2": wide(5, 3 << 40)}, {"s0": wide(5, 3 << 40)}),
    ("s_mov_b64 s[2:3], s[2:3]", {"s2": wide(5, 3 << 40)}, {}),
    ("s_mov_b64 s[0:1], -1", {}, {"s0": wide(-1, -1)}),
    ("s_mov_b64 s[0:1], 0x80000000", {}, {"s0": wide(TOP, TOP)}),
    ("s_mov_b64 s[0:1], 1.0", {}, {"s0": wide(0x3FF << 52)}),
    ("s_mov_b64 vcc, s[2:3]", {"s2": wide(1 << 33, 2)}, {"vcc": wide(1 << 33, 2)}),
    ("s_movk_i32 s0, 0x7f", {}, {"s0": 0x7F}),
    ("s_movk_i32 s0, 0x8000", {}, {"s0": 0xFFFF8000}),
    ("s_movk_i32 s0, -2", {}, {"s0": 0xFFFFFFFE}),
    ("s_cselect_b32 s0, s1, s2", {"s1": 1, "s2": 2}, {"s0": (1, 2)}),
    ("s_cselect_b32 s0, -1, 0", {}, {"s0": (ONES, 0)}),
    ("s_cselect_b64 s[0:1], s[2:3], 1", {"s2": wide(1 << 40)}, {"s0": wide(1 << 40, 1)}),
    ("s_cselect_b64 s[0:1], -1, 0", {}, {"s0": wide(-1, 0)}),
    # Bitwise
    ("s_and_b32 s0, s1, s2", {"s1": 12, "s2": (10, 3)}, {"s0": (8, 0), "scc": (1, 0)}),
    ("s_and_b32 s0, s1, 0xff", {"s1": (0x100, 0x1FF)}, {"s0": (0, 0xFF), "scc": (0, 1)}),
    ("s_or_b32 s0, s1, s2", {"s1": (12, 0), "s2": (10, 0)}, {"s0": (14, 0), "scc": (1, 0)}),
    ("s_xor_b32 s0, s1, s2", {"s1": 12, "s2": (10, 12)}, {"s0": (6, 0), "scc": (1, 0)}),
    ("s_nand_b32 s0, s1, s2", {"s1": ONES, "s2": (ONES, 1)}, {"s0": (0, ONES - 1), "scc": (0, 1)}),
    ("s_nor_b32 s0, s1, s2", {"s1": (ONES, 1), "s2": 2}, {"s0": (0, ONES - 3), "scc": (0, 1)}),
    ("s_xnor_b32 s0, s1, s2", {"s1": 5, "s2": (5, ONES - 5)}, {"s0": (ONES, 0), "scc": (1, 0)}),
    ("s_andn2_b32|s_and_not1_b32 s0, s1, s2", {"s1": 12, "s2": (10, 12)},
     {"s0": (4, 0), "scc": (1, 0)}),
    ("s_orn2_b32|s_or_not1_b32 s0, s1, s2", {"s1": (1, 0), "s2": ONES},
     {"s0": (1, 0), "scc": (1, 0)}),
    ("s_not_b32 s0, s1", {"s1": (ONES, 1)}, {"s0": (0, ONES - 1), "scc": (0, 1)}),
    ("s_and_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(12, 12 << 40), "s4": wide(3, 10 << 40)},
     {"s0": wide(0, 8 << 40), "scc": (0, 1)}),
    ("s_and_b64 s[0:1], s[2:3], -2", {"s2": wide(1, TOP64)}, {"s0": wide(0, TOP64), "scc": (0, 1)}),
    ("s_or_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(0, 1 << 40), "s4": wide(0, 1)},
     {"s0": wide(0, 1 << 40 | 1), "scc": (0, 1)}),
    ("s_xor_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(3 << 40), "s4": wide(1 << 40, 3 << 40)},
     {"s0": wide(2 << 40, 0), "scc": (1, 0)}),
    ("s_nand_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(-1), "s4": wide(-1, 1)},
     {"s0": wide(0, -2), "scc": (0, 1)}),
    ("s_nor_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(-1, 1), "s4": wide(2)},
     {"s0": wide(0, -4), "scc": (0, 1)}),
    ("s_xnor_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(5), "s4": wide(5, -6)},
     {"s0": wide(-1, 0), "scc": (1, 0)}),
    ("s_andn2_b64|s_and_not1_b64 s[0:1], s[2:3], s[4:5]",
     {"s2": wide(3 << 40), "s4": wide(1 << 40, -1)}, {"s0": wide(2 << 40, 0), "scc": (1, 0)}),
    ("s_orn2_b64|s_or_not1_b64 s[0:1], s[2:3], s[4:5]", {"s2": wide(1, 0), "s4": wide(-1)},
     {"s0": wide(1, 0), "scc": (1, 0)}),
    ("s_not_b64 s[0:1], s[2:3]", {"s2": wide(-1, 1)}, {"s0": wide(0, -2), "scc": (0, 1)}),
    # Integer arithmetic
    ("s_add_u32|s_add_co_u32 s0, s1, s2", {"s1": (ONES, ONES), "s2": (1, 0)},
     {"s0": (0, ONES), "scc": (1, 0)}),
    ("s_sub_u32|s_sub_co_u32 s0, s1, s2", {"s1": (1, 2), "s2": (2, 2)},
     {"s0": (ONES, 0), "scc": (1, 0)}),
    ("s_add_i32|s_add_co_i32 s0, s1, s2", {"s1": (TOP - 1, ONES), "s2": 1},
     {"s0": (TOP, 0), "scc": (1, 0)}),
    ("s_add_i32 s0, s0, s0", {"s0": (TOP, 3)}, {"s0": (0, 6), "scc": (1, 0)}),
    ("s_sub_i32|s_sub_co_i32 s0, s1, s2", {"s1": (TOP, 0), "s2": 1},
     {"s0": (TOP - 1, ONES), "scc": (1, 0)}),
    ("s_addk_i32|s_addk_co_i32 s0, 0x100", {"s0": (TOP - 1, 1)},
     {"s0": (TOP + 0xFF, 0x101), "scc": (1, 0)}),
    ("s_addk_i32 s0, 0xffff", {"s0": (TOP, 1)}, {"s0": (TOP - 1, 0), "scc": (1, 0)}),
    ("s_addc_u32|s_add_co_ci_u32 s0, s1, s2", {"s1": (ONES, ONES), "s2": (0, 0)},
     {"s0": (0, ONES), "scc": (1, 0)}),
    ("s_addc_u32 s0, s1, s2", {"s1": (ONES, ONES), "s2": (ONES, 1)},
     {"s0": (ONES, 0), "scc": (1, 1)}),
    ("s_addc_u32 s0, 0, 0", {}, {"s0": (1, 0), "scc": (0, 0)}),
    ("s_subb_u32|s_sub_co_ci_u32 s0, s1, s2", {"s1": 5, "s2": 5}, {"s0": (ONES, 0), "scc": (1, 0)}),
    ("s_subb_u32 s0, s1, s2", {"s1": (5, 4), "s2": (4, 5)}, {"s0": (0, ONES), "scc": (0, 1)}),
    ("s_subb_u32 s0, 0, -1", {}, {"s0": (0, 1), "scc": (1, 1)}),
    ("s_mul_i32 s0, s1, s2", {"s1": (ONES, 0x10001), "s2": (3, 0x10001)},
     {"s0": (0xFFFFFFFD, 0x20001)}),
    ("s_mulk_i32 s0, 0xfffe", {"s0": (3, ONES)}, {"s0": (0xFFFFFFFA, 2)}),
    ("s_mul_hi_u32 s0, s1, s2", {"s1": (ONES, 1 << 20), "s2": (ONES, 1 << 20)},
     {"s0": (ONES - 1, 1 << 8)}),
    ("s_mul_hi_i32 s0, s1, s2", {"s1": (ONES, TOP), "s2": (1, TOP)}, {"s0": (ONES, 1 << 30)}),
    ("s_add_nc_u64 s[0:1], s[2:3], s[4:5]", {"s2": wide(ONES, -1), "s4": wide(1, 2)},
     {"s0": wide(1 << 32, 1)}),
    ("s_add_nc_u64 s[0:1], s[2:3], -1", {"s2": wide(0, 1 << 32)}, {"s0": wide(-1, ONES)}),
    ("s_sub_nc_u64 s[0:1], s[2:3], s[4:5]", {"s2": wide(1 << 32, 1), "s4": wide(1, 2)},
     {"s0": wide(ONES, -1)}),
    ("s_mul_u64 s[0:1], s[2:3], s[4:5]", {"s2": wide(1 << 33, -3), "s4": wide(3, 5)},
     {"s0": wide(3 << 33, -15)}),
    ("s_min_i32 s0, s1, s2", {"s1": (ONES, 2), "s2": (1, 2)}, {"s0": (ONES, 2), "scc": (1, 0)}),
    ("s_min_u32 s0, s1, s2", {"s1": (ONES, 1), "s2": (1, 2)}, {"s0": (1, 1), "scc": (0, 1)}),
    ("s_max_i32 s0, s1, s2", {"s1": (ONES, 2), "s2": (1, 2)}, {"s0": (1, 2), "scc": (0, 1)}),
    ("s_max_u32 s0, s1, s2", {"s1": (ONES, 1), "s2": (1, 2)}, {"s0": (ONES, 2), "scc": (1, 0)}),
    ("s_abs_i32 s0, s1", {"s1": (ONES, 0)}, {"s0": (1, 0), "scc": (1, 0)}),
    ("s_abs_i32 s0, s1", {"s1": (TOP, 5)}, {"s0": (TOP, 5), "scc": (1, 1)}),
    ("s_lshl1_add_u32 s0, s1, s2", {"s1": (TOP, 3), "s2": 1}, {"s0": (1, 7), "scc": (1, 0)}),
    ("s_lshl2_add_u32 s0, s1, s2", {"s1": (TOP >> 1, 3), "s2": 1}, {"s0": (1, 13), "scc": (1, 0)}),
    ("s_lshl3_add_u32 s0, s1, s2", {"s1": (0x1FFFFFFF, 3), "s2": 8},
     {"s0": (0, 32), "scc": (1, 0)}),
    ("s_lshl4_add_u32 s0, s1, s2", {"s1": (0x10000000, 3), "s2": 1},
     {"s0": (1, 49), "scc": (1, 0)}),
    # Shifts and bit fields
    ("s_lshl_b32 s0, s1, s2", {"s1": (3, TOP), "s2": (36, 1)}, {"s0": (48, 0), "scc": (1, 0)}),
    ("s_lshl_b64 s[0:1], s[2:3], s4", {"s2": wide(3, TOP64), "s4": (36, 65)},
     {"s0": wide(3 << 36, 0), "scc": (1, 0)}),
    ("s_lshr_b32 s0, s1, s2", {"s1": (TOP, 1), "s2": (63, 1)}, {"s0": (1, 0), "scc": (1, 0)}),
    ("s_lshr_b64 s[0:1], s[2:3], s4", {"s2": wide(TOP64, 1), "s4": (63, 1)},
     {"s0": wide(1, 0), "scc": (1, 0)}),
    ("s_ashr_i32 s0, s1, s2", {"s1": (TOP, 1), "s2": (36, 1)},
     {"s0": (0xF8000000, 0), "scc": (1, 0)}),
    ("s_ashr_i64 s[0:1], s[2:3], 31", {"s2": wide(-(1 << 40), 1)},
     {"s0": wide(-(1 << 9), 0), "scc": (1, 0)}),
    ("s_bfe_u32 s0, s1, 0x50019", {"s1": (31 << 25, 1 << 24)}, {"s0": (31, 0), "scc": (1, 0)}),
    ("s_bfe_u32 s0, s1, s2", {"s1": ONES, "s2": (40 << 16 | 4, 0)},
     {"s0": (0x0FFFFFFF, 0), "scc": (1, 0)}),
    ("s_bfe_i32 s0, s1, 0x1001e", {"s1": (1 << 30, 1 << 29)},
     {"s0": (ONES, 0), "scc": (1, 0)}),
    ("s_bfe_i32 s0, s1, s2", {"s1": (0x7F0, 0xF0), "s2": (5 << 16 | 4, 4 << 16)},
     {"s0": (ONES, 0), "scc": (1, 0)}),
    ("s_bfe_u64 s[0:1], s[2:3], 0x200010", {"s2": wide(-1, ONES64 << 48)},
     {"s0": wide(ONES, 0), "scc": (1, 0)}),
    ("s_bfe_i64 s[0:1], s[2:3], 0x200000", {"s2": wide(TOP, 1 << 32)},
     {"s0": wide(-TOP, 0), "scc": (1, 0)}),
    ("s_bfm_b32 s0, s1, s2", {"s1": (3, 32), "s2": (33, 1)}, {"s0": (14, 0)}),
    ("s_bitset0_b32 s0, s1", {"s0": ONES, "s1": (31, 33)}, {"s0": (TOP - 1, ONES - 2)}),
    ("s_bitset1_b32 s0, s1", {"s0": 1, "s1": (31, 33)}, {"s0": (TOP + 1, 3)}),
    ("s_bitset0_b64 s[0:1], s2", {"s0": wide(-1), "s2": (63, 64)}, {"s0": wide(TOP64 - 1, -2)}),
    ("s_bitset1_b64 s[0:1], s2", {"s0": wide(2), "s2": (63, 64)}, {"s0": wide(TOP64 + 2, 3)}),
    ("s_bitcmp0_b32 s1, s2", {"s1": 4, "s2": (34, 1)}, {"scc": (0, 1)}),
    ("s_bitcmp1_b32 s1, s2", {"s1": 4, "s2": (1, 34)}, {"scc": (0, 1)}),
    ("s_bitcmp0_b64 s[2:3], s4", {"s2": wide(1 << 40), "s4": (40, 8)}, {"scc": (0, 1)}),
    ("s_bitcmp1_b64 s[2:3], s4", {"s2": wide(1 << 40), "s4": (8, 104)}, {"scc": (0, 1)}),
    # Bit counts, searches and rearrangements
    ("s_bcnt1_i32_b32 s0, s1", {"s1": (0, 0x70001)}, {"s0": (0, 4), "scc": (0, 1)}),
    ("s_bcnt1_i32_b64 s0, s[2:3]", {"s2": wide(0, 7 << 31)}, {"s0": (0, 3), "scc": (0, 1)}),
    ("s_ff1_i32_b32|s_ctz_i32_b32 s0, s1", {"s1": (0, 0x50)}, {"s0": (ONES, 4)}),
    ("s_ff1_i32_b64|s_ctz_i32_b64 s0, s[2:3]", {"s2": wide(0, 5 << 40)}, {"s0": (ONES, 40)}),
    ("s_flbit_i32_b32|s_clz_i32_u32 s0, s1", {"s1": (0, 0xFFFFFF)}, {"s0": (ONES, 8)}),
    ("s_flbit_i32_b64|s_clz_i32_u64 s0, s[2:3]", {"s2": wide(0, 5)}, {"s0": (ONES, 61)}),
    ("s_flbit_i32_b64 s0, s[2:3]", {"s2": wide(1 << 62, ONES)}, {"s0": (1, 32)}),
    ("s_flbit_i32|s_cls_i32 s0, s1", {"s1": (ONES, 0xF0000000)}, {"s0": (ONES, 4)}),
    ("s_flbit_i32 s0, s1", {"s1": (0, 0x0FFFFFFF)}, {"s0": (ONES, 4)}),
    ("s_brev_b32 s0, s1", {"s1": (1, 0xC0000001)}, {"s0": (TOP, 0x80000003)}),
    ("s_brev_b64 s[0:1], s[2:3]", {"s2": wide(1, 6)}, {"s0": wide(TOP64, 6 << 60)}),
    ("s_sext_i32_i8 s0, s1", {"s1": (0x180, 0x17F)}, {"s0": (0xFFFFFF80, 0x7F)}),
    ("s_sext_i32_i16 s0, s1", {"s1": (0x18000, 0x17FFF)}, {"s0": (0xFFFF8000, 0x7FFF)}),
    ("s_pack_ll_b32_b16 s0, s1, s2", {"s1": 0x11112222, "s2": 0x33334444}, {"s0": 0x44442222}),
    ("s_pack_lh_b32_b16 s0, s1, s2", {"s1": 0x11112222, "s2": 0x33334444}, {"s0": 0x33332222}),
    ("s_pack_hl_b32_b16 s0, s1, s2", {"s1": 0x11112222, "s2": 0x33334444}, {"s0": 0x44441111}),
    ("s_pack_hh_b32_b16 s0, s1, s2", {"s1": 0x11112222, "s2": 0x33334444}, {"s0": 0x33331111}),
    # Comparisons of integers
    ("s_cmp_eq_i32|s_cmp_eq_u32 s1, s2", {"s1": (1, 2), "s2": 2}, {"scc": (0, 1)}),
    ("s_cmp_lg_i32|s_cmp_lg_u32 s1, s2", {"s1": (1, 2), "s2": 2}, {"scc": (1, 0)}),
    ("s_cmp_gt_i32 s1, s2", {"s1": (1, 2), "s2": ONES}, {"scc": (1, 1)}),
    ("s_cmp_gt_i32 s1, s2", {"s1": (1, TOP), "s2": 1}, {"scc": (0, 0)}),
    ("s_cmp_gt_u32 s1, s2", {"s1": (1, TOP), "s2": 1}, {"scc": (0, 1)}),
    ("s_cmp_ge_i32 s1, s2", {"s1": (1, TOP), "s2": 1}, {"scc": (1, 0)}),
    ("s_cmp_ge_u32 s1, s2", {"s1": (0, TOP), "s2": 1}, {"scc": (0, 1)}),
    ("s_cmp_lt_i32 s1, s2", {"s1": (1, TOP), "s2": 1}, {"scc": (0, 1)}),
    ("s_cmp_lt_u32 s1, s2", {"s1": (0, TOP), "s2": 1}, {"scc": (1, 0)}),
    ("s_cmp_le_i32 s1, s2", {"s1": (1, 2), "s2": 1}, {"scc": (1, 0)}),
    ("s_cmp_le_u32 s1, s2", {"s1": (ONES, 1), "s2": 1}, {"scc": (0, 1)}),
    ("s_cmp_lt_u32 1, 2", {}, {"scc": (1, 1)}),
    ("s_cmpk_eq_i32 s1, 0xfffe", {"s1": (0xFFFE, ONES - 1)}, {"scc": (0, 1)}),
    ("s_cmpk_eq_u32 s1, 0xfffe", {"s1": (0xFFFE, ONES - 1)}, {"scc": (1, 0)}),
    ("s_cmpk_lg_i32 s1, 0xfffe", {"s1": (0xFFFE, ONES - 1)}, {"scc": (1, 0)}),
    ("s_cmpk_lg_u32 s1, 0xfffe", {"s1": (0xFFFE, ONES - 1)}, {"scc": (0, 1)}),
    ("s_cmpk_gt_i32 s1, 0xffff", {"s1": (0, ONES)}, {"scc": (1, 0)}),
    ("s_cmpk_gt_u32 s1, 0xffff", {"s1": (0, ONES)}, {"scc": (0, 1)}),
    ("s_cmpk_ge_i32 s1, 0xffff", {"s1": (ONES - 1, ONES)}, {"scc": (0, 1)}),
    ("s_cmpk_ge_u32 s1, 0xffff", {"s1": (0xFFFF, 0)}, {"scc": (1, 0)}),
    ("s_cmpk_lt_i32 s1, 0xffff", {"s1": (ONES - 1, 0)}, {"scc": (1, 0)}),
    ("s_cmpk_lt_u32 s1, 0xffff", {"s1": (ONES, 0)}, {"scc": (0, 1)}),
    ("s_cmpk_le_i32 s1, 0xffff", {"s1": (ONES, 0)}, {"scc": (1, 0)}),
    ("s_cmpk_le_u32 s1, 0xffff", {"s1": (ONES, 0xFFFF)}, {"scc": (0, 1)}),
    ("s_cmp_eq_u64 s[2:3], s[4:5]", {"s2": wide(1 << 40, 5), "s4": wide(0, 5)}, {"scc": (0, 1)}),
    ("s_cmp_lg_u64 s[2:3], 0", {"s2": wide(1 << 40, 0)}, {"scc": (1, 0)}),
    # Floating point
    ("s_add_f32 s0, s1, s2", {"s1": floats(1.5, INF), "s2": 2.0}, {"s0": floats(3.5, INF)}),
    ("s_sub_f32 s0, s1, 1.0", {"s1": floats(1.5, 0)}, {"s0": floats(0.5, -1)}),
    ("s_mul_f32 s0, s1, 0x4f800000", {"s1": floats(1, -2)}, {"s0": floats(2**32, -(2**33))}),
    ("s_min_f32|s_min_num_f32 s0, s1, s2", {"s1": floats(NAN, 0.0), "s2": floats(2, -0.0)},
     {"s0": floats(2, -0.0)}),
    ("s_max_f32|s_max_num_f32 s0, s1, s2", {"s1": floats(NAN, -0.0), "s2": floats(2, 0.0)},
     {"s0": floats(2, 0.0)}),
    ("s_fmac_f32 s0, s1, s2",
     {"s0": floats(-1, 1), "s1": floats(1 + 2**-12, 2), "s2": floats(1 - 2**-12, 3)},
     {"s0": floats(-(2.0**-24), 7)}),
    ("s_fmaak_f32 s0, s1, s2, 0x40000000", {"s1": 3.0, "s2": floats(5, 0.5)},
     {"s0": floats(17, 3.5)}),
    ("s_fmamk_f32 s0, s1, 0x40000000, s2", {"s1": 3.0, "s2": floats(5, 0.5)},
     {"s0": floats(11, 6.5)}),
    ("s_ceil_f32 s0, s1", {"s1": floats(1.25, -1.25)}, {"s0": floats(2, -1)}),
    ("s_floor_f32 s0, s1", {"s1": floats(1.25, -1.25)}, {"s0": floats(1, -2)}),
    ("s_trunc_f32 s0, s1", {"s1": floats(1.75, -1.75)}, {"s0": floats(1, -1)}),
    ("s_rndne_f32 s0, s1", {"s1": floats(2.5, 3.5)}, {"s0": floats(2, 4)}),
    ("s_cvt_f32_i32 s0, s1", {"s1": (ONES, 16777217)}, {"s0": floats(-1, 16777216)}),
    ("s_cvt_f32_u32 s0, s1", {"s1": (ONES, 16777219)}, {"s0": floats(2.0**32, 16777220)}),
    ("s_cvt_i32_f32 s0, s1", {"s1": floats(-1.75, 1e20)}, {"s0": (ONES, TOP - 1)}),
    ("s_cvt_u32_f32 s0, s1", {"s1": floats(-1.75, 1e20)}, {"s0": (0, ONES)}),
    ("s_cvt_i32_f32 s0, s1", {"s1": floats(NAN, 2.5)}, {"s0": (0, 2)}),
    ("v_s_exp_f32 s0, s1", {"s1": floats(3, -1)}, {"s0": floats(8, 0.5)}),
    ("v_s_log_f32 s0, s1", {"s1": floats(8, 0.5)}, {"s0": floats(3, -1)}),
    ("v_s_rcp_f32 s0, s1", {"s1": floats(4, 0.0)}, {"s0": floats(0.25, INF)}),
    ("v_s_rcp_f32 s0, -s1", {"s1": floats(4, -2)}, {"s0": floats(-0.25, 0.5)}),
    ("v_s_rsq_f32 s0, |s1|", {"s1": floats(-4, 0.25)}, {"s0": floats(0.5, 2)}),
    ("v_s_sqrt_f32 s0, s1", {"s1": floats(4, 0.25)}, {"s0": floats(2, 0.5)}),
]  # fmt: skip

#: Comparison -> for a less than, equal to and greater than b, and for a NaN.
FLOAT_COMPARISONS = {
    "lt": (1, 0, 0, 0), "eq": (0, 1, 0, 0), "le": (1, 1, 0, 0), "gt": (0, 0, 1, 0),
    "lg": (1, 0, 1, 0), "ge": (0, 1, 1, 0), "o": (1, 1, 1, 0), "u": (0, 0, 0, 1),
    "nge": (1, 0, 0, 1), "nlg": (0, 1, 0, 1), "ngt": (1, 1, 0, 1), "nle": (0, 0, 1, 1),
    "neq": (1, 0, 1, 1), "nlt": (0, 1, 1, 1),
}  # fmt: skip

#: Instructions with EXEC -> for each pair of bits of the source and EXEC: 00, 01, 10, 11.
EXEC_FUNCTIONS = {
    "and": 0b0001, "or": 0b0111, "xor": 0b0110, "nand": 0b1110, "nor": 0b1000, "xnor": 0b1001,
    "andn2": 0b0010, "and_not1": 0b0010, "orn2": 0b1011, "or_not1": 0b1011,
}  # fmt: skip


def each_name():
    """The rows as parameters, one for each name."""
    for text, before, after in ROWS:
        names, _, operands = text.partition(" ")
        for name in names.split("|"):
            yield pytest.param(f"{name} {operands}", before, after, id=f"{name} {operands}")


def as_bits(value):
    return np.array(value, np.uint32) if isinstance(value, tuple) else value


def two_waves(registers, target="gfx942"):
    scc = np.array([True, False])
    values = {name: as_bits(value) for name, value in registers.items()}
    return group_of(target, 2, **({"scc": scc} | values))


@pytest.mark.parametrize(("text", "before", "after"), list(each_name()))
def test_result_and_scc(text, before, after):
    group, expected = two_waves(before), two_waves(before)
    for name, value in after.items():
        put_register(expected, name, as_bits(value))
    execute(group, text)
    np.testing.assert_array_equal(group.s_u32, expected.s_u32)
    assert group.scc.shape == (2,)
    assert group.scc.tolist() == expected.scc.tolist()


@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_float_comparison(name):
    group = group_of("gfx1201", 4, s1=floats(1, 2, 3, NAN), s2=2.0)
    execute(group, f"s_cmp_{name}_f32 s1, s2")
    assert group.scc.tolist() == [bool(each) for each in FLOAT_COMPARISONS[name]]


@pytest.mark.parametrize("opcode", EXEC_TABLE)
def test_exec_functions(opcode):
    wide_exec = opcode.endswith("b64")
    group = group_of("gfx942" if wide_exec else "gfx1100", 2, exec=0b1010)
    put_register(group, "s2", wide(0b1100) if wide_exec else 0b1100)
    table = EXEC_FUNCTIONS[opcode.removeprefix("s_").partition("_saveexec")[0]]
    execute(group, f"{opcode} s[0:1], s[2:3]" if wide_exec else f"{opcode} s0, s2")
    bits = [table >> (3 - (2 * (0b1100 >> i & 1) + (0b1010 >> i & 1))) & 1 for i in range(4)]
    zeros = table >> 3 & 1
    expected = np.array([*bits, *[zeros] * (group.lanes - 4)], bool)
    np.testing.assert_array_equal(group.exec[0], expected)
    np.testing.assert_array_equal(group.lane_mask(126), group.exec)
    assert group.scc.all() == expected.any()
    assert group.lane_mask(0)[0].nonzero()[0].tolist() == [1, 3]


def test_exec_function_needs_the_width_of_a_wave():
    with pytest.raises(UnknownInstruction, match="EXEC has 32 bits"):
        execute(group_of("gfx1100"), "s_and_saveexec_b64 s[0:1], s[2:3]")


def test_scc_is_zero_if_no_lane_is_left():
    group = execute(group_of("gfx942", scc=1, s2=wide(0)), "s_and_saveexec_b64 s[0:1], s[2:3]")
    assert not group.scc.any()
    assert not group.exec.any()


def test_move_to_exec_changes_the_lanes():
    group = execute(group_of("gfx942", s2=wide(5, 1 << 63)), "s_mov_b64 exec, s[2:3]")
    assert [row.nonzero()[0].tolist() for row in group.exec] == [[0, 2], [63]]
    execute(group, "s_or_b64 exec, exec, s[2:3]", "s_mov_b64 exec, -1")
    assert group.full


def test_every_opcode_has_a_row():
    with_rows = {param.values[0].split()[0] for param in each_name()}
    with_rows |= {f"s_cmp_{name}_f32" for name in FLOAT_COMPARISONS}
    assert set(TABLE) == with_rows


def test_the_mode_of_rounding_is_to_nearest():
    group = group_of("gfx1201", v2=1.0)
    text = "s_setreg_imm32_b32 hwreg(HW_REG_WAVE_MODE, 2, 2), 0"
    execute(group, text, "v_cvt_f16_f32_e32 v0, v2")
    assert (group.v_u16[0, ..., 0] == 0x3C00).all()
    assert not group.saturates


@pytest.mark.parametrize(
    "text",
    [
        "s_getpc_b64 s[0:1]",
        "s_getreg_b32 s0, hwreg(HW_REG_MODE)",
        "s_setreg_b32 hwreg(HW_REG_MODE, 23, 1), s0",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 2, 2), 3",
        "s_memtime s[0:1]",
        "s_add_u32 s0, s1",
        "s_add_u32 s0, s1, v2",
        "s_add_u32 s0, s1, s2 clamp",
        "s_movk_i32 s0, 0x12345",
        "s_movk_i32 s0, s1",
        "s_add_nc_u64 s[0:1], s2, s[4:5]",
        "s_mov_b64 s0, s[2:3]",
        "s_mov_b64 s[0:1], s[3:4]",
        "s_no_such_thing s0",
    ],
)
def test_unknown_form(text):
    with pytest.raises(UnknownInstruction):
        execute(group_of("gfx942"), text)
