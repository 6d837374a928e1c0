"""Multi-head latent attention in absorbed form for Hopper, in Gluon.

A key is a latent of 512 elements and a rotated part of 64, and the value is the latent, for all
query heads together (arXiv:2405.04434). So a tile of latents is loaded once by TMA, and multiplied
twice. Programs share the work by Stream-K (`stream_k.py`).

The output of 64 rows is 64 x 512 float32, as many registers as two warp groups have: each of them
has one half of its columns. They take turns with the scores: one computes those of the even key
tiles, and one those of the odd ones, so that one of them multiplies while the other computes
weights. The weights of a tile go to the other warp group through shared memory. The idea of the two
halves in turns is FlashMLA's ("seesaw", DeepSeek 2025).

Parts of work units are merged by all of their programs, which wait for each other (`mla_parts.py`).
So all programs must run at the same time: it is a cooperative launch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.cuda.hopper.epilogue import Output
from attn_dispatch.backends.cuda.hopper.mla_parts import (
    LATENT,
    OWN,
    ROWS,
    Parts,
    by_row,
    scaled,
)
from attn_dispatch.backends.cuda.hopper.pages import Pages
from attn_dispatch.backends.cuda.hopper.scores import MASKED, Scale, no_score, tanh
from attn_dispatch.backends.cuda.hopper.stream_k import IterationSpace
from attn_dispatch.backends.cuda.hopper.tma_ring import (
    aggregate,
    barrier,
    load_tile,
    mma_layout,
    reinterpret,
    row_layout,
)
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["hopper_mla_kernel"]

_BOX = gl.constexpr(64)  # 16-bit columns of a swizzled row of shared memory
_CHUNKS = gl.constexpr(8)  # boxes of a latent; the rotated part is one more
_ALL_KEYS = gl.constexpr(128)  # of all stages
_VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


#: Of the producer's one warp.
_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))

#: Parameters whose values the compiled code does not depend on.
_COUNTS = "num_reqs all_reqs num_rows table_stride window team block_rows".split()


@aggregate
class _Buffers:
    """A thread block's shared memory.

    Attributes:
        q, q_rotated: the queries of a work unit.
        latents, rotated: stages of key tiles. Tile number n is in stage n % STAGES, and the warp
            group n % 2 computes its scores.
        weights: of a tile, from each warp group for the other.
        largest, factor: of a tile, by row, from each warp group: the running maxima, and what the
            output was multiplied by.
        sums: of weights, by the parity of the work unit and warp group.
        q_full, q_empty, full, empty: barriers of the queries and of the stages.
        ready: for each warp group, that the weights of its tile are there.
        taken: for each warp group, that the other one has used them.
        summed: for each warp group, that its sums are there.
    """

    q: gl.shared_memory_descriptor
    q_rotated: gl.shared_memory_descriptor
    latents: gl.shared_memory_descriptor
    rotated: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    largest: gl.shared_memory_descriptor
    factor: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor
    summed: gl.shared_memory_descriptor
    KEYS: gl.constexpr
    STAGES: gl.constexpr

    @gluon.jit
    def wait_full(self, n):
        """Wait until tile n is loaded, and return its stage."""
        stage = n % self.STAGES
        mbarrier.wait(self.full.index(stage), n // self.STAGES & 1)
        return stage

    @gluon.jit
    def release(self, n):
        """Tile n's stage can be loaded again, if both warp groups say so."""
        mbarrier.arrive(self.empty.index(n % self.STAGES))

    @gluon.jit
    def values(self, n, WHICH: gl.constexpr):
        """A warp group's columns of tile n, (KEYS, 256)."""
        dtype: gl.constexpr = self.latents.dtype
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([self.KEYS, OWN], dtype)
        halves = reinterpret(self.latents, dtype, [2 * self.STAGES, self.KEYS, OWN], LAYOUT)
        return halves.index(2 * (n % self.STAGES) + WHICH)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def _allocate(dtype: gl.constexpr, KEYS: gl.constexpr):
    """The buffers. A fence must follow, before warp_specialize."""
    STAGES: gl.constexpr = _ALL_KEYS // KEYS
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, _BOX], dtype)
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, _BOX], dtype)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, KEYS], dtype)
    return _Buffers(
        gl.allocate_shared_memory(dtype, [ROWS, LATENT], Q),
        gl.allocate_shared_memory(dtype, [ROWS, _BOX], Q),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, LATENT], KV),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, _BOX], KV),
        gl.allocate_shared_memory(dtype, [2, ROWS, KEYS], P),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], _VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], _VECTOR),
        gl.allocate_shared_memory(gl.float32, [4, ROWS], _VECTOR),
        _barriers(1, 1),
        _barriers(1, 2),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(2, 1),
        _barriers(2, 1),
        _barriers(2, 1),
        KEYS,
        STAGES,
    )


