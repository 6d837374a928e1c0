"""How a batch is laid out for the Triton kernels, once on the host, for all layers.

Requests of few query tokens go to the decode kernel, which splits their keys. The others go to the
prefill kernel, as a list of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.common import start_offsets
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.configs import amd, nvidia
from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch
from attn_dispatch.backends.triton.operands import block_of, blocks_of
from attn_dispatch.backends.triton.prefill_plan import (
    KeyGroup,
    Plan,
    PlanRows,
    PrefillPlan,
    group_by_memory,
    plan_rows,
)
from attn_dispatch.backends.triton.scratch import GatherBuffers
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import StagedBuffers
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.validation import check_int32
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceProfile

__all__ = [
    "INVARIANT_PARTS",
    "DecodePlan",
    "Launches",
    "TritonBuilder",
    "TritonMetadata",
    "Variant",
    "int32_tensor",
    "launch_table",
    "part_bytes",
]

#: Requests of up to this many query tokens go to the decode kernel: a token, or drafts to verify.
MAX_DECODE_TOKENS = 16
#: With batch_invariant, the keys of a request are split into this many parts.
INVARIANT_PARTS = 8
#: Of the memory for scratch, the share of the parts of split requests with batch_invariant: whether
#: a request's keys are gathered must not depend on how many others are split.
_INVARIANT_PARTS_SHARE = 1 / 4
#: The number of SMs in Triton's interpreter.
_INTERPRETED_SMS = 2


def launch_table(device: DeviceProfile) -> LaunchTable:
    """How the kernels are launched on a device. Triton's interpreter, on a CPU, uses Hopper's."""
    if device.vendor == "amd":
        return amd.table_for(device.arch)
    return nvidia.table_for(device.capability or (9, 0))


@dataclass(frozen=True, eq=False)
class Launches:
    """The rows of the launch table for layers of one kind on one device."""

    table: LaunchTable
    decode: DecodeLaunch
    decode_few: DecodeLaunch
    prefill: PrefillLaunch
    num_sms: int
    is_nvidia: bool

    @classmethod
    @functools.cache
    def of(cls, spec: AttentionSpec, profile: DeviceProfile) -> Launches:
        """Those for a spec and a device."""
        table = launch_table(profile)
        sizes = (max(block_of(spec.head_size), block_of(spec.head_size_v)), spec.dtype.itemsize)
        return cls(
            table,
            table.decode_for(*sizes),
            table.decode_for(*sizes, is_few=True),
            table.prefill_for(*sizes),
            profile.num_sms or _INTERPRETED_SMS,
            profile.vendor == "nvidia",
        )

    def releasing_threads(self, num_warps: int) -> int:
        """`DecodeSchedule.RELEASING_THREADS` for programs of this many warps."""
        return 0 if self.is_nvidia else num_warps * self.table.warp_size


class Variant(NamedTuple):
    """What differs between the compiled attention kernels of one layer."""

    launches: Launches
    kind: str
    format: str
    dtype: torch.dtype
    block_size: int
    scale_stride: int
    out_format: str
    out_group: int
    has_ranges: bool
    has_mask: bool
    query_dtype: torch.dtype
    sinks_dtype: torch.dtype


@dataclass(frozen=True)
class DecodePlan:
    """The operands of the decode kernel.

    Attributes:
        launch: the row of the launch table.
        requests: (num_reqs,) int32, which requests; None for all of them.
        num_reqs: number of requests.
        longest: query tokens of the longest request.
        rows: rows in a tile, tokens times query heads of a KV head.
        grid: programs.
        part_out, part_lse, counters: buffers for the parts of splits, see decode.py.
        parts: each work unit is split into this many parts, so that how a request is split depends
            only on the request; 0 for Stream-K.
        in_turn: plans of groups of these requests, one after the other, where the parts of all do
            not fit into memory at once. () if one launch takes all.
    """

    launch: DecodeLaunch
    requests: torch.Tensor | None
    num_reqs: int
    longest: int
    rows: int
    grid: int
    part_out: torch.Tensor
    part_lse: torch.Tensor
    counters: torch.Tensor
    parts: int
    in_turn: tuple[DecodePlan, ...] = ()

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers."""
        buffers = (self.part_out, self.part_lse, self.counters)
        return sum(each.numel() * each.element_size() for each in buffers)

    def in_turns_of(self, num_reqs: int) -> DecodePlan:
        """The plan with `in_turn` for groups of at most this many requests."""
        if self.num_reqs <= num_reqs:
            return self
        requests = self.requests
        if requests is None:
            requests = int32_tensor(range(self.num_reqs), self.counters.device)
        groups = requests.tensor_split(-(-self.num_reqs // num_reqs))
        in_turn = tuple(replace(self, requests=each, num_reqs=len(each)) for each in groups)
        return replace(self, in_turn=in_turn)


@dataclass
class TritonMetadata(BatchMetadata):
    """The batch, and its layout for each kernel.

    Attributes:
        launches: how the kernels are launched.
        decode: for the requests of few query tokens, or None.
        prefill: for the others, or None.
        mask_starts: (num_reqs,) int64, where each request's custom mask begins.
        ranges: (num_ranges, 2) int32, request by request.
        range_starts: (num_reqs + 1,) int32, where each request's ranges begin.
        graph: the tensors above that a captured graph reads; None outside of graphs.
    """

    launches: Launches
    decode: DecodePlan | None
    prefill: PrefillPlan | None
    mask_starts: torch.Tensor | None = None
    ranges: torch.Tensor | None = None
    range_starts: torch.Tensor | None = None
    graph: StagedBuffers | None = None

    @functools.cached_property
    def without_pages(self) -> TritonMetadata:
        """The metadata of a call without a cache, whose keys are all in its `key`."""
        metadata: TritonMetadata = self.builder.build(replace(self.batch, block_table=None))
        return metadata

    def extras(self) -> tuple[Any, ...]:
        """The kernels' arguments from `mask_ptr` to `key_step`; any tensor for what is absent."""
        none, mask = self.batch.seq_lens, self.batch.custom_mask
        return (
            none if mask is None else mask.view(torch.uint8),
            none if self.mask_starts is None else self.mask_starts,
            none if self.ranges is None else self.ranges,
            none if self.range_starts is None else self.range_starts,
            *self.key_positions(),
        )

    def key_positions(self) -> tuple[torch.Tensor, int, int]:
        """(lengths, offset, step) of the batch's key positions; those of key j at j without."""
        positions = self.batch.key_positions
        if positions is None:
            return self.batch.seq_lens, 0, 1
        return positions.seq_lens, positions.offset, positions.step


class TritonBuilder(AttentionMetadataBuilder[TritonMetadata]):
    """Lays out a batch for the kernels."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.launches = Launches.of(spec, detect_device(device))
        self._group = spec.num_heads // spec.num_kv_heads

    def build(self, batch: AttentionBatch) -> TritonMetadata:
        """See AttentionMetadataBuilder.build."""
        check_int32(batch)
        metadata: TritonMetadata = TritonMetadata.of(
            batch, self, launches=self.launches, decode=None, prefill=None
        )
        few = self._few_tokens(batch)
        if few is None:
            metadata.decode = self._decode(batch, None)
        else:
            decodes = [i for i, is_few in enumerate(few) if is_few]
            prefills = [i for i, is_few in enumerate(few) if not is_few]
            if decodes:
                metadata.decode = self._decode(batch, decodes)
            if prefills:
                free_bytes = self.bytes_to_gather(metadata.decode)
                metadata.prefill = self._prefill(batch, prefills, free_bytes)
        if batch.custom_mask is not None:
            mask_starts = torch.tensor(batch.mask_starts[:-1], dtype=torch.int64, device="cpu")
            metadata.mask_starts = to_device(mask_starts, self.device)
        if self.spec.bidirectional_ranges:
            ranges = [metadata.ranges_of(request) for request in range(batch.num_reqs)]
            flat = [pair for each in ranges for pair in each]
            metadata.range_starts = start_offsets([len(each) for each in ranges], self.device)
            metadata.ranges = int32_tensor(flat or [(0, 0)], self.device)
        return metadata

    def _few_tokens(self, batch: AttentionBatch) -> list[bool] | None:
        """For each request whether it goes to the decode kernel; None if all do."""
        if self.spec.block_size is None or batch.block_table is None:  # the kernel reads pages
            return [False] * batch.num_reqs
        limit = 1 if self.spec.batch_invariant else MAX_DECODE_TOKENS
        if batch.max_query_len <= limit:
            return None
        return [query_len <= limit for query_len in batch.query_lens]

    def _decode(self, batch: AttentionBatch, chosen: list[int] | None) -> DecodePlan:
        if chosen is None:
            num_reqs, longest = batch.num_reqs, batch.max_query_len
        else:
            num_reqs, longest = len(chosen), max(batch.query_lens[i] for i in chosen)
        requests = None if chosen is None else int32_tensor(chosen, self.device)
        return self._decode_plan(num_reqs, longest, requests, has_prefills=chosen is not None)

    def _decode_plan(
        self,
        num_reqs: int,
        longest: int,
        requests: torch.Tensor | None,
        make_room: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
        *,
        has_prefills: bool = False,
    ) -> DecodePlan:
        """The plan for this many requests of up to `longest` new tokens.

        `make_room` gives as many float32 and int32 for the parts of splits, the latter zeros. With
        `has_prefills` the batch has requests whose keys are gathered, too.
        """
        spec, launches = self.spec, self.launches
        programs = launches.num_sms * launches.decode_few.programs_per_sm
        is_few = num_reqs * spec.num_kv_heads < programs and not spec.batch_invariant
        launch = launches.decode_few if is_few else launches.decode
        rows = min(block_of(longest * self._group), launch.max_rows)
        grid = launches.num_sms * launch.programs_per_sm
        _, block_v = blocks_of(spec.head_size, spec.head_size_v)
        parts, at_once = 2 * self._most_programs(grid), num_reqs
        if spec.batch_invariant:  # queries of one token
            each = spec.num_kv_heads * -(-self._group // rows) * INVARIANT_PARTS
            limit = scratch.MAX_SCRATCH_BYTES
            if has_prefills:
                limit = int(limit * _INVARIANT_PARTS_SHARE)
            at_once = min(num_reqs, max(1, limit // (each * part_bytes(rows, block_v))))
            parts = at_once * each
        size = parts * rows
        floats, counters = (make_room or self._make_room)(size * (block_v + 1), parts)
        return DecodePlan(
            launch=launch,
            requests=requests,
            num_reqs=num_reqs,
            longest=longest,
            rows=rows,
            grid=grid,
            part_out=floats[size:],
            part_lse=floats[:size],
            counters=counters,
            parts=INVARIANT_PARTS if spec.batch_invariant else 0,
        ).in_turns_of(at_once)

    def _make_room(self, num_floats: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.empty(num_floats, dtype=torch.float32, device=self.device),
            torch.zeros(num_counters, dtype=torch.int32, device=self.device),
        )

    def _most_programs(self, grid: int) -> int:
        """How many programs may store parts, if the decode kernel has this grid."""
        return grid

    def bytes_to_gather(self, decode: DecodePlan | None) -> int:
        """What gathered keys and values may take in a batch with these decodes.

        With batch_invariant it does not depend on the batch.
        """
        limit = scratch.MAX_SCRATCH_BYTES
        if self.spec.batch_invariant:
            return limit - int(limit * _INVARIANT_PARTS_SHARE)
        return limit - (0 if decode is None else decode.scratch_bytes)

    def _prefill(self, batch: AttentionBatch, chosen: list[int], free_bytes: int) -> PrefillPlan:
        row = self.launches.prefill
        rows = plan_rows(batch, chosen, row.block_n)
        groups = [KeyGroup(rows, gathers=False)]
        if self._gathers(batch, rows):
            groups = self._groups(rows, free_bytes)
        tiles = [self._tiles(each.rows, row.block_m, self._group) for each in groups]
        return self._plan(batch, groups, tiles, PrefillPlan).in_parts(groups, tiles)

    def _groups(self, rows: PlanRows, free_bytes: int) -> list[KeyGroup]:
        """Groups of requests whose gathered keys fit into memory; see `group_by_memory`."""
        # With batch_invariant only a request's own size decides.
        has_enough = None if self.spec.batch_invariant else self._has_enough_work
        return group_by_memory(rows, free_bytes // self._row_bytes, has_enough)

    @property
    def _row_bytes(self) -> int:
        """Bytes of a gathered key and its value."""
        spec = self.spec
        size = sum(blocks_of(spec.head_size, spec.head_size_v))
        return spec.num_kv_heads * size * spec.dtype.itemsize

    def _has_enough_work(self, rows: PlanRows) -> bool:
        """Whether these requests have programs for half of the SMs: pages take longer than that."""
        block_m = self.launches.prefill.block_m
        tiles = sum(-(-each * self._group // block_m) for each in rows.query_lens)
        return 2 * tiles * self.spec.num_kv_heads >= self.launches.num_sms

    def _plan(
        self,
        batch: AttentionBatch,
        groups: Sequence[KeyGroup],
        tiles: Sequence[torch.Tensor],
        plan_cls: type[Plan],
    ) -> Plan:
        """The plan for these requests and the tiles of each group."""
        starts = torch.zeros(batch.num_reqs, dtype=torch.int32, device="cpu")
        for rows, _ in groups:
            starts[rows.requests] = start_offsets(rows.padded)[:-1]
        requests = [i for rows, _ in groups for i in rows.requests]
        is_fresh = all(rows.key_lens == rows.seq_lens for rows, _ in groups)
        gathered = [sum(rows.padded) for rows, gathers in groups if gathers]
        own_keys = batch.key_start_loc_cpu
        return plan_cls(
            tiles=torch.cat([*tiles]).to(self.device, non_blocking=True),
            requests=int32_tensor(requests, self.device),
            # An upper bound that is the number of new keys is the true count: these are among the
            # keys. Whether keys are fresh depends on the batch, which must not affect invariant
            # results. With key positions, new keys may be another GPU's, and their number may still
            # agree.
            is_fresh=is_fresh
            and (batch.key_positions is None or batch.block_table is None)
            and not (self.spec.batch_invariant and batch.block_table is not None),
            key_start_loc=(
                batch.query_start_loc if own_keys is None else to_device(own_keys, self.device)
            ),
            gathered_start_loc=starts.to(self.device, non_blocking=True) if gathered else None,
            gathered_rows=max(gathered, default=0),
            longest=max(max(rows.padded) for rows, _ in groups),
            pad=groups[0].rows.pad,
            dtype=self.spec.dtype,
            buffers=GatherBuffers(max(gathered, default=0)),
        )

    def _gathers(self, batch: AttentionBatch, rows: PlanRows) -> bool:
        """Whether to gather pages first, as far as there is memory: where it is faster.

        It is faster where each key is read often. How often is estimated without the key counts:
        quantized keys are rounded when they are gathered, so with upper bounds the choice must be
        the same as with exact lengths.
        """
        if batch.block_table is None or self.spec.batch_invariant:
            return batch.block_table is not None
        return sum(rows.query_lens) >= self.launches.table.gather_from * len(rows.query_lens)

    def _tiles(self, rows: PlanRows, block_m: int, rows_per_token: int) -> torch.Tensor:
        """(num_tiles, 2) int32 on the host: requests and first rows, long and late ones first.

        Args:
            rows: the requests.
            block_m: rows in a tile.
            rows_per_token: rows of each token.
        """
        queries = torch.tensor(rows.query_lens, device="cpu")
        counts = (queries * rows_per_token + block_m - 1) // block_m
        index = torch.repeat_interleave(torch.arange(len(queries), device="cpu"), counts)
        before = torch.cumsum(counts, 0) - counts
        first = (torch.arange(len(index), device="cpu") - before[index]) * block_m
        keys = torch.tensor(rows.seq_lens, device="cpu")
        # Long requests first, and their long tiles first; neighbours share their keys.
        by_request = torch.argsort(keys, descending=True, stable=True)
        rank = torch.empty_like(by_request)
        rank[by_request] = torch.arange(len(keys), device="cpu")
        order = torch.argsort(rank[index] * (1 << 32) - first, stable=True)
        requests = torch.tensor(rows.requests, device="cpu")[index]
        return torch.stack([requests, first], 1)[order].to(torch.int32)


def part_bytes(rows: int, block_v: int) -> int:
    """Bytes of a part of a split: outputs and log2-sums in float32, and a counter."""
    return 4 * (rows * (block_v + 1) + 1)


def int32_tensor(values: Any, device: torch.device) -> torch.Tensor:
    """Integers on the host as int32 on a device, without a wait."""
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
