"""HOPPER_ATTN: its plans on any machine, its prefill kernel on a Hopper GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from attn_dispatch.backends.cuda.hopper.backend import HopperBuilder, HopperImpl, HopperPlan
from attn_dispatch.backends.triton.impl import TritonImpl
from attn_dispatch.backends.triton.plan import PrefillPlan
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.platforms import libraries
from support.hopper_cases import BATCH, check, on_gpu, step_of

SINGLE = {"query_lens": (300,), "seq_lens": (300,)}

#: Changes to a layer with a KV cache of two heads of 128, and to the batch.
VARIANTS = {
    "plain": ({}, {}),
    "not causal": ({"causal": False}, {}),
    "window": ({"sliding_window": 70}, {}),
    "window both ways": ({"causal": False, "sliding_window": 70}, {}),
    "window of one": ({"sliding_window": 1}, {}),
    "soft cap": ({"logits_soft_cap": 5.0}, {}),
    "ALiBi and lse": ({"alibi": True, "returns_lse": True}, {}),
    "ALiBi, soft cap, window": (
        {"alibi": True, "logits_soft_cap": 5.0, "sliding_window": 200, "sinks": True},
        {},
    ),
    "sinks, window, lse": ({"sinks": True, "sliding_window": 130, "returns_lse": True}, {}),
    "fp8 cache": ({"kv_cache_dtype": "fp8_e4m3"}, {}),
    "int8 cache": ({"kv_cache_dtype": "int8_per_token_head"}, {}),
    "heads of 64": ({"head_size": 64, "returns_lse": True}, {}),
    "heads of 256": ({"head_size": 256, "sliding_window": 100}, {}),
    "seven heads to one": ({"num_heads": 14}, {}),
    "heads first": ({"kv_cache_layout": "HND"}, {}),
    "sharing": ({"kv_sharing": True}, {}),
    "fused qkv": ({}, {"memory": "fused", "padding": 3}),
    "strided": ({}, {"memory": "strided"}),
    "keys in the cache": ({}, {"brings_keys": False}),
    "fresh": ({"dtype": torch.float16}, SINGLE),
    "fresh, fused": ({}, SINGLE | {"memory": "fused", "padding": 60}),
    "without a cache": ({"block_size": None}, SINGLE),
    "several without a cache": ({"block_size": None}, {"seq_lens": BATCH["query_lens"]}),
    "several fresh": ({}, {"query_lens": (256, 128, 70), "seq_lens": (256, 128, 70)}),
    "several without a cache, whole tiles": (
        {"block_size": None, "returns_lse": True},
        {"query_lens": (256, 128, 70), "seq_lens": (256, 128, 70)},
    ),
    "without keys": ({"block_size": None, "returns_lse": True}, SINGLE | {"seq_lens": (200,)}),
}


@on_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_agrees_with_the_reference(variant):
    step = step_of(*VARIANTS[variant], "cuda")
    check(step, step.run("HOPPER_ATTN"))


@on_gpu
@pytest.mark.parametrize("keys_are", ["new", "in the cache"])
def test_nan_behind_a_prompt_does_not_reach_it(keys_are):
    """NaN in the keys and values of a decode in the same step, and of padding."""
    batch = {"query_lens": (300, 1), "seq_lens": (300, 50), "padding": 90}
    step = step_of({}, batch | {"brings_keys": keys_are == "new"}, "cuda")
    expected = step.expected()[0]
    if keys_are == "new":
        step.key[300:], step.value[300:] = torch.nan, torch.nan
    else:
        step.kv_cache[step.batch.block_table[1, :3].long()] = torch.nan
    output = step.run("HOPPER_ATTN")[:300].double().cpu()
    torch.testing.assert_close(output, expected[:300], rtol=0, atol=0.02)


@on_gpu
def test_any_number_of_work_tiles_agrees_with_the_reference():
    """Fewer and more work tiles than programs, and a number that is not a multiple."""
    for query_lens in ((17,), (2000,), (500, 700, 129, 128, 900)):
        step = step_of({}, {"query_lens": query_lens, "seq_lens": query_lens}, "cuda")
        step.check(step.run("HOPPER_ATTN"))


def plan_of(fields, batch):
    step = step_of(fields, batch, "cpu")
    return HopperBuilder(step.spec, step.device).build(step.batch)


def test_work_tiles_cover_every_token_of_a_prefill_once():
    plan = plan_of({}, {}).prefill
    assert isinstance(plan, HopperPlan)
    covered = []
    for start, length, first, request in plan.tiles.tolist():
        assert length == BATCH["query_lens"][request]
        covered += range(start + first, start + min(first + 128, length))
    assert sorted(covered) == list(range(1, 450))  # requests 1, 2 and 3


def test_gathered_requests_start_at_multiples_of_a_tile():
    plan = plan_of({}, {}).prefill
    starts = plan.gathered_start_loc.tolist()
    assert [starts[i] for i in (1, 2, 3)] == [0, 128, 512]
    assert plan.gathered_rows == 128 + 384 + 640


@pytest.mark.parametrize(
    ("fields", "batch", "is_fresh"),
    [
        ({}, SINGLE, True),
        ({}, {"query_lens": (300, 1), "seq_lens": (300, 50)}, True),
        ({}, {"query_lens": (44, 256), "seq_lens": (44, 256)}, False),
        ({}, {"query_lens": (256, 44), "seq_lens": (256, 44)}, True),
        ({"head_size": 256}, {"query_lens": (192, 108), "seq_lens": (192, 108)}, True),
        ({}, {"query_lens": (192, 108), "seq_lens": (192, 108)}, False),
        ({}, {"query_lens": (300,), "seq_lens": (400,)}, False),
    ],
)
def test_new_prompts_that_end_with_a_tile_are_not_gathered(fields, batch, is_fresh):
    plan = plan_of(fields, batch).prefill
    assert plan.is_fresh is is_fresh
    assert plan.fresh_end == 300


def test_the_portable_kernel_runs_requests_without_pages_that_end_inside_a_tile():
    plan = plan_of({"block_size": None}, {"seq_lens": BATCH["query_lens"]}).prefill
    assert type(plan) is PrefillPlan
    lengths = (128, 256, 70)
    plan = plan_of({"block_size": None}, {"query_lens": lengths, "seq_lens": lengths}).prefill
    assert type(plan) is HopperPlan


def test_the_portable_kernel_rejects_a_hopper_plan():
    step = step_of({"block_size": None, "dtype": torch.float16}, SINGLE, "cpu")
    metadata = HopperBuilder(step.spec, step.device).build(step.batch)
    impl = TritonImpl(**step.impl_arguments())
    with pytest.raises(InvalidInputError, match="made by a HopperBuilder"):
        impl.forward(step.layer, step.query, step.key, step.value, None, metadata)


@pytest.mark.parametrize("fields", [{"custom_mask": True}, {"head_size": 96}])
def test_a_builder_rejects_undeclared_features(fields):
    with pytest.raises(UnsupportedError, match="HOPPER_ATTN does not compute this layer"):
        plan_of(fields, {})


def test_a_triton_without_gluon_counts_as_broken(monkeypatch):
    """Selection then continues without it."""
    monkeypatch.setattr(libraries, "_broken", {})
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    with pytest.raises(BackendFailure, match="cannot be imported here"):
        HopperImpl(8, 128, 1.0, 2)
    assert list(libraries._broken) == ["triton"]
