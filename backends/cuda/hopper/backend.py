"""HOPPER_ATTN: TRITON_ATTN with Gluon kernels for Hopper, `prefill.py` and `decode.py`.

The portable Triton kernels do what these do not support.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.hopper.launch import (
    BLOCK_M,
    BLOCK_N,
    DECODES,
    FEW_KV_HEADS_PER_SM,
    FIXED_BLOCKS,
    MAX_DECODE_ROWS,
    DecodeConfig,
    DecodeLaunch,
    PrefillConfig,
)
from attn_dispatch.backends.cuda.hopper.paged_tma import PagedTma, page_problem, tma_descriptor
from attn_dispatch.backends.cuda.hopper.sm_partition import SMShares, share_sms, side_stream
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.graph_plan import TritonGraphBuilder
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource, fills_tiles
from attn_dispatch.backends.triton.plan import (
    DecodePlan,
    PrefillPlan,
    TritonMetadata,
    plan_rows,
)
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, OneOf, SameAs
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperAttnBackend", "HopperBuilder", "HopperImpl", "HopperPlan"]


@dataclass
class HopperPlan(PrefillPlan):
    """A plan whose tiles are the Hopper kernel's work tiles, of tokens of one query head.

    Attributes:
        fresh_end: where these requests' rows of `key` end.
        splits_all_sms: the decodes of the step are split as if they had all SMs, whatever their
            share is, because that follows from bounds and the split decides bits.
        may_be_fresh: by the bounds of their lengths a request may have a past, but need not; if it
            has none, its keys can be read from `key`.
        shares: how the SMs are shared with concurrent decodes; None if decodes run first.
        descriptors: of gathered keys and values, which are at the same address for all layers.
    """

    fresh_end: int = 0
    may_be_fresh: bool = False
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
        k, v = (_describe(rows[: self.gathered_rows], block_n) for rows in (source.k, source.v))
        self.descriptors = k, v
        return k, v

    def describe_new(self, key: torch.Tensor, value: torch.Tensor, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of the rows of a call's key and value."""
        return _describe(key[: self.fresh_end], block_n), _describe(
            value[: self.fresh_end], block_n
        )


class HopperBuilder(TritonGraphBuilder):
    """Plans prefills for the Hopper kernel, unless there are too many keys to gather.

    In a captured step, where no keys are gathered, the portable kernel computes prefills.
    """

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
        block_n = BLOCK_N[self.spec.head_size]
        rows = plan_rows(batch, chosen, block_n)
        has_pages = batch.block_table is not None
        # The last tile of a request's new keys must not reach into those of the next: 0 * NaN is
        # NaN. TMA reads zeros behind the last request.
        ends = [batch.key_starts[i + 1] - batch.key_starts[i] for i in chosen[:-1]]
        ends_with_tile = not any(length % block_n for length in ends)
        if not (self._has_room(rows) if has_pages else ends_with_tile):
            return super()._prefill(batch, chosen)
        tiles = _work_tiles(batch, self._tiles(rows, BLOCK_M, 1))
        plan = self._plan(batch, rows, tiles, has_pages, HopperPlan)
        assert isinstance(plan, HopperPlan)
        plan.is_fresh = plan.is_fresh and ends_with_tile
        is_unknown = batch.lengths == "upper_bound" and not plan.is_fresh
        plan.splits_all_sms = self.spec.lengths == "upper_bound"
        plan.may_be_fresh = is_unknown and ends_with_tile and batch.key_start_loc_cpu is None
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        return plan


def _work_tiles(batch: AttentionBatch, tiles: torch.Tensor) -> torch.Tensor:
    """(num_tiles, 4) int32 on the host: the columns that `hopper_prefill_kernel` documents."""
    requests, first_tokens = tiles.long().unbind(1)
    starts = batch.query_start_loc_cpu
    firsts = starts[requests]
    lengths = starts[requests + 1] - firsts
    return torch.stack((firsts, lengths, first_tokens, requests), 1).to(torch.int32)


