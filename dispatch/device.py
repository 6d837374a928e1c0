"""What a device is, as plain data; the devices that are known; and the detection of real ones."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.libraries import Library, installed_libraries

if TYPE_CHECKING:
    import torch

__all__ = [
    "KNOWN_DEVICES",
    "DeviceMatch",
    "DeviceProfile",
    "default_torch_device",
    "detect_device",
    "known_device",
    "settle_device",
    "usable_device",
]


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What selection may know of a device.

    Attributes:
        vendor: "nvidia", "amd", "intel", "apple" or "cpu".
        arch: "sm90", "gfx942", "cpu", "mps", "xpu": what kernels are compiled for.
        name: what a person calls it.
        capability: compute capability on NVIDIA, else None.
        num_sms: streaming multiprocessors or compute units.
        shared_memory_bytes: shared memory or LDS that one program can have.
        l2_bytes: size of the L2 cache.
        memory_bandwidth: bytes per second at best: by the vendor's datasheet for a known device,
            by the memory's clock and width for a detected one.
        libraries: what is installed beside it; see `libraries.Library`.
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

    @property
    def is_gpu(self) -> bool:
        """Whether attention on the CPU would be a surprise here."""
        return self.vendor != "cpu"

    def library(self, name: str) -> Library:
        """What is known of a library; one that nobody mentioned is not installed."""
        return next((lib for lib in self.libraries if lib.name == name), Library(name))

    def with_libraries(self, *libraries: Library) -> DeviceProfile:
        """A copy with these libraries in place of those of the same names."""
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

    def admits(self, device: DeviceProfile) -> bool:
        """Whether the device is in the set."""
        first, last, capability = self.min_capability, self.max_capability, device.capability
        return (
            self.vendor in (None, device.vendor)
            and (not self.archs or device.arch in self.archs)
            and (first is None or (capability is not None and capability >= first))
            and (last is None or (capability is not None and capability <= last))
        )

    def describe(self) -> str:
        """The set in words, e.g. "nvidia from sm90"."""
        parts = [self.vendor or "", "/".join(self.archs)]
        first, last = self.min_capability, self.max_capability
        if first and first == last:
            parts.append("sm{}{}".format(*first))
        elif first:
            parts.append("from sm{}{}".format(*first))
        if last and first != last:
            parts.append("to sm{}{}".format(*last))
        return " ".join(part for part in parts if part) or "any device"


def _nvidia(
    arch: str, name: str, sms: int, smem_kib: float, l2_mib: int, tb_s: float
) -> DeviceProfile:
    digits = arch.removeprefix("sm")
    return DeviceProfile(
        vendor="nvidia",
        arch=arch,
        name=name,
        capability=(int(digits[:-1]), int(digits[-1])),
        num_sms=sms,
        shared_memory_bytes=int(smem_kib * 1024),
        l2_bytes=l2_mib << 20,
        memory_bandwidth=tb_s * 1e12,
    )


def _amd(arch: str, name: str, cus: int, lds_kib: int, l2_mib: int, tb_s: float) -> DeviceProfile:
    return DeviceProfile(
        vendor="amd",
        arch=arch,
        name=name,
        num_sms=cus,
        shared_memory_bytes=lds_kib << 10,
        l2_bytes=l2_mib << 20,
        memory_bandwidth=tb_s * 1e12,
    )


#: One device of each architecture, figures by the vendors' datasheets, no libraries.
KNOWN_DEVICES: dict[str, DeviceProfile] = {
    profile.arch: profile
    for profile in (
        _nvidia("sm80", "NVIDIA A100", 108, 163, 40, 2.04),
        _nvidia("sm86", "NVIDIA GeForce RTX 3090", 82, 99, 6, 0.936),
        _nvidia("sm89", "NVIDIA L40S", 142, 99, 96, 0.864),
        _nvidia("sm90", "NVIDIA H200", 132, 227, 50, 4.8),
        _nvidia("sm100", "NVIDIA B200", 148, 227, 126, 8.0),
        _nvidia("sm120", "NVIDIA GeForce RTX 5090", 170, 99, 96, 1.79),
        _amd("gfx90a", "AMD Instinct MI250X (one die)", 110, 64, 8, 1.6),
        _amd("gfx942", "AMD Instinct MI300X", 304, 64, 4, 5.3),
        _amd("gfx950", "AMD Instinct MI355X", 256, 160, 4, 8.0),
        _amd("gfx1100", "AMD Radeon RX 7900 XTX", 96, 64, 6, 0.96),
        _amd("gfx1201", "AMD Radeon RX 9070 XT", 64, 64, 8, 0.64),
        DeviceProfile(vendor="cpu", arch="cpu", name="CPU"),
        DeviceProfile(vendor="apple", arch="mps", name="Apple GPU"),
        DeviceProfile(vendor="intel", arch="xpu", name="Intel GPU"),
    )
}

#: Other names for the same: what people call the products.
ALIASES: dict[str, str] = {
    "a100": "sm80",
    "rtx3090": "sm86",
    "a10": "sm86",
    "l4": "sm89",
    "l40s": "sm89",
    "rtx4090": "sm89",
    "h100": "sm90",
    "h200": "sm90",
    "b200": "sm100",
    "rtx5090": "sm120",
    "mi250": "gfx90a",
    "mi250x": "gfx90a",
    "mi300x": "gfx942",
    "mi325x": "gfx942",
    "mi350x": "gfx950",
    "mi355x": "gfx950",
    "rx7900xtx": "gfx1100",
    "rx9070xt": "gfx1201",
}


def known_device(name: str) -> DeviceProfile:
    """The profile of a device by architecture or product name ("gfx942", "H200").

    Raises:
        InvalidInputError: the name is not in the table; it lists those that are.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"Device {shown(name)} is not the name of a device.")
    key = name.lower().replace("_", "").replace(" ", "")
    key = ALIASES.get(key, key)
    if key not in KNOWN_DEVICES:
        raise InvalidInputError(
            f"Device {name!r} is not known. Known are: {', '.join(KNOWN_DEVICES)}; "
            f"and by product: {', '.join(ALIASES)}."
        )
    return KNOWN_DEVICES[key]


