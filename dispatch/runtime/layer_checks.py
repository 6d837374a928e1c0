"""Checks of a layer's call that depend on how the layer was made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, check_kv_cache
from attn_dispatch.interface.quantization import is_e4m3
from attn_dispatch.interface.spec import SPEC_FIELDS, AttentionSpec
from attn_dispatch.interface.validation import check_tensors

__all__ = [
    "check_block_size",
    "check_dtype",
    "check_features",
    "check_quantized",
    "check_query",
    "derives_scales",
    "unflatten",
]

_SCALE_OF_QUANT = {"fp8_e4m3": "output_scale", "fp8_e4m3_group128": "output_block_scale"}


class _Layer(Protocol):
    spec: AttentionSpec
    prefix: str


def check_features(layer: str, features: Iterable[str], own: frozenset[str] = frozenset()) -> None:
    """Check that further arguments of a layer's constructor are fields of a spec.

    Args:
        layer: the name of its class.
        features: the names of the arguments.
        own: fields that the constructor fills in.
    """
    fields = SPEC_FIELDS - own
    unknown = set(features) - fields
    if unknown:
        raise InvalidInputError(
            f"{layer} has no argument {min(unknown)!r}. In addition to its own arguments it "
            f"takes the fields of AttentionSpec: {', '.join(sorted(fields))}."
        )


def check_dtype(layer: _Layer, query: torch.Tensor) -> None:
    """Check that the query has the dtype of the layer."""
    if query.dtype != layer.spec.dtype:
        raise InvalidInputError(
            f"query is {query.dtype}; layer {layer.prefix!r} was made for {layer.spec.dtype}. Cast "
            "the query, or make the layer with dtype=."
        )


def check_query(query: object, output: object) -> None:
    """Check that query is a tensor, and output too if there is one."""
    if not isinstance(query, torch.Tensor) or (
        output is not None and not isinstance(output, torch.Tensor)
    ):
        check_tensors(query=query, output=output)
        raise InvalidInputError("query is None. Give (num_tokens, num_heads, head_size).")


def derives_scales(metadata: Any) -> bool:
    """Whether the scales of an fp8 cache are to be derived from the call of this metadata."""
    try:
        return bool(metadata.enable_kv_scales_calculation)
    except AttributeError as error:
        raise InvalidInputError(
            f"attn_metadata is a {type(metadata).__name__}. Make it by layer.build_metadata(batch)."
        ) from error


def unflatten(
    layer: _Layer, name: str, tensor: torch.Tensor, heads: int, size: int
) -> torch.Tensor:
    """The tensor as (num_tokens, heads, size), from that or from (num_tokens, heads * size)."""
    if not isinstance(tensor, torch.Tensor):
        check_tensors(**{name: tensor})
    if tensor.dim() == 3:
        return tensor
    if tensor.dim() != 2 or tensor.shape[1] != heads * size:
        raise InvalidInputError(
            f"{name} has shape {tuple(tensor.shape)}; layer {layer.prefix!r} takes "
            f"(num_tokens, {heads}, {size}) or (num_tokens, {heads * size})."
        )
    check_tensors(**{name: tensor})
    return tensor.view(tensor.shape[0], heads, size)


def check_block_size(layer: _Layer, kv_cache: KVCache) -> None:
    """Check that it is a cache and, if it has blocks, that they have the layer's size."""
    check_kv_cache("kv_cache", kv_cache, meta=True)
    dim = 2 if layer.spec.mla is None else 1
    is_cache = len(kv_cache.shape) == (5 if dim == 2 else 3)
    if is_cache and layer.spec.block_size not in (None, kv_cache.shape[dim]):
        raise InvalidInputError(
            f"kv_cache has blocks of {kv_cache.shape[dim]} tokens, and layer {layer.prefix!r} was "
            f"made with block_size={layer.spec.block_size}. Give it a cache of its own plan."
        )


def check_quantized(
    layer: _Layer,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    """Check that the output and its scales go with the layer's output_quant."""
    quant = layer.spec.output_quant
    scales = {"output_scale": output_scale, "output_block_scale": output_block_scale}
    given = [name for name, scale in scales.items() if scale is not None]
    if quant is None or not is_e4m3(output.dtype) or given != [_SCALE_OF_QUANT[quant]]:
        takes = "" if quant is None else f", which takes {_SCALE_OF_QUANT[quant]} and e4m3"
        raise InvalidInputError(
            f"output is {output.dtype} with {' and '.join(given) or 'no scale'}; layer "
            f"{layer.prefix!r} was made with output_quant={quant!r}{takes}."
        )
