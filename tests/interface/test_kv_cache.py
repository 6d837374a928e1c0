"""The KV cache: where things lie, what is written and what is left alone, moving blocks."""

from __future__ import annotations

import itertools
import math
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import Attention, AttentionBatch, attention, bind_kv_caches
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend, ReferenceMLAImpl
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.impl import get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv, write_kv_cache, write_mla_cache
from attn_dispatch.interface.kv_blocks import copy_blocks, swap_blocks
from attn_dispatch.interface.kv_cache import (
    STRIDE_ORDERS,
    allocate_kv_cache,
    kv_cache_shape,
    split_token_scales,
    view_kv_cache,
)
from attn_dispatch.interface.quantization import (
    kv_cache_dtype_name,
    kv_cache_torch_dtype,
    quantize_rows,
    stored_head_size,
)
from attn_dispatch.interface.spec import KV_CACHE_DTYPES, MLADims
from attn_dispatch.selection.registry import registry
from support.cases import (
    FP8,
    INT8,
    dequantized,
    encoded_parts,
    int8_rows,
    nan_cache,
    stored_size,
)

ONE = torch.ones(())
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.int8]
SHARED = [
    name
    for name, candidate in registry.candidates().items()
    if candidate.backend_cls is not None and not name.endswith("MLA")
]


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def random_cache(num_blocks, layout="NHD", dtype=torch.float32, seed=0):
    """(num_blocks, 2, 4, 2, 8), or 32 for the last if it is int8, every byte random."""
    shape = (num_blocks, 2, 4, 2, 32 if dtype == torch.int8 else 8)
    cache = allocate_kv_cache(shape, STRIDE_ORDERS[layout], dtype)
    random = torch.randint(0, 255, as_bytes(cache).shape, generator=torch.manual_seed(seed))
    cache.view(torch.uint8)[:] = random.to(torch.uint8).view(cache.view(torch.uint8).shape)
    return cache


def blocks_of(cache):
    """Each block's bytes."""
    return [bytes(as_bytes(block).flatten().tolist()) for block in cache]


@pytest.mark.parametrize("backend", SHARED)
def test_every_backend_shares_one_logical_shape(backend):
    cls = registry.candidates()[backend].backend_cls
    assert cls.get_kv_cache_shape(7, 16, 2, 64) == (7, 2, 16, 2, 64)
    assert cls.get_kv_cache_stride_order() in STRIDE_ORDERS.values()


