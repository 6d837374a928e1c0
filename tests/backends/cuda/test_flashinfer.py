"""FLASHINFER: the arguments of FlashInfer, and the results.

Without FlashInfer and a GPU, a fake with its signatures and conventions computes in PyTorch, and
rejects what FlashInfer would read out of bounds or drop. On a GPU, FlashInfer itself runs.
"""

from __future__ import annotations

import gc
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import fake_flashinfer as fake
from support import vendor_cases
from support.cases import MEMORY, Case, Step
from support.vendor_cases import BRAIN, HALF, spec_of

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.cuda.flashinfer import backend as flashinfer_attn
from attn_dispatch.backends.cuda.flashinfer import plan as flashinfer_plan
from attn_dispatch.backends.cuda.flashinfer.backend import FlashInferBackend, FlashInferImpl
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.conformance import verify
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import compare
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.routing import RoutedBuilder, RoutedImpl

GPU = KNOWN_DEVICES["sm90"].with_libraries(
    Library("flashinfer", version="0.7.2.post1"), Library("triton", version="3.6.0")
)
HAS_GPU = torch.cuda.is_available()
#: A decode, a prompt, a request that pads the batch, a chunk, drafts to verify; no request is long.
MIXED = {"query_lens": (1, 5, 1, 7, 3), "seq_lens": (19, 5, 0, 23, 9)}
DECODES = {"query_lens": (1, 1, 1), "seq_lens": (19, 40, 2)}


@pytest.fixture(autouse=True)
def installed(monkeypatch, request):
    """FlashInfer itself on a GPU, else the fake; no wrapper is left from another test."""
    for cached in (flashinfer_plan._pool, flashinfer_plan.workspace):
        cached.cache_clear()
    fake.MADE.clear()
    fake.COMPILED.clear()
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setitem(sys.modules, "flashinfer", fake.MODULE)
        if HAS_GPU:  # then Triton's kernels, which write the cache, are not interpreted
            monkeypatch.setattr(FlashInferImpl, "write_kv", AttentionImpl.write_kv)


def step_of(fields=(), batch=MIXED, device="cpu", **case):
    return vendor_cases.step_of(fields, batch, device, **case)


def run(step, **more):
    return vendor_cases.run(FlashInferBackend, step, **more)


def check(step, found=None, expected=None):
    vendor_cases.check(step, found or run(step), expected)


# Results.

