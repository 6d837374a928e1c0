"""Whether a forward leaves its inputs as they are: only the cache and the output are written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from attn_dispatch.conformance.cases import Step
from attn_dispatch.conformance.findings import require

__all__ = ["Inputs"]


class Inputs:
    """What a step gives to a backend, as it was when this was made.

    Of a tensor all of its memory is kept, also what lies between its rows.

    Args:
        step: the step.
        but_for: inputs that may change, by name.
    """

    def __init__(self, step: Step, but_for: tuple[str, ...] = ()) -> None:
        self._step, self._but_for = step, but_for
        self._before = {name: _copy(value) for name, value in self._inputs()}

    def _inputs(self) -> Iterator[tuple[str, Any]]:
        step = self._step
        for name in ("query", "key", "value", "slopes", "sinks"):
            yield name, getattr(step, name)
        for name in ("_k_scale", "_v_scale", "_k_scale_float", "_v_scale_float"):
            yield f"layer.{name}", getattr(step.layer, name)
        for field in dataclasses.fields(step.batch):
            yield f"batch.{field.name}", getattr(step.batch, field.name)

    @property
    def changed(self) -> list[str]:
        """The names of the inputs that are no longer what they were."""
        return [
            name
            for name, now in self._inputs()
            if name not in self._but_for and not _is_same(self._before[name], now)
        ]

    def require_unchanged(self) -> None:
        """Check that every input is what it was.

        Raises:
            CheckFailed: one is not; it says which.
        """
        changed = self.changed
        require(
            not changed,
            f"forward modified its inputs: {', '.join(changed)}. It may write the cache and the "
            "output, and nothing else",
        )


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor is a view of."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value, _memory(value).clone()
    return copy.deepcopy(value)


def _is_same(before: Any, now: Any) -> bool:
    if not isinstance(now, torch.Tensor):
        # The floats of scales for each head are NaN, which is not equal to itself.
        return bool(before == now) or bool(before != before and now != now)  # noqa: PLR0124
    tensor, memory = before
    return now is tensor and torch.equal(memory, _memory(now))