def test_latents_have_a_shape_of_their_own():
    assert ReferenceMLABackend.get_kv_cache_shape(7, 16, 1, 576) == (7, 16, 576)
    assert ReferenceMLABackend.get_kv_cache_stride_order() == (0, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", STRIDE_ORDERS)
def test_a_block_is_contiguous_and_zero(layout, dtype):
    shape = (3, 2, 4, 5, 6)
    cache = allocate_kv_cache(shape, STRIDE_ORDERS[layout], dtype)
    assert cache.shape == shape
    assert cache.dtype == dtype
    assert not as_bytes(cache).any()
    assert cache.stride(0) == 2 * 4 * 5 * 6
    last = sum(
        stride * (size - 1) for stride, size in zip(cache.stride()[1:], shape[1:], strict=False)
    )
    assert last == cache.stride(0) - 1


def test_the_layouts_differ_in_the_order_of_tokens_and_heads():
    nhd, hnd = (
        allocate_kv_cache((1, 2, 4, 5, 6), o, torch.float32) for o in STRIDE_ORDERS.values()
    )
    assert (nhd.stride(2), nhd.stride(3)) == (5 * 6, 6)
    assert (hnd.stride(2), hnd.stride(3)) == (6, 4 * 6)


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_every_kv_cache_dtype_is_a_torch_dtype(name):
    dtype = kv_cache_torch_dtype(name, torch.bfloat16)
    assert dtype.is_floating_point or (name, dtype) == (INT8, torch.int8)


def test_fp8_is_what_the_device_has():
    assert kv_cache_torch_dtype("fp8", torch.bfloat16, "gfx942") == torch.float8_e4m3fnuz
    assert kv_cache_torch_dtype("fp8", torch.bfloat16, "gfx950") == torch.float8_e4m3fn
    with pytest.raises(InvalidInputError, match="names no floating-point type"):
        kv_cache_torch_dtype("int4", torch.bfloat16)


def put(place, row, scale):
    """Write (heads, size) values into (heads, stored size) of a cache."""
    for part, content in encoded_parts(row, scale, place.dtype):
        place.view(content.dtype)[:, part] = content


@given(
    slots=st.lists(st.integers(0, 6 * 4 - 1), max_size=12, unique=True),
    skipped=st.integers(0, 3),
    layout=st.sampled_from(list(STRIDE_ORDERS)),
    kv_cache_dtype=st.sampled_from(["auto", "bfloat16", *FP8, INT8]),
    sizes=st.sampled_from([(8, 8), (8, 3), (3, 8)]),
    per_head=st.booleans(),
)
def test_writing_changes_only_the_given_slots(
    slots, skipped, layout, kv_cache_dtype, sizes, per_head
):
    cache = random_cache(6, layout, kv_cache_torch_dtype(kv_cache_dtype, torch.float32))
    slots = [*slots, *[-1] * skipped]
    scales = [torch.tensor([0.02, 0.5]) if per_head else torch.tensor(s) for s in (0.1, 3.0)]
    new = [torch.randn(len(slots), 2, size) for size in sizes]
    wanted = cache.clone()
    for row, slot in enumerate(slots):
        for index in (0, 1):
            if slot >= 0:
                place = wanted[slot // 4, index, slot % 4]
                put(place, new[index][row], scales[index])
    write_kv_cache(*new, cache, torch.tensor(slots, dtype=torch.int64), *scales)
    assert torch.equal(as_bytes(cache), as_bytes(wanted))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", *FP8, INT8])
@pytest.mark.parametrize("layout", STRIDE_ORDERS)
def test_written_rows_are_read_back(layout, kv_cache_dtype):
    dtype = kv_cache_torch_dtype(kv_cache_dtype, torch.float32)
    cache = nan_cache((5, 2, 4, 2, stored_size(kv_cache_dtype, 8)), layout, dtype)
    key, value = torch.randn(6, 2, 8), torch.randn(6, 2, 5)
    table = torch.tensor([3, 1, 99])
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    k_scale, v_scale = torch.tensor([0.1, 0.2]), torch.tensor(0.05)
    write_kv_cache(key, value, cache, slots, k_scale, v_scale)
    keys, values = view_kv_cache(cache, 8, 5)
    layer = SimpleNamespace(_k_scale=k_scale, _v_scale=v_scale)
    scales = get_kv_scales(layer, cache)
    read = gather_kv(keys, table, 6, scales[0], torch.float64)
    torch.testing.assert_close(read, dequantized(key, k_scale, dtype))
    read = gather_kv(values, table, 6, scales[1], torch.float64)
    torch.testing.assert_close(read, dequantized(value, v_scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_may_be_a_slice_of_a_shared_tensor(dtype):
    """Engines that move blocks of all layers at once lay the layers side by side in a block."""
    size = 32 if dtype == torch.int8 else 8
    everything = allocate_kv_cache((5, 3, 2, 4, 2, size), range(6), dtype)
    cache, (key, value) = everything[:, 1], torch.randn(2, 3, 2, 8)
    write_kv_cache(key, value, cache, torch.tensor([12, 13, 7]), ONE, ONE)
    keys, _ = view_kv_cache(cache, 8, 8)
    scale, _ = get_kv_scales(SimpleNamespace(_k_scale=ONE, _v_scale=ONE), cache)
    read = gather_kv(keys, torch.tensor([3]), 2, scale, torch.float64)
    torch.testing.assert_close(read, dequantized(key[:2], ONE, dtype))
    assert not as_bytes(everything[:, 0]).any()
    assert not as_bytes(everything[:, 2]).any()


def test_an_fp8_cache_clamps_to_its_largest_value():
    cache = nan_cache((1, 2, 4, 1, 1), "NHD", torch.float8_e4m3fn)
    huge = torch.tensor([1e6, -torch.inf, 448.0]).view(3, 1, 1)
    write_kv_cache(huge, huge, cache, torch.arange(3), ONE, ONE)
    assert cache[0, 0, :3, 0, 0].float().tolist() == [448.0, -448.0, 448.0]


# int8, with a scale for each token and head.


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("size", [1, 16, 17, 64, 80, 576])
def test_only_int8_heads_take_more_than_their_elements(name, size):
    assert stored_head_size(name, size) == stored_size(name, size)
    assert stored_head_size(INT8, size) % 16 == 0
    shape = kv_cache_shape(7, 16, 2, stored_head_size(name, size))
    assert allocate_kv_cache(shape, STRIDE_ORDERS["HND"], torch.int8).shape == shape


def int8_cache(size, num_blocks=3, heads=2, layout="NHD"):
    return nan_cache((num_blocks, 2, 4, heads, stored_size(INT8, size)), layout, torch.int8)


def read_all(cache, count, sizes, dtype=torch.float64):
    """The first `count` keys and values of an int8 cache."""
    views, table = view_kv_cache(cache, *sizes), torch.arange(len(cache))
    return [
        gather_kv(view, table, count, scale, dtype)
        for view, scale in zip(views, split_token_scales(cache), strict=True)
    ]


@pytest.mark.parametrize("layout", STRIDE_ORDERS)
@pytest.mark.parametrize("sizes", [(8, 8), (16, 5), (7, 33), (1, 1)], ids=str)
def test_an_int8_row_has_the_documented_layout(layout, sizes):
    """Integers first, float32 at the next multiple of 16 bytes, and nothing else is written."""
    cache = int8_cache(max(sizes), layout=layout)
    new = [torch.randn(3, 2, size) for size in sizes]
    write_kv_cache(*new, cache, torch.tensor([0, 5, -1]), ONE, ONE)
    start = 16 * -(-max(sizes) // 16)
    for index, (size, values) in enumerate(zip(sizes, new, strict=True)):
        for row, (block, offset) in enumerate([(0, 0), (1, 1)]):
            for head in range(2):
                stored = cache[block, index, offset, head].tolist()
                scale = values[row, head].abs().max() / 127
                assert stored[:size] == (values[row, head] / scale).round().tolist()
                assert stored[size:start] == [-1] * (start - size)
                assert bytes(b % 256 for b in stored[start : start + 4]) == struct.pack("f", scale)
                assert stored[start + 4 :] == [-1] * 12
    assert int((cache != -1).any(-1).sum()) == 2 * 2 * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(
    exponent=st.integers(-30, 12),
    sizes=st.sampled_from([(8, 8), (64, 5), (1, 17)]),
    layout=st.sampled_from(list(STRIDE_ORDERS)),
)
def test_the_round_trip_error_is_at_most_half_a_scale(dtype, exponent, sizes, layout):
    cache = int8_cache(max(sizes), num_blocks=2, layout=layout)
    new = [(torch.randn(6, 2, size) * 2.0**exponent).to(dtype) for size in sizes]
    write_kv_cache(*new, cache, torch.arange(6), ONE, ONE)
    for values, read in zip(new, read_all(cache, 6, sizes), strict=True):
        wanted = values.float().double()
        amax = wanted.abs().amax(-1, keepdim=True)
        assert bool(((read - wanted).abs() <= amax / 127 * (0.5 + 1e-4)).all())
        largest = wanted.abs() == amax
        torch.testing.assert_close(read[largest], wanted[largest], rtol=1e-6, atol=0)


def test_an_outlier_stays_in_its_head_and_token():
    tame = torch.randn(5, 2, 64)
    wild = tame.clone()
    wild[2, 1, 7] = 1e6
    caches = [int8_cache(64) for _ in range(2)]
    for cache, values in zip(caches, (tame, wild), strict=True):
        write_kv_cache(values, values, cache, torch.arange(5), ONE, ONE)
    others = torch.ones(5, 2, dtype=torch.bool)
    others[2, 1] = False
    for with_it, without in zip(*(read_all(c, 5, (64, 64)) for c in reversed(caches)), strict=True):
        assert torch.equal(with_it[others], without[others])
        assert float(with_it[2, 1, 7]) == pytest.approx(1e6)
        assert not with_it[2, 1, :7].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_value_stays_in_its_row(dtype, poison):
    cache, new = int8_cache(8), torch.randn(5, 2, 8).to(dtype)
    new[2, 1, 7] = poison
    write_kv_cache(new, new, cache, torch.arange(5), ONE, ONE)
    for read, scales in zip(read_all(cache, 5, (8, 8)), split_token_scales(cache), strict=True):
        assert bool(read[2, 1].isnan().all())
        assert not read[2, 0].isnan().any()
        assert int(read.isnan().sum()) == 8
        assert bool(scales[0, 2, 1].isnan()) == math.isnan(poison)
        assert not scales[0, 2, 1].isfinite()
    assert not cache[0, :, 2, 1, :8].any()


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_non_finite_value_reaches_the_output(backend, poison):
    key, value = torch.randn(2, 3, 2, 8)
    value[1, 0, 3] = poison
    cache, table = int8_cache(8), torch.tensor([[1]])
    output = attention(
        torch.randn(3, 4, 8), key, value, kv_cache=cache, block_table=table, backend=backend
    )
    assert bool(output[2, :2].isnan().all())
    assert not output[:, 2:].isnan().any()


def test_a_float64_beyond_float32_is_not_finite():
    integers, scale = quantize_rows(torch.tensor([1e300, 1.0], dtype=torch.float64))
    assert (integers.tolist(), scale.item()) == ([0, 0], torch.inf)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-36])
def test_a_row_of_tiny_values_has_a_normal_scale(largest):
    integers, scale = quantize_rows(torch.tensor([[largest, 0.0, -largest]]))
    assert scale.item() >= torch.finfo(torch.float32).tiny
    assert (scale.item() == 1.0) == (largest == 0.0)
    read = integers.double() * scale.double()
    assert float((read - torch.tensor([largest, 0.0, -largest]).double()).abs().max()) <= 1e-38


def test_halves_go_to_the_even_integer():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    integers, scale = quantize_rows(values)
    assert scale.item() == 1.0
    assert integers.tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_an_unwritten_int8_cache_reads_as_zero():
    cache = allocate_kv_cache((2, 2, 4, 2, 32), STRIDE_ORDERS["NHD"], torch.int8)
    assert not any(read.any() for read in read_all(cache, 8, (8, 8)))


@pytest.mark.parametrize("scale", [ONE, torch.ones(2), torch.ones(3, 4, 1)], ids=["()", "2", "3-d"])
def test_int8_is_not_read_under_another_scale(scale):
    keys, _ = view_kv_cache(int8_cache(8), 8, 8)
    with pytest.raises(InvalidInputError, match=r"Take the scales of kv_cache.get_kv_scales\."):
        gather_kv(keys, torch.tensor([0]), 2, scale, torch.float32)


@pytest.mark.parametrize("layouts", list(itertools.product(STRIDE_ORDERS, STRIDE_ORDERS)), ids=str)
def test_moving_a_block_moves_its_scales(layouts):
    (src, dst), new = (int8_cache(8, layout=layout) for layout in layouts), torch.randn(2, 4, 2, 8)
    write_kv_cache(*new, src, torch.arange(4, 8), ONE, ONE)
    copy_blocks([src], torch.tensor([[1, 0]]))
    swap_blocks(src, dst, torch.tensor([[0, 2]]))
    expected = [integers.double() * scales for integers, scales in map(int8_rows, new)]
    for cache, block in ((src, 0), (src, 1), (dst, 2)):
        for read, wanted in zip(read_all(cache[block:], 4, (8, 8)), expected, strict=True):
            assert torch.equal(read, wanted)


def test_latents_are_never_int8():
    cache = torch.zeros(3, 4, 32, dtype=torch.int8)
    with pytest.raises(InvalidInputError, match="latents cannot be int8"):
        write_mla_cache(torch.randn(1, 4), torch.randn(1, 2), cache, torch.tensor([2]), ONE)
    assert not cache.any()
    arguments = {
        "mla": MLADims(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)
    }
    with pytest.raises(
        UnsupportedError, match="REFERENCE_MLA does not support kv_cache_dtype='int8"
    ):
        ReferenceMLAImpl(
            1, 6, 1.0, 1, kv_cache_dtype=INT8, kv_b_proj=torch.zeros(4, 4), **arguments
        )


# Latents.


def test_latents_are_written_side_by_side():
    cache = torch.full((3, 4, 6), torch.nan)
    latents, rotated = torch.randn(3, 4), torch.randn(3, 2)
    write_mla_cache(latents, rotated, cache, torch.tensor([9, -1, 2]), ONE)
    assert torch.equal(cache[2, 1], torch.cat([latents[0], rotated[0]]))
    assert torch.equal(cache[0, 2], torch.cat([latents[2], rotated[2]]))
    assert int((~cache.isnan()).sum()) == 12


PAIRS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6, unique_by=lambda pair: pair[1]
)


@given(pairs=PAIRS, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(list(STRIDE_ORDERS)))
def test_copying_reads_every_source_before_it_writes(pairs, dtype, layout):
    caches = [random_cache(6, layout, dtype, seed) for seed in (0, 1)]
    before = [blocks_of(cache) for cache in caches]
    copy_blocks(caches, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))
    source = {destination: source for source, destination in pairs}
    for cache, old in zip(caches, before, strict=True):
        assert blocks_of(cache) == [old[source.get(block, block)] for block in range(6)]


@given(
    pairs=PAIRS,
    dtype=st.sampled_from(DTYPES),
    layouts=st.sampled_from(list(itertools.product(STRIDE_ORDERS, STRIDE_ORDERS))),
)
def test_swapping_takes_blocks_to_a_cache_of_another_size_and_layout(pairs, dtype, layouts):
    src, dst = random_cache(6, layouts[0], dtype, 0), random_cache(9, layouts[1], dtype, 1)
    before, old = blocks_of(src), blocks_of(dst)
    swap_blocks(src, dst, torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2))
    source = {destination: source for source, destination in pairs}
    assert blocks_of(src) == before
    wanted = [before[source[b]] if b in source else old[b] for b in range(9)]
    assert blocks_of(dst) == wanted


