"""The impl of TRITON_ATTN: what it gives each kernel for a call of `forward`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.common import MAX_WINDOW, on_device
from attn_dispatch.backends.reference.semantics import split_scale
from attn_dispatch.backends.triton.kernels.structs import DecodeSchedule, Features
from attn_dispatch.backends.triton.kv_writer import KVCacheWriter
from attn_dispatch.backends.triton.launcher import Launchers
from attn_dispatch.backends.triton.operands import (
    KVSource,
    OutputBuffers,
    block_of,
    fills_tiles,
    has_native_fp8,
    head_constants,
    is_interpreted,
    on_tensor_device,
    tensor_descriptor,
    with_contiguous_heads,
)
from attn_dispatch.backends.triton.plan import DecodePlan, TritonMetadata, Variant
from attn_dispatch.backends.triton.prefill_plan import PrefillPlan
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import GROUP_SIZE
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    OUTPUT_QUANTS,
)
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.libraries import import_library

__all__ = ["GROUPED_HEADS", "Call", "TritonImpl"]

LOG2E = math.log2(math.e)
#: A smaller soft cap changes no result further, and a larger one changes none at all: float32 does
#: not distinguish scores that large.
_SMALLEST_CAP, _LARGEST_CAP = 2.0**-40, 2.0**100
#: The kinds of ALiBi, see Features.
_ALIBI = {False: 0, True: 1, ALIBI_SYMMETRIC: 2}
#: Sizes of value heads that are filled by whole groups of quantized output values.
GROUPED_HEADS = (GROUP_SIZE, 2 * GROUP_SIZE, 4 * GROUP_SIZE)
#: Up to this many parts of a split are merged as whole tiles, more row by row.
_MERGE_TILE_MAX_PARTS = 8


class Call(NamedTuple):
    """A call of `forward`, with its arguments as the kernels take them."""

    layer: AttentionLayer
    metadata: TritonMetadata
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    cache: KVSource | None
    out: OutputBuffers


class TritonImpl(AttentionImpl[TritonMetadata]):
    """Launches the kernels."""

    _merge_group = 0  # see DecodeSchedule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton")
        from attn_dispatch.backends.triton.kernels import decode, gather, prefill

        self._decode_kernel = decode.decode_kernel
        self._prefill_kernel = prefill.prefill_kernel
        self._gather_kernel = gather.gather_kv_kernel
        self._launchers = Launchers()
        self._writer = KVCacheWriter(self)
        self._slopes: torch.Tensor | None = None
        self._query_factor, scale = split_scale(self.scale)
        self._cap = self.logits_soft_cap
        if self._cap is not None:
            self._cap = max(self._cap, _SMALLEST_CAP) if self._cap <= _LARGEST_CAP else None
        cap = self._cap or 1.0
        reach = Reach.of(self)
        #: Tokens up to the query's own that its window has; None without a window.
        self._window = None if reach.left is None else reach.left + 1
        self._right = -1  # see Features
        if self.window_size is not None:
            self._window = MAX_WINDOW if self._window is None else self._window
            self._right = min(MAX_WINDOW if reach.right is None else reach.right, MAX_WINDOW)
        # No position is larger than MAX_WINDOW: then there is one chunk.
        self._chunk = reach.chunk if (reach.chunk or 0) <= MAX_WINDOW else None
        self._skips_keys = self._window is not None or self._chunk is not None
        self._skips = gather.Skips(self._window is not None, self._chunk or 0, self.key_positions)
        #: The last run-time arguments of every attention kernel.
        self._numbers = (
            min(self._window or 0, MAX_WINDOW), scale * LOG2E, cap * LOG2E, scale / cap
        )  # fmt: skip
        self._sizes = head_constants(self.head_size, self.head_size_v)
        sizes = (self.head_size, self.head_size_v)
        #: Heads can be read as pairs of bytes: half a tile still suits the matrix units.
        self._can_pack = not any(size % 2 or block_of(size) < 32 for size in sizes)

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """fp8 with one scale; and fp8 by groups, where each group lies in one head."""
        if quant_key == "fp8_e4m3_group128":
            return self.head_size_v in GROUPED_HEADS
        return quant_key in OUTPUT_QUANTS

    @on_tensor_device
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        attn_metadata: TritonMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, TritonMetadata)
        scales = (output_scale, output_block_scale)
        if output_scale is not None or output_block_scale is not None:
            quant_key = "fp8_e4m3" if output_block_scale is None else "fp8_e4m3_group128"
            if not self.fused_output_quant_supported(quant_key):
                raise UnsupportedError(
                    f"{type(self).__name__} does not store its output as {quant_key} with "
                    f"head_size_v={self.head_size_v}; REFERENCE does."
                )
        check_forward(self, query, key, value, kv_cache, attn_metadata.batch, output, *scales)
        query = with_contiguous_heads(
            query if self._query_factor == 1.0 else query * self._query_factor
        )
        cache = None if kv_cache is None else self._writer.pages(kv_cache)
        if cache is None and attn_metadata.batch.block_table is not None:
            attn_metadata = attn_metadata.without_pages
        out = OutputBuffers.of(self, query, output, *scales)
        if key is not None and value is not None:
            key, value = with_contiguous_heads(key), with_contiguous_heads(value)
            if kv_cache is not None:
                self.write_kv(layer, key, value, kv_cache, attn_metadata.batch)
        self._attend(Call(layer, attn_metadata, query, key, value, cache, out))
        return out.result(output, output_block_scale)

    def _attend(self, call: Call) -> None:
        """Attention of all requests; the cache has the new keys already."""
        metadata = call.metadata
        if metadata.decode is not None and metadata.decode.num_reqs and call.cache is not None:
            for decode in metadata.decode.in_turn or (metadata.decode,):
                self._decode(call, decode, call.cache)
        else:  # the decode kernel clears the padding rows itself, by the lengths on the device
            call.out.clear_from(metadata.batch.num_tokens)
        if metadata.prefill is not None:
            self._prefill_parts(call, metadata.prefill)

    def _prefill_parts(self, call: Call, plan: PrefillPlan) -> None:
        """Attention of a plan's requests, at once or part by part."""
        parts = (plan,) if self._is_new(call, plan) else plan.parts or (plan,)
        for part in parts:
            self._prefill(call, part, self._source(call, part))

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        self._writer.write(layer, key, value, kv_cache, batch)

    def _variant(
        self, call: Call, source: KVSource, scale_stride: int, sinks: torch.Tensor
    ) -> Variant:
        metadata, out = call.metadata, call.out
        return Variant(
            metadata.launches, source.kind, source.format, source.k.dtype, source.block_size,
            scale_stride, out.format, out.group, metadata.ranges is not None,
            metadata.mask_starts is not None, call.query.dtype, sinks.dtype,
        )  # fmt: skip

    def _features(self, variant: Variant, block_n: int, stages: int) -> Features:
        """What an attention kernel is compiled for."""
        table = variant.launches.table
        has_tanh = table.fast_tanh and variant.query_dtype != torch.float32
        return Features(
            NUM_HEADS=self.num_heads,
            NUM_KV_HEADS=self.num_kv_heads,
            GROUP=self.num_heads // self.num_kv_heads,
            **self._sizes,
            BLOCK_SIZE=variant.block_size,
            BLOCK_N=block_n,
            STAGES=stages,
            SOURCE=variant.kind,
            FORMAT=variant.format,
            NATIVE=has_native_fp8(table, variant.format),
            SCALE_STRIDE=variant.scale_stride,
            CAUSAL=self.causal,
            WINDOW=self._window is not None,
            RIGHT=self._right,
            CHUNK=self._chunk or 0,
            POSITIONS=self.key_positions,
            SKIPS_KEYS=self._skips_keys and not variant.has_ranges,
            CAP=self._cap is not None,
            FAST_TANH=has_tanh and not is_interpreted(),
            ALIBI=_ALIBI[self.alibi],
            SINKS=self.sinks is not None,
            RANGES=variant.has_ranges,
            MASK=variant.has_mask,
            LSE=self.returns_lse,
            OUT_FORMAT=variant.out_format,
            OUT_GROUP=variant.out_group,
        )

    def _has_descriptors(self, query: torch.Tensor, metadata: TritonMetadata) -> bool:
        """Whether this is a step of a kind for which descriptors were tested on a GPU.

        Where values are 16 wide and keys are wider, Triton 3.6 reads beyond the tile's shared
        memory. So only heads of the usual sizes, 16-bit dtypes, and no loop in the masks.
        """
        block = self._sizes["BLOCK_D"]
        is_usual = block == self._sizes["BLOCK_DV"] and block in (64, 128, 256)
        has_loop = metadata.ranges is not None or metadata.mask_starts is not None
        return is_usual and query.dtype.itemsize == 2 and not has_loop

    def _per_head(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ALiBi's slopes and the sinks, on the query's device; the query where there are none."""
        slopes = sinks = query
        if self.alibi_slopes is not None:
            if self._slopes is None or self._slopes.device != query.device:
                slopes = on_device(self.alibi_slopes, query.device, torch.float32)
                self._slopes = slopes.contiguous()
            slopes = self._slopes
        if self.sinks is not None:
            sinks = self.sinks.to(query.device, non_blocking=True).contiguous()
        return slopes, sinks

    def _decode(self, call: Call, plan: DecodePlan, cache: KVSource) -> None:
        """Attention of the requests with few query tokens."""
        metadata, query, out = call.metadata, call.query, call.out
        batch, row = metadata.batch, plan.launch
        table, requests = batch.block_table, plan.requests
        assert table is not None
        k_scale, v_scale, scale_stride = cache.scales(call.layer)
        cache = cache.packed8 if self._can_pack and query.dtype.itemsize == 2 else cache
        slopes, sinks = self._per_head(query)
        stages = row.num_stages
        if cache.k.dtype.itemsize == 1 or cache.kind == "packed8":
            stages = row.num_stages_8bit or stages
        variant = self._variant(call, cache, scale_stride, sinks)
        name = (row is metadata.launches.decode, plan.rows, plan.parts, requests is None)
        launch = self._launchers.find(
            (variant, *name, cache.same_strides),
            self._decode_kernel,
            lambda: {
                "F": self._features(variant, row.block_n, stages),
                "S": DecodeSchedule(
                    ROWS=plan.rows,
                    PARTS=plan.parts,
                    MIN_TILES=row.min_tiles,
                    HAS_REQUEST_LIST=requests is not None,
                    SAME_STRIDES=cache.same_strides,
                    ALLOW_PTX=metadata.launches.is_nvidia and not is_interpreted(),
                    RELEASING_THREADS=metadata.launches.releasing_threads(row.num_warps),
                    LENGTHS_PER_LOAD=row.lengths_per_load,
                    MERGE_TILE_MAX_PARTS=_MERGE_TILE_MAX_PARTS,
                    MERGE_PARTS_AT_ONCE=max(8, min(64, 4096 // self._sizes["BLOCK_DV"])),
                    MERGE_GROUP=self._merge_group,
                ),
            },
            {"num_warps": row.num_warps, "num_stages": stages},
        )
        launch(
            (plan.grid, 1, 1),
            query, cache.k, cache.v, out.values, out.lse, out.scale, plan.part_out, plan.part_lse,
            plan.counters, batch.seq_lens if requests is None else requests,
            batch.query_start_loc, batch.seq_lens, table, cache.k_row_scales, cache.v_row_scales,
            k_scale, v_scale, slopes, sinks, *metadata.extras(),
            *query.stride()[:2], *cache.k_strides, *cache.v_strides, *out.values.stride()[:2],
            plan.num_reqs, batch.seq_lens.shape[0], query.shape[0], table.stride(0),
            *self._numbers,
        )  # fmt: skip

    def _source(self, call: Call, plan: PrefillPlan) -> KVSource:
        """The keys of the prefill kernel: those of the call, gathered ones, or pages."""
        key, value, cache = call.key, call.value, call.cache
        if self._is_new(call, plan):
            assert key is not None  # by check_forward
            assert value is not None
            return KVSource.of_rows(key, value, plan.key_start_loc)
        assert cache is not None
        if plan.gathered_start_loc is None:
            return cache
        return self._gather(call, plan, plan.gathered_start_loc, cache)

    def _is_new(self, call: Call, plan: PrefillPlan) -> bool:
        """Whether all keys are rows of the call."""
        if call.cache is None:
            return True
        return plan.is_fresh and call.value is not None and self._has_rows(call)

    def _has_rows(self, call: Call) -> bool:
        """Whether the rows of key and value are what the cache has after it is written."""
        key, cache = call.key, call.cache
        if key is None or self.kv_sharing_target_layer_name is not None:
            return False
        # If the cache stores another dtype, its rounded values must be read.
        return cache is None or (cache.format == "plain" and cache.k.dtype == key.dtype)

    def _gather(
        self, call: Call, plan: PrefillPlan, starts: torch.Tensor, cache: KVSource
    ) -> KVSource:
        """Copy the keys and values of the plan's requests out of their pages."""
        batch, launches = call.metadata.batch, call.metadata.launches
        table = batch.block_table
        assert table is not None
        keys, values = plan.room_for(self.num_kv_heads, self.head_size, self.head_size_v)
        rows = max(16, 16384 // max(self._sizes["BLOCK_D"], self._sizes["BLOCK_DV"]))
        skips = self._skips_keys and call.metadata.ranges is None
        k_scale, v_scale, scale_stride = cache.scales(call.layer)
        name = (launches, plan.pad, skips, cache.format, cache.k.dtype, cache.block_size)
        launch = self._launchers.find(
            (*name, scale_stride, cache.same_strides),
            self._gather_kernel,
            lambda: {
                "NUM_KV_HEADS": self.num_kv_heads,
                "BLOCK_SIZE": cache.block_size,
                "ROWS": rows,
                "PAD": plan.pad,
                "SKIPS": self._skips if skips else self._skips._replace(WINDOW=False, CHUNK=0),
                "FORMAT": cache.format,
                "NATIVE": has_native_fp8(launches.table, cache.format),
                "SCALE_STRIDE": scale_stride,
                "SAME_STRIDES": cache.same_strides,
                **self._sizes,
            },
        )
        launch(
            (-(-plan.longest * self.num_kv_heads // rows), len(plan.requests), 1),
            cache.k, cache.v, cache.k_row_scales, cache.v_row_scales, k_scale,
            v_scale, table, plan.requests, batch.query_start_loc, batch.seq_lens, starts,
            keys, values, *cache.k_strides, *cache.v_strides, table.stride(0), self._numbers[0],
            *call.metadata.key_positions(),
        )  # fmt: skip
        return KVSource.of_rows(keys, values, starts)

    def _prefill(self, call: Call, plan: PrefillPlan, source: KVSource) -> None:
        """Attention of the requests with many query tokens."""
        metadata, query, out = call.metadata, call.query, call.out
        if not len(plan.tiles):
            return
        if plan.tiles.shape[1] != 2:  # a subclass's, for a kernel of its own
            raise InvalidInputError(
                f"attn_metadata was made by a {type(metadata.builder).__name__}, for another "
                "kernel. Make it with the layer's own builder; layer.build_metadata does."
            )
        batch, row = metadata.batch, metadata.launches.prefill
        k_scale, v_scale, scale_stride = source.scales(call.layer)
        slopes, sinks = self._per_head(query)
        variant = self._variant(call, source, scale_stride, sinks)
        k, v, block = source.k, source.v, self._sizes["BLOCK_D"]
        if (
            source.kind == "rows"
            and metadata.launches.table.descriptors
            and fills_tiles(k, block)
            and fills_tiles(v, block)
            and self._has_descriptors(query, metadata)
        ):
            variant = variant._replace(kind="descriptors")
            describe, shape = tensor_descriptor(), [row.block_n, block]
            k, v = describe(k.flatten(1), shape), describe(v.flatten(1), shape)
        launch = self._launchers.find(
            (variant,),
            self._prefill_kernel,
            lambda: {
                "BLOCK_M": row.block_m,
                "F": self._features(variant, row.block_n, row.num_stages),
            },
            row.compile_options,
        )
        table = batch.seq_lens if batch.block_table is None else batch.block_table
        starts = batch.seq_lens if source.starts is None else source.starts
        launch(
            (self.num_kv_heads, len(plan.tiles), 1),
            query, k, v, out.values, out.lse, out.scale, plan.tiles, batch.query_start_loc,
            batch.seq_lens, starts, table, source.k_row_scales, source.v_row_scales,
            k_scale, v_scale, slopes, sinks, *metadata.extras(),
            *query.stride()[:2], *source.k_strides, *source.v_strides, *out.values.stride()[:2],
            table.stride(0), *self._numbers,
        )  # fmt: skip
