"""Atomic operations of the emulator, lane by lane."""

from __future__ import annotations

import operator

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
    assert set(ATOMIC_OPERATIONS) == {*INTEGER, "add_f32"}


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


def test_floats_round_after_each_lane():
    memory = np.array([1e8, 0.5], np.float32)
    added = np.array([3.0, 2.25, 3.0, np.inf, 3.0, -np.inf], np.float32)
    index = [0, 1, 0, 1, 0, 1]
    expected, found = memory.copy(), []
    for at, value in zip(index, added, strict=True):
        found.append(expected[at])
        expected[at] = expected[at] + value
    old = run("add_f32", memory.view(np.uint32), index, added.view(np.uint32))
    assert old.view(np.float32).tolist() == found
    assert np.array_equal(memory, expected, equal_nan=True)
    assert np.isnan(memory[1])


def test_subnormal_sums_are_kept():
    memory = np.array([1e-40], np.float32)
    run("add_f32", memory.view(np.uint32), [0], np.array([1e-40], np.float32).view(np.uint32))
    assert memory[0] == operator.add(*[np.float32(1e-40)] * 2) != 0
