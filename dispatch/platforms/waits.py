"""`ATTN_DISPATCH_CHECK=sync`: a line that waits for the device is an error that names the line.

PyTorch reports its own waits: `.item()`, boolean indexing, copies from pageable memory. It does not
report torch.cuda.synchronize() and what other packages do by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from attn_dispatch import environment
from attn_dispatch.errors import DeviceWaitError
from attn_dispatch.platforms.device_errors import device_wait_of

__all__ = ["never_waits", "watched"]

P = ParamSpec("P")
T = TypeVar("T")

_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


def never_waits(function: Callable[P, T]) -> Callable[P, T]:
    """A function that is part of a step: under the check it raises if it waits for the device.

    The function raises DeviceWaitError then. On a machine without CUDA or ROCm nothing is checked.
    PyTorch has one setting for the whole process, so a wait in another thread raises there too.
    """

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        if not environment.sync_mode():
            return function(*args, **options)
        with _waits_are_errors():
            return function(*args, **options)

    return run


def watched(method: Callable[P, T]) -> Callable[P, T]:
    """A method as `never_waits` makes it, under the check; else itself, at no cost for its call."""
    return never_waits(method) if environment.sync_mode() else method


@contextlib.contextmanager
def _waits_are_errors() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except DeviceWaitError:  # of a function that this one called
        raise
    except Exception as error:
        wait = device_wait_of(error)
        if wait is None:
            raise
        raise DeviceWaitError(
            f"{_line_of(wait)} waits for the device, and a step must not, under "
            "ATTN_DISPATCH_CHECK=sync. Keep on the host what the host reads, and copy to the "
            "device with non_blocking=True, from pinned memory. If the line is a backend's, "
            "exclude the backend by an override such as -REFERENCE."
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _line_of(error: BaseException) -> str:
    """The last line outside of PyTorch that an exception came through: its place and its text."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_TORCH_FOLDER)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: `{frame.line}`"
