"""How far two results of attention are apart, row by row; used by the shadow check."""

from __future__ import annotations

import math

import torch

from attn_dispatch.interface.quantization import GROUP_SIZE

__all__ = [
    "FLOOR",
    "LSE_FLOOR",
    "differ_in_kind",
    "exact",
    "lse_errors",
    "plain_output",
    "row_errors",
]

#: What is right whatever the case: sums in another order.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5}
LSE_FLOOR = 1e-5
#: A row that is smaller than this part of the largest is one whose values cancel.
_CANCELLED = 1 / 16


def row_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(num_tokens, num_heads): the largest error, relative to the row's largest value."""
    if not expected.numel():
        return expected.new_zeros(expected.shape[:2])
    largest = expected.abs().amax(-1)
    largest = largest.clamp_min(_CANCELLED * float(largest.max()) or 1.0)
    return ((actual - expected).abs().amax(-1) / largest).nan_to_num(nan=math.inf)


def differ_in_kind(
    actual: torch.Tensor,
    expected: torch.Tensor,
    actual_lse: torch.Tensor,
    expected_lse: torch.Tensor,
) -> torch.Tensor:
    """(num_tokens, num_heads) bool: where one is finite and the other is not, or is −inf."""
    output = actual.isfinite() != expected.isfinite()
    lse = actual_lse.isfinite() != expected_lse.isfinite()
    lse |= (actual_lse == -math.inf) != (expected_lse == -math.inf)
    return output.any(-1) | lse


def lse_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(num_tokens, num_heads): the error, relative to the value where that is large."""
    off = (actual - expected).abs() / expected.abs().clamp_min(1.0)
    return off.nan_to_num(nan=math.inf).masked_fill(actual == expected, 0.0)  # −inf equals itself


def plain_output(
    output: torch.Tensor, scale: torch.Tensor | None, block_scale: torch.Tensor | None
) -> torch.Tensor:
    """An output as float64, the scales of a quantized one applied."""
    plain = exact(output)
    if scale is not None:
        plain = plain * exact(scale)
    if block_scale is not None:
        plain = plain * exact(block_scale).repeat_interleave(GROUP_SIZE, 1).view(plain.shape)
    return plain


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """As float64, on the CPU if the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
