"""Observers of a layer's calls. An observer is imported when the environment enables it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attn_dispatch import environment

__all__ = ["Observation", "observer"]

#: The module of the observer that `ATTN_DISPATCH_CHECK=shadow` enables. It is in a higher layer.
_SHADOW = "attn_dispatch.conformance.shadow"


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
    if not environment.shadow_interval():
        return None
    begin: Callable[..., Observation | None] = importlib.import_module(_SHADOW).begin_shadow
    return begin
