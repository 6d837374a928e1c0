"""What the commands share in how they print."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["facts_table", "make_console", "noise_to_stderr", "print_json", "text_table"]


def make_console() -> Console:
    """A console on stdout that takes text as it is: no markup, no colour by content."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def text_table(*columns: str, narrow: int = 1) -> Table:
    """A table without vertical lines; the first `narrow` columns stay on one line if they can."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index < narrow)
    return table


def facts_table() -> Table:
    """Two columns without a head: what it is, and the fact."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def print_json(data: Any) -> None:
    """Print the data and nothing else."""
    print(json.dumps(data, indent=2, allow_nan=False))


@contextlib.contextmanager
def noise_to_stderr() -> Iterator[None]:
    """Send what libraries print while they are imported to stderr: stdout is for the answer.

    The file descriptor goes too, since native code does not know of `sys.stdout`.
    """
    sys.stdout.flush()
    answer = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(answer, 1)
        os.close(answer)
