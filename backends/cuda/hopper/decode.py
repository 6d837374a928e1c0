"""Decode for Hopper, in Gluon: TMA fetches pages, and the keys are the rows of the products.

The tiles of keys of all requests and KV heads are one line, which the programs share evenly
(`hopper_line.py`); parts of a split are merged by the last program to arrive (`hopper_store.py`).

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

from attn_dispatch.backends.cuda.hopper.epilogue import (
    lanes,
    merge,
    store,
    store_empty,
    store_padding,
)
from attn_dispatch.backends.cuda.hopper.prefill import (
    LOG2E,
    NOTHING,
    load_tile,
    mma_layout,
    sees_nothing,
    tanh,
)
from attn_dispatch.backends.cuda.hopper.stream_k import find, length_of, lowest_key, unit_at
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["hopper_decode_kernel"]

_HALF = gl.constexpr(64)  # 16-bit columns that a swizzled row of shared memory holds

# Later than Triton 3.6, and later than 3.8, they got other names.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_memory = gl.shared_memory_descriptor
_seen_as = getattr(_memory, "reinterpret", None) or _memory._reinterpret


@gluon.jit
def _producer(
    WHICH: gl.constexpr, position, end, i, base, share, pages_desc, k_pages, v_pages, k_full,
    k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
    num_reqs, table_stride, window, block_rows, v_rows, head_rows, head_columns,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, HAS_REQUEST_LIST: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: keys and values of each tile, page by page."""
    PAGE: gl.constexpr = k_pages.shape[1]
    PER_TILE: gl.constexpr = KEYS // PAGE
    HALVES: gl.constexpr = D // _HALF
    NUM_KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    came = 0
    while position < end:
        request, unit, first_tile, last_tile, _, _, _, i, base, position = unit_at(
            position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
            num_reqs, HAS_REQUEST_LIST, WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS,
        )  # fmt: skip
        if unit >= 0:
            kv_head = unit % NUM_KV_HEADS
            seq_len = gl.load(seq_lens_ptr + request)
            q_len = gl.load(query_start_loc_ptr + request + 1) - gl.load(
                query_start_loc_ptr + request
            )
            lowest = lowest_key(seq_len, q_len, window, WINDOW)
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
    layout: gl.constexpr = lanes(D)
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
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HAS_REQUEST_LIST: gl.constexpr, CAUSAL: gl.constexpr,
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
    LOADED: gl.constexpr = lanes(D)
    dtype: gl.constexpr = q_smem.dtype
    program = gl.program_id(0) * PROGRAMS + WHICH
    q = q_smem.index(WHICH).permute((1, 0))
    zero = gl.zeros([KEYS, ROWS], gl.float32, MMA)
    col = gl.arange(0, KEYS, BY_KEY)
    came = 0
    while position < end:
        request, unit, first_tile, last_tile, is_whole, parts, first, i, base, position = unit_at(
            position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
            num_reqs, HAS_REQUEST_LIST, WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS,
        )  # fmt: skip
        if unit >= 0:
            kv_head = unit % NUM_KV_HEADS
            first_packed = unit // NUM_KV_HEADS * ROWS
            seq_len = gl.load(seq_lens_ptr + request)
            q_start = gl.load(query_start_loc_ptr + request)
            q_len = gl.load(query_start_loc_ptr + request + 1) - q_start
            lowest = lowest_key(seq_len, q_len, window, WINDOW)

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
                nothing = sees_nothing(q_pos, seq_len, window, CAUSAL, WINDOW)
                store(
                    acc, m_i, total, nothing, q_start, packed, ok, heads, out_ptr, lse_ptr,
                    sinks_ptr, out_stride_t, out_stride_h, GROUP, NUM_HEADS, SINKS, LSE, dtype,
                )  # fmt: skip
            else:
                slot = program.to(gl.int64) * 2 + (program == first).to(gl.int64)
                empty = total == 0.0  # no score above −inf; a NaN is in the sum
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
                    merge(
                        first, parts, part_out_ptr, part_lse_ptr, q_start, first_packed,
                        q_len * GROUP, seq_len - q_len, seq_len, window, kv_head, out_ptr,
                        lse_ptr, sinks_ptr, out_stride_t, out_stride_h, D, ROWS, GROUP, NUM_HEADS,
                        CAUSAL, WINDOW, SINKS, LSE, dtype,
                    )  # fmt: skip
                    gl.store(counters_ptr + 2 * first, 0)  # for the next launch


