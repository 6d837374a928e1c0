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
    MAX_DECODE_ROWS,
    DecodeConfig,
    DecodeLaunch,
    PrefillConfig,
)
from attn_dispatch.backends.cuda.hopper.paged_tma import PageMatrix, tma_descriptor
from attn_dispatch.backends.cuda.hopper.sm_partition import SMShares, share_sms, side_stream
from attn_dispatch.backends.triton.backend import Call, TritonAttnBackend, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource, fills_tiles
from attn_dispatch.backends.triton.plan import (
    DecodePlan,
    PrefillPlan,
    TritonBuilder,
    TritonMetadata,
    plan_rows,
)
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, OneOf, SameAs
from attn_dispatch.platforms.device import DeviceMatch
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperAttnBackend", "HopperBuilder", "HopperImpl", "HopperPlan"]


@dataclass
class HopperPlan(PrefillPlan):
    """A plan whose tiles are the Hopper kernel's work tiles, of tokens of one query head.

    Attributes:
        fresh_end: where these requests' rows of `key` end.
        shares: how the SMs are shared with concurrent decodes; None if decodes run first.
        descriptors: of gathered keys and values, which are at the same address for all layers.
    """

    fresh_end: int = 0
    shares: SMShares | None = None
    descriptors: tuple[Any, Any] | None = None

    def describe(self, source: KVSource, block_n: int) -> tuple[Any, Any]:
        """TMA descriptors of keys and values."""
        is_gathered = self.gathered is not None and source.k is self.gathered[0]
        if is_gathered and self.descriptors is not None:
            return self.descriptors
        end = self.gathered_rows if is_gathered else self.fresh_end
        k, v = (_describe(rows[:end], block_n) for rows in (source.k, source.v))
        if is_gathered:
            self.descriptors = k, v
        return k, v


class HopperBuilder(TritonBuilder):
    """Plans prefills for the Hopper kernel, unless there are too many keys to gather."""

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
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        return plan


def _work_tiles(batch: AttentionBatch, tiles: torch.Tensor) -> torch.Tensor:
    """(num_tiles, 8) int32 on the host: the columns that `hopper_prefill_kernel` documents."""
    requests, first_tokens = tiles.long().unbind(1)
    starts, seq_lens = batch.query_start_loc_cpu, batch.seq_lens_cpu
    firsts = starts[requests]
    lengths = starts[requests + 1] - firsts
    work_tiles = torch.zeros(len(tiles), 8, dtype=torch.int32, device="cpu")
    columns = (firsts, lengths, first_tokens, seq_lens[requests], requests)
    work_tiles[:, : len(columns)] = torch.stack(columns, 1)
    return work_tiles


class HopperImpl(TritonImpl):
    """Launches the Hopper kernels, and the portable ones for what these do not support."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda.hopper import decode, prefill

        self._hopper_kernel = prefill.hopper_prefill_kernel
        self._hopper_decode_kernel = decode.hopper_decode_kernel
        self._last_pages: tuple[KVSource, PageMatrix | None] | None = None

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
        side, main = side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                source = self._source(call, prefill)
                main.wait_stream(side)  # gathering takes all SMs, and little time
                self._launch_prefill(call, prefill, source, shares.prefill)
            row = DECODES[self.head_size].mixed
            self._launch_decode(call, decode, pages, row, shares.decode)
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
        launch = self._launchers.find(
            ("hopper", query.dtype, sinks.dtype),
            self._hopper_kernel,
            lambda: {"CONFIG": PrefillConfig(**self._layer_constants(), BLOCK_N=block_n)},
            {"num_warps": 4},
        )
        assert source.starts is not None
        launch(
            (min(num_tiles, num_sms), 1, 1),
            _describe(query, BLOCK_M // 2), *plan.describe(source, block_n), out.values, out.lse,
            plan.tiles, source.starts, slopes, sinks, num_tiles, *out.values.stride()[:2],
            *self._numbers,
        )  # fmt: skip

    def _decode(self, call: Call, plan: DecodePlan, cache: KVSource) -> None:
        pages = self._pages(cache, plan, call.query.dtype)
        if pages is None:
            super()._decode(call, plan, cache)
            return
        num_sms = call.metadata.launches.num_sms
        is_few = plan.num_reqs * self.num_kv_heads < FEW_KV_HEADS_PER_SM * num_sms
        rows = DECODES[self.head_size]
        self._launch_decode(call, plan, pages, rows.few if is_few else rows.many, num_sms)

    def _pages(self, cache: KVSource, plan: DecodePlan, dtype: torch.dtype) -> PageMatrix | None:
        """The cache as the Hopper decode kernel reads it; None where the portable one must.

        The last result is kept.
        """
        is_long = plan.longest * self.num_heads > MAX_DECODE_ROWS * self.num_kv_heads
        if is_long or cache.k.dtype != dtype:
            return None
        if self._last_pages is None or self._last_pages[0] is not cache:
            self._last_pages = cache, PageMatrix.of(cache)
        return self._last_pages[1]

    def _launch_decode(
        self, call: Call, plan: DecodePlan, pages: PageMatrix, row: DecodeLaunch, num_sms: int
    ) -> None:
        """Launch the Hopper decode kernel on this many SMs."""
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
        launch(
            (num_sms * row.blocks, 1, 1),
            query, pages.descriptor, out.values, out.lse, plan.part_out, plan.part_lse,
            plan.counters, batch.seq_lens if requests is None else requests,
            batch.query_start_loc, batch.seq_lens, table, slopes, sinks, *query.stride()[:2],
            pages.block_rows, pages.value_rows, pages.head_rows, pages.head_columns,
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
