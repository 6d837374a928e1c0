"""The oracle: attention of one request in float64, by formulas of its own.

Written from docs/numerics.md, and sharing nothing with the backends: a mistake in the reference
must show too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["attention_of_request", "sees"]


def sees(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None = None,
    ranges: Sequence[tuple[int, int]] = (),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(num_queries, num_keys) bool: which query sees which key; the last query has the last key.

    Args:
        num_queries: of the request.
        num_keys: of the request.
        causal: a query sees no later key.
        window: a query sees the keys closer than this.
        ranges: [start, end) whose tokens see each other besides.
        mask: (num_queries, num_keys) bool; False hides a key whatever the above says.
    """
    keys = torch.arange(num_keys, device="cpu")
    queries = torch.arange(num_queries, device="cpu")[:, None] + (num_keys - num_queries)
    distance = keys - queries
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device="cpu")
    if causal:
        allowed &= distance <= 0
    if window is not None:
        allowed &= distance.abs() < window
    for start, end in ranges:
        in_range = [(tokens >= start) & (tokens < end) for tokens in (queries, keys)]
        allowed |= in_range[0] & in_range[1]
    return allowed if mask is None else allowed & mask


def attention_of_request(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    seen: torch.Tensor,
    cap: float | None = None,
    slopes: Sequence[float] | None = None,
    symmetric: bool = False,
    sinks: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request.

    Args:
        query: (num_queries, num_heads, head_size) float64 on the CPU.
        key: (num_keys, num_kv_heads, head_size), the same.
        value: (num_keys, num_kv_heads, head_size_v), the same.
        scale: factor on the scores.
        seen: (num_queries, num_keys) bool, of `sees`.
        cap: soft cap of the scores, or None.
        slopes: num_heads slopes, or None.
        symmetric: the slopes count distances, not signed ones.
        sinks: num_heads further logits, or None.

    Returns:
        output: (num_queries, num_heads, head_size_v) float64; 0 where a query sees no key. It is
            the sum over the keys that a query sees, so a NaN that it does not see adds nothing.
        lse: (num_queries, num_heads) float64, natural logarithm, sinks left out; −inf where a
            query sees no key, NaN where all the scores that it sees are −inf.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, head_size_v = value.shape
    output = torch.zeros(num_queries, num_heads, head_size_v, dtype=torch.float64, device="cpu")
    lse = torch.full((num_queries, num_heads), -math.inf, dtype=torch.float64, device="cpu")
    if not num_queries or not num_keys:
        return output, lse
    first = num_keys - num_queries
    distance = (torch.arange(num_keys) - torch.arange(first, num_keys)[:, None]).double()
    if symmetric:
        distance = -distance.abs()
    sees_any = seen.any(1)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = scale * (query[:, head] @ key[:, kv_head].T)
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        if slopes is not None:
            scores = scores + slopes[head] * distance
        scores[~seen] = -math.inf
        largest = scores.amax(1, keepdim=True).clamp_min(-1e300)  # a row may see nothing
        weights = (scores - largest).exp()
        total = weights.sum(1)
        lse[:, head] = largest[:, 0] + total.log()
        lse[sees_any & (total == 0), head] = math.nan
        if sinks is not None:
            total = total + (sinks[head] - largest[:, 0]).exp()
        sums = weights @ value[:, kv_head].nan_to_num(0.0, 0.0, 0.0)
        broken = ~value[:, kv_head].isfinite()
        for place in broken.any(1).nonzero().flatten().tolist():
            part = torch.where(broken[place], value[place, kv_head], 0.0)
            sums += torch.where(seen[:, place, None], weights[:, place, None] * part, 0.0)
        output[sees_any, head] = (sums / total[:, None])[sees_any]
    return output, lse
