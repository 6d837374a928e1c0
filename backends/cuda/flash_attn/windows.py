"""The sliding windows that FlashAttention 3 computes correctly, derived from its tile sizes.

The builds in vLLM 0.23.0 and 0.24.0 compute wrong prefills for many windows: some rows see keys
outside their window. The cause, as read in vllm-project/flash-attention (hopper/block.h and
mainloop_fwd_sm90_tma_gmma_ws.hpp, since 2025-10): the keys of a query tile are counted from the
first key inside its window. But where softmax and matrix products overlap, the boundary between
masked and unmasked key tiles is computed from the whole length, so a key tile that crosses the
diagonal gets no mask. Heads of up to 64 do not overlap the two and are correct.

The measurements are in `docs/vendors.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["QueryKeyTile", "computes_window", "tile_of"]


class QueryKeyTile(NamedTuple):
    """The tile of a windowed 16-bit prefill.

    Attributes:
        rows: query tokens times query heads per KV head.
        keys: keys.
    """

    rows: int
    keys: int


#: The largest head_size of each tile. Smaller heads than these mask every key tile.
_TILES = (
    (96, QueryKeyTile(192, 128)),
    (128, QueryKeyTile(128, 128)),
    (192, QueryKeyTile(128, 96)),
    (256, QueryKeyTile(128, 64)),
)
_LARGEST_MASKED_HEAD = 64


def tile_of(head_size: int) -> QueryKeyTile | None:
    """The tile for this head size; None if every key tile is masked, or there is no kernel."""
    if head_size <= _LARGEST_MASKED_HEAD:
        return None
    return next((tile for largest, tile in _TILES if head_size <= largest), None)


def computes_window(spec: AttentionSpec) -> bool:
    """Whether FlashAttention 3 computes the layer's window correctly for requests of any length.

    An unmasked key tile must end before the first key that the first row of its query tile does
    not see. So no key tile may end between the last visible key of the first row and that of the
    last row, unless the window is too short to contain an unmasked tile.
    """
    tile = tile_of(spec.head_size)
    if tile is None:
        return True
    if spec.sliding_window is None:
        return spec.window_size is None  # of two sizes no window was measured
    # Keys from the first to the last one that the tile's first row sees.
    visible = spec.sliding_window if spec.causal else 2 * spec.sliding_window - 1
    group = spec.num_heads // spec.num_kv_heads
    return all(
        visible <= tile.keys + tokens or (visible + tokens - 2) // tile.keys * tile.keys <= visible
        for tokens in _tokens_per_tile(tile.rows, group)
    )


def _tokens_per_tile(rows: int, group: int) -> set[int]:
    """How many tokens a query tile can span. A token has `group` rows, so after that many tiles
    one starts at a token boundary again.
    """
    starts = range(0, rows * group, rows)
    return {(start + rows - 1) // group + 1 - start // group for start in starts}
