"""Matrix instructions as they are written: registers, constants, modifiers, EXEC.

`test_matrix.py` has the layouts; here every instruction that Triton may emit for our kernels is
executed once.
"""

import numpy as np
import pytest

from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from support.emulation import execute, group_of

#: Target -> the instructions of one block that Triton emits for `tl.dot`.
OPCODES = {
    "gfx90a": """
        v_mfma_f32_16x16x16bf16_1k v_mfma_f32_16x16x16f16 v_mfma_f32_16x16x4f32
        v_mfma_f32_32x32x2f32 v_mfma_f32_32x32x8bf16_1k v_mfma_f32_32x32x8f16
        v_mfma_i32_16x16x16i8 v_mfma_i32_32x32x8i8
    """,
    "gfx942": """
        v_mfma_f32_16x16x16_bf16 v_mfma_f32_16x16x16_f16 v_mfma_f32_16x16x32_fp8_fp8
        v_mfma_f32_16x16x32_bf8_fp8 v_mfma_f32_16x16x4_f32 v_mfma_f32_16x16x8_xf32
        v_mfma_f32_32x32x16_fp8_fp8 v_mfma_f32_32x32x16_fp8_bf8 v_mfma_f32_32x32x2_f32
        v_mfma_f32_32x32x4_xf32 v_mfma_f32_32x32x8_bf16 v_mfma_f32_32x32x8_f16
        v_mfma_i32_16x16x32_i8 v_mfma_i32_32x32x16_i8
    """,
    "gfx950": """
        v_mfma_f32_16x16x128_f8f6f4 v_mfma_f32_16x16x16_bf16 v_mfma_f32_16x16x16_f16
        v_mfma_f32_16x16x32_bf16 v_mfma_f32_16x16x32_f16 v_mfma_f32_16x16x4_f32
        v_mfma_f32_32x32x16_bf16 v_mfma_f32_32x32x16_f16 v_mfma_f32_32x32x2_f32
        v_mfma_f32_32x32x64_f8f6f4 v_mfma_i32_16x16x64_i8 v_mfma_i32_32x32x32_i8
    """,
    "gfx1100": """
        v_wmma_f32_16x16x16_bf16 v_wmma_f32_16x16x16_f16 v_wmma_i32_16x16x16_iu8
    """,
    "gfx1201": """
        v_wmma_f32_16x16x16_bf16 v_wmma_f32_16x16x16_f16 v_wmma_i32_16x16x16_iu8
        v_wmma_f32_16x16x16_fp8_fp8 v_wmma_f32_16x16x16_bf8_fp8
    """,
}
#: Type -> a register full of ones, and the bits of an element.
ONES = {
    "f32": (0x3F800000, 32), "xf32": (0x3F800000, 32), "f16": (0x3C003C00, 16),
    "bf16": (0x3F803F80, 16), "i8": (0x01010101, 8), "iu8": (0x01010101, 8),
    "fp8": (0x38383838, 8), "bf8": (0x3C3C3C3C, 8), "f8f6f4": (0x38383838, 8),
    "fp8 fnuz": (0x40404040, 8), "bf8 fnuz": (0x40404040, 8),
}  # fmt: skip


def each_opcode():
    return [(target, name) for target, names in OPCODES.items() for name in names.split()]


def types_of(target, opcode):
    """Types of A and B."""
    last = opcode.removesuffix("_1k").split("_")[-1]
    if last in ("fp8", "bf8"):
        types = opcode.split("_")[-2:]
        return [f"{each} fnuz" for each in types] if target == "gfx942" else types
    return [next(name for name in sorted(ONES, key=len, reverse=True) if last.endswith(name))] * 2


def sizes_of(target, opcode):
    """k, registers of A and of D."""
    m, n, k = (int(each.split("b")[0].split("f")[0].split("i")[0])
               for each in opcode.split("_")[3].split("x"))  # fmt: skip
    lanes = 64 if target.startswith("gfx9") else 32
    copies = 2 if target == "gfx1100" else 1
    bits = ONES[types_of(target, opcode)[0]][1]
    return k, copies * m * k * bits // (32 * lanes), m * n // lanes


def span(file, first, count):
    return f"{file}{first}" if count == 1 else f"{file}[{first}:{first + count - 1}]"


