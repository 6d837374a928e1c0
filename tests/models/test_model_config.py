"""From Hugging Face configs to specs: a config of each family, and configs that are rejected."""

from __future__ import annotations

import json

import pytest
import torch

from attn_dispatch.backends.reference.semantics import visible
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.models.config import layers_from_config
from attn_dispatch.models.families import ATTENTION_KEYS, FAMILIES, UNSUPPORTED, WRAPPERS
from attn_dispatch.models.hf import load_config
from support.model_cases import BF16, EXPECTED, FP16, FP32, load
from support.paths import CONFIGS


@pytest.mark.parametrize("name", EXPECTED)
def test_config_gives_the_specs_of_its_layers(name):
    groups = layers_from_config(load(name))
    assert groups.keys() == EXPECTED[name].keys()
    for group, (layers, fields) in EXPECTED[name].items():
        assert set(groups[group].layers) == layers
        spec = groups[group].spec
        assert {field: getattr(spec, field) for field in fields} == fields


def test_every_supported_model_has_a_config():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(EXPECTED)
    types = set()
    for name in EXPECTED:
        config = load(name)
        types |= {config["model_type"], config.get("text_config", {}).get("model_type")}
    covered = [FAMILIES[kind] for kind in types if kind in FAMILIES]
    covered += [FAMILIES[WRAPPERS[kind].text] for kind in types if kind in WRAPPERS]
    assert [kind for kind, stacks in FAMILIES.items() if stacks not in covered] == []
    assert all(wrapper.text in FAMILIES for wrapper in WRAPPERS.values())
    assert not set(UNSUPPORTED) & {*FAMILIES, *WRAPPERS}


def test_groups_are_in_the_order_of_the_layers():
    assert list(layers_from_config(load("gemma2"))) == ["sliding_window", "full"]
    assert list(layers_from_config(load("ministral"))) == ["full", "sliding_window"]


def test_encoder_window_covers_both_sides():
    spec = layers_from_config(load("modernbert"))["encoder_only, sliding_window"].spec
    seen = visible(
        torch.tensor([500]), torch.arange(1000), causal=False, sliding_window=spec.sliding_window
    )
    assert seen[0].nonzero().flatten().tolist() == list(range(500 - 64, 500 + 64 + 1))


