"""The layer: how it is called, what it shares and keeps, its scales, its quantized output."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given
from torch import nn

from attn_dispatch import (
    Attention,
    AttentionBatch,
    AttentionType,
    InvalidInputError,
    Phase,
    UnsupportedError,
    attention_backend,
    bind_kv_caches,
    forward_context,
    known_device,
    plan_kv_cache,
)
from attn_dispatch.backends.reference.torch_sdpa import SDPABuilder
from attn_dispatch.selection.version import changed
from support.cases import INT8, Case, Step, call, fused_on_cpu, layer_of, layer_spec
from support.strategies import cases

#: Decodes, prompts and a chunk, in any order.
REQUESTS = [(1, 9), (5, 5), (1, 4), (3, 8)]
CASE = Case(spec=layer_spec(), query_lens=(1, 5, 3), seq_lens=(9, 5, 8))
E4M3 = torch.float8_e4m3fn


@given(case=cases("REFERENCE", dtypes=(torch.float32, torch.bfloat16)))
def test_any_step_agrees_with_the_reference(device, case):
    step = Step(case, device)
    result = call(layer_of(step), step)
    step.check(result[0] if step.spec.returns_lse else result)


ROUTES = ["prefill=REFERENCE,decode=TORCH_SDPA", "prefill=TORCH_SDPA,decode=REFERENCE"]


@pytest.mark.parametrize("route", ROUTES)
@given(case=cases("TORCH_SDPA"))
def test_any_step_may_be_split_by_phase(device, route, case):
    if device.type != "cpu":
        case = case.replace(spec=case.spec.replace(alibi=False))
    step = Step(case, device)
    with fused_on_cpu(device):
        step.check(call(layer_of(step, backend=route), step))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_requests_in_any_order(route, order):
    query_lens, seq_lens = zip(*(REQUESTS[i] for i in order), strict=True)
    step = Step(CASE.replace(query_lens=query_lens, seq_lens=seq_lens, padding=3))
    output = call(layer_of(step, backend=route), step)
    step.check(output)
    assert not output[10:].any()


def test_both_phases_may_have_one_backend():
    layer = Attention(4, 8, backend="REFERENCE", device="cpu")
    assert {s.name for s in layer.selections.values()} == {"REFERENCE"}
    assert layer.selections.keys() == {Phase.PREFILL, Phase.DECODE}


def test_an_encoder_has_only_prefill():
    layer = Attention(4, 8, attn_type=AttentionType.ENCODER_ONLY, device="cpu")
    assert layer.selections.keys() == {Phase.PREFILL}
    assert layer.spec.block_size is None


@pytest.mark.parametrize("flat", ["query", "key", "value", "query key value"])
def test_heads_and_elements_may_be_one_dimension(flat):
    step = Step(CASE)
    for name in flat.split():
        setattr(step, name, getattr(step, name).flatten(1))
    output = call(layer_of(step), step)
    assert output.dim() == step.query.dim()
    step.check(output.view(-1, 4, 8))


def test_a_flat_tensor_of_another_width_is_rejected():
    layer = layer_of(Step(CASE), prefix="model.layers.3.attn")
    with pytest.raises(InvalidInputError, match=r"layer 'model.layers.3.attn' takes .*, 4, 8\)"):
        layer(torch.zeros(3, 31, dtype=torch.float64))


def test_the_output_is_written_to_the_given_tensor():
    step = Step(CASE)
    output = torch.full((2, 9, 4, 8), torch.nan, dtype=torch.float64)[1]
    assert call(layer_of(step), step, output=output) is output
    step.check(output)


def test_cache_and_metadata_may_be_given():
    step = Step(CASE)
    layer = layer_of(step)
    layer.kv_cache, cache = None, step.kv_cache
    metadata = layer.build_metadata(step.batch)
    step.check(layer(step.query, step.key, step.value, kv_cache=cache, attn_metadata=metadata))


def test_a_layer_outside_of_a_context_is_an_error_with_a_remedy():
    step = Step(CASE)
    with pytest.raises(InvalidInputError, match=r"outside of forward_context. Open"):
        layer_of(step)(step.query, step.key, step.value)


def test_a_query_of_another_dtype_is_rejected():
    step = Step(CASE)
    layer, step.query = layer_of(step), step.query.float()
    with pytest.raises(InvalidInputError, match=r"query is torch.float32; layer .* torch.float64"):
        call(layer, step)


def test_the_log_sum_exp_comes_with_the_output():
    step = Step(CASE.replace(spec=layer_spec(returns_lse=True)))
    output, lse = call(layer_of(step), step)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_contexts_nest_and_end_with_an_error():
    step, other = Step(CASE), Step(CASE.replace(query_lens=(2,), seq_lens=(6,)))
    layer = layer_of(step)
    with forward_context(step.batch):
        other.check(call(layer_of(other), other))
        step.check(layer(step.query, step.key, step.value))
        with pytest.raises(InvalidInputError), forward_context(other.batch):
            layer(step.query[:1], step.key, step.value)
        step.check(layer(step.query, step.key, step.value))
    with pytest.raises(InvalidInputError, match="outside of forward_context"):
        layer(step.query, step.key, step.value)


# What layers share.


def count_builds(monkeypatch):
    built = []
    build = SDPABuilder.build
    monkeypatch.setattr(
        SDPABuilder, "build", lambda self, batch: built.append(batch) or build(self, batch)
    )
    return built


def test_equal_layers_share_metadata_and_others_do_not(monkeypatch):
    built, step = count_builds(monkeypatch), Step(CASE)
    equal = [layer_of(step, prefix=str(i)) for i in range(4)]
    windowed = layer_of(Step(CASE.replace(spec=layer_spec(sliding_window=3))))
    with forward_context(step.batch):
        for layer in [*equal, windowed, *equal]:
            layer(step.query, step.key, step.value)
    assert len(built) == 2


def test_each_context_makes_its_own_metadata(monkeypatch):
    built, step = count_builds(monkeypatch), Step(CASE)
    layer = layer_of(step)
    for _ in range(2):
        call(layer, step)
    assert len(built) == 2


def test_layers_may_have_batches_of_their_own():
    steps = {"a": Step(CASE), "b": Step(CASE.replace(query_lens=(2,), seq_lens=(6,), seed=1))}
    layers = {name: layer_of(step, prefix=name) for name, step in steps.items()}
    with forward_context({name: step.batch for name, step in steps.items()}):
        for name, step in steps.items():
            step.check(layers[name](step.query, step.key, step.value))
        stranger = layer_of(steps["a"], prefix="c")
        with pytest.raises(
            InvalidInputError, match="no batch for layer 'c'; it has them for: a, b"
        ):
            stranger(steps["a"].query)


def test_two_threads_do_not_mix_their_batches():
    cases = [CASE, CASE.replace(query_lens=(4, 2), seq_lens=(6, 7), seed=1)]
    steps = [Step(case) for case in cases]
    barrier, failures = threading.Barrier(2), []

    def work(step):
        layer = layer_of(step)
        try:
            with forward_context(step.batch):
                for _ in range(20):
                    barrier.wait(timeout=60)
                    step.check(layer(step.query, step.key, step.value))
        except Exception as error:  # a thread's error would be lost
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Model(nn.Module):
    """Three layers, the last of which reads the cache of the first."""

    def __init__(self, **features):
        super().__init__()
        sizes = {
            "num_heads": 4,
            "head_size": 8,
            "num_kv_heads": 2,
            "dtype": torch.float32,
            "device": "cpu",
        }
        self.layers = nn.ModuleList(
            Attention(
                **(sizes | features),
                block_size=4,
                prefix=f"layers.{i}",
                kv_sharing_target_layer_name="layers.0" if i == 2 else None,
            )
            for i in range(3)
        )


def test_caches_are_bound_by_name_and_shared_between_sharing_layers():
    model = Model()
    caches = {f"layers.{i}": torch.zeros(5, 2, 4, 2, 8) for i in range(2)}
    bind_kv_caches(model, caches)
    first, second, third = model.layers
    assert first.kv_cache is third.kv_cache is caches["layers.0"]
    assert second.kv_cache is caches["layers.1"]
    bind_kv_caches({"layers.1": second}, {"layers.1": caches["layers.0"]})
    assert second.kv_cache is caches["layers.0"]


def test_a_sharing_layer_attends_to_what_its_target_wrote():
    model, step = Model(), Step(CASE.replace(spec=layer_spec(dtype=torch.float32)))
    bind_kv_caches(model, {"layers.0": step.kv_cache, "layers.1": step.kv_cache.clone()})
    first, _, third = model.layers
    with forward_context(step.batch):
        expected = first(step.query, step.key, step.value)
        written = step.kv_cache.clone()
        for args in ((), (step.key * 2, step.value * 2)):
            torch.testing.assert_close(third(step.query, *args), expected)
    assert torch.equal(step.kv_cache.nan_to_num(7), written.nan_to_num(7))


def test_a_missing_cache_and_a_duplicate_name_are_errors():
    model = Model()
    with pytest.raises(InvalidInputError, match=r"no cache for layer 'layers.1'"):
        bind_kv_caches(model, {"layers.0": torch.zeros(5, 2, 4, 2, 8)})
    model.layers[1].prefix = "layers.0"
    with pytest.raises(InvalidInputError, match="Two layers of the model have the prefix"):
        bind_kv_caches(model, {})


# What a layer keeps.


def test_making_a_layer_like_an_earlier_one_is_cheap():
    """Measured in calls of Python functions, since time depends on the machine. It was 2,850."""
    arguments = {"num_kv_heads": 8, "dtype": torch.float32, "device": "cpu"}
    Attention(32, 128, **arguments)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        Attention(32, 128, **arguments)
    finally:
        sys.setprofile(None)
    assert calls < 600


def test_a_layer_keeps_the_overrides_under_which_it_was_made():
    with attention_backend("REFERENCE"):
        layer = Attention(4, 8, device="meta")
    layer._bind(torch.device("cpu"))
    assert layer.selections[Phase.DECODE].name == "REFERENCE"
    with attention_backend("REFERENCE"):
        assert Attention(4, 8, backend="TORCH_SDPA", device="cpu").selections[
            Phase.DECODE
        ].name == ("TORCH_SDPA")


def test_a_layer_made_on_meta_runs_where_its_queries_are():
    step = Step(CASE)
    layer = Attention(4, 8, step.scale, 2, dtype=torch.float64, block_size=4, device="meta")
    layer.kv_cache = step.kv_cache
    step.check(call(layer, step))


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA", *ROUTES])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alibi": True},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": INT8},
        {"sliding_window": 3},
    ],
    ids=lambda fields: str(*fields.values()) or "plain",
)
def test_the_default_device_and_dtype_are_ignored(backend, fields, misleading_defaults):
    step = Step(CASE.replace(spec=layer_spec(dtype=torch.float32, **fields)))
    expected, table = step.expected()[0], step._table
    lens = (step.case.query_lens, step.case.seq_lens)
    with misleading_defaults():
        layer = layer_of(step, backend=backend)
        assert layer._k_scale.dtype == torch.float32
        step.batch = AttentionBatch.create(*lens, block_table=table, block_size=4)
        output = call(layer, step)
    step.check(output, expected)


def test_a_layer_without_a_backend_is_not_made():
    with pytest.raises(UnsupportedError, match="TORCH_SDPA"):
        Attention(4, 8, logits_soft_cap=30.0, backend="TORCH_SDPA", device="cpu")


@pytest.mark.parametrize("backend", ["TORCH_SDPA", *ROUTES])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_a_separate_layer(duplicate, backend):
    step = Step(CASE.replace(spec=layer_spec(dtype=torch.float32, kv_cache_dtype="fp8_e4m3")))
    layer = layer_of(step, backend=backend)
    other = duplicate(layer)
    assert other._op_key != layer._op_key
    assert other.kv_cache is None
    other.set_kv_scales(0.5, 0.25)
    step.check(call(layer, step))
    other.set_kv_scales(step.layer._k_scale, step.layer._v_scale)
    step.check(call(other, step, kv_cache=step.kv_cache))


def test_sharing_survives_a_copy_of_the_model():
    model = Model(kv_cache_dtype="fp8_e4m3")
    caches = {f"layers.{i}": torch.zeros(5, 2, 4, 2, 8).to(E4M3) for i in range(2)}
    bind_kv_caches(model, caches)
    other = copy.deepcopy(model)
    other.layers[0].set_kv_scales(0.5, 0.25)
    assert float(other.layers[2]._k_scale) == 0.5
    assert float(model.layers[2]._k_scale) == 1.0


@pytest.mark.parametrize("cast", [nn.Module.half, lambda m: m.to(torch.bfloat16), nn.Module.double])
def test_casting_the_model_leaves_the_scales_float32(cast):
    model = Model(kv_cache_dtype="fp8_e4m3")
    model.layers[0].set_kv_scales(0.1, 0.2)
    cast(model)
    assert model.layers[0]._k_scale.dtype == torch.float32
    assert model.layers[0]._k_scale_float == pytest.approx(0.1)


def test_sinks_stay_a_parameter_of_the_model():
    """They are not a parameter of the layer too: a checkpoint names them once."""
    step = Step(CASE.replace(spec=layer_spec(sinks=True)))
    wanted, step.sinks = step.sinks, nn.Parameter(torch.zeros(4), requires_grad=False)
    model = nn.Module()
    model.sinks, model.attn = step.sinks, layer_of(step)
    assert list(model.state_dict()) == ["sinks"]
    model.load_state_dict({"sinks": wanted})
    step.check(call(model.attn, step))


def test_a_layer_with_an_int8_cache_takes_no_scales():
    layer = layer_of(Step(CASE.replace(spec=layer_spec(kv_cache_dtype=INT8))), prefix="a")
    with pytest.raises(InvalidInputError, match=r"layer 'a' .* Leave set_kv_scales out\."):
        layer.set_kv_scales(1.0, 1.0)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA", *ROUTES])
def test_a_layer_runs_with_a_planned_int8_cache(backend):
    """From the plan to the layer, only the name of the dtype is given."""
    step = Step(CASE.replace(spec=layer_spec(kv_cache_dtype=INT8, head_size_v=33)))
    plan = plan_kv_cache({"a": step.spec}, "cpu")
    layer = layer_of(step, prefix="a", backend=backend)
    bind_kv_caches({"a": layer}, plan.allocate(len(step.kv_cache), "cpu"))
    assert layer.kv_cache.shape == step.kv_cache.shape
    layer.kv_cache.copy_(step.kv_cache)
    step.check(call(layer, step))


# Quantized output.

FLOATS = CASE.replace(spec=layer_spec(head_size_v=64))


def quantized(quant):
    """A step whose layer stores its output as `quant`, and that output in float64."""
    spec = layer_spec(head_size_v=64, output_quant=quant)
    return Step(CASE.replace(spec=spec)), Step(FLOATS).run("REFERENCE")


def test_a_static_scale_divides_the_output():
    step, plain = quantized("fp8_e4m3")
    scale = torch.tensor(0.003)  # so small that some values are clamped
    output = call(layer_of(step), step, output_scale=scale)
    wanted = (plain / scale.double()).clamp(-448, 448).to(E4M3)
    assert output.dtype == E4M3
    assert bool((wanted.float().abs() == 448).any())
    assert torch.equal(output.view(torch.uint8), wanted.view(torch.uint8))


def test_each_group_of_the_output_has_its_scale():
    step, plain = quantized("fp8_e4m3_group128")
    scales = torch.zeros(len(plain), 2)
    output = call(layer_of(step), step, output_block_scale=scales)
    groups = plain.reshape(len(plain), 2, 128)
    torch.testing.assert_close(scales, (groups.abs().amax(-1) / 448).float())
    wanted = (groups / scales[..., None].double()).to(E4M3).view(plain.shape)
    assert torch.equal(output.view(torch.uint8), wanted.view(torch.uint8))


def test_a_group_of_zeros_has_a_scale_of_one():
    step = Step(CASE.replace(spec=layer_spec(head_size_v=64, output_quant="fp8_e4m3_group128")))
    step.value, step.kv_cache = torch.zeros_like(step.value), torch.zeros_like(step.kv_cache)
    scales = torch.zeros(len(step.query), 2)
    output = call(layer_of(step), step, output_block_scale=scales)
    assert bool((scales == 1).all())
    assert not output.view(torch.uint8).any()


@pytest.mark.parametrize(
    ("quant", "given"),
    [
        ("fp8_e4m3", {}),
        ("fp8_e4m3", {"output_block_scale": torch.zeros(9, 2)}),
        ("fp8_e4m3_group128", {"output_scale": torch.ones(())}),
        ("fp8_e4m3", {"output_scale": torch.ones(()), "output": torch.zeros(9, 4, 64).double()}),
        (
            "fp8_e4m3",
            {"output_scale": torch.ones(()), "output": torch.zeros(9, 4, 64).to(torch.float8_e5m2)},
        ),
        (None, {"output_scale": torch.ones(()), "output": torch.zeros(9, 4, 64).to(E4M3)}),
    ],
    ids=["no scale", "wrong scale", "other wrong scale", "float output", "e5m2", "not described"],
)
def test_output_quantization_that_differs_from_the_spec_is_rejected(quant, given):
    step, _ = quantized(quant)
    with pytest.raises(InvalidInputError, match=f"made with output_quant={quant!r}"):
        call(layer_of(step), step, **given)


@pytest.mark.filterwarnings("ignore::attn_dispatch.selection.resolve.ReferenceFallbackWarning")
def test_fp8_outputs_have_the_fp8_type_of_the_device(monkeypatch):
    monkeypatch.setattr(
        "attn_dispatch.selection.resolve.detect_device", lambda device: known_device("gfx942")
    )
    changed()  # a context of the real CPU may exist
    sizes = {"dtype": torch.float32, "device": "cpu", "attn_type": "encoder_only"}
    layer = Attention(2, 64, output_quant="fp8_e4m3", **sizes)
    query = torch.randn(3, 2, 64)
    with forward_context(AttentionBatch.create([3], [3])):
        output = layer(query, query, query, output_scale=torch.tensor(0.01))
    assert output.dtype == torch.float8_e4m3fnuz
