"""HOPPER_ATTN: TRITON_ATTN with Gluon kernels for Hopper, `prefill.py` and `decode.py`.

The portable Triton kernels do what these do not support.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.cuda.hopper.launch import (
    BLOCK_M,
    BLOCK_N,
    DECODES,
    FEW_KV_HEADS_PER_SM,
    FIXED_BLOCKS,
    HEAD_SIZES,
    MAX_DECODE_ROWS,
    DecodeConfig,
    DecodeLaunch,
    PrefillConfig,
)
from attn_dispatch.backends.cuda.hopper.paged_tma import PagedTma
from attn_dispatch.backends.cuda.hopper.plan import (
    CopiedCache,
    HopperBuilder,
    HopperPlan,
    cache_problem,
    describe_rows,
    words_to_copy,
)
from attn_dispatch.backends.cuda.hopper.sm_partition import side_stream
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource
from attn_dispatch.backends.triton.plan import DecodePlan
from attn_dispatch.backends.triton.prefill_plan import PrefillPlan
from attn_dispatch.interface.capability import (
    AnyOf,
    Capabilities,
    OneOf,
    Reason,
    ReasonCode,
    SameAs,
)
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperAttnBackend", "HopperImpl"]


class _Keys(NamedTuple):
    """Keys and values as arguments of the prefill kernel, and what it is compiled for."""

    k: Any
    v: Any
    table: torch.Tensor
    steps: tuple[int, ...]
    scales: tuple[torch.Tensor, ...]
    block_size: int = 0
    format: str = ""
    unit: int = 16
    scale_stride: int = 0

    @property
    def name(self) -> tuple[Any, ...]:
        """What the compiled kernel depends on."""
        return self.block_size, self.format, self.unit, self.scale_stride


class HopperImpl(TritonImpl):
    """Launches the Hopper kernels, and the portable ones for what these do not support."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda.hopper import decode, prefill

        self._hopper_kernel = prefill.hopper_prefill_kernel
        self._hopper_decode_kernel = decode.hopper_decode_kernel
        self._last_pages: tuple[KVSource, PagedTma | None] | None = None
        self._last_copied: tuple[KVSource, CopiedCache | None] | None = None

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """False: the Hopper kernels do not quantize."""
        return False

    def _attend(self, call: Call) -> None:
        prefill, decode = call.metadata.prefill, call.metadata.decode
        shares = prefill.shares if isinstance(prefill, HopperPlan) else None
        if not call.query.is_cuda:
            shares = None  # interpreted kernels run one after another
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
                if prefill.gathered_start_loc is not None:
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
        """As TRITON_ATTN's, which gathers by the plan."""
        if (
            isinstance(plan, HopperPlan)
            and plan.gathered_start_loc is None
            and not self._is_new(call, plan)
        ):
            assert call.cache is not None  # by check_forward
            return call.cache
        return super()._source(call, plan)

    def _prefill(self, call: Call, plan: PrefillPlan, source: KVSource) -> None:
        if not isinstance(plan, HopperPlan):
            super()._prefill(call, plan, source)
        elif source.starts is not None or self._reads(source, call.query.dtype):
            self._launch_prefill(call, plan, source, call.metadata.launches.num_sms)
        else:
            self._prefill_parts(call, plan.portable_plan(call.metadata))

    def _reads(self, cache: KVSource, dtype: torch.dtype) -> bool:
        """Whether the prefill kernel reads a cache."""
        return self._pages(cache, dtype) is not None or self._copied(cache, dtype) is not None

    def _launch_prefill(self, call: Call, plan: HopperPlan, source: KVSource, num_sms: int) -> None:
        """Launch the Hopper prefill kernel on this many SMs."""
        if not len(plan.tiles):
            return
        query, out, batch = call.query, call.out, call.metadata.batch
        block_n, num_tiles = BLOCK_N[self.head_size], len(plan.tiles) * self.num_heads
        slopes, sinks = self._per_head(query)
        is_new, has_fresh = self._is_new(call, plan), plan.may_be_fresh and self._has_rows(call)
        new: Any = None
        if is_new or has_fresh:
            assert call.key is not None
            assert call.value is not None
            new = plan.describe_new(call.key, call.value, block_n)
        rows = new if is_new else None
        if rows is None and source.starts is not None:
            rows = plan.describe_gathered(source, block_n)
        keys = self._keys_of(call, source, rows)
        # Triton encodes each descriptor at each launch: none that is not read.
        new = new if has_fresh else keys.scales
        launch = self._launchers.find(
            ("hopper", query.dtype, sinks.dtype, has_fresh, *keys.name),
            self._hopper_kernel,
            lambda: {
                "CONFIG": PrefillConfig(
                    **self._layer_constants(),
                    D_V=self.head_size_v,
                    BLOCK_N=block_n,
                    BLOCK_SIZE=keys.block_size,
                    HAS_FRESH=has_fresh,
                    FORMAT=keys.format,
                    UNIT=keys.unit,
                    SCALE_STRIDE=keys.scale_stride,
                )
            },
            {"num_warps": 4},
        )
        launch(
            (min(num_tiles, num_sms), 1, 1),
            describe_rows(query, BLOCK_M // 2), keys.k, keys.v, *new, out.values, out.lse,
            plan.tiles, plan.counters, batch.seq_lens, keys.table, *keys.scales, slopes, sinks,
            num_tiles, keys.table.stride(0), *keys.steps, *out.values.stride()[:2], *self._numbers,
        )  # fmt: skip

    def _keys_of(self, call: Call, source: KVSource, rows: Any) -> _Keys:
        """Where the prefill kernel finds keys and values; `rows`: where they are rows."""
        if rows is not None:
            assert source.starts is not None
            k, v = rows
            return _Keys(k, v, source.starts, (0,) * 6, (source.starts,) * 2)
        table = call.metadata.batch.block_table
        assert table is not None
        pages = self._pages(source, call.query.dtype)
        if pages is not None:
            keys, values = pages.keys, pages.values
            steps = (*keys.steps, *values.steps)
            return _Keys(
                keys.descriptor, values.descriptor, table, steps, (table,) * 2, pages.block_size
            )
        copied = self._copied(source, call.query.dtype)
        assert copied is not None  # by _prefill
        *scales, scale_stride = source.scales(call.layer)
        if source.format == "int8":
            scales = [source.k_row_scales, source.v_row_scales]
        return _Keys(
            copied.keys, copied.values, table, copied.steps, tuple(scales), source.block_size,
            copied.format, copied.unit, scale_stride,
        )  # fmt: skip

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
        fits = self.head_size in DECODES and _fits_decode_rows(self, plan.longest)
        return self._pages(cache, dtype) if fits else None

    def _pages(self, cache: KVSource, dtype: torch.dtype) -> PagedTma | None:
        """The cache as TMA reads it, if it can. The last result is kept."""
        if cache.k.dtype != dtype:
            return None
        if self._last_pages is None or self._last_pages[0] is not cache:
            self._last_pages = cache, PagedTma.of(cache)
        return self._last_pages[1]

    def _copied(self, cache: KVSource, dtype: torch.dtype) -> CopiedCache | None:
        """The cache as a warp group copies it, if it can. The last result is kept."""
        if self._last_copied is None or self._last_copied[0] is not cache:
            self._last_copied = cache, words_to_copy(cache, dtype)
        return self._last_copied[1]

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
    if spec.head_size not in DECODES:
        sizes = ", ".join(map(str, DECODES))
        return f"it computes heads of {sizes}, and the layer's have {spec.head_size}"
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
            "head_size": OneOf(*HEAD_SIZES),
            "head_size_v": AnyOf(SameAs("head_size"), OneOf(128)),
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
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Each size of keys has one size of values."""
        reasons = super().check_combination(spec, device)
        size = HEAD_SIZES[spec.head_size]
        if spec.head_size_v != size:
            asked = f"{spec.head_size_v} with head_size={spec.head_size}"
            reason = Reason(
                code=ReasonCode.COMBINATION, field="head_size_v", asked=asked, allowed=str(size)
            )
            reasons.append(reason)
        return reasons

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
