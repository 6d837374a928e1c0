"""Decode graphs of vLLM: on stand-ins in `make test`, and on its own files.

Without a GPU a replay is another call on the metadata of the capture: whatever a graph would replay
comes from static tensors then, too. A real replay runs no Python, so only `build` is called.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from attn_dispatch import DeviceMatch, UnsupportedError, attention_backend, register_backend
from attn_dispatch.backends.triton.mla import TritonMLABackend
from attn_dispatch.conformance.oracle import attention_of_request
from attn_dispatch.interface.capability import Capabilities
from attn_dispatch.selection.registry import registry
from support import vllm_cases, vllm_mla_cases
from support.graph_cases import BACKEND, interpreted_backend
from support.vllm_cases import BLOCK, HEADS, KV_HEADS, SIZE, assert_close, common_of

#: (keys of each request, slots of padding): steps that are replayed on a graph of 3 requests.
STEPS = (([33, 5, 40], 0), ([17], 2), ([], 3))
SIZES = (3, 1)


class FullMode:
    """What vLLM's cudagraph_mode is asked."""

    def has_full_cudagraphs(self):
        return True


def configure(engine):
    """vLLM's configuration with graphs of whole decodes."""
    engine.config.compilation_config.cudagraph_mode = FullMode()


def capture_step(engine, builder, size):
    """The metadata that a decode of this size is captured with."""
    return builder.build_for_cudagraph_capture(step_of(engine, [1] * size, 0))


def interpreted(check):
    """Run a check on a backend that can be captured, in Triton's interpreter without a GPU."""

    @functools.wraps(check)
    def run(*given):
        with interpreted_backend(), attention_backend(BACKEND), torch.inference_mode():
            check(*given)

    return run


def step_of(engine, total, padding):
    """A decode as vLLM describes it, padded to the size of a graph."""
    return common_of(
        engine, new=[1] * len(total), total=total, padded_reqs=padding, padded_tokens=padding,
        max_query_len=1, max_seq_len=max(total, default=1),
    )  # fmt: skip


def capture(engine, builder, layer, run):
    """Metadata of each size, largest first, as vLLM captures; the layer runs as in a capture."""
    found = {}
    for size in SIZES:
        made = capture_step(engine, builder, size)
        assert capture_step(engine, builder, size).context is made.context
        assert made.num_actual_tokens == size
        run(made, size)
        found[size] = made
    return found


