"""The scales of a KV cache, shared by the layers that share the cache."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import KVScales, is_fp8, scale_for
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, AttentionSpec

__all__ = ["CacheState", "LayerScales"]


class CacheState(KVScales):
    """The state of a cache, shared by the layers that share the cache.

    Attributes:
        scales_are_final: the content of the cache depends on the scales.
        token: represents the cache in compiled graphs, see `ops.attention_op`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scales_are_final = False
        with torch.inference_mode(False):  # else it could be used only inside of that mode
            self.token = torch.zeros(1, device="cpu")

    def to(self, device: torch.device) -> None:
        """Move the scales and the token to a device."""
        super().to(device)
        with torch.inference_mode(False):
            self.token = self.token.to(device)


def _of_cache(name: str) -> Any:
    return property(lambda layer: getattr(layer._cache_state, name))


class LayerScales:
    """The scales of a layer's cache, under the names of AttentionLayer: a base of `Attention`."""

    spec: AttentionSpec
    prefix: str
    kv_sharing_target_layer_name: str | None
    _cache_state: CacheState
    _device: torch.device | None

    _q_scale: torch.Tensor = _of_cache("_q_scale")
    _prob_scale: torch.Tensor = _of_cache("_prob_scale")
    _k_scale: torch.Tensor = _of_cache("_k_scale")
    _v_scale: torch.Tensor = _of_cache("_v_scale")
    _k_scale_float: float = _of_cache("_k_scale_float")
    _v_scale_float: float = _of_cache("_v_scale_float")

    def set_kv_scales(self, k_scale: float | torch.Tensor, v_scale: float | torch.Tensor) -> None:
        """Set the scales of an fp8 cache.

        Args:
            k_scale: a number or (), or (num_kv_heads,) with kv_scales="per_head".
            v_scale: the same for values.

        Raises:
            InvalidInputError: the shape does not go with the spec's kv_scales, a scale is not
                positive and finite, or the cache is int8 and has its own.
        """
        if self.spec.kv_cache_dtype == INT8_PER_TOKEN_HEAD:
            raise InvalidInputError(
                f"The cache of layer {self.prefix!r} is {INT8_PER_TOKEN_HEAD}: it has a scale for "
                "each token and head, made when the token is written. Leave set_kv_scales out."
            )
        self._set_scales(k_scale, v_scale)
        self._cache_state.scales_are_final = True

    def _set_scales(self, k_scale: float | torch.Tensor, v_scale: float | torch.Tensor) -> None:
        shape = (self.spec.num_kv_heads,) if self.spec.kv_scales == "per_head" else ()
        self._cache_state.set(k_scale, v_scale, (shape,), self._device)

    def _derive_scales(
        self,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        slots: torch.Tensor | None,
    ) -> bool:
        """Derive the scales from the keys and values that go to the cache; False if none do."""
        if kv_cache is None or not is_fp8(kv_cache.dtype):
            return False
        if self.spec.kv_sharing:
            raise InvalidInputError(
                f"Layer {self.prefix!r} reads the cache of {self.kv_sharing_target_layer_name!r} "
                "and does not have its scales. Bind the caches of both by bind_kv_caches, or give "
                "both set_kv_scales."
            )
        if key is None or value is None or slots is None or not bool((slots >= 0).any()):
            return False
        if min(len(key), len(value)) < len(slots):
            return False  # the impl rejects it
        dims = (0, 2) if self.spec.kv_scales == "per_head" else (0, 1, 2)
        new = (tensor[: len(slots)][slots >= 0] for tensor in (key, value))
        self._set_scales(*(scale_for(tensor, kv_cache.dtype, dims) for tensor in new))
        return True
