"""The error of an output: its distance from the oracle, on a sample of the rows of a case.

The oracle gets the keys and values that the cache holds, scales applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.tolerance import allowance, distance
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

__all__ = ["AccuracyJudge", "exact_rows", "sample_of"]

#: The sample: requests, rows of one, and rows of all requests together.
_MAX_REQUESTS, _MAX_ROWS, _ALL_ROWS, _MIN_ROWS = 128, 256, 4096, 16

#: Elements of the keys of some heads that are held at a time.
_MAX_ELEMENTS = 1 << 25


def sample_of(case: Case) -> dict[int, torch.Tensor]:
    """Request -> (num_rows,) int64, the rows of its query that are compared, on the host.

    Up to 128 requests, evenly spaced from the first to the last, and the longest. Of each as many
    rows as make 4096 together, but 16 to 256: evenly spaced, including the first and the last.
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
    """The oracle's rows of a case, and the error that is allowed.

    The error of a row and head is the largest difference from the oracle, relative to the oracle's
    largest magnitude there; that of an output is the largest of these.

    Attributes:
        sampled_requests, sampled_rows: the size of the sample.
        sdpa_error: of PyTorch's scaled_dot_product_attention in the case's dtype, over the same
            keys and rows; of a layer with soft cap, ALiBi or sinks, without these.
        allowed: twice that, plus one unit in the last place; two where PyTorch's own attention
            does not compute all of the case (soft cap, ALiBi, sinks, a cache of eight bits).
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        sample = sample_of(case)
        starts = inputs.batch.query_start_list
        self.sampled_requests = len(sample)
        self.sampled_rows = sum(len(rows) for rows in sample.values())
        beyond_sdpa = case.alibi or case.sinks or case.logits_soft_cap is not None
        self.sdpa_error = 0.0
        #: Rows of the output, and their values by the oracle.
        self._expected: list[tuple[torch.Tensor, torch.Tensor]] = []
        for request, rows in sample.items():
            expected = exact_rows(inputs, request, rows)
            self._expected.append(((rows + starts[request]).to(inputs.device), expected))
            if beyond_sdpa:
                expected = exact_rows(inputs, request, rows, plain=True)
            own = distance(_sdpa_rows(inputs, request, rows).double(), expected, cancelled=0.0)
            if math.isfinite(own):  # else it allows nothing
                self.sdpa_error = max(self.sdpa_error, own)
        units = 2 if beyond_sdpa or case.is_quantized else 1
        self.allowed = allowance(case.torch_dtype, self.sdpa_error, units=units)

    def error_of(self, output: torch.Tensor) -> float:
        """The error of an output, (num_tokens, num_heads, head_size); infinite with a NaN in it.

        All of the output is searched for NaN and infinity, also rows that are not in the sample.
        """
        if not bool(output.isfinite().all()):
            return math.inf
        return max(
            distance(output[rows].double(), expected, cancelled=0.0)
            for rows, expected in self._expected
        )


def _calls(
    inputs: Inputs, request: int, rows: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]]:
    """Some query heads, their queries, keys and values; positions of the rows, and what they see.

    As many heads at a time as fit; the others of a long request follow.
    """
    case, num_keys = inputs.case, inputs.case.seq_lens[request]
    group = case.num_heads // case.num_kv_heads
    step = max(1, _MAX_ELEMENTS // (num_keys * case.head_size))
    own = (rows + inputs.batch.query_start_list[request]).to(inputs.device)
    positions = (rows + num_keys - case.query_lens[request]).to(inputs.device)
    seen = oracle.sees(positions, num_keys, causal=case.causal, window=case.sliding_window)
    for start in range(0, case.num_kv_heads, step):
        kv_heads = slice(start, min(start + step, case.num_kv_heads))
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        keys, values = inputs.keys_and_values(request, slice(0, num_keys), kv_heads, dtype)
        yield heads, (inputs.query[own, heads], keys, values), positions, seen


def exact_rows(
    inputs: Inputs, request: int, rows: torch.Tensor, *, plain: bool = False
) -> torch.Tensor:
    """Attention of some rows of one request in float64.

    Args:
        inputs: the case with tensors.
        request: its number.
        rows: (num_rows,) int64 of the request's query, on the host.
        plain: leave soft cap, ALiBi and sinks out.

    Returns:
        (num_rows, num_heads, head_size) float64, on the inputs' device.
    """
    case, found = inputs.case, []
    for heads, tensors, positions, seen in _calls(inputs, request, rows, torch.float64):
        features: dict[str, Any] = {
            "cap": case.logits_soft_cap,
            "slopes": None if inputs.slopes is None else inputs.slopes[heads].tolist(),
            "symmetric": case.alibi == ALIBI_SYMMETRIC,
            "sinks": None if inputs.sinks is None else inputs.sinks[heads].tolist(),
        }
        output, _ = oracle.attention_of_request(
            *tensors,
            scale=case.scale,
            seen=seen,
            positions=positions,
            **({} if plain else features),
        )
        found.append(output)
    return torch.cat(found, 1)


def _sdpa_rows(inputs: Inputs, request: int, rows: torch.Tensor) -> torch.Tensor:
    """The same rows by PyTorch's own attention in the case's dtype."""
    calls = _calls(inputs, request, rows, inputs.case.torch_dtype)
    found = [
        oracle.sdpa_of_request(*tensors, scale=inputs.case.scale, seen=seen)
        for _, tensors, _, seen in calls
    ]
    return torch.cat(found, 1)
