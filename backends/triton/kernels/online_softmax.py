"""The inner loop that every attention kernel here runs: online softmax over tiles of keys.

The algorithm is FlashAttention's (arXiv:2205.14135): one pass over the keys, with a running maximum
and a running sum for each row, in units of log2. The conventions are docs/numerics.md's. A tile of
rows packs the query heads of one KV head: row = token * GROUP + head of the group, so that a key
is loaded once for all of them, whatever the ratio.

Where keys come from, SOURCE, is one of
    "pages"        blocks of the paged cache, found through the block table
    "rows"         (tokens, heads, size) tensors, one request's keys in rows that follow each other
    "descriptors"  the same as (tokens, heads * size) through tensor descriptors, where a head fills
                   its tile: TMA where the device has it
and FORMAT is how they are kept there: "plain", "int8" (a float32 scale beside each row) or one of
elements.py's.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8

__all__ = [
    "LOWEST",
    "alibi_bias",
    "attend",
    "counted",
    "reach",
    "sees",
    "sees_nothing",
    "soft_capped",
]

LOG2E = tl.constexpr(1.4426950408889634)
#: A running maximum up to LOWEST is of no score above −inf. Where keys are hidden one by one, SEEN
#: stands for the −inf of a key that is seen, and −inf for no key.
LOWEST = tl.constexpr(-2.0e38)
SEEN = tl.constexpr(-3.0e38)


@triton.jit
def soft_capped(s, scale_log2, cap_log2, scale_over_cap, FAST: tl.constexpr):
    """Products as scores with a soft cap, cap * tanh(scale * s / cap), in units of log2.

    FAST takes NVIDIA's instruction, whose relative error is up to 2 ** -11. Else it is a few units
    in the last place of float32: near 0 by the series of tanh(x) / x (its coefficients are those of
    Cephes' tanhf), where 1 - 2 / (exp(2 x) + 1) would cancel.
    """
    x = s * scale_over_cap
    if FAST:
        return cap_log2 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        near = s * scale_log2
        near = near + near * (series * z)
        far = cap_log2 * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
        return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def sees_nothing(
    m_i, l_i, q_pos, seq_len, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(rows,) bool: which rows see no key, whatever their scores are.

    By their positions; where a mask or ranges decide, by the state over all of their keys.
    """
    if RANGES or MASK:
        return (m_i == float("-inf")) & (l_i == 0.0)
    else:
        # No query stands behind the last key, so what one may lack is keys up to itself.
        last = q_pos * 0 + seq_len - 1
        if CAUSAL:
            last = q_pos
        elif WINDOW:
            last = tl.minimum(last, q_pos + window - 1)
        return last < 0


@triton.jit
def counted(s, seen, RANGES: tl.constexpr, MASK: tl.constexpr):
    """Scores with −inf for hidden keys, so that `sees_nothing` can tell these from seen ones."""
    if RANGES or MASK:
        s = tl.where(s == float("-inf"), SEEN, s)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def alibi_bias(slopes, k_pos, q_pos_f, ALIBI: tl.constexpr):
    """(rows, keys): slope * (key - query), or with ALIBI == 2 slope * -abs(key - query)."""
    distance = k_pos.to(tl.float32)[None, :] - q_pos_f[:, None]
    if ALIBI == 2:
        distance = -tl.abs(distance)
    return slopes[:, None] * distance


@triton.jit
def reach(
    first_position,
    last_position,
    seq_len,
    window,
    ranges_ptr,
    first_range,
    last_range,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
):
    """[lo, hi): the keys that a row from first_position to last_position may see."""
    lo = 0
    hi = seq_len
    if CAUSAL:
        hi = tl.minimum(seq_len, last_position + 1)
    if WINDOW:
        lo = tl.maximum(0, first_position - window + 1)
        if not CAUSAL:
            hi = tl.minimum(seq_len, last_position + window)
    if RANGES:
        for i in range(first_range, last_range):
            start = tl.load(ranges_ptr + 2 * i)
            end = tl.load(ranges_ptr + 2 * i + 1)
            if (start <= last_position) & (first_position < end):
                lo = tl.minimum(lo, start)
                hi = tl.maximum(hi, tl.minimum(seq_len, end))
    return lo, hi


@triton.jit
def sees(
    q_pos,
    k_pos,
    tokens,
    seq_len,
    window,
    mask_ptr,
    ranges_ptr,
    first_range,
    last_range,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    MASK: tl.constexpr,
):
    """(rows, keys) bool: which row sees which key; rows without a token see nothing.

    Args:
        q_pos: (rows,) where the rows stand among the keys.
        k_pos: (keys,).
        tokens: (rows,) the token of each row, −1 for none.
        mask_ptr: where the request's custom mask begins, (query_len, seq_len).
        ranges_ptr: (num_ranges, 2) [start, end); the request's are first_range to last_range.
    """
    q = q_pos[:, None]
    k = k_pos[None, :]
    seen = (k < seq_len) & (tokens >= 0)[:, None]
    allowed = seen
    if CAUSAL:
        seen = seen & (k <= q)
    if WINDOW:
        seen = seen & (k > q - window)
        if not CAUSAL:
            seen = seen & (k < q + window)
    if RANGES:
        for i in range(first_range, last_range):
            start = tl.load(ranges_ptr + 2 * i)
            end = tl.load(ranges_ptr + 2 * i + 1)
            together = (q >= start) & (q < end) & (k >= start) & (k < end)
            seen = seen | (together & allowed)
    if MASK:
        offsets = tokens.to(tl.int64)[:, None] * seq_len + k
        seen = seen & (tl.load(mask_ptr + offsets, mask=allowed, other=0) != 0)
    return seen


@triton.jit
def _decoded(x, dtype: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    if FORMAT == "plain":
        return x.to(dtype)
    elif FORMAT == "int8":
        return x.to(dtype)
    else:
        return decode_fp8(x, dtype, FORMAT, NATIVE)


@triton.jit
def attend(
    acc,
    m_i,
    l_i,
    q,
    q_pos,
    tokens,
    slopes,
    first_tile,
    last_tile,
    key_lo,
    key_hi,
    seq_len,
    k_src,
    v_src,
    k_row_scales,
    v_row_scales,
    block_table,
    first_row,
    kv_head,
    k_stride_b,
    k_stride_t,
    v_stride_b,
    v_stride_t,
    mask_ptr,
    ranges_ptr,
    first_range,
    last_range,
    window,
    scale_log2,
    cap_log2,
    scale_over_cap,
    MASKED: tl.constexpr,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FAST_TANH: tl.constexpr,
    ALIBI: tl.constexpr,
    RANGES: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the tiles [first_tile, last_tile) of keys into a state (acc, m_i, l_i).

    Args:
        acc: (rows, BLOCK_DV) float32, weighted values so far.
        m_i: (rows,) float32, largest score so far, in units of log2.
        l_i: (rows,) float32, sum of exp2(score − m_i) so far.
        q: (rows, BLOCK_D), queries.
        q_pos: (rows,) int32, where they stand among the keys.
        tokens: (rows,) int32, the request's token of each row, −1 for a row that is none.
        slopes: (rows,) float32, ALiBi's, times log2(e).
        first_tile, last_tile: a tile t is the keys [t * BLOCK_N, (t + 1) * BLOCK_N).
        key_lo, key_hi: no row sees a key outside of these; what lies there is not read.
        k_src, v_src: pointers to the head's first element, or descriptors.
        k_row_scales, v_row_scales: for "int8", float32 pointers to the head's first scale.
        block_table: for "pages", pointer to the request's blocks.
        first_row: for "rows" and "descriptors", the row of the request's first key.
        scale_log2: factor on the scores, times log2(e).
        cap_log2, scale_over_cap: the soft cap times log2(e), and the factor over the soft cap.
        MASKED: rows may see only some of the keys; else every row sees every key.
        ALIBI: 0 for none, 1 for signed distances, 2 for the symmetric kind.

    Returns:
        The new acc, m_i, l_i.
    """
    n_idx = tl.arange(0, BLOCK_N)
    d_idx = tl.arange(0, q.shape[1])
    dv_idx = tl.arange(0, acc.shape[1])
    PADDED: tl.constexpr = HEAD_SIZE != q.shape[1]
    PADDED_V: tl.constexpr = HEAD_SIZE_V != acc.shape[1]
    # bfloat16 has the range to take a scale into the weights; float16 has not.
    SCALE_WEIGHTS: tl.constexpr = (FORMAT == "int8") and (q.dtype != tl.float16)
    q_pos_f = q_pos.to(tl.float32)
    for t in tl.range(first_tile, last_tile, num_stages=STAGES):
        k_pos = t * BLOCK_N + n_idx
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        k_offsets = k_pos
        v_offsets = k_pos
        in_block = (k_pos % BLOCK_SIZE).to(tl.int64)
        if SOURCE == "pages":
            if MASKED:
                page = tl.load(block_table + k_pos // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
            else:
                page = tl.load(block_table + k_pos // BLOCK_SIZE).to(tl.int64)
            k_offsets = page * k_stride_b + in_block * k_stride_t
            v_offsets = page * v_stride_b + in_block * v_stride_t
        elif SOURCE == "rows":
            k_offsets = (first_row + k_pos).to(tl.int64) * k_stride_t
            v_offsets = (first_row + k_pos).to(tl.int64) * v_stride_t
        if SOURCE == "descriptors":
            k = k_src.load([first_row + t * BLOCK_N, kv_head * q.shape[1]]).T
        elif MASKED or PADDED:
            k_ok = live[None, :] & (d_idx < HEAD_SIZE)[:, None]
            k = tl.load(k_src + k_offsets[None, :] + d_idx[:, None], mask=k_ok, other=0)
        else:
            k = tl.load(k_src + k_offsets[None, :] + d_idx[:, None])
        s = tl.dot(q, _decoded(k, q.dtype, FORMAT, NATIVE), input_precision="ieee")
        if FORMAT == "int8":
            s *= tl.load(k_row_scales + k_offsets // 4, mask=live, other=0.0)[None, :]
        if CAP:
            s = soft_capped(s, scale_log2, cap_log2, scale_over_cap, FAST_TANH)
        elif MASKED or ALIBI:
            s = s * scale_log2
        if ALIBI:
            s += alibi_bias(slopes, k_pos, q_pos_f, ALIBI)
        if MASKED:
            seen = sees(
                q_pos, k_pos, tokens, seq_len, window, mask_ptr, ranges_ptr, first_range,
                last_range, CAUSAL, WINDOW, RANGES, MASK,
            )  # fmt: skip
            s = counted(s, seen, RANGES, MASK)
        # A maximum drops NaN, which stays in the sum of weights.
        if MASKED or CAP or ALIBI:
            m_new = tl.maximum(m_i, tl.max(s, 1))
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        if RANGES and not MASKED:
            m_new = tl.maximum(m_new, SEEN)
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        if MASKED or CAP or ALIBI:
            p = tl.exp2(s - m_use[:, None])
        else:  # the factor goes into the same instruction as the subtraction
            p = tl.exp2(s * scale_log2 - m_use[:, None])
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if SOURCE == "descriptors":
            v = v_src.load([first_row + t * BLOCK_N, kv_head * acc.shape[1]])
            if MASKED:  # beyond a request's keys lie another's, and zero times its NaN is NaN
                v = tl.where(live[:, None], v, 0)
        elif MASKED or PADDED_V:
            v_ok = live[:, None] & (dv_idx < HEAD_SIZE_V)[None, :]
            v = tl.load(v_src + v_offsets[:, None] + dv_idx[None, :], mask=v_ok, other=0)
        else:
            v = tl.load(v_src + v_offsets[:, None] + dv_idx[None, :])
        v = _decoded(v, q.dtype, FORMAT, NATIVE)
        if FORMAT == "int8":
            v_scales = tl.load(v_row_scales + v_offsets // 4, mask=live, other=0.0)
            if SCALE_WEIGHTS:
                p *= v_scales[None, :]
            else:
                v = (v.to(tl.float32) * v_scales[:, None]).to(q.dtype)
        if RANGES or MASK:
            if MASKED:  # what no row sees may be freed memory
                used = tl.max(seen.to(tl.int32), 0) > 0
                v = tl.where(used[:, None], v, 0.0)
                if SCALE_WEIGHTS:
                    p = tl.where(seen, p, 0.0)
        acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i
