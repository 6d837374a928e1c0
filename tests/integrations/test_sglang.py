"""SGLang's plug-in with stand-ins for SGLang: numbers, memory, graphs, and what is rejected."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from attn_dispatch import attention_backend, engines
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.sglang import BACKEND_NAME, make_backend, register
from support import fake_sglang, sglang_names
from support.fake_sglang import AttentionType, Block, ForwardMode, MHATokenToKVPool, RadixAttention
from support.graph_cases import BACKEND, interpreted_backend
from support.paths import ROOT
from support.plain_backend import plain_backend
from support.sglang_cases import ROWS, STEPS, Conversation

HEADS, KV_HEADS, DIM = 4, 2, 16
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    return fake_sglang.install(monkeypatch)


def radix(layer_id=0, **more):
    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id, **more)


def runner_of(
    *blocks, page_size=1, dim_v=DIM, dtype=torch.float32, kv_dtype=None, hnd=False, **more
):
    size = -(-160 // page_size) * page_size
    kinds = (size, page_size, len(blocks), KV_HEADS, DIM, dim_v, kv_dtype or dtype)
    pool = MHATokenToKVPool(*kinds, hnd=hnd)
    return fake_sglang.make_runner(blocks, pool, page_size, dtype=dtype, kv_dtype=kv_dtype, **more)


# --- Numbers

LAYERS = {
    "plain": ({}, {}),
    "window": ({"sliding_window_size": 5}, {"window": 6}),
    "cap": ({"logit_cap": 3.0}, {"cap": 3.0}),
    "chunk": ({"use_irope": True}, {"chunk": 8}),
}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_steps_have_the_numbers_of_the_definition(page_size, hnd):
    blocks = [Block(radix(i, **given)) for i, (given, _) in enumerate(LAYERS.values())]
    blocks.append(Block(radix(len(blocks)), sinks=SINKS.bfloat16()))
    runner = runner_of(*blocks, page_size=page_size, hnd=hnd, attention_chunk_size=8)
    semantics = [{"causal": True, **means} for _, means in LAYERS.values()]
    semantics.append({"causal": True, "sinks": SINKS.tolist()})
    kwargs = [{} for _ in LAYERS] + [{"sinks": blocks[-1].sinks}]
    errors = Conversation(make_backend(runner), runner).run(semantics, kwargs=kwargs)
    assert len(errors) == len(STEPS) * len(blocks)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("page_size", [1, 16])
def test_values_have_a_head_size_of_their_own(page_size):
    runner = runner_of(Block(radix(v_head_dim=8)), page_size=page_size, dim_v=8)
    assert max(Conversation(make_backend(runner), runner).run([{"causal": True}])) < 2e-6


@pytest.mark.parametrize("page_size", [1, 16])
def test_fp8_caches_are_read_and_written_with_the_scales_of_the_layer(page_size):
    block, dtype = Block(radix()), torch.float8_e4m3fn
    block.attn.k_scale_float = block.attn.v_scale_float = 0.25
    runner = runner_of(block, page_size=page_size, kv_dtype=dtype)

    def stored(tensor):
        return (tensor / 0.25).to(dtype).double() * 0.25

    errors = Conversation(make_backend(runner), runner).run([{"causal": True}], stored)
    assert max(errors) < 2e-6
    assert max(Conversation(make_backend(runner), runner).run([{"causal": True}])) > 1e-3


def test_encoders_attend_both_ways_without_a_cache():
    layers = [
        radix(0, attn_type=AttentionType.ENCODER_ONLY),
        radix(1, attn_type=AttentionType.ENCODER_ONLY, sliding_window_size=3),
    ]
    runner = runner_of(*map(Block, layers), page_size=16)
    talk = Conversation(make_backend(runner), runner)
    batch, chosen, tensors = talk.step("EXTEND", [7, 12, 1])
    talk.backend.init_forward_metadata(batch)
    for number, (q, k, v) in enumerate(tensors):
        result = talk.backend.forward(q, k, v, layers[number], batch)
        window = {} if number == 0 else {"window": 4}
        want = talk.expected(number, chosen, [7, 12, 1], q, causal=False, **window)
        torch.testing.assert_close(result.double(), want, rtol=0, atol=2e-6)
    assert not any(buffer.any() for pair in runner.token_to_kv_pool.buffers for buffer in pair)


def test_an_encoder_over_a_cached_prefix_is_rejected():
    layer = radix(attn_type=AttentionType.ENCODER_ONLY)
    runner = runner_of(Block(layer))
    talk = Conversation(make_backend(runner), runner)
    talk.step("EXTEND", [4, 4, 4])
    batch, _, ((q, k, v),) = talk.step("EXTEND", [2, 2, 2])
    talk.backend.init_forward_metadata(batch)
    with pytest.raises(InvalidInputError):
        talk.backend.forward(q, k, v, layer, batch)


def runner_with_two_pools(page_size):
    """The second of two layers has a window of 4 tokens, and is in a pool with other pages."""
    blocks = [Block(radix(0)), Block(radix(1, sliding_window_size=3))]
    kinds = (160, page_size, 1, KV_HEADS, DIM, DIM, torch.float32)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(160 // page_size, generator=generator)
    order = torch.cat([torch.zeros(1).long(), 1 + order])
    pool = fake_sglang.SWAKVPool(
        MHATokenToKVPool(*kinds),
        MHATokenToKVPool(*kinds),
        {0: (0, False), 1: (0, True)},
        (order[:, None] * page_size + torch.arange(page_size)).flatten(),
    )
    return fake_sglang.make_runner(blocks, pool, page_size)


@pytest.mark.parametrize("page_size", [1, 16])
def test_layers_in_the_pool_of_sliding_windows_have_its_slots(page_size):
    """The window's pool has other slots; those before the window were freed and map to 0."""
    runner = runner_with_two_pools(page_size)
    blocks, pool = list(runner.model.layers), runner.token_to_kv_pool
    mapping = pool.full_to_swa_index_mapping
    talk = Conversation(make_backend(runner), runner)
    semantics = [{"causal": True}, {"causal": True, "window": 4}]
    assert max(talk.run(semantics)) < 2e-6
    full, window = pool.full_kv_pool.buffers[0][0], pool.swa_kv_pool.buffers[0][0]
    used = runner.req_to_token_pool.req_to_token[ROWS[0], : talk.lens[0]].long()
    assert full[used].flatten(1).any(1).all()
    assert window[mapping[used]].flatten(1).any(1).all()
    # Request 1 is long: its first page is out of every later query's window.
    first = runner.req_to_token_pool.req_to_token[ROWS[1], :page_size].long()
    mapping[first] = 0
    batch, chosen, tensors = talk.step("DECODE", [1, 1, 1])
    talk.backend.init_forward_metadata(batch)
    for number, (q, k, v) in enumerate(tensors):
        result = talk.backend.forward(q, k, v, blocks[number].attn, batch)
        want = talk.expected(number, chosen, [1, 1, 1], q, **semantics[number])
        torch.testing.assert_close(result.double(), want, rtol=0, atol=2e-6)


