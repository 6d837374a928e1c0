"""Are wrong AMD kernels noticed? Changes one executed instruction at a time, and runs a step.

    python benchmarks/amd_mutations.py gfx942 [--count 100] [--kind barrier] [--seed 1]

A step of TRITON_ATTN with a prefill, decodes and a write to the cache runs on the emulated GPU.
Then an instruction that the step executes is replaced by a similar one: another operation, swapped
operands, another offset, another lane, nothing in the place of a barrier or a wait. A change is
noticed if the result differs from the float64 oracle by more than is allowed, or if the emulator
finds a fault. Changes that make no difference (a barrier that another one makes superfluous, a
mask that is full) cannot be noticed; all that were not are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.conformance.cases import EngineStep
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.emulated import emulated_device
from attn_dispatch.conformance.tolerance import CheckFailed
from attn_dispatch.emulation import TARGETS, EmulationError, triton_driver
from attn_dispatch.emulation.machine import Kernel
from attn_dispatch.emulation.targets import Target

#: kind -> (pattern of an instruction, its replacement).
CHANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "arithmetic": (
        (r"^v_add_f32", "v_sub_f32"),
        (r"^v_mul_f32", "v_add_f32"),
        (r"^v_max_f32|^v_max_num_f32", "v_min_f32"),
        (r"^v_lshlrev_b32", "v_lshrrev_b32"),
        (r"^v_or_b32", "v_and_b32"),
        (r"^v_and_b32", "v_or_b32"),
        (r"^s_add_i32", "s_sub_i32"),
        (r"^s_add_co_i32", "s_sub_co_i32"),
    ),
    "comparison": (
        (r"^v_cmp_gt_", "v_cmp_lt_"),
        (r"^v_cmp_lt_", "v_cmp_ge_"),
        (r"^v_cmp_le_", "v_cmp_gt_"),
        (r"^s_cmp_lt_i32", "s_cmp_gt_i32"),
        (r"^(v_cndmask_b32\S*) (\S+), (\S+), (\S+),", r"\1 \2, \4, \3,"),
    ),
    "operands": (
        (r"^(v_(?:mfma|wmma)\S+) (\S+), (\S+), (\S+),", r"\1 \2, \4, \3,"),
        (r"^(v_perm_b32) (\S+), (\S+), (\S+),", r"\1 \2, \4, \3,"),
        (r"offset:(\d+)$", "offset:+16"),
    ),
    "lanes": (
        (r"quad_perm:\[1,0,3,2\]", "quad_perm:[2,3,0,1]"),
        (r"row_shr:8", "row_shr:4"),
        (r"swizzle\(SWAP,16\)", "swizzle(SWAP,8)"),
    ),
    "barrier": ((r"^s_barrier(_wait -1)?$", "s_nop 0"),),
    "wait": ((r"^s_waitcnt .*$|^s_wait_(load|ds|km|store)cnt.*$", "s_nop 0"),),
}


@dataclass(frozen=True)
class Change:
    """A change of one line of a kernel's assembly."""

    kernel: str
    line: int
    before: str
    after: str


def run_step(target: BackendUnderTest, step: EngineStep) -> None:
    """Run the step and compare it with the oracle; raises CheckFailed or EmulationError."""
    target.run_and_judge(step)


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Within it, the kernel has the changed line."""
    read: Callable[..., Kernel] = triton_driver._kernel.__wrapped__

    def kernel_of(key: str, name: str, target: Target) -> Kernel:
        kernel = read(key, name, target)
        if change.kernel != key:
            return kernel
        lines = kernel.assembly.text.splitlines()
        lines[change.line - 1] = change.after
        return Kernel("\n".join(lines), target)

    with mock.patch.object(triton_driver, "_kernel", kernel_of):
        yield


def executed_lines(run: Callable[[], None]) -> dict[str, set[tuple[int, str]]]:
    """Kernel's key -> lines, with their texts, that a run executes."""
    found: dict[str, set[tuple[int, str]]] = {}
    read: Callable[..., Kernel] = triton_driver._kernel.__wrapped__

    def kernel_of(key: str, name: str, target: Target) -> Kernel:
        kernel = read(key, name, target)
        launch = kernel.launch

        def recorded(*args: object, **more: object) -> object:
            counts = launch(*args, **more)  # type: ignore[arg-type]
            texts = {each.line: each.text for each in kernel.assembly.instructions}
            found.setdefault(key, set()).update((line, texts[line]) for line in counts.lines)
            return counts

        kernel.launch = recorded  # type: ignore[method-assign, assignment]
        return kernel

    with mock.patch.object(triton_driver, "_kernel", kernel_of):
        run()
    return found


def changes_of(executed: dict[str, set[tuple[int, str]]], kinds: list[str]) -> list[Change]:
    """All changes of these kinds to what was executed."""
    found = []
    for key, lines in executed.items():
        for line, text in sorted(lines):
            for pattern, replacement in (pair for kind in kinds for pair in CHANGES[kind]):
                if re.search(pattern, text):
                    after = re.sub(pattern, replacement, text, count=1)
                    moved = re.search(r"offset:(\d+)$", text)
                    if moved and replacement == "offset:+16":
                        after = text.replace(moved[0], f"offset:{int(moved[1]) + 16}")
                    found.append(Change(key, line, text, after))
    return found


def outcome(run: Callable[[], None]) -> str:
    """What notices the change: "" if nothing does."""
    try:
        run()
    except CheckFailed:
        return "wrong result"
    except EmulationError as error:
        return type(error).__name__
    return ""


def main() -> int:
    """Run, change, print."""
    parser = argparse.ArgumentParser(description="Are wrong AMD kernels noticed?")
    parser.add_argument("arch", choices=tuple(TARGETS))
    parser.add_argument("--count", type=int, default=100, help="changes that are tried")
    parser.add_argument("--kind", choices=tuple(CHANGES), action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--wave-order", default="lockstep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with emulated_device(args.arch, wave_order=args.wave_order) as device:
        target = BackendUnderTest(TritonAttnBackend, torch.device("cpu"), device.profile)
        spec = target.base.replace(
            head_size=64, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16, block_size=16
        )
        step = target.step(spec, query_lens=(1, 24, 3, 1), seq_lens=(39, 44, 21, 300))

        def run() -> None:
            run_step(target, step)

        executed = executed_lines(run)
        possible = changes_of(executed, args.kind or list(CHANGES))
        random.Random(args.seed).shuffle(possible)
        chosen, start = possible[: args.count], time.monotonic()
        noticed: dict[str, int] = {}
        for change in chosen:
            with changed(change):
                how = outcome(run)
            noticed[how] = noticed.get(how, 0) + 1
            if not how:
                print(f"not noticed: line {change.line}: {change.before}  ->  {change.after}")
        run()
    missed = noticed.pop("", 0)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(noticed.items()))
    print(
        f"{args.arch}: {len(chosen) - missed} of {len(chosen)} changes noticed ({kinds}); "
        f"{len(possible)} possible; {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
