"""`attend` for caches with one byte per element, which are loaded two at a time.

The matrix units take 16-bit elements, and shared memory transposes 16-bit elements fast and single
bytes slowly. So elements are loaded in pairs, as 16-bit words, and separated in registers into a
tile of the even ones and a tile of the odd ones: a product of heads is the sum of two, over the
even and over the odd elements, and the output is two tiles, of its even and its odd elements.

All of it is float16, which holds every fp8 format and int8 exactly. Queries of any dtype are
brought into its range by a power of two for each row.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8
from attn_dispatch.backends.triton.kernels.online_softmax import (
    LOWEST,
    alibi_bias,
    hide,
    soft_capped,
    visibility_mask,
)

__all__ = ["attend_packed"]


@triton.jit
def _halves(x, ALLOW_PTX: tl.constexpr, F: tl.constexpr):
    """The even and the odd elements, float16, of pairs in uint16."""
    FORMAT: tl.constexpr = F.FORMAT
    if FORMAT == "int8":
        # Into the last bits of 1024, where a step is 1; then subtract 1024 and the shift by 128.
        even = ((x & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        odd = ((x >> 8) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        return even, odd
    elif FORMAT == "e5m2":
        even = (x << 8).to(tl.float16, bitcast=True)
        odd = (x & 0xFF00).to(tl.float16, bitcast=True)
        return even, odd
    elif ALLOW_PTX and F.NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {$0, $1}, both; }",
            "=h,=h,h",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        even = decode_fp8((x & 0xFF).to(tl.uint8), tl.float16, FORMAT, F.NATIVE)
        odd = decode_fp8((x >> 8).to(tl.uint8), tl.float16, FORMAT, F.NATIVE)
        return even, odd


@triton.jit
def attend_packed(
    state, q_even, q_odd, tile, keys, first_tile, last_tile, key_lo, key_hi,
    ALLOW_PTX: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Fold tiles of keys in pages into a state; see `attend`.

    Args:
        q_even, q_odd: (rows, BLOCK_D / 2), the even and odd elements of the queries.
        state: before the first key; its acc is not read.
        keys: with uint16 pointers, and strides in pairs.
        ALLOW_PTX: NVIDIA's instructions may be used.
        Others: as for `attend`, with MASKED.

    Returns:
        The new state.
    """
    _, m_i, l_i = state
    n_idx = tl.arange(0, F.BLOCK_N)
    d_idx = tl.arange(0, q_even.shape[1])
    dv_idx = tl.arange(0, F.BLOCK_DV // 2)
    q_even = q_even.to(tl.float32)
    q_odd = q_odd.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(q_even), 1), tl.max(tl.abs(q_odd), 1))
    exponent = tl.floor(tl.log2(tl.maximum(amax, 1.0e-30)))
    row_scale = tl.exp2(exponent)
    shrink = tl.exp2(-exponent)[:, None]
    q_even = (q_even * shrink).to(tl.float16)
    q_odd = (q_odd * shrink).to(tl.float16)
    HALF: tl.constexpr = F.BLOCK_DV // 2
    acc_even = tl.zeros([q_even.shape[0], HALF], tl.float32)
    acc_odd = tl.zeros([q_even.shape[0], HALF], tl.float32)
    for t in tl.range(first_tile, last_tile, num_stages=F.STAGES):
        k_pos = t * F.BLOCK_N + n_idx
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        page = tl.load(keys.block_table + k_pos // F.BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        in_block = (k_pos % F.BLOCK_SIZE).to(tl.int64)
        k_offsets = page * keys.k_stride_b + in_block * keys.k_stride_t
        v_offsets = page * keys.v_stride_b + in_block * keys.v_stride_t
        k_ok = live[None, :]
        if F.HEAD_SIZE != F.BLOCK_D:
            k_ok = k_ok & (d_idx < F.HEAD_SIZE // 2)[:, None]
        k = tl.load(keys.k + k_offsets[None, :] + d_idx[:, None], mask=k_ok, other=0)
        k_even, k_odd = _halves(k, ALLOW_PTX, F)
        s = tl.dot(q_even, k_even)
        s = tl.dot(q_odd, k_odd, s)
        if F.FORMAT == "int8":
            k_scales = tl.load(keys.k_row_scales + k_offsets // 2, mask=live, other=0.0)
            s *= row_scale[:, None] * k_scales[None, :]
        else:
            s *= row_scale[:, None]
        if F.CAP:
            s = soft_capped(s, tile, F)
        else:
            s = s * tile.scale_log2
        if F.ALIBI:
            s += alibi_bias(tile, k_pos, F)
        visible = visibility_mask(tile, k_pos, F)
        s = hide(s, visible, F)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        p = tl.exp2(s - m_use[:, None])
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_ok = live[:, None]
        if F.HEAD_SIZE_V != F.BLOCK_DV:
            v_ok = v_ok & (dv_idx < F.HEAD_SIZE_V // 2)[None, :]
        v = tl.load(keys.v + v_offsets[:, None] + dv_idx[None, :], mask=v_ok, other=0)
        if F.RANGES or F.MASK:  # memory that no row sees may have been freed
            used = tl.max(visible.to(tl.int32), 0) > 0
            v = tl.where(used[:, None], v, 0)
        v_even, v_odd = _halves(v, ALLOW_PTX, F)
        acc_even *= alpha[:, None]
        acc_odd *= alpha[:, None]
        if F.FORMAT == "int8":
            # The largest scale of the tile is applied after the product: float16 holds the rest.
            v_scales = tl.load(keys.v_row_scales + v_offsets // 2, mask=live, other=0.0)
            if F.RANGES or F.MASK:
                v_scales = tl.where(used, v_scales, 0.0)
            largest = tl.max(v_scales, 0) + tl.sum(v_scales * 0.0, 0)  # a NaN is not lost
            p *= (v_scales / tl.where(largest == 0.0, 1.0, largest))[None, :]
            p = p.to(tl.float16)
            acc_even += tl.dot(p, v_even) * largest
            acc_odd += tl.dot(p, v_odd) * largest
        else:
            p = p.to(tl.float16)
            acc_even = tl.dot(p, v_even, acc_even)
            acc_odd = tl.dot(p, v_odd, acc_odd)
        m_i = m_new
    acc = tl.reshape(tl.join(acc_even, acc_odd), (q_even.shape[0], F.BLOCK_DV))
    return acc, m_i, l_i
