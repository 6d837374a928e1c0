"""Buffer instructions: descriptors, range checks, offsets."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.decode import decode
from support.emulation import execute, register
from support.memory_cases import NUM_BYTES, MemoryCase


@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
def test_range_of_a_buffer(target):
    """Lanes whose offset is beyond the range get 0 and store nothing."""
    wide = "dwordx2" if target.startswith("gfx9") else "b64"
    case = MemoryCase(target, "buffer")
    limit = NUM_BYTES // 4
    case.group.s_u32[10] = limit
    case.place(np.arange(2 * case.lanes).reshape(2, -1) * 8 + limit - 8 * case.lanes)
    case.group.v_u32[1, 0, :3] = [0x80000000, 0xFFFFFFF8, limit]
    inside = (case.group.v_u32[1] < limit) & case.exec
    outside = ~inside & case.exec
    assert inside.any()
    assert outside.any()
    before, kept = case.region.data.copy(), case.words("v", 4, 2)
    execute(case.group, f"buffer_load_{wide} v[4:5], v1, s[8:11], 0 offen")
    loaded = register(case.group, "v4", np.uint64)
    at = np.where(inside, case.group.v_u32[1], 0) // 8
    np.testing.assert_array_equal(loaded[inside], before.view(np.uint64)[at][inside])
    assert not loaded[outside].any()
    np.testing.assert_array_equal(case.words("v", 4, 2)[:, ~case.exec], kept[:, ~case.exec])
    case.group.v_u32[4:6] = 0x01010101
    execute(case.group, f"buffer_store_{wide} v[4:5], v1, s[8:11], 0 offen")
    expected = before.copy()
    expected.view(np.uint64)[at[inside]] = 0x0101010101010101
    np.testing.assert_array_equal(case.region.data, expected)


def test_each_word_of_an_access_has_its_own_range_check():
    case = MemoryCase("gfx942", "buffer", partial=False)
    case.group.s_u32[10] = 72
    case.group.v_u32[1] = 64
    words = case.region.data.view(np.uint32).copy()
    execute(case.group, "buffer_load_dwordx4 v[4:7], v1, s[8:11], 0 offen")
    for i, expected in enumerate([words[16], words[17], 0, 0]):
        assert (register(case.group, f"v{4 + i}") == expected).all()
    case.group.v_u32[4:8] = np.arange(4)[:, None, None]
    execute(case.group, "s_waitcnt vmcnt(0)", "buffer_store_dwordx4 v[4:7], v1, s[8:11], 0 offen")
    expected = words.copy()
    expected[16:18] = 0, 1
    np.testing.assert_array_equal(case.region.data.view(np.uint32), expected)
    assert len(case.group.pending) == 1


def test_range_of_an_atomic_operation():
    case = MemoryCase("gfx942", "buffer", partial=False)
    case.group.s_u32[10] = 28
    case.place(np.zeros_like(case.addresses) + 24)
    case.group.v_u32[4:6] = 1
    before = case.region.data.copy()
    execute(case.group, "buffer_atomic_add_x2 v[4:5], v1, s[8:11], 0 offen sc0")
    np.testing.assert_array_equal(case.region.data, before)
    assert not case.words("v", 4, 2).any()


@pytest.mark.parametrize(("target", "name"), [("gfx90a", "dword"), ("gfx1201", "b32")])
def test_offsets_of_a_buffer(target, name):
    zero = "0" if target.startswith("gfx9") else "null"
    for text, offset in (
        (f"off, s[8:11], {zero}", 0),
        (f"off, s[8:11], {zero} offset:64", 64),
        (f"v9, s[8:11], {zero} offen offset:64", 72),
    ):
        case = MemoryCase(target, "buffer")
        case.group.v_u32[9] = 8
        execute(case.group, f"buffer_load_{name} v4, {text}")
        word = case.region.data.view(np.uint32)[offset // 4]
        assert (register(case.group, "v4")[case.exec] == word).all(), text


def test_waves_with_different_buffers():
    case = MemoryCase("gfx942", "buffer")
    case.group.s_u32[8] += np.array([0, 64], np.uint32)
    case.group.s_u32[10] = [NUM_BYTES, 80]
    case.group.v_u32[1] = 8 * (np.arange(64) % 12)
    execute(case.group, "buffer_load_dword v4, v1, s[8:11], 0 offen")
    words, loaded = case.region.data.view(np.uint32), register(case.group, "v4")
    for wave, lane, _ in case.active():
        offset = 8 * (lane % 12)
        expected = words[offset // 4] if wave == 0 else words[16 + offset // 4]
        assert loaded[wave, lane] == (0 if wave and offset >= 80 else expected)


def test_descriptor_may_change():
    case = MemoryCase("gfx942", "buffer")
    load = decode(parse_instruction("buffer_load_dword v4, off, s[8:11], 0"), case.target)
    words = case.region.data.view(np.uint32)
    for first in (0, 4, 8):
        case.group.s_u32[8] = (case.region.address & 0xFFFFFFFF) + 4 * first
        load.execute(case.group)
        assert (register(case.group, "v4")[case.exec] == words[first]).all()


@pytest.mark.parametrize("scalar", ["s6", "16"])
def test_scalar_offset_is_not_known(scalar):
    with pytest.raises(UnknownInstruction, match="scalar offset"):
        execute(
            MemoryCase("gfx942", "buffer").group, f"buffer_load_dword v4, off, s[8:11], {scalar}"
        )


@pytest.mark.parametrize(
    ("target", "word", "bit", "message"),
    [
        ("gfx942", 9, 16, "stride or swizzle"),
        ("gfx942", 9, 31, "stride or swizzle"),
        ("gfx1201", 9, 30, "stride or swizzle"),
        ("gfx942", 11, 23, "adds the lane's number"),
        ("gfx942", 11, 30, "adds the lane's number"),
        ("gfx1100", 11, 28, "range check"),
    ],
)
def test_descriptors_that_are_not_known(target, word, bit, message):
    case = MemoryCase(target, "buffer")
    case.group.s_u32[word] ^= np.uint32(1 << bit)
    name = "dword" if target.startswith("gfx9") else "b32"
    with pytest.raises(UnknownInstruction, match=message):
        execute(case.group, f"buffer_load_{name} v4, v1, s[8:11], 0 offen")


def test_private_memory_through_a_buffer():
    """gfx90a has a descriptor of private memory; its scalar offset counts bytes of all lanes."""
    case = MemoryCase("gfx90a", "scratch")
    case.group.s_u32[0:4] = np.reshape([0, 0x5C00, 0, 0], (4, 1))
    case.group.s_u32[6] = 64 * 20
    contents = case.contents()
    execute(case.group, "buffer_load_dwordx2 v[4:5], off, s[0:3], s6 offset:12")
    execute(case.group, "buffer_store_dword v5, off, s[0:3], 0 offset:8")
    loaded, after = register(case.group, "v4", np.uint64), case.contents()
    for wave, lane, _ in case.active():
        raw = contents(wave, lane)[32:40]
        assert loaded[wave, lane] == int.from_bytes(raw, "little")
        assert after(wave, lane)[8:12] == raw[4:]
    with pytest.raises(UnknownInstruction, match="private memory"):
        execute(case.group, "buffer_atomic_add v5, off, s[0:3], 0 offset:8")


@pytest.mark.parametrize(("name", "size"), [("ubyte", 1), ("ushort", 2), ("dword", 4)])
def test_last_access_within_the_range(name, size):
    case = MemoryCase("gfx942", "buffer", partial=False)
    case.group.s_u32[10] = 64
    case.group.v_u32[1] = np.where(np.arange(64) % 2, 64 - size, 64 - size + 1)
    execute(case.group, f"buffer_load_{name} v4, v1, s[8:11], 0 offen")
    value = int.from_bytes(case.region.data[64 - size : 64].tobytes(), "little")
    expected = np.broadcast_to(np.where(np.arange(64) % 2, value, 0), (2, 64))
    np.testing.assert_array_equal(register(case.group, "v4"), expected)
