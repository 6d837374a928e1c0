"""A small serving engine over attn-dispatch: continuous batching on one paged KV cache.

Each step runs one forward pass: one token of every request in decode, and chunks of the prompts
that are not computed yet (chunked prefill). All requests share one prefix that is computed once:
its full blocks are shared, and its last, partial block is copied for each request. If no block is
free, the youngest request is swapped out to the host and resumed later. The scheduler has the
structure of vLLM's, reduced to what this demo needs.

On a GPU, steps are CUDA graphs where the backends can capture them: one for decodes, and one for
steps with chunks of prompts. Other steps run eagerly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.kv_binding import bind_kv_caches
from attn_dispatch.runtime.kv_cache_plan import plan_kv_cache
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.serving import tokenizer
from attn_dispatch.serving.graphs import CapturedSteps
from attn_dispatch.serving.model import DemoModel

__all__ = ["Engine", "EngineLimits", "EngineStats", "Request"]


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of the caches, and limits of a step.

    Attributes:
        num_blocks: blocks of the cache on the device; few, so that requests are preempted.
        num_host_blocks: blocks on the host, for requests that are swapped out.
        max_requests: requests in a step.
        max_tokens: new tokens in a step, over all requests.
        max_new_tokens: tokens in an answer.
    """

    num_blocks: int = 96
    num_host_blocks: int = 256
    max_requests: int = 16
    max_tokens: int = 128
    max_new_tokens: int = 9


