"""MLAAttention against float64: both forms, chunks of earlier keys, fp8, and everything around."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_dispatch import (
    Attention,
    AttentionBatch,
    AttentionSpec,
    InvalidInputError,
    MLAAttention,
    MLADims,
    Phase,
    UnsupportedError,
    attention_backend,
    bind_kv_caches,
    copy_blocks,
    forward_context,
    plan_kv_cache,
    resolve,
    swap_blocks,
)
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.errors import BackendFailure
from attn_dispatch.interface.capability import OneOf
from attn_dispatch.runtime.mla_impl import MLABuilder
from attn_dispatch.runtime.mla_plan import (
    bytes_per_key,
    expanded_requests,
    is_expanded_faster,
    why_absorbed,
)
from attn_dispatch.runtime.mla_weights import apply_rope, dequantize_weight
from attn_dispatch.selection.failure_record import BackendFallbackWarning, forget_failures
from support.fallback import faulty
from support.mla_cases import SMALL_DIMS, MLAStep
from support.selection import registered

DEEPSEEK = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
MODES = ("auto", "expanded", "absorbed")


def layer_of(step, **more):
    """A layer for a step's spec, with the step's cache and scale."""
    spec = step.spec
    fields = {
        name: getattr(spec, name)
        for name in ("sliding_window", "logits_soft_cap", "causal", "returns_lse", "output_quant",
                     "batch_invariant", "lengths", "cuda_graph")
    }  # fmt: skip
    target = "target" if spec.kv_sharing else None
    layer = MLAAttention(
        **({
            "num_heads": step.heads, "mla": step.dims, "kv_b_proj": step.weight,
            "scale": step.scale, "dtype": spec.dtype, "device": "cpu",
            "block_size": spec.block_size, "kv_cache_dtype": spec.kv_cache_dtype,
            "kv_sharing_target_layer_name": target, "prefix": "mla",
        } | fields | more)
    )  # fmt: skip
    if not spec.kv_sharing:
        bind_kv_caches([layer], {"mla": step.cache})
        if spec.kv_cache_dtype.startswith("fp8"):
            layer.set_kv_scales(0.02)
    return layer


def run(layer, step, **more):
    with torch.no_grad(), forward_context(step.batch):
        return layer(step.query, step.latents, step.rotated, **more)


def small_workspace(step, keys):
    """The bytes in which this many earlier keys are expanded at a time."""
    return keys * bytes_per_key(step.spec)


def check(step, result):
    output, lse = result if isinstance(result, tuple) else (result, None)
    wanted, wanted_lse = step.expected()
    # Parts are merged by an LSE in float32, also of layers in float64.
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    allowed = 1e-5 if step.spec.dtype == torch.float32 else 2e-6
    torch.testing.assert_close(
        output.double().unflatten(-1, wanted.shape[1:]) if output.dim() == 2 else output.double(),
        wanted,
        rtol=0,
        atol=allowed * max(1.0, largest),
    )
    if lse is not None:
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefill", MODES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"returns_lse": True},
        {"logits_soft_cap": 2.0, "returns_lse": True},
        {"causal": False},
        {"dtype": torch.float32, "kv_cache_dtype": "fp8_e4m3"},
        {"dtype": torch.float32, "kv_cache_dtype": "float64"},
    ],
    ids=str,
)
def test_every_form_equals_the_oracle(prefill, fields):
    step = MLAStep((1, 5, 0, 3, 1, 4), (9, 5, 4, 7, 3, 11), padding=2, **fields)
    layer = layer_of(step, prefill=prefill, prefill_workspace_bytes=small_workspace(step, 3))
    check(step, run(layer, step))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_batches_with_chunks_of_any_size(data):
    number = data.draw(st.integers(0, 5))
    query_lens = data.draw(st.lists(st.integers(0, 9), min_size=number, max_size=number))
    earlier = data.draw(st.lists(st.integers(0, 17), min_size=number, max_size=number))
    step = MLAStep(
        query_lens,
        [query + before for query, before in zip(query_lens, earlier, strict=True)],
        data.draw(st.integers(0, 99)),
        data.draw(st.integers(0, 2)),
        returns_lse=True,
        logits_soft_cap=data.draw(st.sampled_from([None, 1.5])),
        causal=data.draw(st.booleans()),
    )
    chunk = data.draw(st.integers(1, 25))
    layer = layer_of(
        step,
        prefill=data.draw(st.sampled_from(MODES)),
        prefill_workspace_bytes=small_workspace(step, chunk),
    )
    check(step, run(layer, step))


def test_what_the_expanded_form_does_not_compute_is_absorbed():
    step = MLAStep(sliding_window=3)
    layer = layer_of(step)
    assert layer.prefill_selection is None
    assert "does not compute sliding_window" in layer.explain()
    check(step, run(layer, step))
    with pytest.raises(UnsupportedError, match="sliding_window"):
        layer_of(step, prefill="expanded")
    assert "batch_invariant" in why_absorbed(step.spec.replace(batch_invariant=True))
    assert why_absorbed(MLAStep().spec) == ""


def test_both_picks_are_explained():
    layer = MLAAttention(2, DEEPSEEK, torch.zeros(512, 512), device="cpu")
    assert layer.selections[Phase.DECODE].name == "REFERENCE_MLA"
    dense = layer.prefill_selection
    assert dense.name == "REFERENCE"
    assert dense.report.spec.head_size == 192
    assert dense.report.spec.head_size_v == 128
    text = layer.explain()
    assert "head_size=192" in text
    assert "head_size_v=128" in text
    assert "REFERENCE_MLA" in text
    assert str(layer.workspace_bytes) in text
    assert layer.workspace_bytes <= 256 * 2**20


def test_the_form_with_fewer_multiplications_is_chosen():
    assert is_expanded_faster(DEEPSEEK, 4096, 0)
    assert is_expanded_faster(DEEPSEEK, 512, 60_000)
    assert not is_expanded_faster(DEEPSEEK, 128, 60_000)
    # 131072 multiplications to expand a key, and 768 fewer for each query that sees it.
    assert not is_expanded_faster(DEEPSEEK, 170, 10**6)
    assert is_expanded_faster(DEEPSEEK, 171, 10**6)


def test_few_new_tokens_after_many_keys_are_absorbed():
    step = MLAStep((200, 2, 1), (200, 50, 50))
    layer = layer_of(step, num_heads=step.heads)
    metadata = layer.build_metadata(dataclasses.replace(step.batch))
    assert metadata.expanded_rows.batch.query_lens == [200]
    assert metadata.absorbed_rows.batch.query_lens == [2, 1]
    check(step, run(layer, step))


class _Largest(TorchDispatchMode):
    """Records the most bytes that were in one new tensor."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel() * each.element_size())
        return result


