"""Are wrong AMD kernels noticed? Changes one executed instruction at a time, and runs a step.

    python benchmarks/amd_mutations.py gfx942 --count 150
    python benchmarks/amd_mutations.py gfx942 --kind barrier --count 0

Steps of TRITON_ATTN with a prefill, decodes and a write to the cache run on the emulated GPU. Then
an instruction that they execute is changed as a bug of a compiler or of a GPU would do it: another
operation, register, offset or lane, EXEC not restored, a weaker wait, no barrier
(`amd_changes.KINDS`). A change is noticed if the emulator finds a fault, or if the result differs
from the float64 oracle by more than is allowed. A change of a barrier or a wait that is not noticed
when waves run in lockstep runs in both orders of waves, too. What the first step does not notice
runs in the second one, which has more requests.

What was not noticed is printed with its class:

- no effect: each time, the changed instruction leaves the same registers and the same operations
  pending as the original one. So it cannot be noticed, and does not count in the rates.
- same result: it has an effect, but the result and the cache have the same bits.
- small difference: less than the error that is allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from amd_changes import KINDS, Change, changes_of, is_memory_or_control

from attn_dispatch import __version__
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.conformance.check import BackendUnderTest, same_bits
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.tolerance import CheckFailed
from attn_dispatch.emulation import TARGETS, Emulation, EmulationError, machine
from attn_dispatch.emulation.assembly import Instruction, parse_instruction
from attn_dispatch.emulation.instructions.decode import Decoded, decode
from attn_dispatch.emulation.machine import Kernel, LaunchCounts, WaveOrder
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["MutatedSteps", "Outcome", "mutated_steps"]

NO_EFFECT, SAME_RESULT, SMALL_DIFFERENCE = "no effect", "same result", "small difference"
#: Changes that the order of waves may show.
_ORDER_KINDS = ("barrier", "dropped wait", "weaker wait")
#: (query_lens, seq_lens) of the steps.
STEPS = (
    ((3, 1, 24), (21, 160, 204)),
    ((1, 1, 5, 1, 40, 1, 1), (90, 7, 33, 260, 100, 129, 64)),
)
#: A changed kernel that executes this many times as much as all steps does not end.
_ENDLESS = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a change.

    Attributes:
        change: the change.
        noticed_by: "wrong result", the name of a fault, "does not end"; "" if nothing noticed it.
        unnoticed: `NO_EFFECT`, `SAME_RESULT` or `SMALL_DIFFERENCE` if nothing noticed it.
        message: of the fault.
    """

    change: Change
    noticed_by: str = ""
    unnoticed: str = ""
    message: str = ""


class MutatedSteps:
    """Steps of TRITON_ATTN on an emulated GPU, whose kernels can be changed.

    Args:
        device: the GPU.
        emulation: the one that is active.
        steps: (query_lens, seq_lens) of each.

    Attributes:
        kernels: what the steps launch, with the lines of the assembly that are executed.
    """

    def __init__(
        self,
        device: EmulatedDevice,
        emulation: Emulation,
        steps: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = STEPS,
    ) -> None:
        self._emulation = emulation
        self._target = BackendUnderTest(TritonAttnBackend, torch.device("cpu"), device.profile)
        spec = self._target.base.replace(
            head_size=64, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16, block_size=16
        )
        self._steps = [
            self._target.step(spec, query_lens=query_lens, seq_lens=seq_lens)
            for query_lens, seq_lens in steps
        ]
        self.kernels: dict[Kernel, set[int]] = {}
        with self._recorded():
            self._expected = [self._run(step) for step in self._steps]
        self._limit = _ENDLESS * sum(each.instructions for each in emulation.launches)

    def _run(self, step: EngineStep) -> tuple[torch.Tensor, ...]:
        """The result and the cache; raises CheckFailed if they are wrong, or EmulationError."""
        done = self._target.forward(step)
        self._target.judge(step, done)
        return done.returned, done.cache

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        launch = Kernel.launch

        def recorded(kernel: Kernel, *args: object, **more: object) -> LaunchCounts:
            counts = launch(kernel, *args, **more)  # type: ignore[arg-type]
            self.kernels.setdefault(kernel, set()).update(counts.lines)
            return counts

        with mock.patch.object(Kernel, "launch", recorded):
            yield

    def changes(self, kinds: Collection[str]) -> list[Change]:
        """All changes of some kinds to instructions that the steps execute."""
        return [
            change
            for kernel, lines in self.kernels.items()
            for change in changes_of(kernel, lines, kinds)
        ]

    def outcome(self, change: Change) -> Outcome:
        """Run the steps with a change, until one notices it."""
        orders: tuple[WaveOrder, ...] = ("lockstep", "both")
        differs = False
        for step, expected in zip(self._steps, self._expected, strict=True):
            for order in orders if change.kind in _ORDER_KINDS else orders[:1]:
                try:
                    with (
                        changed(change),
                        mock.patch.object(self._emulation, "wave_order", order),
                        mock.patch.object(machine, "_LIMIT", self._limit),
                    ):
                        found = self._run(step)
                except CheckFailed as error:
                    return Outcome(change, "wrong result", message=str(error))
                except EmulationError as error:
                    message = str(error)
                    name = "does not end" if "does not end" in message else type(error).__name__
                    return Outcome(change, name, message=message)
                differs |= not all(map(same_bits, found, expected))
        if differs:
            return Outcome(change, unnoticed=SMALL_DIFFERENCE)
        return Outcome(change, unnoticed=NO_EFFECT if self._has_no_effect(change) else SAME_RESULT)

    def _has_no_effect(self, change: Change) -> bool:
        """Whether the changed instruction always leaves the same state as the original one."""
        original = decode(_instruction_at(change.kernel, change.line), change.kernel.target)
        if is_memory_or_control(original.text):
            return False
        other, differences = _decoded(change.kernel, change.line, change.after), [0]

        def compared(group: WaveGroup) -> None:
            copy = group.only(np.ones(group.num_waves, np.bool_))
            other.execute(copy)
            original.execute(group)
            differences[0] += not _is_same(copy, group)

        watched = dataclasses.replace(original, execute=compared)
        with _replaced(change.kernel, {change.line: watched}):
            for step in self._steps:
                self._run(step)
        return not differences[0]


