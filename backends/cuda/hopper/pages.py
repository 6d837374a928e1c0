"""How the producers of the Hopper kernels load pages of the cache by TMA, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate, load_columns

__all__ = ["Pages"]

#: The layout of a tile's block numbers, which the producer's one warp reads.
_BLOCKS = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@aggregate
class Pages:
    """Keys or values of a paged cache as a matrix: `paged_tma.PageMatrix`, and the block table.

    Attributes:
        desc: boxes of 16, 32 or 64 rows, which divide a page, by 32 or 64 columns.
        table_ptr, table_stride: the block table.
        block_rows, head_rows, head_columns: rows or columns of the matrix between one block and the
            next, and one KV head and the next.
    """

    desc: tma.tensor_descriptor
    table_ptr: gl.tensor
    table_stride: gl.tensor
    block_rows: gl.tensor
    head_rows: gl.tensor
    head_columns: gl.tensor

    @gluon.jit
    def table_of(self, request):
        """Where the request's row of the block table begins."""
        return self.table_ptr + request.to(gl.int64) * self.table_stride

    @gluon.jit
    def blocks(self, table, first, first_key, last_key, CONFIG: gl.constexpr):
        """The blocks of a tile's boxes. Keys out of range are masked later: any block will do."""
        PAGE: gl.constexpr = self.desc.block_type.shape[0]
        PER_TILE: gl.constexpr = CONFIG.BLOCK_N // PAGE
        key = first + gl.arange(0, PER_TILE, _BLOCKS) * PAGE
        at = gl.minimum(gl.maximum(key, first_key), last_key)
        return gl.load(table + at // CONFIG.BLOCK_SIZE)

    @gluon.jit
    def row_of(self, blocks, p: gl.constexpr, first, CONFIG: gl.constexpr):
        """The matrix row of the first head's box p of a tile."""
        PAGE: gl.constexpr = self.desc.block_type.shape[0]
        box = gl.arange(0, CONFIG.BLOCK_N // PAGE, _BLOCKS)
        block = gl.sum(gl.where(box == p, blocks, 0), 0)
        return block * self.block_rows + (first + p * PAGE) % CONFIG.BLOCK_SIZE

    @gluon.jit
    def load(self, ring, n, blocks, first, kv_head, CONFIG: gl.constexpr):
        """Load a key tile as the ring's tile n."""
        PAGE: gl.constexpr = self.desc.block_type.shape[0]
        PER_TILE: gl.constexpr = CONFIG.BLOCK_N // PAGE
        column = kv_head * self.head_columns
        stage = ring.acquire(n)
        for p in gl.static_range(PER_TILE):
            row = self.row_of(blocks, p, first, CONFIG) + kv_head * self.head_rows
            load_columns(ring, stage, ring.full.index(stage), self.desc, row, column, p, PER_TILE)
