"""Each fault detector catches a kernel with that fault, and lets the repaired one run.

The kernels are written for CDNA and RDNA: two waves of a workgroup exchange values through LDS or
memory, or one wave uses memory wrongly.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from attn_dispatch.emulation.errors import (
    KernelFault,
    MemoryFault,
    RaceFault,
    UnwrittenRead,
    WaitFault,
    WaveOrderFault,
)
from support.assembly import in_names_of, launch

ARCHS = ("gfx942", "gfx1100")


#: Lanes of two waves.
LANES = {"gfx942": 128, "gfx1100": 64}


def exchange(arch: str, *, without: str = "") -> str:
    """Each lane stores its number to LDS and reads that of the other wave's lane.

    Args:
        arch: the target.
        without: "barrier", or "wait" for the wait before it.
    """
    lines = {
        "address": "s_load_b64 s[4:5], s[0:1], 0x0",
        "offset": "v_lshlrev_b32_e32 v1, 2, v0",
        "write": "ds_store_b32 v1, v0",
        "wait": "s_waitcnt lgkmcnt(0)",
        "barrier": "s_barrier",
        "other": f"v_xor_b32_e32 v2, 0x{4 * LANES[arch] // 2:x}, v1",
        "read": "ds_load_b32 v3, v2",
        "wait for it": "s_waitcnt lgkmcnt(0)",
        "store": "global_store_b32 v1, v3, s[4:5]",
    }
    return in_names_of(arch, *(line for name, line in lines.items() if name != without))


@pytest.mark.parametrize("arch", ARCHS)
def test_waves_exchange_values_through_lds(arch):
    lanes = LANES[arch]
    out = np.zeros(lanes, np.uint32)
    body = exchange(arch)
    launch(arch, body, out, num_waves=2, lds_bytes=4 * lanes)
    assert out.tolist() == [i ^ (lanes // 2) for i in range(lanes)]
    out[:] = 0
    launch(arch, body, out, num_waves=2, lds_bytes=4 * lanes, wave_order="both")
    assert out.tolist() == [i ^ (lanes // 2) for i in range(lanes)]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_missing_barrier_is_a_race(arch):
    out = np.zeros(LANES[arch], np.uint32)
    with pytest.raises(RaceFault, match="LDS"):
        launch(arch, exchange(arch, without="barrier"), out, num_waves=2, lds_bytes=4 * len(out))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_barrier_without_a_wait_before_it_is_a_race(arch):
    """The values may arrive after the barrier: nothing has waited for them."""
    out = np.zeros(LANES[arch], np.uint32)
    with pytest.raises(RaceFault, match="LDS"):
        launch(arch, exchange(arch, without="wait"), out, num_waves=2, lds_bytes=4 * len(out))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("without", ["wait for it", "wait of the address"])
def test_a_result_that_nothing_waited_for_is_a_fault(arch, without):
    lines = {
        "address": "s_load_b64 s[4:5], s[0:1], 0x0",
        "wait of the address": "s_waitcnt lgkmcnt(0)",
        "offset": "v_lshlrev_b32_e32 v1, 2, v0",
        "load": "global_load_b32 v2, v1, s[4:5]",
        "wait for it": "s_waitcnt vmcnt(0)",
        "add": "v_add_f32_e32 v2, 1.0, v2",
        "store": "global_store_b32 v1, v2, s[4:5]",
    }
    data = np.arange(64, dtype=np.float32)
    launch(arch, in_names_of(arch, *lines.values()), data)
    executed = LANES[arch] // 2
    assert data.tolist() == [i + (i < executed) for i in range(64)]
    del lines[without]
    broken = in_names_of(arch, *lines.values())
    register = "v2" if without == "wait for it" else "s4"
    with pytest.raises(WaitFault, match=rf"{register} is used before the wait") as caught:
        launch(arch, broken, data)
    assert any(re.search(rf"tiny on {arch}, line \d+: ", note) for note in caught.value.__notes__)


def test_the_upper_half_of_vcc_is_no_condition_of_32_lanes():
    """The compiler loads other values into it: a branch on VCC need not wait for them."""
    lines = {
        "address": "s_load_b64 s[4:5], s[0:1], 0x0",
        "wait": "s_waitcnt lgkmcnt(0)",
        "condition": "s_mov_b32 vcc_lo, 1",
        "load": "s_load_b32 vcc_hi, s[4:5], 0x0",
        "branch": "s_cbranch_vccz .LEND",
        "wait for it": "s_waitcnt lgkmcnt(0)",
        "offset": "v_lshlrev_b32_e32 v1, 2, v0",
        "value": "v_mov_b32_e32 v2, vcc_hi",
        "store": "global_store_b32 v1, v2, s[4:5]",
        "end": ".LEND:",
    }
    data = np.full(64, 7, np.uint32)
    data[1:] = 0
    launch("gfx1100", "\n".join(lines.values()), data)
    assert data.tolist() == [7] * 32 + [0] * 32
    del lines["wait for it"]
    with pytest.raises(WaitFault, match="s107 is used before the wait"):
        launch("gfx1100", "\n".join(lines.values()), data)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_store_that_another_wave_reads_must_have_been_waited_for(arch):
    """Through memory: a barrier orders the waves, but only a wait makes the stores arrive."""
    half = LANES[arch] // 2
    lines = {
        "address": "s_load_b64 s[4:5], s[0:1], 0x0",
        "offset": "v_lshlrev_b32_e32 v1, 2, v0",
        "its wait": "s_waitcnt lgkmcnt(0)",
        "store": "global_store_b32 v1, v0, s[4:5]",
        "wait": "s_waitcnt_vscnt null, 0x0",
        "barrier": "s_barrier",
        "other": f"v_xor_b32_e32 v2, 0x{4 * half:x}, v1",
        "load": "global_load_b32 v3, v2, s[4:5]",
        "wait for it": "s_waitcnt vmcnt(0)",
        "to the second half": f"v_add_nc_u32_e32 v1, 0x{8 * half:x}, v1",
        "store it": "global_store_b32 v1, v3, s[4:5]",
    }
    data = np.zeros(4 * half, np.uint32)
    launch(arch, in_names_of(arch, *lines.values()), data, num_waves=2)
    assert data[2 * half :].tolist() == [i ^ half for i in range(2 * half)]
    del lines["wait"]
    with pytest.raises(WaitFault, match="in flight"):
        launch(arch, in_names_of(arch, *lines.values()), data, num_waves=2)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_result_that_depends_on_the_order_of_waves_is_a_fault(arch):
    """Both waves store their numbers to the same place of memory: the last one wins."""
    half = LANES[arch] // 2
    body = in_names_of(
        arch,
        "s_load_b64 s[4:5], s[0:1], 0x0",
        f"v_and_b32_e32 v1, 0x{half - 1:x}, v0",
        "v_lshlrev_b32_e32 v1, 2, v1",
        "s_waitcnt lgkmcnt(0)",
        "global_store_b32 v1, v0, s[4:5]",
    )
    out = np.zeros(half, np.uint32)
    with pytest.raises(WaveOrderFault, match="argument 0"):
        launch(arch, body, out, num_waves=2, wave_order="both")
    launch(arch, body, out, num_waves=1, wave_order="both")
    assert out.tolist() == list(range(half))


LOAD, STORE = "global_load_b32 v2, v1, s[4:5]", "global_store_b32 v1, v0, s[4:5]"
ATOMIC = "global_atomic_add_u32 v1, v0, s[4:5]"
ADD_4 = "v_add_nc_u32_e32 v1, 4, v1"
ILLEGAL = {
    "beyond the end": (ADD_4, LOAD, "after the end"),
    "before the start": ("v_subrev_nc_u32_e32 v1, 4, v1", LOAD, "outside of all regions"),
    "a store beyond the end": (ADD_4, STORE, "after the end"),
    "an unaligned atomic": ("v_add_nc_u32_e32 v1, 2, v1", ATOMIC, "aligned"),
    "LDS beyond its end": (ADD_4, "ds_store_b32 v1, v0", "LDS"),
}


def run_lines(arch: str, *lines: str, **options: Any) -> None:
    """Run lines, with s[4:5] the address of a word for each lane, and v1 the offset of its own."""
    lanes = LANES[arch] // 2
    first = ("s_load_b64 s[4:5], s[0:1], 0x0", "v_lshlrev_b32_e32 v1, 2, v0")
    body = in_names_of(arch, *first, "s_waitcnt lgkmcnt(0)", *lines)
    launch(arch, body, np.zeros(lanes, np.uint32), lds_bytes=4 * lanes, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", ILLEGAL)
def test_an_address_that_is_not_allowed_is_a_fault(arch, case):
    change, access, message = ILLEGAL[case]
    run_lines(arch, access)
    with pytest.raises(MemoryFault, match=message):
        run_lines(arch, change, access)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_scalar_load_of_an_odd_address_is_a_fault(arch):
    """Hardware would ignore the lowest two bits."""
    run_lines(arch, "s_load_b64 s[6:7], s[4:5], 0x4")
    with pytest.raises(MemoryFault, match="aligned"):
        run_lines(arch, "s_load_b64 s[6:7], s[4:5], 0x6")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("write", "read", "wait"),
    [
        (STORE, LOAD, "s_waitcnt vmcnt(0)"),
        ("ds_store_b32 v1, v0", "ds_load_b32 v2, v1", "s_waitcnt lgkmcnt(0)"),
        (
            "scratch_store_b32 off, v0, off offset:8",
            "scratch_load_b32 v2, off, off offset:8",
            "s_waitcnt vmcnt(0)",
        ),
    ],
    ids=["memory", "LDS", "private memory"],
)
def test_a_read_of_what_was_never_written_is_a_fault(arch, write, read, wait):
    run_lines(arch, write, read, wait, scratch=16, unwritten=(0,))
    with pytest.raises(UnwrittenRead):
        run_lines(arch, read, wait, scratch=16, unwritten=(0,))


def test_a_kernel_without_arguments_runs():
    assert launch("gfx942", "s_nop 0").instructions == {"s_nop": 1, "s_endpgm": 1}


def test_every_fault_is_a_kernel_fault():
    kinds = (MemoryFault, RaceFault, UnwrittenRead, WaitFault, WaveOrderFault)
    assert all(issubclass(kind, KernelFault) for kind in kinds)