@pytest.mark.parametrize(("target", "opcode"), each_opcode())
def test_product_of_ones(target, opcode):
    k, inputs, outputs = sizes_of(target, opcode)
    group = group_of(target, vgprs=64)
    for first, kind in zip((32, 48), types_of(target, opcode), strict=True):
        group.v_u32[first : first + inputs] = ONES[kind][0]
    accumulator = np.int32 if "_i32_" in opcode else np.float32
    group.v_u32[:outputs] = accumulator(5).view(np.uint32)
    d, a, b = span("v", 0, outputs), span("v", 32, inputs), span("v", 48, inputs)
    modifiers = " neg_lo:[1,1,0]" if opcode.endswith("iu8") else ""
    execute(group, f"{opcode} {d}, {a}, {b}, {d}{modifiers}")
    assert (group.v_u32[:outputs].view(accumulator) == k + 5).all()
    assert (group.v_u32[outputs:32] == 0xFFFFFFFF).all()


def rows_of(target, m, outputs):
    """The row of D that each register has in each lane: (registers, lanes)."""
    register = np.arange(outputs)[:, None]
    lane = np.arange(64 if target.startswith("gfx9") else 32)
    if target == "gfx1100":
        return 2 * register + lane // 16
    if target == "gfx1201":
        return register + 8 * (lane // 16)
    return register // 4 * (4 * 64 // m) + 4 * (lane // m) + register % 4


@pytest.mark.parametrize(
    ("target", "opcode"),
    [
        ("gfx90a", "v_mfma_f32_32x32x8f16"), ("gfx942", "v_mfma_f32_16x16x16_f16"),
        ("gfx950", "v_mfma_f32_32x32x16_f16"), ("gfx1100", "v_wmma_f32_16x16x16_f16"),
        ("gfx1201", "v_wmma_f32_16x16x16_f16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operand", ["A", "B"])
def test_rows_are_of_a_and_columns_of_b(target, opcode, operand):
    k, inputs, outputs = sizes_of(target, opcode)
    m = 32 if "32x32" in opcode else 16
    group = group_of(target, vgprs=64)
    number = (np.arange(group.lanes) % m).astype(np.float16).view(np.uint16).astype(np.uint32)
    both = number | number << np.uint32(16)
    group.v_u32[32 : 32 + inputs] = both if operand == "A" else ONES["f16"][0]
    group.v_u32[48 : 48 + inputs] = both if operand == "B" else ONES["f16"][0]
    execute(group, f"{opcode} v[0:{outputs - 1}], {span('v', 32, inputs)}, "
                   f"{span('v', 48, inputs)}, 0")  # fmt: skip
    columns = np.broadcast_to(np.arange(group.lanes) % m, (outputs, group.lanes))
    expected = k * (rows_of(target, m, outputs) if operand == "A" else columns)
    for wave in range(2):
        np.testing.assert_array_equal(group.v_f32[:outputs, wave], expected)


@pytest.mark.parametrize("files", ["vvvv", "avav", "aava", "vaaa"])
def test_accumulation_registers(files):
    """The letters are the files of D, A, B and C."""
    group = group_of("gfx942")
    d, a, b, c = (
        span(file, *place)
        for file, place in zip(files, ((0, 4), (8, 2), (12, 2), (16, 4)), strict=True)
    )
    for file, first, count, value in (
        (files[1], 8, 2, 0x40004000), (files[2], 12, 2, 0x3C003C00), (files[3], 16, 4, 0x3F800000),
    ):  # fmt: skip
        getattr(group, f"{file}_u32")[first : first + count] = value
    execute(group, f"v_mfma_f32_16x16x16_f16 {d}, {a}, {b}, {c}")
    assert (getattr(group, f"{files[0]}_f32")[:4] == 33).all()


@pytest.mark.parametrize(
    ("target", "opcode", "constant", "expected"),
    [
        ("gfx942", "v_mfma_f32_16x16x16_f16", "0", 16.0),
        ("gfx942", "v_mfma_f32_16x16x16_f16", "-2.0", 14.0),
        ("gfx942", "v_mfma_i32_16x16x32_i8", "5", 37),
        ("gfx942", "v_mfma_i32_16x16x32_i8", "-1", 31),
        ("gfx1201", "v_wmma_f32_16x16x16_f16", "1.0", 17.0),
    ],
)
def test_constant_accumulators(target, opcode, constant, expected):
    _, inputs, outputs = sizes_of(target, opcode)
    group = group_of(target)
    group.v_u32[8:32] = ONES[types_of(target, opcode)[0]][0]
    a = span("v", 8, inputs)
    execute(group, f"{opcode} v[0:{outputs - 1}], {a}, {a}, {constant}")
    kind = np.float32 if isinstance(expected, float) else np.int32
    assert (group.v_u32[:outputs].view(kind) == expected).all()


def test_mfma_ignores_exec():
    group = group_of("gfx942", exec=1)
    group.v_u32[8:12] = ONES["f16"][0]
    execute(group, "v_mfma_f32_16x16x16_f16 v[0:3], v[8:9], v[10:11], 0")
    assert (group.v_f32[:4] == 16).all()


def test_wmma_needs_all_lanes():
    group = group_of("gfx1100", exec=1)
    with pytest.raises(KernelFault, match="all lanes"):
        execute(group, "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[8:15], 0")


@pytest.mark.parametrize(
    ("modifiers", "a", "b"), [("", 3, 5), (" cbsz:1", 1.75, 5), (" blgp:1", 3, 2.5)]
)
def test_formats_of_8_bits_by_modifier(modifiers, a, b):
    """0x44 is 3 as e4m3 and 4 as e5m2; 0x3f is 1.875 as e4m3 and 1.75 as e5m2."""
    codes = {3: 0x44, 1.75: 0x3F, 5: 0x4A, 2.5: 0x41}
    group = group_of("gfx950")
    group.v_u32[8:16] = codes[a] * 0x01010101
    group.v_u32[16:24] = codes[b] * 0x01010101
    execute(group, f"v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[8:15], v[16:23], 0{modifiers}")
    assert (group.v_f32[:4] == 128 * a * b).all()


@pytest.mark.parametrize(
    ("modifiers", "a", "b"),
    [("", 255, 254), (" neg_lo:[1,0,0]", -1, 254), (" neg_lo:[0,1,0]", 255, -2)],
)
def test_signs_of_integers(modifiers, a, b):
    group = group_of("gfx1201")
    group.v_u32[8:10], group.v_u32[10:12] = 0xFFFFFFFF, 0xFEFEFEFE
    execute(group, f"v_wmma_i32_16x16x16_iu8 v[0:7], v[8:9], v[10:11], 0{modifiers}")
    assert (group.v_i32[:8] == 16 * a * b).all()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:3], v[8:9], v[9:10], 0"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[1:4], v[8:9], v[10:11], 0"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:7], v[8:9], v[10:11], 0"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:3], v[8:11], v[12:15], 0"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:3], v[8:9], v[10:11], -v[4:7]"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:3], v[8:9], v[10:11], 0 clamp"),
        ("gfx942", "v_mfma_f32_16x16x16_f16 v[0:3], v[8:9], v[10:11], 0 blgp:1"),
        ("gfx942", "v_mfma_f64_16x16x4_f64 v[0:7], v[8:9], v[10:11], 0"),
        ("gfx942", "v_smfmac_f32_16x16x32_f16 v[0:3], v[8:9], v[10:13], v14"),
        ("gfx950", "v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[8:13], v[16:21], 0 cbsz:2 blgp:2"),
        ("gfx1100", "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], 0 op_sel:[0,0,1]"),
        ("gfx1100", "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], 0 neg_lo:[1,0,0]"),
        ("gfx1100", "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], 0 neg_hi:[0,0,1]"),
        ("gfx1100", "v_wmma_i32_16x16x16_iu8 v[0:7], v[8:11], v[12:15], 0 clamp"),
        ("gfx1201", "v_wmma_f16_16x16x16_f16 v[0:3], v[8:11], v[12:15], 0"),
        # Two and sixteen blocks, whose number these names do not have.
        ("gfx90a", "v_mfma_f32_32x32x4f16 v[0:31], v[32:33], v[34:35], 0"),
        ("gfx90a", "v_mfma_f32_4x4x4f16 v[0:3], v[32:33], v[34:35], 0"),
        ("gfx1201", "v_swmmac_f32_16x16x32_f16 v[0:7], v[8:11], v[12:19], v20"),
    ],
)  # fmt: skip
def test_unknown_form(target, text):
    with pytest.raises(UnknownInstruction):
        execute(group_of(target), text)
