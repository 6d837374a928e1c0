"""Loads straight into LDS: where values go, and what the wait for them orders."""

from __future__ import annotations

import re

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import (
    MemoryFault,
    RaceFault,
    UnknownInstruction,
    UnwrittenRead,
    WaitFault,
)
from attn_dispatch.emulation.instructions.decode import decode, unknown_instructions
from attn_dispatch.emulation.memory.lds import Lds
from attn_dispatch.emulation.registers import M0
from attn_dispatch.emulation.targets import TARGETS, target_named
from support.assembly import kernel_text, launch
from support.emulation import execute
from support.memory_cases import MemoryCase

LDS_BYTES = 4096
BUFFER_ROWS = [
    ("gfx90a", "buffer_load_dword", 4),
    ("gfx942", "buffer_load_dword", 4),
    ("gfx950", "buffer_load_dword", 4),
    ("gfx950", "buffer_load_dwordx4", 16),
]
GLOBAL_ROWS = [
    ("gfx942", "global_load_lds_dword", 4),
    ("gfx950", "global_load_lds_dword", 4),
    ("gfx950", "global_load_lds_dwordx4", 16),
]


def case_with_lds(target, space, partial, lds_bytes=LDS_BYTES):
    case = MemoryCase(target, space, partial)
    case.group.shared.lds = Lds(1, lds_bytes)
    case.group.s_u32[M0] = [64, 64 + 1024 + 512]
    return case


def lds_words(case):
    """All of LDS, uint32 (words,)."""
    return case.group.shared.lds._bytes.data.view(np.uint32)


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "opcode", "size"), BUFFER_ROWS + GLOBAL_ROWS)
def test_lanes_store_next_to_each_other_from_m0_on(target, opcode, size, partial):
    space = opcode.split("_")[0]
    case = case_with_lds(target, space, partial)
    expected, contents = lds_words(case).copy(), case.contents()
    for wave, lane, offset in case.active():
        raw = bytes(contents(wave, lane)[offset + 36 : offset + 36 + size])
        at = (int(case.group.s_u32[M0, wave]) + 36 + size * lane) // 4
        expected[at : at + size // 4] = np.frombuffer(raw, np.uint32)
    execute(case.group, load_text(case, opcode, 36))
    np.testing.assert_array_equal(lds_words(case), expected)
    (pending,) = case.group.pending
    assert (pending.kind, pending.counter) == ("load", "vmcnt")
    assert not pending.registers


def load_text(case, opcode, offset):
    """The instruction, which has no register for its data."""
    lds = " lds" if opcode.startswith("buffer") else ""
    return re.sub(r" v4, ", " ", case.text(opcode, "v4", offset)) + lds


def test_lanes_out_of_the_range_of_a_buffer_store_0():
    case = case_with_lds("gfx950", "buffer", partial=False)
    case.group.s_u32[M0] = [0, 1024]
    case.group.s_u32[10] = 64
    case.group.v_u32[1] = 4 * np.arange(64)
    case.group.v_u32[1, :, 20] = 0x80000000
    words = case.region.data.view(np.uint32)[:16]
    execute(case.group, "buffer_load_dword v1, s[8:11], 0 offen lds")
    for first in (0, 256):
        stored = lds_words(case)[first : first + 64]
        np.testing.assert_array_equal(stored[:16], words)
        assert not stored[16:].any()


def test_bounds_of_lds():
    case = case_with_lds("gfx950", "buffer", partial=False)
    case.group.s_u32[M0] = [0, LDS_BYTES - 252]
    with pytest.raises(MemoryFault, match="outside of its LDS of 4096"):
        execute(case.group, load_text(case, "buffer_load_dword", 0))


def test_m0_is_read():
    """A load of M0 that nothing waited for would be noticed."""
    instruction = parse_instruction("buffer_load_dword v1, s[8:11], 0 offen lds")
    decoded = decode(instruction, target_named("gfx950"))
    assert {M0, 1001, 8, 9, 10, 11} == decoded.reads == decoded.registers
    assert not decoded.writes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "text",
    [
        "buffer_load_ubyte v1, s[8:11], 0 offen lds",
        "buffer_load_dwordx2 v1, s[8:11], 0 offen lds",
        "buffer_load_dwordx3 v1, s[8:11], 0 offen lds",
        "buffer_load_dword v1, s[8:11], 0 lds",
        "buffer_load_dword v1, s[8:11], 0 idxen lds",
        "buffer_store_dword v1, s[8:11], 0 offen lds",
        "buffer_load_b32 v1, s[8:11], 0 offen lds",
        "global_load_dword v[2:3], off lds",
        "global_load_lds_ushort v[2:3], off",
        "global_load_lds_dword v[2:3], off offen",
    ],
)
def test_other_forms_are_unknown(target, text):
    with pytest.raises(UnknownInstruction):
        decode(parse_instruction(text), target_named(target))


