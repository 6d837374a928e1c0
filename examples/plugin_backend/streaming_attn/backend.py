"""STREAMING_ATTN: attention that walks over the keys in pieces, for attn-dispatch.

It updates the softmax piece by piece (FlashAttention, arXiv:2205.14135): a running maximum, the sum
of the weights relative to it, and the weighted sum of values.
"""

from __future__ import annotations

import torch

from attn_dispatch.interface import (
    ANY,
    KV_CACHE_DTYPES,
    AttentionBackend,
    BatchMetadata,
    Capabilities,
    DeviceMatch,
    ForwardArgs,
    OneOf,
    UnquantizedImpl,
)

__all__ = ["StreamingBackend", "StreamingImpl"]

#: Keys in a piece.
_PIECE = 32


class StreamingImpl(UnquantizedImpl[BatchMetadata]):
    """Computes request by request, piece by piece."""

    def _attend(
        self, args: ForwardArgs[BatchMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        batch = args.metadata.batch
        output.zero_()  # a row that sees no key is 0
        if lse is not None:
            lse.fill_(float("-inf"))
        for request, seq_len in enumerate(batch.seq_lens_list):
            rows = slice(*batch.query_start_list[request : request + 2])
            if seq_len and rows.start < rows.stop:
                keys, values = args.request_kv(request, torch.float64)
                output[rows], row_lse = self._one_request(args.query[rows], keys, values)
                if lse is not None:
                    lse[rows] = row_lse.float()

    def _one_request(
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
            v = v.masked_fill(~seen.any(0)[:, None, None], 0.0)  # hidden values may be NaN
            total = total * kept + weights.sum(-1, keepdim=True)
            sums = sums * kept + torch.einsum("hqk,khd->hqd", weights, v)
        # If all visible scores of a row are −inf, the row is NaN, as −inf minus −inf is.
        lse = torch.where(total == 0.0, torch.nan, largest + total.log()).squeeze(-1)
        if self.sinks is not None:
            finite = largest.clamp(min=torch.finfo(torch.float64).min)
            total = total + torch.exp(self.sinks.double().view(-1, 1, 1) - finite)
        # A row that sees keys keeps a NaN. A row that sees none is 0, even if its query is NaN.
        output = torch.where(sees_a_key[:, None], sums / total, 0.0)
        lse = torch.where(sees_a_key, lse, float("-inf"))
        return output.transpose(0, 1), lse.T


class StreamingBackend(AttentionBackend):
    """Causal attention of decoders, with soft cap, window, sinks and LSE."""

    interface_version = 2
    name = "STREAMING_ATTN"  # the name of the entry point too
    impl_cls = StreamingImpl
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
