"""EngineAttention, DecodeSteps and reasons_against: what plug-ins for engines are made of."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    AttentionBatch,
    AttentionSpec,
    DecodeSteps,
    EngineAttention,
    InvalidInputError,
    attention_backend,
    reasons_against,
)
from attn_dispatch.runtime.context import ForwardContext
from support.graph_cases import BACKEND, interpreted_backend

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}


def cache_of(blocks=4, block_size=16, dtype=torch.float32):
    return torch.zeros(blocks, 2, block_size, 2, 16).to(dtype)


def step(attention, output=None, scale=None, device="cpu"):
    """The first 3 tokens of a request, in block 1."""
    batch = AttentionBatch.create(
        [3], [3], block_table=torch.tensor([[1]], dtype=torch.int32), block_size=16
    )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 16, generator=generator) for heads in (4, 2, 2))
    output = torch.empty(3, 4, 16) if output is None else output
    attention.forward(query, key, value, ForwardContext(batch), output, scale)
    return output, key


def test_a_layer_follows_the_caches_of_its_engine():
    attention = EngineAttention(**SIZES)
    outputs = []
    for cache in (cache_of(), cache_of(block_size=16)):
        assert not attention.is_bound_to(cache)
        attention.bind(cache, cache, "layers.0")
        assert attention.is_bound_to(cache)
        output, key = step(attention)
        assert torch.equal(cache[1, 0, :3], key)
        outputs.append(output)
    assert attention.layer.prefix == "layers.0"
    assert torch.equal(*outputs)


def test_scales_of_a_cache_are_followed():
    attention = EngineAttention(**SIZES, kv_cache_dtype="fp8_e4m3")
    attention.set_scales(0.5, 0.25)  # before there is a cache
    for scales in ((0.5, 0.25), (0.25, 0.5)):
        cache = cache_of(dtype=torch.float8_e4m3fn)
        attention.bind(cache, cache, "layers.0")
        attention.set_scales(*scales)
        _, key = step(attention)
        stored = cache[1, 0, :3].float() * scales[0]
        torch.testing.assert_close(stored, key, rtol=0.07, atol=0.01)


def test_a_second_layer_has_fp8_output_over_the_same_cache():
    attention, cache = EngineAttention(**SIZES), cache_of()
    attention.bind(cache, cache, "layers.0")
    output, _ = step(attention)
    assert attention.quantizes_output()
    quantized = torch.empty(3, 4, 16, dtype=torch.float8_e4m3fn)
    step(attention, quantized, torch.tensor(0.05))
    torch.testing.assert_close(quantized.float() * 0.05, output, rtol=0.07, atol=0.01)
    assert [each.prefix for each in attention.layers] == ["layers.0", "layers.0, fp8 output"]


def test_an_output_scale_that_no_backend_takes_is_rejected():
    with attention_backend("TORCH_SDPA"):
        attention = EngineAttention(**SIZES)
        cache = cache_of()
        attention.bind(cache, cache, "layers.0")
        assert not attention.quantizes_output()
        with pytest.raises(InvalidInputError, match="quantizes_output"):
            step(attention, scale=torch.tensor(0.05))
    assert not cache.any()


def test_features_are_tried():
    with attention_backend("REFERENCE"):
        attention = EngineAttention(**SIZES, try_cuda_graph=True)
        assert not attention.has_graphs
        assert EngineAttention(**SIZES, try_shared_prefix=True).shares_prefix
    with interpreted_backend(), attention_backend(BACKEND):
        assert EngineAttention(**SIZES, try_cuda_graph=True).has_graphs


def test_steps_of_decodes_are_made_once_and_filled():
    with interpreted_backend(), attention_backend(BACKEND), torch.inference_mode():
        attention, cache = EngineAttention(**SIZES, try_cuda_graph=True), cache_of()
        attention.bind(cache, cache, "layers.0")
        steps = DecodeSteps(attention.layers, max_num_seqs=2, max_seq_len=32)
        assert 2 not in steps
        captured = steps.capture(2)
        assert steps.capture(2) is captured
        assert 2 in steps
        attention.warm_up(captured)
        assert not cache.any()
        batch = AttentionBatch.create(
            [1], [1], block_table=torch.tensor([[3]], dtype=torch.int32), block_size=16
        )
        assert steps.prepare(2, batch) is captured
        query, key, value = (torch.ones(2, heads, 16) for heads in (4, 2, 2))
        output = torch.empty(2, 4, 16)
        attention.forward(query, key, value, captured, output)
        assert torch.equal(output[0], torch.ones(4, 16))
        assert not output[1].any()
        assert cache[3, :, 0].all()
        assert cache.count_nonzero() == 2 * 2 * 16


def test_reasons_are_sentences():
    spec = AttentionSpec(**SIZES, block_size=16)
    assert reasons_against(spec, "cpu") == []
    with attention_backend("TORCH_SDPA"):
        reasons = reasons_against(spec.replace(sinks=True), "cpu")
    assert any(each.startswith("TORCH_SDPA: sinks=True") for each in reasons)
