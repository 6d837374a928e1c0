"""Engine: serves a causal language model by continuous batching over one paged KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import AttnDispatchError, InvalidInputError, UnsupportedError
from attn_dispatch.runtime.kv_binding import bind_kv_caches
from attn_dispatch.runtime.kv_cache_plan import plan_kv_cache
from attn_dispatch.serving.blocks import BlockPool
from attn_dispatch.serving.forward import Forward, LanguageModel, Launched, Newest
from attn_dispatch.serving.limits import Limits, sized
from attn_dispatch.serving.requests import FinishReason, Request, Sampling
from attn_dispatch.serving.scheduler import Chunk, Scheduler, Stats
from attn_dispatch.serving.text import Text, TextStream

__all__ = ["Engine", "LanguageModel", "Piece"]


@dataclass(frozen=True)
class Piece:
    """New text of an answer.

    Attributes:
        request: which; finished if `request.finish_reason` is not None.
        text: what it adds to the answer.
    """

    request: Request
    text: str


class Engine:
    """Serves a language model.

    Each step is one forward pass over one token of every request that is decoding and chunks of
    the prompts that are not computed yet. Requests whose tokens begin in the same way share full
    blocks. If no block is free, the youngest request is swapped out to the host. On a GPU, decodes
    and short steps are replays of CUDA graphs where the backends can be captured.

    Args:
        model: see LanguageModel.
        tokenizer: of transformers; None if prompts are given as token ids.
        eos_ids: tokens that end an answer.
        limits: see Limits.
        use_graphs: whether to capture steps; None for on a GPU. The layers must have been made
            with cuda_graph=True.
        run_ahead: whether a step is queued before the tokens of the one before are on the host, so
            that the device does not wait for the host; None for on a GPU. Tokens are the same. Not
            while requests draw tokens, or are swapped out.
        draft_tokens: the most tokens of a request that are guessed from its own text and verified
            in one step, see PromptLookup; 0 for none. Tokens are the same, but for rounding. No
            step is queued ahead then. Not for models with states.
        clock: the time in seconds.

    Attributes:
        layers: the attention layers.
        block_size: tokens per block; with context parallelism, on all ranks together.
        limits: with the numbers that were None.
        stats: counters.
        finished: requests, in the order in which they ended.

    Raises:
        InvalidInputError: a limit is too small for a block, or larger than the memory.
        UnsupportedError: no layout of the cache is accepted by all layers; or draft_tokens are
            given for a model that has states.

    Example:
        >>> engine = load_engine("SmolLM2-135M-Instruct")
        >>> for request in engine.generate(["The capital of France is"]):
        ...     print(engine.text_of(request))
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any = None,
        *,
        eos_ids: Sequence[int] = (),
        limits: Limits | None = None,
        use_graphs: bool | None = None,
        run_ahead: bool | None = None,
        draft_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.clock = model, clock
        self.device = model.device
        self.text = Text(tokenizer)
        self.eos_ids = frozenset(eos_ids)
        self.stats = Stats()
        self.finished: list[Request] = []
        if as_int("draft_tokens", draft_tokens, 0) and model.states is not None:
            raise UnsupportedError(
                "This model keeps states, which cannot go back to before a wrong draft. Leave out "
                "draft_tokens."
            )
        self._num_added = 0
        self._failed = False
        plan = plan_kv_cache(model.layers)
        self.block_size = plan.tokens_per_block
        limits, num_host_blocks = sized(
            limits or Limits(),
            model.max_seq_len,
            model.max_step_tokens,
            self.block_size,
            plan.bytes_per_block,
            self.device,
        )
        self.limits = limits
        assert limits.num_blocks is not None
        assert limits.max_tokens is not None
        assert limits.max_seq_len is not None
        self._caches = plan.allocate(limits.num_blocks, self.device)
        self._plan, self._num_host_blocks = plan, num_host_blocks
        self._host_caches: dict[str, torch.Tensor] = {}
        bind_kv_caches(model.layers, self._caches)
        self.layers = list(model.layers.values())
        self._scheduler = Scheduler(
            # A state is that of all tokens before, and is not kept for each block.
            BlockPool(limits.num_blocks, self.block_size, keeps_content=model.states is None),
            BlockPool(num_host_blocks, self.block_size, keeps_content=False),
            self._swap,
            max_requests=limits.max_requests,
            max_tokens=limits.max_tokens,
            stats=self.stats,
            draft_tokens=draft_tokens,
        )
        self._forward = Forward(model, self.block_size, draft_tokens)
        if self.device.type == "cuda" if use_graphs is None else use_graphs:
            self._forward.capture(limits)
        self._ahead: Launched | None = None
        self._runs_ahead = self.device.type == "cuda" if run_ahead is None else run_ahead
        self._runs_ahead = self._runs_ahead and not draft_tokens

    def add(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
        sampling: Sampling | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt: text, which is not changed; token ids; or the messages of a chat, which the
                tokenizer's chat template makes a text of.
            sampling: None for the most likely tokens.

        Raises:
            InvalidInputError: the prompt is empty, or too long together with the answer.
        """
        sampling = sampling or Sampling()
        token_ids = self.text.encode(prompt)
        longest = len(token_ids) + sampling.max_new_tokens
        assert self.limits.max_seq_len is not None
        if not token_ids:
            raise InvalidInputError("The prompt has no tokens.")
        if longest > self.limits.max_seq_len:
            raise InvalidInputError(
                f"A prompt of {len(token_ids)} tokens with an answer of up to "
                f"{sampling.max_new_tokens} takes {longest}; the engine has room for requests of "
                f"{self.limits.max_seq_len}. Shorten it, lower max_new_tokens, or raise "
                "max_seq_len and the size of the cache where the model allows it."
            )
        request = Request(
            self._num_added, list(token_ids), len(token_ids), sampling, added_at=self.clock()
        )
        self._num_added += 1
        self._scheduler.waiting.append(request)
        return request

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun, or are swapped out."""
        return len(self._scheduler.waiting) + len(self._scheduler.swapped)

    @property
    def num_running(self) -> int:
        """Requests that have blocks on the device."""
        return len(self._scheduler.running)

    def step(self) -> list[Request]:
        """Run one forward pass, and append its new tokens to each request that gets some.

        Returns:
            These requests.

        Raises:
            InvalidInputError: an earlier step failed; the cache is not to be trusted after that.
        """
        if self._failed:
            raise InvalidInputError("An earlier step of this engine failed. Make a new one.")
        launched = self._next()
        if launched is None:
            return []
        self._ahead = self._launch_ahead(launched)
        self._failed = True
        tokens = launched.read()
        self._failed = False
        chunks = launched.unfinished()
        self._count(chunks)
        self.stats.replayed_steps += launched.replayed
        last = [chunk for chunk in chunks if chunk.is_last]
        for chunk in last:
            self._take(chunk, tokens[chunk.request])
        return [chunk.request for chunk in last]

    def _next(self) -> Launched | None:
        """The step that runs already, or else a new one; None if there is nothing to do."""
        launched, self._ahead = self._ahead, None
        if launched is not None and launched.unfinished():
            self.stats.steps_ahead += 1
            return launched
        chunks = self._scheduler.schedule()
        return self._launch(chunks) if chunks else None

    def _launch(self, chunks: list[Chunk], newest: Newest = ({}, None)) -> Launched:
        """Queue the forward passes of a step on the device."""
        self._failed = True
        launched = Launched()
        for group in self._groups(chunks):
            launched.add(group, *self._forward.run(group, newest))
        self._failed = False
        return launched

    def _launch_ahead(self, launched: Launched) -> Launched | None:
        """Queue the step after this one, before this one's tokens are known on the host.

        They stay on the device. A request that turns out to be finished has computed one token too
        many, which is dropped.
        """
        newest = launched.newest
        if not self._runs_ahead or newest is None or self.model.states is not None:
            return None
        chunks = self._scheduler.schedule() if self._scheduler.can_run_ahead() else []
        return self._launch(chunks, newest) if chunks else None

    def _groups(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """The chunks of each forward pass: all in one, if the model keeps no states."""
        if self.model.states is None:
            return [chunks]
        decodes = [chunk for chunk in chunks if chunk.start and chunk.end - chunk.start == 1]
        return [each for each in (decodes, *([c] for c in chunks if c not in decodes)) if each]

    def _count(self, chunks: Sequence[Chunk]) -> None:
        stats = self.stats
        stats.steps += 1
        stats.largest_batch = max(stats.largest_batch, len(chunks))
        stats.mixed_steps += len({chunk.known_end - chunk.start > 1 for chunk in chunks}) == 2
        for chunk in chunks:
            end = min(chunk.end, chunk.request.num_prompt_tokens)
            stats.prompt_tokens += max(0, end - chunk.start)

    def _take(self, chunk: Chunk, tokens: list[int]) -> None:
        """Append the tokens after a chunk to its request."""
        request = chunk.request
        request.num_pending -= 1
        if chunk.drafts:  # the keys of wrong ones are overwritten
            request.num_computed = chunk.known_end + len(tokens) - 1
            self.stats.accepted_tokens += len(tokens) - 1
        for token in tokens:
            if request.finish_reason is None:
                self._append(request, token)

    def _append(self, request: Request, token: int) -> None:
        """Append a token, and finish the request if it was the last."""
        request.token_ids.append(token)
        self.stats.new_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = self.clock()
        if token in self.eos_ids and not request.sampling.ignore_eos:
            self._finish(request, FinishReason.STOP)
        elif request.num_new_tokens == request.sampling.max_new_tokens:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason, request.finished_at = reason, self.clock()
        self._scheduler.finish(request)
        self._forward.forget(request.index)
        self.finished.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now; its answer is what there is."""
        if request.finish_reason is None:
            self._finish(request, FinishReason.CANCELLED)

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Request]:
        """Serve prompts, and return their finished requests in the same order.

        Args:
            prompts: as for `add`.
            sampling: for all of them, or one for each.
            on_step: called after each step.

        Raises:
            InvalidInputError: as for `add`; nothing is served then.
        """
        requests = self._add_all(prompts, sampling)
        while any(request.finish_reason is None for request in requests):
            self.step()
            on_step()
        return requests

    def stream(
        self,
        prompts: Sequence[Any],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> Generator[Piece, None, None]:
        """Serve prompts, and yield text as it is produced; the last piece of each may be empty.

        Args, Raises: as for `generate`. If the caller stops early, the rest is cancelled.
        """
        requests = self._add_all(prompts, sampling)
        texts = {id(request): TextStream(self.text) for request in requests}
        try:
            while any(request.finish_reason is None for request in requests):
                stepped = self.step()
                on_step()
                for request in stepped:
                    if id(request) in texts:
                        ids, is_last = self._text_ids(request), request.finish_reason is not None
                        piece = texts[id(request)].new_text(ids, is_last=is_last)
                        if piece or is_last:
                            yield Piece(request, piece)
        finally:
            for request in requests:
                self.cancel(request)

    def _add_all(
        self, prompts: Sequence[Any], sampling: Sampling | Sequence[Sampling] | None
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise InvalidInputError("prompts is one text. Give a list of prompts.")
        each = [sampling] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise InvalidInputError(f"{len(prompts)} prompts, and sampling for {len(each)}.")
        requests: list[Request] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, one))
        except AttnDispatchError as error:
            for request in requests:
                self._scheduler.finish(request)
            at = f"Prompt {len(requests) + 1} of {len(prompts)}, {shown(prompt)}: "
            raise InvalidInputError(f"{at}{error}") from error
        return requests

    def text_of(self, request: Request) -> str:
        """The answer as text, without the token that ended it."""
        return self.text.decode(self._text_ids(request))

    def _text_ids(self, request: Request) -> list[int]:
        ids = request.answer_ids
        return ids[:-1] if request.finish_reason is FinishReason.STOP else ids

    def _swap(self, src: Sequence[int], dst: Sequence[int], to_host: bool) -> None:
        # Allocated on the first preemption, which most runs never have.
        self._host_caches = self._host_caches or self._plan.allocate(self._num_host_blocks, "cpu")
        caches = (self._caches, self._host_caches)
        source, target = caches if to_host else caches[::-1]
        pairs = torch.tensor([list(src), list(dst)], dtype=torch.int64).T
        for layer in self.layers:
            if layer.kv_sharing_target_layer_name is None:
                # All backends copy blocks in the same way, so any of them will do.
                backend_cls = next(iter(layer.selections.values())).backend_cls
                backend_cls.swap_blocks(source[layer.prefix], target[layer.prefix], pairs)
