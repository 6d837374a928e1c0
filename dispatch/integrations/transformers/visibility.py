"""Which keys a query sees, read off the mask function that a model builds.

transformers gives a mask function `f(batch, head, query, key) -> bool` to the function that makes
the mask. It is evaluated here at positions far from both ends of a long sequence, so that windows
longer than any model's are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Visibility", "read_visibility"]

#: The queries that are asked: neither is a multiple of a usual chunk, and one ends a chunk of 8192.
_QUERIES = (1_000_003, 1_007_615)
_NUM_KEYS = 2_100_000


@dataclass(frozen=True)
class Visibility:
    """What a query sees.

    Attributes:
        causal: it sees no later key.
        left, right: the most keys before and after its own that it sees; None for all.
        chunk: it sees only keys of its own chunk of this many positions.
        problem: why the mask cannot be described; then the other attributes mean nothing.
    """

    causal: bool
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    problem: str | None = None


def read_visibility(
    mask_function: Callable[..., Any], local_size: int | None, chunk: int | None
) -> Visibility:
    """What the queries of a layer see.

    Args:
        mask_function: `f(batch, head, query, key)`, of integer tensors that broadcast.
        local_size: the size of the window or chunk, where the model gives one with the mask.
        chunk: the model's `attention_chunk_size`, if it has one.
    """
    sides = []
    for query in _QUERIES:
        try:
            seen = _visible(mask_function, query)
        except (IndexError, RuntimeError, NotImplementedError, TypeError, ValueError):
            seen = None  # it reads tensors of the batch, which have no values or too few
        if seen is None:
            # The mask of chunks reads the padding of the batch, which has no values on meta.
            if chunk is not None and local_size == chunk:
                return Visibility(causal=True, chunk=chunk)
            return _problem("its mask depends on the batch")
        if not seen.numel():
            return _problem("its mask hides all keys of a query")
        first, last = int(seen[0]), int(seen[-1])
        if last - first + 1 != seen.numel() or not first <= query <= last:
            return _problem("the keys that its mask shows a query are not consecutive")
        sides.append((query, first, last))
    return _from_sides(sides, chunk)


def _problem(why: str) -> Visibility:
    return Visibility(causal=False, problem=why)


def _visible(mask_function: Callable[..., Any], query: int) -> torch.Tensor | None:
    """The keys that a query sees; None if the function has no values, as on the meta device."""
    zero = torch.zeros((), dtype=torch.long)
    keys = torch.arange(_NUM_KEYS)
    result = mask_function(zero, zero, torch.tensor(query), keys)
    if not isinstance(result, torch.Tensor):
        result = torch.tensor(bool(result))
    if result.device.type == "meta":
        return None
    return result.expand(_NUM_KEYS).nonzero().flatten()


def _from_sides(sides: list[tuple[int, int, int]], chunk: int | None) -> Visibility:
    lefts = {None if first == 0 else query - first for query, first, _ in sides}
    rights = {None if last == _NUM_KEYS - 1 else last - query for query, _, last in sides}
    causal = rights == {0}
    if len(lefts) == len(rights) == 1:
        return Visibility(causal=causal, left=lefts.pop(), right=rights.pop())
    if causal and chunk and all(first == query - query % chunk for query, first, _ in sides):
        return Visibility(causal=True, chunk=chunk)
    return _problem("what its mask shows depends on the position of the query")
