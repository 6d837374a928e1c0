"""Layers over the caches of engines: results, writes, moves of blocks, and which backends run."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import (
    KV_LAYOUTS,
    Attention,
    InvalidInputError,
    KVCacheView,
    UnsupportedError,
    attention,
    bind_kv_caches,
    copy_blocks,
    forward_context,
    kv_strides_of,
    swap_blocks,
    write_kv_cache,
)
from attn_dispatch.conformance import shadow
from attn_dispatch.conformance.kv_layouts import engine_cache_of, memories_of
from attn_dispatch.interface.kv_view import keys_and_values
from attn_dispatch.selection.registry import registry
from support.cases import FP8, INT8, Case, Step, call, layer_of, layer_spec

BACKENDS = ("REFERENCE", "TORCH_SDPA", "TRITON_ATTN")
#: (query_lens, seq_lens)
STEPS = {
    "prefill": ((5, 9), (5, 13)),
    "decode": ((1, 1, 1), (9, 4, 17)),
    "mixed": ((1, 5, 3, 0), (9, 5, 8, 4)),
}
#: One layout of each form: the orders in memory of one form differ only in strides.
FORMS = {layout.form.name: layout for layout in reversed(KV_LAYOUTS.values())}


def step_of(layout, step="mixed", **fields):
    """A step of a layer over this layout, and whether the layout has such a cache."""
    spec = layer_spec(**({"dtype": torch.float32} | fields))
    spec = spec.replace(kv_strides=layout.strides_for(spec))
    query_lens, seq_lens = STEPS[step]
    return Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens))


def laid(layout, step, contents=None):
    """A cache with this layout and the step's contents."""
    return engine_cache_of(layout, step, step.kv_cache if contents is None else contents)


def assert_same_memory(one, other):
    """All bytes are the same: the elements of the cache, and everything around them."""
    for mine, its in zip(memories_of(one), memories_of(other), strict=True):
        assert torch.equal(mine, its)


def check(backend, layout, step):
    """Run a step over the layout and over our own: the same bits, and the same bytes written."""
    if backend == "TRITON_ATTN":
        pytest.importorskip("triton", minversion="3.6")
    cls = registry.candidates()[backend].backend_cls
    cache, own = laid(layout, step), step.kv_cache.clone()
    result, expected = step.forward(cls, cache), step.forward(cls, own)
    assert torch.equal(result, expected)
    step.check(result)
    assert_same_memory(cache, laid(layout, step, own))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", KV_LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_gives_the_bits_of_our_own(backend, name, step):
    check(backend, KV_LAYOUTS[name], step_of(KV_LAYOUTS[name], step))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kv_cache_dtype", [*FP8, INT8])
