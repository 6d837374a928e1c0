"""The work tiles of the Hopper prefill kernel, and how programs and warps share them: in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dispatch.backends.cuda.hopper.stream_k import VECTOR
from attn_dispatch.backends.cuda.hopper.tma_ring import aggregate

__all__ = ["Schedule", "WorkTile"]


@gluon.constexpr_function
def _one_value(warps):
    """The layout of one value that all of the producer's warps have."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@aggregate
class WorkTile:
    """128 query tokens of a request and one head, and the tiles of keys that they see.

    Attributes:
        q_start, q_len, seq_len: the request's query rows and its number of keys.
        first_token: of the work tile, among the request's query tokens.
        first_position: of that token.
        last_tile, num_tiles: the last key tile and how many there are; they are taken backwards.
        num_right, num_left: how many at the end and at the beginning are seen in part.
    """

    head: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    seq_len: gl.tensor
    first_token: gl.tensor
    first_position: gl.tensor
    last_tile: gl.tensor
    num_tiles: gl.tensor
    num_right: gl.tensor
    num_left: gl.tensor

    @gluon.jit
    def first_key(self, window, WINDOW: gl.constexpr):
        """The first key that a query of the request sees. Blocks before it may be freed."""
        if WINDOW:
            return gl.maximum(self.seq_len - self.q_len - window + 1, 0)
        else:
            return 0


@aggregate
class Schedule:
    """The list of work tiles, and how the producer tells the consumers which one is next.

    `tickets` are written and read like the queries: after the producer has acquired a stage of
    their ring, and once they have arrived.
    """

    tiles_ptr: gl.tensor
    seq_lens_ptr: gl.tensor
    counters_ptr: gl.tensor
    num_tiles: gl.tensor
    window: gl.tensor
    tickets: gl.shared_memory_descriptor
    config: gl.constexpr

    @gluon.jit
    def first(self):
        """For the producer: the index of the program's first work tile."""
        return gl.program_id(0)

    @gluon.jit
    def take(self):
        """For the producer: the index of the next work tile that no program has taken."""
        taken = gl.atomic_add(self.counters_ptr, 1, sem="relaxed", scope="gpu")
        return gl.num_programs(0) + taken

    @gluon.jit
    def finish(self):
        """For the producer: the last one to end leaves the counters at zero."""
        ended = gl.atomic_add(self.counters_ptr + 1, 1, sem="relaxed", scope="gpu")
        if ended == gl.num_programs(0) - 1:
            gl.store(self.counters_ptr, 0)
            gl.store(self.counters_ptr + 1, 0)

    @gluon.jit
    def work_tile(self, index):
        """For the producer: (a work tile of the list, its request)."""
        config: gl.constexpr = self.config
        ptr = self.tiles_ptr + index // config.NUM_HEADS * 4
        request = gl.load(ptr + 3)
        work = self._work(
            index % config.NUM_HEADS, gl.load(ptr), gl.load(ptr + 1),
            gl.load(self.seq_lens_ptr + request), gl.load(ptr + 2),
        )  # fmt: skip
        return work, request

    @gluon.jit
    def send(self, stage, head, q_start, q_len, seq_len, first_token):
        """For the producer: write a stage's ticket; a head of −1 says that there are no more."""
        ONE: gl.constexpr = _one_value(self.config.PRODUCERS)
        values = (head, q_start, q_len, seq_len, first_token)
        for i in gl.static_range(5):
            self.tickets.index(stage * 5 + i).store(gl.full([1], values[i], gl.int32, ONE))

    @gluon.jit
    def receive(self, stage):
        """For the consumers: the work tile of a stage's ticket."""
        at = stage * 5
        return self._work(
            self._read(at), self._read(at + 1), self._read(at + 2), self._read(at + 3),
            self._read(at + 4),
        )  # fmt: skip

    @gluon.jit
    def _read(self, i):
        return gl.max(self.tickets.index(i).load(VECTOR), 0)

    @gluon.jit
    def _work(self, head, q_start, q_len, seq_len, first_token):
        config: gl.constexpr = self.config
        past = seq_len - q_len
        first = past + first_token
        last = past + gl.minimum(first_token + 128, q_len) - 1
        lo = 0  # [lo, hi) is seen by some row, [full_lo, full_hi) by every row
        full_lo = 0
        hi = seq_len
        full_hi = seq_len
        if config.CAUSAL:
            hi = gl.minimum(seq_len, last + 1)
            full_hi = gl.minimum(seq_len, first + 1)
        if config.WINDOW:
            lo = gl.maximum(0, first - self.window + 1)
            full_lo = gl.maximum(0, last - self.window + 1)
            if not config.CAUSAL:
                hi = gl.minimum(seq_len, last + self.window)
                full_hi = gl.minimum(seq_len, first + self.window)
        first_tile = lo // config.BLOCK_N
        end_tile = (gl.maximum(hi, 0) + config.BLOCK_N - 1) // config.BLOCK_N
        end_tile = gl.maximum(end_tile, first_tile)
        full_end = gl.maximum(full_hi, 0) // config.BLOCK_N
        full_end = gl.maximum(gl.minimum(full_end, end_tile), first_tile)
        full_first = gl.minimum((full_lo + config.BLOCK_N - 1) // config.BLOCK_N, full_end)
        num_left = gl.to_tensor(0)
        if config.WINDOW:
            num_left = full_first - first_tile
        return WorkTile(
            head, q_start, q_len, seq_len, first_token, first, end_tile - 1,
            end_tile - first_tile, end_tile - full_end, num_left,
        )  # fmt: skip
