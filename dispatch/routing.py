"""Phase routing: prefill and decode of one batch on different backends, over the same cache.

The split is decided on the host, once per batch. Where both phases have the same backend there is
nothing to split, and nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.batch import AttentionBatch, BatchMetadata, BatchPart
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    Phase,
)
from attn_dispatch.validation import check_forward, check_metadata

__all__ = ["RoutedBuilder", "RoutedImpl", "RoutedMetadata", "RoutedPart"]


@dataclass(frozen=True)
class RoutedPart:
    """The requests of one phase, and the metadata of that phase's backend."""

    phase: Phase
    rows: BatchPart
    metadata: Any


@dataclass
class RoutedMetadata(BatchMetadata):
    """A batch taken apart by phase, each part with the metadata of its own backend."""

    parts: list[RoutedPart]

    def _of(self, phase: Phase) -> AttentionMetadata | None:
        return next((part.metadata for part in self.parts if part.phase is phase), None)

    @property
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The metadata of the prefill backend, or None."""
        return self._of(Phase.PREFILL)

    @property
    def decode_metadata(self) -> AttentionMetadata | None:
        """The metadata of the decode backend, or None."""
        return self._of(Phase.DECODE)


class RoutedBuilder(AttentionMetadataBuilder[RoutedMetadata]):
    """Builds each phase's metadata with that phase's builder."""

    def __init__(self, builders: Mapping[Phase, AttentionMetadataBuilder[Any]]) -> None:
        first = builders[Phase.PREFILL]
        super().__init__(first.spec, first.device)
        self._builders = builders

    def build(self, batch: AttentionBatch) -> RoutedMetadata:
        """The metadata of every phase that the batch has requests in."""
        metadata: RoutedMetadata = RoutedMetadata.of(batch, self, parts=[])
        for phase, part in batch.parts.items():
            built = self._builders[phase].build(part.batch)
            metadata.parts.append(RoutedPart(phase, part, built))
        return metadata


class RoutedImpl:
    """Runs each part of a batch on its phase's impl.

    Args:
        impls: of each phase, for the same layer.
        backends: of each phase.
    """

    def __init__(
        self,
        impls: Mapping[Phase, AttentionImpl[Any]],
        backends: Mapping[Phase, type[AttentionBackend]],
    ) -> None:
        self._impls = impls
        self._metadata_classes = {phase: cls.get_metadata_cls() for phase, cls in backends.items()}

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: RoutedMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward; only that output must be given."""
        first = self._impls[Phase.PREFILL]
        check_metadata(first, attn_metadata, RoutedMetadata)
        batch, parts = attn_metadata.batch, attn_metadata.parts
        for part in parts:
            if not isinstance(part.metadata, self._metadata_classes[part.phase]):
                raise InvalidInputError(
                    f"attn_metadata has a {type(part.metadata).__name__} for {part.phase}, and "
                    "this layer's backend for it is another. Make it by layer.build_metadata."
                )
        scales = (output_scale, output_block_scale)
        check_forward(first, query, key, value, kv_cache, batch, output, *scales)

        if len(parts) > 1 and kv_cache is not None and key is not None and value is not None:
            # A part may read what another writes: a prefix that their requests share. So what the
            # later parts write must be there before the first one reads.
            for part in parts[1:]:
                new = (key[part.rows.keys], value[part.rows.keys])
                self._impls[part.phase].write_kv(layer, *new, kv_cache, part.rows.batch)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        if len(parts) != 1:  # what lies beyond the batch's tokens is in no part
            _bytes(output)[batch.num_tokens :] = 0
            lse[batch.num_tokens :] = float("-inf")
        for part in parts:
            tokens, keys = part.rows.tokens, part.rows.keys
            part_output = output[tokens]
            block_scale = None if output_block_scale is None else output_block_scale[tokens]
            result = self._impls[part.phase].forward(
                layer,
                query[tokens],
                None if key is None else key[keys],
                None if value is None else value[keys],
                kv_cache,
                part.metadata,
                part_output,
                output_scale,
                block_scale,
            )
            if first.returns_lse:
                lse[tokens] = result[1]
            if not isinstance(tokens, slice):  # indexing made copies: put them back
                _bytes(output)[tokens] = _bytes(part_output)
                if output_block_scale is not None and block_scale is not None:
                    output_block_scale[tokens] = block_scale
        return (output, lse) if first.returns_lse else output


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
