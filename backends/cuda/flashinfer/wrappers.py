"""What FlashInfer's wrappers share: their memory, and who may plan one again."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.locks import ForkSafeLock

__all__ = ["WrapperPool", "record_event", "workspace"]

#: Twice what FlashInfer's documentation recommends.
_WORKSPACE_BYTES = 256 << 20


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's memory for the parts of split requests, for every wrapper of a device."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event that completes after all work that the device has been given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class WrapperPool:
    """Wrappers of one kind, each lent to one plan at a time.

    A wrapper copies a plan to the device from memory that its next plan overwrites. So a returned
    wrapper is lent again only after that copy has completed.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._free: deque[tuple[Any, torch.cuda.Event | None]] = deque()

    def take(self, make: Callable[[], Any]) -> Any:
        """A free wrapper, or a new one."""
        with self._lock:
            for _ in range(len(self._free)):
                wrapper, copied = self._free.popleft()
                if copied is None or copied.query():
                    return wrapper
                self._free.append((wrapper, copied))
        return make()

    def lend(self, wrapper: Any, borrower: object, copied: torch.cuda.Event | None) -> None:
        """Take the wrapper back once the borrower is gone."""
        weakref.finalize(borrower, self._free.append, (wrapper, copied)).atexit = False
