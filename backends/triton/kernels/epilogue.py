"""How finished rows are stored: normalized, with their sink, plain or as fp8; and their LSE."""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import encode_fp8, largest
from attn_dispatch.backends.triton.kernels.online_softmax import LOG2E, LOWEST, fully_masked

__all__ = ["store_rows", "store_state"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_state(state, tile, v_scale, out, F: tl.constexpr):
    """Store the rows of a tile, whose state covers all of their keys; see store_rows."""
    _, m_i, l_i = state
    is_empty = fully_masked(m_i, l_i, tile, F)
    store_rows(state, tile.out_rows, tile.heads, tile.ok, is_empty, v_scale, out, F.SINKS, F)


@triton.jit
def store_rows(
    state, out_rows, heads, ok, is_empty, v_scale, out, SINKS: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Store rows of a state of `attend`.

    Args:
        state: see `attend`.
        out_rows: (rows,) the row of the output, by token.
        heads: (rows,) the query head.
        ok: (rows,) bool, rows that exist.
        is_empty: (rows,) bool, rows that see no key: 0, with an LSE of −inf. In other rows a NaN
            stays, and a row without a score above −inf is 0 / 0, unless a sink takes part.
        v_scale: float32, of the values of an fp8 cache.
        out: see Output.
        SINKS: sinks take part.
    """
    acc, m_i, l_i = state
    DV: tl.constexpr = acc.shape[1]
    OUT_FORMAT: tl.constexpr = F.OUT_FORMAT
    rows = out_rows.to(tl.int64)
    low = m_i <= LOWEST
    if F.LSE:
        lse = tl.where(low, float("nan"), (m_i + tl.log2(l_i)) * LN2)
        lse = tl.where(is_empty, float("-inf"), lse)
        tl.store(out.lse + rows * F.NUM_HEADS + heads, lse, mask=ok)
    total = l_i
    if SINKS:
        sink = tl.load(out.sinks + heads, mask=ok, other=0.0).to(tl.float32) * LOG2E
        total += tl.exp2(sink - tl.where(low, 0.0, m_i))
    x = acc * (v_scale / total)[:, None]
    x = tl.where(is_empty[:, None], 0.0, x)
    d_idx = tl.arange(0, DV)
    offsets = (
        rows[:, None] * out.stride_t + (heads.to(tl.int64) * out.stride_h)[:, None] + d_idx[None, :]
    )
    stored = ok[:, None]
    if F.HEAD_SIZE_V != DV:
        stored = stored & (d_idx < F.HEAD_SIZE_V)[None, :]
    if OUT_FORMAT == "plain":
        tl.store(out.data + offsets, x.to(out.data.dtype.element_ty), mask=stored)
    elif F.OUT_GROUP == 0:
        scaled = tl.math.div_rn(x, tl.load(out.scale).to(tl.float32))
        tl.store(out.data + offsets, encode_fp8(scaled, OUT_FORMAT), mask=stored)
    else:
        GROUPS: tl.constexpr = DV // F.OUT_GROUP
        STORED_GROUPS: tl.constexpr = F.HEAD_SIZE_V // F.OUT_GROUP
        SHAPE: tl.constexpr = (acc.shape[0], GROUPS, F.OUT_GROUP)
        groups = tl.reshape(x, SHAPE)
        amax = tl.max(tl.abs(groups), 2)
        full = tl.full(amax.shape, largest(OUT_FORMAT), tl.float32)
        scales = tl.maximum(tl.math.div_rn(amax, full), 1.1754943508222875e-38)
        scales = tl.where(amax == 0.0, 1.0, scales)
        scaled = tl.math.div_rn(groups, tl.broadcast_to(scales[:, :, None], SHAPE))
        codes = encode_fp8(tl.reshape(scaled, (acc.shape[0], DV)), OUT_FORMAT)
        tl.store(out.data + offsets, codes, mask=stored)
        g_idx = tl.arange(0, GROUPS)
        scale_offsets = (rows * F.NUM_HEADS + heads)[:, None] * STORED_GROUPS + g_idx[None, :]
        scales_stored = ok[:, None] & (g_idx < STORED_GROUPS)[None, :]
        tl.store(out.scale + scale_offsets, scales, mask=scales_stored)
