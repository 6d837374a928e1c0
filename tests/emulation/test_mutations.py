"""Wrong kernels are noticed: changes of executed instructions, and each detector by itself."""

from __future__ import annotations

import dataclasses
import sys
from unittest import mock

import pytest

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.emulation.memory.lds import Lds
from support.compiling import needs_compiler, only_where_interpreted, passed_where_compiled
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from amd_changes import KINDS
from amd_mutations import NO_EFFECT, balanced, mutated_steps

pytestmark = pytest.mark.emulated

ARCH, SEED = "gfx942", 1
#: One prefill. It compiles faster than a step with decodes.
STEP = ((24,), (204,))
#: Of random changes, one or two of each kind, that have an effect.
LOWEST_RATE = 0.6


@only_where_interpreted
def test_in_a_process_that_compiles():
    assert passed_where_compiled(__file__) >= 8


@pytest.fixture(scope="module")
def steps():
    with mutated_steps(ARCH, [STEP]) as found:
        yield found


def of_prefill(steps, kind, pattern=""):
    """The changes of a kind to the prefill kernel, of instructions whose text has the pattern."""
    return [
        change
        for change in steps.changes([kind])
        if change.kernel.name == "prefill_kernel" and pattern in change.before
    ]


def noticed_by(steps, changes):
    return [steps.outcome(change).noticed_by for change in changes]


@needs_compiler
def test_most_random_changes_are_noticed(steps):
    changes = balanced(steps.changes(list(KINDS)), 14, SEED)
    outcomes = [steps.outcome(change) for change in changes]
    counted = [each for each in outcomes if each.unnoticed != NO_EFFECT]
    missed = [str(each.change) for each in counted if not each.noticed_by]
    assert len(counted) >= 10
    assert len(missed) <= (1 - LOWEST_RATE) * len(counted), "\n".join(missed)


@needs_compiler
def test_a_missing_barrier_is_noticed(steps):
    barriers = of_prefill(steps, "barrier")
    assert len(barriers) >= 6
    assert set(noticed_by(steps, barriers)) == {"RaceFault"}


@needs_compiler
def test_both_orders_of_waves_show_a_missing_barrier_without_the_detector_of_races(steps):
    with mock.patch.object(Lds, "_check_race"):
        assert noticed_by(steps, of_prefill(steps, "barrier")[-1:]) == ["WaveOrderFault"]


@needs_compiler
@pytest.mark.parametrize("kind", ["dropped wait", "weaker wait"])
def test_a_missing_wait_is_noticed(steps, kind):
    waits = of_prefill(steps, kind, "vmcnt(0)")
    assert len(waits) >= 2
    assert set(noticed_by(steps, waits)) == {"WaitFault"}


@needs_compiler
def test_a_missing_store_to_lds_is_noticed(steps):
    stores = of_prefill(steps, "instruction", "ds_write")
    first = min(stores, key=lambda change: change.line)
    assert noticed_by(steps, [first]) == ["UnwrittenRead"]


@needs_compiler
def test_an_access_outside_of_memory_is_noticed(steps):
    """Another pair of registers for the address of a scalar load."""
    loads = of_prefill(steps, "register", "s_load_dword")[:4]
    outcomes = [steps.outcome(change) for change in loads]
    assert any("outside of all regions" in each.message for each in outcomes)
    assert {each.noticed_by for each in outcomes} <= {"MemoryFault", "wrong result"}


@needs_compiler
def test_a_change_is_undone_and_one_without_an_effect_is_not_counted(steps):
    change = of_prefill(steps, "instruction", "ds_write")[0]
    assert steps.outcome(change).noticed_by
    same = of_prefill(steps, "instruction", "v_mov_b32")[0]
    outcome = steps.outcome(dataclasses.replace(same, after=same.before))
    assert (outcome.noticed_by, outcome.unnoticed) == ("", NO_EFFECT)