def test_earlier_keys_never_take_more_than_the_bound():
    step = MLAStep((4,), (2000,), heads=3)
    bound = small_workspace(step, 40)
    layer = layer_of(step, prefill="expanded", prefill_workspace_bytes=bound)
    assert layer.workspace_bytes == bound
    ranges = layer.build_metadata(step.batch).expanded.earlier
    assert max(each.num_keys for each in ranges) == 40
    assert sum(each.num_keys for each in ranges) == 1996
    expanded, impl = [], layer._binding.impl._expanded
    original = impl._expand

    def measured(*arguments):
        with _Largest() as largest:
            result = original(*arguments)
        expanded.append(largest.found)
        return result

    impl._expand = measured
    check(step, run(layer, step))
    # The place of the cache in bytes is a view; nothing new is larger than the bound.
    assert max(each for each in expanded if each < step.cache.numel() * 8) <= bound
    with pytest.raises(InvalidInputError, match="no room for one expanded key"):
        layer_of(step, prefill_workspace_bytes=10)


def test_the_plan_of_caches_counts_the_workspace():
    layers = [
        MLAAttention(
            2, SMALL_DIMS, torch.zeros(16, 6), prefix=str(i), device="cpu",
            dtype=torch.float32, prefill_workspace_bytes=10_000 * (i + 1),
        )
        for i in range(2)
    ]  # fmt: skip
    plan = plan_kv_cache(layers)
    assert plan.workspace_bytes == layers[1].workspace_bytes > layers[0].workspace_bytes
    assert plan.shapes["0"] == (16, 10)
    assert plan.num_blocks(plan.workspace_bytes + 3 * plan.bytes_per_block) == 3
    assert plan.num_blocks(0) == 0
    specs = plan_kv_cache({name: layer.spec for name, layer in zip("ab", layers, strict=True)})
    assert specs.workspace_bytes == 0


