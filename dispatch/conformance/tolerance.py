"""How far from the oracle a result may be. `verify`, the shadow check and the benchmark share it.

The error of a row and head is the largest difference from the oracle, relative to the oracle's
largest magnitude there. It may be twice that of PyTorch's own attention in the same dtype, plus one
unit in the last place: see docs/verify.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = [
    "LSE_FLOOR",
    "TANH_ERROR",
    "CheckFailed",
    "ErrorBound",
    "allowance",
    "distance",
    "require",
    "require_rejected",
    "row_errors",
    "worst_of",
]

#: What is always allowed, because sums may be in another order.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5}
#: The same for an LSE.
LSE_FLOOR = 1e-5
#: The values of a row cancel where its largest is below this part of the largest of all rows.
_CANCELLED = 1 / 16
#: The relative error of a GPU's instruction for tanh, which a soft cap in 16 bits may use.
TANH_ERROR = 2.0**-11


@dataclass(frozen=True)
class ErrorBound:
    """The error that was found and the one that is allowed; both 0 where nothing is measured."""

    error: float = 0.0
    allowed: float = 0.0

    @property
    def ratio(self) -> float:
        """The error as a part of what is allowed."""
        return self.error / self.allowed if self.allowed else (math.inf if self.error else 0.0)


def worst_of(findings: Iterable[ErrorBound]) -> ErrorBound:
    """The one whose error is the largest part of what is allowed."""
    return max(findings, key=lambda finding: finding.ratio, default=ErrorBound())


class CheckFailed(Exception):
    """A check found something wrong; the message is a sentence about it."""

    def __init__(self, message: str, finding: ErrorBound | None = None) -> None:
        super().__init__(message)
        self.finding = finding or ErrorBound()


def require(holds: bool, message: str) -> None:
    """Raise CheckFailed with this sentence unless the condition holds."""
    if not holds:
        raise CheckFailed(message)


def require_rejected(call: Callable[[], object], message: str) -> None:
    """Raise CheckFailed with this sentence unless the call raises an InvalidInputError."""
    try:
        call()
    except InvalidInputError:
        return
    raise CheckFailed(message)


def row_errors(
    actual: torch.Tensor, expected: torch.Tensor, *, cancelled: float = _CANCELLED
) -> torch.Tensor:
    """The error of each row (..., head_size_v) of an output; infinite where it has a NaN.

    Args:
        actual: the output.
        expected: by the oracle.
        cancelled: an error is relative to at least this part of the largest value of all rows.
    """
    if not expected.numel():
        return expected.new_zeros(expected.shape[:-1])
    largest = expected.abs().amax(-1)
    largest = largest.clamp_min(cancelled * float(largest.max()))
    largest = largest.masked_fill(largest == 0, 1.0)
    return ((actual - expected).abs().amax(-1) / largest).nan_to_num(math.inf, math.inf)


def distance(actual: torch.Tensor, expected: torch.Tensor, **more: float) -> float:
    """The largest of the `row_errors`."""
    errors = row_errors(actual, expected, **more)
    return float(errors.max()) if errors.numel() else 0.0


def allowance(dtype: torch.dtype, sdpa_error: float = 0.0, *, units: int = 1) -> float:
    """The error that an output may have.

    Args:
        dtype: of the output.
        sdpa_error: the error of PyTorch's own attention on the same keys and rows.
        units: in the last place; 2 where PyTorch computes only part of the layer.
    """
    return max(2 * sdpa_error + units * torch.finfo(dtype).eps, _FLOOR.get(dtype, 0.0))
