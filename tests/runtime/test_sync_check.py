"""ATTN_DISPATCH_CHECK=sync: a step that waits for the device is an error that names the line."""

from __future__ import annotations

import types

import pytest
import torch

from attn_dispatch.conformance.probes import is_request, refusals
from attn_dispatch.errors import DeviceWaitError, UnsupportedError
from attn_dispatch.interface.capability import compare_availability
from attn_dispatch.interface.kv_access import write_kv_cache
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms import waits
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.selection.failure_record import BackendFallbackWarning, failures, forget_failures
from attn_dispatch.selection.registry import registry
from support.cases import INT8, Case, Step, call, layer_of, layer_spec
from support.fallback import faulty
from support.selection import make_backend, registered

MIXED = {"query_lens": (3, 1, 2, 1), "seq_lens": (3, 9, 6, 5)}
#: What PyTorch raises.
WAIT = "called a synchronizing CUDA operation"


@pytest.fixture(autouse=True)
def _no_failures():
    forget_failures()
    yield
    forget_failures()


class DebugMode:
    """Takes the place of torch.cuda on a machine with a GPU."""

    def __init__(self):
        self.mode, self.history = "default", []

    def is_available(self):
        return True

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        self.history.append(mode)


@pytest.fixture
def debug_mode(monkeypatch):
    mode = DebugMode()
    monkeypatch.setattr(waits, "torch", types.SimpleNamespace(cuda=mode))
    return mode


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "sync")


# --- The mechanism, on any machine ---------------------------------------------------------------


def test_batch_metadata_and_call_are_checked(debug_mode, checked):
    seen = []

    class Watching(make_backend("WATCHING").get_impl_cls()):
        def forward(self, *args, **named):
            seen.append(debug_mode.mode)
            return super().forward(*args, **named)

    backend = make_backend("WATCHING")
    backend.get_impl_cls = staticmethod(lambda: Watching)
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(backend):
        layer = layer_of(step, backend="WATCHING")
        for part in (step._make_batch, lambda: layer.build_metadata(step.batch)):
            debug_mode.history.clear()
            part()
            assert debug_mode.history == ["error", "default"]
        step.check(call(layer, step))
    assert seen == ["error"]
    assert debug_mode.mode == "default"


@pytest.mark.parametrize("value", [None, "0", "1", "shadow"])
def test_nothing_is_set_without_the_check(debug_mode, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
    step = Step(Case(spec=layer_spec(), **MIXED))
    layer = layer_of(step)
    step.check(call(layer, step))
    assert debug_mode.history == []


def test_nothing_is_checked_without_a_gpu(checked, monkeypatch):
    cuda = DebugMode()
    cuda.is_available = lambda: False
    monkeypatch.setattr(waits, "torch", types.SimpleNamespace(cuda=cuda))
    step = Step(Case(spec=layer_spec(), **MIXED))
    step.check(call(layer_of(step), step))
    assert cuda.history == []


@pytest.mark.parametrize("override", [None, "prefill=REFERENCE"], ids=["whole", "routed"])
@pytest.mark.parametrize("where", ["plan", "launch"])
def test_a_wait_is_an_error_and_no_failure_of_the_backend(debug_mode, checked, where, override):
    """Another backend must not serve the call: the wait would never be seen."""
    step = Step(Case(spec=layer_spec(), **MIXED))
    phase = None if override is None else Phase.DECODE
    with registered(faulty(where, RuntimeError(WAIT), phase=phase)):
        layer = layer_of(step, backend=override)
        with pytest.raises(DeviceWaitError, match=r"fallback\.py:\d+, in reach: `raise error`"):
            call(layer, step)
    assert failures() == ()
    assert debug_mode.mode == "default"


def test_a_wait_while_metadata_is_built_is_an_error(debug_mode, checked):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("plan", RuntimeError(WAIT))):
        layer = layer_of(step)
        with pytest.raises(DeviceWaitError, match="waits for the device"):
            layer.build_metadata(step.batch)
    assert failures() == ()


def test_other_errors_still_fall_back(debug_mode, checked):
    step = Step(Case(spec=layer_spec(), **MIXED))
    with registered(faulty("launch")), pytest.warns(BackendFallbackWarning):
        step.check(call(layer_of(step), step))
    assert debug_mode.mode == "default"


def test_the_line_is_the_last_one_outside_of_pytorch(debug_mode, checked):
    def item():
        raise RuntimeError(WAIT)

    @waits.never_waits
    def step():
        return torch.utils._pytree.tree_map(lambda _: item(), [1])

    with pytest.raises(DeviceWaitError, match=r"test_sync_check\.py:\d+, in item"):
        step()


