"""Layers whose keys are split over the ranks of a group: what the layer itself knows of that.

The rest is in `distributed`, which is above this layer: the user makes a ContextParallel and gives
it to `Attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.cascade import bind_cascade, check_cascade
from attn_dispatch.selection.report import Selection
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["HasBackends", "SplitsKeys", "checked_split", "part_spec"]


@runtime_checkable
class SplitsKeys(Protocol):
    """What a layer calls on its context_parallel."""

    @property
    def size(self) -> int:
        """How many ranks share the keys."""

    def check(self, spec: AttentionSpec) -> None:
        """Raise UnsupportedError, with the reason, if the layer's keys cannot be split."""

    def call_spec(self, spec: AttentionSpec) -> AttentionSpec:
        """The spec with the heads of the queries and the output of a call."""

    def bind(
        self,
        spec: AttentionSpec,
        device: torch.device,
        context: SelectionContext,
        arguments: Mapping[str, Any],
    ) -> LayerBinding:
        """The backends of this rank's part, with an impl and a builder for whole batches."""

    def agree(self, prefix: str, bind: Callable[[], Mapping[str, str]]) -> None:
        """Bind a new layer on all ranks, or raise on all; `bind` returns its picks."""


def checked_split(context_parallel: Any, spec: AttentionSpec) -> SplitsKeys | None:
    """The argument of a layer, after its check.

    Raises:
        InvalidInputError: it is not a ContextParallel.
        UnsupportedError: the layer's keys cannot be split.
    """
    if context_parallel is None:
        return None
    if not isinstance(context_parallel, SplitsKeys) or isinstance(context_parallel, type):
        raise InvalidInputError(
            f"context_parallel is a {type(context_parallel).__name__}. Give a ContextParallel of "
            "a process group, or None."
        )
    context_parallel.check(spec)
    return context_parallel


def part_spec(spec: AttentionSpec, *, positions: bool = True) -> AttentionSpec:
    """The layer that computes one rank's part: all heads, over this rank's keys, with the LSE.

    Sinks and the quantization of the output come after the parts are merged. Steps that need
    positions are not captured.
    """
    return spec.replace(
        key_positions=positions,
        returns_lse=True,
        sinks=False,
        output_quant=None,
        cuda_graph=spec.cuda_graph and not positions,
    )


class HasBackends:
    """The backends of a layer: for its keys, or for this rank's part of them."""

    spec: AttentionSpec
    prefix: str
    context_parallel: SplitsKeys | None
    _binding: LayerBinding | None
    _is_cascade = False

    def _set_cascade(self, shared_prefix: bool) -> None:
        """Set whether a shared prefix is read once, after a check."""
        if not isinstance(shared_prefix, bool):
            raise InvalidInputError(f"shared_prefix={shown(shared_prefix)} is not True or False.")
        if shared_prefix and self.context_parallel is not None:
            raise UnsupportedError(
                "shared_prefix=True does not go with context_parallel: prefixes are shared there "
                "by blocks, and each request reads its part of them."
            )
        if shared_prefix:
            check_cascade(self.spec)
        self._is_cascade = shared_prefix

    @property
    def selections(self) -> dict[Phase, Selection]:
        """The backend of each phase, and why; empty until the layer is on a device.

        With context_parallel, of the part that a rank computes by the positions of its keys.
        """
        return {} if self._binding is None else self._binding.selections

    def _picks(self) -> dict[str, str]:
        return {str(phase): each.name for phase, each in self.selections.items()}

    def _require_binding(self) -> LayerBinding:
        if self._binding is None:
            raise InvalidInputError(
                f"Layer {self.prefix!r} was made on the meta device and has not run on another "
                "yet. Call it there first, or make it with device=."
            )
        return self._binding

    @property
    def split_impl(self) -> Any:
        """With context_parallel, what computes the layer's steps; else None."""
        if self.context_parallel is None or self._binding is None:
            return None
        return getattr(self._binding.impl, "_inner", self._binding.impl)  # MLAImpl wraps it

    @property
    def _selected_spec(self) -> AttentionSpec:
        """The spec that the backends are selected for."""
        return self.spec if self.context_parallel is None else part_spec(self.spec)

    def _binding_of(self, device: torch.device, context: SelectionContext) -> LayerBinding:
        bind = LayerBinding.of if self.context_parallel is None else self.context_parallel.bind
        if self._is_cascade:
            bind = bind_cascade
        return bind(self.spec, device, context, self._impl_arguments())

    def _impl_arguments(self) -> dict[str, Any]:
        """The arguments of an impl's constructor that the spec does not state."""
        raise NotImplementedError
