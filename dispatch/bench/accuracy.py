"""Who is right: attention in float64 by formulas of its own, and how far from it one may be.

The oracle reads the keys and values that the cache holds, scales applied. Large cases are sampled,
by a fixed rule: see `sample_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

__all__ = ["AccuracyJudge", "exact_rows", "sample_of"]

#: The sample: requests, rows of one, and rows of all requests together.
_MAX_REQUESTS, _MAX_ROWS, _ALL_ROWS, _MIN_ROWS = 128, 256, 4096, 16

#: Elements of one operand that are held at a time, and scores.
_MAX_ELEMENTS, _MAX_SCORES = 1 << 25, 1 << 24


def sample_of(case: Case) -> dict[int, torch.Tensor]:
    """Request -> (num_rows,) int64, the rows of its query that are looked at, on the host.

    Up to 128 requests, evenly spaced from the first to the last, and the longest. Of each as many
    rows as make 4096 together, but 16 to 256: evenly spaced, the first and the last among them.
    """
    count = len(case.query_lens)
    longest = max(range(count), key=lambda request: case.seq_lens[request])
    requests = sorted({longest, *_spaced(count, _MAX_REQUESTS).tolist()})
    most = min(_MAX_ROWS, max(_MIN_ROWS, _ALL_ROWS // len(requests)))
    return {request: _spaced(case.query_lens[request], most) for request in requests}


def _spaced(count: int, most: int) -> torch.Tensor:
    if count <= most:
        return torch.arange(count, device="cpu")
    steps = torch.linspace(0, count - 1, most, dtype=torch.float64, device="cpu")
    spaced: torch.Tensor = steps.round().long().unique()
    return spaced


class AccuracyJudge:
    """Holds the oracle's rows of a case, and the error that is allowed.

    The error of a row and head is the largest difference from the oracle, relative to the oracle's
    largest magnitude there; that of an output is the largest of these.

    Attributes:
        sampled_requests, sampled_rows: how much was computed.
        sdpa_error: of PyTorch's scaled_dot_product_attention in the case's dtype, over the same
            keys and rows; of a layer with soft cap, ALiBi or sinks, without these.
        allowed: twice that, and one unit in the last place; two where PyTorch's own attention
            does not compute all of the case (soft cap, ALiBi, sinks, a cache of eight bits).
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        sample = sample_of(case)
        self._rows = {
            request: rows + inputs.batch.query_start_list[request]
            for request, rows in sample.items()
        }
        self._expected = {r: exact_rows(inputs, r, rows) for r, rows in sample.items()}
        self.sampled_requests = len(sample)
        self.sampled_rows = sum(len(rows) for rows in sample.values())
        beyond_sdpa = case.alibi or case.sinks or case.logits_soft_cap is not None
        self.sdpa_error = 0.0
        for request, rows in sample.items():
            expected = self._expected[request]
            if beyond_sdpa:
                expected = exact_rows(inputs, request, rows, plain=True)
            own = _distance(_sdpa_rows(inputs, request, rows), expected)
            if math.isfinite(own):  # else it excuses nothing
                self.sdpa_error = max(self.sdpa_error, own)
        ulp = max(torch.finfo(case.torch_dtype).eps, 1e-5)
        self.allowed = 2 * self.sdpa_error + ulp * (1 + bool(beyond_sdpa or case.is_quantized))

    def error_of(self, output: torch.Tensor) -> float:
        """The error of an output, (num_tokens, num_heads, head_size); infinite with a NaN in it.

        All of the output is searched for NaN and infinity, also what is not in the sample.
        """
        if not bool(output.isfinite().all()):
            return math.inf
        return max(
            _distance(output[rows.to(output.device)].double(), self._expected[request])
            for request, rows in self._rows.items()
        )


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    largest = expected.abs().amax(-1)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    found = ((actual - expected).abs().amax(-1) / largest).max()
    return float(found) if bool(found.isfinite()) else math.inf


