"""The addition model as an Engine runs it, and a check of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_dispatch import Attention
from attn_dispatch.serving import Engine, Limits, Request
from support.addition import tokenizer
from support.addition.model import load_demo_model
from support.addition.workload import Workload

#: Few blocks, so that requests are preempted; and small steps, so that prompts are cut into chunks.
SMALL = Limits(max_requests=16, max_tokens=48, num_blocks=48)

#: The longest answer.
MAX_NEW_TOKENS = 9


class AdditionModel:
    """A LanguageModel: the addition model, with one Attention for each of its layers."""

    max_seq_len = 288
    max_step_tokens = None
    states = None

    def __init__(
        self, device: torch.device | str = "cpu", backend: str | None = None, **options: object
    ) -> None:
        self.model = load_demo_model(torch.float32, device)
        self.device = self.model.embedding.weight.device
        config = self.model.config
        self.layers = {
            f"layers.{index}": Attention(
                config.num_heads,
                config.head_size,
                config.scale,
                config.num_kv_heads,
                sliding_window=layer.sliding_window,
                logits_soft_cap=layer.logits_soft_cap,
                prefix=f"layers.{index}",
                dtype=torch.float32,
                device=self.device,
                block_size=8,
                backend=backend,
                **options,
            )
            for index, layer in enumerate(config.layers)
        }

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """See LanguageModel."""
        attend = lambda index, *qkv: self.layers[f"layers.{index}"](*qkv)
        return self.model(token_ids, positions, attend)[rows]


def engine_of(model: AdditionModel, limits: Limits = SMALL, **options: object) -> Engine:
    """An engine whose answers end at a semicolon."""
    return Engine(model, eos_ids=[tokenizer.END_ID], limits=limits, **options)


def prompts_of(workload: Workload) -> list[list[int]]:
    """The token ids of a workload's prompts."""
    return [tokenizer.encode(workload.prefix + task.text) for task in workload.tasks]


def answer_of(request: Request) -> str:
    """The digits of an answer."""
    return tokenizer.decode(request.answer_ids).rstrip(";")


def check_tokens(requests: Sequence[Request], rows: int = 16) -> tuple[int, int]:
    """Compare each token of each answer with the prediction of the dense float64 forward pass.

    Returns:
        Tokens checked, and tokens that differ.
    """
    model = load_demo_model(torch.float64)
    checked = different = 0
    for first in range(0, len(requests), rows):
        group = requests[first : first + rows]
        longest = max(len(request.token_ids) for request in group)
        padded = torch.full((len(group), longest), tokenizer.PAD_ID)
        for row, request in zip(padded, group, strict=True):
            row[: len(request.token_ids)] = torch.tensor(request.token_ids)
        with torch.inference_mode():
            logits = model.dense_logits(padded)
        for row_logits, request in zip(logits, group, strict=True):
            # The logits at a position predict the next token.
            predictions = row_logits[request.num_prompt_tokens - 1 : len(request.token_ids) - 1]
            checked += len(predictions)
            different += int((predictions.argmax(-1) != torch.tensor(request.answer_ids)).sum())
    return checked, different
