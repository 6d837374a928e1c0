"""Classification of exceptions that concern the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from attn_dispatch.errors import summary_of

__all__ = ["device_wait_of", "is_capturing", "is_device_lost", "is_out_of_memory"]

#: Parts of messages, only their letters, in lower case.
_OUT_OF_MEMORY = ("outofmemory", "memoryallocation", "tallocatememory", "notenoughmemory")
#: Every later call on such a device fails.
_LOST_DEVICE = (
    "illegalmemoryaccess",
    "illegaladdress",
    "devicesideassert",
    "cudaerrorassert",
    "misalignedaddress",
    "illegalinstruction",
    "invalidprogramcounter",
    "unspecifiedlaunchfailure",
    "launchfailed",
    "launchtimedout",
    "hardwarestackerror",
    "uncorrectable",
    "memoryaccessfault",
)


#: Of what PyTorch raises for a wait while `torch.cuda.set_sync_debug_mode("error")` holds.
_DEVICE_WAIT = "calledasynchronizing"


def device_wait_of(error: BaseException) -> BaseException | None:
    """The exception in which PyTorch reports a wait for the device: this one, a cause, or None."""
    errors = (each for each in _chain(error) if isinstance(each, RuntimeError))
    return next((each for each in errors if _DEVICE_WAIT in _letters(_message(each))), None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or the device had too little memory."""
    errors = (MemoryError, torch.OutOfMemoryError)
    is_one = any(isinstance(each, errors) for each in _chain(error))
    return is_one or _mentions(error, _OUT_OF_MEMORY)


def is_device_lost(error: Exception) -> bool:
    """Whether an error leaves the device in a state in which every later call fails."""
    return _mentions(error, _LOST_DEVICE)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _mentions(error: Exception, texts: Sequence[str]) -> bool:
    """Whether the message of an error or of one of its causes contains one of these."""
    messages = (_letters(_message(each)) for each in _chain(error))
    return any(text in each for each in messages for text in texts)


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.lower()))


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # `str()` runs code of the exception's author
        return summary_of(failure)


def is_capturing() -> bool:
    """Whether a CUDA graph captures this call, or torch.compile traces it."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
