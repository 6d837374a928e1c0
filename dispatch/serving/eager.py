"""Checking answers against transformers' own eager attention, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.serving.requests import Request

__all__ = ["EagerCheck", "check_answers"]

#: Logits of two tokens that are this close can change places when sums are rounded otherwise; it is
#: relative to the largest logit.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class EagerCheck:
    """The result of `check_answers`.

    Attributes:
        answers: compared answers.
        tokens: compared tokens.
        different: tokens that eager attention would not have chosen, by more than rounding.
        smallest_margin: between the two largest logits, over all tokens.
    """

    answers: int
    tokens: int
    different: int
    smallest_margin: float


def check_answers(paged: Any, requests: Sequence[Request]) -> EagerCheck:
    """Compare each token of greedy answers with what the model predicts with eager attention.

    One pass over the whole answer, without any cache: the prediction at a position is that for the
    next token. If all are equal, greedy decoding with eager attention gives the same answer.

    Args:
        paged: a PagedModel.
        requests: finished, made with temperature 0.
    """
    tokens = different = 0
    margin = float("inf")
    with paged.attention_of("eager") as model, torch.inference_mode():
        for request in requests:
            ids = torch.tensor(request.token_ids[:-1], device=model.device)[None]
            keep = request.num_new_tokens
            logits = model(ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:]
            best, second = logits.topk(2, -1).values.unbind(-1)
            answer = torch.tensor(request.answer_ids, device=logits.device)
            chosen = logits.gather(-1, answer[:, None])[:, 0]
            bound = _ROUNDING.get(logits.dtype, 0.0) * logits.abs().amax(-1)
            different += int((best - chosen > bound).sum())
            tokens += len(answer)
            margin = min(margin, float((best - second).min()))
    return EagerCheck(len(requests), tokens, different, margin)