class HopperImpl(TritonImpl):
    """Launches the Hopper kernels, and the portable ones for what these do not support."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda.hopper import decode, prefill

        self._hopper_kernel = prefill.hopper_prefill_kernel
        self._hopper_decode_kernel = decode.hopper_decode_kernel
        self._last_pages: tuple[KVSource, PagedTma | None] | None = None

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """False: the Hopper kernels do not quantize."""
        return False

    def _attend(self, call: Call) -> None:
        prefill, decode = call.metadata.prefill, call.metadata.decode
        shares = prefill.shares if isinstance(prefill, HopperPlan) else None
        pages = None
        if decode is not None and decode.num_reqs and call.cache is not None:
            pages = self._pages(call.cache, decode, call.query.dtype)
        if shares is None or pages is None:
            super()._attend(call)
            return
        assert isinstance(prefill, HopperPlan)
        assert decode is not None
        device = call.query.device
        num_sms = call.metadata.launches.num_sms
        side, main = side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                source = self._source(call, prefill)
                main.wait_stream(side)  # gathering takes all SMs, and little time
                self._launch_prefill(call, prefill, source, shares.prefill)
            row = DECODES[self.head_size].mixed
            # Blocks beyond the share wait for an SM.
            blocks = shares.decode * row.blocks
            if prefill.splits_all_sms:
                blocks = FIXED_BLOCKS * num_sms
            self._launch_decode(call, decode, pages, row, blocks)
        finally:  # the next work may write the same output
            main.wait_stream(side)

    def _prefill(self, call: Call, plan: PrefillPlan, source: KVSource) -> None:
        if isinstance(plan, HopperPlan):
            self._launch_prefill(call, plan, source, call.metadata.launches.num_sms)
        else:
            super()._prefill(call, plan, source)

    def _launch_prefill(self, call: Call, plan: HopperPlan, source: KVSource, num_sms: int) -> None:
        """Launch the Hopper prefill kernel on this many SMs."""
        if not len(plan.tiles):
            return
        query, out = call.query, call.out
        block_n, num_tiles = BLOCK_N[self.head_size], len(plan.tiles) * self.num_heads
        slopes, sinks = self._per_head(query)
        descriptors = new = plan.describe(source, block_n)
        has_fresh = self._skips_fresh(call, plan)
        if has_fresh:
            assert call.key is not None
            assert call.value is not None
            new = plan.describe_new(call.key, call.value, block_n)
        launch = self._launchers.find(
            ("hopper", query.dtype, sinks.dtype, has_fresh),
            self._hopper_kernel,
            lambda: {
                "CONFIG": PrefillConfig(
                    **self._layer_constants(), BLOCK_N=block_n, HAS_FRESH=has_fresh
                )
            },
            {"num_warps": 4},
        )
        assert source.starts is not None
        launch(
            (min(num_tiles, num_sms), 1, 1),
            _describe(query, BLOCK_M // 2), *descriptors, *new, out.values, out.lse, plan.tiles,
            call.metadata.batch.seq_lens, source.starts, slopes, sinks, num_tiles,
            *out.values.stride()[:2], *self._numbers,
        )  # fmt: skip

    def _skips_fresh(self, call: Call, plan: PrefillPlan) -> bool:
        return isinstance(plan, HopperPlan) and plan.may_be_fresh and self._has_rows(call)

    def _decode(self, call: Call, plan: DecodePlan, cache: KVSource) -> None:
        pages = self._pages(cache, plan, call.query.dtype)
        if pages is None:
            super()._decode(call, plan, cache)
            return
        num_sms, prefill = call.metadata.launches.num_sms, call.metadata.prefill
        rows = DECODES[self.head_size]
        if isinstance(prefill, HopperPlan) and prefill.splits_all_sms:
            self._launch_decode(call, plan, pages, rows.mixed, FIXED_BLOCKS * num_sms)
            return
        is_few = plan.num_reqs * self.num_kv_heads < FEW_KV_HEADS_PER_SM * num_sms
        row = rows.few if is_few else rows.many
        self._launch_decode(call, plan, pages, row, num_sms * row.blocks)

    def _pages(self, cache: KVSource, plan: DecodePlan, dtype: torch.dtype) -> PagedTma | None:
        """The cache as the Hopper decode kernel reads it; None where the portable one must.

        The last result is kept.
        """
        if not _fits_decode_rows(self, plan.longest) or cache.k.dtype != dtype:
            return None
        if self._last_pages is None or self._last_pages[0] is not cache:
            self._last_pages = cache, PagedTma.of(cache)
        return self._last_pages[1]

    def _launch_decode(
        self, call: Call, plan: DecodePlan, pages: PagedTma, row: DecodeLaunch, blocks: int
    ) -> None:
        """Launch this many blocks of the Hopper decode kernel."""
        query, out, batch, requests = call.query, call.out, call.metadata.batch, plan.requests
        table = batch.block_table
        assert table is not None
        group = self.num_heads // self.num_kv_heads
        rows = max(8, 1 << (plan.longest * group - 1).bit_length())
        slopes, sinks = self._per_head(query)
        launch = self._launchers.find(
            (
                "hopper decode",
                (query.dtype, sinks.dtype),
                rows,
                row,
                pages.block_size,
                requests is None,
            ),
            self._hopper_decode_kernel,
            lambda: {
                "CONFIG": DecodeConfig(
                    **self._layer_constants(),
                    ROWS=rows,
                    KEYS=row.keys,
                    BLOCK_SIZE=pages.block_size,
                    STAGES=row.stages_for(rows),
                    PROGRAMS=row.programs,
                    HAS_REQUEST_LIST=requests is not None,
                    MIN_TILES=row.min_tiles,
                )
            },
            row.options,
        )
        keys, values = pages.keys, pages.values
        launch(
            (blocks, 1, 1),
            query, keys.descriptor, values.descriptor, out.values, out.lse, plan.part_out,
            plan.part_lse, plan.counters, batch.seq_lens if requests is None else requests,
            batch.query_start_loc, batch.seq_lens, table, slopes, sinks, *query.stride()[:2],
            keys.block_rows, keys.head_rows, keys.head_columns, values.block_rows,
            values.head_rows, values.head_columns,
            *out.values.stride()[:2], plan.num_reqs, batch.seq_lens.shape[0], query.shape[0],
            table.stride(0), *self._numbers,
        )  # fmt: skip

    def _layer_constants(self) -> dict[str, Any]:
        """The layer's constants, in the config of both kernels."""
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.num_heads // self.num_kv_heads,
            "D": self.head_size,
            "CAUSAL": self.causal,
            "WINDOW": self.sliding_window is not None,
            "CAP": self._cap is not None,
            "ALIBI": self.alibi_slopes is not None,
            "SINKS": self.sinks is not None,
            "LSE": self.returns_lse,
        }