@gluon.jit
def _load_queries(work, buffers, q_desc, q_rotated_desc, unit):
    """Load the queries of the program's work unit number `unit`. Other rows keep what they had."""
    Q_ROWS: gl.constexpr = q_rotated_desc.block_type.shape[0]
    dtype: gl.constexpr = q_desc.dtype
    row = work.q_start * work.config.GROUP + work.unit * ROWS
    mbarrier.wait(buffers.q_empty.index(0), (unit & 1) ^ 1)
    full = buffers.q_full.index(0)
    mbarrier.expect(full, Q_ROWS * 576 * 2)
    if Q_ROWS == ROWS:
        q = reinterpret(buffers.q, dtype, [1, _CHUNKS, Q_ROWS, _BOX], q_desc.layout)
        load_tile(q_desc, [0, row, 0], full, q.index(0))
    else:
        BOXES: gl.constexpr = _CHUNKS * (ROWS // Q_ROWS)
        q = reinterpret(buffers.q, dtype, [BOXES, Q_ROWS, _BOX], q_rotated_desc.layout)
        for c in gl.static_range(_CHUNKS):
            load_tile(q_rotated_desc, [row, c * _BOX], full, q.index(c * (ROWS // Q_ROWS)))
    ROTATED: gl.constexpr = [ROWS // Q_ROWS, Q_ROWS, _BOX]
    rotated = reinterpret(buffers.q_rotated, dtype, ROTATED, q_rotated_desc.layout)
    load_tile(q_rotated_desc, [row, LATENT], full, rotated.index(0))


@gluon.jit
def _blocks(pages, work, tile):
    """The blocks of the next 32 boxes from a tile on, one for each lane of the producer's warp.

    Boxes out of range are masked later: any block will do.
    """
    CONFIG: gl.constexpr = work.config
    PAGE: gl.constexpr = pages.desc.block_type.shape[0]
    key = tile * CONFIG.KEYS + gl.arange(0, 32, _LANES) * PAGE
    key = gl.minimum(gl.maximum(key, work.first_key), work.seq_len - 1)
    blocks_ptr = pages.table_of(work.request) + key // CONFIG.BLOCK_SIZE
    return gl.load(blocks_ptr, mask=key >= 0, other=0)  # a request without keys has no block


@gluon.jit
def _load_keys(pages, latent_desc, blocks, first_box, first, buffers, n, CONFIG: gl.constexpr):
    """Load the key tile that begins at key `first`, whose boxes' blocks begin with `first_box`."""
    PAGE: gl.constexpr = pages.desc.block_type.shape[0]
    KEYS: gl.constexpr = buffers.KEYS
    STAGES: gl.constexpr = buffers.STAGES
    PER_TILE: gl.constexpr = KEYS // PAGE
    dtype: gl.constexpr = pages.desc.dtype
    LATENTS: gl.constexpr = STAGES * _CHUNKS * PER_TILE
    ROTATED: gl.constexpr = STAGES * PER_TILE
    rotated = reinterpret(buffers.rotated, dtype, [ROTATED, PAGE, _BOX], pages.desc.layout)
    stage = n % STAGES
    mbarrier.wait(buffers.empty.index(stage), n // STAGES & 1 ^ 1)
    full = buffers.full.index(stage)
    mbarrier.expect(full, KEYS * 576 * 2)
    for p in gl.static_range(PER_TILE):
        is_box = gl.arange(0, 32, _LANES) == first_box + p
        block = gl.sum(gl.where(is_box, blocks, 0), 0)
        row = block * pages.block_rows + (first + p * PAGE) % CONFIG.BLOCK_SIZE
        if PER_TILE == 1:
            TILES: gl.constexpr = [STAGES, _CHUNKS, KEYS, _BOX]
            tiles = reinterpret(buffers.latents, dtype, TILES, latent_desc.layout)
            load_tile(latent_desc, [0, row, 0], full, tiles.index(stage))
        else:
            boxes = reinterpret(buffers.latents, dtype, [LATENTS, PAGE, _BOX], pages.desc.layout)
            for c in gl.static_range(_CHUNKS):
                box = boxes.index((stage * _CHUNKS + c) * PER_TILE + p)
                load_tile(pages.desc, [row, c * _BOX], full, box)
        load_tile(pages.desc, [row, LATENT], full, rotated.index(stage * PER_TILE + p))


@gluon.jit
def _producer(is_left, work, left, buffers, pages, latent_desc, q_desc, q_rotated_desc):
    """One warp: the queries of each work unit, and its key tiles.

    What it needs from memory is asked for early, since under load an answer takes microseconds: the
    blocks of 32 boxes, and the next work tile once the ring is full.
    """
    KEYS: gl.constexpr = buffers.KEYS
    STAGES: gl.constexpr = buffers.STAGES
    PER_TILE: gl.constexpr = KEYS // pages.desc.block_type.shape[0]
    AT_ONCE: gl.constexpr = 32 // PER_TILE  # tiles
    n = 0  # key tiles
    unit = 0  # work units
    next_blocks = _blocks(pages, work, work.first_tile)
    while is_left:
        # The first queries are loaded first. Later ones have to wait for the unit before, and the
        # tiles that there is room for until then need not.
        q_at = gl.minimum(work.first_tile + gl.where(unit == 0, 0, STAGES - 1), work.last_tile)
        next_at = gl.minimum(work.first_tile + STAGES, work.last_tile)
        # Not next_blocks: Triton does not carry a variable through a loop if, when the loop begins,
        # it is another name of what the loop sets it to.
        blocks = gl.zeros_like(next_blocks)
        is_left = left.position < left.end
        next_work, coming_blocks = work, next_blocks
        for tile in range(work.first_tile, work.last_tile + 1):
            if (tile == q_at) & (work.unit >= 0):
                _load_queries(work, buffers, q_desc, q_rotated_desc, unit)
            if (tile == next_at) & is_left:
                next_work, left = left.next()
                coming_blocks = _blocks(pages, next_work, next_work.first_tile)
            if (tile < work.last_tile) & (work.unit >= 0):
                i = (tile - work.first_tile) % AT_ONCE
                if i == 0:
                    blocks = next_blocks
                    next_blocks = _blocks(pages, work, tile + AT_ONCE)
                first, box = tile * KEYS, i * PER_TILE
                _load_keys(pages, latent_desc, blocks, box, first, buffers, n, work.config)
                n += 1
        unit += (work.unit >= 0).to(gl.int32)
        work, next_blocks = next_work, coming_blocks


@gluon.jit
def _has_unseen(work, first_key):
    """Whether some query may not see all keys of a tile."""
    CONFIG: gl.constexpr = work.config
    end = work.seq_len  # of the keys that all queries see
    if CONFIG.CAUSAL:
        end -= work.q_len - 1
    elif CONFIG.WINDOW:
        end = gl.minimum(end, work.seq_len - work.q_len + work.window)
    unseen = first_key + CONFIG.KEYS > end
    if CONFIG.WINDOW:
        unseen = unseen | (first_key < work.seq_len - work.window)
    return unseen


@gluon.jit
def _masked(s, work, positions, first_key):
    """A tile's scores, with those of unseen keys masked."""
    CONFIG: gl.constexpr = work.config
    keys = first_key + gl.arange(0, CONFIG.KEYS, gl.SliceLayout(0, s.type.layout))
    seen = (keys < work.seq_len)[None, :]
    if CONFIG.CAUSAL:
        seen = seen & (keys[None, :] <= positions[:, None])
    if CONFIG.WINDOW:
        seen = seen & (keys[None, :] > (positions - work.window)[:, None])
        if not CONFIG.CAUSAL:
            seen = seen & (keys[None, :] < (positions + work.window)[:, None])
    return gl.where(seen, s, MASKED)


@gluon.jit
def _softmax(s, m_before, work, positions, first_key, scale):
    """(weights, running maxima, the same but 0 without a score) of a tile of scores."""
    CONFIG: gl.constexpr = work.config
    if CONFIG.CAP:
        s = tanh(s * scale.scale_over_cap) * scale.cap_log2
    else:
        s = s * scale.scale_log2
    if _has_unseen(work, first_key):
        s = _masked(s, work, positions, first_key)
    m_new = gl.maximum(m_before, gl.max(s, 1))
    m_use = gl.where(no_score(m_new), 0.0, m_new)
    return gl.exp2(s - m_use[:, None]), m_new, m_use


@gluon.jit
def _hide_values(buffers, n, tile, work, WHICH: gl.constexpr):
    """Zero a warp group's columns of unseen values: 0 * NaN is NaN."""
    KEYS: gl.constexpr = buffers.KEYS
    first = tile * KEYS
    if (first < work.first_key) | (first + KEYS > work.seq_len):
        LAYOUT: gl.constexpr = row_layout(_BOX)
        dtype: gl.constexpr = buffers.latents.dtype
        BOX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, _BOX], dtype)
        BOXES: gl.constexpr = buffers.STAGES * _CHUNKS
        boxes = reinterpret(buffers.latents, dtype, [BOXES, KEYS, _BOX], BOX)
        key = first + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
        is_seen = (key >= work.first_key) & (key < work.seq_len)
        for b in range(0, _CHUNKS // 2):
            box = boxes.index((n % buffers.STAGES * 2 + WHICH) * (_CHUNKS // 2) + b)
            values = box.load(LAYOUT)
            box.store(gl.where(is_seen[:, None], values, gl.zeros_like(values)))
        fence_async_shared()
        barrier()


@gluon.jit
def _issue_scores(buffers, n):
    """Issue the products of the queries and the keys of tile n."""
    zero = gl.zeros([ROWS, buffers.KEYS], gl.float32, mma_layout(buffers.KEYS))
    stage = buffers.wait_full(n)
    latents = buffers.latents.index(stage).permute((1, 0))
    rotated = buffers.rotated.index(stage).permute((1, 0))
    s = warpgroup_mma(buffers.q, latents, zero, use_acc=False, is_async=True)
    return warpgroup_mma(buffers.q_rotated, rotated, s, is_async=True)


@gluon.jit
def _other_tile(buffers, acc, n, tile, work, WHICH: gl.constexpr):
    """Issue the product of the other warp group's weights of tile n and the own columns.

    Returns it, and the running maxima of the other's tile.
    """
    OTHER: gl.constexpr = 1 - WHICH
    buffers.wait_full(n)
    _hide_values(buffers, n, tile, work, WHICH)
    mbarrier.wait(buffers.ready.index(OTHER), (n >> 1) & 1)
    factor = buffers.factor.index(OTHER).load(by_row(OWN))
    largest = buffers.largest.index(OTHER).load(by_row(buffers.KEYS))
    acc = acc * factor[:, None]
    weights = buffers.weights.index(OTHER)
    return warpgroup_mma(weights, buffers.values(n, WHICH), acc, is_async=True), largest


@gluon.jit
def _release_other(buffers, n, WHICH: gl.constexpr):
    """The other warp group's tile n is no longer needed, nor are its weights."""
    buffers.release(n)
    mbarrier.arrive(buffers.taken.index(1 - WHICH))


@gluon.jit
def _send_weights(buffers, p, m_new, alpha, n, WHICH: gl.constexpr):
    """Send the weights of the own tile n to the other warp group."""
    mbarrier.wait(buffers.taken.index(WHICH), (n >> 1) & 1 ^ 1)
    buffers.weights.index(WHICH).store(p.to(buffers.weights.dtype))
    buffers.largest.index(WHICH).store(m_new)
    buffers.factor.index(WHICH).store(alpha)
    fence_async_shared()
    barrier()
    mbarrier.arrive(buffers.ready.index(WHICH))


@gluon.jit
def _own_values(buffers, acc, p, alpha, n, tile, work, WHICH: gl.constexpr):
    """Add the own columns of the own tile n, by its weights."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_layout(OWN), k_width=2)
    _hide_values(buffers, n, tile, work, WHICH)
    weights = gl.convert_layout(p.to(buffers.weights.dtype), WEIGHTS)
    acc = scaled(acc, alpha)
    acc = warpgroup_mma(weights, buffers.values(n, WHICH), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    buffers.release(n)
    return acc


@gluon.jit
def _consumer(WHICH: gl.constexpr, is_left, work, left, buffers, scale, output, parts):
    """A warp group: half of the columns of each of the program's work tiles."""
    KEYS: gl.constexpr = buffers.KEYS
    BY_ROW: gl.constexpr = by_row(KEYS)
    has_first, first_work, first_left = is_left, work, left
    n = 0  # key tiles before this work tile
    unit = 0
    while is_left:
        # The next work tile is found here, where the queries are being loaded.
        is_left = left.position < left.end
        next_work = work
        if is_left:
            next_work, left = left.next()
        if work.unit >= 0:
            rows = work.rows(BY_ROW)
            m_i = gl.full([ROWS], MASKED, gl.float32, BY_ROW)  # of all tiles so far
            m_own = m_i  # of the own tiles, when the last of them was added
            l_i = gl.zeros([ROWS], gl.float32, BY_ROW)  # of the own tiles, by m_own
            acc = gl.zeros([ROWS, OWN], gl.float32, mma_layout(OWN))
            num_tiles = work.last_tile - work.first_tile
            own = (n & 1) ^ WHICH  # the first own tile, counted from the work tile's first
            mbarrier.wait(buffers.q_full.index(0), unit & 1)
            if own == 0:
                tile = work.first_tile
                s = _issue_scores(buffers, n)
                s = warpgroup_mma_wait(0, deps=[s])
                p, m_i, m_use = _softmax(s, m_i, work, rows.positions, tile * KEYS, scale)
                l_i = gl.sum(p, 1)
                m_own = m_use
                alpha = gl.zeros([ROWS], gl.float32, BY_ROW)
                _send_weights(buffers, p, m_i, alpha, n, WHICH)
                acc = _own_values(buffers, acc, p, alpha, n, tile, work, WHICH)
            for i in range(2 - own, num_tiles, 2):
                tile = work.first_tile + i
                s = _issue_scores(buffers, n + i)
                acc, m_before = _other_tile(buffers, acc, n + i - 1, tile - 1, work, WHICH)
                s = warpgroup_mma_wait(1, deps=[s])
                p, m_i, m_use = _softmax(s, m_before, work, rows.positions, tile * KEYS, scale)
                alpha = gl.exp2(m_before - m_use)
                l_i = l_i * gl.exp2(m_own - m_use) + gl.sum(p, 1)
                m_own = m_use
                _send_weights(buffers, p, m_i, alpha, n + i, WHICH)
                acc = warpgroup_mma_wait(0, deps=[acc])
                _release_other(buffers, n + i - 1, WHICH)
                acc = _own_values(buffers, acc, p, alpha, n + i, tile, work, WHICH)
            mbarrier.arrive(buffers.q_empty.index(0))
            n += num_tiles
            if ((n - 1) & 1) != WHICH:  # the last tile is the other's
                acc, m_i = _other_tile(buffers, acc, n - 1, work.last_tile - 1, work, WHICH)
                acc = warpgroup_mma_wait(0, deps=[acc])
                _release_other(buffers, n - 1, WHICH)
            m_use = gl.where(no_score(m_i), 0.0, m_i)
            l_i = l_i * gl.exp2(m_own - m_use)
            buffers.sums.index(2 * (unit & 1) + WHICH).store(l_i)
            barrier()
            mbarrier.arrive(buffers.summed.index(WHICH))
            mbarrier.wait(buffers.summed.index(1 - WHICH), unit & 1)
            total = l_i + buffers.sums.index(2 * (unit & 1) + 1 - WHICH).load(BY_ROW)
            unit += 1
            if work.is_whole:
                _store_rows(acc, m_i, total, rows, output, WHICH)
            else:
                parts.store(acc, m_i, total, rows, work, left.program, WHICH)
        work = next_work
    is_left, work, left = has_first, first_work, first_left
    while is_left:
        if (work.unit >= 0) & (work.num_parts > 1):
            parts.merge(work, left.program, output, buffers, WHICH)
        is_left = left.position < left.end
        if is_left:
            work, left = left.next()


@gluon.jit
def _store_rows(acc, m_i, total, rows, output, WHICH: gl.constexpr):
    """Store a warp group's columns of whole rows."""
    factor = output._decode_factor(m_i, total, rows)
    out = scaled(acc, gl.where(rows.sees_no_key, 0.0, factor))
    hidden = gl.convert_layout(rows.sees_no_key.to(gl.int32), by_row(OWN)) != 0
    out = gl.where(hidden[:, None], 0.0, out).to(output.out_ptr.dtype.element_ty)
    rows = rows.to(by_row(OWN))
    column = WHICH * OWN + gl.arange(0, OWN, gl.SliceLayout(0, mma_layout(OWN)))
    at = output.offsets(rows.tokens, rows.heads)
    gl.store(output.out_ptr + at[:, None] + column[None, :], out, mask=rows.ok[:, None])


@gluon.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=METADATA)
def hopper_mla_kernel(
    q_desc, q_rotated_desc, latent_desc, kv_desc, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
    counters_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, block_rows, out_stride_t,
    out_stride_h, num_reqs, all_reqs, num_rows, table_stride, window, team, scale_log2, cap_log2,
    scale_over_cap, CONFIG: gl.constexpr,
):  # fmt: skip
    """Absorbed attention of all requests over the paged latents.

    Grid: at most as many programs as SMs, in a cooperative launch.

    Args:
        q_desc: (num_tokens * NUM_HEADS, 576) as blocks of 64 columns, boxes of 8 by Q_ROWS by 64.
        q_rotated_desc: the same as a matrix, boxes of Q_ROWS by 64.
        latent_desc, kv_desc: the tokens of the cache by 576, likewise. Boxes have 16 or 32 rows,
            which divide a page and a key tile.
        out_ptr: (num_tokens, NUM_HEADS, 512), see the strides.
        part_out_ptr: (2 * programs, 64, 512) float32; part_lse_ptr: (2 * programs, 2, 64).
        counters_ptr: MLA_COUNTERS * programs zeros, which are zero again afterwards.
        block_rows: rows of the cache's matrix between one block and the next.
        team: programs that share key ranges, see `IterationSpace`.
        CONFIG: an MLAConfig.
        Others: as for triton/kernels/decode.py.
    """
    space = IterationSpace(
        seq_lens_ptr,
        query_start_loc_ptr,
        seq_lens_ptr,
        num_reqs,
        window,
        gl.to_tensor(team),
        CONFIG,
    )
    pages = Pages(
        kv_desc, block_table_ptr, table_stride, block_rows, gl.to_tensor(0), gl.to_tensor(0)
    )
    scale = Scale(scale_log2, cap_log2, scale_over_cap, lse_ptr)
    output = Output(
        out_ptr, lse_ptr, lse_ptr, gl.to_tensor(out_stride_t), gl.to_tensor(out_stride_h), CONFIG
    )
    buffers = _allocate(kv_desc.dtype, CONFIG.KEYS)
    fence_async_shared()

    output.store_empty(space)
    size = space.size()
    share = space.share(gl.program_id(0), size, space.tiles_per_program(size))
    parts = Parts(part_out_ptr, part_lse_ptr, counters_ptr, space.team, share.member)
    # The first work tile is found here, where there are many registers.
    is_left = share.position < share.end
    work, left = share.next()
    barrier()  # see decode.py
    gl.warp_specialize(
        [
            (_consumer, (0, is_left, work, left, buffers, scale, output, parts)),
            (_consumer, (1, is_left, work, left, buffers, scale, output, parts)),
            (_producer, (is_left, work, left, buffers, pages, latent_desc, q_desc, q_rotated_desc)),
        ],
        [4, 1],
        [CONFIG.REGISTERS, CONFIG.PRODUCER_REGISTERS],
    )  # fmt: skip
    output.store_padding(gl.load(query_start_loc_ptr + all_reqs), num_rows)
