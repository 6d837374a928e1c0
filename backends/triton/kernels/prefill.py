"""Attention of many query tokens: each program takes one tile of rows of one KV head.

The tiles come from a list that the host lays out once per batch, the most work first, so that the
last programs to start are short ones. KV heads vary fastest, so that what runs at the same time
shares its keys in the cache.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.epilogue import store_rows
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E, attend, reach, sees_nothing
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["prefill_kernel"]


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=METADATA)
def prefill_kernel(
    q_ptr,
    k_src,
    v_src,
    out_ptr,
    lse_ptr,
    out_scale_ptr,
    tiles_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    key_start_loc_ptr,
    block_table_ptr,
    k_row_scales_ptr,
    v_row_scales_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slopes_ptr,
    sinks_ptr,
    mask_ptr,
    mask_starts_ptr,
    ranges_ptr,
    range_starts_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    window,
    scale_log2,
    cap_log2,
    scale_over_cap,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FAST_TANH: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    RANGES: tl.constexpr,
    MASK: tl.constexpr,
    LSE: tl.constexpr,
    OUT_FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
):
    """Attention of the rows in `tiles`.

    Grid: (num_kv_heads, num_tiles).

    Args:
        q_ptr: (num_tokens, NUM_HEADS, HEAD_SIZE).
        k_src, v_src, key_start_loc_ptr, k_row_scales_ptr, v_row_scales_ptr: see attend.py; keys
            are found by SOURCE.
        tiles_ptr: (num_tiles, 2) int32, the request and its first row.
        k_scale_ptr, v_scale_ptr: float32 scales of an fp8 cache, SCALE_STRIDE apart for the heads.
        mask_starts_ptr: (num_reqs,) int64, where each request's mask begins.
        range_starts_ptr: (num_reqs + 1,) int32, where each request's ranges begin.
    """
    kv_head = tl.program_id(0)
    request = tl.load(tiles_ptr + 2 * tl.program_id(1))
    first_row_of_tile = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    q_start = tl.load(query_start_loc_ptr + request)
    q_len = tl.load(query_start_loc_ptr + request + 1) - q_start
    seq_len = tl.load(seq_lens_ptr + request)

    rows = first_row_of_tile + tl.arange(0, BLOCK_M)
    ok = rows < q_len * GROUP
    tokens = tl.where(ok, rows // GROUP, -1)
    heads = kv_head * GROUP + rows % GROUP
    past = seq_len - q_len
    q_pos = past + rows // GROUP
    first_position = past + first_row_of_tile // GROUP
    last_row = tl.minimum(first_row_of_tile + BLOCK_M, q_len * GROUP) - 1
    last_position = past + last_row // GROUP

    d_idx = tl.arange(0, BLOCK_D)
    q_ok = ok[:, None]
    if HEAD_SIZE != BLOCK_D:
        q_ok = q_ok & (d_idx < HEAD_SIZE)[None, :]
    q_rows = (q_start + rows // GROUP).to(tl.int64)
    q_offsets = (
        q_rows[:, None] * q_stride_t + (heads.to(tl.int64) * q_stride_h)[:, None] + d_idx[None, :]
    )
    q = tl.load(q_ptr + q_offsets, mask=q_ok, other=0.0)

    first_range = 0
    last_range = 0
    if RANGES:
        first_range = tl.load(range_starts_ptr + request)
        last_range = tl.load(range_starts_ptr + request + 1)
    request_mask = mask_ptr
    if MASK:
        request_mask = mask_ptr + tl.load(mask_starts_ptr + request)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=ok, other=0.0) * LOG2E
    v_scale = 1.0
    if (FORMAT != "plain") & (FORMAT != "int8"):
        scale_log2 *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
        scale_over_cap *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
        v_scale = tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)

    # Tiles of keys: those that rows see in part, those that every row sees whole, and again.
    lo, hi = reach(
        first_position, last_position, seq_len, window, ranges_ptr, first_range, last_range,
        CAUSAL, WINDOW, RANGES,
    )  # fmt: skip
    full_lo = 0
    full_hi = seq_len
    if CAUSAL:
        full_hi = tl.minimum(seq_len, first_position + 1)
    if WINDOW:
        full_lo = tl.maximum(0, last_position - window + 1)
        if not CAUSAL:
            full_hi = tl.minimum(seq_len, first_position + window)
    first_tile = lo // BLOCK_N
    last_tile = tl.maximum(tl.cdiv(hi, BLOCK_N), first_tile)
    full_first = first_tile
    if WINDOW or RANGES:
        full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N), first_tile), last_tile)
    full_last = tl.maximum(tl.minimum(full_hi // BLOCK_N, last_tile), full_first)
    if MASK:
        full_first = first_tile
        full_last = first_tile

    first_row = 0
    block_table = block_table_ptr
    k_head = k_src
    v_head = v_src
    k_row_scales = k_row_scales_ptr
    v_row_scales = v_row_scales_ptr
    if SOURCE == "pages":
        block_table = block_table_ptr + request.to(tl.int64) * table_stride
    else:
        first_row = tl.load(key_start_loc_ptr + request)
    if SOURCE != "descriptors":
        k_head = k_src + kv_head.to(tl.int64) * k_stride_h
        v_head = v_src + kv_head.to(tl.int64) * v_stride_h
    if FORMAT == "int8":
        k_row_scales = k_row_scales_ptr + kv_head.to(tl.int64) * k_stride_h // 4
        v_row_scales = v_row_scales_ptr + kv_head.to(tl.int64) * v_stride_h // 4

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if WINDOW or RANGES:
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, q_pos, tokens, slopes, first_tile, full_first, lo, hi, seq_len,
            k_head, v_head, k_row_scales, v_row_scales, block_table, first_row, kv_head,
            k_stride_b, k_stride_t, v_stride_b, v_stride_t, request_mask, ranges_ptr, first_range,
            last_range, window, scale_log2, cap_log2, scale_over_cap, True, SOURCE, FORMAT, NATIVE,
            CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI, RANGES, MASK, BLOCK_SIZE, HEAD_SIZE,
            HEAD_SIZE_V, BLOCK_N, STAGES,
        )  # fmt: skip
    if not MASK:
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, q_pos, tokens, slopes, full_first, full_last, lo, hi, seq_len,
            k_head, v_head, k_row_scales, v_row_scales, block_table, first_row, kv_head,
            k_stride_b, k_stride_t, v_stride_b, v_stride_t, request_mask, ranges_ptr, first_range,
            last_range, window, scale_log2, cap_log2, scale_over_cap, False, SOURCE, FORMAT,
            NATIVE, CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI, RANGES, MASK, BLOCK_SIZE, HEAD_SIZE,
            HEAD_SIZE_V, BLOCK_N, STAGES,
        )  # fmt: skip
    acc, m_i, l_i = attend(
        acc, m_i, l_i, q, q_pos, tokens, slopes, full_last, last_tile, lo, hi, seq_len,
        k_head, v_head, k_row_scales, v_row_scales, block_table, first_row, kv_head, k_stride_b,
        k_stride_t, v_stride_b, v_stride_t, request_mask, ranges_ptr, first_range, last_range,
        window, scale_log2, cap_log2, scale_over_cap, True, SOURCE, FORMAT, NATIVE, CAUSAL, WINDOW,
        CAP, FAST_TANH, ALIBI, RANGES, MASK, BLOCK_SIZE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, STAGES,
    )  # fmt: skip
    nothing = sees_nothing(
        m_i, l_i, q_pos, seq_len, window, CAUSAL, WINDOW, RANGES, MASK
    )  # fmt: skip
    store_rows(
        acc, m_i, l_i, q_start + rows // GROUP, heads, ok, nothing, v_scale, out_ptr, out_stride_t,
        out_stride_h, lse_ptr, sinks_ptr, out_scale_ptr, NUM_HEADS, HEAD_SIZE_V, SINKS, LSE,
        OUT_FORMAT, OUT_GROUP,
    )  # fmt: skip
