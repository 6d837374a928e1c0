"""The inner loop of every attention kernel here: online softmax over tiles of keys.

One pass over the keys with a running maximum and a running sum for each row, in units of log2:
online softmax (Milakov and Gimelshein, arXiv:1805.02867) over tiles as in FlashAttention-2
(arXiv:2307.08691), which divides by the sum once, at the end. docs/numerics.md has the conventions.
A tile of rows packs the query heads of one KV head, row = token * GROUP + head of the group, so
that a key is loaded once for all of them, whatever the ratio.

`Features.SOURCE` is where the keys are:
    "pages"        blocks of the paged cache, found through the block table
    "packed8"      the same with one byte per element, loaded in pairs: online_softmax_packed.py
    "latents"      blocks of a cache of latents, for decode only: online_softmax_latent.py
    "rows"         (tokens, heads, size) tensors, the keys of a request in consecutive rows
    "descriptors"  the same as (tokens, heads * size) through tensor descriptors, where a head fills
                   its tile: TMA where the device has it
`Features.FORMAT` is how they are stored: "plain", "int8" (with a float32 scale for each row) or one
of the formats of fp8.py.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8
from attn_dispatch.backends.triton.kernels.structs import Request, Tile

__all__ = ["LOG2E", "LOWEST", "alibi_bias", "attend", "dequantize", "fully_masked", "hide"]
__all__ += ["first_key", "init_state", "load_request", "soft_capped", "tile_of", "value_scale"]
__all__ += ["visibility_mask", "visible_by_all", "visible_key_range"]

LOG2E = tl.constexpr(1.4426950408889634)
#: A running maximum up to LOWEST is that of no score above −inf. Where keys are masked one by one,
#: SEEN replaces the −inf of a visible key; −inf is then left to masked keys.
LOWEST = tl.constexpr(-2.0e38)
SEEN = tl.constexpr(-3.0e38)


@triton.jit
def load_request(inputs, index, F: tl.constexpr):
    """The request with this place in the batch."""
    q_start = tl.load(inputs.query_start_loc + index)
    q_len = tl.load(inputs.query_start_loc + index + 1) - q_start
    seq_len = tl.load(inputs.seq_lens + index)
    length = seq_len
    if F.POSITIONS:
        length = tl.load(inputs.lengths + index)
    return Request(index, q_start, q_len, seq_len, length)


# Which keys a query sees --------------------------------------------------------------------------
# `at` is anything with the fields key_offset and key_step: the inputs, or a tile.


@triton.jit
def _keys_before(position, at, F: tl.constexpr):
    """How many keys are before a position. Without POSITIONS that is the position itself."""
    if F.POSITIONS:
        return tl.maximum(position - at.key_offset + at.key_step - 1, 0) // at.key_step
    else:
        return position


@triton.jit
def _chunk_start(q_pos, F: tl.constexpr):
    """The first position of a query's chunk; of one before all keys, where its position is < 0."""
    return tl.where(q_pos < 0, -F.CHUNK, q_pos // F.CHUNK * F.CHUNK)


@triton.jit
def _window_end(window, F: tl.constexpr):
    """From a query to the first position after its window, where that is on both sides."""
    if F.RIGHT >= 0:
        return F.RIGHT + 1
    else:
        return window


@triton.jit
def first_key(q_pos, window, at, F: tl.constexpr):
    """The first key that queries at q_pos and later ones see, with WINDOW or CHUNK."""
    if F.CHUNK:
        first = _chunk_start(q_pos, F)
        if F.WINDOW:
            first = tl.maximum(first, q_pos - window + 1)
    else:
        first = q_pos - window + 1
    return tl.maximum(_keys_before(first, at, F), 0)


@triton.jit
def end_key(q_pos, tile, F: tl.constexpr):
    """The key after the last one that queries up to q_pos see, at most seq_len."""
    seq_len = tile.seq_len
    if F.CAUSAL:
        return tl.minimum(seq_len, _keys_before(q_pos + 1, tile, F))
    elif F.CHUNK:
        end = _chunk_start(q_pos, F) + F.CHUNK
        if F.WINDOW:
            end = tl.minimum(end, q_pos + _window_end(tile.window, F))
        return tl.minimum(seq_len, _keys_before(end, tile, F))
    elif F.WINDOW:
        return tl.minimum(seq_len, _keys_before(q_pos + _window_end(tile.window, F), tile, F))
    else:
        return seq_len


@triton.jit
def tile_of(rows, request, kv_head, inputs, F: tl.constexpr):
    """The tile of these rows of a request, token * GROUP + query head of the group."""
    ok = rows < request.q_len * F.GROUP
    tokens = tl.where(ok, rows // F.GROUP, -1)
    heads = kv_head * F.GROUP + rows % F.GROUP
    q_pos = request.length - request.q_len + rows // F.GROUP
    out_rows = request.q_start + rows // F.GROUP
    first_range = 0
    last_range = 0
    if F.RANGES:
        first_range = tl.load(inputs.range_starts + request.index)
        last_range = tl.load(inputs.range_starts + request.index + 1)
    mask = inputs.mask
    if F.MASK:
        mask = inputs.mask + tl.load(inputs.mask_starts + request.index)
    slopes = tl.zeros(rows.shape, tl.float32)
    if F.ALIBI:
        slopes = tl.load(inputs.slopes + heads, mask=ok, other=0.0) * LOG2E
    scale_log2 = inputs.scale_log2
    scale_over_cap = inputs.scale_over_cap
    if (F.FORMAT != "plain") & (F.FORMAT != "int8"):
        k_scale = tl.load(inputs.k_scale + kv_head * F.SCALE_STRIDE)
        scale_log2 *= k_scale
        scale_over_cap *= k_scale
    return Tile(
        ok, tokens, heads, q_pos, out_rows, slopes, request.seq_len, inputs.key_offset,
        inputs.key_step, mask, inputs.ranges, first_range, last_range, inputs.window, scale_log2,
        inputs.cap_log2, scale_over_cap,
    )  # fmt: skip


@triton.jit
def value_scale(inputs, kv_head, F: tl.constexpr):
    """The scale of the values of an fp8 cache."""
    scale = 1.0
    if (F.FORMAT != "plain") & (F.FORMAT != "int8"):
        scale = tl.load(inputs.v_scale + kv_head * F.SCALE_STRIDE)
    return scale


@triton.jit
def init_state(ROWS: tl.constexpr, F: tl.constexpr):
    """The state (acc, m_i, l_i) before the first key; see `attend`."""
    BLOCK_DV: tl.constexpr = F.BLOCK_DV  # a shape takes constexprs, not fields of one
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    return acc, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def soft_capped(s, tile, F: tl.constexpr):
    """Scores with a soft cap, cap * tanh(scale * s / cap), in units of log2, of products `s`.

    FAST_TANH uses NVIDIA's instruction, whose relative error is up to 2 ** -11. Otherwise the error
    is a few units in the last place of float32: near 0 by the series of tanh(x) / x (with the
    coefficients of Cephes' tanhf), where 1 - 2 / (exp(2 x) + 1) would cancel.
    """
    x = s * tile.scale_over_cap
    if F.FAST_TANH:
        return tile.cap_log2 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        near = s * tile.scale_log2
        near = near + near * (series * z)
        far = tile.cap_log2 * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
        return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def fully_masked(m_i, l_i, tile, F: tl.constexpr):
    """(rows,) bool: which rows see no key, whatever their scores are.

    Decided by their positions; with a mask or ranges, by the state over all of their keys.
    """
    if F.RANGES or F.MASK:
        return (m_i == float("-inf")) & (l_i == 0.0)
    elif F.POSITIONS:
        first = tile.q_pos * 0
        if F.WINDOW or F.CHUNK:
            first = first_key(tile.q_pos, tile.window, tile, F)
        return first >= end_key(tile.q_pos, tile, F)
    else:
        # No query comes after the last key, so only keys up to its own position can be missing.
        last = tile.q_pos * 0 + tile.seq_len - 1
        if F.CAUSAL or F.CHUNK:
            last = tile.q_pos
        elif F.WINDOW:
            last = tl.minimum(last, tile.q_pos + _window_end(tile.window, F) - 1)
        return last < 0


@triton.jit
def hide(s, visible, F: tl.constexpr):
    """Scores with −inf for masked keys, so that `fully_masked` can tell them from visible ones."""
    if F.RANGES or F.MASK:
        s = tl.where(s == float("-inf"), SEEN, s)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _positions_of(keys, tile, F: tl.constexpr):
    """The positions of keys."""
    if F.POSITIONS:
        return tile.key_offset + tile.key_step * keys
    else:
        return keys


@triton.jit
def alibi_bias(tile, k_pos, F: tl.constexpr):
    """(rows, keys): slope * (key - query), or slope * -abs(key - query) for the symmetric kind."""
    k_pos = _positions_of(k_pos, tile, F)
    distance = k_pos.to(tl.float32)[None, :] - tile.q_pos.to(tl.float32)[:, None]
    if F.ALIBI == 2:
        distance = -tl.abs(distance)
    return tile.slopes[:, None] * distance


@triton.jit
def visible_key_range(first_position, last_position, tile, F: tl.constexpr):
    """[lo, hi): the keys that queries from first_position to last_position may see."""
    seq_len = tile.seq_len
    lo = 0
    if F.WINDOW or F.CHUNK:
        lo = first_key(first_position, tile.window, tile, F)
    hi = end_key(last_position, tile, F)
    if F.RANGES:
        for i in range(tile.first_range, tile.last_range):
            start = tl.load(tile.ranges + 2 * i)
            end = tl.load(tile.ranges + 2 * i + 1)
            if (start <= last_position) & (first_position < end):
                lo = tl.minimum(lo, _keys_before(start, tile, F))
                hi = tl.maximum(hi, tl.minimum(seq_len, _keys_before(end, tile, F)))
    return lo, hi


@triton.jit
def visible_by_all(first_position, last_position, tile, F: tl.constexpr):
    """[lo, hi): keys that all queries from first_position to last_position see, without MASK."""
    lo = 0
    if F.WINDOW or F.CHUNK:
        lo = first_key(last_position, tile.window, tile, F)
    return lo, end_key(first_position, tile, F)


@triton.jit
def visibility_mask(tile, k_pos, F: tl.constexpr):
    """(rows, keys) bool: which row sees which key; rows without a token see none."""
    q = tile.q_pos[:, None]
    visible = (k_pos[None, :] < tile.seq_len) & (tile.tokens >= 0)[:, None]
    exists = visible
    k = _positions_of(k_pos, tile, F)[None, :]
    if F.CAUSAL:
        visible = visible & (k <= q)
    if F.WINDOW:
        visible = visible & (k > q - tile.window)
        if not F.CAUSAL:
            visible = visible & (k < q + _window_end(tile.window, F))
    if F.CHUNK:
        chunk = _chunk_start(tile.q_pos, F)[:, None]
        visible = visible & (k >= chunk)
        if not F.CAUSAL:
            visible = visible & (k < chunk + F.CHUNK)
    if F.RANGES:
        for i in range(tile.first_range, tile.last_range):
            start = tl.load(tile.ranges + 2 * i)
            end = tl.load(tile.ranges + 2 * i + 1)
            together = (q >= start) & (q < end) & (k >= start) & (k < end)
            visible = visible | (together & exists)
    if F.MASK:
        offsets = tile.tokens.to(tl.int64)[:, None] * tile.seq_len + k_pos[None, :]
        visible = visible & (tl.load(tile.mask + offsets, mask=exists, other=0) != 0)
    return visible


@triton.jit
def dequantize(x, dtype: tl.constexpr, F: tl.constexpr):
    """Loaded elements as `dtype`, without their scale."""
    FORMAT: tl.constexpr = F.FORMAT  # as an argument it must be a constexpr itself
    if (FORMAT == "plain") | (FORMAT == "int8"):
        return x.to(dtype)
    else:
        return decode_fp8(x, dtype, FORMAT, F.NATIVE)


@triton.jit
def attend(
    state, q, tile, keys, first_tile, last_tile, key_lo, key_hi, MASKED: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Fold the tiles [first_tile, last_tile) of keys into a state.

    Args:
        state: (acc, m_i, l_i), where m_i (rows,) is the largest score so far, in units of log2, l_i
            (rows,) the sum of exp2(score − m_i), and acc (rows, BLOCK_DV) the sum of the values
            with these weights, all float32.
        q: (rows, BLOCK_D), queries.
        tile, keys: see structs.py.
        first_tile, last_tile: tile t holds the keys [t * BLOCK_N, (t + 1) * BLOCK_N).
        key_lo, key_hi: no row sees a key outside of these, and none is read there.
        MASKED: rows may see only some of the keys; else every row sees every key.

    Returns:
        The new state.
    """
    acc, m_i, l_i = state
    n_idx = tl.arange(0, F.BLOCK_N)
    d_idx = tl.arange(0, q.shape[1])
    dv_idx = tl.arange(0, acc.shape[1])
    # bfloat16 has the range to take a scale into the weights; float16 has not.
    SCALE_WEIGHTS: tl.constexpr = (F.FORMAT == "int8") and (q.dtype != tl.float16)
    # Without any of these, the scale goes into the same instruction as the maximum's subtraction.
    SCALED: tl.constexpr = MASKED or F.CAP or (F.ALIBI != 0)
    for t in tl.range(first_tile, last_tile, num_stages=F.STAGES):
        k_pos = t * F.BLOCK_N + n_idx
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        k_offsets = k_pos
        v_offsets = k_pos
        in_block = (k_pos % F.BLOCK_SIZE).to(tl.int64)
        if F.SOURCE == "pages":
            if MASKED:
                page = tl.load(keys.block_table + k_pos // F.BLOCK_SIZE, mask=live, other=0)
            else:
                page = tl.load(keys.block_table + k_pos // F.BLOCK_SIZE)
            page = page.to(tl.int64)
            k_offsets = page * keys.k_stride_b + in_block * keys.k_stride_t
            v_offsets = page * keys.v_stride_b + in_block * keys.v_stride_t
        elif F.SOURCE == "rows":
            k_offsets = (keys.first_row + k_pos).to(tl.int64) * keys.k_stride_t
            v_offsets = (keys.first_row + k_pos).to(tl.int64) * keys.v_stride_t
        if F.SOURCE == "descriptors":
            k = keys.k.load([keys.first_row + t * F.BLOCK_N, keys.head * q.shape[1]]).T
        elif MASKED or (F.HEAD_SIZE != F.BLOCK_D):
            k_ok = live[None, :] & (d_idx < F.HEAD_SIZE)[:, None]
            k = tl.load(keys.k + k_offsets[None, :] + d_idx[:, None], mask=k_ok, other=0)
        else:
            k = tl.load(keys.k + k_offsets[None, :] + d_idx[:, None])
        s = tl.dot(q, dequantize(k, q.dtype, F), input_precision="ieee")
        if F.FORMAT == "int8":
            s *= tl.load(keys.k_row_scales + k_offsets // 4, mask=live, other=0.0)[None, :]
        if F.CAP:
            s = soft_capped(s, tile, F)
        elif SCALED:
            s = s * tile.scale_log2
        if F.ALIBI:
            s += alibi_bias(tile, k_pos, F)
        if MASKED:
            visible = visibility_mask(tile, k_pos, F)
            s = hide(s, visible, F)
        # A maximum drops NaN, which stays in the sum of weights.
        if SCALED:
            m_new = tl.maximum(m_i, tl.max(s, 1))
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1) * tile.scale_log2)
        if F.RANGES and not MASKED:
            m_new = tl.maximum(m_new, SEEN)
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        if SCALED:
            p = tl.exp2(s - m_use[:, None])
        else:
            p = tl.exp2(s * tile.scale_log2 - m_use[:, None])
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if F.SOURCE == "descriptors":
            v = keys.v.load([keys.first_row + t * F.BLOCK_N, keys.head * acc.shape[1]])
            if MASKED:  # next come another request's rows, and zero times their NaN is NaN
                v = tl.where(live[:, None], v, 0)
        elif MASKED or (F.HEAD_SIZE_V != F.BLOCK_DV):
            v_ok = live[:, None] & (dv_idx < F.HEAD_SIZE_V)[None, :]
            v = tl.load(keys.v + v_offsets[:, None] + dv_idx[None, :], mask=v_ok, other=0)
        else:
            v = tl.load(keys.v + v_offsets[:, None] + dv_idx[None, :])
        v = dequantize(v, q.dtype, F)
        if F.FORMAT == "int8":
            v_scales = tl.load(keys.v_row_scales + v_offsets // 4, mask=live, other=0.0)
            if SCALE_WEIGHTS:
                p *= v_scales[None, :]
            else:
                v = (v.to(tl.float32) * v_scales[:, None]).to(q.dtype)
        if MASKED and (F.RANGES or F.MASK):  # memory that no row sees may have been freed
            used = tl.max(visible.to(tl.int32), 0) > 0
            v = tl.where(used[:, None], v, 0.0)
            if SCALE_WEIGHTS:
                p = tl.where(visible, p, 0.0)
        acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i
