"""NO_ATTENTION: the result of `get_attn_backend` for a model without attention layers.

It gives an engine a backend class for its caches and metadata. It is not registered, never
selected, and computes nothing.
"""

from __future__ import annotations

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import ANY, Capabilities
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.validation import profiling_output

__all__ = ["NoAttentionBackend", "NoAttentionImpl"]


class NoAttentionImpl(AttentionImpl[BatchMetadata]):
    """Rejects every call except that of a profiling run."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        attn_metadata: BatchMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward.

        Raises:
            UnsupportedError: there is metadata, so the layer needs attention.
        """
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        raise UnsupportedError(
            "This layer computes attention, and its backend was requested with "
            "is_attention_free=True. Call get_attn_backend without it."
        )


class NoAttentionBackend(AttentionBackend):
    """For models without attention, such as Mamba."""

    interface_version = 2
    name = "NO_ATTENTION"
    impl_cls = NoAttentionImpl
    # Any layer may be built, so that an engine can do its profiling run.
    capabilities = Capabilities(
        devices=(), requires=(), **dict.fromkeys(AttentionSpec.__dataclass_fields__, ANY)
    )
