"""Attention in plain PyTorch: the definition that all backends follow.

    score  = scale * (query . key)
    score  = cap * tanh(score / cap)                     with a soft cap
    score += slope * (key position - query position)     with ALiBi; symmetric: slope * -abs(...)
    score  = -inf                                        where the query does not see the key
    output = softmax(score) @ value                      a sink is one more score, without a value

Queries are at the end of the keys: the last query has the position of the last key, unless the
positions of both are given.

Scaled dot-product attention: arXiv:1706.03762. Shared KV heads: arXiv:2305.13245. Sliding window:
arXiv:2004.05150. Soft cap: arXiv:2408.00118. ALiBi: arXiv:2108.12409. Sinks: arXiv:2309.17453.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["attend", "compute_dtype", "soft_capped", "split_scale", "visible", "without_autocast"]

#: Scores held at a time; longer queries are computed in pieces.
_MAX_SCORES = 1 << 26
#: In float32, a cap below the first computes the same as the first, and one above the second the
#: same as none, up to rounding.
_SMALLEST_CAP, _LARGEST_CAP = 2.0**-100, 2.0**100
#: Of a smaller scale, a part is applied to the query.
_SMALLEST_SCALE = 2.0**-60

T = TypeVar("T")


def without_autocast(method: Callable[..., T]) -> Callable[..., T]:
    """Disable autocast in an impl's method whose second argument is a tensor."""

    @functools.wraps(method)
    def run(self: Any, layer: Any, query: torch.Tensor, *args: Any, **options: Any) -> T:
        kind = query.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return method(self, layer, query, *args, **options)
        with torch.autocast(kind, enabled=False):
            return method(self, layer, query, *args, **options)

    return run


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    causal: bool,
    sliding_window: int | None = None,
    window_size: tuple[int, int] | None = None,
    attention_chunk: int | None = None,
    ranges: Sequence[tuple[int, int]] = (),
    custom_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(..., num_queries, num_keys) bool: which query sees which key.

    Args:
        query_positions: (..., num_queries) int64, positions of the queries among the keys.
        key_positions: (..., num_keys) int64.
        causal: a query sees no later key.
        sliding_window: with causal, a query sees this many tokens up to itself; without, the keys
            closer than this on either side.
        window_size: (left, right), the keys that a query sees before and after its own; −1 for all.
        attention_chunk: a query sees only keys of its own chunk of this many positions, from
            position // attention_chunk * attention_chunk on.
        ranges: tokens of one range [start, end) see each other, regardless of the above.
        custom_mask: (..., num_queries, num_keys) bool; False hides a key, regardless of the above.
    """
    q = query_positions[..., :, None]
    k = key_positions[..., None, :]
    seen = (k <= q) if causal else torch.ones_like(k <= q)
    if sliding_window is not None:
        seen &= k > q - sliding_window
        if not causal:
            seen &= k < q + sliding_window
    left, right = window_size or (-1, -1)
    if left >= 0:
        seen &= k >= q - left
    if right >= 0:
        seen &= k <= q + right
    if attention_chunk is not None:
        seen &= k // attention_chunk == q // attention_chunk
    for start, end in ranges:
        seen |= (q >= start) & (q < end) & (k >= start) & (k < end)
    if custom_mask is not None:
        seen &= custom_mask
    return seen


def split_scale(scale: float, smallest: float = _SMALLEST_SCALE) -> tuple[float, float]:
    """(factor, remaining scale above 0): the query is multiplied by the factor.

    For kernels that take only positive scales, and for scales so small that products with them
    would vanish: the remaining one is at least about `smallest`. A scale of 0 goes into the factor,
    so a NaN or infinity in the query becomes NaN.
    """
    if scale == 0:
        return 0.0, 1.0
    factor, scale = math.copysign(1.0, scale), abs(scale)
    if scale < smallest:  # a power of two does not round
        exponent = math.frexp(scale / smallest)[1] - 1
        factor, scale = math.ldexp(factor, exponent), math.ldexp(scale, -exponent)
    return factor, scale


def soft_capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(scores / cap), for any positive finite cap."""
    if scores.dtype == torch.float32:
        if cap > _LARGEST_CAP:
            return scores
        cap = max(cap, _SMALLEST_CAP)
    return cap * torch.tanh(scores / cap)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int | None = None,
    window_size: tuple[int, int] | None = None,
    attention_chunk: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_symmetric: bool = False,
    sinks: torch.Tensor | None = None,
    ranges: Sequence[tuple[int, int]] = (),
    custom_mask: torch.Tensor | None = None,
    positions: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request, in the dtype of its arguments.

    Args:
        query: (num_queries, num_heads, head_size).
        key: (num_keys, num_kv_heads, head_size).
        value: (num_keys, num_kv_heads, head_size_v).
        scale: factor on the scores.
        causal, sliding_window, window_size, attention_chunk, ranges, custom_mask: as for `visible`.
        logits_soft_cap: cap of the scores, or None.
        alibi_slopes: (num_heads,), or None.
        alibi_symmetric: the slopes multiply -abs(distance).
        sinks: (num_heads,), or None.
        positions: those of the queries, (num_queries,) int64, and of the keys, (num_keys,) int64;
            None for 0, 1 and so on, with the queries at the end.

    Returns:
        output: (num_queries, num_heads, head_size_v). 0 for a query that sees no key. NaN for a
            query that sees a score of NaN or +inf, or only scores of −inf.
        lse: (num_queries, num_heads), natural log, without the sinks. −inf for a query that sees no
            key, and NaN for a query with scores as above.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)
    if positions is None:
        key_positions = torch.arange(num_keys, device=query.device)
        query_positions = torch.arange(num_queries, device=query.device) + num_keys - num_queries
    else:
        query_positions, key_positions = positions

    def piece(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = scale * torch.einsum("qhd,khd->hqk", query[rows], key)
        if logits_soft_cap is not None:
            scores = soft_capped(scores, logits_soft_cap)
        if alibi_slopes is not None:
            distance = key_positions - query_positions[rows, None]
            if alibi_symmetric:
                distance = -distance.abs()
            scores = scores + alibi_slopes[:, None, None] * distance
        seen = visible(
            query_positions[rows],
            key_positions,
            causal=causal,
            sliding_window=sliding_window,
            window_size=window_size,
            attention_chunk=attention_chunk,
            ranges=ranges,
            custom_mask=None if custom_mask is None else custom_mask[rows],
        )
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
        weights = torch.exp(scores - total[..., None]).masked_fill(~seen, 0.0)
        # A value that no query sees may be freed memory, and zero times NaN is NaN.
        used = value.masked_fill(~seen.any(0)[:, None, None], 0.0)
        sees_any = seen.any(1)
        output = torch.einsum("hqk,khd->qhd", weights, used)
        # Only a row without keys has an infinite lse: for any other, the weights were NaN.
        lse = lse.masked_fill(lse.isinf() & sees_any, float("nan"))
        return output.masked_fill(~sees_any[:, None, None], 0.0), lse.T

    step = max(1, _MAX_SCORES // max(1, num_heads * num_keys))
    pieces = [piece(slice(row, row + step)) for row in range(0, num_queries, step)]
    outputs, lses = zip(*pieces, strict=True)
    return torch.cat(outputs), torch.cat(lses)
