"""The backends of this package, and the order in which each platform tries them.

To add a backend, write its module and add one entry to `BUILTIN`. A backend without a rank on a
platform (a plug-in, or one that was not measured there) is tried before the last resort.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["BUILTIN", "LAST_RESORT", "PLATFORMS", "Builtin", "Platform", "backend_order"]

#: Correct on every device and fast on none; selecting one on a GPU gives a warning.
LAST_RESORT = ("REFERENCE", "REFERENCE_MLA")

#: A backend's place on a platform, the lowest first: for both phases, or (prefill, decode).
Rank = int | tuple[int, int] | None


@dataclass(frozen=True)
class Builtin:
    """A backend of this package: its class as "module:Class", and its rank on each platform."""

    path: str
    ampere: Rank = None
    hopper: Rank = None
    blackwell: Rank = None
    cdna: Rank = None
    rdna: Rank = None
    other: Rank = None

    @property
    def target(self) -> str:
        """The full name of the class, as `resolve_full_cls_name` takes it."""
        return f"attn_dispatch.backends.{self.path}"


# Ranks are 10 apart, so that a new backend fits in between. Where they come from:
#
# hopper: measured on an H200. HOPPER_ATTN's prefills are level with FlashAttention 3's: ahead for
#   long prompts, behind for many short ones. Its decodes, which are TRITON_ATTN's, are level for
#   requests of equal lengths and ahead for unequal ones. FLASH_ATTN takes what HOPPER_ATTN has no
#   kernel for: its prefills are faster than TRITON_ATTN's. FLASHINFER's decodes were level. The
#   place of TORCH_VARLEN is a guess. Latents: on an H100, FLASHMLA's decodes led nearly everywhere,
#   and FLASHINFER_MLA's came next. HOPPER_MLA's took 0.9 to 1.6 times as long, TRITON_MLA's 0.9 to
#   4.6 times. For prompts FLASH_ATTN_MLA and FLASHINFER_MLA were level, and the former plans
#   nothing on the host; TRITON_MLA was 4 to 8 times slower, and HOPPER_MLA was not timed.
# The others are guesses from published figures; `attn-dispatch tune` replaces them by times.
# ampere: FlashAttention 2 and FlashInfer's FA2 kernels were tuned for it. Prefills are bound by how
#   well a kernel feeds the tensor cores. Decodes are bound by memory, where Triton's do as well.
# blackwell: FlashAttention 4 and FlashInfer have kernels for the tensor cores of B200; Triton's are
#   general.
# cdna: not run on an AMD GPU yet. TRITON_ATTN is first because its results were checked on NVIDIA;
#   the others were only checked against fakes.
# rdna, other: not measured. Triton compiles the same program everywhere; then what PyTorch has.
BUILTIN: dict[str, Builtin] = {
    "HOPPER_ATTN": Builtin("cuda.hopper.backend:HopperAttnBackend", hopper=10),
    "FLASH_ATTN": Builtin(
        "cuda.flash_attn.backend:FlashAttnBackend", ampere=(10, 20), hopper=20, blackwell=(10, 30)
    ),
    "FLASHINFER": Builtin(
        "cuda.flashinfer.backend:FlashInferBackend", ampere=30, hopper=40, blackwell=(20, 10)
    ),
    "ROCM_AITER": Builtin("rocm.aiter:RocmAiterBackend", cdna=20),
    "ROCM_FLASH_ATTN": Builtin("rocm.flash_attn_ck:RocmFlashAttnBackend", cdna=30),
    "TRITON_ATTN": Builtin(
        "triton.backend:TritonAttnBackend",
        ampere=(20, 10),
        hopper=30,
        blackwell=(30, 20),
        cdna=10,
        rdna=10,
    ),
    "TORCH_VARLEN": Builtin(
        "cuda.torch_varlen:TorchVarlenBackend", ampere=40, hopper=50, blackwell=40
    ),
    "TORCH_SDPA": Builtin(
        "reference.torch_sdpa:TorchSDPABackend",
        ampere=50,
        hopper=60,
        blackwell=50,
        cdna=40,
        rdna=20,
        other=10,
    ),
    "FLASHMLA": Builtin("cuda.flashmla.backend:FlashMLABackend", hopper=(65, 66)),
    "FLASHINFER_MLA": Builtin(
        "cuda.flashinfer.mla:FlashInferMLABackend", ampere=55, hopper=(64, 67), blackwell=55
    ),
    "FLASH_ATTN_MLA": Builtin("cuda.flash_attn.mla:FlashAttnMLABackend", hopper=(63, 68)),
    "ROCM_AITER_MLA": Builtin("rocm.aiter_mla:RocmAiterMLABackend", cdna=60),
    "HOPPER_MLA": Builtin("cuda.hopper.mla:HopperMLABackend", hopper=69),
    "TRITON_MLA": Builtin(
        "triton.mla:TritonMLABackend", ampere=60, hopper=70, blackwell=60, cdna=50, rdna=30
    ),
    "REFERENCE": Builtin("reference.torch_ref:ReferenceBackend"),
    "REFERENCE_MLA": Builtin("reference.torch_ref_mla:ReferenceMLABackend"),
}


@dataclass(frozen=True)
class Platform:
    """A set of devices with one order of backends.

    Attributes:
        name: for people.
        match: the devices.
        ranks: the field of `Builtin` that holds the ranks.
    """

    name: str
    match: DeviceMatch
    ranks: str

    def order(self, phase: Phase | None) -> tuple[str, ...]:
        """The backends with a rank here, best first; None for the order of prefill."""
        found = {}
        for name, backend in BUILTIN.items():
            rank: Rank = getattr(backend, self.ranks)
            if rank is not None:
                found[name] = rank if isinstance(rank, int) else rank[phase is Phase.DECODE]
        return tuple(sorted(found, key=found.__getitem__))


def _cuda(first: tuple[int, int], last: tuple[int, int]) -> DeviceMatch:
    return DeviceMatch(vendor="nvidia", min_capability=first, max_capability=last)


def _rocm(*archs: str) -> DeviceMatch:
    return DeviceMatch(vendor="amd", archs=archs)


#: The first match counts.
PLATFORMS: tuple[Platform, ...] = (
    Platform("CUDA, Ampere and Ada", _cuda((8, 0), (8, 9)), "ampere"),
    Platform("CUDA, Hopper", _cuda((9, 0), (9, 9)), "hopper"),
    Platform("CUDA, Blackwell for data centres", _cuda((10, 0), (11, 9)), "blackwell"),
    # It lacks the tensor memory of B200, and FlashAttention 4 does not support it.
    Platform("CUDA, Blackwell for workstations", _cuda((12, 0), (12, 9)), "ampere"),
    Platform("ROCm, CDNA", _rocm("gfx90a", "gfx942", "gfx950"), "cdna"),
    Platform("ROCm, RDNA", _rocm("gfx1100", "gfx1201"), "rdna"),
    Platform("CPU", DeviceMatch(vendor="cpu"), "other"),
    Platform("MPS", DeviceMatch(vendor="apple"), "other"),
    Platform("XPU", DeviceMatch(vendor="intel"), "other"),
)


def backend_order(
    device: DeviceProfile, phase: Phase | None, registered: tuple[str, ...]
) -> tuple[str, ...]:
    """Every registered backend in the order to try them: ranked, others, last resort."""
    platform = next((p for p in PLATFORMS if p.match.matches(device)), None)
    ranked = [] if platform is None else [n for n in platform.order(phase) if n in registered]
    resort = [name for name in LAST_RESORT if name in registered]
    others = [name for name in registered if name not in ranked and name not in resort]
    return (*ranked, *others, *resort)
