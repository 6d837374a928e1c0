"""The limits of captured steps, and the static tensors that later steps fill."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import AttentionBatch, Phase, PlaceholderRange
from attn_dispatch.interface.captured import (
    GraphLimits,
    StagedBuffers,
    StaticBatch,
    ranges_by_request,
)

CPU = torch.device("cpu")
DECODE = GraphLimits(num_reqs=3, num_tokens=3, max_query_len=1, max_seq_len=40)
DRAFTS = GraphLimits(num_reqs=3, num_tokens=7, max_query_len=3, max_seq_len=40)
CHUNKS = GraphLimits(
    num_reqs=3, num_tokens=20, max_query_len=20, max_seq_len=40, phase=Phase.PREFILL
)
MASKED = GraphLimits(
    num_reqs=3, num_tokens=7, max_query_len=3, max_seq_len=40, has_custom_mask=True,
    max_mask_elements=30,
)  # fmt: skip
EVERY = {"decode": DECODE, "drafts": DRAFTS, "chunks": CHUNKS, "masked": MASKED}


def static_of(limits, **more):
    table = torch.zeros(limits.num_slots, 3, dtype=torch.int32)
    mask = torch.zeros(limits.max_mask_elements).bool() if limits.has_custom_mask else None
    return StaticBatch.make(limits, CPU, block_table=table, custom_mask=mask, **more)


@pytest.mark.parametrize("name", EVERY)
def test_the_example_has_the_shape_of_the_largest_step(name):
    limits, batch = EVERY[name], static_of(EVERY[name]).batch
    assert batch.num_reqs == limits.num_slots
    assert batch.num_tokens == limits.num_tokens == len(batch.slot_mapping)
    assert (batch.max_query_len, batch.max_seq_len) == (limits.max_query_len, limits.max_seq_len)
    assert max(batch.query_lens) == limits.max_query_len
    assert set(batch.slot_mapping.tolist()) == {-1}  # nothing is written while it is captured
    phases = {phase for phase, query in zip(batch.phases, batch.query_lens, strict=True) if query}
    assert phases == {limits.phase}
    assert batch.query_start_loc.tolist() == batch.query_start_list
    assert batch.seq_lens.tolist() == batch.seq_lens_list


def test_only_one_token_requests_have_no_idle_slot():
    """Lists of requests of different lengths name it in unused entries."""
    assert [limits.num_slots for limits in (DECODE, DRAFTS, CHUNKS)] == [3, 4, 4]


@st.composite
def steps(draw):
    limits = EVERY[draw(st.sampled_from(list(EVERY)))]
    query_lens, left = [], limits.num_tokens
    for _ in range(draw(st.integers(0, limits.num_reqs))):
        least = int(limits is DECODE)
        query_lens.append(draw(st.integers(least, max(least, min(left, limits.max_query_len)))))
        left -= query_lens[-1]
    seq_lens = [draw(st.integers(q, q + 9)) for q in query_lens]
    return limits, query_lens, seq_lens


@given(step=steps())
def test_a_step_replaces_all_of_an_earlier_one(step):
    limits, query_lens, seq_lens = step
    number, tokens = len(query_lens), sum(query_lens)
    more = {}
    if limits.has_custom_mask:
        size = sum(q * s for q, s in zip(query_lens, seq_lens, strict=True))
        more["custom_mask"] = torch.rand(size) < 0.5
    table = torch.randint(1, 99, (number, 2), dtype=torch.int32)
    batch = AttentionBatch.create(
        query_lens, seq_lens, block_table=table, slot_mapping=torch.arange(tokens), **more
    )
    static = static_of(limits)
    own = static.batch
    for tensor in (own.seq_lens, own.slot_mapping, own.query_start_loc):
        tensor.fill_(77)  # of an earlier step
    if limits.mismatch(batch) is not None:
        assert "custom_mask has" in limits.mismatch(batch)
        return
    static.fill(batch)
    idle = limits.num_slots - number
    assert own.seq_lens.tolist() == seq_lens + [0] * idle
    starts = own.query_start_loc.tolist()
    assert starts[: number + 1] == batch.query_start_list
    step_of_idle = 1 if limits is DECODE else 0
    assert starts[number + 1 :] == [tokens + step_of_idle * (i + 1) for i in range(idle)]
    slots = [*range(tokens), *[-1] * (limits.num_tokens - tokens)]
    assert own.slot_mapping.tolist() == slots
    assert torch.equal(own.block_table[:number, :2], table)
    if limits.has_custom_mask:
        mask = more["custom_mask"]
        assert torch.equal(own.custom_mask[: len(mask)], mask)


def test_a_batch_without_new_keys_has_no_slots():
    static = static_of(DECODE, writes_keys=False)
    assert static.batch.slot_mapping is None
    static.fill(AttentionBatch.create([1], [3], block_table=torch.ones(1, 1).int()))
    assert static.batch.seq_lens.tolist() == [3, 0, 0]


@pytest.mark.parametrize(
    ("limits", "query_lens", "seq_lens", "reason"),
    [
        (DECODE, [1] * 4, [2] * 4, "has 4 requests, and the graph takes up to 3"),
        (DECODE, [2], [2], "has 2 new tokens in a request, and the graph takes up to 1"),
        (DECODE, [1, 0], [2, 2], "a request without a new token"),
        (DECODE, [1], [41], "has 41 keys in a request, and the graph takes up to 40"),
        (DRAFTS, [3, 3, 3], [3, 3, 3], "has 9 new tokens, and the graph takes up to 7"),
        (MASKED, [1], [3], "has no custom_mask, and the graph was captured with one"),
        (DRAFTS, [3, 0, 1], [40, 9, 1], None),
        (CHUNKS, [18, 1, 1], [18, 40, 1], None),
    ],
)
def test_a_step_beyond_the_limits_is_described(limits, query_lens, seq_lens, reason):
    found = limits.mismatch(AttentionBatch.create(query_lens, seq_lens))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("limits", "words"), [
    (DECODE, "one new token per request"),
    (MASKED, "up to 3 new tokens per request and a custom mask"),
    (CHUNKS, "chunks of up to 20 new tokens"),
])  # fmt: skip
def test_the_kind_of_step_is_described(limits, words):
    assert limits.kind == words


def test_ranges_come_request_by_request():
    ranges = {
        "image": [PlaceholderRange(2, 1, 3), PlaceholderRange(0, 4, 5)],
        "audio": [PlaceholderRange(2, 6, 7)],
    }
    batch = AttentionBatch.create([5, 1, 7], [5, 1, 7], multi_modal_placeholder_index_maps=ranges)
    assert ranges_by_request(batch) == ([(4, 5), (1, 3), (6, 7)], [0, 1, 1, 3])
    assert ranges_by_request(AttentionBatch.create([1, 1], [2, 2])) == ([], [0, 0, 0])


def test_staged_buffers_are_aligned_and_independent():
    buffers = StagedBuffers(
        CPU, a=((3,), torch.int32), b=((2, 2), torch.int64), c=((5,), torch.bool)
    )
    addresses = {name: each.data_ptr() for name, each in buffers.tensors.items()}
    base = buffers.tensors["a"].data_ptr()
    assert all((address - base) % 16 == 0 for address in addresses.values())
    first, second = buffers.stage(), buffers.stage()
    assert first["b"].data_ptr() != second["b"].data_ptr()  # the first may not be copied yet
    for staged, number in ((first, 1), (second, 2)):
        staged["a"].fill_(number)
        staged["b"].fill_(10 * number)
        staged["c"].fill_(number == 2)
    buffers.send(first)
    buffers.send(second)
    assert buffers.tensors["a"].tolist() == [2, 2, 2]
    assert buffers.tensors["b"].tolist() == [[20, 20], [20, 20]]
    assert buffers.tensors["c"].all()
    assert {name: each.data_ptr() for name, each in buffers.tensors.items()} == addresses
