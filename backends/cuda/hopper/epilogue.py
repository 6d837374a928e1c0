"""Where the decode kernel's results go (`hopper_decode.py`), and how parts are merged: in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.prefill import LN2, LOG2E, sees_nothing
from attn_dispatch.backends.cuda.hopper.stream_k import LINE, request_of

__all__ = ["lanes", "merge", "store", "store_empty", "store_padding"]


@gluon.constexpr_function
def lanes(d):
    """(rows, d) in 4 warps: each thread has 8 neighbours of a row, 16 bytes of 16-bit values."""
    across = min(32, d // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def _merged(d):
    """(parts, rows, d) float32: a row is a warp's."""
    across = min(32, d // 4)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // across, across], [1, 4, 1], [2, 1, 0])


@gluon.jit
def _factor(
    m_i, total, nothing, tokens, heads, ok, lse_ptr, sinks_ptr,
    NUM_HEADS: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """Store each row's lse, and return what its sum of values is to be multiplied by."""
    low = m_i <= -1.0e29  # no score above −inf
    m_use = gl.where(low, 0.0, m_i)
    if LSE:
        lse = gl.where(low, float("nan"), (m_use + gl.log2(total)) * LN2)
        lse = gl.where(nothing, float("-inf"), lse)
        gl.store(lse_ptr + tokens * NUM_HEADS + heads, lse, mask=ok)
    if SINKS:
        sinks = gl.load(sinks_ptr + heads, mask=ok, other=0.0).to(gl.float32) * LOG2E
        total += gl.exp2(sinks - m_use)
    return 1.0 / total


@gluon.jit
def store(
    acc, m_i, total, nothing, q_start, packed, ok, heads, out_ptr, lse_ptr, sinks_ptr,
    out_stride_t, out_stride_h,
    GROUP: gl.constexpr, NUM_HEADS: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Store the rows of a state, acc being (head_size, rows); `nothing` sees no key."""
    D: gl.constexpr = acc.shape[0]
    LOADED: gl.constexpr = lanes(D)
    tokens = (q_start + packed // GROUP).to(gl.int64)
    factor = _factor(
        m_i, total, nothing, tokens, heads, ok, lse_ptr, sinks_ptr, NUM_HEADS, SINKS, LSE
    )
    out = gl.where(nothing[None, :], 0.0, acc * factor[None, :]).to(dtype)
    out = gl.convert_layout(gl.permute(out, (1, 0)), LOADED)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LOADED)
    tokens = gl.convert_layout(q_start + packed // GROUP, BY_ROW).to(gl.int64)
    rows = tokens * out_stride_t + gl.convert_layout(heads, BY_ROW).to(gl.int64) * out_stride_h
    d = gl.arange(0, D, gl.SliceLayout(0, LOADED))
    gl.store(out_ptr + rows[:, None] + d[None, :], out, mask=gl.convert_layout(ok, BY_ROW)[:, None])


@gluon.jit
def merge(
    first, parts, part_out_ptr, part_lse_ptr, q_start, first_packed, end_packed, past, seq_len,
    window, kv_head, out_ptr, lse_ptr, sinks_ptr, out_stride_t, out_stride_h,
    D: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Merge the parts of a split and store the rows."""
    AT_ONCE: gl.constexpr = max(1, 64 // ROWS)
    LAYOUT: gl.constexpr = _merged(D)
    BY_PART: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, BY_PART)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    rows = gl.arange(0, ROWS, BY_ROW)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
    l_i = gl.zeros([ROWS], gl.float32, BY_ROW)
    acc = gl.zeros([ROWS, D], gl.float32, OUT)
    for begin in range(0, parts, AT_ONCE):
        part = begin + gl.arange(0, AT_ONCE, gl.SliceLayout(1, BY_PART))
        slot = (first + part).to(gl.int64) * 2 + (part == 0).to(gl.int64)
        at = slot[:, None] * ROWS + rows[None, :]
        ok = (part < parts)[:, None] & (rows >= 0)[None, :]
        lse = gl.load(part_lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        offsets = gl.expand_dims(at, 2) * D + gl.expand_dims(gl.expand_dims(d, 0), 0)
        out = gl.load(
            part_out_ptr + offsets, mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg"
        )
        m_new = gl.maximum(m_i, gl.max(lse, 0))
        m_use = gl.where(m_new == float("-inf"), 0.0, m_new)
        weight = gl.exp2(lse - m_use[None, :])
        alpha = gl.exp2(m_i - m_use)
        l_i = l_i * alpha + gl.sum(weight, 0)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        acc += gl.sum(out * gl.expand_dims(weight, 2), 0)
        m_i = m_new
    packed = first_packed + rows
    ok = packed < end_packed
    heads = kv_head * GROUP + packed % GROUP
    tokens = (q_start + packed // GROUP).to(gl.int64)
    nothing = sees_nothing(past + packed // GROUP, seq_len, window, CAUSAL, WINDOW)
    factor = _factor(
        m_i, l_i, nothing, tokens, heads, ok, lse_ptr, sinks_ptr, NUM_HEADS, SINKS, LSE
    )
    TO: gl.constexpr = gl.SliceLayout(1, OUT)
    hidden = gl.convert_layout(nothing.to(gl.int32), TO) != 0
    out = acc * gl.convert_layout(factor, TO)[:, None]
    out = gl.where(hidden[:, None], 0.0, out).to(dtype)
    at = gl.convert_layout(tokens * out_stride_t + heads.to(gl.int64) * out_stride_h, TO)
    columns = gl.arange(0, D, gl.SliceLayout(0, OUT))
    gl.store(out_ptr + at[:, None] + columns[None, :], out, mask=gl.convert_layout(ok, TO)[:, None])


@gluon.jit
def _store_nothing(
    first, last, step, out_ptr, lse_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: gl.constexpr, D: gl.constexpr, LSE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Store rows that see no key, token * NUM_HEADS + head: 0, and an lse of −inf."""
    d = gl.arange(0, D, LINE)
    for row in range(first, last, step):
        token = (row // NUM_HEADS).to(gl.int64)
        head = (row % NUM_HEADS).to(gl.int64)
        at = out_ptr + token * out_stride_t + head * out_stride_h
        gl.store(at + d, gl.zeros([D], dtype, LINE))
        if LSE:
            gl.store(lse_ptr + row, float("-inf"))


@gluon.jit
def store_empty(
    num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, out_ptr, lse_ptr, out_stride_t,
    out_stride_h,
    HAS_REQUEST_LIST: gl.constexpr, NUM_HEADS: gl.constexpr, D: gl.constexpr, LSE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Store the rows of requests without keys."""
    for i in range(gl.program_id(0), num_reqs, gl.num_programs(0)):
        request = request_of(requests_ptr, i, HAS_REQUEST_LIST)
        if gl.load(seq_lens_ptr + request) == 0:
            first = gl.load(query_start_loc_ptr + request) * NUM_HEADS
            last = gl.load(query_start_loc_ptr + request + 1) * NUM_HEADS
            _store_nothing(
                first, last, 1, out_ptr, lse_ptr, out_stride_t, out_stride_h, NUM_HEADS, D, LSE,
                dtype,
            )  # fmt: skip


@gluon.jit
def store_padding(
    end, num_rows, out_ptr, lse_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: gl.constexpr, D: gl.constexpr, LSE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Store the rows behind those of the last request, `end` to `num_rows`, each program some."""
    _store_nothing(
        end * NUM_HEADS + gl.program_id(0), num_rows * NUM_HEADS, gl.num_programs(0), out_ptr,
        lse_ptr, out_stride_t, out_stride_h, NUM_HEADS, D, LSE, dtype,
    )  # fmt: skip
