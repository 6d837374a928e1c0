"""How the producers of the Hopper kernels load pages of the cache by TMA, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate, load_columns

__all__ = ["Pages"]


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
        """The blocks of a tile's boxes. Keys out of range are masked later: any block will do.

        Each is a number of its own, so that their loads do not wait for each other.
        """
        PAGE: gl.constexpr = self.desc.block_type.shape[0]
        found = ()
        for p in gl.static_range(CONFIG.BLOCK_N // PAGE):
            at = gl.minimum(gl.maximum(first + p * PAGE, first_key), last_key)
            found = found + (gl.load(table + at // CONFIG.BLOCK_SIZE),)
        return found

    @gluon.jit
    def load(self, ring, n, blocks, first, kv_head, CONFIG: gl.constexpr):
        """Load a key tile as the ring's tile n."""
        PAGE: gl.constexpr = self.desc.block_type.shape[0]
        PER_TILE: gl.constexpr = CONFIG.BLOCK_N // PAGE
        head = kv_head * self.head_rows
        column = kv_head * self.head_columns
        stage = ring.acquire(n)
        for p in gl.static_range(PER_TILE):
            row = blocks[p] * self.block_rows + head + (first + p * PAGE) % CONFIG.BLOCK_SIZE
            load_columns(ring, stage, ring.full.index(stage), self.desc, row, column, p, PER_TILE)
