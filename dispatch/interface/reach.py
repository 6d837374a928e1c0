"""How far queries see: windows with two sides, and chunks of positions."""

from __future__ import annotations

from typing import Any, NamedTuple

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError

__all__ = ["Reach", "folded_window"]


class Reach(NamedTuple):
    """Which positions a query sees, apart from causality, ranges and masks.

    Attributes:
        left: positions before the query's own; None for all.
        right: positions after it; None for all.
        chunk: positions are divided into chunks of this many, and it sees only its own chunk's;
            None for one chunk.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, layer: Any) -> Reach:
        """That of a layer: an AttentionSpec or an AttentionImpl."""
        left = right = None
        if layer.sliding_window is not None:
            left = layer.sliding_window - 1
            right = None if layer.causal else left
        elif layer.window_size is not None:
            left, right = (None if side < 0 else side for side in layer.window_size)
        return cls(left, right, layer.attention_chunk)

    def first(self, position: int) -> int:
        """The first position that the query at this one may see, at least 0."""
        first = 0 if self.left is None else position - self.left
        if self.chunk is not None:
            first = max(first, position // self.chunk * self.chunk)
        return max(first, 0)


def folded_window(
    causal: bool, sliding_window: int | None, window_size: Any
) -> tuple[bool, int | None, tuple[int, int] | None]:
    """(causal, sliding_window, window_size) of a layer, each in the one form that a layer has.

    A window_size that causality and sliding_window can state becomes these: (W - 1, W - 1) is
    sliding_window=W, (W - 1, 0) the same with causal=True, (-1, -1) no window. A causal query sees
    nothing to its right, so the right side of a causal layer counts for nothing.

    Raises:
        InvalidInputError: window_size is not a pair of integers from -1 on, or both are given.
    """
    if window_size is None:
        return causal, sliding_window, None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise InvalidInputError(
            f"window_size={shown(window_size)} is not a pair (left, right): the keys that a query "
            "sees before and after its own, -1 for all."
        )
    left, right = (as_int("window_size", side, -1) for side in window_size)
    if sliding_window is not None:
        raise InvalidInputError(
            f"sliding_window={sliding_window} and window_size={(left, right)} are both given. "
            "Give one; sliding_window=W is window_size=(W - 1, W - 1)."
        )
    causal = causal or right == 0
    if causal or left == right:
        return causal, None if left < 0 else left + 1, None
    return causal, None, (left, right)
