"""Forward: the forward passes of an engine's steps, and their tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from attn_dispatch.errors import UnsupportedError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.host_copies import pack_to_device, to_device
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.serving.blocks import BlockTables
from attn_dispatch.serving.graphs import CapturedSteps
from attn_dispatch.serving.limits import Limits
from attn_dispatch.serving.requests import Request
from attn_dispatch.serving.sampling import Choice
from attn_dispatch.serving.scheduler import Chunk

__all__ = ["Forward", "LanguageModel", "Launched"]

#: Steps with prompts are captured up to this many tokens. Longer ones keep a GPU busy without.
_MAX_CAPTURED_TOKENS = 256


class LanguageModel(Protocol):
    """What an Engine runs. `integrations.transformers.PagedModel` is one.

    Attributes:
        layers: its attention layers by name; the engine binds their caches.
        device: where it runs.
        max_seq_len: the most tokens of a request, or None for no limit.
        max_step_tokens: the most new tokens of a step, or None for no limit.
        states: None, or the RecurrentStates of layers without attention. Then each call of `logits`
            has one request, or one token of each of several.
    """

    layers: dict[str, Attention]
    device: torch.device
    max_seq_len: int | None
    max_step_tokens: int | None
    states: Any

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """(len(rows), vocab_size): the logits after these of the step's tokens.

        token_ids, positions: (num_tokens,) int64; rows: int64 indices. It is called in the step's
        forward_context, and its attention layers find their batch there.
        """


class Launched:
    """A step whose forward passes are queued on the device.

    Attributes:
        chunks: what it computes.
        replayed: whether it is the replay of a graph.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.replayed = False
        self._choices: list[tuple[list[Request], Choice]] = []

    def add(
        self,
        chunks: Sequence[Chunk],
        logits: torch.Tensor,
        replayed: bool,
        *,
        choose_all: bool = False,
    ) -> None:
        """Queue the choice of the tokens after these chunks.

        Args:
            chunks: of one forward pass.
            logits, replayed: what Forward.run returned for them.
            choose_all: all of them do, though not all tokens are known yet.
        """
        self.chunks += chunks
        self.replayed |= replayed
        asked = [chunk.request for chunk in chunks if choose_all or chunk.is_last]
        if asked:
            self._choices.append((asked, Choice(logits, asked)))

    @property
    def tokens(self) -> torch.Tensor | None:
        """(len(chunks),) int64 on the device, if each chunk gets its most likely token."""
        if len(self._choices) != 1:
            return None
        asked, choice = self._choices[0]
        return choice.greedy if len(asked) == len(self.chunks) and choice.is_greedy else None

    def read(self) -> dict[Request, int]:
        """The new token of each request that gets one; waits for the device."""
        return {
            request: token
            for asked, choice in self._choices
            for request, token in zip(asked, choice.read(), strict=True)
        }

    def unfinished(self) -> list[Chunk]:
        """The chunks of requests that have not ended since the step was queued."""
        return [chunk for chunk in self.chunks if chunk.request.finish_reason is None]


class Forward:
    """Runs a model on chunks of requests, as a replay of a CUDA graph where one fits.

    Args:
        model: see LanguageModel; with bound caches.
        block_size: tokens per block.

    Attributes:
        graphs: the captured steps, or None.
    """

    def __init__(self, model: LanguageModel, block_size: int) -> None:
        self._model, self._block_size = model, block_size
        self._tables = BlockTables()
        self.graphs: CapturedSteps | None = None

    def capture(self, limits: Limits) -> None:
        """Capture steps into graphs, if the layers can be; each is run once before."""
        layers = list(self._model.layers.values())
        if self._model.states or not all(layer.spec.cuda_graph for layer in layers):
            return
        self._warm_up()
        assert limits.max_tokens is not None
        assert limits.max_seq_len is not None
        try:
            self.graphs = CapturedSteps(
                self._model.logits,
                layers,
                max_requests=limits.max_requests,
                max_tokens=min(_MAX_CAPTURED_TOKENS, limits.max_tokens),
                max_seq_len=limits.max_seq_len,
            )
        except UnsupportedError:
            self.graphs = None  # a backend has no graphs for these layers; steps run eagerly
        except RuntimeError as error:  # the model's own code waits for the device, for example
            self.graphs = None
            warnings.warn(
                f"Steps are not captured, and run eagerly: {summary_of(error)}", stacklevel=4
            )

    def _warm_up(self) -> None:
        """Run a prompt and a decode, so that kernels are compiled and backends final."""
        dummy = Request(-1, [0] * 3, 2)
        dummy.blocks = list(range(-(-3 // self._block_size)))
        for chunk in (Chunk(dummy, 0, 2), Chunk(dummy, 2, 3)):
            self.run([chunk])
        self.forget(dummy.index)

    def forget(self, index: int) -> None:
        """Drop what is kept of a request that is finished."""
        self._tables.forget(index)
        if self._model.states is not None:
            self._model.states.forget(index)

    def run(
        self, chunks: Sequence[Chunk], newest: tuple[torch.Tensor, list[int]] | None = None
    ) -> tuple[torch.Tensor, bool]:
        """Run one forward pass.

        Args:
            chunks: of the requests.
            newest: for chunks of one token, which the host does not know yet: a tensor with the
                tokens on the device, and the index of each chunk's.

        Returns:
            The logits after each chunk that ends its request's tokens, or with `newest` after all;
            the next replay of a graph overwrites them. And whether a graph was replayed.
        """
        device = self._model.device
        batch = AttentionBatch.create(
            [chunk.end - chunk.start for chunk in chunks],
            [chunk.end for chunk in chunks],
            block_table=self._tables.of([chunk.request for chunk in chunks]),
            block_size=self._block_size,
            device=device,
        )
        if newest is None:
            inputs = self._inputs(chunks, device)
        else:
            tokens, rows = newest
            starts, index = torch.tensor([[chunk.start for chunk in chunks], rows], device="cpu")
            if len(rows) < len(tokens):
                tokens = tokens[to_device(index, device)]
            positions = to_device(starts, device)
            inputs = [tokens, positions, torch.arange(len(chunks), device=device)]
        logits = None if self.graphs is None else self.graphs.run(batch, *inputs)
        if logits is not None:
            return logits, True
        with torch.inference_mode(), forward_context(batch), self._states_of(chunks):
            return self._model.logits(*inputs), False

    def _inputs(self, chunks: Sequence[Chunk], device: torch.device) -> list[torch.Tensor]:
        """Token ids, positions, and the rows that logits are asked for."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            token_ids += chunk.request.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            if chunk.is_last:
                rows.append(len(token_ids) - 1)
        tensors = [torch.tensor(x, dtype=torch.int64) for x in (token_ids, positions, rows)]
        return pack_to_device(device, *tensors)

    def _states_of(self, chunks: Sequence[Chunk]) -> contextlib.AbstractContextManager[None]:
        states = self._model.states
        if states is None:
            return contextlib.nullcontext()
        for chunk in chunks:
            if chunk.start == 0:
                states.forget(chunk.request.index)
        step: contextlib.AbstractContextManager[None] = states.step(
            [chunk.request.index for chunk in chunks]
        )
        return step
