"""Prefill for Hopper, in Gluon: wgmma, TMA and specialized warps.

This is FlashAttention 3's plan (arXiv:2407.08608), with the online softmax (arXiv:1805.02867). A
producer warp loads queries, keys and values by TMA, keys and values through rings in shared memory.
Two warp groups compute 64 query rows each and share the keys. Each issues the next tile's scores
before the softmax of the last, so that the tensor cores stay busy. Tiles that rows see only in part
are masked and come first and last; the pipelined loop between them has no masks.

There is one program for each SM. Its producer takes work tiles from a list, one at a time and by a
counter in memory, so that all programs end at about the same time however different the work tiles
are; FlashAttention 3 does the same. The loads for the next work tile are under way while the last
one is finished and stored.

Keys and values are read from the pages of the cache, or from the new rows of this step if a request
has no others. Pages that TMA cannot read, or not in the layer's dtype, are copied by a warp group
in place of the producer warp (`copied.py`). Where the host does not know which requests have a
past, the device decides, by request. What lies before a request's first visible key and behind its
last one may be anything: the consumers replace such values by zeros, since 0 * NaN is NaN.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.cuda.hopper.copied import CopiedPages, copy_keys
from attn_dispatch.backends.cuda.hopper.epilogue import Output
from attn_dispatch.backends.cuda.hopper.pages import Pages
from attn_dispatch.backends.cuda.hopper.prefill_schedule import Schedule, WorkTile
from attn_dispatch.backends.cuda.hopper.scores import (
    ANY,
    MASKED,
    Scale,
    no_score,
    sees_no_key,
    tanh,
    where_below,
)
from attn_dispatch.backends.cuda.hopper.tma_ring import (
    TmaRing,
    aggregate,
    load_columns,
    make_ring,
    mma_layout,
    reinterpret,
    row_layout,
    tile_layout,
)
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["hopper_prefill_kernel"]

_BOX = gl.constexpr(64)  # rows of a part of a tile


@aggregate
class _Rows:
    """A warp group's 64 query rows of a work tile, and what turns their scores into weights.

    ALiBi's slope * (column - row) is taken apart: `col_bias` is that of the column in its tile, the
    tile's is added once for each row, and what is the same for all keys of a row is left out.
    """

    q_ring: TmaRing
    q_tile: gl.tensor
    positions: gl.tensor
    col: gl.tensor
    col_bias: gl.tensor
    slope: gl.tensor
    work: WorkTile
    scale: Scale
    window: gl.tensor
    hidden: gl.shared_memory_descriptor
    config: gl.constexpr
    WHICH: gl.constexpr

    @gluon.jit
    def unit(self):
        """What takes running maxima to units of log2."""
        if self.config.ALIBI:
            return 1.0
        elif self.config.CAP:
            return self.scale.cap_log2
        else:
            return self.scale.scale_log2

    @gluon.jit
    def query_tile(self, zero):
        """The number of the tile of queries, plus a number that is 0 when the kernel runs.

        Each place that issues scores takes another zero, which no compiler knows. Where they were
        equal, ptxas 12.8 computed the descriptors of the queries in front of one loop of key tiles,
        and used them in the next one also if the first had been skipped.
        """
        return self.q_tile + (zero >> 28)

    @gluon.jit
    def issue_scores(self, q_tile, k_ring, stage):
        """Issue the products of a tile of queries and the keys in a stage of the ring."""
        ROWS: gl.constexpr = self.q_ring.tiles.shape[1]
        BLOCK_N: gl.constexpr = self.config.BLOCK_N
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, mma_layout(BLOCK_N))
        q = self.q_ring.tiles.index(q_tile)
        k = k_ring.tiles.index(stage).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        if self.config.TAIL:
            k = k_ring.tail.index(stage).permute((1, 0))
            s = warpgroup_mma(self.q_ring.tail.index(q_tile), k, s, is_async=True)
        return s

    @gluon.jit
    def issue_output(self, weights, v_ring, stage, acc, tail):
        """Issue the product of weights and the values in a stage of the ring."""
        acc = warpgroup_mma(weights, v_ring.tiles.index(stage), acc, is_async=True)
        if self.config.TAIL_V:
            TAIL: gl.constexpr = mma_layout(self.config.TAIL_V)
            weights = gl.convert_layout(weights, gl.DotOperandLayout(0, TAIL, 2))
            tail = warpgroup_mma(weights, v_ring.tail.index(stage), tail, is_async=True)
        return acc, tail

    @gluon.jit
    def wait_output(self, acc, tail):
        """Wait for all products."""
        if self.config.TAIL_V:
            acc, tail = warpgroup_mma_wait(0, deps=[acc, tail])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        return acc, tail

    @gluon.jit
    def softmax(self, s, m_i, l_i, i, IS_MASKED: gl.constexpr):
        """Weights of the i-th tile of scores: (weights, m_i, l_i, factor on what was before).

        m_i is in the unit that `unit` takes to log2's.
        """
        config: gl.constexpr = self.config
        scale = self.scale
        first_col = (self.work.last_tile - i) * config.BLOCK_N
        tile_bias = self.slope * (first_col - self.work.first_position)
        if config.CAP:
            s = tanh(s * scale.scale_over_cap)
        c = self.unit()
        if config.ALIBI:
            s = s * (scale.cap_log2 if config.CAP else scale.scale_log2) + self.col_bias[None, :]
        if IS_MASKED:
            rows = self.positions
            cols = first_col + self.col
            distance = rows[:, None] - cols[None, :]
            if config.CAUSAL:  # no row that is stored comes after the last key
                s = where_below(s, distance, self.window if config.WINDOW else ANY)
            else:
                s = where_below(s, (self.work.seq_len - 1 - cols)[None, :], ANY)
                if config.WINDOW:
                    s = where_below(s, distance + (self.window - 1), 2 * self.window - 1)
        largest = gl.max(s, 1)
        if config.ALIBI:
            largest = gl.where(no_score(largest), MASKED, largest + tile_bias)
        m_new = gl.maximum(m_i, largest)
        # Without a score so far, the rounding of a huge product would be a huge difference.
        scaled = gl.where(no_score(m_new), 0.0, m_new * c)
        if config.ALIBI:
            p = gl.exp2(s - (scaled - tile_bias)[:, None])
        else:
            p = gl.exp2(s * c - scaled[:, None])
        alpha = gl.exp2(m_i * c - scaled)
        l_i = l_i * alpha + gl.sum(p, 1)
        return p, m_new, l_i, alpha

    @gluon.jit
    def rescale(self, acc, tail, factor):
        """Outputs times a factor for each row."""
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
        if self.config.TAIL_V:
            tail = tail * gl.convert_layout(factor, gl.SliceLayout(1, tail.type.layout))[:, None]
        return acc, tail

    @gluon.jit
    def operand(self, p):
        """Weights as an operand of the product with the values."""
        OUT: gl.constexpr = mma_layout(self.config.MAIN_V)
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
        return gl.convert_layout(p.to(self.q_ring.tiles.dtype), WEIGHTS)

    @gluon.jit
    def hide_values(self, v_ring, n, i, turn):
        """Zero values of the i-th tile that no query of the request sees; return the next turn.

        Each warp group zeroes every other box of the tile, and waits for the other one. Both come
        here at the same tiles.
        """
        BLOCK_N: gl.constexpr = self.config.BLOCK_N
        first = (self.work.last_tile - i) * BLOCK_N
        first_key = self.work.first_key(self.window, self.config.WINDOW)
        if (first + BLOCK_N > self.work.seq_len) | (first < first_key):
            stage = v_ring.wait(n)
            self._hide_boxes(v_ring.tiles, stage, first, first_key)
            if self.config.TAIL_V:
                self._hide_boxes(v_ring.tail, stage, first, first_key)
            fence_async_shared()
            mbarrier.arrive(self.hidden)
            mbarrier.wait(self.hidden, turn & 1)
            turn += 1
        return turn

    @gluon.jit
    def _hide_boxes(self, tiles, stage, first, first_key):
        dtype: gl.constexpr = tiles.dtype
        WIDTH: gl.constexpr = self.config.COLUMNS
        LAYOUT: gl.constexpr = row_layout(WIDTH)
        PER_PART: gl.constexpr = tiles.shape[1] // _BOX
        BOXES: gl.constexpr = PER_PART * tiles.shape[2] // WIDTH
        ALL: gl.constexpr = tiles.shape[0] * BOXES
        boxes = reinterpret(tiles, dtype, [ALL, _BOX, WIDTH], tile_layout(WIDTH))
        for b in range(self.WHICH, BOXES, 2):
            box = boxes.index(stage * BOXES + b)
            key = first + b % PER_PART * _BOX + gl.arange(0, _BOX, gl.SliceLayout(1, LAYOUT))
            is_seen = (key >= first_key) & (key < self.work.seq_len)
            values = box.load(LAYOUT)
            box.store(gl.where(is_seen[:, None], values, gl.zeros_like(values)))

    @gluon.jit
    def begin_tile(self, acc, tail, m_i, l_i, k_ring, n, i):
        """Weights of the i-th tile, which is masked and has number n in the rings."""
        stage = k_ring.wait(n)
        s = self.issue_scores(self.query_tile(stage), k_ring, stage)
        s = warpgroup_mma_wait(0, deps=[s])
        k_ring.release(stage)
        p, m_i, l_i, alpha = self.softmax(s, m_i, l_i, i, True)
        acc, tail = self.rescale(acc, tail, alpha)
        return acc, tail, m_i, l_i, p

    @gluon.jit
    def finish_tile(self, acc, tail, weights, v_ring, n):
        """Add the values of tile number n by their weights, an operand."""
        stage = v_ring.wait(n)
        acc, tail = self.issue_output(weights, v_ring, stage, acc, tail)
        acc, tail = self.wait_output(acc, tail)
        v_ring.release(stage)
        return acc, tail

    @gluon.jit
    def pass_by(self, k_ring, v_ring, n, turn):
        """Let a work tile pass in which the warp group has no rows; return hide_values' turn."""
        for i in range(0, self.work.num_tiles):
            k_ring.release(k_ring.wait(n + i))
            turn = self.hide_values(v_ring, n + i, i, turn)
            v_ring.release(v_ring.wait(n + i))
        return turn

    @gluon.jit
    def store(self, acc, tail, m_i, l_i, output):
        """Store the rows."""
        config: gl.constexpr = self.config
        work = self.work
        head = work.head
        ROWS: gl.constexpr = self.q_ring.tiles.shape[1]
        no_key = sees_no_key(self.positions, work.seq_len, self.window, config)
        low = no_score(m_i)
        m_log2 = m_i * self.unit()
        if config.ALIBI:  # slope * (column - row) is what was added, less this
            m_log2 = m_log2 - self.slope * (self.positions - work.first_position).to(gl.float32)
        m_log2 = gl.where(low, 0.0, m_log2)
        first = work.first_token + self.WHICH * ROWS
        r = first + gl.arange(0, ROWS, gl.SliceLayout(1, mma_layout(config.BLOCK_N)))
        lse_ptrs = output.lse_ptr + (work.q_start + r).to(gl.int64) * config.NUM_HEADS + head
        sink = l_i
        if config.SINKS:
            sink = gl.load(output.sinks_ptr + head)
        factor = output.normalizer(m_log2, low, l_i, no_key, sink, lse_ptrs, r < work.q_len)
        acc, tail = self.rescale(acc, tail, factor)
        self._store_columns(acc, no_key, first, output, 0)
        if config.TAIL_V:
            self._store_columns(tail, no_key, first, output, config.MAIN_V)

    @gluon.jit
    def _store_columns(self, out, no_key, first, output, FIRST: gl.constexpr):
        """Store the rows' columns from FIRST on."""
        work = self.work
        LAYOUT: gl.constexpr = row_layout(out.shape[1])
        OUT: gl.constexpr = out.type.layout
        hidden = gl.convert_layout(no_key.to(gl.int32), gl.SliceLayout(1, OUT)) != 0
        out = gl.where(hidden[:, None], 0.0, out)
        out = gl.convert_layout(out.to(output.out_ptr.dtype.element_ty), LAYOUT)
        r = first + gl.arange(0, out.shape[0], gl.SliceLayout(1, LAYOUT))
        output.store(out, work.q_start + r, work.head, r < work.q_len, FIRST)


