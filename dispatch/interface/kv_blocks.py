"""Copying whole blocks, within a cache or from one to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.aliases import groups_of
from attn_dispatch.interface.kv_access import check_writable
from attn_dispatch.interface.kv_view import (
    KVCache,
    as_kv_cache,
    check_kv_cache,
    keys_and_values,
    parts_of,
)
from attn_dispatch.interface.quantization import as_indexable_bytes
from attn_dispatch.interface.tensors import INTEGERS, check_dense, wrong_form

__all__ = ["copy_blocks", "swap_blocks"]


def copy_blocks(kv_caches: Iterable[KVCache], src_to_dists: torch.Tensor) -> None:
    """Copy blocks within each cache, e.g. for a prefix that requests share.

    All sources are read before anything is written, so pairs may overlap. Caches may share memory,
    as those of layers that share one: each pair is applied once to each piece of memory.

    Args:
        kv_caches: one cache for each layer: tensors, KVCacheViews or pairs (key, value).
        src_to_dists: (num_pairs, 2) integers: source block and destination block.

    Raises:
        InvalidInputError: the caches cannot be written, or a block of one overlaps another block
            of another; or the pairs do not fit. Nothing has been written then. Pairs on a device
            are read only under ATTN_DISPATCH_CHECK=1.
    """
    if isinstance(kv_caches, (str, Mapping, torch.Tensor)) or not isinstance(kv_caches, Iterable):
        raise InvalidInputError(
            f"kv_caches is a {type(kv_caches).__name__}; it must be a list of caches."
        )
    caches = [as_kv_cache(each, f"kv_caches[{i}]") for i, each in enumerate(kv_caches)]
    for index, kv_cache in enumerate(caches):
        _check_blocks(f"kv_caches[{index}]", kv_cache)
        check_writable(f"kv_caches[{index}]", kv_cache)
    for fewest in sorted({len(kv_cache) for kv_cache in caches})[:1]:
        _check_pairs(src_to_dists, fewest, fewest)
    parts = [part for kv_cache in caches for part in parts_of(kv_cache)]
    for group in groups_of(parts):
        together = [parts[index] for index in group]
        found = [_take(part, src_to_dists) for part in together]
        for part, blocks in zip(together, found, strict=True):
            _put(part, src_to_dists, blocks)


def swap_blocks(src_kv_cache: KVCache, dst_kv_cache: KVCache, src_to_dst: torch.Tensor) -> None:
    """Copy blocks from one cache to another, on the same device or not (to the host and back).

    All sources are read before anything is written: both may be the same cache, or share memory.

    Args:
        src_kv_cache: read; a tensor, a KVCacheView or a pair (key, value).
        dst_kv_cache: written; the same shape but for num_blocks, and the same dtype. One may be a
            tensor and the other a KVCacheView.
        src_to_dst: (num_pairs, 2) integers: block of src and block of dst.

    Raises:
        InvalidInputError: caches or pairs do not fit; nothing has been written then.
    """
    src_kv_cache = as_kv_cache(src_kv_cache, "src_kv_cache")
    dst_kv_cache = as_kv_cache(dst_kv_cache, "dst_kv_cache")
    _check_blocks("src_kv_cache", src_kv_cache)
    _check_blocks("dst_kv_cache", dst_kv_cache)
    sources, destinations = parts_of(src_kv_cache), parts_of(dst_kv_cache)
    if (
        len(sources) != len(destinations)
        and len(src_kv_cache.shape) == len(dst_kv_cache.shape) == 5
    ):
        sources, destinations = keys_and_values(src_kv_cache), keys_and_values(dst_kv_cache)
    forms = [[(part.shape[1:], part.dtype) for part in each] for each in (sources, destinations)]
    if forms[0] != forms[1]:
        raise InvalidInputError(
            f"Blocks of {tuple(src_kv_cache.shape[1:])} {src_kv_cache.dtype} do not fit into a "
            f"cache with blocks of {tuple(dst_kv_cache.shape[1:])} {dst_kv_cache.dtype}. Both "
            "caches must come from the same plan."
        )
    check_writable("dst_kv_cache", dst_kv_cache)
    _check_pairs(src_to_dst, len(src_kv_cache), len(dst_kv_cache))
    taken = [_take(part, src_to_dst) for part in sources]
    for part, blocks in zip(destinations, taken, strict=True):
        _put(part, src_to_dst, blocks)


def _check_blocks(name: str, kv_cache: KVCache) -> None:
    """Check that it is a cache, of keys and values or of latents."""
    check_kv_cache(name, kv_cache)
    part = parts_of(kv_cache)[0]
    if part.dim() < 2 or part.is_complex() or part.is_quantized:
        raise wrong_form(name, kv_cache, "a cache, with blocks along the first dimension")


def _check_pairs(pairs: torch.Tensor, num_sources: int, num_destinations: int) -> None:
    name = "The tensor of block pairs"
    check_dense(name, pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in INTEGERS:
        raise wrong_form(name, pairs, "(num_pairs, 2) int32 or int64: source and destination")
    if not len(pairs) or (pairs.device.type != "cpu" and not environment.check_mode()):
        return  # reading them would wait for the device
    sources, destinations = pairs[:, 0], pairs[:, 1]
    for name, blocks, limit in (
        ("source", sources, num_sources),
        ("destination", destinations, num_destinations),
    ):
        if int(blocks.min()) < 0 or int(blocks.max()) >= limit:
            raise InvalidInputError(
                f"A {name} block is out of range: blocks go from {int(blocks.min())} to "
                f"{int(blocks.max())}, and the cache has {limit}."
            )
    if len(destinations.unique()) != len(destinations):
        raise InvalidInputError("A destination block is named twice. Name each one once.")


def _take(part: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    return as_indexable_bytes(part)[pairs[:, 0].to(part.device, torch.int64)]


def _put(part: torch.Tensor, pairs: torch.Tensor, blocks: torch.Tensor) -> None:
    destinations = pairs[:, 1].to(part.device, torch.int64)
    as_indexable_bytes(part)[destinations] = blocks.to(part.device)
