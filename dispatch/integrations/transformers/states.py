"""RecurrentStates: what layers without softmax attention keep of each request.

Linear attention, Mamba and short convolutions keep a state of fixed size. transformers' own cache
layers hold it, one for each request and layer; for a step with several requests they are joined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from attn_dispatch.errors import UnsupportedError

__all__ = ["RecurrentStates"]

#: The kinds of state of a LinearAttentionLayer, which are equally named attributes.
_KINDS = ("conv", "recurrent")


class RecurrentStates:
    """The states of all requests.

    Attributes:
        layers: indices of the layers that have used a state so far.
    """

    def __init__(self) -> None:
        self._of: dict[int, dict[int, Any]] = {}
        self._requests: Sequence[int] = ()
        self._joined: dict[int, Any] = {}
        self.layers: set[int] = set()

    @property
    def num_requests(self) -> int:
        """Requests of the step that is running."""
        return len(self._requests)

    @contextlib.contextmanager
    def step(self, requests: Sequence[int]) -> Iterator[None]:
        """Run a step of one request, or of one token of each of several that have states.

        If it raises, the states are not to be trusted.
        """
        self._requests, self._joined = requests, {}
        try:
            yield
            if len(requests) > 1:
                self._split()
        finally:
            self._requests, self._joined = (), {}

    def forget(self, request: int) -> None:
        """Drop the states of a request that is finished or starts again."""
        self._of.pop(request, None)

    def layer(self, layer_idx: int, state_idx: int = 0) -> Any:
        """transformers' cache layer for the step's requests.

        Raises:
            UnsupportedError: the layer has several states.
        """
        if state_idx:
            raise UnsupportedError(
                f"Layer {layer_idx} of this model keeps several states, which the engine does not."
            )
        self.layers.add(layer_idx)
        if len(self._requests) == 1:
            own = self._of.setdefault(self._requests[0], {})
            if layer_idx not in own:
                own[layer_idx] = LinearAttentionLayer()
            return own[layer_idx]
        if layer_idx not in self._joined:
            self._joined[layer_idx] = _join([self._of[each][layer_idx] for each in self._requests])
        return self._joined[layer_idx]

    def _split(self) -> None:
        for layer_idx, joined in self._joined.items():
            for row, request in enumerate(self._requests):
                own = self._of[request][layer_idx]
                for kind in _KINDS:
                    states = getattr(joined, f"{kind}_states")[0]
                    if states is not None:
                        getattr(own, f"{kind}_states")[0].copy_(states[row : row + 1])


def _join(layers: Sequence[Any]) -> Any:
    """A cache layer with a row for each of these."""
    joined = LinearAttentionLayer()
    first = layers[0]
    joined.device, joined.dtype = first.device, first.dtype
    joined.has_previous_state[0] = True
    joined.conv_kernel_size[0] = first.conv_kernel_size[0]
    for kind in _KINDS:
        states = [getattr(each, f"{kind}_states")[0] for each in layers]
        if states[0] is not None:
            getattr(joined, f"{kind}_states")[0] = torch.cat(states)
            getattr(joined, f"is_{kind}_states_initialized")[0] = True
    return joined
