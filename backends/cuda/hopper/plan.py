"""How a batch is laid out for HOPPER_ATTN's kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.hopper.launch import BLOCK_M, BLOCK_N, DECODES, FIXED_BLOCKS
from attn_dispatch.backends.cuda.hopper.paged_tma import page_problem, tma_descriptor
from attn_dispatch.backends.cuda.hopper.sm_partition import SMShares, share_sms
from attn_dispatch.backends.triton.graph_plan import TritonGraphBuilder
from attn_dispatch.backends.triton.operands import KVSource, fills_tiles
from attn_dispatch.backends.triton.plan import PlanRows, PrefillPlan, TritonMetadata, plan_rows
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["HopperBuilder", "HopperPlan", "cache_problem", "describe_rows"]


@dataclass
class HopperPlan(PrefillPlan):
    """A plan whose tiles are the Hopper kernel's work tiles, of tokens of one query head.

    Attributes:
        counters: (2,) int32 zeros, in which the kernel counts.
        fresh_end: where these requests' rows of `key` end.
        splits_all_sms: the decodes of the step are split as if they had all SMs, whatever their
            share is, because that follows from bounds and the split decides bits.
        may_be_fresh: some requests may have no past; their keys can be read from `key`, and the
            device knows which they are.
        reads_pages: the kernel can read a cache of the layer's spec from its pages.
        shares: how the SMs are shared with concurrent decodes; None if decodes run first.
        descriptors: of gathered keys and values, which are at the same address for all layers.
    """

    counters: torch.Tensor | None = None
    fresh_end: int = 0
    may_be_fresh: bool = False
    reads_pages: bool = False
    splits_all_sms: bool = False
    shares: SMShares | None = None
    descriptors: tuple[Any, Any] | None = None

    def describe(self, source: KVSource, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of keys and values."""
        is_gathered = self.gathered is not None and source.k is self.gathered[0]
        if is_gathered and self.descriptors is not None:
            return self.descriptors
        if not is_gathered:
            return self.describe_new(source.k, source.v, block_n)
        k, v = (describe_rows(rows[: self.gathered_rows], block_n) for rows in (source.k, source.v))
        self.descriptors = k, v
        return k, v

    def describe_new(self, key: torch.Tensor, value: torch.Tensor, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of the rows of a call's key and value."""
        return describe_rows(key[: self.fresh_end], block_n), describe_rows(
            value[: self.fresh_end], block_n
        )


class HopperBuilder(TritonGraphBuilder):
    """Plans prefills for the Hopper kernel.

    Keys in pages that TMA cannot read are gathered; if there are too many, or the step is captured,
    the plan is for the portable kernel.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        has_pages = spec.block_size is not None
        self._reads_pages = has_pages and not cache_problem(spec, detect_device(device))

    def build(self, batch: AttentionBatch) -> TritonMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata = super().build(batch)
        plan = metadata.prefill
        if isinstance(plan, HopperPlan) and metadata.decode is not None:
            is_decode = self._few_tokens(batch)
            assert is_decode is not None  # the batch has both kinds
            num_tiles = len(plan.tiles) * self.spec.num_heads
            plan.shares = share_sms(self.spec, batch, is_decode, num_tiles, self.launches.num_sms)
        return metadata

    def _most_programs(self, grid: int) -> int:
        if self.spec.lengths == "exact":
            return grid
        programs = DECODES[self.spec.head_size].mixed.programs
        return max(grid, FIXED_BLOCKS * programs * self.launches.num_sms)

    def _prefill(self, batch: AttentionBatch, chosen: list[int]) -> PrefillPlan:
        rows = plan_rows(batch, chosen, BLOCK_N[self.spec.head_size])
        has_pages = batch.block_table is not None
        reads_pages = has_pages and self._reads_pages
        if has_pages and not reads_pages and not self._has_room(rows):
            return super()._prefill(batch, chosen)
        tiles = self._work_tiles(batch, rows)
        # One copy to the device for both.
        counters_and_tiles = torch.cat([tiles.new_zeros(1, tiles.shape[1]), tiles])
        plan = self._plan(batch, rows, counters_and_tiles, has_pages, HopperPlan)
        assert isinstance(plan, HopperPlan)
        plan.counters, plan.tiles = plan.tiles[0, :2], plan.tiles[1:]
        is_bound = batch.lengths == "upper_bound"
        lens = zip(rows.key_lens, rows.seq_lens, strict=True)
        has_fresh = is_bound or any(new == keys for new, keys in lens)
        plan.may_be_fresh = has_fresh and not plan.is_fresh and batch.key_start_loc_cpu is None
        plan.reads_pages = reads_pages
        plan.splits_all_sms = self.spec.lengths == "upper_bound"
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        return plan

    def _work_tiles(self, batch: AttentionBatch, rows: PlanRows) -> torch.Tensor:
        """(num_tiles, 4) int32 on the host: the columns that `hopper_prefill_kernel` documents."""
        requests, first_tokens = self._tiles(rows, BLOCK_M, 1).long().unbind(1)
        starts = batch.query_start_loc_cpu
        firsts = starts[requests]
        lengths = starts[requests + 1] - firsts
        return torch.stack((firsts, lengths, first_tokens, requests), 1).to(torch.int32)

    def _max_tiles(self, limits: GraphLimits, longest_decode: int) -> int:
        if not self._reads_pages:
            return super()._max_tiles(limits, longest_decode)
        return limits.num_tokens // BLOCK_M + self._max_prefills(limits, longest_decode)

    def _idle_tile(self, idle: int) -> tuple[int, ...]:
        return (0, 0, 0, idle) if self._reads_pages else super()._idle_tile(idle)

    def _listed_tiles(self, batch: AttentionBatch, prefills: list[int]) -> torch.Tensor:
        if not self._reads_pages:
            return super()._listed_tiles(batch, prefills)
        return self._work_tiles(batch, plan_rows(batch, prefills, BLOCK_N[self.spec.head_size]))

    def _prefill_plan(
        self, batch: AttentionBatch, tiles: torch.Tensor, requests: torch.Tensor
    ) -> PrefillPlan:
        plan = super()._prefill_plan(batch, tiles, requests)
        if not self._reads_pages:
            return plan
        return HopperPlan(
            **vars(plan),
            counters=tiles.new_zeros(2),
            fresh_end=batch.num_tokens,
            may_be_fresh=True,
            reads_pages=True,
            splits_all_sms=self.spec.lengths == "upper_bound",
        )


@functools.cache
def cache_problem(spec: AttentionSpec, device: DeviceProfile) -> str:
    """What keeps the kernels from the pages of a layer's cache, as a sentence; "" if nothing."""
    assert spec.block_size is not None
    dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, device.arch)
    if dtype != spec.dtype:
        stored, own = (str(each).removeprefix("torch.") for each in (dtype, spec.dtype))
        return f"it reads caches of the layer's own dtype, {own}, and this one is {stored}"
    width = dtype.itemsize
    row = spec.head_size * width
    pages = (spec.block_size, spec.num_kv_heads, row, width)
    if (found := spec.kv_strides) is None:
        token = spec.num_kv_heads * row
        return page_problem(*pages, (2 * spec.block_size * token, token, row), 16)
    problems = (page_problem(*pages, each, found.alignment) for each in (found.key, found.value))
    return next(filter(None, problems), "")


def describe_rows(tensor: torch.Tensor, rows: int) -> Any:
    """A TMA descriptor of (tokens, heads, size) in boxes of this many rows by one head.

    The tensor is copied if TMA cannot read it.
    """
    size = tensor.shape[2]
    if not fills_tiles(tensor, size):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    matrix = tensor.flatten(1)
    return tma_descriptor(matrix, matrix.shape, matrix.stride(0), (rows, size))
