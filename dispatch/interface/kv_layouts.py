"""Caches of other engines as caches of this library: views of their memory, without a copy.

Each function takes what one engine hands to its attention, and returns what every function and
layer here takes as `kv_cache`. `kv_layout_table` lists the layouts and makes examples of them. The
shapes were read in the released packages of the versions that are named.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, KVCacheView
from attn_dispatch.interface.tensors import check_dense

__all__ = [
    "kv_cache_from_flashinfer",
    "kv_cache_from_sglang",
    "kv_cache_from_transformers",
    "kv_cache_from_transformers_5_12",
    "kv_cache_from_vllm",
    "kv_cache_from_vllm_0_10",
    "kv_cache_from_vllm_0_24",
]


def kv_cache_from_vllm(
    kv_cache: torch.Tensor,
    head_size: int,
    head_size_v: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> KVCache:
    """A layer's cache of vLLM 0.33 and later, in any of its physical layouts.

    A row holds a token's key of one head, and its value after it.

    Args:
        kv_cache: (num_blocks, num_kv_heads, block_size, head_size + head_size_v), as
            `AttentionImpl.forward` gets it. Its strides are those of one of vLLM's KVCacheLayout.
        head_size: elements of a key.
        head_size_v: elements of a value; None for as many.
        dtype: of the elements; vLLM keeps fp8 caches as torch.uint8, and they are viewed as this.

    Returns:
        One tensor in the logical shape if keys and values have the same size, else a KVCacheView.

    Raises:
        InvalidInputError: the tensor has another shape, or holds bytes and dtype is None.
    """
    size, size_v = _sizes(head_size, head_size_v)
    wanted = (
        "(num_blocks, num_kv_heads, block_size, head_size + head_size_v), the last dimension "
        f"{size + size_v}. kv_cache_from_vllm_0_24 and kv_cache_from_vllm_0_10 take those of older "
        "versions"
    )
    reject = functools.partial(_rejection, "vLLM 0.33", wanted)
    (rows,) = _as_dtype(reject, dtype, kv_cache)
    if rows.dim() != 4 or rows.shape[3] != size + size_v:
        raise reject(kv_cache)
    return _split_rows(rows.transpose(1, 2), size, size_v)


def kv_cache_from_vllm_0_24(
    kv_cache: torch.Tensor,
    head_size: int,
    head_size_v: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> KVCache:
    """A layer's cache of vLLM 0.24, NHD or HND, by itself or in an allocation of all layers.

    Args:
        kv_cache: (num_blocks, 2, block_size, num_kv_heads, head_size), or that of the backends
            for two sizes, (num_blocks, block_size, num_kv_heads, head_size + head_size_v).
        head_size, head_size_v, dtype: as for `kv_cache_from_vllm`.

    Returns:
        One tensor in the logical shape if keys and values have the same size, else a KVCacheView.

    Raises:
        InvalidInputError: the tensor has another shape, or holds bytes and dtype is None.
    """
    size, size_v = _sizes(head_size, head_size_v)
    wanted = (
        f"(num_blocks, 2, block_size, num_kv_heads, {size}), or (num_blocks, block_size, "
        f"num_kv_heads, {size + size_v}) from its backends for two head sizes. "
        "kv_cache_from_vllm_0_10 takes (2, num_blocks, ...), which its ROCM_ATTN has, too"
    )
    reject = functools.partial(_rejection, "vLLM 0.24", wanted)
    (given,) = _as_dtype(reject, dtype, kv_cache)
    if given.dim() == 4 and given.shape[3] == size + size_v:
        return _split_rows(given, size, size_v)
    if given.dim() != 5 or (given.shape[1], given.shape[4]) != (2, size) or size != size_v:
        raise reject(kv_cache)
    return given


def kv_cache_from_vllm_0_10(
    kv_cache: torch.Tensor, head_size: int, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A layer's cache of vLLM 0.10, whose keys and values are two halves of one tensor.

    Args:
        kv_cache: (2, num_blocks, block_size, num_kv_heads, head_size), NHD or HND.
        head_size: elements of a key, and of a value.
        dtype: as for `kv_cache_from_vllm`.

    Returns:
        One tensor in the logical shape.

    Raises:
        InvalidInputError: the tensor has another shape, or holds bytes and dtype is None.
    """
    size, _ = _sizes(head_size, None)
    wanted = (
        f"(2, num_blocks, block_size, num_kv_heads, {size}). That of its FLASHINFER, "
        "(num_blocks, 2, ...), is one for kv_cache_from_flashinfer"
    )
    reject = functools.partial(_rejection, "vLLM 0.10", wanted)
    (halves,) = _as_dtype(reject, dtype, kv_cache)
    if halves.dim() != 5 or (halves.shape[0], halves.shape[4]) != (2, size):
        raise reject(kv_cache)
    return halves.transpose(0, 1)