@gluon.jit(
    do_not_specialize=[
        "num_reqs",
        "all_reqs",
        "num_rows",
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
    all_reqs, num_rows, table_stride, window, scale_log2, cap_log2, scale_over_cap,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, HAS_REQUEST_LIST: gl.constexpr,
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
    k_smem = _seen_as(k_pages, dtype, [RING, KEYS, D], TILE)
    v_smem = _seen_as(v_pages, dtype, [RING, KEYS, D], TILE)
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

    store_empty(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_stride_t,
        out_stride_h, HAS_REQUEST_LIST, NUM_HEADS, D, LSE, dtype,
    )  # fmt: skip
    total = length_of(
        num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST, WINDOW, GROUP,
        ROWS, KEYS, NUM_KV_HEADS, CHUNK,
    )  # fmt: skip
    # A share is a round number of tiles, so that equal requests are cut alike, or not at all.
    programs = gl.num_programs(0) * PROGRAMS
    share = gl.maximum((total + programs - 1) // programs, MIN_TILES)
    step = gl.exp2(gl.floor(gl.log2(gl.maximum(share // 16, 1).to(gl.float32)))).to(gl.int64)
    share = (share + step - 1) // step * step
    position = gl.program_id(0) * PROGRAMS * share
    end = gl.minimum(position + share, total)
    i, base = find(
        position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
        WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
    )  # fmt: skip
    # Written out: in a tuple that has a name, constants would no longer be constants.
    # Triton 3.6 stores what the partitions take into the shared memory of the last reduction, while
    # other warps may still read its result. Later versions have this barrier of their own.
    if PROGRAMS == 1:
        _barrier()
        gl.warp_specialize(
            [
                (_consumer, (
                    0, position, end, i, base, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    HAS_REQUEST_LIST, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_producer, (
                    0, position, end, i, base, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, HAS_REQUEST_LIST, WINDOW,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        position_1 = position + share
        end_1 = gl.minimum(position_1 + share, total)
        i_1, base_1 = find(
            position_1, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        _barrier()
        gl.warp_specialize(
            [
                (_consumer, (
                    0, position, end, i, base, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    HAS_REQUEST_LIST, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_consumer, (
                    1, position_1, end_1, i_1, base_1, share, q_ptr, q_smem, p_smem, k_smem,
                    v_smem, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, part_out_ptr,
                    part_lse_ptr, counters_ptr, requests_ptr, query_start_loc_ptr, seq_lens_ptr,
                    slopes_ptr, sinks_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h,
                    num_reqs, window, scale_log2, cap_log2, scale_over_cap, NUM_HEADS, GROUP,
                    HAS_REQUEST_LIST, CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
                )),
                (_producer, (
                    0, position, end, i, base, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, HAS_REQUEST_LIST, WINDOW,
                )),
                (_producer, (
                    1, position_1, end_1, i_1, base_1, share, pages_desc, k_pages, v_pages,
                    k_full, k_empty, v_full, v_empty, requests_ptr, query_start_loc_ptr,
                    seq_lens_ptr, block_table_ptr, num_reqs, table_stride, window, block_rows,
                    v_rows, head_rows, head_columns, NUM_HEADS, GROUP, D, ROWS, KEYS, BLOCK_SIZE,
                    STAGES, HAS_REQUEST_LIST, WINDOW,
                )),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    store_padding(
        gl.load(query_start_loc_ptr + all_reqs), num_rows, out_ptr, lse_ptr, out_stride_t,
        out_stride_h, NUM_HEADS, D, LSE, dtype,
    )  # fmt: skip