@gluon.jit
def _attend(rows, q_ring, q_stage, k_ring, v_ring, n, turn, output):
    """A warp group's rows of a work tile; its first key tile has number n in the rings."""
    work = rows.work
    CONFIG: gl.constexpr = rows.config
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    MAIN_V: gl.constexpr = CONFIG.MAIN_V
    TAIL_V: gl.constexpr = CONFIG.TAIL_V
    ROWS: gl.constexpr = q_ring.tiles.shape[1]
    SCORES: gl.constexpr = mma_layout(BLOCK_N)
    m_i = gl.full([ROWS], MASKED, gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, MAIN_V], gl.float32, mma_layout(MAIN_V))
    tail = gl.to_tensor(0.0)
    if TAIL_V:
        tail = gl.zeros([ROWS, TAIL_V], gl.float32, mma_layout(TAIL_V))
    first_left = work.num_tiles - work.num_left
    begin = gl.maximum(work.num_right - 1, 0)  # the pipeline begins with this tile
    for i in range(0, begin):
        acc, tail, m_i, l_i, p = rows.begin_tile(acc, tail, m_i, l_i, k_ring, n + i, i)
        turn = rows.hide_values(v_ring, n + i, i, turn)
        acc, tail = rows.finish_tile(acc, tail, rows.operand(p), v_ring, n + i)
    if work.num_tiles > 0:
        acc, tail, m_i, l_i, p = rows.begin_tile(acc, tail, m_i, l_i, k_ring, n + begin, begin)
        turn = rows.hide_values(v_ring, n + begin, begin, turn)
        weights = rows.operand(p)
        q_tile = rows.query_tile(first_left)  # here, so that the loop does not compute it again
        for i in range(begin + 1, first_left):
            stage = k_ring.wait(n + i)
            s = rows.issue_scores(q_tile, k_ring, stage)
            before = v_ring.wait(n + i - 1)
            acc, tail = rows.issue_output(weights, v_ring, before, acc, tail)
            s = warpgroup_mma_wait(2 if TAIL_V else 1, deps=[s])
            k_ring.release(stage)
            p, m_i, l_i, alpha = rows.softmax(s, m_i, l_i, i, False)
            acc, tail = rows.wait_output(acc, tail)
            v_ring.release(before)
            acc, tail = rows.rescale(acc, tail, alpha)
            weights = rows.operand(p)
        if not CONFIG.WINDOW:
            q_ring.release(q_stage)
        end = gl.maximum(first_left, begin + 1)
        acc, tail = rows.finish_tile(acc, tail, weights, v_ring, n + end - 1)
        if CONFIG.WINDOW:
            for i in range(end, work.num_tiles):
                acc, tail, m_i, l_i, p = rows.begin_tile(acc, tail, m_i, l_i, k_ring, n + i, i)
                turn = rows.hide_values(v_ring, n + i, i, turn)
                acc, tail = rows.finish_tile(acc, tail, rows.operand(p), v_ring, n + i)
            q_ring.release(q_stage)
    else:
        q_ring.release(q_stage)
    rows.store(acc, tail, m_i, l_i, output)
    return turn


