"""ModelDescription: what `describe` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_dispatch.models.layers import LayerGroup

__all__ = ["ModelDescription"]


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The layers of a model, as transformers' own classes run them.

    Attributes:
        model_type: of the described part, which for a multimodal model is its language model.
        groups: the layers that an AttentionSpec describes, by the name of their kind, in the order
            of their first layer.
        others: the layers without softmax attention, such as linear attention or convolutions, by
            the name of what they have. No backend here computes them.
        rejected: the layers with attention that AttentionSpec cannot describe, by the reason.
        notes: sentences about what was left out or assumed.
    """

    model_type: str
    groups: Mapping[str, LayerGroup]
    others: Mapping[str, tuple[int, ...]]
    rejected: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
