"""Integer instructions on scalar registers at the limits of their operands, against Python ints."""

import numpy as np
import pytest

from support.emulation import execute, group_of, register

ONES, TOP = 0xFFFFFFFF, 0x80000000
ONES64, TOP64 = (1 << 64) - 1, 1 << 63


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) else x


def overflows(x):
    return not -(1 << 31) <= x < 1 << 31


#: Instruction -> result (modulo 2 ** 32) and SCC, of two words and the SCC before, as Python ints.
ON_INTEGERS = {
    "s_add_u32": lambda a, b, c: (a + b, a + b > ONES),
    "s_sub_u32": lambda a, b, c: (a - b, a < b),
    "s_addc_u32": lambda a, b, c: (a + b + c, a + b + c > ONES),
    "s_subb_u32": lambda a, b, c: (a - b - c, a < b + c),
    "s_add_i32": lambda a, b, c: (a + b, overflows(signed(a) + signed(b))),
    "s_sub_i32": lambda a, b, c: (a - b, overflows(signed(a) - signed(b))),
    "s_mul_i32": lambda a, b, c: (a * b, c),
    "s_mul_hi_u32": lambda a, b, c: (a * b >> 32, c),
    "s_mul_hi_i32": lambda a, b, c: (signed(a) * signed(b) >> 32, c),
    "s_lshl3_add_u32": lambda a, b, c: (8 * a + b, 8 * a + b > ONES),
    "s_lshl_b32": lambda a, b, c: (a << b % 32, bool(a << b % 32 & ONES)),
    "s_lshr_b32": lambda a, b, c: (a >> b % 32, bool(a >> b % 32)),
    "s_ashr_i32": lambda a, b, c: (signed(a) >> b % 32, bool(signed(a) >> b % 32)),
    "s_bfm_b32": lambda a, b, c: (((1 << a % 32) - 1) << b % 32, c),
    "s_max_i32": lambda a, b, c: (max(signed(a), signed(b)), signed(a) >= signed(b)),
}  # fmt: skip


def unsigned_field(x, b, bits=32):
    return x >> b % bits & ((1 << (b >> 16 & 127)) - 1)


def signed_field(x, b, bits=32):
    """Bits above the word are copies of its sign."""
    width = b >> 16 & 127
    field = unsigned_field(signed(x, bits), b, bits)
    return signed(field, width) if width else 0


#: The same for the first source of 64 bits: result modulo 2 ** 64.
ON_WIDE_INTEGERS = {
    "s_lshl_b64": lambda a, b: a << b % 64,
    "s_lshr_b64": lambda a, b: a >> b % 64,
    "s_ashr_i64": lambda a, b: signed(a, 64) >> b % 64,
    "s_bfe_u64": lambda a, b: unsigned_field(a, b, 64),
    "s_bfe_i64": lambda a, b: signed_field(a, b, 64),
}
#: Fields of 0, 1, 7, 31, 32, 33, 64 and 127 bits, and plain shifts.
FIELDS = [0x0, 0x10000, 0x7001F, 0x1F0001, 0x200000, 0x210010, 0x400003, 0x7F003F, 31, 32, 63, 64]
EDGES = [0, 1, 2, 3, 31, 32, 0x8000, 0x12345678, TOP - 1, TOP, TOP + 1, 0xFFFF0000, ONES - 1, ONES]


@pytest.mark.parametrize("opcode", ON_INTEGERS)
@pytest.mark.parametrize("scc", [0, 1])
def test_integers_at_their_limits(opcode, scc):
    a, b = (each.ravel() for each in np.meshgrid(np.array(EDGES, np.uint32), EDGES))
    group = group_of("gfx942", len(a), s1=a, s2=b.astype(np.uint32), scc=scc)
    execute(group, f"{opcode} s0, s1, s2")
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [ON_INTEGERS[opcode](x, y, scc) for x, y in pairs]
    assert group.s_u32[0].tolist() == [result & ONES for result, _ in expected]
    assert group.scc.tolist() == [after for _, after in expected]


@pytest.mark.parametrize("opcode", ON_WIDE_INTEGERS)
def test_wide_integers_at_their_limits(opcode):
    values = np.array([0, 1, TOP64, TOP64 - 1, ONES64, 0x123456789ABCDEF, ONES, 1 << 32], np.uint64)
    a, b = (each.ravel() for each in np.meshgrid(values, np.array(FIELDS, np.uint64)))
    group = group_of("gfx942", len(a), s2=a, s4=b.astype(np.uint32))
    execute(group, f"{opcode} s[0:1], s[2:3], s4")
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [ON_WIDE_INTEGERS[opcode](x, y) & ONES64 for x, y in pairs]
    assert register(group, "s0", np.uint64).tolist() == expected
    assert group.scc.tolist() == [result != 0 for result in expected]


@pytest.mark.parametrize(
    ("opcode", "field_of"), [("s_bfe_u32", unsigned_field), ("s_bfe_i32", signed_field)]
)
def test_bit_fields_of_all_widths(opcode, field_of):
    a, b = (each.ravel() for each in np.meshgrid(np.array(EDGES, np.uint32), FIELDS))
    group = group_of("gfx942", len(a), s1=a, s2=b.astype(np.uint32))
    execute(group, f"{opcode} s0, s1, s2")
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [field_of(x, y) & ONES for x, y in pairs]
    assert group.s_u32[0].tolist() == expected
    assert group.scc.tolist() == [result != 0 for result in expected]
