"""Caches of other engines: views of their memory, addressed as the engines address it."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    KV_LAYOUTS,
    InvalidInputError,
    KVCacheView,
    MLADims,
    kv_cache_from_flashinfer,
    kv_cache_from_sglang,
    kv_cache_from_transformers,
    kv_cache_from_transformers_5_12,
    kv_cache_from_vllm,
    kv_cache_from_vllm_0_10,
    kv_cache_from_vllm_0_24,
    kv_strides_of,
    with_kv_layout,
)
from attn_dispatch.interface import kv_layout_table, kv_layouts
from attn_dispatch.interface.kv_layout_table import kv_layout_named
from attn_dispatch.interface.kv_view import keys_and_values, parts_of
from support.cases import FP8, INT8, layer_spec

B, N, H, D, DV = 6, 4, 3, 8, 5
E4M3 = torch.float8_e4m3fn


def numbered(*shape):
    """A tensor in which each element is the number of its place."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def assert_is(kv_cache, key, value):
    """The keys and values of a cache are these elements, at these places."""
    for part, expected in zip(keys_and_values(kv_cache), (key, value), strict=True):
        assert part.data_ptr() == expected.data_ptr()
        assert torch.equal(part, expected)


# Each engine's own indexing gives the same elements.


@pytest.mark.parametrize("size_v", [D, DV])
def test_vllm_has_values_after_keys_in_a_row(size_v):
    cache = numbered(B, H, N, D + size_v)
    # vllm/v1/attention/backends/flash_attn.py of 0.33
    key, value = cache.transpose(1, 2).split([D, size_v], dim=-1)
    found = kv_cache_from_vllm(cache, D, size_v)
    assert_is(found, key, value)
    assert isinstance(found, torch.Tensor if size_v == D else KVCacheView)


#: What compute_layout_strides of vLLM 0.33 returns for 3 layers of 32 blocks of 16 tokens, with 8
#: heads of 128 in 16 bits: the strides of layers, blocks, heads and tokens, in bytes.
VLLM_STRIDES = {
    "LBHNC": (2097152, 65536, 8192, 512),
    "LBNHC": (2097152, 65536, 512, 4096),
    "LHBNC": (2097152, 8192, 262144, 512),
    "BLHNC": (65536, 196608, 8192, 512),
    "BLNHC": (65536, 196608, 512, 4096),
    "BHLNC": (8192, 196608, 24576, 512),
}


@pytest.mark.parametrize("name", VLLM_STRIDES)
def test_the_strides_are_those_that_vllm_allocates(name):
    spec = layer_spec(num_heads=8, num_kv_heads=8, head_size=128, block_size=16)
    cache = KV_LAYOUTS[f"vllm-{name}"].allocate(spec.replace(dtype=torch.bfloat16), 32, "meta")
    layer, block, head, token = VLLM_STRIDES[name]
    assert [2 * step for step in cache.stride()] == [block, 256, token, head, 2]
    assert 2 * cache.storage_offset() == layer


def test_every_layout_of_vllm_is_in_the_table():
    names = [name for name in KV_LAYOUTS if KV_LAYOUTS[name].form.name == "vllm"]
    assert {name.removeprefix("vllm-") for name in names} == set(VLLM_STRIDES)


def test_vllm_0_24_has_our_shape_or_one_row_of_both():
    cache = numbered(B, 2, N, H, D)
    assert_is(kv_cache_from_vllm_0_24(cache, D), *cache.unbind(1))
    assert kv_strides_of(kv_cache_from_vllm_0_24(cache, D)) is None
    rows = numbered(B, N, H, D + DV)
    assert_is(kv_cache_from_vllm_0_24(rows, D, DV), rows[..., :D], rows[..., D:])


def test_vllm_0_10_has_all_keys_before_all_values():
    cache = numbered(2, B, N, H, D)
    assert_is(kv_cache_from_vllm_0_10(cache, D), *cache.unbind(0))


