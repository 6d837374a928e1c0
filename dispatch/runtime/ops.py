"""The custom op behind the layer, so that torch.compile sees one opaque call with known effects."""

# No `from __future__ import annotations`: the op's schema is inferred from real annotations.

import weakref
from typing import Any, Optional

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = ["attention_op", "layers_by_key"]

#: The layers that are alive, by the key that their op call carries.
layers_by_key: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


@torch.library.custom_op(
    "attn_dispatch::attention", mutates_args=("output", "lse", "output_block_scale", "cache_token")
)
def attention_op(
    query: torch.Tensor,
    key: Optional[torch.Tensor],  # noqa: UP045
    value: Optional[torch.Tensor],  # noqa: UP045
    output: torch.Tensor,
    lse: Optional[torch.Tensor],  # noqa: UP045
    output_scale: Optional[torch.Tensor],  # noqa: UP045
    output_block_scale: Optional[torch.Tensor],  # noqa: UP045
    cache_token: torch.Tensor,
    layer_key: str,
) -> None:
    """Run a layer's attention: output, lse and output_block_scale are written.

    The layer's KV cache is written too. It is no argument, because functionalization would then
    be free to copy gigabytes. `cache_token`, one element that layers with a common cache share,
    stands for it: a mutated input keeps the compiler from dropping a layer whose output nobody
    uses, and keeps those that write and read one cache in their order.
    """
    layer = layers_by_key.get(layer_key)
    if layer is None:
        raise InvalidInputError(
            f"The attention layer {layer_key!r} that this graph was compiled for is gone. Compile "
            "the model that is in use."
        )
    layer._run(query, key, value, output, lse, output_scale, output_block_scale)


@attention_op.register_fake
def _(
    query: torch.Tensor,
    key: Optional[torch.Tensor],  # noqa: UP045
    value: Optional[torch.Tensor],  # noqa: UP045
    output: torch.Tensor,
    lse: Optional[torch.Tensor],  # noqa: UP045
    output_scale: Optional[torch.Tensor],  # noqa: UP045
    output_block_scale: Optional[torch.Tensor],  # noqa: UP045
    cache_token: torch.Tensor,
    layer_key: str,
) -> None:
    """Nothing is returned, so there is nothing to describe."""