@interpreted
def check_dense(engine, fp8_output):
    """Later steps are read from where the capture reads them; padding writes nothing."""
    configure(engine)
    layer = engine.layer("l0", per_layer_sliding_window=20)
    if fp8_output:
        assert layer.impl.fused_output_quant_supported(engine.fp8_static)
    builder = vllm_cases.builder_of(engine, [layer])
    support = type(builder).get_cudagraph_support(engine.config, builder.kv_cache_spec)
    assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE"
    cache, _ = vllm_cases.cache_of(engine.version, vllm_cases.LAYOUTS[engine.version][0], blocks=12)
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(5)))
    layer.kv_cache = cache
    scale = torch.tensor(0.05) if fp8_output else None

    def run(metadata, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(size, h, SIZE, generator=generator) for h in (HEADS, *[KV_HEADS] * 2)]
        dtype = torch.float8_e4m3fn if fp8_output else torch.float32
        output = torch.full((size, HEADS, SIZE), float("nan")).to(dtype)
        scales = [scale] if fp8_output else []
        engine.run(layer, *given, metadata, output, *scales)
        return *given, output.float() * (0.05 if fp8_output else 1.0)

    before = cache.clone()
    captured = capture(engine, builder, layer, run)
    assert torch.equal(cache, before)
    for seed, (total, padding) in enumerate(STEPS):
        before = cache.clone()
        builder.build(0, step_of(engine, total, padding))
        query, key, value, output = run(captured[3], 3, seed)
        assert not output[len(total) :].any()
        keys, values = vllm_cases.keys_and_values(cache)
        for i, t in enumerate(total):
            rows = [(int(vllm_cases.TABLE[i, p // BLOCK]), p % BLOCK) for p in range(t)]
            assert torch.equal(keys[rows[-1]], key[i])
            assert torch.equal(values[rows[-1]], value[i])
            held = [torch.stack([part[row] for row in rows]).double() for part in (keys, values)]
            seen = torch.arange(t)[None] > t - 1 - 20
            expected, _ = attention_of_request(query[i : i + 1], *held, scale=SIZE**-0.5, seen=seen)
            if fp8_output:
                torch.testing.assert_close(
                    output[i : i + 1].double(), expected, rtol=0.07, atol=0.02
                )
            else:
                assert_close(output[i : i + 1], expected)
        written = (cache != before).flatten(1).any(1).sum()
        assert written <= len(total)


@interpreted
def check_eager_steps_of_the_same_size(engine):
    """A step that runs eagerly has metadata of its own, whatever graphs there are."""
    configure(engine)
    layer = engine.layer("l0")
    builder = vllm_cases.builder_of(engine, [layer])
    cache, _ = vllm_cases.cache_of(engine.version, vllm_cases.LAYOUTS[engine.version][0])
    layer.kv_cache = cache
    capture_step(engine, builder, 4)
    query, *_, output = vllm_cases.one_step(
        engine, layer, cache, metadata=builder.build(0, common_of(engine))
    )
    assert_close(output, vllm_cases.reference(query, cache))
    with pytest.raises(UnsupportedError, match="PIECEWISE"):
        builder.build_for_cudagraph_capture(common_of(engine))


@interpreted
def check_levels(engine):
    """Graphs are reported only where each layer was made for them, and not with drafts."""
    configure(engine)
    able = engine.layer("l0")
    drafts = SimpleNamespace(num_speculative_tokens=2)
    cases = [([able], {}, 1), ([able], {"speculative_config": drafts}, 0)]
    with attention_backend("TORCH_SDPA"):
        unable = engine.layer("l1")
    cases += [([able, unable], {"speculative_config": None}, 0)]
    for layers, config, level in cases:
        vars(engine.config).update(config)
        builder = vllm_cases.builder_of(engine, layers)
        support = type(builder).get_cudagraph_support(engine.config, builder.kv_cache_spec)
        assert support.value == level
    del engine.config.compilation_config.cudagraph_mode
    assert not engine.layer("l2").impl.attention.has_graphs


def check_latents(engine):
    """The same for a layer of latent attention."""
    case = vllm_mla_cases
    configure(engine)
    kv_b_proj = case.projection()
    with interpreted_latents(), torch.inference_mode():
        layer = case.layer_of(engine, kv_b_proj=kv_b_proj)
        builder = case.builder_of(engine, [layer])
        support = type(builder).get_cudagraph_support(engine.config, builder.kv_cache_spec)
        assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE"
        cache, _ = case.cache_of("LBNC")
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(5)))
        layer.kv_cache = cache

        def run(metadata, size):
            given = case.inputs(size)
            output = torch.full((size, case.HEADS * case.VALUES), float("nan"))
            engine.run_mla(layer, *given, metadata, output)
            return *given, output

        before = cache.clone()
        captured = capture(engine, builder, layer, run)
        assert torch.equal(cache, before)
        for total, padding in STEPS:
            builder.build(0, step_of(engine, total, padding))
            query, *_, output = run(captured[3], 3)
            assert not output[len(total) :].any()
            lengths = [(1, each) for each in total]
            expected = case.reference(query, cache, kv_b_proj.weight, lengths=lengths)
            assert_close(output[: len(total)], expected)


@contextlib.contextmanager
def interpreted_latents():
    """TRITON_MLA for a CPU."""

    @register_backend
    class Interpreted(TritonMLABackend):
        name = "INTERPRETED_MLA"
        capabilities = Capabilities(
            devices=(DeviceMatch(vendor="cpu"),), **TritonMLABackend.capabilities.fields
        )

    with attention_backend("mla=INTERPRETED_MLA"):
        yield
    registry.unregister("INTERPRETED_MLA")


#: Checks that take an engine.
CHECKS = (check_eager_steps_of_the_same_size, check_levels, check_latents)
