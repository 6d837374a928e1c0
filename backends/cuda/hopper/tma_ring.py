"""The ring of tiles between the warp that loads by TMA and the warp groups that compute, in Gluon.

Also the layouts of both kernels, and the names that differ between Triton 3.6 and 3.9.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language import core

__all__ = [
    "TmaRing",
    "aggregate",
    "barrier",
    "load_columns",
    "load_tile",
    "make_ring",
    "mma_layout",
    "reinterpret",
    "row_layout",
    "tile_layout",
]

# These names changed after Triton 3.6, 3.6 and 3.8.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_descriptor = gl.shared_memory_descriptor
reinterpret = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret


def aggregate(cls):
    """`gluon.aggregate`, which came with Triton 3.8; until then a class needs an `__init__`.

    FIELDS are the names of its fields, in order: the interpreter of Gluon needs them.
    """
    made = _aggregated(cls)
    made.FIELDS = tuple(cls.__annotations__)
    return made


def _aggregated(cls):
    if hasattr(gluon, "aggregate"):
        return gluon.aggregate(cls)

    def init(self, *values):
        for name, value in zip(cls.__annotations__, values, strict=True):
            setattr(self, name, value)

    init.__triton_builtin__ = True
    cls.__init__ = init
    return core._aggregate(cls)


@aggregate
class TmaRing:
    """A ring of STAGES stages in shared memory. Tile number n is in stage FIRST + n % STAGES.

    `full` and `empty` have a barrier for each stage. A barrier's phase flips each time that its
    stage is filled or released, so tile n waits for the parity of n // STAGES. Shapes are powers of
    two: where columns are not, `tail` has the last TAIL of them.
    """

    tiles: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    FIRST: gl.constexpr
    STAGES: gl.constexpr
    TILE_BYTES: gl.constexpr
    TAIL: gl.constexpr

    @gluon.jit
    def ring(self, INDEX: gl.constexpr):
        """One of the rings that `make_ring` has made with this one."""
        FIRST: gl.constexpr = INDEX * self.STAGES
        return TmaRing(
            self.tiles, self.tail, self.full, self.empty, FIRST, self.STAGES, self.TILE_BYTES,
            self.TAIL,
        )  # fmt: skip

    @gluon.jit
    def wait_empty(self, n):
        """For the producer: wait until tile n can be loaded, and return its stage."""
        stage = self.FIRST + n % self.STAGES
        mbarrier.wait(self.empty.index(stage), ((n // self.STAGES) & 1) ^ 1)
        return stage

    @gluon.jit
    def acquire(self, n):
        """For the producer: `wait_empty`, and announce the bytes of the tile."""
        stage = self.wait_empty(n)
        mbarrier.expect(self.full.index(stage), self.TILE_BYTES)
        return stage

    @gluon.jit
    def fill(self, stage):
        """For the producer's warps: they have stored the stage's tile, without TMA."""
        fence_async_shared()
        mbarrier.arrive(self.full.index(stage))

    @gluon.jit
    def wait(self, n):
        """For a consumer: wait until tile n is loaded, and return its stage."""
        stage = self.FIRST + n % self.STAGES
        mbarrier.wait(self.full.index(stage), (n // self.STAGES) & 1)
        return stage

    @gluon.jit
    def release(self, stage):
        """For a consumer: the stage can be loaded again."""
        mbarrier.arrive(self.empty.index(stage))


@gluon.jit
def make_ring(
    dtype: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    D: gl.constexpr, LAYOUT: gl.constexpr, CONSUMERS: gl.constexpr, RINGS: gl.constexpr = 1,
    TAIL: gl.constexpr = 0,
):  # fmt: skip
    """A ring of TILES tiles (ROWS, D + TAIL) of 16-bit values, TILES // STAGES in each stage.

    It is the first of RINGS rings in the same arrays, which take less shared memory than an array
    for each. A fence must follow, before warp_specialize.
    """
    tiles = gl.allocate_shared_memory(dtype, [RINGS * TILES, ROWS, D], LAYOUT)
    tail = tiles
    if TAIL:
        tail = gl.allocate_shared_memory(dtype, [RINGS * TILES, ROWS, TAIL], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(RINGS * STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return TmaRing(
        tiles, tail, full, empty, 0, STAGES, TILES // STAGES * ROWS * (D + TAIL) * 2, TAIL
    )


@gluon.jit
def load_columns(
    ring, tile, full, desc, row, column, BOX: gl.constexpr = 0, BOXES: gl.constexpr = 1
):
    """For the producer: load a box of a tile's rows, all columns.

    In shared memory a tile is the boxes of its columns, one after the other, and each of these its
    BOXES boxes of rows.
    """
    ROWS: gl.constexpr = desc.block_type.shape[0]
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    NUMBER: gl.constexpr = ring.tiles.shape[2] // WIDTH
    ALL: gl.constexpr = ring.tiles.shape[0] * NUMBER * BOXES
    boxes = reinterpret(ring.tiles, desc.dtype, [ALL, ROWS, WIDTH], desc.layout)
    for i in gl.static_range(NUMBER):
        place = (tile * NUMBER + i) * BOXES + BOX
        load_tile(desc, [row, column + i * WIDTH], full, boxes.index(place))
    if ring.TAIL:
        MORE: gl.constexpr = ring.TAIL // WIDTH
        REST: gl.constexpr = ring.tiles.shape[0] * MORE * BOXES
        boxes = reinterpret(ring.tail, desc.dtype, [REST, ROWS, WIDTH], desc.layout)
        for i in gl.static_range(MORE):
            place = (tile * MORE + i) * BOXES + BOX
            load_tile(desc, [row, column + (NUMBER + i) * WIDTH], full, boxes.index(place))


@gluon.constexpr_function
def tile_layout(columns):
    """The layout of a tile of 16-bit values that is loaded in boxes of 32 or 64 columns."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def mma_layout(n):
    """The layout of a warp group's product with n columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def row_layout(n):
    """(rows, n) over 4 warps: a thread has 8 neighbours of a row, 16 bytes of 16-bit values."""
    lanes = min(32, n // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
