"""The declared order of backends on each platform: what automatic selection tries, best first.

A backend is named here once it exists. One that is registered but not named for a platform (a
plugin, or a backend that nobody measured there) is tried before the last resort.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

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


#: Where nobody has measured: what one program compiles to everywhere, then what PyTorch brings.
_TRITON_FIRST = ("TRITON_ATTN", "TORCH_SDPA")
_SDPA = ("TORCH_SDPA",)

# Only Hopper's order goes by what was measured, on an H200. There HOPPER_ATTN's prefills are level
# with FlashAttention 3's: ahead for long prompts, behind for many short ones. Its decodes, which
# are TRITON_ATTN's, are level too where requests are alike, and ahead where they are not.
# FLASH_ATTN takes what HOPPER_ATTN has no kernel for: its prefills are faster than TRITON_ATTN's.
# FLASHINFER's decodes were level; the place of TORCH_VARLEN is a guess.
_HOPPER = (
    "HOPPER_ATTN",
    "FLASH_ATTN",
    "TRITON_ATTN",
    "FLASHINFER",
    "TORCH_VARLEN",
    "TORCH_SDPA",
)

# The orders below are guesses from published figures; `attn-dispatch tune` replaces them by times.
# FlashAttention 2 and FlashInfer's FA2 kernels were tuned for Ampere, where prefills are bound by
# how well a kernel feeds the tensor cores. Decodes are bound by memory: Triton's do as well.
_AMPERE_PREFILL = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "TORCH_VARLEN", "TORCH_SDPA")
_AMPERE_DECODE = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER", "TORCH_VARLEN", "TORCH_SDPA")

# FlashAttention 4 and FlashInfer have kernels for the tensor cores of B200; Triton's are general.
_BLACKWELL_PREFILL = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "TORCH_VARLEN", "TORCH_SDPA")
_BLACKWELL_DECODE = ("FLASHINFER", "TRITON_ATTN", "FLASH_ATTN", "TORCH_VARLEN", "TORCH_SDPA")

# Nobody has run these on an AMD GPU here. TRITON_ATTN comes first: its results were checked on
# NVIDIA, and the others' by stand-ins alone.
_CDNA = ("TRITON_ATTN", "ROCM_AITER", "ROCM_FLASH_ATTN", "TORCH_SDPA")


def _cuda(first: tuple[int, int], last: tuple[int, int]) -> DeviceMatch:
    return DeviceMatch(vendor="nvidia", min_capability=first, max_capability=last)


def _rocm(*archs: str) -> DeviceMatch:
    return DeviceMatch(vendor="amd", archs=archs)


#: First match counts. Columns: name, devices, order for prefill, order for decode.
PLATFORMS: tuple[Platform, ...] = (
    Platform("CUDA, Ampere and Ada", _cuda((8, 0), (8, 9)), _AMPERE_PREFILL, _AMPERE_DECODE),
    Platform("CUDA, Hopper", _cuda((9, 0), (9, 9)), _HOPPER, _HOPPER),
    Platform(
        "CUDA, Blackwell for data centres",
        _cuda((10, 0), (11, 9)),
        _BLACKWELL_PREFILL,
        _BLACKWELL_DECODE,
    ),
    # Without the tensor memory of B200; FlashAttention 4 is not for it.
    Platform(
        "CUDA, Blackwell for workstations", _cuda((12, 0), (12, 9)), _AMPERE_PREFILL, _AMPERE_DECODE
    ),
    Platform("ROCm, CDNA", _rocm("gfx90a", "gfx942", "gfx950"), _CDNA, _CDNA),
    Platform("ROCm, RDNA", _rocm("gfx1100", "gfx1201"), _TRITON_FIRST, _TRITON_FIRST),
    Platform("CPU", DeviceMatch(vendor="cpu"), _SDPA, _SDPA),
    Platform("MPS", DeviceMatch(vendor="apple"), _SDPA, _SDPA),
    Platform("XPU", DeviceMatch(vendor="intel"), _SDPA, _SDPA),
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
