"""HOPPER_ATTN: TRITON_ATTN with kernels of Hopper's own, in Gluon, for prefill and for decode.

The kernels are in `prefill.py` and `decode.py`. What they do not take is the portable ones'.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.cuda.hopper.paged_tma import PageMatrix
from attn_dispatch.backends.cuda.hopper.sm_partition import Shares, share_sms, side_stream
from attn_dispatch.backends.triton.backend import TritonAttnBackend, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource, OutputBuffers, fills_tiles
from attn_dispatch.backends.triton.plan import (
    DecodePlan,
    PrefillPlan,
    TritonBuilder,
    TritonMetadata,
    plan_rows,
)
from attn_dispatch.interface.backend import refuse_spec
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, OneOf, SameAs
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperAttnBackend", "HopperBuilder", "HopperImpl", "HopperPlan"]

#: Query tokens in a tile, half of them for each warp group.
_BLOCK_M = 128
#: Head size -> keys in a tile: what two stages of keys and values leave room for.
_BLOCK_N = {64: 128, 128: 128, 256: 64}
#: Stages of the ring; registers of each thread that computes.
_STAGES, _REGISTERS = 2, 240


@dataclass(frozen=True)
class DecodeRow:
    """How the decode kernel is launched.

    Attributes:
        keys: in a tile.
        stages: of a program's ring; one less where a tile has more than `full_rows` rows.
        min_tiles: a program that works gets so many tiles of keys at least.
        programs: that share a block of threads.
        blocks: on an SM.
    """

    keys: int
    stages: int
    min_tiles: int = 3
    programs: int = 1
    blocks: int = 1
    full_rows: int = 16

    def stages_for(self, rows: int) -> int:
        """Stages for which shared memory has room beside so many rows."""
        return self.stages - (rows > self.full_rows)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler takes: several blocks, of 8 warps each, share an SM's registers."""
        return {"num_warps": 4} | ({"maxnreg": 256 // self.blocks} if self.blocks > 1 else {})


class DecodeRows(NamedTuple):
    """Launches for many requests, for few, and beside a prefill, where a block has the SM."""

    many: DecodeRow
    few: DecodeRow
    beside: DecodeRow


#: By head size. A plan has room for the parts of as many programs as the portable kernel has.
_DECODES = {
    64: DecodeRows(
        many=DecodeRow(64, 3, blocks=4, full_rows=8),
        few=DecodeRow(128, 6, min_tiles=2),
        beside=DecodeRow(128, 3, min_tiles=2, programs=2),
    ),
    128: DecodeRows(
        many=DecodeRow(64, 3, blocks=2),
        few=DecodeRow(128, 3, min_tiles=2),
        beside=DecodeRow(64, 3, programs=2),
    ),
    256: DecodeRows(many=DecodeRow(64, 3), few=DecodeRow(64, 3), beside=DecodeRow(64, 3)),
}
#: Rows of a tile, at most. More are the portable kernel's.
_DECODE_ROWS = 32
#: Lengths of requests that a program reads at a time.
_LENGTHS = 128
#: For each SM so many KV heads, over all requests, are few.
_FEW = 0.25


@dataclass
class HopperPlan(PrefillPlan):
    """A plan whose tiles are this kernel's: tokens of one query head.

    Attributes:
        fresh_end: where the rows of `key` end that are these requests'.
        shares: how SMs are shared with decodes at the same time; None if these come before.
        descriptors: of gathered keys and values, which stay where they are for all layers.
    """

    fresh_end: int = 0
    shares: Shares | None = None
    descriptors: tuple[Any, Any] | None = None

    def described(self, source: KVSource, describe: Any, block_n: int) -> tuple[Any, Any]:
        """Descriptors of keys and values."""
        is_gathered = self.gathered is not None and source.k is self.gathered[0]
        if is_gathered and self.descriptors is not None:
            return self.descriptors
        end = self.gathered_rows if is_gathered else self.fresh_end
        k, v = (_as_matrix(rows[:end]) for rows in (source.k, source.v))
        made = describe(k, block_n), describe(v, block_n)
        if is_gathered:
            self.descriptors = made
        return made


class HopperBuilder(TritonBuilder):
    """Lays out prefills for this kernel, unless their keys are too many to be gathered."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        refuse_spec(HopperAttnBackend, spec, detect_device(device))

    def build(self, batch: AttentionBatch) -> TritonMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata = super().build(batch)
        plan = metadata.prefill
        if isinstance(plan, HopperPlan) and metadata.decode is not None:
            few = self._few_tokens(batch)
            assert few is not None  # there are both kinds
            num_pieces = len(plan.tiles) * self.spec.num_heads
            plan.shares = share_sms(self.spec, batch, few, num_pieces, self.launches.num_sms)
        return metadata

    def _prefill(self, batch: AttentionBatch, chosen: list[int]) -> PrefillPlan:
        block_n = _BLOCK_N[self.spec.head_size]
        rows = plan_rows(batch, chosen, block_n)
        has_pages = batch.block_table is not None
        # The last tile of a request's new keys must not reach into those of the next: times a
        # weight of zero NaN is NaN. Behind the last request's TMA finds zeros.
        ends = [batch.key_starts[i + 1] - batch.key_starts[i] for i in chosen[:-1]]
        ends_with_tile = not any(length % block_n for length in ends)
        if not (self._has_room(rows) if has_pages else ends_with_tile):
            return super()._prefill(batch, chosen)
        pieces = _pieces(batch, self._tiles(rows, _BLOCK_M, 1))
        plan = self._plan(batch, rows, pieces, has_pages, HopperPlan)
        assert isinstance(plan, HopperPlan)
        plan.is_fresh = plan.is_fresh and ends_with_tile
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        return plan


def _pieces(batch: AttentionBatch, tiles: torch.Tensor) -> torch.Tensor:
    """(num_tiles, 8) int32 on the host: what prefill.py wants to know of each tile."""
    requests, first_tokens = tiles.long().unbind(1)
    starts = batch.query_start_loc_cpu
    queries = starts[1:] - starts[:-1]
    pieces = torch.zeros(len(tiles), 8, dtype=torch.int32, device="cpu")
    columns = (starts[requests], queries[requests], first_tokens, batch.seq_lens_cpu[requests])
    for place, column in enumerate((*columns, requests)):
        pieces[:, place] = column
    return pieces


class HopperImpl(TritonImpl):
    """Launches Hopper's kernels, and the portable ones for what these do not take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda.hopper import decode, prefill

        self._hopper_kernel = prefill.hopper_prefill_kernel
        self._hopper_decode_kernel = decode.hopper_decode_kernel
        self._last_pages: tuple[KVSource, PageMatrix | None] | None = None

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """No: Hopper's kernels do not quantize."""
        return False

    def _attend(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: KVSource | None,
        out: OutputBuffers,
    ) -> None:
        prefill, decode = metadata.prefill, metadata.decode
        shares = prefill.shares if isinstance(prefill, HopperPlan) else None
        pages = None if decode is None or cache is None else self._pages(cache, decode, query.dtype)
        if shares is None or pages is None or decode is None or not decode.num_reqs:
            super()._attend(layer, metadata, query, key, value, cache, out)
            return
        assert isinstance(prefill, HopperPlan)
        side, main = side_stream(query.device), torch.cuda.current_stream(query.device)
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                source = self._source(layer, metadata, prefill, cache, key, value)
                main.wait_stream(side)  # gathering takes all SMs, and little time
                self._launch_prefill(prefill, query, source, out, shares.prefill)
            row = _DECODES[self.head_size].beside
            self._launch_decode(metadata, decode, query, pages, out, row, shares.decode)
        finally:  # whatever comes next may write the same output
            main.wait_stream(side)

    def _prefill(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        query: torch.Tensor,
        source: KVSource,
        out: OutputBuffers,
    ) -> None:
        if isinstance(plan, HopperPlan):
            self._launch_prefill(plan, query, source, out, metadata.launches.num_sms)
        else:
            super()._prefill(layer, metadata, plan, query, source, out)

    def _launch_prefill(
        self,
        plan: HopperPlan,
        query: torch.Tensor,
        source: KVSource,
        out: OutputBuffers,
        num_sms: int,
    ) -> None:
        """Launch Hopper's prefill kernel on so many SMs."""
        if not len(plan.tiles):
            return
        block_n, num_pieces = _BLOCK_N[self.head_size], len(plan.tiles) * self.num_heads
        slopes, sinks = self._per_head(query)
        describe = _descriptors(self.head_size, query.dtype)
        launch = self._launchers.find(
            ("hopper", query.dtype, sinks.dtype),
            self._hopper_kernel,
            lambda: {
                **self._compiled_for(),
                "BLOCK_N": block_n,
                "STAGES": _STAGES,
                "REGISTERS": _REGISTERS,
            },
            {"num_warps": 4},
        )
        assert source.starts is not None
        launch(
            (min(num_pieces, num_sms), 1, 1),
            describe(_as_matrix(query), _BLOCK_M // 2),
            *plan.described(source, describe, block_n),
            out.values, out.lse, plan.tiles, source.starts, slopes, sinks, num_pieces,
            *out.values.stride()[:2], *self._numbers,
        )  # fmt: skip

    def _decode(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: DecodePlan,
        query: torch.Tensor,
        cache: KVSource,
        out: OutputBuffers,
    ) -> None:
        pages = self._pages(cache, plan, query.dtype)
        if pages is None:
            super()._decode(layer, metadata, plan, query, cache, out)
            return
        num_sms = metadata.launches.num_sms
        is_few = plan.num_reqs * self.num_kv_heads < _FEW * num_sms
        rows = _DECODES[self.head_size]
        row = rows.few if is_few else rows.many
        self._launch_decode(metadata, plan, query, pages, out, row, num_sms)

    def _pages(self, cache: KVSource, plan: DecodePlan, dtype: torch.dtype) -> PageMatrix | None:
        """The cache as Hopper's decode kernel reads it; None where the portable one serves.

        The last cache's is remembered.
        """
        is_long = plan.longest * self.num_heads > _DECODE_ROWS * self.num_kv_heads
        if is_long or cache.k.dtype != dtype:
            return None
        if self._last_pages is None or self._last_pages[0] is not cache:
            self._last_pages = cache, PageMatrix.of(cache)
        return self._last_pages[1]

    def _launch_decode(
        self,
        metadata: TritonMetadata,
        plan: DecodePlan,
        query: torch.Tensor,
        pages: PageMatrix,
        out: OutputBuffers,
        row: DecodeRow,
        num_sms: int,
    ) -> None:
        """Launch Hopper's decode kernel on so many SMs."""
        batch, requests = metadata.batch, plan.requests
        table = batch.block_table
        assert table is not None
        group = self.num_heads // self.num_kv_heads
        rows = max(8, 1 << (plan.longest * group - 1).bit_length())
        slopes, sinks = self._per_head(query)
        dtypes = (query.dtype, sinks.dtype)
        launch = self._launchers.find(
            ("hopper decode", dtypes, rows, row, pages.block_size, requests is None),
            self._hopper_decode_kernel,
            lambda: {
                **self._compiled_for(),
                "ROWS": rows,
                "KEYS": row.keys,
                "BLOCK_SIZE": pages.block_size,
                "STAGES": row.stages_for(rows),
                "PROGRAMS": row.programs,
                "HAS_REQUEST_LIST": requests is not None,
                "CHUNK": _LENGTHS,
                "MIN_TILES": row.min_tiles,
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

    def _compiled_for(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        return {
            "NUM_HEADS": self.num_heads,
            "GROUP": self.num_heads // self.num_kv_heads,
            "D": self.head_size,
            "CAUSAL": self.causal,
            "WINDOW": self.sliding_window is not None,
            "CAP": self._cap is not None,
            "ALIBI": self.alibi_slopes is not None,
            "SINKS": self.sinks is not None,
            "LSE": self.returns_lse,
        }


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, size) as (tokens, heads * size), copied where TMA could not read it."""
    if not fills_tiles(tensor, tensor.shape[2]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.flatten(1)


@functools.cache
def _descriptors(head_size: int, dtype: torch.dtype) -> Any:
    """Makes a descriptor with blocks of so many rows by one head."""
    gluon = import_library("triton.experimental.gluon.language")
    hopper = import_library("triton.experimental.gluon.nvidia.hopper")
    element = {torch.bfloat16: gluon.bfloat16, torch.float16: gluon.float16}[dtype]

    @functools.cache
    def layout(rows: int) -> Any:
        return gluon.NVMMASharedLayout.get_default_for([rows, head_size], element)

    def describe(matrix: torch.Tensor, rows: int) -> Any:
        return hopper.TensorDescriptor.from_tensor(matrix, [rows, head_size], layout(rows))

    return describe


class HopperAttnBackend(TritonAttnBackend):
    """TRITON_ATTN with kernels for Hopper: wgmma, TMA and specialized warps, in Gluon."""

    interface_version = 2
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        # Gluon changes between releases; of these 3.6 to 3.9 were compiled.
        requires=("triton>=3.6,<3.10",),
        **{
            **TritonAttnBackend.capabilities.fields,
            "head_size": OneOf(*_BLOCK_N),
            "head_size_v": SameAs("head_size"),
            "dtype": OneOf(torch.bfloat16, torch.float16),
            "alibi": OneOf(True, False),  # prefill takes the distance apart by rows and columns
            "custom_mask": OneOf(False),
            "bidirectional_ranges": OneOf(False),
            "output_quant": OneOf(None),
            "batch_invariant": OneOf(False),
        },
    )

    @staticmethod
    def get_name() -> str:
        """HOPPER_ATTN."""
        return "HOPPER_ATTN"

    @staticmethod
    def get_impl_cls() -> type[HopperImpl]:
        """HopperImpl."""
        return HopperImpl

    @staticmethod
    def get_builder_cls() -> type[HopperBuilder]:
        """HopperBuilder."""
        return HopperBuilder
