"""Which tiles of keys are a program's, for the decode kernel (`hopper_decode.py`): in Gluon.

The schedule is kernels/decode.py's. The tiles of keys of all requests, tiles of rows and KV heads
are one line, of which every program has an equal share. A unit is what a KV head and a tile of rows
of a request have of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["LINE", "find", "length_of", "lowest_key", "request_of", "unit_at"]

#: The layout of what all warps read as one.
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def request_of(requests_ptr, i, HAS_REQUEST_LIST: gl.constexpr):
    """The i-th request of this launch."""
    if HAS_REQUEST_LIST:
        return gl.load(requests_ptr + i)
    else:
        return i


@gluon.jit
def lowest_key(seq_len, q_len, window, WINDOW: gl.constexpr):
    """The first key that a query of the request sees: blocks before it may be another's."""
    lowest = seq_len * 0
    if WINDOW:
        lowest = gl.maximum(seq_len - q_len - window + 1, 0)
    return lowest


@gluon.jit
def _units_of(
    r, ok, query_start_loc_ptr, seq_lens_ptr, window,
    WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """(tiles of keys, tiles of rows, first tile of keys) of requests, a vector or one."""
    seq_len = gl.load(seq_lens_ptr + r, mask=ok, other=0)
    start = gl.load(query_start_loc_ptr + r, mask=ok, other=0)
    q_len = gl.load(query_start_loc_ptr + r + 1, mask=ok, other=0) - start
    first = lowest_key(seq_len, q_len, window, WINDOW) // KEYS
    tiles = gl.maximum((seq_len + KEYS - 1) // KEYS - first, 0)
    return tiles, (q_len * GROUP + ROWS - 1) // ROWS, first


@gluon.jit
def _lengths(
    begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    HAS_REQUEST_LIST: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """(CHUNK,) int64: how much of the line each of these requests takes."""
    i = begin + gl.arange(0, CHUNK, LINE)
    ok = i < num_reqs
    r = i
    if HAS_REQUEST_LIST:
        r = gl.load(requests_ptr + i, mask=ok, other=0)
    tiles, row_tiles, _ = _units_of(
        r, ok, query_start_loc_ptr, seq_lens_ptr, window, WINDOW, GROUP, ROWS, KEYS
    )
    return tiles.to(gl.int64) * row_tiles * NUM_KV_HEADS


@gluon.jit
def length_of(
    num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    HAS_REQUEST_LIST: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """The length of the line, in tiles of keys."""
    total = gl.to_tensor(0).to(gl.int64)
    for begin in range(0, num_reqs, CHUNK):
        lengths = _lengths(
            begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        total += gl.sum(lengths, 0)
    return total


@gluon.jit
def find(
    position, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    HAS_REQUEST_LIST: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """(i, base): the request that a position on the line falls to, and where its stretch begins."""
    i = gl.to_tensor(0)
    base = gl.to_tensor(0).to(gl.int64)
    running = gl.to_tensor(0).to(gl.int64)
    for begin in range(0, num_reqs, CHUNK):
        lengths = _lengths(
            begin, num_reqs, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window, HAS_REQUEST_LIST,
            WINDOW, GROUP, ROWS, KEYS, NUM_KV_HEADS, CHUNK,
        )  # fmt: skip
        ends = gl.associative_scan(lengths, 0, _add) + running
        before = (ends <= position) & (begin + gl.arange(0, CHUNK, LINE) < num_reqs)
        i += gl.sum(before.to(gl.int32), 0)
        base = gl.maximum(base, gl.max(gl.where(before, ends, 0), 0))
        running += gl.sum(lengths, 0)
    return i, base


@gluon.jit
def unit_at(
    position, end, i, base, share, requests_ptr, query_start_loc_ptr, seq_lens_ptr, window,
    num_reqs,
    HAS_REQUEST_LIST: gl.constexpr, WINDOW: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """What a position on the line falls to.

    Returns:
        request: the i-th of this launch.
        unit: its KV head and tile of rows, kv_head + NUM_KV_HEADS * tile of rows; −1 for none.
        first_tile, last_tile: the program's tiles of keys.
        is_whole, part, parts, first: whether that is all of the unit; else which part of how many,
            and the program that has the first.
        i, base, position: where the program goes on.
    """
    request = request_of(requests_ptr, i, HAS_REQUEST_LIST)
    tiles, row_tiles, skipped = _units_of(
        request, i < num_reqs, query_start_loc_ptr, seq_lens_ptr, window, WINDOW, GROUP, ROWS,
        KEYS,
    )  # fmt: skip
    length = tiles.to(gl.int64) * row_tiles * NUM_KV_HEADS
    some = gl.maximum(tiles, 1)
    unit = gl.where(length > 0, ((position - base) // some).to(gl.int32), -1)
    first_tile = ((position - base) % some).to(gl.int32)
    last_tile = gl.minimum(tiles, first_tile + gl.minimum(end - position, tiles).to(gl.int32))
    begin = base + unit.to(gl.int64) * tiles
    first = (begin // share).to(gl.int32)
    last = ((begin + some - 1) // share).to(gl.int32)
    is_whole = (first_tile == 0) & (last_tile == tiles)
    position += gl.where(length > 0, last_tile - first_tile, 0)
    is_done = position == base + length
    base = gl.where(is_done, position, base)
    i += is_done.to(gl.int32)
    return (
        request, unit, skipped + first_tile, skipped + last_tile, is_whole, last - first + 1, first,
        i, base, position,
    )  # fmt: skip
