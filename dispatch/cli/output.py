"""What the commands share in how they print."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable, parse_json, read_file, replace_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "MAX_ROUNDS",
    "check_json_output",
    "check_seconds",
    "facts_table",
    "make_console",
    "noise_to_stderr",
    "print_json",
    "text_table",
    "write_output",
]

#: Calls of one contestant that --rounds takes: more would run for days.
MAX_ROUNDS = 100_000

#: The largest file that is read to see whether a command wrote it.
_MAX_BYTES = 256 << 20


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


def check_json_output(path: Path, *keys: str) -> None:
    """Before the work: whether a JSON file can be written there without losing another file.

    Args:
        path: of the file.
        keys: those that the command's own files have; another file is not overwritten.

    Raises:
        InvalidInputError: it cannot be written, or is a file that the command did not write.
    """
    if not path.absolute().parent.is_dir():
        raise InvalidInputError(f"{path}: there is no folder {path.absolute().parent}.")
    if _keeps_nothing(path):
        return
    check_writable(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        data = parse_json(read_file(path, _MAX_BYTES), origin=str(path))
    except InvalidInputError:
        data = None
    if not isinstance(data, dict) or not data.keys() >= set(keys):
        raise InvalidInputError(
            f"{path} is there already, and this command did not write it. Name another file."
        )


def _keeps_nothing(path: Path) -> bool:
    """Whether it is /dev/null, /dev/stdout or a terminal."""
    return path.is_char_device() or str(path) in ("/dev/stdout", "/dev/stderr")


def write_output(path: Path, text: str) -> None:
    """Write a file that `check_json_output` let pass.

    Raises:
        InvalidInputError: it cannot be written.
    """
    if not _keeps_nothing(path):
        replace_file(path, text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}.") from error


def check_seconds(seconds: float | None) -> float | None:
    """For the callback of --time-budget: NaN and infinity are no time.

    Raises:
        InvalidInputError: it is not finite.
    """
    if seconds is not None and not math.isfinite(seconds):
        raise InvalidInputError(f"--time-budget {seconds} is not a number of seconds.")
    return seconds


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
