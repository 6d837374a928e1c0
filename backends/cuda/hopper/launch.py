"""How the Hopper kernels are launched, and what they are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "BLOCK_M",
    "BLOCK_N",
    "DECODES",
    "DecodeConfig",
    "DecodeLaunch",
    "HEAD_SIZES",
    "MLA_COUNTERS",
    "MLAConfig",
    "PrefillConfig",
]

#: Query tokens in a work tile of the prefill kernel, half of them for each warp group.
BLOCK_M = 128
#: Head size -> keys in a tile: two stages of keys and values fill shared memory.
BLOCK_N = {64: 128, 96: 128, 128: 128, 192: 128, 256: 64}
#: Head size -> that of its values.
HEAD_SIZES = {size: size for size in BLOCK_N} | {192: 128}
#: Counters of a program of the kernel for latents: parts that have arrived, and programs that have
#: seen all of them, for the columns of each warp group.
MLA_COUNTERS = 4
#: The decode kernel's row tiles have at most this many rows; the portable kernel takes more.
MAX_DECODE_ROWS = 32
#: A batch with fewer KV heads for each SM, over all requests, has few.
FEW_KV_HEADS_PER_SM = 0.25
#: Blocks for each SM of the device of decodes next to a prefill, if the number of blocks must not
#: depend on how the SMs are shared. With two, the last ones to run are short.
FIXED_BLOCKS = 2


@dataclass(frozen=True)
class _Config(str):
    """A layer's constants. Not a NamedTuple: as a constexpr, Triton 3.8 takes that apart.

    Also a string, of the same fields: Triton writes all constants as JSON where a hook receives
    what is compiled, as in vLLM's engine.
    """

    NUM_HEADS: int
    NUM_KV_HEADS: int
    GROUP: int
    D: int
    CAUSAL: bool
    WINDOW: bool
    CAP: bool
    ALIBI: bool
    SINKS: bool
    LSE: bool

    def __new__(cls, *args: object, **fields: object) -> Any:
        return super().__new__(cls, f"{cls.__name__} {args} {fields}")


@dataclass(frozen=True)
class PrefillConfig(_Config):
    """What the prefill kernel is compiled for.

    Attributes:
        D_V: elements of a head's values; D of its keys.
        BLOCK_N: keys in a tile.
        BLOCK_SIZE: tokens in a block of the cache; 0 if keys and values are contiguous rows.
        HAS_FRESH: keys of requests without a past are read from the new rows.
        FORMAT: of a cache whose pages TMA cannot read as they are, see copied.py; "" if it can.
        UNIT: bytes of the unit in which the strides of copied pages are given.
        SCALE_STRIDE: from one head's scale to the next, with an fp8 FORMAT.
        STAGES: of the rings of keys and values.
    """

    D_V: int
    BLOCK_N: int
    BLOCK_SIZE: int
    HAS_FRESH: bool
    FORMAT: str = ""
    UNIT: int = 16
    SCALE_STRIDE: int = 0
    STAGES: int = 2

    @property
    def Q_STAGES(self) -> int:
        """Of the ring of queries: those of the next work tile are loaded early, where they fit."""
        return 2 if self.D <= 128 else 1

    @property
    def COLUMNS(self) -> int:
        """Columns of the boxes in which tiles are loaded."""
        return math.gcd(self.D, self.D_V, 64)

    @property
    def MAIN(self) -> int:
        """Columns of keys in the tiles of a ring, a power of two; the others are in its tail."""
        return 1 << self.D.bit_length() - 1

    @property
    def MAIN_V(self) -> int:
        """The same of values."""
        return 1 << self.D_V.bit_length() - 1

    @property
    def TAIL(self) -> int:
        """Columns of keys in the ring's tail."""
        return self.D - self.MAIN

    @property
    def TAIL_V(self) -> int:
        """The same of values."""
        return self.D_V - self.MAIN_V

    @property
    def COPIES(self) -> bool:
        """Whether warps copy the pages, instead of TMA."""
        return bool(self.FORMAT)

    @property
    def PRODUCERS(self) -> int:
        """Warps that load: one tells TMA what to do, four copy."""
        return 4 if self.COPIES else 1

    @property
    def REGISTERS(self) -> int:
        """Of each thread of the two warp groups that compute."""
        if self.COPIES:
            return 208 if self.D > 192 else 200
        return 240

    @property
    def PRODUCER_REGISTERS(self) -> int:
        """Of each thread of the warps that load; all together have 504 for each warp of four."""
        return 504 - 2 * self.REGISTERS if self.COPIES else 32


