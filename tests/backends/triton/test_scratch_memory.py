"""The limit of scratch memory: what is gathered in groups of requests, and what is read from pages.

The limit is made so small that small batches exceed it.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder, HopperPlan
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.plan import Launches
from attn_dispatch.backends.triton.prefill_plan import PlanRows, group_by_memory
from attn_dispatch.emulation.gluon.interpret import interpreted
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from support.cases import INT8, Case, Step, layer_spec
from support.hopper_cases import check as check_hopper
from support.hopper_cases import step_of as hopper_step
from support.triton_cases import (
    DEVICE,
    HAS_GPU,
    SMALL,
    builder_of,
    check,
    counters_are_zero,
    forward,
    poison,
    reordered,
    rows_of,
    same_bits,
    some,
)

GATHERS = {**SMALL, "num_sms": 2, "table": {"gather_from": 0}}
#: Four requests with a past, of 48 to 96 keys once padded to tiles of 16, and a decode.
BATCH = {"query_lens": (20, 24, 1, 18, 17), "seq_lens": (37, 60, 9, 95, 50)}
#: Bytes of a gathered key and value in float32 with one head of 16.
ROW = 2 * 16 * 4


def limit(size):
    return mock.patch.object(scratch, "MAX_SCRATCH_BYTES", int(size))


def step_of(batch=BATCH, **fields):
    sizes = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.float32, "returns_lse": True}
    return Step(Case(spec=layer_spec(**(sizes | fields)), **batch), DEVICE)


def parts_of(plan):
    return plan.parts or (plan,)


def gathered_bytes(plan):
    """Bytes of the buffers that a plan's parts have gathered into."""
    memory = plan.buffers._memory
    return 0 if memory is None else memory.numel() * memory.element_size()


def decode_bytes(metadata):
    return 0 if metadata.decode is None else metadata.decode.scratch_bytes


# Groups of requests -------------------------------------------------------------------------------


