"""Gather keys and values of a batch from their pages into contiguous rows, as the layer's dtype.

Long queries read each key many times. Copied once, keys can be loaded in large tiles, and their
quantization is undone once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8
from attn_dispatch.backends.triton.kernels.online_softmax import first_key
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["Skips", "gather_kv_kernel"]


class Skips(NamedTuple):
    """Which keys before the first query may have been freed; see Features."""

    WINDOW: bool
    CHUNK: int
    POSITIONS: bool


class _KeyPositions(NamedTuple):
    key_offset: Any
    key_step: Any


@triton.jit
def _copy(
    source_ptr, row_scales_ptr, scale_ptr, target_ptr, offsets, targets, heads, ok, inside,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
):  # fmt: skip
    d_idx = tl.arange(0, BLOCK_D)
    in_head = (d_idx < SIZE)[None, :]
    dtype: tl.constexpr = target_ptr.dtype.element_ty
    x = tl.load(source_ptr + offsets[:, None] + d_idx[None, :], mask=ok[:, None] & in_head, other=0)
    if FORMAT == "plain":
        x = x.to(dtype)
    else:
        if FORMAT == "int8":
            scales = tl.load(row_scales_ptr + offsets // 4, mask=ok, other=0.0)
            x = x.to(tl.float32)
        else:
            scales = tl.load(scale_ptr + heads * SCALE_STRIDE, mask=ok, other=0.0)
            x = decode_fp8(x, tl.float32, FORMAT, NATIVE)
        x = tl.where(ok[:, None], x * scales[:, None], 0.0).to(dtype)
    tl.store(target_ptr + targets[:, None] * BLOCK_D + d_idx[None, :], x, mask=inside[:, None])


_UNSPECIALIZED = ["table_stride", "window", "key_offset", "key_step"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=METADATA)
def gather_kv_kernel(
    k_ptr, v_ptr, k_row_scales_ptr, v_row_scales_ptr, k_scale_ptr, v_scale_ptr, block_table_ptr,
    requests_ptr, query_start_loc_ptr, seq_lens_ptr, key_start_loc_ptr, k_out_ptr, v_out_ptr,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, table_stride, window,
    lengths_ptr, key_offset, key_step,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    PAD: tl.constexpr, SKIPS: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values of the listed requests; keys that no query sees become zeros.

    Grid: (ceil(longest * NUM_KV_HEADS / ROWS), number of requests), the longest padded to PAD.

    Args:
        requests_ptr: (number,) int32.
        key_start_loc_ptr: (num_reqs,) int32, where each request's rows begin.
        k_out_ptr: (rows, NUM_KV_HEADS, BLOCK_D), v_out_ptr the same for values, written; zeros
            pad the heads.
        k_stride_b, k_stride_t, k_stride_h: of the cache's keys; v_stride_b and so on of its values,
            not read with SAME_STRIDES.
        lengths_ptr, key_offset, key_step: see Inputs.
        PAD: each request has as many rows as its keys, rounded up to this.
        SKIPS: a Skips.
    """
    request = tl.load(requests_ptr + tl.program_id(1))
    seq_len = tl.load(seq_lens_ptr + request)
    padded = (seq_len + PAD - 1) // PAD * PAD
    first = tl.program_id(0) * ROWS
    if first < padded * NUM_KV_HEADS:
        rows = first + tl.arange(0, ROWS)
        positions = rows // NUM_KV_HEADS
        heads = rows % NUM_KV_HEADS
        inside = positions < padded
        ok = positions < seq_len
        if SKIPS.WINDOW or SKIPS.CHUNK:  # keys that the first query does not see: see Skips
            q_len = tl.load(query_start_loc_ptr + request + 1)
            q_len -= tl.load(query_start_loc_ptr + request)
            length = seq_len
            if SKIPS.POSITIONS:
                length = tl.load(lengths_ptr + request)
            at = _KeyPositions(key_offset, key_step)
            ok = ok & (positions >= first_key(length - q_len, window, at, SKIPS))
        row_of_table = block_table_ptr + request.to(tl.int64) * table_stride
        pages = tl.load(row_of_table + positions // BLOCK_SIZE, mask=ok, other=0).to(tl.int64)
        in_page = (positions % BLOCK_SIZE).to(tl.int64)
        k_offsets = pages * k_stride_b + in_page * k_stride_t + heads.to(tl.int64) * k_stride_h
        v_offsets = k_offsets
        if not SAME_STRIDES:
            v_offsets = pages * v_stride_b + in_page * v_stride_t + heads.to(tl.int64) * v_stride_h
        targets = tl.load(key_start_loc_ptr + request).to(tl.int64) * NUM_KV_HEADS + rows
        _copy(
            k_ptr, k_row_scales_ptr, k_scale_ptr, k_out_ptr, k_offsets, targets, heads, ok, inside,
            HEAD_SIZE, BLOCK_D, FORMAT, NATIVE, SCALE_STRIDE,
        )  # fmt: skip
        _copy(
            v_ptr, v_row_scales_ptr, v_scale_ptr, v_out_ptr, v_offsets, targets, heads, ok, inside,
            HEAD_SIZE_V, BLOCK_DV, FORMAT, NATIVE, SCALE_STRIDE,
        )  # fmt: skip