# --- Every backend's step, on a GPU --------------------------------------------------------------

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
#: Requests whose phases alternate are gathered by phase; of the last, one pads the batch.
STEPS = {
    "decode": {"query_lens": (1, 1, 1), "seq_lens": (39, 4, 170)},
    "verification": {
        "query_lens": (4, 1, 3),
        "seq_lens": (39, 4, 170),
        "max_decode_query_len": 4,
    },
    "prefill": {"query_lens": (37, 90), "seq_lens": (37, 90), "padding": 3},
    "mixed": {"query_lens": (1, 40, 1, 70, 0), "seq_lens": (39, 40, 4, 170, 9)},
}
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 9},
    "bounds": {"lengths": "upper_bound"},
    "bounds, window": {"lengths": "upper_bound", "sliding_window": 9},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "lse": {"returns_lse": True},
    "mask": {"custom_mask": True},
    "ranges": {"bidirectional_ranges": True},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "int8": {"kv_cache_dtype": INT8},
}


def _backends():
    if not torch.cuda.is_available():
        return ["REFERENCE"]  # the tests are skipped
    profile = detect_device(torch.device("cuda"))
    found = ((c.name, c.backend_cls) for c in registry.candidates().values())
    return [n for n, cls in found if cls and not compare_availability(cls.capabilities, profile)]


def _gpu_step(backend, fields, step):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "block_size": 16}
    spec = layer_spec(**{"dtype": torch.bfloat16, **sizes, **fields})
    cls = registry.candidates()[backend].backend_cls
    profile = detect_device(torch.device("cuda"))
    if not is_request(spec) or refusals(cls, spec, profile):
        pytest.skip(f"{backend} does not declare it")
    case = dict(STEPS[step])
    if spec.lengths == "upper_bound":
        case["bounds"] = tuple(n + 5 * i for i, n in enumerate(case["seq_lens"]))
    if spec.bidirectional_ranges:
        case["ranges"] = ((1, 1, 4),)
    return Step(Case(spec=spec, **case), "cuda")


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", _backends())
def test_no_backend_waits(backend, step, fields, checked):
    """The first step and another one: a new batch, its metadata, the cache write, the layer."""
    step = _gpu_step(backend, FIELDS[fields], step)
    try:
        layer = layer_of(step, backend=backend)
    except UnsupportedError as error:  # a library that it needs turned out to be broken
        pytest.skip(str(error))
    if backend == "REFERENCE" and step.case.bounds is not None:
        with pytest.raises(DeviceWaitError, match=r"contents\.py:\d+, in with_exact_lengths"):
            call(layer, step)
        return
    for _ in range(2):
        step.batch = step._make_batch()
        found = call(layer, step)
        step.check(found[0] if step.spec.returns_lse else found)


@pytest.mark.parametrize(
    "order", ["prefill={},decode=TRITON_ATTN", "prefill=TRITON_ATTN,decode={}"]
)
@pytest.mark.parametrize("backend", _backends())
def test_a_routed_layer_does_not_wait(backend, order, checked):
    step = _gpu_step(backend, {}, "mixed")
    layer = layer_of(step, backend=order.format(backend))
    for _ in range(2):
        step.batch = step._make_batch()
        step.check(call(layer, step))


def test_derived_slots_do_not_wait(checked):
    step = _gpu_step("REFERENCE", {"lengths": "upper_bound"}, "mixed")
    case = step.case
    batch = type(step.batch).create(
        case.query_lens,
        step.batch.seq_lens,
        lengths="upper_bound",
        seq_lens_upper_bound=case.bounds,
        block_table=step._table,
        block_size=step.spec.block_size,
        device="cuda",
    )
    assert torch.equal(batch.slot_mapping, step.batch.slot_mapping)


def test_writing_to_a_cache_does_not_wait(checked):
    step = _gpu_step("REFERENCE", {"kv_cache_dtype": "fp8_e4m3"}, "mixed")
    slots = step.batch.slot_mapping
    waits.never_waits(write_kv_cache)(step.key, step.value, step.kv_cache.clone(), slots, 0.5, 0.5)


def test_an_actual_wait_is_named(checked):
    """PyTorch's own report, on the real device."""

    @waits.never_waits
    def waiting(tensor):
        return tensor.sum().item()

    with pytest.raises(DeviceWaitError, match=r"in waiting: `return tensor\.sum\(\)\.item\(\)`"):
        waiting(torch.ones(3, device="cuda"))
    assert torch.cuda.get_sync_debug_mode() == 0
    with forward_context(None):
        torch.ones(
            3, device="cuda"
        ).sum().item()  # outside of the library's code, nothing is checked


for _test in (
    test_no_backend_waits,
    test_a_routed_layer_does_not_wait,
    test_derived_slots_do_not_wait,
    test_writing_to_a_cache_does_not_wait,
    test_an_actual_wait_is_named,
):
    _test.pytestmark = [*getattr(_test, "pytestmark", []), *NEEDS_GPU]
