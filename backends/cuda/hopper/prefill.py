"""Prefill for Hopper, in Gluon: wgmma, TMA, and warps that specialize.

FlashAttention 3's plan (arXiv:2407.08608): one warp brings queries, keys and values by TMA, the
latter through a ring in shared memory; two warp groups take 64 query rows each and share what
comes; and each issues the next tile's scores before it works off the softmax of the last, so that
the tensor cores have something to do meanwhile. Tiles that rows see only in part are masked, and
come first and last; the others are not, and run in the pipelined loop between.

There is one program for each SM. It goes through a list of pieces of work, so that loads for the
next piece are under way while the last one is finished and stored.

Keys and values are contiguous rows, (tokens, num_kv_heads * head_size), gathered from pages before,
or those that the step brings. Behind a request's last key come zeros, to the end of its last tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.triton.launcher import METADATA

__all__ = [
    "LN2",
    "LOG2E",
    "NOTHING",
    "hopper_prefill_kernel",
    "load_tile",
    "mma_layout",
    "sees_nothing",
    "tanh",
]

# After Triton 3.6 it got another name.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

NOTHING = gl.constexpr(-1.0e30)  # a masked score; its infinity would make NaN of itself
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def mma_layout(n):
    """The layout of a warp group's product with n columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def _stored(n):
    """The layout in which rows of n 16-bit values are stored, 16 bytes a thread."""
    lanes = min(32, n // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def tanh(x):
    """NVIDIA's instruction, right to 2 ** -11."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def sees_nothing(q_pos, seq_len, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Which rows see no key, by their positions; no query stands behind the last key."""
    last = q_pos * 0 + seq_len - 1
    if CAUSAL:
        last = q_pos
    elif WINDOW:
        last = gl.minimum(last, q_pos + window - 1)
    return last < 0


@gluon.jit
def _unit(scale_log2, cap_log2, CAP: gl.constexpr, ALIBI: gl.constexpr):
    """What takes scores, as `_softmax` leaves them, to units of log2."""
    if ALIBI:
        return 1.0
    elif CAP:
        return cap_log2
    else:
        return scale_log2


@gluon.jit
def _softmax(
    s, m_i, l_i, rows, cols, col_bias, tile_bias, seq_len, window, scale_log2, cap_log2,
    scale_over_cap,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    """Weights of one tile of scores: (weights, m_i, l_i, factor on what was before).

    m_i is in the unit that `_unit` takes to log2's. ALiBi's slope * (column - row) is taken apart:
    col_bias is that of the column in its tile, tile_bias that of the tile, and what is the same
    for all keys of a row is left out.
    """
    if CAP:
        s = tanh(s * scale_over_cap)
    c = _unit(scale_log2, cap_log2, CAP, ALIBI)
    if ALIBI:
        s = s * (cap_log2 if CAP else scale_log2) + col_bias[None, :]
    if MASKED:
        if CAUSAL:  # and no row that is stored stands behind the last key
            seen = cols[None, :] <= rows[:, None]
        else:
            seen = (cols < seq_len)[None, :]
        if WINDOW:
            seen = seen & (cols[None, :] > (rows - window)[:, None])
            if not CAUSAL:
                seen = seen & (cols[None, :] < (rows + window)[:, None])
        s = gl.where(seen, s, NOTHING)
    largest = gl.max(s, 1)
    if ALIBI:  # the bias of the whole tile is added where it is added once a row
        largest = gl.where(largest <= -1.0e29, NOTHING, largest + tile_bias)
    m_new = gl.maximum(m_i, largest)
    # Where a row has seen nothing yet, the rounding of a huge product would be a huge difference.
    scaled = gl.where(m_new <= -1.0e29, 0.0, m_new * c)
    if ALIBI:
        p = gl.exp2(s - (scaled - tile_bias)[:, None])
    else:
        p = gl.exp2(s * c - scaled[:, None])
    alpha = gl.exp2(m_i * c - scaled)
    l_i = l_i * alpha + gl.sum(p, 1)
    return p, m_new, l_i, alpha


@gluon.jit
def _piece_of(round_, program, num_programs):
    """Which piece a program takes in a round: forth and back, so that all get about the same."""
    place = gl.where(round_ % 2 == 0, program, num_programs - 1 - program)
    return round_ * num_programs + place


@gluon.jit
def _rounds_of(program, num_programs, num_pieces):
    """How many pieces a program gets."""
    whole = num_pieces // num_programs
    last = _piece_of(whole, program, num_programs)
    return whole + (last < num_pieces).to(gl.int32)


@gluon.jit
def _bounds(
    piece_ptr, window, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr
):  # fmt: skip
    """Of a piece: where its queries are, and which tiles of keys they see, whole or in part.

    Returns:
        q_start, q_len, first_token: of the request, and of the piece in it.
        past, seq_len: of the request.
        end_tile, num_tiles: tiles are [end_tile - num_tiles, end_tile), and are taken from the end.
        num_right, num_left: how many at the end and at the beginning are seen in part.
    """
    q_start = gl.load(piece_ptr)
    q_len = gl.load(piece_ptr + 1)
    first_token = gl.load(piece_ptr + 2)
    seq_len = gl.load(piece_ptr + 3)
    past = seq_len - q_len
    first = past + first_token
    last = past + gl.minimum(first_token + 128, q_len) - 1
    lo = 0  # [lo, hi) is seen by some row, [full_lo, full_hi) by every row
    full_lo = 0
    hi = seq_len
    full_hi = seq_len
    if CAUSAL:
        hi = gl.minimum(seq_len, last + 1)
        full_hi = gl.minimum(seq_len, first + 1)
    if WINDOW:
        lo = gl.maximum(0, first - window + 1)
        full_lo = gl.maximum(0, last - window + 1)
        if not CAUSAL:
            hi = gl.minimum(seq_len, last + window)
            full_hi = gl.minimum(seq_len, first + window)
    first_tile = lo // BLOCK_N
    end_tile = gl.maximum((gl.maximum(hi, 0) + BLOCK_N - 1) // BLOCK_N, first_tile)
    full_end = gl.maximum(gl.minimum(gl.maximum(full_hi, 0) // BLOCK_N, end_tile), first_tile)
    full_first = gl.minimum((full_lo + BLOCK_N - 1) // BLOCK_N, full_end)
    num_left = 0
    if WINDOW:
        num_left = full_first - first_tile
    return (
        q_start, q_len, first_token, past, seq_len, end_tile, end_tile - first_tile,
        end_tile - full_end, num_left,
    )  # fmt: skip


@gluon.jit
def _masked_tile(
    came, tile, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, m_i, l_i, rows, col, zero,
    col_bias, first, seq_len, window, slope, scale_log2, cap_log2, scale_over_cap,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """One tile from beginning to end; `came` tiles came through the ring before."""
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    OUT: gl.constexpr = mma_layout(k_smem.shape[2])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    stage = came % STAGES
    phase = (came // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage))
    p, m_i, l_i, alpha = _softmax(
        s, m_i, l_i, rows, tile * BLOCK_N + col, col_bias, slope * (tile * BLOCK_N - first),
        seq_len, window, scale_log2, cap_log2, scale_over_cap, True, CAUSAL, WINDOW, CAP, ALIBI,
    )  # fmt: skip
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    mbarrier.wait(v_full.index(stage), phase)
    weights = gl.convert_layout(p.to(k_smem.dtype), WEIGHTS)
    acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(stage))
    return acc, m_i, l_i


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_ptr, lse_ptr, pieces_ptr, num_pieces, slopes_ptr, sinks_ptr, window, scale_log2, cap_log2,
    scale_over_cap, out_stride_t, out_stride_h,
    NUM_HEADS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
    ALIBI: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of each piece, over its tiles of keys, last keys first."""
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    ROWS: gl.constexpr = q_smem.shape[1]
    SCORES: gl.constexpr = mma_layout(BLOCK_N)
    OUT: gl.constexpr = mma_layout(D)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    STORED: gl.constexpr = _stored(D)
    dtype: gl.constexpr = q_smem.dtype
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    q = q_smem.index(WHICH)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    col = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    came = 0
    for round_ in range(0, _rounds_of(program, num_programs, num_pieces)):
        piece = _piece_of(round_, program, num_programs)
        head = piece % NUM_HEADS
        piece_ptr = pieces_ptr + piece // NUM_HEADS * 8
        q_start, q_len, first_token, past, seq_len, end_tile, num_tiles, num_right, num_left = (
            _bounds(piece_ptr, window, BLOCK_N, CAUSAL, WINDOW)
        )
        slope = 0.0
        col_bias = col
        if ALIBI:
            slope = gl.load(slopes_ptr + head) * LOG2E
            col_bias = slope * col.to(gl.float32)
        m_i = gl.full([ROWS], NOTHING, gl.float32, gl.SliceLayout(1, SCORES))
        l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        first = past + first_token
        rows = first + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        last_tile = end_tile - 1
        first_left = num_tiles - num_left
        begin = gl.maximum(num_right - 1, 0)  # with this tile the pipeline begins
        mbarrier.wait(q_full, round_ & 1)
        for i in range(0, begin):
            acc, m_i, l_i = _masked_tile(
                came + i, last_tile - i, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc,
                m_i, l_i, rows, col, zero, col_bias, first, seq_len, window, slope, scale_log2,
                cap_log2, scale_over_cap, CAUSAL, WINDOW, CAP, ALIBI,
            )  # fmt: skip
        if num_tiles > 0:
            stage = (came + begin) % STAGES
            phase = ((came + begin) // STAGES) & 1
            tile = last_tile - begin
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(
                q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            p, m_i, l_i, alpha = _softmax(
                s, m_i, l_i, rows, tile * BLOCK_N + col, col_bias,
                slope * (tile * BLOCK_N - first), seq_len, window, scale_log2, cap_log2,
                scale_over_cap, True, CAUSAL, WINDOW, CAP, ALIBI,
            )  # fmt: skip
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            weights = gl.convert_layout(p.to(dtype), WEIGHTS)
            for i in range(begin + 1, first_left):
                stage = (came + i) % STAGES
                before = (came + i - 1) % STAGES
                tile = last_tile - i
                mbarrier.wait(k_full.index(stage), ((came + i) // STAGES) & 1)
                s = warpgroup_mma(
                    q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(before), ((came + i - 1) // STAGES) & 1)
                acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                p, m_i, l_i, alpha = _softmax(
                    s, m_i, l_i, rows, tile * BLOCK_N + col, col_bias,
                    slope * (tile * BLOCK_N - first), seq_len, window, scale_log2, cap_log2,
                    scale_over_cap, False, CAUSAL, WINDOW, CAP, ALIBI,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(before))
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
                weights = gl.convert_layout(p.to(dtype), WEIGHTS)
            if not WINDOW:
                mbarrier.arrive(q_empty)
            end = gl.maximum(first_left, begin + 1)
            before = (came + end - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((came + end - 1) // STAGES) & 1)
            acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(before))
            if WINDOW:
                for i in range(end, num_tiles):
                    acc, m_i, l_i = _masked_tile(
                        came + i, last_tile - i, q, k_smem, v_smem, k_full, k_empty, v_full,
                        v_empty, acc, m_i, l_i, rows, col, zero, col_bias, first, seq_len, window,
                        slope, scale_log2, cap_log2, scale_over_cap, CAUSAL, WINDOW, CAP, ALIBI,
                    )  # fmt: skip
                mbarrier.arrive(q_empty)
        else:
            mbarrier.arrive(q_empty)
        came += num_tiles

        # A NaN among a row's scores is in the sum of its weights; no maximum shows it.
        nothing = sees_nothing(rows, seq_len, window, CAUSAL, WINDOW)
        low = m_i <= -1.0e29  # no score above −inf
        m_log2 = m_i * _unit(scale_log2, cap_log2, CAP, ALIBI)
        if ALIBI:  # slope * (column - row) is what was added, less this
            m_log2 = m_log2 - slope * (rows - first).to(gl.float32)
        m_log2 = gl.where(low, 0.0, m_log2)
        tokens = first_token + WHICH * ROWS
        if LSE:
            lse = gl.where(low, float("nan"), (m_log2 + gl.log2(l_i)) * LN2)
            lse = gl.where(nothing, float("-inf"), lse)
            r = tokens + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
            gl.store(lse_ptr + (q_start + r).to(gl.int64) * NUM_HEADS + head, lse, mask=r < q_len)
        total = l_i
        if SINKS:
            sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
            total = total + gl.exp2(sink - m_log2)
        out = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
        hidden = gl.convert_layout(nothing.to(gl.int32), gl.SliceLayout(1, OUT)) != 0
        out = gl.where(hidden[:, None], 0.0, out)
        out = gl.convert_layout(out.to(dtype), STORED)
        r = tokens + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
        d = gl.arange(0, D, gl.SliceLayout(0, STORED))
        offsets = (q_start + r).to(gl.int64) * out_stride_t + head.to(gl.int64) * out_stride_h
        gl.store(out_ptr + offsets[:, None] + d[None, :], out, mask=(r < q_len)[:, None])


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, pieces_ptr, num_pieces, key_start_loc_ptr, window,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: of each piece the queries, then keys and values through the ring."""
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    ROWS: gl.constexpr = q_smem.shape[1]
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    came = 0
    for round_ in range(0, _rounds_of(program, num_programs, num_pieces)):
        piece = _piece_of(round_, program, num_programs)
        head = piece % NUM_HEADS
        piece_ptr = pieces_ptr + piece // NUM_HEADS * 8
        q_start, _, first_token, _, _, end_tile, num_tiles, _, _ = _bounds(
            piece_ptr, window, BLOCK_N, CAUSAL, WINDOW
        )
        key_start = gl.load(key_start_loc_ptr + gl.load(piece_ptr + 4))
        mbarrier.wait(q_empty, (round_ & 1) ^ 1)
        mbarrier.expect(q_full, 2 * ROWS * D * 2)
        load_tile(q_desc, [q_start + first_token, head * D], q_full, q_smem.index(0))
        load_tile(q_desc, [q_start + first_token + ROWS, head * D], q_full, q_smem.index(1))
        for i in range(0, num_tiles):
            stage = (came + i) % STAGES
            phase = (((came + i) // STAGES) & 1) ^ 1
            row = key_start + (end_tile - 1 - i) * BLOCK_N
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BLOCK_N * D * 2)
            load_tile(k_desc, [row, head // GROUP * D], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BLOCK_N * D * 2)
            load_tile(v_desc, [row, head // GROUP * D], v_full.index(stage), v_smem.index(stage))
        came += num_tiles


@gluon.jit(do_not_specialize=["window", "num_pieces"], do_not_specialize_on_alignment=METADATA)
def hopper_prefill_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, pieces_ptr, key_start_loc_ptr, slopes_ptr, sinks_ptr,
    num_pieces, out_stride_t, out_stride_h, window, scale_log2, cap_log2, scale_over_cap,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    CAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """Attention of the pieces of work in a list: 128 query tokens of one head each.

    Grid: any number of programs; one for each SM.

    Args:
        q_desc: (num_tokens, NUM_HEADS * D), blocks of 64 by D.
        k_desc, v_desc: (rows, num_kv_heads * D), blocks of BLOCK_N by D.
        pieces_ptr: (num_pieces / NUM_HEADS, 8) int32: where the request's queries begin, how many
            they are, the piece's first token among them, the request's keys, the request; each
            for all heads, which vary fastest, so that what runs together shares its keys.
        key_start_loc_ptr: (num_reqs,) int32, where each request's rows of keys begin.
        num_pieces: of all heads.
        REGISTERS: of each thread of the two warp groups that compute.
        Others: as for kernels/prefill.py.
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # Written out: in a tuple that has a name, constants would no longer be constants.
    gl.warp_specialize(
        [
            (_consumer, (
                0, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, pieces_ptr, num_pieces, slopes_ptr, sinks_ptr, window,
                scale_log2, cap_log2, scale_over_cap, out_stride_t, out_stride_h, NUM_HEADS,
                CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
            )),
            (_consumer, (
                1, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, pieces_ptr, num_pieces, slopes_ptr, sinks_ptr, window,
                scale_log2, cap_log2, scale_over_cap, out_stride_t, out_stride_h, NUM_HEADS,
                CAUSAL, WINDOW, CAP, ALIBI, SINKS, LSE,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, pieces_ptr, num_pieces, key_start_loc_ptr, window, NUM_HEADS,
                GROUP, CAUSAL, WINDOW,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
