"""Decode for Hopper, in Gluon: TMA fetches pages, and the keys are the rows of the products.

Programs share the work by Stream-K (`stream_k.py`); the last one to finish a part of a work unit
merges all of its parts (`epilogue.py`).

Each program has a producer warp, which loads keys and values by TMA into rings in shared memory,
one page (or 64 of its tokens) at a time, so that no address is computed for each row. A warp group
multiplies 64 or 128 keys by the few query rows, transposed: scores are (keys, rows) and the output
is (head_size, rows), so that the 64 rows of the matrix units are full however few the queries are.
The next tile's scores are issued before the softmax of the last, as in FlashAttention 3
(arXiv:2407.08608). The softmax is the online one (arXiv:1805.02867).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.cuda.hopper.epilogue import Output, Parts
from attn_dispatch.backends.cuda.hopper.pages import Pages
from attn_dispatch.backends.cuda.hopper.scores import MASKED, Scale, no_score, tanh
from attn_dispatch.backends.cuda.hopper.stream_k import IterationSpace
from attn_dispatch.backends.cuda.hopper.tma_ring import (
    TmaRing,
    aggregate,
    barrier,
    load_tile,
    make_ring,
    mma_layout,
    reinterpret,
    row_layout,
)
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["hopper_decode_kernel"]

_HALF = gl.constexpr(64)  # 16-bit columns of a swizzled row of shared memory

#: Parameters whose values the compiled code does not depend on.
_COUNTS = (
    "num_reqs all_reqs num_rows table_stride window k_block_rows k_head_rows k_head_columns "
    "v_block_rows v_head_rows v_head_columns"
).split()


@aggregate
class _Buffers:
    """A thread block's shared memory, as one of its programs uses it.

    A program has one tile of queries, two of weights, and rings of keys and values.
    """

    queries: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    k: TmaRing
    v: TmaRing
    PROGRAM: gl.constexpr

    @gluon.jit
    def of(self, PROGRAM: gl.constexpr):
        """The buffers of another program of the block."""
        return _Buffers(
            self.queries, self.weights, self.k.ring(PROGRAM), self.v.ring(PROGRAM), PROGRAM
        )

    @gluon.jit
    def weights_of(self, n):
        """Tile n's weights, (ROWS, KEYS)."""
        return self.weights.index(2 * self.PROGRAM + (n & 1))


@gluon.jit
def _allocate(dtype: gl.constexpr, CONFIG: gl.constexpr):
    """The buffers of a block's first program."""
    D: gl.constexpr = CONFIG.D
    ROWS: gl.constexpr = CONFIG.ROWS
    KEYS: gl.constexpr = CONFIG.KEYS
    STAGES: gl.constexpr = CONFIG.STAGES
    PROGRAMS: gl.constexpr = CONFIG.PROGRAMS
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, KEYS], dtype)
    return _Buffers(
        gl.allocate_shared_memory(dtype, [PROGRAMS, ROWS, D], Q),
        gl.allocate_shared_memory(dtype, [PROGRAMS * 2, ROWS, KEYS], P),
        make_ring(dtype, STAGES, STAGES, KEYS, D, TILE, 1, PROGRAMS),
        make_ring(dtype, STAGES, STAGES, KEYS, D, TILE, 1, PROGRAMS),
        0,
    )


