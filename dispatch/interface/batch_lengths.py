"""The key counts of a batch of which the host knows only upper bounds.

With an asynchronous scheduler the host prepares a step before it knows how many tokens the last one
accepted. Then the true key counts are on the device, and the host has a bound of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.tensors import INTEGERS, check_dense, wrong_form
from attn_dispatch.interface.types import LENGTHS

__all__ = ["check_bounds", "check_device_lengths", "check_lengths", "check_true_lengths"]


def check_lengths(lengths: Any, bounds: Any) -> None:
    """Check that `lengths` is one of LENGTHS, and that there are bounds if it says so.

    Raises:
        InvalidInputError: it is not, or they are not.
    """
    if not isinstance(lengths, str) or lengths not in LENGTHS:
        raise InvalidInputError(f"lengths={shown(lengths)} is not one of: {', '.join(LENGTHS)}.")
    if (lengths == "upper_bound") != (bounds is not None):
        raise InvalidInputError(
            "lengths='upper_bound' and seq_lens_upper_bound go together: give both, or neither. "
            "seq_lens are the true key counts in either case."
        )


def check_device_lengths(seq_lens: Any, num_reqs: int) -> None:
    """Check the form of the true key counts, which are a tensor on the device.

    Raises:
        InvalidInputError: it is not a tensor with an integer for each request.
    """
    wanted = f"a tensor of the true key counts on the device, ({num_reqs},) int32"
    check_dense("seq_lens", seq_lens, wanted, meta=True)
    if seq_lens.shape != (num_reqs,) or seq_lens.dtype not in INTEGERS:
        raise wrong_form("seq_lens", seq_lens, wanted)


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