def test_blocks_go_to_the_host_and_back(device):
    cache = random_cache(6).to(device)
    host = torch.zeros_like(cache[:2], device="cpu")
    swap_blocks(cache, host, torch.tensor([[5, 0], [3, 1]]))
    kept = blocks_of(cache.cpu())
    cache[3] = cache[5] = 0
    swap_blocks(host, cache, torch.tensor([[0, 5], [1, 3]]))
    assert blocks_of(cache.cpu()) == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_latents_move_too(dtype):
    cache = allocate_kv_cache((3, 4, 6), (0, 1, 2), dtype)
    cache.view(torch.uint8)[:] = torch.arange(3, dtype=torch.uint8)[:, None, None]
    ReferenceMLABackend.copy_blocks([cache], torch.tensor([[2, 0]]))
    other = torch.zeros_like(cache)
    ReferenceMLABackend.swap_blocks(cache, other, torch.tensor([[0, 1]]))
    assert other.view(torch.uint8)[:, 0, 0].tolist() == [0, 2, 0]


BAD_PAIRS = {
    "no pairs": (torch.tensor([0, 1]), r"shape \(2,\)"),
    "triples": (torch.zeros(1, 3).long(), r"\(num_pairs, 2\)"),
    "floats": (torch.tensor([[0.0, 1.0]]), "torch.float32"),
    "source beyond": (torch.tensor([[4, 1]]), "A source block is out of range.*4 to 4.*has 4"),
    "source below": (torch.tensor([[-1, 1]]), "A source block is out of range"),
    "destination beyond": (torch.tensor([[0, 1], [1, 4]]), "A destination block is out of range"),
    "destination twice": (torch.tensor([[0, 2], [1, 2]]), "A destination block is named twice"),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pairs_are_rejected_before_any_cache_is_written(what):
    pairs, message = BAD_PAIRS[what]
    larger, smaller = random_cache(6), random_cache(4)
    before = [blocks_of(cache) for cache in (larger, smaller)]
    with pytest.raises(InvalidInputError, match=message):
        copy_blocks([larger, smaller], pairs)
    with pytest.raises(InvalidInputError, match=message):
        swap_blocks(smaller, smaller, pairs)
    assert [blocks_of(cache) for cache in (larger, smaller)] == before


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"size": 16}], ids=["dtype", "size"])
def test_blocks_of_another_kind_are_rejected(other):
    src = random_cache(4)
    shape = (4, 2, 4, 2, other.get("size", 8))
    dst = torch.zeros(shape, dtype=other.get("dtype", torch.float32))
    with pytest.raises(InvalidInputError, match="do not fit into a cache"):
        swap_blocks(src, dst, torch.tensor([[0, 0]]))


