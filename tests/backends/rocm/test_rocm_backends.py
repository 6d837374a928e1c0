"""ROCM_AITER and ROCM_FLASH_ATTN: with fakes on any machine, with the libraries on an AMD GPU."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from support.cases import FP8, INT8, MEMORY, Case, Step, layer_spec
from support.fake_rocm import install_aiter, install_flash_attn
from support.selection import rules

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.rocm.aiter import AiterImpl, RocmAiterBackend
from attn_dispatch.backends.rocm.flash_attn_ck import (
    FlashAttnImpl,
    RocmFlashAttnBackend,
    VarlenPlan,
)
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import compare
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.selector import select
from support.triton_cases import HAS_GPU, check, in_words, reordered

BACKENDS = {"ROCM_AITER": RocmAiterBackend, "ROCM_FLASH_ATTN": RocmFlashAttnBackend}
INSTALL = {"ROCM_AITER": install_aiter, "ROCM_FLASH_ATTN": install_flash_attn}
MODULES = {"ROCM_AITER": "aiter", "ROCM_FLASH_ATTN": "flash_attn"}
on_amd = pytest.mark.skipif(not torch.version.hip or not HAS_GPU, reason="needs an AMD GPU")

INSTALLED = (
    Library("triton", "3.6.0"),
    Library("aiter", "0.1.20"),
    Library("flash_attn", "2.8.3"),
    Library("flash_attn_2_cuda", "2.8.3"),
)

#: Decodes, a short chunk, prompts, a chunk with a past, nothing.
BATCH = {"query_lens": (1, 18, 3, 0, 17, 20), "seq_lens": (30, 18, 9, 0, 40, 20)}
PROMPTS = {"query_lens": (17, 20), "seq_lens": (17, 20)}


@pytest.fixture(params=BACKENDS)
def name(request):
    return request.param


@pytest.fixture
def calls(name, monkeypatch):
    """Installs the backend's fake library. The value is its calls."""
    monkeypatch.setattr(libraries, "_broken", {})
    return INSTALL[name](monkeypatch)


def step_of(fields=(), batch=BATCH, device="cpu"):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float16}
    return Step(Case(spec=layer_spec(**(sizes | dict(fields))), **(BATCH | dict(batch))), device)


def built(name, step):
    return BACKENDS[name].get_builder_cls()(step.spec, step.device).build(step.batch)


def run(name, step, *, metadata=None, cache=None, output=None):
    impl = BACKENDS[name].get_impl_cls()(**step.impl_arguments())
    metadata = built(name, step) if metadata is None else metadata
    if cache is None and step.kv_cache is not None:
        cache = step.kv_cache.clone()
    return impl.forward(step.layer, step.query, step.key, step.value, cache, metadata, output)


MI300X = known_device("gfx942").with_libraries(*INSTALLED)


def rejections(name, spec, device=MI300X):
    """The fields for which a backend rejects a layer on a device."""
    cls = BACKENDS[name]
    reasons = compare(spec, cls.capabilities, device) or cls.check_combination(spec, device)
    return [reason.field for reason in reasons]


# --- Results ----------------------------------------------------------------------------------

