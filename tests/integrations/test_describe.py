"""describe(): what transformers' own classes do, against what is known of published models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.spec import MLADims
from support.model_cases import EXPECTED, load

pytest.importorskip("transformers", minversion="5.17")

from attn_dispatch.integrations.transformers import describe

BF16 = torch.bfloat16
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "dtype": "bfloat16",
}
#: Models whose classes compute attention without transformers' attention function.
OWN_ATTENTION = {"bloom", "mpt", "falcon_7b", "falcon_40b", "falcon_rw"}


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - OWN_ATTENTION))
def test_published_models_have_the_known_layers(name):
    expected = EXPECTED[name]
    dtypes = {fields["dtype"] for _, fields in expected.values()}
    groups = describe(load(name), dtype=dtypes.pop()).groups
    assert set(groups) == set(expected)
    for group, (layers, fields) in expected.items():
        assert set(groups[group].layers) == layers
        spec = groups[group].spec
        assert {field: getattr(spec, field) for field in fields} == fields


@pytest.mark.parametrize("name", sorted(OWN_ATTENTION))
def test_models_that_never_call_the_attention_function_are_rejected(name):
    with pytest.raises(UnsupportedError, match="computes its attention itself"):
        describe(load(name), dtype=BF16)


#: Model -> (config, scale): scales other than head_size**-0.5.
SCALES = {
    "gemma2": ({"query_pre_attn_scalar": 144, "head_dim": 128}, 144**-0.5),
    "granite": ({"attention_multiplier": 0.0078125}, 0.0078125),
    "llama": ({"head_dim": 64}, 64**-0.5),
}


@pytest.mark.parametrize("model_type", SCALES)
def test_the_scale_is_that_of_the_model(model_type):
    own, scale = SCALES[model_type]
    groups = describe({"model_type": model_type, **SMALL, **own}).groups
    assert [group.scale for group in groups.values()] == [pytest.approx(scale)] * len(groups)


HYBRID = {
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"] * 2}, {1, 3}),
    "lfm2": ({"layer_types": ["conv", "conv", "conv", "full_attention"]}, {3}),
    "granitemoehybrid": ({"layer_types": ["mamba", "attention", "mamba", "mamba"]}, {1}),
}


@pytest.mark.parametrize("model_type", HYBRID)
def test_other_layers_of_hybrid_models_are_counted_and_named(model_type):
    own, softmax = HYBRID[model_type]
    found = describe({"model_type": model_type, **SMALL, **own})
    assert {layer for group in found.groups.values() for layer in group.layers} == softmax
    others = {layer for layers in found.others.values() for layer in layers}
    assert others == set(range(4)) - softmax
    assert all(name for name in found.others)


def test_latent_attention_has_its_sizes():
    sizes = {
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "q_lora_rank": 24,
    }
    groups = describe({"model_type": "deepseek_v3", **SMALL, **sizes}).groups
    sizes.pop("q_lora_rank")
    assert groups["mla"].spec.mla == MLADims(**sizes)


REJECTED = {
    "indexer": ({"model_type": "deepseek_v32"}, "an indexer picks the keys"),
    "differential": ({"model_type": "diffllama"}, "differential attention"),
    "relative bias": (
        {"model_type": "t5", "d_model": 64, "num_heads": 4, "d_kv": 16, "num_layers": 2},
        "bias learned for relative positions",
    ),
    "own code": (
        {"model_type": "qwen3", "architectures": ["Qwen3BidirectionalModel"]},
        "Qwen3BidirectionalModel.*both directions",
    ),
    "unknown": ({"model_type": "qwen33"}, r"Nearest: qwen3.*--num-heads 4 --num-kv-heads 2"),
    "block configs": ({"model_type": "nemotron-nas", "block_configs": [{}]}, "its own heads"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_described_is_rejected_with_the_reason(case):
    config, message = REJECTED[case]
    with pytest.raises(UnsupportedError, match=message):
        describe({**SMALL, **config})


INVALID = {
    "no dtype": ({"dtype": None}, "states no dtype.*--dtype"),
    "no type": ({"model_type": None}, "model_type=None"),
    "too many layers": ({"num_hidden_layers": 10**12}, "no model has as many"),
    "heads": ({"num_attention_heads": "four"}, "num_attention_heads"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_configs_are_rejected(case):
    changes, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        describe({"model_type": "llama", **SMALL, **changes})


def test_a_window_that_hides_nothing_is_noted():
    own = {"sliding_window": 4096, "max_position_embeddings": 4096, "pad_token_id": 0}
    (note,) = describe({"model_type": "phi3", **SMALL, **own}).notes
    assert "window of 4096 tokens hides nothing" in note
    own["max_position_embeddings"] = 4097
    assert describe({"model_type": "phi3", **SMALL, **own}).notes == ()


def test_gpt_oss_states_no_dtype():
    with pytest.raises(InvalidInputError, match=r"states no dtype.*--dtype"):
        describe(load("gpt_oss"))


def test_a_class_that_is_not_run_gives_the_reason():
    with pytest.raises(UnsupportedError, match=r"cannot be run without weights.*needs the input"):
        describe({"model_type": "idefics2_perceiver"}, dtype=BF16)


def test_an_encoder_of_something_else_gives_its_decoder_of_text():
    found = describe({"model_type": "rag", "question_encoder": {"model_type": "dpr"},
                      "generator": {"model_type": "bart", "encoder_layers": 2, "decoder_layers": 3},
                      "is_encoder_decoder": True}, dtype=BF16)  # fmt: skip
    layers = {name: len(group.layers) for name, group in found.groups.items()}
    assert layers == {"encoder": 2, "full": 3, "encoder_decoder": 3}


def test_notes_name_own_code_and_what_is_left_out():
    own = {"auto_map": {"AutoModelForCausalLM": "modeling.LlamaOwn"}}
    (note,) = describe({"model_type": "llama", **SMALL, **own}).notes
    assert "LlamaOwn" in note
    notes = describe(
        {"model_type": "voxtral", "text_config": {"model_type": "llama", **SMALL}}
    ).notes
    assert any("audio_config" in note for note in notes)


def test_a_wrapper_that_transformers_does_not_know_gives_its_language_model():
    inner = {"model_type": "qwen2", **SMALL}
    found = describe({"model_type": "internvl_chat", "llm_config": inner})
    assert found.groups["full"].layers == (0, 1, 2, 3)
    assert "internvl_chat" in found.notes[0]


def test_config_objects_and_models_are_described_too():
    import transformers

    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 32, "intermediate_size": 64})
    expected = describe({"model_type": "llama", **SMALL}).groups
    assert describe(config).groups == expected
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(BF16)
    assert describe(model).groups == expected


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, attn_dispatch; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
