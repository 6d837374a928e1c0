"""The context that an engine opens around a forward pass: it gives layers the step's batch.

A dataclass cannot pass through a custom op, so layers look their metadata up here. It is built once
per batch for all layers with the same spec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch

__all__ = ["ForwardContext", "current_context", "forward_context"]


class ForwardContext:
    """The batch of a step, or one for each layer by name, and the metadata built so far."""

    def __init__(self, batch: AttentionBatch | Mapping[str, AttentionBatch] | None) -> None:
        by_name = batch.values() if isinstance(batch, Mapping) else (batch,)
        for each in by_name:
            if each is not None and not isinstance(each, AttentionBatch):
                raise InvalidInputError(
                    f"forward_context got a {type(each).__name__}; it takes an AttentionBatch, a "
                    "mapping from layer names to them, or None for a profiling run."
                )
        self._batch = batch
        self._metadata: dict[Hashable, Any] = {}

    def batch_for(self, layer_name: str) -> AttentionBatch | None:
        """The batch of a layer; None in a profiling run.

        Raises:
            InvalidInputError: the context has batches by name, and none for this layer.
        """
        if not isinstance(self._batch, Mapping):
            return self._batch
        if layer_name not in self._batch:
            raise InvalidInputError(
                f"forward_context has no batch for layer {layer_name!r}; it has them for: "
                f"{', '.join(self._batch) or 'none'}."
            )
        return self._batch[layer_name]

    def metadata(
        self, layer_name: str, key: Hashable, build: Callable[[AttentionBatch], Any]
    ) -> Any:
        """The metadata of the layer's batch; None in a profiling run.

        It is built once for layers with equal keys.
        """
        batch = self.batch_for(layer_name)
        if batch is None:
            return None
        full_key = (key, id(batch))
        if full_key not in self._metadata:
            self._metadata[full_key] = build(batch)
        return self._metadata[full_key]


_current: ContextVar[ForwardContext | None] = ContextVar("attn_dispatch_forward", default=None)


@contextlib.contextmanager
def forward_context(
    batch: AttentionBatch | Mapping[str, AttentionBatch] | ForwardContext | None,
) -> Iterator[ForwardContext]:
    """Open the context of one forward pass, for this thread and asyncio task only.

    Args:
        batch: the step's batch; or layer name -> batch, where layers have block tables of their
            own (cross-attention, hybrid models). None for an engine's profiling run, before there
            is a cache: every layer's output is zeros, and no cache is read or written. A
            `GraphStep` is taken too, for the metadata of a CUDA graph.

    Raises:
        InvalidInputError: it is none of these.

    Example:
        >>> with forward_context(batch):
        ...     logits = model(token_ids, positions)
    """
    context = batch if isinstance(batch, ForwardContext) else ForwardContext(batch)
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def current_context() -> ForwardContext:
    """The context that is open.

    Raises:
        InvalidInputError: no context is open.
    """
    context = _current.get()
    if context is None:
        raise InvalidInputError(
            "An attention layer was called outside of forward_context. Open "
            "`with forward_context(batch):` around the model's forward, or give the layer "
            "attn_metadata=layer.build_metadata(batch)."
        )
    return context