# The scales of an fp8 cache, as a layer keeps them.


def fp8_layer(kv_scales="per_tensor", **more):
    return Attention(
        4, 8, num_kv_heads=2, kv_cache_dtype="fp8_e4m3", kv_scales=kv_scales, dtype=torch.float32,
        block_size=4, device="cpu", **more,
    )  # fmt: skip


def run_prompt(layer, key, value, cache, padding=0):
    """One prompt of which the layer is to derive its scales; the output of its tokens."""
    tokens = len(key) - padding
    table = torch.arange(len(cache))[None]
    slots = torch.cat([torch.arange(tokens), torch.full((padding,), -1)])
    batch = AttentionBatch.create(
        [tokens], [tokens], block_table=table, slot_mapping=slots, enable_kv_scales_calculation=True
    )
    query = torch.ones(len(key), 4, 8)
    metadata = layer.build_metadata(batch)
    return layer(query, key, value, kv_cache=cache, attn_metadata=metadata)[:tokens]


def fp8_cache():
    return nan_cache((2, 2, 4, 2, 8), "NHD", torch.float8_e4m3fn)


@pytest.mark.parametrize("kv_scales", ["per_tensor", "per_head"])
def test_derived_scales_fit_the_largest_value(kv_scales):
    layer, (key, value) = fp8_layer(kv_scales), 5 * torch.randn(2, 6, 2, 8)
    output = run_prompt(layer, key, value, fp8_cache())
    dims = (0, 2) if kv_scales == "per_head" else (0, 1, 2)
    scales = [tensor.abs().amax(dims) / 448 for tensor in (key, value)]
    torch.testing.assert_close(layer._k_scale, scales[0])
    torch.testing.assert_close(layer._v_scale, scales[1])
    stored = [
        dequantized(t, s, torch.float8_e4m3fn).float()
        for t, s in zip((key, value), scales, strict=False)
    ]
    plain = attention(torch.ones(6, 4, 8), *stored, backend="REFERENCE")
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)


