"""HOPPER_ATTN: its plans on any machine, its prefill kernel on a Hopper GPU."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

from attn_dispatch.backends.cuda.hopper.backend import HopperImpl
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder, HopperPlan
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.impl import TritonImpl
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.platforms import libraries
from support.hopper_cases import (
    BATCH,
    check,
    interpreted_prefills,
    launched,
    on_an_h200,
    on_gpu,
    step_of,
)

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
    "fp8_e5m2 cache, window": ({"kv_cache_dtype": "fp8_e5m2", "sliding_window": 130}, {}),
    "fp8 cache, scales by head": ({"kv_cache_dtype": "fp8_e4m3", "kv_scales": "per_head"}, {}),
    "fp8 cache, float16": ({"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16}, {}),
    "int8 cache, float16": ({"kv_cache_dtype": "int8_per_token_head", "dtype": torch.float16}, {}),
    "float16 cache": ({"kv_cache_dtype": "float16"}, {}),
    "bfloat16 cache": ({"kv_cache_dtype": "bfloat16", "dtype": torch.float16}, {}),
    "float32 cache": ({"kv_cache_dtype": "float32"}, {}),
    "heads of 64": ({"head_size": 64, "returns_lse": True}, {}),
    "heads of 64, fp8, pages of 1": (
        {"head_size": 64, "kv_cache_dtype": "fp8_e4m3", "block_size": 1, "returns_lse": True},
        {},
    ),
    "heads of 96": ({"head_size": 96, "returns_lse": True}, {}),
    "heads of 96, window": ({"head_size": 96, "sliding_window": 70, "num_heads": 2}, {}),
    "heads of 96, everything": (
        {"head_size": 96, "alibi": True, "logits_soft_cap": 5.0, "sliding_window": 200},
        {},
    ),
    "heads of 96, fp8": ({"head_size": 96, "kv_cache_dtype": "fp8_e4m3"}, {}),
    "heads of 96, int8": ({"head_size": 96, "kv_cache_dtype": "int8_per_token_head"}, {}),
    "heads of 96, pages of 4": ({"head_size": 96, "block_size": 4}, {}),
    "heads of 96, fresh": ({"head_size": 96, "dtype": torch.float16}, SINGLE),
    "heads of 96, fused qkv": ({"head_size": 96}, {"memory": "fused", "padding": 3}),
    "heads of 192": ({"head_size": 192, "head_size_v": 128, "returns_lse": True}, {}),
    "heads of 192, window": ({"head_size": 192, "head_size_v": 128, "sliding_window": 70}, {}),
    "heads of 192, pages of 1": ({"head_size": 192, "head_size_v": 128, "block_size": 1}, {}),
    "heads of 192, no cache": (
        {"head_size": 192, "head_size_v": 128, "block_size": None, "num_kv_heads": 8},
        {"seq_lens": BATCH["query_lens"]},
    ),
    "heads of 256, fp8": ({"head_size": 256, "kv_cache_dtype": "fp8_e4m3"}, {}),
    "heads of 256, pages of 8": ({"head_size": 256, "block_size": 8}, {}),
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
    "several fresh": ({}, {"query_lens": (256, 100, 70), "seq_lens": (256, 100, 70)}),
    "fresh and chunks": ({}, {"query_lens": (200, 100, 70), "seq_lens": (200, 350, 70)}),
    "pages of 8": ({"block_size": 8}, {}),
    "pages of 1": ({"block_size": 1, "sliding_window": 130}, {}),
    "pages of 24": ({"block_size": 24}, {}),
    "pages of 48": ({"block_size": 48}, {}),
    "pages of 256, window": ({"block_size": 256, "sliding_window": 70}, {}),
    "without keys": ({"block_size": None, "returns_lse": True}, SINGLE | {"seq_lens": (200,)}),
}


#: Changes to a layer whose pages TMA cannot read -> FORMAT of the kernel that copies them.
COPIED = {
    "fp8 cache": ({"kv_cache_dtype": "fp8_e4m3"}, "e4m3"),
    "fp8_e5m2 cache": ({"kv_cache_dtype": "fp8_e5m2"}, "e5m2"),
    "int8 cache": ({"kv_cache_dtype": "int8_per_token_head"}, "int8"),
    "another dtype": ({"kv_cache_dtype": "float16"}, "float16"),
    "pages of 8": ({"block_size": 8}, "same"),
    "pages of 1": ({"block_size": 1}, "same"),
}


#: Bytes of gathered keys and values, up to which they are gathered.
NO_SCRATCH = mock.patch.object(scratch, "MAX_SCRATCH_BYTES", 0)


@on_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_agrees_with_the_reference(variant):
    step = step_of(*VARIANTS[variant], "cuda")
    check(step, step.run("HOPPER_ATTN"))


#: The interpreter takes seconds for each.
INTERPRETED = (
    *("plain", "sinks, window, lse", "ALiBi, soft cap, window", "window both ways", "without keys"),
    *(
        "fp8 cache, float16",
        "heads of 96, int8",
        "heads of 192, window",
        "heads of 64",
        "pages of 1",
    ),
    *("fresh and chunks", "fused qkv", "several without a cache"),
)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v not in INTERPRETED)) for v in VARIANTS],
)
def test_an_interpreted_step_agrees_with_the_reference(variant):
    """On the CPU, by three programs, in an order and with delays that differ by variant.

    Triton's interpreter, in which the kernel runs that writes caches, rounds to other dtypes
    differently: such caches have all keys.
    """
    fields, batch = VARIANTS[variant]
    step = step_of(fields, {"brings_keys": "kv_cache_dtype" not in fields} | batch, "cpu")
    seed = list(VARIANTS).index(variant)
    check(step, interpreted_prefills(step, seed=seed, lateness=seed % 3 / 2, programs=3))


@NO_SCRATCH
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "int8 cache")) for v in COPIED]
)
def test_interpreted_copies_of_pages_agree_with_the_reference(variant):
    step = step_of(COPIED[variant][0], {"brings_keys": False}, "cpu")
    check(step, interpreted_prefills(step, programs=3))


@on_gpu
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("keys_are", ["new", "in the cache"])
def test_nan_behind_a_prompt_does_not_reach_it(keys_are, head_size, block_size):
    """NaN in the keys and values of a decode in the same step, of padding, and of unused slots."""
    batch = {"query_lens": (300, 1), "seq_lens": (300, 50), "padding": 90}
    fields = {"head_size": head_size, "block_size": block_size}
    step = step_of(fields, batch | {"brings_keys": keys_are == "new"}, "cuda")
    expected = step.expected()[0]
    if keys_are == "new":
        step.key[300:], step.value[300:] = torch.nan, torch.nan
    else:
        full, rest = divmod(300, block_size)
        step.kv_cache[step.batch.block_table[0, full].long(), :, rest:] = torch.nan
        others = step.batch.block_table[1, : -(-50 // block_size)]
        step.kv_cache[others.long()] = torch.nan
    output = step.run("HOPPER_ATTN")[:300].double().cpu()
    torch.testing.assert_close(output, expected[:300], rtol=0, atol=0.02)


@on_gpu
@pytest.mark.parametrize("block_size", [4, 16])
def test_nan_before_a_window_does_not_reach_a_chunk(block_size):
    """Blocks that no query of the chunk sees may be freed, and their entries name any block."""
    batch = {"query_lens": (200,), "seq_lens": (900,), "brings_keys": False}
    step = step_of({"sliding_window": 130, "block_size": block_size}, batch, "cuda")
    expected = step.expected()[0]
    freed = (900 - 200 - 130 + 1) // block_size
    step.kv_cache[step.batch.block_table[0, :freed].long()] = torch.nan
    output = step.run("HOPPER_ATTN").double().cpu()
    torch.testing.assert_close(output, expected, rtol=0, atol=0.02)


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


@on_gpu
@NO_SCRATCH
@pytest.mark.parametrize("variant", COPIED)
def test_copied_pages_agree_with_the_reference(variant):
    step = step_of(COPIED[variant][0], {}, "cuda")
    check(step, step.run("HOPPER_ATTN"))


@pytest.mark.parametrize("variant", COPIED)
def test_pages_that_tma_cannot_read_are_gathered_while_they_are_few(variant):
    step = step_of(COPIED[variant][0], {}, "cpu")
    launches, impl = on_an_h200(step, step.kv_cache)
    assert launched(impl) >= {"gather_kv", "hopper_prefill"}
    (launch,) = (each for each in launches if each.name == "hopper_prefill")
    config = launch.constants["CONFIG"]
    assert (config.BLOCK_SIZE, config.FORMAT) == (0, "")
    heads, size = step.spec.num_kv_heads, step.spec.head_size
    assert [*launch.args[1].shape] == [gathered_rows(launches), heads * size]


def gathered_rows(launches):
    """Rows of the buffer that keys are gathered into."""
    (gather,) = (each for each in launches if each.name == "gather_kv")
    return dict(zip(gather.kernel.arg_names, gather.args, strict=False))["k_out_ptr"].shape[0]


def test_the_limit_of_scratch_memory():
    """64 MiB hold keys and values of 16k tokens with 8 heads of 128."""
    fields = {"num_kv_heads": 8, "num_heads": 8, "block_size": 8}
    for keys, gathers in ((16384, True), (16385, False)):
        batch = {"query_lens": (300,), "seq_lens": (keys,)}
        made = plan_of(fields, batch).prefill
        assert (made.gathered_start_loc is not None) == gathers


@NO_SCRATCH
@pytest.mark.parametrize("variant", COPIED)
def test_many_pages_that_tma_cannot_read_are_copied_by_the_kernel(variant):
    """Nothing is gathered: there are no buffers, whatever the number of keys."""
    fields, form = COPIED[variant]
    step = step_of(fields, {}, "cpu")
    launches, impl = on_an_h200(step, step.kv_cache)
    assert launched(impl) >= {"hopper_prefill"}
    assert not launched(impl) & {"gather_kv", "prefill"}
    (launch,) = (each for each in launches if each.name == "hopper_prefill")
    assert form == launch.constants["CONFIG"].FORMAT
    assert launch.args[1].dtype == torch.int32
    part = step.kv_cache[:, 0]
    assert launch.args[1].data_ptr() == part.data_ptr()
    unit = launch.constants["CONFIG"].UNIT
    steps = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    strides = [steps[f"k_step_{i}"] * unit for i in range(3)]
    assert strides == [step * part.element_size() for step in part.stride()[:3]]


@NO_SCRATCH
def test_many_pages_of_float32_are_read_by_the_portable_kernel():
    step = step_of({"kv_cache_dtype": "float32"}, {}, "cpu")
    _, impl = on_an_h200(step, step.kv_cache)
    assert "prefill" in launched(impl)
    assert "hopper_prefill" not in launched(impl)


def test_strides_of_two_bytes_are_read_by_the_portable_kernel():
    """Such a cache has no words of four bytes; its layer's spec does not show it."""
    step = step_of({}, {}, "cpu")
    cache = torch.zeros(*step.kv_cache.shape[:-1], 129, dtype=torch.bfloat16)[..., :-1]
    _, impl = on_an_h200(step, cache.copy_(step.kv_cache))
    assert "prefill" in launched(impl)
    assert "hopper_prefill" not in launched(impl)


