"""Choosing the next token of each request, with transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.serving.requests import Request, Sampling

__all__ = ["choose_tokens"]


def choose_tokens(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request.

    Args:
        logits: (len(requests), vocab_size).
        requests: those with temperature 0 and no penalty get the most likely token; with several
            that are equally likely, the first.
    """
    plain = [_is_plain(request.sampling) for request in requests]
    chosen: list[int] = logits.argmax(-1).tolist() if any(plain) else [0] * len(requests)
    for row, request in enumerate(requests):
        if not plain[row]:
            if request.sampler is None:
                request.sampler = Sampler(request.sampling)
            chosen[row] = request.sampler(request.token_ids, logits[row])
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
