"""NaN and infinity: rows agree with the definition, on every backend here.

The expectation is REFERENCE's, and REFERENCE's own cases are written out. The Triton kernels run
with tiles so small that keys are split and parts are merged.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from attn_dispatch import attention
from attn_dispatch.backends.reference.semantics import attend
from support.triton_cases import SMALL, builder_of, forward, in_words, mixed

NAN, INF = math.nan, math.inf
FIELDS = [
    {},
    {"sliding_window": 6},
    {"causal": False, "sliding_window": 5},
    {"custom_mask": True},
    {"custom_mask": True, "sinks": True},
    {"bidirectional_ranges": True},
    {"alibi": True},
    {"alibi": "symmetric", "causal": False},
    {"sinks": True},
    {"logits_soft_cap": 2.0},
    {"kv_cache_dtype": "int8_per_token_head"},
    {"kv_cache_dtype": "int8_per_token_head", "head_size": 32, "dtype": torch.float16},
    {"kv_cache_dtype": "fp8_e4m3", "head_size": 32, "dtype": torch.float16},
    {"batch_invariant": True},
]
#: Rows of the query or of new keys, and what is there: several requests, others have none.
CASES = {
    "queries of NaN": ("query", [(0, NAN), (5, NAN), (26, NAN), (40, NAN)]),
    "queries of infinity": ("query", [(0, INF), (26, -INF)]),
    "keys of NaN": ("key", [(0, NAN), (1, NAN)]),
    "keys of infinity": ("key", [(3, INF), (27, -INF)]),
}


def broken(step, where, rows):
    """The step with these values in these rows."""
    other = copy.copy(step)
    tensor = getattr(step, where).clone()
    for row, value in rows:
        tensor[row] = value
    setattr(other, where, tensor)
    return other


def of_reference(step):
    from attn_dispatch.selection.registry import registry

    cls = registry.candidates()["REFERENCE"].backend_cls
    cache = None if step.kv_cache is None else step.kv_cache.clone()
    return step.forward(cls, cache)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fields", FIELDS, ids=in_words)
def test_triton_attn_nan_stays_in_its_rows(fields, case):
    step = mixed(**{"dtype": torch.float32, "returns_lse": True, **fields})
    step = broken(step, *CASES[case])
    wanted, wanted_lse = of_reference(step)
    metadata = builder_of(step.spec, device=step.device, **SMALL).build(step.batch)
    output, lse = forward(step, metadata)
    assert torch.equal(output.isnan(), wanted.isnan())
    assert torch.equal(lse.isnan(), wanted_lse.isnan())
    assert torch.equal(lse == -INF, wanted_lse == -INF)
    is_clamped = "fp8" in step.spec.kv_cache_dtype and case == "keys of infinity"
    assert wanted.isnan().any() or is_clamped
    assert not wanted.isnan().all()
    rounding = 1e-4 if step.spec.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output, wanted, atol=rounding, rtol=rounding, equal_nan=True)


@pytest.mark.parametrize("fields", [{}, {"custom_mask": True}, {"sinks": True}], ids=in_words)
def test_triton_attn_where_no_score_is_above_minus_infinity(fields):
    """The products overflow float32: 0 / 0, which a sink makes 0."""
    step = mixed(dtype=torch.float32, returns_lse=True, **fields)
    step = copy.copy(step)
    step.query = step.query.abs() * 1e30
    step.kv_cache = step.kv_cache.clone()
    step.kv_cache[:, 0] = -step.kv_cache[:, 0].abs() * 1e30
    step.key = -step.key.abs() * 1e30
    wanted, wanted_lse = of_reference(step)
    metadata = builder_of(step.spec, device=step.device, **SMALL).build(step.batch)
    output, lse = forward(step, metadata)
    torch.testing.assert_close(output, wanted, equal_nan=True)
    assert torch.equal(lse.isnan(), wanted_lse.isnan())
    assert lse.isnan().any()


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_in_its_rows(backend, dtype, window, name, value):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(6, heads, 16, generator=generator).abs().to(dtype)
        for key, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    tensors[name][2] = value
    output = attention(*tensors.values(), sliding_window=window, backend=backend)
    last = 3 if name == "query" else 6 if window is None else 2 + window
    expected = torch.zeros(6, dtype=torch.bool)
    expected[2:last] = True
    assert torch.equal(output.isnan().all(-1).all(-1), expected)
    assert torch.equal(output.isnan().any(-1).any(-1), expected)


def test_row_without_keys_is_0_for_any_query():
    query, key = torch.full((3, 1, 4), NAN), torch.ones(1, 1, 4)
    output, lse = attend(query, key, key, scale=1.0, causal=True)
    assert torch.equal(output[:2], torch.zeros(2, 1, 4))
    assert (lse[:2] == -INF).all()
    assert output[2].isnan().all()
    assert lse[2].isnan().all()


@pytest.mark.parametrize(("sink", "is_nan"), [(None, True), (0.5, False), (-INF, True)])
def test_scores_of_minus_infinity(sink, is_nan):
    query, key, value = torch.ones(1, 1, 4), torch.full((2, 1, 4), -INF), torch.ones(2, 1, 4)
    sinks = None if sink is None else torch.tensor([sink])
    output, lse = attend(query, key, value, scale=1.0, causal=True, sinks=sinks)
    assert bool(output.isnan().all()) is is_nan
    assert lse.isnan().all()
