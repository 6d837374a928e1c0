"""Batches that are made of what engines keep, and how a plug-in rejects requests."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    AttentionBatch,
    AttentionSpec,
    EngineAttention,
    EnginePlugin,
    InvalidInputError,
    UnsupportedError,
    batches_by_layer,
    padded_batch,
    slot_table_batch,
)

SIZES = {"num_heads": 2, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
SPEC = AttentionSpec(**SIZES, block_size=16)
PLUGIN = EnginePlugin(engine="some-engine", group="some.plugins", flag="--ours", tested={})


def given(**more):
    """Two requests, and two that pad: as an engine's buffers, longer than the step."""
    starts = torch.tensor([0, 1, 4, 4, 4], dtype=torch.int32)
    return {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts.clone(),
        "seq_lens": torch.tensor([20, 3, 0, 0, 77], dtype=torch.int32),
        "seq_lens_cpu": torch.tensor([20, 3, 9, 9, 77], dtype=torch.int32),
        "block_table": torch.zeros(5, 4, dtype=torch.int32),
        "slot_mapping": torch.arange(10),
        "block_size": 16,
        "max_query_len": 3,
        "max_seq_len": 20,
    } | more


def test_requests_that_pad_a_batch_are_left_out():
    tensors = given()
    batch = padded_batch(SPEC, **tensors, max_decode_query_len=2)
    batch.check()
    assert batch.query_lens == [1, 3]
    assert batch.seq_lens_list == batch.seq_lens.tolist() == [20, 3]
    assert (batch.num_reqs, batch.max_decode_query_len, batch.block_size) == (2, 2, 16)
    for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"):
        assert getattr(batch, name).data_ptr() == tensors[name].data_ptr()
    tensors["seq_lens_cpu"].zero_()  # the engine fills it for its next step
    tensors["query_start_loc_cpu"].zero_()
    assert batch.seq_lens_cpu.tolist() == [20, 3]
    assert batch.query_start_loc_cpu.tolist() == [0, 1, 4]


def test_a_buffer_of_starts_can_be_longer_than_the_step():
    starts = torch.tensor([0, 1, 4, 0, 0], dtype=torch.int32)
    batch = padded_batch(SPEC, **given(query_start_loc_cpu=starts, num_reqs=2))
    assert batch.query_lens == [1, 3]


def test_a_step_of_padding_only_is_empty():
    starts = torch.zeros(3, dtype=torch.int32)
    more = {"query_start_loc": starts, "query_start_loc_cpu": starts, "max_query_len": 1}
    batch = padded_batch(SPEC, **given(**more))
    assert (batch.num_reqs, batch.num_tokens) == (0, 0)


def test_lengths_that_the_host_does_not_have_are_bounds():
    bounded = SPEC.replace(lengths="upper_bound")
    batch = padded_batch(bounded, **given(seq_lens_cpu=None, max_seq_len=64))
    assert batch.lengths == "upper_bound"
    assert batch.seq_lens_list == [64, 64]
    assert batch.seq_lens.tolist() == [20, 3]
    with pytest.raises(InvalidInputError, match="lengths='upper_bound'"):
        padded_batch(SPEC, **given(seq_lens_cpu=None))


def test_layers_of_encoders_have_the_keys_of_the_step():
    spec = AttentionSpec(**SIZES, block_size=None, attn_type="encoder_only")
    batch = padded_batch(spec, **given())
    batch.check()
    assert batch.seq_lens_list == batch.seq_lens.tolist() == [1, 3]
    assert batch.block_table is None
    assert batch.slot_mapping is None


@pytest.mark.parametrize("page_size", [1, 4])
def test_slots_of_tokens_become_a_block_table(page_size):
    """Each request's pages are anywhere; slots before the first one are padding."""
    pages = torch.tensor([[0] * 6, [3, 1, 5, 4, 2, 6], [9, 7, 8, 10, 11, 12]]) * 4 // page_size
    per_page = 4 if page_size == 4 else 1
    table = (pages[:, :, None] * page_size + torch.arange(per_page)).flatten(1).int()
    rows, new = torch.tensor([2, 1]), [1, 3]
    slots = torch.cat([table[2, 4:5], table[1, 2:5], torch.zeros(3, dtype=torch.int32)])
    tables = {"slot_table": table, "rows": rows, "page_size": page_size, "first_slot": page_size}
    batch = slot_table_batch(new, [5, 5], new_slots=slots, **tables)
    batch.check()
    blocks = batch.block_table.long()
    for request, row in enumerate(rows):
        for position in range(5):
            block = blocks[request, position // page_size]
            assert block * page_size + position % page_size == table[row, position]
    assert batch.slot_mapping.tolist() == slots[:4].tolist()
    padding = slot_table_batch(new, [5, 5], new_slots=torch.zeros(4).long(), **tables)
    assert padding.slot_mapping.tolist() == [-1] * 4
    moved = slot_table_batch(
        new, [5, 5], new_slots=slots, translate=lambda each: each + 2 * page_size, **tables
    )
    assert torch.equal(moved.block_table, batch.block_table + 2)
    assert moved.slot_mapping.tolist() == [each + 2 * page_size for each in slots[:4].tolist()]


def test_layers_of_a_group_share_a_batch():
    attentions = [EngineAttention(**SIZES, prefix=f"l{i}", group=i % 2) for i in range(3)]
    made = []

    def make(group):
        made.append(group)
        return AttentionBatch.create([1], [1])

    found = batches_by_layer(attentions, make)
    assert made == [0, 1]
    assert found["l0"] is found["l2"]
    assert found["l0"] is not found["l1"]


def test_what_is_asked_for_is_rejected_with_all_reasons():
    asked = {"rings": True, "stars": torch.ones(2), "none": None, "off": False, "zero": 0}
    assert PLUGIN.reasons(asked) == ["rings", "stars", "zero"]
    with pytest.raises(UnsupportedError) as caught:
        PLUGIN.reject(asked, "layer 'l0'", "Use --other.")
    assert str(caught.value) == (
        "attn-dispatch's plug-in for some-engine does not serve layer 'l0', which asks for: rings; "
        "stars; zero. Use --other."
    )
    PLUGIN.reject({"none": None, "off": False})
    PLUGIN.reject([])
    with pytest.raises(UnsupportedError, match="a flag of the future"):
        PLUGIN.reject(["a flag of the future"])