def default_torch_device() -> torch.device:
    """The device that work goes to when nobody names one: the accelerator if there is one."""
    import torch

    chosen = torch.get_default_device()
    return chosen if chosen.type != "cpu" else _accelerator_or_cpu()


@functools.cache
def _accelerator_or_cpu() -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def settle_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant here and now: what None and a bare "cuda" mean may change.

    Raises:
        InvalidInputError: PyTorch does not know or cannot reach the device.
    """
    import torch

    try:
        settled = default_torch_device() if device is None else torch.device(device)
        if settled.type == "cuda" and settled.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return settled
    except _NO_DEVICE as error:
        raise _unusable(device, error) from error


#: What PyTorch raises for a device that it does not know or cannot reach.
_NO_DEVICE = (RuntimeError, AssertionError, TypeError, ValueError, OverflowError)


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, as by `settle_device`, if a tensor can be made there.

    Raises:
        InvalidInputError: PyTorch does not know or cannot reach the device.
    """
    settled = settle_device(device)
    if settled.type not in ("cpu", "meta"):
        _try_device(settled)
    return settled


@functools.cache
def _try_device(device: torch.device) -> None:
    """Make a tensor on a device; once, if it succeeds."""
    import torch

    try:
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        pass  # the device is there, and full
    except (*_NO_DEVICE, NotImplementedError) as error:
        raise _unusable(device, error) from error


def _unusable(device: object, error: Exception) -> InvalidInputError:
    import torch

    named = shown(str(device) if isinstance(device, torch.device) else device)
    lines = str(error).splitlines() or [type(error).__name__]
    return InvalidInputError(
        f"Device {named} cannot be used here: {lines[0].rstrip('.')}. "
        "`attn-dispatch doctor` shows what this machine has; `attn-dispatch explain` answers for "
        "devices that are elsewhere, by architecture or product, e.g. gfx942 or H200."
    )


def detect_device(device: torch.device | str | None = None) -> DeviceProfile:
    """The profile of a device of this machine, with the libraries that are installed.

    Args:
        device: as PyTorch names it; None for the default device.

    Raises:
        InvalidInputError: PyTorch does not know or cannot reach the device.
    """
    from attn_dispatch.registry import registry

    settled = settle_device(device)
    try:
        hardware = _detect_hardware(settled.type, settled.index)
    except _NO_DEVICE as error:
        raise _unusable(device, error) from error
    libraries = installed_libraries(registry.library_names())
    return dataclasses.replace(hardware, libraries=libraries)


@functools.cache
def _detect_hardware(kind: str, index: int | None) -> DeviceProfile:
    import torch

    if kind == "cuda":
        return _describe_cuda(torch.cuda.get_device_properties(index), torch.version.hip)
    if kind in ("cpu", "mps", "xpu"):
        return KNOWN_DEVICES[kind]
    raise RuntimeError(f"there is no profile for PyTorch devices of type {kind!r}.")


def _bandwidth(properties: Any) -> float | None:
    """Bytes per second by the memory's clock and width; two transfers a cycle."""
    clock_khz = getattr(properties, "memory_clock_rate", None)
    bits = getattr(properties, "memory_bus_width", None)
    return 2 * clock_khz * 1e3 * bits / 8 if clock_khz and bits else None


def _describe_cuda(properties: Any, hip_version: str | None) -> DeviceProfile:
    """A profile out of torch.cuda.get_device_properties; pure, so that tests can feed it."""
    if hip_version:
        vendor, arch = "amd", str(properties.gcnArchName).split(":")[0]
        capability = None
    else:
        capability = (int(properties.major), int(properties.minor))
        vendor, arch = "nvidia", f"sm{capability[0]}{capability[1]}"
    return DeviceProfile(
        vendor=vendor,
        arch=arch,
        name=str(properties.name),
        capability=capability,
        num_sms=int(properties.multi_processor_count),
        shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", None),
        l2_bytes=getattr(properties, "L2_cache_size", None),
        memory_bandwidth=_bandwidth(properties),
    )
