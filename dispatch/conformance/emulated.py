"""Checks of a backend on a GPU that is emulated on the CPU.

device = EmulatedDevice.named("gfx942")
report = verify(MyBackend, emulate=device)
print(device.summary())
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, cast, get_args

import torch

from attn_dispatch.conformance.check import Check, skip
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound
from attn_dispatch.errors import InvalidInputError, summary_of
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.platforms.detect import emulated_profile
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.selection.version import changed

__all__ = ["Addressing", "EmulatedDevice", "InterpretedHopper"]

#: How kernels access memory. Triton uses buffer instructions, whose offsets have 32 bits, for
#: tensors in storages under 2 GiB. "buffer": all tensors are; "mixed": all but caches, which is
#: what engines have; "global": Triton uses none.
Addressing = Literal["buffer", "mixed", "global"]
_LARGE_BYTES = 1 << 31

#: Compute units of an emulated device. Kernels start programs for each; an emulator runs them one
#: after another, and a few show the same as 304.
_COMPUTE_UNITS = 4
#: Its kernels are in Gluon, which is interpreted; there is no emulator of its instructions.
_HOPPER = "sm90"


@dataclasses.dataclass
class EmulatedDevice:
    """A GPU that is emulated, and what ran on it.

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

        sm90 is an `InterpretedHopper`.

        Raises:
            InvalidInputError: it is not emulated; there is no such addressing; NumPy or Triton is
                not installed; or Triton interprets kernels in this process, which it must for sm90
                and must not for others.
        """
        if addressing not in get_args(Addressing):
            raise InvalidInputError(
                f"{addressing!r} is no addressing. Give one of {', '.join(get_args(Addressing))}."
            )
        try:
            from attn_dispatch.emulation import EmulationError, emulated
        except ImportError as error:
            raise InvalidInputError(str(error)) from error
        if arch == _HOPPER:
            if addressing != "buffer":
                raise InvalidInputError(f"{arch} has no addressing: leave it out.")
            return InterpretedHopper(_few_units(arch))
        try:
            with emulated(arch):
                pass
        except EmulationError as error:
            raise InvalidInputError(str(error)) from error
        return cls(_few_units(arch), cast("Addressing", addressing))

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
    def running(self, seed: int = 0) -> Iterator[Any]:
        """Within this context the CPU is this device, for selection, layers and Triton.

        Args:
            seed: of the order in which warps run, for `InterpretedHopper`.

        Raises:
            EmulationError: as for `emulation.emulated`.
        """
        from attn_dispatch.emulation import emulated

        buffer_ops = self.addressing != "global"
        with emulated(self.profile.arch, buffer_ops=buffer_ops) as emulation, self._as_profile():
            try:
                yield emulation
            finally:
                self.launches += len(emulation.launches)
                self.instructions += sum(each.instructions for each in emulation.launches)
                self.seconds += sum(each.seconds for each in emulation.launches)

    @contextlib.contextmanager
    def _as_profile(self) -> Iterator[None]:
        """Within this context the CPU is this device, for selection and layers."""
        with contextlib.ExitStack() as stack:
            stack.callback(changed)  # selections for the CPU, before and afterwards, are others
            stack.enter_context(emulated_profile(self.profile))
            changed()
            yield

    def check_on_it(self, check: Check, cls: type[AttentionBackend]) -> Check:
        """A check of a backend, run on this device."""
        if check.needs:
            reason = f"it needs a PyTorch device of type {check.needs}, and tensors are on the CPU"
            return dataclasses.replace(check, test=partial(skip, reason), needs="")
        return dataclasses.replace(check, test=partial(self._run, check))

    def _run(self, check: Check) -> ErrorBound | None:
        with self.running(zlib.crc32(check.full_name.encode())):
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


@dataclasses.dataclass
class InterpretedHopper(EmulatedDevice):
    """A Hopper GPU: Gluon kernels are interpreted, and Triton interprets its own.

    Attributes:
        kernels: how often each Gluon kernel was launched.
    """

    kernels: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.profile.arch} (interpreted)"

    @contextlib.contextmanager
    def running(self, seed: int = 0) -> Iterator[Any]:
        """See EmulatedDevice.running."""
        from attn_dispatch.emulation.gluon.interpret import interpreted

        with interpreted(seed=seed) as launched, self._as_profile():
            try:
                yield launched
            finally:
                self.kernels.update(launched)

    def check_on_it(self, check: Check, cls: type[AttentionBackend]) -> Check:
        """See EmulatedDevice.check_on_it."""
        reason = ""
        if check.group == "bits":
            reason = "matrix products on a CPU are summed in an order that depends on their shapes"
        elif check.spec.dtype == torch.bfloat16 and cls.kernel_notes(
            check.spec, self.profile, None
        ):
            reason = "portable kernels compute it, and Triton's interpreter gets bfloat16 wrong"
        if reason:
            return dataclasses.replace(check, test=partial(skip, reason), needs="")
        return super().check_on_it(check, cls)

    def summary(self) -> str:
        """See EmulatedDevice.summary."""
        if not self.kernels:
            return f"No Gluon kernel was launched on the interpreted {self.profile.arch}."
        names = ", ".join(f"{name} {number}" for name, number in sorted(self.kernels.items()))
        return (
            f"{self.profile.arch}: launches of {names}. Kernels are interpreted in Python: no "
            "compiler and no hardware."
        )


def _few_units(arch: str) -> DeviceProfile:
    known = KNOWN_DEVICES[arch]
    return dataclasses.replace(
        known,
        name=f"{known.name}, emulated",
        num_sms=_COMPUTE_UNITS,
        other_libraries="looked up",
    )


def _notes(error: BaseException | None) -> list[str]:
    """The notes of an exception and its causes: the emulator adds where in a kernel it failed."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", ())
        error = error.__cause__
    return notes
