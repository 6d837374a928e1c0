"""Private memory of the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.errors import MemoryFault, UnwrittenRead
from attn_dispatch.emulation.memory.scratch import Scratch
from support.memory_cases import lanes, random_words

SIZES = [1, 2, 4, 8, 12, 16]


def test_each_lane_of_each_wave_has_its_own_memory():
    scratch = Scratch(num_waves=3, lanes=32, bytes_each=20)
    waves, numbers = np.repeat(np.arange(3), 32), np.tile(np.arange(32), 3)
    for offset in range(0, 20, 4):
        values = (1000 * waves + 10 * numbers + offset).astype(np.uint32)[None]
        scratch.store(waves, numbers, np.full(96, offset), values, 4)
    for offset in range(0, 20, 4):
        expected = (1000 * waves + 10 * numbers + offset).tolist()
        assert scratch.load(waves, numbers, np.full(96, offset), 4).tolist() == [expected]


def test_bytes_are_counted():
    scratch = Scratch(1, 64, 16)
    four = np.arange(4)
    scratch.store(0 * four, four, 0 * four, np.zeros((4, 4), np.uint32), 16)
    scratch.load(0 * four[:3], four[:3], lanes(0, 1, 2), 8)
    assert (scratch.bytes_written, scratch.bytes_read) == (64, 24)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["load", "store"])
@pytest.mark.parametrize("offset", [-1, 1])
def test_outside_of_the_lane_is_a_fault(size, kind, offset):
    scratch = Scratch(2, 32, 20)
    wrong = offset if offset < 0 else 20 - size + offset
    legal = 0 if offset < 0 else 20 - size
    values = np.zeros((max(size // 4, 1), 1), np.uint32)
    scratch.store(lanes(1), lanes(4), lanes(legal), values, size)
    scratch.load(lanes(1), lanes(4), lanes(legal), size)
    message = f"{kind} of {size} bytes at offset {wrong} by lane 4 of wave 1 is outside .* 20 bytes"
    with pytest.raises(MemoryFault, match=message):
        getattr(scratch, kind)(
            lanes(1), lanes(4), lanes(wrong), *([values] if kind == "store" else []), size
        )


@pytest.mark.parametrize("size", SIZES)
def test_a_byte_that_was_never_written_may_not_be_read(size):
    scratch = Scratch(2, 32, 32)
    one = np.zeros((1, 1), np.uint32)
    for byte in range(5, 5 + size - 1):
        scratch.store(lanes(1), lanes(3), lanes(byte), one, 1)
    with pytest.raises(UnwrittenRead, match=f"lane 3 of wave 1 reads byte {5 + size - 1}, which"):
        scratch.load(lanes(1), lanes(3), lanes(5), size)
    scratch.store(lanes(1), lanes(3), lanes(5 + size - 1), one, 1)
    scratch.load(lanes(1), lanes(3), lanes(5), size)
    for wave, lane in ((0, 3), (1, 2)):
        with pytest.raises(UnwrittenRead):
            scratch.load(lanes(wave), lanes(lane), lanes(5), size)


def test_a_kernel_without_private_memory():
    scratch = Scratch(4, 64, 0)
    with pytest.raises(MemoryFault, match="private memory of 0 bytes"):
        scratch.load(lanes(0), lanes(0), lanes(0), 4)
    assert scratch.load(lanes(), lanes(), lanes(), 4).shape == (1, 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_accesses_agree_with_a_dictionary_of_bytes(seed):
    rng = np.random.default_rng(seed)
    scratch, model, seen = Scratch(3, 4, 24), {}, set()
    for _ in range(200):
        size, step = int(rng.choice(SIZES)), int(rng.choice([1, 2, 4, 8]))
        chosen = rng.choice(12, rng.integers(1, 7), replace=False)  # a lane accesses once
        waves, numbers = np.divmod(chosen, 4)
        offsets = rng.integers(-1 if step == 1 else 0, 26 - size, chosen.size) // step * step
        spans = [
            [(owner, byte) for byte in range(offset, offset + size)]
            for owner, offset in zip(chosen.tolist(), offsets.tolist(), strict=True)
        ]
        outside = any(not 0 <= byte < 24 for span in spans for _, byte in span)
        if rng.random() < 0.5:
            values = random_words(rng, size, chosen.size)
            if outside:
                with pytest.raises(MemoryFault):
                    scratch.store(waves, numbers, offsets, values, size)
                continue
            scratch.store(waves, numbers, offsets, values, size)
            for span, column in zip(spans, np.ascontiguousarray(values.T), strict=True):
                model.update(zip(span, column.tobytes()[:size], strict=True))
            continue
        unwritten = any(byte not in model for span in spans for byte in span)
        fault = MemoryFault if outside else UnwrittenRead if unwritten else None
        seen.add(fault)
        if fault:
            with pytest.raises(fault):
                scratch.load(waves, numbers, offsets, size)
            continue
        values = np.ascontiguousarray(scratch.load(waves, numbers, offsets, size).T)
        for span, column in zip(spans, values, strict=True):
            assert column.tobytes()[:size] == bytes(model[byte] for byte in span)
            assert not any(column.tobytes()[size:])
    assert seen == {None, MemoryFault, UnwrittenRead}
