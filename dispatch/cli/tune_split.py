"""`attn-dispatch tune --context-parallel`: one GPU next to several that share the keys."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attn_dispatch.cli.output import facts_table, make_console, progress, text_table
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from attn_dispatch.bench.cases import Case
    from attn_dispatch.distributed.collectives import Ranks
    from attn_dispatch.tuning.split import MeasuredSplit

__all__ = ["device_of_rank", "ranks_of_launch", "tune_split"]

#: Seconds after which a rank gives up waiting for another.
_TIMEOUT_S = 120


def device_of_rank(device: str | None) -> str | None:
    """The device of this process, by torchrun's number for it unless one is named."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    if device in (None, "cuda") and torch.cuda.is_available() and local.isdecimal():
        return f"cuda:{local}"
    return device


def ranks_of_launch(world: int, device: torch.device) -> Ranks:
    """The processes that torchrun has started.

    Raises:
        InvalidInputError: there is another number of them.
    """
    import torch
    from torch import distributed

    from attn_dispatch.distributed.advice import tune_command
    from attn_dispatch.distributed.collectives import Ranks

    found = os.environ.get("WORLD_SIZE", "")
    if found != str(world) or world < 2:
        raise InvalidInputError(
            f"--context-parallel {world} needs {max(2, world)} processes, and torchrun has started "
            f"{found or 'none'}: {tune_command(max(2, world))}"
        )
    if not distributed.is_initialized():
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(device)
        limit = datetime.timedelta(seconds=_TIMEOUT_S)
        distributed.init_process_group("nccl" if is_gpu else "gloo", timeout=limit)
    return Ranks()


def tune_split(
    cases: Sequence[Case],
    notes: Sequence[str],
    device: torch.device,
    path: Path,
    ranks: Ranks,
    *,
    fresh: bool,
    rounds: int | None,
    time_budget: float | None,
    replaces_unreadable: bool,
) -> bool:
    """Measure the cases on all ranks, and print the outcome on rank 0.

    Returns:
        Whether every case has a point.
    """
    from attn_dispatch.selection.timings.store import forget_tables
    from attn_dispatch.tuning.split import SplitTuner

    tuner = SplitTuner(device, path, ranks, fresh, rounds, replaces_unreadable)
    left = tuner.cases_left(cases)
    done: list[MeasuredSplit] = []
    start, results = time.monotonic(), tuner.run(left)
    with progress("tune", len(left)) as show:
        for index, case in enumerate(left):
            is_over = time_budget is not None and time.monotonic() - start > time_budget
            if any(ranks.gather_objects(is_over)):  # one clock decides for all
                break
            show(case.name, index)
            done.append(next(results))
    forget_tables()
    if ranks.rank == 0:
        _print_outcome(path, ranks, notes, len(left), done)
    sys.stdout.flush()
    return all(each.advice is not None for each in done) and len(done) == len(left)


def _print_outcome(
    path: Path, ranks: Ranks, notes: Sequence[str], planned: int, done: Sequence[MeasuredSplit]
) -> None:
    from attn_dispatch.distributed.advice import EXCHANGES, ONE_RANK

    console = make_console()
    for note in notes:
        console.print(note)
    facts = facts_table()
    kept = [each for each in done if each.advice is not None]
    facts.add_row("Table", str(path))
    facts.add_row("Ranks", f"{ranks.size}, over {ranks.transport}")
    facts.add_row("Points", f"{len(kept)} measured now, {planned - len(kept)} still to do")
    console.print(facts)
    for each in done:
        if each.skipped:
            console.print(f"{each.case.name}: not measured, {each.skipped}")
    if not kept:
        return
    columns = ("One rank, us", *EXCHANGES.values(), "In a graph", "Run eagerly")
    rows = text_table("Batch", *columns, narrow=0)
    for each in kept:
        assert each.advice is not None
        times = each.advice.point.times_us
        rows.add_row(
            each.case.name,
            *(f"{times[name]:.1f}" for name in (ONE_RANK, *EXCHANGES)),
            each.advice.verdict(captured=True),
            each.advice.verdict(captured=False),
        )
    console.print(rows)
