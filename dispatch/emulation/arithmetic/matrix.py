"""Matrix instructions on arrays of registers: MFMA (CDNA) and WMMA (RDNA3, RDNA4).

D = A B + C, where A is (m, k), B is (k, n), C and D are (m, n), and an MFMA instruction may compute
several such blocks. Where the elements are follows AMD's matrix instruction calculator
(github.com/ROCm/amd_matrix_instruction_calculator) and, for gfx950, the CDNA4 ISA manual.

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
from attn_dispatch.emulation.arithmetic.numerics import from_bfloat16, to_bfloat16
from attn_dispatch.emulation.errors import KernelFault, UnknownInstruction
from attn_dispatch.emulation.targets import Target

__all__ = ["MatrixShape", "multiply_cdna", "multiply_rdna3", "multiply_rdna4", "shape_of"]

_F64 = NDArray[np.float64]
_U32 = NDArray[np.uint32]
#: Larger temporary arrays leave the cache, and each call gets their pages from the system again.
_PRODUCTS_AT_ONCE = 1 << 14
_SMALLEST_FLOAT32 = 2.0**-126
_SMALLEST_FLOAT16 = 2.0**-14

_MFMA = re.compile(r"v_mfma_(f32|i32)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?([a-z]\w+)")
_WMMA = re.compile(r"v_wmma_(f32|i32|f16|bf16)_(16)x(16)x(16)_([a-z]\w+)")
_BITS = {"f32": 32, "xf32": 32, "i32": 32, "f16": 16, "bf16": 16}
#: Elements of A in a lane, in the instructions with several blocks that do not name their number.
_ELEMENTS_IN_LANE = {"f32": 1, "f16": 4, "bf16_1k": 4, "bf16": 2, "i8": 4}


@dataclass(frozen=True)
class MatrixShape:
    """A form of a matrix instruction.

    Attributes:
        m: rows of A and D.
        n: columns of B and D.
        k: columns of A and rows of B.
        blocks: independent products.
        a_format: "f32", "xf32", "f16", "bf16", "i8", "u8", or a key of `fp8.FORMATS`.
        b_format: the same for B.
        accumulator: format of C and D: "f32", "i32", "f16" or "bf16".
        lanes: of a wave.
        rows_in_lane: consecutive rows of D that a lane holds, before another lane has the next row.
        source_blocks: the block of A that each block multiplies; empty: its own (cbsz and abid).
        flushes_denormals: denormal numbers of A, B, C and D are zero (gfx90a, 16-bit operands).
        is_duplicated: A and B must be in both halves of the wave (RDNA3).
    """

    m: int
    n: int
    k: int
    blocks: int
    a_format: str
    b_format: str
    accumulator: str
    lanes: int
    rows_in_lane: int
    source_blocks: tuple[int, ...] = ()
    flushes_denormals: bool = False
    is_duplicated: bool = False

    @property
    def input_registers(self) -> int:
        """Registers of A, and of B."""
        lanes = self.lanes // 2 if self.is_duplicated else self.lanes
        return self.m * self.k * self.blocks * _BITS.get(self.a_format, 8) // (32 * lanes)

    @property
    def accumulator_registers(self) -> int:
        """Registers of C, and of D. On RDNA3 only a half of each has a 16-bit accumulator."""
        bits = 32 if self.is_duplicated else _BITS[self.accumulator]
        return self.m * self.n * self.blocks * bits // (32 * self.lanes)


def shape_of(
    opcode: str,
    target: Target,
    *,
    cbsz: int = 0,
    abid: int = 0,
    blgp: int = 0,
    neg_lo: tuple[int, ...] = (0, 0, 0),
) -> MatrixShape:
    """The form of a matrix instruction, from its name and its modifiers.

    Args:
        opcode: such as "v_mfma_f32_32x32x8_f16", "v_mfma_f32_32x32x8bf16_1k" (gfx90a) or
            "v_wmma_f32_16x16x16_bf16".
        target: decides on the layout and on what "fp8" and "bf8" are.
        cbsz: logarithm of the number of blocks that share a block of A; for "f8f6f4", A's format.
        abid: which block they share.
        blgp: for "f8f6f4", B's format.
        neg_lo: for "iu8", whether A and B have a sign.

    Raises:
        UnknownInstruction: no matrix instruction that Triton emits, or not with these modifiers.
    """
    if match := _MFMA.fullmatch(opcode):
        return _mfma_shape(match, target, cbsz, abid, blgp)
    if match := _WMMA.fullmatch(opcode):
        return _wmma_shape(match, target, neg_lo)
    raise UnknownInstruction(f"{opcode} is not a matrix instruction that the emulator knows.")


def _mfma_shape(
    match: re.Match[str], target: Target, cbsz: int, abid: int, blgp: int
) -> MatrixShape:
    accumulator, element = match[1], match[6]
    m, n, k = int(match[2]), int(match[3]), int(match[4])
    blocks = int(match[5] or max(1, 64 * _ELEMENTS_IN_LANE.get(element, 0) // (m * k)))
    source_blocks: tuple[int, ...] = ()
    if element == "f8f6f4":
        if cbsz > 1 or blgp > 1:
            raise UnknownInstruction(f"{match[0]} of 4- and 6-bit formats is not emulated.")
        element = f"{('fp8', 'bf8')[cbsz]}_{('fp8', 'bf8')[blgp]}"
    elif blgp or 1 << cbsz > blocks or abid >= 1 << cbsz:
        raise UnknownInstruction(
            f"{match[0]} with cbsz:{cbsz} abid:{abid} blgp:{blgp} is not emulated."
        )
    elif cbsz:
        source_blocks = tuple((block >> cbsz << cbsz) + abid for block in range(blocks))
    a_format, b_format = _formats(match[0], element.removesuffix("_1k"), target)
    return MatrixShape(
        m, n, k, blocks, a_format, b_format, accumulator, 64, 4, source_blocks,
        flushes_denormals=target.name == "gfx90a" and a_format in ("f16", "bf16"),
    )  # fmt: skip


def _wmma_shape(match: re.Match[str], target: Target, neg_lo: tuple[int, ...]) -> MatrixShape:
    m, n, k = int(match[2]), int(match[3]), int(match[4])
    if match[5] == "iu8":
        a_format, b_format = ("i8" if signed else "u8" for signed in neg_lo[:2])
    elif any(neg_lo):
        raise UnknownInstruction(f"{match[0]} with neg_lo is not emulated.")
    else:
        a_format, b_format = _formats(match[0], match[5], target)
    is_rdna3 = target.generation == 11
    return MatrixShape(
        m, n, k, 1, a_format, b_format, match[1], 32, 1 if is_rdna3 else 8, is_duplicated=is_rdna3
    )


def _formats(opcode: str, element: str, target: Target) -> tuple[str, str]:
    """Formats of A and B."""
    if element in _BITS or element == "i8":
        return element, element
    names = element.split("_")
    if len(names) != 2 or not {*names} <= {"fp8", "bf8"}:
        raise UnknownInstruction(f"{opcode}: the emulator does not know the type {element!r}.")
    return fp8.format_of(names[0], target.has_fnuz), fp8.format_of(names[1], target.has_fnuz)


def multiply_cdna(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _U32:
    """D = A B + C on CDNA (v_mfma_*). EXEC has no effect.

    Args:
        shape: from `shape_of`.
        a: packed elements, (shape.input_registers, waves, 64).
        b: the same.
        c: accumulators, (shape.accumulator_registers, waves, 64) of float32, or int32 for integer
            products, or the bits of either; or a constant.

    Returns:
        The bits of D, (shape.accumulator_registers, waves, 64).
    """
    return _multiply(shape, a, b, c)


def multiply_rdna4(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _U32:
    """D = A B + C on RDNA4 (v_wmma_*), for which all lanes must be active.

    Args:
        shape: from `shape_of`.
        a: packed elements, (shape.input_registers, waves, 32).
        b: the same.
        c: accumulators, (shape.accumulator_registers, waves, 32) of 32 bits, in which accumulators
            of 16 bits are packed in pairs; or a constant.

    Returns:
        The bits of D, (shape.accumulator_registers, waves, 32).
    """
    if _BITS[shape.accumulator] == 32:
        return _multiply(shape, a, b, c)
    if isinstance(c, np.ndarray):
        words = c.view(np.uint32)
        halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=1)
        c = _from_16_bits(halves.reshape(-1, *c.shape[1:]), shape.accumulator)
    rounded = _multiply(shape, a, b, c)
    return np.asarray(rounded[0::2] | rounded[1::2] << np.uint32(16))


def multiply_rdna3(
    shape: MatrixShape,
    a: _U32,
    b: _U32,
    c: NDArray[Any] | float,
    destination: _U32 | None = None,
    in_upper_half: bool = False,
) -> _U32:
    """D = A B + C on RDNA3 (v_wmma_*), for which all lanes must be active.

    Args:
        shape: from `shape_of`.
        a: packed elements, (shape.input_registers, waves, 32). Lanes i and i + 16 hold the same.
        b: the same.
        c: accumulators, (shape.accumulator_registers, waves, 32) of 32 bits; or a constant.
        destination: D's registers before the instruction, for accumulators of 16 bits: the
            instruction keeps the half that it does not write. None means those of C, or zeros.
        in_upper_half: accumulators of 16 bits are in bits 31:16 of C and D (op_sel[2]).

    Returns:
        The bits of D, (shape.accumulator_registers, waves, 32).

    Raises:
        KernelFault: the halves of a wave differ in A or B.
    """
    for name, words in (("A", a), ("B", b)):
        if not np.array_equal(words[..., :16], words[..., 16:]):
            raise KernelFault(
                f"Operand {name} of the WMMA instruction differs between lanes 0 to 15 and lanes "
                "16 to 31. RDNA3 needs it twice: load the same elements in lanes i and i + 16."
            )
    a, b = a[..., :16], b[..., :16]
    if _BITS[shape.accumulator] == 32:
        return _multiply(shape, a, b, c)
    shift = np.uint32(16 if in_upper_half else 0)
    if isinstance(c, np.ndarray):
        registers = c.view(np.uint32)
        destination = registers if destination is None else destination
        c = _from_16_bits(registers >> shift & np.uint32(0xFFFF), shape.accumulator)
    rounded = np.asarray(_multiply(shape, a, b, c) << shift)
    if destination is None:
        return rounded
    kept = np.uint32(0xFFFF if in_upper_half else 0xFFFF0000)
    return np.asarray(rounded | destination & kept)


def _multiply(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _U32:
    """The bits of D: (rows of a lane in all blocks, waves, lanes), with 16 bits not yet packed."""
    waves = a.shape[1]
    step = max(1, _PRODUCTS_AT_ONCE // (shape.m * shape.n * shape.blocks))
    if waves <= step:
        return _rounded(shape, _accumulate(shape, a, b, c))
    result = np.empty((shape.m * shape.n * shape.blocks // shape.lanes, waves, shape.lanes), "u4")
    for start in range(0, waves, step):
        part = slice(start, start + step)
        c_part = c[:, part] if isinstance(c, np.ndarray) else c
        result[:, part] = _rounded(shape, _accumulate(shape, a[:, part], b[:, part], c_part))
    return result


def _accumulate(shape: MatrixShape, a: _U32, b: _U32, c: NDArray[Any] | float) -> _F64:
    """A B + C before it is rounded: (rows of a lane in all blocks, waves, lanes)."""
    left = _dense(shape, a, shape.m, shape.a_format)
    right = _dense(shape, b, shape.n, shape.b_format)
    if shape.source_blocks:
        left = left[:, shape.source_blocks]
    products = np.matmul(left.swapaxes(2, 3), right)  # (waves, blocks, m, n)
    waves = products.shape[0]
    # Lanes hold: blocks (of 4x4), groups of rows, columns. Registers hold: blocks, groups, rows.
    lane_groups = min(shape.m // shape.rows_in_lane, shape.lanes // shape.n)
    lane_blocks = shape.lanes // (shape.n * lane_groups)
    register_groups = shape.m // (lane_groups * shape.rows_in_lane)
    # fmt: off
    split = products.reshape(
        waves, -1, lane_blocks, register_groups, lane_groups, shape.rows_in_lane, shape.n
    )
    # fmt: on
    total: _F64 = split.transpose(1, 3, 5, 0, 2, 4, 6).reshape(-1, waves, shape.lanes)
    if isinstance(c, np.ndarray):
        c = c.view(np.int32 if shape.accumulator == "i32" else np.float32)
        c = _flush(c, _SMALLEST_FLOAT32) if shape.flushes_denormals else c
    return np.add(total, c, out=total)


def _dense(shape: MatrixShape, words: _U32, rows: int, format: str) -> _F64:
    """The transposed A, or B: (waves, blocks, k, rows)."""
    registers, waves, lanes = words.shape
    groups = lanes // (rows * shape.blocks)  # of lanes that hold the same row, with other k
    values = _values(words, format, shape.flushes_denormals)
    split = values.reshape(registers, -1, waves, groups, shape.blocks, rows)
    dense = np.ascontiguousarray(split.transpose(2, 4, 3, 0, 1, 5), dtype=np.float64)
    return dense.reshape(waves, shape.blocks, -1, rows)


def _values(words: _U32, format: str, flush: bool) -> NDArray[Any]:
    """Packed elements as floats: (registers, elements of a word, waves, lanes)."""
    if format in ("f32", "xf32"):
        kept = np.uint32(0xFFFFE000 if format == "xf32" else 0xFFFFFFFF)
        return np.asarray(words & kept).view(np.float32)[:, None]
    if format == "bf16":
        halves = np.stack((words << np.uint32(16), words & np.uint32(0xFFFF0000)), axis=1)
        values = halves.view(np.float32)
        return _flush(values, _SMALLEST_FLOAT32) if flush else values
    words = np.ascontiguousarray(words)
    if format == "f16":
        values = words.view(np.float16).astype(np.float64)
        values = _flush(values, _SMALLEST_FLOAT16) if flush else values
    elif format in ("i8", "u8"):
        values = words.view(np.int8 if format == "i8" else np.uint8).astype(np.float64)
    else:
        # The mode only saves the check of the indices, which are in range.
        values = fp8.decode_table(format).take(words.view(np.uint8), mode="clip")
    return np.moveaxis(values.reshape(*words.shape, -1), -1, 1)


def _flush(x: NDArray[Any], smallest: float) -> NDArray[Any]:
    """Numbers below the smallest normal one become zeros of the same sign."""
    return np.asarray(x * ~(np.abs(x) < x.dtype.type(smallest)))


def _from_16_bits(bits: _U32, format: str) -> NDArray[np.float32]:
    if format == "bf16":
        return np.asarray(from_bfloat16(bits))
    return np.asarray(bits.astype(np.uint16).view(np.float16).astype(np.float32))


def _rounded(shape: MatrixShape, total: _F64) -> _U32:
    """The bits of accumulators: integers wrap around, floats are rounded to nearest even."""
    if shape.accumulator == "i32":
        return total.astype(np.int64).astype(np.uint32)
    if shape.accumulator == "f16":
        return total.astype(np.float16).view(np.uint16).astype(np.uint32)
    nearest = total.astype(np.float32)
    if shape.accumulator == "f32":
        nearest = _flush(nearest, _SMALLEST_FLOAT32) if shape.flushes_denormals else nearest
        return nearest.view(np.uint32)
    # bfloat16: round to odd first, so that the second rounding has the result of a single one.
    truncated = nearest.view(np.uint32) - (np.abs(nearest) > np.abs(total))
    is_inexact = truncated.view(np.float32) != total
    odd = np.asarray(truncated | is_inexact).view(np.float32)
    return np.asarray(to_bfloat16(odd), dtype=np.uint32)
