"""Attention of few query tokens over long keys: the keys are split, in one launch.

The work is one line: for each request, for each tile of its rows, for each KV head, the tiles of
keys that they see. A fixed number of programs share it, so that a captured graph serves any
lengths, and each finds its place by a prefix sum over the requests that it makes itself: nothing is
read on the host. Parts of a split are kept as normalized float32 outputs with their log2-sums, and
the last program to arrive at a split, by an atomic counter, merges them (split softmax as in
Flash-Decoding; the schedule is ours).

Two schedules: `decode_kernel` gives every program an equal share of the line, wherever that cuts.
`decode_invariant_kernel` cuts each request into the same parts whatever else is in the batch, so
that its result has the same bits.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.epilogue import store_rows
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E, LOWEST, attend, sees_nothing
from attn_dispatch.backends.triton.kernels.online_softmax_packed import attend_pairs
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["decode_invariant_kernel", "decode_kernel"]


@triton.jit
def _request(requests_ptr, i, HAS_REQUEST_LIST: tl.constexpr):
    """The i-th request of this launch."""
    if HAS_REQUEST_LIST:
        return tl.load(requests_ptr + i)
    else:
        return i


@triton.jit
def _tiles_of(
    i, ok, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    HAS_REQUEST_LIST: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(tiles of keys, tiles of rows, first tile of keys) of the i-th requests, a vector or one."""
    r = i
    if HAS_REQUEST_LIST:
        r = tl.load(requests_ptr + i, mask=ok, other=0)
    seq_len = tl.load(seq_lens_ptr + r, mask=ok, other=0)
    start = tl.load(query_start_loc_ptr + r, mask=ok, other=0)
    q_len = tl.load(query_start_loc_ptr + r + 1, mask=ok, other=0) - start
    first = seq_len * 0
    if WINDOW:  # keys that no query of the request sees
        first = tl.maximum(seq_len - q_len - window + 1, 0) // BLOCK_N
    tiles = tl.maximum((seq_len + BLOCK_N - 1) // BLOCK_N - first, 0)
    row_tiles = (q_len * GROUP + ROWS - 1) // ROWS
    return tiles, row_tiles, first


@triton.jit
def _find(
    position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    PER_TILE: tl.constexpr, PARTS_OF_EACH: tl.constexpr, HAS_REQUEST_LIST: tl.constexpr,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(i, base): the request that a position on the line falls to, and where its stretch begins.

    The line counts tiles of keys, or with PARTS_OF_EACH parts of a split, so many for each.
    """
    i = 0
    base = (position * 0).to(tl.int64)
    running = (position * 0).to(tl.int64)
    for begin in range(0, num_reqs, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        ok = offs < num_reqs
        tiles, row_tiles, _ = _tiles_of(
            offs, ok, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST, WINDOW,
            GROUP, ROWS, BLOCK_N,
        )  # fmt: skip
        if PER_TILE:
            length = tiles.to(tl.int64) * row_tiles * NUM_KV_HEADS
        else:
            length = tl.where(tiles > 0, row_tiles.to(tl.int64) * NUM_KV_HEADS * PARTS_OF_EACH, 0)
        ends = tl.cumsum(length, 0) + running
        before = (ends <= position) & ok
        i += tl.sum(before.to(tl.int32))
        base = tl.maximum(base, tl.max(tl.where(before, ends, 0)))
        running += tl.sum(length)
    return i, base


@triton.jit
def _total(
    num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    PER_TILE: tl.constexpr, PARTS_OF_EACH: tl.constexpr, HAS_REQUEST_LIST: tl.constexpr,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The length of the line."""
    total = (num_reqs * 0).to(tl.int64)
    for begin in range(0, num_reqs, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        tiles, row_tiles, _ = _tiles_of(
            offs, offs < num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
            WINDOW, GROUP, ROWS, BLOCK_N,
        )  # fmt: skip
        if PER_TILE:
            total += tl.sum(tiles.to(tl.int64) * row_tiles) * NUM_KV_HEADS
        else:
            parts = tl.where(tiles > 0, row_tiles, 0)
            total += tl.sum(parts.to(tl.int64)) * NUM_KV_HEADS * PARTS_OF_EACH
    return total


@triton.jit
def _slot(first_slot, part, BALANCED: tl.constexpr):
    """Where a part of a split is kept.

    With BALANCED every program has two places: one for the split that it begins with and which
    began before it, and one for the split that begins with it. Else the parts follow each other.
    """
    slot = (first_slot + part).to(tl.int64)
    if BALANCED:
        slot = slot * 2 + (slot == first_slot).to(tl.int64)
    return slot


@triton.jit
def _merge_tile(
    first_slot, parts, part_out_ptr, part_lse_ptr, ok,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """The state over a few parts of a split, (acc, m_i, l_i) as `attend` has it, all rows."""
    rows = tl.arange(0, ROWS)
    d_idx = tl.arange(0, BLOCK_DV)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for part in range(0, parts):
        at = _slot(first_slot, part, BALANCED) * ROWS + rows
        lse = tl.load(part_lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        out = tl.load(
            part_out_ptr + at[:, None] * BLOCK_DV + d_idx[None, :], mask=ok[:, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m_i, lse)
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        weight = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + weight
        acc = acc * alpha[:, None] + out * weight[:, None]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _merge_row(
    first_slot, parts, row, part_out_ptr, part_lse_ptr,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, BALANCED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The state over many parts of a split, of one row: (1, BLOCK_DV), (1,), (1,)."""
    d_idx = tl.arange(0, BLOCK_DV)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        part = begin + tl.arange(0, AT_ONCE)
        ok = part < parts
        at = _slot(first_slot, part, BALANCED) * ROWS + row
        lse = tl.load(part_lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        out = tl.load(
            part_out_ptr + at[:, None] * BLOCK_DV + d_idx[None, :], mask=ok[:, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        weight = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(out * weight[:, None], 0)[None, :]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _attend_part(
    request, unit, first_tile, last_tile, is_whole, part, parts, first_slot,
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr, part_lse_ptr, counters_ptr,
    query_start_loc_ptr, seq_lens_ptr, block_table_ptr, k_row_scales_ptr, v_row_scales_ptr,
    k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr, mask_starts_ptr, ranges_ptr,
    range_starts_ptr, q_stride_t, q_stride_h, stride_b, stride_t, stride_h, out_stride_t,
    out_stride_h, table_stride, window, scale_log2, cap_log2, scale_over_cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr, PAIRS: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    FAST_TANH: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, RANGES: tl.constexpr,
    MASK: tl.constexpr, LSE: tl.constexpr, OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr,
    FEW: tl.constexpr, AT_ONCE: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles [first_tile, last_tile) of keys; store the result, or the part.

    Args:
        unit: which KV head and tile of rows: kv_head + NUM_KV_HEADS * tile of rows.
        is_whole: these are all the tiles that the unit has.
        part, parts, first_slot: else, which part of how many, and where the first is kept.
    """
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    kv_head = unit % NUM_KV_HEADS
    rows = tl.arange(0, ROWS)
    packed = unit // NUM_KV_HEADS * ROWS + rows
    seq_len = tl.load(seq_lens_ptr + request)
    q_start = tl.load(query_start_loc_ptr + request)
    q_len = tl.load(query_start_loc_ptr + request + 1) - q_start
    ok = packed < q_len * GROUP
    tokens = tl.where(ok, packed // GROUP, -1)
    heads = kv_head * GROUP + packed % GROUP
    q_pos = seq_len - q_len + packed // GROUP
    q_rows = (q_start + packed // GROUP).to(tl.int64)
    q_heads = q_ptr + (q_rows * q_stride_t + heads.to(tl.int64) * q_stride_h)[:, None]
    first_range = 0
    last_range = 0
    if RANGES:
        first_range = tl.load(range_starts_ptr + request)
        last_range = tl.load(range_starts_ptr + request + 1)
    request_mask = mask_ptr
    if MASK:
        request_mask = mask_ptr + tl.load(mask_starts_ptr + request)
    slopes = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=ok, other=0.0) * LOG2E
    v_scale = 1.0
    if (FORMAT != "plain") & (FORMAT != "int8"):
        scale_log2 *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
        scale_over_cap *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
        v_scale = tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)
    if PAIRS:  # so that the compiler sees that rows begin at multiples of 16 bytes
        stride_b *= 8
        stride_t *= 8
        stride_h *= 8
    head_offset = kv_head.to(tl.int64) * stride_h
    k_row_scales = k_row_scales_ptr
    v_row_scales = v_row_scales_ptr
    if FORMAT == "int8":
        PER_SCALE: tl.constexpr = 2 if PAIRS else 4  # what strides count, in 4 bytes
        k_row_scales = k_row_scales_ptr + head_offset // PER_SCALE
        v_row_scales = v_row_scales_ptr + head_offset // PER_SCALE
    key_lo = 0
    if WINDOW and not RANGES:  # what lies before the window may be freed
        key_lo = tl.maximum(seq_len - q_len - window + 1, 0)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    table = block_table_ptr + request.to(tl.int64) * table_stride
    if PAIRS:
        d_idx = 2 * tl.arange(0, BLOCK_D // 2)[None, :]
        q_ok = ok[:, None] & (d_idx < HEAD_SIZE)
        q_even = tl.load(q_heads + d_idx, mask=q_ok, other=0.0)
        q_odd = tl.load(q_heads + d_idx + 1, mask=q_ok, other=0.0)
        acc, m_i, l_i = attend_pairs(
            m_i, l_i, q_even, q_odd, q_pos, tokens, slopes, first_tile, last_tile, key_lo, seq_len,
            seq_len, k_ptr + head_offset, v_ptr + head_offset, k_row_scales, v_row_scales, table,
            stride_b, stride_t, stride_b, stride_t, request_mask, ranges_ptr, first_range,
            last_range, window, scale_log2, cap_log2, scale_over_cap, BLOCK_DV, FORMAT, NATIVE,
            PTX, CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI, RANGES, MASK, BLOCK_SIZE, HEAD_SIZE,
            HEAD_SIZE_V, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        d_idx = tl.arange(0, BLOCK_D)
        q_ok = ok[:, None]
        if HEAD_SIZE != BLOCK_D:
            q_ok = q_ok & (d_idx < HEAD_SIZE)[None, :]
        q = tl.load(q_heads + d_idx[None, :], mask=q_ok, other=0.0)
        acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, q_pos, tokens, slopes, first_tile, last_tile, key_lo, seq_len,
            seq_len, k_ptr + head_offset, v_ptr + head_offset, k_row_scales, v_row_scales, table,
            0, kv_head, stride_b, stride_t, stride_b, stride_t, request_mask, ranges_ptr,
            first_range, last_range, window, scale_log2, cap_log2, scale_over_cap, True, "pages",
            FORMAT, NATIVE, CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI, RANGES, MASK, BLOCK_SIZE,
            HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, STAGES,
        )  # fmt: skip
    token_rows = q_start + packed // GROUP
    if is_whole:
        nothing = sees_nothing(
            m_i, l_i, q_pos, seq_len, window, CAUSAL, WINDOW, RANGES, MASK
        )  # fmt: skip
        store_rows(
            acc, m_i, l_i, token_rows, heads, ok, nothing, v_scale, out_ptr, out_stride_t,
            out_stride_h, lse_ptr, sinks_ptr, out_scale_ptr, NUM_HEADS, HEAD_SIZE_V, SINKS, LSE,
            OUT_FORMAT, OUT_GROUP,
        )  # fmt: skip
    else:
        # A part without a score above −inf has nothing in it; one with NaN keeps it.
        total = tl.where(l_i == 0.0, 1.0, l_i)
        dv_idx = tl.arange(0, BLOCK_DV)
        at = _slot(first_slot, part, BALANCED) * ROWS + rows
        part_lse = m_i + tl.log2(total)
        tl.store(
            part_out_ptr + at[:, None] * BLOCK_DV + dv_idx[None, :], acc / total[:, None],
            mask=ok[:, None],
        )  # fmt: skip
        tl.store(part_lse_ptr + at, part_lse, mask=ok)
        # All threads' stores come before the one thread's release, and its acquire before their
        # loads, which bypass the first-level cache.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + first_slot, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            tl.debug_barrier()
            if parts <= FEW:
                acc, m_i, l_i = _merge_tile(
                    first_slot, parts, part_out_ptr, part_lse_ptr, ok, ROWS, BLOCK_DV, BALANCED
                )
                nothing = sees_nothing(
                    m_i, l_i, q_pos, seq_len, window, CAUSAL, WINDOW, RANGES, MASK
                )  # fmt: skip
                store_rows(
                    acc, m_i, l_i, token_rows, heads, ok, nothing, v_scale, out_ptr, out_stride_t,
                    out_stride_h, lse_ptr, sinks_ptr, out_scale_ptr, NUM_HEADS, HEAD_SIZE_V, SINKS,
                    LSE, OUT_FORMAT, OUT_GROUP,
                )  # fmt: skip
            else:
                first_packed = unit // NUM_KV_HEADS * ROWS
                for row in range(0, tl.minimum(q_len * GROUP - first_packed, ROWS)):
                    row_acc, row_m, row_l = _merge_row(
                        first_slot, parts, row, part_out_ptr, part_lse_ptr, ROWS, BLOCK_DV,
                        BALANCED, AT_ONCE,
                    )  # fmt: skip
                    one = first_packed + row + tl.arange(0, 1)
                    nothing = sees_nothing(
                        row_m, row_l, seq_len - q_len + one // GROUP, seq_len, window, CAUSAL,
                        WINDOW, RANGES, MASK,
                    )  # fmt: skip
                    store_rows(
                        row_acc, row_m, row_l, q_start + one // GROUP,
                        kv_head * GROUP + one % GROUP, one >= 0, nothing, v_scale, out_ptr,
                        out_stride_t, out_stride_h, lse_ptr, sinks_ptr, out_scale_ptr, NUM_HEADS,
                        HEAD_SIZE_V, SINKS, LSE, OUT_FORMAT, OUT_GROUP,
                    )  # fmt: skip
            tl.store(counters_ptr + first_slot, 0)  # for the next launch


@triton.jit
def _store_nothing(
    first, last, step, out_ptr, lse_ptr, out_scale_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: tl.constexpr, HEAD_SIZE_V: tl.constexpr, BLOCK_DV: tl.constexpr, LSE: tl.constexpr,
    OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr,
):  # fmt: skip
    """Store rows that see no key, token * NUM_HEADS + head: 0, and an lse of −inf."""
    ONE: tl.constexpr = 1
    for row in range(first, last, step):
        at = row + tl.arange(0, ONE)
        store_rows(
            tl.zeros([ONE, BLOCK_DV], tl.float32), tl.full([ONE], float("-inf"), tl.float32),
            tl.zeros([ONE], tl.float32), at // NUM_HEADS, at % NUM_HEADS, at >= 0, at >= 0, 1.0,
            out_ptr, out_stride_t, out_stride_h, lse_ptr, lse_ptr, out_scale_ptr, NUM_HEADS,
            HEAD_SIZE_V, False, LSE, OUT_FORMAT, OUT_GROUP,
        )  # fmt: skip


@triton.jit
def _store_padding(
    end, num_rows, out_ptr, lse_ptr, out_scale_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: tl.constexpr, HEAD_SIZE_V: tl.constexpr, BLOCK_DV: tl.constexpr, LSE: tl.constexpr,
    OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr,
):  # fmt: skip
    """Store the rows behind those of the last request, `end` to `num_rows`, each program some.

    First of all, while few registers are in use: at the end it made the kernel spill.
    """
    _store_nothing(
        end * NUM_HEADS + tl.program_id(0), num_rows * NUM_HEADS, tl.num_programs(0), out_ptr,
        lse_ptr, out_scale_ptr, out_stride_t, out_stride_h, NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE,
        OUT_FORMAT, OUT_GROUP,
    )  # fmt: skip


@triton.jit
def _store_empty(
    num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_scale_ptr,
    out_stride_t, out_stride_h,
    HAS_REQUEST_LIST: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, LSE: tl.constexpr, OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr,
):  # fmt: skip
    """Store the rows of requests without keys."""
    for i in range(tl.program_id(0), num_reqs, tl.num_programs(0)):
        request = _request(requests_ptr, i, HAS_REQUEST_LIST)
        if tl.load(seq_lens_ptr + request) == 0:
            first = tl.load(query_start_loc_ptr + request) * NUM_HEADS
            last = tl.load(query_start_loc_ptr + request + 1) * NUM_HEADS
            _store_nothing(
                first, last, 1, out_ptr, lse_ptr, out_scale_ptr, out_stride_t, out_stride_h,
                NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE, OUT_FORMAT, OUT_GROUP,
            )  # fmt: skip


_UNSPECIALIZED = ["num_reqs", "all_reqs", "num_rows", "table_stride", "window"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=METADATA)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr, part_lse_ptr, counters_ptr,
    requests_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, k_row_scales_ptr,
    v_row_scales_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr, mask_starts_ptr,
    ranges_ptr, range_starts_ptr, q_stride_t, q_stride_h, stride_b, stride_t, stride_h,
    out_stride_t, out_stride_h, num_reqs, all_reqs, num_rows, table_stride, window, scale_log2,
    cap_log2, scale_over_cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_REQUEST_LIST: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr,
    PAIRS: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FAST_TANH: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr,
    LSE: tl.constexpr, OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    FEW: tl.constexpr, AT_ONCE: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Attention of the listed requests over the paged cache, shared evenly among the programs.

    Grid: any number of programs; part_out_ptr has 2 * programs * ROWS * BLOCK_DV float32,
    part_lse_ptr 2 * programs * ROWS, counters_ptr a zero int32 for each, which is zero again after.

    Args:
        requests_ptr: with HAS_REQUEST_LIST, (num_reqs,) int32, the requests; else all of them, in order.
        all_reqs: requests of the batch, listed or not.
        num_rows: of the output; those behind the last request's are stored as rows without keys.
        PAIRS: the cache is given as pairs of bytes, see attend_pairs.py; strides are in 16 bytes.
        PTX: NVIDIA's instructions may be used.
        MIN_TILES: a program that works has at least so many tiles of keys.
        CHUNK: lengths that are read at a time.
        FEW, AT_ONCE: how parts are merged: so few as whole tiles, else so many rows at a time.
        Others: as for prefill_kernel; keys and values have the same strides.
    """
    pid = tl.program_id(0)
    SPLIT_WINDOW: tl.constexpr = WINDOW and not RANGES  # a range may reach back beyond the window
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    _store_padding(
        tl.load(query_start_loc_ptr + all_reqs), num_rows, out_ptr, lse_ptr, out_scale_ptr,
        out_stride_t, out_stride_h, NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE, OUT_FORMAT, OUT_GROUP,
    )  # fmt: skip
    _store_empty(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_scale_ptr,
        out_stride_t, out_stride_h, HAS_REQUEST_LIST, NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE, OUT_FORMAT,
        OUT_GROUP,
    )  # fmt: skip
    total = _total(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, True, 1, HAS_REQUEST_LIST,
        SPLIT_WINDOW, GROUP, ROWS, BLOCK_N, NUM_KV_HEADS, CHUNK,
    )  # fmt: skip
    # A share is a round number of tiles, so that equal requests are cut alike, or not at all.
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), MIN_TILES)
    step = tl.exp2(tl.floor(tl.log2(tl.maximum(share // 16, 1).to(tl.float32)))).to(tl.int64)
    share = tl.cdiv(share, step) * step
    position = pid * share
    end = tl.minimum(position + share, total)
    if position < end:
        i, base = _find(
            position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, True, 1,
            HAS_REQUEST_LIST, SPLIT_WINDOW, GROUP, ROWS, BLOCK_N, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        while position < end:
            tiles, row_tiles, skipped = _tiles_of(
                i, i < num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
                SPLIT_WINDOW, GROUP, ROWS, BLOCK_N,
            )  # fmt: skip
            units = row_tiles * NUM_KV_HEADS
            if tiles * units > 0:
                unit = ((position - base) // tiles).to(tl.int32)
                first_tile = ((position - base) % tiles).to(tl.int32)
                last_tile = tl.minimum(tiles, first_tile + (end - position).to(tl.int32))
                begin = base + unit.to(tl.int64) * tiles
                first = (begin // share).to(tl.int32)
                last = ((begin + tiles - 1) // share).to(tl.int32)
                _attend_part(
                    _request(requests_ptr, i, HAS_REQUEST_LIST), unit, skipped + first_tile,
                    skipped + last_tile, (first_tile == 0) & (last_tile == tiles), pid - first,
                    last - first + 1, first,
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
                    k_row_scales_ptr, v_row_scales_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr,
                    sinks_ptr, mask_ptr, mask_starts_ptr, ranges_ptr, range_starts_ptr, q_stride_t,
                    q_stride_h, stride_b, stride_t, stride_h, out_stride_t, out_stride_h,
                    table_stride, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    HEAD_SIZE, HEAD_SIZE_V, BLOCK_D, BLOCK_DV, BLOCK_SIZE, ROWS, BLOCK_N, STAGES,
                    FORMAT, NATIVE, PTX, PAIRS, SCALE_STRIDE, CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI,
                    SINKS, RANGES, MASK, LSE, OUT_FORMAT, OUT_GROUP, FEW, AT_ONCE, True,
                )  # fmt: skip
                position += last_tile - first_tile
            if position == base + tiles.to(tl.int64) * units:
                base = position
                i += 1


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=METADATA)
def decode_invariant_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr, part_lse_ptr, counters_ptr,
    requests_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, k_row_scales_ptr,
    v_row_scales_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr, mask_starts_ptr,
    ranges_ptr, range_starts_ptr, q_stride_t, q_stride_h, stride_b, stride_t, stride_h,
    out_stride_t, out_stride_h, num_reqs, all_reqs, num_rows, table_stride, window, scale_log2,
    cap_log2, scale_over_cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_REQUEST_LIST: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr,
    PAIRS: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FAST_TANH: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr,
    LSE: tl.constexpr, OUT_FORMAT: tl.constexpr, OUT_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    FEW: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The same, each unit of work cut into PARTS parts (fewer if it has fewer tiles).

    Grid: any number of programs; part_out_ptr has units * PARTS * ROWS * BLOCK_DV float32, where a
    request has NUM_KV_HEADS units for each tile of its rows; part_lse_ptr and counters_ptr as many
    less the last one or two factors.
    """
    SPLIT_WINDOW: tl.constexpr = WINDOW and not RANGES
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    _store_padding(
        tl.load(query_start_loc_ptr + all_reqs), num_rows, out_ptr, lse_ptr, out_scale_ptr,
        out_stride_t, out_stride_h, NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE, OUT_FORMAT, OUT_GROUP,
    )  # fmt: skip
    _store_empty(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_scale_ptr,
        out_stride_t, out_stride_h, HAS_REQUEST_LIST, NUM_HEADS, HEAD_SIZE_V, BLOCK_DV, LSE, OUT_FORMAT,
        OUT_GROUP,
    )  # fmt: skip
    total = _total(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, False, PARTS, HAS_REQUEST_LIST,
        SPLIT_WINDOW, GROUP, ROWS, BLOCK_N, NUM_KV_HEADS, CHUNK,
    ).to(tl.int32)  # fmt: skip
    place = tl.program_id(0)
    while place < total:
        i, base = _find(
            place, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, False, PARTS,
            HAS_REQUEST_LIST, SPLIT_WINDOW, GROUP, ROWS, BLOCK_N, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        tiles, _, skipped = _tiles_of(
            i, i < num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
            SPLIT_WINDOW, GROUP, ROWS, BLOCK_N,
        )  # fmt: skip
        parts = tl.minimum(tiles, PARTS)
        part = place % PARTS  # every base is a multiple of PARTS
        if part < parts:
            _attend_part(
                _request(requests_ptr, i, HAS_REQUEST_LIST), (place - base.to(tl.int32)) // PARTS,
                skipped + part * tiles // parts, skipped + (part + 1) * tiles // parts, parts == 1,
                part, parts, place - part,
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr, part_lse_ptr,
                counters_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, k_row_scales_ptr,
                v_row_scales_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr,
                mask_starts_ptr, ranges_ptr, range_starts_ptr, q_stride_t, q_stride_h, stride_b,
                stride_t, stride_h, out_stride_t, out_stride_h, table_stride, window, scale_log2,
                cap_log2, scale_over_cap, NUM_HEADS, GROUP, HEAD_SIZE, HEAD_SIZE_V, BLOCK_D,
                BLOCK_DV, BLOCK_SIZE, ROWS, BLOCK_N, STAGES, FORMAT, NATIVE, PTX, PAIRS,
                SCALE_STRIDE, CAUSAL, WINDOW, CAP, FAST_TANH, ALIBI, SINKS, RANGES, MASK, LSE,
                OUT_FORMAT, OUT_GROUP, FEW, AT_ONCE, False,
            )  # fmt: skip
        place += tl.num_programs(0)
