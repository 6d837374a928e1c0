"""Choosing the next token of each request, with transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.serving.requests import Request, Sampling

__all__ = ["Choice"]


class Choice:
    """The next token of each request, whose choice is queued on the device.

    Args:
        logits: (len(requests), vocab_size).
        requests: those with temperature 0 and no penalty get the most likely token; with several
            that are equally likely, the first.

    Attributes:
        greedy: (len(requests),) int64 on the device, the most likely tokens.
        is_greedy: whether all requests get these.
    """

    def __init__(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._plain = [_is_plain(request.sampling) for request in requests]
        self.is_greedy = all(self._plain)
        self.greedy = logits.argmax(-1)
        self._logits = None if self.is_greedy else logits
        self._host, self._copied = self.greedy, None
        if logits.device.type == "cuda":
            # A copy of its own, so that reading it does not wait for what is queued later.
            self._host = torch.empty(
                self.greedy.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
            self._host.copy_(self.greedy, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[int]:
        """The tokens; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        chosen: list[int] = self._host.tolist()
        if self._logits is not None:
            for row, request in enumerate(self._requests):
                if not self._plain[row]:
                    if request.sampler is None:
                        request.sampler = Sampler(request.sampling)
                    chosen[row] = request.sampler(request.token_ids, self._logits[row])
        return chosen


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature == 0 and sampling.repetition_penalty == 1


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