#: Changes of the layer, and of the batch.
VARIANTS = {
    "plain": ({}, {}),
    "not causal": ({"causal": False}, {}),
    "window": ({"sliding_window": 7}, {}),
    "window both ways": ({"sliding_window": 7, "causal": False}, {}),
    "window of two": ({"sliding_window": 2}, {}),
    "window over all": ({"sliding_window": 2**40}, {}),
    "ALiBi": ({"alibi": True}, {}),
    "lse": ({"returns_lse": True}, {}),
    "lse and window": ({"returns_lse": True, "sliding_window": 9}, {}),
    "lse, not causal": ({"returns_lse": True, "causal": False}, {}),
    **{name: ({"kv_cache_dtype": name}, {}) for name in (*FP8, INT8, "float32")},
    "scales per head": ({"kv_cache_dtype": "fp8_e4m3", "kv_scales": "per_head"}, {}),
    "HND": ({"kv_cache_layout": "HND", "block_size": 16}, {}),
    "blocks of three": ({"block_size": 3}, {}),
    "blocks of one": ({"block_size": 1}, {}),
    "sharing": ({"kv_sharing": True}, {}),
    "keys in the cache": ({}, {"brings_keys": False}),
    **{memory: ({}, {"memory": memory, "padding": 3}) for memory in MEMORY},
    "fused prompts": ({}, PROMPTS | {"memory": "fused", "padding": 5}),
    "strided prompts": ({}, PROMPTS | {"memory": "strided"}),
    "prompts": ({"returns_lse": True}, PROMPTS),
    "heads of 24": ({"head_size": 24, "num_heads": 6}, {}),
    "heads of 128": ({"head_size": 128, "num_heads": 2, "num_kv_heads": 1}, {}),
    "encoder": (
        {"attn_type": "encoder_only", "block_size": None},
        {"seq_lens": (3, 18, 1, 0, 2, 9)},
    ),
    "encoder, window, lse": (
        {"attn_type": "encoder", "block_size": None, "sliding_window": 3, "returns_lse": True},
        {"seq_lens": BATCH["query_lens"]},
    ),
    "cross": ({"attn_type": "encoder_decoder"}, {"new_lens": (0, 18, 0, 0, 40, 0)}),
    "cross, all new": ({"attn_type": "encoder_decoder"}, {"new_lens": BATCH["seq_lens"]}),
    "without a cache": ({"block_size": None}, {"seq_lens": BATCH["query_lens"]}),
}
OF_AITER = {
    "soft cap": ({"logits_soft_cap": 2.0}, {}),
    "soft cap and window": ({"logits_soft_cap": 2.0, "sliding_window": 9, "causal": False}, {}),
    "heads of 192 and 128": ({"head_size": 192, "head_size_v": 128, "num_heads": 2}, {}),
}
EVERY = [
    *itertools.product(BACKENDS, VARIANTS),
    *(("ROCM_AITER", variant) for variant in OF_AITER),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "variant"), EVERY, ids=str)
def test_a_step_agrees_with_the_reference(name, variant, calls):
    fields, batch = (VARIANTS | OF_AITER)[variant]
    step = step_of(fields, batch)
    assert rejections(name, step.spec) == []
    check(step, run(name, step))
    assert len(calls) == 1


@pytest.mark.gpu
@on_amd
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "variant"), EVERY, ids=str)
def test_a_step_agrees_with_the_reference_on_a_gpu(name, variant, dtype):
    """With the library itself, and shapes that fill its tiles."""
    fields, batch = (VARIANTS | OF_AITER)[variant]
    larger = {
        field: tuple(1 if n == 1 and field == "query_lens" else 23 * n for n in lengths)
        for field, lengths in (BATCH | batch).items()
        if field.endswith("_lens")
    }
    sizes = {"head_size": 128, "num_heads": 16} | fields | {"dtype": dtype}
    step = step_of(sizes, batch | larger, "cuda")
    if rejected := rejections(name, step.spec, detect_device("cuda")):
        pytest.skip(f"rejected here: {rejected}")
    check(step, run(name, step))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(name, scale, calls):
    step = step_of({"returns_lse": True})
    step.scale = scale
    check(step, run(name, step))
    assert len(calls) == 1


def test_bfloat16_prompts(name, calls):
    """Without decodes: those are Triton's, whose interpreter cannot multiply bfloat16."""
    sizes = {"dtype": torch.bfloat16, "head_size": 128, "num_heads": 2, "num_kv_heads": 1}
    step = step_of(sizes, {"query_lens": (17, 19), "seq_lens": (17, 35)})
    check(step, run(name, step))
    assert len(calls) == 1


