"""How a batch is laid out for HOPPER_ATTN's kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.hopper.launch import (
    BLOCK_M,
    BLOCK_N,
    DECODES,
    FIXED_BLOCKS,
)
from attn_dispatch.backends.cuda.hopper.paged_tma import box_columns, page_problem, tma_descriptor
from attn_dispatch.backends.cuda.hopper.sm_partition import SMShares, share_sms
from attn_dispatch.backends.triton.graph_plan import TritonGraphBuilder
from attn_dispatch.backends.triton.operands import FORMATS, KVSource, blocks_of
from attn_dispatch.backends.triton.plan import TritonMetadata
from attn_dispatch.backends.triton.prefill_plan import (
    KeyGroup,
    PlanRows,
    PrefillPlan,
    plan_rows,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["HopperBuilder", "HopperPlan", "cache_problem", "describe_rows", "words_to_copy"]


@dataclass(frozen=True)
class CopiedCache:
    """A cache whose pages are copied, see `copied.py`.

    Attributes:
        format: FORMAT of a PrefillConfig.
        unit: bytes.
        steps: strides of blocks, tokens and heads of keys, then of values, in units.
        keys, values: tensors of words; only their addresses count.
    """

    format: str
    unit: int
    steps: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor


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
        shares: how the SMs are shared with concurrent decodes; None if decodes run first.
        chosen: which requests; None in a captured step.
        portable: a plan of the same requests for the portable kernel, if a cache needs one.
    """

    counters: torch.Tensor | None = None
    fresh_end: int = 0
    may_be_fresh: bool = False
    chosen: list[int] | None = None
    portable: PrefillPlan | None = None
    splits_all_sms: bool = False
    shares: SMShares | None = None

    def portable_plan(self, metadata: TritonMetadata) -> PrefillPlan:
        """A plan of the same requests for the portable kernel.

        Raises:
            InvalidInputError: the step is captured.
        """
        if self.chosen is None:
            raise InvalidInputError(
                "The kv_cache begins at an address, or has strides, that are no multiples of 4 "
                "bytes; a captured step of HOPPER_ATTN needs them. Align the cache."
            )
        if self.portable is None:
            builder = metadata.builder
            assert isinstance(builder, HopperBuilder)
            free_bytes = builder.bytes_to_gather(metadata.decode)
            portable = builder.portable_prefill(metadata.batch, self.chosen, free_bytes)
            self.portable = portable.sharing(self.buffers)
        return self.portable

    def describe_gathered(self, source: KVSource, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of gathered rows, which are at the same address for all layers."""
        rows = self.gathered_rows
        return describe_rows(source.k, block_n, rows), describe_rows(source.v, block_n, rows)

    def describe_new(self, key: torch.Tensor, value: torch.Tensor, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of the rows of a call's key and value."""
        end = self.fresh_end
        return describe_rows(key, block_n, end), describe_rows(value, block_n, end)


class HopperBuilder(TritonGraphBuilder):
    """Plans prefills for the Hopper kernel, which reads keys from their pages.

    Pages that TMA cannot read are gathered while that takes little memory, since a warp group that
    copies them in the kernel is slower. For a format of the cache that the kernel does not know,
    the plan is for the portable kernel.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        profile = detect_device(device)
        dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, profile.arch)
        sizes = (spec.head_size, spec.head_size_v)
        # Gathered rows are as wide as a tile of the portable kernel.
        self._can_gather = (
            spec.block_size is not None
            and bool(cache_problem(spec, profile))
            and blocks_of(*sizes) == sizes
        )
        self._knows_format = copied_format(FORMATS.get(dtype, dtype), spec.dtype) is not None

    def build(self, batch: AttentionBatch) -> TritonMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata = super().build(batch)
        plan = metadata.prefill
        if isinstance(plan, HopperPlan) and metadata.decode is not None:
            is_decode = self._few_tokens(batch)
            assert is_decode is not None  # the batch has both kinds
            num_tiles = len(plan.tiles) * self.spec.num_heads
            # Without a decode kernel of Hopper's own, the portable one's blocks share SMs. Where it
            # has one, the prefill kernel reads the same pages: there are no parts.
            if self.spec.head_size not in DECODES or plan.parts:
                return metadata
            plan.shares = share_sms(self.spec, batch, is_decode, num_tiles, self.launches.num_sms)
        return metadata

    def _most_programs(self, grid: int) -> int:
        if self.spec.lengths == "exact":
            return grid
        if self.spec.head_size not in DECODES:
            return grid
        programs = DECODES[self.spec.head_size].mixed.programs
        return max(grid, FIXED_BLOCKS * programs * self.launches.num_sms)

    def _prefill(self, batch: AttentionBatch, chosen: list[int], free_bytes: int) -> PrefillPlan:
        rows = plan_rows(batch, chosen, BLOCK_N[self.spec.head_size])
        groups = [KeyGroup(rows, gathers=False)]
        if self._can_gather and batch.block_table is not None:
            groups = self._groups(rows, free_bytes)
        gathers = any(each.gathers for each in groups)
        if batch.block_table is not None and not (self._knows_format or gathers):
            return self.portable_prefill(batch, chosen, free_bytes)
        tiles = [self._work_tiles(batch, each.rows) for each in groups]
        # One copy to the device for both.
        counters = tiles[0].new_zeros(1, tiles[0].shape[1])
        plan = self._plan(batch, groups, [counters, *tiles], HopperPlan)
        plan.chosen = chosen
        plan.counters, plan.tiles = plan.tiles[0, :2], plan.tiles[1:]
        is_bound = batch.lengths == "upper_bound"
        lens = zip(rows.key_lens, rows.seq_lens, strict=True)
        has_fresh = is_bound or any(new == keys for new, keys in lens)
        plan.may_be_fresh = has_fresh and not plan.is_fresh and batch.key_start_loc_cpu is None
        plan.splits_all_sms = self.spec.lengths == "upper_bound"
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        plan = plan.in_parts(groups, tiles)
        for part, group in zip(plan.parts, groups, strict=False):
            assert isinstance(part, HopperPlan)
            part.chosen = group.rows.requests
        return plan

    def portable_prefill(
        self, batch: AttentionBatch, chosen: list[int], free_bytes: int
    ) -> PrefillPlan:
        """TRITON_ATTN's plan for these requests."""
        return super()._prefill(batch, chosen, free_bytes)

    def _has_enough_work(self, rows: PlanRows) -> bool:
        """See TritonBuilder."""
        tiles = sum(-(-each // BLOCK_M) for each in rows.query_lens)
        return 2 * tiles * self.spec.num_heads >= self.launches.num_sms

    def _work_tiles(self, batch: AttentionBatch, rows: PlanRows) -> torch.Tensor:
        """(num_tiles, 4) int32 on the host: the columns that `hopper_prefill_kernel` documents."""
        requests, first_tokens = self._tiles(rows, BLOCK_M, 1).long().unbind(1)
        starts = batch.query_start_loc_cpu
        firsts = starts[requests]
        lengths = starts[requests + 1] - firsts
        return torch.stack((firsts, lengths, first_tokens, requests), 1).to(torch.int32)

    def _max_tiles(self, limits: GraphLimits, longest_decode: int) -> int:
        if not self._knows_format:
            return super()._max_tiles(limits, longest_decode)
        return limits.num_tokens // BLOCK_M + self._max_prefills(limits, longest_decode)

    def _idle_tile(self, idle: int) -> tuple[int, ...]:
        return (0, 0, 0, idle) if self._knows_format else super()._idle_tile(idle)

    def _listed_tiles(self, batch: AttentionBatch, prefills: list[int]) -> torch.Tensor:
        if not self._knows_format:
            return super()._listed_tiles(batch, prefills)
        return self._work_tiles(batch, plan_rows(batch, prefills, BLOCK_N[self.spec.head_size]))

    def _prefill_plan(
        self, batch: AttentionBatch, tiles: torch.Tensor, requests: torch.Tensor
    ) -> PrefillPlan:
        plan = super()._prefill_plan(batch, tiles, requests)
        if not self._knows_format:
            return plan
        return HopperPlan(
            **vars(plan),
            counters=tiles.new_zeros(2),
            fresh_end=batch.num_tokens,
            may_be_fresh=True,
            splits_all_sms=self.spec.lengths == "upper_bound",
        )


@functools.cache
def cache_problem(spec: AttentionSpec, device: DeviceProfile) -> str:
    """What keeps TMA from the pages of a layer's cache, as a sentence; "" if nothing."""
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


def describe_rows(tensor: torch.Tensor, rows: int, number: int | None = None) -> Any:
    """A TMA descriptor of (tokens, heads, size) in boxes of this many rows.

    The tensor is copied if TMA cannot read it.

    Args:
        tensor: the tensor.
        rows: of a box.
        number: the descriptor's rows; None for all tokens.
    """
    number = tensor.shape[0] if number is None else number
    strides = tensor.stride()
    found = _described(tensor.data_ptr(), tensor.dtype, number, tensor.shape[1:], strides, rows)
    if found is not None:
        return found
    copy = tensor.clone(memory_format=torch.contiguous_format).flatten(1)
    box = (rows, box_columns(tensor.shape[2]))
    return tma_descriptor(copy, (number, copy.shape[1]), copy.stride(0), box)


@dataclass(frozen=True)
class _Memory:
    """The base of a descriptor that is kept. A tensor would not be freed."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=4096)
def _described(
    address: int,
    dtype: torch.dtype,
    number: int,
    head_shape: tuple[int, int],
    strides: tuple[int, int, int],
    rows: int,
) -> Any:
    """A descriptor of rows whose heads are next to each other; None if TMA cannot read them.

    Steps reuse memory, and all layers of one have the same shapes: a descriptor is made once.
    """
    heads, size = head_shape
    token, head, element = strides
    is_aligned = not (address % 16 or token * dtype.itemsize % 16)
    is_row = element == 1 and (head == size or heads == 1) and token >= heads * size
    if not (number and is_aligned and is_row):
        return None
    box = (rows, box_columns(size))
    return tma_descriptor(_Memory(address, dtype), (number, heads * size), token, box)


def words_to_copy(cache: KVSource, dtype: torch.dtype) -> CopiedCache | None:
    """A cache as `copied.py` reads it, for a layer of this dtype; None if it cannot."""
    form = copied_format(cache.k.dtype if cache.format == "plain" else cache.format, dtype)
    width = cache.k.element_size()
    strides = [step * width for step in (*cache.k_strides, *cache.v_strides)]
    unit = math.gcd(16, *strides, cache.k.data_ptr(), cache.v.data_ptr())
    if form is None or unit < 4:
        return None
    words = (_as_words(part) for part in (cache.k, cache.v))
    return CopiedCache(form, unit, tuple(step // unit for step in strides), *words)


def _as_words(part: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first element on as int32."""
    skipped = part.storage_offset() * part.element_size()
    words = torch.empty(0, dtype=torch.int32, device=part.device)
    words.set_(part.untyped_storage(), skipped // 4, (1,), (1,))
    return words


def copied_format(stored: torch.dtype | str, dtype: torch.dtype) -> str | None:
    """The FORMAT of `PrefillConfig` for stored elements in a layer of a dtype; None without one."""
    if stored == dtype:
        return "same"
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    name = names.get(stored) if isinstance(stored, torch.dtype) else stored
    return name if name in (*names.values(), "int8", "e4m3", "e5m2") else None
