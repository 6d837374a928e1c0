"""The interpreter of Gluon: where elements are in shared memory, accesses of memory, and types."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from triton.experimental.gluon import language as gl

from attn_dispatch.emulation import EmulationError
from attn_dispatch.emulation.gluon.global_memory import Memory
from attn_dispatch.emulation.gluon.ordering import Clock
from attn_dispatch.emulation.gluon.shared_memory import allocate
from attn_dispatch.emulation.gluon.values import Tensor, rounded

PLAIN = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


def layout_of(span, bits=16, rank=2):
    return gl.NVMMASharedLayout(swizzle_byte_width=span, element_bitwidth=bits, rank=rank)


def shared(shape, layout, dtype=gl.bfloat16):
    return allocate("a test's", dtype, shape, layout, lambda: 1)


def numbers(shape, dtype=gl.bfloat16):
    count = int(np.prod(shape))
    return Tensor(np.arange(count, dtype=np.float32).reshape(shape) % 256, dtype)


@pytest.mark.parametrize(("span", "bits"), [(128, 16), (64, 16), (32, 16), (128, 8), (128, 32)])
def test_elements_are_where_the_hardware_places_them(span, bits):
    """As addresses: bits 4 and up are those of an unswizzled block, xor its bits 7 and up."""
    dtype = {8: gl.int8, 16: gl.bfloat16, 32: gl.float32}[bits]
    columns, rows = 2 * span * 8 // bits, 16
    memory = shared([3, rows, columns], layout_of(span, bits), dtype)
    per_block = columns // 2
    turned = span // 16 - 1
    for tile, row, column in itertools.product(range(3), range(rows), range(columns)):
        block, rest = divmod(column, per_block)
        address = ((tile * 2 + block) * rows + row) * span + rest * bits // 8
        address ^= (address >> 7 & turned) << 4
        assert memory.offsets[tile, row, column] == address


def test_what_is_stored_is_loaded_under_other_shapes():
    memory = shared([2, 16, 128], layout_of(128))
    memory.index(1).store(numbers([16, 128]))
    assert (memory.index(1).load().data == numbers([16, 128]).data).all()
    assert np.isnan(memory.index(0).load().data).all()  # never written
    boxes = memory.reinterpret(gl.bfloat16, [8, 8, 64], layout_of(128))
    second_half = boxes.index(6).load().data  # of tile 1, the first rows of its second block
    assert (second_half == numbers([16, 128]).data[:8, 64:]).all()
    turned = memory.index(1).permute((1, 0)).load().data
    assert (turned == numbers([16, 128]).data.T).all()
    part = memory.index(1).slice(8, 8, dim=0).load().data
    assert (part == numbers([16, 128]).data[8:]).all()


def test_a_tile_of_three_dimensions_is_its_blocks_of_columns():
    """So one copy of (blocks of columns, rows, columns) fills a tile (rows, all columns)."""
    tile = shared([8, 128], layout_of(128))
    boxes = tile.reinterpret(gl.bfloat16, [1, 2, 8, 64], layout_of(128, rank=3))
    boxes.index(0).put(numbers([2, 8, 64]))
    expected = numbers([2, 8, 64]).data.transpose(1, 0, 2).reshape(8, 128)
    assert (tile.load().data == expected).all()


def test_shared_memory_is_checked():
    memory = shared([2, 16, 64], layout_of(128))
    with pytest.raises(EmulationError, match=r"Index 2 is outside of \[2, 16, 64\]"):
        memory.index(2)
    with pytest.raises(EmulationError, match=r"\[8, \+ 16\) is outside of"):
        memory.index(0).slice(8, 16)
    with pytest.raises(EmulationError, match="are not the 4096 bytes"):
        memory.reinterpret(gl.bfloat16, [2, 16, 32], layout_of(64))
    with pytest.raises(EmulationError, match="were stored in"):
        memory.index(0).store(numbers([16, 64], gl.float16))
    with pytest.raises(EmulationError, match="48 columns are no multiple of the 64 of a block"):
        shared([16, 48], layout_of(128))
    with pytest.raises(EmulationError, match="does not have SwizzledSharedLayout"):
        shared([16, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    with pytest.raises(EmulationError, match="no elements of"):
        shared([16, 64], PLAIN, gl.pointer_type(gl.int32))


def barrier(count=1):
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    made = allocate("the", gl.int64, [2, 1], mbarrier.MBarrierLayout(), lambda: 1).index(1)
    made.init(count)
    return made


def test_a_phase_ends_with_all_arrivals_and_all_bytes():
    made = barrier(2)
    assert made.has_ended(1)  # the phase before the first
    assert not made.has_ended(0)
    made.arrive(1, 48)
    made.complete(32)
    made.arrive()
    assert not made.has_ended(0)
    made.complete(16)
    assert made.has_ended(0)
    assert not made.has_ended(1)
    made.arrive(2)
    assert made.has_ended(1)


def test_barriers_are_checked():
    with pytest.raises(EmulationError, match=r"More bytes landed than the\[1\] expects"):
        barrier().complete(16)
    with pytest.raises(EmulationError, match=r"More than 2 arrived at the\[1\] in one phase"):
        barrier(2).arrive(3)
    with pytest.raises(EmulationError, match=r"the\[1\] was initialized twice"):
        barrier().init(1)
    made = barrier()
    made.count = 0
    with pytest.raises(EmulationError, match="before it was initialized"):
        made.arrive()


def pointers(tensor, offsets):
    memory = Memory()
    return memory, memory.pointer(tensor) + Tensor(np.asarray(offsets, np.int32), gl.int32)


def test_only_elements_of_tensors_are_accessed():
    tensor = torch.arange(8, dtype=torch.float32)
    memory, at = pointers(tensor, [0, 7, 9])
    loaded = memory.load(at, np.array([True, True, False]), 5.0)
    assert loaded.data.tolist() == [0, 7, 5]
    with pytest.raises(EmulationError, match="1 addresses are outside of all tensors"):
        memory.load(at, np.array([True] * 3), None)
    with pytest.raises(EmulationError, match="outside of all tensors"):
        memory.store(at, numbers([3], gl.float32), np.array([True] * 3), Clock(1))
    memory.store(at, numbers([3], gl.float32), np.array([True, True, False]), Clock(1))
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5, 6, 1]


def test_a_box_outside_of_a_matrix_is_zero():
    tensor = torch.arange(12, dtype=torch.float16).view(3, 4)
    memory = Memory()
    memory.add(tensor)
    box = memory.box(tensor.data_ptr(), [4, 1], [3, 4], [2, -1], [2, 3], gl.float16)
    assert box.tolist() == [[0, 8, 9], [0, 0, 0]]


def test_numbers_are_rounded_as_torch_does():
    data = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e3
    data = torch.cat([data, torch.tensor([torch.inf, -torch.inf, 1e-41, 65519.0, 3.4e38, 0.0])])
    for dtype, own in ((torch.bfloat16, gl.bfloat16), (torch.float16, gl.float16)):
        assert torch.equal(torch.from_numpy(rounded(data.numpy(), own)), data.to(dtype).float())
        assert np.isnan(rounded(np.array([np.nan], np.float32), own)).all()


def test_numbers_of_python_do_not_change_a_type():
    half = Tensor(np.float32(1.5), gl.float16)
    assert (half + 1).dtype == gl.float16
    assert (half * 0.1).data == np.float32(torch.tensor(1.5).half() * 0.1)
    assert (Tensor(np.int32(7), gl.int32) + 2**40).dtype == gl.int32
    assert (Tensor(np.int32(7), gl.int32) * Tensor(np.int64(2), gl.int64)).dtype == gl.int64
    assert int(Tensor(np.int32(-7), gl.int32) // 2) == -3  # as in C
    assert int(Tensor(np.int32(-7), gl.int32) % 2) == -1
    with pytest.raises(EmulationError, match="divided by zero"):
        Tensor(np.int32(7), gl.int32) // Tensor(np.int32(0), gl.int32)
    with pytest.raises(EmulationError, match="must be one value"):
        bool(numbers([2]) > 0)
