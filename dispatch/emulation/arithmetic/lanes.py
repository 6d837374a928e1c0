"""Which lane each lane of a wave reads from: DPP, ds_swizzle and v_permlane16.

A row is 16 lanes, a bank is 4 lanes of a row. The semantics are those of AMD's instruction set
manuals; the texts are those that LLVM prints. Returned arrays are cached and read-only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.errors import UnknownInstruction

__all__ = ["dpp_sources", "permlane16_sources", "row_bank_lanes", "swizzle_sources"]

_Lanes = NDArray[np.int64]

#: Controls without a number. Each takes lane numbers; -1 is no source.
_DPP_NAMED: dict[str, Callable[[_Lanes], _Lanes]] = {
    "row_mirror": lambda lane: lane ^ 15,
    "row_half_mirror": lambda lane: lane ^ 7,
    # The last lane of each row goes to the next row.
    "row_bcast:15": lambda lane: np.where(lane >= 16, lane // 16 * 16 - 1, -1),
    # Lane 31 goes to the upper half.
    "row_bcast:31": lambda lane: np.where(lane >= 32, lane // 32 * 32 - 1, -1),
    "wave_shr:1": lambda lane: lane - 1,
    "wave_shl:1": lambda lane: np.where(lane + 1 < len(lane), lane + 1, -1),
    "wave_ror:1": lambda lane: (lane - 1) % len(lane),
    "wave_rol:1": lambda lane: (lane + 1) % len(lane),
}
#: Controls with a number, which the functions take, too.
_DPP_NUMBERED: dict[str, tuple[range, Callable[[_Lanes, int], _Lanes]]] = {
    "row_shl": (range(1, 16), lambda lane, n: np.where(lane % 16 + n < 16, lane + n, -1)),
    "row_shr": (range(1, 16), lambda lane, n: np.where(lane % 16 >= n, lane - n, -1)),
    "row_ror": (range(1, 16), lambda lane, n: lane // 16 * 16 + (lane - n) % 16),
    "row_share": (range(16), lambda lane, n: lane // 16 * 16 + n),
    "row_newbcast": (range(16), lambda lane, n: lane // 16 * 16 + n),
    "row_xmask": (range(16), lambda lane, n: lane ^ n),
}


def _frozen(lanes: NDArray[Any]) -> NDArray[Any]:
    lanes.setflags(write=False)
    return lanes


@cache
def dpp_sources(control: str, wave_size: int) -> _Lanes:
    """The lane that each lane reads under a DPP control, -1 where there is none.

    Args:
        control: as LLVM prints it, for example "quad_perm:[1,0,3,2]", "row_shr:1", "row_bcast:15".
        wave_size: 32 or 64.

    Returns:
        int64, (wave_size,), read-only.

    Raises:
        UnknownInstruction: the control is not known.
    """
    lane = np.arange(wave_size)
    if control in _DPP_NAMED:
        return _frozen(_DPP_NAMED[control](lane))
    if found := re.fullmatch(r"quad_perm:\[([0-3]),([0-3]),([0-3]),([0-3])\]", control):
        choice = np.array([int(digit) for digit in found.groups()])
        return _frozen(lane // 4 * 4 + choice[lane % 4])
    name, _, number = control.partition(":")
    if name in _DPP_NUMBERED and number.isdecimal():
        allowed, sources = _DPP_NUMBERED[name]
        if int(number) in allowed:
            return _frozen(sources(lane, int(number)))
    raise UnknownInstruction(f"The DPP control {control!r} is not known.")


@cache
def row_bank_lanes(row_mask: int, bank_mask: int, wave_size: int) -> NDArray[np.bool_]:
    """The lanes that a DPP instruction writes: its row and its bank are in the 4-bit masks.

    Returns:
        bool, (wave_size,), read-only.
    """
    lane = np.arange(wave_size)
    chosen = (row_mask >> (lane // 16)) & (bank_mask >> (lane % 16 // 4)) & 1
    return _frozen(chosen.astype(bool))


@cache
def swizzle_sources(text: str, wave_size: int) -> _Lanes:
    """The lane that each lane reads in ds_swizzle_b32; halves of 32 lanes are independent.

    Args:
        text: the offset as LLVM prints it: "swizzle(SWAP,16)", "swizzle(REVERSE,8)",
            "swizzle(BROADCAST,4,1)" (lanes of a group, the one that all read),
            "swizzle(QUAD_PERM,1,0,3,2)", or 'swizzle(BITMASK_PERM,"00p11")' with a letter for each
            bit of the lane number, the highest first: pass, invert, 0 or 1.
        wave_size: 32 or 64.

    Returns:
        int64, (wave_size,), read-only.

    Raises:
        UnknownInstruction: the text is not known. Rotations and FFT swizzles are not.
    """
    lane = np.arange(wave_size)
    if found := re.fullmatch(r"swizzle\(SWAP,(1|2|4|8|16)\)", text):
        return _frozen(lane ^ int(found[1]))
    if found := re.fullmatch(r"swizzle\(REVERSE,(2|4|8|16|32)\)", text):
        return _frozen(lane ^ (int(found[1]) - 1))
    if found := re.fullmatch(r"swizzle\(BROADCAST,(2|4|8|16|32),(\d+)\)", text):
        group, chosen = int(found[1]), int(found[2])
        if chosen < group:
            return _frozen(lane // group * group + chosen)
    if found := re.fullmatch(r"swizzle\(QUAD_PERM,([0-3]),([0-3]),([0-3]),([0-3])\)", text):
        return _frozen(lane // 4 * 4 + np.array([int(each) for each in found.groups()])[lane % 4])
    if found := re.fullmatch(r'swizzle\(BITMASK_PERM,\s*"([pi01]{5})"\)', text):
        keep, put, flip = (
            int("".join("1" if letter in letters else "0" for letter in found[1]), 2)
            for letters in ("pi", "1", "i")
        )
        return _frozen((lane & ~31) | (((lane & keep) | put) ^ flip))
    raise UnknownInstruction(f"The swizzle {text!r} is not known.")


@cache
def permlane16_sources(low: int, high: int, crosses: bool, wave_size: int) -> _Lanes:
    """The lane that each lane reads in v_permlane16_b32, or v_permlanex16_b32 if it crosses.

    Args:
        low: 4 bits for each of the lanes 0 to 7 of a row.
        high: the same for the lanes 8 to 15.
        crosses: read from the other row of a pair of rows.
        wave_size: 32 or 64.

    Returns:
        int64, (wave_size,), read-only.
    """
    chosen = np.array([(high << 32 | low) >> 4 * i & 15 for i in range(16)])
    lane = np.arange(wave_size)
    return _frozen(lane // 16 * 16 ^ (16 if crosses else 0) | chosen[lane % 16])
