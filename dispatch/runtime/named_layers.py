"""The attention layers of a model by the names that their caches and batches have."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.runtime.layer import Attention

__all__ = ["layers_of_model", "layers_by_prefix"]


def layers_of_model(model: nn.Module) -> dict[str, Attention]:
    """The Attention layers in a model, by their prefixes.

    Raises:
        InvalidInputError: two layers have the same prefix.
    """
    return layers_by_prefix(each for each in model.modules() if isinstance(each, Attention))


def layers_by_prefix(layers: Iterable[Attention]) -> dict[str, Attention]:
    """Layers by their prefixes; one that occurs twice is one layer.

    Raises:
        InvalidInputError: two layers have the same prefix, or one is not an Attention layer.
    """
    named: dict[str, Attention] = {}
    for index, each in enumerate(layers):
        if not isinstance(each, Attention):
            raise InvalidInputError(
                f"layers[{index}] is {shown(each)}, which has no name. Give a list of Attention "
                "layers, or a mapping from each layer's name to its AttentionSpec."
            )
        if named.setdefault(each.prefix, each) is not each:
            raise InvalidInputError(
                f"Two layers of the model have the prefix {each.prefix!r}. Give each its own."
            )
    return named
