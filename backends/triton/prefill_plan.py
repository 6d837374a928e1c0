"""How the prefills of a batch are laid out for the Triton kernels, and which keys are gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch

from attn_dispatch.backends.triton.operands import blocks_of
from attn_dispatch.backends.triton.scratch import GatherBuffers
from attn_dispatch.interface.batch import AttentionBatch

__all__ = ["KeyGroup", "Plan", "PlanRows", "PrefillPlan", "group_by_memory", "plan_rows"]

Plan = TypeVar("Plan", bound="PrefillPlan")


@dataclass
class PrefillPlan:
    """The operands of the prefill kernel.

    Attributes:
        tiles: (num_tiles, 2) int32, requests and first rows; long requests and late rows first.
        requests: (number,) int32, which requests.
        is_fresh: no request has earlier tokens: their keys are the rows of the call's `key`.
        key_start_loc: (num_reqs,) int32, where each request's rows begin in `key`.
        gathered_start_loc: (num_reqs,) int32, where each request's rows begin once gathered; None
            if pages are read directly.
        gathered_rows: rows of all requests, or an upper bound.
        longest: rows of the longest request, or an upper bound.
        pad: the rows of each request are padded to a multiple of this, with zeros.
        dtype: of gathered keys and values.
        buffers: the memory for them.
        parts: plans of these requests in groups, one after the other, each gathered or read from
            pages: for keys that do not fit into the buffers at once. () if one launch takes all.
    """

    tiles: torch.Tensor
    requests: torch.Tensor
    is_fresh: bool
    key_start_loc: torch.Tensor
    gathered_start_loc: torch.Tensor | None
    gathered_rows: int
    longest: int
    pad: int
    dtype: torch.dtype
    buffers: GatherBuffers = field(default_factory=GatherBuffers)
    parts: tuple[PrefillPlan, ...] = ()

    def room_for(
        self, num_kv_heads: int, head_size: int, head_size_v: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for gathered keys and values, (gathered_rows, num_kv_heads, width of a tile)."""
        widths = blocks_of(head_size, head_size_v)
        device = self.tiles.device
        return self.buffers.of(self.gathered_rows, num_kv_heads, widths, self.dtype, device)

    def sharing(self: Plan, buffers: GatherBuffers) -> Plan:
        """The plan, which gathers into these buffers."""
        parts = tuple(replace(each, buffers=buffers) for each in self.parts)
        return replace(self, buffers=buffers, parts=parts)

    def in_parts(self: Plan, groups: Sequence[KeyGroup], tiles: Sequence[torch.Tensor]) -> Plan:
        """The plan with a part for each group, if there are several; in order, as their tiles."""
        if len(groups) == 1:
            return self
        parts, first_tile, first = [], 0, 0
        for (rows, gathers), its_tiles in zip(groups, tiles, strict=True):
            end_tile, end = first_tile + len(its_tiles), first + len(rows.requests)
            part = replace(
                self,
                tiles=self.tiles[first_tile:end_tile],
                requests=self.requests[first:end],
                gathered_start_loc=self.gathered_start_loc if gathers else None,
                gathered_rows=sum(rows.padded) if gathers else 0,
                longest=max(rows.padded),
            )
            parts.append(part)
            first_tile, first = end_tile, end
        return replace(self, gathered_start_loc=None, gathered_rows=0, parts=tuple(parts))


@dataclass(frozen=True)
class PlanRows:
    """The requests of a prefill plan, their lengths, and these padded to `pad`.

    `seq_lens` and `padded` are upper bounds if the batch has only these.
    """

    requests: list[int]
    query_lens: list[int]
    seq_lens: list[int]
    key_lens: list[int]
    padded: list[int]
    pad: int

    def at(self, indices: Sequence[int]) -> PlanRows:
        """Those at some indices, in their order."""
        return PlanRows(
            requests=[self.requests[i] for i in indices],
            query_lens=[self.query_lens[i] for i in indices],
            seq_lens=[self.seq_lens[i] for i in indices],
            key_lens=[self.key_lens[i] for i in indices],
            padded=[self.padded[i] for i in indices],
            pad=self.pad,
        )


class KeyGroup(NamedTuple):
    """Requests whose keys are gathered at the same time, or read from their pages."""

    rows: PlanRows
    gathers: bool


def plan_rows(batch: AttentionBatch, chosen: list[int], pad: int) -> PlanRows:
    """The chosen requests, with their keys padded to a multiple of `pad`."""
    seq_lens = [batch.seq_lens_list[i] for i in chosen]
    return PlanRows(
        requests=chosen,
        query_lens=[batch.query_lens[i] for i in chosen],
        seq_lens=seq_lens,
        key_lens=[batch.key_starts[i + 1] - batch.key_starts[i] for i in chosen],
        padded=[-(-n // pad) * pad for n in seq_lens],
        pad=pad,
    )


def group_by_memory(
    rows: PlanRows, max_rows: int, is_enough: Callable[[PlanRows], bool] | None
) -> list[KeyGroup]:
    """Groups of requests whose gathered keys have at most `max_rows` rows each.

    A request that has more is read from its pages. So are the requests of a group that does not
    have enough work for a launch of its own, if there are several groups.

    Args:
        rows: the requests.
        max_rows: that the buffers have.
        is_enough: whether these requests fill the device; None if that does not matter.
    """
    if sum(rows.padded) <= max_rows:
        return [KeyGroup(rows, gathers=True)]
    groups: list[list[int]] = []
    from_pages, room = [], 0
    # Long ones first: neighbours then take about the same time.
    for i in sorted(range(len(rows.padded)), key=lambda i: -rows.padded[i]):
        if rows.padded[i] > max_rows:
            from_pages.append(i)
            continue
        if not groups or rows.padded[i] > room:
            groups.append([])
            room = max_rows
        groups[-1].append(i)
        room -= rows.padded[i]
    gathered = []
    for group in groups:
        if is_enough is None or is_enough(rows.at(group)):
            gathered.append(KeyGroup(rows.at(group), gathers=True))
        else:
            from_pages += group
    if from_pages:
        gathered.append(KeyGroup(rows.at(from_pages), gathers=False))
    return gathered