@dataclass(frozen=True)
class DecodeConfig(_Config):
    """What the decode kernel is compiled for.

    Attributes:
        ROWS: query tokens times query heads of a KV head in a row tile, a multiple of 8.
        KEYS: in a key tile, a multiple of 64.
        BLOCK_SIZE: tokens in a block of the cache.
        STAGES: of a program's rings.
        PROGRAMS: 1, or 2 that share a thread block and nothing else.
        MIN_TILES: a program that works has at least this many key tiles.
        HAS_REQUEST_LIST: the launch takes some of the batch's requests.
        LENGTHS_PER_LOAD: lengths of requests that a program reads at a time.
    """

    ROWS: int
    KEYS: int
    BLOCK_SIZE: int
    STAGES: int
    PROGRAMS: int
    MIN_TILES: int
    HAS_REQUEST_LIST: bool
    LENGTHS_PER_LOAD: int = 128


@dataclass(frozen=True)
class MLAConfig(DecodeConfig):
    """What the kernel for multi-head latent attention is compiled for.

    Attributes:
        BLOCK_N: KEYS, by the name that the prefill kernel has.
        Q_ROWS: rows of queries that are loaded of a work unit: 16, 32 or 64.
        REGISTERS, PRODUCER_REGISTERS: of each thread of a warp group that computes, and of the warp
            that loads.
    """

    BLOCK_N: int = 64
    Q_ROWS: int = 64
    REGISTERS: int = 240
    PRODUCER_REGISTERS: int = 24


@dataclass(frozen=True)
class DecodeLaunch:
    """How the decode kernel is launched.

    Attributes:
        keys: in a tile.
        stages: of a program's rings; one less where a row tile has more than `full_rows` rows.
        min_tiles: a program that works gets at least this many key tiles.
        programs: that share a thread block.
        blocks: on an SM.
    """

    keys: int
    stages: int
    min_tiles: int = 3
    programs: int = 1
    blocks: int = 1
    full_rows: int = 16

    def stages_for(self, rows: int) -> int:
        """Stages that fit into shared memory with this many rows."""
        return self.stages - (rows > self.full_rows)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options: several blocks, of 8 warps each, share an SM's registers."""
        return {"num_warps": 4} | ({"maxnreg": 256 // self.blocks} if self.blocks > 1 else {})


class DecodeLaunches(NamedTuple):
    """Launches for many requests, for few, and for SMs next to those of a prefill."""

    many: DecodeLaunch
    few: DecodeLaunch
    mixed: DecodeLaunch


#: By head size. A plan has room for the parts of as many programs as the portable kernel has.
DECODES = {
    64: DecodeLaunches(
        many=DecodeLaunch(64, 3, blocks=4, full_rows=8),
        few=DecodeLaunch(128, 6, min_tiles=2),
        mixed=DecodeLaunch(128, 3, min_tiles=2, programs=2),
    ),
    128: DecodeLaunches(
        many=DecodeLaunch(64, 3, blocks=2),
        few=DecodeLaunch(128, 3, min_tiles=2),
        mixed=DecodeLaunch(64, 3, programs=2),
    ),
    256: DecodeLaunches(*[DecodeLaunch(64, 3)] * 3),
}
