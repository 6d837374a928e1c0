"""A device, and a set of devices, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from attn_dispatch.platforms.libraries import Library, installed_library

__all__ = ["DeviceMatch", "DeviceProfile"]


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """The facts about a device that selection uses.

    Attributes:
        vendor: "nvidia", "amd", "intel", "apple" or "cpu".
        arch: the target of compiled kernels: "sm90", "gfx942", "cpu", "mps", "xpu".
        name: of the product.
        capability: compute capability on NVIDIA, else None.
        num_sms: streaming multiprocessors or compute units.
        shared_memory_bytes: shared memory or LDS that one program can have.
        l2_bytes: size of the L2 cache.
        memory_bandwidth: peak bytes per second: from the vendor's datasheet for a known device,
            from the memory's clock and width for a detected one.
        libraries: optional libraries; see `libraries.Library`.
        other_libraries: how `library` treats any other library: it is "missing", "assumed" to be
            installed, or "looked up" on this machine on demand.
    """

    vendor: str
    arch: str
    name: str
    capability: tuple[int, int] | None = None
    num_sms: int | None = None
    shared_memory_bytes: int | None = None
    l2_bytes: int | None = None
    memory_bandwidth: float | None = None
    libraries: tuple[Library, ...] = ()
    other_libraries: Literal["missing", "assumed", "looked up"] = "missing"

    @property
    def is_gpu(self) -> bool:
        """Whether this is not a CPU."""
        return self.vendor != "cpu"

    def library(self, name: str) -> Library:
        """A library on this device; nothing is imported."""
        for library in self.libraries:
            if library.name == name:
                return library
        if self.other_libraries == "looked up":
            return installed_library(name)
        return Library(name, "unknown" if self.other_libraries == "assumed" else None)

    def with_libraries(self, *libraries: Library) -> DeviceProfile:
        """A copy in which these libraries replace those of the same names."""
        kept = {lib.name: lib for lib in self.libraries} | {lib.name: lib for lib in libraries}
        return dataclasses.replace(self, libraries=tuple(kept.values()))

    def asdict(self) -> dict[str, Any]:
        """The profile as JSON-ready data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class DeviceMatch:
    """A set of devices, by vendor, by architecture and by compute capability (inclusive)."""

    vendor: str | None = None
    archs: tuple[str, ...] = ()
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None

    def matches(self, device: DeviceProfile) -> bool:
        """Whether the device is in the set."""
        first, last, capability = self.min_capability, self.max_capability, device.capability
        return (
            self.vendor in (None, device.vendor)
            and (not self.archs or device.arch in self.archs)
            and (first is None or (capability is not None and capability >= first))
            and (last is None or (capability is not None and capability <= last))
        )

    def describe(self) -> str:
        """The set as text, e.g. "nvidia from sm90"."""
        parts = [self.vendor or "", "/".join(self.archs)]
        first, last = self.min_capability, self.max_capability
        if first and first == last:
            parts.append("sm{}{}".format(*first))
        elif first:
            parts.append("from sm{}{}".format(*first))
        if last and first != last:
            parts.append("to sm{}{}".format(*last))
        return " ".join(part for part in parts if part) or "any device"