@pytest.mark.parametrize("size_v", [D, DV])
@pytest.mark.parametrize("page_size", [1, N])
def test_sglang_has_slots(page_size, size_v):
    key, value = numbered(B * N, H, D), numbered(B * N, H, size_v)
    view = kv_cache_from_sglang(key, value, page_size)
    pages = (part.unflatten(0, (-1, page_size)) for part in (key, value))
    assert_is(view, *pages)


def test_sglang_may_have_heads_before_the_tokens_of_a_page():
    key, value = numbered(2, B, H, N, D).unbind(0)
    assert_is(kv_cache_from_sglang(key, value, N), key.transpose(1, 2), value.transpose(1, 2))


@pytest.mark.parametrize("layer", [0, 2])
def test_transformers_has_a_page_of_keys_and_one_of_values_for_each_layer(layer):
    tokens, layers = numbered(B * 3 * N, 2, H, D), 3
    found = kv_cache_from_transformers(tokens, N, layer, layers)
    # FullAttentionCacheAllocator.get_write_indices and update
    flat, stride = tokens.view(-1, H, D), 2 * N * layers
    for index, part in enumerate(keys_and_values(found)):
        for block in range(B):
            start = block * stride + (2 * layer + index) * N
            assert torch.equal(part[block], flat[start : start + N])
    assert found.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


@pytest.mark.parametrize("padding", [0, 1])
def test_old_transformers_had_two_tensors_of_tokens(padding):
    key, value = numbered(B * N + padding, H, D), numbered(B * N + padding, H, D)
    view = kv_cache_from_transformers_5_12(key, value, N)
    assert_is(view, key[: B * N].view(B, N, H, D), value[: B * N].view(B, N, H, D))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_flashinfer_has_one_tensor_or_a_tuple(kv_layout):
    sizes = (N, H) if kv_layout == "NHD" else (H, N)
    cache = numbered(B, 2, *sizes, D)

    def logical(part):
        return part if kv_layout == "NHD" else part.transpose(1, 2)

    found = kv_cache_from_flashinfer(cache, kv_layout)
    assert_is(found, *map(logical, cache.unbind(1)))
    parts = numbered(B, *sizes, D), numbered(B, *sizes, DV)
    assert_is(kv_cache_from_flashinfer(parts, kv_layout), *map(logical, parts))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_flashinfer_may_leave_out_a_page_size_of_1(kv_layout):
    cache, pair = numbered(B, 2, H, D), (numbered(B, H, D), numbered(B, H, D))
    assert_is(kv_cache_from_flashinfer(cache, kv_layout), cache[:, :1], cache[:, 1:])
    assert_is(kv_cache_from_flashinfer(pair, kv_layout), pair[0][:, None], pair[1][:, None])


# Bytes.

BYTES = {
    "vllm": lambda: kv_cache_from_vllm(_bytes(B, H, N, 2 * D), D, dtype=E4M3),
    "vllm, two sizes": lambda: kv_cache_from_vllm(_bytes(B, H, N, D + DV), D, DV, dtype=E4M3),
    "vllm 0.24": lambda: kv_cache_from_vllm_0_24(_bytes(B, 2, N, H, D), D, dtype=E4M3),
    "vllm 0.10": lambda: kv_cache_from_vllm_0_10(_bytes(2, B, N, H, D), D, dtype=E4M3),
    "sglang": lambda: kv_cache_from_sglang(*_bytes(2, B * N, H, D), N, dtype=E4M3),
    "flashinfer": lambda: kv_cache_from_flashinfer(_bytes(B, 2, N, H, D), dtype=E4M3),
}
_given: list[torch.Tensor] = []


def _bytes(*shape):
    _given[:] = [torch.zeros(shape, dtype=torch.uint8)]
    return _given[0]


@pytest.mark.parametrize("engine", BYTES)
def test_bytes_are_viewed_as_fp8(engine):
    found = BYTES[engine]()
    for part in keys_and_values(found):
        assert part.dtype == E4M3
        assert part.untyped_storage().data_ptr() == _given[0].untyped_storage().data_ptr()
        part.view(torch.uint8).fill_(7)
    assert bool((_given[0] == 7).all())