def test_caches_are_planned_bound_copied_and_swapped():
    model = nn.ModuleList(
        MLAAttention(
            3, SMALL_DIMS, torch.randn(24, 6), prefix=f"layers.{i}", block_size=None,
            dtype=torch.float32, device="cpu",
        )
        for i in range(2)
    )  # fmt: skip
    plan = plan_kv_cache(model)
    caches = plan.allocate(4, "cpu")
    bind_kv_caches(model, caches)
    assert all(layer.spec.block_size == plan.block_size for layer in model)
    first = model[0].kv_cache
    first.copy_(torch.arange(first.numel()).view(first.shape))
    copy_blocks([layer.kv_cache for layer in model], torch.tensor([[0, 3]]))
    assert torch.equal(first[0], first[3])
    swap_blocks(first, model[1].kv_cache, torch.tensor([[1, 2]]))
    assert torch.equal(first[1], model[1].kv_cache[2])


@pytest.mark.parametrize("prefill", MODES)
def test_a_sharing_layer_reads_and_never_writes(prefill):
    step = MLAStep()
    target = layer_of(step)
    sharing = MLAAttention(
        3, SMALL_DIMS, step.weight, step.scale, dtype=torch.float64, block_size=4, device="cpu",
        prefix="sharing", kv_sharing_target_layer_name="target", prefill=prefill,
    )  # fmt: skip
    target.prefix = "target"
    bind_kv_caches([target, sharing], {"target": step.cache})
    expected = run(target, step)
    before = step.cache.clone()
    with torch.no_grad(), forward_context(step.batch):
        found = sharing(step.query, step.latents * math.nan, step.rotated * math.nan)
    torch.testing.assert_close(found, expected)
    assert torch.equal(before.nan_to_num(7.0), step.cache.nan_to_num(7.0))


def test_prefill_and_decode_of_two_backends_for_latents():
    class Other(ReferenceMLABackend):
        name = "OTHER_MLA"

    step = MLAStep((1, 5, 2, 3), (9, 5, 4, 7), padding=1, returns_lse=True)
    with registered(Other):
        for prefill in MODES:
            layer = layer_of(
                step, prefill=prefill, backend="decode=OTHER_MLA, prefill=REFERENCE_MLA"
            )
            assert layer.selections[Phase.DECODE].name == "OTHER_MLA"
            assert layer.selections[Phase.PREFILL].name == "REFERENCE_MLA"
            check(step, run(layer, step))


def test_an_override_for_latents_does_not_apply_to_the_dense_backend():
    weight = torch.zeros(24, 6)
    with attention_backend("REFERENCE_MLA"):
        layer = MLAAttention(3, SMALL_DIMS, weight, device="cpu")
    assert layer.prefill_selection.name == "REFERENCE"
    with attention_backend("full=REFERENCE"):
        layer = MLAAttention(3, SMALL_DIMS, weight, device="cpu")
    assert layer.selections[Phase.DECODE].name == "REFERENCE_MLA"
    assert "full=REFERENCE" in str(layer.prefill_selection.report.evidence)
    with pytest.raises(UnsupportedError):
        MLAAttention(3, SMALL_DIMS, weight, device="cpu", backend="REFERENCE")
    with pytest.raises(UnsupportedError):
        MLAAttention(3, SMALL_DIMS, weight, device="cpu", prefill_backend="TORCH_SDPA")


