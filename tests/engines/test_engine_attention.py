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
    UnsupportedError,
    attention_backend,
    batches_by_layer,
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


def test_the_memory_of_the_engine_is_followed():
    """Its objects may be made at each call; what counts is where they are, and how they lie."""
    attention, caches = EngineAttention(**SIZES), [cache_of(), cache_of()]
    made = []

    def view(given):
        made.append(given)
        return given[0]

    for cache, count in ((caches[0], 1), (caches[0], 1), (caches[1], 2), (caches[0], 3)):
        attention.follow((cache.view(cache.shape), "kind"), view, name="layers.0")
        assert len(made) == count
        _, key = step(attention)
        assert torch.equal(cache[1, 0, :3], key)
    attention.follow((caches[0].transpose(2, 3).contiguous().transpose(2, 3), "kind"), view)
    assert len(made) == 4
    assert attention.layer.prefix == "layers.0"
    encoder = EngineAttention(**SIZES, attn_type="encoder_only")
    encoder.follow((caches[0], "kind"), view)
    assert len(made) == 4
    assert encoder.layer.kv_cache is None


def test_one_scale_of_two_is_rejected():
    attention = EngineAttention(**SIZES, kv_cache_dtype="fp8_e4m3", prefix="layers.0")
    with pytest.raises(InvalidInputError, match=r"layers\.0"):
        attention.set_scales(0.5, None)
    attention.set_scales(None, None)
    cache = cache_of(dtype=torch.float8_e4m3fn)
    attention.bind(cache, cache, "layers.0")
    _, key = step(attention)
    torch.testing.assert_close(cache[1, 0, :3].float(), key, rtol=0.07, atol=0.01)


def test_a_cache_of_bytes_has_the_elements_of_the_layer():
    attention = EngineAttention(**SIZES, kv_cache_dtype="fp8_e5m2")
    assert attention.dtype_of_bytes(torch.empty(1, dtype=torch.uint8)) == torch.float8_e5m2
    assert attention.dtype_of_bytes(torch.empty(1)) is None


def test_sinks_are_those_that_the_layer_was_made_with():
    sinks = torch.zeros(4)
    attention = EngineAttention(**SIZES, sinks=sinks)
    assert attention.has_sinks(sinks.view(4))
    assert not attention.has_sinks(sinks.clone())
    assert not attention.has_sinks(None)
    assert EngineAttention(**SIZES).has_sinks(None)
    assert not EngineAttention(**SIZES).has_sinks(sinks)


def test_a_short_prefix_of_few_requests_is_not_read_once():
    attention = EngineAttention(**SIZES, try_shared_prefix=True)
    assert attention.uses_shared_prefix(256, 8)
    assert not attention.uses_shared_prefix(255, 8)
    assert not attention.uses_shared_prefix(256, 7)
    assert not EngineAttention(**SIZES).uses_shared_prefix(256, 8)


def test_a_flat_query_has_a_flat_output():
    attention, cache = EngineAttention(**SIZES), cache_of()
    attention.bind(cache, cache, "layers.0")
    wanted, _ = step(attention)
    batch = AttentionBatch.create(
        [3], [3], block_table=torch.tensor([[1]], dtype=torch.int32), block_size=16
    )
    query = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    found = attention.forward(query.flatten(1), None, None, ForwardContext(batch))
    assert torch.equal(found, wanted.flatten(1))


def test_graphs_can_be_required_later():
    with interpreted_backend(), attention_backend(BACKEND):
        attention, cache = EngineAttention(**SIZES), cache_of()
        attention.bind(cache, cache, "layers.0")
        assert attention.quantizes_output()
        before = attention.layers
        assert not attention.has_graphs
        attention.require_cuda_graph()
        assert attention.has_graphs
        assert [each.spec.cuda_graph for each in attention.layers] == [True, True]
        assert [each.prefix for each in attention.layers] == [each.prefix for each in before]
        assert attention.is_bound_to(cache)
        assert attention.layer.kv_cache is cache
    with attention_backend("REFERENCE"):
        attention = EngineAttention(**SIZES)
        attention.bind(cache, cache, "layers.1")
        layer = attention.layer
        with pytest.raises(UnsupportedError, match=r"layers\.1.*cuda_graph"):
            attention.require_cuda_graph()
        assert attention.layer is layer
        assert not attention.has_graphs
        step(attention)


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


def test_groups_of_layers_have_batches_of_their_own(monkeypatch):
    with interpreted_backend(), attention_backend(BACKEND), torch.inference_mode():
        cache = cache_of(blocks=8)
        attentions = [EngineAttention(**SIZES, prefix=f"l{i}", group=i) for i in range(2)]
        attentions.append(EngineAttention(**SIZES, prefix="l2", attn_type="encoder_only"))
        for each in attentions[:2]:
            each.bind(cache, cache, each.layer.prefix)
        steps = DecodeSteps(attentions, max_num_seqs=1, max_seq_len=32)
        with pytest.raises(InvalidInputError, match="no step of 2 requests"):
            steps.prepare(2, {})
        captured = steps.capture(2, warm_up=True)  # more requests than were stated
        assert all(each.has_graphs for each in attentions[:2])
        assert not cache.any()
        made = [
            AttentionBatch.create(
                [1], [1], block_table=torch.tensor([[block]], dtype=torch.int32), block_size=16
            )
            for block in (3, 5)
        ]
        steps.prepare(2, batches_by_layer(attentions[:2], lambda group: made[group]))
        query, key, value = (torch.ones(2, heads, 16) for heads in (4, 2, 2))
        for each, block in zip(attentions, (3, 5), strict=False):
            assert not cache[block].any()
            each.forward(query, key, value, captured)
            assert cache[block, :, 0].all()
        monkeypatch.setattr("attn_dispatch.engines.graphs.is_capturing", lambda: True)
        for call in (lambda: steps.capture(2), lambda: steps.prepare(2, made[0])):
            with pytest.raises(UnsupportedError, match="before the capture"):
                call()


def test_reasons_are_sentences():
    spec = AttentionSpec(**SIZES, block_size=16)
    assert reasons_against(spec, "cpu") == []
    with attention_backend("TORCH_SDPA"):
        reasons = reasons_against(spec.replace(sinks=True), "cpu")
    assert any(each.startswith("TORCH_SDPA: sinks=True") for each in reasons)
