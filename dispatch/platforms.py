"""The declared order of backends on each platform: what automatic selection tries, best first.

A backend is named here once it exists. One that is registered but not named for a platform (a
plugin, or a backend that nobody measured there) is tried before the last resort.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.device import DeviceMatch, DeviceProfile
from attn_dispatch.interface import Phase

__all__ = ["LAST_RESORT", "PLATFORMS", "Platform", "backend_order"]

#: Right everywhere and fast nowhere; landing here on a GPU is worth a warning.
LAST_RESORT = ("REFERENCE", "REFERENCE_MLA")


@dataclass(frozen=True)
class Platform:
    """A set of devices and the order of backends there, for each phase."""

    name: str
    match: DeviceMatch
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


_PORTABLE = ("TRITON_ATTN", "TORCH_SDPA")


def _cuda(name: str, first: tuple[int, int], last: tuple[int, int], *before: str) -> Platform:
    match = DeviceMatch(vendor="nvidia", min_capability=first, max_capability=last)
    order = (*before, *_PORTABLE)
    return Platform(name, match, prefill=order, decode=order)


def _rocm(name: str, *archs: str) -> Platform:
    match = DeviceMatch(vendor="amd", archs=archs)
    return Platform(name, match, prefill=_PORTABLE, decode=_PORTABLE)


def _other(name: str, vendor: str) -> Platform:
    match = DeviceMatch(vendor=vendor)
    return Platform(name, match, prefill=("TORCH_SDPA",), decode=("TORCH_SDPA",))


#: First match counts.
PLATFORMS: tuple[Platform, ...] = (
    _cuda("CUDA, Ampere and Ada", (8, 0), (8, 9)),
    _cuda("CUDA, Hopper", (9, 0), (9, 9), "HOPPER_ATTN"),
    _cuda("CUDA, Blackwell for data centres", (10, 0), (11, 9)),
    _cuda("CUDA, Blackwell for workstations", (12, 0), (12, 9)),
    _rocm("ROCm, CDNA", "gfx90a", "gfx942", "gfx950"),
    _rocm("ROCm, RDNA", "gfx1100", "gfx1201"),
    _other("CPU", "cpu"),
    _other("MPS", "apple"),
    _other("XPU", "intel"),
)


def backend_order(
    device: DeviceProfile, phase: Phase | None, registered: tuple[str, ...]
) -> tuple[str, ...]:
    """Every registered backend in the order to try them: declared, others, last resort."""
    platform = next((p for p in PLATFORMS if p.match.admits(device)), None)
    declared: tuple[str, ...] = ()
    if platform is not None:
        declared = platform.decode if phase is Phase.DECODE else platform.prefill
    named = [name for name in declared if name in registered]
    resort = [name for name in LAST_RESORT if name in registered]
    others = [name for name in registered if name not in named and name not in resort]
    return (*named, *others, *resort)