# --- Memory


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_keys_and_values_are_in_the_memory_of_the_pool(page_size, hnd):
    layer = radix()
    runner = runner_of(Block(layer), page_size=page_size, hnd=hnd)
    backend = make_backend(runner)
    pair = runner.token_to_kv_pool.buffers[0]
    cache = backend.attention_layers()["layers.0.attn"].kv_cache
    assert (cache.key.data_ptr(), cache.value.data_ptr()) == tuple(b.data_ptr() for b in pair)
    talk = Conversation(backend, runner)
    batch, _, ((q, k, v),) = talk.step("EXTEND", [7, 18, 1])
    backend.init_forward_metadata(batch)
    backend.forward(q, k, v, layer, batch)
    for buffer, given in zip(pair, (k, v), strict=True):
        slots = buffer.transpose(1, 2).flatten(0, 1) if hnd else buffer
        assert torch.equal(slots[batch.out_cache_loc], given)
        assert int(buffer.count_nonzero()) == given.numel()


def test_keys_that_the_pool_has_already_are_not_written_again():
    layer = radix()
    runner = runner_of(Block(layer))
    talk = Conversation(make_backend(runner), runner)
    batch, chosen, ((q, k, v),) = talk.step("EXTEND", [7, 4, 1])
    key, value = runner.token_to_kv_pool.buffers[0]
    key[batch.out_cache_loc], value[batch.out_cache_loc] = k, v
    talk.backend.init_forward_metadata(batch)
    want = talk.expected(0, chosen, [7, 4, 1], q, causal=True)
    before = key.clone(), value.clone()
    for given in ((k + 1, v + 1), (None, None)):  # a fused write; a layer that shares a cache
        result = talk.backend.forward(q, *given, layer, batch, save_kv_cache=False)
        torch.testing.assert_close(result.double(), want, rtol=0, atol=2e-6)
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])