@given(
    lens=st.lists(st.tuples(st.integers(17, 90), st.integers(0, 300)), min_size=1, max_size=9),
    rows=st.integers(0, 700),
    fields=st.sampled_from(
        [{}, {"kv_cache_dtype": INT8}, {"batch_invariant": True}, {"num_kv_heads": 2}]
    ),
)
def test_plans_of_any_batch_stay_within_the_limit(lens, rows, fields):
    """Every tile is in one part, and each part that gathers fits."""
    query_lens = tuple(query_len for query_len, _ in lens)
    batch = {"query_lens": (*query_lens, 1), "seq_lens": (*(q + past for q, past in lens), 30)}
    spec = layer_spec(**({"head_size": 16, "dtype": torch.float16, "num_kv_heads": 1} | fields))
    step = Step(Case(spec=spec, **batch, brings_keys=False), "cpu")
    size = rows * 64 * spec.num_kv_heads
    with limit(size):
        metadata = builder_of(spec, device="cpu", **GATHERS).build(step.batch)
    plan = metadata.prefill
    assert sorted(plan.requests.tolist()) == list(range(len(lens)))
    parts = parts_of(plan)
    tiles = [tile for part in parts for tile in part.tiles.tolist()]
    assert sorted(tiles) == sorted(plan.tiles.tolist())
    for part in parts:
        assert {request for request, _ in part.tiles.tolist()} == {*part.requests.tolist()}
        if part.gathered_start_loc is None:
            continue
        part.room_for(spec.num_kv_heads, 16, 16)
        starts = part.gathered_start_loc[part.requests.long()].tolist()
        padded = [-(-batch["seq_lens"][i] // part.pad) * part.pad for i in part.requests.tolist()]
        assert starts == [sum(padded[:i]) for i in range(len(padded))]
        assert gathered_bytes(part) >= sum(padded) * 64 * spec.num_kv_heads
    assert gathered_bytes(plan) <= size
    if not spec.batch_invariant:  # a part of one request is the least that its decodes can take
        assert gathered_bytes(plan) + decode_bytes(metadata) <= max(size, decode_bytes(metadata))


def test_a_group_without_enough_work_is_read_from_pages():
    lens = [40, 40, 100, 10, 40]
    rows = PlanRows([3, 5, 6, 7, 9], [20] * 5, lens, lens, lens, 1)
    found = group_by_memory(rows, 80, lambda rows: len(rows.requests) > 1)
    assert [(each.rows.requests, each.gathers) for each in found] == [
        ([3, 5], True),
        ([9, 7], True),
        ([6], False),
    ]
    found = group_by_memory(rows, 80, lambda rows: 7 not in rows.requests)
    assert [(each.rows.requests, each.gathers) for each in found] == [
        ([3, 5], True),
        ([6, 9, 7], False),
    ]
    assert [each.gathers for each in group_by_memory(rows, 230, lambda _: False)] == [True]


@pytest.mark.parametrize(
    ("fields", "rows"),
    some(
        9,
        [
            {},
            {"kv_cache_dtype": "fp8_e4m3", "kv_scales": "per_head"},
            {"kv_cache_dtype": INT8, "sliding_window": 30},
            {"custom_mask": True},
        ],
        [0, 64, 120, 1000],
    ),
    ids=str,
)
def test_results_agree_on_both_sides_of_the_limit(fields, rows):
    """From pages, by two and three groups of which one is from pages, and gathered at once."""
    step = step_of(**fields)
    builder = builder_of(step.spec, **GATHERS)
    decodes = decode_bytes(builder.build(step.batch))
    with limit(rows * ROW + decodes):
        metadata = builder.build(step.batch)
    gathers = [each.gathered_start_loc is not None for each in parts_of(metadata.prefill)]
    assert gathers == {0: [False], 64: [True] * 3 + [False], 120: [True] * 3, 1000: [True]}[rows]
    poison(metadata)
    check(step, forward(step, metadata))
    assert gathered_bytes(metadata.prefill) <= rows * ROW


def test_new_rows_are_read_at_once_however_many_they_are(monkeypatch):
    lens = BATCH["query_lens"]
    step = step_of({"query_lens": lens, "seq_lens": lens})
    with limit(40 * ROW):
        metadata = builder_of(step.spec, **GATHERS).build(step.batch)
    monkeypatch.setattr(scratch.GatherBuffers, "of", None)
    check(step, forward(step, metadata))


@pytest.mark.parametrize("fields", [{}, {"kv_cache_dtype": "fp8_e4m3"}], ids=str)
def test_invariant_results_have_the_same_bits_in_any_batch(fields):
    """Of requests on both sides of the limit, next to others and by themselves."""
    step = step_of(batch_invariant=True, **fields)
    with limit(64 * ROW / 0.75):
        metadata = builder_of(step.spec, **GATHERS).build(step.batch)
        together = forward(step, metadata)
        check(step, together)
        assert len(metadata.prefill.parts) == 4
        for request in (0, 2, 3):
            by_itself = reordered(step, [request])
            found = forward(by_itself, builder_of(step.spec, **GATHERS).build(by_itself.batch))
            its = rows_of(step, request)
            assert same_bits(found, tuple(each[its] for each in together))


# Parts of split requests --------------------------------------------------------------------------


def test_invariant_decodes_in_turn_have_the_bits_of_one_launch():
    batch = {"query_lens": (1,) * 5, "seq_lens": (40, 3, 0, 25, 50), "padding": 2}
    step = step_of(batch, batch_invariant=True, num_kv_heads=1)
    builder = builder_of(step.spec, **SMALL)
    at_once = builder.build(step.batch)
    expected = forward(step, at_once)
    check(step, expected)
    with limit(decode_bytes(at_once) * 2 // 5):
        metadata = builder.build(step.batch)
    assert [each.num_reqs for each in metadata.decode.in_turn] == [2, 2, 1]
    assert decode_bytes(metadata) <= decode_bytes(at_once) * 2 // 5
    poison(metadata)
    assert same_bits(forward(step, metadata), expected)
    assert counters_are_zero(metadata)


def test_many_invariant_decodes_take_less_than_the_limit():
    step = step_of({"query_lens": (1,) * 300, "seq_lens": (1,) * 300}, batch_invariant=True,
                   num_heads=32, num_kv_heads=8, head_size=128)  # fmt: skip
    metadata = builder_of(step.spec).build(step.batch)
    assert 0.9 * scratch.MAX_SCRATCH_BYTES < decode_bytes(metadata) <= scratch.MAX_SCRATCH_BYTES
    assert sum(each.num_reqs for each in metadata.decode.in_turn) == 300


# HOPPER_ATTN --------------------------------------------------------------------------------------

#: Prompts with a past of pages that TMA cannot read: 128, 256 and 384 rows once padded to tiles.
CHUNKS = {"query_lens": (20, 140, 60), "seq_lens": (100, 200, 300), "brings_keys": False}


def hopper_plan(step, rows):
    builder = HopperBuilder(step.spec, step.device)
    builder.launches = Launches.of(step.spec, KNOWN_DEVICES["sm90"])
    with (
        limit(rows * 2 * 2 * 128 * 2),
        mock.patch.object(HopperBuilder, "_has_enough_work", return_value=True),
    ):
        return builder.build(step.batch)


@pytest.mark.skipif(HAS_GPU, reason="portable kernels are compiled there")
@pytest.mark.parametrize("cache", ["float16", "float32"])
def test_hopper_gathers_in_groups_and_reads_the_rest_from_pages(cache):
    """The kernel copies pages of float16; those of float32 are left to the portable one."""
    fields = {"block_size": 8} if cache == "float16" else {"kv_cache_dtype": cache}
    step = hopper_step({"dtype": torch.float16, "returns_lse": True} | fields, CHUNKS, "cpu")
    metadata = hopper_plan(step, 256)
    plan = metadata.prefill
    assert isinstance(plan, HopperPlan)
    found = [(each.requests.tolist(), each.gathered_rows) for each in plan.parts]
    assert found == [([1], 256), ([0], 128), ([2], 0)]
    impl = step.impl_of(HopperAttnBackend)
    with interpreted(programs=3) as launched:
        tensors = (step.query, step.key, step.value, step.kv_cache)
        returned = impl.forward(step.layer, *tensors, metadata)
    check_hopper(step, returned)
    assert launched == ["hopper_prefill_kernel"] * (3 if cache == "float16" else 2)
    assert gathered_bytes(plan) <= 256 * 2 * 2 * 128 * 2


def test_hopper_needs_work_for_half_of_the_sms_in_a_group():
    step = hopper_step({"block_size": 8, "num_heads": 64, "num_kv_heads": 1}, CHUNKS, "cpu")
    builder = HopperBuilder(step.spec, step.device)
    builder.launches = Launches.of(step.spec, KNOWN_DEVICES["sm90"])
    with limit(256 * 2 * 128 * 2):
        plan = builder.build(step.batch).prefill
    # 128 work tiles for request 1, 64 for each other one; half of the SMs are 66.
    found = [(each.requests.tolist(), each.gathered_rows) for each in plan.parts]
    assert found == [([1], 256), ([2, 0], 0)]
    with limit(384 * 2 * 128 * 2):
        plan = builder.build(step.batch).prefill
    assert [(each.requests.tolist(), each.gathered_rows) for each in plan.parts] == [
        ([1, 0], 384),
        ([2], 0),
    ]
