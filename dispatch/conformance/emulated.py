"""Checks of a backend on an AMD GPU that is emulated on the CPU.

device = EmulatedDevice.named("gfx942")
report = verify(MyBackend, emulate=device)
print(device.summary())
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

from attn_dispatch.conformance.check import Check, skip
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound
from attn_dispatch.errors import InvalidInputError, summary_of
from attn_dispatch.platforms.detect import emulated_profile
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.selection.version import changed

if TYPE_CHECKING:
    from attn_dispatch.emulation import Emulation

__all__ = ["Addressing", "EmulatedDevice"]

#: How kernels access memory. Triton uses buffer instructions, whose offsets have 32 bits, for
#: tensors in storages under 2 GiB. "buffer": all tensors are; "mixed": all but caches, which is
#: what engines have; "global": Triton uses none.
Addressing = Literal["buffer", "mixed", "global"]
_LARGE_BYTES = 1 << 31

#: Compute units of an emulated device. Kernels start programs for each; an emulator runs them one
#: after another, and a few show the same as 304.
_COMPUTE_UNITS = 4


@dataclasses.dataclass
class EmulatedDevice:
    """An AMD GPU that is emulated, and what ran on it.

    Attributes:
        profile: of the product with this architecture, but with few compute units.
        addressing: how kernels access memory.
        launches: Triton kernels that were launched.
        instructions: that their waves executed.
        seconds: that their emulation took, without their compilation.
    """

    profile: DeviceProfile
    addressing: Addressing = "buffer"
    launches: int = 0
    instructions: int = 0
    seconds: float = 0.0

    @classmethod
    def named(cls, arch: str, addressing: str = "buffer") -> EmulatedDevice:
        """The device of an architecture, after a trial: what is missing is an error at once.

        Raises:
            InvalidInputError: it is not emulated; there is no such addressing; NumPy or Triton is
                not installed; or Triton interprets kernels in this process.
        """
        if addressing not in get_args(Addressing):
            raise InvalidInputError(
                f"{addressing!r} is no addressing. Give one of {', '.join(get_args(Addressing))}."
            )
        try:
            from attn_dispatch.emulation import EmulationError, emulated
        except ImportError as error:
            raise InvalidInputError(str(error)) from error
        try:
            with emulated(arch):
                pass
        except EmulationError as error:
            raise InvalidInputError(str(error)) from error
        known = KNOWN_DEVICES[arch]
        profile = dataclasses.replace(
            known,
            name=f"{known.name}, emulated",
            num_sms=_COMPUTE_UNITS,
            other_libraries="looked up",
        )
        return cls(profile, cast("Addressing", addressing))

    def __str__(self) -> str:
        return f"{self.profile.arch} (emulated, {self.addressing} addressing)"

    @property
    def min_cache_bytes(self) -> int:
        """The least size of a cache's storage."""
        return _LARGE_BYTES if self.addressing == "mixed" else 0

    @property
    def torch_device(self) -> torch.device:
        """The device of its tensors."""
        return torch.device("cpu")

    @contextlib.contextmanager
    def running(self) -> Iterator[Emulation]:
        """Within this context the CPU is this device, for selection, layers and Triton.

        Raises:
            EmulationError: as for `emulation.emulated`.
        """
        from attn_dispatch.emulation import emulated

        profile = self.profile
        buffer_ops = self.addressing != "global"
        with (
            emulated(profile.arch, buffer_ops=buffer_ops) as emulation,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(changed)  # selections for the CPU, before and afterwards, are others
            stack.enter_context(emulated_profile(profile))
            changed()
            try:
                yield emulation
            finally:
                self.launches += len(emulation.launches)
                self.instructions += sum(each.instructions for each in emulation.launches)
                self.seconds += sum(each.seconds for each in emulation.launches)

    def check_on_it(self, check: Check) -> Check:
        """The check, run on this device."""
        if check.needs:
            reason = f"it needs a PyTorch device of type {check.needs}, and tensors are on the CPU"
            return dataclasses.replace(check, test=partial(skip, reason), needs="")
        return dataclasses.replace(check, test=partial(self._run, check))

    def _run(self, check: Check) -> ErrorBound | None:
        with self.running():
            try:
                return check.test()
            except Exception as error:
                places = _notes(error)
                if not places:
                    raise
                raise CheckFailed(f"it raises {summary_of(error)} ({'; '.join(places)})") from error

    def summary(self) -> str:
        """What ran, as a sentence or two."""
        if not self.launches:
            return f"No Triton kernel ran to its end on the emulated {self.profile.arch}."
        return (
            f"{self.profile.arch}: {self.launches} launches, {self.instructions / 1e6:.1f} million "
            f"wave instructions, {self.seconds:.0f} s. It is an emulated instruction set, not "
            "hardware."
        )


def _notes(error: BaseException | None) -> list[str]:
    """The notes of an exception and its causes: the emulator adds where in a kernel it failed."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", ())
        error = error.__cause__
    return notes
