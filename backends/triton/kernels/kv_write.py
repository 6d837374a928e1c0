"""Store new keys and values in their slots of the paged cache, in its format."""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import encode_fp8
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["write_kv_kernel"]


@triton.jit
def _write(
    new_ptr, cache_ptr, row_scales_ptr, scale_ptr, tokens, heads, offsets, ok, stride_t, stride_h,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, SCALE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Store rows of one tensor; `offsets` are where their heads begin in the cache."""
    d_idx = tl.arange(0, BLOCK_D)
    here = ok[:, None] & (d_idx < SIZE)[None, :]
    source = tokens.to(tl.int64) * stride_t + heads.to(tl.int64) * stride_h
    x = tl.load(new_ptr + source[:, None] + d_idx[None, :], mask=here, other=0.0)
    target = cache_ptr + offsets[:, None] + d_idx[None, :]
    if FORMAT == "plain":
        tl.store(target, x.to(cache_ptr.dtype.element_ty), mask=here)
    elif FORMAT == "int8":
        x = x.to(tl.float32)
        has_nan = tl.max((x != x).to(tl.int32), 1) > 0  # a maximum may drop it
        amax = tl.where(has_nan, float("nan"), tl.max(tl.abs(x), 1))
        scales = tl.math.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32))
        # The smallest normal number: no device flushes it to zero. NaN stays.
        scales = tl.where(scales < 1.1754943508222875e-38, 1.1754943508222875e-38, scales)
        scales = tl.where(amax == 0.0, 1.0, scales)
        scaled = tl.math.div_rn(x, tl.broadcast_to(scales[:, None], x.shape))
        # Adding this rounds to even. A row with NaN stores any bytes: its scale is NaN.
        rounded = (scaled + 12582912.0) - 12582912.0
        rounded = tl.where(rounded != rounded, 0.0, tl.minimum(tl.maximum(rounded, -127.0), 127.0))
        tl.store(target, rounded.to(tl.int8), mask=here)
        tl.store(row_scales_ptr + offsets // 4, scales, mask=ok)
    else:
        scales = tl.load(scale_ptr + heads * SCALE_STRIDE, mask=ok, other=1.0)
        scaled = tl.math.div_rn(x.to(tl.float32), tl.broadcast_to(scales[:, None], x.shape))
        tl.store(target, encode_fp8(scaled, FORMAT), mask=here)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=METADATA)
def write_kv_kernel(
    key_ptr, value_ptr, k_ptr, v_ptr, k_row_scales_ptr, v_row_scales_ptr, k_scale_ptr, v_scale_ptr,
    slots_ptr, num_tokens, key_stride_t, key_stride_h, value_stride_t, value_stride_h, k_stride_b,
    k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_STRIDE: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """Store new keys and values; tokens with slot −1 are skipped.

    Grid: (ceil(num_tokens * NUM_KV_HEADS / ROWS),).

    Args:
        key_ptr: (num_tokens, NUM_KV_HEADS, HEAD_SIZE); value_ptr the same for values.
        k_ptr, v_ptr: the cache's keys and values, bytes for an fp8 FORMAT.
        k_row_scales_ptr, v_row_scales_ptr: for "int8", float32, where the first rows' scales are.
        k_scale_ptr, v_scale_ptr: for fp8, float32 scales, SCALE_STRIDE apart for the heads.
        slots_ptr: (num_tokens,) int64.
        k_stride_b, k_stride_t, k_stride_h: of the cache's keys; v_stride_b and so on of its values,
            not read with SAME_STRIDES.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = rows // NUM_KV_HEADS
    heads = rows % NUM_KV_HEADS
    slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
    ok = slots >= 0
    blocks, in_block = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    k_offsets = (
        blocks * k_stride_b + in_block * k_stride_t + heads.to(tl.int64) * k_stride_h
    )  # fmt: skip
    v_offsets = k_offsets
    if not SAME_STRIDES:
        v_offsets = (
            blocks * v_stride_b + in_block * v_stride_t + heads.to(tl.int64) * v_stride_h
        )  # fmt: skip
    _write(
        key_ptr, k_ptr, k_row_scales_ptr, k_scale_ptr, tokens, heads, k_offsets, ok, key_stride_t,
        key_stride_h, HEAD_SIZE, BLOCK_D, FORMAT, SCALE_STRIDE,
    )  # fmt: skip
    _write(
        value_ptr, v_ptr, v_row_scales_ptr, v_scale_ptr, tokens, heads, v_offsets, ok,
        value_stride_t, value_stride_h, HEAD_SIZE_V, BLOCK_DV, FORMAT, SCALE_STRIDE,
    )  # fmt: skip
