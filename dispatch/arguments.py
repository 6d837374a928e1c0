"""Checks of single arguments, for the public functions: integers, and values in messages."""

from __future__ import annotations

import math
import numbers
from typing import Any

from attn_dispatch.errors import InvalidInputError

__all__ = ["INT32_MAX", "INT64_MAX", "as_int", "checked_scale", "shown"]

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

#: Characters of a value that a message shows.
_SHOWN = 80


def shown(value: Any) -> str:
    """Any value for an error message: short, and without waiting for a device."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if hasattr(value, "shape"):  # a tensor or an array
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except Exception as error:  # it runs the value's own code
        return f"a {type(value).__name__} (its repr raises {type(error).__name__})"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def as_int(name: str, value: Any, minimum: int, maximum: int = INT64_MAX) -> int:
    """An integer argument as a Python int; NumPy's integers are accepted, booleans are not.

    Raises:
        InvalidInputError: the value is not an integer, or out of range.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise InvalidInputError(f"{name}={shown(value)} is not an integer of {minimum} or more.")
    if value > maximum:
        raise InvalidInputError(
            f"{name}={shown(value)} is too large; the largest that is accepted is {maximum}."
        )
    return int(value)


def checked_scale(scale: Any) -> float:
    """The factor on the scores as a float.

    Raises:
        InvalidInputError: it is not a finite number.
    """
    try:
        value = math.nan if isinstance(scale, (bool, str)) else float(scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(
            f"scale={shown(scale)} is not a finite number. Give the factor on the scores, usually "
            "head_size ** -0.5."
        )
    return value