FEATURES = {
    "plain": {},
    "bfloat16": {"dtype": BRAIN},
    "lse": {"returns_lse": True},
    "not causal": {"causal": False, "returns_lse": True},
    "window": {"sliding_window": 6, "returns_lse": True},
    "window of one": {"sliding_window": 1},
    "window beyond all": {"sliding_window": 2**40},
    "soft cap": {"logits_soft_cap": 2.0, "returns_lse": True},
    "soft cap, window": {"logits_soft_cap": 30.0, "sliding_window": 5},
    "sinks": {"sinks": True},
    "sinks, window": {"sinks": True, "sliding_window": 6},
    "one KV head": {"num_heads": 7, "num_kv_heads": 1},
    "no shared heads": {"num_kv_heads": 4},
    "heads of 128": {"head_size": 128},
    "heads of 256": {"head_size": 256, "num_kv_heads": 1},
    "HND": {"kv_cache_layout": "HND"},
    "blocks of 1": {"block_size": 1, "sliding_window": 6},
    "blocks of 5": {"block_size": 5},
    "blocks of 64": {"block_size": 64},
    "sharing": {"kv_sharing": True},
    "e4m3 cache": {"head_size": 128, "kv_cache_dtype": "fp8_e4m3", "returns_lse": True},
    "e5m2 cache": {"head_size": 128, "kv_cache_dtype": "fp8_e5m2", "kv_cache_layout": "HND"},
    "fp8 cache, soft cap": {"head_size": 128, "kv_cache_dtype": "fp8", "logits_soft_cap": 3.0},
    "cache with a named dtype": {"kv_cache_dtype": "float16"},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_agrees_with_the_oracle(feature, batch):
    step = step_of(FEATURES[feature], batch)
    assert not compare(step.spec, FlashInferBackend.capabilities, GPU)
    assert FlashInferBackend.check_combination(step.spec, GPU) == []
    check(step, expected=step.naive())


@st.composite
def any_cases(draw):
    """A step that the backend declares."""
    sinks, window = draw(st.booleans()), draw(st.sampled_from([None, None, 1, 3, 17]))
    cache = "auto" if sinks else draw(st.sampled_from(["auto", "auto", "fp8_e4m3", "fp8_e5m2"]))
    spec = spec_of(
        num_heads=draw(st.sampled_from([2, 4, 6])),
        num_kv_heads=draw(st.sampled_from([1, 2])),
        head_size=64 if sinks else draw(st.sampled_from([128] if cache != "auto" else [64, 128])),
        dtype=draw(st.sampled_from([HALF, BRAIN])),
        block_size=draw(st.sampled_from([1, 3, 16, 64])),
        kv_cache_layout=draw(st.sampled_from(["NHD", "HND"])),
        kv_cache_dtype=cache,
        causal=window is not None or draw(st.booleans()),
        sliding_window=window,
        logits_soft_cap=None if sinks else draw(st.sampled_from([None, None, 2.0, 50.0])),
        sinks=sinks,
        kv_sharing=draw(st.booleans()),
        returns_lse=not sinks and draw(st.booleans()),
    )
    lens = draw(
        st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 9]), st.integers(0, 40)), max_size=5)
    )
    seq_lens = tuple(0 if (query, past) == (1, 0) else query + past for query, past in lens)
    return Case(
        spec=spec,
        query_lens=tuple(query for query, _ in lens),
        seq_lens=seq_lens,
        brings_keys=draw(st.booleans()),
        memory=draw(st.sampled_from(MEMORY)),
        padding=draw(st.sampled_from([0, 3])),
        max_decode_query_len=draw(st.sampled_from([1, 2])),
        seed=draw(st.integers(0, 99)),
    )


@given(case=any_cases())
def test_any_step_agrees_with_the_reference(case):
    check(Step(case))


@pytest.mark.parametrize("new_lens", [(7, 5), (0, 5), (0, 0)], ids=str)
def test_cross_attention(new_lens):
    fields = {"attn_type": AttentionType.ENCODER_DECODER, "returns_lse": True}
    check(step_of(fields, {"query_lens": (3, 1), "seq_lens": (7, 5), "new_lens": new_lens}))


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_a_scale_need_not_be_positive(scale):
    step = step_of({"returns_lse": True, "logits_soft_cap": 4.0})
    expected = step_of({"returns_lse": True, "logits_soft_cap": 4.0})
    step.scale = expected.scale = scale
    check(step, expected=expected.expected())


def test_layers_of_one_plan_may_differ_in_scale():
    step, other = step_of(), step_of()
    metadata = step.metadata_of(FlashInferBackend)
    other.scale = 3 * step.scale
    for each in (step, other):
        impl, cache = each.impl_of(FlashInferBackend), each.kv_cache.clone()
        arguments = (each.layer, each.query, each.key, each.value, cache, metadata)
        check(each, (impl.forward(*arguments), None))
    assert len(fake.MADE) == len(metadata.calls)


def test_the_log_sum_exp_has_base_e_and_includes_every_key():
    step = step_of({"returns_lse": True, "causal": False}, DECODES)
    lse = run(step)[1]
    scores = torch.einsum("qhd,khd->qhk", step.queries[0], step.keys[0].repeat_interleave(2, 1))
    wanted = (step.scale * scores).logsumexp(-1)[0].float()
    torch.testing.assert_close(lse[0], wanted, rtol=1e-3, atol=1e-3)


# What must not reach a result: NaN, freed blocks, padding.


