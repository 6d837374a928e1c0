"""Checks of memory that overlaps: the result is right, or the call is rejected before any write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from attn_dispatch.conformance.cases import output_size
from attn_dispatch.conformance.check import BackendUnderTest, Check, same_bits
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.tolerance import ErrorBound, require
from attn_dispatch.errors import InvalidInputError

__all__ = ["overlaps"]


@dataclass
class _Call:
    """The arguments of a call, some of which share memory; the step's tensors are views too.

    Attributes:
        output: the tensor for the result.
        cache: written to; None for a copy of the step's.
        shared: the names of inputs whose memory is written.
    """

    output: torch.Tensor | None
    cache: torch.Tensor | None = None
    shared: tuple[str, ...] = ()


def _output_over(name: str, shift: int) -> Callable[[EngineStep], _Call]:
    """The output begins `shift` elements after an input, in the same memory."""

    def make(step: EngineStep) -> _Call:
        tensor: torch.Tensor = getattr(step, name)
        size = math.prod(step.output_shape)
        memory = tensor.new_full((max(tensor.numel(), size + shift),), math.nan)
        view = memory[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        setattr(step, name, view)
        output = memory[shift : shift + size].view(step.output_shape)
        return _Call(output, shared=(name,))

    return make


def _expanded_output(step: EngineStep) -> _Call:
    """Every row of the output is the same memory."""
    rows, *row_shape = step.output_shape
    return _Call(step.query.new_full((1, *row_shape), math.nan).expand(rows, -1, -1))


def _overlapping_rows(step: EngineStep) -> _Call:
    """Each row of the output begins within the one before."""
    rows, heads, size = step.output_shape
    stride = (heads - 1) * size
    memory = step.query.new_full((rows * stride + heads * size,), math.nan)
    return _Call(memory.as_strided(step.output_shape, (stride, size, 1)))


def _expanded_cache(step: EngineStep) -> _Call:
    """Every block of the cache is the same memory."""
    return _Call(None, step.kv_cache[:1].clone().expand(step.kv_cache.shape))


def _keys_over_values(step: EngineStep) -> _Call:
    """Keys and values of the cache are the same memory."""
    return _Call(None, step.kv_cache[:, :1].clone().expand(step.kv_cache.shape))


def _output_in_cache(step: EngineStep) -> _Call:
    """The output is in the memory of the cache."""
    cache, shape = step.kv_cache.clone(), step.output_shape
    whole = torch.empty(0, dtype=step.spec.dtype, device=step.device).set_(cache.untyped_storage())
    require(whole.numel() >= math.prod(shape), "the step's cache is smaller than its output")
    return _Call(whole[: math.prod(shape)].view(shape), cache)


def overlaps(target: BackendUnderTest) -> Iterator[Check]:
    """Outputs over inputs, and outputs and caches over themselves."""
    base = target.base
    if base.returns_lse or base.output_quant is not None:
        return
    row = base.num_heads * output_size(base)
    kinds: dict[str, Callable[[EngineStep], _Call]] = {}
    for name in ("query", "key", "value"):
        kinds[f"output over {name}"] = _output_over(name, 0)
        kinds[f"output over {name}, a row later"] = _output_over(name, row)
    kinds["output that is one row"] = _expanded_output
    kinds["output with rows that overlap"] = _overlapping_rows
    if base.block_size is not None:
        kinds["cache that is one block"] = _expanded_cache
        if base.mla is None:
            kinds["cache with its keys over its values"] = _keys_over_values
        if base.kv_cache_dtype == "auto":
            kinds["output in the cache"] = _output_in_cache
    shows = "Overlapping memory gives the right result, or is rejected before anything is written."
    for kind, make in kinds.items():
        yield Check(kind, shows, base, partial(_right_or_rejected, target, make))


def _right_or_rejected(
    target: BackendUnderTest, make: Callable[[EngineStep], _Call]
) -> ErrorBound | None:
    step = target.step(target.base)
    call = make(step)
    written = {"output": call.output, "cache": call.cache}
    before = {name: (t, t.clone()) for name, t in written.items() if t is not None}
    given = {} if call.output is None else {"output": call.output}
    try:
        done = target.forward(step, call.cache, may_change=call.shared, **given)
    except InvalidInputError:
        for name, (tensor, copy) in before.items():
            require(
                same_bits(tensor, copy),
                f"the call was rejected after the {name} had been written",
            )
        return None
    separate = target.forward(target.step(target.base)).cache
    require(
        separate is None or same_bits(done.cache, separate),
        "memory that overlaps was not rejected, and what is written to the cache is wrong",
    )
    return target.judge(step, done)
