"""The devices that are known by name, wherever they are."""

from __future__ import annotations

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["KNOWN_DEVICES", "known_device"]


def _gpu(
    arch: str, name: str, units: int, shared_kib: int, l2_mib: int, tb_per_s: float
) -> DeviceProfile:
    digits = arch.removeprefix("sm") if arch.startswith("sm") else ""
    return DeviceProfile(
        vendor="nvidia" if digits else "amd",
        arch=arch,
        name=name,
        capability=(int(digits[:-1]), int(digits[-1])) if digits else None,
        num_sms=units,
        shared_memory_bytes=shared_kib << 10,
        l2_bytes=l2_mib << 20,
        memory_bandwidth=tb_per_s * 1e12,
    )


#: One device of each architecture, figures by the vendors' datasheets, no libraries.
KNOWN_DEVICES: dict[str, DeviceProfile] = {
    profile.arch: profile
    for profile in (
        _gpu("sm80", "NVIDIA A100", 108, 163, 40, 2.04),
        _gpu("sm86", "NVIDIA GeForce RTX 3090", 82, 99, 6, 0.936),
        _gpu("sm89", "NVIDIA L40S", 142, 99, 96, 0.864),
        _gpu("sm90", "NVIDIA H200", 132, 227, 50, 4.8),
        _gpu("sm100", "NVIDIA B200", 148, 227, 126, 8.0),
        _gpu("sm120", "NVIDIA GeForce RTX 5090", 170, 99, 96, 1.79),
        _gpu("gfx90a", "AMD Instinct MI250X (one die)", 110, 64, 8, 1.6),
        _gpu("gfx942", "AMD Instinct MI300X", 304, 64, 4, 5.3),
        _gpu("gfx950", "AMD Instinct MI355X", 256, 160, 4, 8.0),
        _gpu("gfx1100", "AMD Radeon RX 7900 XTX", 96, 64, 6, 0.96),
        _gpu("gfx1201", "AMD Radeon RX 9070 XT", 64, 64, 8, 0.64),
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
