"""Cases of the vLLM plug-in: run on stand-ins of vLLM in `make test`, and on its own files.

An `engine` has: `version`, `ours` (the module with our classes), `common` (the class of a step's
metadata), `config` (what get_current_vllm_config returns), `fp8_static` and `fp8_blocks` (keys of
quantizations), `layer(name, **arguments)` and `run(layer, query, key, value, metadata, output)`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_dispatch import UnsupportedError, attention_backend
from attn_dispatch.conformance.oracle import attention_of_request
from support.plain_backend import plain_backend

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 32, 16
NEW, TOTAL = [1, 5, 1, 20], [33, 5, 1, 40]  # decodes, prompts and a chunk, in any order
ROWS = sum(NEW)
TABLE = torch.tensor([[7, 2, 9], [4, 0, 0], [1, 0, 0], [3, 8, 5]], dtype=torch.int32)

#: The dimensions of (layers, blocks, heads, tokens in a block, elements) in memory, outermost
#: first: all layouts of vLLM 0.33; and those of 0.24, with K and V (2) as another dimension.
LAYOUTS = {
    "0.33.0": ("LBNHC", "LBHNC", "LHBNC", "BLNHC", "BLHNC", "BHLNC"),
    "0.24.0": ("LB2NHC", "LB2HNC", "BL2NHC", "BHL2NC"),
}


def cache_of(version, layout, *, blocks=10, dtype=torch.float32):
    """(what vLLM hands over, all of its memory): the second of three layers."""
    older = "2" in layout
    sizes = {"L": 3, "B": blocks, "2": 2, "N": BLOCK, "H": KV_HEADS, "C": SIZE * (2 - older)}
    memory = torch.zeros([sizes[each] for each in layout], dtype=dtype)
    logical = "LB2NHC" if older else "LBHNC"
    return memory.permute([layout.index(each) for each in logical])[1], memory


def keys_and_values(cache):
    """(num_blocks, block_size, num_kv_heads, size) each."""
    if cache.dim() == 5:
        return cache[:, 0], cache[:, 1]
    return cache.transpose(1, 2).split(SIZE, dim=-1)


def common_of(engine, *, new=NEW, total=TOTAL, bounds=None, padded_tokens=0, padded_reqs=0, **more):
    """A step as vLLM describes it; padding requests at the end have no tokens."""
    starts = [0]
    for each in new:
        starts.append(starts[-1] + each)
    starts += [starts[-1]] * padded_reqs
    slots = [
        int(TABLE[i, p // BLOCK]) * BLOCK + p % BLOCK
        for i, (n, t) in enumerate(zip(new, total, strict=True))
        for p in range(t - n, t)
    ] + [-1] * padded_tokens
    rows = len(new) + padded_reqs
    table = torch.zeros(rows, TABLE.shape[1], dtype=torch.int32)
    table[: len(new)] = TABLE[: len(new)]
    padding = [0] * padded_reqs
    given = {
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "query_start_loc_cpu": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor([*total, *padding], dtype=torch.int32),
        "num_reqs": rows,
        "num_actual_tokens": starts[-1] + padded_tokens,
        "max_query_len": max(new, default=0),
        "max_seq_len": max(bounds or total, default=0),
        "block_table_tensor": table,
        "slot_mapping": torch.tensor(slots, dtype=torch.int64),
        "seq_lens_cpu_upper_bound": torch.tensor(
            [*(bounds or total), *[9] * padded_reqs],
            dtype=torch.int32,  # of an earlier step
        ),
    }
    return engine.common(**(given | more))


def builder_of(engine, layers, **spec):
    """The builder of these layers' metadata."""
    engine.config.compilation_config.static_forward_context = {
        layer.layer_name: layer for layer in layers
    }
    kv_cache_spec = SimpleNamespace(block_size=BLOCK, head_size=SIZE, head_size_v=SIZE, **spec)
    make = engine.ours.AttnDispatchBackend.get_builder_cls()
    names = [layer.layer_name for layer in layers]
    return make(kv_cache_spec, names, engine.config, torch.device("cpu"))


