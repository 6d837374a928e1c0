"""Merge attention over parts of the keys, and pack a part into the messages for other ranks."""

import triton
import triton.language as tl

__all__ = ["merge_kernel", "pack_kernel"]


@triton.jit
def _lse_of(ptr, offsets, ok):
    """Where +inf marks a row without keys, as in FlashAttention 2, it becomes −inf."""
    lse = tl.load(ptr + offsets, mask=ok, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def _weighted(ptr, offsets, stored, lse, shift, total):
    """A part's share of the merged rows: 0 where it has no key, whatever it holds there."""
    x = tl.load(ptr + offsets, mask=stored, other=0.0).to(tl.float32)
    weight = tl.exp(lse - shift) / total
    return tl.where((lse == float("-inf"))[:, None], 0.0, weight[:, None] * x)


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    first_ptr, first_lse_ptr, rest_ptr, rest_lse_ptr, sinks_ptr, out_ptr, merged_lse_ptr, num_rows,
    first_stride_t, first_stride_h, first_stride_g, first_lse_stride_t, first_lse_stride_h,
    first_lse_stride_g, rest_stride_p, rest_stride_t, rest_stride_h, rest_stride_g,
    rest_lse_stride_p, rest_lse_stride_t, rest_lse_stride_h, rest_lse_stride_g, out_stride_t,
    out_stride_h,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, REST: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge parts by their LSE, as `merge_states` does; a row is a head of a token.

    Grid: (ceil(num_rows / ROWS),). `out_ptr` may be `first_ptr`; `merged_lse_ptr` is memory of its
    own, because other threads may read a row's LSE later than one of them stores it.

    Args:
        first_ptr: (tokens, NUM_HEADS // GROUP, GROUP, SIZE), the first part; first_lse_ptr without
            SIZE. Strides that end in g are those of GROUP, not read where it is 1.
        rest_ptr: (REST, tokens, NUM_HEADS // GROUP, GROUP, SIZE), the others; rest_lse_ptr without
            SIZE.
        sinks_ptr: (NUM_HEADS,), not read without SINKS.
        out_ptr: (tokens, NUM_HEADS, SIZE), written.
        merged_lse_ptr: (tokens, NUM_HEADS) float32, contiguous, written; without the sinks.
        num_rows: tokens * NUM_HEADS.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = rows < num_rows
    tokens = (rows // NUM_HEADS).to(tl.int64)
    heads = (rows % NUM_HEADS).to(tl.int64)
    d_idx = tl.arange(0, BLOCK_D)
    stored = ok[:, None] & (d_idx < SIZE)[None, :]

    first_at = tokens * first_lse_stride_t + heads // GROUP * first_lse_stride_h
    rest_at = tokens * rest_lse_stride_t + heads // GROUP * rest_lse_stride_h
    first_row = tokens * first_stride_t + heads // GROUP * first_stride_h
    rest_row = tokens * rest_stride_t + heads // GROUP * rest_stride_h
    if GROUP > 1:
        in_group = heads % GROUP
        first_at += in_group * first_lse_stride_g
        rest_at += in_group * rest_lse_stride_g
        first_row += in_group * first_stride_g
        rest_row += in_group * rest_stride_g
    first_lse = _lse_of(first_lse_ptr, first_at, ok)
    largest = first_lse
    for part in tl.static_range(REST):
        at = rest_at + part * rest_lse_stride_p
        largest = tl.maximum(largest, _lse_of(rest_lse_ptr, at, ok))
    # A NaN among the LSEs is in the sum, whether or not a maximum drops it.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.exp(first_lse - shift)
    for part in tl.static_range(REST):
        at = rest_at + part * rest_lse_stride_p
        total += tl.exp(_lse_of(rest_lse_ptr, at, ok) - shift)
    tl.store(merged_lse_ptr + rows, shift + tl.log(total), mask=ok)
    if SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=ok, other=0.0).to(tl.float32)
        total += tl.exp(sinks - shift)

    x = _weighted(
        first_ptr,
        first_row[:, None] + d_idx[None, :],
        stored,
        first_lse,
        shift,
        total,
    )
    rest_offsets = rest_row[:, None] + d_idx[None, :]
    for part in tl.static_range(REST):
        lse = _lse_of(rest_lse_ptr, rest_at + part * rest_lse_stride_p, ok)
        x += _weighted(rest_ptr, rest_offsets + part * rest_stride_p, stored, lse, shift, total)
    offsets = (tokens * out_stride_t + heads * out_stride_h)[:, None] + d_idx[None, :]
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_rows", "failed"])
def pack_kernel(
    out_ptr, lse_ptr, outs_ptr, lses_ptr, flags_ptr, num_rows, failed, out_stride_t, out_stride_h,
    lse_stride_t, lse_stride_h, outs_stride_p, lses_stride_p, flags_stride_p,
    NUM_HEADS: tl.constexpr, PIECES: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Copy outputs and LSE into PIECES messages, each with an equal range of the heads.

    Grid: (max(1, ceil(num_rows / ROWS)),).

    Args:
        out_ptr: (tokens, NUM_HEADS, SIZE); lse_ptr (tokens, NUM_HEADS).
        outs_ptr: (PIECES, tokens, NUM_HEADS // PIECES, SIZE), written, each piece contiguous; the
            pieces are outs_stride_p apart. lses_ptr the same without SIZE.
        flags_ptr: one number for each piece, written, flags_stride_p apart: `failed`, 0 or 1.
        num_rows: tokens * NUM_HEADS.
        failed: if 1, the LSE is NaN in the messages, and so is the merged output.
    """
    COUNT: tl.constexpr = NUM_HEADS // PIECES
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = rows < num_rows
    tokens = (rows // NUM_HEADS).to(tl.int64)
    heads = (rows % NUM_HEADS).to(tl.int64)
    pieces = heads // COUNT
    places = tokens * COUNT + heads % COUNT
    lse = tl.load(lse_ptr + tokens * lse_stride_t + heads * lse_stride_h, mask=ok, other=0.0)
    lse = tl.where(failed != 0, float("nan"), lse)
    tl.store(lses_ptr + pieces * lses_stride_p + places, lse, mask=ok)
    d_idx = tl.arange(0, BLOCK_D)
    stored = ok[:, None] & (d_idx < SIZE)[None, :]
    source = (tokens * out_stride_t + heads * out_stride_h)[:, None] + d_idx[None, :]
    target = (pieces * outs_stride_p + places * SIZE)[:, None] + d_idx[None, :]
    tl.store(outs_ptr + target, tl.load(out_ptr + source, mask=stored, other=0.0), mask=stored)
    if tl.program_id(0) == 0:
        for piece in tl.static_range(PIECES):
            tl.store(flags_ptr + piece * flags_stride_p, failed.to(tl.float32))
