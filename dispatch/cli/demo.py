"""`attn-dispatch demo`: serve a small trained model, show the picks, and check every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attn_dispatch.cli.options import AsJson, Device, device_to_run_on
from attn_dispatch.cli.output import make_console, print_json, progress, text_table

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.selection.report import Report
    from attn_dispatch.serving.engine import Engine
    from attn_dispatch.serving.serve import DemoResult

__all__ = ["demo"]

#: This many answers are printed one by one.
_SHOWN_ANSWERS = 8


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A sum to compute, e.g. 48+76; repeatable.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=4096, help="Requests to serve.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the requests and their times of arrival.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Override, e.g. REFERENCE or decode=TORCH_SDPA.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Serve a small trained model by continuous batching over a paged KV cache, and check it.

    The model adds numbers. Its requests arrive over time, share a prefix, are prefilled in chunks,
    and are preempted when the cache is full. Every token is compared with a dense float64 forward
    pass. Exits with 1 if a token differs.
    """
    import torch

    from attn_dispatch.serving.serve import serve
    from attn_dispatch.serving.workload import Workload, make_workload, prompt_task

    torch_device = device_to_run_on(device)  # before the model is loaded: it may be missing
    workload = make_workload(requests, seed)
    if prompt:
        workload = Workload(workload.prefix, tuple(prompt_task(text) for text in prompt))
    torch.set_num_threads(1)  # the model is so small that a second thread makes it slower
    with progress("serving", len(workload.tasks), lines=False) as show:

        def on_step(engine: Engine) -> None:
            text = f"{len(engine.running)} running, {len(engine.waiting)} waiting, "
            show(f"{text}{len(engine.swapped)} swapped out", len(engine.finished))

        result = serve(workload, device=torch_device, backend=backend, on_step=on_step)
    if as_json:
        print_json(result.asdict())
    else:
        _print_result(make_console(), result)
    if result.tokens_different:
        raise typer.Exit(1)


def _print_result(console: Console, result: DemoResult) -> None:
    _print_picks(console, result)
    _print_answers(console, result)
    stats = result.stats
    console.print(
        f"\n{stats.prompt_tokens} prompt tokens and {stats.new_tokens} new tokens in "
        f"{stats.steps} steps and {result.seconds:.2f} s on {result.device}: "
        f"{result.new_tokens_per_second:.0f} new tokens per second. "
        f"{stats.mixed_steps} steps mixed prefill and decode; the largest batch had "
        f"{stats.largest_batch} requests."
    )
    console.print(
        f"Prefix: {stats.blocks_shared} blocks shared, {stats.blocks_copied} copied. "
        f"Cache full: {stats.preemptions} preemptions ({stats.blocks_swapped} blocks swapped)."
    )
    if stats.replayed_steps:
        console.print(f"{stats.replayed_steps} steps were replays of CUDA graphs.")
    console.print(f"Right answers: {result.num_right} of {len(result.answers)}.")
    same = result.tokens_checked - result.tokens_different
    console.print(
        f"{same} of {result.tokens_checked} tokens are those of a dense float64 forward pass "
        f"(smallest margin between its two largest logits: {result.smallest_margin:.2f}).",
        style="red" if result.tokens_different else "green",
    )


def _print_picks(console: Console, result: DemoResult) -> None:
    spec = result.picks[0][0].spec
    title = (
        f"Picked backends ({spec.num_heads} heads on {spec.num_kv_heads} KV heads of "
        f"{spec.head_size})"
    )
    table = text_table("Layers", "Attention", "Phase", "Backend", "Why", narrow=0, title=title)
    table.columns[1].no_wrap = True
    by_spec: dict[object, list[int]] = {}
    for index, reports in enumerate(result.picks):
        by_spec.setdefault(reports[0].spec, []).append(index)
    for layers in by_spec.values():
        reports = result.picks[layers[0]]
        rows: dict[tuple[str, str], list[str]] = {}
        for report in reports:
            rows.setdefault((str(report.picked), _why(report)), []).append(str(report.phase))
        names, feature = ", ".join(map(str, layers)), _feature(reports[0])
        for (picked, why), phases in rows.items():
            table.add_row(names, feature, ", ".join(phases), picked, why)
            names = feature = ""
    console.print(table)


def _feature(report: Report) -> str:
    spec = report.spec
    if spec.sliding_window:
        return f"sliding window {spec.sliding_window}"
    return f"soft cap {spec.logits_soft_cap:g}" if spec.logits_soft_cap else "plain"


def _why(report: Report) -> str:
    """What decided, and why the candidates before the picked one were rejected."""
    rejected = []
    for verdict in report.verdicts:
        if verdict.name == report.picked:
            break
        if verdict.reasons:
            rejected.append(f"{verdict.name}: {verdict.reasons[0]}")
    return "; ".join([report.because, *rejected])


def _print_answers(console: Console, result: DemoResult) -> None:
    table = text_table("Question", "Answer", "", title="Answers")
    table.columns[1].justify = "right"
    rows = list(zip(result.questions, result.answers, result.expected, strict=True))
    for question, answer, expected in rows[:_SHOWN_ANSWERS]:
        table.add_row(question, answer, "right" if answer == expected else f"not {expected}")
    if len(rows) > _SHOWN_ANSWERS:
        table.add_row(f"and {len(rows) - _SHOWN_ANSWERS} more", "", "")
    console.print()
    console.print(table)
