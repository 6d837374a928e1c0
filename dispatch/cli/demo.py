"""`attn-dispatch demo`: a language model answers questions, and its tokens are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attn_dispatch.cli.generate_report import (
    Recorder,
    loading,
    print_answers,
    print_picks,
    print_summary,
    run_data,
)
from attn_dispatch.cli.options import AsJson, Device, device_to_run_on
from attn_dispatch.cli.output import make_console, print_json, progress

if TYPE_CHECKING:
    from attn_dispatch.serving import Request

__all__ = ["demo"]

#: Room for 32 answers of this model, and more than usual for its size.
_CACHE_BYTES = 256 << 20


def demo(
    requests: Annotated[int, typer.Option(min=1, max=32, help="Questions to answer.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens per answer.")] = 64,
    checked: Annotated[int, typer.Option(min=0, help="Answers to check token by token.")] = 4,
    backend: Annotated[
        str | None, typer.Option(help="Override, e.g. REFERENCE or decode=TORCH_SDPA.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let SmolLM2-135M-Instruct answer questions, by continuous batching over a paged KV cache.

    All questions share a system prompt, whose keys and values are computed once. Some answers are
    compared with transformers' eager attention, token by token. Exits with 1 if a token differs.
    """
    from dataclasses import asdict

    from attn_dispatch.serving import Limits, Sampling, load_engine
    from attn_dispatch.serving.eager import check_answers
    from attn_dispatch.serving.smollm2 import QUESTIONS, SYSTEM, model_path

    torch_device = device_to_run_on(device)
    path = model_path()
    with loading():
        engine = load_engine(
            path,
            device=torch_device,
            backend=backend,
            limits=Limits(
                max_requests=32, max_tokens=512, max_seq_len=1024, cache_bytes=_CACHE_BYTES
            ),
        )
    questions = QUESTIONS[:requests]
    chats = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        for question in questions
    ]
    console = make_console()
    if not as_json:
        console.print("SmolLM2-135M-Instruct", style="bold")
        print_picks(console, engine)
    recorder = Recorder(engine)
    with progress("answers", len(chats), lines=False) as show:

        def on_step() -> None:
            recorder.record()
            show(f"{engine.num_running} running", len(engine.finished))

        answers = engine.generate(chats, Sampling(max_new_tokens=max_new_tokens), on_step=on_step)
    result = check_answers(engine.model, _spread(answers, checked))
    if as_json:
        print_json(run_data(engine, questions, recorder, complete=True) | {"check": asdict(result)})
    else:
        print_answers(console, engine, questions)
        print_summary(console, engine, recorder)
        console.print(
            f"{result.tokens - result.different} of {result.tokens} tokens of {result.answers} "
            "answers are those of transformers' eager attention (smallest margin between its two "
            f"largest logits: {result.smallest_margin:.3f}).",
            style="red" if result.different else "green",
        )
    if result.different:
        raise typer.Exit(1)


def _spread(requests: list[Request], count: int) -> list[Request]:
    """Some of the requests, the shortest and the longest prompt among them."""
    ordered = sorted(requests, key=lambda each: each.num_prompt_tokens)
    if count >= len(ordered):
        return ordered
    last = max(count - 1, 1)
    return [ordered[index * (len(ordered) - 1) // last] for index in range(count)]
