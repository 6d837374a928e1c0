"""Vector instructions with lane masks: results by AMD's published pseudo-code, by hand."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.instructions import vector_masks
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.registers import VCC
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
    u16,
    u32,
    u64,
)

NAN, INF = math.nan, math.inf
M = 0xFFFFFFFF
TOP = 0x80000000
CDNA, RDNA, RDNA4 = "gfx942", "gfx1100", "gfx1201"
LARGE = 3.4028234663852886e38
A = u32(1, M, 0x7FFFFFFF)
ROWS = [
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


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.target}-{row.text}" for row in ROWS])
def test_result(row):
    check_row(row)


def test_every_opcode_has_a_row():
    tested = {parse_instruction(row.text).opcode for row in ROWS}
    assert {*vector_masks.FORMS, *vector_masks.CLASSES} == tested


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


def test_masks_have_0_outside_of_exec():
    group = group_of(CDNA, v2=u32(1), exec=0xF0, vcc=2**64 - 1)
    execute(group, "v_cmp_eq_u32_e32 vcc, 1, v2")
    check_register(group, "vcc", (np.arange(64) >= 4) & (np.arange(64) < 8))
    group = group_of(RDNA, v2=u32(M), exec=0xF0, vcc=M)
    execute(group, "v_add_co_u32 v0, vcc_lo, v2, v2")
    check_register(group, "vcc", (np.arange(32) >= 4) & (np.arange(32) < 8))


def test_dual_issued_selection_reads_vcc_without_its_name():
    text = "v_dual_cndmask_b32 v0, v2, v4 :: v_dual_mov_b32 v1, v3"
    assert VCC in decode(parse_instruction(text), target_named(RDNA)).reads