@st.composite
def random_cases(draw, name):
    fields = {
        "num_kv_heads": (heads := draw(st.sampled_from([1, 2]))),
        "num_heads": heads * draw(st.sampled_from([1, 3])),
        "head_size": draw(st.sampled_from([8, 16, 40])),
        "dtype": torch.float16,
        "block_size": draw(st.sampled_from([None, 1, 4, 16])),
        "causal": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, None, 2, 5, 10_000])),
        "alibi": draw(st.booleans()),
        "returns_lse": draw(st.booleans()),
    }
    if name == "ROCM_AITER":
        fields["logits_soft_cap"] = draw(st.sampled_from([None, 2.0]))
    if fields["block_size"] is not None:
        fields["kv_cache_dtype"] = draw(st.sampled_from(["auto", "fp8_e5m2", INT8]))
        fields["kv_cache_layout"] = draw(st.sampled_from([None, "NHD", "HND"]))
        fields["kv_sharing"] = draw(st.booleans())
    spec = layer_spec(**fields)
    assume(rejections(name, spec) == [])
    lens = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 1, 5, 17, 20]), st.sampled_from([0, 0, 3, 21])),
            min_size=1,
            max_size=4,
        )
    )
    seq_lens = [past if spec.block_size is None else query + past for query, past in lens]
    return Case(
        spec=spec,
        query_lens=tuple(query for query, _ in lens),
        seq_lens=tuple(seq_lens),
        brings_keys=spec.block_size is None or draw(st.booleans()),
        memory=draw(st.sampled_from(MEMORY)),
        padding=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize(
    "fields",
    [{"custom_mask": True}, {"bidirectional_ranges": True}, {"batch_invariant": True}],
    ids=in_words,
)
def test_the_builder_rejects_undeclared_features(name, fields):
    step = step_of(fields)
    with pytest.raises(UnsupportedError, match=f"{name} does not compute this layer"):
        built(name, step)


def test_quantized_output_is_rejected_before_anything_is_written(name, calls):
    step = step_of()
    output = torch.empty(step.query.shape, dtype=torch.float8_e4m3fn)
    impl = BACKENDS[name].get_impl_cls()(**step.impl_arguments())
    cache = step.kv_cache.clone()
    arguments = (step.layer, step.query, step.key, step.value, cache, built(name, step))
    for scales in ((torch.ones(()), None), (None, torch.ones(len(output), 1))):
        with pytest.raises(UnsupportedError, match="REFERENCE does"):
            impl.forward(*arguments, output, *scales)
    assert torch.equal(cache.view(torch.int16), step.kv_cache.view(torch.int16))
    assert not impl.fused_output_quant_supported("fp8_e4m3")


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_any_step_agrees_with_the_oracle(backend, data):
    step = Step(data.draw(random_cases(backend)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        INSTALL[backend](monkeypatch)
        check(step, run(backend, step), step.naive())


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 4, 5)))[1::5], ids=str)
def test_requests_may_be_in_any_order(name, order, calls):
    step = reordered(step_of({"returns_lse": True}), order)
    check(step, run(name, step))
    assert len(calls) == 1


def test_the_cache_holds_the_new_keys_and_nothing_else(name, calls):
    step = step_of()
    cache, wanted = step.kv_cache.clone(), step.kv_cache.clone()
    TritonAttnBackend.get_impl_cls()(**step.impl_arguments()).write_kv(
        step.layer, step.key, step.value, wanted, step.batch
    )
    run(name, step, cache=cache)
    assert torch.equal(cache.view(torch.int16), wanted.view(torch.int16))
    assert not torch.equal(cache.view(torch.int16), step.kv_cache.view(torch.int16))


def test_a_layer_that_shares_a_cache_never_writes(name, calls):
    step = step_of({"kv_sharing": True})
    cache = step.kv_cache.clone()
    run(name, step, cache=cache)
    assert torch.equal(cache.view(torch.int16), step.kv_cache.view(torch.int16))


# --- Calls of the library ---------------------------------------------------------------------


def test_prompts_read_the_given_rows(name, calls):
    step = step_of({}, PROMPTS)
    run(name, step)
    (call,) = calls.made
    assert call["k"].data_ptr() == step.key.data_ptr()
    assert call["v"].data_ptr() == step.value.data_ptr()


@pytest.mark.parametrize(
    ("fields", "batch"),
    [
        ({}, {"query_lens": (17, 20), "seq_lens": (17, 30)}),
        ({"kv_cache_dtype": "fp8_e4m3"}, PROMPTS),
        ({"kv_sharing": True}, PROMPTS),
        ({}, PROMPTS | {"brings_keys": False}),
    ],
    ids=["a past", "fp8", "sharing", "no keys"],
)
def test_keys_are_gathered_unless_the_rows_hold_them_all(name, fields, batch, calls):
    step = step_of(fields, batch)
    check(step, run(name, step))
    (call,) = calls.made
    assert len(call["k"]) == sum(step.case.seq_lens)
    assert step.key is None or call["k"].data_ptr() != step.key.data_ptr()


def test_decodes_do_not_call_the_library(name, calls):
    step = step_of({}, {"query_lens": (1, 4, 1), "seq_lens": (9, 20, 0)})
    check(step, run(name, step))
    assert len(calls) == 0


def test_prefills_too_large_to_gather_use_triton(name, calls, monkeypatch):
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", 1000)
    step = step_of({"returns_lse": True})
    check(step, run(name, step))
    assert len(calls) == 0