@pytest.mark.parametrize("name", ["vllm", "vllm-0.10", "sglang", "sglang-HND"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_so_does_a_cache_of_bytes(backend, name, kv_cache_dtype):
    step = step_of(FORMS[name], kv_cache_dtype=kv_cache_dtype, head_size=16)
    check(backend, FORMS[name], step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_so_does_any_dtype(backend, dtype):
    if (backend, dtype) == ("TRITON_ATTN", torch.float64):
        return  # not declared
    check(backend, KV_LAYOUTS["vllm-LBNHC"], step_of(KV_LAYOUTS["vllm-LBNHC"], dtype=dtype))


@pytest.mark.parametrize("name", [n for n, layout in FORMS.items() if layout.form.two_sizes])
@pytest.mark.parametrize("backend", BACKENDS)
def test_so_do_values_of_another_size(backend, name):
    check(backend, FORMS[name], step_of(FORMS[name], head_size=16, head_size_v=24))


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("name", ["vllm", "sglang", "sglang-HND", "transformers", "flashinfer"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_so_do_blocks_of_any_size(backend, name, block_size):
    check(backend, FORMS[name], step_of(FORMS[name], block_size=block_size, num_kv_heads=1))


# Random strides, for keys and values apart.


@st.composite
def parts(draw, sizes):
    """A view of NaN with dimensions in any order in memory, gaps between them, at any place."""
    strides, step = [0, 0, 0, 1], sizes[3] + draw(st.sampled_from([0, 0, 1, 8]))
    for dim in draw(st.permutations(range(3))):
        strides[dim] = step
        step *= sizes[dim]
        step += draw(st.sampled_from([0, 0, 3, 16]))
    first = draw(st.sampled_from([0, 1, 4]))
    memory = torch.full((first + step + 5,), torch.nan)
    return memory.as_strided(sizes, strides, first)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_keys_and_values_may_have_any_strides(backend, data):
    if backend == "TRITON_ATTN":
        pytest.importorskip("triton", minversion="3.6")
    step = step_of(KV_LAYOUTS["sglang"], data.draw(st.sampled_from(list(STEPS))))
    own = step.kv_cache.clone()
    key, value = (data.draw(parts(own[:, 0].shape)) for _ in range(2))
    view = KVCacheView(key, value)
    for part, content in zip((key, value), own.unbind(1), strict=True):
        part.copy_(content)
    around = [torch.empty(0).set_(p.untyped_storage()).isfinite().sum() for p in (key, value)]
    cls = registry.candidates()[backend].backend_cls
    result, expected = step.forward(cls, view), step.forward(cls, own)
    assert torch.equal(result, expected)
    written = 0
    for index, part in enumerate((key, value)):
        assert torch.equal(part.nan_to_num(7.0), own[:, index].nan_to_num(7.0))
        finite = torch.empty(0).set_(part.untyped_storage()).isfinite().sum()
        written += int(finite - around[index])
        assert int(finite) == int(part.isfinite().sum())
    slots = int((step.batch.slot_mapping >= 0).sum())
    assert written == 2 * slots * step.spec.num_kv_heads * step.spec.head_size


# The public functions.


@pytest.mark.parametrize("name", FORMS)
def test_the_function_takes_it(name):
    step = step_of(FORMS[name])
    cache, own = laid(FORMS[name], step), step.kv_cache.clone()
    results = []
    for each in (cache, own):
        results.append(
            attention(
                step.query,
                step.key,
                step.value,
                query_lens=step.case.query_lens,
                seq_lens=step.case.seq_lens,
                kv_cache=each,
                block_table=step.batch.block_table,
                slot_mapping=step.batch.slot_mapping,
                scale=step.scale,
            )
        )
    assert torch.equal(*results)
    step.check(results[0])
    assert_same_memory(cache, laid(FORMS[name], step, own))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_written_by_hand(name, kv_cache_dtype):
    step = step_of(FORMS[name], kv_cache_dtype=kv_cache_dtype)
    cache, own = laid(FORMS[name], step), step.kv_cache.clone()
    for each in (cache, own):
        write_kv_cache(step.key, step.value, each, step.batch.slot_mapping, 0.5, 0.25)
    assert_same_memory(cache, laid(FORMS[name], step, own))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
@pytest.mark.parametrize("name", FORMS)
def test_blocks_are_copied_within_it(name, kv_cache_dtype):
    step = step_of(FORMS[name], kv_cache_dtype=kv_cache_dtype)
    cache, own = laid(FORMS[name], step), step.kv_cache.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [2, 0]])
    copy_blocks([cache, own], pairs)
    assert_same_memory(cache, laid(FORMS[name], step, own))
    assert torch.equal(own[2].view(torch.uint8), step.kv_cache[1].view(torch.uint8))


def test_views_of_one_cache_are_copied_once():
    """A tensor, the view of its halves, and the same once more: one chain of pairs."""
    cache = torch.zeros(6, 2, 4, 2, 8)
    for block in range(6):
        cache[block] = block
    halves = KVCacheView(*cache.unbind(1))
    copy_blocks([cache, halves, (cache[:, 0], cache[:, 1])], torch.tensor([[0, 1], [1, 2], [2, 3]]))
    assert cache[:, :, 0, 0, 0].tolist() == [[n, n] for n in (0, 0, 1, 2, 4, 5)]


def test_views_of_other_blocks_of_one_cache_are_rejected():
    cache = torch.zeros(6, 2, 4, 2, 8)
    views = [KVCacheView(*cache[first : first + 5].unbind(1)) for first in (0, 1)]
    with pytest.raises(InvalidInputError, match="overlaps"):
        copy_blocks(views, torch.tensor([[0, 1]]))
    assert not cache.any()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
@pytest.mark.parametrize("names", list(itertools.product(["vllm", "sglang", "ours"], repeat=2)))
def test_blocks_are_swapped_between_layouts(names, kv_cache_dtype):
    step = step_of(KV_LAYOUTS["sglang"], kv_cache_dtype=kv_cache_dtype)
    blank = torch.zeros_like(step.kv_cache)
    source, destination = (
        contents if name == "ours" else laid(FORMS[name], step, contents)
        for name, contents in zip(names, (step.kv_cache.clone(), blank.clone()), strict=True)
    )
    swap_blocks(source, destination, torch.tensor([[0, 2], [3, 1]]))
    expected = blank
    expected[2], expected[1] = step.kv_cache[0], step.kv_cache[3]
    for part, wanted in zip(keys_and_values(destination), expected.unbind(1), strict=True):
        size = part.shape[-1]
        assert torch.equal(part.view(torch.uint8), wanted[..., :size].view(torch.uint8))


# Layers.


def bound(step, cache, **more):
    """A layer that left its block size and strides open, bound to a cache."""
    fields = step.spec.impl_arguments() | {"dtype": step.spec.dtype, "scale": step.scale}
    layer = Attention(**fields, block_size=None, prefix="0", **more)
    bind_kv_caches([layer], {"0": cache})
    return layer


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_is_bound_to_it(name):
    step = step_of(FORMS[name])
    cache, own = laid(FORMS[name], step), step.kv_cache.clone()
    layer = bound(step, cache)
    assert layer.spec.kv_strides == kv_strides_of(cache)
    assert layer.spec.block_size == step.spec.block_size
    result, expected = call(layer, step), call(bound(step, own), step)
    assert torch.equal(result, expected)
    step.check(result)
    assert_same_memory(cache, laid(FORMS[name], step, own))


def test_a_layer_takes_a_cache_of_another_layout_later():
    step = step_of(KV_LAYOUTS["sglang"])
    layer = bound(step, laid(KV_LAYOUTS["sglang"], step))
    strides = layer.spec.kv_strides
    for name in ("vllm-LBHNC", "vllm-0.24-NHD"):
        cache = laid(KV_LAYOUTS[name], step)
        bind_kv_caches([layer], {"0": cache})
        assert layer.spec.kv_strides == kv_strides_of(cache) != strides
        step.check(call(layer, step))


@pytest.fixture
def only_own_layouts():
    """TORCH_SDPA without a declaration of kv_strides."""
    fields = registry.candidates()["TORCH_SDPA"].backend_cls.capabilities.fields
    found = fields.pop("kv_strides")
    from attn_dispatch.selection.version import changed

    changed()
    yield
    fields["kv_strides"] = found
    changed()


def test_a_backend_that_does_not_declare_the_strides_is_not_picked(only_own_layouts):
    step = step_of(KV_LAYOUTS["sglang"])
    layer = bound(step, laid(KV_LAYOUTS["vllm-0.24-NHD"], step))
    assert {picked.name for picked in layer.selections.values()} == {"TORCH_SDPA"}
    bind_kv_caches([layer], {"0": laid(KV_LAYOUTS["sglang"], step)})
    assert {picked.name for picked in layer.selections.values()} == {"REFERENCE"}
    for picked in layer.selections.values():
        reasons = {verdict.name: verdict.reasons for verdict in picked.verdicts}
        assert [reason.field for reason in reasons["TORCH_SDPA"]] == ["kv_strides"]
    step.check(call(layer, step))


def test_it_is_rejected_where_it_is_required(only_own_layouts):
    step = step_of(KV_LAYOUTS["sglang"])
    cache = laid(KV_LAYOUTS["sglang"], step)
    with pytest.raises(UnsupportedError, match="kv_strides=two tensors with strides"):
        bound(step, cache, backend="TORCH_SDPA")
    cls = registry.candidates()["TORCH_SDPA"].backend_cls
    with pytest.raises(UnsupportedError, match="TORCH_SDPA does not read this kv_cache, two tens"):
        step.forward(cls, cache)
    assert_same_memory(cache, laid(KV_LAYOUTS["sglang"], step))


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_layer_over_it_compiles_in_one_graph(name):
    step = step_of(FORMS[name])
    cache, own = laid(FORMS[name], step), step.kv_cache.clone()
    layer = bound(step, cache)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with forward_context(step.batch):
        result = compiled(step.query, step.key, step.value)
    assert torch.equal(result, call(bound(step, own), step))
    assert_same_memory(cache, laid(FORMS[name], step, own))


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_the_shadow_check_reads_it(name, kv_cache_dtype, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "shadow:1")
    shadow.reset()
    step = step_of(FORMS[name], kv_cache_dtype=kv_cache_dtype)
    layer = layer_of(step, backend="TORCH_SDPA")
    layer.kv_cache = laid(FORMS[name], step)
    step.check(call(layer, step))
    (found,) = shadow.report()
    assert (found.compared, found.drifted) == (1, 0)
    shadow.reset()
