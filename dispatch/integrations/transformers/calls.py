"""What a model of transformers calls while a PagedModel runs it: attention, and the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.integrations.transformers.states import RecurrentStates

__all__ = ["NAME", "NAME_IN_COMPILED", "NoKeysCache", "Step", "register", "run_as"]

#: The name of the attention function. There is no mask function of this name, so that transformers
#: makes no masks.
NAME = "attn_dispatch_paged"
#: The same function for compiled layers, which do not compile what it calls.
NAME_IN_COMPILED = "attn_dispatch_paged_in_compiled"


class Step(Protocol):
    """What the attention function and the cache do during a run of the model."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> Any:
        """Take a layer's new keys and values, and return what the model goes on with."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        """The output, (rows, row_len, num_heads, head_size_v)."""


_running: ContextVar[Step | None] = ContextVar("attn_dispatch_paged_step", default=None)


@contextlib.contextmanager
def run_as(step: Step) -> Iterator[None]:
    """A context in which models run as this step."""
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)


def _current() -> Step:
    step = _running.get()
    if step is None:
        raise InvalidInputError(
            "This model's attention reads paged caches, so only its PagedModel can run it. Call "
            "model.set_attn_implementation('sdpa') to use it by itself again."
        )
    return step


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function; query, key, value: (rows, num_heads, row_len, head_size)."""
    return _current().attend(module, query, key, value, arguments), None


def register(*, in_compiled: bool = False) -> str:
    """Make the attention function known to transformers, and return its name."""
    if in_compiled:
        AttentionInterface.register(NAME_IN_COMPILED, torch.compiler.disable(_attention))
        return NAME_IN_COMPILED
    AttentionInterface.register(NAME, _attention)
    return NAME


class NoKeysCache(Cache):
    """A cache in transformers' sense. Keys and values stay in our paged caches instead."""

    is_compileable = False

    def __init__(self, states: RecurrentStates) -> None:
        super().__init__(layers=[])
        self._states = states
        self.past = 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> Any:
        """New keys and values of a layer, see Cache."""
        return _current().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`past`, which is 0 but for tests of a model: positions are given to it."""
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """See get_seq_length."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The length and offset of the keys, as if there were only new ones."""
        return query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the step's requests have a state, see Cache."""
        if layer_idx is None:
            layer_idx = min(self._states.layers, default=0)
        return bool(self._states.layer(layer_idx, state_idx or 0).has_previous_state[0])

    def is_recording_past(self, layer_idx: int | None = None) -> bool:
        """False: no states of earlier tokens are kept."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """The inputs that a short convolution still sees, see Cache."""
        layer = self._states.layer(layer_idx, state_idx)
        return layer.conv_states[0] if layer.has_previous_state[0] else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        """Keep new inputs of a convolution, see Cache."""
        return self._states.layer(layer_idx, state_idx).update_conv_state(conv_states, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """The state of a linear recurrence, see Cache."""
        layer = self._states.layer(layer_idx, state_idx)
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        """Keep the state of a linear recurrence, see Cache."""
        layer = self._states.layer(layer_idx, state_idx)
        return layer.update_recurrent_state(recurrent_states, **kwargs)