# What is rejected.

INVALID = {
    "vllm, a row of another size": (
        lambda: kv_cache_from_vllm(numbered(B, H, N, 2 * D), D, DV),
        r"The cache is \(6, 3, 4, 16\) torch.float32; vLLM 0.33 hands over \(num_blocks, .* the "
        "last dimension 13. kv_cache_from_vllm_0_24 and",
    ),
    "vllm, an old shape": (
        lambda: kv_cache_from_vllm(numbered(2, B, N, H, D), D),
        "vLLM 0.33 hands over .* those of older versions",
    ),
    "vllm, no tensor": (
        lambda: kv_cache_from_vllm([numbered(B, H, N, 2 * D)], D), "vLLM 0.33 hands over"
    ),
    "vllm, no size": (
        lambda: kv_cache_from_vllm(numbered(B, H, N, 2 * D), 0), "head_size=0 is not an integer"
    ),
    "vllm 0.24, halves": (
        lambda: kv_cache_from_vllm_0_24(numbered(2, B, N, H, D), D),
        r"The cache is \(2, 6, 4, 3, 8\) .*; vLLM 0.24 hands over .* kv_cache_from_vllm_0_10 takes",
    ),
    "vllm 0.24, one size for two": (
        lambda: kv_cache_from_vllm_0_24(numbered(B, 2, N, H, D), D, DV), "vLLM 0.24 hands over"
    ),
    "vllm 0.10, blocks first": (
        lambda: kv_cache_from_vllm_0_10(numbered(B, 2, N, H, D), D),
        r"vLLM 0.10 hands over \(2, num_blocks, .* kv_cache_from_flashinfer",
    ),
    "sglang, a part of a page": (
        lambda: kv_cache_from_sglang(*numbered(2, B * N + 1, H, D), N),
        "SGLang 0.5 hands over two tensors .* a multiple of page_size=4 of slots",
    ),
    "sglang, vectorized": (
        lambda: kv_cache_from_sglang(*numbered(2, B, H, 2, N, 4), N), "SGLang 0.5 hands over two"
    ),
    "sglang, pages of another size": (
        lambda: kv_cache_from_sglang(*numbered(2, B, H, N, D), 2 * N), "SGLang 0.5 hands over two"
    ),
    "sglang, two kinds": (
        lambda: kv_cache_from_sglang(numbered(B * N, H, D), numbered(B * N, H + 1, D), N),
        "Both need the same blocks",
    ),
    "transformers, tokens of no layer": (
        lambda: kv_cache_from_transformers(numbered(B * N, 2, H, D), N, 0, 4),
        r"transformers 5.18 hands over one tensor .* page_size \* num_layers = 16",
    ),
    "transformers, no such layer": (
        lambda: kv_cache_from_transformers(numbered(B * N, 2, H, D), N, 3, 3), "layer=3 is too"
    ),
    "old transformers, pages": (
        lambda: kv_cache_from_transformers_5_12(*numbered(2, B, N, H, D), N),
        "transformers 5.12 hands over two tensors",
    ),
    "old transformers, less than a block": (
        lambda: kv_cache_from_transformers_5_12(*numbered(2, N - 1, H, D), N),
        "of at least one block",
    ),
    "flashinfer, halves": (
        lambda: kv_cache_from_flashinfer(numbered(3, B, N, H, D)[:, :3]),
        r"FlashInfer hands over one tensor \(num_pages, 2, page_size, num_kv_heads, head_size\)",
    ),
    "flashinfer, three tensors": (
        lambda: kv_cache_from_flashinfer((numbered(B, N, H, D),) * 3), "FlashInfer hands over one"
    ),
    "flashinfer, no layout": (
        lambda: kv_cache_from_flashinfer(numbered(B, 2, N, H, D), "DHN"),
        "kv_layout='DHN' is neither 'NHD' nor 'HND'",
    ),
    "bytes of no type": (
        lambda: kv_cache_from_vllm(_bytes(B, H, N, 2 * D), D),
        "The cache is torch.uint8, .* Give dtype=.*float8_e4m3fn",
    ),
    "bytes as a wider type": (
        lambda: kv_cache_from_vllm(_bytes(B, H, N, 2 * D), D, dtype=torch.bfloat16),
        "dtype=torch.bfloat16 has 2 bytes. Give one with a single byte",
    ),
    "no bytes": (
        lambda: kv_cache_from_vllm(numbered(B, H, N, 2 * D), D, dtype=E4M3),
        "The cache is torch.float32, and dtype=torch.float8_e4m3fn. Only bytes",
    ),
    "no dtype": (
        lambda: kv_cache_from_vllm(_bytes(B, H, N, 2 * D), D, dtype="fp8"),
        "dtype='fp8' is not a torch.dtype",
    ),
    "sparse": (
        lambda: kv_cache_from_vllm(numbered(B, H, N, 2 * D).to_sparse(), D), "sparse, nested or"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INVALID)
def test_what_no_engine_hands_over_is_rejected(what):
    call, message = INVALID[what]
    with pytest.raises(InvalidInputError, match=message):
        call()


# The table.


@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_the_table_names_public_functions_and_its_layouts(name):
    layout = KV_LAYOUTS[name]
    assert layout.form.constructor in kv_layouts.__all__
    assert kv_layout_named(name.upper()) is layout
    assert kv_layout_named(layout.form.name).form is layout.form


def test_every_constructor_is_in_the_table():
    assert {each.form.constructor for each in KV_LAYOUTS.values()} == set(kv_layouts.__all__)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_an_example_is_within_the_memory_of_one_layer(name, kv_cache_dtype):
    """It has as many bytes as its keys and values need, between other layers and margins."""
    layout, margin = KV_LAYOUTS[name], 256
    spec = layer_spec(head_size=8, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    cache = layout.allocate(spec, B, margin_bytes=margin)
    for part in parts_of(cache):
        part.view(torch.uint8).fill_(1)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parts_of(cache)}
    memory = torch.cat([torch.tensor(list(each), dtype=torch.uint8) for each in storages.values()])
    own = sum(part.numel() * part.element_size() for part in keys_and_values(cache))
    assert int(memory.sum()) == own
    assert len(memory) == own * kv_layout_table.LAYERS + 2 * margin * len(storages)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", *FP8])
@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_an_example_has_the_strides_of_its_spec(name, kv_cache_dtype):
    spec = layer_spec(head_size=16, block_size=16, kv_cache_dtype=kv_cache_dtype)
    laid = with_kv_layout(spec, name)
    assert laid == spec.replace(kv_strides=kv_strides_of(KV_LAYOUTS[name].allocate(spec, 16)))


def test_layouts_of_two_tensors_have_strides_for_two_head_sizes():
    spec = layer_spec(head_size=16, head_size_v=8)
    two = [name for name, layout in KV_LAYOUTS.items() if layout.form.two_sizes]
    assert {"vllm-LBNHC", "vllm-0.24-diffkv-NHD", "sglang", "flashinfer-tuple"} <= set(two)
    for name in two:
        strides = with_kv_layout(spec, name).kv_strides
        assert strides.separate


MLA = MLADims(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
REFUSED = {
    "an unknown layout": (layer_spec(), "vlm", "There is no layout 'vlm' of a KV cache. The lay"),
    "no cache": (layer_spec(block_size=None), "sglang", "the layer has no block_size: give one"),
    "two sizes": (layer_spec(head_size_v=4), "vllm-0.10", "head_size_v=4. These have two: vllm-L"),
    "latents": (
        layer_spec().for_mla(num_heads=2, dtype=torch.float32, mla=MLA, block_size=4),
        "vllm",
        "the layer caches latents",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_layer_without_such_a_cache_is_rejected(what):
    spec, name, message = REFUSED[what]
    with pytest.raises(InvalidInputError, match=message):
        with_kv_layout(spec, name)