def test_latents_and_dense_layers_never_get_each_others_backends():
    dense = AttentionSpec(num_heads=4, head_size=16, dtype=torch.float32, block_size=16)
    latents = AttentionSpec.for_mla(num_heads=4, dtype=torch.float32, mla=SMALL_DIMS, block_size=16)
    assert not resolve(dense, "cpu").name.endswith("MLA")
    assert resolve(latents, "cpu").name.endswith("MLA")
    with pytest.raises(UnsupportedError):
        resolve(dense, "cpu", backend="REFERENCE_MLA")
    with pytest.raises(UnsupportedError):
        resolve(latents, "cpu", backend="REFERENCE")
    with pytest.raises(InvalidInputError, match="MLAAttention"):
        Attention(4, 10, num_kv_heads=1, head_size_v=6, mla=SMALL_DIMS)


def test_a_sparse_layer_is_rejected():
    with pytest.raises(UnsupportedError, match=r"index_topk=2048.*indexer"):
        MLAAttention(128, DEEPSEEK, torch.zeros(32768, 512), index_topk=2048)


# Failures -----------------------------------------------------------------------------------------


def test_another_dense_backend_serves_prefills_if_one_fails():
    step = MLAStep()
    with registered(faulty("launch", mla=OneOf(None))):
        layer = layer_of(step, prefill="expanded")
        assert layer.prefill_selection.name == "TORCH_SDPA"
        with pytest.warns(BackendFallbackWarning):
            check(step, run(layer, step))
        assert layer.prefill_selection.name == "REFERENCE"
    forget_failures()


def test_prefills_are_absorbed_if_dense_attention_fails():
    step = MLAStep()
    layer = layer_of(step, prefill="auto")

    def fail(*arguments):
        raise BackendFailure("no kernel image is available")

    layer._binding.impl._expanded.attend = fail
    with pytest.warns(BackendFallbackWarning, match="absorbed"):
        check(step, run(layer, step))
    assert layer.prefill_selection is None
    assert layer.workspace_bytes == 0
    assert "no kernel image" in layer.explain()
    check(step, run(layer, step))

    strict = layer_of(step, prefill="expanded")
    strict._binding.impl._expanded.attend = fail
    with pytest.raises(BackendFailure, match="no kernel image"):
        run(strict, step)


# Calls --------------------------------------------------------------------------------------------


def test_a_profiling_run_needs_no_cache():
    layer = MLAAttention(3, SMALL_DIMS, torch.randn(24, 6), device="cpu", returns_lse=True)
    with torch.no_grad(), forward_context(None):
        output, lse = layer(torch.ones(5, 27), torch.ones(5, 6), torch.ones(5, 1, 4))
    assert torch.equal(output, torch.zeros(5, 9))
    assert bool((lse == -math.inf).all())


def test_a_layer_without_a_cache_says_so():
    layer = MLAAttention(3, SMALL_DIMS, torch.randn(24, 6), device="cpu", dtype=torch.float64)
    step = MLAStep()
    with pytest.raises(InvalidInputError, match="cache"):
        run(layer, step)


def test_a_model_of_layers_is_compiled_without_breaks():
    torch._dynamo.reset()
    step = MLAStep(dtype=torch.float32, returns_lse=True)
    layer = layer_of(step, prefill="expanded")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    check(step, run(compiled, step))
    rotating = layer_of(step, inv_freq=torch.ones(2))
    positions = torch.arange(len(step.query))
    expected = run(rotating, step, positions=positions)
    compiled = torch.compile(rotating, backend="aot_eager", fullgraph=True)
    found = run(compiled, step, positions=positions)
    torch.testing.assert_close(found, expected)


def test_captured_steps_are_absorbed_by_the_backends_own_plan():
    step = MLAStep()
    layer = layer_of(step, prefill="expanded")
    calls = []

    class Inner(type(layer._binding.builder._inner)):
        def build_for_graph(self, batch, limits):
            calls.append((batch, limits))
            return "captured"

        def update_for_graph(self, metadata, batch):
            calls.append((metadata, batch))

    builder = MLABuilder(Inner(step.spec, step.device), chunk=4, always=True)
    metadata = builder.build_for_graph(step.batch, "limits")
    assert (metadata.absorbed, metadata.expanded) == ("captured", None)
    builder.update_for_graph(metadata, "next")
    assert calls == [(step.batch, "limits"), ("captured", "next")]


