"""REFERENCE: every feature, any device, any dtype; the oracle, and the last resort.

`semantics.py` has the mathematics; this file finds each request's keys and stores the results.
"""

from __future__ import annotations

import torch

from attn_dispatch.backends.common import on_device
from attn_dispatch.backends.reference.semantics import attend, compute_dtype, without_autocast
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import (
    ANY,
    ByDevice,
    Capabilities,
    OneOf,
    Reason,
    ReasonCode,
    Strides,
)
from attn_dispatch.interface.contents import with_exact_lengths
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.metadata import BatchMetadata, BatchMetadataBuilder
from attn_dispatch.interface.quantization import GROUP_SIZE, store_output
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    KV_CACHE_DTYPES,
    OUTPUT_QUANTS,
    AttentionSpec,
)
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.interface.unquantized import ForwardArgs
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["ReferenceBackend", "ReferenceBuilder", "ReferenceImpl", "ReferenceMetadata"]


class ReferenceMetadata(BatchMetadata):
    """The batch as it is; REFERENCE plans nothing."""


class ReferenceBuilder(BatchMetadataBuilder):
    """Wraps the batch; upper bounds are replaced by the true lengths."""

    def build(self, batch: AttentionBatch) -> BatchMetadata:
        """The batch's metadata. With upper bounds on a GPU, this waits for the device."""
        return super().build(with_exact_lengths(batch, self.spec))


class ReferenceImpl(AttentionImpl[ReferenceMetadata]):
    """Computes request by request in float32, or in float64 for float64 queries."""

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Static fp8; fp8 by groups if a row of the output is a whole number of groups."""
        if quant_key == "fp8_e4m3_group128":
            return self.num_heads * self.head_size_v % GROUP_SIZE == 0
        return quant_key in OUTPUT_QUANTS

    @without_autocast
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: ReferenceMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, ReferenceMetadata)
        batch = attn_metadata.batch
        scales = (output_scale, output_block_scale)
        check_forward(self, query, key, value, kv_cache, batch, output, *scales)
        if kv_cache is not None and key is not None and value is not None:
            self.write_kv(layer, key, value, kv_cache, batch)
        args = ForwardArgs(layer, query, key, value, kv_cache, attn_metadata)
        dtype = compute_dtype(query.dtype)
        shape = (query.shape[0], self.num_heads, self.head_size_v)
        result = torch.zeros(shape, dtype=dtype, device=query.device)
        lse = torch.full(shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
        slopes, sinks = (
            None if values is None else on_device(values, query.device, dtype)
            for values in (self.alibi_slopes, self.sinks)
        )
        for request, query_len in enumerate(batch.query_lens):
            if query_len == 0 or batch.seq_lens_list[request] == 0:
                continue
            rows = slice(batch.query_start_list[request], batch.query_start_list[request + 1])
            keys, values = args.request_kv(request, dtype)
            result[rows], lse[rows] = attend(
                query[rows].to(dtype),
                keys,
                values,
                scale=self.scale,
                causal=self.causal,
                sliding_window=self.sliding_window,
                window_size=self.window_size,
                attention_chunk=self.attention_chunk,
                logits_soft_cap=self.logits_soft_cap,
                alibi_slopes=slopes,
                alibi_symmetric=self.alibi_symmetric,
                sinks=sinks,
                ranges=attn_metadata.ranges_of(request),
                custom_mask=None if batch.custom_mask is None else batch.request_mask(request),
                positions=batch.positions_of(request),
            )
        if output is None:
            output = torch.empty_like(result, dtype=query.dtype)
        store_output(result, output, *scales)
        return (output, lse) if self.returns_lse else output


#: Apple's GPUs have no float64.
FLOATS = ByDevice(
    (DeviceMatch(vendor="apple"), OneOf(torch.float32, torch.bfloat16, torch.float16)),
    otherwise=OneOf(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)


class ReferenceBackend(AttentionBackend):
    """Plain PyTorch: correct on every device, and slow."""

    interface_version = 2
    name = "REFERENCE"
    impl_cls = ReferenceImpl
    builder_cls = ReferenceBuilder
    metadata_cls = ReferenceMetadata
    capabilities = Capabilities(
        devices=(DeviceMatch(),),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=ANY,
        head_size_v=ANY,
        dtype=FLOATS,
        kv_cache_dtype=OneOf(*KV_CACHE_DTYPES),
        kv_scales=OneOf("per_tensor", "per_head"),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        kv_strides=Strides(),
        lengths=OneOf(*LENGTHS),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        window_size=ANY,
        attention_chunk=ANY,
        key_positions=OneOf(True, False),
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
        cuda_graph=OneOf(False),
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """A row of the output must be a whole number of quantization groups."""
        row = spec.num_heads * spec.head_size_v
        if spec.output_quant == "fp8_e4m3_group128" and row % GROUP_SIZE:
            return [
                Reason(
                    code=ReasonCode.COMBINATION,
                    field="output_quant",
                    asked=f"fp8_e4m3_group128 with num_heads * head_size_v = {row}",
                    allowed=f"multiples of {GROUP_SIZE}",
                )
            ]
        return []
