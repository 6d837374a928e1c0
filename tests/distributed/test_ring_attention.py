"""ring_attention, in processes over gloo, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    ContextParallel,
    InvalidInputError,
    UnsupportedError,
    ring_attention,
    zigzag_rows,
)
from attn_dispatch.conformance.oracle import attention_of_request, positions_of, sees
from support.ranks import run_on_ranks

LENGTHS = [[16], [23, 5, 1, 0, 12], [3]]
OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "cap, sinks": {"logits_soft_cap": 2.0, "sinks": True},
    "all-gather": {"method": "all_gather"},
    "all-gather, not causal, sinks": {"method": "all_gather", "causal": False, "sinks": True},
    "window": {"sliding_window": 5},
    "chunks, alibi": {"attention_chunk": 4, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_row_is_on_one_rank(lengths, world):
    rows = [zigzag_rows(lengths, rank, world) for rank in range(world)]
    assert torch.cat(rows).sort().values.tolist() == list(range(sum(lengths)))
    assert max(map(len, rows)) - min(map(len, rows)) <= 2 * len(lengths)


def test_causal_work_is_balanced():
    work = [int((zigzag_rows([64], rank, 4) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


def prompts(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    random = lambda heads, size: torch.randn(
        sum(lengths), heads, size, generator=generator, dtype=torch.float64
    )
    return random(4, 8), random(2, 8), random(2, 6), torch.tensor([0.5, -1.0, 2.0, 0.0])


def expected(lengths, query, key, value, *, sinks=None, **options):
    found = []
    for rows in zip(*(each.split(lengths) for each in (query, key, value)), strict=True):
        length = len(rows[0])
        seen = sees(
            positions_of(length, length, "cpu"),
            length,
            causal=options.get("causal", True),
            window=options.get("sliding_window"),
            chunk=options.get("attention_chunk"),
        )
        found.append(
            attention_of_request(
                *rows,
                scale=8**-0.5,
                seen=seen,
                cap=options.get("logits_soft_cap"),
                slopes=options.get("alibi_slopes"),
                sinks=None if sinks is None else sinks.tolist(),
            )
        )
    return [torch.cat(each) for each in zip(*found, strict=True)]


def largest_errors(rank, world):
    wrong = {}
    for lengths in LENGTHS:
        query, key, value, sinks = prompts(lengths)
        rows = zigzag_rows(lengths, rank, world)
        own = [each[rows] for each in (query, key, value)]
        for name, options in OPTIONS.items():
            given = dict(options)
            if given.pop("sinks", False):
                given["sinks"] = sinks
            found = ring_attention(*own, lengths, return_lse=True, **given)
            for what, wanted in zip(found, expected(lengths, query, key, value, **given),
                                    strict=True):  # fmt: skip
                same = torch.allclose(what.double(), wanted[rows], rtol=0, atol=2e-6)
                if not same or what.shape != wanted[rows].shape:
                    wrong[name, tuple(lengths)] = (what.double() - wanted[rows]).abs().max()
    return wrong


def continue_after_a_prompt(rank, world):
    """The ring fills the cache of a layer, which decodes from it."""
    lengths = [11, 6]
    query, key, value, _ = prompts(lengths)
    value = torch.cat([value, value[..., :2]], -1)
    layer = Attention(4, 8, num_kv_heads=2, dtype=torch.float64, device="cpu", block_size=2,
                      context_parallel=ContextParallel())  # fmt: skip
    table = torch.tensor([[5, 1, 3], [2, 0, 4]])[:, : -(-12 // (2 * world))]
    prompt, decode = (
        AttentionBatch.create(new, seqs, block_table=table, block_size=2 * world)
        for new, seqs in (([10, 5], [10, 5]), ([1, 1], lengths))
    )
    whole = torch.cat([torch.arange(10), 11 + torch.arange(5)])
    wrong = {}
    for method in ("ring", "all_gather"):
        cache = torch.full((6, 2, 2, 2, 8), float("nan"), dtype=torch.float64)
        rows = whole[zigzag_rows([10, 5], rank, world)]
        ring_attention(
            query[rows], key[rows], value[rows], [10, 5], method=method,
            kv_cache=cache, slot_mapping=prompt.slot_mapping,
        )  # fmt: skip
        last, heads = torch.tensor([10, 16]), slice(rank * 4 // world, (rank + 1) * 4 // world)
        metadata = layer.build_metadata(decode)
        found = layer(
            query[last, heads].contiguous(), key[last], value[last], cache, metadata
        )  # fmt: skip
        wanted = expected(lengths, query, key, value)[0][last, heads]
        if not torch.allclose(found, wanted, rtol=0, atol=2e-6):
            wrong[method] = (found - wanted).abs().max()
    return wrong


def reject(rank, world):
    query, key, value, _ = prompts([8])
    rows = zigzag_rows([8], rank, world)
    own = [each[rows] for each in (query, key, value)]
    cache = torch.zeros(4, 2, 2, 2, 8)
    for arguments, options, error, text in (
        ((query, key, value, [8]), {}, InvalidInputError, "zigzag_rows"),
        ((*own, [8]), {"method": "both"}, InvalidInputError, "method='both'"),
        ((*own, [8]), {"method": "ring", "sliding_window": 4}, UnsupportedError, "all_gather"),
        ((*own, [8]), {"kv_cache": cache}, InvalidInputError, "go together"),
        ((*own, [8]), {"kv_cache": cache, "slot_mapping": torch.arange(3)}, InvalidInputError,
         "has 3 slots"),
        ((*own, [8]), {"kv_cache": cache.to(torch.float8_e4m3fn), "slot_mapping": torch.arange(8)},
         UnsupportedError, "float8"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            ring_attention(*arguments, **options)
    return {}


def check_all(rank, world):
    return largest_errors(rank, world) | continue_after_a_prompt(rank, world) | reject(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_prompts_over_ranks_are_exact(world):
    assert run_on_ranks(world, check_all) == [{}] * world
