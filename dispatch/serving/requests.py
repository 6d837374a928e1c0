"""What a request asks for, and where it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.serving.blocks import Prefix

__all__ = ["FinishReason", "Request", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer's tokens are chosen.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0 for the most likely token; else the logits are divided by it.
        top_k: only the most likely k tokens; 0 for all.
        top_p: only the most likely tokens whose probabilities add up to this.
        min_p: only tokens with at least this fraction of the largest probability.
        repetition_penalty: above 1, tokens that occurred before become less likely.
        seed: of the request's own random numbers: an answer does not depend on other requests,
            but for the rounding of logits.
        ignore_eos: whether the answer goes on after an end-of-sequence token.

    Raises:
        InvalidInputError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether each token is the most likely one."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def __post_init__(self) -> None:
        as_int("max_new_tokens", self.max_new_tokens, 1)
        as_int("top_k", self.top_k, 0)
        as_int("seed", self.seed, 0, 2**63 - 1)
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 1e-9, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 100.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidInputError(f"{name}={shown(value)} is not in {low:g} to {high:g}.")


class FinishReason(str, enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The model produced an end-of-sequence token."""
    LENGTH = "length"
    """It has max_new_tokens tokens."""
    CANCELLED = "cancelled"
    """The caller cancelled it; the answer has the tokens until then."""

    def __str__(self) -> str:
        return self.value


@dataclass(eq=False)
class Request:
    """A request and its blocks.

    Attributes:
        index: the number that `Engine.add` gave it.
        token_ids: prompt and answer so far.
        num_prompt_tokens: this many of them are the prompt.
        sampling: how tokens are chosen.
        num_computed: this many tokens have keys and values in the cache, or will have them after
            the steps that are queued on the device.
        num_pending: its next tokens that steps on the device choose.
        num_shared: this many were found in blocks of other requests when it was admitted.
        blocks: its blocks on the device, in order.
        host_blocks: its blocks on the host while it is swapped out.
        prefix: what of its blocks is known to the pool.
        finish_reason: None while it is not finished.
        added_at, first_token_at, finished_at: times by the engine's clock, in seconds.
    """

    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    num_computed: int = 0
    num_pending: int = 0
    num_shared: int = 0
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)
    finish_reason: FinishReason | None = None
    added_at: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None
    sampler: Any = None
    lookup: Any = None

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_ready(self) -> int:
        """Tokens that can be computed: the rest of the prompt, or the newest token."""
        if self.num_pending and self.has_all_tokens:
            return 0
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_all_tokens(self) -> bool:
        """Whether the answer is as long as it may be, with those that are pending."""
        return self.num_new_tokens + self.num_pending >= self.sampling.max_new_tokens
