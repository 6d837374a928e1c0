"""The batch of a step, made of what engines keep: padded tensors, or a table of slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from attn_dispatch.engines.attention import EngineAttention
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType

__all__ = ["batches_by_layer", "padded_batch", "slot_table_batch"]


def padded_batch(
    spec: AttentionSpec,
    *,
    query_start_loc: torch.Tensor,
    query_start_loc_cpu: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor | None,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    max_query_len: int,
    max_seq_len: int,
    num_reqs: int | None = None,
    **more: Any,
) -> AttentionBatch:
    """A batch over an engine's own tensors, without requests that only pad it.

    Requests at the end without new tokens, which engines add to reach the size of a CUDA graph, are
    left out. Tensors on the device are used as they are and may be longer than the step; those on
    the host are copied, so that the engine can fill them again. Layers of encoders have no cache:
    their keys are those of the step, and the arguments about a cache are not read.

    Args:
        spec: of the layers.
        query_start_loc: (num_reqs + 1,) int32.
        query_start_loc_cpu: the same on the host.
        seq_lens: (num_reqs,) int32, keys of each request, the new ones included.
        seq_lens_cpu: the same on the host. With spec.lengths="upper_bound" a bound of each, or None
            if max_seq_len is the only one.
        block_table: (num_reqs, max_blocks) int32.
        slot_mapping: (num_tokens,) int64.
        block_size: tokens per block of the block table.
        max_query_len: as for AttentionBatch.
        max_seq_len: as for AttentionBatch.
        num_reqs: requests, padding included; None for as many as query_start_loc_cpu has.
        **more: max_decode_query_len and shared_prefix_len, as for AttentionBatch.

    Raises:
        InvalidInputError: the layers need exact lengths on the host, and seq_lens_cpu is None.
    """
    starts = query_start_loc_cpu.tolist()
    num_reqs = len(starts) - 1 if num_reqs is None else num_reqs
    while num_reqs and starts[num_reqs] == starts[num_reqs - 1]:
        num_reqs -= 1
    query_start_loc = query_start_loc[: num_reqs + 1]
    query_start_loc_cpu = query_start_loc_cpu[: num_reqs + 1].clone()
    if not AttentionType(spec.attn_type).has_kv_cache:
        seq_lens, seq_lens_cpu, more = query_start_loc.diff(), query_start_loc_cpu.diff(), {}
    else:
        if seq_lens_cpu is None and spec.lengths == "exact":
            raise InvalidInputError(
                "seq_lens_cpu is None, and the layers were made with lengths='exact'. Give the "
                "lengths, or make the layers with lengths='upper_bound'."
            )
        if seq_lens_cpu is None:
            seq_lens_cpu = torch.full((num_reqs,), max_seq_len, dtype=torch.int32)
        else:
            seq_lens_cpu = seq_lens_cpu[:num_reqs].clone()
        more = {
            **more,
            "block_table": block_table[:num_reqs],
            "slot_mapping": slot_mapping[: starts[num_reqs]],
            "block_size": block_size,
            "lengths": spec.lengths,
        }
    return AttentionBatch(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=seq_lens[:num_reqs],
        seq_lens_cpu=seq_lens_cpu,
        max_query_len=int(max_query_len),
        max_seq_len=int(max(max_seq_len, max_query_len)),
        **more,
    )


def slot_table_batch(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    new_slots: torch.Tensor,
    page_size: int,
    first_slot: int = 0,
    translate: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> AttentionBatch:
    """A batch for an engine that has a slot for each token of each request, and no block table.

    Args:
        query_lens: new tokens of each request.
        seq_lens: keys of each request, the new ones included.
        slot_table: (max_num_reqs, max_context_len) integers, the slot of each token. A request's
            tokens fill its pages in order.
        rows: (num_reqs,) integers, the row of each request in it.
        new_slots: (num_tokens,) integers or longer, where the new keys go.
        page_size: slots per page; 1 if tokens are anywhere.
        first_slot: the first one of a request; those before it take what padding writes.
        translate: the same slots in another pool, for layers that have one; or None.

    Raises:
        InvalidInputError: as for AttentionBatch.create.
    """
    longest = max((1, *seq_lens))
    first_slots = slot_table[:, :longest:page_size].index_select(0, rows.long())
    new_slots = new_slots[: sum(query_lens)]
    if translate is not None:
        first_slots, new_slots = translate(first_slots.long()), translate(new_slots.long())
    return AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=(first_slots // page_size).to(torch.int32),
        block_size=page_size,
        slot_mapping=torch.where(new_slots < first_slot, -1, new_slots),
        device=slot_table.device,
    )


def batches_by_layer(
    attentions: Iterable[EngineAttention], make: Callable[[Hashable], AttentionBatch]
) -> dict[str, AttentionBatch]:
    """Each layer's batch by its name, for `forward_context` and for `DecodeSteps.prepare`.

    Args:
        attentions: layers, whose `group` says which of them share a batch.
        make: makes the batch of a group; it is called once for each.
    """
    batches: dict[Hashable, AttentionBatch] = {}
    found = {}
    for attention in attentions:
        if attention.group not in batches:
            batches[attention.group] = make(attention.group)
        for layer in attention.layers:
            found[layer.prefix] = batches[attention.group]
    return found
