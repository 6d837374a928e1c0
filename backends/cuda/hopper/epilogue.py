"""How the Hopper kernels store their results, and how parts of a work unit are merged: in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.scores import no_score
from attn_dispatch.backends.cuda.hopper.stream_k import VECTOR
from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate, barrier, row_layout
from attn_dispatch.backends.triton.kernels.epilogue import LN2
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E

__all__ = ["Output", "Parts"]


@gluon.constexpr_function
def _merge_layout(d):
    """(parts, rows, d) float32: a row is a warp's."""
    lanes = min(32, d // 4)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, 4, 1], [2, 1, 0])


@aggregate
class Output:
    """Where output and log-sum-exp go, and the sinks."""

    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    sinks_ptr: gl.tensor
    stride_t: gl.tensor
    stride_h: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def normalizer(self, m_log2, has_no_score, total, sees_no_key, sinks, lse_ptrs, ok):
        """Store the log-sum-exp of rows; return what their sums of values are multiplied by.

        Args:
            m_log2: running maxima, in units of log2; 0 where has_no_score.
            total: sums of weights. A NaN among a row's scores is in there; no maximum shows it.
        """
        if self.config.LSE:
            lse = gl.where(has_no_score, float("nan"), (m_log2 + gl.log2(total)) * LN2)
            lse = gl.where(sees_no_key, float("-inf"), lse)
            gl.store(lse_ptrs, lse, mask=ok)
        if self.config.SINKS:
            total += gl.exp2(sinks.to(gl.float32) * LOG2E - m_log2)
        return 1.0 / total

    @gluon.jit
    def _decode_factor(self, m_i, total, rows):
        """`normalizer` for the rows of a decode."""
        sinks = total
        if self.config.SINKS:
            sinks = gl.load(self.sinks_ptr + rows.heads, mask=rows.ok, other=0.0)
        low = no_score(m_i)
        lse_ptrs = self.lse_ptr + rows.tokens.to(gl.int64) * self.config.NUM_HEADS + rows.heads
        return self.normalizer(
            gl.where(low, 0.0, m_i), low, total, rows.sees_no_key, sinks, lse_ptrs, rows.ok
        )

    @gluon.jit
    def offsets(self, tokens, heads):
        """Where the outputs of tokens and heads begin."""
        return tokens.to(gl.int64) * self.stride_t + heads.to(gl.int64) * self.stride_h

    @gluon.jit
    def store(self, out, tokens, heads, ok, FIRST: gl.constexpr = 0):
        """Store rows of outputs; their columns begin at FIRST of the head's."""
        at = self.offsets(tokens, heads)
        d = FIRST + gl.arange(0, out.shape[1], gl.SliceLayout(0, out.type.layout))
        gl.store(self.out_ptr + at[:, None] + d[None, :], out, mask=ok[:, None])

    @gluon.jit
    def store_transposed(self, acc, m_i, total, work):
        """Store the rows of a state whose acc is (D, ROWS)."""
        D: gl.constexpr = acc.shape[0]
        LAYOUT: gl.constexpr = row_layout(D)
        rows = work.rows(gl.SliceLayout(0, acc.type.layout))
        factor = self._decode_factor(m_i, total, rows)
        out = gl.where(rows.sees_no_key[None, :], 0.0, acc * factor[None, :])
        out = out.to(self.out_ptr.dtype.element_ty)
        out = gl.convert_layout(gl.permute(out, (1, 0)), LAYOUT)
        # Computed again in this layout, they would stay in registers since the queries were loaded.
        rows = rows.to(gl.SliceLayout(1, LAYOUT))
        self.store(out, rows.tokens, rows.heads, rows.ok)

    @gluon.jit
    def _store_no_keys(self, first, last, step):
        """Store rows that see no key, token * NUM_HEADS + head: 0, and an lse of −inf."""
        D: gl.constexpr = self.config.D
        zeros = gl.zeros([D], self.out_ptr.dtype.element_ty, VECTOR)
        d = gl.arange(0, D, VECTOR)
        for row in range(first, last, step):
            at = self.offsets(row // self.config.NUM_HEADS, row % self.config.NUM_HEADS)
            gl.store(self.out_ptr + at + d, zeros)
            if self.config.LSE:
                gl.store(self.lse_ptr + row, float("-inf"))

    @gluon.jit
    def store_empty(self, space):
        """Store the rows of requests without keys."""
        for i in range(gl.program_id(0), space.num_reqs, gl.num_programs(0)):
            request = space.request(i, i < space.num_reqs)
            if gl.load(space.seq_lens_ptr + request) == 0:
                first = gl.load(space.query_start_loc_ptr + request)
                last = gl.load(space.query_start_loc_ptr + request + 1)
                self._store_no_keys(first * self.config.NUM_HEADS, last * self.config.NUM_HEADS, 1)

    @gluon.jit
    def store_padding(self, first, last):
        """Store the tokens [first, last) behind the last request, each program some."""
        self._store_no_keys(
            first * self.config.NUM_HEADS + gl.program_id(0), last * self.config.NUM_HEADS,
            gl.num_programs(0),
        )  # fmt: skip


@aggregate
class Parts:
    """Room for parts of work units: normalized outputs, with their log2 sums, and counters.

    A program has two slots: one for the unit that it begins with and that another program began,
    and one for the unit that begins with it.
    """

    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    counters_ptr: gl.tensor

    @gluon.jit
    def store(self, acc, m_i, total, work, program, output):
        """Store a part whose acc is (D, ROWS). If it is the last to arrive, merge all of them."""
        D: gl.constexpr = acc.shape[0]
        ROWS: gl.constexpr = acc.shape[1]
        LAYOUT: gl.constexpr = row_layout(D)
        first = work.first_program
        slot = program.to(gl.int64) * 2 + (program == first).to(gl.int64)
        empty = total == 0.0  # no score above −inf; a NaN is in the sum
        some = gl.where(empty, 1.0, total)
        rows = gl.arange(0, ROWS, gl.SliceLayout(0, acc.type.layout))
        lse = gl.where(empty, float("-inf"), m_i + gl.log2(some))
        gl.store(self.lse_ptr + slot * ROWS + rows, lse)
        part = gl.convert_layout(gl.permute(acc / some[None, :], (1, 0)), LAYOUT)
        at = slot * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
        gl.store(self.out_ptr + at[:, None] * D + d[None, :], part)
        # All threads' stores come before the one thread's release, and its acquire before
        # their loads, which bypass the first-level cache.
        barrier()
        arrived = gl.atomic_add(self.counters_ptr + 2 * first, 1, sem="acq_rel", scope="gpu")
        if arrived == work.num_parts - 1:
            barrier()
            self._merge(work, output)
            gl.store(self.counters_ptr + 2 * first, 0)  # for the next launch

    @gluon.jit
    def _merge(self, work, output):
        """Merge the parts of a unit and store its rows."""
        D: gl.constexpr = output.config.D
        ROWS: gl.constexpr = output.config.ROWS
        AT_ONCE: gl.constexpr = max(1, 64 // ROWS)
        LAYOUT: gl.constexpr = _merge_layout(D)
        BY_PART: gl.constexpr = gl.SliceLayout(2, LAYOUT)
        OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
        BY_ROW: gl.constexpr = gl.SliceLayout(0, BY_PART)
        d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
        rows = gl.arange(0, ROWS, BY_ROW)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        l_i = gl.zeros([ROWS], gl.float32, BY_ROW)
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        for begin in range(0, work.num_parts, AT_ONCE):
            part = begin + gl.arange(0, AT_ONCE, gl.SliceLayout(1, BY_PART))
            slot = (work.first_program + part).to(gl.int64) * 2 + (part == 0).to(gl.int64)
            at = slot[:, None] * ROWS + rows[None, :]
            ok = (part < work.num_parts)[:, None] & (rows >= 0)[None, :]
            lse = gl.load(self.lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
            offsets = gl.expand_dims(at, 2) * D + gl.expand_dims(gl.expand_dims(d, 0), 0)
            out = gl.load(
                self.out_ptr + offsets, mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg"
            )
            m_new = gl.maximum(m_i, gl.max(lse, 0))
            m_use = gl.where(m_new == float("-inf"), 0.0, m_new)
            weight = gl.exp2(lse - m_use[None, :])
            alpha = gl.exp2(m_i - m_use)
            l_i = l_i * alpha + gl.sum(weight, 0)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            acc += gl.sum(out * gl.expand_dims(weight, 2), 0)
            m_i = m_new
        rows = work.rows(BY_ROW)
        factor = output._decode_factor(m_i, l_i, rows)
        out = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        rows = work.rows(gl.SliceLayout(1, OUT))
        out = gl.where(rows.sees_no_key[:, None], 0.0, out)
        out = out.to(output.out_ptr.dtype.element_ty)
        output.store(out, rows.tokens, rows.heads, rows.ok)