def inputs(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, heads, SIZE, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def assert_close(output, expected):
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


def fill(cache, past, scales=(1.0, 1.0)):
    """Write the keys and values of earlier steps, (num_kv_heads, size) for each token."""
    for part, each, scale in zip(keys_and_values(cache), past, scales, strict=True):
        for i, (n, t) in enumerate(zip(NEW, TOTAL, strict=True)):
            for p in range(t - n):
                row = each[i, p] / scale
                part[TABLE[i, p // BLOCK], p % BLOCK] = row.to(part.dtype)


def reference(
    query, cache, *, scales=(1.0, 1.0), scale=SIZE**-0.5, window=None, chunk=None, **features
):
    """The output in float64, from what the cache holds after the step."""
    outputs, start = [], 0
    for i, (n, t) in enumerate(zip(NEW, TOTAL, strict=True)):
        parts = [
            torch.stack([part[TABLE[i, p // BLOCK], p % BLOCK].double() for p in range(t)]) * factor
            for part, factor in zip(keys_and_values(cache), scales, strict=True)
        ]
        distance = torch.arange(t - n, t)[:, None] - torch.arange(t)
        seen = (distance >= 0) & (distance < (window or t))
        if chunk:
            seen &= torch.arange(t - n, t)[:, None] // chunk == torch.arange(t) // chunk
        rows = query[start : start + n]
        outputs.append(attention_of_request(rows, *parts, scale=scale, seen=seen, **features)[0])
        start += n
    return torch.cat(outputs)


def one_step(engine, layer, cache, *, rows=ROWS, scales=(1.0, 1.0), metadata=None, **common):
    """(query, key, value, output) of a step over a cache that holds earlier ones."""
    generator = torch.Generator().manual_seed(1)
    past = torch.randn(2, len(NEW), max(TOTAL), KV_HEADS, SIZE, generator=generator)
    fill(cache, past, scales)
    layer.kv_cache = cache
    layer._k_scale_float, layer._v_scale_float = scales
    query, key, value = inputs(rows)
    output = torch.full((rows, HEADS, SIZE), float("nan"))
    if metadata is None:
        metadata = builder_of(engine, [layer]).build(0, common_of(engine, **common))
    engine.run(layer, query, key, value, metadata, output)
    return query, key, value, output


def check_layout(engine, layout):
    """A step reads and writes vLLM's own memory, in each of its layouts."""
    layer = engine.layer("l0")
    cache, memory = cache_of(engine.version, layout)
    pointer = memory.data_ptr()
    query, key, value, output = one_step(
        engine, layer, cache, rows=sum(NEW) + 3, padded_tokens=3, padded_reqs=2
    )
    used = layer.impl.attention.layer.kv_cache
    first = used.data_ptr() if isinstance(used, torch.Tensor) else used.key.data_ptr()
    assert first == cache.data_ptr()
    assert memory.data_ptr() == pointer
    outside = [each for each in range(memory.shape[layout.index("L")]) if each != 1]
    assert not memory.index_select(layout.index("L"), torch.tensor(outside)).any()
    for part, new in zip(keys_and_values(cache), (key, value), strict=True):
        assert torch.equal(part[TABLE[3, 2], 40 - 32 - 1], new[sum(NEW) - 1])
        assert torch.equal(part[TABLE[1, 0], :5], new[1:6])
    assert_close(output[: sum(NEW)], reference(query[: sum(NEW)], cache))
    assert not output[sum(NEW) :].any()


SLOPES = [0.5, 0.25, 0.125, 0.0625]
SINKS = [0.3, -1.0, 2.0, 0.0]

#: name -> (arguments of the layer, what the reference gets)
FEATURES = {
    "scale": ({"scale": 0.4}, {"scale": 0.4}),
    "sliding_window": ({"per_layer_sliding_window": 7}, {"window": 7}),
    "soft_cap": ({"logits_soft_cap": 2.0}, {"cap": 2.0}),
    "no_soft_cap": ({"logits_soft_cap": 0.0}, {}),
    "alibi": ({"alibi_slopes": SLOPES}, {"slopes": SLOPES}),
    "sinks": ({"sinks": torch.tensor(SINKS)}, {"sinks": SINKS}),
}


def check_feature(engine, name):
    """What a layer has changes the numbers, and as it should."""
    arguments, expected = FEATURES[name]
    layer = engine.layer("l0", **arguments)
    cache, _ = cache_of(engine.version, LAYOUTS[engine.version][0])
    query, *_, output = one_step(engine, layer, cache)
    assert_close(output, reference(query, cache, **expected))


def check_bounds(engine):
    """With drafts, the host knows bounds only, and the device's lengths count."""
    engine.config.speculative_config = SimpleNamespace(num_speculative_tokens=4)
    layer = engine.layer("l0")
    assert layer.impl.attention.layer.spec.lengths == "upper_bound"
    for layout, bounds in ((0, [36, 9, 3, 45]), (1, [4000, 9, 48, 48]), (0, None)):
        cache, _ = cache_of(engine.version, LAYOUTS[engine.version][layout])
        given = {} if bounds else {"seq_lens_cpu_upper_bound": None}
        query, *_, output = one_step(engine, layer, cache, bounds=bounds, **given)
        assert_close(output, reference(query, cache))


def check_cascade(engine):
    """vLLM 0.24 has a prefix that requests share read once; later versions never ask."""
    layers = [engine.layer("l0"), engine.layer("l1", per_layer_sliding_window=64)]
    builder = builder_of(engine, layers[:1])
    prefix, suffix = 256, 5
    asked = dict.fromkeys(
        ("num_query_heads", "num_kv_heads", "use_alibi", "use_sliding_window"), 0
    ) | dict.fromkeys(("use_local_attention", "num_sms", "dcp_world_size"), 0)
    ones = [1] * 8
    uses = builder.use_cascade_attention(prefix, ones, **asked)
    assert uses == (engine.version == "0.24.0")
    assert not builder.use_cascade_attention(prefix, ones[:2], **asked)
    assert not builder.use_cascade_attention(128, ones, **asked)
    assert not builder_of(engine, layers).use_cascade_attention(prefix, ones, **asked)
    if not uses:
        return
    shared, count = prefix // BLOCK, len(ones)
    own = torch.arange(shared, shared + count, dtype=torch.int32)
    table = torch.cat([torch.arange(shared, dtype=torch.int32).expand(count, -1), own[:, None]], 1)
    total = prefix + suffix
    common = common_of(
        engine,
        new=ones[:4],
        total=TOTAL,
        query_start_loc=torch.arange(count + 1, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=torch.full((count,), total, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((count,), total, dtype=torch.int32),
        num_reqs=count,
        num_actual_tokens=count,
        max_seq_len=total,
        block_table_tensor=table,
        slot_mapping=own.long() * BLOCK + suffix - 1,
    )
    outputs = []
    for length in (0, prefix):
        layer = layers[0]
        layer.kv_cache, memory = cache_of(engine.version, LAYOUTS[engine.version][0], blocks=30)
        memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(3)))
        metadata = builder.build(length, common)
        planned = metadata.context.batch_for("l0")
        assert planned.shared_prefix_len == length
        output = torch.empty(count, HEADS, SIZE)
        engine.run(layer, *inputs(count), metadata, output)
        outputs.append(output)
    assert_close(outputs[1], outputs[0].double())
    assert not torch.equal(*outputs)  # another order of summation: in two parts


def check_kv_sharing(engine):
    """A layer that shares reads the target's cache, and writes nothing."""
    target = engine.layer("l0")
    sharing = engine.layer("l1", kv_sharing_target_layer_name="l0")
    cache, _ = cache_of(engine.version, LAYOUTS[engine.version][0])
    metadata = builder_of(engine, [target, sharing]).build(0, common_of(engine))
    one_step(engine, target, cache, metadata=metadata)
    before = cache.clone()
    query, key, value = inputs(sum(NEW))
    sharing.kv_cache = cache
    for given in ((key + 1, value + 1), (None, None)):
        output = torch.full((sum(NEW), HEADS, SIZE), float("nan"))
        engine.run(sharing, query, *given, metadata, output)
        assert torch.equal(cache, before)
        assert_close(output, reference(query, cache))


def check_fp8_cache(engine):
    """An fp8 cache is bytes in vLLM; its scales are those of its layer, also when they change."""
    layer = engine.layer("l0", kv_cache_dtype="fp8_e4m3")
    for scales in ((0.5, 0.25), (0.25, 0.5)):
        raw, _ = cache_of(engine.version, LAYOUTS[engine.version][0], dtype=torch.uint8)
        typed = raw.view(torch.float8_e4m3fn)
        layer.kv_cache = raw
        generator = torch.Generator().manual_seed(1)
        fill(
            typed, torch.randn(2, len(NEW), max(TOTAL), KV_HEADS, SIZE, generator=generator), scales
        )
        layer._k_scale_float, layer._v_scale_float = scales
        query, key, value = inputs(sum(NEW))
        output = torch.full((sum(NEW), HEADS, SIZE), float("nan"))
        metadata = builder_of(engine, [layer]).build(0, common_of(engine))
        engine.run(layer, query, key, value, metadata, output)
        torch.testing.assert_close(
            output.double(), reference(query, typed, scales=scales), rtol=1e-3, atol=1e-3
        )
        stored = keys_and_values(typed)[0][TABLE[1, 0], :5].float() * scales[0]
        torch.testing.assert_close(stored, key[1:6], rtol=0.1, atol=0.02)


def check_fp8_output(engine):
    """The output is quantized by vLLM's scale; other quantizations are not fused."""
    layer = engine.layer("l0")
    assert layer.impl.fused_output_quant_supported(engine.fp8_static)
    assert not layer.impl.fused_output_quant_supported(engine.fp8_blocks)
    cache, _ = cache_of(engine.version, LAYOUTS[engine.version][0])
    query, key, value, output = one_step(engine, layer, cache)
    quantized = torch.empty(output.shape, dtype=torch.float8_e4m3fn)
    metadata = builder_of(engine, [layer]).build(0, common_of(engine))
    engine.run(layer, query, key, value, metadata, quantized, torch.tensor(0.05))
    torch.testing.assert_close(quantized.float() * 0.05, output, rtol=0.07, atol=0.01)
    assert not torch.equal(quantized.float() * 0.05, output)


def check_encoder_only(engine, window):
    """An encoder has no cache and sees both ways; its window is on both sides."""
    layer = engine.layer(
        "l0", attn_type="encoder_only", **({"per_layer_sliding_window": window} if window else {})
    )
    query, key, value = inputs(sum(NEW))
    output = torch.full((sum(NEW), HEADS, SIZE), float("nan"))
    common = common_of(engine, total=NEW, causal=False)
    engine.run(layer, query, key, value, builder_of(engine, [layer]).build(0, common), output)
    start = 0
    for n in NEW:
        rows = slice(start, start + n)
        distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        seen = distance < window if window else distance >= 0
        expected, _ = attention_of_request(
            query[rows], key[rows], value[rows], scale=SIZE**-0.5, seen=seen
        )
        assert_close(output[rows], expected)
        start += n


def check_profiling(engine):
    """Without metadata the output is zeros, and there is no cache yet."""
    layer = engine.layer("l0")
    query, key, value = inputs(3)
    output = torch.full((3, HEADS, SIZE), float("nan"))
    engine.run(layer, query, key, value, None, output)
    assert not output.any()


#: Keywords of validate_configuration that ask for what the plug-in rejects -> words of the reason.
REJECTED = {
    "use_mla": "MLA",
    "use_sparse": "indexer",
    "use_mm_prefix": "images",
    "use_per_head_quant_scales": "per head",
    "use_non_causal": "causal",
    "a_flag_of_the_future": "not known",
}


def check_validation(engine):
    """Reasons are ours, and only where something is rejected."""
    backend = engine.ours.AttnDispatchBackend
    plain = {
        "head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": (9, 0), "attn_type": "decoder",
        "use_kv_connector": True,
    }  # fmt: skip
    validate = backend.validate_configuration
    assert validate(**plain) == []
    assert validate(**plain | {"has_sink": True, "kv_cache_dtype": "fp8_e5m2"}) == []
    assert validate(**plain | {"attn_type": "encoder_only"}) == []
    for name, words in REJECTED.items():
        (reason,) = validate(**plain | {name: True})
        assert words in reason
    assert "encoder_decoder" in validate(**plain | {"attn_type": "encoder_decoder"})[0]
    assert "nvfp4" in validate(**plain | {"kv_cache_dtype": "nvfp4"})[0]
    reasons = validate(
        **plain | {"dtype": torch.float64, "kv_cache_dtype": "fp8", "has_sink": True}
    )
    assert reasons == [] or any("REFERENCE" in each for each in reasons)
    assert backend.supports_head_size(80)
    assert backend.supports_sink()
    assert backend.supports_sliding_window()
    assert backend.supports_dtype(torch.bfloat16)
    assert not backend.supports_dtype(torch.float8_e5m2)
    assert backend.supports_attn_type("encoder_only")
    assert not backend.supports_attn_type("encoder_decoder")
    assert not backend.supports_device_cpu_query_lens_mismatch()
    assert backend.get_supported_kernel_block_sizes()[0].base == 16


def check_start_up_errors(engine, monkeypatch):
    """What no backend has is an error when the layer is made, with the reasons."""
    with pytest.raises(UnsupportedError, match="some_feature"):
        engine.layer("l0", some_feature=2)
    with pytest.raises(UnsupportedError, match="int8_per_token_head"):
        engine.layer("l1", kv_cache_dtype="int8_per_token_head")
    with pytest.raises(UnsupportedError, match="encoder_decoder"):
        engine.layer("l2", attn_type="encoder_decoder")
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "TORCH_SDPA")
    engine.layer("l3")
    with pytest.raises(UnsupportedError, match="sinks=True is not supported"):
        engine.layer("l4", sinks=torch.zeros(HEADS))
    reasons = engine.ours.AttnDispatchBackend.validate_configuration(has_sink=True)
    assert any("TORCH_SDPA: sinks" in each for each in reasons)


#: feature -> (arguments of a layer that has it, flags that ask for it, words of our reason)
LACKING = {
    "sinks": ({"sinks": torch.zeros(HEADS)}, {"has_sink": True}, "PLAIN: sinks=True"),
    "soft_cap": ({"logits_soft_cap": 30.0}, None, "PLAIN: logits_soft_cap=30.0"),
    "window": (
        {"per_layer_sliding_window": 7},
        {"has_sliding_window": True},
        "PLAIN: sliding_window=",
    ),
    "alibi": ({"alibi_slopes": SLOPES}, None, "PLAIN: alibi=True"),
    "encoder_only": (
        {"attn_type": "encoder_only"},
        {"attn_type": "encoder_only"},
        "PLAIN: attn_type=encoder_only",
    ),
    "cross_attention": (
        {"attn_type": "encoder_decoder"},
        {"attn_type": "encoder_decoder"},
        "attention of type 'encoder_decoder' is not wired",
    ),
}


def check_lacking(engine, name):
    """A feature that no backend has is an error at the start, with our reasons."""
    arguments, flags, reason = LACKING[name]
    validate = engine.ours.AttnDispatchBackend.validate_configuration
    with plain_backend():
        engine.layer("able")
        assert validate(dtype=torch.float32) == []
        with pytest.raises(UnsupportedError) as caught:
            engine.layer("unable", **arguments)
        assert reason in str(caught.value)
        if flags is not None:  # vLLM asks for the others only by making the layer
            assert any(reason in each for each in validate(dtype=torch.float32, **flags))


def check_lacking_latents(engine):
    """The same for latent attention: vLLM asks before it makes a layer."""
    with attention_backend("mla=TORCH_SDPA"):
        reasons = engine.mla.AttnDispatchMLABackend.validate_configuration(head_size=576)
    assert any(each.startswith("TORCH_SDPA: mla=") for each in reasons), reasons
    reasons = engine.ours.AttnDispatchBackend.validate_configuration(use_mla=True)
    assert "MLA" in reasons[0]


def check_overrides(engine, monkeypatch):
    """Our environment variable decides inside of vLLM, and vLLM's asks for equal bits."""
    monkeypatch.setattr(engine.ours.vllm.envs, "VLLM_BATCH_INVARIANT", True)
    assert engine.layer("l0").impl.attention.layer.spec.batch_invariant
    monkeypatch.setattr(engine.ours.vllm.envs, "VLLM_BATCH_INVARIANT", False)
    for name in ("REFERENCE", "TORCH_SDPA"):
        monkeypatch.setenv("ATTN_DISPATCH_BACKEND", name)
        layer = engine.layer(name)
        cache, _ = cache_of(engine.version, LAYOUTS[engine.version][0])
        one_step(engine, layer, cache)
        ours = layer.impl.attention.layer
        assert {each.name for each in ours.selections.values()} == {name}
        assert ours.prefix == name


def check_rejected_steps(engine):
    """A step that asks for what the layers do not have is rejected, not computed."""
    builder = builder_of(engine, [engine.layer("l0")])
    with pytest.raises(UnsupportedError, match="causal=False"):
        builder.build(0, common_of(engine, causal=False))
    with pytest.raises(UnsupportedError, match="ranges of images"):
        builder.build(0, common_of(engine, mm_req_doc_ranges={0: [(1, 3)]}))
    with pytest.raises(UnsupportedError, match="upper_bound"):
        builder.build(0, common_of(engine, seq_lens_cpu_upper_bound=None))
    spec = SimpleNamespace(block_size=BLOCK, head_size=SIZE, head_size_v=16)
    with pytest.raises(UnsupportedError, match="values of 16 elements"):
        type(builder)(spec, ["l0"], engine.config, torch.device("cpu"))
    assert type(builder).get_cudagraph_support(engine.config, builder.kv_cache_spec).value == 0


def check_registration(engine, monkeypatch):
    """The backend is registered, once, under a name that vLLM's enum has."""
    from attn_dispatch.integrations import vllm as plugin

    for _ in range(2):
        plugin.register()
    name = engine.ours.AttnDispatchBackend.get_name()
    assert name == ("CUSTOM" if engine.version == "0.24.0" else "ATTN_DISPATCH")
    assert engine.path_of(name) == plugin.BACKEND_CLASS


#: Checks that take an engine.
CHECKS = (
    check_bounds,
    check_cascade,
    check_kv_sharing,
    check_fp8_cache,
    check_fp8_output,
    check_profiling,
    check_validation,
    check_rejected_steps,
    check_lacking_latents,
)

#: Checks that take an engine and a monkeypatch.
ENVIRONMENT_CHECKS = (check_start_up_errors, check_overrides, check_registration)