@gluon.jit
def _consumer(WHICH: gl.constexpr, schedule, q_ring, k_ring, v_ring, hidden, scale, output):
    """A warp group: 64 rows of each work tile, over its key tiles, last keys first."""
    CONFIG: gl.constexpr = schedule.config
    ROWS: gl.constexpr = q_ring.tiles.shape[1]
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    SCORES: gl.constexpr = mma_layout(BLOCK_N)
    col = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    n = 0  # tiles taken from the rings before this work tile
    turn = 0  # of hide_values
    number = 0  # of work tiles before this one
    q_stage = q_ring.wait(0)
    work = schedule.receive(q_stage)
    while work.head >= 0:
        q_tile = gl.to_tensor(q_stage * 2 + WHICH)
        slope = gl.to_tensor(0.0)
        col_bias = col
        if CONFIG.ALIBI:
            slope = gl.load(scale.slopes_ptr + work.head) * LOG2E
            col_bias = slope * col.to(gl.float32)
        positions = work.first_position + WHICH * ROWS
        positions = positions + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        rows = _Rows(
            q_ring, q_tile, positions, col, col_bias, slope, work, scale, schedule.window, hidden,
            CONFIG, WHICH,
        )  # fmt: skip
        if work.first_token + WHICH * ROWS < work.q_len:
            turn = _attend(rows, q_ring, q_stage, k_ring, v_ring, n, turn, output)
        else:
            q_ring.release(q_stage)
            turn = rows.pass_by(k_ring, v_ring, n, turn)
        n += work.num_tiles
        number += 1
        q_stage = q_ring.wait(number)
        work = schedule.receive(q_stage)


