"""Multi-head latent attention in absorbed form for Hopper, in Gluon.

A key is a latent of 512 elements and a rotated part of 64, and the value is the latent, for all
query heads together (arXiv:2405.04434). So a tile of latents is loaded once by TMA, and multiplied
twice. Programs share the work by Stream-K (`stream_k.py`).

The output of 64 rows is 64 x 512 float32, as many registers as two warp groups have: each of them
has one half of its columns. They take turns with the scores: one computes those of the even key
tiles, and one those of the odd ones, so that one of them multiplies while the other computes
weights. The weights of a tile go to the other warp group through shared memory. The idea of the two
halves in turns is FlashMLA's ("seesaw", DeepSeek 2025).

A part of a work unit is up to 128 KB, and a long request has as many parts as there are programs.
So no program merges them all: each stores its parts first, and when all parts of a unit are there,
each of its programs merges some of the rows. They wait for each other, and so all programs must run
at the same time: it is a cooperative launch.
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
from attn_dispatch.backends.cuda.hopper.launch import MLA_COUNTERS
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

_ROWS = gl.constexpr(64)
_LATENT = gl.constexpr(512)
_OWN = gl.constexpr(256)  # columns of a warp group
_BOX = gl.constexpr(64)  # 16-bit columns of a swizzled row of shared memory
_CHUNKS = gl.constexpr(8)  # boxes of a latent; the rotated part is one more
_ALL_KEYS = gl.constexpr(128)  # of all stages
_VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def _by_row(columns):
    """The layout of a value for each row of a product with this many columns."""
    return gl.SliceLayout(1, mma_layout(columns))


#: A step of a merge has one part of 16 rows, or 32 parts of one row: 8 for each warp. Both are by
#: the columns of a warp group.
_MERGE_ROWS = gl.constexpr(16)
_MERGE_PARTS = gl.constexpr(8)
_rows_layout = gl.BlockedLayout([4, 4], [1, 32], [4, 1], [1, 0])
_MANY_ROWS = gl.constexpr(_rows_layout)
_BY_MERGED_ROW = gl.constexpr(gl.SliceLayout(1, _rows_layout))
_BY_COLUMN = gl.constexpr(gl.SliceLayout(0, _rows_layout))
_parts_layout = gl.BlockedLayout([1, 8, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0])
_MANY_PARTS = gl.constexpr(_parts_layout)
_BY_PART = gl.constexpr(gl.SliceLayout(2, _parts_layout))
_PART_SUMS = gl.constexpr(gl.SliceLayout(1, _parts_layout))
#: The sums of four warps: a thread has all of them, of some columns.
_sums_layout = gl.BlockedLayout([4, 2], [1, 32], [1, 4], [1, 0])
_SUMS = gl.constexpr(_sums_layout)
#: Of the producer's one warp.
_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_OF_WARPS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_COUNTERS = gl.constexpr(MLA_COUNTERS)

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
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([self.KEYS, _OWN], dtype)
        halves = reinterpret(self.latents, dtype, [2 * self.STAGES, self.KEYS, _OWN], LAYOUT)
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
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _BOX], dtype)
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, _BOX], dtype)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, KEYS], dtype)
    return _Buffers(
        gl.allocate_shared_memory(dtype, [_ROWS, _LATENT], Q),
        gl.allocate_shared_memory(dtype, [_ROWS, _BOX], Q),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, _LATENT], KV),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, _BOX], KV),
        gl.allocate_shared_memory(dtype, [2, _ROWS, KEYS], P),
        gl.allocate_shared_memory(gl.float32, [2, _ROWS], _VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, _ROWS], _VECTOR),
        gl.allocate_shared_memory(gl.float32, [4, _ROWS], _VECTOR),
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
    row = work.q_start * work.config.GROUP + work.unit * _ROWS
    mbarrier.wait(buffers.q_empty.index(0), (unit & 1) ^ 1)
    full = buffers.q_full.index(0)
    mbarrier.expect(full, Q_ROWS * 576 * 2)
    if Q_ROWS == _ROWS:
        q = reinterpret(buffers.q, dtype, [1, _CHUNKS, Q_ROWS, _BOX], q_desc.layout)
        load_tile(q_desc, [0, row, 0], full, q.index(0))
    else:
        BOXES: gl.constexpr = _CHUNKS * (_ROWS // Q_ROWS)
        q = reinterpret(buffers.q, dtype, [BOXES, Q_ROWS, _BOX], q_rotated_desc.layout)
        for c in gl.static_range(_CHUNKS):
            load_tile(q_rotated_desc, [row, c * _BOX], full, q.index(c * (_ROWS // Q_ROWS)))
    ROTATED: gl.constexpr = [_ROWS // Q_ROWS, Q_ROWS, _BOX]
    rotated = reinterpret(buffers.q_rotated, dtype, ROTATED, q_rotated_desc.layout)
    load_tile(q_rotated_desc, [row, _LATENT], full, rotated.index(0))


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
        load_tile(pages.desc, [row, _LATENT], full, rotated.index(stage * PER_TILE + p))


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
    zero = gl.zeros([_ROWS, buffers.KEYS], gl.float32, mma_layout(buffers.KEYS))
    stage = buffers.wait_full(n)
    latents = buffers.latents.index(stage).permute((1, 0))
    rotated = buffers.rotated.index(stage).permute((1, 0))
    s = warpgroup_mma(buffers.q, latents, zero, use_acc=False, is_async=True)
    return warpgroup_mma(buffers.q_rotated, rotated, s, is_async=True)


@gluon.jit
def _scaled(acc, factor):
    """acc times a factor for each row."""
    return acc * gl.convert_layout(factor, _by_row(_OWN))[:, None]


@gluon.jit
def _other_tile(buffers, acc, n, tile, work, WHICH: gl.constexpr):
    """Issue the product of the other warp group's weights of tile n and the own columns.

    Returns it, and the running maxima of the other's tile.
    """
    OTHER: gl.constexpr = 1 - WHICH
    buffers.wait_full(n)
    _hide_values(buffers, n, tile, work, WHICH)
    mbarrier.wait(buffers.ready.index(OTHER), (n >> 1) & 1)
    factor = buffers.factor.index(OTHER).load(_by_row(_OWN))
    largest = buffers.largest.index(OTHER).load(_by_row(buffers.KEYS))
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
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_layout(_OWN), k_width=2)
    _hide_values(buffers, n, tile, work, WHICH)
    weights = gl.convert_layout(p.to(buffers.weights.dtype), WEIGHTS)
    acc = _scaled(acc, alpha)
    acc = warpgroup_mma(weights, buffers.values(n, WHICH), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    buffers.release(n)
    return acc


@gluon.jit
def _consumer(WHICH: gl.constexpr, is_left, work, left, buffers, scale, output, parts):
    """A warp group: half of the columns of each of the program's work tiles."""
    KEYS: gl.constexpr = buffers.KEYS
    BY_ROW: gl.constexpr = _by_row(KEYS)
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
            m_i = gl.full([_ROWS], MASKED, gl.float32, BY_ROW)  # of all tiles so far
            m_own = m_i  # of the own tiles, when the last of them was added
            l_i = gl.zeros([_ROWS], gl.float32, BY_ROW)  # of the own tiles, by m_own
            acc = gl.zeros([_ROWS, _OWN], gl.float32, mma_layout(_OWN))
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
                alpha = gl.zeros([_ROWS], gl.float32, BY_ROW)
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
    out = _scaled(acc, gl.where(rows.sees_no_key, 0.0, factor))
    hidden = gl.convert_layout(rows.sees_no_key.to(gl.int32), _by_row(_OWN)) != 0
    out = gl.where(hidden[:, None], 0.0, out).to(output.out_ptr.dtype.element_ty)
    rows = rows.to(_by_row(_OWN))
    column = WHICH * _OWN + gl.arange(0, _OWN, gl.SliceLayout(0, mma_layout(_OWN)))
    at = output.offsets(rows.tokens, rows.heads)
    gl.store(output.out_ptr + at[:, None] + column[None, :], out, mask=rows.ok[:, None])


