"""NaN and infinity: which elements of a result are not compared as numbers.

The rule of docs/numerics.md: the result is that of the definition in IEEE arithmetic. The oracle
computes that. Here is what else a backend may do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attn_dispatch.conformance.cases import CaseTensors
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound

__all__ = ["FreeElements", "free_elements"]


class FreeElements(NamedTuple):
    """Elements that are not compared as numbers.

    Attributes:
        output: (num_tokens, num_heads, head_size_v) bool.
        lse: (num_tokens, num_heads) bool.
        is_needed: whether any input of the step is not finite.
    """

    output: torch.Tensor
    lse: torch.Tensor
    is_needed: bool = True


def free_elements(
    step: CaseTensors,
    actual: torch.Tensor,
    lse: torch.Tensor | None,
    expected: torch.Tensor,
    expected_lse: torch.Tensor,
    propagates_nan: bool,
) -> FreeElements:
    """The elements of a result that must not be numbers, or need not be the oracle's.

    Args:
        step: the step.
        actual: (num_tokens, num_heads, head_size_v) float64 on the CPU, the output.
        lse: (at least num_tokens, num_heads), or None.
        expected: by the oracle, the shape of `actual`.
        expected_lse: by the oracle, (num_tokens, num_heads).
        propagates_nan: as the backend declares it. If False, requests with NaN or infinity among
            their inputs are left out, except rows that see no key.

    Raises:
        CheckFailed: the oracle has NaN or infinity where the result has a number.
    """
    touched, spreads = _touched(step, expected_lse)
    if not bool(touched.any()):
        none = torch.zeros_like(expected, dtype=torch.bool)
        return FreeElements(none, touched, is_needed=False)
    sees_nothing = expected_lse == -math.inf
    finite = expected.isfinite()
    # A key that a row does not see has the weight 0 there, and 0 times NaN is NaN.
    spread = spreads[..., None] & finite & ~actual.isfinite()
    if not propagates_nan:
        touched = touched & ~sees_nothing
        return FreeElements(touched[..., None] | spread, touched)
    _require_none(
        ~finite & actual.isfinite(), "a row that sees NaN or infinity has numbers as its output"
    )
    lost = expected_lse.isnan()
    if lse is not None:
        found = lse[: len(expected_lse)].double().cpu()
        two_forms = [
            torch.full((len(query), 1), step.has_infinite_latents(request))
            for request, query in enumerate(step.queries)
        ]
        _require_none(
            lost & ~torch.cat(two_forms) & (found.isfinite() | (found == -math.inf)),
            "a row whose scores are NaN or infinite has a number as its lse",
        )
    return FreeElements(~finite | spread, lost)


def _require_none(wrong: torch.Tensor, sentence: str) -> None:
    if bool(wrong.any()):
        token, head = wrong.nonzero()[0, :2].tolist()
        raise CheckFailed(
            f"{sentence}, e.g. that of token {token}, head {head}: IEEE arithmetic gives NaN "
            "(docs/numerics.md). A backend that does otherwise declares propagates_nan = False",
            ErrorBound(math.inf, 1.0),
        )


def _touched(step: CaseTensors, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_tokens, num_heads) bool each: rows of requests with an input that is not finite, and
    rows that share a request and a KV head with such a value."""
    touched = torch.zeros_like(like, dtype=torch.bool)
    spreads = touched.clone()
    start = 0
    for query, key, value in zip(step.queries, step.keys, step.values, strict=True):
        rows = slice(start, start + len(query))
        start = rows.stop
        if not all(bool(each.isfinite().all()) for each in (query, key, value)):
            touched[rows] = True
            of_heads = ~value.isfinite().all(-1).all(0)
            spreads[rows] = of_heads.repeat_interleave(step.spec.num_heads // len(of_heads))
    return touched, spreads