def _fits_decode_rows(layer: HopperImpl | AttentionSpec, query_len: int) -> bool:
    """Whether the decode kernel's rows hold the query heads of a KV head, for this many tokens."""
    return query_len * layer.num_heads <= MAX_DECODE_ROWS * layer.num_kv_heads


def _decode_problem(spec: AttentionSpec, device: DeviceProfile) -> str:
    """What keeps the decode kernel from a layer's cache, as a sentence; "" if it reads it."""
    assert spec.block_size is not None
    dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, device.arch)
    if dtype != spec.dtype:
        stored, own = (str(each).removeprefix("torch.") for each in (dtype, spec.dtype))
        return f"it reads caches of the layer's own dtype, {own}, and this one is {stored}"
    if not _fits_decode_rows(spec, 1):
        return (
            f"it takes up to {MAX_DECODE_ROWS} query heads of a KV head, and the layer has "
            f"{spec.num_heads // spec.num_kv_heads}"
        )
    width = dtype.itemsize
    row = spec.head_size * width
    pages = (spec.block_size, spec.num_kv_heads, row, width)
    if (found := spec.kv_strides) is None:
        token = spec.num_kv_heads * row
        return page_problem(*pages, (2 * spec.block_size * token, token, row), 16)
    problems = (page_problem(*pages, each, found.alignment) for each in (found.key, found.value))
    return next(filter(None, problems), "")


def _describe(tensor: torch.Tensor, rows: int) -> Any:
    """A TMA descriptor of (tokens, heads, size) in boxes of this many rows by one head.

    The tensor is copied if TMA cannot read it.
    """
    size = tensor.shape[2]
    if not fills_tiles(tensor, size):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    matrix = tensor.flatten(1)
    return tma_descriptor(matrix, matrix.shape, matrix.stride(0), (rows, size))


class HopperAttnBackend(TritonAttnBackend):
    """TRITON_ATTN with kernels for Hopper: wgmma, TMA and specialized warps, in Gluon."""

    interface_version = 2
    name = "HOPPER_ATTN"
    impl_cls = HopperImpl
    builder_cls = HopperBuilder
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        # Gluon changes between releases. The kernels compile with 3.6 to 3.9.
        requires=("triton>=3.6,<3.10",),
        **{
            **TritonAttnBackend.capabilities.fields,
            "head_size": OneOf(*BLOCK_N),
            "head_size_v": SameAs("head_size"),
            "dtype": OneOf(torch.bfloat16, torch.float16),
            "alibi": OneOf(True, False),  # prefill splits the distance by rows and columns
            "window_size": OneOf(None),
            "attention_chunk": OneOf(None),
            "key_positions": OneOf(False),
            "custom_mask": OneOf(False),
            "bidirectional_ranges": OneOf(False),
            "output_quant": OneOf(None),
            "batch_invariant": OneOf(False),
        },
    )

    @classmethod
    def kernel_notes(
        cls, spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
    ) -> tuple[str, ...]:
        """Why decodes run on TRITON_ATTN's kernel, if they do."""
        if spec.block_size is None or phase is Phase.PREFILL:
            return ()
        problem = _decode_problem(spec, device)
        if not problem:
            return ()
        return (f"decodes run on TRITON_ATTN's kernel, not on the one for Hopper: {problem}",)
