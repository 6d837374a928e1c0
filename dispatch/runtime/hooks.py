"""Observers of a layer's calls. An observer is imported when the environment enables it."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from attn_dispatch import environment

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Observation", "observer"]

#: What `ATTN_DISPATCH_CHECK=shadow` installs: module, function.
_SHADOW = ("attn_dispatch.conformance.shadow", "begin_shadow")


class Observation(Protocol):
    """One call that is being observed, from before it runs until its result is there."""

    def compare(
        self,
        result: Any,
        metadata: Any,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
    ) -> None:
        """Examine the result of the call. It raises nothing."""


def observer() -> Callable[..., Observation | None] | None:
    """The observer that the environment enables now, or None.

    It is called before a layer's call with the layer, query, key, value, cache and batch, and
    returns None for a call that it skips.
    """
    return _load(*_SHADOW) if environment.shadow_interval() else None


@functools.cache
def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
