"""Global, flat, private and buffer instructions: every opcode against lanes in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import MemoryFault, UnknownInstruction, WaitFault
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.instructions.vector_memory import forms
from attn_dispatch.emulation.registers import EXEC
from attn_dispatch.emulation.targets import TARGETS, target_named
from attn_dispatch.emulation.waits import check_registers, publish
from support.emulation import execute, register
from support.memory_cases import (
    ATOMIC_RESULTS,
    CDNA,
    LOADS,
    NUM_BYTES,
    STORES,
    MemoryCase,
    atomic_operands,
    operand,
)

SPACES = ("global", "flat", "scratch", "buffer")
#: Operation -> its name on RDNA, without bits.
RDNA_NAMES = {
    "swap": "swap_b", "add": "add_u", "sub": "sub_u", "smin": "min_i", "umin": "min_u",
    "smax": "max_i", "umax": "max_u", "and": "and_b", "or": "or_b", "xor": "xor_b",
    "cmpswap": "cmpswap_b",
}  # fmt: skip
#: Additions of floats of a target and space.
_ALL_FLOATS = ("add_f32", "add_f64", "pk_add_f16", "pk_add_bf16")
FLOATS = {
    ("gfx90a", "global"): _ALL_FLOATS[:3],
    ("gfx90a", "flat"): ("add_f64",),
    ("gfx90a", "buffer"): _ALL_FLOATS[:3],
    ("gfx942", "global"): _ALL_FLOATS,
    ("gfx942", "flat"): _ALL_FLOATS,
    ("gfx942", "buffer"): _ALL_FLOATS[:3],
    ("gfx950", "global"): _ALL_FLOATS,
    ("gfx950", "flat"): _ALL_FLOATS,
    ("gfx950", "buffer"): _ALL_FLOATS,
    ("gfx1100", "global"): ("add_f32",),
    ("gfx1100", "flat"): ("add_f32",),
    ("gfx1100", "buffer"): ("add_f32",),
    ("gfx1201", "global"): ("add_f32", "pk_add_f16", "pk_add_bf16"),
    ("gfx1201", "flat"): ("add_f32", "pk_add_f16", "pk_add_bf16"),
    ("gfx1201", "buffer"): ("add_f32", "pk_add_f16", "pk_add_bf16"),
}
RETURNS = {
    "gfx90a": "glc", "gfx942": "sc0", "gfx950": "sc0", "gfx1100": "glc",
    "gfx1201": "th:TH_ATOMIC_RETURN",
}  # fmt: skip


def once(rows):
    """The rows without those whose opcode another target of the generation has, too."""
    first = {}
    for row in rows:
        target, _, opcode = row.values[:3]
        first.setdefault((target_named(target).generation, opcode), row)
    return list(first.values())


def transfers(kind, table):
    return [
        pytest.param(target, space, f"{space}_{kind}_{name}", value, id=f"{target}-{space}-{name}")
        for target in TARGETS
        for space in SPACES
        for cdna, rdna, _, value in table
        for name in [cdna if target in CDNA else rdna]
    ]


def integer_atomic(target, operation, size):
    if target in CDNA:
        return operation + ("_x2" if size == 8 else "")
    return f"{RDNA_NAMES[operation]}{8 * size}"


LOAD_ROWS = transfers("load", LOADS)
STORE_ROWS = transfers("store", STORES)
ATOMIC_ROWS = [
    pytest.param(
        target, space, f"{space}_atomic_{name}", operation, size, id=f"{target}-{space}-{name}"
    )
    for target in TARGETS
    for space in ("global", "flat", "buffer")
    for operation, name, size in (
        *((each, integer_atomic(target, each, n), n) for each in RDNA_NAMES for n in (4, 8)),
        *((each, each, 8 if each == "add_f64" else 4) for each in FLOATS[target, space]),
    )
]


@pytest.mark.parametrize("target", TARGETS)
def test_every_opcode_has_a_row(target):
    tested = [row.values for row in (*LOAD_ROWS, *STORE_ROWS, *ATOMIC_ROWS)]
    assert set(forms(target_named(target))) == {row[2] for row in tested if row[0] == target}


def check_pending(group, space, kind, registers):
    """One operation is pending; a flat one also counts as one of LDS."""
    load, store, lds = {
        9: ("vmcnt", "vmcnt", "lgkmcnt"),
        11: ("vmcnt", "vscnt", "lgkmcnt"),
        12: ("loadcnt", "storecnt", "dscnt"),
    }[group.shared.target.generation]
    expected = [load if kind == "load" else store, *([lds] if space == "flat" else [])]
    assert [each.counter for each in group.pending] == expected
    assert all(each.registers == set(registers) for each in group.pending)


# Lanes in plain Python ----------------------------------------------------------------------------


def files(target):
    return ("v", "a") if target in CDNA else ("v",)


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "space", "opcode", "value"), once(LOAD_ROWS))
def test_load(target, space, opcode, value, partial):
    for file in files(target):
        case = MemoryCase(target, space, partial)
        expected, contents = case.words(file, 4, value.words), case.contents()
        for wave, lane, offset in case.active():
            raw = bytes(contents(wave, lane)[offset + 36 : offset + 36 + value.size])
            expected[:, wave, lane] = value.loaded(raw, expected[:, wave, lane].tolist())
        execute(case.group, case.text(opcode, operand(file, 4, value.words), 36))
        np.testing.assert_array_equal(case.words(file, 4, value.words), expected)
        first = {"v": 1000, "a": 2000}[file] + 4
        check_pending(case.group, space, "load", range(first, first + value.words))


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "space", "opcode", "value"), once(STORE_ROWS))
def test_store(target, space, opcode, value, partial):
    for file in files(target):
        case = MemoryCase(target, space, partial)
        data, contents = case.words(file, 4, value.words), case.contents()
        for wave, lane, offset in case.active():
            raw = value.stored(data[:, wave, lane].tolist())
            contents(wave, lane)[offset + 40 : offset + 40 + value.size] = raw
        execute(case.group, case.text(opcode, operand(file, 4, value.words), 40))
        assert case.bytes_of(case.contents()) == case.bytes_of(contents)
        check_pending(case.group, space, "store", ())


@pytest.mark.parametrize("returns", [False, True], ids=["", "returns"])
@pytest.mark.parametrize(("target", "space", "opcode", "operation", "size"), once(ATOMIC_ROWS))
def test_atomic(target, space, opcode, operation, size, returns):
    """Several lanes access each address: they take turns in the order of the lanes."""
    case, words = MemoryCase(target, space), size // 4
    case.place(case.addresses % 7 * 8 + 16)
    compares = operation == "cmpswap"
    operands = atomic_operands(operation, size, 2 * case.lanes, case.rng)
    memory = atomic_operands(operation, size, 16, case.rng)
    raw = np.frombuffer(b"".join(x.to_bytes(size, "little") for x in memory), np.uint8)
    for i in range(16):
        case.region.data[8 * i : 8 * i + size] = raw[size * i : size * (i + 1)]
    compared = [memory[2 + (i % 3)] for i in range(2 * case.lanes)]  # some lanes find this
    for word in range(words):
        for first, values in ((4, operands), (4 + words, compared if compares else [])):
            if values:
                bits = [x >> (32 * word) & 0xFFFFFFFF for x in values]
                case.group.v_u32[first + word] = np.reshape(bits, case.exec.shape)
    to = 4 if space == "buffer" else 8  # a buffer's result replaces the operand
    before, contents = case.words("v", to, words), case.contents()
    found = before.copy()
    for wave, lane, offset in case.active():
        shared, number = contents(wave, lane), wave * case.lanes + lane
        old = int.from_bytes(shared[offset : offset + size], "little")
        new = operands[number]
        if compares:
            new = new if old == compared[number] else old
        else:
            new = ATOMIC_RESULTS[operation](old, new, size)
        shared[offset : offset + size] = new.to_bytes(size, "little")
        found[:, wave, lane] = [old >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    data = operand("v", 4, (2 if compares else 1) * words)
    text = case.text(opcode, data, returns=operand("v", 8, words) if returns else "")
    execute(case.group, f"{text} {RETURNS[target]}" if returns else text)
    assert case.bytes_of(case.contents()) == case.bytes_of(contents)
    np.testing.assert_array_equal(case.words("v", to, words), found if returns else before)
    written = range(1000 + to, 1000 + to + words) if returns else ()
    check_pending(case.group, space, "load" if returns else "store", written)


@pytest.mark.parametrize("target", RETURNS)
def test_modifier_that_returns_what_was_in_memory(target):
    name = "add" if target in CDNA else "add_u32"
    text = f"global_atomic_{name} v4, v1, v5, s[4:5]"
    execute(MemoryCase(target, "global").group, f"{text} {RETURNS[target]}")
    other = {"glc": "sc0", "sc0": "sc1"}.get(RETURNS[target], "scope:SCOPE_DEV")
    with pytest.raises(UnknownInstruction):
        execute(MemoryCase(target, "global").group, f"{text} {other}")


# Addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 20, -12])
def test_base_with_an_offset_per_lane(offset):
    case = MemoryCase("gfx942", "global")
    execute(case.group, f"global_load_dword v4, v1, s[4:5] offset:{offset}")
    words = case.region.data.view(np.uint32)[(case.addresses + offset) // 4]
    np.testing.assert_array_equal(register(case.group, "v4")[case.exec], words[case.exec])


def test_negative_offset_of_an_address():
    case = MemoryCase("gfx1201", "global")
    execute(case.group, "global_load_b32 v4, v[2:3], off offset:-8 th:TH_LOAD_NT scope:SCOPE_DEV")
    words = case.region.data.view(np.uint32)[(case.addresses - 8) // 4]
    np.testing.assert_array_equal(register(case.group, "v4")[case.exec], words[case.exec])


def test_offset_per_lane_is_unsigned():
    case = MemoryCase("gfx942", "global")
    case.group.v_u32[1] = 0x80000000
    base = case.region.address - 0x80000000
    case.group.s_u32[4], case.group.s_u32[5] = base & 0xFFFFFFFF, base >> 32
    execute(case.group, "global_load_dword v4, v1, s[4:5]")
    word = case.region.data.view(np.uint32)[0]
    assert (register(case.group, "v4")[case.exec] == word).all()


def test_access_outside_of_memory():
    case = MemoryCase("gfx942", "global")
    case.group.v_u32[1, 1, 40] = NUM_BYTES - 3
    with pytest.raises(MemoryFault, match=r"4 bytes .* by wave 1 is outside of all regions"):
        execute(case.group, "global_load_dword v4, v1, s[4:5]")


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ("scratch_load_b32 v4, off, off", 0),
        ("scratch_load_b32 v4, off, off offset:32", 32),
        ("scratch_load_b32 v4, off, s6 offset:32", 48),
        ("scratch_load_b32 v4, v9, s6 offset:32", 56),
        ("scratch_load_b32 v4, v9, off offset:-4", 4),
        ("scratch_load_b32 v4, v10, off offset:12", 8),
    ],
)
def test_private_addresses(text, offset):
    case = MemoryCase("gfx1100", "scratch")
    case.group.s_u32[6], case.group.v_u32[9], case.group.v_u32[10] = 16, 8, 0xFFFFFFFC
    contents = case.contents()
    execute(case.group, text)
    loaded = register(case.group, "v4")
    for wave, lane, _ in case.active():
        raw = bytes(contents(wave, lane)[offset : offset + 4])
        assert loaded[wave, lane] == int.from_bytes(raw, "little")


def test_private_memory_has_bounds():
    case = MemoryCase("gfx1100", "scratch")
    with pytest.raises(MemoryFault, match="outside of its private memory of 256 bytes"):
        execute(case.group, "scratch_store_b64 off, v[4:5], off offset:252")


def test_no_lane_accesses_memory():
    case = MemoryCase("gfx942", "global")
    case.group.s_u32[EXEC : EXEC + 2] = 0
    case.group.exec_changed()
    before, region = case.words("v", 4, 4), case.region.data.copy()
    execute(
        case.group,
        "global_load_dwordx4 v[4:7], v[4:5], off",
        "global_store_dword v[4:5], v6, off",
        "global_atomic_add v4, v[4:5], v6, off sc0",
        "flat_load_dword v4, v[4:5]",
        "flat_store_dword v[4:5], v6",
        "flat_atomic_add v4, v[4:5], v6 sc0",
        "buffer_load_dword v4, v5, s[8:11], 0 offen",
        "buffer_store_dword v4, v5, s[8:11], 0 offen",
        "buffer_atomic_add v4, v5, s[8:11], 0 offen",
        "scratch_load_dword v4, v5, off",
        "scratch_store_dword v5, v4, off",
    )
    np.testing.assert_array_equal(case.words("v", 4, 4), before)
    np.testing.assert_array_equal(case.region.data, region)


# Forms, waits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("gfx942", "global_load_dword v4, v2, off"),
        ("gfx942", "global_load_dword v4, v[2:3], s[4:5]"),
        ("gfx942", "global_load_dwordx2 v4, v[2:3], off"),
        ("gfx942", "global_load_dword v4, a[2:3], off"),
        ("gfx942", "global_load_dword v4, v[2:3]"),
        ("gfx942", "global_load_b32 v4, v[2:3], off"),
        ("gfx1100", "global_load_dword v4, v[2:3], off"),
        ("gfx1100", "global_load_b32 v4.l, v[2:3], off"),
        ("gfx1201", "global_load_tr_b128 v[4:7], v[2:3], off"),
        ("gfx942", "global_atomic_add v4, v[2:3], v5, off"),
        ("gfx942", "global_atomic_add v[2:3], v5, off sc0"),
        ("gfx942", "global_atomic_cmpswap v[2:3], v5, off"),
        ("gfx90a", "global_atomic_pk_add_bf16 v[2:3], v5, off"),
        ("gfx942", "buffer_atomic_pk_add_bf16 v5, v1, s[8:11], 0 offen"),
        ("gfx1201", "global_atomic_add_f64 v[2:3], v[4:5], off"),
        ("gfx942", "buffer_atomic_inc v5, v1, s[8:11], 0 offen"),
        ("gfx942", "flat_load_dword v4, v[2:3], off"),
        ("gfx942", "flat_load_dword v4, v[2:3] lds"),
        ("gfx90a", "flat_atomic_add_f32 v[2:3], v5"),
        ("gfx942", "scratch_atomic_add v1, v5, off"),
        ("gfx942", "buffer_load_dword v4, v1, s[8:11], 0"),
        ("gfx942", "buffer_load_dword v4, off, s[8:11], 0 offen"),
        ("gfx942", "buffer_load_dword v4, v1, s[8:11], 0 idxen"),
        ("gfx942", "buffer_load_dword v4, v1, s[8:9], 0 offen"),
        ("gfx942", "buffer_load_dword v4, v1, s[8:11], 0 offen tfe"),
        ("gfx942", "buffer_load_format_x v4, v1, s[8:11], 0 offen"),
    ],
)
def test_unknown_form(target, text):
    with pytest.raises(UnknownInstruction, match="line 1"):
        decode(parse_instruction(text, 1), target_named(target))


def use(group, text):
    decoded = decode(parse_instruction(text, 1), group.shared.target)
    check_registers(group, decoded.text, decoded.reads, decoded.writes)


def test_result_is_used_before_the_wait():
    case = MemoryCase("gfx942", "global", partial=False)
    case.group.v_u32[6:8] = case.group.v_u32[2:4]
    execute(case.group, "global_load_dwordx2 v[4:5], v[2:3], off")
    for text in (
        "v_mov_b32_e32 v8, v5",
        "global_load_dwordx2 v[4:5], v[4:5], off",  # the results are their own address
        "global_atomic_add v4, v[6:7], v4, off sc0",
        "buffer_store_dword v4, v1, s[8:11], 0 offen",
        "buffer_atomic_add v4, v1, s[8:11], 0 offen sc0",
    ):
        with pytest.raises(WaitFault, match=r"v[45] is used before .* global_load_dwordx2"):
            use(case.group, text)
    use(case.group, "global_load_dword v4, v[6:7], off")  # it finishes after the first one
    execute(case.group, "s_waitcnt vmcnt(0)")
    use(case.group, "global_load_dword v4, v[4:5], off")


@pytest.mark.parametrize("waits", [("vmcnt(0)", "lgkmcnt(0)"), ("lgkmcnt(0)", "vmcnt(0)")])
def test_a_flat_load_needs_both_waits(waits):
    case = MemoryCase("gfx942", "flat", partial=False)
    execute(case.group, "flat_load_dword v4, v[2:3]", "global_load_dword v5, v[2:3], off")
    for text in ("v_mov_b32_e32 v6, v4", "global_load_dword v4, v[2:3], off"):
        with pytest.raises(WaitFault, match=r"v4 is used before .* flat_load_dword"):
            use(case.group, text)
    execute(case.group, f"s_waitcnt {waits[0]}")
    with pytest.raises(WaitFault, match="v4 is used"):
        use(case.group, "v_mov_b32_e32 v6, v4")
    execute(case.group, f"s_waitcnt {waits[1]}")
    use(case.group, "v_mov_b32_e32 v6, v4")
    assert not case.group.pending


def test_waves_that_wait_for_different_counters_of_a_flat_load_stay_apart():
    case = MemoryCase("gfx942", "flat", partial=False)
    execute(case.group, "flat_load_dword v4, v[2:3]")
    first, second = (case.group.only(case.group.ids == i) for i in (0, 1))
    execute(first, "s_waitcnt vmcnt(0)")
    execute(second, "s_waitcnt lgkmcnt(0)")
    assert not first.joins(second)
    execute(first, "s_waitcnt lgkmcnt(0)")
    execute(second, "s_waitcnt vmcnt(0)")
    assert first.joins(second)


def test_a_flat_load_finishes_in_any_order():
    case = MemoryCase("gfx942", "flat", partial=False)
    execute(
        case.group,
        "flat_load_dword v4, v[2:3]",
        "global_load_dword v5, v[2:3], off",
        "s_waitcnt vmcnt(1) lgkmcnt(0)",
    )
    with pytest.raises(WaitFault, match="v4 is used"):
        use(case.group, "v_mov_b32_e32 v6, v4")


def test_both_halves_may_be_loaded_without_a_wait():
    case = MemoryCase("gfx942", "global", partial=False)
    execute(case.group, "global_load_short_d16 v4, v[2:3], off")
    use(case.group, "global_load_short_d16_hi v4, v[2:3], off offset:2")
    for text in ("v_add_u32_e32 v4, v5, v6", "ds_read_u16_d16_hi v4, v1"):
        with pytest.raises(WaitFault, match="v4 is used"):
            use(case.group, text)


@pytest.mark.parametrize(
    ("target", "store", "load", "wait"),
    [
        (
            "gfx942",
            "global_store_dword v1, v4, s[4:5]",
            "global_load_dword v5, v1, s[4:5]",
            "s_waitcnt vmcnt(0)",
        ),
        (
            "gfx90a",
            "buffer_store_dword v4, v1, s[8:11], 0 offen",
            "global_load_dword v5, v1, s[4:5]",
            "s_waitcnt vmcnt(0)",
        ),
        (
            "gfx1100",
            "global_store_b32 v[2:3], v4, off",
            "global_load_b32 v5, v1, s[4:5]",
            "s_waitcnt_vscnt null, 0x0",
        ),
        (
            "gfx1100",
            "flat_store_b32 v[2:3], v4",
            "flat_load_b32 v5, v[2:3]",
            "s_waitcnt_vscnt null, 0x0",
        ),
        (
            "gfx1201",
            "global_store_b32 v1, v4, s[4:5]",
            "global_load_b32 v5, v[2:3], off",
            "s_wait_storecnt 0x0",
        ),
    ],
)
def test_a_store_is_seen_by_other_waves_after_the_wait_and_a_barrier(target, store, load, wait):
    case = MemoryCase(target, "global", partial=False)
    case.place(np.stack([4 * np.arange(case.lanes)] * 2))
    first, second = (case.group.only(case.group.ids == i) for i in (0, 1))
    execute(first, store)
    with pytest.raises(WaitFault, match="still in flight"):
        execute(second, load)
    execute(first, load)  # a wave sees its own stores
    execute(first, wait)
    with pytest.raises(WaitFault, match="no barrier"):  # nothing orders the load with the wait
        execute(second, load)
    publish(first)  # as at a barrier
    execute(second, load)
    np.testing.assert_array_equal(register(second, "v5"), register(first, "v4"))
