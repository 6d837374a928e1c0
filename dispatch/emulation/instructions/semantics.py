"""The forms in which families of instructions say what an instruction does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["Execute", "Operation", "Semantics"]

#: Executes an instruction for all waves of a group.
Execute = Callable[[WaveGroup], None]


@dataclass(frozen=True)
class Semantics:
    """An instruction that is executed in one go.

    Attributes:
        execute: changes the state of the waves.
        results: `Registers.ids` of the results of a memory operation, which `execute` has written,
            but which have no defined value before the matching wait.
        sources: `Registers.ids` that it reads, where the text does not say so: if it has results,
            as one register may be both, or if it reads registers without naming them.
    """

    execute: Execute
    results: frozenset[int] = frozenset()
    sources: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Operation:
    """An instruction that computes from registers and writes registers.

    Attributes:
        compute: reads registers; the result may be a view of one.
        commit: writes a result of `compute`.
    """

    compute: Callable[[WaveGroup], Any]
    commit: Callable[[WaveGroup, Any], None]

    def execute(self, group: WaveGroup) -> None:
        """Compute and write."""
        self.commit(group, self.compute(group))
