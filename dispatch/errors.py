"""The errors that the library raises."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AttnDispatchError",
    "BackendFailure",
    "DeviceWaitError",
    "InvalidInputError",
    "UnknownBackendError",
    "UnsupportedError",
    "summary_of",
]


class AttnDispatchError(Exception):
    """Base of every error raised by attn-dispatch."""


class UnsupportedError(AttnDispatchError):
    """No backend, or not the required one, computes exactly this request.

    Attributes:
        report: a `Report` with the verdict and reasons for every candidate; None if the error does
            not come from a selection.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class UnknownBackendError(AttnDispatchError):
    """An override names a backend that is not registered."""


class InvalidInputError(AttnDispatchError, ValueError):
    """A value, shape, dtype, device or setting is invalid."""


class BackendFailure(AttnDispatchError):
    """A backend failed when it was imported, built or launched."""


class DeviceWaitError(AttnDispatchError):
    """Under ATTN_DISPATCH_CHECK=sync, a step waited for the device; the message names the line."""


def summary_of(error: BaseException, limit: int = 300) -> str:
    """Return the type and the first line of an exception's message: `ValueError: no such key`.

    A compiler's error that only says where it is, in a first line ending in a colon, is followed by
    the last line of the error of the same type that caused it, which says what is wrong. An
    exception whose own `str()` fails is named only by its type. More than `limit` characters are
    cut.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    name = type(error).__name__
    try:
        text = str.strip(str(error))
        cause = error
        while type(cause.__cause__) is type(error):
            cause = cause.__cause__
        why = str.strip(str(cause))
    except KeyboardInterrupt:
        raise
    except BaseException as failure:  # `str()` runs code of the exception's author
        return f"{name} (its message cannot be read: {type(failure).__name__})"
    if not text:
        return name
    # A lone surrogate could not be printed or written.
    line = text.splitlines()[0].rstrip()
    if line.endswith(":") and why:
        line += " " + why.splitlines()[-1].strip()
    line = line.encode("utf-8", "replace").decode("utf-8")
    if len(line) > limit:
        line = line[: limit - 3] + "..."
    return f"{name}: {line}"
