"""The demo as one function: serve a workload, score the answers and check every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attn_dispatch.selection.report import Report
from attn_dispatch.serving import tokenizer
from attn_dispatch.serving.engine import Engine, EngineLimits, EngineStats, Request
from attn_dispatch.serving.model import DemoModel, load_demo_model
from attn_dispatch.serving.workload import Workload

__all__ = ["DemoResult", "check_tokens", "serve"]


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        device: where the model ran.
        picks: for each layer, the selection report of each phase.
        questions: the sums to compute.
        answers: the model's answers, in the order of the questions.
        expected: the right answers.
        tokens_checked: tokens compared with the dense float64 forward pass.
        tokens_different: this many of them differ.
        smallest_margin: smallest difference between the two largest logits of that pass.
        seconds: time of serving, without loading and checking.
        stats: counters of the engine.
    """

    device: str
    picks: tuple[tuple[Report, ...], ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    expected: tuple[str, ...]
    tokens_checked: int
    tokens_different: int
    smallest_margin: float
    seconds: float
    stats: EngineStats

    @property
    def num_right(self) -> int:
        """The number of right answers."""
        return sum(a == e for a, e in zip(self.answers, self.expected, strict=True))

    @property
    def score(self) -> float:
        """The fraction of right answers."""
        return self.num_right / len(self.answers)

    @property
    def new_tokens_per_second(self) -> float:
        """Tokens of the answers per second of serving."""
        return self.stats.new_tokens / self.seconds

    def asdict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        rows = zip(self.questions, self.answers, self.expected, strict=True)
        return {
            "device": self.device,
            "layers": [[report.asdict() for report in layer] for layer in self.picks],
            "requests": [{"question": q, "answer": a, "expected": e} for q, a, e in rows],
            "score": self.score,
            "tokens_checked": self.tokens_checked,
            "tokens_different": self.tokens_different,
            "smallest_margin": self.smallest_margin,
            "seconds": self.seconds,
            "new_tokens_per_second": self.new_tokens_per_second,
            "stats": asdict(self.stats),
        }


def serve(
    workload: Workload,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    limits: EngineLimits | None = None,
    on_step: Callable[[Engine], None] = lambda engine: None,
) -> DemoResult:
    """Serve a workload and check the result.

    Args:
        workload: the requests.
        device: for the model, in float32; the check runs on the CPU in float64.
        backend: an override of the selected backends.
        limits: see EngineLimits.
        on_step: called after every step.

    Raises:
        UnsupportedError: no backend, or not the required one, supports one of the layers.
    """
    model = load_demo_model(torch.float32, device)
    prefix_ids = tokenizer.encode(workload.prefix)
    prompts = [tokenizer.encode(workload.prefix + task.text) for task in workload.tasks]
    engine = Engine(model, prefix_ids, limits=limits, backend=backend)
    started = time.perf_counter()
    step = added = 0
    while added < len(prompts) or engine.has_work:
        while added < len(prompts) and workload.tasks[added].arrival <= step:
            engine.add(added, prompts[added])
            added += 1
        engine.step()
        step += 1
        on_step(engine)
    seconds = time.perf_counter() - started
    requests = sorted(engine.finished, key=lambda request: request.index)
    answers = [tokenizer.decode(request.answer_ids).rstrip(";") for request in requests]
    checked, different, margin = check_tokens(load_demo_model(torch.float64), requests)
    return DemoResult(
        device=str(model.embedding.weight.device),
        picks=tuple(
            tuple(selection.report for selection in layer.selections.values())
            for layer in engine.layers
        ),
        questions=tuple(task.question for task in workload.tasks),
        answers=tuple(answers),
        expected=tuple(task.answer for task in workload.tasks),
        tokens_checked=checked,
        tokens_different=different,
        smallest_margin=margin,
        seconds=seconds,
        stats=engine.stats,
    )


def check_tokens(
    model: DemoModel, requests: Sequence[Request], rows: int = 16
) -> tuple[int, int, float]:
    """Compare each token of each answer with the prediction of the dense forward pass.

    The pass gets all tokens before it. If all are equal, greedy decoding by the dense forward pass
    gives the same answers.

    Args:
        model: a float64 model.
        requests: finished requests.
        rows: sequences in one pass.

    Returns:
        Tokens checked, tokens that differ, and the smallest margin between the two largest logits.
    """
    checked = different = 0
    margin = float("inf")
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
            best = predictions.topk(2, dim=-1)
            checked += len(predictions)
            different += int((best.indices[:, 0] != torch.tensor(request.answer_ids)).sum())
            margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
    return checked, different, margin
