"""attention() without classes, and merge_states()."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import InvalidInputError, UnsupportedError, attention, merge_states
from attn_dispatch.interface.quantization import is_fp8
from attn_dispatch.runtime import functional
from support.cases import INT8, Case, Step, layer_spec
from support.strategies import cases

LENS = {"query_lens": (1, 5, 3), "seq_lens": (9, 5, 8)}


def call(step, **more):
    """attention() with a step's tensors."""
    spec, batch = step.spec, step.batch
    has_scales = step.kv_cache is not None and is_fp8(step.kv_cache.dtype)
    return attention(
        step.query,
        step.key,
        step.value,
        query_lens=step.case.query_lens,
        seq_lens=step.case.seq_lens,
        kv_cache=step.kv_cache,
        block_table=batch.block_table,
        slot_mapping=batch.slot_mapping,
        scale=step.scale,
        causal=spec.causal,
        sliding_window=spec.sliding_window,
        window_size=spec.window_size,
        attention_chunk=spec.attention_chunk,
        key_positions=batch.key_positions,
        logits_soft_cap=spec.logits_soft_cap,
        alibi_slopes=step.slopes,
        alibi=spec.alibi or None,
        sinks=step.sinks,
        custom_mask=batch.custom_mask,
        k_scale=step.layer._k_scale if has_scales else 1.0,
        v_scale=step.layer._v_scale if has_scales else 1.0,
        return_lse=spec.returns_lse,
        **more,
    )


def as_a_function_takes_it(case):
    """The case without what only a layer has, and with one head size where the cache has all."""
    changes = {"attn_type": "decoder", "bidirectional_ranges": False, "kv_sharing": False}
    if not case.brings_keys:
        changes["head_size_v"] = case.spec.head_size
    new_lens = None if case.spec.block_size else case.seq_lens
    spec = case.spec.replace(**changes)
    seqs = case.seq_lens
    if spec.block_size:
        seqs = tuple(max(q, s) if s else 0 for q, s in zip(case.query_lens, seqs, strict=True))
    return case.replace(spec=spec, ranges=(), padding=0, new_lens=new_lens, seq_lens=seqs)


@given(case=cases("REFERENCE", dtypes=(torch.float32, torch.float64)))
def test_any_step_agrees_with_the_reference(device, case):
    case = as_a_function_takes_it(case)
    if device.type != "cpu":
        case = case.replace(spec=case.spec.replace(alibi=False, dtype=torch.float32))
    step = Step(case, device)
    result = call(step)
    expected, expected_lse = step.expected()
    if step.spec.returns_lse:
        result, lse = result
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-5)
    step.check(result, expected)


def test_one_request_needs_no_lengths():
    step = Step(Case(spec=layer_spec(block_size=None), query_lens=(3,), seq_lens=(7,)))
    step.check(attention(step.query, step.key, step.value, scale=step.scale))


def test_seq_lens_default_to_query_lens():
    step = Step(Case(spec=layer_spec(block_size=None), query_lens=(3, 4), seq_lens=(3, 4)))
    output = attention(step.query, step.key, step.value, query_lens=[3, 4], scale=step.scale)
    step.check(output)


def test_slots_default_to_the_block_table():
    step = Step(Case(spec=layer_spec(), **LENS))
    output = attention(
        step.query, step.key, step.value, **LENS, kv_cache=step.kv_cache,
        block_table=step.batch.block_table, scale=step.scale,
    )  # fmt: skip
    step.check(output)


