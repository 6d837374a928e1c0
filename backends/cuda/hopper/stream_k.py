"""The decode kernel's schedule, in Gluon: Stream-K (arXiv:2301.03598).

The work is one iteration space: the key tiles of every request, row tile and KV head, one after the
other. Each program takes an equal, contiguous share of it, as LeanAttention (arXiv:2405.10480) does
for decodes. A work unit is the key tiles of one row tile and KV head of a request. A share can cut
it into parts.

New here: each program finds its share by a prefix sum over the lengths on the device, so that one
captured graph serves any lengths. The last program to arrive merges the parts (`epilogue.py`), so
that there is no second kernel. Shares are rounded, so that equal requests are cut in the same way.
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
class Rows:
    """Rows of a work unit: a query token and a head each. Those that do not exist are not ok."""

    ok: gl.tensor
    tokens: gl.tensor
    heads: gl.tensor
    positions: gl.tensor
    sees_no_key: gl.tensor

    @gluon.jit
    def to(self, LAYOUT: gl.constexpr):
        """The same rows in another layout."""
        return Rows(
            gl.convert_layout(self.ok, LAYOUT),
            gl.convert_layout(self.tokens, LAYOUT),
            gl.convert_layout(self.heads, LAYOUT),
            gl.convert_layout(self.positions, LAYOUT),
            gl.convert_layout(self.sees_no_key, LAYOUT),
        )


@aggregate
class WorkTile:
    """A program's next stretch of key tiles, [first_tile, last_tile), all of one work unit.

    Attributes:
        request, q_start, q_len, seq_len: the request, its query rows and its number of keys.
        first_key: the first key that a query of the request sees. Blocks before it may be freed.
        unit: kv_head + NUM_KV_HEADS * row tile, or −1 if the program has no part in the tiles: the
            request has no keys, or no unit for this member of the team.
        is_whole: these are all of the unit's tiles.
        num_parts, first_program: otherwise, how many programs share it, and the first of them.
    """

    request: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    seq_len: gl.tensor
    first_key: gl.tensor
    unit: gl.tensor
    first_tile: gl.tensor
    last_tile: gl.tensor
    is_whole: gl.tensor
    num_parts: gl.tensor
    first_program: gl.tensor
    window: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def kv_head(self):
        return self.unit % self.config.NUM_KV_HEADS

    @gluon.jit
    def rows(self, LAYOUT: gl.constexpr):
        """The unit's rows: row r is token r // GROUP and head r % GROUP of the KV head."""
        config: gl.constexpr = self.config
        first = self.unit // config.NUM_KV_HEADS * config.ROWS
        r = first + gl.arange(0, config.ROWS, LAYOUT)
        positions = self.seq_len - self.q_len + r // config.GROUP
        return Rows(
            r < self.q_len * config.GROUP,
            self.q_start + r // config.GROUP,
            self.kv_head() * config.GROUP + r % config.GROUP,
            positions,
            sees_no_key(positions, self.seq_len, self.window, config),
        )


