"""What a KV cache holds of some values, and its scales; formulas: docs/numerics.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from attn_dispatch.interface.kv_cache import STRIDE_ORDERS
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD

__all__ = [
    "as_stored",
    "dequantized",
    "encoded_parts",
    "int8_rows",
    "layer_with",
    "nan_cache",
    "per_head",
    "stored_size",
]


def nan_cache(
    shape: Sequence[int],
    layout: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A cache in which every element, or every scale of int8 rows, is NaN.

    Args:
        shape: the logical one.
        layout: "NHD" or "HND"; None for a cache of latents, which is contiguous.
        dtype: of its elements.
        device: of the cache.
    """
    order = range(len(shape)) if layout is None else STRIDE_ORDERS[layout]
    physical = [shape[dim] for dim in order]
    if dtype == torch.int8:  # four bytes of ones are a NaN too
        memory = torch.full(physical, -1, dtype=dtype)
    elif dtype.itemsize == 1:
        nan = torch.tensor(math.nan).to(dtype).view(torch.uint8)
        memory = torch.full(physical, int(nan), dtype=torch.uint8).view(dtype)
    else:
        memory = torch.full(physical, math.nan, dtype=dtype)
    return memory.to(device).permute([order.index(dim) for dim in range(len(shape))])


def stored_size(kv_cache_dtype: str, size: int) -> int:
    """Elements of a cache that a head of this size takes."""
    return 16 * math.ceil(size / 16) + 16 if kv_cache_dtype == INT8_PER_TOKEN_HEAD else size


def int8_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., size) integers and (..., 1) scales that an int8 cache holds of (..., size) values.

    A row that is not finite has the integers 0, and a scale that makes all of it NaN again.
    """
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True) / 127
    scales[scales == 0] = 1.0
    integers = torch.round(values / scales).clamp(-127, 127)
    return torch.where(scales.isfinite(), integers, 0.0).to(torch.int8), scales


def encoded_parts(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> list[tuple[slice, torch.Tensor]]:
    """The elements of a cache that (..., heads, size) values take: which ones, and their content.

    For types of one byte the content is uint8.
    """
    used = slice(0, values.shape[-1])
    if dtype == torch.int8:
        integers, scales = int8_rows(values)
        scale_bytes = scales.flatten().view(torch.uint8).view(*scales.shape[:-1], 4)
        return [(used, integers.view(torch.uint8)), (slice(-16, -12), scale_bytes)]
    stored = as_stored(values, scale, dtype)
    return [(used, stored.view(torch.uint8) if dtype.itemsize == 1 else stored)]


def as_stored(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a cache of this dtype, which is not int8, holds of (..., heads, size) values."""
    if dtype.itemsize > 1:
        return values.to(dtype)
    working = torch.float64 if values.dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).max
    scaled = values.to(working) / per_head(scale).to(working)
    return scaled.clamp(-limit, limit).to(dtype)


def dequantized(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values after a cache of this dtype stored them, float64 on the CPU."""
    if dtype == torch.int8:
        integers, scales = int8_rows(values)
        return integers.double() * scales.double()
    stored = as_stored(values, scale.cpu(), dtype).double()
    return stored * per_head(scale.cpu()).double() if dtype.itemsize == 1 else stored


def per_head(scale: torch.Tensor) -> torch.Tensor:
    """A scale, or one for each head, that broadcasts over (..., heads, size)."""
    return scale[:, None] if scale.dim() else scale


def layer_with(scales: Sequence[torch.Tensor], device: torch.device) -> Any:
    """A layer with the scales of its keys and values."""
    k_scale, v_scale = (scale.to(device) for scale in scales)
    return SimpleNamespace(
        _k_scale=k_scale,
        _v_scale=v_scale,
        _k_scale_float=math.nan if k_scale.dim() else float(k_scale),
        _v_scale_float=math.nan if v_scale.dim() else float(v_scale),
    )
