"""Giving each layer of a model its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_cache import layout_of
from attn_dispatch.interface.kv_view import (
    KVCache,
    KVCacheView,
    as_kv_cache,
    check_kv_cache,
    fits_heads,
    kv_strides_of,
)
from attn_dispatch.interface.overlap import overlaps_itself
from attn_dispatch.interface.quantization import is_e4m3, kv_cache_torch_dtype, stored_head_size
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.named_layers import layers_by_prefix, layers_of_model

__all__ = ["bind_kv_caches"]


def bind_kv_caches(
    layers: nn.Module | Mapping[str, Attention] | Sequence[Attention],
    caches: Mapping[str, KVCache | tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Give each layer its cache, by name; a sharing layer gets the cache of its target.

    A layer that left its block size open takes that of its cache. Where that, or a cache with an
    engine's own layout, changes what the layer needs, its backends are picked again. Layers of
    encoders have no cache. Layers that share a cache also share its scales.

    Args:
        layers: a model or a list, whose Attention layers are named by their prefix; or layers by
            name.
        caches: layer name -> cache, as KVCachePlan.allocate makes them; or a KVCacheView of an
            engine's cache, or its pair (key, value).

    Raises:
        InvalidInputError: a layer that needs a cache has none in `caches`, or one that does not
            fit it; or two layers of the model have the same prefix. No cache is bound then.
        UnsupportedError: no backend, or not the required one, takes blocks of the cache's size.
    """
    named = _layers_by_name(layers)
    if not isinstance(caches, Mapping):
        raise InvalidInputError(
            f"caches is a {type(caches).__name__}; give a mapping from layer names to caches, as "
            "KVCachePlan.allocate makes it."
        )
    specs: dict[str, AttentionSpec] = {}
    views = {name: as_kv_cache(each, f"The cache of {name!r}") for name, each in caches.items()}
    for name, layer in named.items():
        if not AttentionType(layer.spec.attn_type).has_kv_cache:
            continue
        source = layer.kv_sharing_target_layer_name or name
        if source not in views:
            raise InvalidInputError(
                f"There is no cache for layer {source!r}. Plan the caches over all layers of the "
                "model, under the names that the layers have."
            )
        specs[name] = _spec_with_cache(name, layer._declared_spec, views[source])
    for name, spec in specs.items():
        named[name]._follow_cache(spec)
    for name in specs:
        layer = named[name]
        source = layer.kv_sharing_target_layer_name or name
        layer.kv_cache = views[source]
        if source in named:
            layer._cache_state = named[source]._cache_state


def _spec_with_cache(name: str, spec: AttentionSpec, kv_cache: KVCache) -> AttentionSpec:
    """A layer's spec with the cache's strides; and its block size and layout, if these are open."""
    check_kv_cache(f"The cache of layer {name!r}", kv_cache, meta=True)
    if spec.mla is not None:
        return _spec_with_latents(name, spec, kv_cache)
    sizes = [stored_head_size(spec.kv_cache_dtype, n) for n in (spec.head_size, spec.head_size_v)]
    shape = tuple(kv_cache.shape)
    blocks = "block_size" if spec.block_size is None else spec.block_size
    if (
        len(shape) != 5
        or (shape[1], shape[3]) != (2, spec.num_kv_heads)
        or not fits_heads(kv_cache, *sizes)
        or shape[2] < 1
        or shape[2] != (spec.block_size or shape[2])
    ):
        raise InvalidInputError(
            f"The cache of layer {name!r} has shape {shape}; the layer takes "
            f"(num_blocks, 2, {blocks}, {spec.num_kv_heads}, {max(sizes)}). Make the caches by a "
            "plan over the layers' specs, and the layers with its block size or with "
            "block_size=None."
        )
    _check_form(name, spec, kv_cache)
    strides = kv_strides_of(kv_cache)
    if spec.kv_strides not in (None, strides):
        raise InvalidInputError(
            f"Layer {name!r} was made for a cache of {spec.kv_strides}, and this one has "
            f"{strides or 'a layout of this library'}. Make the layer without kv_strides."
        )
    spec = spec.replace(kv_strides=strides)
    if spec.block_size is not None:
        return spec
    layout = spec.kv_cache_layout
    if isinstance(kv_cache, torch.Tensor):
        layout = layout or layout_of(kv_cache)
    return spec.replace(block_size=shape[2], kv_cache_layout=layout)


def _spec_with_latents(name: str, spec: AttentionSpec, kv_cache: KVCache) -> AttentionSpec:
    """The same for a layer of latent attention."""
    shape = tuple(kv_cache.shape)
    blocks = "block_size" if spec.block_size is None else spec.block_size
    if (
        len(shape) != 3
        or shape[2] != spec.head_size
        or shape[1] < 1
        or shape[1] != (spec.block_size or shape[1])
    ):
        raise InvalidInputError(
            f"The cache of layer {name!r} has shape {shape}; the layer takes (num_blocks, "
            f"{blocks}, {spec.head_size}), with kv_lora_rank + qk_rope_head_dim elements for each "
            "token. Make the caches by a plan over the layers, and the layers with its block size "
            "or with block_size=None."
        )
    _check_form(name, spec, kv_cache)
    return spec if spec.block_size is not None else spec.replace(block_size=shape[1])


def _check_form(name: str, spec: AttentionSpec, kv_cache: KVCache) -> None:
    """Check a cache's element type, and that its entries do not overlap."""
    wanted = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
    either = spec.kv_cache_dtype == "fp8" and is_e4m3(kv_cache.dtype)
    if kv_cache.dtype != wanted and not either:
        raise InvalidInputError(
            f"The cache of layer {name!r} is {kv_cache.dtype}; the layer takes {wanted} "
            f"(kv_cache_dtype={spec.kv_cache_dtype!r})."
        )
    if not isinstance(kv_cache, KVCacheView) and overlaps_itself(kv_cache):
        raise InvalidInputError(
            f"The cache of layer {name!r} overlaps itself: shape {tuple(kv_cache.shape)}, strides "
            f"{kv_cache.stride()}. Make it by allocate_kv_cache."
        )


def _layers_by_name(layers: object) -> dict[str, Attention]:
    if isinstance(layers, nn.Module):
        return layers_of_model(layers)
    if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        return layers_by_prefix(layers)
    if not isinstance(layers, Mapping):
        raise InvalidInputError(
            f"layers is a {type(layers).__name__}; give a model, a list of its Attention layers, "
            "or a mapping from names to them."
        )
    named: dict[str, Attention] = {}
    for name, layer in layers.items():
        if not isinstance(layer, Attention):
            raise InvalidInputError(
                f"layers has a {type(layer).__name__} under {shown(name)}; give Attention layers."
            )
        named[name] = layer
    return named
