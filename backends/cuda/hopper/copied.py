"""How a warp group copies pages that TMA cannot read, or not as 16-bit values: in Gluon.

Pages of any size, and caches of another dtype than the layer's. Each thread loads 16 bytes at a
time, converts them, and stores them where TMA would have: the consumers see no difference. So there
is no copy in memory, whatever the number of keys. The loads of a piece of a tile are under way
while the piece before it is converted and stored.

Elements are loaded, converted and stored in words of 32 bits. `PrefillConfig.FORMAT` is what a word
holds: "same", two elements of the layer's dtype; "float16" or "bfloat16", where that is the other
one; "int8", four integers, with a float32 scale for each row; "e4m3" or "e5m2", four fp8 elements
(arXiv:2209.05433), with a scale for the layer or for each head.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate, reinterpret

__all__ = ["CopiedPages", "copy_keys"]

#: Words of a piece: a thread of four warps holds this many / 128, twice.
_PIECE = 4096
#: Words of a load of one thread.
_LOAD = 4


@gluon.constexpr_function
def _words(columns, FORMAT):
    """The words that hold this many columns."""
    return columns // (4 if FORMAT in ("int8", "e4m3", "e5m2") else 2)


@gluon.constexpr_function
def _piece_rows(rows, columns, FORMAT):
    """Rows of a piece of a tile, a power of two."""
    return min(rows, max(16, 1 << (_PIECE // _words(columns, FORMAT)).bit_length() - 1))


@gluon.constexpr_function
def _loads_layout(words):
    """(rows, words) over 4 warps: a thread has 16 bytes of a row."""
    lanes = min(32, words // _LOAD)
    return gl.BlockedLayout([1, _LOAD], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def _words_layout(columns):
    """`tile_layout` of tiles that are seen as words."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _pair(to):
    """PTX that rounds the float32 registers f0 and f1 to a pair of these in $0, f2 and f3 in $1."""
    kind = "bf16x2" if to == "bf16" else "f16x2"
    return f"cvt.rn.{kind}.f32 $0, f1, f0; cvt.rn.{kind}.f32 $1, f3, f2;"


@gluon.constexpr_function
def _from_fp8(FORMAT, to):
    """PTX that takes a word of fp8 ($2) times a scale ($3) to two words."""
    return f"""{{
        .reg .b16 a, b, h0, h1, h2, h3;
        .reg .b32 x, y;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {{a, b}}, $2;
        cvt.rn.f16x2.{FORMAT}x2 x, a;
        cvt.rn.f16x2.{FORMAT}x2 y, b;
        mov.b32 {{h0, h1}}, x;
        mov.b32 {{h2, h3}}, y;
        cvt.f32.f16 f0, h0;
        cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;
        cvt.f32.f16 f3, h3;
        mul.f32 f0, f0, $3;
        mul.f32 f1, f1, $3;
        mul.f32 f2, f2, $3;
        mul.f32 f3, f3, $3;
        {_pair(to)}
    }}"""


@gluon.constexpr_function
def _from_int8(to):
    """The same of int8: a byte, made unsigned, is the end of a float32 above 2 ** 23."""
    bytes_ = "".join(
        f"prmt.b32 x, u, 0x4B000000, 0x754{i}; mov.b32 f{i}, x; "
        f"sub.f32 f{i}, f{i}, 0f4B000080; mul.f32 f{i}, f{i}, $3;\n"
        for i in range(4)
    )
    return f"""{{
        .reg .b32 u, x;
        .reg .f32 f0, f1, f2, f3;
        xor.b32 u, $2, 0x80808080;
        {bytes_}
        {_pair(to)}
    }}"""


@gluon.constexpr_function
def _from_other(to):
    """PTX that takes a word of two elements of a 16-bit dtype ($1) to one of the other."""
    old, new = ("bf16", "f16") if to == "fp16" else ("f16", "bf16")
    return f"""{{
        .reg .b16 a, b;
        .reg .f32 f0, f1;
        mov.b32 {{a, b}}, $1;
        cvt.f32.{old} f0, a;
        cvt.f32.{old} f1, b;
        cvt.rn.{new}x2.f32 $0, f1, f0;
    }}"""


