"""Instructions that access LDS: every opcode on its own targets, against lanes in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import RaceFault, UnknownInstruction, WaitFault
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.instructions.lds_instructions import forms
from attn_dispatch.emulation.memory.lds import Lds
from attn_dispatch.emulation.targets import TARGETS, target_named
from attn_dispatch.emulation.waits import check_registers
from support.emulation import execute, group_of, register, shared_by
from support.memory_cases import (
    ATOMIC_RESULTS,
    CDNA,
    LOADS,
    RDNA,
    STORES,
    LanesCase,
    Value,
    atomic_operands,
    operand,
)

BYTES = 8192


def rows(table, style):
    """(target, opcode, value) of each row, with the verb on CDNA and on RDNA."""
    return [
        pytest.param(target, f"ds_{verb}{each}", value, id=f"{target}-{verb}{each}")
        for targets, verb in zip((CDNA, RDNA), style, strict=True)
        for target in targets
        for each, value in table.items()
    ]


LOAD_ROWS = rows({row[2]: row[3] for row in LOADS}, ("read_", "load_"))
STORE_ROWS = rows({row[2]: row[3] for row in STORES}, ("write_", "store_"))
TWO = {"b32": (4, 4), "b64": (8, 8)}
STRIDED = {"b32": (4, 256), "b64": (8, 512)}
LOAD_TWO_ROWS = [
    *rows(TWO, ("read2_", "load_2addr_")),
    *rows(STRIDED, ("read2st64_", "load_2addr_stride64_")),
]
STORE_TWO_ROWS = [
    *rows(TWO, ("write2_", "store_2addr_")),
    *rows(STRIDED, ("write2st64_", "store_2addr_stride64_")),
]
#: End of the opcode -> operation of ATOMIC_RESULTS, bytes, whether it returns what was there.
ATOMICS = {
    f"{verb}_{'rtn_' if returns else ''}{kind}{8 * size}": (operation, size, returns)
    for size in (4, 8)
    for returns in (False, True)
    for verb, kind, operation in (
        ("add", "u", "add"), ("sub", "u", "sub"), ("min", "i", "smin"), ("max", "i", "smax"),
        ("min", "u", "umin"), ("max", "u", "umax"), ("and", "b", "and"), ("or", "b", "or"),
        ("xor", "b", "xor"),
    )
}  # fmt: skip
ATOMIC_ROWS = [
    *rows(ATOMICS, ("", "")),
    *rows({f"rtn_b{8 * n}": ("swap", n, True) for n in (4, 8)}, ("wrxchg_", "storexchg_")),
]
COMPARES = {"b32": (4, False), "b64": (8, False), "rtn_b32": (4, True), "rtn_b64": (8, True)}
COMPARE_ROWS = rows(COMPARES, ("cmpst_", "cmpstore_"))
TRANSPOSED = ("gfx950", "ds_read_b64_tr_b16")


@pytest.mark.parametrize("target", TARGETS)
def test_every_opcode_has_a_row(target):
    tested = {TRANSPOSED}
    for table in (
        LOAD_ROWS, STORE_ROWS, LOAD_TWO_ROWS, STORE_TWO_ROWS, ATOMIC_ROWS, COMPARE_ROWS,
    ):  # fmt: skip
        tested |= {row.values[:2] for row in table}
    assert set(forms(target_named(target))) == {name for each, name in tested if each == target}


def once(rows):
    """The rows without those whose opcode another target of the generation has, too."""
    first = {}
    for row in rows:
        first.setdefault((row.values[0] in CDNA, row.values[1]), row)
    return list(first.values())


# Lanes in plain Python ----------------------------------------------------------------------------


class Case(LanesCase):
    """Two workgroups of two waves, LDS with random bytes, and a random address for each lane.

    The address is a multiple of 16, different for each lane of a workgroup.
    """

    def __init__(self, target, partial):
        rng, target, self.lds = np.random.default_rng(7), target_named(target), Lds(2, BYTES)
        contents = rng.integers(0, 1 << 32, (2, BYTES // 4), dtype=np.uint32)
        places = np.arange(0, BYTES, 4, dtype=np.int64)
        for workgroup in range(2):
            number = np.full_like(places, workgroup)
            self.lds.store(number, places, contents[workgroup][None], 4, 2 * number)
        self.lds.new_epoch()
        shared = shared_by(target, 2, lds=self.lds)
        shared.workgroups = np.arange(2)
        words = [0x88010F35, 0, 0xFFFFFFFF, 1] if partial else None
        super().__init__(target, rng, shared, words)
        order = rng.permutation(2 * self.lanes) * 16
        self.place(np.stack([order.reshape(2, -1)] * 2).reshape(4, self.lanes))

    def memory(self):
        """The LDS of both workgroups."""
        places, zero, found = np.arange(BYTES), np.zeros(BYTES, np.int64), []
        self.lds.new_epoch()
        for workgroup in range(2):
            values, _ = self.lds.load(zero + workgroup, places, 1, zero)
            found.append(bytearray(values[0].astype(np.uint8).tobytes()))
        self.lds.new_epoch()
        return found


def files(target):
    return ("v", "a") if target in CDNA else ("v",)


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "opcode", "value"), once(LOAD_ROWS))
def test_load(target, opcode, value, partial):
    for file in files(target):
        case = Case(target, partial)
        expected, memory = case.words(file, 4, value.words), case.memory()
        for wave, lane, address in case.active():
            raw = bytes(memory[wave // 2][address + 36 : address + 36 + value.size])
            expected[:, wave, lane] = value.loaded(raw, expected[:, wave, lane].tolist())
        execute(case.group, f"{opcode} {operand(file, 4, value.words)}, v1 offset:36")
        np.testing.assert_array_equal(case.words(file, 4, value.words), expected)
        (pending,) = case.group.pending
        base = {"v": 1000, "a": 2000}[file] + 4
        assert pending.kind == "lds"
        assert pending.registers == set(range(base, base + value.words))


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "opcode", "value"), once(STORE_ROWS))
def test_store(target, opcode, value, partial):
    for file in files(target):
        case = Case(target, partial)
        data, expected = case.words(file, 4, value.words), case.memory()
        for wave, lane, address in case.active():
            raw = value.stored(data[:, wave, lane].tolist())
            expected[wave // 2][address + 40 : address + 40 + value.size] = raw
        execute(case.group, f"{opcode} v1, {operand(file, 4, value.words)} offset:40")
        assert case.memory() == expected
        (pending,) = case.group.pending
        assert (pending.kind, pending.registers) == ("lds", frozenset())


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "opcode", "value"), once(LOAD_TWO_ROWS))
def test_load_of_two_values(target, opcode, value, partial):
    size, step = value
    for file in files(target):
        case = Case(target, partial)
        count = size // 2
        expected, memory = case.words(file, 4, count), case.memory()
        for wave, lane, address in case.active():
            raw = b""
            for offset in (0, 3):
                raw += memory[wave // 2][address + offset * step :][:size]
            expected[:, wave, lane] = Value(2 * size).loaded(raw, ())
        execute(case.group, f"{opcode} {operand(file, 4, count)}, v1 offset1:3")
        np.testing.assert_array_equal(case.words(file, 4, count), expected)
        assert len(case.group.pending) == 1


@pytest.mark.parametrize("partial", [False, True], ids=["all lanes", "some lanes"])
@pytest.mark.parametrize(("target", "opcode", "value"), once(STORE_TWO_ROWS))
def test_store_of_two_values(target, opcode, value, partial):
    size, step = value
    case = Case(target, partial)
    case.place(case.addresses // 16 * size)
    first, second = (case.words("v", i, size // 4) for i in (4, 8))
    expected = case.memory()
    far = 1 + 2 * case.lanes * size // step  # no two lanes write the same bytes
    for wave, lane, address in case.active():
        for data, offset in ((first, 1), (second, far)):
            at = address + offset * step
            expected[wave // 2][at : at + size] = Value(size).stored(data[:, wave, lane].tolist())
    data = ", ".join(operand("v", i, size // 4) for i in (4, 8))
    execute(case.group, f"{opcode} v1, {data} offset0:1 offset1:{far}")
    assert case.memory() == expected
    assert len(case.group.pending) == 1


@pytest.mark.parametrize(("target", "opcode", "value"), once(ATOMIC_ROWS))
def test_atomic(target, opcode, value):
    """Several lanes access each address: they take turns in the order of the lanes."""
    (operation, size, returns), case = value, Case(target, partial=True)
    case.place(case.addresses % 5 * 8 + 16)
    words, expected = size // 4, case.memory()
    operands = atomic_operands(operation, size, 4 * case.lanes, case.rng)
    for word in range(words):
        bits = [x >> (32 * word) & 0xFFFFFFFF for x in operands]
        case.group.v_u32[4 + word] = np.reshape(bits, case.exec.shape)
    before = case.words("v", 8, words)
    found = before.copy()
    for wave, lane, offset in case.active():
        memory, place = expected[wave // 2], slice(offset + 8, offset + 8 + size)
        old = int.from_bytes(memory[place], "little")
        new = ATOMIC_RESULTS[operation](old, operands[wave * case.lanes + lane], size)
        memory[place] = new.to_bytes(size, "little")
        found[:, wave, lane] = [old >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    to = f"{operand('v', 8, words)}, " if returns else ""
    execute(case.group, f"{opcode} {to}v1, {operand('v', 4, words)} offset:8")
    assert case.memory() == expected
    np.testing.assert_array_equal(case.words("v", 8, words), found if returns else before)
    (pending,) = case.group.pending
    assert pending.kind == "lds"
    assert pending.registers == (set(range(1008, 1008 + words)) if returns else set())


@pytest.mark.parametrize(("target", "opcode", "value"), once(COMPARE_ROWS))
def test_compare_and_swap(target, opcode, value):
    """CDNA names what it compares with first, RDNA the new value."""
    (size, returns), case = value, Case(target, partial=True)
    words, expected = size // 4, case.memory()
    equal = case.rng.random(case.exec.shape) < 0.5
    new, compare = case.words("v", 4, words), case.words("v", 8, words)
    before = case.words("v", 12, words)
    found = before.copy()
    for wave, lane, offset in case.active():
        memory, place = expected[wave // 2], slice(offset, offset + size)
        found[:, wave, lane] = Value(size).loaded(bytes(memory[place]), ())
        if equal[wave, lane]:
            compare[:, wave, lane] = found[:, wave, lane]
            memory[place] = Value(size).stored(new[:, wave, lane].tolist())
    case.group.v_u32[8 : 8 + words] = compare
    data = [operand("v", 4, words), operand("v", 8, words)]
    if target in CDNA:
        data.reverse()
    to = f"{operand('v', 12, words)}, " if returns else ""
    execute(case.group, f"{opcode} {to}v1, {', '.join(data)}")
    assert case.memory() == expected
    np.testing.assert_array_equal(case.words("v", 12, words), found if returns else before)


def test_transposing_load():
    """Lane i of 16 takes element i of four rows; each row is what four lanes point at."""
    case = Case(TRANSPOSED[0], partial=False)
    memory = case.memory()
    expected = case.words("v", 4, 2)
    for wave in range(4):
        for first in range(0, 64, 16):
            rows = [
                np.concatenate(
                    [
                        np.frombuffer(memory[wave // 2], "<u2", 4, int(address) + 24)
                        for address in case.addresses[wave, first + 4 * i : first + 4 * i + 4]
                    ]
                )
                for i in range(4)
            ]
            for lane in range(16):
                column = [int(row[lane]) for row in rows]
                expected[0, wave, first + lane] = column[0] | column[1] << 16
                expected[1, wave, first + lane] = column[2] | column[3] << 16
    execute(case.group, f"{TRANSPOSED[1]} v[4:5], v1 offset:24")
    np.testing.assert_array_equal(case.words("v", 4, 2), expected)


def test_transposing_load_needs_all_lanes():
    case = Case("gfx950", partial=True)
    with pytest.raises(UnknownInstruction, match="lanes that EXEC leaves out"):
        execute(case.group, "ds_read_b64_tr_b16 v[4:5], v1")


# Addresses, waits, races --------------------------------------------------------------------------


def test_sum_of_address_and_offset_has_32_bits():
    """Compilers fold an offset although the register is negative."""
    case = Case("gfx942", partial=False)
    case.group.v_u32[1] -= np.uint32(64)
    execute(case.group, "ds_read_b32 v4, v1 offset:64", "s_waitcnt lgkmcnt(0)")
    case.group.v_u32[1] += np.uint32(64)
    execute(case.group, "ds_read_b32 v5, v1")
    np.testing.assert_array_equal(register(case.group, "v4"), register(case.group, "v5"))


def test_no_lane_accesses_lds():
    group = group_of("gfx942", shared=shared_by(target_named("gfx942"), 2, lds=Lds(1, 64)), exec=0)
    execute(
        group,
        "ds_read_b32 v4, v1",
        "ds_write_b64 v1, v[4:5]",
        "ds_read2_b32 v[4:5], v1 offset1:1",
        "ds_add_rtn_u32 v4, v1, v5",
    )
    assert len(group.pending) == 4


@pytest.mark.parametrize(
    "text",
    [
        "ds_read_b32 v4, v1 gds",
        "ds_read_b32 v4, v1 offset0:1",
        "ds_read2_b32 v[4:5], v1 offset:4",
        "ds_read_b64 v4, v1",
        "ds_read_b32 v[4:5], v1",
        "ds_read_b32 s4, v1",
        "ds_read_b32 v4, s1",
        "ds_write_b32 v1, v4.h",
        "ds_write2_b32 v1, v2",
        "ds_write_b32 v1, v2, v3",
        "ds_add_u32 v1, v2, v3",
        "ds_add_rtn_u32 v1, v2",
        "ds_cmpst_b32 v1, v2",
        "ds_inc_u32 v1, v2",
        "ds_load_b32 v4, v1",
        "ds_consume v1",
        "ds_read_b64_tr_b16 v[4:5], v1",
    ],
)
def test_unknown_form(text):
    with pytest.raises(UnknownInstruction, match="line 1"):
        decode(parse_instruction(text, 1), target_named("gfx942"))


def use(group, text):
    decoded = decode(parse_instruction(text, 1), group.shared.target)
    check_registers(group, decoded.text, decoded.reads, decoded.writes)


def test_result_is_used_before_the_wait():
    case = Case("gfx942", partial=False)
    execute(case.group, "ds_read_b64 v[4:5], v1")
    for text in ("v_mov_b32_e32 v6, v5", "ds_write_b32 v4, v6", "ds_read_b32 v4, v4"):
        with pytest.raises(WaitFault, match=r"v[45] is used before .* ds_read_b64"):
            use(case.group, text)
    execute(case.group, "s_waitcnt lgkmcnt(0)")
    use(case.group, "ds_read_b32 v4, v4")


def test_both_halves_may_be_loaded_without_a_wait():
    case = Case("gfx942", partial=False)
    execute(case.group, "ds_read_u16_d16 v4, v1")
    use(case.group, "ds_read_u16_d16_hi v4, v1 offset:2")
    with pytest.raises(WaitFault, match="v4 is used"):  # it may finish first
        use(case.group, "global_load_short_d16_hi v4, v[2:3], off")


def test_a_load_in_flight_crosses_a_barrier():
    """Another wave may overwrite LDS after the barrier only if the load was waited for."""
    for waits in (False, True):
        lds, target = Lds(1, 256), target_named("gfx1100")
        group = group_of(target, 2, shared=shared_by(target, 2, lds=lds), v1=4 * np.arange(32))
        first, second = group.only(group.ids == 0), group.only(group.ids == 1)
        execute(first, "ds_store_b32 v1, v1", "s_waitcnt lgkmcnt(0)")
        lds.new_epoch()
        execute(second, "ds_load_b32 v4, v1")
        if waits:
            execute(second, "s_waitcnt lgkmcnt(0)")
        lds.new_epoch([each.access for each in second.pending])
        if waits:
            execute(first, "ds_store_b32 v1, v1 offset:4")
        else:
            with pytest.raises(RaceFault, match="wave 1 has read"):
                execute(first, "ds_store_b32 v1, v1 offset:4")
