"""AttentionBatch.shard: what each rank has together is the whole batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import (
    Attention,
    AttentionBatch,
    InvalidInputError,
    KeyPositions,
    UnsupportedError,
    merge_states,
    write_kv_cache,
)
from attn_dispatch.conformance.oracle import attention_of_request, positions_of, sees

LENS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))),
    min_size=1,
    max_size=4,
).filter(lambda lens: sum(q for q, _ in lens))


@given(lens=LENS, world=st.integers(1, 5), block=st.integers(1, 3), window=st.integers(0, 5))
def test_the_parts_of_all_ranks_are_the_whole(lens, world, block, window):
    generator = torch.Generator().manual_seed(sum(q + 7 * s for q, s in lens))
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    queries, seqs = zip(*lens, strict=True)
    query = random(sum(queries), 2, 4)
    keys, values = ([random(seq, 1, 4) for seq in seqs] for _ in range(2))
    columns = -(-max(seqs) // (block * world)) + 1
    table = torch.randperm(len(lens) * columns, generator=generator).view(len(lens), columns)
    layer = Attention(
        2,
        4,
        num_kv_heads=1,
        dtype=torch.float64,
        device="cpu",
        block_size=block,
        sliding_window=window or None,
        key_positions=True,
        returns_lse=True,
        backend="REFERENCE",
    )
    outputs, lses, filled = [], [], 0
    # The whole request is written first, as a prompt; then its last tokens are computed.
    options = {"block_table": table, "block_size": block * world}
    prompts = AttentionBatch.create(seqs, seqs, **options)
    batch = AttentionBatch.create(queries, seqs, **options)
    for rank in range(world):
        cache = torch.full((table.numel(), 2, block, 1, 4), float("nan"), dtype=torch.float64)
        slots = prompts.shard(rank, world).slot_mapping
        filled += int((slots >= 0).sum())
        write_kv_cache(torch.cat(keys), torch.cat(values), cache, slots)
        local = batch.shard(rank, world)
        assert local.seq_lens_list == [len(range(rank, seq, world)) for seq in seqs]
        assert local.seq_lens.tolist() == local.seq_lens_list
        new = [
            torch.cat([each[len(each) - q :] for each, q in zip(parts, queries, strict=True)])
            for parts in (keys, values)
        ]
        out, lse = layer(query, *new, kv_cache=cache, attn_metadata=layer.build_metadata(local))
        outputs.append(out)
        lses.append(lse)
    assert filled == sum(seqs)
    merged, lse = merge_states(outputs, lses)
    for rows, key, value, found, found_lse in zip(
        query.split(queries), keys, values, merged.split(queries), lse.split(queries), strict=True
    ):
        positions = positions_of(len(rows), len(key), "cpu")
        seen = sees(positions, len(key), causal=True, window=window or None)
        wanted, wanted_lse = attention_of_request(rows, key, value, scale=0.5, seen=seen)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(found_lse.double(), wanted_lse, rtol=0, atol=2e-6)


def test_slots_masks_and_counts_are_local():
    mask = torch.arange(2 * 5) % 3 == 0
    batch = AttentionBatch.create(
        [2],
        [5],
        block_table=torch.tensor([[3, 1]]),
        block_size=4,
        custom_mask=mask,
        max_seq_len=7,
        slot_mapping=torch.tensor([15, -1]),
    )
    first, second = batch.shard(0, 2), batch.shard(1, 2)
    assert [each.slot_mapping.tolist() for each in (first, second)] == [[-1, -1], [7, -1]]
    assert [each.block_size for each in (first, second)] == [2, 2]
    assert [each.max_seq_len for each in (first, second)] == [4, 3]
    assert torch.equal(first.request_mask(0), mask.view(2, 5)[:, ::2])
    assert torch.equal(second.request_mask(0), mask.view(2, 5)[:, 1::2])
    assert second.key_positions.offset == 1
    assert second.key_positions.step == 2
    assert batch.shard(1, 2, positions=False).key_positions is None


TABLE = torch.tensor([[0, 1]])
WRONG = {
    "a rank that does not exist": (InvalidInputError, "rank=2", {}, (2, 2)),
    "no ranks": (InvalidInputError, "world=0", {}, (0, 0)),
    "an uneven block": (InvalidInputError, "tokens_per_block", {"block_size": 3}, (0, 2)),
    "a shard": (
        InvalidInputError,
        "one rank's already",
        {"key_positions": KeyPositions.create([4], offset=0, step=1)},
        (0, 2),
    ),
    "bounds": (
        UnsupportedError,
        "upper_bound",
        {"lengths": "upper_bound", "seq_lens_upper_bound": [4]},
        (0, 2),
    ),
    "keys of its own": (UnsupportedError, "key_lens", {"key_lens": [2]}, (0, 2)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_sharded_is_rejected(case):
    error, text, more, ranks = WRONG[case]
    more = {"block_size": 4} | more
    lens = torch.tensor([4]) if "lengths" in more else [4]
    batch = AttentionBatch.create([1], lens, block_table=TABLE, **more)
    with pytest.raises(error, match=text):
        batch.shard(*ranks)
