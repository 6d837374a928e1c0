"""How many programs of a kernel fit on a part of each known GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["UNITS", "Unit"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What the programs on one SM, CU or, on RDNA, pair of CUs share (vendors' manuals).

    Attributes:
        shared_bytes: shared memory or LDS.
        reserved_bytes: of it, that the system takes for each program.
        partitions: schedulers or SIMDs, each with its own registers.
        registers: of a partition, for one lane.
        granule: registers of a lane are given out in multiples of this.
        warps: that a partition holds.
        programs: that the unit holds.
    """

    shared_bytes: int
    reserved_bytes: int = 0
    partitions: int = 4
    registers: int = 512
    granule: int = 8
    warps: int = 16
    programs: int = 32

    def holds(self, shared_bytes: int, registers: int, num_warps: int) -> int:
        """Programs that fit at a time; 0 if not even one does."""
        rounded = -(-max(registers, 1) // self.granule) * self.granule
        warps = self.partitions * min(self.warps, self.registers // rounded)
        by_memory = self.shared_bytes // max(shared_bytes + self.reserved_bytes, 1)
        return min(self.programs, warps // num_warps, by_memory)


_KIB = 1024
_CDNA = Unit(shared_bytes=64 * _KIB, warps=8)
_RDNA = Unit(shared_bytes=128 * _KIB, registers=1536, granule=24)
#: By the name of the device.
UNITS = {
    "sm80": Unit(shared_bytes=164 * _KIB, reserved_bytes=_KIB),
    "sm86": Unit(shared_bytes=100 * _KIB, reserved_bytes=_KIB, warps=12, programs=16),
    "sm89": Unit(shared_bytes=100 * _KIB, reserved_bytes=_KIB, warps=12, programs=24),
    "sm90": Unit(shared_bytes=228 * _KIB, reserved_bytes=_KIB),
    "sm100": Unit(shared_bytes=228 * _KIB, reserved_bytes=_KIB),
    "sm120": Unit(shared_bytes=100 * _KIB, reserved_bytes=_KIB, warps=12, programs=24),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": dataclasses.replace(_CDNA, shared_bytes=160 * _KIB),
    "gfx1100": _RDNA,
    "gfx1201": _RDNA,
}
