"""STREAMING_ATTN: attention that walks over the keys in pieces, for attn-dispatch.

The softmax is kept up as pieces come (FlashAttention, arXiv:2205.14135): a running maximum, the sum
of the weights relative to it, and the weighted sum of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch import (
    ANY,
    AttentionBackend,
    AttentionBatch,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    Capabilities,
    DeviceMatch,
    OneOf,
    UnsupportedError,
    detect_device,
)
from attn_dispatch.interface.backend import refuse_spec
from attn_dispatch.interface.impl import get_kv_scales, store_new_kv
from attn_dispatch.interface.kv_access import gather_kv
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.spec import KV_CACHE_DTYPES
from attn_dispatch.interface.validation import check_forward, check_metadata

__all__ = ["StreamingBackend", "StreamingBuilder", "StreamingImpl", "StreamingMetadata"]

#: Keys in a piece.
_PIECE = 32


@dataclass
class StreamingMetadata(BatchMetadata):
    """The batch as it is."""


class StreamingBuilder(AttentionMetadataBuilder[StreamingMetadata]):
    """Wraps the batch.

    Raises:
        UnsupportedError: it is made by hand for layers that the backend does not declare.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        refuse_spec(StreamingBackend, spec, detect_device(device))

    def build(self, batch: AttentionBatch) -> StreamingMetadata:
        """The batch's metadata."""
        metadata: StreamingMetadata = StreamingMetadata.of(batch, self)
        return metadata


class StreamingImpl(AttentionImpl[StreamingMetadata]):
    """Computes request by request, piece by piece."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: StreamingMetadata,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("STREAMING_ATTN does not quantize its output; REFERENCE does.")
        check_metadata(self, attn_metadata, StreamingMetadata)
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        if kv_cache is not None and key is not None and value is not None:
            store_new_kv(self, layer, key, value, kv_cache, batch)
        if output is None:
            output = query.new_empty(query.shape[0], self.num_heads, self.head_size_v)
        output.zero_()  # a row that sees no key is 0
        lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
        for request, (query_len, seq_len) in enumerate(
            zip(batch.query_lens, batch.seq_lens_list, strict=True)
        ):
            if not query_len or not seq_len:
                continue
            rows = slice(batch.query_start_list[request], batch.query_start_list[request + 1])
            keys, values = self._keys_of(request, layer, key, value, kv_cache, batch)
            result, lse[rows] = self._attend(query[rows], keys, values)
            output[rows] = result.to(output.dtype)
        return (output, lse) if self.returns_lse else output

    def _keys_of(
        self,
        request: int,
        layer: Any,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The request's keys and values, (seq_len, num_kv_heads, size)."""
        if kv_cache is None:
            assert key is not None
            assert value is not None
            own = slice(batch.key_starts[request], batch.key_starts[request + 1])
            return key[own].double(), value[own].double()
        assert batch.block_table is not None
        blocks, seq_len = batch.block_table[request], batch.seq_lens_list[request]
        cached = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
        scales = get_kv_scales(layer, kv_cache)
        keys, values = (
            gather_kv(entries, blocks, seq_len, scale, torch.float64)
            for entries, scale in zip(cached, scales, strict=True)
        )
        return keys, values

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (query_len, num_heads, head_size_v) and lse (query_len, num_heads), float64."""
        group = self.num_heads // self.num_kv_heads
        own = torch.arange(len(query), device=query.device) + len(keys) - len(query)
        shape = (self.num_heads, len(query), 1)
        largest = query.new_full(shape, float("-inf"), dtype=torch.float64)
        total = torch.zeros_like(largest)
        sums = total.new_zeros(self.num_heads, len(query), self.head_size_v)
        sees_a_key = torch.zeros(len(query), dtype=torch.bool, device=query.device)
        for start in range(0, len(keys), _PIECE):
            piece = slice(start, min(start + _PIECE, len(keys)))
            k, v = (t[piece].repeat_interleave(group, dim=1) for t in (keys, values))
            scores = self.scale * torch.einsum("qhd,khd->hqk", query.double(), k)
            if self.logits_soft_cap is not None:
                scores = self.logits_soft_cap * torch.tanh(scores / self.logits_soft_cap)
            distance = torch.arange(piece.start, piece.stop, device=query.device) - own[:, None]
            seen = distance <= 0
            if self.sliding_window is not None:
                seen &= distance > -self.sliding_window
            sees_a_key |= seen.any(-1)
            scores = scores.masked_fill(~seen, float("-inf"))
            before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
            finite = largest.clamp(min=torch.finfo(torch.float64).min)  # −inf minus itself is NaN
            weights, kept = torch.exp(scores - finite), torch.exp(before - finite)
            v = v.masked_fill(~seen.any(0)[:, None, None], 0.0)  # what nobody sees may be NaN
            total = total * kept + weights.sum(-1, keepdim=True)
            sums = sums * kept + torch.einsum("hqk,khd->hqd", weights, v)
        # Only −inf among the scores of a row: it is NaN, as the largest minus itself is.
        lse = torch.where(total == 0.0, torch.nan, largest + total.log()).squeeze(-1)
        if self.sinks is not None:
            finite = largest.clamp(min=torch.finfo(torch.float64).min)
            total = total + torch.exp(self.sinks.double().view(-1, 1, 1) - finite)
        # A row that sees keys keeps a NaN; one that sees none is 0, whatever its query holds.
        output = torch.where(sees_a_key[:, None], sums / total, 0.0)
        lse = torch.where(sees_a_key, lse, float("-inf"))
        return output.transpose(0, 1), lse.T


class StreamingBackend(AttentionBackend):
    """Causal attention of decoders, with soft cap, window, sinks and LSE."""

    interface_version = 2
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="cpu"), DeviceMatch(vendor="nvidia")),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=ANY,
        head_size_v=ANY,
        dtype=OneOf(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        kv_cache_dtype=OneOf(*KV_CACHE_DTYPES),
        kv_scales=OneOf("per_tensor", "per_head"),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf("decoder"),
        causal=OneOf(True),
        sliding_window=ANY,
        logits_soft_cap=ANY,
        sinks=OneOf(True, False),
        kv_sharing=OneOf(True, False),
        returns_lse=OneOf(True, False),
    )

    @staticmethod
    def get_name() -> str:
        """STREAMING_ATTN, the name of the entry point too."""
        return "STREAMING_ATTN"

    @staticmethod
    def get_impl_cls() -> type[StreamingImpl]:
        """StreamingImpl."""
        return StreamingImpl

    @staticmethod
    def get_metadata_cls() -> type[StreamingMetadata]:
        """StreamingMetadata."""
        return StreamingMetadata

    @staticmethod
    def get_builder_cls() -> type[StreamingBuilder]:
        """StreamingBuilder."""
        return StreamingBuilder
