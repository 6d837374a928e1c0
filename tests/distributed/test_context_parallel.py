"""Layers whose keys are split over ranks, in processes over gloo, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from support.ranks import run_on_ranks
from support.split_cases import SplitCase, errors_of_cases, errors_of_mla

#: Fewer tokens than ranks, empty shards, decodes, and a request without keys.
DECODES = ((1, 13), (1, 1), (1, 2), (1, 30), (1, 5))
VERIFY = ((3, 13), (3, 3), (2, 7), (1, 1), (4, 30))
MIXED = ((1, 9), (5, 5), (1, 20), (6, 17), (1, 2))

MERGED = {"prefill": "merge"}
CASES = [
    SplitCase("decode", DECODES),
    SplitCase("decode, reduce-scatter", DECODES, split={"combine": "ag_rs"}),
    SplitCase("decode, sinks", DECODES, sinks=True),
    SplitCase("decode, sinks, reduce-scatter", DECODES, sinks=True, split={"combine": "ag_rs"}),
    SplitCase("decode, all heads", DECODES, heads=3, kv_heads=1, split={"heads": "replicated"}),
    SplitCase("decode, all heads, all-reduce, sinks", DECODES, sinks=True,
              split={"heads": "replicated", "combine": "ag_rs"}),
    SplitCase("decode, window", DECODES, features={"sliding_window": 4}),
    SplitCase("decode, cap, head sizes", DECODES, size=16, size_v=8,
              features={"logits_soft_cap": 2.0}),
    SplitCase("decode, one KV head", DECODES, heads=8, kv_heads=1),
    SplitCase("decode, alibi", DECODES, slopes=True),
    SplitCase("verification", VERIFY, max_decode=4),
    SplitCase("verification, window, cap, sinks", VERIFY, max_decode=4, sinks=True,
              features={"sliding_window": 5, "logits_soft_cap": 2.0}),
    SplitCase("verification, tree mask", VERIFY, max_decode=4, mask=True),
    SplitCase("prefill merged", MIXED, split=MERGED),
    SplitCase("prefill merged, window, sinks", MIXED, sinks=True, split=MERGED,
              features={"sliding_window": 3}),
    SplitCase("prefill gathered", MIXED, split={"prefill": "gather"}),
    SplitCase("prefill gathered, all", ((5, 5), (6, 17), (2, 3)), split={"prefill": "gather"},
              size=16, size_v=8),
    SplitCase("prefill gathered, window, sinks, alibi", MIXED, sinks=True, slopes=True,
              features={"sliding_window": 3, "logits_soft_cap": 3.0},
              split={"prefill": "gather"}),
    SplitCase("prefill, all heads, gathered", MIXED, sinks=True,
              split={"prefill": "gather", "heads": "replicated"}),
    SplitCase("prefill, auto", MIXED, heads=8, kv_heads=4),
    SplitCase("fp8", MIXED, features={"kv_cache_dtype": "fp8_e4m3"}),
    SplitCase("bfloat16", MIXED, heads=8, dtype=torch.bfloat16, tolerance=0.04),
    SplitCase("not causal", VERIFY, max_decode=4, features={"causal": False}),
    SplitCase("prefill, chunks", MIXED, features={"attention_chunk": 4}),
]  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_a_split_layer_is_exact(world):
    cases = CASES if world == 2 else [each for each in CASES if each.heads % 4 == 0]
    assert run_on_ranks(world, errors_of_cases, cases) == [{}] * world


def test_split_latent_attention_is_exact():
    assert run_on_ranks(2, errors_of_mla) == [{}] * 2
