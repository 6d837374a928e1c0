"""Which register, lanes and bits hold an element of a matrix instruction's operands.

Stated element by element, after AMD's matrix instruction calculator (CDNA2, CDNA3, RDNA3, RDNA4)
and the CDNA4 ISA manual (gfx950). The functions of a layout return (register, lanes, first bit).
"""

from __future__ import annotations

import itertools

import numpy as np


def cdna_operand(i, k, block, size, depth, blocks, bits):
    """A[i][k] of a block, or B[k][i], for CDNA."""
    in_lane = depth * size * blocks // 64  # consecutive k of a lane
    if bits == 8 and depth * size == 2048:  # f8f6f4: two runs of 16
        lane = size * (k % (depth // 2) // 16) + i
        position = k // (depth // 2) * 16 + k % 16
    elif blocks > 1:
        lane, position = size * block + i, k
    else:
        lane, position = size * (k // in_lane) + i, k % in_lane
    return position * bits // 32, [lane], position * bits % 32


def cdna_accumulator(i, j, block, size):
    """D[i][j] of a block, for CDNA."""
    if size == 4:
        return i, [4 * block + j], 0
    if size == 16:
        return 4 * block + i % 4, [16 * (i // 4) + j], 0
    return 16 * block + 4 * (i // 8) + i % 4, [32 * (i // 4) % 64 + j], 0


def rdna3_operand(i, k, bits):
    return k * bits // 32, [i, i + 16], k * bits % 32


def rdna4_operand(i, k, bits):
    if bits == 8:
        return k // 4 % 2, [16 * (k // 8) + i], 8 * (k % 4)
    return 2 * (k // 8) + k // 2 % 2, [16 * (k // 4 % 2) + i], 16 * (k % 2)


def rdna_accumulator(target, i, j, bits, in_upper_half=False):
    if target == "gfx1100":
        return i // 2, [16 * i % 32 + j], 16 * in_upper_half
    if bits == 32:
        return i % 8, [16 * (i // 8) + j], 0
    return i // 2 % 4, [16 * (i // 8) + j], 16 * (i % 2)


def scatter(codes, place, registers, lanes):
    """Registers that hold an array (waves, blocks, rows, columns)."""
    words = np.zeros((registers, len(codes), lanes), np.uint32)
    for block, i, j in itertools.product(*map(range, codes.shape[1:])):
        register, where, bit = place(i, j, block)
        for lane in where:
            words[register, :, lane] |= codes[:, block, i, j] << np.uint32(bit)
    return words


def gather(words, place, shape, bits):
    """The array (waves, blocks, rows, columns) that registers hold."""
    codes = np.zeros(shape, np.uint32)
    for block, i, j in itertools.product(*map(range, shape[1:])):
        register, (lane,), bit = place(i, j, block)
        codes[:, block, i, j] = words[register, :, lane] >> np.uint32(bit) & ((1 << bits) - 1)
    return codes