@gluon.jit
def _producer(schedule, q_desc, new_k_desc, new_v_desc, keys, values, q_ring, k_ring, v_ring):
    """The queries of each work tile, then its keys and values through the rings.

    One warp; or four, where pages are copied.
    """
    CONFIG: gl.constexpr = schedule.config
    D: gl.constexpr = CONFIG.D
    ROWS: gl.constexpr = q_ring.tiles.shape[1]
    n = 0  # key tiles before this work tile
    number = 0  # of work tiles before this one
    index = schedule.first()
    while index < schedule.num_tiles:
        work, request = schedule.work_tile(index)
        index = schedule.take()  # its latency passes during the loads
        q_row = work.q_start + work.first_token
        stage = q_ring.wait_empty(number)
        full = q_ring.full.index(stage)
        schedule.send(stage, work.head, work.q_start, work.q_len, work.seq_len, work.first_token)
        mbarrier.expect(full, q_ring.TILE_BYTES)
        for half in gl.static_range(2):
            load_columns(q_ring, stage * 2 + half, full, q_desc, q_row + half * ROWS, work.head * D)
        if CONFIG.HAS_FRESH:
            if work.seq_len == work.q_len:
                _load_rows(work, n, work.q_start, new_k_desc, new_v_desc, k_ring, v_ring, CONFIG)
            else:
                _load_keys(work, request, n, schedule, keys, values, k_ring, v_ring)
        else:
            _load_keys(work, request, n, schedule, keys, values, k_ring, v_ring)
        n += work.num_tiles
        number += 1
    stage = q_ring.wait_empty(number)
    schedule.send(stage, -1, 0, 0, 0, 0)
    mbarrier.arrive(q_ring.full.index(stage))
    schedule.finish()