@pytest.mark.parametrize("fields", [{}, {"kv_cache_dtype": "fp8_e4m3"}], ids=in_words)
def test_prefills_are_gathered_in_groups_that_fit(name, fields, calls, monkeypatch):
    """Of 18, 40, 20 and 90 keys, the last do not fit, and no two others do together with 40."""
    step = step_of(
        {"returns_lse": True, **fields},
        {"query_lens": (18, 17, 3, 0, 20, 30), "seq_lens": (18, 40, 9, 0, 20, 90)},
    )
    builder = BACKENDS[name].get_builder_cls()(step.spec, step.device)
    builder.launches = dataclasses.replace(builder.launches, num_sms=1)
    decodes = builder.build(step.batch).decode.scratch_bytes
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", decodes + 41 * 2 * 32 * 2)
    metadata = builder.build(step.batch)
    check(step, run(name, step, metadata=metadata))
    assert [len(call["k"]) for call in calls.made] == [40, 38]
    assert [each.requests.tolist() for each in metadata.prefill.parts] == [[1], [0, 4], [5]]


def test_layers_share_the_memory_of_gathered_keys(name, calls):
    step = step_of()
    metadata = built(name, step)
    for _ in range(2):
        check(step, run(name, step, metadata=metadata))
    first, second = calls.made
    assert first["k"].data_ptr() == second["k"].data_ptr()


@pytest.mark.parametrize("fields", [{}, {"causal": False}], ids=in_words)
@pytest.mark.parametrize("window", [4, 5, 22, 23, 100])
def test_windows_as_long_as_the_keys(name, fields, window, calls):
    """The libraries treat such a window as none, which is wrong with more queries than keys."""
    step = step_of(
        {"block_size": None, "sliding_window": window, "returns_lse": True, **fields},
        {"query_lens": (22, 17), "seq_lens": (4, 3)},
    )
    check(step, run(name, step))


def test_metadata_is_interchangeable_with_triton(name, calls):
    """For a model with layers of two backends, and an engine that mixes up their metadata."""
    step = step_of({"returns_lse": True})
    impl = TritonAttnBackend.get_impl_cls()(**step.impl_arguments())
    arguments = (step.layer, step.query, step.key, step.value)
    metadata = built(name, step)
    assert isinstance(metadata.prefill, VarlenPlan)
    check(step, impl.forward(*arguments, step.kv_cache.clone(), metadata))
    metadata = TritonAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
    check(step, run(name, step, metadata=metadata))
    assert len(calls) == 0


# --- Rows without keys, NaN, and padding ------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"causal": False}, {"causal": False, "sliding_window": 3}])
@pytest.mark.parametrize("seq_lens", [(0,), (5,), (5, 0, 30), (0, 0)], ids=str)
def test_rows_without_keys_are_zero_and_minus_infinity(name, fields, seq_lens, calls):
    """Queries before the keys, and requests without any: output 0, log-sum-exp minus infinity."""
    step = step_of(
        {"block_size": None, "returns_lse": True, **fields},
        {"query_lens": (20, 18, 17)[: len(seq_lens)], "seq_lens": seq_lens},
    )
    output, lse = run(name, step)
    expected = step.expected()
    check(step, (output, lse), expected)
    without_keys = expected[1] == -torch.inf
    assert bool((lse[without_keys] == -torch.inf).all())
    assert bool((output[without_keys] == 0).all())


def test_a_batch_with_nothing_to_compute(name, calls):
    for lens in ((), (0, 0)):
        step = step_of({"returns_lse": True}, {"query_lens": lens, "seq_lens": lens})
        output, lse = run(name, step)
        assert output.shape == (0, 4, 16)
        assert lse.shape == (0, 4)
    assert len(calls) == 0


