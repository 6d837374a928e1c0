"""The error of an output: its distance from the oracle, on a sample of the rows of a case.

The oracle gets the keys and values that the cache holds, scales applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import LAYER
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.tolerance import allowance, distance
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

#: Rows of an output, and their values by the oracle.
_Expected = tuple[torch.Tensor, torch.Tensor]

__all__ = ["AccuracyJudge", "exact_rows", "sample_of"]

#: The sample: requests, rows of one, and rows of all requests together.
_MAX_REQUESTS, _MAX_ROWS, _ALL_ROWS, _MIN_ROWS = 128, 256, 4096, 16

#: The sample of a whole layer of latent attention, whose keys are expanded for each head.
_LAYER_REQUESTS, _LAYER_ROWS = 8, 16

#: Elements of the keys of some heads that are held at a time.
_MAX_ELEMENTS = 1 << 25


def sample_of(
    case: Case, max_requests: int = _MAX_REQUESTS, max_rows: int = _MAX_ROWS
) -> dict[int, torch.Tensor]:
    """Request -> (num_rows,) int64, the rows of its query that are compared, on the host.

    Up to 128 requests, evenly spaced from the first to the last, and the longest. Of each as many
    rows as make 4096 together, but 16 to 256: evenly spaced, including the first and the last.
    """
    count = len(case.query_lens)
    longest = max(range(count), key=lambda request: case.seq_lens[request])
    requests = sorted({longest, *_spaced(count, max_requests).tolist()})
    most = min(max_rows, max(_MIN_ROWS, _ALL_ROWS // len(requests)))
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
        #: Of a whole layer of latent attention.
        self._layer = None if case.mla is None else _LayerJudge(inputs)
        #: Rows of the output, and their values by the oracle.
        self._expected: list[_Expected] = []
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

    def error_of(self, output: torch.Tensor, variant: str = "") -> float:
        """The error of an output; infinite with a NaN in it, or if its shape is another.

        All of the output is searched for NaN and infinity, also rows that are not in the sample.

        Args:
            output: (num_tokens, num_heads, head_size); of latent attention, see
                Implementation.prepare.
            variant: of the implementation.
        """
        judge = self if variant != LAYER or self._layer is None else self._layer
        return _error_of(output, judge._expected)

    def allowed_for(self, variant: str) -> float:
        """The error that an output of this variant may have."""
        return self._layer.allowed if variant == LAYER and self._layer else self.allowed


class _LayerJudge:
    """As AccuracyJudge, of a whole layer of latent attention.

    What is expected is the expanded form in float64: each latent is multiplied by each head's
    projections. PyTorch's error is that of the absorbed form in the case's dtype, which rounds the
    absorbed queries and the mixed latents too.
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        starts = inputs.batch.query_start_list
        own_error = 0.0
        self._expected: list[_Expected] = []
        for request, rows in sample_of(case, _LAYER_REQUESTS, _LAYER_ROWS).items():
            expected = _expanded_rows(inputs, request, rows)
            own = distance(_absorbed_rows(inputs, request, rows).double(), expected, cancelled=0.0)
            if math.isfinite(own):
                own_error = max(own_error, own)
            self._expected.append(((rows + starts[request]).to(inputs.device), expected))
        units = 2 if case.is_quantized else 1
        self.allowed = allowance(case.torch_dtype, own_error, units=units)


def _error_of(output: torch.Tensor, rows_and_values: Sequence[_Expected]) -> float:
    if any(output.shape[1:] != values.shape[1:] for _, values in rows_and_values):
        return math.inf
    if not bool(output.isfinite().all()):
        return math.inf
    return max(
        distance(output[rows].double(), expected, cancelled=0.0)
        for rows, expected in rows_and_values
    )


def _projections(inputs: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK (num_heads, qk_nope_head_dim, rank) and W_UV (num_heads, v_head_dim, rank)."""
    case, dims, latent = inputs.case, inputs.case.mla_dims, inputs.latent
    assert dims is not None
    assert latent is not None
    both = latent.kv_b_proj.to(dtype).view(case.num_heads, -1, dims.kv_lora_rank)
    up_k, up_v = both.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=1)
    return up_k, up_v


def _expanded_rows(inputs: Inputs, request: int, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a request by the expanded form in float64.

    Returns:
        (num_rows, num_heads, v_head_dim) float64, on the inputs' device.
    """
    case, dims, latent = inputs.case, inputs.case.mla_dims, inputs.latent
    assert dims is not None
    assert latent is not None
    num_keys = case.seq_lens[request]
    whole = (slice(0, num_keys), slice(None), torch.float64)
    entries = inputs.keys_and_values(request, *whole)[0][:, 0]
    latents, rotated = entries.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
    up_k, up_v = _projections(inputs, torch.float64)
    own = (rows + inputs.batch.query_start_list[request]).to(inputs.device)
    positions = (rows + num_keys - case.query_lens[request]).to(inputs.device)
    seen = oracle.sees(positions, num_keys, causal=case.causal, window=case.sliding_window)
    width = dims.qk_nope_head_dim + dims.qk_rope_head_dim
    step = max(1, _MAX_ELEMENTS // (num_keys * width))
    found = []
    for start in range(0, case.num_heads, step):
        heads = slice(start, start + step)
        nope = torch.einsum("kr,hnr->khn", latents, up_k[heads])
        keys = torch.cat([nope, rotated[:, None].expand(-1, nope.shape[1], -1)], -1)
        values = torch.einsum("kr,hvr->khv", latents, up_v[heads])
        output, _ = oracle.attention_of_request(
            latent.query[own, heads], keys, values, scale=case.scale, seen=seen,
            positions=positions, cap=case.logits_soft_cap,
        )  # fmt: skip
        found.append(output)
    return torch.cat(found, 1)


def _absorbed_rows(inputs: Inputs, request: int, rows: torch.Tensor) -> torch.Tensor:
    """The same rows by the absorbed form, with PyTorch's own attention in the case's dtype."""
    mixed = _sdpa_rows(inputs, request, rows)
    up_v = _projections(inputs, mixed.dtype)[1]
    return torch.bmm(mixed.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)


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
