"""What reads the contents of a batch's tensors: checks, and true lengths. On a GPU it waits."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch_checks import check_columns
from attn_dispatch.interface.batch_lengths import check_true_lengths
from attn_dispatch.interface.reach import Reach

if TYPE_CHECKING:
    from attn_dispatch.interface.batch import AttentionBatch
    from attn_dispatch.interface.kv_view import KVCache
    from attn_dispatch.interface.spec import AttentionSpec

__all__ = [
    "OVER_STATIC_BUFFERS",
    "check_batch_contents",
    "check_slots",
    "first_seen_keys",
    "with_exact_lengths",
]

#: An entry of `AttentionBatch.checked`: the tensors are the static buffers of graphs. They hold
#: another step each time, and the host copies are those of the capture.
OVER_STATIC_BUFFERS = ("static buffers",)


_ALL = Reach()


def check_batch_contents(
    batch: AttentionBatch, kv_cache: KVCache | None, reach: Reach = _ALL
) -> None:
    """Check the contents of the batch's tensors, again only if one of them was modified.

    Blocks that a sliding window has passed for every query of a request, or that are before the
    chunk of its first query, may have been freed, so their ids are not checked. A batch over the
    static buffers of graphs is not checked; the engine checks the batch that it copies there.

    Raises:
        InvalidInputError: lengths are not monotone, differ from their host copies or exceed their
            bounds there; a block id or a slot is out of range, or two tokens share a slot.
    """
    if OVER_STATIC_BUFFERS in batch.checked:
        return
    watched = [batch.query_start_loc, batch.seq_lens, batch.block_table, batch.slot_mapping]
    if batch.key_positions is not None:
        watched.append(batch.key_positions.seq_lens)
    tensors = [tensor for tensor in watched if tensor is not None]
    form = None if kv_cache is None else tuple(kv_cache.shape)
    signature: tuple[object, ...] | None = None
    if not any(tensor.is_inference() for tensor in tensors):  # these have no version
        signature = ("contents", form, reach, *(tensor._version for tensor in tensors))
        if signature in batch.checked:
            return
    _check_lengths(batch)
    if kv_cache is not None and batch.block_table is not None:
        num_blocks = kv_cache.shape[0]
        block_size = kv_cache.shape[2] if len(kv_cache.shape) == 5 else kv_cache.shape[1]
        _check_block_ids(batch, batch.block_table, num_blocks, block_size, reach)
        if batch.slot_mapping is not None:
            check_slots(batch.slot_mapping, num_blocks * block_size)
    if signature is not None:
        batch.checked.add(signature)


def _check_lengths(batch: AttentionBatch) -> None:
    starts = batch.query_start_loc.tolist()
    if not starts or starts[0] != 0 or starts != sorted(starts):
        raise InvalidInputError(
            f"query_start_loc is {starts[:8]}; it must ascend from 0. AttentionBatch.create makes "
            "one from the lengths."
        )
    seq_lens = batch.seq_lens.tolist()
    if batch.lengths == "upper_bound":
        check_true_lengths(seq_lens, batch.new_lens, batch.seq_lens_list)
        seq_lens = batch.seq_lens_list
    if starts != batch.query_start_list or seq_lens != batch.seq_lens_list:
        raise InvalidInputError(
            "query_start_loc or seq_lens differs from its host copy. Make both from the same "
            "lengths; AttentionBatch.create does."
        )
    positions = batch.key_positions
    if positions is not None and positions.seq_lens.tolist() != batch.global_lens:
        raise InvalidInputError(
            "seq_lens of key_positions differs from its host copy. Make both from the same "
            "lengths; KeyPositions.create does."
        )


def _check_block_ids(
    batch: AttentionBatch,
    table: torch.Tensor,
    num_blocks: int,
    block_size: int,
    reach: Reach,
) -> None:
    lens = batch.seq_lens.to(table.device)
    if batch.lengths == "upper_bound":  # only now it is known how many columns are needed
        check_columns(table, int(lens.max()) if len(lens) else 0, block_size)
    first_keys = torch.arange(table.shape[1], device=table.device) * block_size
    used = first_keys < lens[:, None]
    if reach.left is not None or reach.chunk is not None:
        exact = batch
        if batch.lengths == "upper_bound":
            exact = dataclasses.replace(batch, lengths="exact", seq_lens_cpu=batch.seq_lens.cpu())
        seen = torch.tensor(first_seen_keys(exact, reach), device=table.device)
        used &= first_keys + block_size > seen[:, None]
    wrong = used & ((table < 0) | (table >= num_blocks))
    if bool(wrong.any()):
        request, column = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"block_table of request {request} names block {int(table[request, column])}; the "
            f"cache has blocks 0 to {num_blocks - 1}. Give blocks of this layer's cache."
        )


def first_seen_keys(batch: AttentionBatch, reach: Reach) -> list[int]:
    """For each request the first key that one of its queries may see, apart from ranges."""
    starts = map(operator.sub, batch.global_lens, batch.query_lens)
    first = [reach.first(position) for position in starts]
    positions = batch.key_positions
    return first if positions is None else [positions.keys_before(each) for each in first]


def check_slots(slot_mapping: torch.Tensor, num_slots: int) -> None:
    """Check that slots exist and that no two tokens have the same one.

    Raises:
        InvalidInputError: a slot is neither −1 nor below num_slots, or is named twice.
    """
    slots = slot_mapping[slot_mapping != -1]
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise InvalidInputError(
            f"slot_mapping names slots {int(slots.min())} to {int(slots.max())}; the cache has "
            f"slots 0 to {num_slots - 1}, and −1 is padding."
        )
    if len(slots.unique()) != len(slots):
        raise InvalidInputError(
            "slot_mapping sends two tokens to the same slot. Give each its own; −1 is padding."
        )


def with_exact_lengths(batch: AttentionBatch, spec: AttentionSpec) -> AttentionBatch:
    """The batch with the true key counts on the host; itself if it has them.

    Reading them from a GPU waits for it. They are not read for layers that take no upper bounds.

    Raises:
        InvalidInputError: one exceeds its bound.
    """
    if batch.lengths == "exact" or spec.lengths == "exact":
        return batch
    seq_lens = batch.seq_lens.cpu()
    check_true_lengths(seq_lens.tolist(), batch.new_lens, batch.seq_lens_list)
    return dataclasses.replace(batch, lengths="exact", seq_lens_cpu=seq_lens)