def _is_same(one: WaveGroup, other: WaveGroup) -> bool:
    """Whether registers and pending operations are the same."""
    states = [(each.s_u32, each.v_u32, each.a_u32, each.scc) for each in (one, other)]
    same_pending = one.pending_operations == other.pending_operations
    return same_pending and all(map(np.array_equal, *states))


def _instruction_at(kernel: Kernel, line: int) -> Instruction:
    return next(each for each in kernel.assembly.instructions if each.line == line)


def _decoded(kernel: Kernel, line: int, text: str) -> Decoded:
    """Another instruction in a line."""
    source = _instruction_at(kernel, line).source
    return decode(parse_instruction(text, line, source), kernel.target)


@contextlib.contextmanager
def _replaced(kernel: Kernel, replacements: Mapping[int, Decoded]) -> Iterator[None]:
    """Within this context, the kernel has other instructions in some lines."""
    undo = []
    for index, block in enumerate(kernel.assembly.blocks):
        for at, instruction in enumerate(block):
            if instruction.line in replacements:
                decoded = kernel.block(index)
                undo.append((block, decoded, at, decoded[at]))
                decoded[at] = replacements[instruction.line]
                block[at] = decoded[at].text
    try:
        yield
    finally:
        for block, decoded, at, original in undo:
            decoded[at], block[at] = original, original.text


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Within this context, the kernel has the change."""
    texts = dict.fromkeys(change.removed, "s_nop 0") | {change.line: change.after}
    kernel = change.kernel
    with _replaced(kernel, {line: _decoded(kernel, line, texts[line]) for line in texts}):
        yield


@contextlib.contextmanager
def mutated_steps(arch: str, steps: Sequence[Any] = STEPS) -> Iterator[MutatedSteps]:
    """The steps on an emulated GPU, within which they run."""
    torch.set_num_threads(1)
    device = EmulatedDevice.named(arch)
    with device.running() as emulation:
        yield MutatedSteps(device, emulation, steps)


def balanced(changes: list[Change], count: int, seed: int) -> list[Change]:
    """A random choice with the same number of each kind, as far as there are any; 0: all."""
    random.Random(seed).shuffle(changes)
    if not count:
        return changes
    turn: Counter[str] = Counter()
    ranked = []
    for change in changes:
        turn[change.kind] += 1
        ranked.append((turn[change.kind], change))
    return [change for _, change in sorted(ranked, key=lambda each: each[0])[:count]]


# Output -------------------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> str:
    """Rates by kind, and what noticed the changes."""
    rows: list[tuple[object, ...]] = [("kind", "tried", "no effect", "noticed", "rate", "by")]
    for kind in [*KINDS, "all"]:
        of_kind = [each for each in outcomes if kind in (each.change.kind, "all")]
        counted = [each for each in of_kind if each.unnoticed != NO_EFFECT]
        noticed = Counter(each.noticed_by for each in counted if each.noticed_by)
        count, total = len(of_kind), sum(noticed.values())
        rate = f"{total / len(counted):.0%}" if counted else "-"
        by = ", ".join(f"{name} {number}" for name, number in noticed.most_common())
        if of_kind:
            rows.append((kind, count, count - len(counted), total, rate, by))
    return "\n".join("{:<14}{:>6}{:>11}{:>9}{:>7}  {}".format(*row) for row in rows)


def main() -> int:
    """Run, change, print."""
    parser = argparse.ArgumentParser(description="Are wrong AMD kernels noticed?")
    parser.add_argument("arch", choices=tuple(TARGETS))
    parser.add_argument("--count", type=int, default=100, help="changes that are tried; 0: all")
    parser.add_argument("--kind", choices=tuple(KINDS), action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start, outcomes = time.monotonic(), []
    with mutated_steps(args.arch) as steps:
        possible = steps.changes(args.kind or list(KINDS))
        with contextlib.suppress(KeyboardInterrupt):  # the table is of what was tried until then
            for change in balanced(list(possible), args.count, args.seed):
                outcomes.append(steps.outcome(change))
                if outcomes[-1].unnoticed:
                    print(f"{outcomes[-1].unnoticed}: {change}", flush=True)
    print(
        f"{args.arch}, seed {args.seed}: {len(outcomes)} of {len(possible)} changes; attn-dispatch "
        f"{__version__}, Triton {triton.__version__}; {time.monotonic() - start:.0f} s"
    )
    print(table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
