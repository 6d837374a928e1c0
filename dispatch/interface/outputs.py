"""The output of a call: its checks, and what a profiling run returns."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.overlap import overlaps_itself
from attn_dispatch.interface.quantization import GROUP_SIZE, as_indexable_bytes, is_fp8
from attn_dispatch.interface.tensors import wrong_form

__all__ = ["check_output", "profiling_output"]


def check_output(
    shape: tuple[int, int, int],
    query: torch.Tensor,
    output: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    """Check the output's shape, dtype and device, and the scales of a quantized one."""
    if output_scale is not None and output_block_scale is not None:
        raise InvalidInputError("Give output_scale or output_block_scale, not both.")
    quantized = output_scale is not None or output_block_scale is not None
    if output is None:
        if quantized:
            raise InvalidInputError("A scale of the output needs an fp8 output to go with it.")
        return
    if tuple(output.shape) != shape or output.device != query.device:
        raise wrong_form("output", output, f"{shape} on {query.device}")
    if overlaps_itself(output):
        raise InvalidInputError(
            f"output overlaps itself: shape {tuple(output.shape)}, strides {output.stride()}. "
            "Give each of its elements memory of its own."
        )
    if quantized != is_fp8(output.dtype) or (not quantized and output.dtype != query.dtype):
        raise InvalidInputError(
            f"output is {output.dtype}. It must be {query.dtype}; or an fp8 type together with "
            "output_scale or output_block_scale."
        )
    if output_scale is not None:
        _check_scale("output_scale", output_scale, (), query)
    if output_block_scale is not None:
        row = shape[1] * shape[2]
        if row % GROUP_SIZE:
            raise InvalidInputError(
                f"A row of the output has num_heads * head_size_v = {row} values, and that is not "
                f"a multiple of {GROUP_SIZE}; use output_scale."
            )
        groups = (shape[0], row // GROUP_SIZE)
        _check_scale("output_block_scale", output_block_scale, groups, query)


def _check_scale(
    name: str, scale: torch.Tensor, shape: tuple[int, ...], query: torch.Tensor
) -> None:
    if tuple(scale.shape) != shape or scale.dtype != torch.float32 or scale.device != query.device:
        raise wrong_form(name, scale, f"{shape} torch.float32 on {query.device}")


def profiling_output(
    layer: Any,
    query: torch.Tensor,
    output: torch.Tensor | None,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    *,
    head_size_v: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What forward returns without metadata, as in vLLM: zeros, and an LSE of −inf.

    An engine runs the model this way before it has a cache, to find out how much memory is left
    for one. No key is read, and only the output is written.

    Args:
        layer: the impl that was called, or the spec of its layer.
        query: (num_tokens, ...).
        output: as for AttentionImpl.forward.
        output_scale: as for AttentionImpl.forward.
        output_block_scale: as for AttentionImpl.forward.
        head_size_v: elements per head of the output, if not the layer's.

    Raises:
        InvalidInputError: the output or its scales do not fit.
    """
    shape = (query.shape[0], layer.num_heads, head_size_v or layer.head_size_v)
    check_output(shape, query, output, output_scale, output_block_scale)
    if output is None:
        output = query.new_zeros(shape)
    else:
        as_indexable_bytes(output).zero_()
    if output_block_scale is not None:
        output_block_scale.fill_(1.0)  # the scale of a group of zeros
    if not layer.returns_lse:
        return output
    return output, query.new_full(shape[:2], float("-inf"), dtype=torch.float32)
