"""Impls that compute a batch by other impls: by phase, in parts, or together with other ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import BatchMetadata

__all__ = ["ComposedImpl", "Given", "Result", "Scales"]

#: The output; with returns_lse also the LSE.
Result: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"

#: `output_scale` and `output_block_scale` of AttentionImpl.forward.
Scales: TypeAlias = "tuple[torch.Tensor | None, torch.Tensor | None]"


class Given(NamedTuple):
    """What a call reads, see AttentionImpl.forward; of latent attention, key and value are kv_c and
    k_pe."""

    layer: Any
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    kv_cache: KVCache | None


class ComposedImpl(ABC):
    """What a layer calls in place of the impl of one backend."""

    #: Of the builder that goes with the impl.
    metadata_cls: ClassVar[type[BatchMetadata]]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> Result:
        """See AttentionImpl.forward; the output must be given.

        Raises:
            InvalidInputError: the metadata is not that of the builder that goes with the impl.
        """
        if not isinstance(attn_metadata, self.metadata_cls):
            raise InvalidInputError(
                f"attn_metadata is a {type(attn_metadata).__name__}; this layer takes the "
                f"{self.metadata_cls.__name__} that layer.build_metadata(batch) makes."
            )
        given = Given(layer, query, key, value, kv_cache)
        return self._compute(given, attn_metadata, output, (output_scale, output_block_scale))

    @abstractmethod
    def _compute(
        self, given: Given, metadata: Any, output: torch.Tensor, scales: Scales
    ) -> Result: ...
