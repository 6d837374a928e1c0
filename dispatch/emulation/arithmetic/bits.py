"""Words and their bits on AMD GPUs, as pure functions on NumPy arrays.

Inputs are uint32 or uint64 and broadcast against each other. The semantics are those of the
pseudo-code in AMD's instruction set manuals (CDNA3, RDNA3, RDNA4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "align_bits",
    "align_bytes",
    "bit_mask_32",
    "bit_mask_64",
    "bitwise_ternary",
    "count_bits",
    "extract_bits",
    "extract_signed_bits",
    "high32",
    "insert_bits",
    "leading_sign_bits",
    "leading_zeros",
    "low32",
    "permute_bytes",
    "reverse_bits",
    "to_u64",
    "trailing_zeros",
]

_U32 = NDArray[np.uint32]
_U64 = NDArray[np.uint64]
_Array = NDArray[Any]

#: The result of a bit search that finds nothing.
_NONE_FOUND = np.uint32(0xFFFFFFFF)


def to_u64(low: _Array, high: _Array) -> _U64:
    """The uint64 whose halves are two uint32."""
    joined: _U64 = np.asarray(low).astype(np.uint64) | (
        np.asarray(high).astype(np.uint64) << np.uint64(32)
    )
    return joined


def low32(x: _Array) -> _U32:
    """The lower half of uint64."""
    low: _U32 = (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return low


def high32(x: _Array) -> _U32:
    """The upper half of uint64."""
    high: _U32 = (x >> np.uint64(32)).astype(np.uint32)
    return high


def count_bits(x: _Array) -> _U32:
    """How many bits of uint32 or uint64 are set (v_bcnt_u32_b32 without its addend)."""
    if x.dtype == np.uint64:
        return count_bits(low32(x)) + count_bits(high32(x))
    # Sums of 2, 4 and 8 neighbouring bits; the product adds the four bytes.
    x = x - ((x >> np.uint32(1)) & np.uint32(0x55555555))
    x = (x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333))
    x = (x + (x >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    counts: _U32 = (x * np.uint32(0x01010101)) >> np.uint32(24)
    return counts


def leading_zeros(x: _Array) -> _U32:
    """Zeros above the highest set bit of uint32 or uint64; 0xFFFFFFFF if no bit is set.

    v_ffbh_u32, v_clz_i32_u32, s_flbit_i32_b32, s_flbit_i32_b64.
    """
    if x.dtype == np.uint64:
        low, high = leading_zeros(low32(x)), leading_zeros(high32(x))
        below = np.where(low == _NONE_FOUND, low, low + np.uint32(32))
        return np.where(high == _NONE_FOUND, below, high)
    bit_length = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, _NONE_FOUND, (32 - bit_length).astype(np.uint32))


def leading_sign_bits(x: _Array) -> _U32:
    """Bits from the top of uint32 that equal the sign bit; 0xFFFFFFFF if all do.

    v_ffbh_i32, v_cls_i32, s_flbit_i32.
    """
    return leading_zeros(np.where(x >> np.uint32(31), ~x, x))


def trailing_zeros(x: _Array) -> _U32:
    """Zeros below the lowest set bit of uint32 or uint64; 0xFFFFFFFF if no bit is set.

    v_ffbl_b32, v_ctz_i32_b32, s_ff1_i32_b32, s_ff1_i32_b64.
    """
    one = x.dtype.type(1)
    return np.where(x == 0, _NONE_FOUND, count_bits(np.asarray(~x & (x - one))))


def reverse_bits(x: _Array) -> _Array:
    """The bits of uint32 or uint64 in reverse order (v_bfrev_b32, s_brev_b32, s_brev_b64)."""
    if x.dtype == np.uint64:
        return to_u64(low=reverse_bits(high32(x)), high=reverse_bits(low32(x)))
    for distance, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        shift, chosen = np.uint32(distance), np.uint32(mask)
        x = ((x >> shift) & chosen) | ((x & chosen) << shift)
    reverse: _Array = np.asarray(x).byteswap()
    return reverse


def extract_bits(x: _Array, offset: _Array, width: _Array) -> _Array:
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
    field: _Array = (x >> (offset.astype(kind) & kind(size - 1))) & mask
    return field


def extract_signed_bits(x: _Array, offset: _Array, width: _Array) -> _Array:
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
    extended: _Array = (field ^ sign) - sign
    return extended


def insert_bits(mask: _Array, x: _Array, y: _Array) -> _Array:
    """Bits of x where the mask is set, of y elsewhere (v_bfi_b32)."""
    merged: _Array = (mask & x) | (~mask & y)
    return merged


def bit_mask_32(width: _Array, offset: _Array) -> _U32:
    """`width` ones from bit `offset` on; both modulo 32 (v_bfm_b32, s_bfm_b32)."""
    one, limit = np.uint32(1), np.uint32(31)
    mask: _U32 = ((one << (width & limit)) - one) << (offset & limit)
    return mask


def bit_mask_64(width: _Array, offset: _Array) -> _U64:
    """`width` ones from bit `offset` on, as uint64; both are uint32, modulo 64 (s_bfm_b64)."""
    one, limit = np.uint64(1), np.uint64(63)
    ones = (one << (width.astype(np.uint64) & limit)) - one
    mask: _U64 = ones << (offset.astype(np.uint64) & limit)
    return mask


def align_bits(high: _Array, low: _Array, shift: _Array) -> _U32:
    """32 bits of the 64 in (high, low), from bit `shift` modulo 32 on (v_alignbit_b32)."""
    return low32(to_u64(low, high) >> (shift & np.uint32(31)).astype(np.uint64))


def align_bytes(high: _Array, low: _Array, shift: _Array) -> _U32:
    """4 bytes of the 8 in (high, low), from byte `shift` modulo 4 on (v_alignbyte_b32)."""
    return align_bits(high, low, (shift & np.uint32(3)) << np.uint32(3))


def permute_bytes(high: _Array, low: _Array, selector: _Array) -> _U32:
    """Four bytes chosen from the eight of (high, low) (v_perm_b32).

    Args:
        high: first source, uint32: bytes 4 to 7.
        low: second source, uint32: bytes 0 to 3.
        selector: uint32 of four selectors. 0 to 7 choose a byte, 8 to 11 repeat the sign of byte
            1, 3, 5 or 7, 12 is 0x00, and 13 or more is 0xFF.
    """
    pair = to_u64(low, high)
    result = np.zeros(np.broadcast_shapes(pair.shape, selector.shape), np.uint32)
    for position in range(0, 32, 8):
        chosen = (selector >> np.uint32(position)) & np.uint32(0xFF)
        shift = (chosen & np.uint32(7)) << np.uint32(3)
        byte = low32(pair >> shift.astype(np.uint64)) & np.uint32(0xFF)
        if (chosen > 7).any():
            sign_bit = ((chosen & np.uint32(3)) << np.uint32(4)) + np.uint32(15)
            sign = low32(pair >> sign_bit.astype(np.uint64)) & np.uint32(1)
            constant = np.where(chosen > 12, np.uint32(0xFF), np.uint32(0))
            other = np.where(chosen < 12, sign * np.uint32(0xFF), constant)
            byte = np.where(chosen < 8, byte, other)
        result |= byte << np.uint32(position)
    return result


def bitwise_ternary(table: int, a: _Array, b: _Array, c: _Array) -> _Array:
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
