"""Global memory of the emulator: bounds, what was written, stores in flight."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.errors import EmulationError, MemoryFault, UnwrittenRead, WaitFault
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from support.memory_cases import lanes, random_words

SIZES = [1, 2, 4, 8, 12, 16, 32, 64]


def words(*rows):
    """uint32 (words, k) from rows of words, or from one number per lane."""
    values = np.array(rows, np.uint32)
    return values if values.ndim == 2 else values[None]


def memory_of(nbytes, written=True, name="x"):
    memory = GlobalMemory()
    return memory, memory.allocate(nbytes, name, written)


# Regions ------------------------------------------------------------------------------------------


def test_memory_is_used_in_place():
    data = np.arange(16, dtype=np.uint8)
    memory = GlobalMemory()
    memory.add(data.ctypes.data, data, "x")
    memory.store(lanes(data.ctypes.data + 4), words(0x01020304), 4, lanes(0))
    assert data[4:8].tolist() == [4, 3, 2, 1]


def test_the_same_memory_is_one_region():
    data = np.zeros(16, np.uint8)
    memory = GlobalMemory()
    assert memory.add(4096, data, "x") is memory.add(4096, data, "y")
    assert [region.name for region in memory.regions] == ["x"]


@pytest.mark.parametrize(
    ("address", "size"), [(4095, 2), (4096, 8), (4100, 4), (4111, 9), (0, 9999)]
)
def test_overlapping_regions_are_rejected(address, size):
    memory = GlobalMemory()
    memory.add(4096, np.zeros(16, np.uint8), "x")
    with pytest.raises(EmulationError, match=r"'y' .* overlaps 'x' \(16 bytes from 0x1000\)"):
        memory.add(address, np.zeros(size, np.uint8), "y")


def test_adjacent_regions_are_two():
    memory = GlobalMemory()
    for address in (4096, 4112, 4080):
        memory.add(address, np.zeros(16, np.uint8), hex(address))
    assert [region.address for region in memory.regions] == [4080, 4096, 4112]


def test_an_empty_region_holds_no_address():
    memory = GlobalMemory()
    memory.add(4096, np.zeros(0, np.uint8), "empty")
    with pytest.raises(MemoryFault, match="there is none"):
        memory.load(lanes(4096), 1, lanes(0))


@pytest.mark.parametrize(
    "data", [np.zeros(4, np.int32), np.zeros((2, 2), np.uint8), np.zeros(8, np.uint8)[::2]]
)
def test_data_of_another_layout_is_rejected(data):
    with pytest.raises(EmulationError, match="contiguous array of uint8"):
        GlobalMemory().add(4096, data, "x")


def test_allocated_memory_is_aligned_and_can_be_removed():
    memory, region = memory_of(100)
    assert region.address % 256 == 0
    assert region.data.size == 100
    assert memory.region_at(region.address + 99) is region
    memory.remove(region)
    with pytest.raises(MemoryFault):
        memory.region_at(region.address)


def test_allocated_content_counts_as_written():
    memory = GlobalMemory()
    region = memory.allocate(np.arange(8, dtype=np.uint8), "arguments")
    assert memory.load(lanes(region.address + 4), 4, lanes(0)).tolist() == [[0x07060504]]


@pytest.mark.parametrize("written", [True, False])
def test_a_region_can_be_restored(written):
    memory, region = memory_of(8, written)
    address = lanes(region.address)
    memory.store(address, words(1), 4, lanes(0))
    saved = region.saved()
    for _ in range(2):
        memory.store(address, words((2,), (3,)), 8, lanes(1))
        region.restore(saved)
        assert memory.load(address, 4, lanes(2)).tolist() == [[1]]  # no store is in flight
        assert region.data[4:].tolist() == [0xFF] * 4
        if not written:
            with pytest.raises(UnwrittenRead):
                memory.load(address, 8, lanes(2))


# Bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_first_and_last_bytes_may_be_accessed(size):
    memory, region = memory_of(128)
    ends = lanes(region.address, region.end - size)
    values = random_words(np.random.default_rng(0), size, 2)
    memory.retire(memory.store(ends, values, size, lanes(0, 1)))
    assert (memory.load(ends, size, lanes(0, 1)) == values).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("kind", ["load", "store"])
def test_one_byte_outside_is_a_fault(size, beyond, kind):
    memory, region = memory_of(128, name="k_cache")
    address = region.end - size + 1 if beyond else region.address - 1
    where = "ends 1 bytes after the end of" if beyond else "begins 1 bytes before"
    message = f"The {kind} of {size} bytes at {address:#x} by wave 7 .*{where} .*'k_cache'"
    addresses, waves = lanes(region.address, address), lanes(6, 7)
    before = region.data.copy()
    values = [np.zeros((max(size // 4, 1), 2), np.uint32)] if kind == "store" else []
    with pytest.raises(MemoryFault, match=message):
        getattr(memory, kind)(addresses, *values, size, waves)
    assert (region.data == before).all()


def test_an_access_across_two_adjacent_regions_is_a_fault():
    memory = GlobalMemory()
    data = np.zeros(32, np.uint8)
    for half, name in ((data[:16], "x"), (data[16:], "y")):
        memory.add(half.ctypes.data, half, name)
    address = data.ctypes.data
    memory.load(lanes(address + 12, address + 16), 4, lanes(0, 0))
    with pytest.raises(MemoryFault, match="ends 2 bytes after the end of the nearest one, 'x'"):
        memory.load(lanes(address + 14), 4, lanes(0))


def test_the_nearest_region_is_named():
    memory = GlobalMemory()
    for address, name in ((0x1000, "x"), (0x2000, "y"), (0x9000, "z")):
        memory.add(address, np.zeros(256, np.uint8), name)
    with pytest.raises(MemoryFault, match="begins 16 bytes before the nearest one, 'y'"):
        memory.load(lanes(0x1FF0), 4, lanes(0))
    with pytest.raises(MemoryFault, match="ends 20 bytes after the end of the nearest one, 'x'"):
        memory.load(lanes(0x1110), 4, lanes(0))


@pytest.mark.parametrize("address", [0, -8, (1 << 63) - 4, -(1 << 63)])
def test_any_64_bits_are_an_address(address):
    memory, region = memory_of(16)
    with pytest.raises(MemoryFault, match=f"at {address % (1 << 64):#x} by wave 3"):
        memory.load(lanes(region.address, address), 16, lanes(3, 3))


def test_the_number_of_lanes_at_fault_is_reported():
    memory, region = memory_of(16)
    with pytest.raises(MemoryFault, match="2 of 3 lanes access such memory"):
        memory.load(region.address + lanes(16, 0, 20), 4, lanes(0, 0, 0))


def test_no_lanes():
    memory, _ = memory_of(16)
    none = lanes()
    assert memory.load(none, 8, none).shape == (2, 0)
    memory.retire(memory.store(none, np.zeros((2, 0), np.uint32), 8, none))
    assert memory.atomic("add", none, np.zeros((1, 0), np.uint32), 4, none).shape == (1, 0)


# What was written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 3])
def test_a_byte_that_was_never_written_may_not_be_read(size, offset):
    memory, region = memory_of(128, written=False)
    start = region.address + offset
    for byte in range(size):
        if byte != size - 1:
            memory.store(lanes(start + byte), words(byte), 1, lanes(0))
    with pytest.raises(UnwrittenRead, match=f"reads byte {offset + size - 1} of 'x'"):
        memory.load(lanes(start), size, lanes(0))
    memory.store(lanes(start + size - 1), words(1), 1, lanes(0))
    memory.load(lanes(start), size, lanes(0))
    with pytest.raises(UnwrittenRead, match=f"wave 5 reads byte {offset + size} of 'x'"):
        memory.load(lanes(start, start + 1), size, lanes(0, 5))


def test_an_atomic_operation_reads():
    memory, region = memory_of(8, written=False)
    address = lanes(region.address)
    with pytest.raises(UnwrittenRead, match="The atomic operation of 4 bytes"):
        memory.atomic("add", address, words(1), 4, lanes(0))
    memory.store(address, words(1), 4, lanes(0))
    memory.atomic("add", address, words(1), 4, lanes(0))


# Stores in flight ---------------------------------------------------------------------------------


def test_a_store_is_in_flight_until_it_is_retired():
    memory, region = memory_of(16)
    address = lanes(region.address)
    stores = memory.store(address + 4, words(7), 4, lanes(2))
    assert memory.load(address + 4, 4, lanes(2)).tolist() == [[7]]  # its own store
    memory.load(address, 4, lanes(3))  # the word before
    memory.load(address + 8, 4, lanes(3))  # the word after
    with pytest.raises(WaitFault, match=r"byte 4 of 'x'.* wave 2 is still in flight"):
        memory.load(address + 1, 4, lanes(3))
    with pytest.raises(WaitFault, match="The atomic operation"):
        memory.atomic("add", address + 4, words(1), 4, lanes(3))
    memory.retire(stores)
    assert memory.load(address + 4, 4, lanes(3)).tolist() == [[7]]


def test_neighbouring_bytes_of_a_word_are_independent():
    memory, region = memory_of(4)
    memory.store(lanes(region.address), words(1), 2, lanes(0))
    memory.load(lanes(region.address + 2), 2, lanes(1))
    with pytest.raises(WaitFault):
        memory.load(lanes(region.address), 4, lanes(1))


def test_a_record_splits_by_wave():
    memory, region = memory_of(16)
    addresses, waves = region.address + lanes(0, 4, 8, 12), lanes(0, 1, 1, 2)
    stores = memory.store(addresses, words(1, 2, 3, 4), 4, waves)
    memory.retire(stores.only(lanes(1)))
    memory.load(addresses[1:3], 4, lanes(5, 5))
    for address, wave in ((addresses[0], 0), (addresses[3], 2)):
        with pytest.raises(WaitFault, match=f"wave {wave} is still"):
            memory.load(lanes(address), 4, lanes(5))
    memory.retire(stores.only(lanes(0)).joined(stores.only(lanes(2, 7))))
    memory.load(addresses, 4, lanes(5, 5, 5, 5))


def test_two_stores_of_a_wave_to_the_same_byte():
    memory, region = memory_of(4)
    address = lanes(region.address)
    first = memory.store(address, words(1), 4, lanes(0))
    second = memory.store(address, words(2), 4, lanes(0))
    for retired in (first, second):
        with pytest.raises(WaitFault):
            memory.load(address, 4, lanes(1))
        memory.retire(retired)
    assert memory.load(address, 4, lanes(1)).tolist() == [[2]]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_waves_store_to_the_same_byte(together, order):
    memory, region = memory_of(4)
    address = lanes(region.address)
    if together:
        both = memory.store(np.repeat(address, 2), words(1, 2), 4, lanes(0, 1))
        stores = [both.only(lanes(0)), both.only(lanes(1))]
    else:
        stores = [memory.store(address, words(wave), 4, lanes(wave)) for wave in (0, 1)]
    for wave in (0, 1, 2):
        with pytest.raises(WaitFault, match="several waves"):
            memory.load(address, 4, lanes(wave))
    first, second = order
    memory.retire(stores[first])
    memory.load(address, 4, lanes(second))  # now only its own store is in flight
    with pytest.raises(WaitFault, match=f"wave {second} is still"):
        memory.load(address, 4, lanes(first))
    memory.retire(stores[second])
    memory.load(address, 4, lanes(2))


def test_a_store_that_overlaps_a_retired_one_is_still_retired_completely():
    memory, region = memory_of(16)
    address = lanes(region.address)
    long = memory.store(address, words((1,), (2,), (3,), (4,)), 16, lanes(0))
    short = memory.store(address, words(5), 4, lanes(1))
    with pytest.raises(WaitFault):
        memory.load(address + 12, 4, lanes(2))
    memory.retire(short)
    memory.retire(long)
    memory.load(address, 16, lanes(2))


# Atomic operations --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8])
def test_an_atomic_operation_must_be_aligned(size):
    memory, region = memory_of(32)
    operand = np.ones((size // 4, 1), np.uint32)
    memory.atomic("add", lanes(region.address + size), operand, size, lanes(0))
    with pytest.raises(MemoryFault, match=f"not aligned: the address must be a multiple of {size}"):
        memory.atomic("add", lanes(region.address + size // 2), operand, size, lanes(0))


def test_an_atomic_operation_outside_is_a_fault():
    memory, region = memory_of(8)
    with pytest.raises(MemoryFault, match="The atomic operation of 4 bytes"):
        memory.atomic("add", lanes(region.end), words(1), 4, lanes(0))


def test_atomic_operations_on_two_regions():
    memory = GlobalMemory()
    x, y = (memory.allocate(np.zeros(8, np.uint8), name) for name in "xy")
    addresses = lanes(x.address, y.address, x.address, y.address + 4)
    found = memory.atomic("add", addresses, words(1, 2, 3, 4), 4, lanes(0, 0, 1, 1))
    assert found.tolist() == [[0, 0, 1, 0]]
    assert x.data.view(np.uint32).tolist() == [4, 0]
    assert y.data.view(np.uint32).tolist() == [2, 4]


# Against a model ----------------------------------------------------------------------------------


class Model:
    """A dictionary of bytes; each byte knows its value and who has it in flight."""

    def __init__(self, memory):
        self.value, self.in_flight, self.regions = {}, {}, []
        for region in memory.regions:
            self.regions.append((region.address, region.end))

    def fault(self, address, size):
        return not any(low <= address and address + size <= high for low, high in self.regions)

    def load(self, addresses, size, waves):
        """The bytes of each lane, or the class of the fault."""
        if any(self.fault(address, size) for address in addresses):
            return MemoryFault
        spans = [range(address, address + size) for address in addresses]
        if any(byte not in self.value for span in spans for byte in span):
            return UnwrittenRead
        for span, wave in zip(spans, waves, strict=True):
            if any(owner != wave for byte in span for owner, _ in self.in_flight.get(byte, ())):
                return WaitFault
        return [bytes(self.value[byte] for byte in span) for span in spans]

    def store(self, addresses, raw, size, waves, number):
        if any(self.fault(address, size) for address in addresses):
            return MemoryFault
        for address, content, wave in zip(addresses, raw, waves, strict=True):
            for at, value in enumerate(content[:size]):
                self.value[address + at] = value
                self.in_flight.setdefault(address + at, set()).add((wave, number))
        return None

    def retire(self, number, waves):
        for owners in self.in_flight.values():
            owners -= {(wave, number) for wave in waves}


@pytest.mark.parametrize("seed", range(10))
def test_random_accesses_agree_with_a_dictionary_of_bytes(seed):
    rng = np.random.default_rng(seed)
    memory, raw = GlobalMemory(), np.zeros(1024, np.uint8)
    base = raw.ctypes.data
    # Adjacent, apart, at odd addresses and of odd lengths.
    for low, high in ((0, 64), (64, 131), (140, 300), (303, 400), (512, 1024)):
        memory.add(base + low, raw[low:high], f"r{low}", written=False)
    model, records, seen = Model(memory), {}, set()
    for region in memory.regions:  # the first bytes stay unwritten
        content = rng.integers(0, 256, region.data.size - 5, dtype=np.uint8)
        places = np.arange(region.address + 5, region.end)
        memory.retire(memory.store(places, words(content), 1, 0 * places))
        model.value.update(enumerate(content.tolist(), region.address + 5))
    for number in range(200):
        size, k = int(rng.choice(SIZES)), int(rng.integers(1, 6))
        step = int(rng.choice([1, 2, 4, 16]))
        low, high = ((0, 1024), (520, 900), (136, 320))[rng.choice(3, p=[0.3, 0.4, 0.3])]
        addresses = base + low + rng.integers(0, high - low - size, k) // step * step
        waves = rng.integers(0, 4, k)
        action = rng.choice(["load", "store", "retire"], p=[0.5, 0.25, 0.25])
        if action == "store":
            # A lane's bytes do not overlap another's: their order is not defined.
            apart = [
                lane
                for lane, address in enumerate(addresses)
                if all(abs(address - other) >= size for other in addresses[:lane])
            ]
            addresses, waves = addresses[apart], waves[apart]
            values = random_words(rng, size, addresses.size)
            content = [column.tobytes() for column in np.ascontiguousarray(values.T)]
            expected = model.store(addresses.tolist(), content, size, waves.tolist(), number)
            if expected is None:
                record = memory.store(addresses, values, size, waves)
                records[number] = record, set(waves.tolist())
            else:
                with pytest.raises(expected):
                    memory.store(addresses, values, size, waves)
        elif action == "load":
            expected = model.load(addresses.tolist(), size, waves.tolist())
            seen.add(expected.__name__ if isinstance(expected, type) else "values")
            if isinstance(expected, type):
                # With several regions, the order of these two differs from the model's.
                either = {MemoryFault} if expected is MemoryFault else {UnwrittenRead, WaitFault}
                with pytest.raises(tuple(either)):
                    memory.load(addresses, size, waves)
            else:
                values = np.ascontiguousarray(memory.load(addresses, size, waves).T)
                assert [column.tobytes()[:size] for column in values] == expected
                assert all(not any(column.tobytes()[size:]) for column in values)
        elif records:
            chosen = int(rng.choice(list(records)))
            record, left = records.pop(chosen)
            part = {wave for wave in left if rng.random() < 0.7}
            memory.retire(record.only(np.array(sorted(part), np.int64)))
            model.retire(chosen, part)
            if left - part:
                rest = np.array(sorted(left - part), np.int64)
                records[chosen] = record.only(rest), left - part
    assert seen == {"values", "MemoryFault", "UnwrittenRead", "WaitFault"}