def test_nan_before_the_window_does_not_reach_the_output(name, calls):
    step = step_of({"sliding_window": 5}, {"query_lens": (1, 18), "seq_lens": (30, 50)})
    expected = step.expected()
    for request, first_seen in enumerate((25, 28)):
        step.kv_cache[step.batch.block_table[request, : first_seen // 4].long()] = torch.nan
    check(step, run(name, step), expected)


def test_nan_after_a_prompt_does_not_reach_it(name, calls):
    step = step_of({}, {"query_lens": (18, 17, 1), "seq_lens": (18, 17, 9), "padding": 4})
    expected = step.expected()[0]
    step.key[18:] = step.value[18:] = torch.nan
    output = run(name, step)[:18].double()
    torch.testing.assert_close(output, expected[:18], rtol=0, atol=2e-3)


@pytest.mark.parametrize("lengths", [BATCH, PROMPTS], ids=["mixed", "prompts"])
def test_padding_rows_are_zero(name, lengths, calls):
    """Rows of no request are 0 with an lse of −inf, whatever output held before."""
    step = step_of({"returns_lse": True}, {**lengths, "padding": 5})
    output = torch.full_like(step.query, torch.nan)
    found, lse = run(name, step, output=output)
    num_tokens = step.batch.num_tokens
    assert len(found) == num_tokens + 5
    assert (found[num_tokens:] == 0).all()
    assert (lse[num_tokens:] == -torch.inf).all()


# --- Rejections -------------------------------------------------------------------------------

REJECTED = {
    "head_size": [{"head_size": 20}, {"head_size": 264}],
    "head_size_v": [{"head_size_v": 64}],
    "dtype": [{"dtype": torch.float32}],
    "sinks": [{"sinks": True}],
    "custom_mask": [{"custom_mask": True}],
    "bidirectional_ranges": [{"bidirectional_ranges": True}],
    "output_quant": [{"output_quant": "fp8_e4m3"}],
    "batch_invariant": [{"batch_invariant": True}],
    "kv_cache_dtype": [{"kv_cache_dtype": "float64"}],
    "alibi": [
        {"alibi": True, "causal": False},
        {"alibi": True, "sliding_window": 9},
        {"alibi": True, "returns_lse": True},
    ],
}


def bf16_layer(**fields):
    return layer_spec(**({"dtype": torch.bfloat16, "head_size": 128, "block_size": 16} | fields))


@pytest.mark.parametrize(
    ("field", "fields"), [(field, f) for field, every in REJECTED.items() for f in every], ids=str
)
def test_unsupported_fields_are_rejected(name, field, fields):
    assert rejections(name, bf16_layer()) == []
    assert field in rejections(name, bf16_layer(**fields))


def test_only_aiter_supports_a_soft_cap_without_alibi_and_lse():
    assert rejections("ROCM_AITER", bf16_layer(logits_soft_cap=30.0)) == []
    assert rejections("ROCM_FLASH_ATTN", bf16_layer(logits_soft_cap=30.0)) == ["logits_soft_cap"]
    assert rejections("ROCM_AITER", bf16_layer(logits_soft_cap=30.0, alibi=True)) == ["alibi"]
    both = bf16_layer(logits_soft_cap=30.0, returns_lse=True)
    assert rejections("ROCM_AITER", both) == ["returns_lse"]


def test_only_flash_attn_supports_windows_of_one_token(monkeypatch):
    assert rejections("ROCM_AITER", bf16_layer(sliding_window=1)) == ["sliding_window"]
    assert rejections("ROCM_FLASH_ATTN", bf16_layer(sliding_window=1)) == []
    install_flash_attn(monkeypatch)
    step = step_of({"sliding_window": 1})
    check(step, run("ROCM_FLASH_ATTN", step))


@pytest.mark.parametrize("sizes", [(192, 128), (192, 192), (128, 128), (64, 128), (256, 128)])
def test_sizes_of_heads_that_differ(sizes):
    spec = bf16_layer(head_size=sizes[0], head_size_v=sizes[1])
    is_known = sizes[0] == sizes[1] or sizes == (192, 128)
    assert rejections("ROCM_AITER", spec) == ([] if is_known else ["head_size_v"])
    assert (rejections("ROCM_FLASH_ATTN", spec) == []) is (sizes[0] == sizes[1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"sinks": torch.zeros(4)},
        {"alibi_slopes": [0.5] * 4, "causal": False},
        {"alibi_slopes": [0.5] * 4, "sliding_window": 9},
        {"alibi_slopes": [0.5] * 4, "returns_lse": True},
        {"logits_soft_cap": 30.0, "returns_lse": True},
    ],
    ids=in_words,
)
def test_impl_rejects_undeclared_features(name, arguments, calls):
    with pytest.raises(UnsupportedError, match=f"{name} does not support"):
        BACKENDS[name].get_impl_cls()(4, 16, 1.0, **arguments)


def test_impl_rejects_what_its_own_backend_does_not_declare(monkeypatch):
    install_aiter(monkeypatch)
    install_flash_attn(monkeypatch)
    with pytest.raises(UnsupportedError, match="ROCM_FLASH_ATTN does not support logits_soft_cap"):
        FlashAttnImpl(4, 16, 1.0, logits_soft_cap=30.0)
    with pytest.raises(UnsupportedError, match="ROCM_AITER does not support sliding_window=1"):
        AiterImpl(4, 16, 1.0, sliding_window=1)


def test_metadata_of_another_layer_is_rejected(name, calls):
    step, other = step_of(), step_of({"sliding_window": 9})
    with pytest.raises(InvalidInputError, match="sliding_window"):
        run(name, step, metadata=built(name, other))


# --- Devices and libraries --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "runs"),
    [
        ("gfx90a", {"ROCM_FLASH_ATTN"}),
        ("gfx942", set(BACKENDS)),
        ("gfx950", set(BACKENDS)),
        ("gfx1100", set()),
        ("gfx1201", set()),
        ("sm90", set()),
        ("cpu", set()),
    ],
)
def test_where_they_run(arch, runs):
    device = known_device(arch).with_libraries(*INSTALLED)
    assert {name for name in BACKENDS if rejections(name, bf16_layer(), device) == []} == runs


