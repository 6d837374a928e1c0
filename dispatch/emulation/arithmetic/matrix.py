"""Matrix instructions on arrays of registers: MFMA (CDNA) and WMMA (RDNA3, RDNA4).

D = A B + C, where A is (size, k), B is (k, size), C and D are (size, size) of 32 bits. Where the
elements are follows AMD's matrix instruction calculator
(github.com/ROCm/amd_matrix_instruction_calculator) and, for gfx950, the CDNA4 ISA manual.
Instructions of several blocks (such as 4x4x4) and accumulators of 16 bits are not emulated: Triton
emits them for no kernel of this library.

The order of k in the registers is not modelled: it is the same in A and B, so that every element
meets its partner, and sums are taken in float64, where the order hardly matters.

Accuracy: products are exact. Their sum with C is taken in float64 and rounded once, to nearest
even. AMD does not specify the order and the precision of the sum. arXiv:2511.10909 (MMA-Sim)
measured them: float32 is a chain of fused multiply-adds; CDNA2 rounds sums of 4 products of 16 bits
to float32; CDNA3 aligns 8 products of 16 bits, or 16 of 8 bits, to 24 fractional bits, rounds down,
and adds them to C. So hardware differs from the emulator by a few units in the last place of the
largest product or sum. CDNA2 flushes denormal numbers of float16 and bfloat16 operands, of C and of
D (AMD, "MI200 MFMA behavior specifics"), and xf32 drops the lower 13 bits of float32: both are
modelled. A sum of zeros is +0, and the sign and payload of a NaN are those of the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.arithmetic import fp8
from attn_dispatch.emulation.arithmetic.numerics import flush_denormals
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from attn_dispatch.emulation.targets import Target

__all__ = ["MatrixShape", "multiply", "shape_of"]

_F64 = NDArray[np.float64]
_U32 = NDArray[np.uint32]
#: Larger temporary arrays leave the cache, and each call gets their pages from the system again.
_PRODUCTS_AT_ONCE = 1 << 14
_SMALLEST_FLOAT16 = np.float16(2.0**-14)

_MFMA = re.compile(r"v_mfma_(f32|i32)_(16x16|32x32)x(\d+)_?([a-z]\w+)")
_WMMA = re.compile(r"v_wmma_(f32|i32)_(16x16)x(16)_([a-z]\w+)")
_BITS = {"f32": 32, "xf32": 32, "f16": 16, "bf16": 16}


@dataclass(frozen=True)
class MatrixShape:
    """A form of a matrix instruction.

    Attributes:
        size: rows of A, C and D, and columns of B, C and D.
        k: columns of A and rows of B.
        a_format: "f32", "xf32", "f16", "bf16", "i8", "u8", or a key of `fp8.FORMATS`.
        b_format: the same for B.
        accumulator: format of C and D: "f32" or "i32".
        lanes: of a wave.
        rows_in_lane: consecutive rows of D that a lane holds, before another lane has the next row.
        flushes_denormals: denormal numbers of A, B, C and D are zero (gfx90a, 16-bit operands).
        is_duplicated: A and B must be in both halves of the wave (RDNA3).
    """

    size: int
    k: int
    a_format: str
    b_format: str
    accumulator: str
    lanes: int
    rows_in_lane: int
    flushes_denormals: bool = False
    is_duplicated: bool = False

    @property
    def input_registers(self) -> int:
        """Registers of A, and of B."""
        lanes = self.lanes // 2 if self.is_duplicated else self.lanes
        return self.size * self.k * _BITS.get(self.a_format, 8) // (32 * lanes)

    @property
    def accumulator_registers(self) -> int:
        """Registers of C, and of D."""
        return self.size**2 // self.lanes


def shape_of(
    opcode: str,
    target: Target,
    *,
    cbsz: int = 0,
    blgp: int = 0,
    neg_lo: tuple[int, ...] = (0, 0, 0),
) -> MatrixShape:
    """The form of a matrix instruction, from its name and its modifiers.

    Args:
        opcode: such as "v_mfma_f32_32x32x8_f16", "v_mfma_f32_32x32x8bf16_1k" (gfx90a) or
            "v_wmma_f32_16x16x16_bf16".
        target: decides on the layout and on what "fp8" and "bf8" are.
        cbsz: for "f8f6f4", A's format.
        blgp: for "f8f6f4", B's format.
        neg_lo: for "iu8", whether A and B have a sign.

    Raises:
        UnknownInstruction: no matrix instruction that the emulator knows, or not with these
            modifiers.
    """
    match = (_MFMA if target.is_cdna else _WMMA).fullmatch(opcode)
    if not match:
        raise UnknownInstruction(f"{opcode} is not a matrix instruction that the emulator knows.")
    accumulator, size, k, element = match[1], int(match[2][:2]), int(match[3]), match[4]
    if element == "f8f6f4":
        if cbsz > 1 or blgp > 1:
            raise UnknownInstruction(f"{opcode} of 4- and 6-bit formats is not emulated.")
        element = f"{('fp8', 'bf8')[cbsz]}_{('fp8', 'bf8')[blgp]}"
    elif cbsz or blgp:
        raise UnknownInstruction(f"{opcode} with cbsz:{cbsz} blgp:{blgp} is not emulated.")
    if element == "iu8":
        a_format, b_format = ("i8" if signed else "u8" for signed in neg_lo[:2])
    elif any(neg_lo):
        raise UnknownInstruction(f"{opcode} with neg_lo is not emulated.")
    else:
        a_format, b_format = _formats(opcode, element.removesuffix("_1k"), target)
    if target.is_cdna:
        flushes = target.name == "gfx90a" and a_format in ("f16", "bf16")
        return MatrixShape(size, k, a_format, b_format, accumulator, 64, 4, flushes)
    is_rdna3 = target.generation == 11
    rows_in_lane = 1 if is_rdna3 else 8
    return MatrixShape(
        size, k, a_format, b_format, accumulator, 32, rows_in_lane, is_duplicated=is_rdna3
    )


def _formats(opcode: str, element: str, target: Target) -> tuple[str, str]:
    """Formats of A and B."""
    if element in _BITS or element == "i8":
        return element, element
    names = element.split("_")
    if len(names) != 2 or not {*names} <= {"fp8", "bf8"}:
        raise UnknownInstruction(f"{opcode}: the emulator does not know the type {element!r}.")
    return fp8.format_of(names[0], target.has_fnuz), fp8.format_of(names[1], target.has_fnuz)


def multiply(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _U32:
    """D = A B + C.

    Args:
        shape: from `shape_of`.
        a: packed elements, (shape.input_registers, waves, shape.lanes). On RDNA3 lanes i and i + 16
            hold the same.
        b: the same.
        c: accumulators, (shape.accumulator_registers, waves, shape.lanes) of float32, or int32 for
            integer products, or the bits of either; or a constant.

    Returns:
        The bits of D, (shape.accumulator_registers, waves, shape.lanes).

    Raises:
        KernelFault: on RDNA3, the halves of a wave differ in A or B.
    """
    if shape.is_duplicated:
        a, b = _lower_lanes("A", a), _lower_lanes("B", b)
    waves = a.shape[1]
    step = max(1, _PRODUCTS_AT_ONCE // shape.size**2)
    if waves <= step:
        return _multiply(shape, a, b, c)
    result = np.empty((shape.accumulator_registers, waves, shape.lanes), np.uint32)
    for start in range(0, waves, step):
        part = slice(start, start + step)
        c_part = c[:, part] if isinstance(c, np.ndarray) else c
        result[:, part] = _multiply(shape, a[:, part], b[:, part], c_part)
    return result


def _lower_lanes(name: str, words: _U32) -> _U32:
    if not np.array_equal(words[..., :16], words[..., 16:]):
        raise KernelFault(
            f"Operand {name} of the WMMA instruction differs between lanes 0 to 15 and lanes "
            "16 to 31. RDNA3 needs it twice: load the same elements in lanes i and i + 16."
        )
    return words[..., :16]


def _multiply(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _U32:
    """`multiply`, for a number of waves whose products fit in the cache."""
    left, right = _dense(shape, a, shape.a_format), _dense(shape, b, shape.b_format)
    products = np.matmul(left.swapaxes(1, 2), right)  # (waves, rows, columns)
    # Lanes hold groups of rows, and columns. Registers hold groups of rows, and their rows.
    lane_groups = shape.lanes // shape.size
    split = products.reshape(len(products), -1, lane_groups, shape.rows_in_lane, shape.size)
    total: _F64 = split.transpose(1, 3, 0, 2, 4).reshape(-1, len(products), shape.lanes)
    if isinstance(c, np.ndarray):
        c = c.view(np.int32 if shape.accumulator == "i32" else np.float32)
        c = flush_denormals(c) if shape.flushes_denormals else c
    np.add(total, c, out=total)
    if shape.accumulator == "i32":  # wraps around
        return total.astype(np.int64).astype(np.uint32)
    nearest = total.astype(np.float32)
    nearest = flush_denormals(nearest) if shape.flushes_denormals else nearest
    return nearest.view(np.uint32)


def _dense(shape: MatrixShape, words: _U32, format: str) -> _F64:
    """The transposed A, or B: (waves, k, size)."""
    registers, waves, lanes = words.shape
    groups = lanes // shape.size  # of lanes that hold the same row, with other k
    values = _values(words, format, shape.flushes_denormals)
    split = values.reshape(registers, -1, waves, groups, shape.size)
    dense = np.ascontiguousarray(split.transpose(2, 3, 0, 1, 4), dtype=np.float64)
    return dense.reshape(waves, shape.k, shape.size)


def _values(words: _U32, format: str, flush: bool) -> NDArray[Any]:
    """Packed elements as floats: (registers, elements of a word, waves, lanes)."""
    if format in ("f32", "xf32"):
        kept = np.uint32(0xFFFFE000 if format == "xf32" else 0xFFFFFFFF)
        return np.asarray(words & kept).view(np.float32)[:, None]
    if format == "bf16":
        halves = np.stack((words << np.uint32(16), words & np.uint32(0xFFFF0000)), axis=1)
        values = halves.view(np.float32)
        return flush_denormals(values) if flush else values
    words = np.ascontiguousarray(words)
    if format == "f16":
        values = words.view(np.float16)
        values = flush_denormals(values, _SMALLEST_FLOAT16) if flush else values
    elif format in ("i8", "u8"):
        values = words.view(np.int8 if format == "i8" else np.uint8).astype(np.float64)
    else:
        # The mode only saves the check of the indices, which are in range.
        values = fp8.decode_table(format).take(words.view(np.uint8), mode="clip")
    return np.moveaxis(values.reshape(*words.shape, -1), -1, 1)
