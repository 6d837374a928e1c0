"""Looking: runs of a few tokens that show a model's layers, and what its code depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers.calls import NoKeysCache, run_as
from attn_dispatch.integrations.transformers.states import RecurrentStates
from attn_dispatch.interface.spec import MLADims

__all__ = ["Looking", "SeenLayer"]

#: Tokens of a run.
_LEN = 4
#: Differences, relative to the largest element, that are rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
#: The longest context that is tried where a model states none.
_LONGEST = 1 << 20
#: Models that cannot be trusted with as many tokens are rejected.
_SHORTEST = 64


@dataclass(frozen=True)
class SeenLayer:
    """A layer, as the run that looks at the layers sees it.

    Attributes:
        module: its attention module.
        num_heads, num_kv_heads, head_size, head_size_v, dtype: of the tensors on this rank.
        sinks: its tensor, or None.
        source: the index of the layer whose keys it reads; None for its own.
        latent_idx: its index in the cache, if it stores latents.
    """

    module: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype
    sinks: torch.Tensor | None
    source: int | None
    latent_idx: int | None


class _Look:
    """A run that only looks at the layers; its outputs are zeros."""

    def __init__(self, latent_sizes: Mapping[int, MLADims]) -> None:
        self.seen: list[SeenLayer] = []
        self._latent_sizes = latent_sizes
        self._latent: int | None = None
        self._keys: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> Any:
        dims = self._latent_sizes.get(len(self.seen))
        if dims is not None:
            sizes = (key.shape[1], key.shape[-1], value.shape[-1])
            if sizes == (1, dims.kv_lora_rank, dims.qk_rope_head_dim):
                self._latent = layer_idx
        return key, value

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        # A layer that shares another's keys gets the same tensor.
        source = next((i for i, known in enumerate(self._keys) if known is key), None)
        self._keys.append(key)
        self.tensors += [query, key, value]
        self.seen.append(
            SeenLayer(
                module=module,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_size=query.shape[-1],
                head_size_v=value.shape[-1],
                dtype=query.dtype,
                sinks=arguments.get("s_aux"),
                source=source,
                latent_idx=self._latent,
            )
        )
        self._latent = None
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


class Looking:
    """Runs a model without attention, to see what it does.

    Args:
        forward: `forward(token_ids, positions, rows)` runs the model; see PagedModel.logits.
        cache: what the model gets as its cache.
        states: of its layers without attention.
        latent_sizes: the sizes of latent layers, by the number of their call.
        device: of the model.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        cache: NoKeysCache,
        states: RecurrentStates,
        latent_sizes: Mapping[int, MLADims],
        device: torch.device,
    ) -> None:
        self._forward, self._cache, self._states = forward, cache, states
        self._latent_sizes = latent_sizes
        self._tokens = torch.arange(_LEN, device=device)

    def layers(self, count: int) -> list[SeenLayer]:
        """The attention layers, in the order of their calls.

        Raises:
            UnsupportedError: there are more or fewer than `count`; or a prompt in parts gives other
                results than at once, because of a state that is not in the cache.
        """
        look, whole = self._run([self._tokens])
        if self._states.layers:
            _, parts = self._run(list(self._tokens.split([2, 1, 1])))
            if not _is_close(parts, whole):
                raise UnsupportedError(
                    "This model gives other results if a prompt is computed in parts, so it keeps "
                    "a state that the engine does not see."
                )
        if len(look.seen) != count:
            raise UnsupportedError(
                f"This model's forward pass has {len(look.seen)} calls of attention, and {count} "
                "layers are known. The engine does not run it."
            )
        return look.seen

    def trusted_length(self, limit: int | None) -> int | None:
        """The most tokens of a request and of a step with right results; None for any number.

        Code that counts tokens from the cache's length, and does not use the positions that it is
        given, is wrong for requests that share a row. It is found by results that depend on that
        length, e.g. those of Llama 4, which scales queries once every 8,192 positions.

        Args:
            limit: the longest request that the model was made for, or None.

        Raises:
            UnsupportedError: already a short length changes the results.
        """
        expected = self._results(0)
        wrong = limit or _LONGEST
        if self._is_right(expected, wrong):
            return None
        right = 0
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if self._is_right(expected, middle):
                right = middle
            else:
                wrong = middle
        if right < _SHORTEST:
            raise UnsupportedError(
                "This model's code takes positions from the length of its cache, and not those "
                "that it is given, so several requests cannot share a step."
            )
        return right

    def _is_right(self, expected: list[torch.Tensor], past: int) -> bool:
        try:
            found = self._results(past)
        except (IndexError, RuntimeError):  # positions beyond a table
            return False
        return all(map(_is_close, found, expected))

    def _results(self, past: int) -> list[torch.Tensor]:
        """What the layers get, and the logits, if the cache claims to hold this many tokens."""
        self._cache.past = past
        try:
            look, logits = self._run([self._tokens])
        finally:
            self._cache.past = 0
        return [*look.tensors, logits]

    def _run(self, pieces: list[torch.Tensor]) -> tuple[_Look, torch.Tensor]:
        """The last run, and the logits after the last token."""
        for piece in pieces:
            look = _Look(self._latent_sizes)
            last = torch.full_like(piece[:1], len(piece) - 1)
            with run_as(look), self._states.step([-1]), torch.no_grad():
                logits = self._forward(piece, piece, last)
        self._states.forget(-1)
        return look, logits


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (found - expected).abs().max()
    return bool(difference <= _ROUNDING.get(expected.dtype, 0.0) * expected.abs().max())
