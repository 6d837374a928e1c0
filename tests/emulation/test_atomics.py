"""Atomic operations of the emulator, lane by lane."""

from __future__ import annotations

import operator
import struct

import numpy as np
import pytest

from attn_dispatch.emulation.memory.access import Bytes
from attn_dispatch.emulation.memory.atomics import ATOMIC_OPERATIONS, apply_atomic


@pytest.fixture(autouse=True)
def _as_in_a_run():
    """The machine runs kernels without NumPy's warnings."""
    with np.errstate(all="ignore"):
        yield


def signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) else value


#: (memory, operand, compare, bits) -> memory, on Python's integers.
INTEGER = {
    "add": lambda m, x, c, b: m + x,
    "sub": lambda m, x, c, b: m - x,
    "and": lambda m, x, c, b: m & x,
    "or": lambda m, x, c, b: m | x,
    "xor": lambda m, x, c, b: m ^ x,
    "smin": lambda m, x, c, b: min(signed(m, b), signed(x, b)),
    "smax": lambda m, x, c, b: max(signed(m, b), signed(x, b)),
    "umin": lambda m, x, c, b: min(m, x),
    "umax": lambda m, x, c, b: max(m, x),
    "swap": lambda m, x, c, b: x,
    "cmpswap": lambda m, x, c, b: x if m == c else m,
}


def run(operation, memory, index, operand, compare=None):
    """Apply to an array of uint32 or uint64 in place; returns what the lanes found."""
    size = memory.itemsize

    def split(values):
        flat = np.array(values, memory.dtype)
        return flat.view(np.uint32).reshape(flat.size, size // 4).T

    data = split(operand)
    if operation == "cmpswap":
        data = np.concatenate([data, split(compare)])
    starts = np.array(index, np.int64) * size
    found = apply_atomic(Bytes(memory.view(np.uint8)), operation, starts, data, size)
    return np.ascontiguousarray(found.T).view(memory.dtype)[:, 0]


def test_every_operation_is_tested():
    assert set(ATOMIC_OPERATIONS) == {*INTEGER, "add_f32", "add_f64", "pk_add_f16", "pk_add_bf16"}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("operation", INTEGER)
def test_integers_with_duplicates_in_the_order_of_the_lanes(operation, bits):
    rng = np.random.default_rng(bits)
    dtype, top = f"uint{bits}", (1 << bits) - 1
    edges = [0, 1, 2, 5, top, top - 1, top >> 1, (top >> 1) + 1]
    memory = np.array(rng.choice(np.array(edges, dtype), 6), dtype)
    index = rng.integers(0, 6, 64)
    operand, compare = (rng.choice(np.array(edges, dtype), 64) for _ in range(2))
    expected, found = memory.tolist(), []
    for at, x, c in zip(index.tolist(), operand.tolist(), compare.tolist(), strict=True):
        found.append(expected[at])
        expected[at] = INTEGER[operation](expected[at], x, c, bits) & top
    assert run(operation, memory, index, operand, compare).tolist() == found
    assert memory.tolist() == expected


def test_a_counter_gives_each_lane_another_number():
    memory = np.zeros(1, np.uint32)
    assert run("add", memory, [0] * 300, [1] * 300).tolist() == list(range(300))
    assert memory.tolist() == [300]


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_round_after_each_lane(bits):
    dtype, word = f"f{bits // 8}", f"u{bits // 8}"
    memory = np.array([{32: 1e8, 64: 1e17}[bits], 0.5], dtype)
    added = np.array([3.0, 2.25, 3.0, np.inf, 3.0, -np.inf], dtype)
    index = [0, 1, 0, 1, 0, 1]
    expected, found = memory.copy(), []
    for at, value in zip(index, added, strict=True):
        found.append(expected[at])
        expected[at] = expected[at] + value
    old = run(f"add_f{bits}", memory.view(word), index, added.view(word))
    assert old.view(dtype).tolist() == found
    assert np.array_equal(memory, expected, equal_nan=True)
    assert np.isnan(memory[1])


def test_subnormal_sums_are_kept():
    memory = np.array([1e-40], np.float32)
    run("add_f32", memory.view(np.uint32), [0], np.array([1e-40], np.float32).view(np.uint32))
    assert memory[0] == operator.add(*[np.float32(1e-40)] * 2) != 0


def test_packed_float16_adds_both_halves():
    memory = np.array([[1.5, 2048.0]], np.float16)
    added = np.array([[0.25, 1.0], [1.0, 3.0]], np.float16)
    old = run("pk_add_f16", memory.view(np.uint32)[:, 0], [0, 0], added.view(np.uint32)[:, 0])
    assert old.view(np.float16).tolist() == [1.5, 2048.0, 1.75, 2048.0]  # 2049 is a tie: to even
    assert memory.tolist() == [[2.75, 2052.0]]  # 2051 is a tie: to even


def bfloat16(value):
    """The bits of the nearest bfloat16 of a float64; ties to even."""
    if np.isnan(value):
        return 0x7FC0
    bits = struct.unpack("<Q", struct.pack("<d", value))[0]
    drop = 45  # of 52 bits of the fraction, 7 are left
    low, kept = bits & ((1 << drop) - 1), bits >> drop << drop
    half = 1 << (drop - 1)
    if low > half or (low == half and kept >> drop & 1):
        kept += 1 << drop
    rounded = struct.unpack("<d", struct.pack("<Q", kept))[0]
    return struct.unpack("<I", struct.pack("<f", rounded))[0] >> 16


def as_float64(bits):
    return float(np.uint32(bits << 16).view(np.float32))


def test_packed_bfloat16_has_one_rounding():
    rng = np.random.default_rng(1)
    # Normal numbers of similar size, so that sums need rounding and some are ties.
    old, new = (
        (rng.integers(0x3F00, 0x4200, 4000) | rng.choice([0, 0x8000], 4000)).astype(np.uint16)
        for _ in range(2)
    )
    memory = old.copy()
    run("pk_add_bf16", memory.view(np.uint32), np.arange(2000), new.view(np.uint32))
    expected = [
        bfloat16(as_float64(a) + as_float64(b))
        for a, b in zip(old.tolist(), new.tolist(), strict=True)
    ]
    assert memory.tolist() == expected


@pytest.mark.parametrize(
    ("old", "new", "is_nan"),
    [
        (0x7F80, 0x3F80, False),
        (0x7F80, 0xFF80, True),
        (0x7F81, 0x3F80, True),
        (0x3F80, 0x7FFF, True),
    ],
)
def test_packed_bfloat16_keeps_infinities_and_nan(old, new, is_nan):
    memory = np.array([old, 0x3F80], np.uint16)
    run("pk_add_bf16", memory.view(np.uint32), [0], np.array([new, 0x3F80], np.uint16).view("u4"))
    assert memory[1] == 0x4000
    assert np.isnan(as_float64(int(memory[0]))) == is_nan
    assert is_nan or memory[0] == 0x7F80
