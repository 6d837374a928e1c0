"""What the waves of a launch share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.memory.lds import Lds
from attn_dispatch.emulation.memory.scratch import Scratch
from attn_dispatch.emulation.targets import Target

__all__ = ["Shared"]


@dataclass
class Shared:
    """What the waves share of the workgroups of a launch that run at the same time.

    Attributes:
        target: the GPU.
        grid: workgroups in each dimension, of the whole launch.
        workgroups: (workgroups,) the numbers of those that run, in the launch.
        waves_per_workgroup: how many waves each has.
        memory: that the kernel may access.
        lds: of all these workgroups.
        scratch: private memory of all lanes.
    """

    target: Target
    grid: tuple[int, int, int]
    workgroups: NDArray[np.int64]
    waves_per_workgroup: int
    memory: GlobalMemory
    lds: Lds
    scratch: Scratch

    @property
    def num_waves(self) -> int:
        """Waves that run."""
        return len(self.workgroups) * self.waves_per_workgroup