def test_scales_are_derived_once():
    """What is in the cache was stored under them."""
    layer, (key, value) = fp8_layer(), torch.randn(2, 6, 2, 8)
    run_prompt(layer, key, value, fp8_cache())
    first = layer._k_scale.clone()
    run_prompt(layer, 100 * key, value, fp8_cache())
    assert torch.equal(layer._k_scale, first)


def test_set_scales_are_not_derived():
    layer, (key, value) = fp8_layer(), torch.randn(2, 6, 2, 8)
    layer.set_kv_scales(0.5, 0.25)
    run_prompt(layer, key, value, fp8_cache())
    assert (layer._k_scale_float, layer._v_scale_float) == (0.5, 0.25)


def test_padding_does_not_change_the_scales():
    layer, (key, value) = fp8_layer(), torch.randn(2, 6, 2, 8)
    key[4:], value[4:] = torch.nan, 1e9
    run_prompt(layer, key, value, fp8_cache(), padding=2)
    torch.testing.assert_close(layer._k_scale, key[:4].abs().max() / 448)


def test_scales_are_derived_after_a_failed_call():
    layer, (key, value) = fp8_layer(), torch.randn(2, 6, 2, 8)
    with pytest.raises(InvalidInputError, match="kv_cache has shape"):
        run_prompt(layer, 100 * key, value, fp8_cache()[..., :4])
    run_prompt(layer, key, value, fp8_cache())
    torch.testing.assert_close(layer._k_scale, key.abs().max() / 448)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", INT8])