def test_a_pool_with_other_tensors_is_followed():
    layer = radix()
    runner = runner_of(Block(layer))
    talk = Conversation(make_backend(runner), runner)
    runner.token_to_kv_pool.buffers = runner_of(Block(radix())).token_to_kv_pool.buffers
    assert max(talk.run([{"causal": True}])) < 2e-6
    assert runner.token_to_kv_pool.buffers[0][0].any()


def test_padding_writes_nothing():
    """SGLang's dummy steps and padded rows write to slot 0, which no request owns."""
    layer = radix()
    runner = runner_of(Block(layer), page_size=16)
    backend = make_backend(runner)
    batch = fake_sglang.make_step(runner, ForwardMode.DECODE, [0, 0, 0], [1, 1, 1], [1, 1, 1])
    assert batch.out_cache_loc.tolist() == [0, 0, 0]
    backend.init_forward_metadata(batch)
    q, k, v = torch.ones(3, HEADS * DIM), *torch.ones(2, 3, KV_HEADS, DIM)
    assert backend.forward(q, k, v, layer, batch).isfinite().all()
    assert not any(buffer.any() for buffer in runner.token_to_kv_pool.buffers[0])


def test_an_idle_step_needs_no_layer():
    layer = radix()
    runner = runner_of(Block(layer))
    backend = make_backend(runner)
    batch = fake_sglang.make_step(runner, ForwardMode.IDLE, [], [], [])
    backend.init_forward_metadata(batch)
    assert backend.forward(torch.ones(0, HEADS * DIM), None, None, layer, batch).shape == (0, 64)


# --- CUDA graphs: without a GPU, the step that a graph would capture is called directly


@pytest.mark.parametrize(("pools", "page_size"), [(1, 1), (2, 16)])
@torch.inference_mode()
def test_a_decode_graph_reads_the_steps_that_are_copied_to_it(pools, page_size):
    runner = runner_with_two_pools(page_size)
    if pools == 1:
        runner = runner_of(*runner.model.layers, page_size=page_size)
    backend = make_backend(runner)
    talk = Conversation(backend, runner)
    semantics = [{"causal": True}, {"causal": True, "window": 4}]
    assert max(talk.run(semantics)) < 2e-6
    with interpreted_backend(), attention_backend(BACKEND):
        backend.init_cuda_graph_state(4, 4)
        dummy = capture(runner, backend, size=4)
        for query_lens in ([1, 1, 1], [0, 1, 0]):
            replay(backend, talk, semantics, query_lens, dummy)
    # A step of an idle rank, all of it padding.
    batch = fake_sglang.make_step(runner, ForwardMode.DECODE, [], [], [])
    backend.init_forward_metadata_out_graph(padded(batch, 4, 1))


def capture(runner, backend, size):
    """Call the layers as in a capture; the static batch that SGLang captures with."""
    fill = backend.get_cuda_graph_seq_len_fill_value()
    row = [[0] * size, [fill] * size, [1] * size]
    dummy = fake_sglang.make_step(runner, ForwardMode.DECODE, *row)
    pools = [runner.token_to_kv_pool.get_kv_buffer(layer_id) for layer_id in (0, 1)]
    before = [buffer.clone() for pair in pools for buffer in pair]
    backend.init_forward_metadata_out_graph(dummy, in_capture=True)
    for block in runner.model.layers:
        q, k, v = torch.ones(size, HEADS * DIM), *torch.ones(2, size, KV_HEADS, DIM)
        backend.forward(q, k, v, block.attn, dummy)
    assert all(map(torch.equal, before, [buffer for pair in pools for buffer in pair]))
    return dummy


def replay(backend, talk, semantics, query_lens, dummy):
    """Call the captured layers again, on padded rows, and compare."""
    captured, size = backend.forward_metadata, dummy.batch_size
    batch, chosen, tensors = talk.step("DECODE", query_lens)
    fill = backend.get_cuda_graph_seq_len_fill_value()
    backend.init_forward_metadata_out_graph(padded(batch, size, fill))
    assert backend.forward_metadata is captured
    for number, (q, k, v) in enumerate(tensors):
        rows = [torch.cat([t, torch.ones(size - len(t), *t.shape[1:])]) for t in (q, k, v)]
        result = backend.forward(*rows, talk.blocks[number].attn, dummy)
        want = talk.expected(number, chosen, query_lens, q, **semantics[number])
        torch.testing.assert_close(result[: len(q)].double(), want, rtol=0, atol=2e-6)
        assert not result[len(q) :].any()


