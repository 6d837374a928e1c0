"""Small models of many architectures: the same logits and greedy tokens as transformers' eager."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

import transformers
import transformers.masking_utils

from attn_dispatch.integrations.transformers import attention, enable
from support.parity_models import (
    DECODERS,
    OTHERS,
    build,
    feature_table,
    features,
    left_padded_prompts,
)
from support.paths import ROOT

#: Largest difference of logits, relative to the largest logit.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def both(model, run):
    """The results of `run(model)` with eager attention and with attn-dispatch."""
    results = []
    for switch in (lambda: model.set_attn_implementation("eager"), lambda: enable(model)):
        switch()
        with torch.no_grad():
            results.append(run(model))
    return results


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


def generate(model, tokens, mask, **options):
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=1, **options
    )


@pytest.mark.models
@pytest.mark.parametrize("model_type", DECODERS)
def test_decoders_with_left_padding(model_type):
    tokens, mask = left_padded_prompts()

    def run(model):
        logits = model(tokens, attention_mask=mask).logits[mask.bool()]
        return logits, generate(model, tokens, mask)

    model = build(model_type)
    (expected, expected_tokens), (actual, actual_tokens) = both(model, run)
    assert difference(expected, actual) < TOLERANCE
    assert torch.equal(actual_tokens, expected_tokens)
    assert features(model) == set(DECODERS[model_type].features)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "llama4_text"])
def test_decoders_with_a_static_cache(model_type):
    chunked = inspect.signature(transformers.masking_utils.create_chunked_causal_mask).parameters
    if model_type == "llama4_text" and "block_sequence_ids" not in chunked:
        pytest.skip("this version of transformers cannot make masks of chunks for a static cache")

    def run(model):
        return generate(model, *left_padded_prompts(), cache_implementation="static")

    expected, actual = both(build(model_type), run)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_decoders_that_get_their_prompt_in_pieces(model_type):
    """Several queries at once see the keys of the cache and their own."""
    tokens = left_padded_prompts()[0][:1]
    model = build(model_type)
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"

    def in_pieces(model):
        cache = transformers.DynamicCache(config=model.config)
        pieces = tokens.split([4, 3, 5, 1], dim=1)
        return torch.cat([model(piece, **{name: cache}).logits for piece in pieces], dim=1)

    expected, _ = both(model, lambda model: model(tokens).logits)
    actual = both(model, in_pieces)[1]
    assert difference(expected, actual) < TOLERANCE


@pytest.mark.parametrize("model_type", ["mistral", "llama4_text"])
def test_decoders_with_right_padding(model_type):
    tokens, mask = (each.flip(1) for each in left_padded_prompts())

    def run(model):
        return model(tokens, attention_mask=mask).logits[mask.bool()]

    expected, actual = both(build(model_type), run)
    assert difference(expected, actual) < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_decoders_with_several_sequences_in_a_row(model_type):
    tokens = left_padded_prompts()[0][:2]
    positions = torch.tensor([[*range(7), *range(6)], [*range(2), *range(11)]])
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    expected, actual = both(build(model_type), lambda model: model(**inputs).logits)
    assert difference(expected, actual) < TOLERANCE


#: Encoders' inputs are padded on the right.
def _bert(model):
    tokens, mask = (each.flip(1) for each in left_padded_prompts())
    return (model(tokens, attention_mask=mask).last_hidden_state[mask.bool()],)


def _vit(model):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return (model(pixels).last_hidden_state,)


def _bart(model):
    tokens, mask = (each.flip(1) for each in left_padded_prompts())
    logits = model(tokens, attention_mask=mask, decoder_input_ids=tokens.flip(0)[:, :5]).logits
    # As many queries as keys: none of them is taken for padding.
    same = model(tokens, attention_mask=mask, decoder_input_ids=tokens.flip(0)).logits
    return logits, same, generate(model, tokens, mask)


def _whisper(model):
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))
    logits = model(features, decoder_input_ids=left_padded_prompts()[0][:2]).logits
    return logits, model.generate(features, max_new_tokens=6, do_sample=False)


RUNS = {"bert": _bert, "modernbert": _bert, "vit": _vit, "bart": _bart, "whisper": _whisper}


@pytest.mark.models
@pytest.mark.parametrize("model_type", OTHERS)
def test_encoders_and_models_with_an_encoder(model_type):
    model = build(model_type)
    for expected, actual in zip(*both(model, RUNS[model_type]), strict=True):
        if expected.is_floating_point():
            assert difference(expected, actual) < TOLERANCE
        else:
            assert torch.equal(actual, expected)
    assert features(model) == set(OTHERS[model_type].features)


#: A field of Attention that is left out -> a model that has it, and the kind of layer.
LEFT_OUT = {
    "sliding_window": "mistral",
    "attention_chunk": "llama4_text",
    "logits_soft_cap": "gemma2",
    "sinks": "gpt_oss",
    "scale": "granitemoehybrid",
}


@pytest.mark.parametrize("field", LEFT_OUT)
def test_a_feature_that_is_left_out_changes_the_logits_visibly(field, monkeypatch):
    """The models above would notice: their scores are far from uniform."""
    tokens, mask = left_padded_prompts()
    made = attention.Attention

    def without(**fields):
        return made(**{**fields, field: None})

    monkeypatch.setattr(attention, "Attention", without)
    monkeypatch.setattr(attention, "_layers", type(attention._layers)())

    def run(model):
        return model(tokens, attention_mask=mask).logits[mask.bool()]

    expected, actual = both(build(LEFT_OUT[field]), run)
    assert difference(expected, actual) > 100 * TOLERANCE


def test_the_documented_table_is_that_of_the_tested_models():
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert feature_table() in page
