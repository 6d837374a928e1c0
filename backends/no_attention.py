"""NO_ATTENTION: what `get_attn_backend` returns for a model without attention layers.

It stands where an engine wants a backend class for its caches and metadata. It is not registered,
never selected, and computes nothing.
"""

from __future__ import annotations

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.validation import profiling_output

__all__ = ["NoAttentionBackend", "NoAttentionBuilder", "NoAttentionImpl"]


class NoAttentionBuilder(AttentionMetadataBuilder[BatchMetadata]):
    """Wraps the batch."""

    def build(self, batch: AttentionBatch) -> BatchMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata: BatchMetadata = BatchMetadata.of(batch, self)
        return metadata


class NoAttentionImpl(AttentionImpl[BatchMetadata]):
    """Rejects every call but that of a profiling run."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: BatchMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward.

        Raises:
            UnsupportedError: there is metadata, so attention is wanted.
        """
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        raise UnsupportedError(
            "This layer computes attention, and its backend was asked for with "
            "is_attention_free=True. Call get_attn_backend without it."
        )


class NoAttentionBackend(AttentionBackend):
    """For models without attention, such as Mamba."""

    interface_version = 2
    capabilities = Capabilities(devices=())

    @staticmethod
    def get_name() -> str:
        """NO_ATTENTION."""
        return "NO_ATTENTION"

    @staticmethod
    def get_impl_cls() -> type[NoAttentionImpl]:
        """NoAttentionImpl."""
        return NoAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[BatchMetadata]:
        """BatchMetadata."""
        return BatchMetadata

    @staticmethod
    def get_builder_cls() -> type[NoAttentionBuilder]:
        """NoAttentionBuilder."""
        return NoAttentionBuilder
