"""`attend` for caches of one byte an element, two at a time.

The matrix units take 16-bit elements, and shared memory transposes 16-bit elements fast and single
bytes slowly. So elements are loaded in pairs, as 16-bit words, and taken apart in registers, into a
tile of the even ones and a tile of the odd ones: a product of heads is a sum of two, over the even
and over the odd elements, and an output is two, its even and its odd elements.

Everything is float16 then, which holds every fp8 format and int8 exactly; queries of any type are
brought into its range by a power of two for each row.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8
from attn_dispatch.backends.triton.kernels.online_softmax import (
    LOWEST,
    alibi_bias,
    counted,
    sees,
    soft_capped,
)

__all__ = ["attend_pairs"]


@triton.jit
def _halves(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr):
    """The even and the odd elements, float16, of pairs in uint16."""
    if FORMAT == "int8":
        # Into the last bits of 1024, where a step is 1; then take 1024 and the shift by 128 away.
        even = ((x & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        odd = ((x >> 8) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        return even, odd
    elif FORMAT == "e5m2":
        even = (x << 8).to(tl.float16, bitcast=True)
        odd = (x & 0xFF00).to(tl.float16, bitcast=True)
        return even, odd
    elif PTX and NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {$0, $1}, both; }",
            "=h,=h,h",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        even = decode_fp8((x & 0xFF).to(tl.uint8), tl.float16, FORMAT, NATIVE)
        odd = decode_fp8((x >> 8).to(tl.uint8), tl.float16, FORMAT, NATIVE)
        return even, odd


@triton.jit
def attend_pairs(
    m_i, l_i, q_even, q_odd, q_pos, tokens, slopes, first_tile, last_tile, key_lo, key_hi, seq_len,
    k_src, v_src, k_row_scales, v_row_scales, block_table, k_stride_b, k_stride_t, v_stride_b,
    v_stride_t, mask_ptr, ranges_ptr, first_range, last_range, window, scale_log2, cap_log2,
    scale_over_cap,
    BLOCK_DV: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FAST_TANH: tl.constexpr,
    ALIBI: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Fold tiles of keys in pages into a state; see `attend`.

    Args:
        q_even, q_odd: (rows, BLOCK_D / 2), the even and odd elements of the queries.
        k_src, v_src: uint16 pointers; strides are in pairs.
        Others: as for `attend`, with MASKED.

    Returns:
        acc (rows, BLOCK_DV), m_i, l_i.
    """
    n_idx = tl.arange(0, BLOCK_N)
    d_idx = tl.arange(0, q_even.shape[1])
    dv_idx = tl.arange(0, BLOCK_DV // 2)
    q_pos_f = q_pos.to(tl.float32)
    q_even = q_even.to(tl.float32)
    q_odd = q_odd.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(q_even), 1), tl.max(tl.abs(q_odd), 1))
    exponent = tl.floor(tl.log2(tl.maximum(amax, 1.0e-30)))
    row_scale = tl.exp2(exponent)
    shrink = tl.exp2(-exponent)[:, None]
    q_even = (q_even * shrink).to(tl.float16)
    q_odd = (q_odd * shrink).to(tl.float16)
    acc_even = tl.zeros([q_even.shape[0], BLOCK_DV // 2], tl.float32)
    acc_odd = tl.zeros([q_even.shape[0], BLOCK_DV // 2], tl.float32)
    for t in tl.range(first_tile, last_tile, num_stages=STAGES):
        k_pos = t * BLOCK_N + n_idx
        live = (k_pos >= key_lo) & (k_pos < key_hi)
        page = tl.load(block_table + k_pos // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        in_block = (k_pos % BLOCK_SIZE).to(tl.int64)
        k_offsets = page * k_stride_b + in_block * k_stride_t
        v_offsets = page * v_stride_b + in_block * v_stride_t
        k_ok = live[None, :]
        if HEAD_SIZE != 2 * q_even.shape[1]:
            k_ok = k_ok & (d_idx < HEAD_SIZE // 2)[:, None]
        k = tl.load(k_src + k_offsets[None, :] + d_idx[:, None], mask=k_ok, other=0)
        k_even, k_odd = _halves(k, FORMAT, NATIVE, PTX)
        s = tl.dot(q_even, k_even)
        s = tl.dot(q_odd, k_odd, s)
        if FORMAT == "int8":
            k_scales = tl.load(k_row_scales + k_offsets // 2, mask=live, other=0.0)
            s *= row_scale[:, None] * k_scales[None, :]
        else:
            s *= row_scale[:, None]
        if CAP:
            s = soft_capped(s, scale_log2, cap_log2, scale_over_cap, FAST_TANH)
        else:
            s = s * scale_log2
        if ALIBI:
            s += alibi_bias(slopes, k_pos, q_pos_f, ALIBI)
        seen = sees(
            q_pos, k_pos, tokens, seq_len, window, mask_ptr, ranges_ptr, first_range, last_range,
            CAUSAL, WINDOW, RANGES, MASK,
        )  # fmt: skip
        s = counted(s, seen, RANGES, MASK)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        p = tl.exp2(s - m_use[:, None])
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_ok = live[:, None]
        if HEAD_SIZE_V != BLOCK_DV:
            v_ok = v_ok & (dv_idx < HEAD_SIZE_V // 2)[None, :]
        v = tl.load(v_src + v_offsets[:, None] + dv_idx[None, :], mask=v_ok, other=0)
        if RANGES or MASK:  # what no row sees may be freed memory
            used = tl.max(seen.to(tl.int32), 0) > 0
            v = tl.where(used[:, None], v, 0)
        v_even, v_odd = _halves(v, FORMAT, NATIVE, PTX)
        acc_even *= alpha[:, None]
        acc_odd *= alpha[:, None]
        if FORMAT == "int8":
            # The largest scale of the tile goes around the product, so that float16 holds the rest.
            v_scales = tl.load(v_row_scales + v_offsets // 2, mask=live, other=0.0)
            if RANGES or MASK:
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
    acc = tl.reshape(tl.join(acc_even, acc_odd), (q_even.shape[0], BLOCK_DV))
    return acc, m_i, l_i
