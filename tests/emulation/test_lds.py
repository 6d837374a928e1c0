"""LDS of the emulator: bounds, what was written, races."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from attn_dispatch.emulation.errors import EmulationError, MemoryFault, RaceFault, UnwrittenRead
from attn_dispatch.emulation.memory.lds import Lds
from support.memory_cases import lanes

SIZES = [1, 2, 4, 8, 12, 16]


def ones(size, k=1, value=1):
    """A value of `size` bytes for each lane; every byte of it is `value`."""
    values = np.full((max(size // 4, 1), k), value * 0x01010101, np.uint32)
    return values & np.uint32((1 << (8 * size)) - 1) if size < 4 else values


def store(lds, wave, offset, size=4, value=1, workgroup=0):
    return lds.store(lanes(workgroup), lanes(offset), ones(size, 1, value), size, lanes(wave))


def load(lds, wave, offset, size=4, workgroup=0):
    return lds.load(lanes(workgroup), lanes(offset), size, lanes(wave))


def add(lds, wave, offset, size=4, workgroup=0):
    return lds.atomic("add", lanes(workgroup), lanes(offset), ones(size), size, lanes(wave))


def written(bytes_each=64, num_workgroups=1, value=9):
    """LDS in which every byte was written before the last barrier."""
    lds = Lds(num_workgroups, bytes_each)
    workgroups, offsets = np.divmod(np.arange(num_workgroups * bytes_each), bytes_each)
    lds.store(workgroups, offsets, ones(1, offsets.size, value), 1, 0 * offsets)
    lds.new_epoch()
    return lds


# Values, bounds and what was written --------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_workgroups_have_their_own_memory(size):
    lds = Lds(3, 20)
    workgroups, offsets = lanes(0, 1, 2), np.full(3, 20 - size)
    values = np.concatenate([ones(size, 1, value) for value in (1, 2, 3)], axis=1)
    lds.store(workgroups, offsets, values, size, lanes(0, 4, 8))
    assert (lds.load(workgroups, offsets, size, lanes(0, 4, 8))[0] == values).all()
    assert (lds.bytes_written, lds.bytes_read) == (3 * size, 3 * size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("kind", [load, store])
def test_one_byte_outside_is_a_fault(size, beyond, kind):
    lds = written(20)
    wrong, legal = (20 - size + 1, 20 - size) if beyond else (-1, 0)
    kind(lds, 3, legal, size)
    with pytest.raises(MemoryFault, match=f"{size} bytes at offset {wrong} by wave 3 .*20 bytes"):
        kind(lds, 3, wrong, size)


def test_a_kernel_without_lds():
    lds = Lds(2, 0)
    lds.new_epoch()
    assert lds.load(lanes(), lanes(), 8, lanes())[0].shape == (2, 0)
    with pytest.raises(MemoryFault, match="LDS of 0 bytes"):
        load(lds, 0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_byte_that_was_never_written_may_not_be_read(size):
    lds = Lds(2, 32)
    for byte in range(5, 5 + size - 1):
        store(lds, 2, byte, 1, workgroup=1)
    with pytest.raises(UnwrittenRead, match=f"workgroup 1 by wave 2 reads byte {5 + size - 1}, wh"):
        load(lds, 2, 5, size, workgroup=1)
    store(lds, 2, 5 + size - 1, 1, workgroup=1)
    load(lds, 2, 5, size, workgroup=1)
    with pytest.raises(UnwrittenRead):
        load(lds, 0, 5, size, workgroup=0)


# Races --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_reading_what_another_wave_wrote(size):
    lds = written()
    store(lds, 1, 16, size)
    load(lds, 1, 16, size)  # its own
    load(lds, 2, 16 + size, size)  # the bytes after
    load(lds, 2, 16 - size, size)  # the bytes before
    for near in (1 - size, 0, size - 1):
        with pytest.raises(RaceFault, match=r"load .* by wave 2 races: wave 1 has written byte"):
            load(lds, 2, 16 + near, size)
    lds.new_epoch()
    load(lds, 2, 16, size)


@pytest.mark.parametrize("size", SIZES)
def test_writing_what_another_wave_read(size):
    lds = written()
    load(lds, 1, 16, size)
    store(lds, 1, 16, size)  # its own
    lds.new_epoch()
    load(lds, 1, 16, size)
    store(lds, 2, 16 + size, size)
    store(lds, 2, 16 - size, size)
    last = 16 + size - 1
    with pytest.raises(RaceFault, match=f"store .* by wave 2 races: wave 1 has read byte {last}"):
        store(lds, 2, last, 1, 7)
    store(lds, 2, last, 1, 1)  # the value that is there
    with pytest.raises(RaceFault, match=f"wave 1 has read byte {last}"):
        store(lds, 2, last, 1, 7)  # wave 2 is now a writer, which is no reason
    lds.new_epoch()
    store(lds, 2, 16, size, 7)


def test_writing_what_several_waves_read():
    lds = written()
    for wave in (1, 2):
        load(lds, wave, 16, 8)
    for wave in (1, 2, 3):
        with pytest.raises(RaceFault, match="several waves have read byte 16 since"):
            store(lds, wave, 16, 4)


def test_waves_of_one_instruction_that_read_the_same_bytes():
    lds = written()
    lds.load(lanes(0, 0), lanes(16, 16), 8, lanes(1, 2))
    for wave in (1, 2, 3):
        with pytest.raises(RaceFault, match="several waves have read"):
            store(lds, wave, 20, 4)


@pytest.mark.parametrize("size", SIZES)
def test_writing_other_values_over_those_of_another_wave(size):
    lds = written()
    store(lds, 1, 16, size, 5)
    store(lds, 1, 16, size, 6)  # its own
    with pytest.raises(RaceFault, match=r"store .* by wave 2 races: wave 1 has written byte 16"):
        store(lds, 2, 16, size, 5)


@pytest.mark.parametrize("size", SIZES)
def test_several_waves_may_write_the_same_value(size):
    lds = written()
    store(lds, 1, 16, size, 5)
    store(lds, 2, 16, size, 5)
    with pytest.raises(RaceFault, match="several waves have written"):
        load(lds, 3, 16, size)
    with pytest.raises(RaceFault, match="several waves have written"):
        store(lds, 2, 16, size, 6)
    lds.new_epoch()
    load(lds, 3, 16, size)


@pytest.mark.parametrize("size", SIZES)
def test_lanes_of_one_instruction_that_write_the_same_bytes(size):
    lds = written()
    for waves in (lanes(1, 2), lanes(1, 1)):
        lds.store(lanes(0, 0), lanes(16, 16), ones(size, 2, 5), size, waves)
        lds.new_epoch()
        values = np.concatenate([ones(size, 1, 5), ones(size, 1, 6)], axis=1)
        with pytest.raises(RaceFault, match="another lane of the same instruction"):
            lds.store(lanes(0, 0), lanes(16, 16), values, size, waves)
        lds.new_epoch()
    lds.store(lanes(0, 0), lanes(16, 16), ones(size, 2, 5), size, lanes(1, 2))
    with pytest.raises(RaceFault, match="several waves have written"):
        load(lds, 1, 16, size)


def test_bits_that_a_short_store_leaves_out_do_not_matter():
    lds = written()
    values = np.array([[0x12340007, 0x56780007]], np.uint32)
    lds.store(lanes(0, 0), lanes(16, 16), values, 2, lanes(1, 2))
    lds.new_epoch()
    assert load(lds, 0, 16, 2)[0].tolist() == [[7]]


def test_workgroups_do_not_race():
    lds = written(num_workgroups=2)
    store(lds, 1, 16, workgroup=0)
    store(lds, 5, 16, value=2, workgroup=1)
    load(lds, 5, 16, workgroup=1)


@pytest.mark.parametrize("first", [0, 222])
def test_32_waves_of_a_workgroup(first):
    lds = written()
    for wave in range(first, first + 32):
        store(lds, wave, wave - first, 1)
    for wave in (first, first + 31):
        for other in range(first, first + 32):
            if other == wave:
                load(lds, wave, other - first, 1)
                continue
            with pytest.raises(RaceFault, match=f"by wave {wave} races: wave {other} has written"):
                load(lds, wave, other - first, 1)


def test_the_number_of_waves_has_a_limit():
    with pytest.raises(EmulationError, match="At most 254 waves"):
        store(written(), 254, 0)


# Barriers -----------------------------------------------------------------------------------------


def test_a_store_in_flight_at_the_barrier_is_still_an_access():
    lds = written()
    access = store(lds, 1, 16, 8)
    lds.new_epoch([access])
    load(lds, 1, 16, 8)
    with pytest.raises(RaceFault, match="wave 1 has written byte 20"):
        load(lds, 2, 20)
    lds.new_epoch()
    load(lds, 2, 20)


def test_a_load_in_flight_at_the_barrier_is_still_an_access():
    lds = written()
    _, access = load(lds, 1, 16, 8)
    lds.new_epoch([access])
    load(lds, 2, 20)
    with pytest.raises(RaceFault, match="wave 1 has read byte 16"):
        store(lds, 2, 16)


def test_records_split_and_join_by_wave():
    lds = written()
    _, access = lds.load(np.zeros(3, np.int64), lanes(0, 4, 8), 4, lanes(1, 2, 3))
    lds.new_epoch([access.only(lanes(1)).joined(access.only(lanes(3)))])
    store(lds, 7, 4)
    for offset, wave in ((0, 1), (8, 3)):
        with pytest.raises(RaceFault, match=f"wave {wave} has read"):
            store(lds, 7, offset)
    lds.new_epoch([access.only(lanes(9))])
    store(lds, 7, 0)


def test_a_barrier_of_some_workgroups():
    lds = written(num_workgroups=3)
    for workgroup in range(3):
        store(lds, 4 * workgroup, 16, workgroup=workgroup)
    lds.new_epoch(workgroups=lanes(0, 2))
    for workgroup in (0, 2):
        load(lds, 4 * workgroup + 1, 16, workgroup=workgroup)
    with pytest.raises(RaceFault, match="LDS of workgroup 1"):
        load(lds, 5, 16, workgroup=1)
    lds.new_epoch()
    load(lds, 5, 16, workgroup=1)


# Atomic operations --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8])
def test_atomic_operations_of_several_waves_do_not_race(size):
    lds = written(value=0)
    three = np.zeros(3, np.int64)
    found, _ = lds.atomic("add", three, three, ones(size, 3), size, lanes(1, 2, 1))
    assert found[0].tolist() == [0, 0x01010101, 0x02020202]
    add(lds, 3, 0, size)
    for kind in (load, store):
        with pytest.raises(RaceFault, match="several waves have changed"):
            kind(lds, 1, size - 4, 4)
    lds.new_epoch()
    assert load(lds, 5, 0)[0].tolist() == [[0x04040404]]
    assert (lds.bytes_read, lds.bytes_written) == (4 * size + 4, 4 * size + 64)


def test_a_wave_may_access_what_only_it_has_changed_by_atomic_operations():
    lds = written()
    add(lds, 1, 0)
    load(lds, 1, 0)
    with pytest.raises(RaceFault, match="wave 1 has changed"):
        load(lds, 2, 0)
    store(lds, 1, 4)
    add(lds, 1, 4)
    with pytest.raises(RaceFault, match="wave 1 has written"):
        add(lds, 2, 4)  # the store may come after it


def test_an_atomic_operation_races_with_loads_and_stores_of_other_waves():
    lds = written()
    load(lds, 1, 0)
    store(lds, 1, 8)
    for offset, done in ((0, "read"), (8, "written")):
        with pytest.raises(RaceFault, match=f"atomic operation .* wave 1 has {done}"):
            add(lds, 2, offset)
        add(lds, 1, offset)


def test_a_store_of_the_sum_races_with_the_addition():
    """It stores the value that is already there only if it comes after the addition."""
    lds = written(value=1)
    add(lds, 1, 0)
    with pytest.raises(RaceFault, match="wave 1 has changed"):
        store(lds, 2, 0, value=2)


def test_an_atomic_operation_in_flight_at_the_barrier():
    lds = written()
    _, access = add(lds, 1, 0)
    lds.new_epoch([access])
    add(lds, 2, 0)
    with pytest.raises(RaceFault, match="several waves have changed"):
        load(lds, 1, 0)


def test_atomic_operations_are_checked_as_other_accesses():
    lds = Lds(1, 16)
    with pytest.raises(UnwrittenRead, match="atomic operation"):
        add(lds, 0, 0)
    with pytest.raises(MemoryFault, match="offset 16 by wave 0 is outside"):
        add(lds, 0, 16)
    with pytest.raises(MemoryFault, match="offset must be a multiple of 8"):
        add(lds, 0, 4, 8)


# Against a model ----------------------------------------------------------------------------------


class Model:
    """Bytes of LDS with the sets of their readers and writers."""

    def __init__(self):
        self.value, self.readers, self.writers = {}, {}, {}
        self.is_broken = False  # by a store that wrote two values to one byte

    def load(self, accesses):
        if any(byte not in self.value for _, span in accesses for byte in span):
            return UnwrittenRead
        for wave, span in accesses:
            if any(self.writers.get(byte, set()) - {wave} for byte in span):
                return RaceFault
        for wave, span in accesses:
            for byte in span:
                self.readers.setdefault(byte, set()).add(wave)
        return None

    def store(self, accesses, contents):
        stored = {}
        for (wave, span), content in zip(accesses, contents, strict=True):
            for byte, value in zip(span, content, strict=True):
                others = (self.writers.get(byte, set()) | self.readers.get(byte, set())) - {wave}
                if others and self.value[byte] != value:
                    return RaceFault
                if stored.setdefault(byte, value) != value:
                    self.is_broken = True
                    return RaceFault
        self.value.update(stored)
        for wave, span in accesses:
            for byte in span:
                self.writers.setdefault(byte, set()).add(wave)
        return None

    def barrier(self, in_flight):
        self.readers, self.writers = {}, {}
        for accesses, is_write in in_flight:
            shadow = self.writers if is_write else self.readers
            for wave, span in accesses:
                for byte in span:
                    shadow.setdefault(byte, set()).add(wave)


@pytest.mark.parametrize("seed", range(12))
def test_random_accesses_agree_with_sets_of_readers_and_writers(seed):
    rng = np.random.default_rng(seed)
    lds, model, recent, seen = Lds(2, 96), Model(), [], set()
    for _ in range(400):
        if rng.random() < 0.15:
            kept = [each for each in recent if rng.random() < 0.2]
            lds.new_epoch([record for record, _, _ in kept])
            model.barrier([(accesses, is_write) for _, accesses, is_write in kept])
            recent = []
            continue
        size, step, k = int(rng.choice(SIZES)), int(rng.choice([1, 2, 4, 8])), rng.integers(1, 5)
        offsets = rng.integers(0, 96 - size, k) // step * step
        workgroups, number = rng.integers(0, 2, k), rng.integers(0, 3, k)
        waves = 124 + 3 * workgroups + number
        accesses = [
            (wave, [(workgroup, byte) for byte in range(offset, offset + size)])
            for wave, workgroup, offset in zip(
                waves.tolist(), workgroups.tolist(), offsets.tolist(), strict=True
            )
        ]
        is_write = rng.random() < 0.5
        if is_write:
            # Few different values, so that waves often write the one that is there already.
            words = rng.choice(np.array([0x01010101, 0x01010102], np.uint32), k, p=[0.9, 0.1])
            values = np.repeat(words[None], max(size // 4, 1), axis=0)
            contents = [each.tobytes()[:size] for each in np.ascontiguousarray(values.T)]
            expected = model.store(accesses, contents)
            access = partial(lds.store, workgroups, offsets, values, size, waves)
        else:
            expected = model.load(accesses)
            access = partial(lds.load, workgroups, offsets, size, waves)
        seen.add((is_write, expected))
        if expected is not None:
            with pytest.raises(expected):
                access()
            if model.is_broken:
                lds, model, recent = Lds(2, 96), Model(), []
            continue
        result = access()
        recent.append((result if is_write else result[1], accesses, is_write))
        if not is_write:
            for (_, span), each in zip(accesses, np.ascontiguousarray(result[0].T), strict=True):
                assert each.tobytes()[:size] == bytes(model.value[byte] for byte in span)
                assert not any(each.tobytes()[size:])
    assert seen == {
        (False, None),
        (False, UnwrittenRead),
        (False, RaceFault),
        (True, None),
        (True, RaceFault),
    }
