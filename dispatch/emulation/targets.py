"""The AMD GPUs whose instruction sets are emulated."""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.emulation.errors import EmulationError

__all__ = ["TARGETS", "Target", "target_named"]


@dataclass(frozen=True)
class Target:
    """What differs between the instruction sets.

    Attributes:
        name: as LLVM and Triton name it.
        wave_size: lanes of a wave; Triton compiles CDNA kernels for 64 and RDNA kernels for 32.
        lds_bytes: that a workgroup can have.
        generation: 9 (CDNA), 11 (RDNA3) or 12 (RDNA4).
        has_fnuz: 8-bit floats are the "fnuz" formats of CDNA3, not the OCP formats.
    """

    name: str
    wave_size: int
    lds_bytes: int
    generation: int
    has_fnuz: bool = False

    @property
    def is_cdna(self) -> bool:
        """Whether it has the instruction set of the data center GPUs."""
        return self.generation == 9


_KIB = 1024
#: LLVM's AMDGPU usage guide and AMD's ISA manuals.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("gfx90a", 64, 64 * _KIB, 9),
        Target("gfx942", 64, 64 * _KIB, 9, has_fnuz=True),
        Target("gfx950", 64, 160 * _KIB, 9),
        Target("gfx1100", 32, 64 * _KIB, 11),
        Target("gfx1201", 32, 64 * _KIB, 12),
    )
}


def target_named(name: str) -> Target:
    """The target with this name.

    Raises:
        EmulationError: it is not emulated.
    """
    if name not in TARGETS:
        raise EmulationError(f"{name!r} is not emulated. The targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]