@gluon.jit
def _load_keys(work, request, n, schedule, keys, values, k_ring, v_ring):
    """Load a work tile's key tiles, from pages or rows; the first has number n in the rings."""
    CONFIG: gl.constexpr = schedule.config
    kv_head = work.head // CONFIG.GROUP
    if CONFIG.BLOCK_SIZE == 0:
        key_start = gl.load(keys.table_ptr + request)
        _load_rows(work, n, key_start, keys.desc, values.desc, k_ring, v_ring, CONFIG)
    elif CONFIG.COPIES:
        first_key = work.first_key(schedule.window, CONFIG.WINDOW)
        copy_keys(work, request, first_key, n, keys, values, k_ring, v_ring, CONFIG)
    else:
        first_key = work.first_key(schedule.window, CONFIG.WINDOW)
        table = keys.table_of(request)
        for i in range(0, work.num_tiles):
            first = (work.last_tile - i) * CONFIG.BLOCK_N
            # Before the ring has room, so that their latency passes in that time.
            blocks = keys.blocks(table, first, first_key, work.seq_len - 1, CONFIG)
            keys.load(k_ring, n + i, blocks, first, kv_head, CONFIG)
            values.load(v_ring, n + i, blocks, first, kv_head, CONFIG)


@gluon.jit
def _load_rows(work, n, key_start, k_desc, v_desc, k_ring, v_ring, CONFIG: gl.constexpr):
    """Load a work tile's key tiles from contiguous rows."""
    kv_head = work.head // CONFIG.GROUP
    for i in range(0, work.num_tiles):
        row = key_start + (work.last_tile - i) * CONFIG.BLOCK_N
        stage = k_ring.acquire(n + i)
        load_columns(k_ring, stage, k_ring.full.index(stage), k_desc, row, kv_head * CONFIG.D)
        stage = v_ring.acquire(n + i)
        load_columns(v_ring, stage, v_ring.full.index(stage), v_desc, row, kv_head * CONFIG.D_V)


#: Parameters whose values the compiled code does not depend on.
_COUNTS = "window num_tiles table_stride k_step_0 k_step_1 k_step_2 v_step_0 v_step_1 v_step_2"
_COUNTS = _COUNTS.split()


