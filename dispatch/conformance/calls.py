"""Checks of padding rows, and of what newly allocated memory holds."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance.check import BackendUnderTest, Check
from attn_dispatch.conformance.tolerance import ErrorBound, worst_of
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["calls"]

#: More rows of query than the batch has tokens, requests without tokens, and one without keys.
_PADDED: dict[str, dict[str, Any]] = {
    "mixed": {"padding": 5},
    "prompts": {"padding": 5, "query_lens": (24, 0, 18), "seq_lens": (24, 7, 18)},
    "chunks": {"padding": 70, "query_lens": (5, 16, 0), "seq_lens": (50, 33, 20)},
    "decodes": {"padding": 5, "query_lens": (1, 1, 0, 1), "seq_lens": (39, 4, 9, 17)},
    "nothing but padding": {"padding": 5, "query_lens": (0, 0), "seq_lens": (9, 0)},
    "no requests": {"padding": 5, "query_lens": (), "seq_lens": ()},
}
_QUICK = ("mixed", "decodes")


def calls(target: BackendUnderTest) -> Iterator[Check]:
    """Padding rows are written, and new memory may hold anything."""
    plain = target.spec_with("returns_lse") or target.base
    shows = "Rows that belong to no request are 0, and their lse is −inf."
    for kind, spec in [("", plain), *target.layers("no cache", "sinks", "window", "mask")]:
        for name in _QUICK if target.quick or kind else _PADDED:
            case = dict(_PADDED[name])
            if spec.block_size is None and "query_lens" in case and spec.causal:
                case["seq_lens"] = case["query_lens"]
            title = ", ".join(filter(None, ("padding rows", name, kind)))
            yield Check(title, shows, spec, partial(_padded, target, spec, case))
    shows = "Nothing depends on what newly allocated memory holds."
    yield Check("memory as it was allocated", shows, plain, partial(_over_nan, target, plain))


def _padded(target: BackendUnderTest, spec: AttentionSpec, case: Mapping[str, Any]) -> ErrorBound:
    """Once with an output that is full of NaN, once with one that the backend allocates."""
    step = target.step(spec, **case)
    output = torch.full(step.output_shape, math.nan, dtype=spec.dtype, device=target.device)
    step.fill_padding(math.nan)
    with _new_memory_is_nan():
        given = target.forward(step, output=output)
        made = target.forward(step)
    return worst_of(target.judge(step, done) for done in (given, made))


def _over_nan(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec)
    with _new_memory_is_nan():
        done = target.forward(step)
    return target.judge(step, done)


#: The functions that backends allocate outputs with.
_MAKERS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """Within it, torch.empty and its relatives fill floating-point memory with NaN."""

    def full_of_nan(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            # A tensor of 8 bits cannot be filled on every device.
            if made.is_floating_point() and made.dtype.itemsize > 1:
                made.fill_(math.nan)
            return made

        return run

    makers = [(owner, name, getattr(owner, name)) for owner, name in _MAKERS]
    try:
        for owner, name, make in makers:
            setattr(owner, name, full_of_nan(make))
        yield
    finally:
        for owner, name, make in makers:
            setattr(owner, name, make)
