"""If one rank rejects a layer, fails or dies, every rank raises, within a bounded time."""

from __future__ import annotations

import copy
import os
import pickle
import time

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    BackendFailure,
    ContextParallel,
    InvalidInputError,
    MLAAttention,
    MLADims,
    UnsupportedError,
    plan_kv_cache,
)
from attn_dispatch.backends.reference import torch_ref
from support.ranks import run_on_ranks

SMALL = {"num_heads": 4, "head_size": 8, "num_kv_heads": 2, "block_size": 2, "device": "cpu"}


def layer_of(**more):
    options = {"context_parallel": ContextParallel(), "backend": "REFERENCE"} | more
    return Attention(**(SMALL | options))


def step_of(layer, world, lens=((1, 5), (1, 3))):
    queries, seqs = zip(*lens, strict=True)
    table = torch.arange(len(lens) * 4).view(len(lens), 4)
    batch = AttentionBatch.create(queries, seqs, block_table=table, block_size=2 * world)
    cache = torch.zeros(table.numel(), 2, 2, 2, 8)
    tokens = sum(queries)
    new = torch.ones(tokens, 2, 8)
    metadata = layer.build_metadata(batch)
    return lambda: layer(
        torch.ones(tokens, 4 // world, 8), new, new, kv_cache=cache, attn_metadata=metadata
    )


def broken(*args, **kw):
    raise RuntimeError("the kernel is broken")


def fail_in_turn(rank, world):
    # A layer that one rank rejects is made on none.
    backend = "TORCH_SDPA" if rank == 1 else "REFERENCE"
    text = r"positions" if rank == 1 else r"on every rank.*rank 1: UnsupportedError"
    with pytest.raises(UnsupportedError, match=text):
        layer_of(backend=backend, sliding_window=4)
    layer = layer_of()
    works = step_of(layer, world)()
    # A backend that raises on one rank.
    begin = time.monotonic()
    for lens in (((1, 5), (1, 3)), ((5, 7), (2, 2)), ((1, 5), (4, 4))):
        original = torch_ref.ReferenceImpl.forward
        call = step_of(layer, world, lens)
        if rank == 1:
            torch_ref.ReferenceImpl.forward = broken
        merged = any(q == 1 for q, _ in lens)  # a gathered prefill alone has no later message
        if rank == 1 or merged:
            with pytest.raises(BackendFailure, match=r"rank 1.*(broken|See the output)"):
                call()
        else:
            call()
        torch_ref.ReferenceImpl.forward = original
    assert time.monotonic() - begin < 20
    assert torch.equal(step_of(layer, world)(), works)  # the ranks are still in step
    # A rank that dies.
    if rank == 1:
        os._exit(7)
    with pytest.raises(BackendFailure, match="another of the 2 ranks"):
        step_of(layer, world)()
    assert time.monotonic() - begin < 60
    return "done"


def test_all_ranks_raise():
    assert run_on_ranks(2, fail_in_turn, may_end=(1,)) == ["done", None]


REJECTED = {
    "encoder": ({"attn_type": "encoder_only"}, "attn_type"),
    "shard": ({"key_positions": True}, "key_positions"),
    "bounds": ({"lengths": "upper_bound"}, "upper_bound"),
    "graph": ({"cuda_graph": True, "sliding_window": 4}, "not captured"),
    "heads": ({"num_heads": 3, "num_kv_heads": 1}, "3 query heads are not a multiple of 2"),
    "gather": (
        {"kv_cache_dtype": "fp8_e4m3", "context_parallel": {"prefill": "gather"}},
        "prefill='gather' needs",
    ),
}


def reject(rank, world):
    for given, text in REJECTED.values():
        fields = dict(given)
        cp = ContextParallel(**fields.pop("context_parallel", {}))
        with pytest.raises(UnsupportedError, match=text):
            layer_of(context_parallel=cp, **fields)
    with pytest.raises(InvalidInputError, match="sinks must be"):
        layer_of(sinks=torch.zeros(2))
    with pytest.raises(InvalidInputError, match="context_parallel is a int"):
        layer_of(context_parallel=2)
    dims = MLADims(kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3)
    with pytest.raises(UnsupportedError, match="key_positions"):
        MLAAttention(
            4, dims, torch.zeros(32, 6), prefill="expanded", context_parallel=ContextParallel()
        )
    # The plan is that of a rank's part, and the engine's blocks hold the tokens of all ranks.
    layer = layer_of(prefix="a", block_size=None)
    plan = plan_kv_cache([layer])
    assert (plan.context_parallel, plan.tokens_per_block) == (2, 2 * plan.block_size)
    with pytest.raises(InvalidInputError, match="on 2 ranks"):
        plan_kv_cache([layer], context_parallel=4)
    copied = copy.deepcopy(layer)
    assert copied.context_parallel is layer.context_parallel
    assert torch.equal(step_of(layer, world)(), step_of(copied, world)())
    assert "rank" in repr(layer)
    with pytest.raises(InvalidInputError, match="cannot be pickled"):
        pickle.dumps(layer)
    with pytest.raises(InvalidInputError, match="another context_parallel"):
        ContextParallel().explain(layer)
    assert "REFERENCE" in layer.context_parallel.explain(layer)
    specs = plan_kv_cache({"a": layer.spec}, "cpu", context_parallel=4)
    assert specs.tokens_per_block == 4 * specs.block_size
    assert plan_kv_cache({"a": layer.spec}, "cpu").tokens_per_block == specs.block_size
    return "done"


def test_what_cannot_be_split_says_why():
    assert run_on_ranks(2, reject) == ["done"] * 2
