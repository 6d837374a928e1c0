"""What a CUDA graph captures: the limits of its steps, and the buffers that later steps fill.

A graph replays kernels with the arguments of its capture. So the batch that it reads keeps its
tensors, of the largest size, and before a replay the step's values are copied into them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.contents import OVER_STATIC_BUFFERS
from attn_dispatch.interface.types import Phase

__all__ = ["GraphLimits", "StagedBuffers", "StaticBatch", "ranges_by_request"]

#: Where buffers start within their allocation: TMA and vector loads need 16 bytes.
_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """The largest step that a graph serves.

    Attributes:
        num_reqs: requests.
        num_tokens: new tokens of all requests, which are the rows of query and output.
        max_query_len: new tokens of a request.
        max_seq_len: keys of a request.
        phase: DECODE for one token per request, or drafts to verify; PREFILL for any mix of
            prompts, chunks of prompts and decodes.
        max_decode_query_len: in a PREFILL step, requests of up to this many new tokens are decodes.
        has_custom_mask: the steps bring a custom mask.
        max_mask_elements: of a step's custom mask.
        has_ranges: the layers have bidirectional ranges. Others ignore a batch's.
        max_ranges: bidirectional ranges of a step, over all requests.
    """

    num_reqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    phase: Phase = Phase.DECODE
    max_decode_query_len: int = 1
    has_custom_mask: bool = False
    max_mask_elements: int = 0
    has_ranges: bool = False
    max_ranges: int = 0

    @property
    def has_one_token_requests(self) -> bool:
        """Whether each request has one new token: the plain decode."""
        return self.phase is Phase.DECODE and self.max_query_len == 1

    @property
    def num_slots(self) -> int:
        """Requests of the captured batch.

        Where lengths of queries differ there is one more than num_reqs. It is always idle, so that
        unused entries of lists of requests can name it.
        """
        return self.num_reqs + (not self.has_one_token_requests)

    @property
    def kind(self) -> str:
        """The kind of step in words, for messages."""
        if self.phase is Phase.PREFILL:
            kind = f"chunks of up to {self.num_tokens} new tokens"
        elif self.max_query_len > 1:
            kind = f"up to {self.max_query_len} new tokens per request"
        else:
            kind = "one new token per request"
        extras = ["a custom mask"] * self.has_custom_mask + ["ranges"] * self.has_ranges
        return " and ".join([kind, *extras])

    def mismatch(self, batch: AttentionBatch) -> str | None:
        """Why a graph cannot run this step; None if it can. The device is not read."""
        query_lens, seq_lens = batch.query_lens, batch.seq_lens_list
        longest, most = max(query_lens, default=0), max(seq_lens, default=0)
        for found, allowed, what in (
            (batch.num_reqs, self.num_reqs, "requests"),
            (longest, self.max_query_len, "new tokens in a request"),
            (batch.num_tokens, self.num_tokens, "new tokens"),
            (most, self.max_seq_len, "keys in a request"),
            (self._count_ranges(batch), self.max_ranges, "bidirectional ranges"),
        ):
            if found > allowed:
                return f"it has {found} {what}, and the graph takes up to {allowed}"
        if self.has_one_token_requests and 0 in query_lens:
            return "it has a request without a new token, and each request of the graph has one"
        mask = batch.custom_mask
        if (mask is not None) != self.has_custom_mask:
            has = "has no custom_mask" if mask is None else "has a custom_mask"
            was = "with one" if mask is None else "without"
            return f"it {has}, and the graph was captured {was}"
        if mask is not None and mask.numel() > self.max_mask_elements:
            most, found = self.max_mask_elements, mask.numel()
            return f"its custom_mask has {found} elements, and the graph takes up to {most}"
        if batch.enable_kv_scales_calculation:
            return "it derives the scales of the cache, which waits for the device"
        return None

    def _count_ranges(self, batch: AttentionBatch) -> int:
        maps = batch.multi_modal_placeholder_index_maps
        return sum(map(len, maps.values())) if maps and self.has_ranges else 0

    def example(self) -> tuple[list[int], list[int]]:
        """(query_lens, seq_lens) of a step that the graph is captured with; the rest is idle."""
        query_lens, left = [], self.num_tokens
        for request in range(self.num_reqs):
            others = self.num_reqs - request - 1 if self.has_one_token_requests else 0
            query_lens.append(min(self.max_query_len, left - others))
            left -= query_lens[-1]
        idle = [0] * (self.num_slots - self.num_reqs)
        # A key before the new ones makes each request a decode.
        past = 1 if self.phase is Phase.DECODE else 0
        seq_lens = [min(length + past, self.max_seq_len) * (length > 0) for length in query_lens]
        if self.has_custom_mask:  # without keys, nothing is read from the mask
            seq_lens = [0] * len(seq_lens)
        return query_lens + idle, seq_lens + idle


def ranges_by_request(batch: AttentionBatch) -> tuple[list[tuple[int, int]], list[int]]:
    """The bidirectional ranges of a batch, request by request, and where each request's begin.

    Returns:
        The ranges [start, end), and num_reqs + 1 places.
    """
    maps = batch.multi_modal_placeholder_index_maps
    if not maps:
        return [], [0] * (batch.num_reqs + 1)
    by_request: list[list[tuple[int, int]]] = [[] for _ in range(batch.num_reqs)]
    for each in itertools.chain.from_iterable(maps.values()):
        by_request[each.request].append((each.start, each.end))
    starts = [0, *itertools.accumulate(map(len, by_request))]
    return list(itertools.chain.from_iterable(by_request)), starts


class StagedBuffers:
    """Static tensors on a device that one copy from the host fills, without a wait.

    Args:
        device: where they are.
        **shapes: name -> (shape, dtype).

    Example:
        >>> buffers = StagedBuffers(device, starts=((9,), torch.int32))
        >>> staged = buffers.stage()
        >>> staged["starts"][:] = starts_on_the_host
        >>> buffers.send(staged)
    """

    def __init__(self, device: torch.device, **shapes: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._shapes, size = {}, 0
        for name, (shape, dtype) in shapes.items():
            end = size + torch.Size(shape).numel() * dtype.itemsize
            self._shapes[name] = slice(size, end), dtype, shape
            size = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._size, self._on_gpu = size, device.type == "cuda"
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tensors = self._views(self._memory)

    def _views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: memory[part].view(dtype).view(shape)
            for name, (part, dtype, shape) in self._shapes.items()
        }

    def stage(self) -> dict[str, torch.Tensor]:
        """Tensors on the host of the same shapes, with any values, to be filled and sent."""
        # New memory each time, as the last copy may not have run yet. PyTorch keeps freed pinned
        # memory until the copies from it are done.
        memory = torch.empty(self._size, dtype=torch.uint8, device="cpu", pin_memory=self._on_gpu)
        return {**self._views(memory), "": memory}

    def send(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Copy what `stage` returned to the device, in the order of the current stream."""
        self._memory.copy_(staged[""], non_blocking=True)