def test_only_fp8_layers_derive_scales(kv_cache_dtype):
    layer = Attention(4, 8, num_kv_heads=2, kv_cache_dtype=kv_cache_dtype, device="cpu")
    shape = (2, 2, 16, 2, stored_size(kv_cache_dtype, 8))
    cache = torch.zeros(shape, dtype=kv_cache_torch_dtype(kv_cache_dtype, torch.float32))
    run_prompt(layer, *(100 * torch.randn(2, 6, 2, 8)), cache)
    assert layer._k_scale_float == layer._v_scale_float == 1.0


def test_a_sharing_layer_uses_the_scales_of_the_cache():
    writer = fp8_layer(prefix="a")
    reader = fp8_layer(prefix="b", kv_sharing_target_layer_name="a")
    bind_kv_caches({"a": writer, "b": reader}, {"a": fp8_cache()})
    key, value = torch.randn(2, 6, 2, 8)
    wrote = run_prompt(writer, key, value, writer.kv_cache)
    assert torch.equal(run_prompt(reader, 50 * key, value, reader.kv_cache), wrote)
    reader.set_kv_scales(0.5, 0.25)
    assert writer._k_scale_float == 0.5


def test_a_sharing_layer_without_its_target_derives_no_scales():
    reader, (key, value) = fp8_layer(kv_sharing_target_layer_name="a"), torch.randn(2, 6, 2, 8)
    with pytest.raises(InvalidInputError, match=r"does not have its scales. Bind the caches"):
        run_prompt(reader, key, value, fp8_cache())


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((0.0, 1.0), "k_scale is 0.0; scales are finite and above 0"),
        ((1.0, float("nan")), "v_scale is nan"),
        ((1.0, -1.0), "v_scale is -1.0"),
        ((torch.ones(2), 1.0), r"k_scale has shape \(2,\); it must be \(\)"),
    ],
)
def test_invalid_scales_are_rejected(scales, message):
    layer = fp8_layer()
    with pytest.raises(InvalidInputError, match=message):
        layer.set_kv_scales(*scales)
    assert layer._k_scale_float == layer._v_scale_float == 1.0


