"""The decode kernel's schedule, in Gluon: Stream-K (arXiv:2301.03598).

The work is one iteration space: the key tiles of every request, row tile and KV head, one after the
other. Each program takes an equal, contiguous share of it, as LeanAttention (arXiv:2405.10480) does
for decodes. A work unit is the key tiles of one row tile and KV head of a request. A share can cut
it into parts, which the last program to arrive merges (`epilogue.py`).

Each program finds its share by a prefix sum over the lengths on the device, so that one captured
graph serves any lengths. Shares are rounded, so that equal requests are cut in the same way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.scores import sees_no_key
from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate

__all__ = ["VECTOR", "IterationSpace"]

#: The layout of a vector that all warps read.
VECTOR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _add(a, b):
    return a + b


@aggregate
class QueryTile:
    """The rows of a work unit. Row r is token r // GROUP and head r % GROUP of the KV head.

    Attributes:
        first_row: of the tile, among those of the request and KV head.
        first_key: the first key that a query of the request sees. Blocks before it may be freed.
    """

    q_start: gl.tensor
    q_len: gl.tensor
    seq_len: gl.tensor
    kv_head: gl.tensor
    first_row: gl.tensor
    first_key: gl.tensor
    window: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def rows(self, LAYOUT: gl.constexpr):
        return self.first_row + gl.arange(0, self.config.ROWS, LAYOUT)

    @gluon.jit
    def has(self, rows):
        return rows < self.q_len * self.config.GROUP

    @gluon.jit
    def tokens(self, rows):
        return self.q_start + rows // self.config.GROUP

    @gluon.jit
    def heads(self, rows):
        return self.kv_head * self.config.GROUP + rows % self.config.GROUP

    @gluon.jit
    def positions(self, rows):
        return self.seq_len - self.q_len + rows // self.config.GROUP

    @gluon.jit
    def sees_no_key(self, rows):
        return sees_no_key(
            self.positions(rows), self.seq_len, self.window, self.config.CAUSAL, self.config.WINDOW
        )


@aggregate
class WorkTile:
    """A program's next stretch of key tiles, all of one work unit.

    Attributes:
        request: its number in the batch.
        unit: kv_head + NUM_KV_HEADS * row tile, or −1 if the request has no keys.
        first_tile, last_tile: the key tiles [first_tile, last_tile).
        is_whole: these are all of the unit's tiles.
        num_parts, first_program: otherwise, how many programs share it, and the first of them.
    """

    request: gl.tensor
    unit: gl.tensor
    first_tile: gl.tensor
    last_tile: gl.tensor
    is_whole: gl.tensor
    num_parts: gl.tensor
    first_program: gl.tensor


@aggregate
class Cursor:
    """A position in the space, the index of its request, and where that request begins."""

    position: gl.tensor
    i: gl.tensor
    base: gl.tensor


@aggregate
class IterationSpace:
    """The space of the listed requests, in key tiles."""

    requests_ptr: gl.tensor
    query_start_loc_ptr: gl.tensor
    seq_lens_ptr: gl.tensor
    num_reqs: gl.tensor
    window: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def request(self, i):
        """The i-th request of this launch."""
        if self.config.HAS_REQUEST_LIST:
            return gl.load(self.requests_ptr + i)
        else:
            return i

    @gluon.jit
    def _first_key(self, seq_len, q_len):
        first = seq_len * 0
        if self.config.WINDOW:
            first = gl.maximum(seq_len - q_len - self.window + 1, 0)
        return first

    @gluon.jit
    def _tiles(self, request, ok):
        """(key tiles, row tiles, first key tile) of requests, a vector or one."""
        config: gl.constexpr = self.config
        seq_len = gl.load(self.seq_lens_ptr + request, mask=ok, other=0)
        start = gl.load(self.query_start_loc_ptr + request, mask=ok, other=0)
        q_len = gl.load(self.query_start_loc_ptr + request + 1, mask=ok, other=0) - start
        first = self._first_key(seq_len, q_len) // config.KEYS
        tiles = gl.maximum((seq_len + config.KEYS - 1) // config.KEYS - first, 0)
        return tiles, (q_len * config.GROUP + config.ROWS - 1) // config.ROWS, first

    @gluon.jit
    def _lengths(self, begin):
        """(LENGTHS_PER_LOAD,) int64: how much of the space each of these requests takes."""
        i = begin + gl.arange(0, self.config.LENGTHS_PER_LOAD, VECTOR)
        ok = i < self.num_reqs
        request = i
        if self.config.HAS_REQUEST_LIST:
            request = gl.load(self.requests_ptr + i, mask=ok, other=0)
        tiles, row_tiles, _ = self._tiles(request, ok)
        return tiles.to(gl.int64) * row_tiles * self.config.NUM_KV_HEADS

    @gluon.jit
    def size(self):
        """The number of key tiles."""
        total = gl.to_tensor(0).to(gl.int64)
        for begin in range(0, self.num_reqs, self.config.LENGTHS_PER_LOAD):
            total += gl.sum(self._lengths(begin), 0)
        return total

    @gluon.jit
    def tiles_per_program(self, size):
        """A rounded number of tiles, so that equal requests are cut in the same way, or not."""
        programs = gl.num_programs(0) * self.config.PROGRAMS
        tiles = gl.maximum((size + programs - 1) // programs, self.config.MIN_TILES)
        step = gl.exp2(gl.floor(gl.log2(gl.maximum(tiles // 16, 1).to(gl.float32)))).to(gl.int64)
        return (tiles + step - 1) // step * step

    @gluon.jit
    def cursor(self, position):
        """The cursor at a position."""
        i = gl.to_tensor(0)
        base = gl.to_tensor(0).to(gl.int64)
        running = gl.to_tensor(0).to(gl.int64)
        for begin in range(0, self.num_reqs, self.config.LENGTHS_PER_LOAD):
            lengths = self._lengths(begin)
            ends = gl.associative_scan(lengths, 0, _add) + running
            in_batch = begin + gl.arange(0, self.config.LENGTHS_PER_LOAD, VECTOR) < self.num_reqs
            before = (ends <= position) & in_batch
            i += gl.sum(before.to(gl.int32), 0)
            base = gl.maximum(base, gl.max(gl.where(before, ends, 0), 0))
            running += gl.sum(lengths, 0)
        return Cursor(position, i, base)

    @gluon.jit
    def share(self, program, size, tiles_per_program):
        """The share of a program."""
        position = program * tiles_per_program
        end = gl.minimum(position + tiles_per_program, size)
        return Share(self, program, tiles_per_program, end, self.cursor(position))

    @gluon.jit
    def queries(self, work):
        """The query rows of a work tile."""
        num_kv_heads: gl.constexpr = self.config.NUM_KV_HEADS
        seq_len = gl.load(self.seq_lens_ptr + work.request)
        q_start = gl.load(self.query_start_loc_ptr + work.request)
        q_len = gl.load(self.query_start_loc_ptr + work.request + 1) - q_start
        return QueryTile(
            q_start, q_len, seq_len, work.unit % num_kv_heads,
            work.unit // num_kv_heads * self.config.ROWS, self._first_key(seq_len, q_len),
            self.window, self.config,
        )  # fmt: skip


@aggregate
class Share:
    """A program's share of the space: from `start` to the position `end`."""

    space: IterationSpace
    program: gl.tensor
    tiles_per_program: gl.tensor
    end: gl.tensor
    start: Cursor

    @gluon.jit
    def next(self, cursor):
        """The work tile at a cursor, and the cursor behind it."""
        space = self.space
        position, i, base = cursor.position, cursor.i, cursor.base
        request = space.request(i)
        tiles, row_tiles, skipped = space._tiles(request, i < space.num_reqs)
        length = tiles.to(gl.int64) * row_tiles * space.config.NUM_KV_HEADS
        some = gl.maximum(tiles, 1)
        unit = gl.where(length > 0, ((position - base) // some).to(gl.int32), -1)
        first_tile = ((position - base) % some).to(gl.int32)
        last_tile = gl.minimum(
            tiles, first_tile + gl.minimum(self.end - position, tiles).to(gl.int32)
        )
        begin = base + unit.to(gl.int64) * tiles
        first_program = (begin // self.tiles_per_program).to(gl.int32)
        last_program = ((begin + some - 1) // self.tiles_per_program).to(gl.int32)
        position += gl.where(length > 0, last_tile - first_tile, 0)
        is_done = position == base + length
        work = WorkTile(
            request, unit, skipped + first_tile, skipped + last_tile,
            (first_tile == 0) & (last_tile == tiles), last_program - first_program + 1,
            first_program,
        )  # fmt: skip
        return work, Cursor(position, i + is_done.to(gl.int32), gl.where(is_done, position, base))