@gluon.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=METADATA)
def hopper_prefill_kernel(
    q_desc, k_src, v_src, new_k_desc, new_v_desc, out_ptr, lse_ptr, tiles_ptr, counters_ptr,
    seq_lens_ptr, table_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, num_tiles,
    table_stride, k_step_0, k_step_1, k_step_2, v_step_0, v_step_1, v_step_2, out_stride_t,
    out_stride_h, window, scale_log2, cap_log2, scale_over_cap, CONFIG: gl.constexpr,
):  # fmt: skip
    """Attention of a list of work tiles: 128 query tokens of one head each.

    Grid: any number of programs; one for each SM.

    Args:
        q_desc: (num_tokens, NUM_HEADS * D), blocks of 64 by CONFIG.COLUMNS.
        k_src, v_src: pages as matrices, see pages.py; where CONFIG.BLOCK_SIZE is 0, rows:
            (rows, num_kv_heads * D or D_V), blocks of BLOCK_N by CONFIG.COLUMNS; with CONFIG.FORMAT
            pages, see copied.py.
        new_k_desc, new_v_desc: the same of the step's new keys, whose rows are those of the
            queries; read with HAS_FRESH, for requests that have no other keys.
        tiles_ptr: (num_tiles / NUM_HEADS, 4) int32: the request's first query row and number of
            queries, the work tile's first token among them, the request; each for all heads, which
            vary fastest, so that concurrent work tiles share keys.
        counters_ptr: (2,) int32, zeros, which are zero again afterwards.
        seq_lens_ptr: (num_reqs,) int32, the number of keys of each request.
        table_ptr: the block table; or (num_reqs,) int32, where each request's rows of keys begin.
        k_scale_ptr, v_scale_ptr: see copied.py.
        num_tiles: of all heads.
        k_step_0 and so on: where pages are, see pages.py or copied.py.
        CONFIG: a PrefillConfig.
        Others: as for triton/kernels/prefill.py.
    """
    STAGES: gl.constexpr = CONFIG.STAGES
    Q_STAGES: gl.constexpr = CONFIG.Q_STAGES
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = tile_layout(CONFIG.COLUMNS)
    q_ring = make_ring(dtype, Q_STAGES, 2 * Q_STAGES, 64, CONFIG.MAIN, TILE, 2, 1, CONFIG.TAIL)
    k_ring = make_ring(dtype, STAGES, STAGES, BLOCK_N, CONFIG.MAIN, TILE, 2, 1, CONFIG.TAIL)
    v_ring = make_ring(dtype, STAGES, STAGES, BLOCK_N, CONFIG.MAIN_V, TILE, 2, 1, CONFIG.TAIL_V)
    hidden = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(hidden, count=2)
    fence_async_shared()
    if CONFIG.COPIES:
        keys = CopiedPages(
            k_src, k_scale_ptr, table_ptr, table_stride, k_step_0, k_step_1, k_step_2, CONFIG
        )
        values = CopiedPages(
            v_src, v_scale_ptr, table_ptr, table_stride, v_step_0, v_step_1, v_step_2, CONFIG
        )
    else:
        keys = Pages(k_src, table_ptr, table_stride, k_step_0, k_step_1, k_step_2)
        values = Pages(v_src, table_ptr, table_stride, v_step_0, v_step_1, v_step_2)
    tickets = gl.allocate_shared_memory(
        gl.int32, [Q_STAGES * 5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    schedule = Schedule(tiles_ptr, seq_lens_ptr, counters_ptr, num_tiles, window, tickets, CONFIG)
    scale = Scale(scale_log2, cap_log2, scale_over_cap, slopes_ptr)
    output = Output(
        out_ptr, lse_ptr, sinks_ptr, gl.to_tensor(out_stride_t), gl.to_tensor(out_stride_h), CONFIG
    )
    # Written out: in a tuple that has a name, constants would no longer be constants.
    gl.warp_specialize(
        [
            (_consumer, (0, schedule, q_ring, k_ring, v_ring, hidden, scale, output)),
            (_consumer, (1, schedule, q_ring, k_ring, v_ring, hidden, scale, output)),
            (_producer, (
                schedule, q_desc, new_k_desc, new_v_desc, keys, values, q_ring, k_ring, v_ring,
            )),
        ],
        [4, CONFIG.PRODUCERS],
        [CONFIG.REGISTERS, CONFIG.PRODUCER_REGISTERS],
    )  # fmt: skip
