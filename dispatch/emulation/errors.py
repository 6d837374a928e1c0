"""What the emulator raises."""

from __future__ import annotations

__all__ = [
    "EmulationError",
    "KernelFault",
    "MemoryFault",
    "RaceFault",
    "UnknownInstruction",
    "UnwrittenRead",
    "WaitFault",
    "WaveOrderFault",
    "add_note",
]


class EmulationError(Exception):
    """A kernel cannot be emulated: the message names the target, kernel or argument at fault."""


class UnknownInstruction(EmulationError):
    """The emulator does not know an instruction, or not in this form; the message has its line."""


class KernelFault(EmulationError):
    """A kernel did what the hardware forbids or leaves undefined.

    The machine adds the kernel's name, the target and the line of the instruction as notes.
    """


class MemoryFault(KernelFault):
    """An access outside of what is allocated, or at an address that the ISA does not allow."""


class UnwrittenRead(KernelFault):
    """A read of memory that was never written."""


class RaceFault(KernelFault):
    """Two waves access the same byte, one of them writes, and nothing orders them."""


class WaitFault(KernelFault):
    """A register or memory is used before the matching wait for the operation that fills it."""


class WaveOrderFault(KernelFault):
    """The result depends on the order in which the waves of a workgroup run."""


def add_note(error: Exception, note: str) -> None:
    """Add to an error's `__notes__`, which tracebacks show since Python 3.11."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
