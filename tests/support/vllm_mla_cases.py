"""Cases of vLLM's layers with latent attention: on stand-ins in `make test`, and on its own files.

An `engine` is that of `vllm_cases`; here it has also `mla` (the module with our classes) and
`mla_layer(name, kv_b_proj, **arguments)`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_dispatch import UnsupportedError
from attn_dispatch.conformance.oracle import attention_of_request
from support.vllm_cases import BLOCK, NEW, ROWS, TABLE, TOTAL, assert_close, common_of

HEADS, NOPE, ROPE, VALUES, LATENT = 4, 16, 16, 12, 64
SCALE = 0.3

#: (new tokens, all keys) of the requests of a step.
LENGTHS = tuple(zip(NEW, TOTAL, strict=True))

#: The dimensions of (layers, blocks, tokens in a block, elements) in memory, outermost first.
LAYOUTS = ("LBNC", "BLNC")


def projection(dtype=torch.float32):
    """kv_b_proj: what vLLM's is for an impl, a module with a weight."""
    generator = torch.Generator().manual_seed(2)
    made = torch.nn.Linear(LATENT, HEADS * (NOPE + VALUES), bias=False, dtype=dtype)
    made.requires_grad_(False)
    made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * LATENT**-0.5)
    made.quant_method = None
    return made


def layer_of(engine, name="l0", kv_b_proj=None, **arguments):
    return engine.mla_layer(name, kv_b_proj or projection(), **arguments)


def cache_of(layout, dtype=torch.float32):
    """(the second of three layers, (num_blocks, block_size, elements); all of the memory)."""
    sizes = {"L": 3, "B": 10, "N": BLOCK, "C": LATENT + ROPE}
    memory = torch.zeros([sizes[each] for each in layout], dtype=dtype)
    return memory.permute([layout.index(each) for each in "LBNC"])[1], memory


def builder_of(engine, layers, **config):
    vars(engine.config).update(config)
    engine.config.compilation_config.static_forward_context = {
        layer.layer_name: layer for layer in layers
    }
    spec = SimpleNamespace(block_size=BLOCK, head_size=LATENT + ROPE, head_size_v=0)
    make = engine.mla.AttnDispatchMLABackend.get_builder_cls()
    return make(spec, [each.layer_name for each in layers], engine.config, torch.device("cpu"))


