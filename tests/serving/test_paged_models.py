"""Decoders of many architectures in the engine: each token is that of eager attention."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers import paged
from attn_dispatch.integrations.transformers.paged import PagedModel
from attn_dispatch.serving import Engine, Limits, Sampling
from attn_dispatch.serving.eager import check_answers
from support.parity_models import DECODERS, VOCABULARY, build

#: So few blocks that requests are preempted, and steps so short that prompts are cut.
SMALL = Limits(max_requests=4, max_tokens=12, num_blocks=13, max_seq_len=48)
NEW_TOKENS = 8
#: Models with layers that are not attention.
HYBRID = {"qwen3_next", "granitemoehybrid"}


def prompts():
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    first = draw(23)
    return [first, draw(5), draw(3), [*first[:9], *draw(4)]]


def serve(model_type, limits=SMALL):
    engine = Engine(PagedModel(build(model_type), block_size=4), limits=limits)
    engine.generate(prompts(), Sampling(max_new_tokens=NEW_TOKENS))
    return engine


@pytest.mark.models
@pytest.mark.parametrize("model_type", DECODERS)
def test_each_token_is_that_of_eager_attention(model_type):
    engine = serve(model_type)
    result = check_answers(engine.model, engine.finished)
    assert (result.tokens, result.different) == (4 * NEW_TOKENS, 0)
    assert engine.stats.preemptions > 0
    assert (engine.stats.shared_tokens > 0) == (model_type not in HYBRID)


def test_states_of_requests_that_start_again_are_dropped():
    limits = Limits(max_requests=4, max_tokens=12, num_blocks=13, max_seq_len=48, host_bytes=0)
    engine = serve("qwen3_next", limits)
    assert engine.stats.recomputed > 0
    assert check_answers(engine.model, engine.finished).different == 0
    assert engine.model.states._of == {}


def test_models_with_states_take_no_drafts():
    with pytest.raises(UnsupportedError, match="keeps states"):
        Engine(PagedModel(build("qwen3_next"), block_size=4), limits=SMALL, draft_tokens=2)


def test_a_state_that_the_engine_does_not_see_is_found(monkeypatch):
    monkeypatch.setattr(
        "attn_dispatch.integrations.transformers.calls.NoKeysCache.get_recurrent_state",
        lambda self, layer_idx, state_idx=0: None,
    )
    with pytest.raises(UnsupportedError, match="other results if a prompt is computed in parts"):
        PagedModel(build("qwen3_next"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "deepseek_v2"])
def test_a_model_of_each_kind_predicts_the_tokens_of_eager_attention(model_type):
    engine = serve(model_type)
    assert check_answers(engine.model, engine.finished).different == 0


@pytest.mark.parametrize("field", ["sliding_window", "logits_soft_cap", "sinks", "scale"])
def test_a_feature_that_is_left_out_changes_tokens(field, monkeypatch):
    model_type = {"sinks": "gpt_oss", "scale": "gemma2", "logits_soft_cap": "gemma2"}
    attention = paged.Attention

    def without(*sizes, **fields):
        if field == "scale":
            sizes = (*sizes[:2], None, *sizes[3:])
        return attention(*sizes, **{**fields, **({} if field == "scale" else {field: None})})

    monkeypatch.setattr(paged, "Attention", without)
    engine = serve(model_type.get(field, "mistral"))
    assert check_answers(engine.model, engine.finished).different > 0


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 128),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_a_step_has_one_set_of_frequencies(rope, longest):
    """Some kinds of RoPE change for all tokens of a step with its longest request."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**DECODERS["llama"].config, rope_parameters=rope)
    model = PagedModel(LlamaForCausalLM(config))
    assert model.max_seq_len == longest
    assert any("longest request" in note for note in model.notes) == (longest < 128)


@pytest.mark.parametrize(("floor_scale", "longest"), [(100, 95), (10_000, None)])
def test_code_that_counts_the_tokens_of_a_step_is_found(floor_scale, longest):
    """Llama 4 scales queries by their index in the step, and not by their position."""
    model = build("llama4_text")
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.attn_temperature_tuning, layer.use_rope = True, False
        layer.floor_scale = floor_scale
    paged_model = PagedModel(model)
    assert paged_model.max_step_tokens == longest
    assert paged_model.max_seq_len == (longest or 128)
    limits = Engine(paged_model, limits=Limits(num_blocks=64)).limits
    assert limits.max_tokens == (longest or 2048)


def test_a_model_that_ignores_positions_is_rejected(monkeypatch):
    model = build("llama")
    rotary = model.model.rotary_emb.forward

    def counting(x, position_ids):
        return rotary(x, position_ids + model.past())

    model.past = lambda: 0
    monkeypatch.setattr(model.model.rotary_emb, "forward", counting)
    original = PagedModel._forward

    def forward(self, *inputs):
        model.past = lambda: self._cache.past
        return original(self, *inputs)

    monkeypatch.setattr(PagedModel, "_forward", forward)
    with pytest.raises(UnsupportedError, match="positions from the length of its cache"):
        PagedModel(model)


def test_encoders_are_rejected():
    with pytest.raises(UnsupportedError, match="causal language models"):
        PagedModel(build("bert"))


@pytest.mark.models
def test_one_compilation_serves_all_layers_and_lengths(monkeypatch):
    """Six layers have the programs of two. They are traced and not translated, which is faster."""
    import torch._dynamo

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="eager", **options),
    )
    programs = []
    for num_layers in (2, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = copy.deepcopy(build("llama", num_hidden_layers=num_layers))
        engine = Engine(PagedModel(model, block_size=4, compile_layers=True), limits=SMALL)
        engine.generate(prompts(), Sampling(max_new_tokens=NEW_TOKENS))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert check_answers(engine.model, engine.finished).different == 0
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs[-1]
    assert 0 < programs[0] == programs[1]