def test_a_copied_layer_works_without_the_first_one():
    step = MLAStep()
    layer = copy.deepcopy(layer_of(step, prefill="expanded"))
    assert layer.kv_cache is None
    bind_kv_caches([layer], {"mla": step.cache})
    check(step, run(layer, step))
    assert list(layer.parameters()) == list(layer.modules())[1:] == []


def test_scales_of_a_cache_are_derived_from_the_entries():
    step = MLAStep((5, 3), (5, 3), dtype=torch.float32, kv_cache_dtype="fp8_e4m3")
    layer = layer_of(step)
    layer._cache_state.scales_are_final = False
    batch = dataclasses.replace(step.batch, enable_kv_scales_calculation=True)
    with torch.no_grad(), forward_context(batch):
        layer(step.query, step.latents, step.rotated)
    largest = torch.cat([step.latents, step.rotated], -1).abs().max()
    assert layer._k_scale_float == layer._v_scale_float == pytest.approx(float(largest) / 448.0)
    with pytest.raises(InvalidInputError, match="one scale"):
        layer.set_kv_scales(1.0, 2.0)


def test_invalid_calls_write_nothing():
    step = MLAStep()
    layer = layer_of(step, prefill="expanded")
    before = step.cache.clone()
    query, latents, rotated = step.query, step.latents, step.rotated
    wide = torch.zeros(*step.cache.shape[:2], 11, dtype=torch.float64)
    cases = [
        ((query[..., :8], latents, rotated), {}, "qk_nope_head_dim"),
        ((query.flatten(1)[:, 1:], latents, rotated), {}, "query has shape"),
        ((query, latents[:, :5], rotated), {}, "kv_c_normed"),
        ((query, latents, rotated[:, :3]), {}, "k_pe"),
        ((query, None, rotated), {}, "kv_c_normed"),
        ((None, latents, rotated), {}, "query"),
        ((query.float(), latents, rotated), {}, "float32"),
        ((query, latents.float(), rotated), {}, "kv_c_normed"),
        ((query[:-1], latents, rotated), {}, "tokens"),
        ((query, latents, rotated, wide), {}, "kv_cache"),
        ((query, latents, rotated), {"positions": torch.arange(len(query))}, "inv_freq"),
        ((query, latents, rotated), {"output": torch.zeros(len(query), 3, 4).double()}, "output"),
        ((query.clone().requires_grad_(), latents, rotated), {}, "autograd"),
    ]
    for arguments, named, message in cases:
        with forward_context(step.batch), pytest.raises(InvalidInputError, match=message):
            layer(*arguments, **named)
        assert torch.equal(before.nan_to_num(7.0), step.cache.nan_to_num(7.0)), message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_b_proj": torch.zeros(23, 6)}, r"kv_b_proj has shape \(23, 6\)"),
        ({"kv_b_proj": nn.Linear(6, 24)}, "bias"),
        ({"kv_b_proj": "weight"}, "kv_b_proj is"),
        ({"kv_b_proj": torch.zeros(24, 6, dtype=torch.int8)}, "floating point"),
        ({"kv_b_proj": torch.zeros(24, 6).to(torch.float8_e4m3fn)}, "without scales"),
        ({"kv_b_proj_scale_inv": torch.ones(1, 1)}, "scales go with a matrix in fp8"),
        ({"mla": (6, 5, 4, 3)}, "not an MLADims"),
        ({"prefill": "dense"}, "prefill='dense' is not one of"),
        ({"head_size": 4}, "no argument 'head_size'"),
        ({"inv_freq": torch.ones(3)}, "inv_freq has shape"),
        ({"q_a_proj": torch.neg}, "go together"),
        ({"q_proj": torch.neg, "q_a_proj": torch.neg, "q_b_proj": torch.neg}, "not both"),
        ({"prefill_workspace_bytes": 0}, "prefill_workspace_bytes"),
        ({"prefix": 3}, "prefix"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_invalid_layer_is_rejected_when_it_is_made(arguments, message):
    named = {"num_heads": 3, "mla": SMALL_DIMS, "kv_b_proj": torch.zeros(24, 6), "device": "cpu"}
    with pytest.raises(InvalidInputError, match=message):
        MLAAttention(**(named | arguments))


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(4, 16, 11), "kv_lora_rank"),
        (torch.zeros(4, 8, 10), "block size"),
        (torch.zeros(4, 2, 16, 1, 10), "kv_lora_rank"),
        (torch.zeros(4, 16, 10, dtype=torch.float16), "torch.float16"),
        (torch.zeros(1, 16, 10).expand(4, 16, 10), "overlaps itself"),
    ],
)
def test_a_cache_that_does_not_fit_is_not_bound(cache, message):
    layer = MLAAttention(3, SMALL_DIMS, torch.zeros(24, 6), device="cpu", prefix="a")
    with pytest.raises(InvalidInputError, match=message):
        bind_kv_caches([layer], {"a": cache})
    assert layer.kv_cache is None


