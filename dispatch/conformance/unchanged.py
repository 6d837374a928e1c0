"""Whether a forward leaves its inputs unchanged: it may write only the cache and the output."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.tolerance import require
from attn_dispatch.interface.key_positions import KeyPositions

__all__ = ["inputs_unchanged", "memory_of"]


@contextlib.contextmanager
def inputs_unchanged(step: EngineStep, may_change: tuple[str, ...] = ()) -> Iterator[None]:
    """Check that the forward within it modifies no input; gaps between rows are checked too.

    Args:
        step: the step.
        may_change: names of inputs that may change.

    Raises:
        CheckFailed: some inputs changed; the message names them.
    """
    before = {name: _copy(value) for name, value in _inputs(step)}
    yield
    changed = [
        name
        for name, now in _inputs(step)
        if name not in may_change and not _is_same(before[name], now)
    ]
    require(
        not changed,
        f"forward modified its inputs: {', '.join(changed)}. It may write only the cache and the "
        "output",
    )


def _inputs(step: EngineStep) -> Iterator[tuple[str, Any]]:
    for name in ("query", "key", "value", "slopes", "sinks", "kv_b_proj"):
        yield name, getattr(step, name, None)
    for name in ("_k_scale", "_v_scale", "_k_scale_float", "_v_scale_float"):
        yield f"layer.{name}", getattr(step.layer, name)
    for field in dataclasses.fields(step.batch):
        value = getattr(step.batch, field.name)
        if isinstance(value, KeyPositions):
            for name, each in vars(value).items():
                yield f"batch.{field.name}.{name}", each
        else:
            yield f"batch.{field.name}", value


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor is a view of."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value, memory_of(value).clone()
    return copy.deepcopy(value)


def _is_same(before: Any, now: Any) -> bool:
    if not isinstance(now, torch.Tensor):
        # The floats of scales for each head are NaN, which is not equal to itself.
        return bool(before == now) or bool(before != before and now != now)  # noqa: PLR0124
    tensor, memory = before
    return now is tensor and torch.equal(memory, memory_of(now))
