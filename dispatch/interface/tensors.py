"""Checks of one tensor, for the other modules: what it is, and what it must be."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = ["INTEGERS", "check_dense", "wrong_form"]

INTEGERS = (torch.int32, torch.int64)


def check_dense(
    name: str, value: object, wanted: str = "a dense torch.Tensor with data", *, meta: bool = False
) -> None:
    """Check that it is a strided tensor; on the meta device only where `meta` allows that.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise InvalidInputError(f"{name} is a {type(value).__name__}; it must be {wanted}.")
    if value.layout is not torch.strided or value.is_nested or (value.is_meta and not meta):
        raise InvalidInputError(
            f"{name} is sparse, nested or on the meta device; it must be {wanted}."
        )


def wrong_form(name: str, tensor: Any, wanted: str, hint: str = "") -> InvalidInputError:
    """The error for a tensor, or a cache, of another shape, dtype or device than wanted."""
    found = f"{name} has shape {tuple(tensor.shape)} and is {tensor.dtype} on {tensor.device}"
    return InvalidInputError(f"{found}; it must be {wanted}.{hint and ' ' + hint}")
