"""TRITON_ATTN on batches with upper bounds: the same bits as with exact lengths."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch.errors import InvalidInputError
from support.cases import INT8, Case, Step, layer_spec
from support.triton_cases import DEVICE, SMALL, builder_of, check, forward, run, same_bits

#: Decodes, drafts, a prompt without a past, one of a graph's padding, chunks.
LENS = {"query_lens": (1, 3, 24, 1, 18, 20), "seq_lens": (39, 21, 24, 0, 50, 20)}
BOUNDS = {
    "exact": LENS["seq_lens"],
    "of prompts exact": (40, 60, 24, 3, 75, 20),
    "twice": tuple(2 * n + 1 for n in LENS["seq_lens"]),
    "far too large": tuple(40 * n + 900 for n in LENS["seq_lens"]),
}
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 9},
    "fp8": {"kv_cache_dtype": "fp8_e4m3", "returns_lse": True},
    "int8": {"kv_cache_dtype": INT8, "head_size": 16},
    "ranges": {"bidirectional_ranges": True, "sliding_window": 5},
    "invariant": {"batch_invariant": True},
    "ALiBi, sinks": {"alibi": True, "sinks": True, "logits_soft_cap": 3.0},
}
#: Pages are read directly, and gathered.
GATHERS = {"pages": 1000, "gathered": 1}


def step_of(bounds, lens=LENS, **fields):
    ranges = ((2, 3, 17), (4, 30, 47)) if fields.get("bidirectional_ranges") else ()
    spec = layer_spec(dtype=torch.float32, lengths="upper_bound", **fields)
    return Step(Case(spec=spec, **lens, bounds=bounds, ranges=ranges), DEVICE)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("gathers", GATHERS)
@pytest.mark.parametrize("fields", FIELDS)
def test_bounds_change_no_bit(fields, gathers, bounds):
    launch = {**SMALL, "table": {"gather_from": GATHERS[gathers]}}
    step = step_of(BOUNDS[bounds], **FIELDS[fields])
    returned = run(step, **launch)
    check(step, returned)
    assert same_bits(returned, run(step_of(None, **FIELDS[fields]), **launch))


@pytest.mark.parametrize("bounds", ["exact", "twice"])
def test_prompts_without_a_past_give_the_same_bits(bounds):
    """With exact bounds the new rows are read, else the pages."""
    lens = {"query_lens": (24, 20, 37), "seq_lens": (24, 20, 37)}
    own = {"exact": (24, 20, 37), "twice": (48, 40, 74)}[bounds]
    step = step_of(own, lens)
    plan = builder_of(step.spec, **SMALL).build(step.batch).prefill
    assert plan.is_fresh is (bounds == "exact")
    assert same_bits(run(step, **SMALL), run(step_of(None, lens), **SMALL))


def test_lengths_are_read_when_the_kernels_run():
    """Metadata of one step, replayed after the device's lengths changed."""
    first, second = step_of(BOUNDS["far too large"]), step_of(None)
    metadata = builder_of(first.spec, **SMALL).build(first.batch)
    true = first.batch.seq_lens.clone()
    first.batch.seq_lens.copy_(torch.tensor((5, 3, 24, 0, 18, 20)))
    forward(first, metadata)
    first.batch.seq_lens.copy_(true)
    assert same_bits(forward(first, metadata), run(second, **SMALL))


def test_a_plan_is_sized_from_the_bounds():
    bounds = BOUNDS["twice"]
    step = step_of(bounds, head_size=16)
    launch = {**SMALL, "table": {"gather_from": 1}}
    plan = builder_of(step.spec, **launch).build(step.batch).prefill
    padded = [-(-bounds[i] // plan.pad) * plan.pad for i in plan.requests.tolist()]
    assert plan.gathered_rows == sum(padded)
    assert plan.longest == max(padded)


def test_a_call_without_a_cache_rejects_bounds():
    step = step_of(BOUNDS["twice"])
    step.kv_cache = None
    with pytest.raises(InvalidInputError, match="Make the batch with lengths='exact'"):
        run(step, **SMALL)