def padded(batch, size, fill):
    """The view of a step that SGLang prepares a replay with; out_cache_loc is the step's."""
    extra = size - batch.batch_size
    return SimpleNamespace(
        **vars(batch)
        | {
            "batch_size": size,
            "num_padding": extra,
            "req_pool_indices": torch.cat([batch.req_pool_indices, torch.zeros(extra).long()]),
            "seq_lens_cpu": torch.cat([batch.seq_lens_cpu, torch.full((extra,), fill)]),
        }
    )


def test_graphs_of_more_than_decodes_are_rejected():
    runner = runner_of(Block(radix()))
    backend = make_backend(runner)
    step = fake_sglang.make_step(runner, ForwardMode.EXTEND, [0], [4], [4])
    with pytest.raises(UnsupportedError, match="--cuda-graph-backend-prefill"):
        backend.init_forward_metadata_out_graph(step, in_capture=True)
    with pytest.raises(UnsupportedError, match="--disable-decode-cuda-graph"):
        backend.init_cuda_graph_state(4, 16)
    step = fake_sglang.make_step(runner, ForwardMode.DECODE, [0], [1], [1])
    with pytest.raises(InvalidInputError, match="init_cuda_graph_state"):
        backend.init_forward_metadata_out_graph(step, in_capture=True)


def test_the_preparation_of_a_step_is_not_captured(monkeypatch):
    """It reads host values. SGLang prepares steps without a graph after an exception."""
    backend = make_backend(runner_of(Block(radix())))
    step = fake_sglang.make_step(backend._runner, ForwardMode.DECODE, [0], [1], [1])
    monkeypatch.setattr(engines, "is_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="SGLANG_ENABLE_METADATA_GLUE_GRAPH"):
        backend.init_forward_metadata_out_graph(padded(step, 4, 1))


def test_layers_without_a_backend_for_graphs_are_rejected_before_a_capture():
    with attention_backend("REFERENCE"):
        backend = make_backend(runner_of(Block(radix())))
        with pytest.raises(UnsupportedError, match=r"layers\.0\.attn.*cuda_graph"):
            backend.init_cuda_graph_state(4, 4)


# --- What is rejected when the server starts


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_mla_backend": True}, "MLA"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, "cross-attention"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, "speculative"),
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "unified memory"),
        ({"token_to_kv_pool": object()}, "a KV cache that is a object"),
        ({"kv_cache_dtype": torch.int8}, "int8"),
        ({"prefill_aware_swa": True}, "depend on the length of the prompt"),
    ],
)
def test_servers_that_are_not_served_are_rejected(more, reason):
    runner = runner_of(Block(radix()))
    vars(runner).update(more)
    with pytest.raises(UnsupportedError, match=reason):
        make_backend(runner)


def test_models_that_give_masks_to_other_backends_are_rejected():
    """SGLang's Gemma 3 with images asks which backend there is, and is causal with others."""
    runner = runner_of(Block(radix()))
    runner.model.prepare_attn_masks = lambda *_: None
    with pytest.raises(UnsupportedError, match="see each other both ways"):
        make_backend(runner)


def test_pools_that_hand_over_copies_are_rejected(monkeypatch):
    monkeypatch.setattr(MHATokenToKVPool, "is_quantized_kv_cache", True)
    with pytest.raises(UnsupportedError, match="quantized in blocks"):
        make_backend(runner_of(Block(radix())))


def test_two_pools_of_another_class_are_rejected():
    runner = runner_with_two_pools(1)
    runner.token_to_kv_pool.swa_kv_pool = type("MLATokenToKVPool", (), {})()
    with pytest.raises(UnsupportedError, match="a KV cache that is a MLATokenToKVPool"):
        make_backend(runner)