@gluon.jit
def _online(m_i, lse):
    """(new maxima, weights of what has these log2 sums, factors of what was there before)."""
    m_new = gl.maximum(m_i, lse)
    m_use = gl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, gl.exp2(lse - m_use), gl.exp2(m_i - m_use)


@aggregate
class _Parts:
    """Room for parts of work units, as `epilogue.Parts`, but in two halves of the columns.

    A slot has 64 rows of 512 columns in `out_ptr`, and two times 64 log2 sums in `lse_ptr`, which
    are equal. `team` is the number of programs in a team, `member` this one's number in it.
    """

    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    counters_ptr: gl.tensor
    team: gl.tensor
    member: gl.tensor

    @gluon.jit
    def _slot(self, program, is_first):
        """The slot of a program of the member's number, for the unit that begins with it or not."""
        return (program.to(gl.int64) * self.team + self.member) * 2 + is_first.to(gl.int64)

    @gluon.jit
    def store(self, acc, m_i, total, rows, work, program, WHICH: gl.constexpr):
        """Store a warp group's columns of a part."""
        slot = self._slot(program, program == work.first_program)
        empty = total == 0.0  # no score above −inf; a NaN is in the sum
        some = gl.where(empty, 1.0, total)
        r = gl.arange(0, _ROWS, total.type.layout)
        lse = gl.where(empty, float("-inf"), m_i + gl.log2(some))
        gl.store(self.lse_ptr + (slot * 2 + WHICH) * _ROWS + r, lse)
        part = _scaled(acc, 1.0 / some)
        ok = gl.convert_layout(rows.ok.to(gl.int32), _by_row(_OWN)) != 0
        r = gl.arange(0, _ROWS, _by_row(_OWN))
        column = WHICH * _OWN + gl.arange(0, _OWN, gl.SliceLayout(0, mma_layout(_OWN)))
        at = (slot * _ROWS + r)[:, None] * _LATENT + column[None, :]
        gl.store(self.out_ptr + at, part, mask=ok[:, None])
        # All threads' stores come before the one thread's release.
        barrier()
        gl.atomic_add(self._counter(work, WHICH), 1, sem="release", scope="gpu")

    @gluon.jit
    def _counter(self, work, WHICH: gl.constexpr):
        program = work.first_program * self.team + self.member
        return self.counters_ptr + _COUNTERS * program + 2 * WHICH

    @gluon.jit
    def merge(self, work, program, output, buffers, WHICH: gl.constexpr):
        """Merge and store a program's share of a unit's rows, once all parts are stored."""
        counter = self._counter(work, WHICH)
        arrived = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while arrived < work.num_parts:
            arrived = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        barrier()
        num_rows = gl.minimum(work.q_len * work.config.GROUP - work.unit * _ROWS, _ROWS)
        share = (num_rows + work.num_parts - 1) // work.num_parts
        first = (program - work.first_program) * share
        last = gl.minimum(first + share, num_rows)
        steps = work.num_parts * ((share + _MERGE_ROWS - 1) // _MERGE_ROWS)
        at_once: gl.constexpr = 4 * _MERGE_PARTS
        if steps <= share * ((work.num_parts + at_once - 1) // at_once):
            for begin in range(first, last, _MERGE_ROWS):
                self._merge_rows(begin, last, work, output, WHICH)
        else:
            for row in range(first, last):
                self._merge_parts(row, work, output, buffers, WHICH)
        self._forget(work, counter)

    @gluon.jit
    def _merge_rows(self, begin, last, work, output, WHICH: gl.constexpr):
        """Merge the rows [begin, last), at most 16: all at once, part after part."""
        row = begin + gl.arange(0, _MERGE_ROWS, _BY_MERGED_ROW)
        ok = row < last
        column = WHICH * _OWN + gl.arange(0, _OWN, _BY_COLUMN)
        m_i = gl.full([_MERGE_ROWS], float("-inf"), gl.float32, _BY_MERGED_ROW)
        l_i = gl.zeros([_MERGE_ROWS], gl.float32, _BY_MERGED_ROW)
        acc = gl.zeros([_MERGE_ROWS, _OWN], gl.float32, _MANY_ROWS)
        for part in range(0, work.num_parts):
            slot = self._slot(work.first_program + part, part == 0)
            lse_ptrs = self.lse_ptr + (slot * 2 + WHICH) * _ROWS + row
            lse = gl.load(lse_ptrs, mask=ok, other=float("-inf"), cache_modifier=".cg")
            at = (slot * _ROWS + row)[:, None] * _LATENT + column[None, :]
            out = gl.load(self.out_ptr + at, mask=ok[:, None], other=0.0, cache_modifier=".cg")
            m_i, weight, alpha = _online(m_i, lse)
            l_i = l_i * alpha + weight
            acc = acc * alpha[:, None] + out * weight[:, None]
        at, factor, no_key = self._finish(m_i, l_i, row, ok, work, output)
        out = gl.where(no_key[:, None], 0.0, acc * factor[:, None])
        out = out.to(output.out_ptr.dtype.element_ty)
        gl.store(output.out_ptr + at[:, None] + column[None, :], out, mask=ok[:, None])

    @gluon.jit
    def _merge_parts(self, row, work, output, buffers, WHICH: gl.constexpr):
        """Merge a row, each warp the parts of its number modulo 4."""
        warp = gl.arange(0, 4, gl.SliceLayout(1, _BY_PART))
        slot_of_warp = gl.arange(0, _MERGE_PARTS, gl.SliceLayout(0, _BY_PART))
        offset = slot_of_warp[None, :] * 4 + warp[:, None]
        column = WHICH * _OWN + gl.arange(0, _OWN, gl.SliceLayout(0, _PART_SUMS))
        m_i = gl.full([4, _MERGE_PARTS], float("-inf"), gl.float32, _BY_PART)
        l_i = gl.zeros([4, _MERGE_PARTS], gl.float32, _BY_PART)
        acc = gl.zeros([4, _MERGE_PARTS, _OWN], gl.float32, _MANY_PARTS)
        for step in range(0, work.num_parts, 4 * _MERGE_PARTS):
            part = step + offset
            ok = part < work.num_parts
            slot = self._slot(work.first_program + part, part == 0)
            lse_ptrs = self.lse_ptr + (slot * 2 + WHICH) * _ROWS + row
            lse = gl.load(lse_ptrs, mask=ok, other=float("-inf"), cache_modifier=".cg")
            at = gl.expand_dims((slot * _ROWS + row) * _LATENT, 2) + column[None, None, :]
            ok = gl.expand_dims(ok, 2)
            out = gl.load(self.out_ptr + at, mask=ok, other=0.0, cache_modifier=".cg")
            m_i, weight, alpha = _online(m_i, lse)
            l_i = l_i * alpha + weight
            acc = acc * gl.expand_dims(alpha, 2) + out * gl.expand_dims(weight, 2)
        m_row = gl.max(gl.max(m_i, 1), 0)
        weight = gl.exp2(m_i - gl.where(m_row == float("-inf"), 0.0, m_row))
        total = gl.sum(gl.sum(weight * l_i, 1), 0)
        # The sum over warps is made in the room of key tiles, which nobody needs now: a reduction's
        # own memory would be too much.
        ALL: gl.constexpr = buffers.STAGES * buffers.KEYS // 4
        sums = reinterpret(buffers.latents, gl.float32, [ALL, 4, _OWN], _OF_WARPS).index(WHICH)
        barrier()
        sums.store(gl.sum(acc * gl.expand_dims(weight, 2), 1))
        barrier()
        out = gl.sum(sums.load(_SUMS), 0)
        column = WHICH * _OWN + gl.arange(0, _OWN, gl.SliceLayout(0, _SUMS))
        at, factor, no_key = self._finish(m_row, total, row, row >= 0, work, output)
        out = gl.where(no_key, 0.0, out * factor).to(output.out_ptr.dtype.element_ty)
        gl.store(output.out_ptr + at + column, out)

    @gluon.jit
    def _finish(self, m_i, total, row, ok, work, output):
        """(where the outputs of rows begin, their factors, which see no key). Stores their LSE."""
        config: gl.constexpr = work.config
        r = work.unit * _ROWS + row
        token = work.q_start + r // config.GROUP
        head = r % config.GROUP
        no_key = work.seq_len - work.q_len + r // config.GROUP < 0
        low = m_i == float("-inf")
        lse_ptrs = output.lse_ptr + token.to(gl.int64) * config.NUM_HEADS + head
        factor = output.normalizer(gl.where(low, 0.0, m_i), low, total, no_key, total, lse_ptrs, ok)
        return output.offsets(token, head), factor, no_key

    @gluon.jit
    def _forget(self, work, counter):
        """Leave the counters at zero for the next launch, once all programs have seen them."""
        barrier()
        seen = gl.atomic_add(counter + 1, 1, sem="relaxed", scope="gpu")
        if seen == work.num_parts - 1:
            gl.store(counter, 0)
            gl.store(counter + 1, 0)


@gluon.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=METADATA)
def hopper_mla_kernel(
    q_desc, q_rotated_desc, latent_desc, kv_desc, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
    counters_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, block_rows, out_stride_t, out_stride_h,
    num_reqs, all_reqs, num_rows, table_stride, window, team, scale_log2, cap_log2, scale_over_cap,
    CONFIG: gl.constexpr,
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
    parts = _Parts(part_out_ptr, part_lse_ptr, counters_ptr, space.team, share.member)
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
