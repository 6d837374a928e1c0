"""Parts of work units of latent attention, and how they are merged: in Gluon.

A part is up to 128 KB, and a long request has as many parts as there are programs. So no program
merges them all: each stores its parts first, and when all parts of a unit are there, each of its
programs merges some of the rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.launch import MLA_COUNTERS
from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate, barrier, mma_layout, reinterpret

__all__ = ["LATENT", "OWN", "ROWS", "Parts", "by_row", "scaled"]

ROWS = gl.constexpr(64)
LATENT = gl.constexpr(512)
OWN = gl.constexpr(256)  # columns of a warp group
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
_OF_WARPS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_COUNTERS = gl.constexpr(MLA_COUNTERS)


@gluon.constexpr_function
def by_row(columns):
    """The layout of a value for each row of a product with this many columns."""
    return gl.SliceLayout(1, mma_layout(columns))


@gluon.jit
def scaled(acc, factor):
    """acc times a factor for each row."""
    return acc * gl.convert_layout(factor, by_row(OWN))[:, None]


@gluon.jit
def _online(m_i, lse):
    """(new maxima, weights of what has these log2 sums, factors of what was there before)."""
    m_new = gl.maximum(m_i, lse)
    m_use = gl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, gl.exp2(lse - m_use), gl.exp2(m_i - m_use)


@aggregate
class Parts:
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
        r = gl.arange(0, ROWS, total.type.layout)
        lse = gl.where(empty, float("-inf"), m_i + gl.log2(some))
        gl.store(self.lse_ptr + (slot * 2 + WHICH) * ROWS + r, lse)
        part = scaled(acc, 1.0 / some)
        ok = gl.convert_layout(rows.ok.to(gl.int32), by_row(OWN)) != 0
        r = gl.arange(0, ROWS, by_row(OWN))
        column = WHICH * OWN + gl.arange(0, OWN, gl.SliceLayout(0, mma_layout(OWN)))
        at = (slot * ROWS + r)[:, None] * LATENT + column[None, :]
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
        num_rows = gl.minimum(work.q_len * work.config.GROUP - work.unit * ROWS, ROWS)
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
        column = WHICH * OWN + gl.arange(0, OWN, _BY_COLUMN)
        m_i = gl.full([_MERGE_ROWS], float("-inf"), gl.float32, _BY_MERGED_ROW)
        l_i = gl.zeros([_MERGE_ROWS], gl.float32, _BY_MERGED_ROW)
        acc = gl.zeros([_MERGE_ROWS, OWN], gl.float32, _MANY_ROWS)
        for part in range(0, work.num_parts):
            slot = self._slot(work.first_program + part, part == 0)
            lse_ptrs = self.lse_ptr + (slot * 2 + WHICH) * ROWS + row
            lse = gl.load(lse_ptrs, mask=ok, other=float("-inf"), cache_modifier=".cg")
            at = (slot * ROWS + row)[:, None] * LATENT + column[None, :]
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
        column = WHICH * OWN + gl.arange(0, OWN, gl.SliceLayout(0, _PART_SUMS))
        m_i = gl.full([4, _MERGE_PARTS], float("-inf"), gl.float32, _BY_PART)
        l_i = gl.zeros([4, _MERGE_PARTS], gl.float32, _BY_PART)
        acc = gl.zeros([4, _MERGE_PARTS, OWN], gl.float32, _MANY_PARTS)
        for step in range(0, work.num_parts, 4 * _MERGE_PARTS):
            part = step + offset
            ok = part < work.num_parts
            slot = self._slot(work.first_program + part, part == 0)
            lse_ptrs = self.lse_ptr + (slot * 2 + WHICH) * ROWS + row
            lse = gl.load(lse_ptrs, mask=ok, other=float("-inf"), cache_modifier=".cg")
            at = gl.expand_dims((slot * ROWS + row) * LATENT, 2) + column[None, None, :]
            ok = gl.expand_dims(ok, 2)
            out = gl.load(self.out_ptr + at, mask=ok, other=0.0, cache_modifier=".cg")
            m_i, weight, alpha = _online(m_i, lse)
            l_i = l_i * alpha + weight
            acc = acc * gl.expand_dims(alpha, 2) + out * gl.expand_dims(weight, 2)
        m_row = gl.max(gl.max(m_i, 1), 0)
        weight = gl.exp2(m_i - gl.where(m_row == float("-inf"), 0.0, m_row))
        total = gl.sum(gl.sum(weight * l_i, 1), 0)
        # The sum over warps is made in the room of key tiles, which are no longer needed: a
        # reduction's own memory would be too much.
        ALL: gl.constexpr = buffers.STAGES * buffers.KEYS // 4
        sums = reinterpret(buffers.latents, gl.float32, [ALL, 4, OWN], _OF_WARPS).index(WHICH)
        barrier()
        sums.store(gl.sum(acc * gl.expand_dims(weight, 2), 1))
        barrier()
        out = gl.sum(sums.load(_SUMS), 0)
        column = WHICH * OWN + gl.arange(0, OWN, gl.SliceLayout(0, _SUMS))
        at, factor, no_key = self._finish(m_row, total, row, row >= 0, work, output)
        out = gl.where(no_key, 0.0, out * factor).to(output.out_ptr.dtype.element_ty)
        gl.store(output.out_ptr + at + column, out)

    @gluon.jit
    def _finish(self, m_i, total, row, ok, work, output):
        """(where the outputs of rows begin, their factors, which see no key). Stores their LSE."""
        config: gl.constexpr = work.config
        r = work.unit * ROWS + row
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