def test_an_override_picks_it(name):
    assert select(bf16_layer(), MI300X, rules=rules(name)).name == name
    with pytest.raises(UnsupportedError, match="sinks=True is not supported; supported: False"):
        select(bf16_layer(sinks=True), MI300X, rules=rules(name))


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("ROCM_AITER", Library("aiter")),
        ("ROCM_AITER", Library("aiter", "0.1.9")),
        ("ROCM_AITER", Library("aiter", "0.2.0")),
        ("ROCM_AITER", Library("aiter", "0.1.20", "OSError: no libamdhip64.so")),
        ("ROCM_AITER", Library("triton")),
        ("ROCM_FLASH_ATTN", Library("flash_attn", "2.7.4")),
        ("ROCM_FLASH_ATTN", Library("flash_attn_2_cuda")),
        ("ROCM_FLASH_ATTN", Library("triton", "3.5.1")),
    ],
    ids=str,
)
def test_libraries_that_are_missing_too_old_or_broken(name, library):
    assert rejections(name, bf16_layer(), MI300X.with_libraries(library)) == [library.name]


@pytest.mark.parametrize("version", ["0.1.10.post3", "0.1.20.post1", "0.1.21.dev3+g1234567"])
def test_releases_of_aiter_that_are_known(version):
    device = MI300X.with_libraries(Library("aiter", version))
    assert rejections("ROCM_AITER", bf16_layer(), device) == []


def test_a_broken_library_is_remembered(name, monkeypatch):
    monkeypatch.setattr(libraries, "_broken", {})
    for module in list(sys.modules):
        if module.split(".")[0] == MODULES[name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(BackendFailure, match="cannot be imported here"):
        BACKENDS[name].get_impl_cls()(4, 16, 1.0)
    assert list(libraries._broken) == [MODULES[name]]


def test_the_triton_build_of_flash_attn_is_rejected(monkeypatch):
    install_flash_attn(monkeypatch, runs_triton=True)
    with pytest.raises(BackendFailure, match="Unset FLASH_ATTENTION_TRITON_AMD_ENABLE"):
        FlashAttnImpl(4, 16, 1.0)


def test_aiter_without_ck_is_rejected(monkeypatch):
    install_aiter(monkeypatch, has_ck=False)
    with pytest.raises(BackendFailure, match="Unset ENABLE_CK"):
        AiterImpl(4, 16, 1.0)


def test_a_reason_names_the_alternative(name):
    spec = bf16_layer(alibi=True, sliding_window=9)
    (reason,) = BACKENDS[name].check_combination(spec, MI300X)
    assert str(reason) == (
        "alibi: alibi with sliding_window is not supported; supported: alibi without sliding_window"
    )


def test_declared_fields_are_within_those_of_triton(name):
    """Every field is declared, and none is wider than what TRITON_ATTN computes for decodes."""
    fields = BACKENDS[name].capabilities.fields
    assert fields.keys() == TritonAttnBackend.capabilities.fields.keys()
    some = [{"head_size": size} for size in (8, 256, 264)] + [{"sliding_window": 2**40}]
    some += [{"sinks": True}, {"kv_cache_dtype": "float64"}, {"dtype": torch.float32}]
    for spec in (bf16_layer(**changes) for changes in some):
        for field, constraint in fields.items():
            value = getattr(spec, field)
            wider = TritonAttnBackend.capabilities.fields[field]
            assert wider.accepts(value, spec, MI300X) or not constraint.accepts(value, spec, MI300X)
