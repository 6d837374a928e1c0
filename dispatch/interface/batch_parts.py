"""Some requests of a batch as a batch of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from attn_dispatch.interface.batch_checks import rows_of
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.types import PlaceholderRange

__all__ = ["select"]

#: A batch, its rows of query and output, and those of key and value.
Part: TypeAlias = "tuple[Any, slice | torch.Tensor, slice | torch.Tensor]"


def select(batch: Any, chosen: list[int]) -> Part:
    """The chosen requests of an AttentionBatch, in ascending order, as a batch of their own.

    Returns:
        The batch, and its rows of query and output, and of key and value: slices if the requests
        are consecutive, and else index tensors.
    """
    first, end = chosen[0], chosen[-1] + 1
    mask, ranges = _mask_of(batch, chosen), batch.multi_modal_placeholder_index_maps
    ranges = None if ranges is None else _ranges_of(ranges, chosen)
    own: dict[str, Any] = {"custom_mask": mask, "multi_modal_placeholder_index_maps": ranges}
    if end - first == len(chosen):
        return _between(batch, first, end, own)
    device, positions = batch.seq_lens.device, batch.key_positions
    tokens, query_lens = rows_of(chosen, batch.query_start_list, device)
    keys, key_lens = rows_of(chosen, batch.key_starts, device)
    requests = to_device(torch.tensor(chosen, device="cpu"), device)
    seq_lens = [batch.seq_lens_list[i] for i in chosen]
    part = batch.of_lengths(
        torch.tensor(query_lens, dtype=torch.int32, device="cpu"),
        torch.tensor(seq_lens, dtype=torch.int32, device="cpu"),
        None
        if batch.key_start_loc_cpu is None
        else torch.tensor(key_lens, dtype=torch.int32, device="cpu"),
        device,
        None if batch.lengths == "exact" else batch.seq_lens[requests],
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table=None if batch.block_table is None else batch.block_table[requests],
        slot_mapping=None if batch.slot_mapping is None else batch.slot_mapping[keys],
        block_size=batch.block_size,
        enable_kv_scales_calculation=batch.enable_kv_scales_calculation,
        max_decode_query_len=batch.max_decode_query_len,
        lengths=batch.lengths,
        key_positions=None if positions is None else positions.select(chosen),
        **own,
    )
    return part, tokens, keys


def _between(batch: Any, first: int, end: int, own: dict[str, Any]) -> Part:
    """The requests [first, end); nothing is copied from the host."""
    requests, bounds = slice(first, end), slice(first, end + 1)
    tokens, keys = (
        slice(starts[first], starts[end]) for starts in (batch.query_start_list, batch.key_starts)
    )
    key_starts, table, slots = batch.key_start_loc_cpu, batch.block_table, batch.slot_mapping
    positions = batch.key_positions
    part = dataclasses.replace(
        batch,
        query_start_loc=batch.query_start_loc[bounds] - tokens.start,
        seq_lens=batch.seq_lens[requests].clone(),  # aligned, as kernels expect
        query_start_loc_cpu=batch.query_start_loc_cpu[bounds] - tokens.start,
        seq_lens_cpu=batch.seq_lens_cpu[requests],
        max_query_len=max(batch.query_lens[requests]),
        max_seq_len=max(batch.seq_lens_list[requests]),
        block_table=None if table is None else table[requests],
        slot_mapping=None if slots is None else slots[keys],
        key_start_loc_cpu=None if key_starts is None else key_starts[bounds] - keys.start,
        key_positions=None if positions is None else positions.between(first, end),
        **own,
    )
    return part, tokens, keys


def _mask_of(batch: Any, chosen: list[int]) -> torch.Tensor | None:
    if batch.custom_mask is None:
        return None
    return torch.cat([batch.request_mask(i).reshape(-1) for i in chosen])


def _ranges_of(
    maps: Mapping[str, Sequence[PlaceholderRange]], chosen: list[int]
) -> dict[str, list[PlaceholderRange]]:
    place = {request: i for i, request in enumerate(chosen)}
    return {
        modality: [
            PlaceholderRange(place[r.request], r.start, r.end) for r in ranges if r.request in place
        ]
        for modality, ranges in maps.items()
    }
