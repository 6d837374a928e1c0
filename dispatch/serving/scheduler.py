"""Scheduler: which requests the next step computes, and where their keys and values are.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv:2309.06180): each step has one
token of every request that is decoding, and chunks of the prompts that are not computed yet. If no
block is free, the youngest request is swapped out to the host, and resumed later.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_dispatch.serving.blocks import BlockPool, Prefix
from attn_dispatch.serving.drafts import PromptLookup
from attn_dispatch.serving.requests import Request

__all__ = ["Chunk", "Scheduler", "Stats"]

#: `swap(src_blocks, dst_blocks, to_host)` copies blocks between the device and the host.
Swap = Callable[[Sequence[int], Sequence[int], bool], None]


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a request: `start` to `end` of its token_ids.

    Attributes:
        is_last: the logits after it choose a token.
        drafts: its last tokens, which are no tokens of the request yet.
    """

    request: Request
    start: int
    end: int
    is_last: bool
    drafts: tuple[int, ...] = ()

    @property
    def known_end(self) -> int:
        """Where its drafts begin."""
        return self.end - len(self.drafts)

    @property
    def is_pending(self) -> bool:
        """Whether it is the token that a queued step chooses."""
        return self.known_end > len(self.request.token_ids)


@dataclass
class Stats:
    """Counters of an engine."""

    steps: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    new_tokens: int = 0
    largest_batch: int = 0
    mixed_steps: int = 0
    preemptions: int = 0
    blocks_swapped: int = 0
    recomputed: int = 0
    replayed_steps: int = 0
    steps_ahead: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Keeps the requests and their blocks.

    Args:
        pool: the blocks on the device.
        host_pool: the blocks on the host.
        swap: copies blocks between them.
        max_requests: requests of a step.
        max_tokens: new tokens of a step.
        draft_tokens: the most drafts of a request in a step.
        stats: counters to update.

    Attributes:
        waiting: requests without blocks, in the order in which they are admitted.
        running: requests with blocks, oldest first.
        swapped: requests on the host, in the order in which they are resumed.
    """

    def __init__(
        self,
        pool: BlockPool,
        host_pool: BlockPool,
        swap: Swap,
        *,
        max_requests: int,
        max_tokens: int,
        stats: Stats,
        draft_tokens: int = 0,
    ) -> None:
        self.pool, self.host_pool, self.stats = pool, host_pool, stats
        self._swap = swap
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._draft_tokens = draft_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.swapped: deque[Request] = deque()

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running or self.swapped)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decodes, prompts that have begun, then new requests."""
        self._resume()
        chunks: list[Chunk] = []
        budget = self._max_tokens
        ready = [each for each in self.running if each.num_ready]
        ready.sort(key=lambda each: each.num_ready > 1)
        for place, request in enumerate(ready, 1):
            if budget == 0:
                break
            if request not in self.running:  # an earlier one has preempted it
                continue
            chunk = self._chunk(request, budget, chunks)
            if chunk is not None:
                # Each other request keeps room for a token.
                chunk = self._with_drafts(chunk, budget - 1 - (len(ready) - place))
                chunks.append(chunk)
                budget -= chunk.end - chunk.start
        while budget and self.waiting and not self.swapped:
            if len(self.running) == self._max_requests or not self._admit(self.waiting[0], budget):
                break
            request = self.waiting.popleft()
            self._start(request)
            chunk = self._chunk(request, budget, [])
            assert chunk is not None  # `_admit` has reserved the blocks
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        return chunks

    def can_run_ahead(self) -> bool:
        """Whether the next step can be scheduled before the tokens of the queued one are known.

        Not if a request could be preempted then, or wants to be resumed.
        """
        if self.swapped:
            return False
        ends = (each.num_computed + min(each.num_ready, self._max_tokens) for each in self.running)
        needed = (
            max(self.pool.blocks_for(end) - len(each.blocks), 0)
            for each, end in zip(self.running, ends, strict=True)
        )
        return sum(needed) <= self.pool.num_free

    def finish(self, request: Request) -> None:
        """Take out a request in any state."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.swapped:
            self.swapped.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.release(request.blocks)
        self.host_pool.release(request.host_blocks)
        request.blocks, request.host_blocks = [], []

    def _start(self, request: Request) -> None:
        self.running.append(request)
        self.running.sort(key=lambda each: each.index)

    def _chunk(self, request: Request, budget: int, chunks: Sequence[Chunk]) -> Chunk | None:
        """The request's next tokens, with blocks for them; None if it was preempted."""
        start = request.num_computed
        end = start + min(request.num_ready, budget)
        while (missing := self.pool.blocks_for(end) - len(request.blocks)) > self.pool.num_free:
            scheduled = [chunk.request for chunk in chunks]
            victim = next(each for each in reversed(self.running) if each not in scheduled)
            self._preempt(victim)  # the youngest that this step does not compute
            if victim is request:
                return None
        request.blocks += self.pool.allocate(max(missing, 0))
        known = min(end, len(request.token_ids))
        request.prefix = self.pool.register(
            request.blocks, request.token_ids, known, request.prefix
        )
        return Chunk(request, start, end, is_last=end == start + request.num_ready)

    def _with_drafts(self, chunk: Chunk, room: int) -> Chunk:
        """A decode with as many drafts as there are, have room and may be new tokens."""
        request, size = chunk.request, self.pool.block_size
        if not self._draft_tokens or not request.sampling.is_plain:
            return chunk
        if not chunk.is_last or chunk.end - chunk.start > 1:
            return chunk
        # Blocks that other requests need for their next tokens are left.
        blocks = len(request.blocks) + max(0, self.pool.num_free - len(self.running))
        # The last new token is never a draft.
        wanted = request.sampling.max_new_tokens - request.num_new_tokens - 1
        most = min(self._draft_tokens, room, wanted, blocks * size - chunk.end)
        if most < 1:
            return chunk
        request.lookup = request.lookup or PromptLookup()
        drafts = request.lookup.draft(request.token_ids, most)
        end = chunk.end + len(drafts)
        missing = self.pool.blocks_for(end) - len(request.blocks)
        request.blocks += self.pool.allocate(max(missing, 0))
        self.stats.drafted_tokens += len(drafts)
        return dataclasses.replace(chunk, end=end, drafts=tuple(drafts))

    def _admit(self, request: Request, budget: int) -> bool:
        """Give a waiting request the known blocks of its prefix, if there is room for more."""
        # One token at least is computed: its logits choose the next one.
        most = (len(request.token_ids) - 1) // self.pool.block_size
        found, prefix = self.pool.find(request.token_ids, most)
        known = len(found) * self.pool.block_size
        end = known + min(len(request.token_ids) - known, budget)
        # What `use` takes from the free blocks, and what the first chunk needs.
        taken = sum(map(self.pool.is_free, found)) + self.pool.blocks_for(end) - len(found)
        # Each running request may need one more block for its next token.
        if self.running and self.pool.num_free < taken + len(self.running):
            return False
        if self.pool.num_free < taken:
            return False
        self.pool.use(found)
        request.blocks, request.prefix = found, prefix
        request.num_computed = request.num_shared = known
        self.stats.shared_tokens += known
        return True

    def _preempt(self, request: Request) -> None:
        """Swap a request out to the host; or if that is full, start it again later."""
        self.running.remove(request)
        self.stats.preemptions += 1
        used = request.blocks[: self.pool.blocks_for(request.num_computed)]
        if len(used) <= self.host_pool.num_free:
            request.host_blocks = self.host_pool.allocate(len(used))
            self._swap(used, request.host_blocks, True)
            self.stats.blocks_swapped += len(used)
            self.swapped.append(request)
        else:
            self.stats.recomputed += request.num_computed
            request.num_computed = 0
            self.waiting.appendleft(request)
        self.pool.release(request.blocks)
        request.blocks, request.prefix = [], Prefix()

    def _resume(self) -> None:
        """Swap requests in while there is room, first the one that was swapped out first."""
        while self.swapped and len(self.running) < self._max_requests:
            request = self.swapped[0]
            size = self.pool.block_size
            found, prefix = self.pool.find(request.token_ids, request.num_computed // size)
            missing = len(request.host_blocks) - len(found)
            taken = sum(map(self.pool.is_free, found)) + missing
            # With one block more for each, or it would be preempted again at once.
            if self.running and self.pool.num_free < taken + len(self.running) + 1:
                return
            self.pool.use(found)
            own = self.pool.allocate(missing)
            self._swap(request.host_blocks[len(found) :], own, False)
            self.stats.blocks_swapped += missing
            self.host_pool.release(request.host_blocks)
            request.host_blocks, request.blocks, request.prefix = [], [*found, *own], prefix
            self._start(self.swapped.popleft())
