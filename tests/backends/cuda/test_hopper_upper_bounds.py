"""HOPPER_ATTN on batches with upper bounds: the same bits as with exact lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch.backends.cuda.hopper.launch import DECODES, FIXED_BLOCKS
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder, HopperPlan
from attn_dispatch.interface.batch import AttentionBatch
from support.cases import layer_spec
from support.hopper_cases import check, on_gpu, step_of

#: Decodes, drafts, prompts without a past, chunks, and a request without keys that pads the batch.
LENS = {
    "mixed": ((1, 3, 300, 1, 129, 700), (900, 210, 300, 0, 600, 4000)),
    "prompts": ((256, 384, 300), (256, 384, 300)),
    "prompts and a chunk": ((256, 128, 384, 300), (256, 900, 384, 300)),
    "ragged prompts": ((250, 391, 300), (250, 391, 300)),
    "decodes": ((1,) * 40, tuple(37 * i * i % 3310 for i in range(40))),
}
BOUNDS = {
    "exact": lambda query, seq: seq,
    "one more": lambda query, seq: seq + 1,
    "exact without a past": lambda query, seq: seq if query == seq else 3 * seq + 5,
    "twice": lambda query, seq: 2 * seq + 1,
    "far too large": lambda query, seq: 9 * seq + 3000,
}
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 99, "returns_lse": True},
    "not causal": {"causal": False, "sliding_window": 200},
    "heads of 64": {"head_size": 64, "logits_soft_cap": 5.0},
    "heads of 256": {"head_size": 256, "alibi": True},
    "fp8 cache": {"kv_cache_dtype": "fp8_e4m3"},
    "sharing": {"kv_sharing": True},
}


def bounded(lens, bounds, device, **fields):
    query_lens, seq_lens = LENS[lens]
    own = None if bounds is None else tuple(map(BOUNDS[bounds], query_lens, seq_lens))
    batch = {"query_lens": query_lens, "seq_lens": seq_lens, "bounds": own}
    return step_of(fields | {"lengths": "upper_bound"}, batch, device)


def plan_of(lens, bounds, **fields):
    step = bounded(lens, bounds, "cpu", **fields)
    plan = HopperBuilder(step.spec, step.device).build(step.batch).prefill
    assert isinstance(plan, HopperPlan)
    return plan


@pytest.mark.parametrize(
    ("lens", "bounds", "is_fresh", "may_be_fresh"),
    [
        ("prompts", None, True, False),
        ("prompts", "exact", True, False),
        ("prompts", "twice", False, True),
        ("prompts and a chunk", "exact", False, True),
        ("prompts and a chunk", None, False, True),
        ("ragged prompts", "exact", True, False),
        ("ragged prompts", "twice", False, True),
    ],
)
def test_whose_keys_are_read_from_the_new_rows(lens, bounds, is_fresh, may_be_fresh):
    plan = plan_of(lens, bounds)
    assert (plan.is_fresh, plan.may_be_fresh) == (is_fresh, may_be_fresh)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_work_tiles_do_not_depend_on_the_bounds_of_equal_requests(bounds):
    """They say nothing of the number of keys, which the kernel reads itself."""
    wanted = plan_of("prompts", None).tiles
    found = plan_of("prompts", bounds).tiles
    assert sorted(found.tolist()) == sorted(wanted.tolist())


@pytest.mark.parametrize("lengths", ["exact", "upper_bound"])
def test_decodes_next_to_a_prefill_are_split_whatever_the_bounds_are(lengths):
    """How many blocks they have decides how their keys are split, and so their bits."""
    spec = layer_spec(
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        block_size=16,
        dtype=torch.bfloat16,
        lengths=lengths,
    )
    builder = HopperBuilder(spec, torch.device("cpu"))
    builder.launches = dataclasses.replace(builder.launches, num_sms=132)
    lens = ([1] * 64 + [2048], [8192] * 64 + [8192])
    table = torch.zeros(65, 512, dtype=torch.int32)
    plan = builder.build(AttentionBatch.create(*lens, block_table=table)).prefill
    assert plan.shares is not None
    assert plan.splits_all_sms is (lengths == "upper_bound")


@pytest.mark.parametrize("size", DECODES)
def test_a_plan_has_room_for_the_parts_of_all_blocks(size):
    spec = layer_spec(head_size=size, block_size=16, dtype=torch.bfloat16, lengths="upper_bound")
    builder = HopperBuilder(spec, torch.device("cpu"))
    builder.launches = dataclasses.replace(builder.launches, num_sms=132)
    table = torch.zeros(2, 512, dtype=torch.int32)
    plan = builder.build(AttentionBatch.create([1, 900], [4000, 4000], block_table=table)).decode
    programs = FIXED_BLOCKS * DECODES[size].mixed.programs * 132
    assert len(plan.counters) >= 2 * programs
    assert plan.part_lse.numel() >= 2 * programs * plan.rows


@on_gpu
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("lens", LENS)
def test_bounds_change_no_bit(lens, fields):
    exact = bounded(lens, None, "cuda", **FIELDS[fields])
    wanted = exact.run("HOPPER_ATTN")
    check(exact, wanted)
    for bounds in BOUNDS:
        step = bounded(lens, bounds, "cuda", **FIELDS[fields])
        found = step.run("HOPPER_ATTN")
        pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
        assert all(torch.equal(a, b) for a, b in pairs), bounds


@on_gpu
def test_nan_behind_new_rows_does_not_reach_a_request():
    """The rows of the decodes that follow a prompt in the batch, and its padding."""
    lens = {"query_lens": (256, 300, 1), "seq_lens": (256, 300, 50), "bounds": (600, 700, 90)}
    step = step_of({"lengths": "upper_bound"}, lens | {"padding": 90}, "cuda")
    expected = step.expected()[0]
    step.key[556:], step.value[556:] = torch.nan, torch.nan
    output = step.run("HOPPER_ATTN")[:556].double().cpu()
    torch.testing.assert_close(output, expected[:556], rtol=0, atol=0.02)