@pytest.mark.parametrize("name", ["dcp_enabled", "enable_prefill_cp"])
def test_context_parallel_servers_are_rejected(engine, name):
    setattr(engine.parallel, name, True)
    with pytest.raises(UnsupportedError, match="context parallelism"):
        make_backend(runner_of(Block(radix())))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("is_cross_attention", True, "cross-attention"),
        ("attn_type", AttentionType.DECODER_BIDIRECTIONAL, "decoder_bidirectional"),
        ("pos_encoding_mode", "ROPE_LLAMA", "pos_encoding_mode"),
        ("xai_temperature_len", 1024, "xai_temperature_len"),
    ],
)
def test_layers_that_are_not_computed_are_rejected(field, value, reason):
    layer = radix()
    setattr(layer, field, value)
    with pytest.raises(UnsupportedError, match=rf"layers\.0\.attn.*{reason}"):
        make_backend(runner_of(Block(layer)))


def test_other_soft_caps_than_tanh_are_rejected():
    layer = radix(logit_cap=30.0, logit_capping_method="rbound")
    with pytest.raises(UnsupportedError, match="rbound"):
        make_backend(runner_of(Block(layer)))


def test_a_required_backend_that_lacks_a_feature_gives_its_reasons():
    with (
        attention_backend("TORCH_SDPA"),
        pytest.raises(UnsupportedError, match=r"layers\.0\.attn.*logits_soft_cap") as caught,
    ):
        make_backend(runner_of(Block(radix(logit_cap=30.0))))
    assert caught.value.report is not None


@pytest.mark.parametrize(
    ("arguments", "sinks", "reason"),
    [
        ({}, SINKS, "sinks=True"),
        ({"logit_cap": 30.0}, None, "logits_soft_cap=30.0"),
        ({"sliding_window_size": 3}, None, "sliding_window=4"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, None, "attn_type=encoder_only"),
    ],
    ids=["sinks", "soft_cap", "window", "encoder"],
)
def test_a_feature_that_no_backend_has_is_an_error_at_the_start(arguments, sinks, reason):
    """With our reasons, and the layer's name. Without the feature, the model is served."""
    with plain_backend():
        make_backend(runner_of(Block(radix())))
        with pytest.raises(UnsupportedError, match=r"layers\.0\.attn") as caught:
            make_backend(runner_of(Block(radix(**arguments), sinks=sinks)))
    assert f"PLAIN: {reason} is not supported" in str(caught.value)


def test_a_model_without_layers_is_rejected():
    with pytest.raises(UnsupportedError, match="no RadixAttention"):
        make_backend(runner_of(Block(torch.nn.Identity())))


# --- What is rejected in a step


@pytest.mark.parametrize(
    "more",
    [
        {"forward_mode": ForwardMode.TARGET_VERIFY},
        {"spec_info": object()},
        {"multi_item_delimiter_indices": [0]},
        {"cross_attention_custom_mask": torch.ones(1)},
        {"attn_cp_metadata": object()},
        {"attn_dcp_metadata": object()},
    ],
    ids=lambda more: next(iter(more)),
)
def test_steps_with_more_are_rejected(more):
    runner = runner_of(Block(radix()))
    backend = make_backend(runner)
    step = fake_sglang.make_step(runner, ForwardMode.EXTEND, [1], [1], [1])
    vars(step).update(more)
    with pytest.raises(UnsupportedError):
        backend.init_forward_metadata(step)


@pytest.mark.parametrize(
    "name", ["q_rope", "topk_indices", "rel_bias", "return_lse", "mha_return_lse", "sinks"]
)
def test_arguments_that_would_be_ignored_are_rejected(name):
    layer = radix()
    runner = runner_of(Block(layer))
    talk = Conversation(make_backend(runner), runner)
    batch, _, ((q, k, v),) = talk.step("EXTEND", [2, 2, 2])
    talk.backend.init_forward_metadata(batch)
    kwargs = {name: SINKS}
    if name == "mha_return_lse":
        batch.mha_return_lse, kwargs = True, {}
    with pytest.raises(UnsupportedError, match=name):
        talk.backend.forward(q, k, v, layer, batch, **kwargs)
    assert not runner.token_to_kv_pool.buffers[0][0].any()
    talk.backend.forward(
        q,
        k,
        v,
        layer,
        fake_sglang.SimpleNamespace(**vars(batch) | {"mha_return_lse": False}),
        rel_bias=None,
    )


def test_sinks_that_are_left_out_of_a_call_are_rejected():
    layer = radix()
    runner = runner_of(Block(layer, sinks=SINKS))
    talk = Conversation(make_backend(runner), runner)
    batch, _, ((q, k, v),) = talk.step("EXTEND", [2, 2, 2])
    talk.backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedError, match="sinks"):
        talk.backend.forward(q, k, v, layer, batch)


