"""Stores new keys and values in the paged cache, by a Triton kernel."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from attn_dispatch.backends.triton.launcher import Launchers
from attn_dispatch.backends.triton.operands import (
    KVSource,
    head_constants,
    on_tensor_device,
    with_contiguous_heads,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.kv_view import KVCache, keys_and_values
from attn_dispatch.platforms.libraries import import_library

__all__ = ["KVCacheWriter", "LatentCacheWriter"]


class KVCacheWriter:
    """Stores a layer's new keys and values in its paged cache, in one launch.

    Any impl may use one: it reads the head counts and sizes of `impl`, and whether its layer shares
    another layer's cache.

    Args:
        impl: the layer's.
        sizes: elements of what is stored as key and as value, if not of the impl's heads.
    """

    def __init__(self, impl: AttentionImpl[Any], sizes: tuple[int, int] | None = None) -> None:
        import_library("triton")
        from attn_dispatch.backends.triton.kernels import kv_write

        self._kernel = kv_write.write_kv_kernel
        self._launchers = Launchers()
        self._last_cache: tuple[Any, KVSource] | None = None
        self._num_kv_heads = impl.num_kv_heads
        self._is_shared = impl.kv_sharing_target_layer_name is not None
        self._heads = head_constants(*(sizes or (impl.head_size, impl.head_size_v)))
        self._rows = max(1, 2048 // max(self._heads["BLOCK_D"], self._heads["BLOCK_DV"]))

    def pages(self, kv_cache: KVCache) -> KVSource:
        """The cache as the kernels read it. Repeated calls with the same cache are cheap.

        Raises:
            InvalidInputError: the elements of a head are not contiguous.
        """
        if self._last_cache is None or self._last_cache[0]() is not kv_cache:
            for part in keys_and_values(kv_cache):
                if part.stride(-1) != 1 and part.shape[-1] > 1:
                    raise InvalidInputError(
                        f"kv_cache has keys or values with strides {part.stride()}; this backend "
                        "needs the elements of each head to be contiguous. Make the cache with "
                        "allocate_kv_cache."
                    )
            self._last_cache = (weakref.ref(kv_cache), KVSource.of_pages(kv_cache))
        return self._last_cache[1]

    @on_tensor_device
    def write(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv. Without slots, or for a shared cache, nothing is stored."""
        slots = batch.slot_mapping
        if self._is_shared or slots is None:
            return
        key, value = with_contiguous_heads(key), with_contiguous_heads(value)
        cache, num_tokens = self.pages(kv_cache), slots.shape[0]
        if not num_tokens:
            return
        k_scale, v_scale, scale_stride = cache.scales(layer)
        launch = self._launchers.find(
            (
                (key.dtype, cache.format, cache.k.dtype, cache.block_size, scale_stride),
                cache.same_strides,
            ),
            self._kernel,
            lambda: {
                "NUM_KV_HEADS": self._num_kv_heads,
                "ROWS": self._rows,
                "BLOCK_SIZE": cache.block_size,
                "FORMAT": cache.format,
                "SCALE_STRIDE": scale_stride,
                "SAME_STRIDES": cache.same_strides,
                **self._heads,
            },
        )
        launch(
            (-(-num_tokens * self._num_kv_heads // self._rows), 1, 1),
            key, value, cache.k, cache.v, cache.k_row_scales, cache.v_row_scales, k_scale,
            v_scale, slots, num_tokens, *key.stride()[:2], *value.stride()[:2],
            *cache.k_strides, *cache.v_strides,
        )  # fmt: skip


class LatentCacheWriter(KVCacheWriter):
    """The same for a cache of latents: they are stored as keys, the rotated parts as values.

    Args:
        impl: the layer's.
        kv_lora_rank: elements of a latent; a rotated part has the rest of the impl's head_size.
    """

    def __init__(self, impl: AttentionImpl[Any], kv_lora_rank: int) -> None:
        super().__init__(impl, (kv_lora_rank, impl.head_size - kv_lora_rank))

    def pages(self, kv_cache: KVCache) -> KVSource:
        """The cache as the kernels read it. Repeated calls with the same cache are cheap.

        Raises:
            InvalidInputError: the elements of an entry are not contiguous.
        """
        if self._last_cache is None or self._last_cache[0]() is not kv_cache:
            assert isinstance(kv_cache, torch.Tensor)
            if kv_cache.stride(-1) != 1:
                raise InvalidInputError(
                    f"kv_cache has strides {kv_cache.stride()}; this backend needs the elements of "
                    "each entry to be contiguous. Make the cache with allocate_kv_cache."
                )
            source = KVSource.of_latents(kv_cache, self._heads["HEAD_SIZE"])
            self._last_cache = (weakref.ref(kv_cache), source)
        return self._last_cache[1]
