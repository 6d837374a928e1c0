"""Words and bits of the emulator, against AMD's pseudo-code on Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.arithmetic import bits
from support.emulation import u32

#: Words with few and many bits, at both ends.
WORDS = [0, 1, 2, 3, 0x80, 0xFF, 0x8000, 0x12345678, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF]
WORDS += [0xFFFF0000, 0xFFFFFFFE, 0xFFFFFFFF]
LONG_WORDS = [high << 32 | low for high in WORDS[::2] for low in WORDS[::2]]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def test_words_of_64_bits_have_halves():
    assert bits.to_u64(u32(0x89ABCDEF), u32(0x01234567)).tolist() == [0x0123456789ABCDEF]
    x = np.array([0x0123456789ABCDEF], np.uint64)
    assert bits.low32(x).tolist() == [0x89ABCDEF]
    assert bits.high32(x).tolist() == [0x01234567]


@pytest.mark.parametrize(("words", "dtype"), [(WORDS, np.uint32), (LONG_WORDS, np.uint64)])
def test_bit_searches_follow_the_pseudo_code(words, dtype):
    # V_FFBH_U32, V_FFBL_B32: -1 if no ones are found. V_BFREV_B32. V_BCNT_U32_B32.
    size = np.dtype(dtype).itemsize * 8
    x = np.array(words, dtype)
    texts = [f"{word:0{size}b}" for word in words]
    none = 0xFFFFFFFF
    first = [text.index("1") if "1" in text else none for text in texts]
    last = [text[::-1].index("1") if "1" in text else none for text in texts]
    assert bits.leading_zeros(x).tolist() == first
    assert bits.trailing_zeros(x).tolist() == last
    assert bits.count_bits(x).tolist() == [text.count("1") for text in texts]
    assert bits.reverse_bits(x).tolist() == [int(text[::-1], 2) for text in texts]
    for function in (bits.leading_zeros, bits.trailing_zeros, bits.count_bits):
        assert function(x).dtype == np.uint32
        assert function(x[3]) == function(x)[3]  # a value without dimensions


def test_leading_sign_bits():
    # V_FFBH_I32: the first bit that differs from the sign, -1 if all bits are the same.
    expected = {0: 0xFFFFFFFF, 0xFFFFFFFF: 0xFFFFFFFF, 1: 31, 0xFFFFFFFE: 31, 0x7FFFFFFF: 1}
    expected |= {0x80000000: 1, 0xFFFF0000: 16, 0x00010000: 15}
    assert bits.leading_sign_bits(u32(*expected)).tolist() == list(expected.values())


def reference_field(word, size, offset, width, signed):
    """S_BFE, V_BFE: shift right (arithmetically if signed), mask, extend the sign."""
    if signed and word >> (size - 1):
        word -= 1 << size
    field = (word >> offset) & ((1 << width) - 1)
    if signed and width and field >> (width - 1):
        field -= 1 << width
    return field % (1 << size)


@pytest.mark.parametrize(("words", "dtype"), [(WORDS, np.uint32), (LONG_WORDS, np.uint64)])
@pytest.mark.parametrize("signed", [False, True])
def test_bit_fields(words, dtype, signed):
    size = np.dtype(dtype).itemsize * 8
    function = bits.extract_signed_bits if signed else bits.extract_bits
    x = np.array(words, dtype)
    for offset in (0, 1, 7, 16, 28, size - 1):
        for width in (0, 1, 5, 8, 24, 31, size, size + 8):
            expected = [reference_field(w, size, offset, width, signed) for w in words]
            assert function(x, u32(offset), u32(width)).tolist() == expected
            assert function(x, u32(offset + size), u32(width)).tolist() == expected


def test_bit_masks():
    # V_BFM_B32: ((1 << S0[4:0]) - 1) << S1[4:0].
    assert bits.bit_mask_32(u32(4, 31, 32, 3), u32(8, 0, 5, 31)).tolist() == [
        0xF00,
        0x7FFFFFFF,
        0,
        0x80000000,
    ]


def test_alignment_takes_words_from_a_pair():
    # V_ALIGNBIT_B32: ({S0, S1} >> S2[4:0]) & 0xffffffff.
    high, low = u32(0x01234567), u32(0x89ABCDEF)
    for shift, expected in {0: 0x89ABCDEF, 4: 0x789ABCDE, 31: 0x02468ACF, 36: 0x789ABCDE}.items():
        assert bits.align_bits(high, low, u32(shift)).tolist() == [expected]


def reference_permuted_byte(pair, selector):
    """BYTE_PERMUTE of V_PERM_B32."""
    if selector >= 13:
        return 0xFF
    if selector == 12:
        return 0
    if selector >= 8:
        return 0xFF * (pair >> (16 * (selector - 8) + 15) & 1)
    return pair >> (8 * selector) & 0xFF


def test_permute_bytes_for_every_selector():
    high, low = 0x8123F567, 0x09ABCDEF
    selectors = np.arange(256, dtype=np.uint32)
    words = selectors | (selectors[::-1] << 8) | (selectors << 16) | (np.uint32(4) << 24)
    expected = [
        sum(
            reference_permuted_byte(high << 32 | low, int(w) >> s & 0xFF) << s
            for s in range(0, 32, 8)
        )
        for w in words
    ]
    assert bits.permute_bytes(u32(high), u32(low), words).tolist() == expected
    single = bits.permute_bytes(np.uint32(high), np.uint32(low), np.uint32(0x03020100))
    assert single == low


def test_permute_bytes_broadcasts():
    high, low = np.arange(8, dtype=np.uint32).reshape(2, 4), u32(0x01020304)
    result = bits.permute_bytes(high, low, u32(0x04000102))
    assert result.tolist() == [[i << 24 | 0x040302 for i in row] for row in high.tolist()]


def test_every_table_of_three_bits():
    # V_BITOP3_B32: bit 4 a + 2 b + c of the table.
    a, b, c = u32(0xF0), u32(0xCC), u32(0xAA)
    for table in range(256):
        assert bits.bitwise_ternary(table, a, b, c)[0] & 0xFF == table
    half = bits.bitwise_ternary(0x96, *(x.astype(np.uint16) for x in (a, b, c)))
    assert half.dtype == np.uint16
    assert half.tolist() == [0xF0 ^ 0xCC ^ 0xAA]
