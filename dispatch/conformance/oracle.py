"""The oracle: attention of one request in float64, and PyTorch's own attention to compare with.

The formulas are those of docs/numerics.md. They share nothing with the backends, so that a mistake
in the reference shows too. `verify`, the shadow check and the benchmark all use this oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

__all__ = ["attention_of_request", "positions_of", "sdpa_of_request", "sees"]

#: Scores that are held at a time; more rows are computed in parts.
_MAX_SCORES = 1 << 24


def positions_of(
    num_queries: int, num_keys: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(num_queries,) int64: the position of each query among the keys; the last one is last."""
    return torch.arange(num_keys - num_queries, num_keys, device=device)


def sees(
    positions: torch.Tensor,
    num_keys: int,
    *,
    causal: bool,
    window: int | None = None,
    sides: tuple[int, int] | None = None,
    chunk: int | None = None,
    ranges: Sequence[tuple[int, int]] = (),
    mask: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """(num_queries, num_keys) bool: which query sees which key.

    Args:
        positions: (num_queries,) int64, of the queries among the keys.
        num_keys: of the request.
        causal: a query sees no later key.
        window: a query sees only the keys closer than this.
        sides: the most that a visible key is before and after its query; -1 for any distance.
        chunk: a query sees only the keys whose position, divided by this, has the same quotient.
        ranges: [start, end) whose tokens also see each other.
        mask: (num_queries, num_keys) bool; False hides a key in any case.
        key_positions: (num_keys,) int64, those of the keys; None for 0, 1 and so on.
    """
    keys = torch.arange(num_keys, device=positions.device)
    if key_positions is not None:
        keys = key_positions
    queries = positions[:, None]
    distance = keys - queries
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed &= distance <= 0
    if window is not None:
        allowed &= distance.abs() < window
    if sides is not None:
        before, after = (math.inf if side < 0 else side for side in sides)
        allowed &= (-distance <= before) & (distance <= after)
    if chunk is not None:
        allowed &= keys.div(chunk, rounding_mode="floor") == queries.div(
            chunk, rounding_mode="floor"
        )
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
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    cap: float | None = None,
    slopes: Sequence[float] | None = None,
    symmetric: bool = False,
    sinks: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request, or of some of its queries, on the device of its tensors.

    Args:
        query: (num_queries, num_heads, head_size) of any dtype.
        key: (num_keys, num_kv_heads, head_size), the same.
        value: (num_keys, num_kv_heads, head_size_v), the same.
        scale: factor on the scores.
        seen: (num_queries, num_keys) bool, from `sees`.
        positions: as for `sees`; None for the last ones.
        key_positions: as for `sees`.
        cap: soft cap of the scores, or None.
        slopes: num_heads slopes, or None.
        symmetric: the slopes multiply |key − query|, negated, not key − query.
        sinks: num_heads further logits, or None.

    Returns:
        output: (num_queries, num_heads, head_size_v) float64; 0 where a query sees no key. It is
            the sum over the keys that a query sees, so a NaN that it does not see adds nothing.
        lse: (num_queries, num_heads) float64, natural logarithm, without sinks; −inf where a
            query sees no key, NaN where all the scores that it sees are −inf.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, head_size_v = value.shape
    output = query.new_zeros(num_queries, num_heads, head_size_v, dtype=torch.float64)
    lse = query.new_full((num_queries, num_heads), -math.inf, dtype=torch.float64)
    if not num_queries or not num_keys:
        return output, lse
    if positions is None:
        positions = positions_of(num_queries, num_keys, query.device)
    if key_positions is None:
        key_positions = torch.arange(num_keys, device=query.device)
    keys, values = (each.double().transpose(0, 1) for each in (key, value))
    broken = (~values.isfinite()).any(-1).any(0).nonzero().flatten().tolist()
    plain = values.nan_to_num(0.0, 0.0, 0.0) if broken else values
    # Queries are (num_kv_heads, heads of each, rows, head_size), scores the same over the keys.
    queries = query.double().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    of_heads = (num_kv_heads, queries.shape[1], 1, 1)

    def per_head(numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=query.device).view(of_heads)

    step = max(1, _MAX_SCORES // (num_heads * num_keys))
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        # The query heads of a KV head become rows of one head, so that no key is repeated.
        products = queries[:, :, rows].flatten(1, 2) @ keys.transpose(1, 2)
        scores = scale * products.unflatten(1, (of_heads[1], -1))
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        if slopes is not None:
            distance = key_positions - positions[rows, None]
            distance = -distance.abs() if symmetric else distance
            scores = scores + per_head(slopes) * distance
        scores = scores.masked_fill(~seen[rows], -math.inf)
        largest = scores.amax(-1, keepdim=True).clamp_min(-1e300)  # a row may see nothing
        weights = (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        sees_any = seen[rows].any(-1)[:, None]
        found = (largest + total.log()).masked_fill(sees_any & (total == 0), math.nan)
        lse[rows] = found.flatten(0, 1)[..., 0].T
        if sinks is not None:
            total = total + (per_head(sinks) - largest).exp()
        sums = (weights.flatten(1, 2) @ plain).unflatten(1, (of_heads[1], -1))
        for place in broken:
            value_ = values[:, place, None, None]  # (num_kv_heads, 1, 1, head_size_v)
            part = weights[..., place, None] * value_.masked_fill(value_.isfinite(), 0.0)
            sums += torch.where(seen[rows, place, None], part, 0.0)
        result = (sums / total).masked_fill(~sees_any, 0.0)
        output[rows] = result.flatten(0, 1).transpose(0, 1)
    return output, lse


def sdpa_of_request(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """The same by PyTorch's `scaled_dot_product_attention`, in the dtype of the query.

    It has no soft cap, ALiBi or sinks.

    Returns:
        (num_queries, num_heads, head_size_v) of the query's dtype; 0 where a query sees no key.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, head_size_v = value.shape
    result = query.new_zeros(num_queries, num_heads, head_size_v)
    if not num_queries or not num_keys:
        return result
    group = num_heads // num_kv_heads
    keys, values = (each.to(query.dtype).transpose(0, 1)[None] for each in (key, value))
    sign = (scale > 0) - (scale < 0)  # PyTorch gives NaN for a scale that is not above 0
    queries = sign * query
    step = max(1, 4 * _MAX_SCORES // (num_heads * num_keys))
    for start in range(0, num_queries, step):
        rows = queries[start : start + step].transpose(0, 1)
        mask = seen[start : start + step].repeat(group, 1)
        found = F.scaled_dot_product_attention(
            rows.reshape(1, num_kv_heads, group * rows.shape[1], -1),
            keys,
            values,
            attn_mask=mask,
            scale=abs(scale) or 1.0,
        ).masked_fill(~mask.any(-1)[:, None], 0.0)
        found = found.reshape(num_heads, rows.shape[1], head_size_v)
        result[start : start + step] = found.transpose(0, 1)
    return result
