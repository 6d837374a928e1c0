"""Phase routing: prefill and decode of one batch on different backends, over the same cache.

The split is decided on the host, once per batch. Where both phases have the same backend there is
nothing to split, and nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.batch import AttentionBatch
from attn_dispatch.interface import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    Phase,
)
from attn_dispatch.validation import check_forward

__all__ = ["RoutedBuilder", "RoutedMetadata", "RoutedPart", "forward_routed"]


@dataclass(frozen=True)
class RoutedPart:
    """The requests of one phase: which rows are theirs, and their backend's metadata."""

    phase: Phase
    tokens: slice | torch.Tensor
    metadata: Any


@dataclass
class RoutedMetadata(AttentionMetadata):
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


class RoutedBuilder:
    """Builds each phase's metadata with that phase's builder."""

    def __init__(self, builders: Mapping[Phase, AttentionMetadataBuilder[Any]]) -> None:
        self._builders = builders

    def build(self, batch: AttentionBatch) -> RoutedMetadata:
        """The metadata of every phase that the batch has requests in."""
        spec = self._builders[Phase.PREFILL].spec
        if spec.attn_type == AttentionType.ENCODER_DECODER:
            # Cross-attention brings an encoder's keys, not one for each query: kept whole.
            phase = Phase.PREFILL if Phase.PREFILL in batch.phases else Phase.DECODE
            whole = slice(0, batch.num_tokens)
            parts = [RoutedPart(phase, whole, self._builders[phase].build(batch))]
        else:
            parts = [
                RoutedPart(phase, part.tokens, self._builders[phase].build(part.batch))
                for phase, part in batch.parts.items()
            ]
        prefill_tokens = sum(
            query
            for query, phase in zip(batch.query_lens, batch.phases, strict=True)
            if phase is Phase.PREFILL
        )
        return RoutedMetadata(
            num_prefills=batch.phases.count(Phase.PREFILL),
            num_prefill_tokens=prefill_tokens,
            num_decode_tokens=batch.num_tokens - prefill_tokens,
            slot_mapping=batch.slot_mapping,
            multi_modal_placeholder_index_maps=batch.multi_modal_placeholder_index_maps,
            enable_kv_scales_calculation=batch.enable_kv_scales_calculation,
            parts=parts,
        )


def forward_routed(
    impls: Mapping[Phase, AttentionImpl[Any]],
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    metadata: RoutedMetadata,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Run each part on its phase's impl; the arguments are those of AttentionImpl.forward.

    `output`, and `lse` if there is one, are written.
    """

    def rows(tensor: torch.Tensor | None, part: RoutedPart) -> torch.Tensor | None:
        # Keys that are not the query's rows belong to a part that is the whole batch.
        own = tensor is None or len(tensor) == len(query)
        return tensor[part.tokens] if own and tensor is not None else tensor

    for part in metadata.parts:  # nothing is written before everything is checked
        args = (query[part.tokens], rows(key, part), rows(value, part), kv_cache)
        check_forward(impls[part.phase], *args, part.metadata.batch)
    for part in metadata.parts:
        block_scale = None if output_block_scale is None else output_block_scale[part.tokens]
        part_output = output[part.tokens]
        result = impls[part.phase].forward(
            layer,
            query[part.tokens],
            rows(key, part),
            rows(value, part),
            kv_cache,
            part.metadata,
            part_output,
            output_scale,
            block_scale,
        )
        if lse is not None:
            lse[part.tokens] = result[1]
        if not isinstance(part.tokens, slice):  # indexing made copies: put them back
            _bytes(output)[part.tokens] = _bytes(part_output)
            if output_block_scale is not None and block_scale is not None:
                output_block_scale[part.tokens] = block_scale


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
