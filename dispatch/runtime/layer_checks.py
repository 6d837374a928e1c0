"""Checks of a layer's call that depend on how the layer was made."""

from __future__ import annotations

from typing import Protocol

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, check_kv_cache
from attn_dispatch.interface.quantization import is_e4m3
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.validation import check_tensors

__all__ = ["check_block_size", "check_quantized", "unflatten"]

_SCALE_OF_QUANT = {"fp8_e4m3": "output_scale", "fp8_e4m3_group128": "output_block_scale"}


class _Layer(Protocol):
    spec: AttentionSpec
    prefix: str


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
    if len(kv_cache.shape) == 5 and layer.spec.block_size not in (
        None,
        kv_cache.shape[2],
    ):
        raise InvalidInputError(
            f"kv_cache has blocks of {kv_cache.shape[2]} tokens, and layer {layer.prefix!r} was "
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
