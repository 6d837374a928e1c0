"""Decode for Hopper, in Gluon: TMA fetches pages, and the keys are the rows of the products.

The schedule is kernels/decode.py's: the tiles of keys of all requests and KV heads are one line,
which the programs share evenly; parts of a split are merged by the last program to arrive.

For each program one warp brings keys and values by TMA through a ring in shared memory, one page
(or 64 of its tokens) at a time, so that nobody works out addresses row by row. A warp group
multiplies 64 or 128 keys by the few query rows, transposed: scores are (keys, rows) and the output
(head_size, rows), so that the matrix units' 64 rows are full however few the queries are. The next
tile's scores are issued before the softmax of the last, as in hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.cuda.hopper import LN2, LOG2E, NOTHING, load_tile, mma_layout, tanh
from attn_dispatch.backends.kernels.launcher import METADATA

__all__ = ["hopper_decode_kernel"]

_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of what all warps read as one
_HALF = gl.constexpr(64)  # 16-bit columns that a swizzled row of shared memory holds

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # the latter after Triton 3.6


@gluon.constexpr_function
def _lanes(n, each, order):
    """A layout of 4 warps in which each thread has `each` neighbours of the last n values."""
    across = min(32, n // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [4, 1], order)


@gluon.constexpr_function
def _merged(d):
    """(parts, rows, d) float32: a row is a warp's."""
    across = min(32, d // 4)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // across, across], [1, 4, 1], [2, 1, 0])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _request(requests_ptr, i, LISTED: gl.constexpr):
    """The i-th request of this launch."""
    if LISTED:
        return gl.load(requests_ptr + i)
    else:
        return i


@gluon.jit
def _lowest(seq_len, q_len, window, WINDOW: gl.constexpr):
    """The first key that a query of the request sees: blocks before it may be another's."""
    lowest = seq_len * 0
    if WINDOW:
        lowest = gl.maximum(seq_len - q_len - window + 1, 0)
    return lowest


@gluon.jit
def _units_of(
    r, ok, query_start_loc_ptr, seq_lens_ptr, window,
    WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """(tiles of keys, tiles of rows, first tile of keys) of requests, a vector or one."""
    seq_len = gl.load(seq_lens_ptr + r, mask=ok, other=0)
    start = gl.load(query_start_loc_ptr + r, mask=ok, other=0)
    q_len = gl.load(query_start_loc_ptr + r + 1, mask=ok, other=0) - start
    first = _lowest(seq_len, q_len, window, WINDOW) // KEYS
    tiles = gl.maximum((seq_len + KEYS - 1) // KEYS - first, 0)
    return tiles, (q_len * GROUP + ROWS - 1) // ROWS, first


@gluon.jit
def _lengths(
    begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    LISTED: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """(CHUNK,) int64: how much of the line each of these requests takes."""
    i = begin + gl.arange(0, CHUNK, _LINE)
    ok = i < num_reqs
    r = i
    if LISTED:
        r = gl.load(requests_ptr + i, mask=ok, other=0)
    tiles, row_tiles, _ = _units_of(
        r, ok, query_start_loc_ptr, seq_lens_ptr, window, WINDOW, GROUP, ROWS, KEYS
    )
    return tiles.to(gl.int64) * row_tiles * NUM_KV_HEADS


@gluon.jit
def _find(
    position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    LISTED: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """(i, base): the request that a position on the line falls to, and where its stretch begins."""
    i = gl.to_tensor(0)
    base = gl.to_tensor(0).to(gl.int64)
    running = gl.to_tensor(0).to(gl.int64)
    for begin in range(0, num_reqs, CHUNK):
        lengths = _lengths(
            begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, LISTED,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        ends = gl.associative_scan(lengths, 0, _add) + running
        before = (ends <= position) & (begin + gl.arange(0, CHUNK, _LINE) < num_reqs)
        i += gl.sum(before.to(gl.int32), 0)
        base = gl.maximum(base, gl.max(gl.where(before, ends, 0), 0))
        running += gl.sum(lengths, 0)
    return i, base


@gluon.jit
def _unit(
    position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    num_reqs,
    LISTED: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """What a position on the line falls to.

    Returns:
        request: the i-th of this launch.
        unit: its KV head and tile of rows, kv_head + NUM_KV_HEADS * tile of rows; −1 for none.
        first_tile, last_tile: the program's tiles of keys.
        is_whole, part, parts, first: whether that is all of the unit; else which part of how many,
            and the program that has the first.
        i, base, position: where the program goes on.
    """
    request = _request(requests_ptr, i, LISTED)
    tiles, row_tiles, skipped = _units_of(
        request, i < num_reqs, query_start_loc_ptr, seq_lens_ptr, window, WINDOW, GROUP, ROWS,
        KEYS,
    )  # fmt: skip
    length = tiles.to(gl.int64) * row_tiles * NUM_KV_HEADS
    some = gl.maximum(tiles, 1)
    unit = gl.where(length > 0, ((position - base) // some).to(gl.int32), -1)
    first_tile = ((position - base) % some).to(gl.int32)
    last_tile = gl.minimum(tiles, first_tile + gl.minimum(end - position, tiles).to(gl.int32))
    begin = base + unit.to(gl.int64) * tiles
    first = (begin // share).to(gl.int32)
    last = ((begin + some - 1) // share).to(gl.int32)
    is_whole = (first_tile == 0) & (last_tile == tiles)
    position += gl.where(length > 0, last_tile - first_tile, 0)
    is_done = position == base + length
    base = gl.where(is_done, position, base)
    i += is_done.to(gl.int32)
    return (
        request, unit, skipped + first_tile, skipped + last_tile, is_whole, last - first + 1, first,
        i, base, position,
    )  # fmt: skip


@gluon.jit
def _producer(
    WHICH: gl.constexpr, position, end, i, base, share, pages_desc, k_pages, v_pages, k_full,
    k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
    num_reqs, table_stride, window, block_rows, v_rows, head_rows, head_columns,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: keys and values of each tile, page by page."""
    PAGE: gl.constexpr = k_pages.shape[1]
    PER_TILE: gl.constexpr = KEYS // PAGE
    HALVES: gl.constexpr = D // _HALF
    NUM_KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    came = 0
    while position < end:
        request, unit, first_tile, last_tile, _, _, _, i, base, position = _unit(
            position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
            num_reqs, LISTED, WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS,
        )  # fmt: skip
        if unit >= 0:
            kv_head = unit % NUM_KV_HEADS
            seq_len = gl.load(seq_lens_ptr + request)
            q_len = gl.load(query_start_loc_ptr + request + 1) - gl.load(
                query_start_loc_ptr + request
            )
            lowest = _lowest(seq_len, q_len, window, WINDOW)
            table = block_table_ptr + request.to(gl.int64) * table_stride
            column = kv_head * head_columns
            for tile in range(first_tile, last_tile):
                stage = WHICH * STAGES + came % STAGES
                phase = ((came // STAGES) & 1) ^ 1
                for half in gl.static_range(2):
                    if half == 0:
                        mbarrier.wait(k_empty.index(stage), phase)
                        mbarrier.expect(k_full.index(stage), KEYS * D * 2)
                    else:
                        mbarrier.wait(v_empty.index(stage), phase)
                        mbarrier.expect(v_full.index(stage), KEYS * D * 2)
                    for p in gl.static_range(PER_TILE):
                        # What is behind the last key, or before the first, is masked: any will do.
                        key = tile * KEYS + p * PAGE
                        at = gl.minimum(gl.maximum(key, lowest), seq_len - 1)
                        block = gl.load(table + at // BLOCK_SIZE)
                        row = block * block_rows + kv_head * head_rows + key % BLOCK_SIZE
                        for h in gl.static_range(HALVES):
                            place = (stage * HALVES + h) * PER_TILE + p
                            if half == 0:
                                load_tile(
                                    pages_desc, [row, column + h * _HALF], k_full.index(stage),
                                    k_pages.index(place),
                                )  # fmt: skip
                            else:
                                load_tile(
                                    pages_desc, [row + v_rows, column + h * _HALF],
                                    v_full.index(stage), v_pages.index(place),
                                )  # fmt: skip
                came += 1


@gluon.jit
def _weights(
    s, m_i, l_i, keys, q_pos, slopes, seq_len, window, scale_log2, cap_log2, scale_over_cap,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Weights of one tile of scores, (keys, rows).

    Returns:
        weights, m_i, l_i, and the factor on what was before; l_i is still apart for each key.
    """
    if CAP:
        s = tanh(s * scale_over_cap) * cap_log2
    else:
        s = s * scale_log2
    if ALIBI:
        s += slopes[None, :] * (keys[:, None] - q_pos[None, :]).to(gl.float32)
    seen = (keys < seq_len)[:, None]
    if CAUSAL:
        seen = seen & (keys[:, None] <= q_pos[None, :])
    if WINDOW:
        seen = seen & (keys[:, None] > (q_pos - window)[None, :])
        if not CAUSAL:
            seen = seen & (keys[:, None] < (q_pos + window)[None, :])
    s = gl.where(seen, s, NOTHING)
    m_new = gl.maximum(m_i, gl.max(s, 0))
    m_use = gl.where(m_new <= -1.0e29, 0.0, m_new)
    p = gl.exp2(s - m_use[None, :])
    alpha = gl.exp2(m_i - m_use)
    return p, m_new, l_i * alpha[None, :] + p, alpha


@gluon.jit
def _values(v_smem, tile, lowest, seq_len):
    """Make zero what lies in a tile of values before the first key or behind the last.

    It may be NaN, and zero times NaN is NaN.
    """
    KEYS: gl.constexpr = v_smem.shape[0]
    D: gl.constexpr = v_smem.shape[1]
    layout: gl.constexpr = _lanes(D, 8, [1, 0])
    first = tile * KEYS
    if (first < lowest) | (first + KEYS > seq_len):
        key = first + gl.arange(0, KEYS, gl.SliceLayout(1, layout))
        live = (key >= lowest) & (key < seq_len)
        values = v_smem.load(layout)
        v_smem.store(gl.where(live[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, position, end, i, base, share, q_ptr, q_smem, p_smem, k_smem, v_smem,
    k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, counters_ptr,
    requests_ptr, query_start_loc_ptr, seq_lens_ptr, slopes_ptr, sinks_ptr, q_stride_t, q_stride_h,
    out_stride_t, out_stride_h, num_reqs, window, scale_log2, cap_log2, scale_over_cap,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, LISTED: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, CAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    """A warp group: the attention of each of the program's parts."""
    PROGRAMS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0] // PROGRAMS
    KEYS: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    ROWS: gl.constexpr = q_smem.shape[1]
    RING: gl.constexpr = WHICH * STAGES
    NUM_KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    MMA: gl.constexpr = mma_layout(ROWS)
    BY_KEY: gl.constexpr = gl.SliceLayout(1, MMA)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    LOADED: gl.constexpr = _lanes(D, 8, [1, 0])
    dtype: gl.constexpr = q_smem.dtype
    program = gl.program_id(0) * PROGRAMS + WHICH
    q = q_smem.index(WHICH).permute((1, 0))
    zero = gl.zeros([KEYS, ROWS], gl.float32, MMA)
    col = gl.arange(0, KEYS, BY_KEY)
    came = 0
    while position < end:
        request, unit, first_tile, last_tile, is_whole, parts, first, i, base, position = _unit(
            position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
            num_reqs, LISTED, WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS,
        )  # fmt: skip
        if unit >= 0:
            kv_head = unit % NUM_KV_HEADS
            first_packed = unit // NUM_KV_HEADS * ROWS
            seq_len = gl.load(seq_lens_ptr + request)
            q_start = gl.load(query_start_loc_ptr + request)
            q_len = gl.load(query_start_loc_ptr + request + 1) - q_start
            lowest = _lowest(seq_len, q_len, window, WINDOW)

            packed = first_packed + gl.arange(0, ROWS, gl.SliceLayout(1, LOADED))
            q_rows = (q_start + packed // GROUP).to(gl.int64) * q_stride_t
            q_heads = (kv_head * GROUP + packed % GROUP).to(gl.int64) * q_stride_h
            d = gl.arange(0, D, gl.SliceLayout(0, LOADED))
            queries = gl.load(
                q_ptr + (q_rows + q_heads)[:, None] + d[None, :],
                mask=(packed < q_len * GROUP)[:, None], other=0.0,
            )  # fmt: skip
            q_smem.index(WHICH).store(queries)
            fence_async_shared()

            packed = first_packed + gl.arange(0, ROWS, BY_ROW)
            ok = packed < q_len * GROUP
            heads = kv_head * GROUP + packed % GROUP
            q_pos = seq_len - q_len + packed // GROUP
            slopes = gl.zeros([ROWS], gl.float32, BY_ROW)
            if ALIBI:
                slopes = gl.load(slopes_ptr + heads, mask=ok, other=0.0) * LOG2E
            m_i = gl.full([ROWS], NOTHING, gl.float32, BY_ROW)
            l_i = gl.zeros([KEYS, ROWS], gl.float32, MMA)
            acc = gl.zeros([D, ROWS], gl.float32, MMA)

            stage = RING + came % STAGES
            mbarrier.wait(k_full.index(stage), (came // STAGES) & 1)
            s = warpgroup_mma(k_smem.index(stage), q, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            p, m_i, l_i, alpha = _weights(
                s, m_i, l_i, first_tile * KEYS + col, q_pos, slopes, seq_len, window, scale_log2,
                cap_log2, scale_over_cap, CAUSAL, WINDOW, CAP, ALIBI,
            )  # fmt: skip
            p_smem.index(2 * WHICH + (came & 1)).store(gl.permute(p.to(dtype), (1, 0)))
            fence_async_shared()
            mbarrier.wait(v_full.index(stage), (came // STAGES) & 1)
            _values(v_smem.index(stage), first_tile, lowest, seq_len)
            for tile in range(first_tile + 1, last_tile):
                before = stage
                stage = RING + (came + 1) % STAGES
                mbarrier.wait(k_full.index(stage), ((came + 1) // STAGES) & 1)
                s = warpgroup_mma(k_smem.index(stage), q, zero, use_acc=False, is_async=True)
                weights = p_smem.index(2 * WHICH + (came & 1)).permute((1, 0))
                values = v_smem.index(before).permute((1, 0))
                acc = warpgroup_mma(values, weights, acc, is_async=True)
                came += 1
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                p, m_i, l_i, alpha = _weights(
                    s, m_i, l_i, tile * KEYS + col, q_pos, slopes, seq_len, window, scale_log2,
                    cap_log2, scale_over_cap, CAUSAL, WINDOW, CAP, ALIBI,
                )  # fmt: skip
                p_smem.index(2 * WHICH + (came & 1)).store(gl.permute(p.to(dtype), (1, 0)))
                fence_async_shared()
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(before))
                acc = acc * alpha[None, :]
                mbarrier.wait(v_full.index(stage), (came // STAGES) & 1)
                _values(v_smem.index(stage), tile, lowest, seq_len)
            weights = p_smem.index(2 * WHICH + (came & 1)).permute((1, 0))
            values = v_smem.index(stage).permute((1, 0))
            acc = warpgroup_mma(values, weights, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage))
            came += 1

            total = gl.sum(l_i, 0)
            if is_whole:
                _store(
                    acc, m_i, total, q_start, packed, ok, heads, out_ptr, lse_ptr, sinks_ptr,
                    out_stride_t, out_stride_h, GROUP, NUM_HEADS, SINKS, LSE, dtype,
                )  # fmt: skip
            else:
                slot = program.to(gl.int64) * 2 + (program == first).to(gl.int64)
                empty = m_i <= -1.0e29
                some = gl.where(empty, 1.0, total)
                rows = gl.arange(0, ROWS, BY_ROW)
                lse = gl.where(empty, float("-inf"), m_i + gl.log2(some))
                gl.store(part_lse_ptr + slot * ROWS + rows, lse)
                part = gl.permute(acc / some[None, :], (1, 0))
                part = gl.convert_layout(part, LOADED)
                at = slot * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOADED))
                gl.store(part_out_ptr + at[:, None] * D + d[None, :], part)
                # All threads' stores come before the one thread's release, and its acquire before
                # their loads, which bypass the first-level cache.
                _barrier()
                arrived = gl.atomic_add(counters_ptr + 2 * first, 1, sem="acq_rel", scope="gpu")
                if arrived == parts - 1:
                    _barrier()
                    _merge(
                        first, parts, part_out_ptr, part_lse_ptr, q_start, first_packed,
                        q_len * GROUP, kv_head, out_ptr, lse_ptr, sinks_ptr, out_stride_t,
                        out_stride_h, D, ROWS, GROUP, NUM_HEADS, SINKS, LSE, dtype,
                    )  # fmt: skip
                    gl.store(counters_ptr + 2 * first, 0)  # for the next launch


@gluon.jit
def _store(
    acc, m_i, total, q_start, packed, ok, heads, out_ptr, lse_ptr, sinks_ptr, out_stride_t,
    out_stride_h,
    GROUP: gl.constexpr, NUM_HEADS: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Store the rows of a state, acc being (head_size, rows)."""
    D: gl.constexpr = acc.shape[0]
    LOADED: gl.constexpr = _lanes(D, 8, [1, 0])
    empty = m_i <= -1.0e29
    m_use = gl.where(empty, 0.0, m_i)
    if LSE:
        lse = gl.where(empty, float("-inf"), (m_use + gl.log2(gl.where(empty, 1.0, total))) * LN2)
        tokens = (q_start + packed // GROUP).to(gl.int64)
        gl.store(lse_ptr + tokens * NUM_HEADS + heads, lse, mask=ok)
    if SINKS:
        sinks = gl.load(sinks_ptr + heads, mask=ok, other=0.0).to(gl.float32) * LOG2E
        total += gl.exp2(sinks - m_use)
    factor = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, total))
    out = gl.convert_layout(gl.permute((acc * factor[None, :]).to(dtype), (1, 0)), LOADED)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LOADED)
    tokens = gl.convert_layout(q_start + packed // GROUP, BY_ROW).to(gl.int64)
    rows = tokens * out_stride_t + gl.convert_layout(heads, BY_ROW).to(gl.int64) * out_stride_h
    d = gl.arange(0, D, gl.SliceLayout(0, LOADED))
    gl.store(out_ptr + rows[:, None] + d[None, :], out, mask=gl.convert_layout(ok, BY_ROW)[:, None])


@gluon.jit
def _merge(
    first, parts, part_out_ptr, part_lse_ptr, q_start, first_packed, end_packed, kv_head, out_ptr,
    lse_ptr, sinks_ptr, out_stride_t, out_stride_h,
    D: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr,
    SINKS: gl.constexpr, LSE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Merge the parts of a split and store the rows."""
    AT_ONCE: gl.constexpr = max(1, 64 // ROWS)
    LAYOUT: gl.constexpr = _merged(D)
    BY_PART: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, BY_PART)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    rows = gl.arange(0, ROWS, BY_ROW)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
    l_i = gl.zeros([ROWS], gl.float32, BY_ROW)
    acc = gl.zeros([ROWS, D], gl.float32, OUT)
    for begin in range(0, parts, AT_ONCE):
        part = begin + gl.arange(0, AT_ONCE, gl.SliceLayout(1, BY_PART))
        slot = (first + part).to(gl.int64) * 2 + (part == 0).to(gl.int64)
        at = slot[:, None] * ROWS + rows[None, :]
        ok = (part < parts)[:, None] & (rows >= 0)[None, :]
        lse = gl.load(part_lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        offsets = gl.expand_dims(at, 2) * D + gl.expand_dims(gl.expand_dims(d, 0), 0)
        out = gl.load(
            part_out_ptr + offsets, mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg"
        )
        m_new = gl.maximum(m_i, gl.max(lse, 0))
        m_use = gl.where(m_new == float("-inf"), 0.0, m_new)
        weight = gl.exp2(lse - m_use[None, :])
        alpha = gl.exp2(m_i - m_use)
        l_i = l_i * alpha + gl.sum(weight, 0)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        acc += gl.sum(out * gl.expand_dims(weight, 2), 0)
        m_i = m_new
    empty = m_i == float("-inf")
    m_use = gl.where(empty, 0.0, m_i)
    packed = first_packed + rows
    ok = packed < end_packed
    heads = kv_head * GROUP + packed % GROUP
    tokens = (q_start + packed // GROUP).to(gl.int64)
    if LSE:
        lse = gl.where(empty, float("-inf"), (m_use + gl.log2(gl.where(empty, 1.0, l_i))) * LN2)
        gl.store(lse_ptr + tokens * NUM_HEADS + heads, lse, mask=ok)
    if SINKS:
        sinks = gl.load(sinks_ptr + heads, mask=ok, other=0.0).to(gl.float32) * LOG2E
        l_i += gl.exp2(sinks - m_use)
    factor = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l_i))
    TO: gl.constexpr = gl.SliceLayout(1, OUT)
    out = (acc * gl.convert_layout(factor, TO)[:, None]).to(dtype)
    at = gl.convert_layout(tokens * out_stride_t + heads.to(gl.int64) * out_stride_h, TO)
    columns = gl.arange(0, D, gl.SliceLayout(0, OUT))
    gl.store(out_ptr + at[:, None] + columns[None, :], out, mask=gl.convert_layout(ok, TO)[:, None])


@gluon.jit
def _store_empty(
    num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_stride_t,
    out_stride_h,
    LISTED: gl.constexpr, NUM_HEADS: gl.constexpr, D: gl.constexpr, LSE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Store the rows of requests without keys: 0, and an lse of −inf."""
    d = gl.arange(0, D, _LINE)
    for i in range(gl.program_id(0), num_reqs, gl.num_programs(0)):
        request = _request(requests_ptr, i, LISTED)
        if gl.load(seq_lens_ptr + request) == 0:
            first = gl.load(query_start_loc_ptr + request) * NUM_HEADS
            last = gl.load(query_start_loc_ptr + request + 1) * NUM_HEADS
            for row in range(first, last):
                token = (row // NUM_HEADS).to(gl.int64)
                head = (row % NUM_HEADS).to(gl.int64)
                at = out_ptr + token * out_stride_t + head * out_stride_h
                gl.store(at + d, gl.zeros([D], dtype, _LINE))
                if LSE:
                    gl.store(lse_ptr + row, float("-inf"))


@gluon.jit(
    do_not_specialize=[
        "num_reqs",
        "table_stride",
        "window",
        "block_rows",
        "v_rows",
        "head_rows",
        "head_columns",
    ],
    do_not_specialize_on_alignment=METADATA,
)
def hopper_decode_kernel(
    q_ptr, pages_desc, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, counters_ptr, requests_ptr,
    query_start_loc_ptr, seq_lens_ptr, block_table_ptr, slopes_ptr, sinks_ptr, q_stride_t,
    q_stride_h, block_rows, v_rows, head_rows, head_columns, out_stride_t, out_stride_h, num_reqs,
    table_stride, window, scale_log2, cap_log2, scale_over_cap,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
    PROGRAMS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
    ALIBI: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr, CHUNK: gl.constexpr,
    MIN_TILES: gl.constexpr,
):  # fmt: skip
    """Attention of the listed requests over the paged cache, shared evenly among the programs.

    Grid: any number of blocks of PROGRAMS programs; part_out_ptr has 2 * programs * ROWS * D
    float32, part_lse_ptr 2 * programs * ROWS, counters_ptr 2 * programs zeros, which are zero again
    after.

    Args:
        pages_desc: the cache as a matrix, whose rows follow each other as the tokens of a block do;
            blocks of 16, 32 or 64 rows, which divide a page, by 64 columns.
        block_rows, v_rows, head_rows, head_columns: how many rows or columns of it lie between
            one block and the next, keys and values, one KV head and the next.
        ROWS: query tokens times query heads of a KV head in a tile, a multiple of 8.
        PROGRAMS: 1, or 2 that have a block of threads, and nothing else, in common.
        KEYS: in a tile, a multiple of 64.
        MIN_TILES: a program that works has at least so many tiles.
        CHUNK: lengths that are read at a time.
        Others: as for kernels/decode.py.
    """
    PAGE: gl.constexpr = pages_desc.block_type.shape[0]
    RING: gl.constexpr = PROGRAMS * STAGES
    PAGES: gl.constexpr = RING * (D // _HALF) * (KEYS // PAGE)
    NUM_KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    dtype: gl.constexpr = pages_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    k_pages = gl.allocate_shared_memory(dtype, [PAGES, PAGE, _HALF], pages_desc.layout)
    v_pages = gl.allocate_shared_memory(dtype, [PAGES, PAGE, _HALF], pages_desc.layout)
    # A tile of keys is its columns' halves, one behind the other, and each half its pages.
    k_smem = k_pages._reinterpret(dtype, [RING, KEYS, D], TILE)
    v_smem = v_pages._reinterpret(dtype, [RING, KEYS, D], TILE)
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, KEYS], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [PROGRAMS, ROWS, D], Q)
    p_smem = gl.allocate_shared_memory(dtype, [PROGRAMS * 2, ROWS, KEYS], P)
    k_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(RING):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)
    fence_async_shared()

    _store_empty(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_stride_t,
        out_stride_h, LISTED, NUM_HEADS, D, LSE, dtype,
    )  # fmt: skip
    total = gl.to_tensor(0).to(gl.int64)
    for begin in range(0, num_reqs, CHUNK):
        lengths = _lengths(
            begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, LISTED,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        total += gl.sum(lengths, 0)
    # A share is a round number of tiles, so that equal requests are cut alike, or not at all.
    programs = gl.num_programs(0) * PROGRAMS
    share = gl.maximum((total + programs - 1) // programs, MIN_TILES)
    step = gl.exp2(gl.floor(gl.log2(gl.maximum(share // 16, 1).to(gl.float32)))).to(gl.int64)
    share = (share + step - 1) // step * step
    position = gl.program_id(0) * PROGRAMS * share
    end = gl.minimum(position + share, total)
    i, base = _find(
        position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, LISTED,
        WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
    )  # fmt: skip
    # Written out: in a tuple that has a name, constants would no longer be constants.
    if PROGRAMS == 1:
        gl.warp_specialize(
            [
                (_consumer, (
                    0, position, end, i, base, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    LISTED, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_producer, (
                    0, position, end, i, base, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, LISTED, WINDOW,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        position_1 = position + share
        end_1 = gl.minimum(position_1 + share, total)
        i_1, base_1 = _find(
            position_1, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, LISTED,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_consumer, (
                    0, position, end, i, base, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    LISTED, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_consumer, (
                    1, position_1, end_1, i_1, base_1, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    LISTED, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_producer, (
                    0, position, end, i, base, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, LISTED, WINDOW,
                )),
                (_producer, (
                    1, position_1, end_1, i_1, base_1, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, LISTED, WINDOW,
                )),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