def test_the_scale_is_one_over_the_root_of_the_head_size():
    query, key, value = torch.randn(3, 5, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(
        attention(query, key, value), attention(query, key, value, scale=0.25)
    )


def test_the_output_is_written_to_the_given_tensor():
    step = Step(Case(spec=layer_spec(), **LENS))
    out = torch.empty(9, 4, 8, dtype=torch.float64)
    assert call(step, out=out) is out
    step.check(out)


def test_a_cache_that_holds_everything_needs_no_new_keys():
    step = Step(Case(spec=layer_spec(), **LENS, brings_keys=False))
    step.check(call(step))


@pytest.mark.parametrize("brings_keys", [True, False])
def test_an_int8_cache_is_recognized_by_its_dtype(brings_keys):
    spec = layer_spec(kv_cache_dtype=INT8, head_size_v=40 if brings_keys else 8)
    step = Step(Case(spec=spec, **LENS, brings_keys=brings_keys))
    step.check(call(step))


def test_a_cache_with_values_of_another_size():
    """Without new values, their size is that of the cache, which is that of the keys."""
    step = Step(Case(spec=layer_spec(), query_lens=(1,), seq_lens=(5,), brings_keys=False))
    assert call(step).shape == (1, 4, 8)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_the_backend_may_be_named(backend):
    step = Step(Case(spec=layer_spec(), **LENS))
    step.check(call(step, backend=backend))


def test_a_backend_without_support_is_rejected():
    query, key, value = torch.randn(3, 5, 4, 16)
    with pytest.raises(UnsupportedError, match=r"logits_soft_cap=30\.0 is not supported"):
        attention(query, key, value, logits_soft_cap=30.0, backend="TORCH_SDPA")


Q, CACHE = torch.zeros(5, 4, 8), torch.zeros(3, 2, 4, 2, 8)
INT8_CACHE = torch.zeros(3, 2, 4, 2, 32, dtype=torch.int8)
K, TABLE = torch.zeros(5, 2, 8), torch.tensor([[0, 1]]).int()
BAD_CALLS = {
    "a batch dimension": ((Q[None], K, K), {}, "query must be a tensor of 3 .* without a batch"),
    "no tensor": ((Q.numpy(), K, K), {}, "query is a ndarray; it must be a dense torch.Tensor"),
    "no keys": ((Q,), {}, "Give key and value, or kv_cache and block_table"),
    "key without value": ((Q, K), {}, "key and value go together"),
    "cache without block table": ((Q, K, K), {"kv_cache": CACHE}, "go together"),
    "block table without cache": ((Q, K, K), {"block_table": TABLE}, "go together"),
    "cache of another rank": (
        (Q, K, K),
        {"kv_cache": CACHE[0], "block_table": TABLE},
        "kv_cache must be a tensor of 5",
    ),
    "lengths that miss queries": ((Q, K, K), {"query_lens": [2, 2]}, "adds up to 4"),
    "lengths that miss keys": (
        (Q, K, K),
        {"seq_lens": [4]},
        "key has 5 rows, and seq_lens adds up to 4",
    ),
    "heads that do not divide": ((Q, K[:, [0, 0, 0]], K[:, [0, 0, 0]]), {}, "not a multiple"),
    "a mask of the wrong size": ((Q, K, K), {"custom_mask": torch.ones(24).bool()}, "custom_mask"),
    "slopes for other heads": ((Q, K, K), {"alibi_slopes": [1.0]}, "alibi_slopes has shape"),
    "a scale without fp8": ((Q, K, K), {"k_scale": 0.5}, "for an fp8 kv_cache, and there is none"),
    "a scale of another shape": (
        (Q, K, K),
        {"kv_cache": CACHE.to(torch.float8_e5m2), "block_table": TABLE, "k_scale": torch.ones(3)},
        r"k_scale has shape \(3,\); it must be \(\) or \(2,\)",
    ),
    "a scale with an int8 cache": (
        (Q, K, K),
        {"kv_cache": INT8_CACHE, "block_table": TABLE, "k_scale": torch.ones(2)},
        "this int8 one has its own for each token and head; leave them out",
    ),
    "an int8 cache without room for scales": (
        (Q, K, K),
        {"kv_cache": CACHE.to(torch.int8), "block_table": TABLE},
        r"2, 32\): 8 elements, filled up to 16s, and their scale",
    ),
    "a cache of integers": (
        (Q, K, K),
        {"kv_cache": CACHE.int(), "block_table": TABLE},
        "must be a floating-point type, or torch.int8",
    ),
    "an output of another shape": ((Q, K, K), {"out": Q[:4]}, "output has shape"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_an_invalid_call_is_rejected(what):
    arguments, more, message = BAD_CALLS[what]
    with pytest.raises(InvalidInputError, match=message):
        attention(*arguments, **more)


def test_the_examples_run():
    names = {"torch": torch, "attention": attention}
    results = doctest.testmod(functional, extraglobs=names)
    assert results.attempted >= 3
    assert results.failed == 0


def test_every_argument_is_documented():
    for function in (attention, merge_states):
        doc = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert f"    {name}: " in doc


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
def test_the_default_device_and_dtype_are_ignored(backend, kv_cache_dtype, misleading_defaults):
    spec = layer_spec(dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    step = Step(Case(spec=spec, **LENS))
    expected = step.expected()[0]
    with misleading_defaults():
        output = call(step, backend=backend)
    step.check(output, expected)


def test_merging_ignores_the_default_device(misleading_defaults):
    output, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    with misleading_defaults():
        merged, _ = merge_states([output, output], [lse, lse], torch.full((2,), -1e9, device="cpu"))
    torch.testing.assert_close(merged, output)


# merge_states: parts of the keys, attended to apart.


def in_parts(query, key, value, bounds, **more):
    """(outputs, lses) over key[a:b] for each a, b; all keys are visible to all queries."""
    results = [
        attention(query, key[a:b], value[a:b], causal=False, return_lse=True, **more)
        for a, b in bounds
    ]
    return [output for output, _ in results], [lse for _, lse in results]


@given(
    cuts=st.lists(st.integers(0, 12), max_size=4),
    with_sinks=st.booleans(),
    soft_cap=st.sampled_from([None, 2.0]),
)
def test_parts_merge_into_the_whole(cuts, with_sinks, soft_cap):
    """Parts of no keys at all included; a sink counts once, however many parts there are."""
    query, key, value = (torch.randn(n, h, 8) for n, h in ((5, 4), (12, 2), (12, 2)))
    sinks = torch.randn(4) if with_sinks else None
    edges = [0, *sorted(cuts), 12]
    bounds = list(zip(edges, edges[1:], strict=False))
    outputs, lses = in_parts(query, key, value, bounds, logits_soft_cap=soft_cap)
    merged, lse = merge_states(outputs, lses, sinks)
    whole, whole_lse = attention(
        query, key, value, causal=False, logits_soft_cap=soft_cap, sinks=sinks, return_lse=True
    )
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


def test_merged_states_can_be_merged_again():
    query, key, value = torch.randn(3, 6, 4, 8)
    outputs, lses = in_parts(query, key, value, [(0, 1), (1, 4), (4, 6)])
    first, first_lse = merge_states(outputs[:2], lses[:2])
    merged, lse = merge_states([first, outputs[2]], [first_lse, lses[2]])
    at_once, lse_at_once = merge_states(outputs, lses)
    torch.testing.assert_close(merged, at_once)
    torch.testing.assert_close(lse, lse_at_once)


def test_the_output_of_a_part_without_keys_is_ignored():
    """A kernel may leave anything in the output of a row that it did not compute."""
    output, lse = torch.randn(2, 1, 4), torch.tensor([[0.5], [-torch.inf]])
    garbage = torch.full_like(output, torch.nan)
    merged, merged_lse = merge_states([garbage, output], [torch.full_like(lse, -torch.inf), lse])
    torch.testing.assert_close(merged[0], output[0])
    assert not merged[1].any()
    assert torch.equal(merged_lse, lse)


def test_a_nan_of_a_part_with_keys_stays():
    output, lse = torch.randn(2, 1, 4), torch.zeros(2, 1)
    merged, _ = merge_states([output, torch.full_like(output, torch.nan)], [lse, lse - 500])
    assert bool(merged.isnan().all())


def test_large_scores_do_not_overflow():
    output = torch.randn(2, 1, 1, 4)
    merged, lse = merge_states(list(output), [torch.full((1, 1), 1e4), torch.full((1, 1), 1e4)])
    torch.testing.assert_close(merged, output.mean(0))
    assert lse.item() == pytest.approx(1e4 + 0.693, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_merged_output_has_the_dtype_of_the_parts(dtype):
    output, lse = torch.randn(3, 2, 4).to(dtype), torch.randn(3, 2)
    merged, merged_lse = merge_states([output, output], [lse, lse])
    assert merged.dtype == dtype
    assert merged_lse.dtype == torch.float32
    torch.testing.assert_close(merged, output)
    assert merge_states([output], [lse.double()])[1].dtype == torch.float64


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "0 outputs and 0 lses"),
        ([torch.zeros(3, 2, 4)], [], "1 outputs and 0 lses"),
        ([torch.zeros(3, 2, 4)], [torch.zeros(2, 3)], "The parts differ"),
        ([torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)], [torch.zeros(3, 2)] * 2, "The parts differ"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(outputs, lses, message):
    with pytest.raises(InvalidInputError, match=message):
        merge_states(outputs, lses)
