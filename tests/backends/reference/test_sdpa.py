"""TORCH_SDPA agrees with REFERENCE in float64, and never uses PyTorch's slow path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch.nn.attention import SDPBackend

from attn_dispatch.backends.reference.torch_sdpa import MathPathWarning, SDPAImpl
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.types import AttentionType
from support.cases import FP8, INT8, MEMORY, Case, Step, fused_on_cpu, layer_spec
from support.strategies import cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_fused(step):
    """The output of TORCH_SDPA; on a CPU only the fused kernel is allowed."""
    with fused_on_cpu(step.device):
        return step.run("TORCH_SDPA")


def without_alibi_on_gpus(case, device):
    """TORCH_SDPA declares ALiBi only for CPUs."""
    return case if device.type == "cpu" else case.replace(spec=case.spec.replace(alibi=False))


@given(case=cases("TORCH_SDPA", dtypes=DTYPES))
def test_any_step_agrees_with_the_reference(device, case):
    step = Step(without_alibi_on_gpus(case, device), device)
    step.check(run_fused(step))


@given(case=cases("TORCH_SDPA", dtypes=(torch.float64,)))
def test_any_step_agrees_to_float64(case):
    step = Step(case)
    step.check(run_fused(step))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 70},
        {"sliding_window": 10_000},
        {"alibi": True},
        {"custom_mask": True},
        {"causal": False, "sliding_window": 40},
        {"bidirectional_ranges": True},
        {"bidirectional_ranges": True, "sliding_window": 20},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)
def test_prefills_longer_than_a_piece(device, dtype, fields):
    """Queries of more than 256 rows that need a mask are computed in pieces."""
    if device.type != "cpu" and (fields.get("alibi") or dtype == torch.float64):
        pytest.skip("TORCH_SDPA declares this only for CPUs")
    spec = layer_spec(dtype=dtype, num_heads=2, block_size=16, **fields)
    ranges = ((0, 200, 330), (1, 100, 420)) if spec.bidirectional_ranges else ()
    case = Case(spec=spec, query_lens=(340, 300, 1), seq_lens=(340, 420, 50), ranges=ranges)
    step = Step(case, device)
    step.check(run_fused(step))


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 64, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_block_sizes_and_layouts(device, block_size, layout):
    spec = layer_spec(dtype=torch.float32, block_size=block_size, kv_cache_layout=layout)
    step = Step(Case(spec=spec, query_lens=(1, 4, 7, 1), seq_lens=(70, 64, 7, 257)), device)
    step.check(run_fused(step))


@pytest.mark.parametrize("group", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_query_heads_per_kv_head(device, group, num_kv_heads):
    spec = layer_spec(
        dtype=torch.float32, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads
    )
    step = Step(Case(spec=spec, query_lens=(1, 4, 6), seq_lens=(9, 11, 6)), device)
    step.check(run_fused(step))


@pytest.mark.parametrize("head_size", [1, 2, 3, 40, 96, 512])
@pytest.mark.parametrize("head_size_v", [1, 5, 64])
@pytest.mark.parametrize("memory", MEMORY)
def test_head_sizes_in_any_memory_layout(device, head_size, head_size_v, memory):
    spec = layer_spec(dtype=torch.float32, head_size=head_size, head_size_v=head_size_v)
    case = Case(spec=spec, query_lens=(1, 4, 6), seq_lens=(9, 11, 6), memory=memory)
    step = Step(case, device)
    step.check(run_fused(step))


def test_strided_heads_of_one_element_use_the_fused_kernel():
    """PyTorch checks the last stride even if the dimension has one element."""
    spec = layer_spec(num_heads=1, num_kv_heads=1, head_size=1, block_size=None)
    step = Step(Case(spec=spec, query_lens=(1,), seq_lens=(4,), memory="strided"))
    assert step.query.stride(-1) == 2
    step.check(run_fused(step))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", *FP8, INT8, "float64", "float32", "float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caches_of_another_type(device, kv_cache_dtype, dtype):
    spec = layer_spec(dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    step = Step(Case(spec=spec, query_lens=(1, 4, 6), seq_lens=(9, 11, 6)), device)
    step.check(run_fused(step))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sizes", [(8, 8), (7, 33), (64, 16)], ids=str)
def test_int8_rows_of_any_size_in_either_layout(device, layout, sizes):
    spec = layer_spec(
        dtype=torch.float32,
        head_size=sizes[0],
        head_size_v=sizes[1],
        kv_cache_dtype=INT8,
        kv_cache_layout=layout,
    )
    step = Step(Case(spec=spec, query_lens=(1, 4, 6), seq_lens=(9, 11, 6)), device)
    step.check(run_fused(step))


def test_a_mask_may_hide_every_key():
    spec = layer_spec(dtype=torch.float32, custom_mask=True)
    step = Step(Case(spec=spec, query_lens=(1, 1, 1, 5, 2), seq_lens=(4, 4, 5, 5, 9)))
    for mask in step.masks[1:]:
        mask[-1] = False
    step.batch = step._make_batch()
    output = run_fused(step)
    step.check(output)
    assert bool((output[1] == 0).all())


def test_decodes_of_similar_length_share_a_call():
    step = Step(Case(spec=layer_spec(), query_lens=(1,) * 6, seq_lens=(30, 29, 30, 28, 30, 27)))
    builder = _builder(step)
    assert len(builder.build(step.batch).groups) == 1


def test_decodes_of_very_different_length_do_not_share_a_call():
    """Else the short ones would read as many keys as the longest."""
    step = Step(Case(spec=layer_spec(), query_lens=(1,) * 4, seq_lens=(200, 3, 3, 3)))
    assert len(_builder(step).build(step.batch).groups) == 2


def test_keys_before_the_window_are_not_read():
    step = Step(Case(spec=layer_spec(sliding_window=8), query_lens=(1, 3), seq_lens=(200, 200)))
    groups = _builder(step).build(step.batch).groups
    assert sorted(group.positions.shape[1] for group in groups) == [8, 10]


@pytest.mark.parametrize(("kv_cache_dtype", "nan"), [("auto", torch.nan), (INT8, -1)])
def test_nan_before_the_window_does_not_reach_the_output(kv_cache_dtype, nan):
    spec = layer_spec(sliding_window=3, kv_cache_dtype=kv_cache_dtype)
    step = Step(Case(spec=spec, query_lens=(2, 1), seq_lens=(12, 13)))
    expected = step.expected()[0]
    for request in (0, 1):
        step.kv_cache[step.batch.block_table[request, :2].long()] = nan
    step.check(run_fused(step), expected)


def test_ranges_extend_the_window_by_as_much_as_needed():
    spec = layer_spec(sliding_window=3, bidirectional_ranges=True)
    ranges = ((0, 2, 5), (1, 7, 12))
    step = Step(Case(spec=spec, query_lens=(2, 2), seq_lens=(12, 12), ranges=ranges))
    expected = step.expected()[0]
    groups = _builder(step).build(step.batch).groups
    assert [group.positions.shape[1] for group in groups] == [5]
    for request in (0, 1):
        step.kv_cache[step.batch.block_table[request, :1].long()] = torch.nan
    step.check(run_fused(step), expected)


def test_a_prompt_without_a_past_does_not_read_the_cache():
    """Its keys are the given rows; nothing is gathered."""
    step = Step(Case(spec=layer_spec(), query_lens=(6,), seq_lens=(6,)))
    assert _builder(step).build(step.batch).groups[0].key_rows == slice(0, 6)


def test_the_math_path_is_warned_of(monkeypatch):
    step = Step(Case(spec=layer_spec(), query_lens=(1, 4), seq_lens=(9, 4)))
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.MATH.value)
    with pytest.warns(MathPathWarning, match="no fused kernel for .* torch.float64 queries on cpu"):
        step.run("TORCH_SDPA")


@pytest.mark.parametrize(
    "feature", [{"logits_soft_cap": 30.0}, {"sinks": torch.zeros(4)}, {"returns_lse": True}]
)
def test_impl_rejects_undeclared_features(feature):
    with pytest.raises(
        UnsupportedError, match=f"TORCH_SDPA does not support {next(iter(feature))}"
    ):
        SDPAImpl(4, 8, 1.0, **feature)


def test_quantized_output_is_rejected():
    step = Step(Case(spec=layer_spec(), query_lens=(1,), seq_lens=(3,)))
    output = torch.empty(1, 4, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="does not quantize its output"):
        step.run("TORCH_SDPA", output=output, output_scale=torch.ones(()))


def test_scales_per_head_are_rejected():
    spec = layer_spec(kv_cache_dtype="fp8_e4m3")
    step = Step(Case(spec=spec, query_lens=(1,), seq_lens=(3,)))
    step.layer._k_scale_float = float("nan")
    with pytest.raises(UnsupportedError, match="scales per head"):
        step.run("TORCH_SDPA")


@pytest.mark.parametrize("new_lens", [(7, 5), (0, 5), (0, 0)], ids=str)
def test_cross_attention(device, new_lens):
    spec = layer_spec(dtype=torch.float32, attn_type=AttentionType.ENCODER_DECODER)
    case = Case(spec=spec, query_lens=(3, 1), seq_lens=(7, 5), new_lens=new_lens)
    step = Step(case, device)
    step.check(run_fused(step))


def _builder(step):
    from attn_dispatch.backends.reference.torch_sdpa import SDPABuilder

    return SDPABuilder(step.spec, step.device)
