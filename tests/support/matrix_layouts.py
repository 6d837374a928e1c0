"""Which register, lanes and bits hold an element of a matrix instruction's operands.

Stated element by element, after AMD's matrix instruction calculator (CDNA2, CDNA3, RDNA3, RDNA4)
and the CDNA4 ISA manual (gfx950). The functions of a layout return (register, lanes, first bit).
"""

from __future__ import annotations

import itertools

import numpy as np


def cdna_operand(i, k, size, depth, bits):
    """A[i][k], or B[k][i], for CDNA."""
    in_lane = depth * size // 64  # consecutive k of a lane
    if bits == 8 and depth * size == 2048:  # f8f6f4: two runs of 16
        lane = size * (k % (depth // 2) // 16) + i
        position = k // (depth // 2) * 16 + k % 16
    else:
        lane, position = size * (k // in_lane) + i, k % in_lane
    return position * bits // 32, [lane], position * bits % 32


def cdna_accumulator(i, j, size):
    """D[i][j], for CDNA."""
    if size == 16:
        return i % 4, [16 * (i // 4) + j], 0
    return 4 * (i // 8) + i % 4, [32 * (i // 4) % 64 + j], 0


def rdna3_operand(i, k, bits):
    return k * bits // 32, [i, i + 16], k * bits % 32


def rdna4_operand(i, k, bits):
    if bits == 8:
        return k // 4 % 2, [16 * (k // 8) + i], 8 * (k % 4)
    return 2 * (k // 8) + k // 2 % 2, [16 * (k // 4 % 2) + i], 16 * (k % 2)


def rdna_accumulator(target, i, j):
    if target == "gfx1100":
        return i // 2, [16 * i % 32 + j], 0
    return i % 8, [16 * (i // 8) + j], 0


def scatter(codes, place, registers, lanes):
    """Registers that hold an array (waves, rows, columns)."""
    words = np.zeros((registers, len(codes), lanes), np.uint32)
    for i, j in itertools.product(*map(range, codes.shape[1:])):
        register, where, bit = place(i, j)
        for lane in where:
            words[register, :, lane] |= codes[:, i, j] << np.uint32(bit)
    return words


def gather(words, place, shape):
    """The array (waves, rows, columns) of 32-bit elements that registers hold."""
    codes = np.zeros(shape, np.uint32)
    for i, j in itertools.product(*map(range, shape[1:])):
        register, (lane,), _ = place(i, j)
        codes[:, i, j] = words[register, :, lane]
    return codes