@aggregate
class CopiedPages:
    """Keys or values of a paged cache, by their strides.

    Attributes:
        ptr: of the elements, as words.
        scale_ptr: of the scales of fp8, or of the first row's scale of int8; else any pointer.
        table_ptr, table_stride: the block table.
        block_step, token_step, head_step: from one block, token or KV head to the next, in units of
            CONFIG.UNIT bytes, so that the compiler knows that loads are aligned.
    """

    ptr: gl.tensor
    scale_ptr: gl.tensor
    table_ptr: gl.tensor
    table_stride: gl.tensor
    block_step: gl.tensor
    token_step: gl.tensor
    head_step: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def scale_of(self, kv_head):
        """The scale of a head's elements; of int8, each row has its own."""
        scale = gl.to_tensor(1.0)
        if (self.config.FORMAT == "e4m3") | (self.config.FORMAT == "e5m2"):
            scale = gl.load(self.scale_ptr + kv_head * self.config.SCALE_STRIDE)
        return scale

    @gluon.jit
    def load(
        self, request, kv_head, first, first_key, end_key, ROWS: gl.constexpr,
        MAIN: gl.constexpr, TAIL: gl.constexpr,
    ):  # fmt: skip
        """Load a piece: ROWS keys, 0 outside of [first_key, end_key).

        No other key's memory is read: what it holds may be anything.

        Returns:
            (MAIN columns, TAIL columns, scales); what the format has not is any tensor.
        """
        x, scales = self._columns(request, kv_head, first, first_key, end_key, ROWS, 0, MAIN)
        tail = x
        if TAIL:
            tail, _ = self._columns(request, kv_head, first, first_key, end_key, ROWS, MAIN, TAIL)
        return x, tail, scales

    @gluon.jit
    def _columns(
        self, request, kv_head, first, first_key, end_key, ROWS: gl.constexpr,
        FIRST: gl.constexpr, COLUMNS: gl.constexpr,
    ):  # fmt: skip
        config: gl.constexpr = self.config
        WORDS: gl.constexpr = _words(COLUMNS, config.FORMAT)
        SKIPPED: gl.constexpr = _words(FIRST, config.FORMAT)
        LAYOUT: gl.constexpr = _loads_layout(WORDS)
        key = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        ok = (key >= first_key) & (key < end_key)
        table = self.table_ptr + request.to(gl.int64) * self.table_stride
        block = gl.load(table + key // config.BLOCK_SIZE, mask=ok, other=0).to(gl.int64)
        at = block * self.block_step + key % config.BLOCK_SIZE * self.token_step
        at = (at + kv_head * self.head_step) * (config.UNIT // 4)
        word = SKIPPED + gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
        x = gl.load(self.ptr + at[:, None] + word[None, :], mask=ok[:, None], other=0)
        scales = key
        if config.FORMAT == "int8":
            scales = gl.load(self.scale_ptr + at, mask=ok, other=0.0)
        return x, scales

    @gluon.jit
    def store(self, ring, stage, PIECE: gl.constexpr, x, tail, scales, scale):
        """Store a piece of a ring's tile, in the layer's dtype."""
        self._store(ring.tiles, stage, PIECE, x, scales, scale)
        if ring.TAIL:
            # The same rows may be in other threads.
            by_row = gl.convert_layout(scales, gl.SliceLayout(1, tail.type.layout))
            self._store(ring.tail, stage, PIECE, tail, by_row, scale)

    @gluon.jit
    def _store(self, tiles, stage, PIECE: gl.constexpr, x, scales, scale):
        FORMAT: gl.constexpr = self.config.FORMAT
        TO: gl.constexpr = tiles.dtype.name
        WORDS: gl.constexpr = tiles.shape[2] // 2
        LAYOUT: gl.constexpr = _words_layout(self.config.COLUMNS)
        ROWS: gl.constexpr = x.shape[0]
        SHAPE: gl.constexpr = [tiles.shape[0], tiles.shape[1], WORDS]
        if (FORMAT == "bfloat16") | (FORMAT == "float16"):
            x = gl.inline_asm_elementwise(
                _from_other(TO), "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
            )
        elif FORMAT != "same":
            ASM: gl.constexpr = _from_int8(TO) if FORMAT == "int8" else _from_fp8(FORMAT, TO)
            if FORMAT == "int8":
                scale = scales[:, None]
            a, b = gl.inline_asm_elementwise(
                ASM, "=r,=r,r,f", [x, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
            )
            x = gl.reshape(gl.join(a, b), [ROWS, WORDS])
        tile = reinterpret(tiles, gl.int32, SHAPE, LAYOUT).index(stage)
        tile.slice(PIECE * ROWS, ROWS, 0).store(x)


@gluon.jit
def copy_keys(
    work, request, first_key, n, keys, values, k_ring, v_ring, CONFIG: gl.constexpr
):  # fmt: skip
    """Copy a work tile's key tiles; the first has number n in the rings."""
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    K_ROWS: gl.constexpr = _piece_rows(BLOCK_N, CONFIG.D, CONFIG.FORMAT)
    V_ROWS: gl.constexpr = _piece_rows(BLOCK_N, CONFIG.D_V, CONFIG.FORMAT)
    MAIN: gl.constexpr = CONFIG.MAIN
    TAIL: gl.constexpr = CONFIG.TAIL
    MAIN_V: gl.constexpr = CONFIG.MAIN_V
    TAIL_V: gl.constexpr = CONFIG.TAIL_V
    K_LAST: gl.constexpr = BLOCK_N // K_ROWS - 1
    V_LAST: gl.constexpr = BLOCK_N // V_ROWS - 1
    kv_head = work.head // CONFIG.GROUP
    k_scale = keys.scale_of(kv_head)
    v_scale = values.scale_of(kv_head)
    end = work.seq_len
    first = work.last_tile * BLOCK_N
    k, k_tail, k_scales = keys.load(request, kv_head, first, first_key, end, K_ROWS, MAIN, TAIL)
    for i in range(0, work.num_tiles + 1):  # values follow one tile later
        first = (work.last_tile - i) * BLOCK_N
        if i < work.num_tiles:
            stage = k_ring.wait_empty(n + i)
            for p in gl.static_range(K_LAST):
                following, tail, scales = keys.load(
                    request, kv_head, first + (p + 1) * K_ROWS, first_key, end, K_ROWS, MAIN, TAIL
                )
                keys.store(k_ring, stage, p, k, k_tail, k_scales, k_scale)
                k, k_tail, k_scales = following, tail, scales
            keys.store(k_ring, stage, K_LAST, k, k_tail, k_scales, k_scale)
            k_ring.fill(stage)
        # Of the next tile; behind the last one, keys that may be loaded as well.
        k, k_tail, k_scales = keys.load(
            request, kv_head, first - BLOCK_N, first_key, end, K_ROWS, MAIN, TAIL
        )
        if i > 0:
            first += BLOCK_N
            v, v_tail, v_scales = values.load(
                request, kv_head, first, first_key, end, V_ROWS, MAIN_V, TAIL_V
            )
            stage = v_ring.wait_empty(n + i - 1)
            for p in gl.static_range(V_LAST):
                following, tail, scales = values.load(
                    request, kv_head, first + (p + 1) * V_ROWS, first_key, end, V_ROWS, MAIN_V,
                    TAIL_V,
                )  # fmt: skip
                values.store(v_ring, stage, p, v, v_tail, v_scales, v_scale)
                v, v_tail, v_scales = following, tail, scales
            values.store(v_ring, stage, V_LAST, v, v_tail, v_scales, v_scale)
            v_ring.fill(stage)
