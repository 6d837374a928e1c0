"""The devices of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES

__all__ = [
    "default_torch_device",
    "detect_device",
    "emulated_profile",
    "resolve_device",
    "usable_device",
]

#: What the CPU is taken for; see `emulated_profile`.
_emulated: DeviceProfile | None = None


def default_torch_device() -> torch.device:
    """The device for work that names none: the accelerator if there is one."""
    chosen = torch.get_default_device()
    return chosen if chosen.type != "cpu" else _accelerator_or_cpu()


@functools.cache
def _accelerator_or_cpu() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device with its index: the meaning of None and "cuda" may change between calls.

    Raises:
        InvalidInputError: PyTorch does not support or cannot reach the device.
    """
    try:
        resolved = default_torch_device() if device is None else torch.device(device)
        if resolved.type == "cuda" and resolved.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return resolved
    except _NO_DEVICE as error:
        raise _unusable(device, error) from error


#: What PyTorch raises for a device that it does not support or cannot reach.
_NO_DEVICE = (RuntimeError, AssertionError, TypeError, ValueError, OverflowError)


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of `resolve_device`, if a tensor can be made there.

    Raises:
        InvalidInputError: PyTorch does not support or cannot reach the device.
    """
    resolved = resolve_device(device)
    if resolved.type not in ("cpu", "meta"):
        _try_device(resolved)
    return resolved


@functools.cache
def _try_device(device: torch.device) -> None:
    """Make a tensor on a device."""
    try:
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        pass  # the device works, and is full
    except (*_NO_DEVICE, NotImplementedError) as error:
        raise _unusable(device, error) from error


def _unusable(device: object, error: Exception) -> InvalidInputError:
    named = shown(str(device) if isinstance(device, torch.device) else device)
    lines = str(error).splitlines() or [type(error).__name__]
    return InvalidInputError(
        f"Device {named} cannot be used here: {lines[0].rstrip('.')}. "
        "`attn-dispatch doctor` shows what this machine has; `attn-dispatch explain` also takes "
        "other devices, by architecture or product, e.g. gfx942 or H200."
    )


def detect_device(device: torch.device | str | None = None) -> DeviceProfile:
    """The profile of a device of this machine. Its libraries are looked up on demand.

    Args:
        device: as PyTorch names it; None for the default device.

    Raises:
        InvalidInputError: PyTorch does not support or cannot reach the device.
    """
    resolved = resolve_device(device)
    if _emulated is not None and resolved.type == "cpu":
        return _emulated
    try:
        return _profile_of(resolved.type, resolved.index)
    except _NO_DEVICE as error:
        raise _unusable(device, error) from error


@contextlib.contextmanager
def emulated_profile(profile: DeviceProfile) -> Iterator[None]:
    """Within this context the CPU is a device that is emulated on it, in all threads.

    Layers that were made outside of it keep what was chosen for the CPU. The caller of a selection
    calls `selection.version.changed`, because selections are kept by device.

    Args:
        profile: of the emulated device.
    """
    global _emulated
    before, _emulated = _emulated, profile
    try:
        yield
    finally:
        _emulated = before


@functools.cache
def _profile_of(kind: str, index: int | None) -> DeviceProfile:
    if kind == "cuda":
        hardware = _describe_cuda(torch.cuda.get_device_properties(index), torch.version.hip)
    elif kind in ("cpu", "mps", "xpu"):
        hardware = KNOWN_DEVICES[kind]
    else:
        raise RuntimeError(f"there is no profile for PyTorch devices of type {kind!r}.")
    return dataclasses.replace(hardware, other_libraries="looked up")


def _describe_cuda(properties: Any, hip_version: str | None) -> DeviceProfile:
    """A profile from torch.cuda.get_device_properties."""
    if hip_version:
        vendor, arch = "amd", str(properties.gcnArchName).split(":")[0]
        capability = None
    else:
        capability = (int(properties.major), int(properties.minor))
        vendor, arch = "nvidia", f"sm{capability[0]}{capability[1]}"
    clock_khz = getattr(properties, "memory_clock_rate", None)
    bits = getattr(properties, "memory_bus_width", None)
    return DeviceProfile(
        vendor=vendor,
        arch=arch,
        name=str(properties.name),
        capability=capability,
        num_sms=int(properties.multi_processor_count),
        shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", None),
        l2_bytes=getattr(properties, "L2_cache_size", None),
        # Two transfers per cycle.
        memory_bandwidth=2 * clock_khz * 1e3 * bits / 8 if clock_khz and bits else None,
    )