def test_rows_without_keys_are_zero_and_minus_infinity():
    """A request without keys, and queries before the first key."""
    batch = {"query_lens": (2, 6, 1), "seq_lens": (0, 3, 9), "brings_keys": False}
    step = step_of({"returns_lse": True, "kv_sharing": True}, batch)
    output, lse = run(step)
    check(step, (output, lse))
    assert not output[:5].any()
    assert bool((lse[:5] == -torch.inf).all())
    assert bool(lse[5:].isfinite().all())


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"), [((1, 2), (0, 0)), ((), ()), ((0, 0), (5, 0))], ids=str
)
def test_flashinfer_is_not_called_without_keys(query_lens, seq_lens):
    batch = {"query_lens": query_lens, "seq_lens": seq_lens}
    step = step_of({"returns_lse": True}, batch, brings_keys=False, padding=2)
    output, lse = run(step)
    assert not output.any()
    assert bool((lse == -torch.inf).all())
    assert not fake.MADE


@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, 0])
def test_blocks_that_the_window_has_passed_are_not_read(garbage):
    """They may be freed: used by another request, NaN, or no block at all."""
    step = step_of({"sliding_window": 3}, {"query_lens": (2, 1), "seq_lens": (12, 13)})
    expected = step.expected()
    for request in (0, 1):
        step.kv_cache[step.batch.block_table[request, :2].long()] = torch.nan
        step.batch.block_table[request, :2] = garbage
    check(step, expected=expected)


def test_padding_rows_are_zero():
    step = step_of({"returns_lse": True}, padding=4)
    output, lse = run(step, output=torch.full(step.query.shape, torch.nan, dtype=HALF))
    assert not output[-4:].any()
    assert bool((lse[-4:] == -torch.inf).all())


def test_a_layer_that_shares_a_cache_does_not_write_it():
    step = step_of({"kv_sharing": True})
    before = step.kv_cache.clone()
    step.forward(FlashInferBackend, step.kv_cache)
    assert torch.equal(before.view(torch.int16), step.kv_cache.view(torch.int16))


def test_a_strided_output_is_filled():
    step = step_of()
    output = torch.empty(17, 4, 128, dtype=HALF)[..., ::2]
    assert run(step, output=output)[0] is output
    check(step, (output, None))


# Plans.


def test_plans_of_two_batches_do_not_interfere():
    """A wrapper keeps its plan, and two batches may be alive."""
    steps = [step_of(), step_of({}, DECODES), step_of({}, MIXED | {"seq_lens": (30, 5, 0, 7, 3)})]
    built = [step.metadata_of(FlashInferBackend) for step in steps]
    for metadata in built:
        assert metadata.calls
    for step, metadata in zip(steps, built, strict=True):
        arguments = (step.layer, step.query, step.key, step.value, step.kv_cache.clone(), metadata)
        check(step, (step.impl_of(FlashInferBackend).forward(*arguments), None))


def test_a_wrapper_is_reused_after_its_plan_is_dropped():
    for _ in range(5):
        run(step_of({}, DECODES))
        gc.collect()
    assert len(fake.MADE) == 1
    run(step_of({"sinks": True}, DECODES))
    run(step_of({"sinks": True, "sliding_window": 4}, DECODES))
    assert len(fake.MADE) == 3


def test_a_wrapper_is_not_reused_before_its_plan_is_copied(monkeypatch):
    copied = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(flashinfer_plan, "record_event", lambda device: copied)
    for number in (1, 2):
        run(step_of({}, DECODES))
        gc.collect()
        assert len(fake.MADE) == number
    copied.query = lambda: True
    run(step_of({}, DECODES))
    assert len(fake.MADE) == 2


@pytest.mark.parametrize(("fields", "prefill"), [({}, "fa3"), ({"sinks": True}, "fa2"),
    ({"head_size": 128, "kv_cache_dtype": "fp8"}, "fa2")], ids=str)  # fmt: skip
