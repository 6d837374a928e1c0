"""Checks of batches of which the host knows only upper bounds of the key counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

from attn_dispatch import environment
from attn_dispatch.conformance.check import BackendUnderTest, Check, same_bits
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.tolerance import ErrorBound, require, require_rejected, worst_of
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["lengths"]

#: A decode, drafts to verify, a prompt whose bound leaves no doubt, one whose bound does, a chunk,
#: a request without tokens and one without keys.
_QUERY_LENS, _SEQ_LENS = (1, 3, 24, 20, 18, 0, 1), (39, 21, 24, 20, 50, 9, 0)
_BOUNDS: dict[str, tuple[int, ...]] = {
    "exact bounds": _SEQ_LENS,
    "bounds twice too large": (78, 42, 24, 40, 100, 18, 2),
    "bounds far too large": (3000, 900, 24, 5000, 2000, 777, 4000),
}


def lengths(target: BackendUnderTest) -> Iterator[Check]:
    """Where upper bounds are declared: results follow the lengths on the device."""
    spec = target.spec_with(lengths="upper_bound")
    if spec is None or spec.block_size is None:
        return
    window = target.spec_with("sliding_window", lengths="upper_bound")
    shows = "With upper bounds a step gives what it gives with exact lengths."
    for kind, layer in (("", spec), (", window", window)):
        for name, bounds in _BOUNDS.items():
            if layer is not None:
                test = partial(_as_with_exact_lengths, target, layer, bounds)
                yield Check(f"{name}{kind}", shows, layer, test)
    shows = "A request with more keys than its bound is rejected before anything is written."
    yield Check("bounds too small", shows, spec, partial(_rejects_small_bounds, target, spec))


def _step(target: BackendUnderTest, spec: AttentionSpec, **case: Any) -> EngineStep:
    return target.step(spec, query_lens=_QUERY_LENS, seq_lens=_SEQ_LENS, **case)


def _as_with_exact_lengths(
    target: BackendUnderTest, spec: AttentionSpec, bounds: tuple[int, ...]
) -> ErrorBound:
    step = _step(target, spec, bounds=bounds)
    require(step.batch.lengths == "upper_bound", "the batch has no upper bounds")
    bounded = target.forward(step)
    step.batch = _step(target, spec, bounds=None).batch
    exact = target.forward(step)
    if exact.cache is not None:
        wrong = "with upper bounds other bytes are written to the cache than with exact lengths"
        require(same_bits(bounded.cache, exact.cache), wrong)
    return worst_of(target.judge(step, done) for done in (bounded, exact))


def _rejects_small_bounds(target: BackendUnderTest, spec: AttentionSpec) -> None:
    """The first request has a key more than its bound; on a GPU, contents are checked for this."""
    step = _step(target, spec, bounds=(_SEQ_LENS[0] - 1, *_SEQ_LENS[1:]))
    cache = step.copy_of_cache()
    with mock.patch.dict(os.environ, {environment.CHECK.name: "1"}):
        require_rejected(
            partial(step.forward, target.cls, cache),
            "a request with more keys than its bound was accepted. Call check_forward before "
            "anything is written",
        )
    require(same_bits(cache, step.kv_cache), "the call was rejected after the cache was written")
