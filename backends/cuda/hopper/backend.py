"""HOPPER_ATTN: TRITON_ATTN with Gluon kernels for Hopper, `prefill.py` and `decode.py`.

The portable Triton kernels do what these do not support.
"""

from __future__ import annotations

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
from attn_dispatch.backends.cuda.hopper.paged_tma import PagedTma
from attn_dispatch.backends.cuda.hopper.plan import (
    HopperBuilder,
    HopperPlan,
    cache_problem,
    describe_rows,
)
from attn_dispatch.backends.cuda.hopper.sm_partition import side_stream
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource
from attn_dispatch.backends.triton.plan import (
    DecodePlan,
    PrefillPlan,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.capability import Capabilities, OneOf, SameAs
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperAttnBackend", "HopperImpl"]


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
            pages = self._pages_to_decode(call.cache, decode, call.query.dtype)
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

    def _source(self, call: Call, plan: PrefillPlan) -> KVSource:
        """As TRITON_ATTN's, but pages that the Hopper kernel reads are not gathered."""
        source = super()._source
        if not isinstance(plan, HopperPlan):
            return source(call, plan)
        if self._paged(call, plan) is not None:
            assert call.cache is not None
            return call.cache
        if plan.reads_pages and plan.gathered_start_loc is None and not plan.is_fresh:
            raise InvalidInputError(
                "The kv_cache begins at an address that is no multiple of 16, or has 2 ** 31 rows; "
                "a captured step of HOPPER_ATTN reads it by TMA, which needs the former and fewer "
                "rows. Align the cache."
            )
        return source(call, plan)

    def _paged(self, call: Call, plan: HopperPlan) -> PagedTma | None:
        """The cache, if the prefill kernel reads it."""
        is_new = plan.is_fresh and call.value is not None and self._has_rows(call)
        if is_new or not plan.reads_pages or call.cache is None:
            return None
        return self._pages(call.cache, call.query.dtype)

    def _prefill(self, call: Call, plan: PrefillPlan, source: KVSource) -> None:
        if isinstance(plan, HopperPlan):
            self._launch_prefill(call, plan, source, call.metadata.launches.num_sms)
        else:
            super()._prefill(call, plan, source)

    def _launch_prefill(self, call: Call, plan: HopperPlan, source: KVSource, num_sms: int) -> None:
        """Launch the Hopper prefill kernel on this many SMs."""
        if not len(plan.tiles):
            return
        query, out, batch = call.query, call.out, call.metadata.batch
        block_n, num_tiles = BLOCK_N[self.head_size], len(plan.tiles) * self.num_heads
        slopes, sinks = self._per_head(query)
        pages, table, steps = self._paged(call, plan), source.starts, (0,) * 7
        if pages is None:
            descriptors = plan.describe(source, block_n)
        else:
            table, keys, values = batch.block_table, pages.keys, pages.values
            assert table is not None
            descriptors = keys.descriptor, values.descriptor
            steps = (table.stride(0), *keys.steps, *values.steps)
        new = descriptors
        has_fresh = self._skips_fresh(call, plan)
        if has_fresh:
            assert call.key is not None
            assert call.value is not None
            new = plan.describe_new(call.key, call.value, block_n)
        block_size = 0 if pages is None else pages.block_size
        launch = self._launchers.find(
            ("hopper", query.dtype, sinks.dtype, block_size, has_fresh),
            self._hopper_kernel,
            lambda: {
                "CONFIG": PrefillConfig(
                    **self._layer_constants(),
                    BLOCK_N=block_n,
                    BLOCK_SIZE=block_size,
                    HAS_FRESH=has_fresh,
                )
            },
            {"num_warps": 4},
        )
        assert table is not None
        launch(
            (min(num_tiles, num_sms), 1, 1),
            describe_rows(query, BLOCK_M // 2), *descriptors, *new, out.values, out.lse, plan.tiles,
            plan.counters, batch.seq_lens, table, slopes, sinks, num_tiles, *steps,
            *out.values.stride()[:2], *self._numbers,
        )  # fmt: skip

    def _skips_fresh(self, call: Call, plan: PrefillPlan) -> bool:
        return isinstance(plan, HopperPlan) and plan.may_be_fresh and self._has_rows(call)

    def _decode(self, call: Call, plan: DecodePlan, cache: KVSource) -> None:
        pages = self._pages_to_decode(cache, plan, call.query.dtype)
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

    def _pages_to_decode(
        self, cache: KVSource, plan: DecodePlan, dtype: torch.dtype
    ) -> PagedTma | None:
        """The cache as the Hopper decode kernel reads it; None where the portable one must."""
        return self._pages(cache, dtype) if _fits_decode_rows(self, plan.longest) else None

    def _pages(self, cache: KVSource, dtype: torch.dtype) -> PagedTma | None:
        """The cache as TMA reads it, if it can. The last result is kept."""
        if cache.k.dtype != dtype:
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
            *keys.steps, *values.steps, *out.values.stride()[:2], plan.num_reqs,
            batch.seq_lens.shape[0], query.shape[0], table.stride(0), *self._numbers,
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
    """What keeps the decode kernel from a layer, as a sentence; "" if it computes it."""
    if not _fits_decode_rows(spec, 1):
        return (
            f"it takes up to {MAX_DECODE_ROWS} query heads of a KV head, and the layer has "
            f"{spec.num_heads // spec.num_kv_heads}"
        )
    return cache_problem(spec, device)


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
