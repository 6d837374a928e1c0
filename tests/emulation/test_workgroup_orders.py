"""Workgroups that use each other's results without being ordered are found by both orders."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.errors import WaveOrderFault
from support.assembly import launch

WAIT_FOR_STORES = {"gfx942": "s_waitcnt vmcnt(0)", "gfx1100": "s_waitcnt_vscnt null, 0x0"}
#: What loads an address, loads a word, and stores one.
NAMES = {
    "gfx942": ("s_load_dwordx2", "global_load_dword", "global_store_dword"),
    "gfx1100": ("s_load_b64", "global_load_b32", "global_store_b32"),
}


def run(arch, other, *, wave_order):
    """Workgroup i stores i + 1 to word i, waits, and copies word i ^ `other` to word 4 + i."""
    load_address, load, store = NAMES[arch]
    body = f"""
    {load_address} s[4:5], s[0:1], 0x0
    s_mov_b32 exec_lo, 1
    s_mov_b32 exec_hi, 0
    s_add_i32 s6, s2, 1
    s_lshl_b32 s7, s2, 2
    v_mov_b32_e32 v1, s7
    v_mov_b32_e32 v2, s6
    s_waitcnt lgkmcnt(0)
    {store} v1, v2, s[4:5]
    {WAIT_FOR_STORES[arch]}
    v_xor_b32_e32 v3, {4 * other}, v1
    {load} v4, v3, s[4:5]
    s_waitcnt vmcnt(0)
    {store} v1, v4, s[4:5] offset:16"""
    if arch != "gfx942":
        body = body.replace("s_mov_b32 exec_hi, 0", "")
    data = np.zeros(8, np.uint32)
    launch(arch, body, data, grid=(4, 1, 1), wave_order=wave_order)
    return data[4:].tolist()


@pytest.mark.parametrize("arch", NAMES)
def test_a_workgroup_that_reads_what_another_one_stores(arch):
    assert run(arch, 0, wave_order="both") == [1, 2, 3, 4]
    # Each workgroup sees what those before it have stored.
    assert run(arch, 1, wave_order="lockstep") == [2, 1, 4, 3]
    assert run(arch, 1, wave_order="forward") == [0, 1, 0, 3]
    assert run(arch, 1, wave_order="backward") == [2, 0, 4, 0]
    with pytest.raises(WaveOrderFault, match="argument 0"):
        run(arch, 1, wave_order="both")
