"""The custom op of a layer: for torch.compile, one opaque call with known effects."""

# No `from __future__ import annotations`: the op's schema is inferred from real annotations.

import itertools
import weakref
from typing import Any, Optional

import torch
from torch import nn

from attn_dispatch.errors import InvalidInputError

__all__ = ["CalledByOp", "attention_op", "layers_by_key"]

_serial = itertools.count()

#: The layers that exist, by the key in their op call.
layers_by_key: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


class CalledByOp(nn.Module):
    """A layer that the op finds by its key; a copied or unpickled one gets a key of its own."""

    prefix: str
    _op_key: str

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no cache: caches are large, and two layers must not write the same one.
        return {**self.__dict__, "kv_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def _register(self) -> None:
        self._op_key = f"{self.prefix or 'attention'}#{next(_serial)}"
        layers_by_key[self._op_key] = self


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
