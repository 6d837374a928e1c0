"""The custom op of a layer: for torch.compile, one opaque call with known effects."""

# No `from __future__ import annotations`: the op's schema is inferred from real annotations.

import weakref
from typing import Any, Optional

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = ["attention_op", "layers_by_key"]

#: The layers that exist, by the key in their op call.
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

    The layer's KV cache is written too. It is not an argument, because functionalization might then
    copy gigabytes. `cache_token` represents it, one element that layers with a common cache share:
    a mutated input keeps the compiler from dropping a layer whose output is not used, and keeps
    the layers that write and read one cache in order.
    """
    layer = layers_by_key.get(layer_key)
    if layer is None:
        raise InvalidInputError(
            f"The attention layer {layer_key!r} that this graph was compiled for is gone. Compile "
            "the model that is in use."
        )
    layer._run(query, key, value, output, lse, output_scale, output_block_scale)


@attention_op.register_fake
def _(*arguments: Any) -> None:
    """The op returns nothing."""
