"""How finished rows go out: normalized, with their sink, as they are or as fp8; and their lse."""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import encode_fp8, largest
from attn_dispatch.backends.triton.kernels.online_softmax import LOWEST

__all__ = ["store_rows"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_rows(
    acc,
    m_i,
    l_i,
    token_rows,
    heads,
    ok,
    nothing,
    v_scale,
    out_ptr,
    out_stride_t,
    out_stride_h,
    lse_ptr,
    sinks_ptr,
    out_scale_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    OUT_FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
):
    """Store rows of the state that `attend` returns.

    Args:
        acc, m_i, l_i: as in `attend`.
        token_rows: (rows,) the row of the output, by token.
        heads: (rows,) the query head.
        ok: (rows,) bool, rows that exist.
        nothing: (rows,) bool, rows that see no key: 0, with an lse of −inf. In others a NaN stays,
            and what has no score above −inf is 0 / 0, unless a sink takes part.
        v_scale: float32, of the values of an fp8 cache.
        lse_ptr: (tokens, NUM_HEADS) float32, written with LSE.
        sinks_ptr: (NUM_HEADS,) float32, read with SINKS.
        out_scale_ptr: for an OUT_FORMAT of fp8 the scale, read; with OUT_GROUP the scales of each
            group of so many values, written.
        OUT_FORMAT: "plain" or one of elements.py's; the output is bytes then.
    """
    DV: tl.constexpr = acc.shape[1]
    rows = token_rows.to(tl.int64)
    low = m_i <= LOWEST
    if LSE:
        lse = tl.where(low, float("nan"), (m_i + tl.log2(l_i)) * LN2)
        lse = tl.where(nothing, float("-inf"), lse)
        tl.store(lse_ptr + rows * NUM_HEADS + heads, lse, mask=ok)
    total = l_i
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=ok, other=0.0).to(tl.float32) * LOG2E
        total += tl.exp2(sink - tl.where(low, 0.0, m_i))
    out = acc * (v_scale / total)[:, None]
    out = tl.where(nothing[:, None], 0.0, out)
    d_idx = tl.arange(0, DV)
    offsets = (
        rows[:, None] * out_stride_t + (heads.to(tl.int64) * out_stride_h)[:, None] + d_idx[None, :]
    )
    out_ok = ok[:, None]
    if HEAD_SIZE_V != DV:
        out_ok = out_ok & (d_idx < HEAD_SIZE_V)[None, :]
    if OUT_FORMAT == "plain":
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=out_ok)
    elif OUT_GROUP == 0:
        scaled = tl.math.div_rn(out, tl.load(out_scale_ptr).to(tl.float32))
        tl.store(out_ptr + offsets, encode_fp8(scaled, OUT_FORMAT), mask=out_ok)
    else:
        GROUPS: tl.constexpr = DV // OUT_GROUP
        KEPT: tl.constexpr = HEAD_SIZE_V // OUT_GROUP
        LARGEST: tl.constexpr = largest(OUT_FORMAT)
        groups = tl.reshape(out, (out.shape[0], GROUPS, OUT_GROUP))
        amax = tl.max(tl.abs(groups), 2)
        scales = tl.maximum(
            tl.math.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), 1.1754943508222875e-38
        )
        scales = tl.where(amax == 0.0, 1.0, scales)
        per_value = tl.broadcast_to(scales[:, :, None], (out.shape[0], GROUPS, OUT_GROUP))
        scaled = tl.math.div_rn(groups, per_value)
        codes = encode_fp8(tl.reshape(scaled, (out.shape[0], DV)), OUT_FORMAT)
        tl.store(out_ptr + offsets, codes, mask=out_ok)
        g_idx = tl.arange(0, GROUPS)
        scale_offsets = (rows * NUM_HEADS + heads)[:, None] * KEPT + g_idx[None, :]
        scales_ok = ok[:, None] & (g_idx < KEPT)[None, :]
        tl.store(out_scale_ptr + scale_offsets, scales, mask=scales_ok)
