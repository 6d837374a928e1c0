"""The named tuples that the kernels here pass to their device functions.

`Features` and `DecodeSchedule` are constexpr parameters of the kernels and cost nothing at run
time. The others hold run-time values and are made inside a kernel. The kernels' own run-time
parameters stay flat, because Triton specializes on the alignment of each by its name.
"""

from typing import Any, NamedTuple

__all__ = ["DecodeSchedule", "Features", "Inputs", "Keys", "Output", "Request", "Tile"]


class Features(NamedTuple):
    """What an attention kernel is compiled for.

    All of it is data: Triton tells compiled kernels apart by the text of this tuple.
    """

    NUM_HEADS: int
    NUM_KV_HEADS: int
    GROUP: int  # query heads of a KV head
    HEAD_SIZE: int
    HEAD_SIZE_V: int
    BLOCK_D: int  # width of the tiles that hold heads of keys
    BLOCK_DV: int
    BLOCK_SIZE: int  # tokens in a block of the cache
    BLOCK_N: int  # keys in a tile
    STAGES: int  # of the loop over tiles of keys
    SOURCE: str  # where keys are; see online_softmax.py
    FORMAT: str  # how they are stored there
    NATIVE: bool  # the compiler converts FORMAT in hardware
    SCALE_STRIDE: int  # from the scale of a head to the next one's; 0 if there is one for all
    CAUSAL: bool
    WINDOW: bool
    RIGHT: int  # keys after its own that a query sees in its window; −1 for as many as before it
    CHUNK: int  # positions of a chunk, if a query sees only its own chunk's keys; else 0
    POSITIONS: bool  # key j is at position key_offset + key_step * j
    SKIPS_KEYS: bool  # keys before window and chunk are skipped: no range reaches back beyond them
    CAP: bool
    FAST_TANH: bool  # the soft cap may use NVIDIA's instruction
    ALIBI: int  # 0 for none, 1 for signed distances, 2 for the symmetric kind
    SINKS: bool
    RANGES: bool
    MASK: bool
    LSE: bool  # the log-sum-exp is stored
    OUT_FORMAT: str  # "plain" or the fp8 format of the output
    OUT_GROUP: int  # output values that share a scale; 0 if all do


class DecodeSchedule(NamedTuple):
    """How the decode kernel divides its work."""

    ROWS: int  # in a tile
    PARTS: int  # that each work unit is split into; 0 for Stream-K
    MIN_TILES: int  # of keys, for a program that works, with Stream-K
    HAS_REQUEST_LIST: bool  # else all requests of the batch are computed
    SAME_STRIDES: bool  # keys and values of the cache have the same strides
    ALLOW_PTX: bool  # NVIDIA's instructions may be used
    RELEASING_THREADS: int  # all of a program, if each must release its own stores; else 0
    LENGTHS_PER_LOAD: int  # lengths of requests that are read at a time
    MERGE_TILE_MAX_PARTS: int  # up to this many parts are merged as whole tiles, more row by row
    MERGE_PARTS_AT_ONCE: int  # parts of a row that are merged at a time
    MERGE_GROUP: int  # more parts than this are merged in groups of it first; 0 for never


class Inputs(NamedTuple):
    """What a layer and a batch bring for all tiles: pointers, strides and numbers."""

    q: Any  # (num_tokens, NUM_HEADS, HEAD_SIZE)
    q_stride_t: Any
    q_stride_h: Any
    query_start_loc: Any  # (num_reqs + 1,) int32
    seq_lens: Any  # (num_reqs,) int32
    slopes: Any  # with ALIBI, (NUM_HEADS,) float32
    k_scale: Any  # of an fp8 cache, () or (NUM_KV_HEADS,) float32
    v_scale: Any
    mask: Any  # uint8, (query_len, seq_len) of each request
    mask_starts: Any  # (num_reqs,) int64, where the request's begins
    ranges: Any  # (num_ranges, 2) int32 [start, end), request by request
    range_starts: Any  # (num_reqs + 1,) int32, where the request's begin
    lengths: Any  # with POSITIONS, (num_reqs,) int32, each request's length; seq_lens counts keys
    key_offset: Any  # with POSITIONS, the position of key 0
    key_step: Any  # and from one key to the next
    window: Any
    scale_log2: Any  # factor on the scores, times log2(e)
    cap_log2: Any  # the soft cap, times log2(e)
    scale_over_cap: Any  # the factor over the soft cap


class Request(NamedTuple):
    """A request: its place in the batch, its first query token, and its lengths."""

    index: Any
    q_start: Any
    q_len: Any
    seq_len: Any  # keys
    length: Any  # the position after the last query's


class Tile(NamedTuple):
    """The rows of a tile of one KV head: row = token * GROUP + query head of the group."""

    ok: Any  # (rows,) bool, rows that exist
    tokens: Any  # (rows,) the request's token, −1 for rows that do not exist
    heads: Any  # (rows,) the query head
    q_pos: Any  # (rows,) the position of the query
    out_rows: Any  # (rows,) the row of the query and of the output
    slopes: Any  # (rows,) float32, of ALiBi, times log2(e)
    seq_len: Any
    key_offset: Any
    key_step: Any
    mask: Any  # pointer to the request's mask
    ranges: Any  # pointer to all ranges; the request's are [first_range, last_range)
    first_range: Any
    last_range: Any
    window: Any
    scale_log2: Any  # these include the scale of an fp8 cache's keys
    cap_log2: Any
    scale_over_cap: Any


class Keys(NamedTuple):
    """The keys and values of one request and KV head."""

    k: Any  # pointer to the head's first element, or a tensor descriptor
    v: Any
    k_row_scales: Any  # with "int8", pointer to the head's first float32 scale
    v_row_scales: Any
    block_table: Any  # for pages, pointer to the request's blocks
    first_row: Any  # for rows and descriptors, the row of the request's first key
    head: Any
    k_stride_b: Any  # from block to block
    k_stride_t: Any  # from token to token
    v_stride_b: Any
    v_stride_t: Any


class Output(NamedTuple):
    """Where results go, as pointers."""

    data: Any  # (num_tokens, NUM_HEADS, HEAD_SIZE_V), bytes if it is quantized
    stride_t: Any
    stride_h: Any
    lse: Any  # with LSE, (num_tokens, NUM_HEADS) float32
    scale: Any  # of an fp8 output, read; with OUT_GROUP those of the groups, written
    sinks: Any  # with SINKS, (NUM_HEADS,), read
