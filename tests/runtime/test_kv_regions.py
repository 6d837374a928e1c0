"""KVCachePlan.regions: which bytes of a cache belong to a block's keys, values and scales."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from attn_dispatch import KVCachePlan, plan_kv_cache, write_kv_cache
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_access import write_mla_cache
from attn_dispatch.interface.kv_cache import split_token_scales, view_kv_cache
from attn_dispatch.interface.quantization import as_indexable_bytes
from support.cases import INT8
from support.selection import layer, mla_layer

NUM_BLOCKS = 5

#: The orders of the two layouts, and others: K before all blocks, tokens before K and V, elements
#: before heads.
ORDERS = {
    "NHD": (0, 1, 2, 3, 4),
    "HND": (0, 1, 3, 2, 4),
    "K first": (1, 0, 2, 3, 4),
    "K in tokens": (0, 2, 1, 3, 4),
    "K in heads": (0, 2, 3, 1, 4),
    "tokens first": (2, 0, 3, 1, 4),
    "elements before heads": (0, 1, 2, 4, 3),
    "all reversed": (4, 3, 2, 1, 0),
}
SIZES = [(64, 64), (24, 40), (40, 24)]
CACHES = {
    f"{name} {dtype} {sizes[0]}-{sizes[1]}": (order, dtype, sizes)
    for (name, order), dtype, sizes in itertools.product(
        ORDERS.items(), ("float16", "fp8", INT8), SIZES
    )
    if dtype != INT8 or order[-1] == 4  # a float32 scale is four bytes in a row
}


def make_plan(order, dtype="auto", sizes=(64, 64), heads=2, block_size=4) -> KVCachePlan:
    spec = layer(
        num_kv_heads=heads,
        head_size=sizes[0],
        head_size_v=sizes[1],
        kv_cache_dtype=dtype,
        block_size=block_size,
    )
    plan = plan_kv_cache({"a": spec}, "cpu")
    return dataclasses.replace(plan, stride_orders={"a": order})


def memory_of(cache: torch.Tensor) -> torch.Tensor:
    """The bytes of a cache, in the order of memory."""
    memory = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    assert len(memory) == cache.numel() * cache.element_size()
    assert cache.data_ptr() == memory.data_ptr()
    return memory


def content_of(cache: torch.Tensor, region, block: int) -> torch.Tensor:
    """The bytes of a region in a block, piece by piece."""
    memory = memory_of(cache)
    pieces = [memory[offset : offset + size] for offset, size in region.ranges(block)]
    assert all(len(piece) == region.size for piece in pieces)
    return torch.cat(pieces)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, in the order in which it lies in memory."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    return tensor.permute(order).contiguous().flatten().view(torch.uint8)


def write(cache: torch.Tensor, sizes: tuple[int, int]) -> None:
    """Fill every slot."""
    _, _, block_size, heads, _ = cache.shape
    num_slots = len(cache) * block_size
    torch.manual_seed(1)
    key = torch.randn(num_slots, heads, sizes[0])
    value = torch.randn(num_slots, heads, sizes[1])
    write_kv_cache(key, value, cache, torch.randperm(num_slots), 0.5, 0.25)


@pytest.mark.parametrize("what", CACHES)
def test_regions_hold_what_was_written(what):
    order, dtype, sizes = CACHES[what]
    plan = make_plan(order, dtype, sizes)
    cache = plan.allocate(NUM_BLOCKS)["a"]
    write(cache, sizes)
    stored = dict(zip(("key", "value"), view_kv_cache(cache, *sizes), strict=True))
    if dtype == INT8:
        scales = split_token_scales(cache)
        stored |= dict(zip(("key_scale", "value_scale"), scales, strict=True))
    found = {r.content: r for r in plan.regions(NUM_BLOCKS) if r.content != "padding"}
    assert found.keys() == stored.keys()
    for content, region in found.items():
        for block in range(NUM_BLOCKS):
            expected = bytes_of(as_indexable_bytes(stored[content][block]))
            assert expected.any()
            assert torch.equal(content_of(cache, region, block), expected), content


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("what", CACHES)
def test_regions_of_a_block_are_the_block_and_no_byte_is_in_two(what, split):
    """Each byte gets the number of the region that has it, and must have had none before."""
    order, dtype, sizes = CACHES[what]
    plan = make_plan(order, dtype, sizes)
    cache = plan.allocate(NUM_BLOCKS)["a"]
    owner = torch.full((cache.numel() * cache.element_size(),), -1)
    for region in plan.regions(NUM_BLOCKS, split=split):
        for block in range(NUM_BLOCKS):
            ranges = region.ranges(block)
            assert ranges == sorted(ranges)
            assert sum(size for _, size in ranges) == region.bytes_per_block
            for offset, size in ranges:
                assert size > 0
                assert (owner[offset : offset + size] == -1).all()
                owner[offset : offset + size] = block
    blocks = torch.arange(NUM_BLOCKS, dtype=torch.uint8)
    memory_of(cache).copy_(owner.to(torch.uint8))
    cache_bytes = memory_of(cache).as_strided(
        (*cache.shape, cache.element_size()),
        (*(stride * cache.element_size() for stride in cache.stride()), 1),
    )
    assert torch.equal(cache_bytes, blocks.view(-1, 1, 1, 1, 1, 1).expand_as(cache_bytes))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_in_our_layouts_keys_and_values_are_one_piece_each(layout, block_size, heads):
    plan = make_plan(ORDERS[layout], "float16", heads=heads, block_size=block_size)
    half = plan.bytes_per_block // 2
    regions = plan.regions(NUM_BLOCKS)
    assert [(r.content, r.ranges(3)) for r in regions] == [
        ("key", [(6 * half, half)]),
        ("value", [(7 * half, half)]),
    ]


@pytest.mark.parametrize("dtype", ["float16", "fp8", INT8])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_in_our_layouts_a_whole_block_is_one_piece(layout, dtype):
    plan = make_plan(ORDERS[layout], dtype, (40, 24))
    (region,) = plan.regions(NUM_BLOCKS, split=False)
    size = plan.bytes_per_block
    assert (region.content, region.ranges(2)) == ("block", [(2 * size, size)])


@pytest.mark.parametrize("what", CACHES)
def test_copying_the_regions_of_a_block_copies_it_and_nothing_else(what):
    order, dtype, sizes = CACHES[what]
    plan = make_plan(order, dtype, sizes)
    source, target, expected = (plan.allocate(blocks)["a"] for blocks in (NUM_BLOCKS, 3, 3))
    write(source, sizes)
    for cache in (target, expected):
        memory_of(cache).fill_(77)
    as_indexable_bytes(expected)[1] = as_indexable_bytes(source)[4]
    memory, source_memory = memory_of(target), memory_of(source)
    for region, copy in zip(plan.regions(NUM_BLOCKS), plan.regions(3), strict=True):
        for (first, size), (to, to_size) in zip(region.ranges(4), copy.ranges(1), strict=True):
            assert size == to_size
            memory[to : to + size] = source_memory[first : first + size]
    assert torch.equal(memory, memory_of(expected))


def test_regions_of_latents():
    plan = plan_kv_cache({"mla": mla_layer()}, "cpu")
    (region,) = plan.regions(NUM_BLOCKS)
    size = 16 * 576 * 2
    assert (region.layer, region.content, region.ranges(1)) == ("mla", "latent", [(size, size)])
    cache = plan.allocate(NUM_BLOCKS)["mla"]
    latents = torch.randn(16, 512)
    write_mla_cache(latents, torch.randn(16, 64), cache, torch.arange(16, 32))
    assert torch.equal(content_of(cache, region, 1), bytes_of(cache[1]))
    assert not content_of(cache, region, 0).any()


def test_a_shared_cache_is_listed_once_under_the_layer_that_writes_it():
    specs = {"a": layer(), "b": layer(kv_sharing=True), "c": layer(kv_cache_dtype="fp8")}
    plan = plan_kv_cache(specs, "cpu", shared={"b": "a"})
    regions = plan.regions(NUM_BLOCKS)
    assert [(r.layer, r.content) for r in regions] == [
        ("a", "key"),
        ("a", "value"),
        ("c", "key"),
        ("c", "value"),
    ]
    assert sum(r.bytes_per_block for r in regions) == plan.bytes_per_block
    cache = plan.allocate(NUM_BLOCKS)[next(iter(plan.shared))]
    write(cache, (64, 64))
    assert torch.equal(content_of(cache, regions[0], 2), bytes_of(cache[2, 0]))


def test_layers_without_a_cache_have_no_regions():
    plan = plan_kv_cache({"e": layer(attn_type="encoder_only", block_size=None)}, "cpu")
    assert plan.regions(NUM_BLOCKS) == []


def test_a_region_is_frozen_and_its_strides_give_its_ranges():
    plan = make_plan(ORDERS["HND"], INT8)
    for region in plan.regions(NUM_BLOCKS):
        with pytest.raises(dataclasses.FrozenInstanceError):
            region.offset = 0
        assert math.prod(region.counts) == len(region.ranges(0))
        first, second = region.ranges(0), region.ranges(1)
        assert {b[0] - a[0] for a, b in zip(first, second, strict=True)} == {region.block_stride}


@pytest.mark.parametrize("block", [-1, NUM_BLOCKS, 1.0, True, None])
def test_a_block_that_does_not_exist_is_rejected(block):
    region = make_plan(ORDERS["NHD"]).regions(NUM_BLOCKS)[0]
    with pytest.raises(InvalidInputError, match="block="):
        region.ranges(block)


@pytest.mark.parametrize("num_blocks", [-1, 1.5, "3", None])
def test_num_blocks_is_checked(num_blocks):
    with pytest.raises(InvalidInputError, match="num_blocks="):
        make_plan(ORDERS["NHD"]).regions(num_blocks)


def test_a_cache_without_blocks_has_regions_without_ranges():
    region = make_plan(ORDERS["NHD"]).regions(0)[0]
    with pytest.raises(InvalidInputError, match="block=0"):
        region.ranges(0)