@pytest.mark.parametrize(
    ("batch", "is_fresh", "may_be_fresh"),
    [
        (SINGLE, True, False),
        ({"query_lens": (300, 1), "seq_lens": (300, 50)}, True, False),
        ({"query_lens": (44, 256), "seq_lens": (44, 256)}, True, False),
        ({"query_lens": (44, 256), "seq_lens": (44, 999)}, False, True),
        ({"query_lens": (300,), "seq_lens": (400,)}, False, False),
    ],
)
def test_keys_of_prompts_without_a_past_are_the_new_rows(batch, is_fresh, may_be_fresh):
    plan = plan_of({}, batch).prefill
    assert (plan.is_fresh, plan.may_be_fresh) == (is_fresh, may_be_fresh)
    assert plan.fresh_end == 300


def test_the_portable_kernel_rejects_a_hopper_plan():
    step = step_of({"block_size": None, "dtype": torch.float16}, SINGLE, "cpu")
    metadata = HopperBuilder(step.spec, step.device).build(step.batch)
    impl = TritonImpl(**step.impl_arguments())
    with pytest.raises(InvalidInputError, match="made by a HopperBuilder"):
        impl.forward(step.layer, step.query, step.key, step.value, None, metadata)


@pytest.mark.parametrize(
    "fields",
    [
        {"custom_mask": True},
        {"head_size": 80},
        {"head_size": 192},
        {"head_size": 128, "head_size_v": 64},
    ],
)
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
