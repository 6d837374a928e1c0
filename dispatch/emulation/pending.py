"""Memory operations that a wave has issued and not waited for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.memory.lds import LdsAccess

__all__ = ["ORDER_OF_OPCODE", "Pending"]

#: Kinds whose operations finish in the order of their issue, if they share a counter. Scalar loads
#: and flat accesses finish in any order.
_ORDERED = {"load": "vector memory", "store": "vector memory", "lds": "LDS"}
#: The same by how the opcode begins.
ORDER_OF_OPCODE = {
    "global": "vector memory", "scratch": "vector memory", "buffer": "vector memory", "ds": "LDS",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pending:
    """A memory operation that nothing has waited for yet.

    A flat access adds to two counters, and is two of these.

    Attributes:
        instruction: that issued it.
        kind: as for `waits.issue`.
        counter: that it adds to.
        registers: `Registers.ids` that it will write.
        access: of memory: stores that are in flight, or accesses of LDS.
    """

    instruction: Instruction
    kind: str
    counter: str
    registers: frozenset[int] = frozenset()
    access: StoresInFlight | LdsAccess | None = None

    @property
    def order(self) -> str | None:
        """What finishes in the order of issue, if it shares a counter; None if nothing does."""
        return _ORDERED.get(self.kind)

    def only(self, waves: NDArray[np.int64]) -> Pending:
        """The part of some of the waves."""
        if self.access is None:
            return self
        return dataclasses.replace(self, access=self.access.only(waves))

    def joined(self, other: Pending) -> Pending:
        """The operation of the waves of both."""
        if self.access is None:
            return self
        access: Any = self.access
        return dataclasses.replace(self, access=access.joined(other.access))
