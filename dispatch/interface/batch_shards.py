"""What one rank of a context-parallel group keeps and computes of a batch.

The position p of a request is on rank p mod world. A block of the engine's one block table holds
world * B positions, and B of them are in the block with the same id of each rank's cache. So the
table is the same on all ranks, and a slot s of it is slot s // world on rank s mod world.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attn_dispatch.arguments import INT32_MAX, as_int
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.key_positions import KeyPositions

__all__ = ["local_length", "shard_batch"]


def local_length(length: int, rank: int, world: int) -> int:
    """How many of the positions 0 to length - 1 are on this rank."""
    return max(0, -(-(length - rank) // world))


def shard_batch(batch: Any, rank: int, world: int, *, positions: bool = True) -> Any:
    """See AttentionBatch.shard."""
    world = as_int("world", world, 1, INT32_MAX)
    rank = as_int("rank", rank, 0, world - 1)
    batch.check()
    _check_can_be_sharded(batch, world)
    lengths = [local_length(length, rank, world) for length in batch.seq_lens_list]
    own = (batch.seq_lens + (world - 1 - rank)) // world
    slots, mask = batch.slot_mapping, batch.custom_mask
    if slots is not None:
        is_own = (slots >= 0) & (slots % world == rank)
        slots = torch.where(is_own, slots // world, -1)
    if mask is not None:
        columns = (batch.request_mask(i)[:, rank::world] for i in range(batch.num_reqs))
        mask = torch.cat([each.reshape(-1) for each in columns] or [mask])
    key_positions = None
    if positions:
        key_positions = KeyPositions(
            offset=rank, step=world, seq_lens=batch.seq_lens, seq_lens_cpu=batch.seq_lens_cpu
        )
    return dataclasses.replace(
        batch,
        seq_lens=own.to(batch.seq_lens.dtype),
        seq_lens_cpu=torch.tensor(lengths, dtype=torch.int32, device="cpu"),
        max_seq_len=local_length(batch.max_seq_len, rank, world),
        slot_mapping=slots,
        custom_mask=mask,
        block_size=None if batch.block_size is None else batch.block_size // world,
        key_positions=key_positions,
        shared_prefix_len=0,
    )


def _check_can_be_sharded(batch: Any, world: int) -> None:
    if batch.key_positions is not None:
        raise InvalidInputError(
            "The batch has key_positions, so its keys are one rank's already. Shard the batch of "
            "all keys."
        )
    if batch.lengths != "exact":
        raise UnsupportedError(
            "The batch has lengths='upper_bound', and which keys are on a rank follows from the "
            "true key counts. Give exact seq_lens to steps that are sharded."
        )
    if batch.key_start_loc_cpu is not None:
        raise UnsupportedError(
            "The batch has key_lens of its own, as in cross-attention, which is not sharded."
        )
    if batch.block_size is not None and batch.block_size % world:
        raise InvalidInputError(
            f"The batch has blocks of {batch.block_size} tokens, which {world} ranks do not share "
            "evenly. Make it with block_size=plan.tokens_per_block, of "
            f"plan_kv_cache(..., context_parallel={world})."
        )
