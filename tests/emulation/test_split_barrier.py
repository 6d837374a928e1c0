"""RDNA4 has two instructions for a barrier: what comes between them is not ordered."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.errors import KernelFault, RaceFault, UnknownInstruction, WaitFault
from support.assembly import launch

LANES = 64  # of two waves
WAIT, SIGNAL, PASS = "s_wait_dscnt 0x0", "s_barrier_signal -1", "s_barrier_wait -1"


def run(*lines, wave_order="lockstep"):
    """Each lane reads what the other wave's lane has written to LDS, with these lines between."""
    body = "\n".join(
        [
            "s_load_b64 s[4:5], s[0:1], 0x0",
            "v_lshlrev_b32_e32 v1, 2, v0",
            f"v_xor_b32_e32 v2, 0x{4 * LANES // 2:x}, v1",
            *lines,
            "ds_load_b32 v3, v2",
            "s_wait_dscnt 0x0",
            "s_wait_kmcnt 0x0",
            "global_store_b32 v1, v3, s[4:5]",
        ]
    )
    out = np.zeros(LANES, np.uint32)
    launch("gfx1201", body, out, num_waves=2, lds_bytes=8 * LANES, wave_order=wave_order)
    return out.tolist()


WRITE = "ds_store_b32 v1, v0"
OTHER_WAVES = [i ^ (LANES // 2) for i in range(LANES)]


@pytest.mark.parametrize("wave_order", ["lockstep", "both"])
def test_an_access_before_the_signal_is_ordered(wave_order):
    assert run(WRITE, WAIT, SIGNAL, "s_nop 0", PASS, wave_order=wave_order) == OTHER_WAVES
    unrelated = "ds_store_b32 v1, v0 offset:256"  # in flight, but it is read by no other wave
    assert run(WRITE, WAIT, SIGNAL, unrelated, PASS, wave_order=wave_order) == OTHER_WAVES


@pytest.mark.parametrize(
    "lines",
    [(WAIT, SIGNAL, WRITE, WAIT, PASS), (WRITE, SIGNAL, WAIT, PASS), (WRITE, SIGNAL, PASS)],
    ids=["after the signal", "waited for after the signal", "never waited for"],
)
def test_an_access_that_may_be_after_the_signal_is_a_race(lines):
    with pytest.raises(RaceFault, match="LDS"):
        run(*lines)


def test_the_next_barrier_orders_it():
    assert run(SIGNAL, WRITE, WAIT, PASS, SIGNAL, PASS) == OTHER_WAVES


def test_a_barrier_without_a_signal_never_ends():
    with pytest.raises(KernelFault, match="has not signalled"):
        run(WRITE, WAIT, PASS)
    with pytest.raises(KernelFault, match="has not signalled"):
        run(WRITE, WAIT, SIGNAL, PASS, PASS)


def test_a_signal_without_a_wait_is_a_fault():
    with pytest.raises(KernelFault, match="has not waited for the last one"):
        run(WRITE, WAIT, SIGNAL, SIGNAL, PASS)


def test_waves_that_branch_between_signal_and_wait_meet_again():
    """One wave jumps over an instruction; its signal is not lost."""
    jump = ["v_cmp_gt_u32_e32 vcc_lo, 32, v0", "s_cbranch_vccnz .LBB0_1", "s_nop 0", ".LBB0_1:"]
    assert run(WRITE, WAIT, SIGNAL, *jump, PASS) == OTHER_WAVES
    with pytest.raises(RaceFault, match="LDS"):
        run(SIGNAL, WRITE, WAIT, *jump, PASS)


def test_other_barriers_are_not_known():
    with pytest.raises(UnknownInstruction, match="only the barrier -1 is known"):
        run("s_barrier_signal 1")
    with pytest.raises(UnknownInstruction, match="only the barrier -1 is known"):
        run(SIGNAL, "s_barrier_wait -2")


@pytest.mark.parametrize("in_time", [True, False])
def test_a_store_must_have_been_waited_for_before_the_signal(in_time):
    """Another wave reads the store after the barrier."""
    wait = "s_wait_storecnt 0x0"
    body = f"""
    s_load_b64 s[4:5], s[0:1], 0x0
    v_lshlrev_b32_e32 v1, 2, v0
    v_xor_b32_e32 v2, 0x{4 * LANES // 2:x}, v1
    s_wait_kmcnt 0x0
    global_store_b32 v1, v0, s[4:5]
    {wait if in_time else ""}
    s_barrier_signal -1
    {wait}
    s_barrier_wait -1
    {{}}
    global_load_b32 v3, v2, s[4:5]
    s_wait_loadcnt 0x0
    global_store_b32 v1, v3, s[4:5] offset:{4 * LANES}"""
    out = np.zeros(2 * LANES, np.uint32)
    if in_time:
        launch("gfx1201", body.format(""), out, num_waves=2)
        assert out[LANES:].tolist() == OTHER_WAVES
        return
    with pytest.raises(WaitFault, match="in flight"):
        launch("gfx1201", body.format(""), out, num_waves=2)
    # The signal of the next barrier comes after that wait.
    launch("gfx1201", body.format(f"{SIGNAL}\n{PASS}"), out, num_waves=2)
    assert out[LANES:].tolist() == OTHER_WAVES
