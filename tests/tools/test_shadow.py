"""ATTN_DISPATCH_CHECK=shadow: faults are caught, and right results are not reported."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given

from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.conformance import shadow
from attn_dispatch.conformance.shadow import ShadowDriftWarning, report, reset
from attn_dispatch.environment import shadow_interval
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.selection import failure_record
from support.cases import FP8, INT8, Case, Step, call, layer_of, layer_spec
from support.selection import make_backend, registered
from support.strategies import cases
from support.wrong_backend import wrong

MIXED = {"query_lens": (3, 1, 2, 1), "seq_lens": (3, 9, 6, 5)}
LONG = {"query_lens": (40, 1, 20), "seq_lens": (40, 70, 50)}


@pytest.fixture(autouse=True)
def _shadow(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "shadow:1")
    reset()
    yield
    reset()
    failure_record.forget_failures()


def drifting(text):
    return pytest.warns(ShadowDriftWarning, match=text)


def run(step, backend, **more):
    """A call of a new layer on one backend, and what was found of it."""
    layer = layer_of(step, backend=backend, prefix="model.layers.3.attn", **more)
    call(layer, step)
    return report()[-1]


def replacing(change):
    """A backend like REFERENCE whose output and lse go through `change(output, lse, batch)`."""

    class Impl(ReferenceImpl):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, *more, **named):
            arguments = (layer, query, key, value, kv_cache, attn_metadata)
            result = super().forward(*arguments, *more, **named)
            output, lse = result if self.returns_lse else (result, None)
            change(output, lse, attn_metadata.batch)
            return result

    backend = make_backend("WRONG")
    backend.get_impl_cls = staticmethod(lambda: Impl)
    return backend


# --- What is wrong -----------------------------------------------------------------------------

#: Fault -> a layer that shows it, and what is said.
FAULTS = {
    "drops the soft cap": ({"logits_soft_cap": 0.5}, "output is that of no soft cap"),
    "ignores ALiBi": ({"alibi": True}, "output is that of no slopes"),
    "ignores sinks": ({"sinks": True}, "output is that of no sinks"),
    "window off by one": ({"sliding_window": 4}, "the window is off by one"),
    "lse in base 2": ({"returns_lse": True}, "the lse is in base 2"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(fault, dtype):
    fields, text = FAULTS[fault]
    step = Step(Case(spec=layer_spec(dtype=dtype, **fields), **LONG))
    with registered(wrong.wrong_backend(fault)), drifting(text) as caught:
        found = run(step, "WRONG")
    assert (found.calls, found.compared, found.drifted) == (1, 1, 1)
    assert found.error > found.allowed > 0
    message = str(caught[0].message)
    assert message.startswith("Layer model.layers.3.attn#")
    assert "WRONG: " in message
    assert found.message in message


def test_scales_that_are_ignored_are_named():
    class Impl(ReferenceImpl):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, *more, **named):
            self.write_kv(layer, key, value, kv_cache, attn_metadata.batch)
            plain = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=layer._v_scale)
            return super().forward(
                plain, query, None, None, kv_cache, attn_metadata, *more, **named
            )

    backend = make_backend("WRONG")
    backend.get_impl_cls = staticmethod(lambda: Impl)
    step = Step(Case(spec=layer_spec(dtype=torch.float32, kv_cache_dtype="fp8_e4m3"), **LONG))
    with registered(backend), drifting("the cache's keys have a k_scale"):
        run(step, "WRONG")


def test_fault_without_effect_is_not_reported():
    step = Step(Case(spec=layer_spec(dtype=torch.bfloat16), **LONG))
    with registered(wrong.wrong_backend("drops the soft cap")):
        assert run(step, "WRONG").drifted == 0


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_warning_names_the_wrong_place(value):
    """One value of the second request: its token 4 of 20, head 2."""

    def change(output, lse, batch):
        output[batch.query_start_list[2] + 4, 2, 5] += value

    step = Step(Case(spec=layer_spec(dtype=torch.float16), **LONG))
    with registered(replacing(change)), drifting("worst in request 2, token 4, head 2"):
        run(step, "WRONG")


def test_row_without_keys_must_be_0():
    def change(output, lse, batch):
        output[batch.query_start_list[1]] = 1.0

    case = Case(spec=layer_spec(), query_lens=(2, 1), seq_lens=(5, 0))
    with registered(replacing(change)), drifting("sees no key|off by"):
        run(Step(case), "WRONG")


def test_wrong_part_of_a_routed_batch_is_named():
    def change(output, lse, batch):
        output.mul_(1.5)

    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(replacing(change)), drifting("WRONG: .* in request [13]"):
        run(step, "prefill=REFERENCE,decode=WRONG")


def test_layer_warns_once_and_keeps_counting():
    def change(output, lse, batch):
        output.mul_(1.5)

    step = Step(Case(spec=layer_spec(block_size=None), query_lens=(3,), seq_lens=(3,)))
    with registered(replacing(change)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = [layer_of(step, backend="WRONG") for _ in range(2)]
        for layer in layers * 3:
            call(layer, step)
    assert [each.category for each in caught] == [ShadowDriftWarning] * 2
    assert [(found.compared, found.drifted) for found in report()] == [(3, 3)] * 2


# --- NaN and infinity --------------------------------------------------------------------------

NAN, INF = torch.nan, torch.inf
#: What is planted in requests 0 and 2 of LONG.
PLANTED = {
    "NaN in a query": (("query", 2, 7, 8, NAN),),
    "infinite query": (("query", 2, 7, 8, INF),),
    "NaN in a key": (("key", 0, 30, 31, NAN), ("key", 2, 33, 34, NAN)),
    "infinite key": (("key", 0, 30, 31, INF),),
    "NaN in a value": (("value", 0, 30, 31, NAN), ("value", 2, 3, 4, NAN)),
    "infinite value": (("value", 2, 33, 34, -INF),),
    "all keys infinite": (("key", 2, 0, 50, INF),),
}
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 9},
    "lse": {"returns_lse": True},
    "int8": {"kv_cache_dtype": INT8},
    "16 bits": {"dtype": torch.bfloat16},
}


def planted(name, fields):
    spec = layer_spec(**{"dtype": torch.float32, "head_size": 32, **FIELDS[fields]})
    return Step(Case(spec=spec, planted=PLANTED[name], **LONG))


def losing_nan(**more):
    def change(output, lse, batch):
        output.nan_to_num_(nan=0.0, posinf=INF, neginf=-INF)
        if lse is not None:
            lse.nan_to_num_(nan=-INF, posinf=INF, neginf=-INF)

    cls = replacing(change)
    for name, value in more.items():
        setattr(cls, name, value)
    return cls


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_expected_nan_is_not_drift(name, fields, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShadowDriftWarning)
        if fields == "lse":
            backend = "REFERENCE"
        found = run(planted(name, fields), backend)
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", PLANTED)
def test_nan_that_becomes_a_number_is_drift(name, fields):
    if name == "infinite value" and fields != "int8":
        pytest.skip("infinity in a value is no NaN where the values are added up")
    with registered(losing_nan()), drifting("has numbers as its output|off by"):
        found = run(planted(name, fields), "WRONG")
    assert found.message.startswith("WRONG: ")
    assert "in request " in found.message


@pytest.mark.parametrize("name", PLANTED)
def test_backend_may_declare_to_lose_nan(name):
    with registered(losing_nan(propagates_nan=False)), warnings.catch_warnings():
        warnings.simplefilter("error", ShadowDriftWarning)
        found = run(planted(name, "lse"), "WRONG")
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


@pytest.mark.parametrize("declares", [True, False])
@pytest.mark.parametrize("value", [NAN, 1.0])
def test_other_requests_are_compared_despite_a_nan(value, declares):
    def change(output, lse, batch):
        output[40, 1] += value  # the decode

    cls = replacing(change)
    cls.propagates_nan = declares
    with registered(cls), drifting("worst in request 1, token 0, head 1"):
        run(planted("NaN in a key", "plain"), "WRONG")


def test_other_rows_of_a_request_are_compared_despite_a_nan():
    def change(output, lse, batch):
        output[2] *= 1.5

    with registered(replacing(change)), drifting("worst in request 0, token 2"):
        run(planted("NaN in a key", "plain"), "WRONG")


# --- What is right -----------------------------------------------------------------------------


@given(cases("TORCH_SDPA", dtypes=(torch.float32, torch.bfloat16)))
def test_right_results_are_not_drift(case):
    # The values of a row of one or two may cancel: then no error is small relative to the largest.
    assume(case.spec.dtype == torch.float32 or case.spec.head_size_v >= 16)
    step = Step(case)
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShadowDriftWarning)
        found = run(step, "TORCH_SDPA")
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


@given(cases("REFERENCE", dtypes=(torch.float64, torch.float16)))
def test_every_feature_can_be_compared(case):
    assume(case.spec.dtype == torch.float64 or case.spec.head_size_v >= 16)
    step = Step(case)
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShadowDriftWarning)
        found = run(step, "REFERENCE")
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


QUANTS = {
    "fp8_e4m3": lambda tokens: {"output_scale": torch.tensor(0.01)},
    "fp8_e4m3_group128": lambda tokens: {"output_block_scale": torch.empty(tokens, 1)},
}


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("quant", QUANTS)
def test_quantized_outputs_are_compared_too(quant, wrong):
    def change(output, lse, batch):
        if wrong:
            output[3] = 0

    fields = {"num_heads": 4, "head_size": 32, "output_quant": quant, "dtype": torch.float32}
    step = Step(Case(spec=layer_spec(**fields), **MIXED))
    with registered(replacing(change)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = layer_of(step, backend="WRONG")
        call(layer, step, **QUANTS[quant](len(step.query)))
    assert report()[-1].failed == ""
    assert [each.category for each in caught] == [ShadowDriftWarning] * wrong
    assert report()[-1].drifted == wrong


@pytest.mark.parametrize("kv_cache_dtype", ["auto", *FP8[:2], INT8])
@pytest.mark.parametrize("kv_sharing", [False, True])
def test_check_changes_no_result(kv_cache_dtype, kv_sharing, monkeypatch):
    fields = {"kv_cache_dtype": kv_cache_dtype, "kv_sharing": kv_sharing}
    step = Step(Case(spec=layer_spec(dtype=torch.float32, **fields), **MIXED))
    found = []
    for value in ("0", "shadow"):
        monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
        layer = layer_of(step, backend="REFERENCE")
        found.append((call(layer, step), layer.kv_cache.view(torch.uint8)))
    (output, cache), (shadowed, shadowed_cache) = found
    assert torch.equal(output, shadowed)
    assert torch.equal(cache, shadowed_cache)


@pytest.mark.parametrize("attn_type", AttentionType)
def test_layers_of_every_type_are_compared(attn_type):
    cached = AttentionType(attn_type).has_kv_cache
    fields = {"attn_type": attn_type, "block_size": 4 if cached else None}
    step = Step(Case(spec=layer_spec(**fields), query_lens=(3, 4), seq_lens=(3, 4)))
    found = run(step, "REFERENCE")
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


# --- Which calls -------------------------------------------------------------------------------


def test_first_and_every_nth_call_are_compared(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "shadow:3")
    step = Step(Case(spec=layer_spec(block_size=None), query_lens=(3,), seq_lens=(3,)))
    layers = [layer_of(step) for _ in range(2)]
    counts = []
    for _ in range(7):
        call(layers[0], step)
        counts.append(report()[0].compared)
    call(layers[1], step)
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert [(found.calls, found.compared) for found in report()] == [(7, 3), (1, 1)]


@pytest.mark.parametrize(("value", "every"), [("shadow", 100), ("shadow:7", 7), ("1", 0), ("", 0)])
def test_interval_comes_from_the_variable(value, every, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
    assert shadow_interval() == every


@pytest.mark.parametrize("value", ["shadow:", "shadow:0", "shadow:-1", "shadow:x", "shadowy"])
def test_interval_must_be_a_number(value, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
    step = Step(Case(spec=layer_spec(), **MIXED))
    with pytest.raises(InvalidInputError, match=r"is not understood.* shadow:N"):
        call(layer_of(step), step)


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_nothing_is_compared_while_the_check_is_off(value, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
    monkeypatch.setattr(shadow, "begin_shadow", None)
    step = Step(Case(spec=layer_spec(), **MIXED))
    step.check(call(layer_of(step), step))
    assert report() == ()


def test_captured_call_is_not_compared(monkeypatch):
    step = Step(Case(spec=layer_spec(), **MIXED))
    layer = layer_of(step)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    call(layer, step)
    assert report() == ()


def test_failed_comparison_warns_once_and_the_call_goes_on(monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(shadow, "copy_of_blocks", fail)
    step = Step(Case(spec=layer_spec(), **MIXED))
    layer = layer_of(step)
    with drifting("cannot be compared with the reference: MemoryError: no room") as caught:
        for _ in range(2):
            step.check(call(layer, step))
    assert len(caught) == 1
    assert report()[0].failed == "MemoryError: no room for a copy"


def test_substitute_is_compared_after_a_fallback():
    class Failing(ReferenceImpl):
        def forward(self, *arguments, **named):
            raise RuntimeError("no kernel image")

    backend = make_backend("TORCH_SDPA")
    backend.get_impl_cls = staticmethod(lambda: Failing)
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(backend):
        layer = layer_of(step)
        with pytest.warns(failure_record.BackendFallbackWarning):
            output = call(layer, step)
    step.check(output)
    assert layer.selections[Phase.DECODE].name == "REFERENCE"
    assert [(found.compared, found.drifted) for found in report()] == [(1, 0)]


def test_lost_device_error_is_raised(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(shadow, "copy_of_blocks", fail)
    step = Step(Case(spec=layer_spec(), **MIXED))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(layer_of(step), step)


# --- On a device -------------------------------------------------------------------------------

#: A layer that every device has a fast backend for.
ORDINARY = {"dtype": torch.bfloat16, "num_heads": 8, "head_size": 64, "block_size": 16}


@pytest.mark.parametrize("lens", [LONG, {"query_lens": (1, 1), "seq_lens": (300, 17)}], ids=str)
def test_picked_backend_does_not_drift(device, lens):
    step = Step(Case(spec=layer_spec(returns_lse=True, **ORDINARY), **lens), device)
    call(layer_of(step), step)
    (found,) = report()
    assert (found.compared, found.drifted, found.failed) == (1, 0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_does_not_contain_the_reference():
    spec = layer_spec(cuda_graph=True, **ORDINARY)
    step = Step(Case(spec=spec, query_lens=(1, 1), seq_lens=(300, 17)), "cuda")
    layer = layer_of(step)
    metadata = layer.build_metadata(step.batch)
    new = (step.query, step.key, step.value)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(*new, attn_metadata=metadata)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(*new, attn_metadata=metadata)
    assert [found.calls for found in report()] == [1]
    output.zero_()
    graph.replay()
    step.check(output)
