"""KeyPositions: what a batch accepts, and what it derives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch import Attention, AttentionBatch, InvalidInputError, KeyPositions
from attn_dispatch.interface.contents import first_seen_keys
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.types import Phase


def batch_of(query_lens, lengths, *, offset=1, step=3, seq_lens=None, **more):
    positions = KeyPositions.create(lengths, offset=offset, step=step)
    seq_lens = positions.local_seq_lens() if seq_lens is None else seq_lens
    return AttentionBatch.create(query_lens, seq_lens, key_positions=positions, **more)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_keys_before_a_position_are_counted(offset, step):
    positions = KeyPositions.create([3, 20], offset=offset, step=step)
    keys = range(offset, 100, step)
    for position in range(-3, 30):
        assert positions.keys_before(position) == sum(key < position for key in keys)
    assert positions.local_seq_lens() == [positions.keys_before(3), positions.keys_before(20)]


def test_phases_go_by_the_length_of_the_request():
    # One key of each request is here, also of the prompt of two tokens.
    batch = batch_of([1, 2, 1], [4, 2, 2], max_decode_query_len=2)
    assert batch.seq_lens_list == [1, 1, 1]
    assert batch.phases == [Phase.DECODE, Phase.PREFILL, Phase.DECODE]


@pytest.mark.parametrize("order", [(4, 9, 1, 6), (9, 4, 6, 1)], ids=str)
def test_parts_keep_their_positions(order):
    query_lens = [1 if length > 5 else length for length in order]
    parts = batch_of(query_lens, order).parts
    for phase, part in parts.items():
        lengths = [n for n in order if (n > 5) == (phase is Phase.DECODE)]
        positions = part.batch.key_positions
        assert positions.seq_lens_cpu.tolist() == positions.seq_lens.tolist() == lengths
        assert (positions.offset, positions.step) == (1, 3)
        part.batch.check()


def test_first_seen_keys_are_counted_here():
    batch = batch_of([1, 4], [40, 40])
    # The first queries are at 39 and 36; with 10 tokens before each, they see from 29 and 26 on.
    keys = [1 + 3 * key for key in range(20)]
    found = first_seen_keys(batch, Reach(left=10))
    assert found == [next(i for i, key in enumerate(keys) if key >= first) for first in (29, 26)]
    assert first_seen_keys(batch, Reach(chunk=16)) == [11, 11]  # the chunk from 32 on: key 34


WRONG = {
    "type": (lambda p: (1, 3), "key_positions is a tuple. Make it by KeyPositions.create"),
    "requests": (
        lambda p: KeyPositions.create([9], offset=1, step=3),
        "seq_lens of key_positions has 1 requests and seq_lens 2",
    ),
    "step": (lambda p: dataclasses.replace(p, step=0), "step of key_positions=0"),
    "offset": (lambda p: dataclasses.replace(p, offset=-1), "offset of key_positions=-1"),
    "length": (
        lambda p: KeyPositions.create([9, 4], offset=1, step=3),
        "Request 1 has 2 keys, the last at position 4, and 4 keys on all GPUs",
    ),
    "dtype": (
        lambda p: dataclasses.replace(p, seq_lens=p.seq_lens.double()),
        r"seq_lens of key_positions is \(2,\) torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_positions_that_do_not_fit_are_rejected(case):
    change, message = WRONG[case]
    positions = change(KeyPositions.create([9, 5], offset=1, step=3))
    with pytest.raises(InvalidInputError, match=message):
        AttentionBatch.create([1, 1], [3, 2], key_positions=positions)
    whole = AttentionBatch.create([1, 1], [3, 2])
    with pytest.raises(InvalidInputError, match=message):
        dataclasses.replace(whole, key_positions=positions).check()


def test_slots_are_not_derived():
    table = torch.zeros(1, 2, dtype=torch.int32)
    assert batch_of([1], [9], block_table=table, block_size=4).slot_mapping is None


@pytest.mark.parametrize("backend", ["REFERENCE"])
def test_layer_and_batch_must_agree(backend):
    layer = Attention(2, 8, device="cpu", dtype=torch.float32, backend=backend)
    sharded = Attention(
        2, 8, device="cpu", dtype=torch.float32, backend=backend, key_positions=True
    )
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(InvalidInputError, match="the layer's spec has none, so they would be"):
        layer.build_metadata(batch_of([1], [9], block_table=table))
    with pytest.raises(InvalidInputError, match="The layer has key_positions, and the batch"):
        sharded.build_metadata(AttentionBatch.create([1], [9], block_table=table))


def test_other_lengths_on_the_device_are_found():
    layer = Attention(
        2, 8, device="cpu", dtype=torch.float32, key_positions=True, backend="REFERENCE"
    )
    table = torch.zeros(1, 1, dtype=torch.int32)
    batch = batch_of([1], [9], block_table=table)
    positions = batch.key_positions
    positions = dataclasses.replace(positions, seq_lens=positions.seq_lens + 1)
    metadata = layer.build_metadata(dataclasses.replace(batch, key_positions=positions))
    cache = torch.zeros(1, 2, 16, 2, 8)
    with pytest.raises(InvalidInputError, match="seq_lens of key_positions differs"):
        layer(torch.zeros(1, 2, 8), None, None, cache, metadata)