@pytest.mark.parametrize("row", BUFFER_ROWS + GLOBAL_ROWS)
def test_only_some_targets_have_them(row):
    _, opcode, _ = row
    text = f"{opcode} v1, s[8:11], 0 offen lds"
    if opcode.startswith("global"):
        text = f"{opcode} v[2:3], off"
    known = {t for t in TARGETS if not unknown_instructions(kernel_text(t, text), t)}
    assert known == {t for t, name, _ in BUFFER_ROWS + GLOBAL_ROWS if name == opcode}


# Waits and barriers -------------------------------------------------------------------------------

#: Two waves load 256 bytes each into LDS, and read what they or the other wave have loaded.
LINES = {
    "addresses": "s_load_dwordx4 s[4:7], s[0:1], 0x0",
    "first": "v_readfirstlane_b32 s12, v0",
    "m0": "s_lshl_b32 m0, s12, 2",
    "offset": "v_lshlrev_b32_e32 v1, 2, v0",
    "other": "v_xor_b32_e32 v2, OTHER, v1",
    "wait of the addresses": "s_waitcnt lgkmcnt(0)",
    "load": "global_load_lds_dword v1, s[4:5]",
    "wait": "s_waitcnt vmcnt(0)",
    "barrier": "s_barrier",
    "read": "ds_read_b32 v3, v2",
    "wait of the read": "s_waitcnt lgkmcnt(0)",
    "store": "global_store_dword v1, v3, s[6:7]",
}


def run(own=False, without=(), before=None, **options):
    """What the lanes of two waves read: the values of the other wave, or their own."""
    lines = {name: text for name, text in LINES.items() if name not in without}
    for name, text in (before or {}).items():
        lines[name] = f"{text}\n{lines[name]}"
    body = "\n".join(lines.values()).replace("OTHER", "0" if own else "0x100")
    data, out = np.arange(128, dtype=np.uint32) + 7, np.zeros(128, np.uint32)
    launch("gfx950", body, data, out, num_waves=2, lds_bytes=512, **options)
    return (out - 7).tolist()


@pytest.mark.parametrize("order", ["lockstep", "both"])
def test_waves_exchange_values(order):
    assert run(wave_order=order) == [i ^ 64 for i in range(128)]
    assert run(own=True, without=("barrier",), wave_order=order) == list(range(128))


@pytest.mark.parametrize("order", ["lockstep", "forward", "backward"])
@pytest.mark.parametrize("missing", ["wait", "barrier"])
def test_another_wave_reads_without_a_wait_or_a_barrier(missing, order):
    # Without a barrier, the wave that runs first reads what the other one has not written.
    fault = UnwrittenRead if missing == "barrier" and order != "lockstep" else RaceFault
    with pytest.raises(fault, match="load of 4 bytes"):
        run(without=(missing,), wave_order=order)


@pytest.mark.parametrize("without", [("wait",), ("wait", "barrier")])
def test_a_wave_reads_its_own_values_without_a_wait(without):
    with pytest.raises(WaitFault, match="before the wait for the load into LDS"):
        run(own=True, without=without)


@pytest.mark.parametrize("text", ["ds_write_b32 v1, v1", "ds_write_b8 v1, v1"])
def test_a_wave_writes_its_own_values_without_a_wait(text):
    with pytest.raises(WaitFault, match="before the wait for the load into LDS"):
        run(before={"wait": text})
    run(before={"barrier": f"{text}\ns_waitcnt lgkmcnt(0)"})


def test_loads_arrive_in_order():
    """A wait for the older one lets its bytes be read; two loads may write the same bytes."""
    second = "s_add_i32 m0, m0, 0x200\nglobal_load_lds_dword v1, s[4:5]\ns_waitcnt vmcnt(1)"
    lines = dict(LINES, load=f"{LINES['load']}\n{second}")
    body = "\n".join(text for name, text in lines.items() if name not in ("wait", "barrier"))
    data, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    launch("gfx950", body.replace("OTHER", "0"), data, out, num_waves=2, lds_bytes=1024)
    assert out.tolist() == list(range(128))
    with pytest.raises(WaitFault, match="LDS"):
        launch("gfx950", body.replace("OTHER", "0x200"), data, out, num_waves=2, lds_bytes=1024)
    assert run(before={"wait": LINES["load"]}) == [i ^ 64 for i in range(128)]


def test_a_pending_m0_cannot_be_used():
    with pytest.raises(WaitFault, match="s125 is used before the wait"):
        run(before={"load": "s_load_dword m0, s[0:1], 0x0"})
