"""Which lane each lane of a wave reads from: DPP, ds_swizzle and v_permlane16.

A row is 16 lanes, a bank is 4 lanes of a row. The semantics are those of AMD's instruction set
manuals; the texts are those that LLVM prints. Returned arrays are cached and read-only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import UnknownInstruction

__all__ = [
    "dpp_sources",
    "mbcnt_masks",
    "permlane16_sources",
    "row_bank_lanes",
    "swizzle_sources",
]

_Lanes = NDArray[np.int64]

#: Controls with a number. Each takes lane numbers, wave size and the number; -1 is no source.
_DPP_NUMBERED: dict[str, tuple[range, Callable[[_Lanes, int, int], _Lanes]]] = {
    "row_shl": (range(1, 16), lambda lane, _, n: np.where(lane % 16 + n < 16, lane + n, -1)),
    "row_shr": (range(1, 16), lambda lane, _, n: np.where(lane % 16 >= n, lane - n, -1)),
    "row_ror": (range(1, 16), lambda lane, _, n: lane // 16 * 16 + (lane - n) % 16),
    "row_share": (range(16), lambda lane, _, n: lane // 16 * 16 + n),
    "row_newbcast": (range(16), lambda lane, _, n: lane // 16 * 16 + n),
    "row_xmask": (range(16), lambda lane, _, n: lane ^ n),
    "wave_shl": (range(1, 2), lambda lane, size, n: np.where(lane + n < size, lane + n, -1)),
    "wave_shr": (range(1, 2), lambda lane, _, n: lane - n),
    "wave_rol": (range(1, 2), lambda lane, size, n: (lane + n) % size),
    "wave_ror": (range(1, 2), lambda lane, size, n: (lane - n) % size),
}
_SWIZZLE = re.compile(r"swizzle\(\s*(\w+)\s*,(.*)\)")


def _frozen(lanes: _Lanes) -> _Lanes:
    lanes.setflags(write=False)
    return lanes


def _dpp(control: str, lane: _Lanes, wave_size: int) -> _Lanes | None:
    """The source of each lane, None for an unknown control."""
    name, _, argument = control.partition(":")
    if control == "row_mirror":
        return lane ^ 15
    if control == "row_half_mirror":
        return lane ^ 7
    if control == "row_bcast:15":  # the last lane of each row goes to the next row
        return np.where(lane >= 16, lane // 16 * 16 - 1, -1)
    if control == "row_bcast:31":  # lane 31 goes to the upper half
        return np.where(lane >= 32, lane // 32 * 32 - 1, -1)
    if name in ("quad_perm", "dpp8"):
        group = 4 if name == "quad_perm" else 8
        choice = [int(digit) for digit in re.findall(r"\d+", argument)]
        if len(choice) != group or max(choice) >= group:
            return None
        chosen: _Lanes = lane // group * group + np.array(choice)[lane % group]
        return chosen
    if name in _DPP_NUMBERED and argument.isdecimal():
        allowed, sources = _DPP_NUMBERED[name]
        if int(argument) in allowed:
            return sources(lane, wave_size, int(argument))
    return None


@cache
def dpp_sources(control: str, wave_size: int) -> _Lanes:
    """The lane that each lane reads under a DPP control, -1 where there is none.

    Args:
        control: as LLVM prints it, for example "quad_perm:[1,0,3,2]", "row_shr:1", "row_bcast:15".
        wave_size: 32 or 64.

    Returns:
        int64, (wave_size,), read-only.

    Raises:
        UnknownInstruction: no GPU has this control.
    """
    sources = _dpp(control, np.arange(wave_size), wave_size)
    if sources is None:
        raise UnknownInstruction(f"The DPP control {control!r} is not known.")
    return _frozen(sources)


@cache
def row_bank_lanes(row_mask: int, bank_mask: int, wave_size: int) -> NDArray[np.bool_]:
    """The lanes that a DPP instruction writes: its row and its bank are in the 4-bit masks.

    Returns:
        bool, (wave_size,), read-only.
    """
    lane = np.arange(wave_size)
    lanes = (((row_mask >> (lane // 16)) & (bank_mask >> (lane % 16 // 4))) & 1).astype(bool)
    lanes.setflags(write=False)
    return lanes


def _swizzle_by_offset(offset: int, lane: _Lanes) -> _Lanes | None:
    """The source of each lane for the 16 bits of an offset, None for an unknown encoding."""
    if 0 <= offset < 0x8000:  # and, or, xor of the lower 5 bits of the lane number
        keep, put, flip = offset & 31, offset >> 5 & 31, offset >> 10 & 31
        return (lane & ~31) | (((lane & keep) | put) ^ flip)
    if offset >> 8 == 0x80:  # four numbers of 2 bits
        return lane // 4 * 4 + (offset >> 2 * (lane % 4) & 3)
    return None


def _swizzle_by_name(name: str, arguments: list[str], lane: _Lanes) -> _Lanes | None:
    """The source of each lane for a swizzle that LLVM names, None for an unknown one."""
    if name == "BITMASK_PERM" and len(arguments) == 1:
        # One letter a bit, the highest first: pass, invert, 0 or 1.
        if not re.fullmatch(r"[pi01]{5}", arguments[0]):
            return None
        keep, put, flip = (
            int("".join("1" if letter in letters else "0" for letter in arguments[0]), 2)
            for letters in ("pi", "1", "i")
        )
        return _swizzle_by_offset(keep | put << 5 | flip << 10, lane)
    if not all(argument.isdecimal() for argument in arguments):
        return None
    numbers = [int(argument) for argument in arguments]
    if name == "QUAD_PERM" and len(numbers) == 4 and max(numbers) < 4:
        permuted: _Lanes = lane // 4 * 4 + np.array(numbers)[lane % 4]
        return permuted
    if name == "SWAP" and numbers in ([1], [2], [4], [8], [16]):
        return lane ^ numbers[0]
    if name == "REVERSE" and numbers in ([2], [4], [8], [16], [32]):
        return lane ^ (numbers[0] - 1)
    if name == "BROADCAST" and len(numbers) == 2:
        group, chosen = numbers
        if group in (2, 4, 8, 16, 32) and chosen < group:
            return lane // group * group + chosen
    return None


@cache
def swizzle_sources(text: str, wave_size: int) -> _Lanes:
    """The lane that each lane reads in ds_swizzle_b32; halves of 32 lanes are independent.

    Args:
        text: the offset as LLVM prints it, for example "swizzle(SWAP,16)",
            'swizzle(BITMASK_PERM,"00p11")', or a number.
        wave_size: 32 or 64.

    Returns:
        int64, (wave_size,), read-only.

    Raises:
        UnknownInstruction: the text is not known. Rotations and FFT swizzles are not.
    """
    lane = np.arange(wave_size)
    sources = None
    if match := _SWIZZLE.fullmatch(text.strip()):
        arguments = [argument.strip().strip('"') for argument in match[2].split(",")]
        sources = _swizzle_by_name(match[1], arguments, lane)
    elif re.fullmatch(r"\d+|0[xX][0-9a-fA-F]+", text.strip()):
        sources = _swizzle_by_offset(int(text, 0), lane)
    if sources is None:
        raise UnknownInstruction(f"The swizzle {text!r} is not known.")
    return _frozen(sources)


def permlane16_sources(
    select_low: NDArray[np.uint32],
    select_high: NDArray[np.uint32],
    crosses: bool,
    wave_size: int,
) -> _Lanes:
    """The lane that each lane reads in v_permlane16_b32, or v_permlanex16_b32 if it crosses.

    Args:
        select_low: for each wave, 4 bits for each of the lanes 0 to 7 of a row: uint32, (n,).
        select_high: the same for the lanes 8 to 15.
        crosses: read from the other row of a pair of rows.
        wave_size: 32 or 64.

    Returns:
        int64, (n, wave_size).
    """
    lane = np.arange(wave_size)
    words = np.where(lane % 16 < 8, select_low[:, None], select_high[:, None]).astype(np.int64)
    selected = (words >> (4 * (lane % 8))) & 15
    rows = lane // 16 ^ (1 if crosses else 0)
    sources: _Lanes = selected + 16 * rows
    return sources


@cache
def mbcnt_masks(wave_size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The lanes below each lane, as bits: (low, high) halves for v_mbcnt_lo and v_mbcnt_hi.

    Returns:
        Two arrays of uint32, (wave_size,), read-only.
    """
    below = (np.uint64(1) << np.arange(wave_size, dtype=np.uint64)) - np.uint64(1)
    low = (below & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (below >> np.uint64(32)).astype(np.uint32)
    low.setflags(write=False)
    high.setflags(write=False)
    return low, high
