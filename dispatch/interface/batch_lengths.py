"""The key counts of a batch of which the host knows only upper bounds.

With an asynchronous scheduler the host prepares a step before it knows how many tokens the last one
accepted. Then the true key counts are on the device, and the host has a bound of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import LENGTHS

__all__ = ["check_bounds", "check_lengths", "check_true_lengths"]


def check_lengths(lengths: Any) -> None:
    """Check that `lengths` is one of LENGTHS.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(lengths, str) or lengths not in LENGTHS:
        raise InvalidInputError(f"lengths={shown(lengths)} is not one of: {', '.join(LENGTHS)}.")


def check_bounds(new_lens: Sequence[int], bounds: Sequence[int]) -> None:
    """Check that no bound is below the request's new keys, which are among its keys.

    Raises:
        InvalidInputError: one is; only a request that pads the batch may have none at all.
    """
    for request, (new, bound) in enumerate(zip(new_lens, bounds, strict=True)):
        if 0 < bound < new:
            raise InvalidInputError(
                f"Request {request} brings {new} keys, and has at most {bound}. "
                "seq_lens_upper_bound counts the new ones too."
            )


def check_true_lengths(
    seq_lens: Sequence[int], new_lens: Sequence[int], bounds: Sequence[int]
) -> None:
    """Check true key counts against what the host knows of them.

    Raises:
        InvalidInputError: one is above its bound; or below the request's new keys, and not 0.
    """
    for request, (seq_len, new, bound) in enumerate(zip(seq_lens, new_lens, bounds, strict=True)):
        if seq_len > bound:
            raise InvalidInputError(
                f"Request {request} has {seq_len} keys, and its bound is {bound}. Plans are sized "
                "from the bounds; give a seq_lens_upper_bound that no request exceeds."
            )
        if 0 != seq_len < new:
            raise InvalidInputError(
                f"Request {request} brings {new} keys, and has {seq_len}. seq_lens counts the new "
                "ones too."
            )
