"""Checks of the factor on the scores: any finite one is right, and any other is rejected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from attn_dispatch.conformance.check import BackendUnderTest, Check
from attn_dispatch.conformance.tolerance import ErrorBound, require_rejected
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["scales"]

#: Multiples of head_size ** -0.5. With the large ones a row is nearly the value of one key.
_FACTORS = {
    "0": 0.0,
    "negative": -0.8,
    "large and negative": -12.0,
    "tiny": 1e-30,
    "large": 12.0,
}
_QUICK = ("0", "negative")
_REJECTED = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}


def scales(target: BackendUnderTest) -> Iterator[Check]:
    """0, negative, tiny and large scales, with the features that change how scores are computed."""
    others = target.layers("soft cap", "window", "ALiBi", "sinks", "mask", "no cache", "lse")
    for kind, spec in [("", target.base), *others]:
        for name in _QUICK if target.quick or kind else _FACTORS:
            yield Check(
                f"{name}, {kind}" if kind else name,
                "Any finite scale gives the oracle's result.",
                spec,
                partial(_agrees, target, spec, _FACTORS[name]),
            )
    for name, scale in _REJECTED.items():
        yield Check(
            f"{name} is rejected",
            "The impl's constructor rejects a scale that is not finite.",
            target.base,
            partial(_is_rejected, target, scale),
        )


def _agrees(target: BackendUnderTest, spec: AttentionSpec, factor: float) -> ErrorBound:
    step = target.step(spec)
    step.scale = factor * spec.head_size**-0.5
    return target.run_and_judge(step)


def _is_rejected(target: BackendUnderTest, scale: float) -> None:
    step = target.step(target.base)
    step.scale = scale
    require_rejected(
        partial(step.impl_of, target.cls),
        f"scale={scale} was accepted: every score would be NaN or infinite. AttentionImpl.__init__ "
        "rejects it with an InvalidInputError; call it",
    )