def test_scales_are_copied():
    """The tensor and the float say the same, whatever becomes of what was given."""
    layer, given = fp8_layer(), torch.tensor(0.5)
    layer.set_kv_scales(given, 1.0)
    given.fill_(7.0)
    assert float(layer._k_scale) == layer._k_scale_float == 0.5


def test_scales_per_head_have_no_float():
    layer = fp8_layer("per_head")
    layer.set_kv_scales(torch.tensor([0.5, 1.0]), torch.tensor([2.0, 1.0]))
    assert layer._k_scale.tolist() == [0.5, 1.0]
    assert layer._k_scale_float != layer._k_scale_float
    with pytest.raises(InvalidInputError, match=r"it must be \(2,\)"):
        layer.set_kv_scales(1.0, 1.0)


@pytest.mark.parametrize("name", ["float16", "float32", "fp8_e4m3", "fp8_e5m2", "fp8_e5m2fnuz"])
def test_a_cache_of_plain_numbers_has_a_name(name):
    stored = kv_cache_torch_dtype(name, torch.bfloat16)
    assert kv_cache_dtype_name(stored, torch.bfloat16) == name
    assert kv_cache_dtype_name(stored, stored) == "auto"


def test_a_cache_of_integers_has_none():
    """int8 would need the scales that its rows have here."""
    assert kv_cache_dtype_name(torch.int8, torch.bfloat16) is None
    assert kv_cache_dtype_name(torch.uint8, torch.bfloat16) is None
