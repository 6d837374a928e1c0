"""stdout and stderr that may be closed or full: the one place where that is handled."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["OutputError", "checked_streams", "one_line", "tell_error"]

#: Characters of a message's word that are shown: a value of 5,000 digits says enough in fewer.
_LONGEST_WORD, _SHOWN = 400, 60


class OutputError(Exception):
    """stdout cannot be written to.

    Attributes:
        is_broken_pipe: whether its reader has gone, as `head` does, which is no mistake.
    """

    def __init__(self, why: str, *, is_broken_pipe: bool = False) -> None:
        super().__init__(f"The output cannot be written: {why}.")
        self.is_broken_pipe = is_broken_pipe


class _Checked:
    """A text stream that hands errors of writing to `failed`; otherwise the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, see TextIO."""
        return self._do(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush, see TextIO."""
        self._do(self._stream.flush)

    def _do(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            _discard_rest(self._stream)
            self.failed(error)
        except ValueError as error:
            if not getattr(self._stream, "closed", False):
                raise
            self.failed(OSError(errno.EBADF, str(error)))

    def failed(self, error: OSError) -> None:
        """What an error of writing means."""
        raise NotImplementedError


class _Stdout(_Checked):
    def failed(self, error: OSError) -> None:
        why = (error.strerror or str(error)).rstrip(".")
        raise OutputError(why, is_broken_pipe=error.errno == errno.EPIPE) from error


class _Stderr(_Checked):
    def failed(self, error: OSError) -> None:
        """Nothing is left to say it to, and the answer may still be given."""


def _discard_rest(stream: TextIO) -> None:
    """Let what is still in the stream's buffer go nowhere, or Python's exit fails on it again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


@contextlib.contextmanager
def checked_streams() -> Iterator[None]:
    """Within it, errors of stdout are OutputError, and those of stderr are passed over.

    Characters that a stream's encoding does not have are written as escapes.

    Raises:
        OutputError: stdout is closed.
    """
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    if before[1] is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the exit)
    for stream in (sys.stdout, sys.stderr):
        # Names of devices and errors of libraries may hold what a terminal's encoding does not.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _Stderr(sys.stderr)
    try:
        if sys.stdout is None:
            raise OutputError("stdout is closed")
        sys.stdout = _Stdout(sys.stdout)
        yield
        sys.stdout.flush()
    except OutputError as error:
        if not error.is_broken_pipe:
            tell_error(str(error))
        raise
    finally:
        sys.stdout, sys.stderr = before


def _fill_descriptors() -> None:
    """Open the standard descriptors that are closed, or the next file to be opened becomes one."""
    with contextlib.suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)


def one_line(text: str) -> str:
    """A message on one line, with values of any length cut to their beginning."""
    lines = filter(None, (" ".join(line.split()) for line in text.splitlines()))
    return re.sub(rf"\S{{{_LONGEST_WORD},}}", _shorten, "; ".join(lines).replace(":; ", ": "))


def _shorten(found: re.Match[str]) -> str:
    return f"{found[0][:_SHOWN]}... ({len(found[0])} characters)"


def tell_error(text: str) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
