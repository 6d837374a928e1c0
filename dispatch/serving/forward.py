"""Forward: the forward passes of an engine's steps, and their tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from attn_dispatch.errors import UnsupportedError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.host_copies import pack_to_device
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


#: Tokens that only the device knows: each request's index into them, and (n,) int64.
Newest = tuple[dict[Request, int], torch.Tensor | None]


class Launched:
    """A step whose forward passes are queued on the device.

    Attributes:
        chunks: what it computes.
        replayed: whether it is the replay of a graph.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.replayed = False
        self._choices: list[Choice] = []

    def add(self, chunks: Sequence[Chunk], logits: torch.Tensor, replayed: bool) -> None:
        """Queue the choice of the tokens after these chunks.

        Args:
            chunks: of one forward pass.
            logits, replayed: what Forward.run returned for them.
        """
        self.chunks += chunks
        self.replayed |= replayed
        asked = [chunk for chunk in chunks if chunk.is_last]
        if asked:
            self._choices.append(Choice(logits, asked))
        for chunk in chunks:
            chunk.request.num_computed = chunk.end
            chunk.request.num_pending += chunk.is_last

    @property
    def newest(self) -> Newest | None:
        """The tokens that it chooses, if the next step can run with them."""
        if not self._choices:
            return {}, None
        choice = self._choices[0]
        if len(self._choices) > 1 or not choice.is_known_on_device:
            return None
        return {chunk.request: row for row, chunk in enumerate(choice.chunks)}, choice.greedy

    def read(self) -> dict[Request, list[int]]:
        """The new tokens of each request that gets some; waits for the device."""
        return {
            chunk.request: tokens
            for choice in self._choices
            for chunk, tokens in zip(choice.chunks, choice.read(), strict=True)
        }

    def unfinished(self) -> list[Chunk]:
        """The chunks of requests that have not ended since the step was queued."""
        return [chunk for chunk in self.chunks if chunk.request.finish_reason is None]


class Forward:
    """Runs a model on chunks of requests, as a replay of a CUDA graph where one fits.

    Args:
        model: see LanguageModel; with bound caches.
        block_size: tokens per block.
        draft_tokens: the most drafts of a request in a step.

    Attributes:
        graphs: the captured steps, or None.
    """

    def __init__(self, model: LanguageModel, block_size: int, draft_tokens: int = 0) -> None:
        self._model, self._block_size = model, block_size
        self._draft_tokens = draft_tokens
        self._tables = BlockTables()
        self.graphs: CapturedSteps | None = None

    def capture(self, limits: Limits) -> None:
        """Capture steps into graphs, if the layers can be; each is run once before."""
        layers = list(self._model.layers.values())
        if self._model.states or not all(layer.spec.cuda_graph for layer in layers):
            return
        self._warm_up(limits)
        assert limits.max_tokens is not None
        assert limits.max_seq_len is not None
        try:
            self.graphs = CapturedSteps(
                self._model.logits,
                layers,
                max_requests=limits.max_requests,
                max_tokens=min(_MAX_CAPTURED_TOKENS, limits.max_tokens),
                max_seq_len=limits.max_seq_len,
                smallest=getattr(self._model, "smallest_step", 1),
                draft_tokens=self._draft_tokens,
            )
        except UnsupportedError:
            self.graphs = None  # a backend has no graphs for these layers; steps run eagerly
        except RuntimeError as error:  # the model's own code waits for the device, for example
            self.graphs = None
            warnings.warn(
                f"Steps are not captured, and run eagerly: {summary_of(error)}", stacklevel=4
            )

    def _warm_up(self, limits: Limits) -> None:
        """Run prompts and decodes, so that kernels are compiled and backends final.

        The first step is as large as steps are, since compilers suit a kernel to its first sizes.
        """
        assert limits.max_tokens is not None
        assert limits.max_seq_len is not None
        assert limits.num_blocks is not None
        # Two requests if they fit: a decode of one is not captured with compiled layers.
        share = limits.max_tokens // min(2, limits.max_requests)
        length = max(1, min(limits.max_seq_len, share))
        columns = -(-length // self._block_size)
        count = min(limits.max_tokens // length, limits.num_blocks // columns, limits.max_requests)
        prompts, decodes = [], []
        for index in range(count):
            dummy = Request(-1 - index, [0] * length, length)
            dummy.blocks = list(range(index * columns, (index + 1) * columns))
            prompts.append(Chunk(dummy, 0, length, is_last=True))
            decodes.append(Chunk(dummy, length - 1, length, is_last=True))
        for chunks in (prompts, decodes[:2]):
            self.run(chunks)
        for chunk in prompts:
            self.forget(chunk.request.index)

    def forget(self, index: int) -> None:
        """Drop what is kept of a request that is finished."""
        self._tables.forget(index)
        if self._model.states is not None:
            self._model.states.forget(index)

    def run(
        self, chunks: Sequence[Chunk], newest: Newest = ({}, None)
    ) -> tuple[torch.Tensor, bool]:
        """Run one forward pass.

        Args:
            chunks: of the requests.
            newest: the tokens of chunks that are pending.

        Returns:
            The logits after each chunk that is_last, and before that after each token before a
            draft; the next replay of a graph overwrites them. And whether a graph was replayed.
        """
        batch = AttentionBatch.create(
            [chunk.end - chunk.start for chunk in chunks],
            [chunk.end for chunk in chunks],
            block_table=self._tables.of([chunk.request for chunk in chunks]),
            block_size=self._block_size,
            device=self._model.device,
            max_decode_query_len=1 + self._draft_tokens,
        )
        inputs = self._inputs(chunks, newest)
        logits = None if self.graphs is None else self.graphs.run(batch, *inputs)
        if logits is not None:
            return logits, True
        with torch.inference_mode(), forward_context(batch), self._states_of(chunks):
            return self._model.logits(*inputs), False

    def _inputs(self, chunks: Sequence[Chunk], newest: Newest) -> list[torch.Tensor]:
        """Token ids, positions, and the rows that logits are asked for."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        sources: list[int] = []
        rows_of, tokens = newest
        for chunk in chunks:
            if chunk.is_pending:
                places.append(len(token_ids))
                sources.append(rows_of[chunk.request])
                token_ids.append(0)
            else:
                token_ids += chunk.request.token_ids[chunk.start : chunk.known_end]
            token_ids += chunk.drafts
            positions += range(chunk.start, chunk.end)
            if chunk.is_last:
                rows += range(len(token_ids) - 1 - len(chunk.drafts), len(token_ids))
        lists = (token_ids, positions, rows, places, sources)
        tensors = [torch.tensor(each, dtype=torch.int64, device="cpu") for each in lists]
        ids, *inputs, to, source = pack_to_device(self._model.device, *tensors)
        if places:
            assert tokens is not None
            ids.index_copy_(0, to, tokens[source])
        return [ids, *inputs]

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
