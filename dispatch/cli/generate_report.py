"""What `attn-dispatch generate` and `demo` print about a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.cli.output import noise_to_stderr
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.serving import Engine, Request

__all__ = [
    "Recorder",
    "StepRecord",
    "answer_data",
    "loading",
    "plot_steps",
    "print_answers",
    "print_picks",
    "print_summary",
    "run_data",
]


@dataclass(frozen=True)
class StepRecord:
    """The engine after a step.

    Attributes:
        seconds: since the run began.
        running: requests on the device.
        new_tokens, prompt_tokens: so far.
    """

    seconds: float
    running: int
    new_tokens: int
    prompt_tokens: int


class Recorder:
    """Keeps what a plot and a summary need."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._begin = engine.clock()
        self.steps: list[StepRecord] = []

    @property
    def seconds(self) -> float:
        """Since the recorder was made, until the last record."""
        return self.steps[-1].seconds if self.steps else 0.0

    def record(self) -> None:
        """Note the state after a step."""
        stats = self._engine.stats
        record = StepRecord(
            self._engine.clock() - self._begin,
            self._engine.num_running,
            stats.new_tokens,
            stats.prompt_tokens,
        )
        self.steps.append(record)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While a model is loaded: what libraries print goes to stderr, bars only to a terminal."""
    from importlib.util import find_spec

    with noise_to_stderr():
        if find_spec("transformers") is not None and not sys.stderr.isatty():
            from transformers import logging

            logging.disable_progress_bar()
        yield


def print_picks(console: Console, engine: Engine) -> None:
    """Print the backend of each phase, for each kind of layer."""
    kinds: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
    for layer in engine.layers:
        picks = tuple((str(phase), each.name) for phase, each in layer.selections.items())
        key = (str(layer.spec), picks)
        kinds[key] = kinds.get(key, 0) + 1
    for (spec, picks), count in kinds.items():
        by_name: dict[str, list[str]] = {}
        for phase, name in picks:
            by_name.setdefault(name, []).append(phase)
        names = "; ".join(f"{name} ({', '.join(phases)})" for name, phases in by_name.items())
        console.print(f"{count} layers: {names}", style="bold")
        console.print(f"  {spec}", style="dim")
    console.print()


def print_answers(console: Console, engine: Engine, texts: Sequence[str]) -> None:
    """Print each prompt and what there is of its answer, in the order of the prompts."""
    for request in sorted(engine.finished, key=lambda each: each.index):
        if not request.num_new_tokens:
            continue
        console.print(f"> {' '.join(texts[request.index].split())}", style="bold")
        reason = str(request.finish_reason)
        console.print(
            f"{engine.text_of(request).strip()}{'' if reason == 'stop' else f' [{reason}]'}\n"
        )


def print_summary(console: Console, engine: Engine, recorder: Recorder) -> None:
    """Print counts and the speed."""
    stats, seconds = engine.stats, recorder.seconds
    done = [each for each in engine.finished if each.finish_reason != "cancelled"]
    rate = stats.new_tokens / seconds if seconds else 0.0
    console.print(
        f"{len(done)} answers: {stats.prompt_tokens} prompt tokens and {stats.new_tokens} new "
        f"tokens in {stats.steps} steps and {seconds:.1f} s: {rate:.0f} new tokens per second. "
        f"The largest step had {stats.largest_batch} requests."
    )
    parts = []
    if stats.shared_tokens:
        parts.append(f"{stats.shared_tokens} prompt tokens were in blocks of other requests")
    if stats.preemptions:
        parts.append(
            f"{stats.preemptions} preemptions ({stats.blocks_swapped} blocks swapped, "
            f"{stats.recomputed} tokens computed again)"
        )
    if stats.replayed_steps:
        parts.append(f"{stats.replayed_steps} steps were replays of CUDA graphs")
    if parts:
        console.print(f"{'; '.join(parts)}.")


def answer_data(engine: Engine, texts: Sequence[str], request: Request) -> dict[str, Any]:
    """An answer as JSON-ready data."""
    return {
        "index": request.index,
        "prompt": texts[request.index],
        "answer": engine.text_of(request) if engine.text.tokenizer else None,
        "token_ids": request.answer_ids,
        "finish_reason": str(request.finish_reason),
        "prompt_tokens": request.num_prompt_tokens,
        "shared_tokens": request.num_shared,
    }


def run_data(
    engine: Engine, texts: Sequence[str], recorder: Recorder, *, complete: bool
) -> dict[str, Any]:
    """A run as JSON-ready data."""
    requests = sorted(engine.finished, key=lambda each: each.index)
    return {
        "device": str(engine.device),
        "complete": complete,
        "answers": [answer_data(engine, texts, request) for request in requests],
        "seconds": recorder.seconds,
        "stats": asdict(engine.stats),
        "limits": asdict(engine.limits),
        "block_size": engine.block_size,
        "layers": {
            layer.prefix: {str(phase): each.name for phase, each in layer.selections.items()}
            for layer in engine.layers
        },
    }


def plot_steps(steps: Sequence[StepRecord], path: Path) -> None:
    """Draw the requests of each step and the tokens per second, over time.

    Raises:
        InvalidInputError: matplotlib is missing, or the file cannot be written.
    """
    from attn_dispatch.bench.plot import load_pyplot

    pyplot = load_pyplot()
    times = [step.seconds for step in steps]
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(9, 6), layout="constrained")
    upper.step(times, [step.running for step in steps], where="post", color="#0072B2")
    upper.set_ylabel("running requests")
    for name, label, colour in (
        ("new_tokens", "new tokens", "#009E73"),
        ("prompt_tokens", "prompt tokens", "#E69F00"),
    ):
        lower.plot(times, [getattr(step, name) for step in steps], label=label, color=colour)
    lower.set_ylabel("tokens so far")
    lower.set_xlabel("seconds")
    lower.legend()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)
