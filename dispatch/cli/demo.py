"""`attn-dispatch demo`: serve a small trained model, show what was picked, and check the result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from attn_dispatch.cli.device_flag import device_to_run_on

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.selection.report import Report
    from attn_dispatch.serving.engine import Engine
    from attn_dispatch.serving.serve import DemoResult
    from attn_dispatch.serving.workload import Workload

__all__ = ["register"]

#: Answers that are printed one by one.
SHOWN_ANSWERS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="demo")(demo)


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A sum to ask for, e.g. 48+76; repeatable.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=4096, help="Requests to serve.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the requests and their arrival.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Override, e.g. REFERENCE or decode=TORCH_SDPA.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: the accelerator if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Serve a small trained model by continuous batching over a paged KV cache, and check it.

    The model adds numbers. Its requests arrive over time, share a prefix, are prefilled in chunks,
    and give way to each other when the cache is full. Every token is compared with a dense float64
    forward. Exits with 1 if one differs.
    """
    import torch
    from rich.console import Console

    from attn_dispatch.serving.serve import serve
    from attn_dispatch.serving.workload import Workload, make_workload, prompt_task

    torch_device = device_to_run_on(device)  # what is missing shows before the model is loaded
    workload = make_workload(requests, seed)
    if prompt:
        workload = Workload(workload.prefix, tuple(prompt_task(text) for text in prompt))
    # The model is so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    with _Progress(Console(stderr=True), workload) as progress:
        result = serve(workload, device=torch_device, backend=backend, on_step=progress.update)
    if as_json:
        print(json.dumps(result.asdict(), indent=2))
    else:
        _print_result(Console(), result)
    if result.tokens_different:
        raise typer.Exit(1)


class _Progress:
    """A bar of finished requests, with what the others are doing; nothing without a terminal."""

    def __init__(self, console: Console, workload: Workload) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("serving"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=len(workload.tasks))

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, engine: Engine) -> None:
        """Show the engine's state."""
        text = (
            f"{len(engine.running)} running, {len(engine.waiting)} waiting, "
            f"{len(engine.swapped)} swapped out"
        )
        self._progress.update(self._task, completed=len(engine.finished), description=text)


def _print_result(console: Console, result: DemoResult) -> None:
    _print_picks(console, result)
    _print_answers(console, result)
    stats = result.stats
    console.print(
        f"\n{stats.prompt_tokens} prompt tokens and {stats.new_tokens} new ones in "
        f"{stats.steps} steps and {result.seconds:.2f} s on {result.device}: "
        f"[bold]{result.new_tokens_per_second:.0f}[/] new tokens per second. "
        f"{stats.mixed_steps} steps mixed prefill and decode, up to {stats.largest_batch} requests."
    )
    console.print(
        f"Prefix: {stats.blocks_shared} blocks shared, {stats.blocks_copied} copied. "
        f"Cache full: {stats.preemptions} times a request gave way and came back "
        f"({stats.blocks_swapped} blocks swapped)."
    )
    right = sum(a == e for a, e in zip(result.answers, result.expected, strict=True))
    console.print(f"Right answers: [bold]{right} of {len(result.answers)}[/].")
    same = result.tokens_checked - result.tokens_different
    verdict = "[bold green]" if not result.tokens_different else "[bold red]"
    console.print(
        f"{verdict}{same} of {result.tokens_checked} tokens equal[/] those of a dense float64 "
        f"forward (smallest margin between two logits there: {result.smallest_margin:.2f})."
    )


def _print_picks(console: Console, result: DemoResult) -> None:
    from rich import box
    from rich.table import Table

    spec = result.picks[0][0].spec
    title = (
        f"What was picked, and why ({spec.num_heads} heads on {spec.num_kv_heads} KV heads of "
        f"{spec.head_size})"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for header in ("layers", "attention", "phase", "backend", "why"):
        table.add_column(header, overflow="fold", no_wrap=header == "attention")
    for layers, reports in _alike(result.picks):
        rows: dict[tuple[str, str], list[str]] = {}
        for report in reports:
            rows.setdefault((str(report.picked), _why(report)), []).append(str(report.phase))
        names, feature = ", ".join(map(str, layers)), _feature(reports[0])
        for (picked, why), phases in rows.items():
            table.add_row(names, feature, ", ".join(phases), picked, why)
            names = feature = ""
    console.print(table)


def _alike(picks: tuple[tuple[Report, ...], ...]) -> list[tuple[list[int], tuple[Report, ...]]]:
    """Layers with the same request, together."""
    groups: dict[object, tuple[list[int], tuple[Report, ...]]] = {}
    for index, reports in enumerate(picks):
        groups.setdefault(reports[0].spec, ([], reports))[0].append(index)
    return list(groups.values())


def _feature(report: Report) -> str:
    """What sets the layer apart."""
    spec = report.spec
    if spec.sliding_window:
        return f"sliding window {spec.sliding_window}"
    return f"soft cap {spec.logits_soft_cap:g}" if spec.logits_soft_cap else "plain"


def _why(report: Report) -> str:
    """What decided, and what stood in the way of the candidates before the pick."""
    refused = []
    for verdict in report.verdicts:
        if verdict.name == report.picked:
            break
        if verdict.reasons:
            refused.append(f"{verdict.name}: {verdict.reasons[0]}")
    return "; ".join([report.because, *refused])


def _print_answers(console: Console, result: DemoResult) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Answers", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("question")
    table.add_column("answer", justify="right")
    table.add_column("")
    rows = list(zip(result.questions, result.answers, result.expected, strict=True))
    for question, answer, expected in rows[:SHOWN_ANSWERS]:
        table.add_row(question, answer, "right" if answer == expected else f"not {expected}")
    if len(rows) > SHOWN_ANSWERS:
        table.add_row(f"and {len(rows) - SHOWN_ANSWERS} more", "", "")
    console.print(table)