# Weights and RoPE ---------------------------------------------------------------------------------


def test_block_scaled_weights_are_dequantized_once():
    dims = MLADims(kv_lora_rank=130, qk_nope_head_dim=70, qk_rope_head_dim=4, v_head_dim=60)
    weight = torch.randn(3 * 130, 130).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 2) + 0.5
    expected = torch.empty(390, 130)
    for i in range(390):
        for j in range(0, 130, 2):
            expected[i, j : j + 2] = weight[i, j : j + 2].float() * scales[i // 128, j // 128]
    torch.testing.assert_close(dequantize_weight(weight, scales, torch.float32), expected)
    step = MLAStep(dims=dims, dtype=torch.float32, heads=3)
    plain = layer_of(step, kv_b_proj=expected)
    scaled = layer_of(step, kv_b_proj=weight, kv_b_proj_scale_inv=scales)
    found = run(scaled, step)
    torch.testing.assert_close(found, run(plain, step))
    used = scaled._kv_b_proj.weight
    assert scaled._kv_b_proj.weight is used
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    torch.testing.assert_close(run(layer_of(step, kv_b_proj=module), step), found)
    scales *= 2  # the checkpoint is loaded later
    assert torch.equal(scaled._kv_b_proj.weight, used * 2)
    with pytest.raises(InvalidInputError, match=r"takes \(4, 2\)"):
        layer_of(step, kv_b_proj=weight, kv_b_proj_scale_inv=scales[:3])


def test_projections_and_rope_come_before_attention():
    step = MLAStep(dtype=torch.float32)
    hidden, tokens = 12, len(step.query)
    torch.manual_seed(1)
    a, norm, b = nn.Linear(hidden, 7, bias=False), nn.RMSNorm(7), nn.Linear(7, 27, bias=False)
    states, inv_freq = torch.randn(tokens, hidden), torch.tensor([1.0, 0.1])
    positions = torch.arange(tokens) * 3
    layer = layer_of(step, q_a_proj=a, q_a_layernorm=norm, q_b_proj=b, inv_freq=inv_freq)
    plain = layer_of(step)
    angles = positions[:, None] * inv_freq
    with torch.no_grad(), forward_context(step.batch):
        found = layer(states, step.latents, step.rotated, positions=positions)
        query = b(norm(a(states))).view(tokens, 3, 9)
        rotated = apply_rope(query[..., 5:], angles.cos(), angles.sin())
        key = apply_rope(step.rotated, angles.cos(), angles.sin())
        expected = plain(torch.cat([query[..., :5], rotated], -1), step.latents, key)
    torch.testing.assert_close(found, expected.flatten(1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_multiplies_complex_numbers(interleaved):
    x, angles = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else torch.cat(expected.unbind(-1), -1)
    found = apply_rope(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(found, expected)


def test_batches_with_upper_bounds_are_absorbed():
    """How many earlier keys a request has is then known only on the device."""
    table = torch.arange(6).view(2, 3)
    given = {"block_table": table, "block_size": 4}
    exact = AttentionBatch.create([5, 3], [5, 7], **given)
    assert expanded_requests(exact, SMALL_DIMS, always=True) == [0, 1]
    true = torch.tensor([5, 7], dtype=torch.int32)
    bounds = {"lengths": "upper_bound", "seq_lens_upper_bound": [5, 9]}
    bounded = AttentionBatch.create([5, 3], true, **bounds, **given)
    assert expanded_requests(bounded, SMALL_DIMS, always=True) == []