@gluon.jit
def _load_pages(ring, n, pages, tile, work):
    """Load the pages of a key tile, keys or values, as the ring's tile n.

    In shared memory a tile is its columns' halves, one after the other, and each half its pages.
    """
    CONFIG: gl.constexpr = work.config
    PAGE: gl.constexpr = pages.desc.block_type.shape[0]
    PER_TILE: gl.constexpr = CONFIG.KEYS // PAGE
    HALVES: gl.constexpr = CONFIG.D // _HALF
    BOXES: gl.constexpr = ring.tiles.shape[0] * HALVES * PER_TILE
    boxes = reinterpret(ring.tiles, pages.desc.dtype, [BOXES, PAGE, _HALF], pages.desc.layout)
    table = pages.table_of(work.request)
    kv_head = work.kv_head()
    stage = ring.acquire(n)
    for p in gl.static_range(PER_TILE):
        # Keys before the first and behind the last are masked: any page will do.
        key = tile * CONFIG.KEYS + p * PAGE
        at = gl.minimum(gl.maximum(key, work.first_key), work.seq_len - 1)
        block = gl.load(table + at // CONFIG.BLOCK_SIZE)
        row = block * pages.block_rows + kv_head * pages.head_rows + key % CONFIG.BLOCK_SIZE
        for h in gl.static_range(HALVES):
            load_tile(
                pages.desc,
                [row, kv_head * pages.head_columns + h * _HALF],
                ring.full.index(stage),
                boxes.index((stage * HALVES + h) * PER_TILE + p),
            )


@gluon.jit
def _producer(share, buffers, keys, values):
    """One warp: keys and values of each tile, page by page."""
    n = 0
    while share.position < share.end:
        work, share = share.next()
        if work.unit >= 0:
            for tile in range(work.first_tile, work.last_tile):
                _load_pages(buffers.k, n, keys, tile, work)
                _load_pages(buffers.v, n, values, tile, work)
                n += 1


@gluon.jit
def _softmax(s, m_i, l_i, keys, q_pos, slopes, work, scale):
    """Weights of a tile of scores, (keys, rows).

    Returns:
        weights, m_i, l_i, and the factor on what was before. l_i still has a sum for each key.
    """
    CONFIG: gl.constexpr = work.config
    if CONFIG.CAP:
        s = tanh(s * scale.scale_over_cap) * scale.cap_log2
    else:
        s = s * scale.scale_log2
    if CONFIG.ALIBI:
        s += slopes[None, :] * (keys[:, None] - q_pos[None, :]).to(gl.float32)
    seen = (keys < work.seq_len)[:, None]
    if CONFIG.CAUSAL:
        seen = seen & (keys[:, None] <= q_pos[None, :])
    if CONFIG.WINDOW:
        seen = seen & (keys[:, None] > (q_pos - work.window)[None, :])
        if not CONFIG.CAUSAL:
            seen = seen & (keys[:, None] < (q_pos + work.window)[None, :])
    s = gl.where(seen, s, MASKED)
    m_new = gl.maximum(m_i, gl.max(s, 0))
    m_use = gl.where(no_score(m_new), 0.0, m_new)
    p = gl.exp2(s - m_use[None, :])
    alpha = gl.exp2(m_i - m_use)
    return p, m_new, l_i * alpha[None, :] + p, alpha


@gluon.jit
def _zero_unseen(v_smem, tile, work):
    """Zero the values before the first key and behind the last: 0 * NaN is NaN."""
    KEYS: gl.constexpr = v_smem.shape[0]
    LAYOUT: gl.constexpr = row_layout(v_smem.shape[1])
    first = tile * KEYS
    if (first < work.first_key) | (first + KEYS > work.seq_len):
        key = first + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
        is_seen = (key >= work.first_key) & (key < work.seq_len)
        values = v_smem.load(LAYOUT)
        v_smem.store(gl.where(is_seen[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _load_queries(q_smem, q_ptr, stride_t, stride_h, work):
    D: gl.constexpr = q_smem.shape[1]
    LAYOUT: gl.constexpr = row_layout(D)
    rows = work.rows(gl.SliceLayout(1, LAYOUT))
    at = rows.tokens.to(gl.int64) * stride_t + rows.heads.to(gl.int64) * stride_h
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    q_smem.store(gl.load(q_ptr + at[:, None] + d[None, :], mask=rows.ok[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _store_weights(weights, p):
    weights.store(gl.permute(p.to(weights.dtype), (1, 0)))
    fence_async_shared()


@gluon.jit
def _output_mma(buffers, stage, n, acc):
    """Issue the product of the values in a stage of the ring and tile n's weights."""
    values = buffers.v.tiles.index(stage).permute((1, 0))
    weights = buffers.weights_of(n).permute((1, 0))
    return warpgroup_mma(values, weights, acc, is_async=True)


@gluon.jit
def _consumer(share, buffers, scale, output, parts, q_ptr, q_stride_t, q_stride_h):
    """A warp group: the attention of each of the program's work tiles."""
    CONFIG: gl.constexpr = share.space.config
    D: gl.constexpr = CONFIG.D
    KEYS: gl.constexpr = CONFIG.KEYS
    ROWS: gl.constexpr = CONFIG.ROWS
    MMA: gl.constexpr = mma_layout(ROWS)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    k_ring = buffers.k
    v_ring = buffers.v
    queries = buffers.queries.index(buffers.PROGRAM)
    q = queries.permute((1, 0))
    zero = gl.zeros([KEYS, ROWS], gl.float32, MMA)
    col = gl.arange(0, KEYS, gl.SliceLayout(1, MMA))
    n = 0  # tiles taken from the rings
    while share.position < share.end:
        work, share = share.next()
        if work.unit >= 0:
            _load_queries(queries, q_ptr, q_stride_t, q_stride_h, work)
            rows = work.rows(BY_ROW)
            slopes = gl.zeros([ROWS], gl.float32, BY_ROW)
            if CONFIG.ALIBI:
                slopes = gl.load(scale.slopes_ptr + rows.heads, mask=rows.ok, other=0.0) * LOG2E
            m_i = gl.full([ROWS], MASKED, gl.float32, BY_ROW)
            l_i = gl.zeros([KEYS, ROWS], gl.float32, MMA)
            acc = gl.zeros([D, ROWS], gl.float32, MMA)

            stage = k_ring.wait(n)
            s = warpgroup_mma(k_ring.tiles.index(stage), q, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            k_ring.release(stage)
            p, m_i, l_i, alpha = _softmax(
                s, m_i, l_i, work.first_tile * KEYS + col, rows.positions, slopes, work, scale
            )
            _store_weights(buffers.weights_of(n), p)
            v_ring.wait(n)
            _zero_unseen(v_ring.tiles.index(stage), work.first_tile, work)
            for tile in range(work.first_tile + 1, work.last_tile):
                before = stage
                stage = k_ring.wait(n + 1)
                s = warpgroup_mma(k_ring.tiles.index(stage), q, zero, use_acc=False, is_async=True)
                acc = _output_mma(buffers, before, n, acc)
                n += 1
                s = warpgroup_mma_wait(1, deps=[s])
                k_ring.release(stage)
                p, m_i, l_i, alpha = _softmax(
                    s, m_i, l_i, tile * KEYS + col, rows.positions, slopes, work, scale
                )
                _store_weights(buffers.weights_of(n), p)
                acc = warpgroup_mma_wait(0, deps=[acc])
                v_ring.release(before)
                acc = acc * alpha[None, :]
                v_ring.wait(n)
                _zero_unseen(v_ring.tiles.index(stage), tile, work)
            acc = _output_mma(buffers, stage, n, acc)
            acc = warpgroup_mma_wait(0, deps=[acc])
            v_ring.release(stage)
            n += 1

            total = gl.sum(l_i, 0)
            if work.is_whole:
                output.store_transposed(acc, m_i, total, work)
            else:
                parts.store(acc, m_i, total, work, share.program, output)


@gluon.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=METADATA)
def hopper_decode_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, counters_ptr, requests_ptr,
    query_start_loc_ptr, seq_lens_ptr, block_table_ptr, slopes_ptr, sinks_ptr, q_stride_t,
    q_stride_h, k_block_rows, k_head_rows, k_head_columns, v_block_rows, v_head_rows,
    v_head_columns, out_stride_t, out_stride_h, num_reqs, all_reqs, num_rows, table_stride, window,
    scale_log2, cap_log2, scale_over_cap, CONFIG: gl.constexpr,
):  # fmt: skip
    """Attention of the listed requests over the paged cache.

    Grid: any number of blocks of CONFIG.PROGRAMS programs.

    Args:
        k_desc, v_desc: keys and values as matrices, whose rows are the tokens of a block one after
            the other; boxes of 16, 32 or 64 rows, which divide a page, by 64 columns.
        part_out_ptr: (2 * programs, ROWS, D) float32; part_lse_ptr (2 * programs, ROWS).
        counters_ptr: 2 * programs zeros, which are zero again afterwards.
        k_block_rows, k_head_rows, k_head_columns: rows or columns of the keys' matrix between one
            block and the next, one KV head and the next; v_block_rows and so on of the values'.
        CONFIG: a DecodeConfig.
        Others: as for triton/kernels/decode.py.
    """
    space = IterationSpace(
        requests_ptr, query_start_loc_ptr, seq_lens_ptr, num_reqs, window, gl.to_tensor(1), CONFIG
    )
    keys = Pages(k_desc, block_table_ptr, table_stride, k_block_rows, k_head_rows, k_head_columns)
    values = Pages(v_desc, block_table_ptr, table_stride, v_block_rows, v_head_rows, v_head_columns)
    scale = Scale(scale_log2, cap_log2, scale_over_cap, slopes_ptr)
    output = Output(
        out_ptr, lse_ptr, sinks_ptr, gl.to_tensor(out_stride_t), gl.to_tensor(out_stride_h), CONFIG
    )
    parts = Parts(part_out_ptr, part_lse_ptr, counters_ptr)
    PROGRAMS: gl.constexpr = CONFIG.PROGRAMS
    buffers = _allocate(k_desc.dtype, CONFIG)
    fence_async_shared()

    output.store_empty(space)
    size = space.size()
    tiles_per_program = space.tiles_per_program(size)
    program = gl.program_id(0) * PROGRAMS
    share = space.share(program, size, tiles_per_program)
    # Triton 3.6 stores what the partitions take into the shared memory of the last reduction, while
    # other warps may still read its result. Later versions have this barrier of their own.
    if PROGRAMS == 1:
        barrier()
        gl.warp_specialize(
            [
                (_consumer, (share, buffers, scale, output, parts, q_ptr, q_stride_t, q_stride_h)),
                (_producer, (share, buffers, keys, values)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        buffers_1 = buffers.of(1)
        share_1 = space.share(program + 1, size, tiles_per_program)
        barrier()
        gl.warp_specialize(
            [
                (_consumer, (share, buffers, scale, output, parts, q_ptr, q_stride_t, q_stride_h)),
                (_consumer, (
                    share_1, buffers_1, scale, output, parts, q_ptr, q_stride_t, q_stride_h,
                )),
                (_producer, (share, buffers, keys, values)),
                (_producer, (share_1, buffers_1, keys, values)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    output.store_padding(gl.load(query_start_loc_ptr + all_reqs), num_rows)
