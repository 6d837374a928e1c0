"""Steps of a layer whose keys are split over ranks, against the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from attn_dispatch import (
    Attention,
    AttentionBatch,
    ContextParallel,
    MLAAttention,
    bind_kv_caches,
    forward_context,
    kv_cache_torch_dtype,
    write_kv_cache,
    write_mla_cache,
)
from attn_dispatch.conformance.oracle import attention_of_request, positions_of, sees
from support.mla_cases import MLAStep

__all__ = ["SplitCase", "errors_of_cases", "errors_of_mla"]


@dataclass(frozen=True)
class SplitCase:
    """A step: (query_len, seq_len) of each request, and the layer."""

    name: str
    lens: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    size_v: int = 8
    sinks: bool = False
    slopes: bool = False
    mask: bool = False
    features: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    max_decode: int = 1
    block_size: int = 2
    dtype: torch.dtype = torch.float64
    tolerance: float = 2e-6  # the LSE is float32


def run_case(case: SplitCase, rank: int, world: int) -> None:
    """Run a step on this rank, and compare its heads with the oracle's."""
    generator = torch.Generator().manual_seed(len(case.name) + case.heads)

    stored = kv_cache_torch_dtype(case.features.get("kv_cache_dtype", "auto"), case.dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    def random_kv(*shape: int) -> torch.Tensor:  # what the cache can hold
        return random(*shape).to(stored).to(case.dtype)

    queries, seqs = zip(*case.lens, strict=True)
    tokens = sum(queries)
    query = random(tokens, case.heads, case.size)
    keys = [random_kv(seq, case.kv_heads, case.size) for seq in seqs]
    values = [random_kv(seq, case.kv_heads, case.size_v) for seq in seqs]
    sinks = random(case.heads) if case.sinks else None
    slopes = [0.1 * (head + 1) for head in range(case.heads)] if case.slopes else None
    masks = [
        torch.rand(q, s, generator=generator) > 0.3 if case.mask else None for q, s in case.lens
    ]
    # The global table: blocks of world * block_size positions, in a mixed order.
    per_block = case.block_size * world
    columns = max(-(-seq // per_block) for seq in seqs) + 1
    ids = torch.randperm(len(seqs) * columns, generator=generator)
    table = ids.view(len(seqs), columns).int()
    cp = ContextParallel(**case.split)
    layer = Attention(
        case.heads,
        case.size,
        num_kv_heads=case.kv_heads,
        head_size_v=case.size_v,
        dtype=case.dtype,
        block_size=case.block_size,
        sinks=sinks,
        alibi_slopes=slopes,
        custom_mask=case.mask,
        returns_lse=True,
        prefix=case.name,
        device="cpu",
        context_parallel=cp,
        **case.features,
    )
    # Whatever no step wrote is NaN.
    size = max(case.size, case.size_v)
    shape = (len(ids), 2, case.block_size, case.kv_heads, size)
    cache = torch.full(shape, float("nan"), dtype=case.dtype).to(stored)
    more = {"max_decode_query_len": case.max_decode}
    for request, (q, seq) in enumerate(case.lens):
        if earlier := seq - q:
            before = AttentionBatch.create(
                [earlier],
                [earlier],
                block_table=table[request : request + 1],
                block_size=per_block,
            )
            slots = before.shard(rank, world).slot_mapping
            write_kv_cache(keys[request][:earlier], values[request][:earlier], cache, slots)
    if case.mask:
        more["custom_mask"] = torch.cat([mask.flatten() for mask in masks])
    batch = AttentionBatch.create(queries, seqs, block_table=table, block_size=per_block, **more)
    new = [
        torch.cat([each[len(each) - q :] for each, q in zip(parts, queries, strict=True)])
        for parts in (keys, values)
    ]
    own = slice(None)
    if cp.heads == "sharded":
        own = slice(rank * case.heads // world, (rank + 1) * case.heads // world)
    out, lse = layer(
        query[:, own].contiguous(),
        *new,
        kv_cache=cache,
        attn_metadata=layer.build_metadata(batch),
    )
    features = case.features
    expected = [
        attention_of_request(
            each,
            keys[i],
            values[i],
            scale=case.size**-0.5,
            seen=sees(
                positions_of(len(each), seqs[i], "cpu"),
                seqs[i],
                causal=features.get("causal", True),
                window=features.get("sliding_window"),
                chunk=features.get("attention_chunk"),
                mask=masks[i],
            ),
            cap=features.get("logits_soft_cap"),
            slopes=slopes,
            sinks=None if sinks is None else sinks.tolist(),
        )
        for i, each in enumerate(query.split(queries))
    ]
    for name, found, index in (("output", out, 0), ("lse", lse, 1)):
        wanted = torch.cat([each[index] for each in expected])[:, own]
        error = (found.double() - wanted).abs().nan_to_num(posinf=1e9, nan=1e9)
        error[(found == wanted) | (found.isneginf() & wanted.isneginf())] = 0
        largest = error.max().item() if error.numel() else 0.0
        assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
        assert largest <= case.tolerance, f"{name} differs by {largest:.1e}"


def run_mla(step: MLAStep, rank: int, world: int, split: dict[str, Any], max_decode: int) -> None:
    """Run a step of latent attention on this rank, and compare its heads with the oracle's."""
    block_size = step.spec.block_size
    per_block = block_size * world
    columns = max(-(-seq // per_block) for seq in step.seq_lens)
    table = torch.arange(len(step.seq_lens) * columns).flip(0).view(-1, columns)
    cache = torch.full((table.numel(), block_size, step.width), float("nan"), dtype=step.spec.dtype)
    for request, rows in enumerate(step.meant):
        earlier = len(rows) - step.query_lens[request]
        before = AttentionBatch.create(
            [earlier], [earlier], block_table=table[request : request + 1], block_size=per_block
        )
        parts = rows[:earlier].split([step.dims.kv_lora_rank, step.dims.qk_rope_head_dim], -1)
        write_mla_cache(*parts, cache, before.shard(rank, world).slot_mapping)
    cp = ContextParallel(**split)
    layer = MLAAttention(
        step.heads,
        step.dims,
        step.weight,
        step.scale,
        dtype=step.spec.dtype,
        device="cpu",
        block_size=block_size,
        prefix="mla",
        sliding_window=step.spec.sliding_window,
        context_parallel=cp,
    )
    bind_kv_caches([layer], {"mla": cache})
    batch = AttentionBatch.create(
        step.query_lens,
        step.seq_lens,
        block_table=table,
        block_size=per_block,
        max_decode_query_len=max_decode,
    )
    own = slice(rank * step.heads // world, (rank + 1) * step.heads // world)
    with forward_context(batch):
        out = layer(step.query[:, own].contiguous(), step.latents, step.rotated)
    error = (out - step.expected()[0][:, own]).abs().max().item()
    assert error <= 2e-6, f"output differs by {error:.1e}"


def errors_of_mla(rank: int, world: int) -> dict[str, str]:
    """What went wrong with latent attention on this rank."""
    found = {}
    for name, fields, split in (
        ("mla", {}, {}),
        ("mla, window, reduce-scatter", {"sliding_window": 4}, {"combine": "ag_rs"}),
    ):
        for max_decode in (1, 3):
            step = MLAStep((1, 5, 0, 3, 1), (9, 5, 4, 7, 3), heads=4, **fields)
            try:
                run_mla(step, rank, world, split, max_decode)
            except Exception as error:
                found[f"{name} {max_decode}"] = f"{type(error).__name__}: {error}"
            dist.barrier()
    return found


def errors_of_cases(rank: int, world: int, cases: list[SplitCase]) -> dict[str, str]:
    """What went wrong on this rank, by the case's name."""
    found = {}
    for case in cases:
        try:
            run_case(case, rank, world)
        except Exception as error:
            found[case.name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return found
