"""Sliding windows that FlashAttention 3 computes right, by its tiles.

The builds of vLLM 0.23.0 and 0.24.0 give wrong prefills for many windows: some rows see keys that
they should not. The cause, as read in vllm-project/flash-attention (hopper/block.h and
mainloop_fwd_sm90_tma_gmma_ws.hpp, from 2025-10 on): the keys of a query tile are counted from the
first one that the window lets it see, but where softmax and products overlap, the limits between
masked and unmasked key tiles are computed from the whole length. So a key tile that crosses the
diagonal is taken for one that needs no mask. Heads of up to 64 do not overlap there, and are right.

`docs/vendors.md` has what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["QueryKeyTile", "computes_window", "tile_of"]


class QueryKeyTile(NamedTuple):
    """The tile of a windowed prefill in 16 bits.

    Attributes:
        rows: query tokens times query heads of a KV head.
        keys: keys.
    """

    rows: int
    keys: int


#: The largest head_size, and the tile. Smaller heads than these have a mask on every key tile.
_TILES = (
    (96, QueryKeyTile(192, 128)),
    (128, QueryKeyTile(128, 128)),
    (192, QueryKeyTile(128, 96)),
    (256, QueryKeyTile(128, 64)),
)
_LARGEST_MASKED_HEAD = 64


def tile_of(head_size: int) -> QueryKeyTile | None:
    """The tile for heads of a size; None where every key tile has a mask, or there is no kernel."""
    if head_size <= _LARGEST_MASKED_HEAD:
        return None
    return next((tile for largest, tile in _TILES if head_size <= largest), None)


def computes_window(spec: AttentionSpec) -> bool:
    """Whether FlashAttention 3 computes a layer's window right, for requests of any lengths.

    A key tile without a mask must lie before the first key that its query tile's first row does
    not see. So no tile may end between the last key of the first row and that of the last row,
    unless the window is too short for a tile without a mask.
    """
    tile = tile_of(spec.head_size)
    if spec.sliding_window is None or tile is None:
        return True
    # Keys from the first that the tile's first row sees to the last.
    seen = spec.sliding_window if spec.causal else 2 * spec.sliding_window - 1
    group = spec.num_heads // spec.num_kv_heads
    return all(
        seen <= tile.keys + tokens or (seen + tokens - 2) // tile.keys * tile.keys <= seen
        for tokens in _tokens_of_tile(tile.rows, group)
    )


def _tokens_of_tile(rows: int, group: int) -> set[int]:
    """How many tokens the query tiles of a request can reach over, `group` rows being one token's.

    The tiles after `group` of them begin with a token again.
    """
    starts = range(0, rows * group, rows)
    return {(start + rows - 1) // group + 1 - start // group for start in starts}