def test_prefills_on_hopper_use_fa3(monkeypatch, fields, prefill):
    monkeypatch.setattr(flashinfer_attn, "detect_device", lambda device: KNOWN_DEVICES["sm90"])
    check(step_of(fields))
    assert {wrapper.backend for wrapper in fake.MADE} == {prefill, "fa2"}
    for name in ("sm80", "sm100", "sm120"):
        profile = KNOWN_DEVICES[name]
        monkeypatch.setattr(flashinfer_attn, "detect_device", lambda device, at=profile: at)
        builder = FlashInferBackend.get_builder_cls()(spec_of(**fields), torch.device("cpu"))
        assert set(builder.kernels.values()) == {"fa2"}


@pytest.mark.skipif(HAS_GPU, reason="needs Triton's interpreter")
def test_each_phase_may_have_its_own_backend():
    """Decodes by FlashInfer, prefills by Triton; each writes its own part."""
    step = step_of()
    classes = {Phase.PREFILL: TritonAttnBackend, Phase.DECODE: FlashInferBackend}
    impls = {phase: step.impl_of(cls) for phase, cls in classes.items()}
    builders = {
        phase: cls.get_builder_cls()(step.spec, step.device) for phase, cls in classes.items()
    }
    metadata = RoutedBuilder(builders).build(step.batch)
    output = torch.empty(step.query.shape, dtype=HALF)
    with forward_context(step.batch):
        RoutedImpl(impls, classes).forward(
            step.layer, step.query, step.key, step.value, step.kv_cache.clone(), metadata, output
        )
    check(step, (output, None))


# Graphs.


def state_of(spec, size, device="cpu", builder=None):
    runner = SimpleNamespace(
        metadata_builder=builder or FlashInferBackend.get_builder_cls()(spec, torch.device(device)),
        device=torch.device(device),
        max_blocks_per_request=12,
        max_seq_len=48,
    )
    state = FlashInferBackend.get_state_cls()(runner)
    with state.graph_capture(size):
        pass
    return state


def padded(step, size):
    """The step's rows, followed by those of a graph's padding requests."""
    for name in ("query", "key", "value"):
        rows = getattr(step, name)
        filled = torch.full((size, *rows.shape[1:]), 3.0, dtype=rows.dtype, device=rows.device)
        filled[: len(rows)] = rows
        setattr(step, name, filled)
    return step.layer, step.query, step.key, step.value


GRAPHS = [{}, {"sliding_window": 5, "returns_lse": True}, {"sinks": True}, {"logits_soft_cap": 3.0}]