def kv_cache_from_sglang(
    key: torch.Tensor, value: torch.Tensor, page_size: int, *, dtype: torch.dtype | None = None
) -> KVCacheView:
    """A layer's pool of SGLang 0.5: two tensors of slots, or of pages in the HND layout.

    Args:
        key: (slots + page_size, num_kv_heads, head_size), or with SGLANG_USE_HND_KVCACHE
            (num_pages, num_kv_heads, page_size, head_size): `token_to_kv_pool.get_kv_buffer(i)[0]`.
        value: the same of values, whose heads may have another size.
        page_size: of the server, 1 or more: the block size here. The block table is
            `req_to_token[req_pool_indices, :seq_len:page_size] // page_size`.
        dtype: as for `kv_cache_from_vllm`; for `k_buffer[i]`, which holds fp8 as torch.uint8.

    Raises:
        InvalidInputError: the tensors have other shapes, do not fit each other, or hold bytes and
            dtype is None.
    """
    page_size = as_int("page_size", page_size, 1)
    wanted = (
        "two tensors (slots + page_size, num_kv_heads, head_size), a multiple of "
        f"page_size={page_size} of slots, or (num_pages, num_kv_heads, {page_size}, head_size)"
    )
    reject = functools.partial(_rejection, "SGLang 0.5", wanted)
    pages = []
    for part in _as_dtype(reject, dtype, key, value):
        if part.dim() == 3 and part.shape[0] % page_size == 0:
            pages.append(_in_pages(part, page_size))
        elif part.dim() == 4 and part.shape[2] == page_size:
            pages.append(part.transpose(1, 2))
        else:
            raise reject(key, value)
    return KVCacheView(*pages)


def kv_cache_from_transformers(
    cache_tensor: torch.Tensor, page_size: int, layer: int, num_layers: int
) -> torch.Tensor:
    """A layer's cache in the PagedAttentionCache of transformers 5.18 and later.

    A group of layers shares one tensor: a block has a page of keys and one of values of each layer.

    Args:
        cache_tensor: (num_tokens, 2, num_kv_heads, head_size), `allocator.cache_tensor` of one of
            the cache's allocators.
        page_size: tokens of a page, `allocator.tokens_per_page`: the block size here.
        layer: the layer's index in `allocator.layer_indices`.
        num_layers: layers of the group, `allocator.pages_per_block`.

    Returns:
        One tensor in the logical shape. Its blocks are those of `allocator.block_table`.

    Raises:
        InvalidInputError: the tensor has another shape, or the group no such layer.
    """
    page_size, num_layers = as_int("page_size", page_size, 1), as_int("num_layers", num_layers, 1)
    layer = as_int("layer", layer, 0, num_layers - 1)
    wanted = (
        "one tensor (num_tokens, 2, num_kv_heads, head_size), whose tokens are a multiple of "
        f"page_size * num_layers = {page_size * num_layers}. kv_cache_from_transformers_5_12 takes "
        "the two of older versions"
    )
    reject = functools.partial(_rejection, "transformers 5.18", wanted)
    (tokens,) = _as_dtype(reject, None, cache_tensor)
    if (
        tokens.dim() != 4
        or tokens.shape[1] != 2
        or tokens.shape[0] % (page_size * num_layers)
        or not tokens.is_contiguous()
    ):
        raise reject(cache_tensor)
    return tokens.view(-1, num_layers, 2, page_size, *tokens.shape[2:])[:, layer]


def kv_cache_from_transformers_5_12(
    key: torch.Tensor, value: torch.Tensor, block_size: int
) -> KVCacheView:
    """A layer's cache in the PagedAttentionCache of transformers 4.57 to 5.12: two tensors.

    Args:
        key: (num_tokens, num_kv_heads, head_size), `cache.key_cache[i]`. Tokens after the last
            whole block, which 4.57 has for padding, are left out.
        value: the same of values, `cache.value_cache[i]`.
        block_size: `cache.block_size`.

    Raises:
        InvalidInputError: the tensors have other shapes, or do not fit each other.
    """
    block_size = as_int("block_size", block_size, 1)
    wanted = "two tensors (num_tokens, num_kv_heads, head_size), of at least one block"
    reject = functools.partial(_rejection, "transformers 5.12", wanted)
    parts = _as_dtype(reject, None, key, value)
    if any(part.dim() != 3 or part.shape[0] < block_size for part in parts):
        raise reject(key, value)
    return KVCacheView(*(_in_pages(part, block_size) for part in parts))


