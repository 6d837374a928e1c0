"""A backend that fails at run time: which one serves the call, which errors are raised."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch

from attn_dispatch import attention, attention_backend, explain, forward_context, resolve
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import OneOf, ReasonCode
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.runtime.recovery import raise_attempt_failed, with_fallback
from attn_dispatch.runtime.routing import RoutedImpl
from attn_dispatch.selection.failure_record import BackendFallbackWarning, failures, forget_failures
from attn_dispatch.selection.resolve import SelectionContext
from attn_dispatch.selection.version import version
from support.cases import FP8, INT8, Case, Step, call, layer_of, layer_spec
from support.fallback import faulty
from support.selection import Forbidden, make_backend, registered

MIXED = {"query_lens": (3, 1, 2, 1), "seq_lens": (3, 9, 6, 5)}
PREFILL = {"query_lens": (3, 5), "seq_lens": (3, 9)}
DECODE = {"query_lens": (1, 1), "seq_lens": (4, 9)}
#: Places where a backend may fail: when it is built, and on a call.
MADE, CALLED = ("impl", "builder"), ("plan", "launch")


@pytest.fixture(autouse=True)
def _no_failures():
    forget_failures()
    yield
    forget_failures()


def names(layer):
    return {str(phase): selection.name for phase, selection in layer.selections.items()}


def tries(backend):
    return next(copy.copy(backend.tries))


def falls_back(text="TORCH_SDPA failed"):
    return pytest.warns(BackendFallbackWarning, match=text)


# --- Fallback ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", [MIXED, PREFILL, DECODE], ids=["mixed", "prefill", "decode"])
@pytest.mark.parametrize("where", MADE + CALLED)
def test_the_next_backend_computes_the_same(where, lens):
    step = Step(Case(spec=layer_spec(returns_lse=True), **lens))
    with registered(faulty(where)), falls_back():
        layer = layer_of(step)
        output, lse = call(layer, step)
        again, _ = call(layer, step)
    step.check(output)
    torch.testing.assert_close(lse, step.expected()[1])
    torch.testing.assert_close(again, output, rtol=0, atol=0)
    assert "REFERENCE" in names(layer).values()


@pytest.mark.parametrize("where", CALLED)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", FP8[0], INT8])
def test_fallback_writes_the_same_cache(where, kv_cache_dtype):
    step = Step(Case(spec=layer_spec(dtype=torch.float32, kv_cache_dtype=kv_cache_dtype), **MIXED))
    right = layer_of(step, backend="REFERENCE")
    call(right, step)
    with registered(faulty(where)), falls_back():
        layer = layer_of(step)
        step.check(call(layer, step))
    assert torch.equal(layer.kv_cache.view(torch.uint8), right.kv_cache.view(torch.uint8))


def test_derived_scales_are_derived_once():
    step = Step(Case(spec=layer_spec(dtype=torch.float32, kv_cache_dtype="fp8_e4m3"), **PREFILL))
    object.__setattr__(step.batch, "enable_kv_scales_calculation", True)
    layers = []
    for backend in (faulty("launch"), make_backend("TORCH_SDPA")):
        forget_failures()
        with registered(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendFallbackWarning)
            layer = layer_of(step)
            layer._cache_state.scales_are_final = False
            call(layer, step)
            layers.append(layer)
    assert layers[0]._cache_state.scales_are_final
    assert layers[0]._k_scale == layers[1]._k_scale
    assert torch.equal(*(each.kv_cache.view(torch.uint8) for each in layers))


def test_a_failure_on_a_later_call_falls_back_there():
    step = Step(Case(spec=layer_spec(), **DECODE))
    with registered(faulty("launch", after=2)):
        layer = layer_of(step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = [call(layer, step), call(layer, step)]
        assert names(layer)["decode"] == "TORCH_SDPA"
        with falls_back("at its launch: RuntimeError: no kernel image"):
            after = call(layer, step)
        assert names(layer)["decode"] == "REFERENCE"
    for output in (*before, after):
        step.check(output)


def test_a_backend_that_fails_in_one_phase_serves_the_other():
    backend = faulty("launch", phase=Phase.PREFILL)
    prefill, decode, mixed = (
        Step(Case(spec=layer_spec(), **lens)) for lens in (PREFILL, DECODE, MIXED)
    )
    with registered(backend):
        layer = layer_of(prefill)
        with falls_back("REFERENCE serves its layers in prefill"):
            prefill.check(call(layer, prefill))
        assert names(layer) == {"prefill": "REFERENCE", "decode": "TORCH_SDPA"}
        assert isinstance(layer._binding.impl, RoutedImpl)
        for step in (decode, mixed):
            layer.kv_cache = step.kv_cache.clone()
            step.check(call(layer, step))
    assert [failure.phase for failure in failures()] == [Phase.PREFILL]


def test_only_the_failed_part_of_a_batch_falls_back():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with (
        registered(faulty("launch", phase=Phase.DECODE), make_backend("SECOND")),
        falls_back("SECOND serves its layers in decode"),
    ):
        layer = layer_of(step, backend="prefill=REFERENCE")
        step.check(call(layer, step))
    assert names(layer) == {"prefill": "REFERENCE", "decode": "SECOND"}


def test_fallback_continues_until_a_backend_works():
    step = Step(Case(spec=layer_spec(), **MIXED))
    others = [faulty("impl"), faulty("plan", name="SECOND"), faulty("launch", name="THIRD")]
    with registered(*others), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = layer_of(step)
        step.check(call(layer, step))
    assert names(layer) == {"prefill": "REFERENCE", "decode": "REFERENCE"}
    assert [str(each.message).split(" failed")[0] for each in caught] == [
        "TORCH_SDPA",
        "SECOND",
        "THIRD",
    ]


def test_an_encoder_falls_back():
    case = Case(
        spec=layer_spec(attn_type=AttentionType.ENCODER_ONLY, block_size=None),
        query_lens=(3, 1),
        seq_lens=(3, 1),
    )
    step = Step(case)
    with registered(faulty("launch")), falls_back():
        layer = layer_of(step)
        step.check(call(layer, step))
    assert names(layer) == {"prefill": "REFERENCE"}


def test_a_preferred_backend_falls_back():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", name="OWN")), falls_back("OWN failed at its launch"):
        layer = layer_of(step, backend="OWN?")
        assert names(layer)["prefill"] == "OWN"
        step.check(call(layer, step))
    assert names(layer)["prefill"] == "TORCH_SDPA"


@pytest.mark.parametrize("given", ["before", "after"])
def test_given_metadata_is_built_again_after_a_fallback(given):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", after=1)), falls_back():
        layer = layer_of(step)
        metadata = layer.build_metadata(step.batch)
        step.check(layer(step.query, step.key, step.value, attn_metadata=metadata))
        if given == "after":
            metadata = layer.build_metadata(step.batch)
        for _ in range(2):
            step.check(layer(step.query, step.key, step.value, attn_metadata=metadata))


def test_build_metadata_falls_back():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("plan")), falls_back("failed when it planned a batch"):
        layer = layer_of(step)
        metadata = layer.build_metadata(step.batch)
        step.check(layer(step.query, step.key, step.value, attn_metadata=metadata))


def test_a_substitute_accepts_the_same_caches():
    """The cache may have been planned for the first, in a layout that SECOND does not take."""
    second = make_backend("SECOND", kv_cache_layout=OneOf(None, "HND"))
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("impl"), second), falls_back("From now on REFERENCE"):
        layer = layer_of(step)
    verdict = next(v for v in layer.selections[Phase.DECODE].verdicts if v.name == "SECOND")
    assert "TORCH_SDPA, which failed, has another layout" in str(verdict.reasons[0])


# --- Warnings and reports ----------------------------------------------------------------------


def test_later_layers_exclude_a_failed_backend_with_the_reason():
    step = Step(Case(spec=layer_spec(), **MIXED))
    backend = faulty("impl")
    with registered(backend):
        with falls_back():
            layer_of(step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            later = layer_of(step)
    assert tries(backend) == 1
    verdict = next(v for v in later.selections[Phase.DECODE].verdicts if v.name == "TORCH_SDPA")
    (reason,) = verdict.reasons
    assert reason.code is ReasonCode.FAILED
    for part in ("when it was built", "RuntimeError: no kernel image", "forget_failures()"):
        assert part in str(later.selections[Phase.DECODE])


def test_earlier_layers_exclude_a_failed_backend():
    step = Step(Case(spec=layer_spec(), **MIXED))
    backend = faulty("launch")
    with registered(backend), falls_back():
        first, second = layer_of(step), layer_of(step)
        for layer in (first, second):
            step.check(call(layer, step))
    assert tries(backend) == 1
    assert names(first) == names(second)


def test_a_failure_does_not_affect_another_spec():
    step = Step(Case(spec=layer_spec(), **MIXED))
    other = Step(Case(spec=layer_spec(head_size=16), **MIXED))
    with registered(faulty("launch", after=0)) as _, falls_back():
        call(layer_of(step), step)
        assert names(layer_of(other))["decode"] == "TORCH_SDPA"


def test_a_failure_warns_once_for_each_backend_and_cause():
    steps = [Step(Case(spec=layer_spec(head_size=size), **MIXED)) for size in (8, 16, 24)]
    with registered(faulty("launch")), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            step.check(call(layer_of(step), step))
    text = str(*(each.message for each in caught if each.category is BackendFallbackWarning))
    assert len(failures()) == 3
    for part in (
        "TORCH_SDPA failed at its launch: RuntimeError: no kernel image is available.",
        "From now on REFERENCE serves",
        "require it by the override TORCH_SDPA",
        "exclude it by -TORCH_SDPA",
    ):
        assert part in text


def test_forgotten_failures_are_tried_again():
    step = Step(Case(spec=layer_spec(), **MIXED))
    backend = faulty("launch")
    with registered(backend):
        layer = layer_of(step)
        with falls_back():
            call(layer, step)
        before = version()
        forget_failures()
        assert version() != before
        with falls_back():
            step.check(call(layer, step))
    assert tries(backend) == 2


# --- Errors ------------------------------------------------------------------------------------

REQUIRED = {
    "argument": lambda make: make(backend="TORCH_SDPA"),
    "phase": lambda make: make(backend="prefill=TORCH_SDPA"),
    "kind": lambda make: make(backend="full=TORCH_SDPA"),
}


@pytest.mark.parametrize("how", REQUIRED)
@pytest.mark.parametrize("where", MADE + CALLED)
def test_a_required_backend_raises_with_its_cause(where, how):
    step = Step(Case(spec=layer_spec(), **PREFILL))
    error = RuntimeError("undefined symbol: _ZN3c10")
    with (
        registered(faulty(where, error)),
        pytest.raises(
            BackendFailure, match=r"undefined symbol.* is required by .*TORCH_SDPA\?"
        ) as caught,
    ):
        call(REQUIRED[how](lambda **more: layer_of(step, **more)), step)
    assert caught.value.__cause__ is error
    assert failures() == ()


@pytest.mark.parametrize("how", ["context", "environment"])
def test_a_backend_required_by_context_or_environment_raises(how, monkeypatch):
    step = Step(Case(spec=layer_spec(), **PREFILL))
    if how == "environment":
        monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "TORCH_SDPA")
    text = "TORCH_SDPA" if how == "context" else ""
    with registered(faulty("launch")):
        with attention_backend(text):
            layer = layer_of(step)
        with pytest.raises(BackendFailure, match="is required by"):
            call(layer, step)


def test_a_required_backend_is_tried_after_it_failed_in_another_layer():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", phase=Phase.PREFILL)):
        with falls_back():
            call(layer_of(step), step)
        required = layer_of(step, backend="TORCH_SDPA")
        assert names(required)["decode"] == "TORCH_SDPA"
        with pytest.raises(BackendFailure, match="is required by"):
            call(required, step)


def test_no_remaining_backend_is_an_error_with_the_reasons():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with (
        registered(faulty("launch")),
        pytest.raises(
            BackendFailure, match=r"(?s)No other backend can take its place.*REFERENCE: excluded"
        ),
    ):
        call(layer_of(step, backend="-REFERENCE,-REFERENCE_MLA"), step)


SEEN = [
    InvalidInputError("the caller's"),
    UnsupportedError("the caller's"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError("none left"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("HIP error: an illegal memory access was encountered"),
    RuntimeError("cudaErrorIllegalAddress at fmha.cu:12"),
    RuntimeError("CUDA driver error: CUDA_ERROR_LAUNCH_FAILED"),
    RuntimeError("hipErrorOutOfMemory"),
    KeyboardInterrupt(),
    SystemExit(3),
]


@pytest.mark.parametrize("error", SEEN, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
@pytest.mark.parametrize("where", MADE + CALLED)
def test_errors_that_no_backend_can_prevent_are_raised_unchanged(where, error):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty(where, error)), pytest.raises(type(error)) as caught:
        call(layer_of(step), step)
    assert caught.value is error
    assert failures() == ()


OWN = [
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: too many resources requested for launch"),
    ImportError("undefined symbol: _ZN3c10"),
    AssertionError("tile sizes"),
    BackendFailure("flash_attn has no flash_attn_varlen_func"),
    KeyError("signature"),
]


@pytest.mark.parametrize("error", OWN, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
def test_errors_of_the_backend_fall_back(error):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", error)), falls_back(type(error).__name__):
        step.check(call(layer_of(step), step))


def test_a_lost_device_is_found_in_the_cause_of_an_error():
    wrapped = RuntimeError("the kernel failed")
    wrapped.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", wrapped)), pytest.raises(RuntimeError, match="kernel failed"):
        call(layer_of(step), step)


@pytest.mark.parametrize("how", ["torch.compiler.is_compiling", "torch.cuda"])
def test_no_fallback_during_capture(how, monkeypatch):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch")):
        layer = layer_of(step)
        if how == "torch.cuda":
            monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
            monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        else:
            monkeypatch.setattr(how, lambda: True)
        output = torch.empty_like(step.query)
        with (
            forward_context(step.batch),
            pytest.raises(BackendFailure, match="Run each step once before it is captured"),
        ):
            layer._run(step.query, step.key, step.value, output, None, None, None)
    assert names(layer)["decode"] == "TORCH_SDPA"
    assert failures() == ()


def test_a_call_of_the_compiled_op_falls_back():
    step = Step(Case(spec=layer_spec(), **MIXED))
    output = torch.empty_like(step.query)
    with registered(faulty("launch")):
        layer = layer_of(step)
        arguments = (step.query, step.key, step.value, output, None, None, None)
        with forward_context(step.batch), falls_back():
            torch.ops.attn_dispatch.attention(*arguments, layer._cache_state.token, layer._op_key)
    step.check(output)


def test_selecting_a_failed_backend_again_is_an_error():
    """Selection never does that; an attempt of this test does."""

    def attempt(context):
        error = RuntimeError("again")
        raise_attempt_failed(error, "TORCH_SDPA", None, "at its launch", context.version)

    context = SelectionContext.current("cpu")
    with pytest.raises(BackendFailure, match="selected again"):
        with_fallback(layer_spec(), context, attempt)
    assert failures() == ()


# --- Threads, copies, the function -------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one layer", "a layer each"])
def test_threads_fall_back_with_one_warning(shared):
    step = Step(Case(spec=layer_spec(block_size=None), query_lens=(3, 5), seq_lens=(3, 5)))
    outputs, errors, start = [], [], threading.Barrier(6)
    with registered(faulty("launch")):
        common = layer_of(step)
        layers = [common if shared else layer_of(step) for _ in range(6)]

        def work(layer):
            start.wait()
            try:
                for _ in range(5):
                    outputs.append(call(layer, step))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert errors == []
    assert len(outputs) == 30
    for output in outputs:
        step.check(output)
    assert [each.category for each in caught].count(BackendFallbackWarning) == 1


def test_a_copy_of_a_layer_works_after_a_fallback():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch")), falls_back():
        layer = layer_of(step)
        call(layer, step)
        twin = copy.deepcopy(layer)
    twin.kv_cache = step.kv_cache.clone()
    step.check(call(twin, step))


@pytest.mark.parametrize("where", MADE + CALLED)
def test_the_function_falls_back_once(where):
    backend = faulty(where)
    query = torch.randn(5, 4, 8, dtype=torch.float64)
    expected = attention(query, query, query, query_lens=[2, 3], backend="REFERENCE")
    with registered(backend):
        with falls_back("REFERENCE serves"):
            output = attention(query, query, query, query_lens=[2, 3])
        again = attention(query, query, query, query_lens=[2, 3])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(again, expected)
    assert tries(backend) == 1


@pytest.mark.parametrize("where", MADE + CALLED)
def test_the_function_raises_for_a_required_backend(where):
    query = torch.randn(5, 4, 8)
    with registered(faulty(where)), pytest.raises(BackendFailure, match="is required by") as caught:
        attention(query, query, query, backend="TORCH_SDPA")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", SEEN, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
def test_the_function_raises_errors_that_no_backend_can_prevent(error):
    query = torch.randn(5, 4, 8)
    with registered(faulty("launch", error)), pytest.raises(type(error)) as caught:
        attention(query, query, query)
    assert caught.value is error


def test_a_call_selects_nothing_while_no_backend_fails(monkeypatch):
    step = Step(Case(spec=layer_spec(), **MIXED))
    layer = layer_of(step)
    monkeypatch.setattr("attn_dispatch.runtime.layer.SelectionContext", Forbidden("the context"))
    step.check(call(layer, step))


def test_fallback_on_this_device(device):
    fields = {"dtype": torch.bfloat16, "num_heads": 8, "head_size": 64, "block_size": 16}
    step = Step(Case(spec=layer_spec(**fields), **MIXED), device)
    with registered(faulty("launch", name="OWN")), falls_back("OWN failed at its launch"):
        layer = layer_of(step, backend="OWN?")
        step.check(call(layer, step))
    assert "OWN" not in names(layer).values()


def test_explain_and_resolve_exclude_a_failed_backend():
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch", phase=Phase.PREFILL)):
        assert resolve(step.spec, "cpu", phase=Phase.PREFILL).name == "TORCH_SDPA"
        with falls_back():
            call(layer_of(step, backend="decode=REFERENCE"), step)
        assert resolve(step.spec, "cpu", phase=Phase.PREFILL).name == "REFERENCE"
        prefill, decode = explain(step.spec, "cpu")
        other, _ = explain(step.spec.replace(head_size=16), "cpu")
        forget_failures()
        assert resolve(step.spec, "cpu", phase=Phase.PREFILL).name == "TORCH_SDPA"
    assert (prefill.picked, decode.picked, other.picked) == (
        "REFERENCE",
        "TORCH_SDPA",
        "TORCH_SDPA",
    )
    (reason,) = next(v.reasons for v in prefill.verdicts if v.name == "TORCH_SDPA")
    assert reason.code is ReasonCode.FAILED
    assert str(reason).startswith("passed over: it failed at its launch: RuntimeError: no kernel")
