"""Matrix instructions, against matrices whose elements are put in registers one by one."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.arithmetic import fp8
from attn_dispatch.emulation.arithmetic.matrix import multiply, shape_of
from attn_dispatch.emulation.arithmetic.numerics import from_bfloat16
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from attn_dispatch.emulation.targets import target_named
from support.matrix_layouts import (
    cdna_accumulator,
    cdna_operand,
    gather,
    rdna3_operand,
    rdna4_operand,
    rdna_accumulator,
    scatter,
)

WAVES = 3
#: target, opcode, size, k, formats of A and B.
CDNA = [
    ("gfx90a", "v_mfma_f32_32x32x8f16", 32, 8, "f16", "f16"),
    ("gfx90a", "v_mfma_f32_16x16x16f16", 16, 16, "f16", "f16"),
    ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 32, 8, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 16, 16, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_32x32x4bf16", 32, 4, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_16x16x8bf16", 16, 8, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_32x32x2f32", 32, 2, "f32", "f32"),
    ("gfx90a", "v_mfma_f32_16x16x4f32", 16, 4, "f32", "f32"),
    ("gfx90a", "v_mfma_i32_32x32x8i8", 32, 8, "i8", "i8"),
    ("gfx90a", "v_mfma_i32_16x16x16i8", 16, 16, "i8", "i8"),
    ("gfx942", "v_mfma_f32_32x32x8_f16", 32, 8, "f16", "f16"),
    ("gfx942", "v_mfma_f32_16x16x16_f16", 16, 16, "f16", "f16"),
    ("gfx942", "v_mfma_f32_32x32x8_bf16", 32, 8, "bf16", "bf16"),
    ("gfx942", "v_mfma_f32_16x16x16_bf16", 16, 16, "bf16", "bf16"),
    ("gfx942", "v_mfma_f32_32x32x2_f32", 32, 2, "f32", "f32"),
    ("gfx942", "v_mfma_f32_16x16x4_f32", 16, 4, "f32", "f32"),
    ("gfx942", "v_mfma_f32_32x32x4_xf32", 32, 4, "xf32", "xf32"),
    ("gfx942", "v_mfma_f32_16x16x8_xf32", 16, 8, "xf32", "xf32"),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8", 16, 32, "e4m3fnuz", "e4m3fnuz"),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_bf8", 16, 32, "e4m3fnuz", "e5m2fnuz"),
    ("gfx942", "v_mfma_f32_32x32x16_bf8_fp8", 32, 16, "e5m2fnuz", "e4m3fnuz"),
    ("gfx942", "v_mfma_f32_32x32x16_bf8_bf8", 32, 16, "e5m2fnuz", "e5m2fnuz"),
    ("gfx942", "v_mfma_i32_32x32x16_i8", 32, 16, "i8", "i8"),
    ("gfx942", "v_mfma_i32_16x16x32_i8", 16, 32, "i8", "i8"),
    ("gfx950", "v_mfma_f32_32x32x16_f16", 32, 16, "f16", "f16"),
    ("gfx950", "v_mfma_f32_16x16x32_f16", 16, 32, "f16", "f16"),
    ("gfx950", "v_mfma_f32_32x32x16_bf16", 32, 16, "bf16", "bf16"),
    ("gfx950", "v_mfma_f32_16x16x32_bf16", 16, 32, "bf16", "bf16"),
    ("gfx950", "v_mfma_f32_16x16x32_fp8_bf8", 16, 32, "e4m3", "e5m2"),
    ("gfx950", "v_mfma_f32_32x32x64_f8f6f4", 32, 64, "e4m3", "e4m3"),
    ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", 16, 128, "e4m3", "e4m3"),
    ("gfx950", "v_mfma_i32_32x32x32_i8", 32, 32, "i8", "i8"),
    ("gfx950", "v_mfma_i32_16x16x64_i8", 16, 64, "i8", "i8"),
]  # fmt: skip
#: target, opcode, formats of A and B, modifiers.
WMMA = [
    ("gfx1100", "v_wmma_f32_16x16x16_f16", "f16", "f16", {}),
    ("gfx1100", "v_wmma_f32_16x16x16_bf16", "bf16", "bf16", {}),
    ("gfx1100", "v_wmma_i32_16x16x16_iu8", "u8", "u8", {}),
    ("gfx1100", "v_wmma_i32_16x16x16_iu8", "i8", "i8", {"neg_lo": (1, 1, 0)}),
    ("gfx1100", "v_wmma_i32_16x16x16_iu8", "i8", "u8", {"neg_lo": (1, 0, 0)}),
    ("gfx1201", "v_wmma_f32_16x16x16_f16", "f16", "f16", {}),
    ("gfx1201", "v_wmma_f32_16x16x16_bf16", "bf16", "bf16", {}),
    ("gfx1201", "v_wmma_i32_16x16x16_iu8", "i8", "i8", {"neg_lo": (1, 1, 0)}),
    ("gfx1201", "v_wmma_i32_16x16x16_iu8", "u8", "i8", {"neg_lo": (0, 1, 0)}),
    ("gfx1201", "v_wmma_f32_16x16x16_fp8_fp8", "e4m3", "e4m3", {}),
    ("gfx1201", "v_wmma_f32_16x16x16_fp8_bf8", "e4m3", "e5m2", {}),
    ("gfx1201", "v_wmma_f32_16x16x16_bf8_fp8", "e5m2", "e4m3", {}),
    ("gfx1201", "v_wmma_f32_16x16x16_bf8_bf8", "e5m2", "e5m2", {}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def bits_of(format):
    return {"f32": 32, "xf32": 32, "i32": 32, "f16": 16, "bf16": 16}.get(format, 8)


def value_of(codes, format):
    """What an array of codes means, in float64."""
    codes = np.asarray(codes, np.uint32)
    if format in ("f32", "xf32"):
        bits = codes & np.uint32(0xFFFFE000) if format == "xf32" else codes
        return bits.view(np.float32).astype(np.float64)
    if format == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    if format == "bf16":
        return from_bfloat16(codes).astype(np.float64)
    if format == "i32":
        return codes.view(np.int32).astype(np.float64)
    if format in ("i8", "u8"):
        return codes.astype(np.uint8).view("int8" if format == "i8" else "uint8").astype(float)
    return fp8.decode_table(format)[codes].astype(np.float64)


def random_codes(rng, shape, format):
    """Codes of finite numbers near one, or of any integers."""
    if format in ("i8", "u8"):
        return rng.integers(0, 256, shape).astype(np.uint32)
    if format == "i32":
        return rng.integers(0, 1 << 32, shape).astype(np.uint32)
    values = rng.standard_normal(shape).astype(np.float32)
    if format in ("f32", "xf32"):
        return values.view(np.uint32)
    if format == "bf16":
        return values.view(np.uint32) >> np.uint32(16)
    if format == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    finite = np.flatnonzero(np.isfinite(fp8.decode_table(format)))
    return rng.choice(finite, shape).astype(np.uint32)


def expected_codes(a, b, c, format):
    """The bits of A B + C: values in float64, (waves, size, k), (.., k, size), (.., size, size)."""
    total = a @ b + c
    if format == "i32":
        return (total.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
    return total.astype(np.float32).view(np.uint32)


def close(actual, expected, format):
    """Equal, but for the order in which float64 adds."""
    if format == "i32":
        return np.array_equal(actual, expected)
    return np.allclose(
        value_of(actual, format), value_of(expected, format), rtol=3e-7, atol=1e-12, equal_nan=True
    )


def cdna_case(opcode, target, size, k, formats, seed, **modifiers):
    """Operands as matrices of codes and as registers, and how to read the result."""
    rng = np.random.default_rng(seed)
    shape = shape_of(opcode, target_named(target), **modifiers)
    accumulator = "i32" if "_i32_" in opcode else "f32"
    a = random_codes(rng, (WAVES, size, k), formats[0])
    b = random_codes(rng, (WAVES, k, size), formats[1])
    c = random_codes(rng, (WAVES, size, size), accumulator)
    bits = bits_of(formats[0])
    count = size * k * bits // 32 // 64

    def operand(i, j):
        return cdna_operand(i, j, size, k, bits)

    def place(i, j):
        return cdna_accumulator(i, j, size)

    registers = (
        scatter(a, operand, count, 64),
        scatter(b.swapaxes(1, 2), operand, count, 64),
        scatter(c, place, size * size // 64, 64),
    )
    return shape, (a, b, c), registers, place, accumulator


@pytest.mark.parametrize("case", CDNA, ids=lambda case: f"{case[0]}-{case[1]}")
def test_mfma(case):
    target, opcode, size, k, *formats = case
    shape, (a, b, c), registers, place, accumulator = cdna_case(
        opcode, target, size, k, formats, seed=1
    )
    assert (shape.size, shape.k) == (size, k)
    assert (shape.a_format, shape.b_format, shape.accumulator) == (*formats, accumulator)
    assert shape.input_registers == len(registers[0])
    assert shape.accumulator_registers == len(registers[2])
    a, b = value_of(a, formats[0]), value_of(b, formats[1])
    expected = expected_codes(a, b, value_of(c, accumulator), accumulator)

    result = multiply(shape, *registers)

    assert (result.dtype, result.shape) == (np.uint32, registers[2].shape)
    assert close(gather(result, place, c.shape), expected, accumulator)
    typed = registers[2].view(np.int32 if accumulator == "i32" else np.float32)
    assert np.array_equal(multiply(shape, *registers[:2], typed), result)
    constant = gather(multiply(shape, *registers[:2], 2), place, c.shape)
    assert close(constant, expected_codes(a, b, 2.0, accumulator), accumulator)


@pytest.mark.parametrize("cbsz", [0, 1])
@pytest.mark.parametrize("blgp", [0, 1])
def test_f8f6f4_takes_its_formats_from_modifiers(cbsz, blgp):
    formats = [("e4m3", "e5m2")[cbsz], ("e4m3", "e5m2")[blgp]]
    shape, (a, b, c), registers, place, _ = cdna_case(
        "v_mfma_f32_16x16x128_f8f6f4", "gfx950", 16, 128, formats, 3, cbsz=cbsz, blgp=blgp
    )
    assert [shape.a_format, shape.b_format] == formats
    a, b = value_of(a, formats[0]), value_of(b, formats[1])
    result = gather(multiply(shape, *registers), place, c.shape)
    assert close(result, expected_codes(a, b, value_of(c, "f32"), "f32"), "f32")


def wmma_registers(target, a, b, a_bits, b_bits):
    operand = rdna3_operand if target == "gfx1100" else rdna4_operand
    copies = 2 if target == "gfx1100" else 1
    return [
        scatter(codes, lambda i, k, n=bits: operand(i, k, n), 16 * bits * copies // 64, 32)
        for codes, bits in ((a, a_bits), (b.swapaxes(1, 2), b_bits))
    ]


@pytest.mark.parametrize("case", WMMA, ids=lambda case: "-".join(map(str, case[:4])))
def test_wmma(case):
    target, opcode, *formats, modifiers = case
    rng = np.random.default_rng(4)
    shape = shape_of(opcode, target_named(target), **modifiers)
    assert [shape.a_format, shape.b_format] == formats
    accumulator = "i32" if "_i32_" in opcode else "f32"
    size = (WAVES, 16, 16)
    a, b, c = (random_codes(rng, size, format) for format in (*formats, accumulator))
    left, right = wmma_registers(target, a, b, *map(bits_of, formats))
    assert shape.input_registers == len(left)

    def place(i, j):
        return rdna_accumulator(target, i, j)

    registers = scatter(c, place, 8, 32)
    assert shape.accumulator_registers == 8
    a, b = value_of(a, formats[0]), value_of(b, formats[1])
    result = multiply(shape, left, right, registers)
    assert (result.dtype, result.shape) == (np.uint32, registers.shape)
    expected = expected_codes(a, b, value_of(c, accumulator), accumulator)
    assert close(gather(result, place, size), expected, accumulator)
    constant = gather(multiply(shape, left, right, 1), place, size)
    assert close(constant, expected_codes(a, b, 1.0, accumulator), accumulator)


@pytest.mark.parametrize("operand", ["A", "B"])
def test_rdna3_needs_operands_in_both_halves_of_the_wave(operand):
    shape = shape_of("v_wmma_f32_16x16x16_f16", target_named("gfx1100"))
    a, b = np.zeros((2, 8, WAVES, 32), np.uint32)
    (a if operand == "A" else b)[3, 1, 20] = 1
    with pytest.raises(KernelFault, match=f"Operand {operand}"):
        multiply(shape, a, b, 0.0)


@pytest.mark.parametrize(
    ("target", "opcode"),
    [
        ("gfx942", "v_mfma_f32_16x16x16_f16"),
        ("gfx1100", "v_wmma_f32_16x16x16_f16"),
        ("gfx1201", "v_wmma_f32_16x16x16_f16"),
    ],
)
def test_infinities_and_nans_stay_in_their_row(target, opcode):
    shape = shape_of(opcode, target_named(target))
    a = np.zeros((shape.input_registers, 1, shape.lanes), np.uint32)
    b = np.full(a.shape, 0x3C003C00, np.uint32)  # ones
    a[0, 0, 1::16] = 0x7C00  # row 1 has infinities,
    a[0, 0, 2::16] = 0x7E00  # row 2 NaNs,
    a[0, 0, 3::16] = 0xFC007C00  # row 3 both infinities, and row 4 is NaN from C.
    c = np.zeros((shape.accumulator_registers, 1, shape.lanes), np.float32)

    def place(i, j):
        if target == "gfx942":
            return cdna_accumulator(i, j, 16)
        return rdna_accumulator(target, i, j)

    register, (lane,), _ = place(4, 0)
    c[register, 0, lane] = np.nan
    result = value_of(gather(multiply(shape, a, b, c), place, (1, 16, 16)), "f32")[0]
    assert (result[1] == np.inf).all()
    assert np.isnan(result[2:4]).all()
    assert np.isnan(result[4, 0])
    assert not result[4, 1:].any()
    assert not result[[0, *range(5, 16)]].any()
    b[:] = 0
    result = value_of(gather(multiply(shape, a, b, 0.0), place, (1, 16, 16)), "f32")[0]
    assert np.isnan(result[1:4]).all(), "infinity times zero"


def test_sums_that_overflow_are_infinite_and_tiny_negative_ones_are_minus_zero():
    shape = shape_of("v_mfma_f32_16x16x4_f32", target_named("gfx942"))
    a, b = np.full((2, 1, 1, 64), 1.0e20, np.float32).view(np.uint32)
    assert (multiply(shape, a, b, 0.0).view(np.float32) == np.inf).all()
    a, b = np.float32([[[[1.0e-30]]], [[[-1.0e-30]]]]).repeat(64, 3).view(np.uint32)
    assert (multiply(shape, a, b, 0.0) == 0x80000000).all()


def test_many_waves_have_the_results_of_each_wave():
    """More waves than are multiplied at once."""
    shape = shape_of("v_mfma_f32_32x32x8_f16", target_named("gfx942"))
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 2, 41, 128)).astype(np.float16).view(np.uint32)
    c = rng.standard_normal((16, 41, 64)).astype(np.float32)
    each = [slice(wave, wave + 1) for wave in range(41)]
    single = [multiply(shape, a[:, wave], b[:, wave], c[:, wave]) for wave in each]
    assert np.array_equal(multiply(shape, a, b, c), np.concatenate(single, axis=1))
    single = [multiply(shape, a[:, wave], b[:, wave], -0.5) for wave in each]
    assert np.array_equal(multiply(shape, a, b, -0.5), np.concatenate(single, axis=1))


def test_integer_sums_wrap_around():
    shape = shape_of("v_mfma_i32_16x16x32_i8", target_named("gfx942"))
    a, b = np.full((2, 2, 1, 64), 0x01010101, np.uint32)
    c = np.full((4, 1, 64), 0x7FFFFFFF, np.int32)
    assert (multiply(shape, a, b, c) == 0x7FFFFFFF + 32).all()


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_gfx90a_flushes_denormals_of_16_bit_products(format):
    """AMD, "MI200 MFMA behavior specifics"; later targets keep them."""
    name = {"f16": "f16", "bf16": "bf16_1k"}[format]
    old = shape_of(f"v_mfma_f32_16x16x16{name}", target_named("gfx90a"))
    new = shape_of(f"v_mfma_f32_16x16x16_{format}", target_named("gfx942"))
    denormal, one = {"f16": (0x03FF03FF, 0x3C003C00), "bf16": (0x007F007F, 0x3F803F80)}[format]
    a, ones = (np.full((2, 1, 64), word, np.uint32) for word in (denormal, one))
    assert not multiply(old, a, ones, 0.0).any()
    assert not multiply(old, ones, a, 0.0).any()
    assert (multiply(new, a, ones, 0.0).view(np.float32) > 0).all()
    zeros, c = np.zeros_like(a), np.full((4, 1, 64), 0x007FFFFF, np.uint32)
    assert not multiply(old, zeros, ones, c).any()
    assert (multiply(new, zeros, ones, c) == c).all()


def test_gfx90a_flushes_c_before_the_sum_and_d_after_it():
    shape = shape_of("v_mfma_f32_16x16x16bf16_1k", target_named("gfx90a"))
    smallest, one, tiny = (np.zeros((2, 1, 64), np.uint32) for _ in range(3))
    first = (0, 0, slice(16))  # k 0
    smallest[first], one[first], tiny[first] = 0x0080, 0x3F80, 0x2000  # 2**-126, 1, 2**-63
    c = np.full((4, 1, 64), 0x00400000, np.uint32)  # 2**-127
    assert (multiply(shape, smallest, one, c) == 0x00800000).all()
    half = np.where(one, np.uint32(0x3F00), np.uint32(0))
    assert not multiply(shape, smallest, half, 0.0).any()
    assert (multiply(shape, tiny, tiny, 0.0) == 0x00800000).all()


def test_products_of_float32_denormals_are_not_flushed_on_gfx90a():
    shape = shape_of("v_mfma_f32_16x16x4f32", target_named("gfx90a"))
    a = np.full((1, 1, 64), 1, np.uint32)
    ones = np.full((1, 1, 64), 0x3F800000, np.uint32)
    assert (multiply(shape, a, ones, 0.0) == 4).all()


@pytest.mark.parametrize(
    ("target", "opcode", "modifiers"),
    [
        ("gfx942", "v_mfma_f64_16x16x4_f64", {}),
        ("gfx942", "v_smfmac_f32_16x16x32_f16", {}),
        ("gfx942", "v_mfma_f32_16x16x16_f17", {}),
        ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", {"cbsz": 4}),
        ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", {"blgp": 2}),
        ("gfx942", "v_mfma_f32_16x16x16_f16", {"cbsz": 1}),
        ("gfx942", "v_mfma_f32_16x16x16_f16", {"blgp": 1}),
        ("gfx942", "v_mfma_f32_4x4x4_16b_f16", {}),
        ("gfx942", "v_mfma_f32_32x32x4_2b_f16", {}),
        ("gfx1100", "v_wmma_f16_16x16x16_f16", {}),
        ("gfx1100", "v_wmma_i32_16x16x16_iu4", {}),
        ("gfx1201", "v_wmma_f32_16x16x16_f16", {"neg_lo": (1, 0, 0)}),
    ],
)
def test_unknown_forms_are_rejected(target, opcode, modifiers):
    with pytest.raises(UnknownInstruction, match=opcode):
        shape_of(opcode, target_named(target), **modifiers)
