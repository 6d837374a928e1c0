"""8-bit types: names of cache dtypes, the scales of a cache, and quantized outputs."""

from __future__ import annotations

import math

import torch

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, KV_CACHE_DTYPES

__all__ = [
    "GROUP_SIZE",
    "KVScales",
    "dequantize",
    "dequantize_rows",
    "has_token_scales",
    "as_indexable_bytes",
    "is_e4m3",
    "is_fp8",
    "kv_cache_dtype_name",
    "kv_cache_torch_dtype",
    "quantize",
    "quantize_rows",
    "scale_for",
    "store_output",
    "stored_head_size",
    "token_scales",
]

#: Values that share one scale under output_quant="fp8_e4m3_group128".
GROUP_SIZE = 128

_FP8 = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}

#: The largest integer of an int8 cache; -128 is not used, so that the range is symmetric.
_INT8_MAX = 127.0
#: An int8 row is padded to a multiple of this many bytes, and its scale takes this many more: rows
#: stay aligned for the widest load of a GPU, and scales for float32.
_ROW_ALIGNMENT = 16

#: Where "fp8" means the fnuz form, the only one of their matrix cores.
FNUZ_ARCHS = ("gfx942",)


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether a torch dtype is one of the 8-bit floating-point types."""
    return dtype in _FP8.values()


def as_indexable_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a type that every device can index: fp8 as bytes, others unchanged."""
    return tensor.view(torch.uint8) if is_fp8(tensor.dtype) else tensor