@pytest.mark.parametrize("fields", GRAPHS, ids=str)
@pytest.mark.parametrize("size", [4, 8])
def test_a_replay_plans_into_the_captured_buffers(fields, size, monkeypatch):
    """A smaller step after a larger one; the fake reads the buffers when it runs."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # a copy, as for a GPU tensor
    spec = spec_of(cuda_graph=True, **fields)
    state = state_of(spec, 8).graph_clone(8)
    captured = state.graph_capture_get_metadata_for_batch(size)
    buffers = state.get_graph_input_buffers(captured)
    addresses = [buffer.data_ptr() for buffer in captured.graph.call.wrapper.buffers]
    for seq_lens in ((40, 3, 16, 33), (9, 30, 1)):
        step = step_of(
            {"cuda_graph": True, **fields},
            {"query_lens": (1,) * len(seq_lens), "seq_lens": seq_lens},
        )
        expected = step.expected()
        state.prepare_graph_input_buffers(buffers, step.metadata_of(FlashInferBackend))
        impl, arguments = step.impl_of(FlashInferBackend), padded(step, size)
        found = impl.forward(*arguments, step.kv_cache.clone(), captured)
        output, lse = found if spec.returns_lse else (found, None)
        check(step, (output, lse), expected)
        assert not output[len(seq_lens) :].any()
        if lse is not None:
            assert bool((lse[len(seq_lens) :] == -torch.inf).all())
    wrapper = captured.graph.call.wrapper
    assert addresses == [buffer.data_ptr() for buffer in wrapper.buffers]
    assert len(fake.MADE) == 1  # the steps' own metadata planned nothing


def test_a_replay_waits_until_the_last_plan_is_copied(monkeypatch):
    waited = []
    event = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(flashinfer_plan, "record_event", lambda device: event)
    spec = spec_of(cuda_graph=True)
    state = state_of(spec, 4)
    captured = state.graph_capture_get_metadata_for_batch(4)
    assert not waited
    step = step_of({"cuda_graph": True}, DECODES)
    buffers = state.get_graph_input_buffers(captured)
    state.prepare_graph_input_buffers(buffers, step.metadata_of(FlashInferBackend))
    assert waited == [True]


def test_graphs_with_a_backend_for_each_phase():
    """The state finds its own part of the metadata."""
    spec, device = spec_of(cuda_graph=True), torch.device("cpu")
    builders = {
        Phase.PREFILL: TritonAttnBackend.get_builder_cls()(spec, device),
        Phase.DECODE: FlashInferBackend.get_builder_cls()(spec, device),
    }
    state = state_of(spec, 4, builder=RoutedBuilder(builders))
    captured = state.graph_capture_get_metadata_for_batch(4)
    buffers = state.get_graph_input_buffers(captured)
    step = step_of({"cuda_graph": True}, DECODES)
    expected = step.expected()
    state.prepare_graph_input_buffers(buffers, state.runner.metadata_builder.build(step.batch))
    impl, arguments = step.impl_of(FlashInferBackend), padded(step, 4)
    found = impl.forward(*arguments, step.kv_cache.clone(), captured.decode_metadata)
    check(step, (found, None), expected)


# Rejections.

REJECTED = {
    "window both ways": ({"sliding_window": 4, "causal": False}, "sliding_window"),
    "another dtype": ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
    "fp8 heads of 64": ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype"),
    "graph over fp8": (
        {"head_size": 128, "kv_cache_dtype": "fp8", "cuda_graph": True},
        "cuda_graph",
    ),
    "sinks of 128": ({"sinks": True, "head_size": 128}, "sinks"),
    "capped sinks": ({"sinks": True, "logits_soft_cap": 2.0}, "sinks"),
    "sinks and lse": ({"sinks": True, "returns_lse": True}, "sinks"),
    "sinks over fp8": ({"sinks": True, "head_size": 128, "kv_cache_dtype": "fp8"}, "sinks"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_selection_and_builder_reject_combinations(case):
    fields, field = REJECTED[case]
    spec = spec_of(**fields)
    assert not compare(spec, FlashInferBackend.capabilities, GPU)
    assert [reason.field for reason in FlashInferBackend.check_combination(spec, GPU)] == [field]
    with pytest.raises(UnsupportedError, match=f"FLASHINFER does not compute this layer: {field}"):
        FlashInferBackend.get_builder_cls()(spec, torch.device("cpu"))


UNDECLARED = {
    "head_size": {"head_size": 96},
    "head_size_v": {"head_size_v": 128},
    "dtype": {"dtype": torch.float32},
    "kv_cache_dtype": {"kv_cache_dtype": "int8_per_token_head"},
    "kv_scales": {"head_size": 128, "kv_cache_dtype": "fp8", "kv_scales": "per_head"},
    "block_size": {"block_size": None},
    "attn_type": {"attn_type": AttentionType.ENCODER_ONLY},
    "alibi": {"alibi": True},
    "custom_mask": {"custom_mask": True},
    "bidirectional_ranges": {"bidirectional_ranges": True},
    "output_quant": {"output_quant": "fp8_e4m3"},
    "batch_invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("field", UNDECLARED)
def test_undeclared_fields_are_rejected(field):
    reasons = compare(spec_of(**UNDECLARED[field]), FlashInferBackend.capabilities, GPU)
    assert [reason.field for reason in reasons] == [field]
    with pytest.raises(UnsupportedError, match=f"FLASHINFER does not compute this layer: {field}="):
        FlashInferBackend.get_builder_cls()(spec_of(**UNDECLARED[field]), torch.device("cpu"))


def test_impl_rejects_alibi_slopes():
    with pytest.raises(UnsupportedError, match="FLASHINFER does not support alibi_slopes"):
        FlashInferImpl(4, 64, 1.0, alibi_slopes=[1.0] * 4)


def test_a_broken_flashinfer_is_reported(monkeypatch):
    monkeypatch.setattr(libraries, "_broken", {})
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendFailure, match="flashinfer cannot be imported here"):
        FlashInferImpl(4, 64, 1.0)
    assert list(libraries._broken) == ["flashinfer"]


def test_quantized_output_is_rejected():
    output = torch.empty(17, 4, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="does not quantize its output"):
        run(step_of(), output=output, output_scale=torch.ones(()))


def wrong_dtype(step):
    step.query, step.key, step.value = (t.bfloat16() for t in (step.query, step.key, step.value))
    step.kv_cache = step.kv_cache.bfloat16()


def other_fp8(step):
    step.kv_cache = step.kv_cache.view(torch.float8_e5m2)


def other_blocks(step):
    step.kv_cache = torch.zeros(40, 2, 8, 2, 64, dtype=HALF)


def crooked_cache(step):
    flat = torch.zeros(step.kv_cache.numel() + 1, dtype=HALF)
    step.kv_cache = flat[1:].view(step.kv_cache.shape)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (wrong_dtype, {}, "query's dtype is torch.bfloat16, and the layer was described with"),
        (
            other_fp8,
            {"head_size": 128, "kv_cache_dtype": "fp8"},
            "kv_cache's dtype is torch.float8_e5m2",
        ),
        (other_blocks, {}, "kv_cache's block_size is 8"),
        (crooked_cache, {}, "Make the cache by allocate_kv_cache"),
    ],
)
def test_tensors_that_do_not_match_the_plan_are_rejected(change, fields, message):
    step = step_of(fields)
    change(step)
    before = step.kv_cache.clone()
    with pytest.raises(InvalidInputError, match=message):
        step.forward(FlashInferBackend, step.kv_cache)
    assert torch.equal(before.view(torch.uint8), step.kv_cache.view(torch.uint8))


def test_scales_per_head_are_rejected():
    step = step_of({"head_size": 128, "kv_cache_dtype": "fp8"})
    step.layer._k_scale_float = float("nan")
    with pytest.raises(UnsupportedError, match="scales per head"):
        run(step)


def test_a_call_without_a_cache_is_rejected():
    step = step_of({}, {"query_lens": (3,), "seq_lens": (3,)})
    with pytest.raises(UnsupportedError, match="reads a paged cache"):
        step.forward(FlashInferBackend, None)


def test_a_batch_without_a_block_table_is_rejected():
    batch = AttentionBatch.create([3], [3])
    with pytest.raises(InvalidInputError, match="has no block_table, and FLASHINFER"):
        FlashInferBackend.get_builder_cls()(spec_of(), torch.device("cpu")).build(batch)


def test_verify_passes():
    report = verify(FlashInferBackend, "cpu", quick=True, profile=GPU)
    assert report.passed, report.failures


# FlashInfer itself. It compiles each kernel on first use, which takes about 20 seconds.

#: Long enough for several tiles, and for requests to be split.
LONG = {"query_lens": (1, 300, 1, 129, 3), "seq_lens": (700, 300, 0, 600, 70)}
ON_GPU = {
    "plain": {"returns_lse": True},
    "HND": {"kv_cache_layout": "HND", "returns_lse": True},
    "window": {"sliding_window": 70, "returns_lse": True},
    "soft cap": {"logits_soft_cap": 5.0},
    "sinks, window": {"sinks": True, "head_size": 64, "sliding_window": 70},
    "e4m3 cache": {"kv_cache_dtype": "fp8_e4m3", "returns_lse": True},
    "not causal": {"causal": False, "returns_lse": True},
}
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"),
]


def gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


def long_step(fields, **case):
    pytest.importorskip("flashinfer", minversion="0.7.2")
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": BRAIN, "block_size": 16}
    return step_of(sizes | fields, LONG, "cuda", **case)


@gpu
@pytest.mark.parametrize("feature", ON_GPU)
def test_flashinfer_agrees_with_the_reference(feature):
    check(long_step(ON_GPU[feature]))


@gpu
@pytest.mark.parametrize("memory", MEMORY)
def test_flashinfer_reads_queries_of_any_strides(memory):
    check(long_step({"returns_lse": True}, memory=memory, padding=5))


@gpu
def test_flashinfer_does_not_read_before_the_window():
    step = long_step({"sliding_window": 70, "returns_lse": True})
    expected = step.expected()
    for request, (query, seq) in enumerate(zip(*LONG.values(), strict=True)):
        passed = max(0, seq - query - 69) // 16
        step.kv_cache[step.batch.block_table[request, :passed].long()] = torch.nan
        step.batch.block_table[request, :passed] = -1
    check(step, expected=expected)


@gpu
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 7, "returns_lse": True}], ids=str)
def test_flashinfer_in_a_graph_replays_what_eager_computes(fields):
    """Captured once, replayed for other lengths and fewer requests, one after another."""
    pytest.importorskip("flashinfer", minversion="0.7.2")
    sizes = {"num_heads": 8, "head_size": 128, "dtype": BRAIN, "cuda_graph": True}
    spec, size = spec_of(**sizes, **fields), 8
    state = state_of(spec, size, "cuda")
    captured = state.graph_capture_get_metadata_for_batch(size)
    buffers = state.get_graph_input_buffers(captured)
    one = Step(Case(spec=spec, query_lens=(1,), seq_lens=(5,)), "cuda")
    impl = one.impl_of(FlashInferBackend)
    cache = torch.randn(size * 12 + 1, 2, 4, 2, 128, device="cuda").bfloat16()
    query, key, value = (torch.zeros(size, n, 128, dtype=BRAIN, device="cuda") for n in (8, 2, 2))
    arguments = (one.layer, query, key, value, cache, captured)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        impl.forward(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = impl.forward(*arguments)
    table = torch.randperm(size * 12).view(size, 12).int()
    for round_ in range(6):
        count = max(1, size - round_)
        batch = AttentionBatch.create(
            [1] * count, torch.randint(1, 48, (count,)), block_table=table[:count], block_size=4,
            device="cuda",
        )  # fmt: skip
        eager = FlashInferBackend.get_builder_cls()(spec, torch.device("cuda")).build(batch)
        for tensor in (query, key, value):
            tensor.normal_()
        state.prepare_graph_input_buffers(buffers, eager)
        before = cache.clone()
        graph.replay()
        rows = (query[:count], key[:count], value[:count])
        expected = impl.forward(one.layer, *rows, before, eager)
        assert torch.equal(before, cache)
        if spec.returns_lse:
            (replayed_output, replayed_lse), (expected, expected_lse) = replayed, expected
            torch.testing.assert_close(replayed_lse[:count], expected_lse, rtol=2e-3, atol=2e-3)
        else:
            replayed_output = replayed
        torch.testing.assert_close(replayed_output[:count], expected, rtol=2e-2, atol=2e-2)
        assert not replayed_output[count:].any()


@gpu
def test_the_fake_has_the_signatures_of_flashinfer():
    flashinfer = pytest.importorskip("flashinfer", minversion="0.7.2")
    for name, mine in vars(fake.MODULE).items():
        theirs = getattr(flashinfer, name)
        for method in ("__init__", "plan", "run"):
            ours, real = (
                inspect.signature(inspect.unwrap(getattr(cls, method))).parameters
                for cls in (mine, theirs)
            )
            assert list(ours) == list(real)
            assert [p.kind for p in ours.values()] == [p.kind for p in real.values()]
