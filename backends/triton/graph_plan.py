"""How the steps of a captured graph are laid out for the Triton kernels.

A graph fixes which kernels run, how many programs they have and how tiles are shaped. All of that
follows from the limits of the steps here, and never from a step. What does change is in buffers:
lists of requests, tiles and ranges, whose unused entries name an idle request.

So a replay has the bits of an eager call on the same metadata. Where one kernel takes all requests,
it also has those of an eager call on a batch that is padded with idle requests to the graph's size
and has the graph's max_query_len.
"""

from __future__ import annotations

import torch

from attn_dispatch.backends.triton.plan import (
    MAX_DECODE_TOKENS,
    TritonBuilder,
    TritonMetadata,
)
from attn_dispatch.backends.triton.prefill_plan import PrefillPlan, plan_rows
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import GraphLimits, StagedBuffers, ranges_by_request
from attn_dispatch.interface.validation import check_int32

__all__ = ["TritonGraphBuilder"]


class TritonGraphBuilder(TritonBuilder):
    """TritonBuilder, which also lays out captured steps.

    In a captured step the prefill kernel reads keys from their pages: buffers for gathered keys
    would have to be as large as the longest possible step.
    """

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> TritonMetadata:
        """See AttentionMetadataBuilder.build_for_graph.

        Raises:
            UnsupportedError: batch-invariant layers, and more than one new token per request:
                their results come from gathered keys.
        """
        if self.spec.batch_invariant and not limits.has_one_token_requests:
            raise UnsupportedError(
                f"{self._backend_name} captures batch-invariant layers with one new token per "
                f"request, and this step has {limits.kind}. Run it eagerly."
            )
        check_int32(batch)
        metadata: TritonMetadata = TritonMetadata.of(
            batch, self, launches=self.launches, decode=None, prefill=None
        )
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        longest = limits.max_query_len
        is_split = longest > MAX_DECODE_TOKENS
        if is_split:
            longest = min(limits.max_decode_query_len, MAX_DECODE_TOKENS)
            shapes["requests"] = ((limits.num_reqs,), torch.int32)
            size = (self._max_tiles(limits, longest), len(self._idle_tile(0)))
            shapes["tiles"] = (size, torch.int32)
        if batch.custom_mask is not None:
            shapes["mask_starts"] = ((batch.num_reqs,), torch.int64)
        if self.spec.bidirectional_ranges:
            shapes["ranges"] = ((max(1, limits.max_ranges), 2), torch.int32)
            shapes["range_starts"] = ((batch.num_reqs + 1,), torch.int32)
        tensors: dict[str, torch.Tensor] = {}
        if shapes:
            metadata.graph = StagedBuffers(self.device, **shapes)
            tensors = metadata.graph.tensors
        metadata.decode = self._decode_plan(
            limits.num_reqs, longest, tensors.get("requests"), self._share_room
        )
        if is_split:
            metadata.prefill = self._prefill_plan(batch, tensors["tiles"], tensors["requests"])
        metadata.mask_starts = tensors.get("mask_starts")
        metadata.ranges = tensors.get("ranges")
        metadata.range_starts = tensors.get("range_starts")
        self.update_for_graph(metadata, batch)
        return metadata

    def update_for_graph(self, metadata: TritonMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        buffers, decode = metadata.graph, metadata.decode
        if buffers is None or decode is None:
            return
        staged, number = buffers.stage(), batch.num_reqs
        if metadata.prefill is not None:
            self._list_requests(staged, batch, decode.longest, idle=metadata.batch.num_reqs - 1)
        if metadata.mask_starts is not None:
            starts = staged["mask_starts"].zero_()
            if batch is not metadata.batch:  # that of the capture has no mask of its own yet
                starts[:number] = torch.tensor(batch.mask_starts[:-1], device="cpu")
        if metadata.ranges is not None:
            ranges, firsts = ranges_by_request(batch)
            staged["ranges"].zero_()
            if ranges:
                staged["ranges"][: len(ranges)] = torch.tensor(ranges, device="cpu")
            staged["range_starts"].fill_(len(ranges))
            staged["range_starts"][: number + 1] = torch.tensor(firsts, device="cpu")
        buffers.send(staged)

    def _max_tiles(self, limits: GraphLimits, longest_decode: int) -> int:
        """The most tiles that the prefill kernel gets in a step."""
        full = limits.num_tokens * self._group // self.launches.prefill.block_m
        return full + self._max_prefills(limits, longest_decode)

    def _max_prefills(self, limits: GraphLimits, longest_decode: int) -> int:
        """The most requests of a step that the prefill kernel computes."""
        return min(limits.num_reqs, limits.num_tokens // (longest_decode + 1))

    def _idle_tile(self, idle: int) -> tuple[int, ...]:
        """A tile of an idle request, in the columns of `PrefillPlan.tiles`."""
        return idle, 0

    def _listed_tiles(self, batch: AttentionBatch, prefills: list[int]) -> torch.Tensor:
        """The tiles of these requests, on the host."""
        row = self.launches.prefill
        return self._tiles(plan_rows(batch, prefills, row.block_n), row.block_m, self._group)

    def _prefill_plan(
        self, batch: AttentionBatch, tiles: torch.Tensor, requests: torch.Tensor
    ) -> PrefillPlan:
        return PrefillPlan(
            tiles=tiles,
            requests=requests,
            is_fresh=False,
            key_start_loc=batch.query_start_loc,
            gathered_start_loc=None,
            gathered_rows=0,
            longest=0,
            pad=self.launches.prefill.block_n,
            dtype=self.spec.dtype,
        )

    def _list_requests(
        self, staged: dict[str, torch.Tensor], batch: AttentionBatch, longest: int, idle: int
    ) -> None:
        """Fill the decode kernel's list of requests, and the prefill kernel's list of tiles."""
        decodes = [i for i, n in enumerate(batch.query_lens) if n <= longest and i != idle]
        prefills = [i for i, n in enumerate(batch.query_lens) if n > longest]
        staged["requests"].fill_(idle)
        staged["requests"][: len(decodes)] = torch.tensor(decodes, device="cpu")
        staged["tiles"][:] = torch.tensor(self._idle_tile(idle), device="cpu")
        if prefills:
            tiles = self._listed_tiles(batch, prefills)
            staged["tiles"][: len(tiles)] = tiles

    def _share_room(self, num_floats: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory for all graphs of these layers, which run one after the other."""
        room = self._room
        if room is None or len(room[0]) < num_floats or len(room[1]) < num_counters:
            room = self._room = self._make_room(num_floats, num_counters)
        return room
