"""AttentionBatch.create derives the slots of keys that are not the query's rows."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import Attention, AttentionBatch, allocate_kv_cache, attention, write_kv_cache
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape

TABLE = torch.tensor([[3, 1], [2, 0], [5, 4]])


def slots(query_lens, seq_lens, key_lens, **more):
    batch = AttentionBatch.create(
        query_lens, seq_lens, key_lens=key_lens, block_table=TABLE, block_size=4, **more
    )
    return None if batch.slot_mapping is None else batch.slot_mapping.tolist()


def test_the_new_keys_are_the_last_ones_of_their_request():
    assert slots([1, 2, 1], [6, 3, 8], [6, 0, 2]) == [12, 13, 14, 15, 4, 5, 18, 19]


def test_a_request_may_have_more_queries_than_keys():
    assert slots([9, 1, 1], [2, 1, 1], [2, 1, 1]) == [12, 13, 8, 20]


def test_no_new_keys_need_no_slots():
    assert slots([1, 1, 1], [6, 3, 8], [0, 0, 0]) == []


def test_keys_of_a_request_without_keys_are_padding():
    assert slots([1, 1, 1], [0, 3, 8], [2, 1, 0]) == [-1, -1, 10]


def test_given_slots_are_kept():
    assert slots([1, 1, 1], [6, 3, 8], [1, 1, 0], slot_mapping=torch.tensor([7, -1])) == [7, -1]


def test_without_a_block_size_nothing_is_derived():
    batch = AttentionBatch.create([1], [6], key_lens=[6], block_table=TABLE[:1])
    assert batch.slot_mapping is None


def test_equal_lengths_give_the_same_slots_as_no_key_lens():
    assert slots([2, 1, 3], [6, 3, 8], [2, 1, 3]) == slots([2, 1, 3], [6, 3, 8], None)


@pytest.mark.parametrize(
    ("seq_lens", "key_lens", "message"),
    [
        ([6, 3, 8], [7, 0, 0], "Request 0 has 7 new rows of key and 6 keys"),
        ([9, 3, 8], [1, 0, 0], "2 blocks of 4 tokens for a request, and the longest has 9 keys"),
    ],
)
def test_keys_without_room_are_rejected(seq_lens, key_lens, message):
    with pytest.raises(InvalidInputError, match=message):
        slots([1, 1, 1], seq_lens, key_lens)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_cross_attention_over_derived_slots(backend):
    """The encoder's keys are written once, then read by steps without keys."""
    torch.manual_seed(0)
    cache = allocate_kv_cache(kv_cache_shape(6, 4, 2, 16), STRIDE_ORDERS["NHD"], torch.float32)
    layer = Attention(
        4,
        16,
        num_kv_heads=2,
        dtype=torch.float32,
        device="cpu",
        block_size=4,
        attn_type="encoder_decoder",
        backend=backend,
    )
    encoder_lens, table = [7, 5], TABLE[:2]
    key, value = torch.randn(2, 12, 2, 16)
    by_hand = cache.clone()
    places = [12, 13, 14, 15, 4, 5, 6, 8, 9, 10, 11, 0]
    write_kv_cache(key, value, by_hand, torch.tensor(places))
    for query_lens, key_lens in (([3, 1], encoder_lens), ([1, 1], [0, 0])):
        batch = AttentionBatch.create(
            query_lens, encoder_lens, key_lens=key_lens, block_table=table, block_size=4
        )
        query = torch.randn(batch.num_tokens, 4, 16)
        new = (key, value) if sum(key_lens) else (None, None)
        output = layer(query, *new, kv_cache=cache, attn_metadata=layer.build_metadata(batch))
        expected = attention(
            query, key, value, query_lens=query_lens, seq_lens=encoder_lens, causal=False
        )
        torch.testing.assert_close(output, expected)
        assert torch.equal(cache, by_hand)