def test_scales_that_change_are_followed():
    block, dtype = Block(radix()), torch.float8_e4m3fn
    runner = runner_of(block, kv_dtype=dtype)
    backend = make_backend(runner)
    for scale in (1.0, 0.25):
        block.attn.k_scale_float = block.attn.v_scale_float = scale
        talk = Conversation(backend, runner)
        errors = talk.run([{"causal": True}], lambda t, s=scale: (t / s).to(dtype).double() * s)
        assert max(errors) < 2e-6
    block.attn.k_scale_float = None
    batch, _, ((q, k, v),) = talk.step("EXTEND", [2, 2, 2])
    backend.init_forward_metadata(batch)
    with pytest.raises(InvalidInputError, match="only one of k_scale and v_scale"):
        backend.forward(q, k, v, block.attn, batch)


def test_calls_without_a_plan_and_of_unknown_layers_are_rejected():
    layer = radix()
    runner = runner_of(Block(layer))
    backend = make_backend(runner)
    step = fake_sglang.make_step(runner, ForwardMode.EXTEND, [1], [1], [1])
    q, k, v = torch.ones(1, HEADS * DIM), *torch.ones(2, 1, KV_HEADS, DIM)
    with pytest.raises(InvalidInputError, match="no step was planned"):
        backend.forward(q, k, v, layer, step)
    with pytest.raises(InvalidInputError, match="none of the model's"):
        backend.forward(q, k, v, radix(), step)


# --- The plug-in


def test_registering_makes_the_option_once(engine):
    register()
    register()
    assert engine.ATTENTION_BACKEND_CHOICES == ["triton", "fa3", BACKEND_NAME]
    assert engine.registered == {BACKEND_NAME: make_backend}


def test_the_entry_point_is_the_function():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."sglang.srt.plugins"]')[1].split("[")[0]
    (entry,) = re.findall(r'^(\w+) = "(\S+)"$', section, re.MULTILINE)
    assert entry[0] == BACKEND_NAME
    assert EntryPoint(*entry, "sglang.srt.plugins").load() is register


def test_overrides_of_this_library_choose_the_backends(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "REFERENCE")
    layers = make_backend(runner_of(Block(radix()))).attention_layers()
    (layer,) = layers.values()
    assert {each.name for each in layer.selections.values()} == {"REFERENCE"}


def test_another_version_of_sglang_is_named(monkeypatch):
    name = "sglang.srt.layers.radix_attention"
    monkeypatch.delattr(sys.modules[name], "RadixAttention")
    with pytest.raises(ImportError, match=r"RadixAttention.*0\.5\.23"):
        register()


def parsed():
    folder = ROOT / "dispatch" / "integrations" / "sglang"
    return {path.stem: ast.parse(path.read_text("utf-8")) for path in folder.glob("*.py")}


def imports_of_sglang(tree):
    """name -> module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            found.update((alias.name, node.module) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update((a.name, a.name) for a in node.names if a.name.split(".")[0] == "sglang")
    return found


def test_one_module_imports_sglang_and_the_package_does_not():
    found = {name: imports_of_sglang(tree) for name, tree in parsed().items()}
    assert {name for name, imported in found.items() if imported} == {"names"}
    assert found["names"] == sglang_names.IMPORTED
    code = "import sys, attn_dispatch.integrations.sglang; print('sglang' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_lists_every_attribute_of_sglang_that_is_used():
    """The contract test checks what the code reads of a runner, a layer, a step or a pool."""
    known = {each for attributes in sglang_names.ATTRIBUTES.values() for each in attributes}
    known |= {function.split(".")[-1] for _, function in sglang_names.SIGNATURES} | set(
        sglang_names.TEXTS
    )
    roots = {"runner", "_runner", "layer", "forward_batch", "pool", "parallel"}
    used = set()
    for node in (node for tree in parsed().values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            of = node.value
            while isinstance(of, ast.Attribute) and of.attr in known:
                of = of.value
            if (getattr(of, "id", None) or getattr(of, "attr", None)) in roots:
                used.add(node.attr)
    others = {
        "prefix",
        "shape",
        "device",
        "name",
        "value",
    }  # of our layers, of tensors and of enums
    assert used - known - others == set()
    assert {"token_to_kv_pool", "extend_seq_lens_cpu", "use_irope", "req_to_token"} <= used
    assert not [name for name in known | set(sglang_names.IMPORTED) if name.startswith("_")]
