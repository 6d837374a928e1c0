"""Calls with arguments that are wrong: one clear error, nothing written, nothing recorded."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    AttnDispatchError,
    BackendFailure,
    BackendFallbackWarning,
    InvalidInputError,
    allocate_kv_cache,
    attention,
    forget_failures,
    forward_context,
)
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.selection.failure_record import (
    MAX_FAILURES,
    Failure,
    failures,
    record,
)
from attn_dispatch.selection.version import version
from support.selection import make_backend, registered

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16}
TOKENS, BLOCKS, BLOCK_SIZE = 5, 6, 4


@pytest.fixture(autouse=True)
def _forget():
    forget_failures()
    yield
    forget_failures()


def make_cache(blocks=BLOCKS, block_size=BLOCK_SIZE):
    shape = kv_cache_shape(blocks, block_size, 2, 16)
    return allocate_kv_cache(shape, STRIDE_ORDERS["NHD"], torch.float32)


def make_inputs(tokens=TOKENS):
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tokens, heads, 16, generator=random)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }


def make_batch(table=((3, 1),), slots=None, **more):
    lens = [TOKENS]
    return AttentionBatch.create(
        lens,
        lens,
        block_table=torch.tensor(table),
        block_size=BLOCK_SIZE,
        slot_mapping=None if slots is None else torch.tensor(slots),
        **more,
    )


def make_layer(**more):
    options = {"dtype": torch.float32, "device": "cpu", "block_size": BLOCK_SIZE}
    return Attention(**HEADS, **(options | more))


def call(layer, cache, batch=None, **changes):
    arguments = make_inputs() | {"kv_cache": cache} | changes
    batch = make_batch() if batch is None else batch
    return layer(attn_metadata=layer.build_metadata(batch), **arguments)


def inference_copy(tensor):
    with torch.inference_mode():
        return tensor.clone()


def overlapping(shape):
    return torch.zeros(1).expand(shape)


SHAPE = (TOKENS, 4, 16)
#: What a value may be instead of a tensor of the right kind.
NOT_TENSORS = {
    "list": [[1.0]],
    "array": np.zeros((TOKENS, 2, 16), np.float32),
    "string": "tensor",
    "number": 3.0,
    "tuple of tensors": (torch.zeros(SHAPE),),
}
BAD_TENSORS = {
    "sparse": torch.zeros(SHAPE).to_sparse(),
    "meta": torch.zeros(SHAPE, device="meta"),
    "integers": torch.zeros(SHAPE, dtype=torch.int64),
    "bools": torch.zeros(SHAPE, dtype=torch.bool),
    "complex": torch.zeros(SHAPE, dtype=torch.complex64),
    "scalar": torch.zeros(()),
    "too few rows": torch.zeros(TOKENS - 1, 4, 16),
    "another head size": torch.zeros(TOKENS, 4, 8),
    "a dimension more": torch.zeros(1, TOKENS, 4, 16),
    "requires grad": torch.zeros(SHAPE, requires_grad=True),
    "bfloat16": torch.zeros(SHAPE, dtype=torch.bfloat16),
}
BAD_OUTPUTS = BAD_TENSORS | {
    "expanded": overlapping(SHAPE),
    "overlapping rows": torch.zeros(1000).as_strided(SHAPE, (32, 16, 1)),
    "made under inference_mode": inference_copy(torch.zeros(SHAPE)),
    "too many rows": torch.zeros(TOKENS + 1, 4, 16),
}
CACHE = tuple(make_cache().shape)
BAD_CACHES = {
    "a list of tensors": [make_cache()],
    "sparse": make_cache().to_sparse(),
    "meta": make_cache().to("meta"),
    "expanded": torch.zeros(1, *CACHE[1:]).expand(CACHE),
    "keys and values in one place": torch.zeros(BLOCKS, 1, *CACHE[2:]).expand(CACHE),
    "requires grad": make_cache().requires_grad_(),
    "made under inference_mode": inference_copy(make_cache()),
    "other blocks": make_cache(block_size=8),
    "another dtype": make_cache().half(),
    "integers": make_cache().long(),
    "three dimensions": torch.zeros(6, 4, 16),
    "other heads": torch.zeros(BLOCKS, 2, BLOCK_SIZE, 3, 16),
}
BAD_CALLS = {
    **{f"query: {k}": {"query": v} for k, v in (NOT_TENSORS | BAD_TENSORS).items()},
    **{f"key: {k}": {"key": v} for k, v in (NOT_TENSORS | BAD_TENSORS).items()},
    **{f"value: {k}": {"value": v} for k, v in (NOT_TENSORS | BAD_TENSORS).items()},
    **{f"output: {k}": {"output": v} for k, v in (NOT_TENSORS | BAD_OUTPUTS).items()},
    **{f"kv_cache: {k}": {"kv_cache": v} for k, v in (NOT_TENSORS | BAD_CACHES).items()},
    "query: None": {"query": None},
    "key without value": {"value": None},
    "output_scale: string": {"output_scale": "1.0"},
    "output_block_scale: tensor": {"output_block_scale": torch.ones(TOKENS, 1)},
}
BAD_BATCHES = {
    "a block beyond the cache": {"table": [[3, 77]]},
    "a negative block": {"table": [[-1, 2]]},
    "a slot beyond the cache": {"slots": [0, 1, 2, 3, 4000]},
    "a slot below -1": {"slots": [0, 1, 2, 3, -2]},
    "a slot for two tokens": {"slots": [0, 1, 2, 3, 3]},
}


def check_nothing_happened(layer, cache, expected, before):
    assert torch.equal(cache, before), "a rejected call wrote to the cache"
    assert failures() == ()
    torch.testing.assert_close(call(layer, cache), expected)
    assert {s.name for s in make_layer().selections.values()} == {"TORCH_SDPA"}


@pytest.mark.parametrize("backend", [None, "REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("what", BAD_CALLS)
def test_one_invalid_call_disables_nothing(what, backend):
    layer, cache = make_layer(backend=backend), make_cache()
    expected, before = call(layer, cache), cache.clone()
    with pytest.raises(AttnDispatchError) as error:
        call(layer, BAD_CALLS[what].get("kv_cache", cache), **BAD_CALLS[what])
    assert not isinstance(error.value, BackendFailure), "the call is wrong, not the backend"
    check_nothing_happened(layer, cache, expected, before)


@pytest.mark.parametrize("is_fresh", [True, False], ids=["new tensors", "modified in place"])
@pytest.mark.parametrize("backend", [None, "REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("what", BAD_BATCHES)
def test_ids_and_slots_on_the_host_are_always_checked(what, backend, is_fresh):
    layer, cache = make_layer(backend=backend), make_cache()
    expected, before = call(layer, cache), cache.clone()
    if is_fresh:
        with pytest.raises(InvalidInputError):
            call(layer, cache, make_batch(**BAD_BATCHES[what]))
    else:
        batch = make_batch()
        call(layer, cache, batch)
        for name, values in BAD_BATCHES[what].items():
            tensor = batch.block_table if name == "table" else batch.slot_mapping
            tensor.copy_(torch.tensor(values))
        with pytest.raises(InvalidInputError):
            call(layer, cache, batch)
    check_nothing_happened(layer, cache, expected, before)


@pytest.mark.parametrize(
    "metadata",
    ["metadata", 3, object(), make_batch(), [None]],
    ids=["string", "number", "object", "batch", "list"],
)
def test_metadata_of_another_kind_is_rejected(metadata):
    layer, cache = make_layer(), make_cache()
    with pytest.raises(InvalidInputError):
        layer(**make_inputs(), kv_cache=cache, attn_metadata=metadata)
    assert not cache.any()


@pytest.mark.parametrize(
    "batch",
    [None, "batch", {}, [make_batch()], 3],
    ids=["None", "string", "dict", "list of batches", "number"],
)
def test_a_batch_of_another_kind_is_rejected(batch):
    layer = make_layer()
    with pytest.raises(InvalidInputError):
        layer.build_metadata(batch)


FUNCTION_VALUES = [
    None, True, -1, 0, 10**30, math.nan, "x", b"x", [], [1], {}, object(), torch.zeros(()),
    torch.zeros(3), torch.zeros(2, 2, 2), np.float32(2), [None], ["a"], torch.float32,
]  # fmt: skip
FUNCTION_NAMES = [
    "query", "key", "value", "query_lens", "seq_lens", "kv_cache", "block_table", "slot_mapping",
    "scale", "causal", "sliding_window", "logits_soft_cap", "alibi_slopes", "alibi", "sinks",
    "custom_mask", "k_scale", "v_scale", "out", "return_lse", "backend",
]  # fmt: skip


@pytest.mark.parametrize("is_paged", [True, False], ids=["paged", "ragged"])
@pytest.mark.parametrize("name", FUNCTION_NAMES)
def test_attention_accepts_a_value_or_rejects_it_with_the_reason(name, is_paged):
    for value in FUNCTION_VALUES:
        cache = make_cache()
        arguments = make_inputs()
        if is_paged:
            arguments |= {"kv_cache": cache, "block_table": torch.tensor([[3, 1]])}
        arguments[name] = value
        error = error_of(functools.partial(attention, **arguments))
        assert not isinstance(error, BackendFailure), value
        assert error is None or not cache.any(), value
        assert failures() == (), value


def error_of(run):
    try:
        run()
    except AttnDispatchError as error:
        return error
    return None


LAYER_NAMES = [
    "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window",
    "kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks",
    "prefix", "dtype", "device", "block_size", "alibi", "backend", "causal", "head_size_v",
    "no_such_field",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_a_layer_accepts_a_value_or_rejects_it_with_the_reason(name):
    options = {**HEADS, "dtype": torch.float32, "device": "cpu"}
    for value in FUNCTION_VALUES:
        with contextlib.suppress(AttnDispatchError):
            Attention(**(options | {name: value}))
        assert failures() == (), value


# --- Memory that overlaps ----------------------------------------------------------------------


def room(rows=2 * TOKENS):
    return torch.randn(rows, 4, 16, generator=torch.Generator().manual_seed(1))


def pairs_in_one_buffer():
    buffer = room()
    yield "the same tensor", buffer[:TOKENS], buffer[:TOKENS]
    yield "a row later", buffer[:TOKENS], buffer[1 : TOKENS + 1]
    yield "a row earlier", buffer[1 : TOKENS + 1], buffer[:TOKENS]
    yield "the last row", buffer[:TOKENS], buffer[TOKENS - 1 : 2 * TOKENS - 1]
    yield "in reverse heads", buffer[:TOKENS], buffer[:TOKENS].transpose(1, 2).reshape(SHAPE)
    flat = buffer.flatten()
    yield "half a row", flat[: TOKENS * 64].view(SHAPE), flat[32 : 32 + TOKENS * 64].view(SHAPE)
    wide = torch.randn(TOKENS, 6, 16)
    yield "heads of one row", wide[:, :4], wide[:, 2:]


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_an_output_over_an_input_is_correct_or_rejected(name, index, backend):
    _, source, out = list(pairs_in_one_buffer())[index]
    inputs = make_inputs()
    inputs[name] = source if name == "query" else source[:, :2]
    expected = attention(**{k: v.clone() for k, v in inputs.items()}, backend=backend)
    before = source.clone()
    error = error_of(lambda: attention(**inputs, out=out, backend=backend))
    if error is None:
        torch.testing.assert_close(out, expected)
    else:
        assert "shares memory" in str(error)
        assert torch.equal(source, before)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_slices_of_one_fused_buffer_that_do_not_overlap_are_accepted(backend):
    fused = torch.randn(TOKENS, 4 + 2 + 2 + 4, 16)
    query, key, value, out = fused.split([4, 2, 2, 4], dim=1)
    expected = attention(query.clone(), key.clone(), value.clone(), backend=backend)
    result = attention(query, key, value, out=out, backend=backend)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, expected)


def test_keys_inside_their_cache_are_rejected():
    cache = make_cache(block_size=8)
    inputs = make_inputs() | {"key": cache[0, 0, :TOKENS]}
    with pytest.raises(InvalidInputError, match="kv_cache shares memory with key"):
        attention(**inputs, kv_cache=cache, block_table=torch.tensor([[3, 1]]))


def test_an_output_in_the_cache_is_rejected():
    cache = make_cache()
    out = cache.view(-1)[: TOKENS * 64].view(SHAPE)
    with pytest.raises(InvalidInputError, match="output shares memory with kv_cache"):
        attention(**make_inputs(), kv_cache=cache, block_table=torch.tensor([[3, 1]]), out=out)


# --- Block sizes -------------------------------------------------------------------------------

SIZES = (4, 8, 16)


@pytest.mark.parametrize("check", ["0", "1", "shadow"])
@pytest.mark.parametrize("of_cache", SIZES)
@pytest.mark.parametrize("of_batch", SIZES)
@pytest.mark.parametrize("of_layer", SIZES)
def test_block_sizes_agree_or_are_rejected(of_layer, of_batch, of_cache, check, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", check)
    layer, cache = make_layer(block_size=of_layer), make_cache(block_size=of_cache)
    batch = AttentionBatch.create(
        [TOKENS], [TOKENS], block_table=torch.tensor([[3, 1]]), block_size=of_batch
    )
    if of_layer == of_batch == of_cache:
        torch.testing.assert_close(call(layer, cache, batch), attention(**make_inputs()))
        return
    with pytest.raises(InvalidInputError, match="block"):
        call(layer, cache, batch)
    assert not cache.any()


# --- Autograd, autocast ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_slopes_and_sinks_that_require_grad_are_rejected_while_autograd_records(name):
    options = {name: torch.ones(4, requires_grad=True)}
    with pytest.raises(InvalidInputError, match="autograd is recording"):
        attention(**make_inputs(), **options)
    with torch.no_grad():
        assert not attention(**make_inputs(), **options).requires_grad
    layer, cache = make_layer(**options), make_cache()
    with pytest.raises(InvalidInputError, match="autograd is recording"):
        call(layer, cache)
    assert not cache.any()


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_forward_mode_differentiation_is_rejected(name):
    inputs = make_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(InvalidInputError, match="forward-mode"):
            attention(**inputs | {name: dual})
        attention(**inputs)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_torch_func_are_rejected(transform):
    inputs = make_inputs()

    def run(query):
        return attention(query, inputs["key"], inputs["value"]).sum()

    query = inputs["query"]
    apply = {
        "vmap": lambda: torch.func.vmap(run)(query[None]),
        "grad": lambda: torch.func.grad(run)(query),
        "jvp": lambda: torch.func.jvp(run, (query,), (query,)),
    }[transform]
    with pytest.raises(InvalidInputError, match=r"torch\.func|forward-mode|autograd"):
        apply()
    assert failures() == ()


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("is_paged", [True, False], ids=["paged", "ragged"])
def test_autocast_changes_nothing(backend, is_paged):
    arguments = make_inputs(64) | {"backend": backend, "logits_soft_cap": None}
    if is_paged:
        arguments |= {"block_table": torch.arange(16)[None]}
    results = []
    for enabled in (False, True):
        if is_paged:
            arguments["kv_cache"] = make_cache(blocks=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(attention(**arguments))
    assert torch.equal(*results)


# --- The record of failures ----------------------------------------------------------------------


def test_the_record_of_failures_is_bounded():
    for size in range(1, 2 * MAX_FAILURES):
        spec = AttentionSpec(num_heads=1, head_size=size, dtype=torch.float32)
        record(Failure("TORCH_SDPA", spec, "cpu", None, "at its launch", "RuntimeError"))
    assert len(failures()) == MAX_FAILURES
    assert failures()[-1].spec.head_size == 2 * MAX_FAILURES - 1


def test_forgetting_and_recording_from_threads():
    start, errors = threading.Barrier(5), []

    def work(index):
        start.wait()
        try:
            for size in range(1, 200):
                if index == 0:
                    forget_failures()
                else:
                    spec = AttentionSpec(num_heads=index, head_size=size, dtype=torch.float32)
                    record(Failure("X", spec, "cpu", None, "at its launch", "RuntimeError"))
                    failures()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    before = version()
    forget_failures()
    assert failures() == ()
    assert version() != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_fork_while_another_thread_holds_the_lock_leaves_the_child_usable():
    from attn_dispatch.selection import failure_record

    held, release = threading.Event(), threading.Event()

    def hold():
        with failure_record._lock:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        forget_failures()
        os._exit(0 if failures() == () else 1)
    try:
        for _ in range(100):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            release.wait(0.1)
        else:
            os.kill(child, 9)
            pytest.fail("the child deadlocked")
    finally:
        release.set()
        thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


# --- Backends of other packages ------------------------------------------------------------------

Fault = namedtuple("Fault", "forward text")


def _modified_then_raises(self, layer, query, key, value, *more, **named):
    for tensor in (query, key, value):
        tensor.fill_(7.0)
    raise RuntimeError("no kernel image is available")


FAULTS = {
    "returns None": Fault(lambda *args, **named: None, "returned None"),
    "returns a list": Fault(lambda *args, **named: [1], "returned a list"),
    "wrong shape": Fault(lambda *args, **named: torch.zeros(1, 4, 16), r"returned \(1, 4, 16\)"),
    "wrong dtype": Fault(lambda *args, **named: torch.zeros(SHAPE).half(), "float16"),
    "output not written": Fault(lambda *args, **named: args[7], "did not write"),
}


def foreign_backend(forward, name="TORCH_SDPA"):
    class Impl(ReferenceImpl):
        pass

    Impl.forward = forward
    backend = make_backend(name)
    backend.get_impl_cls = staticmethod(lambda: Impl)
    return backend


@pytest.mark.parametrize("is_layer", [True, False], ids=["layer", "function"])
@pytest.mark.parametrize("what", FAULTS)
def test_results_of_other_packages_are_checked(what, is_layer):
    forward, text = FAULTS[what]
    with registered(foreign_backend(forward)):
        if is_layer:
            with pytest.raises(BackendFailure, match=text):
                call(make_layer(backend="TORCH_SDPA"), make_cache())
        else:
            with pytest.raises(BackendFailure, match=text):
                attention(**make_inputs(), backend="TORCH_SDPA")
        with pytest.warns(BackendFallbackWarning):
            result = attention(**make_inputs())
    torch.testing.assert_close(result, attention(**make_inputs(), backend="REFERENCE"))


def test_a_result_in_another_tensor_is_copied_to_the_output():
    def forward(self, *args, **named):
        return ReferenceImpl.forward(self, *args[:6])

    out = torch.zeros(SHAPE)
    with registered(foreign_backend(forward)):
        result = attention(**make_inputs(), out=out, backend="TORCH_SDPA")
    assert result is out
    torch.testing.assert_close(out, attention(**make_inputs(), backend="REFERENCE"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_layer", [True, False], ids=["layer", "function"])
def test_inputs_modified_by_a_failing_backend_are_restored(is_layer, mode):
    expected = attention(**make_inputs(), backend="REFERENCE")
    with registered(foreign_backend(_modified_then_raises)), mode():
        inputs, cache = make_inputs(), make_cache()
        run = (
            (lambda: call(make_layer(), cache, **inputs))
            if is_layer
            else (lambda: attention(**inputs))
        )
        with pytest.warns(BackendFallbackWarning):
            result = run()
    for name, tensor in make_inputs().items():
        assert torch.equal(inputs[name], tensor)
    torch.testing.assert_close(result, expected)


def test_an_error_whose_text_raises_is_handled():
    class Unprintable(Exception):
        def __str__(self):
            raise ValueError("no text")

    def forward(*args, **named):
        raise Unprintable

    with (
        registered(foreign_backend(forward)),
        pytest.warns(BackendFallbackWarning, match="Unprintable"),
    ):
        attention(**make_inputs())


def test_a_call_that_every_backend_rejects_is_an_invalid_call():
    def forward(*args, **named):
        raise RuntimeError("unsupported value")

    backends = [foreign_backend(forward), foreign_backend(forward, "REFERENCE")]
    with registered(*backends), pytest.raises(InvalidInputError, match="Every backend raised"):
        attention(**make_inputs())
    assert failures() == ()


def test_a_profiling_run_has_no_batch():
    layer, cache = make_layer(), make_cache()
    with forward_context(None):
        result = layer(**make_inputs(), kv_cache=cache)
    assert not result.any()
    assert not cache.any()
