"""Multi-head latent attention: absorbed, expanded and the scalar oracle agree."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attn_dispatch import (
    InvalidInputError,
    UnsupportedError,
    resolve,
)
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLAImpl
from attn_dispatch.interface.types import Phase
from support.cases import FP8
from support.mla_cases import SMALL_DIMS
from support.mla_cases import MLAStep as Step

HEADS = 3


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 3},
        {"logits_soft_cap": 1.5},
        {"causal": False},
        *({"kv_cache_dtype": name} for name in FP8),
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "kv_cache_dtype": "fp8"},
    ],
    ids=lambda fields: "+".join(map(str, fields.values())) or "plain",
)
def test_both_phases_agree_with_the_oracle(fields):
    step = Step(**fields)
    assert set(step.batch.phases) == set(Phase)
    step.check(step.run())


@given(
    lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 50),
    padding=st.integers(0, 2),
)
def test_any_step_agrees_with_the_oracle(lens, seed, padding):
    query_lens = tuple(query for query, _ in lens)
    step = Step(query_lens, tuple(query + past for query, past in lens), seed, padding)
    step.check(step.run())


def test_decode_is_absorbed_and_prefill_is_expanded(monkeypatch):
    """A decode that expanded its keys would project the whole cache for one token."""
    calls = []
    for name in ("_absorbed", "_expanded"):
        method = getattr(ReferenceMLAImpl, name)
        spy = lambda *args, name=name, method=method: calls.append(name) or method(*args)
        monkeypatch.setattr(ReferenceMLAImpl, name, spy)
    Step().run()
    assert calls == ["_absorbed", "_expanded", "_expanded", "_absorbed"]


def test_absorbed_and_expanded_agree(monkeypatch):
    step = Step()
    usual = step.run()
    absorbed, expanded = ReferenceMLAImpl._absorbed, ReferenceMLAImpl._expanded
    monkeypatch.setattr(ReferenceMLAImpl, "_absorbed", expanded)
    monkeypatch.setattr(ReferenceMLAImpl, "_expanded", absorbed)
    torch.testing.assert_close(step.run(), usual, rtol=0, atol=1e-12)


def test_returns_lse_adds_the_log_sum_exp():
    step = Step(returns_lse=True)
    output, lse = step.run()
    step.check(output)
    torch.testing.assert_close(lse.double(), step.naive()[1], rtol=1e-6, atol=1e-6)


def test_an_empty_batch_gives_an_empty_result():
    step = Step((), ())
    assert step.run().shape == (0, HEADS, 3)


def test_default_device_and_dtype_are_ignored(misleading_defaults):
    step = Step(kv_cache_dtype="fp8", returns_lse=True)
    with misleading_defaults():
        output, _ = step.run()
    step.check(output)


def test_queries_and_keys_may_be_flattened():
    step = Step()
    flat = step.run(query=step.query.flatten(1))
    step.rotated = step.rotated[:, None]
    torch.testing.assert_close(step.run(), flat, rtol=0, atol=0)


def test_q_proj_makes_the_queries():
    step = Step()
    hidden = torch.randn(len(step.query), 7, dtype=torch.float64)
    project = nn.Linear(7, HEADS * 9, bias=False, dtype=torch.float64).requires_grad_(False)
    step.query = project(hidden).view(-1, HEADS, 9)
    step.check(step.run(step.impl(q_proj=project), query=hidden))


def test_kv_b_proj_may_be_a_module():
    step = Step()
    module = nn.Linear(6, HEADS * 8, bias=False, dtype=torch.float64).requires_grad_(False)
    impl = step.impl(kv_b_proj=module)
    module.weight.copy_(step.weight)  # loaded after the impl was made
    step.check(step.run(impl))


def test_a_layer_that_shares_a_cache_does_not_write_it():
    step = Step(kv_sharing=True)
    wanted = Step()
    expected = wanted.run()
    step.cache = wanted.cache.clone()
    step.latents = step.latents * 9
    before = step.cache.clone()
    torch.testing.assert_close(step.run(), expected)
    assert torch.equal(step.cache.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_the_output_may_be_quantized(dtype):
    step, scale = Step(), torch.tensor(0.01)
    output = step.run(output=torch.zeros(10, HEADS, 3).to(dtype), output_scale=scale)
    limit = torch.finfo(dtype).max
    wanted = (step.run() / scale.double()).clamp(-limit, limit).to(dtype)
    assert torch.equal(output.view(torch.uint8), wanted.view(torch.uint8))


def test_selection_picks_the_backend():
    assert resolve(Step().spec, "cpu").name == "REFERENCE_MLA"
    with pytest.raises(UnsupportedError, match=r"REFERENCE_MLA: .*sinks=True"):
        resolve(Step(sinks=True).spec, "cpu")


@pytest.mark.parametrize(
    "feature", [{"alibi_slopes": [1.0] * HEADS}, {"sinks": torch.zeros(HEADS)}], ids=list
)
def test_impl_rejects_undeclared_features(feature):
    with pytest.raises(UnsupportedError, match="REFERENCE_MLA does not support"):
        Step().impl(**feature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_b_proj": torch.zeros(8, 6)}, r"\(8, 6\); the layer takes \(24, 6\)"),
        ({"kv_b_proj": nn.Linear(6, 24)}, "has a bias"),
    ],
    ids=["shape", "bias"],
)
def test_invalid_kv_b_proj_is_rejected(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        Step().impl(**changes)


def test_sizes_of_another_cache_are_rejected():
    with pytest.raises(
        InvalidInputError, match=r"give kv_lora_rank \+ qk_rope_head_dim = 10 and 1"
    ):
        ReferenceMLAImpl(HEADS, 9, 1.0, mla=SMALL_DIMS, kv_b_proj=torch.zeros(24, 6))


def spoil(name, change):
    return lambda step: setattr(step, name, change(getattr(step, name)))


def replaced(**changes):
    return lambda step: setattr(step, "batch", dataclasses.replace(step.batch, **changes))


BAD_CALLS = {
    "query of another width": (spoil("query", lambda t: t[..., :8]), "query has shape"),
    "query of fewer rows": (spoil("query", lambda t: t[:9]), "each of the batch's 10 tokens"),
    "latents of another width": (spoil("latents", lambda t: t[:, :5]), "kv_c_normed has shape"),
    "latents of fewer rows": (spoil("latents", lambda t: t[:9]), "kv_c_normed has shape"),
    "latents of another dtype": (spoil("latents", torch.Tensor.float), "kv_c_normed is torch.flo"),
    "latents elsewhere": (spoil("latents", lambda t: t.to("meta")), "kv_c_normed is .* on meta"),
    "key parts of another width": (spoil("rotated", lambda t: t[:, :3]), "k_pe has shape"),
    "key parts of two heads": (spoil("rotated", lambda t: t[:, None, [0, 1]]), "k_pe has shape"),
    "cache of another rank": (spoil("cache", lambda t: t[0]), "kv_cache has shape"),
    "cache of another width": (spoil("cache", lambda t: t[..., :9]), "kv_cache has shape"),
    "cache of another dtype": (spoil("cache", torch.Tensor.float), "kv_cache .* is torch.float32"),
    "cache elsewhere": (spoil("cache", lambda t: t.to("meta")), "kv_cache .* is .* on meta"),
    "scale per head": (
        lambda step: setattr(step.layer, "_k_scale", torch.ones(3)),
        "scale is per head",
    ),
    "no slots": (replaced(slot_mapping=None), "no slot_mapping"),
    "block table too narrow": (
        lambda step: replaced(block_table=step.batch.block_table[:, :1])(step),
        "Give it 3 columns",
    ),
    "no block table": (replaced(block_table=None), "needs a block_table"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_invalid_arguments_are_rejected_before_anything_is_written(what):
    change, message = BAD_CALLS[what]
    step = Step()
    cache, output = step.cache, torch.full((10, HEADS, 3), 7.0, dtype=torch.float64)
    impl, before = step.impl(), cache.view(torch.uint8).clone()
    change(step)
    output = output[: len(step.query)]
    with pytest.raises(InvalidInputError, match=message):
        step.run(impl, output=output)
    assert torch.equal(cache.view(torch.uint8), before)
    assert bool((output == 7).all())
