"""REFERENCE in float64 agrees with the independent oracle, for every feature and pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attn_dispatch.interface.types import AttentionType
from support.cases import FP8, INT8, MEMORY, Case, Step, layer_spec
from support.feature_cases import FEATURES, PAIRS, case_of
from support.strategies import cases

ENCODER_TYPES = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)

#: What each feature changes of a layer; the batch below has decodes, prefills, chunks and nothing.


def assert_is_naive(step, returned):
    """Assert that output and lse, if it is returned, are those of the scalar oracle."""
    expected, expected_lse = step.naive()
    output, lse = returned if step.spec.returns_lse else (returned, None)
    torch.testing.assert_close(output[: len(expected)], expected, rtol=0, atol=1e-12)
    if lse is not None:
        assert lse.dtype == torch.float32
        lse = lse[: len(expected)].double()
        torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feature", ["none", *FEATURES])
def test_a_feature_agrees_with_the_oracle(feature):
    step = Step(case_of(*([] if feature == "none" else [feature])))
    assert_is_naive(step, step.run("REFERENCE"))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_of_features_agrees_with_the_oracle(pair):
    step = Step(case_of(*pair))
    assert_is_naive(step, step.run("REFERENCE"))


@pytest.mark.parametrize("kv_cache_dtype", FP8)
@pytest.mark.parametrize("kv_scales", ["per_tensor", "per_head"])
def test_every_fp8_type_agrees_with_the_oracle(kv_cache_dtype, kv_scales):
    spec = layer_spec(kv_cache_dtype=kv_cache_dtype, kv_scales=kv_scales)
    step = Step(Case(spec=spec, query_lens=(1, 4), seq_lens=(7, 6)))
    assert_is_naive(step, step.run("REFERENCE"))


@pytest.mark.parametrize("head_size", [1, 8, 15, 16, 17, 64])
@pytest.mark.parametrize("head_size_v", [1, 16, 33])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_int8_rows_of_any_size_agree_with_the_oracle(head_size, head_size_v, layout):
    sizes = {"head_size": head_size, "head_size_v": head_size_v}
    spec = layer_spec(kv_cache_dtype=INT8, kv_cache_layout=layout, **sizes)
    step = Step(Case(spec=spec, query_lens=(1, 4), seq_lens=(7, 6)))
    assert_is_naive(step, step.run("REFERENCE"))


@pytest.mark.parametrize("attn_type", ENCODER_TYPES, ids=str)
@pytest.mark.parametrize("window", [None, 2])
def test_encoders_see_both_ways(attn_type, window):
    spec = layer_spec(attn_type=attn_type, block_size=None, sliding_window=window)
    step = Step(Case(spec=spec, query_lens=(4, 0, 6), seq_lens=(4, 0, 6)))
    assert_is_naive(step, step.run("REFERENCE"))


def test_cross_attention_reads_new_and_cached_keys():
    spec = layer_spec(attn_type=AttentionType.ENCODER_DECODER)
    step = Step(Case(spec=spec, query_lens=(3, 1, 2), seq_lens=(7, 5, 0), new_lens=(7, 0, 0)))
    assert_is_naive(step, step.run("REFERENCE"))


def test_cross_attention_decodes_without_new_keys():
    spec = layer_spec(attn_type=AttentionType.ENCODER_DECODER)
    step = Step(Case(spec=spec, query_lens=(1, 1), seq_lens=(7, 5), brings_keys=False))
    assert_is_naive(step, step.run("REFERENCE"))


@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory_layout_is_read(memory):
    step = Step(case_of().replace(memory=memory, padding=2))
    assert_is_naive(step, step.run("REFERENCE"))


def test_an_empty_batch_gives_an_empty_result():
    step = Step(Case(spec=layer_spec(returns_lse=True), query_lens=(), seq_lens=()))
    output, lse = step.run("REFERENCE")
    assert output.shape == (0, 4, 8)
    assert lse.shape == (0, 4)


def test_queries_before_the_first_key_are_zero():
    spec = layer_spec(block_size=None, returns_lse=True)
    step = Step(Case(spec=spec, query_lens=(5, 3), seq_lens=(2, 0)))
    output, lse = step.run("REFERENCE")
    assert_is_naive(step, (output, lse))
    assert bool((output[:3] == 0).all())
    assert bool((lse[5:] == -torch.inf).all())


def test_long_queries_are_computed_in_pieces(monkeypatch):
    step = Step(case_of("mask", "alibi").replace(query_lens=(30,), seq_lens=(40,)))
    whole = step.run("REFERENCE")
    monkeypatch.setattr("attn_dispatch.backends.reference.semantics._MAX_SCORES", 4 * 40 * 7)
    torch.testing.assert_close(step.run("REFERENCE"), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_scores_do_not_overflow(backend, dtype):
    step = Step(case_of("mask").replace(spec=layer_spec(dtype=dtype, custom_mask=True)))
    step.query *= 500
    step.queries = [500 * query for query in step.queries]
    output = step.run(backend)
    assert bool(output.isfinite().all())
    allowed = {torch.float64: 1e-11, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(output.double(), step.naive()[0], rtol=0, atol=allowed)


@pytest.mark.parametrize(("sink", "same_as"), [(-torch.inf, "none"), (1e30, "nothing")])
def test_infinite_and_dominant_sinks(sink, same_as):
    step = Step(case_of("sinks", "mask"))
    step.sinks.fill_(sink)
    output = step.run("REFERENCE")
    without = Step(case_of("mask"))
    without.masks, without.batch = step.masks, step.batch
    for name in ("query", "key", "value", "kv_cache"):
        setattr(without, name, getattr(step, name))
    wanted = without.run("REFERENCE") if same_as == "none" else torch.zeros_like(output)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kv_cache_dtype", "nan"), [("auto", torch.nan), (INT8, -1)])
def test_nan_before_the_window_does_not_reach_the_output(kv_cache_dtype, nan):
    """Blocks before the window may be freed, and hold NaN of another request."""
    spec = layer_spec(sliding_window=3, kv_cache_dtype=kv_cache_dtype)
    step = Step(Case(spec=spec, query_lens=(2,), seq_lens=(12,)))
    expected = step.run("REFERENCE")
    first = step.batch.block_table[0, :2].long()  # positions 0 to 7; the window starts at 8
    step.kv_cache[first] = nan
    torch.testing.assert_close(step.run("REFERENCE"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "feature", ["not_causal", "soft_cap", "alibi", "sinks", "fp8_cache", "int8_cache"]
)
def test_lower_precision_agrees_up_to_rounding(dtype, feature):
    case = case_of(feature)
    step = Step(case.replace(spec=case.spec.replace(dtype=dtype)))
    output = step.run("REFERENCE")
    assert output.dtype == dtype
    step.check(output)


def test_result_does_not_depend_on_the_batch():
    case = case_of("alibi").replace(query_lens=(1, 5, 3), seq_lens=(9, 5, 8))
    case = case.replace(spec=case.spec.replace(dtype=torch.bfloat16, batch_invariant=True))
    step = Step(case)
    together = step.run("REFERENCE")
    single = Step(case.replace(query_lens=(1,), seq_lens=(9,)))
    single.query, single.key, single.value = step.query[:1], step.key[:1], step.value[:1]
    single.kv_cache = step.kv_cache
    single._table, single._slots = step._table[:1], step._slots[:1]
    single.batch = single._make_batch()
    assert torch.equal(single.run("REFERENCE"), together[:1])


@given(case=cases("REFERENCE", dtypes=(torch.float64,), max_query=5, max_past=9))
def test_any_step_agrees_with_the_oracle(case):
    step = Step(case)
    assert_is_naive(step, step.run("REFERENCE"))
