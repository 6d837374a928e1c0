"""Choosing the next token of each request, with transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.serving.drafts import accepted
from attn_dispatch.serving.requests import Sampling
from attn_dispatch.serving.scheduler import Chunk

__all__ = ["Choice"]


class Choice:
    """The next tokens of requests, whose choice is queued on the device.

    Args:
        logits: (rows, vocab_size): of each chunk 1 + len(drafts) rows.
        chunks: of the requests. Those with temperature 0 and no penalty get the most likely token;
            with several that are equally likely, the first.

    Attributes:
        chunks: these.
        greedy: (rows,) int64 on the device, the most likely tokens.
        is_known_on_device: whether these are the tokens of all requests, one for each.
    """

    def __init__(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        is_greedy = all(chunk.request.sampling.is_plain for chunk in chunks)
        self.is_known_on_device = is_greedy and not any(chunk.drafts for chunk in chunks)
        self.greedy = logits.argmax(-1)
        self._logits = None if is_greedy else logits
        self._host, self._copied = self.greedy, None
        if logits.device.type == "cuda":
            # A copy of its own, so that reading it does not wait for what is queued later.
            self._host = torch.empty(
                self.greedy.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
            self._host.copy_(self.greedy, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[list[int]]:
        """The new tokens of each chunk's request; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        likely: list[int] = self._host.tolist()
        found, row = [], 0
        for chunk in self.chunks:
            request, end = chunk.request, row + 1 + len(chunk.drafts)
            if request.sampling.is_plain:
                found.append(accepted(chunk.drafts, likely[row:end]))
            else:
                assert self._logits is not None
                if request.sampler is None:
                    request.sampler = Sampler(request.sampling)
                found.append([request.sampler(request.token_ids, self._logits[row])])
            row = end
        return found


class Sampler:
    """Draws one request's tokens, with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._is_greedy = sampling.temperature == 0
        self._processors = _processors(sampling)
        # On the CPU, so that a seed gives the same numbers on every device.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after these, given (vocab_size,) logits."""
        scores = logits[None].float().cpu()
        ids = torch.tensor([list(token_ids)])
        for processor in self._processors:
            scores = processor(ids, scores)
        if self._is_greedy:
            return int(scores.argmax())
        probabilities = scores.softmax(-1)
        return int(torch.multinomial(probabilities[0], 1, generator=self._generator))


def _processors(sampling: Sampling) -> list[Callable[[torch.Tensor, torch.Tensor], Any]]:
    """In the order in which `generate` of transformers applies them."""
    import transformers as hf

    found: list[Any] = []
    if sampling.repetition_penalty != 1:
        found.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(hf.MinPLogitsWarper(sampling.min_p))
    return found
