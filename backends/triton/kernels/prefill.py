"""Attention of many query tokens: each program computes one tile of rows of one KV head.

The rows are FlashAttention-2's (arXiv:2307.08691): one program for each tile of rows, which loops
over all of its keys. The list of tiles is made on the host once per batch, the most work first, so
that the last programs to start are short. KV heads vary fastest, so that programs that run at the
same time share their keys in the cache.
"""

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.epilogue import store_state
from attn_dispatch.backends.triton.kernels.online_softmax import (
    attend,
    init_state,
    load_request,
    tile_of,
    value_scale,
    visible_by_all,
    visible_key_range,
)
from attn_dispatch.backends.triton.kernels.structs import Inputs, Keys, Output
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["prefill_kernel"]


_UNSPECIALIZED = ["table_stride", "window", "key_offset", "key_step"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=METADATA)
def prefill_kernel(
    q_ptr, k_src, v_src, out_ptr, lse_ptr, out_scale_ptr, tiles_ptr, query_start_loc_ptr,
    seq_lens_ptr, key_start_loc_ptr, block_table_ptr, k_row_scales_ptr, v_row_scales_ptr,
    k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr, mask_starts_ptr, ranges_ptr,
    range_starts_ptr, lengths_ptr, key_offset, key_step, q_stride_t, q_stride_h, k_stride_b,
    k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, out_stride_t, out_stride_h,
    table_stride, window, scale_log2, cap_log2, scale_over_cap, BLOCK_M: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Attention of the rows in `tiles`.

    Grid: (num_kv_heads, num_tiles).

    Args:
        q_ptr: (num_tokens, NUM_HEADS, HEAD_SIZE).
        k_src, v_src, key_start_loc_ptr: keys, values and the first row of each request, by SOURCE.
        tiles_ptr: (num_tiles, 2) int32, the request and its first row.
        BLOCK_M: rows in a tile.
        F: Features.
        Others: see the fields of the same names in structs.py.
    """
    kv_head = tl.program_id(0)
    request_index = tl.load(tiles_ptr + 2 * tl.program_id(1))
    first = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    inputs = Inputs(
        q_ptr, q_stride_t, q_stride_h, query_start_loc_ptr, seq_lens_ptr, slopes_ptr, k_scale_ptr,
        v_scale_ptr, mask_ptr, mask_starts_ptr, ranges_ptr, range_starts_ptr, lengths_ptr,
        key_offset, key_step, window, scale_log2, cap_log2, scale_over_cap,
    )  # fmt: skip
    request = load_request(inputs, request_index, F)
    tile = tile_of(first + tl.arange(0, BLOCK_M), request, kv_head, inputs, F)
    d_idx = tl.arange(0, F.BLOCK_D)
    q_ok = tile.ok[:, None]
    if F.HEAD_SIZE != F.BLOCK_D:
        q_ok = q_ok & (d_idx < F.HEAD_SIZE)[None, :]
    # In decode.py, these offsets are added in another order. Each takes the fewest registers there.
    q_offsets = tile.out_rows.to(tl.int64)[:, None] * q_stride_t
    q_offsets += (tile.heads.to(tl.int64) * q_stride_h)[:, None] + d_idx[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_ok, other=0.0)
    v_scale = value_scale(inputs, kv_head, F)
    past = request.length - request.q_len
    first_position = past + first // F.GROUP
    last = tl.minimum(first + BLOCK_M, request.q_len * F.GROUP) - 1
    last_position = past + last // F.GROUP

    # Tiles of keys: those that rows see in part, those that every row sees whole, and again.
    lo, hi = visible_key_range(first_position, last_position, tile, F)
    full_lo, full_hi = visible_by_all(first_position, last_position, tile, F)
    first_tile = lo // F.BLOCK_N
    last_tile = tl.maximum(tl.cdiv(hi, F.BLOCK_N), first_tile)
    full_first = first_tile
    if F.WINDOW or F.CHUNK or F.RANGES:
        full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, F.BLOCK_N), first_tile), last_tile)
    full_last = tl.maximum(tl.minimum(full_hi // F.BLOCK_N, last_tile), full_first)
    if F.MASK:
        full_first = first_tile
        full_last = first_tile

    first_row = 0
    block_table = block_table_ptr
    k_head = k_src
    v_head = v_src
    k_row_scales = k_row_scales_ptr
    v_row_scales = v_row_scales_ptr
    if F.SOURCE == "pages":
        block_table = block_table_ptr + request_index.to(tl.int64) * table_stride
    else:
        first_row = tl.load(key_start_loc_ptr + request_index)
    if F.SOURCE != "descriptors":
        k_head = k_src + kv_head.to(tl.int64) * k_stride_h
        v_head = v_src + kv_head.to(tl.int64) * v_stride_h
    if F.FORMAT == "int8":
        k_row_scales = k_row_scales_ptr + kv_head.to(tl.int64) * k_stride_h // 4
        v_row_scales = v_row_scales_ptr + kv_head.to(tl.int64) * v_stride_h // 4
    keys = Keys(
        k_head, v_head, k_row_scales, v_row_scales, block_table, first_row, kv_head, k_stride_b,
        k_stride_t, v_stride_b, v_stride_t,
    )  # fmt: skip

    state = init_state(BLOCK_M, F)
    if F.WINDOW or F.CHUNK or F.RANGES:
        state = attend(state, q, tile, keys, first_tile, full_first, lo, hi, True, F)
    if not F.MASK:
        state = attend(state, q, tile, keys, full_first, full_last, lo, hi, False, F)
    state = attend(state, q, tile, keys, full_last, last_tile, lo, hi, True, F)
    out = Output(out_ptr, out_stride_t, out_stride_h, lse_ptr, out_scale_ptr, sinks_ptr)
    store_state(state, tile, v_scale, out, F)
