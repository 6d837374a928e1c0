"""Attention of few query tokens over long keys: the keys are split, in one launch.

The keys of a request are split over programs and their partial outputs merged, as in Flash-Decoding
(https://pytorch.org/blog/flash-decoding/). How they are split is Stream-K (arXiv:2301.03598),
applied to attention as in LeanAttention (arXiv:2405.10480). A work unit is one tile of rows of one
KV head of a request, and its iterations are the tiles of keys that these rows see. The iterations
of all work units, one after the other, are the iteration space; each of a fixed number of programs
gets `tiles_per_program` consecutive ones, wherever that splits a work unit.

Two things differ from these papers. Each program finds its place by a prefix sum over the requests
that it computes itself from the lengths on the device, so one captured graph serves all lengths.
And no second kernel or waiting program merges: partial outputs are stored normalized, float32, with
their log2-sums, and the last program to arrive at a split, by an atomic counter, merges them;
with `DecodeSchedule.MERGE_GROUP` in two levels.

With `DecodeSchedule.PARTS` each work unit is split into the same parts whatever else is in the
batch, so that its result has the same bits (batch invariance).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_dispatch.backends.triton.kernels.epilogue import store_rows, store_state
from attn_dispatch.backends.triton.kernels.online_softmax import (
    LOWEST,
    attend,
    first_key,
    init_state,
    load_request,
    tile_of,
    value_scale,
)
from attn_dispatch.backends.triton.kernels.online_softmax_latent import attend_latents
from attn_dispatch.backends.triton.kernels.online_softmax_packed import attend_packed
from attn_dispatch.backends.triton.kernels.structs import Inputs, Keys, Output
from attn_dispatch.backends.triton.launcher import METADATA

__all__ = ["decode_kernel"]


class Batch(NamedTuple):
    """The requests of a launch: pointers to their places in the batch and to their lengths."""

    requests: Any  # with HAS_REQUEST_LIST, (num_reqs,) int32; else all of the batch, in order
    num_reqs: Any
    query_start_loc: Any
    seq_lens: Any
    lengths: Any  # these four: see Inputs
    key_offset: Any
    key_step: Any
    window: Any


class PagedKV(NamedTuple):
    """The paged cache and its block table."""

    k: Any
    v: Any
    k_row_scales: Any
    v_row_scales: Any
    k_stride_b: Any  # from block to block; then from token to token and from head to head
    k_stride_t: Any
    k_stride_h: Any
    v_stride_b: Any
    v_stride_t: Any
    v_stride_h: Any
    block_table: Any
    table_stride: Any


class Parts(NamedTuple):
    """Pointers to the partial outputs of splits, their log2-sums, and counters of arrivals."""

    out: Any
    lse: Any
    counters: Any


class Split(NamedTuple):
    """A part of a work unit, or all of it."""

    request: Any
    work_unit: Any  # kv_head + NUM_KV_HEADS * tile of rows
    first_tile: Any  # its tiles of keys are [first_tile, last_tile)
    last_tile: Any
    is_whole: Any  # these are all that the work unit has
    part: Any  # else, which part this is
    parts: Any  # of how many
    first_slot: Any  # and where the first one is stored


# The iteration space ------------------------------------------------------------------------------


@triton.jit
def _request(batch, i, S: tl.constexpr):
    """The i-th request of this launch."""
    if S.HAS_REQUEST_LIST:
        return tl.load(batch.requests + i)
    else:
        return i


@triton.jit
def _tiles_of(batch, i, ok, F: tl.constexpr, S: tl.constexpr):
    """(tiles of keys, tiles of rows, first tile of keys) of the i-th requests, a vector or one."""
    r = i
    if S.HAS_REQUEST_LIST:
        r = tl.load(batch.requests + i, mask=ok, other=0)
    seq_len = tl.load(batch.seq_lens + r, mask=ok, other=0)
    start = tl.load(batch.query_start_loc + r, mask=ok, other=0)
    q_len = tl.load(batch.query_start_loc + r + 1, mask=ok, other=0) - start
    first = seq_len * 0
    if F.SKIPS_KEYS:
        length = seq_len
        if F.POSITIONS:
            length = tl.load(batch.lengths + r, mask=ok, other=0)
        first = first_key(length - q_len, batch.window, batch, F) // F.BLOCK_N
        if F.POSITIONS:  # where no row sees a key, a tile is left, and with it their results
            first = tl.minimum(first, tl.maximum(seq_len - 1, 0) // F.BLOCK_N)
    tiles = tl.maximum((seq_len + F.BLOCK_N - 1) // F.BLOCK_N - first, 0)
    row_tiles = (q_len * F.GROUP + S.ROWS - 1) // S.ROWS
    return tiles, row_tiles, first


@triton.jit
def _lengths(batch, begin, F: tl.constexpr, S: tl.constexpr):
    """(lengths, exists): how much of the iteration space the requests from `begin` on take.

    In tiles of keys, or with PARTS in parts.
    """
    i = begin + tl.arange(0, S.LENGTHS_PER_LOAD)
    ok = i < batch.num_reqs
    tiles, row_tiles, _ = _tiles_of(batch, i, ok, F, S)
    if S.PARTS:
        units = row_tiles.to(tl.int64) * F.NUM_KV_HEADS
        return tl.where(tiles > 0, units * S.PARTS, 0), ok
    else:
        return tiles.to(tl.int64) * row_tiles * F.NUM_KV_HEADS, ok


@triton.jit
def _total(batch, F: tl.constexpr, S: tl.constexpr):
    """The size of the iteration space."""
    total = (batch.num_reqs * 0).to(tl.int64)
    for begin in range(0, batch.num_reqs, S.LENGTHS_PER_LOAD):
        lengths, _ = _lengths(batch, begin, F, S)
        total += tl.sum(lengths)
    return total


@triton.jit
def _find(batch, position, F: tl.constexpr, S: tl.constexpr):
    """(i, base): the request at a position of the iteration space, and where it begins there."""
    i = 0
    base = (position * 0).to(tl.int64)
    running = (position * 0).to(tl.int64)
    for begin in range(0, batch.num_reqs, S.LENGTHS_PER_LOAD):
        lengths, ok = _lengths(batch, begin, F, S)
        ends = tl.cumsum(lengths, 0) + running
        before = (ends <= position) & ok
        i += tl.sum(before.to(tl.int32))
        base = tl.maximum(base, tl.max(tl.where(before, ends, 0)))
        running += tl.sum(lengths)
    return i, base


# Merging splits -----------------------------------------------------------------------------------


@triton.jit
def _slot(first_slot, part, S: tl.constexpr):
    """Where a part of a split is stored.

    With Stream-K every program has two slots: one for the split that it begins with and which began
    in an earlier program, and one for the split that begins in it. Else parts are consecutive.
    """
    slot = (first_slot + part).to(tl.int64)
    if S.PARTS == 0:
        slot = slot * 2 + (slot == first_slot).to(tl.int64)
    return slot


@triton.jit
def _merged_slot(first_slot, part, S: tl.constexpr):
    """Where the merged parts of the group that begins with this part are stored: after all slots.

    Other programs may still be reading the slot of the part.
    """
    place = (first_slot + part).to(tl.int64)
    is_first = (place == first_slot).to(tl.int64)
    return 2 * tl.num_programs(0) + place // S.MERGE_GROUP * 2 + is_first


@triton.jit
def _is_last_to_arrive(counter, parts, S: tl.constexpr):
    """Whether this program is the last of a split's; then all parts can be loaded.

    By NVIDIA's memory model one thread's release after a barrier covers the stores of all threads.
    On AMD a release waits for the stores of its own wave only, and a barrier on CDNA for none: so
    every thread adds 1.
    """
    tl.debug_barrier()
    if S.RELEASING_THREADS:
        ones = tl.full([S.RELEASING_THREADS], 1, tl.int32)
        before = tl.atomic_add(counter + (ones - 1), ones, sem="acq_rel", scope="gpu")
        return tl.max(before) == parts * S.RELEASING_THREADS - 1
    else:
        return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def _load_part(buffers, at, ok, F: tl.constexpr):
    """(outputs, log2-sums) of parts, not from the first-level cache: other programs wrote them."""
    d_idx = tl.arange(0, F.BLOCK_DV)
    lse = tl.load(buffers.lse + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
    out = tl.load(
        buffers.out + at[:, None] * F.BLOCK_DV + d_idx[None, :], mask=ok[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    return out, lse


@triton.jit
def _store_part(state, slot, buffers, ok, F: tl.constexpr, S: tl.constexpr):
    """Store a part of a split, or merged ones."""
    acc, m_i, l_i = state
    # A part without a score above −inf has nothing in it; one with NaN keeps it.
    total = tl.where(l_i == 0.0, 1.0, l_i)
    dv_idx = tl.arange(0, F.BLOCK_DV)
    at = slot * S.ROWS + tl.arange(0, S.ROWS)
    part_lse = m_i + tl.log2(total)
    tl.store(
        buffers.out + at[:, None] * F.BLOCK_DV + dv_idx[None, :], acc / total[:, None],
        mask=ok[:, None],
    )  # fmt: skip
    tl.store(buffers.lse + at, part_lse, mask=ok)


@triton.jit
def _merge_tile(split, first, last, step, buffers, ok, F: tl.constexpr, S: tl.constexpr):
    """The state over the parts range(first, last, step), as `attend` returns it, all rows.

    With a step of more than 1, each is that of the group that begins with it.
    """
    rows = tl.arange(0, S.ROWS)
    state = init_state(S.ROWS, F)
    m_i, l_i, acc = state[1], state[2], state[0]  # in this order the loop takes fewer registers
    for part in range(first, last, step):
        slot = _slot(split.first_slot, part, S)
        if S.MERGE_GROUP:
            slot = tl.where(step > 1, _merged_slot(split.first_slot, part, S), slot)
        out, lse = _load_part(buffers, slot * S.ROWS + rows, ok, F)
        m_new = tl.maximum(m_i, lse)
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        weight = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + weight
        acc = acc * alpha[:, None] + out * weight[:, None]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _merge_groups(split, buffers, ok, F: tl.constexpr, S: tl.constexpr):
    """(step, is_last): the parts left to merge are range(0, parts, step); by this program if last.

    One program takes long to read many parts of wide rows. So the last program to arrive at a group
    of parts merges it, and the last of these merges the groups. A group's counter is that of its
    first part's slot, and the split's that of its second part's, where no group begins.
    """
    first = split.part // S.MERGE_GROUP * S.MERGE_GROUP
    last = tl.minimum(first + S.MERGE_GROUP, split.parts)
    counter = buffers.counters + _slot(split.first_slot, first, S)
    is_last = _is_last_to_arrive(counter, last - first, S)
    if is_last:
        tl.store(counter, 0)  # for the next launch
        if split.parts > S.MERGE_GROUP:
            tl.debug_barrier()
            merged = _merge_tile(split, first, last, 1, buffers, ok, F, S)
            _store_part(merged, _merged_slot(split.first_slot, first, S), buffers, ok, F, S)
            counter = buffers.counters + _slot(split.first_slot, 1, S)
            is_last = _is_last_to_arrive(counter, tl.cdiv(split.parts, S.MERGE_GROUP), S)
            if is_last:
                tl.store(counter, 0)
    return tl.where(split.parts > S.MERGE_GROUP, S.MERGE_GROUP, 1), is_last


@triton.jit
def _merge_row(split, row, buffers, F: tl.constexpr, S: tl.constexpr):
    """The state over many parts of a split, of one row."""
    state = init_state(1, F)
    m_i, l_i, acc = state[1], state[2], state[0]
    for begin in range(0, split.parts, S.MERGE_PARTS_AT_ONCE):
        part = begin + tl.arange(0, S.MERGE_PARTS_AT_ONCE)
        at = _slot(split.first_slot, part, S) * S.ROWS + row
        out, lse = _load_part(buffers, at, part < split.parts, F)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_use = tl.where(m_new <= LOWEST, 0.0, m_new)
        weight = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(out * weight[:, None], 0)[None, :]
        m_i = m_new
    return acc, m_i, l_i


# The work -----------------------------------------------------------------------------------------


@triton.jit
def _attend_split(split, inputs, kv, out, buffers, F: tl.constexpr, S: tl.constexpr):
    """Attend to the tiles of keys of a split; store the result, or the part."""
    kv_head = split.work_unit % F.NUM_KV_HEADS
    first_row = split.work_unit // F.NUM_KV_HEADS * S.ROWS
    rows = tl.arange(0, S.ROWS)
    request = load_request(inputs, split.request, F)
    seq_len = request.seq_len
    tile = tile_of(first_row + rows, request, kv_head, inputs, F)
    v_scale = value_scale(inputs, kv_head, F)
    q_offsets = tile.out_rows.to(tl.int64) * inputs.q_stride_t
    q_pointers = inputs.q + (q_offsets + tile.heads.to(tl.int64) * inputs.q_stride_h)[:, None]
    # For "packed8" multiplied here, so that the compiler sees that rows begin at multiples of 16.
    UNIT: tl.constexpr = 8 if F.SOURCE == "packed8" else 1
    k_stride_b, k_stride_t = kv.k_stride_b * UNIT, kv.k_stride_t * UNIT
    k_head_offset = kv_head.to(tl.int64) * (kv.k_stride_h * UNIT)
    v_stride_b, v_stride_t, v_head_offset = k_stride_b, k_stride_t, k_head_offset
    if not S.SAME_STRIDES:
        v_stride_b, v_stride_t = kv.v_stride_b * UNIT, kv.v_stride_t * UNIT
        v_head_offset = kv_head.to(tl.int64) * (kv.v_stride_h * UNIT)
    k_row_scales = kv.k_row_scales
    v_row_scales = kv.v_row_scales
    if F.FORMAT == "int8":
        PER_SCALE: tl.constexpr = 2 if F.SOURCE == "packed8" else 4  # a scale in units of strides
        k_row_scales = kv.k_row_scales + k_head_offset // PER_SCALE
        v_row_scales = kv.v_row_scales + v_head_offset // PER_SCALE
    key_lo = 0
    if F.SKIPS_KEYS:  # blocks before window and chunk may have been freed
        key_lo = first_key(request.length - request.q_len, inputs.window, inputs, F)
    block_table = kv.block_table + split.request.to(tl.int64) * kv.table_stride
    keys = Keys(
        kv.k + k_head_offset, kv.v + v_head_offset, k_row_scales, v_row_scales, block_table, 0,
        kv_head, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    )  # fmt: skip
    state = init_state(S.ROWS, F)
    if F.SOURCE == "packed8":
        d_idx = 2 * tl.arange(0, F.BLOCK_D // 2)[None, :]
        ok = tile.ok[:, None] & (d_idx < F.HEAD_SIZE)
        q_even = tl.load(q_pointers + d_idx, mask=ok, other=0.0)
        q_odd = tl.load(q_pointers + d_idx + 1, mask=ok, other=0.0)
        state = attend_packed(
            state, q_even, q_odd, tile, keys, split.first_tile, split.last_tile, key_lo, seq_len,
            S.ALLOW_PTX, F,
        )  # fmt: skip
    elif F.SOURCE == "latents":
        state = attend_latents(
            state, q_pointers, tile, keys, split.first_tile, split.last_tile, key_lo, seq_len, F
        )
    else:
        d_idx = tl.arange(0, F.BLOCK_D)[None, :]
        ok = tile.ok[:, None]
        if F.HEAD_SIZE != F.BLOCK_D:
            ok = ok & (d_idx < F.HEAD_SIZE)
        q = tl.load(q_pointers + d_idx, mask=ok, other=0.0)
        state = attend(
            state, q, tile, keys, split.first_tile, split.last_tile, key_lo, seq_len, True, F
        )
    if split.is_whole:
        store_state(state, tile, v_scale, out, F)
    else:
        _store_part(state, _slot(split.first_slot, split.part, S), buffers, tile.ok, F, S)
        if S.MERGE_GROUP:
            step, is_last = _merge_groups(split, buffers, tile.ok, F, S)
            if is_last:
                tl.debug_barrier()
                merged = _merge_tile(split, 0, split.parts, step, buffers, tile.ok, F, S)
                store_state(merged, tile, v_scale, out, F)
        elif _is_last_to_arrive(buffers.counters + split.first_slot, split.parts, S):
            tl.debug_barrier()
            if split.parts <= S.MERGE_TILE_MAX_PARTS:
                merged = _merge_tile(split, 0, split.parts, 1, buffers, tile.ok, F, S)
                store_state(merged, tile, v_scale, out, F)
            else:
                for row in range(0, tl.minimum(request.q_len * F.GROUP - first_row, S.ROWS)):
                    merged_row = _merge_row(split, row, buffers, F, S)
                    index = first_row + row + tl.arange(0, 1)
                    one = tile_of(index, request, kv_head, inputs, F)
                    store_state(merged_row, one, v_scale, out, F)
            tl.store(buffers.counters + split.first_slot, 0)  # for the next launch


@triton.jit
def _store_empty(first, last, step, out, F: tl.constexpr):
    """Store rows that see no key, token * NUM_HEADS + head: 0, and an LSE of −inf."""
    for row in range(first, last, step):
        at = row + tl.arange(0, 1)
        store_rows(
            init_state(1, F), at // F.NUM_HEADS, at % F.NUM_HEADS, at >= 0, at >= 0, 1.0, out,
            False, F,
        )  # fmt: skip


_UNSPECIALIZED = ["num_reqs", "all_reqs", "num_rows", "table_stride", "window"]
_UNSPECIALIZED += ["key_offset", "key_step"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=METADATA)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, out_scale_ptr, part_out_ptr, part_lse_ptr, counters_ptr,
    requests_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, k_row_scales_ptr,
    v_row_scales_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, mask_ptr, mask_starts_ptr,
    ranges_ptr, range_starts_ptr, lengths_ptr, key_offset, key_step, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, out_stride_t,
    out_stride_h, num_reqs, all_reqs, num_rows, table_stride, window, scale_log2, cap_log2,
    scale_over_cap, F: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Attention of the listed requests over the paged cache.

    Grid: any number of programs. part_out_ptr has ROWS * BLOCK_DV float32 for each slot,
    part_lse_ptr ROWS, and counters_ptr an int32 that is zero before and after: two slots for each
    program, or with PARTS as many for each work unit. MERGE_GROUP needs two more slots for
    each group of as many programs.

    Args:
        q_ptr: (num_tokens, NUM_HEADS, HEAD_SIZE).
        k_ptr, v_ptr: the cache's keys and values; for "latents", latents and rotated key parts.
        requests_ptr: with HAS_REQUEST_LIST, (num_reqs,) int32, the requests; else all, in order.
        all_reqs: requests of the batch, listed or not.
        num_rows: of the output; rows after the last request's are stored as rows without keys.
        k_stride_b, k_stride_t, k_stride_h: of the cache's keys, in 16 bytes for "packed8";
            v_stride_b and so on of its values, not read with SAME_STRIDES.
        F, S: Features and DecodeSchedule.
        Others: see the fields of the same names in structs.py.
    """
    batch = Batch(
        requests_ptr, num_reqs, query_start_loc_ptr, seq_lens_ptr, lengths_ptr, key_offset,
        key_step, window,
    )  # fmt: skip
    kv = PagedKV(
        k_ptr, v_ptr, k_row_scales_ptr, v_row_scales_ptr, k_stride_b, k_stride_t, k_stride_h,
        v_stride_b, v_stride_t, v_stride_h, block_table_ptr, table_stride,
    )  # fmt: skip
    inputs = Inputs(
        q_ptr, q_stride_t, q_stride_h, query_start_loc_ptr, seq_lens_ptr, slopes_ptr, k_scale_ptr,
        v_scale_ptr, mask_ptr, mask_starts_ptr, ranges_ptr, range_starts_ptr, lengths_ptr,
        key_offset, key_step, window, scale_log2, cap_log2, scale_over_cap,
    )  # fmt: skip
    out = Output(out_ptr, out_stride_t, out_stride_h, lse_ptr, out_scale_ptr, sinks_ptr)
    buffers = Parts(part_out_ptr, part_lse_ptr, counters_ptr)
    pid = tl.program_id(0)

    # Rows without keys come first, while few registers are in use: at the end they made the kernel
    # spill. They are the rows after the last request's, and those of requests without keys.
    end = tl.load(query_start_loc_ptr + all_reqs)
    _store_empty(
        end * F.NUM_HEADS + pid, num_rows * F.NUM_HEADS, tl.num_programs(0), out, F
    )  # fmt: skip
    for i in range(pid, num_reqs, tl.num_programs(0)):
        request = _request(batch, i, S)
        if tl.load(seq_lens_ptr + request) == 0:
            first = tl.load(query_start_loc_ptr + request) * F.NUM_HEADS
            last = tl.load(query_start_loc_ptr + request + 1) * F.NUM_HEADS
            _store_empty(first, last, 1, out, F)

    total = _total(batch, F, S)
    if S.PARTS:
        total = total.to(tl.int32)
        place = pid
        while place < total:
            i, base = _find(batch, place, F, S)
            tiles, _, skipped = _tiles_of(batch, i, i < num_reqs, F, S)
            parts = tl.minimum(tiles, S.PARTS)
            part = place % S.PARTS  # every base is a multiple of PARTS
            if part < parts:
                split = Split(
                    _request(batch, i, S), (place - base.to(tl.int32)) // S.PARTS,
                    skipped + part * tiles // parts, skipped + (part + 1) * tiles // parts,
                    parts == 1, part, parts, place - part,
                )  # fmt: skip
                _attend_split(split, inputs, kv, out, buffers, F, S)
            place += tl.num_programs(0)
    else:
        # A round number of tiles, so that equal requests are split in the same way, or not at all.
        tiles_per_program = tl.maximum(tl.cdiv(total, tl.num_programs(0)), S.MIN_TILES)
        step = tl.maximum(tiles_per_program // 16, 1).to(tl.float32)
        step = tl.exp2(tl.floor(tl.log2(step))).to(tl.int64)
        tiles_per_program = tl.cdiv(tiles_per_program, step) * step
        position = pid * tiles_per_program
        end = tl.minimum(position + tiles_per_program, total)
        if position < end:
            i, base = _find(batch, position, F, S)
            while position < end:
                tiles, row_tiles, skipped = _tiles_of(batch, i, i < num_reqs, F, S)
                units = row_tiles * F.NUM_KV_HEADS
                if tiles * units > 0:
                    unit = ((position - base) // tiles).to(tl.int32)
                    first_tile = ((position - base) % tiles).to(tl.int32)
                    last_tile = tl.minimum(tiles, first_tile + (end - position).to(tl.int32))
                    begin = base + unit.to(tl.int64) * tiles
                    first = (begin // tiles_per_program).to(tl.int32)
                    last = ((begin + tiles - 1) // tiles_per_program).to(tl.int32)
                    split = Split(
                        _request(batch, i, S), unit, skipped + first_tile, skipped + last_tile,
                        (first_tile == 0) & (last_tile == tiles), pid - first, last - first + 1,
                        first,
                    )  # fmt: skip
                    _attend_split(split, inputs, kv, out, buffers, F, S)
                    position += last_tile - first_tile
                if position == base + tiles.to(tl.int64) * units:
                    base = position
                    i += 1
