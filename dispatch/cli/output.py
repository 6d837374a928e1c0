"""What the commands share for printing and for writing files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable, parse_json, read_file, replace_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "check_folder",
    "check_json_file",
    "facts_table",
    "make_console",
    "noise_to_stderr",
    "print_json",
    "progress",
    "text_table",
    "write_json_file",
]

#: The largest existing file that is read to find out whether the same command wrote it.
_MAX_BYTES = 256 << 20

#: `show(description, num_done)`.
Show: TypeAlias = Callable[[str, int], Any]


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, and no colours derived from the content."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def text_table(*columns: str, narrow: int = 1, title: str | None = None) -> Table:
    """A table without vertical lines; the first `narrow` columns are not wrapped if possible."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.title, table.title_justify = title, "left"
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index < narrow)
    return table


def facts_table() -> Table:
    """Two columns without a header: a name and its value."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


@contextlib.contextmanager
def progress(title: str, total: int, *, lines: bool = True) -> Iterator[Show]:
    """Yield a function that shows on stderr what is running, and how much is done.

    It shows a bar on a terminal. Elsewhere it prints a line for each call, or nothing if not
    `lines`.
    """
    from rich import progress as bars

    console = make_console(stderr=True)
    if not console.is_terminal:
        yield lambda text, done: console.print(f"[{done}/{total}] {text}") if lines else None
        return
    columns = (
        bars.TextColumn(title),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, completed=done, description=text)


def print_json(data: Any) -> None:
    """Print the data and nothing else."""
    print(json.dumps(data, indent=2, allow_nan=False))


def check_folder(path: Path) -> None:
    """Raise InvalidInputError if the file's folder does not exist."""
    if not path.absolute().parent.is_dir():
        raise InvalidInputError(f"{path}: there is no folder {path.absolute().parent}.")


def check_json_file(path: Path, *keys: str) -> None:
    """Check before the work that a JSON file can be written without destroying another file.

    Args:
        path: the file to write.
        keys: the keys of the files that this command writes. A file without them is kept.

    Raises:
        InvalidInputError: the file cannot be written, or another program wrote it.
    """
    check_folder(path)
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
            f"{path} exists, and this command did not write it. Name another file."
        )


def _keeps_nothing(path: Path) -> bool:
    """Whether it is /dev/null, /dev/stdout or a terminal."""
    return path.is_char_device() or str(path) in ("/dev/stdout", "/dev/stderr")


def write_json_file(path: Path, data: Any) -> None:
    """Write a file that `check_json_file` accepted; lists of integers are kept on one line.

    Raises:
        InvalidInputError: the file cannot be written.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    text = re.sub(r"\[[\d,\s]+\]", lambda found: "".join(found[0].split()), text)
    if not _keeps_nothing(path):
        replace_file(path, text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def noise_to_stderr() -> Iterator[None]:
    """Redirect to stderr what libraries print while they are imported; stdout is for results.

    The file descriptor is redirected too, because native code does not use `sys.stdout`.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
