"""Each fault detector catches a kernel with that fault, and lets the repaired one run.

The kernels are written for CDNA and RDNA: two waves of a workgroup exchange values through LDS or
memory, or one wave uses memory wrongly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
from support.assembly import launch

ARCHS = ("gfx942", "gfx1100")


@dataclass(frozen=True)
class Names:
    """What the two instruction sets call the same."""

    load_address: str
    load: str
    store: str
    write_lds: str
    read_lds: str
    wait_lds: str
    wait_load: str
    wait_store: str
    shift: str


NAMES = {
    "gfx942": Names(
        "s_load_dwordx2", "global_load_dword", "global_store_dword", "ds_write_b32", "ds_read_b32",
        "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)", "v_lshlrev_b32_e32",
    ),
    "gfx1100": Names(
        "s_load_b64", "global_load_b32", "global_store_b32", "ds_store_b32", "ds_load_b32",
        "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(0)", "s_waitcnt_vscnt null, 0x0",
        "v_lshlrev_b32_e32",
    ),
}  # fmt: skip
#: Lanes of two waves.
LANES = {"gfx942": 128, "gfx1100": 64}


def exchange(arch: str, *, without: str = "") -> str:
    """Each lane stores its number to LDS and reads that of the other wave's lane.

    Args:
        arch: the target.
        without: "barrier", or "wait" for the wait before it.
    """
    names = NAMES[arch]
    lines = {
        "address": f"{names.load_address} s[4:5], s[0:1], 0x0",
        "offset": f"{names.shift} v1, 2, v0",
        "write": f"{names.write_lds} v1, v0",
        "wait": names.wait_lds,
        "barrier": "s_barrier",
        "other": f"v_xor_b32_e32 v2, 0x{4 * LANES[arch] // 2:x}, v1",
        "read": f"{names.read_lds} v3, v2",
        "wait for it": names.wait_lds,
        "store": f"{names.store} v1, v3, s[4:5]",
    }
    return "\n".join(line for name, line in lines.items() if name != without)


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
    names = NAMES[arch]
    lines = {
        "address": f"{names.load_address} s[4:5], s[0:1], 0x0",
        "wait of the address": "s_waitcnt lgkmcnt(0)",
        "offset": f"{names.shift} v1, 2, v0",
        "load": f"{names.load} v2, v1, s[4:5]",
        "wait for it": names.wait_load,
        "add": "v_add_f32_e32 v2, 1.0, v2",
        "store": f"{names.store} v1, v2, s[4:5]",
    }
    data = np.arange(64, dtype=np.float32)
    launch(arch, "\n".join(lines.values()), data)
    executed = LANES[arch] // 2
    assert data.tolist() == [i + (i < executed) for i in range(64)]
    broken = "\n".join(line for name, line in lines.items() if name != without)
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
    names, half = NAMES[arch], LANES[arch] // 2
    lines = {
        "address": f"{names.load_address} s[4:5], s[0:1], 0x0",
        "offset": f"{names.shift} v1, 2, v0",
        "its wait": "s_waitcnt lgkmcnt(0)",
        "store": f"{names.store} v1, v0, s[4:5]",
        "wait": names.wait_store,
        "barrier": "s_barrier",
        "other": f"v_xor_b32_e32 v2, 0x{4 * half:x}, v1",
        "load": f"{names.load} v3, v2, s[4:5]",
        "wait for it": names.wait_load,
        "to the second half": f"v_add_u32_e32 v1, 0x{8 * half:x}, v1"
        if arch == "gfx942"
        else f"v_add_nc_u32_e32 v1, 0x{8 * half:x}, v1",
        "store it": f"{names.store} v1, v3, s[4:5]",
    }
    data = np.zeros(4 * half, np.uint32)
    launch(arch, "\n".join(lines.values()), data, num_waves=2)
    assert data[2 * half :].tolist() == [i ^ half for i in range(2 * half)]
    broken = "\n".join(line for name, line in lines.items() if name != "wait")
    with pytest.raises(WaitFault, match="in flight"):
        launch(arch, broken, data, num_waves=2)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_result_that_depends_on_the_order_of_waves_is_a_fault(arch):
    """Both waves store their numbers to the same place of memory: the last one wins."""
    names, half = NAMES[arch], LANES[arch] // 2
    body = f"""
    {names.load_address} s[4:5], s[0:1], 0x0
    v_and_b32_e32 v1, 0x{half - 1:x}, v0
    {names.shift} v1, 2, v1
    s_waitcnt lgkmcnt(0)
    {names.store} v1, v0, s[4:5]"""
    out = np.zeros(half, np.uint32)
    with pytest.raises(WaveOrderFault, match="argument 0"):
        launch(arch, body, out, num_waves=2, wave_order="both")
    launch(arch, body, out, num_waves=1, wave_order="both")
    assert out.tolist() == list(range(half))


ILLEGAL = {
    "beyond the end": ("v_add_u32_e32 v1, 4, v1", "load", "after the end"),
    "before the start": ("v_subrev_u32_e32 v1, 4, v1", "load", "outside of all regions"),
    "a store beyond the end": ("v_add_u32_e32 v1, 4, v1", "store", "after the end"),
    "an unaligned atomic": ("v_add_u32_e32 v1, 2, v1", "atomic", "aligned"),
    "LDS beyond its end": ("v_add_u32_e32 v1, 4, v1", "LDS", "LDS"),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", ILLEGAL)
def test_an_address_that_is_not_allowed_is_a_fault(arch, case):
    change, access, message = ILLEGAL[case]
    names, lanes = NAMES[arch], LANES[arch] // 2
    change = change if arch == "gfx942" else change.replace("_u32", "_nc_u32")
    atomic = "global_atomic_add" if arch == "gfx942" else "global_atomic_add_u32"
    accesses = {
        "load": f"{names.load} v2, v1, s[4:5]",
        "store": f"{names.store} v1, v0, s[4:5]",
        "atomic": f"{atomic} v1, v0, s[4:5]",
        "LDS": f"{names.write_lds} v1, v0",
    }

    def run(line):
        body = f"""
        {names.load_address} s[4:5], s[0:1], 0x0
        {names.shift} v1, 2, v0
        s_waitcnt lgkmcnt(0)
        {line}
        {accesses[access]}"""
        launch(arch, body, np.zeros(lanes, np.uint32), lds_bytes=4 * lanes)

    run("s_nop 0")
    with pytest.raises(MemoryFault, match=message):
        run(change)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_scalar_load_of_an_odd_address_is_a_fault(arch):
    """Hardware would ignore the lowest two bits."""
    names = NAMES[arch]
    body = f"""
    {names.load_address} s[4:5], s[0:1], 0x0
    s_waitcnt lgkmcnt(0)
    {names.load_address} s[6:7], s[4:5], OFFSET"""
    launch(arch, body.replace("OFFSET", "0x4"), np.zeros(8, np.uint32))
    with pytest.raises(MemoryFault, match="aligned"):
        launch(arch, body.replace("OFFSET", "0x6"), np.zeros(8, np.uint32))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("where", ["memory", "LDS", "private memory"])
def test_a_read_of_what_was_never_written_is_a_fault(arch, where):
    names, lanes = NAMES[arch], LANES[arch] // 2
    size = "dword" if arch == "gfx942" else "b32"
    write, read, wait = {
        "memory": (f"{names.store} v1, v0, s[4:5]", f"{names.load} v2, v1, s[4:5]", "vmcnt"),
        "LDS": (f"{names.write_lds} v1, v0", f"{names.read_lds} v2, v1", "lgkmcnt"),
        "private memory": (
            f"scratch_store_{size} off, v0, off offset:8",
            f"scratch_load_{size} v2, off, off offset:8",
            "vmcnt",
        ),
    }[where]

    def run(*lines):
        body = "\n".join(
            [
                f"{names.load_address} s[4:5], s[0:1], 0x0",
                f"{names.shift} v1, 2, v0",
                "s_waitcnt lgkmcnt(0)",
                *lines,
                f"s_waitcnt {wait}(0)",
            ]
        )
        out = np.zeros(lanes, np.uint32)
        launch(arch, body, out, lds_bytes=4 * lanes, scratch=16, unwritten=(0,))

    run(write, read)
    with pytest.raises(UnwrittenRead):
        run(read)


def test_every_fault_is_a_kernel_fault():
    kinds = (MemoryFault, RaceFault, UnwrittenRead, WaitFault, WaveOrderFault)
    assert all(issubclass(kind, KernelFault) for kind in kinds)