def kv_cache_from_flashinfer(
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_layout: str = "NHD",
    *,
    dtype: torch.dtype | None = None,
) -> KVCache:
    """The `paged_kv_cache` of FlashInfer's wrappers: one tensor, or a tuple of two.

    Args:
        kv_cache: (num_pages, 2, page_size, num_kv_heads, head_size), or keys and values without the
            2, each; (num_pages, 2, num_kv_heads, page_size, head_size) and so on if "HND". The
            dimension of a page_size of 1 may be left out, as in FlashInfer.
        kv_layout: that of the wrapper, "NHD" or "HND".
        dtype: as for `kv_cache_from_vllm`.

    Returns:
        A tensor in the logical shape, or a KVCacheView of the tuple.

    Raises:
        InvalidInputError: the tensors have other shapes, or hold bytes and dtype is None.
    """
    if kv_layout not in ("NHD", "HND"):
        raise InvalidInputError(f"kv_layout={shown(kv_layout)} is neither 'NHD' nor 'HND'.")
    sizes = "page_size, num_kv_heads" if kv_layout == "NHD" else "num_kv_heads, page_size"
    wanted = (
        f"one tensor (num_pages, 2, {sizes}, head_size), or a tuple of two "
        f"(num_pages, {sizes}, head_size)"
    )
    reject = functools.partial(_rejection, "FlashInfer", wanted)
    is_pair = isinstance(kv_cache, (tuple, list))
    given = tuple(kv_cache) if is_pair else (kv_cache,)
    parts = _as_dtype(reject, dtype, *given)
    dims = 4 if is_pair else 5
    fits = all(part.dim() in (dims - 1, dims) for part in parts)
    if len(parts) != (2 if is_pair else 1) or not fits or not (is_pair or parts[0].shape[1] == 2):
        raise reject(*given)
    of_one = -3 if kv_layout == "NHD" else -2
    pages = [part if part.dim() == dims else part.unsqueeze(of_one) for part in parts]
    if kv_layout == "HND":
        pages = [part.transpose(-3, -2) for part in pages]
    return KVCacheView(*pages) if is_pair else pages[0]


def _sizes(head_size: Any, head_size_v: Any) -> tuple[int, int]:
    size = as_int("head_size", head_size, 1)
    return size, size if head_size_v is None else as_int("head_size_v", head_size_v, 1)


def _rejection(engine: str, wanted: str, *given: Any) -> InvalidInputError:
    """The error for what is not what an engine hands over."""
    found = " and ".join(
        f"{tuple(each.shape)} {each.dtype}" if isinstance(each, torch.Tensor) else shown(each)
        for each in given
    )
    return InvalidInputError(f"The cache is {found}; {engine} hands over {wanted}.")


def _as_dtype(reject: Any, dtype: torch.dtype | None, *given: Any) -> tuple[torch.Tensor, ...]:
    """The tensors, viewed as dtype if they hold bytes.

    Raises:
        InvalidInputError: one is no dense tensor, or holds another dtype, or bytes of an unknown
            one.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InvalidInputError(f"dtype={shown(dtype)} is not a torch.dtype.")
    for each in given:
        if not isinstance(each, torch.Tensor):
            raise reject(*given)
        check_dense("The cache", each, meta=True)
        if dtype is None and each.dtype == torch.uint8:
            raise InvalidInputError(
                "The cache is torch.uint8, which some engines keep fp8 in. Give dtype=, the type "
                "that they view it as, e.g. dtype=torch.float8_e4m3fn."
            )
        if dtype is not None and each.dtype not in (dtype, torch.uint8):
            raise InvalidInputError(
                f"The cache is {each.dtype}, and dtype={shown(dtype)}. Only bytes, torch.uint8, "
                "are viewed as another type: leave dtype out."
            )
        if dtype is not None and dtype.itemsize != each.dtype.itemsize:
            raise InvalidInputError(
                f"The cache is {each.dtype}, and dtype={dtype} has {dtype.itemsize} bytes. Give "
                "one with a single byte, e.g. torch.float8_e4m3fn."
            )
    return given if dtype is None else tuple(each.view(dtype) for each in given)


def _split_rows(rows: torch.Tensor, size: int, size_v: int) -> KVCache:
    """(num_blocks, block_size, num_kv_heads, size + size_v), each row a key and then a value."""
    if size == size_v:
        halves: torch.Tensor = rows.unflatten(3, (2, size))
        return halves.permute(0, 3, 1, 2, 4)
    return KVCacheView(rows[..., :size], rows[..., size:])


def _in_pages(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """(slots, heads, size) as (pages, page_size, heads, size); a part of a page is left out."""
    whole = slots[: slots.shape[0] // page_size * page_size]
    pages: torch.Tensor = whole.unflatten(0, (-1, page_size))
    return pages
