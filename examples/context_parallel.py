"""One request's keys on several ranks: a long prompt by a ring, then decodes.

    torchrun --nproc-per-node 2 examples/context_parallel.py

It runs over NCCL with a GPU for each process, and over gloo without GPUs. Rank 0 compares each
result with one call over the whole sequence in float64.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attn_dispatch import (
    Attention,
    AttentionBatch,
    ContextParallel,
    attention,
    bind_kv_caches,
    forward_context,
    plan_kv_cache,
    ring_attention,
    zigzag_rows,
)

HEADS, KV_HEADS, HEAD_SIZE, PROMPT, STEPS = 8, 2, 32, 101, 3


def report(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Print the largest difference over all ranks."""
    error = (found.double() - wanted).abs().max().float().reshape(1)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"{what}: largest difference from float64 {float(error):.1e}", flush=True)


def main() -> None:
    """Run a prompt and some decodes on every rank."""
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else "cpu"
    if has_gpus:
        torch.cuda.set_device(device)
    world = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cuda" if has_gpus else "cpu", (world,), mesh_dim_names=("cp",))
    cp = ContextParallel(mesh["cp"])
    rank = mesh.get_local_rank("cp")
    layer = Attention(
        HEADS,
        HEAD_SIZE,
        num_kv_heads=KV_HEADS,
        dtype=torch.float32,
        device=device,
        block_size=None,
        prefix="layers.0",
        context_parallel=cp,
    )
    plan = plan_kv_cache([layer])
    length = PROMPT + STEPS
    blocks = -(-length // plan.tokens_per_block)
    bind_kv_caches([layer], plan.allocate(blocks, device))
    if rank == 0:
        print(f"{plan.tokens_per_block} tokens in a block, {plan.block_size} on each rank")
        print(cp.explain(layer))

    # The same on every rank, as the activations of a model would be.
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, heads, HEAD_SIZE, generator=random).to(device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    wanted = attention(query.double(), key.double(), value.double())
    table = torch.arange(blocks).flip(0)[None]

    prompt = AttentionBatch.create(
        [PROMPT], [PROMPT], block_table=table, block_size=plan.tokens_per_block, device=device
    )
    rows = zigzag_rows([PROMPT], rank, world).to(device)
    found = ring_attention(
        query[rows],
        key[rows],
        value[rows],
        [PROMPT],
        mesh["cp"],
        kv_cache=layer.kv_cache,
        slot_mapping=prompt.slot_mapping,
    )
    report("prompt, ring", found, wanted[rows])

    own = slice(rank * HEADS // world, (rank + 1) * HEADS // world)  # as under tensor parallelism
    for position in range(PROMPT, length):
        batch = AttentionBatch.create(
            [1],
            [position + 1],
            block_table=table,
            block_size=plan.tokens_per_block,
            device=device,
        )
        row = slice(position, position + 1)
        with forward_context(batch):
            found = layer(query[row, own].contiguous(), key[row], value[row])
        report(f"token {position}", found, wanted[row, own])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