@dataclass
class EngineStats:
    """Counters of the engine."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    largest_batch: int = 0
    mixed_steps: int = 0
    blocks_shared: int = 0
    blocks_copied: int = 0
    preemptions: int = 0
    blocks_swapped: int = 0
    replayed_steps: int = 0


@dataclass
class Request:
    """A request and its blocks.

    Attributes:
        token_ids: prompt and answer so far.
        num_prompt_tokens: this many of them are the prompt.
        num_computed: this many of them have keys and values in the cache.
        blocks: its blocks on the device, in order; the first `num_shared` belong to the prefix.
        host_blocks: the other blocks while it is swapped out.
    """

    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_shared: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_ready(self) -> int:
        """Tokens that can be computed: the rest of the prompt, or the newest token."""
        return len(self.token_ids) - self.num_computed


class Engine:
    """Serves a DemoModel.

    Args:
        model: on `device`.
        prefix_ids: the tokens that every prompt begins with.
        limits: see EngineLimits.
        backend: an override of the selected backends.
        block_size: tokens per block.
        use_graphs: capture steps into CUDA graphs, if the backends can; None for on a GPU.

    Raises:
        InvalidInputError: the cache is too small for the prefix.
        UnsupportedError: no backend, or not the required one, supports one of the layers.
    """

    def __init__(
        self,
        model: DemoModel,
        prefix_ids: Sequence[int],
        *,
        limits: EngineLimits | None = None,
        backend: str | None = None,
        block_size: int = 8,
        use_graphs: bool | None = None,
    ) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.limits = limits or EngineLimits()
        self.block_size = block_size
        self.stats = EngineStats()
        if use_graphs is None:
            use_graphs = self.device.type == "cuda"
        self._graphs: CapturedSteps | None = None
        self.layers, use_graphs = self._make_layers(backend, use_graphs)
        named = {layer.prefix: layer for layer in self.layers}
        specs = {name: layer.spec for name, layer in named.items()}
        plan = plan_kv_cache(specs, self.device, backend=backend)
        self._caches = plan.allocate(self.limits.num_blocks, self.device)
        self._host_caches = plan.allocate(self.limits.num_host_blocks, "cpu")
        bind_kv_caches(named, self._caches)
        # All backends copy and swap blocks in the same way, so any of them will do.
        self._backend_cls = next(iter(self.layers[0].selections.values())).backend_cls

        self._free = deque(range(self.limits.num_blocks))
        self._free_host = deque(range(self.limits.num_host_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.swapped: deque[Request] = deque()
        self.finished: list[Request] = []
        self._prefix = Request(-1, list(prefix_ids), len(prefix_ids))
        self._compute_prefix()
        if use_graphs:  # after a step that ran eagerly: by now the layers have their backends
            self._graphs = CapturedSteps(
                self._logits,
                self.layers,
                max_requests=self.limits.max_requests,
                max_tokens=self.limits.max_tokens,
                max_seq_len=self.limits.num_blocks * block_size,
            )

    def _make_layers(self, backend: str | None, use_graphs: bool) -> tuple[list[Attention], bool]:
        """The layers, and whether their steps can be captured."""
        config = self.model.config
        try:
            layers = [
                Attention(
                    config.num_heads,
                    config.head_size,
                    config.scale,
                    config.num_kv_heads,
                    sliding_window=layer.sliding_window,
                    logits_soft_cap=layer.logits_soft_cap,
                    prefix=f"layers.{index}",
                    dtype=self.model.embedding.weight.dtype,
                    device=self.device,
                    block_size=self.block_size,
                    cuda_graph=use_graphs,
                    backend=backend,
                )
                for index, layer in enumerate(config.layers)
            ]
        except UnsupportedError:
            if not use_graphs:
                raise
            return self._make_layers(backend, False)
        return layers, use_graphs

    def add(self, index: int, prompt_ids: Sequence[int]) -> None:
        """Queue a request.

        Raises:
            InvalidInputError: the prompt does not continue the prefix, or is too long.
        """
        prefix = self._prefix.token_ids
        longest = len(prompt_ids) + self.limits.max_new_tokens
        if list(prompt_ids[: len(prefix)]) != prefix or len(prompt_ids) == len(prefix):
            raise InvalidInputError("A prompt must continue the engine's prefix.")
        if self._blocks_for(longest) > self.limits.num_blocks - self._blocks_for(len(prefix)):
            raise InvalidInputError(
                f"A request of {longest} tokens does not fit into {self.limits.num_blocks} blocks "
                f"of {self.block_size}. Raise num_blocks."
            )
        self.waiting.append(Request(index, list(prompt_ids), len(prompt_ids)))

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running or self.swapped)

    def step(self) -> None:
        """Resume and admit what fits, run one forward pass, and append the predicted tokens."""
        self._resume()
        self._admit()
        chunks = self._schedule()
        if not chunks:
            return
        next_ids = self._forward(chunks)
        self.stats.steps += 1
        self.stats.largest_batch = max(self.stats.largest_batch, len(chunks))
        kinds = {request.num_ready == 1 and bool(request.answer_ids) for request, _ in chunks}
        self.stats.mixed_steps += len(kinds) == 2
        for (request, num_tokens), next_id in zip(chunks, next_ids, strict=True):
            self._advance(request, num_tokens, next_id)

    def _advance(self, request: Request, num_tokens: int, next_id: int) -> None:
        """Record computed tokens; once the prompt is computed, append the predicted token."""
        in_prompt = max(0, min(num_tokens, request.num_prompt_tokens - request.num_computed))
        self.stats.prompt_tokens += in_prompt
        request.num_computed += num_tokens
        if request.num_computed < len(request.token_ids):
            return
        request.token_ids.append(next_id)
        self.stats.new_tokens += 1
        if next_id == tokenizer.END_ID or len(request.answer_ids) == self.limits.max_new_tokens:
            self.running.remove(request)
            self._free.extend(request.blocks[request.num_shared :])
            self.finished.append(request)

    def _compute_prefix(self) -> None:
        """Prefill the prefix, in chunks like any prompt."""
        prefix = self._prefix
        while prefix.num_computed < len(prefix.token_ids):
            num_tokens = min(prefix.num_ready, self.limits.max_tokens)
            if not self._grow(prefix, num_tokens):
                raise InvalidInputError("The prefix does not fit into the cache. Raise num_blocks.")
            self._forward([(prefix, num_tokens)])
            prefix.num_computed += num_tokens
            self.stats.prompt_tokens += num_tokens

    def _admit(self) -> None:
        """Start waiting requests on the prefix's blocks while blocks are free."""
        prefix = self._prefix
        shared = prefix.blocks[: len(prefix.token_ids) // self.block_size]
        partial = prefix.blocks[len(shared) :]
        pairs = []
        while self.waiting and len(self.running) < self.limits.max_requests and not self.swapped:
            if len(self._free) < len(partial) + 1:
                break
            request = self.waiting.popleft()
            own = [self._free.popleft() for _ in partial]
            pairs += list(zip(partial, own, strict=True))
            request.blocks = [*shared, *own]
            request.num_shared = len(shared)
            request.num_computed = len(prefix.token_ids)
            self.stats.blocks_shared += len(shared)
            self.running.append(request)
        if pairs:
            self._backend_cls.copy_blocks(list(self._caches.values()), torch.tensor(pairs))
            self.stats.blocks_copied += len(pairs)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give a request the blocks for its next tokens; False if not enough are free."""
        missing = self._blocks_for(request.num_computed + num_tokens) - len(request.blocks)
        if missing > len(self._free):
            return False
        request.blocks += [self._free.popleft() for _ in range(missing)]
        return True

    def _schedule(self) -> list[tuple[Request, int]]:
        """The requests of the next step, each with a number of tokens: decodes, then prompts."""
        chunks: list[tuple[Request, int]] = []
        budget = self.limits.max_tokens
        for request in sorted(self.running, key=lambda r: not r.answer_ids):  # oldest first
            num_tokens = min(request.num_ready, budget)
            if num_tokens == 0 or request not in self.running:  # the loop may have preempted it
                continue
            while not self._grow(request, num_tokens):
                scheduled = [each for each, _ in chunks]
                victim = next(r for r in reversed(self.running) if r not in scheduled)
                self._preempt(victim)  # the youngest one that is not scheduled
                if victim is request:
                    break
            if request in self.running:
                chunks.append((request, num_tokens))
                budget -= num_tokens
        return chunks

    def _preempt(self, request: Request) -> None:
        """Swap a request's own blocks out to the host."""
        own = request.blocks[request.num_shared :]
        request.host_blocks = [self._free_host.popleft() for _ in own]
        self._swap(self._caches, self._host_caches, own, request.host_blocks)
        self._free.extend(own)
        del request.blocks[request.num_shared :]
        self.running.remove(request)
        self.swapped.append(request)
        self.stats.preemptions += 1

    def _resume(self) -> None:
        """Swap requests back in while blocks are free, first the one that was swapped out first."""
        while self.swapped and len(self.running) < self.limits.max_requests:
            request = self.swapped[0]
            # With one block more than it had; otherwise it would be preempted again at once.
            if self.running and len(self._free) < len(request.host_blocks) + 1:
                return
            own = [self._free.popleft() for _ in request.host_blocks]
            self._swap(self._host_caches, self._caches, request.host_blocks, own)
            self._free_host.extend(request.host_blocks)
            request.host_blocks = []
            request.blocks += own
            self.running.append(self.swapped.popleft())

    def _swap(
        self,
        src: dict[str, torch.Tensor],
        dst: dict[str, torch.Tensor],
        src_blocks: list[int],
        dst_blocks: list[int],
    ) -> None:
        pairs = torch.tensor([src_blocks, dst_blocks], dtype=torch.int64).T
        for name, cache in src.items():
            self._backend_cls.swap_blocks(cache, dst[name], pairs)
        self.stats.blocks_swapped += len(src_blocks)

    def _forward(self, chunks: list[tuple[Request, int]]) -> list[int]:
        """Run one forward pass, and return the most likely token after each chunk."""
        starts = [request.num_computed for request, _ in chunks]
        lens = [num_tokens for _, num_tokens in chunks]
        ends = [start + num_tokens for start, num_tokens in zip(starts, lens, strict=True)]
        columns = max(len(request.blocks) for request, _ in chunks)
        table = [request.blocks + [0] * (columns - len(request.blocks)) for request, _ in chunks]
        batch = AttentionBatch.create(
            lens,
            ends,
            block_table=torch.tensor(table),
            block_size=self.block_size,
            device=self.device,
        )
        token_ids: list[int] = []
        positions: list[int] = []
        for (request, _), start, end in zip(chunks, starts, ends, strict=True):
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
        inputs = (
            torch.tensor(token_ids, device=self.device),
            torch.tensor(positions, device=self.device),
        )
        logits = None if self._graphs is None else self._graphs.run(batch, *inputs)
        self.stats.replayed_steps += logits is not None
        with torch.inference_mode(), forward_context(batch):
            if logits is None:
                logits = self._logits(*inputs)
            last = batch.query_start_loc[1:].long() - 1
            return logits[last].argmax(-1).tolist()

    def _logits(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(token_ids, positions, self._attend)
        return logits

    def _attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output = self.layers[index](query, key, value)
        assert isinstance(output, torch.Tensor)
        return output