@dataclass
class StaticBatch:
    """The batch of captured steps, over static tensors.

    Attributes:
        limits: of the steps.
        batch: what the graph reads. Its copies on the host are those of the capture.
    """

    limits: GraphLimits
    batch: AttentionBatch
    _lengths: StagedBuffers = field(repr=False)

    @classmethod
    def make(
        cls,
        limits: GraphLimits,
        device: torch.device,
        *,
        block_table: torch.Tensor,
        custom_mask: torch.Tensor | None = None,
        writes_keys: bool = True,
    ) -> StaticBatch:
        """Static tensors with the values of `limits.example()`, which a capture can run on.

        Args:
            limits: of the steps.
            device: of the tensors.
            block_table: (num_slots or more, max_blocks) int32, which batches may share.
            custom_mask: (max_mask_elements,) bool; None if the steps have no mask.
            writes_keys: the steps bring new keys; not so in cross-attention.
        """
        query_lens, seq_lens = limits.example()
        slots = limits.num_slots
        lengths = StagedBuffers(
            device,
            query_start_loc=((slots + 1,), torch.int32),
            seq_lens=((slots,), torch.int32),
        )
        tensors: dict[str, Any] = dict(lengths.tensors)
        if writes_keys:
            tensors["slot_mapping"] = torch.full(
                (limits.num_tokens,), -1, dtype=torch.int64, device=device
            )
        starts = torch.tensor(
            [0, *itertools.accumulate(query_lens)], dtype=torch.int32, device="cpu"
        )
        is_decode = limits.phase is Phase.DECODE
        batch = AttentionBatch(
            **tensors,
            block_table=block_table[:slots],
            custom_mask=custom_mask,
            query_start_loc_cpu=starts,
            seq_lens_cpu=torch.tensor(seq_lens, dtype=torch.int32, device="cpu"),
            max_query_len=limits.max_query_len,
            max_seq_len=limits.max_seq_len,
            max_decode_query_len=limits.max_query_len if is_decode else 1,
        )
        batch.checked.add(OVER_STATIC_BUFFERS)
        batch.trust()  # the mask's buffer is larger than the mask of the example
        made = cls(limits, batch, lengths)
        made._send(batch)
        return made

    def _send(self, batch: AttentionBatch) -> None:
        """Copy the lengths; the requests that the batch does not have become idle."""
        staged, number = self._lengths.stage(), batch.num_reqs
        starts, seq_lens = staged["query_start_loc"], staged["seq_lens"]
        starts[: number + 1] = batch.query_start_loc_cpu
        seq_lens[:number] = batch.seq_lens_cpu
        if number < len(seq_lens):
            seq_lens[number:] = 0
            if self.limits.has_one_token_requests:  # idle requests have a token and no keys
                torch.arange(number + 1, len(starts), out=starts[number + 1 :])
            else:
                starts[number + 1 :] = batch.num_tokens
        self._lengths.send(staged)
        if batch.lengths == "upper_bound":  # the true ones are only on the device
            self.batch.seq_lens[:number].copy_(batch.seq_lens, non_blocking=True)

    def fill(self, batch: AttentionBatch) -> None:
        """Copy a step that `limits` allow into the tensors, without a wait."""
        own, table, slots = self.batch, batch.block_table, batch.slot_mapping
        self._send(batch)
        assert own.block_table is not None
        if table is not None:
            columns = min(table.shape[1], own.block_table.shape[1])
            own.block_table[: batch.num_reqs, :columns].copy_(table[:, :columns], non_blocking=True)
        if own.slot_mapping is not None:
            number = 0 if slots is None else batch.num_tokens
            if number < len(own.slot_mapping):
                own.slot_mapping[number:].fill_(-1)
            if slots is not None:
                own.slot_mapping[:number].copy_(slots[:number], non_blocking=True)
        if own.custom_mask is not None and batch.custom_mask is not None:
            mask = batch.custom_mask
            own.custom_mask[: len(mask)].copy_(mask, non_blocking=True)
