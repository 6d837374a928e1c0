"""Words and their bits on AMD GPUs, as pure functions on NumPy arrays.

Inputs are arrays or scalars of uint32 or uint64, which broadcast against each other. Results are
uint32 if the docstring does not say otherwise. The semantics are those of the pseudo-code in AMD's
instruction set manuals (CDNA3, RDNA3, RDNA4).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "align_bits",
    "bit_mask_32",
    "bitwise_ternary",
    "count_bits",
    "extract_bits",
    "extract_signed_bits",
    "high32",
    "leading_sign_bits",
    "leading_zeros",
    "low32",
    "permute_bytes",
    "reverse_bits",
    "to_u64",
    "trailing_zeros",
]

#: The result of a bit search that finds nothing.
_NONE_FOUND = np.uint32(0xFFFFFFFF)


def to_u64(low: Any, high: Any) -> Any:
    """The uint64 whose halves are two uint32."""
    return np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)


def low32(x: Any) -> Any:
    """The lower half of uint64."""
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def high32(x: Any) -> Any:
    """The upper half of uint64."""
    return (x >> np.uint64(32)).astype(np.uint32)


def count_bits(x: Any) -> Any:
    """How many bits of uint32 or uint64 are set (v_bcnt_u32_b32 without its addend)."""
    if x.dtype == np.uint64:
        return count_bits(low32(x)) + count_bits(high32(x))
    # Sums of 2, 4 and 8 neighbouring bits; the product adds the four bytes.
    x = x - ((x >> np.uint32(1)) & np.uint32(0x55555555))
    x = (x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333))
    x = (x + (x >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return (x * np.uint32(0x01010101)) >> np.uint32(24)


def leading_zeros(x: Any) -> Any:
    """Zeros above the highest set bit of uint32 or uint64; 0xFFFFFFFF if no bit is set.

    v_ffbh_u32, v_clz_i32_u32, s_flbit_i32_b32, s_flbit_i32_b64.
    """
    if x.dtype == np.uint64:
        low, high = leading_zeros(low32(x)), leading_zeros(high32(x))
        below = np.where(low == _NONE_FOUND, low, low + np.uint32(32))
        return np.where(high == _NONE_FOUND, below, high)
    bit_length = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, _NONE_FOUND, (32 - bit_length).astype(np.uint32))


def leading_sign_bits(x: Any) -> Any:
    """Bits from the top of uint32 that equal the sign bit; 0xFFFFFFFF if all do.

    v_ffbh_i32, v_cls_i32, s_flbit_i32.
    """
    return leading_zeros(np.where(x >> np.uint32(31), ~x, x))


def trailing_zeros(x: Any) -> Any:
    """Zeros below the lowest set bit of uint32 or uint64; 0xFFFFFFFF if no bit is set.

    v_ffbl_b32, v_ctz_i32_b32, s_ff1_i32_b32, s_ff1_i32_b64.
    """
    one = x.dtype.type(1)
    return np.where(x == 0, _NONE_FOUND, count_bits(np.asarray(~x & (x - one))))


def reverse_bits(x: Any) -> Any:
    """The bits of uint32 or uint64 in reverse order (v_bfrev_b32, s_brev_b32, s_brev_b64)."""
    if x.dtype == np.uint64:
        return to_u64(low=reverse_bits(high32(x)), high=reverse_bits(low32(x)))
    for distance, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        shift, chosen = np.uint32(distance), np.uint32(mask)
        x = ((x >> shift) & chosen) | ((x & chosen) << shift)
    return np.asarray(x).byteswap()


def extract_bits(x: Any, offset: Any, width: Any) -> Any:
    """An unsigned bit field of uint32 or uint64 (v_bfe_u32, s_bfe_u32, s_bfe_u64).

    Args:
        x: uint32 or uint64.
        offset: of the lowest bit; taken modulo the size of x.
        width: in bits. v_bfe has 5 bits for it, s_bfe 7: the caller masks it.
    """
    kind, size = x.dtype.type, 8 * x.dtype.itemsize
    one = kind(1)
    # A shift by the size of x or more gives 0 in NumPy, so such a width selects every bit.
    mask = (one << width.astype(kind)) - one
    return (x >> (offset.astype(kind) & kind(size - 1))) & mask


def extract_signed_bits(x: Any, offset: Any, width: Any) -> Any:
    """A bit field with its sign extended, in x's unsigned dtype (v_bfe_i32, s_bfe_i32, s_bfe_i64).

    Args:
        x: uint32 or uint64. Bits above it are copies of its sign bit.
        offset: of the lowest bit; taken modulo the size of x.
        width: in bits. v_bfe has 5 bits for it, s_bfe 7: the caller masks it.
    """
    kind, size = x.dtype.type, 8 * x.dtype.itemsize
    signed = np.dtype(f"i{x.dtype.itemsize}")
    one, widths = kind(1), width.astype(kind)
    shifted = x.view(signed) >> (offset.astype(signed) & signed.type(size - 1))
    field = shifted.view(x.dtype) & ((one << widths) - one)
    # For width 0 this shift is by more than the size of x: 0, and so is the field.
    sign = one << (widths - one)
    return (field ^ sign) - sign


def bit_mask_32(width: Any, offset: Any) -> Any:
    """`width` ones from bit `offset` on; both modulo 32 (v_bfm_b32, s_bfm_b32)."""
    one, limit = np.uint32(1), np.uint32(31)
    return ((one << (width & limit)) - one) << (offset & limit)


def align_bits(high: Any, low: Any, shift: Any) -> Any:
    """32 bits of the 64 in (high, low), from bit `shift` modulo 32 on (v_alignbit_b32)."""
    return low32(to_u64(low, high) >> (shift & np.uint32(31)).astype(np.uint64))


def permute_bytes(high: Any, low: Any, selector: Any) -> Any:
    """Four bytes chosen from the eight of (high, low) (v_perm_b32).

    Args:
        high: first source, uint32: bytes 4 to 7.
        low: second source, uint32: bytes 0 to 3.
        selector: uint32 of four selectors. 0 to 7 choose a byte, 8 to 11 repeat the sign of byte
            1, 3, 5 or 7, 12 is 0x00, and 13 or more is 0xFF.
    """
    words = np.asarray(selector)
    first = words.flat[0]
    result = _permuted(high, low, int(first))
    if (words == first).all():  # as in kernels
        return result
    for word in np.unique(words):
        result = np.where(words == word, _permuted(high, low, int(word)), result)
    return result


def _permuted(high: Any, low: Any, selector: int) -> Any:
    """The bytes by one selector for all lanes."""
    result = np.uint32(0)
    masks: dict[tuple[bool, int], int] = {}  # of the bytes that come from one word by one shift
    for i in range(4):
        byte = selector >> 8 * i & 0xFF
        if byte < 8:
            key = (byte >= 4, 8 * (i - byte % 4))
            masks[key] = masks.get(key, 0) | 0xFF << 8 * i
        elif byte < 12:
            word = high if byte >= 10 else low
            sign = word >> np.uint32(16 * (byte % 2) + 15) & np.uint32(1)
            result = result | sign * np.uint32(0xFF << 8 * i)
        elif byte > 12:
            result = result | np.uint32(0xFF << 8 * i)
    for (is_high, shift), mask in masks.items():
        word = high if is_high else low
        moved = word << np.uint32(shift) if shift >= 0 else word >> np.uint32(-shift)
        result = result | (moved & np.uint32(mask))
    return result


def bitwise_ternary(table: int, a: Any, b: Any, c: Any) -> Any:
    """Any bitwise function of three words (v_bitop3_b32, v_bitop3_b16).

    Args:
        table: 8 bits. Bit 4 a + 2 b + c is the result for these bits of a, b and c.
        a: words of any unsigned dtype; b and c are of the same dtype.
    """
    negated = bin(table & 0xFF).count("1") > 4  # the complement has fewer terms
    terms = ~table if negated else table
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
    for index in range(8):
        if terms >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return ~result if negated else result