#: Defaults of transformers for missing keys: (config, changes, group, fields).
DEFAULTS = [
    ("mistral", {"sliding_window": ...}, "sliding_window", {"sliding_window": 4096}),
    ("mistral", {"num_key_value_heads": None}, "sliding_window", {"num_kv_heads": 32}),
    ("llama", {"num_key_value_heads": ...}, "full", {"num_kv_heads": 32}),
    ("llama", {"head_dim": 64}, "full", {"head_size": 64}),
    ("gemma2", {"attn_logit_softcapping": ...}, "full", {"logits_soft_cap": 50.0}),
    ("gemma2", {"attn_logit_softcapping": None}, "full", {"logits_soft_cap": None}),
    ("gpt_oss", {"layer_types": ...}, "sliding_window", {"sliding_window": 128}),
    ("bloom", {"num_attention_heads": ..., "n_head": 8}, "full", {"num_heads": 8}),
    ("mpt", {"attn_config": ...}, "full", {"alibi": True}),
    ("mpt", {"attn_config": {"alibi": False}}, "full", {"alibi": False}),
    ("falcon_rw", {"multi_query": ...}, "full", {"num_kv_heads": 1}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window", {}),
    ("mixtral", {"sliding_window": 4096}, "sliding_window", {"sliding_window": 4096}),
]


#: Number of layers, changes of the config, and the layers that attend in chunks.
LLAMA4 = {
    "no_rope_layers": (3, {"no_rope_layers": [1, 0, 1]}, {0, 2}),
    "layer_types": (4, {"layer_types": ["full_attention", "chunked_attention"] * 2}, {1, 3}),
    "interval": (5, {"no_rope_layer_interval": 2}, {0, 2, 4}),
}


@pytest.mark.parametrize("case", LLAMA4)
def test_the_layers_of_llama4_that_attend_in_chunks(case):
    num_layers, changes, chunked = LLAMA4[case]
    text = load("llama4")["text_config"] | {"num_hidden_layers": num_layers} | changes
    groups = layers_from_config(load("llama4", text_config=text))
    assert set(groups["chunked"].layers) == chunked
    assert groups["chunked"].spec.attention_chunk == 8192


def test_layers_in_chunks_need_their_size():
    text = load("llama4")["text_config"] | {"attention_chunk_size": None}
    with pytest.raises(InvalidInputError, match="attention_chunk_size is null"):
        layers_from_config(load("llama4", text_config=text))


@pytest.mark.parametrize(("name", "changes", "group", "fields"), DEFAULTS)
def test_missing_keys_have_the_defaults_of_transformers(name, changes, group, fields):
    spec = layers_from_config(load(name, **changes))[group].spec
    assert {field: getattr(spec, field) for field in fields} == fields


def test_dtype_comes_from_the_argument_the_config_or_is_float32():
    config = load("llama")
    assert layers_from_config(config)["full"].spec.dtype == BF16
    assert layers_from_config(config, dtype=FP16)["full"].spec.dtype == FP16
    assert layers_from_config(load("llama", torch_dtype=...))["full"].spec.dtype == FP32
    config = load("llama", torch_dtype=..., dtype="torch.float16")
    assert layers_from_config(config)["full"].spec.dtype == FP16
    assert layers_from_config(load("gemma3"))["full"].spec.dtype == BF16  # from the outer config


def test_cache_fields_only_apply_to_layers_with_a_cache():
    groups = layers_from_config(load("whisper"), block_size=16, cuda_graph=True)
    sizes = {name: group.spec.block_size for name, group in groups.items()}
    assert sizes == {"encoder": None, "full": 16, "encoder_decoder": 16}
    assert all(group.spec.cuda_graph for group in groups.values())


def test_fields_that_the_config_decides_are_rejected():
    with pytest.raises(InvalidInputError, match=r"num_heads, sinks cannot be given .*block_size"):
        layers_from_config(load("llama"), num_heads=4, sinks=True)


#: (config, changes, part of the message): features that the spec or the entry does not cover.
UNKNOWN_FEATURES = {
    "unknown model": ("llama", {"model_type": "llama5"}, "'llama5' are not supported.*--num-heads"),
    "t5": ("llama", {"model_type": "t5"}, "bias learned for relative positions"),
    "chunks": ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
    "window": ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
    "soft cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "relative": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "bert decoder": ("bert", {"is_decoder": True}, "is_decoder=True"),
    "cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    "both ways": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "not causal": ("qwen2", {"is_causal": False}, "is_causal=False"),
    "moe window": ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
    "types": ("gemma2", {"layer_types": ["chunked_attention"] * 42}, "type chunked_attention"),
    "wrong types": ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types contradict"),
    "llama types": ("llama", {"layer_types": ["sliding_attention"] * 32}, "layer_types contradict"),
    "prefix": ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm=True"),
    "sparse": ("deepseek_v3", {"index_topk": 2048}, "index_topk=2048"),
    "long images": ("gemma3", {"mm_tokens_per_image": 4096}, "images of 4096 tokens"),
    "vision": (
        "gemma4",
        {"text_config": {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}},
        "use_bidirectional_attention='vision'",
    ),
    "inner model": ("llava", {"text_config": {"model_type": "mamba"}}, "'mamba' are not supported"),
}


@pytest.mark.parametrize("case", UNKNOWN_FEATURES)
def test_unknown_features_are_rejected(case):
    name, changes, message = UNKNOWN_FEATURES[case]
    with pytest.raises(UnsupportedError, match=message):
        layers_from_config(load(name, **changes))


@pytest.mark.parametrize("key", ATTENTION_KEYS)
def test_keys_that_change_attention_are_not_ignored(key):
    config = load("llama")
    with pytest.raises(UnsupportedError, match=f"has {key}='surprise'"):
        layers_from_config(config | {key: "surprise"})
    expected = layers_from_config(config)
    for neutral in ATTENTION_KEYS[key]:
        assert layers_from_config(config | {key: neutral}) == expected


#: (config, changes, part of the message): invalid configs.
INVALID = {
    "no type": ("llama", {"model_type": ...}, "model_type=None"),
    "type": ("llama", {"model_type": ["llama"]}, r"model_type=\['llama'\]"),
    "no heads": ("llama", {"num_attention_heads": ...}, "has no num_attention_heads"),
    "no aliased heads": ("gpt2", {"n_head": ...}, r"no n_head \(or num_attention_heads\)"),
    "text heads": ("llama", {"num_attention_heads": "32"}, "num_attention_heads='32'"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "layers without end": ("llama", {"num_hidden_layers": 10**12}, "no model has as many"),
    "odd size": ("llama", {"hidden_size": 4095}, "which 32 heads do not divide"),
    "kv heads": ("llama", {"num_key_value_heads": 5}, "num_kv_heads=5"),
    "no head size": ("gemma2", {"head_dim": None}, "has no head_dim"),
    "two names": ("gpt2", {"num_attention_heads": 16}, "n_head=12 and num_attention_heads=16"),
    "types": ("gemma2", {"layer_types": "full_attention"}, "not a list of strings"),
    "few types": ("gemma2", {"layer_types": ["full_attention"]}, "1 layer_types for 42 layers"),
    "no window": ("gemma2", {"sliding_window": None}, "no window size"),
    "window off": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 28},
        "no window size.*switched off",
    ),
    "flag": ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window='no'"),
    "cap": ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50'"),
    "nan cap": ("gemma2", {"attn_logit_softcapping": float("nan")}, "logits_soft_cap=nan"),
    "all shared": (
        "gemma3n",
        {"text_config": load("gemma3n")["text_config"] | {"num_kv_shared_layers": 35}},
        "num_kv_shared_layers=35 of 35",
    ),
    "nested": ("mpt", {"attn_config": "alibi"}, "attn_config='alibi'"),
    "no text": ("gemma3", {"text_config": ...}, "text_config=None"),
    "dtype": ("llama", {"torch_dtype": "int8"}, "dtype='int8'"),
    "rank": ("deepseek_v3", {"kv_lora_rank": None}, "has no kv_lora_rank"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_configs_are_rejected(case):
    name, changes, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        layers_from_config(load(name, **changes))


def test_config_must_be_a_mapping():
    with pytest.raises(InvalidInputError, match=r"config is a list.*to_dict"):
        layers_from_config([])


FILES = {
    "empty": (b"", "not valid JSON"),
    "cut off": (b'{"model_type": "llama"', "not valid JSON"),
    "a list": (b"[1, 2]", "contains a JSON list"),
    "binary": (b"\x80\x02\xff\x00", "is not text"),
    "deep": (b"[" * 200_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_without_a_config_are_rejected(case, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"{message}.*Give the model's config.json"):
        load_config(path)


def test_paths_without_a_config_are_rejected(tmp_path):
    with pytest.raises(InvalidInputError, match=r"folder .* contains no config.json"):
        load_config(tmp_path)
    with pytest.raises(InvalidInputError, match="There is no file"):
        load_config(tmp_path / "config.json")
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidInputError, match="too large"):
        load_config(weights)


def test_config_in_a_folder_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(load("llama")).encode())
    assert load_config(tmp_path) == load("llama")
