"""stdout and stderr that may be closed or full."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

__all__ = ["OutputError", "checked_streams", "one_line", "print_error"]

#: A word of a message that is longer than the first is cut to the second: 5,000 digits, say.
_LONGEST_WORD, _SHOWN = 400, 60


class OutputError(Exception):
    """stdout cannot be written to.

    Attributes:
        is_broken_pipe: the reader has closed the pipe, as `head` does; this is not a mistake.
    """

    def __init__(self, why: str, *, is_broken_pipe: bool = False) -> None:
        super().__init__(f"The output cannot be written: {why}.")
        self.is_broken_pipe = is_broken_pipe


class _CheckedStream:
    """A text stream that passes errors of writing to a function."""

    def __init__(self, stream: Any, on_error: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_error = on_error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, see TextIO."""
        return self._call(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush, see TextIO."""
        self._call(self._stream.flush)

    def _call(self, method: Any, *arguments: str) -> Any:
        try:
            return method(*arguments)
        except OSError as error:
            _discard_buffer(self._stream)
            self._on_error(error)
        except ValueError as error:
            if not getattr(self._stream, "closed", False):
                raise
            self._on_error(OSError(errno.EBADF, str(error)))


def _raise_output_error(error: OSError) -> None:
    why = (error.strerror or str(error)).rstrip(".")
    raise OutputError(why, is_broken_pipe=error.errno == errno.EPIPE) from error


def _ignore(error: OSError) -> None:
    """An error of stderr cannot be reported, and the answer on stdout may still arrive."""


def _discard_buffer(stream: TextIO) -> None:
    """Send the rest of the stream's buffer to /dev/null; otherwise Python fails again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


@contextlib.contextmanager
def checked_streams() -> Iterator[None]:
    """Within it, an error of stdout raises OutputError, and an error of stderr is ignored.

    Characters that a stream's encoding does not have are written as escapes.

    Raises:
        OutputError: stdout is closed.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    if before[1] is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the exit)
    for stream in (sys.stdout, sys.stderr):
        # Names of devices and messages of libraries may not fit the terminal's encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _CheckedStream(sys.stderr, _ignore)
    try:
        if sys.stdout is None:
            raise OutputError("stdout is closed")
        sys.stdout = _CheckedStream(sys.stdout, _raise_output_error)
        yield
        sys.stdout.flush()
    except OutputError as error:
        if not error.is_broken_pipe:
            print_error(str(error))
        raise
    finally:
        sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """Open descriptors 0 to 2 if they are closed; otherwise the next open file would get one."""
    with contextlib.suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)


def one_line(text: str) -> str:
    """A message on one line, with very long words cut."""
    lines = filter(None, (" ".join(line.split()) for line in text.splitlines()))
    return re.sub(rf"\S{{{_LONGEST_WORD},}}", _shorten, "; ".join(lines).replace(":; ", ": "))


def _shorten(found: re.Match[str]) -> str:
    return f"{found[0][:_SHOWN]}... ({len(found[0])} characters)"


def print_error(text: str) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
