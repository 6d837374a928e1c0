"""TRITON_ATTN: every feature, over the paged cache, in Triton kernels for NVIDIA's and AMD's GPUs.

The kernels are in `kernels/`, how they are launched in `cuda/launch_tables.py` and
`rocm/launch_tables.py`, how a batch is laid out for them in `triton_plan.py`, and what they are
given in `triton_arguments.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_dispatch.backends.reference.semantics import split_scale
from attn_dispatch.backends.triton.configs import amd
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
from attn_dispatch.backends.triton.plan import (
    INVARIANT_PARTS,
    DecodePlan,
    PrefillPlan,
    TritonBuilder,
    TritonMetadata,
)
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import ANY, Capabilities, OneOf, Range, Reason, ReasonCode
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.quantization import GROUP_SIZE
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    KV_CACHE_DTYPES,
    OUTPUT_QUANTS,
    AttentionSpec,
)
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["TritonAttnBackend", "TritonImpl"]

LOG2E = math.log2(math.e)
#: A larger window is as good as this one, and positions plus this are still an int32.
_WINDOW_LIMIT = 1 << 30
#: A soft cap below the first changes no result more than the first does, and one beyond the second
#: none: scores of float32 that are that large are not told apart.
_SMALLEST_CAP, _LARGEST_CAP = 2.0**-40, 2.0**100
#: How the kernels call the kinds of ALiBi.
_ALIBI = {False: 0, True: 1, ALIBI_SYMMETRIC: 2}
#: Sizes of value heads that groups of quantized output values fill.
_GROUPED_HEADS = (GROUP_SIZE, 2 * GROUP_SIZE, 4 * GROUP_SIZE)
#: So many parts of a split are merged as whole tiles, more row by row.
_FEW_PARTS = 8


class TritonImpl(AttentionImpl[TritonMetadata]):
    """Launches the kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton")
        from attn_dispatch.backends.triton.kernels import decode, gather, prefill

        self._decode_kernels = (decode.decode_kernel, decode.decode_invariant_kernel)
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
        #: What every attention kernel takes after its strides.
        self._numbers = (
            min(self.sliding_window or 0, _WINDOW_LIMIT), scale * LOG2E, cap * LOG2E, scale / cap
        )  # fmt: skip
        self._sizes = head_constants(self.head_size, self.head_size_v)
        sizes = (self.head_size, self.head_size_v)
        #: Heads can be taken as pairs of bytes: half a tile still suits the matrix units.
        self._has_pairs = not any(size % 2 or block_of(size) < 32 for size in sizes)
        self._largest_block = max(self._sizes["BLOCK_D"], self._sizes["BLOCK_DV"])

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Static fp8; and fp8 by groups, where a group lies in one head."""
        if quant_key == "fp8_e4m3_group128":
            return self.head_size_v in _GROUPED_HEADS
        return quant_key in OUTPUT_QUANTS

    @on_tensor_device
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
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
        self._attend(layer, attn_metadata, query, key, value, cache, out)
        return out.result(output, output_block_scale)

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
        """Attention of all requests, the new keys being in the cache."""
        if metadata.decode is not None and metadata.decode.num_reqs and cache is not None:
            self._decode(layer, metadata, metadata.decode, query, cache, out)
        else:  # the decode kernel sees to the rows of no request, by the device's lengths
            out.clear_from(metadata.batch.num_tokens)
        if metadata.prefill is not None:
            source = self._source(layer, metadata, metadata.prefill, cache, key, value)
            self._prefill(layer, metadata, metadata.prefill, query, source, out)

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        self._writer.write(layer, key, value, kv_cache, batch)

    def _features(
        self,
        metadata: TritonMetadata,
        source: KVSource,
        out: OutputBuffers,
        scale_stride: int,
        dtype: Any,
    ) -> dict[str, Any]:
        """What both attention kernels are compiled for."""
        table = metadata.launches.table
        return {
            "NUM_HEADS": self.num_heads,
            "GROUP": self.num_heads // self.num_kv_heads,
            **self._sizes,
            "BLOCK_SIZE": source.block_size,
            "FORMAT": source.format,
            "NATIVE": has_native_fp8(table, source.format),
            "SCALE_STRIDE": scale_stride,
            "CAUSAL": self.causal,
            "WINDOW": self.sliding_window is not None,
            "CAP": self._cap is not None,
            "FAST_TANH": table.fast_tanh and dtype != torch.float32 and not is_interpreted(),
            "ALIBI": _ALIBI[self.alibi],
            "SINKS": self.sinks is not None,
            "RANGES": metadata.ranges is not None,
            "MASK": metadata.mask_starts is not None,
            "LSE": self.returns_lse,
            "OUT_FORMAT": out.format,
            "OUT_GROUP": out.group,
        }

    def _has_descriptors(self, query: torch.Tensor, metadata: TritonMetadata) -> bool:
        """Whether this is a step of the kind for which descriptors were run on a GPU.

        Where values are 16 wide and keys are not, Triton 3.6 reads beyond the tile's shared memory,
        or its neighbour's numbers. So: heads of the usual sizes, 16 bits, and no loop in the masks.
        """
        block = self._sizes["BLOCK_D"]
        is_usual = block == self._sizes["BLOCK_DV"] and block in (64, 128, 256)
        has_loop = metadata.ranges is not None or metadata.mask_starts is not None
        return is_usual and query.dtype.itemsize == 2 and not has_loop

    def _per_head(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ALiBi's slopes and the sinks, on the query's device; anything where there are none."""
        slopes = sinks = query
        if self.alibi_slopes is not None:
            if self._slopes is None or self._slopes.device != query.device:
                self._slopes = torch.as_tensor(
                    self.alibi_slopes, dtype=torch.float32, device=query.device
                ).contiguous()
            slopes = self._slopes
        if self.sinks is not None:
            sinks = self.sinks.to(query.device).contiguous()
        return slopes, sinks

    def _decode(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: DecodePlan,
        query: torch.Tensor,
        cache: KVSource,
        out: OutputBuffers,
    ) -> None:
        """Attention of the requests of few query tokens."""
        batch, row = metadata.batch, plan.launch
        table, requests = batch.block_table, plan.requests
        assert table is not None
        k_scale, v_scale, scale_stride = cache.scales(layer)
        cache = cache.pairs if self._has_pairs and query.dtype.itemsize == 2 else cache
        kind = (
            cache.kind, cache.format, cache.k.dtype, cache.block_size, scale_stride, out.format,
            out.group,
        )  # fmt: skip
        features = (metadata.ranges is not None, metadata.mask_starts is not None)
        slopes, sinks = self._per_head(query)
        dtypes = (query.dtype, sinks.dtype)
        stages = row.num_stages
        if cache.k.dtype.itemsize == 1 or cache.kind == "pairs":
            stages = row.num_stages_8bit or stages
        is_usual = row is metadata.launches.decode
        name = (
            "decode", metadata.launches, is_usual, plan.rows, requests is None, *features, *kind,
            *dtypes,
        )  # fmt: skip

        def constants() -> dict[str, Any]:
            parts = (
                {"PARTS": INVARIANT_PARTS} if plan.is_invariant else {"MIN_TILES": row.min_tiles}
            )
            return {
                **self._features(metadata, cache, out, scale_stride, query.dtype),
                "ROWS": plan.rows,
                "BLOCK_N": row.block_n,
                "STAGES": stages,
                "HAS_REQUEST_LIST": requests is not None,
                "PTX": metadata.launches.is_nvidia and not is_interpreted(),
                "PAIRS": cache.kind == "pairs",
                "CHUNK": row.lengths_per_load,
                "FEW": _FEW_PARTS,
                "AT_ONCE": max(8, min(64, 4096 // self._sizes["BLOCK_DV"])),
                **parts,
            }

        kernel = self._decode_kernels[plan.is_invariant]
        options = {**row.compile_options, "num_stages": stages}
        launch = self._launchers.find(name, kernel, constants, options)
        launch(
            (plan.grid, 1, 1),
            query, cache.k, cache.v, out.values, out.lse, out.scale, plan.part_out, plan.part_lse,
            plan.counters, batch.seq_lens if requests is None else requests,
            batch.query_start_loc, batch.seq_lens, table, cache.k_row_scales, cache.v_row_scales,
            k_scale, v_scale, slopes, sinks, *metadata.extras(),
            *query.stride()[:2], *cache.k_strides, *out.values.stride()[:2], plan.num_reqs,
            batch.seq_lens.shape[0], query.shape[0], table.stride(0), *self._numbers,
        )  # fmt: skip

    def _source(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        cache: KVSource | None,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
    ) -> KVSource:
        """Where the prefill kernel finds keys: as they came, gathered, or in their pages."""
        if key is not None and value is not None and plan.is_fresh:
            # What a cache keeps in another form is what must be read.
            as_kept = cache is None or (cache.format == "plain" and cache.k.dtype == key.dtype)
            if as_kept and self.kv_sharing_target_layer_name is None:
                return KVSource.of_rows(key, value, plan.key_start_loc)
        assert cache is not None  # check_forward saw to it
        if plan.gathered_start_loc is None:
            return cache
        return self._gather(layer, metadata, plan, plan.gathered_start_loc, cache)

    def _gather(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        starts: torch.Tensor,
        cache: KVSource,
    ) -> KVSource:
        """Copy the keys and values of the plan's requests out of their pages."""
        batch, launches = metadata.batch, metadata.launches
        table = batch.block_table
        assert table is not None
        keys, values = plan.room_for(self.num_kv_heads, self.head_size, self.head_size_v)
        rows = max(16, 16384 // self._largest_block)
        windowed = self.sliding_window is not None and metadata.ranges is None
        k_scale, v_scale, scale_stride = cache.scales(layer)
        kind = (cache.format, cache.k.dtype, cache.block_size, scale_stride)
        launch = self._launchers.find(
            ("gather", launches, plan.pad, windowed, *kind),
            self._gather_kernel,
            lambda: {
                "NUM_KV_HEADS": self.num_kv_heads,
                "BLOCK_SIZE": cache.block_size,
                "ROWS": rows,
                "PAD": plan.pad,
                "WINDOW": windowed,
                "FORMAT": cache.format,
                "NATIVE": has_native_fp8(launches.table, cache.format),
                "SCALE_STRIDE": scale_stride,
                **self._sizes,
            },
            {},
        )
        launch(
            (-(-plan.longest * self.num_kv_heads // rows), len(plan.requests), 1),
            cache.k, cache.v, cache.k_row_scales, cache.v_row_scales, k_scale,
            v_scale, table, plan.requests, batch.query_start_loc, batch.seq_lens, starts,
            keys, values, *cache.k_strides, table.stride(0), self._numbers[0],
        )  # fmt: skip
        return KVSource.of_rows(keys, values, starts)

    def _prefill(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        query: torch.Tensor,
        source: KVSource,
        out: OutputBuffers,
    ) -> None:
        """Attention of the requests of many query tokens."""
        if not len(plan.tiles):
            return
        if plan.tiles.shape[1] != 2:  # a subclass's, for a kernel of its own
            raise InvalidInputError(
                f"attn_metadata was laid out by a {type(metadata.builder).__name__} for another "
                "kernel. Make it by the layer's own builder; layer.build_metadata does."
            )
        batch, launches = metadata.batch, metadata.launches
        row = launches.prefill
        k, v, kind = source.k, source.v, source.kind
        if kind == "rows" and launches.table.descriptors:
            block = self._sizes["BLOCK_D"]
            fills = fills_tiles(k, block) and fills_tiles(v, block)
            if fills and self._has_descriptors(query, metadata):
                kind = "descriptors"
                k = tensor_descriptor()(k.flatten(1), [row.block_n, block])
                v = tensor_descriptor()(v.flatten(1), [row.block_n, block])
        k_scale, v_scale, scale_stride = source.scales(layer)
        slopes, sinks = self._per_head(query)
        name = (
            "prefill", launches, kind, source.format, source.k.dtype, source.block_size,
            scale_stride, out.format, out.group, metadata.ranges is not None,
            metadata.mask_starts is not None, query.dtype, sinks.dtype,
        )  # fmt: skip
        launch = self._launchers.find(
            name,
            self._prefill_kernel,
            lambda: {
                **self._features(metadata, source, out, scale_stride, query.dtype),
                "BLOCK_M": row.block_m,
                "BLOCK_N": row.block_n,
                "STAGES": row.num_stages,
                "SOURCE": kind,
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


class TritonAttnBackend(AttentionBackend):
    """Triton kernels for NVIDIA's and AMD's GPUs, compiled on the spot, for nearly every layer."""

    interface_version = 2
    name = "TRITON_ATTN"
    impl_cls = TritonImpl
    builder_cls = TritonBuilder
    metadata_cls = TritonMetadata
    capabilities = Capabilities(
        devices=(
            DeviceMatch(vendor="nvidia", min_capability=(8, 0)),
            DeviceMatch(vendor="amd", archs=amd.ARCHS),
        ),
        requires=("triton>=3.6",),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=Range(1, 512),
        head_size_v=Range(1, 512),
        dtype=OneOf(torch.bfloat16, torch.float16, torch.float32),
        kv_cache_dtype=OneOf(*(name for name in KV_CACHE_DTYPES if name != "float64")),
        kv_scales=OneOf("per_tensor", "per_head"),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        logits_soft_cap=ANY,
        alibi=OneOf(True, False, ALIBI_SYMMETRIC),
        sinks=OneOf(True, False),
        kv_sharing=OneOf(True, False),
        custom_mask=OneOf(True, False),
        bidirectional_ranges=OneOf(True, False),
        mla=OneOf(None),
        returns_lse=OneOf(True, False),
        output_quant=OneOf(None, *OUTPUT_QUANTS),
        batch_invariant=OneOf(True, False),
        cuda_graph=OneOf(True, False),
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """A group of output values lies in one head; a graph takes no mask and no range."""
        reasons = []
        if spec.output_quant == "fp8_e4m3_group128" and spec.head_size_v not in _GROUPED_HEADS:
            reasons.append(
                Reason(
                    code=ReasonCode.COMBINATION,
                    field="output_quant",
                    asked=f"fp8_e4m3_group128 with head_size_v={spec.head_size_v}",
                    allowed="head_size_v " + ", ".join(map(str, _GROUPED_HEADS)),
                )
            )
        for field in ("custom_mask", "bidirectional_ranges"):
            if spec.cuda_graph and getattr(spec, field):
                reasons.append(
                    Reason(
                        code=ReasonCode.COMBINATION,
                        field="cuda_graph",
                        asked=f"cuda_graph with {field}",
                        allowed=f"cuda_graph without {field}",
                    )
                )
        return reasons