def is_e4m3(dtype: torch.dtype) -> bool:
    """Whether a torch dtype is e4m3, of either form."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def has_token_scales(dtype: torch.dtype) -> bool:
    """Whether a cache of this torch dtype stores a scale with each row."""
    return dtype == torch.int8


def stored_head_size(kv_cache_dtype: str, size: int) -> int:
    """Elements of the cache for one token's key or value of one KV head.

    This is the head_size of AttentionBackend.get_kv_cache_shape and kv_cache.kv_cache_shape. It is
    `size`, except for int8_per_token_head: there a row has round_up(size, 16) + 16 bytes, in which

        [0, head_size)          are the integers, head_size being that of the key or of the value,
        [stored - 16, ... - 12) is the float32 scale, in the machine's byte order,
        the rest                is unused and may hold anything.

    Args:
        kv_cache_dtype: one of spec.KV_CACHE_DTYPES.
        size: max(head_size, head_size_v).

    Raises:
        InvalidInputError: the name is not one of these, or the size is not an integer of 1 or more.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in KV_CACHE_DTYPES:
        raise InvalidInputError(
            f"kv_cache_dtype={shown(kv_cache_dtype)} is not one of: {', '.join(KV_CACHE_DTYPES)}."
        )
    size = as_int("size", size, 1)
    if kv_cache_dtype != INT8_PER_TOKEN_HEAD:
        return size
    return -(-size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT + _ROW_ALIGNMENT


def kv_cache_torch_dtype(kv_cache_dtype: str, dtype: torch.dtype, arch: str = "") -> torch.dtype:
    """The torch dtype of a cache.

    Args:
        kv_cache_dtype: one of spec.KV_CACHE_DTYPES.
        dtype: of the layer, the meaning of "auto".
        arch: of the device; decides the meaning of "fp8".

    Raises:
        InvalidInputError: the name is not one of these.
    """
    if not isinstance(kv_cache_dtype, str):
        raise InvalidInputError(
            f"kv_cache_dtype={shown(kv_cache_dtype)} is not a name. Give one of "
            "spec.KV_CACHE_DTYPES."
        )
    if kv_cache_dtype == "auto":
        return dtype
    if kv_cache_dtype == INT8_PER_TOKEN_HEAD:
        return torch.int8
    if kv_cache_dtype == "fp8":
        return torch.float8_e4m3fnuz if arch in FNUZ_ARCHS else torch.float8_e4m3fn
    found = _FP8.get(kv_cache_dtype) or getattr(torch, kv_cache_dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInputError(
            f"kv_cache_dtype={kv_cache_dtype!r} names no floating-point type. Give one of "
            "spec.KV_CACHE_DTYPES."
        )
    return found


def kv_cache_dtype_name(stored: torch.dtype, dtype: torch.dtype) -> str | None:
    """The kv_cache_dtype of a cache of plain numbers, for engines that state a torch dtype.

    Args:
        stored: of the cache's elements.
        dtype: of the layer.

    Returns:
        One of spec.KV_CACHE_DTYPES, "auto" if both are the same; None if there is none.
    """
    names = [n for n in KV_CACHE_DTYPES if n not in ("fp8", INT8_PER_TOKEN_HEAD)]
    return next((name for name in names if kv_cache_torch_dtype(name, dtype) == stored), None)


class KVScales:
    """The scales of one fp8 cache, under the names of AttentionLayer; 1 until they are set."""

    def __init__(self) -> None:
        self._k_scale = self._v_scale = torch.ones((), dtype=torch.float32, device="cpu")
        self._k_scale_float = self._v_scale_float = 1.0

    def set(
        self,
        k_scale: float | torch.Tensor,
        v_scale: float | torch.Tensor,
        shapes: tuple[tuple[int, ...], ...],
        device: torch.device | None = None,
    ) -> None:
        """Set both.

        Args:
            k_scale: a number, or a tensor of one of the shapes.
            v_scale: the same for values.
            shapes: what is allowed: () per tensor, (num_kv_heads,) per head.
            device: where they go; None to leave them.

        Raises:
            InvalidInputError: one has another shape, or is not positive and finite.
        """
        scales = [_as_scale(*pair) for pair in (("k_scale", k_scale), ("v_scale", v_scale))]
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if tuple(scale.shape) not in shapes:
                raise InvalidInputError(
                    f"{name} has shape {tuple(scale.shape)}; it must be "
                    f"{' or '.join(map(str, shapes))}."
                )
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise InvalidInputError(
                    f"{name} is {scale.tolist()}; scales are finite and above 0."
                )
        self._k_scale, self._v_scale = (scale.to(device or scale.device) for scale in scales)
        self._k_scale_float, self._v_scale_float = (
            math.nan if scale.dim() else float(scale) for scale in scales
        )

    @property
    def _q_scale(self) -> torch.Tensor:
        """1: queries are not quantized. A new tensor each time, so that it stays 1."""
        return torch.ones((), dtype=torch.float32, device=self._k_scale.device)

    @property
    def _prob_scale(self) -> torch.Tensor:
        """1: probabilities are not quantized."""
        return self._q_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        attn_metadata: object,
    ) -> torch.Tensor:
        """Raise InvalidInputError: these are only the scales for a call without a layer."""
        raise InvalidInputError(
            "KVScales has the scales of a layer and computes nothing. Call the impl, or an "
            "Attention layer."
        )

    def to(self, device: torch.device) -> None:
        """Move both to a device."""
        self._k_scale, self._v_scale = self._k_scale.to(device), self._v_scale.to(device)


def _as_scale(name: str, scale: float | torch.Tensor) -> torch.Tensor:
    """A float32 copy."""
    if isinstance(scale, torch.Tensor):
        if scale.layout != torch.strided or scale.is_meta or not scale.is_floating_point():
            raise InvalidInputError(
                f"{name} is {scale.dtype} {scale.layout} on {scale.device}; give a number or a "
                "dense floating-point tensor."
            )
        return scale.detach().to(torch.float32, copy=True)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InvalidInputError(f"{name}={shown(scale)} is neither a number nor a tensor.")
    try:
        return torch.tensor(float(scale), dtype=torch.float32, device="cpu")
    except OverflowError as error:  # an integer beyond float64
        raise InvalidInputError(f"{name} is too large; scales are finite and above 0.") from error


def scale_for(values: torch.Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> torch.Tensor:
    """float32: the scales under which the largest value over `dims` is the largest of dtype."""
    amax = values.detach().abs().amax(dims).float()
    scale = (amax / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def quantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values / scale as dtype, clamped to its range."""
    limit = torch.finfo(dtype).max
    working = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (values.to(working) / scale.to(working)).clamp(-limit, limit).to(dtype)


def dequantize(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stored values times their scale, as dtype."""
    return stored.to(dtype) * scale.to(dtype)


def token_scales(stored: torch.Tensor) -> torch.Tensor:
    """The scales of stored rows: a float32 view, (...), of (..., stored_head_size) int8."""
    return stored.view(torch.float32)[..., -(_ROW_ALIGNMENT // torch.float32.itemsize)]


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows for a cache of int8_per_token_head, in float32.

    A row with NaN or infinity gets that as its scale and zeros as its integers, so that the whole
    row reads back as NaN.

    Args:
        values: (..., size), floating point.

    Returns:
        (..., size) int8, round(values / scale) with ties to even, within ±127; and their scales,
        (...) float32, largest magnitude / 127; 1 for a row of zeros, else at least the smallest
        normal number, which no device flushes to 0.
    """
    values = values.to(torch.float32)
    amax = values.abs().amax(-1)
    # Divide by a tensor: a GPU multiplies by the reciprocal of a number, with other bits.
    scale = (amax / torch.full_like(amax, _INT8_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(amax == 0, torch.ones_like(amax), scale)
    integers = (values / scale[..., None]).round().clamp(-_INT8_MAX, _INT8_MAX)
    return integers.nan_to_num(nan=0.0).to(torch.int8), scale


def dequantize_rows(
    integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(..., size) integers times (...) scales, rounded to dtype once."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return (integers.to(working) * scale.to(working)[..., None]).to(dtype)


def store_output(
    values: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    """Store attention's result in output, quantized if there is a scale.

    Args:
        values: (num_tokens, num_heads, head_size_v), floating point.
        output: the same shape, written; fp8 if there is a scale.
        output_scale: () float32: values are divided by it.
        output_block_scale: (num_tokens, num_heads * head_size_v // GROUP_SIZE) float32, written:
            the scale of each group. At most one of the two scales is given.
    """
    if output_block_scale is None:
        scaled = values if output_scale is None else quantize(values, output_scale, output.dtype)
        output.copy_(scaled)
        return
    groups = values.flatten(1).unflatten(1, (-1, GROUP_SIZE))
    scales = scale_for(groups, output.dtype, (-1,))
    output_block_scale.copy_(scales)
    output.copy_(quantize(groups, scales[..., None], output.dtype).view(values.shape))
