"""The projection of a latent attention layer: kv_b_proj, also in block-scaled fp8; and RoPE."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.quantization import is_fp8
from attn_dispatch.interface.spec import MLADims

__all__ = ["WEIGHT_BLOCK", "KVProjection", "apply_rope", "dequantize_weight"]

#: Rows and columns that share a scale in the fp8 checkpoints of DeepSeek-V3.
WEIGHT_BLOCK = 128


def dequantize_weight(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A block-scaled fp8 weight as dtype; computed in float32.

    Args:
        weight: (rows, columns) fp8.
        scale_inv: (ceil(rows / 128), ceil(columns / 128)): what the elements of each block are
            multiplied by, DeepSeek's `weight_scale_inv`.
        dtype: of the result.

    Raises:
        InvalidInputError: the weight is not fp8, or the scales do not fit it.
    """
    if not is_fp8(weight.dtype) or weight.dim() != 2:
        raise InvalidInputError(
            f"kv_b_proj is {tuple(weight.shape)} {weight.dtype} with scales for blocks; scales go "
            "with a matrix in fp8. Leave them out, or give the weight as it was stored."
        )
    wanted = tuple(-(-size // WEIGHT_BLOCK) for size in weight.shape)
    if tuple(scale_inv.shape) != wanted or not scale_inv.dtype.is_floating_point:
        raise InvalidInputError(
            f"weight_scale_inv is {tuple(scale_inv.shape)} {scale_inv.dtype}; a weight of "
            f"{tuple(weight.shape)} takes {wanted}, one for each block of {WEIGHT_BLOCK} x "
            f"{WEIGHT_BLOCK} elements."
        )
    scales = scale_inv.float()
    for dim, size in enumerate(weight.shape):
        scales = scales.repeat_interleave(WEIGHT_BLOCK, dim).narrow(dim, 0, size)
    return (weight.float() * scales).to(dtype)


class KVProjection:
    """kv_b_proj as impls take it: an object with a `weight`, and no bias.

    The weight is read at each call, because a model may load it later, or move it. An fp8 weight is
    dequantized when it is first used, and again only after it was written or replaced. The copy
    takes two bytes an element in 16 bits, in addition to the weight itself.

    Args:
        given: (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank), or a module with such a
            `weight`, and for fp8 a `weight_scale_inv`.
        scale_inv: the scales of an fp8 weight, if `given` is a tensor.
        num_heads: query heads.
        mla: the sizes.
        dtype: that an fp8 weight is dequantized to.

    Raises:
        InvalidInputError: the weight has another shape or dtype, or there is a bias.
    """

    bias = None

    def __init__(
        self,
        given: Any,
        scale_inv: torch.Tensor | None,
        num_heads: int,
        mla: MLADims,
        dtype: torch.dtype,
    ) -> None:
        is_tensor = isinstance(given, torch.Tensor)
        weight = given if is_tensor else getattr(given, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise InvalidInputError(
                f"kv_b_proj is {shown(given)}. Give its weight, or a module that has one."
            )
        if getattr(given, "bias", None) is not None:
            raise InvalidInputError(
                "kv_b_proj has a bias, which multi-head latent attention does not support. Give a "
                "module without one."
            )
        wanted = (num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        if tuple(weight.shape) != wanted:
            raise InvalidInputError(
                f"kv_b_proj has shape {tuple(weight.shape)}; the layer takes {wanted}: "
                "(num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank)."
            )
        self._given, self._scale_inv, self._dtype = given, scale_inv, dtype
        self._dequantized: tuple[Any, torch.Tensor] | None = None
        if self._scales() is not None or is_fp8(weight.dtype):
            self.weight  # noqa: B018 checks the scales
        elif not weight.is_floating_point():
            raise InvalidInputError(f"kv_b_proj is {weight.dtype}; it must be floating point.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dequantized": None}

    def _scales(self) -> torch.Tensor | None:
        if self._scale_inv is not None:
            return self._scale_inv
        found = getattr(self._given, "weight_scale_inv", None)
        return found if isinstance(found, torch.Tensor) else None

    @property
    def stored(self) -> torch.Tensor:
        """The weight as it was given."""
        given = self._given
        weight: torch.Tensor = given if isinstance(given, torch.Tensor) else given.weight
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """(num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank), dequantized.

        Raises:
            InvalidInputError: it is fp8 without scales for its blocks, or the scales do not fit.
        """
        stored, scales = self.stored, self._scales()
        if scales is None:
            if is_fp8(stored.dtype):
                raise InvalidInputError(
                    f"kv_b_proj is {stored.dtype} without scales. Give kv_b_proj_scale_inv=, or a "
                    "module with a weight_scale_inv."
                )
            return stored
        now = tuple((id(each), _version(each), each.device) for each in (stored, scales))
        if self._dequantized is None or self._dequantized[0] != now:
            # The tensors are kept with the copy, so that their ids stay theirs.
            with torch.inference_mode(False), torch.no_grad():
                copy = dequantize_weight(stored.detach(), scales.detach(), self._dtype)
            self._dequantized = (now, copy)
        return self._dequantized[1]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = True
) -> torch.Tensor:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) of each pair of elements.

    Args:
        x: (num_tokens, ..., size).
        cos: (num_tokens, size / 2), of each token's angles.
        sin: the same.
        interleaved: pairs are neighbours, as in DeepSeek's checkpoints; else element i and
            i + size / 2 are a pair.

    Returns:
        The same shape, order and dtype; computed in float32, or in float64.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (len(x), *[1] * (x.dim() - 2), -1)
    c, s = cos.to(compute).view(shape), sin.to(compute).view(shape)
    wide = x.to(compute)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    rotated = (first * c - second * s, first * s + second * c)
    joined = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return joined.to(x.dtype)
