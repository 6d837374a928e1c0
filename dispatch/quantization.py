"""fp8, in and out: element types by name, the scales of a cache, and quantized outputs."""

from __future__ import annotations

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = [
    "GROUP_SIZE",
    "dequantize",
    "is_fp8",
    "kv_cache_torch_dtype",
    "quantize",
    "quantize_output",
    "scale_for",
]

#: Values that share one scale under output_quant="fp8_e4m3_group128".
GROUP_SIZE = 128

_FP8 = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}

#: Where "fp8" means the fnuz form: the matrix cores there know no other.
FNUZ_ARCHS = ("gfx942",)


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether a torch dtype is one of the 8-bit floating-point types."""
    return dtype in _FP8.values()


def kv_cache_torch_dtype(kv_cache_dtype: str, dtype: torch.dtype, arch: str = "") -> torch.dtype:
    """The torch dtype of a cache.

    Args:
        kv_cache_dtype: one of spec.KV_CACHE_DTYPES.
        dtype: that of the layer, which "auto" stands for.
        arch: of the device; decides what "fp8" stands for.

    Raises:
        InvalidInputError: the name is none of these.
    """
    if kv_cache_dtype == "auto":
        return dtype
    if kv_cache_dtype == "fp8":
        return torch.float8_e4m3fnuz if arch in FNUZ_ARCHS else torch.float8_e4m3fn
    found = _FP8.get(kv_cache_dtype) or getattr(torch, kv_cache_dtype, None)
    if not isinstance(found, torch.dtype):
        raise InvalidInputError(f"kv_cache_dtype={kv_cache_dtype!r} names no element type.")
    return found


def scale_for(values: torch.Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> torch.Tensor:
    """float32: the scales under which the largest value over `dims` is the largest of dtype."""
    amax = values.detach().abs().amax(dims).float()
    return torch.where(amax > 0, amax / torch.finfo(dtype).max, torch.ones_like(amax))


def quantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values / scale as dtype, what is out of range clamped to its largest value."""
    limit = torch.finfo(dtype).max
    working = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (values.to(working) / scale.to(working)).clamp(-limit, limit).to(dtype)


def dequantize(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stored values times their scale, as dtype."""
    return stored.to(dtype) * scale.to(dtype)


def quantize_output(
    values: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    """Store attention's result into an fp8 output.

    Args:
        values: (num_tokens, num_heads, head_size_v), floating point.
        output: the same shape, fp8, written.
        output_scale: () float32: values are divided by it.
        output_block_scale: (num_tokens, num_heads * head_size_v // GROUP_SIZE) float32, written:
            the scale of each group. Exactly one of the two scales is given.
    """
    if output_scale is not None:
        output.copy_(quantize(values, output_scale, output.dtype))
        return
    assert output_block_scale is not None
    groups = values.reshape(values.shape[0], -1, GROUP_SIZE)
    scales = scale_for(groups, output.dtype, (-1,))
    output_block_scale.copy_(scales)
    output.copy_(quantize(groups, scales[..., None], output.dtype).view(values.shape))
