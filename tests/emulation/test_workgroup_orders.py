"""Workgroups that use each other's stores: what orders them, and what finds that nothing does."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.errors import WaitFault, WaveOrderFault
from support.assembly import in_names_of, launch

ARCHS = ("gfx942", "gfx1100")
WAIT = "s_waitcnt_vscnt null, 0x0"
ATOMIC = "global_atomic_add_u32 v5, v2, s[4:5] offset:32"


def run(arch, *lines, other=1, wave_order="lockstep"):
    """Workgroup i stores i + 1 to word i, and copies word i ^ `other` to word 4 + i.

    Args:
        arch: the target.
        *lines: between the two.
        other: 0 for the workgroup's own word.
        wave_order: as for `launch`.
    """
    body = in_names_of(
        arch,
        "s_load_b64 s[4:5], s[0:1], 0x0",
        "s_mov_b32 exec_lo, 1",
        "s_mov_b32 exec_hi, 0" if arch == "gfx942" else "",
        "s_add_i32 s6, s2, 1",
        "s_lshl_b32 s7, s2, 2",
        "v_mov_b32_e32 v1, s7",
        "v_mov_b32_e32 v2, s6",
        "v_mov_b32_e32 v5, 0",
        f"v_xor_b32_e32 v3, {4 * other}, v1",
        "s_waitcnt lgkmcnt(0)",
        "global_store_b32 v1, v2, s[4:5]",
        *lines,
        "global_load_b32 v4, v3, s[4:5]",
        "s_waitcnt vmcnt(0)",
        "global_store_b32 v1, v4, s[4:5] offset:16",
    )
    data = np.zeros(9, np.uint32)
    launch(arch, body, data, grid=(4, 1, 1), wave_order=wave_order)
    return data[4:8].tolist()


@pytest.mark.parametrize("arch", ARCHS)
def test_both_orders_show_that_a_result_depends_on_which_workgroup_runs_first(arch):
    assert run(arch, WAIT, other=0, wave_order="both") == [1, 2, 3, 4]
    # Each workgroup sees what those before it have stored.
    assert run(arch, WAIT, wave_order="forward") == [0, 1, 0, 3]
    assert run(arch, WAIT, wave_order="backward") == [2, 0, 4, 0]
    with pytest.raises(WaveOrderFault, match="argument 0"):
        run(arch, WAIT, wave_order="both")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_store_is_released_by_a_wait_and_then_an_atomic_operation(arch):
    """As the parts of a split decode: the last program to add to a counter reads all parts."""
    assert run(arch, WAIT, ATOMIC, WAIT) == [2, 1, 4, 3]
    # One wave without lanes in EXEC, such as those that do not release, does no operation.
    none = ["s_mov_b32 s8, exec_lo", "s_mov_b32 exec_lo, 0", ATOMIC, "s_mov_b32 exec_lo, s8"]
    for lines in [(WAIT,), (ATOMIC,), (ATOMIC, WAIT), (WAIT, *none, WAIT)]:
        with pytest.raises(WaitFault, match="no barrier and done no atomic operation"):
            run(arch, *lines)