def fill(cache, scale=1.0):
    """Write the latents of earlier steps."""
    generator = torch.Generator().manual_seed(1)
    past = torch.randn(len(NEW), max(TOTAL), LATENT + ROPE, generator=generator)
    for i, (n, t) in enumerate(zip(NEW, TOTAL, strict=True)):
        for p in range(t - n):
            cache[TABLE[i, p // BLOCK], p % BLOCK] = (past[i, p] / scale).to(cache.dtype)


def inputs(rows):
    """Queries, normalized latents, and keys that all heads share, as vLLM's model has them."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, HEADS, NOPE + ROPE), (rows, LATENT), (rows, 1, ROPE))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def reference(query, cache, weight, *, scale=1.0, lengths=LENGTHS):
    """The output in float64, from what the cache holds after the step."""
    parts = weight.double().view(HEADS, NOPE + VALUES, LATENT).split([NOPE, VALUES], 1)
    outputs, start = [], 0
    for i, (n, t) in enumerate(lengths):
        held = torch.stack([cache[TABLE[i, p // BLOCK], p % BLOCK].double() for p in range(t)])
        latent, shared = (held * scale).split([LATENT, ROPE], -1)
        key, value = (torch.einsum("hdl,tl->thd", part, latent) for part in parts)
        key = torch.cat([key, shared[:, None].expand(-1, HEADS, -1)], -1)
        seen = torch.arange(t - n, t)[:, None] >= torch.arange(t)
        rows = query[start : start + n]
        outputs.append(attention_of_request(rows, key, value, scale=SCALE, seen=seen)[0])
        start += n
    return torch.cat(outputs or [query[:0, :, :VALUES].double()]).flatten(1)


def one_step(engine, layer, cache, *, rows=ROWS, metadata=None, **common):
    """(queries, latents, shared keys, output) of a step over a cache that holds earlier ones."""
    layer.kv_cache = cache
    given = inputs(rows)
    output = torch.full((rows, HEADS * VALUES), float("nan"))
    if metadata is None:
        metadata = builder_of(engine, [layer]).build(0, common_of(engine, **common))
    engine.run_mla(layer, *given, metadata, output)
    return *given, output


def check_layout(engine, layout):
    """A step of decodes, prompts and chunks reads and writes vLLM's own memory."""
    kv_b_proj = projection()
    layer = layer_of(engine, kv_b_proj=kv_b_proj)
    cache, memory = cache_of(layout)
    fill(cache)
    query, latents, shared, output = one_step(
        engine, layer, cache, rows=ROWS + 3, padded_tokens=3, padded_reqs=2
    )
    assert layer.impl.attention.layer.kv_cache.data_ptr() == cache.data_ptr()
    outside = memory.index_select(layout.index("L"), torch.tensor([0, 2]))
    assert not outside.any()
    new = torch.cat([latents, shared.flatten(1)], -1)
    assert torch.equal(cache[TABLE[3, 2], 40 - 32 - 1], new[ROWS - 1])
    assert torch.equal(cache[TABLE[1, 0], :5], new[1:6])
    assert_close(output[:ROWS], reference(query[:ROWS], cache, kv_b_proj.weight))


def check_weights_are_read_when_they_are_loaded(engine):
    """The layer is made before the weights are loaded, and a model can load others."""
    kv_b_proj = projection()
    layer = layer_of(engine, kv_b_proj=kv_b_proj)
    for factor in (0.5, 3.0):
        kv_b_proj.weight.mul_(factor)
        cache, _ = cache_of("LBNC")
        fill(cache)
        query, *_, output = one_step(engine, layer, cache)
        assert_close(output, reference(query, cache, kv_b_proj.weight))


def check_fp8_latents(engine):
    """A cache of fp8 is bytes in vLLM, and has the scale of its layer."""
    kv_b_proj = projection()
    layer = layer_of(engine, kv_b_proj=kv_b_proj, kv_cache_dtype="fp8_e4m3")
    layer._k_scale_float = 0.25
    raw, _ = cache_of("LBNC", torch.uint8)
    typed = raw.view(torch.float8_e4m3fn)
    fill(typed, 0.25)
    for _ in range(2):
        query, latents, _, output = one_step(engine, layer, raw)
        expected = reference(query, typed, kv_b_proj.weight, scale=0.25)
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
    stored = typed[TABLE[1, 0], :5, :LATENT].float() * 0.25
    torch.testing.assert_close(stored, latents[1:6], rtol=0.1, atol=0.02)


def check_drafts(engine):
    """With drafts, the host knows bounds only, and the device's lengths count."""
    drafts = SimpleNamespace(num_speculative_tokens=4)
    engine.config.speculative_config = drafts
    kv_b_proj = projection()
    layer = layer_of(engine, kv_b_proj=kv_b_proj)
    assert layer.impl.attention.layer.spec.lengths == "upper_bound"
    cache, _ = cache_of("LBNC")
    fill(cache)
    query, *_, output = one_step(engine, layer, cache, bounds=[36, 9, 3, 45])
    assert_close(output, reference(query, cache, kv_b_proj.weight))


def check_profiling(engine):
    """Without metadata the output is zeros, and there is no cache yet."""
    layer = layer_of(engine)
    output = torch.full((3, HEADS * VALUES), float("nan"))
    engine.run_mla(layer, *inputs(3), None, output)
    assert not output.any()


def check_validation(engine):
    """Reasons are ours, and a model of one kind is no model of the other."""
    backend = engine.mla.AttnDispatchMLABackend
    plain = {
        "head_size": 576, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None,
        "use_mla": True, "has_sink": False, "use_sparse": False, "device_capability": (9, 0),
    }  # fmt: skip
    validate = backend.validate_configuration
    assert backend.is_mla()
    assert validate(**plain) == []
    assert validate(**plain | {"kv_cache_dtype": "fp8"}) == []
    assert validate(**plain | {"head_size": 320, "block_size": 64}) == []
    for given, words in (
        ({"use_mla": False}, "without latents"),
        ({"use_sparse": True}, "indexer"),
        ({"use_dcp": True}, "decode context parallelism"),
        ({"has_sink": True}, "sinks"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, "fp8_ds_mla"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"head_size": 64}, "kv_lora_rank"),
        ({"a_flag_of_the_future": True}, "not known"),
    ):
        assert any(words in each for each in validate(**plain | given)), given
    assert backend.supports_head_size(576)
    assert not backend.supports_sink()
    assert backend.get_supported_kernel_block_sizes()[0].base == 16


def check_rejected_layers(engine):
    """What no backend has is an error when the layer is made."""
    with pytest.raises(UnsupportedError, match="some_feature"):
        layer_of(engine, some_feature=2)
    with pytest.raises(UnsupportedError, match="indexer"):
        layer_of(engine, "l1", indexer=object())
    with pytest.raises(UnsupportedError, match="fp8_ds_mla"):
        layer_of(engine, "l2", kv_cache_dtype="fp8_ds_mla")


def check_choice(engine):
    """The kind of model decides which class vLLM gets for the name."""
    from attn_dispatch.integrations import vllm as plugin

    name = plugin.BACKEND_CLASS.rpartition(".")[2]
    for model, found in (
        (None, engine.ours.AttnDispatchBackend),
        (SimpleNamespace(use_mla=False), engine.ours.AttnDispatchBackend),
        (SimpleNamespace(use_mla=True), engine.mla.AttnDispatchMLABackend),
    ):
        engine.config.model_config = model
        assert getattr(plugin, name) is found
    with pytest.raises(AttributeError, match="Other"):
        plugin.Other  # noqa: B018


#: Checks that take an engine.
CHECKS = (
    check_weights_are_read_when_they_are_loaded,
    check_fp8_latents,
    check_drafts,
    check_profiling,
    check_validation,
    check_rejected_layers,
    check_choice,
)