@aggregate
class IterationSpace:
    """The space of the listed requests, in key tiles.

    Attributes:
        team: this many programs, one after the other, have the same share, and each takes other
            work units of it: the same keys are then read at about the same time, and all but one
            find them in the second-level cache.
    """

    requests_ptr: gl.tensor
    query_start_loc_ptr: gl.tensor
    seq_lens_ptr: gl.tensor
    num_reqs: gl.tensor
    window: gl.tensor
    team: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def request(self, i, ok):
        """The i-th request of this launch, or requests, where ok."""
        if self.config.HAS_REQUEST_LIST:
            return gl.load(self.requests_ptr + i, mask=ok, other=0)
        else:
            return i

    @gluon.jit
    def _lengths(self, request, ok):
        """(q_start, q_len, seq_len, first key, key tiles, tiles in all), of one or a vector."""
        config: gl.constexpr = self.config
        seq_len = gl.load(self.seq_lens_ptr + request, mask=ok, other=0)
        q_start = gl.load(self.query_start_loc_ptr + request, mask=ok, other=0)
        q_len = gl.load(self.query_start_loc_ptr + request + 1, mask=ok, other=0) - q_start
        first_key = seq_len * 0
        if config.WINDOW:
            first_key = gl.maximum(seq_len - q_len - self.window + 1, 0)
        tiles = (seq_len + config.KEYS - 1) // config.KEYS - first_key // config.KEYS
        tiles = gl.maximum(tiles, 0)
        size = tiles.to(gl.int64) * ((self._units(q_len) + self.team - 1) // self.team)
        return q_start, q_len, seq_len, first_key, tiles, size

    @gluon.jit
    def _units(self, q_len):
        """The work units of a request."""
        row_tiles = (q_len * self.config.GROUP + self.config.ROWS - 1) // self.config.ROWS
        return row_tiles * self.config.NUM_KV_HEADS

    @gluon.jit
    def _sizes(self, begin):
        """(sizes of the next LENGTHS_PER_LOAD requests, which of them exist)."""
        i = begin + gl.arange(0, self.config.LENGTHS_PER_LOAD, VECTOR)
        ok = i < self.num_reqs
        _, _, _, _, _, sizes = self._lengths(self.request(i, ok), ok)
        return sizes, ok

    @gluon.jit
    def size(self):
        """The number of key tiles."""
        total = gl.to_tensor(0).to(gl.int64)
        for begin in range(0, self.num_reqs, self.config.LENGTHS_PER_LOAD):
            sizes, _ = self._sizes(begin)
            total += gl.sum(sizes, 0)
        return total

    @gluon.jit
    def tiles_per_program(self, size):
        """A rounded number of tiles, so that equal requests are cut in the same way, or not."""
        programs = gl.num_programs(0) * self.config.PROGRAMS // self.team
        tiles = gl.maximum((size + programs - 1) // programs, self.config.MIN_TILES)
        step = gl.exp2(gl.floor(gl.log2(gl.maximum(tiles // 16, 1).to(gl.float32)))).to(gl.int64)
        return (tiles + step - 1) // step * step

    @gluon.jit
    def share(self, program, size, tiles_per_program):
        """The share of a program."""
        member = program % self.team
        program = program // self.team
        position = program * tiles_per_program
        i = gl.to_tensor(0)
        base = gl.to_tensor(0).to(gl.int64)
        running = gl.to_tensor(0).to(gl.int64)
        for begin in range(0, self.num_reqs, self.config.LENGTHS_PER_LOAD):
            sizes, ok = self._sizes(begin)
            ends = gl.associative_scan(sizes, 0, _add) + running
            before = (ends <= position) & ok
            i += gl.sum(before.to(gl.int32), 0)
            base = gl.maximum(base, gl.max(gl.where(before, ends, 0), 0))
            running += gl.sum(sizes, 0)
        end = gl.minimum(position + tiles_per_program, size)
        return Share(self, program, member, tiles_per_program, end, position, i, base)


@aggregate
class Share:
    """What is left of a program's share, [position, end).

    `program` is the number of its team, and `member` the program's number in it. `i` is the index
    of the request at `position`, `base` the position where that request begins.
    """

    space: IterationSpace
    program: gl.tensor
    member: gl.tensor
    tiles_per_program: gl.tensor
    end: gl.tensor
    position: gl.tensor
    i: gl.tensor
    base: gl.tensor

    @gluon.jit
    def next(self):
        """The next work tile, and the share that is left then. There may be none."""
        space = self.space
        position = self.position
        ok = self.i < space.num_reqs
        request = space.request(self.i, ok)
        _, _, _, first_key, tiles, size = space._lengths(request, ok)
        # A request's tiles, and so distances in one, fit into 32 bits, whose division is faster.
        some = gl.maximum(tiles, 1)
        at = (position - self.base).to(gl.int32)
        turn = at // some
        first = at - turn * some
        last = gl.minimum(tiles, first + gl.minimum(self.end - position, tiles).to(gl.int32))
        per_program = self.tiles_per_program.to(gl.int32)
        # Where the unit begins, counted from where the program's share began.
        begin = (position - self.program * self.tiles_per_program).to(gl.int32) - first
        before = (gl.maximum(-begin, 0) + per_program - 1) // per_program
        after = (begin + some - 1) // per_program
        skipped = first_key // space.config.KEYS
        # Loaded again, so that what was loaded above need not stay in registers. With the same mask
        # the compiler would merge the loads; a share that is not at its end has a request.
        is_left = position < self.end
        q_start, q_len, seq_len, first_key, _, _ = space._lengths(request, is_left)
        unit = turn * space.team + self.member
        unit = gl.where((size > 0) & (unit < space._units(q_len)), unit, -1)
        work = WorkTile(
            request, q_start, q_len, seq_len, first_key, unit, skipped + first, skipped + last,
            (first == 0) & (last == tiles), before + after + 1, self.program - before,
            space.window, space.config,
        )  # fmt: skip
        position += gl.where(size > 0, last - first, 0)
        is_done = position == self.base + size
        left = Share(
            space, self.program, self.member, self.tiles_per_program, self.end, position,
            self.i + is_done.to(gl.int32), gl.where(is_done, position, self.base),
        )  # fmt: skip
        return work, left
