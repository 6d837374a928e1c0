"""An oracle that shares no code with the library and computes one score at a time.

It is written from the documentation in plain Python floats (which are float64), for a few dozen
tokens. REFERENCE in float64 is compared with it, and is the oracle for larger cases.
"""

from __future__ import annotations

import math

import torch


def sees(
    query_position, key_position, *, causal, window=None, sides=None, chunk=None, ranges=(),
    mask_value=True,
):  # fmt: skip
    """Whether a query sees a key."""
    allowed = True
    if causal and key_position > query_position:
        allowed = False
    if window is not None and not -window < key_position - query_position < window:
        allowed = False
    if sides is not None:
        left, right = sides
        if left != -1 and key_position < query_position - left:
            allowed = False
        if right != -1 and key_position > query_position + right:
            allowed = False
    if chunk is not None and key_position // chunk != query_position // chunk:
        allowed = False
    for start, end in ranges:
        if start <= query_position < end and start <= key_position < end:
            allowed = True
    return allowed and mask_value


def attention_of_request(
    query, key, value, *, scale, causal, window=None, cap=None, slopes=None, sinks=None,
    ranges=(), mask=None, symmetric=False, sides=None, chunk=None, shard=None,
):  # fmt: skip
    """Output (num_queries, num_heads, head_size_v) and lse (num_queries, num_heads), float64.

    `query`, `key` and `value` belong to one request: (tokens, heads, size). With `symmetric`, ALiBi
    depends on the distance to either side. `shard` is (offset, step, length) where the keys are
    only some of a request's: key j is at position offset + step * j.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, head_size_v = value.shape
    output = torch.zeros(num_queries, num_heads, head_size_v, dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -math.inf, dtype=torch.float64)
    queries, keys, values = query.tolist(), key.tolist(), value.tolist()
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        for row in range(num_queries):
            offset, step, length = shard or (0, 1, num_keys)
            position = length - num_queries + row
            scores = {}
            for column in range(num_keys):
                if not sees(
                    position,
                    offset + step * column,
                    causal=causal,
                    window=window,
                    sides=sides,
                    chunk=chunk,
                    ranges=ranges,
                    mask_value=mask is None or bool(mask[row, column]),
                ):
                    continue
                products = zip(queries[row][head], keys[column][kv_head], strict=True)
                score = scale * math.fsum(q * k for q, k in products)
                if cap is not None:
                    score = cap * math.tanh(score / cap)
                if slopes is not None:
                    distance = offset + step * column - position
                    score += slopes[head] * (-abs(distance) if symmetric else distance)
                scores[column] = score
            if not scores:
                continue
            sink = [] if sinks is None else [sinks[head]]
            largest = max([*scores.values(), *sink])
            weights = {column: math.exp(score - largest) for column, score in scores.items()}
            total = math.fsum(weights.values()) + sum(math.exp(s - largest) for s in sink)
            lse[row, head] = largest + math.log(math.fsum(weights.values()))
            for element in range(head_size_v):
                output[row, head, element] = (
                    math.fsum(w * values[c][kv_head][element] for c, w in weights.items()) / total
                )
    return output, lse


def expanded_latents(latent, rotated, weight, *, num_heads, nope, size_v):
    """Keys and values of multi-head latent attention, head by head, (tokens, heads, size).

    `weight` is kv_b_proj's: for each head the rows of its keys, then those of its values.
    """
    rows = weight.double().view(num_heads, nope + size_v, -1)
    keys, values = [], []
    for token in range(len(latent)):
        projected = [head_rows @ latent[token].double() for head_rows in rows]
        keys.append(
            torch.stack([torch.cat([both[:nope], rotated[token].double()]) for both in projected])
        )
        values.append(torch.stack([both[nope:] for both in projected]))
    rope = rotated.shape[-1]
    return (
        torch.stack(keys) if keys else torch.zeros(0, num_heads, nope + rope).double(),
        torch.stack(values) if values else torch.zeros(0, num_heads, size_v).double(),
    )