def _visible(case: Case, request: int, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(num_rows, num_keys) bool: which of the rows sees which key."""
    first, end = (bound[rows].to(device)[:, None] for bound in case.key_ranges(request))
    keys = torch.arange(case.seq_lens[request], device=device)
    return (keys >= first) & (keys < end)


def _head_groups(case: Case, request: int) -> Iterator[tuple[slice, slice]]:
    """KV heads that are worked off together, and their query heads."""
    group = case.num_heads // case.num_kv_heads
    fit = max(1, _MAX_ELEMENTS // (case.seq_lens[request] * case.head_size))
    for start in range(0, case.num_kv_heads, fit):
        stop = min(start + fit, case.num_kv_heads)
        yield slice(start, stop), slice(start * group, stop * group)


def _key_chunks(case: Case, request: int, heads: slice) -> Iterator[slice]:
    step = max(1, _MAX_ELEMENTS // (case.head_size * (heads.stop - heads.start)))
    step = max(1, step // case.block_size) * case.block_size
    for start in range(0, case.seq_lens[request], step):
        yield slice(start, min(start + step, case.seq_lens[request]))


def exact_rows(
    inputs: Inputs, request: int, rows: torch.Tensor, *, plain: bool = False
) -> torch.Tensor:
    """Attention of some rows of one request in float64.

    Args:
        inputs: the case with tensors.
        request: which.
        rows: (num_rows,) int64 of the request's query, on the host.
        plain: leave soft cap, ALiBi and sinks out.

    Returns:
        (num_rows, num_heads, head_size) float64, on the inputs' device.
    """
    case, device = inputs.case, inputs.device
    shape = (len(rows), case.num_heads, case.head_size)
    result = torch.zeros(shape, dtype=torch.float64, device=device)
    for kv_heads, heads in _head_groups(case, request):
        scores_per_row = (heads.stop - heads.start) * case.seq_lens[request]
        step = max(1, _MAX_SCORES // scores_per_row)
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            result[some, heads] = _exact(inputs, request, rows[some], kv_heads, heads, plain)
    return result


def _exact(
    inputs: Inputs,
    request: int,
    rows: torch.Tensor,
    kv_heads: slice,
    heads: slice,
    plain: bool,
) -> torch.Tensor:
    """`exact_rows` for some heads: scores over all keys at once, keys and values by chunks."""
    case, device = inputs.case, inputs.device
    chunks = list(_key_chunks(case, request, kv_heads))
    start = inputs.batch.query_start_list[request]
    query = inputs.query[(rows + start).to(device), heads].double()
    query = query.unflatten(1, (kv_heads.stop - kv_heads.start, -1))  # KV heads, heads of each

    def stored(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.keys_and_values(request, keys, kv_heads, torch.float64)

    products = [torch.einsum("rhgd,khd->hgrk", query, stored(keys)[0]) for keys in chunks]
    scores = case.scale * torch.cat(products, -1).flatten(0, 1)  # (heads, rows, keys)
    if case.logits_soft_cap is not None and not plain:
        scores = case.logits_soft_cap * torch.tanh(scores / case.logits_soft_cap)
    if inputs.slopes is not None and not plain:
        keys = torch.arange(case.seq_lens[request], device=device)
        positions = (rows + case.seq_lens[request] - case.query_lens[request]).to(device)
        distance = (keys - positions[:, None]).double()
        if case.alibi == ALIBI_SYMMETRIC:
            distance = -distance.abs()
        scores = scores + inputs.slopes[heads].double()[:, None, None] * distance
    scores = scores.masked_fill(~_visible(case, request, rows, device), -math.inf)
    largest = scores.amax(-1, keepdim=True).clamp_min(-1e30)  # a row may see nothing
    sinks = None
    if inputs.sinks is not None and not plain:
        sinks = inputs.sinks[heads].double()[:, None, None]
        largest = torch.maximum(largest, sinks)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    weights = (weights / total.clamp_min(1e-300)).unflatten(0, query.shape[1:3])
    result = torch.zeros_like(query)
    for keys_ in chunks:
        result += torch.einsum("hgrk,khd->rhgd", weights[..., keys_], stored(keys_)[1])
    return result.flatten(1, 2)


def _sdpa_rows(inputs: Inputs, request: int, rows: torch.Tensor) -> torch.Tensor:
    """The same rows by PyTorch's own attention in the case's dtype, as float64."""
    case, device = inputs.case, inputs.device
    group, num_keys = case.num_heads // case.num_kv_heads, case.seq_lens[request]
    shape = (len(rows), case.num_heads, case.head_size)
    result = torch.zeros(shape, dtype=torch.float64, device=device)
    start = inputs.batch.query_start_list[request]
    step = max(1, 4 * _MAX_SCORES // (group * num_keys))
    for kv_heads, heads in _head_groups(case, request):
        keys, values = (
            t.transpose(0, 1)[None]
            for t in inputs.keys_and_values(request, slice(0, num_keys), kv_heads, case.torch_dtype)
        )
        for begin in range(0, len(rows), step):
            some = rows[begin : begin + step]
            seen = _visible(case, request, some, device)
            query = inputs.query[(some + start).to(device), heads].transpose(0, 1)
            # The heads of one KV head become rows of one head: no key is repeated.
            query = query.reshape(1, kv_heads.stop - kv_heads.start, group * len(some), -1)
            mask = seen.repeat(group, 1)
            found = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=case.scale
            )
            found = found.masked_fill(~mask.any(-1)[:, None], 0.0).double()
            found = found.reshape(heads.stop - heads.start, len(some), -1)
            result[begin : begin + step, heads] = found.transpose(0, 1)
    return result
