"""From Hugging Face configs to specs: a config of each family, and configs that are rejected."""

from __future__ import annotations

import json

import pytest
import torch

from attn_dispatch.backends.reference.semantics import visible
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.spec import MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.config import layers_from_config
from attn_dispatch.models.families import ATTENTION_KEYS, FAMILIES, UNSUPPORTED, WRAPPERS
from attn_dispatch.models.hf import load_config
from support.paths import CONFIGS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENCODER_ONLY = {"attn_type": AttentionType.ENCODER_ONLY, "causal": False}
DEEPSEEK = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def sizes(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype = BF16, **more) -> dict:
    return {
        **{"num_heads": heads, "num_kv_heads": kv_heads, "head_size": head_size, "dtype": dtype},
        **more,
    }


def every(start: int, stop: int, step: int = 1) -> set[int]:
    return set(range(start, stop, step))


def plain(layers: int, *args, **more) -> dict:
    return {"full": (every(0, layers), sizes(*args, **more))}


def windowed(layers: int, window: int, *args, **more) -> dict:
    spec = sizes(*args, sliding_window=window, **more)
    return {"sliding_window": (every(0, layers), spec)}


def mixed(layers: int, full: set[int], window: int, *args, **more) -> dict:
    return {
        "full": (full, sizes(*args, sliding_window=None, **more)),
        "sliding_window": (
            every(0, layers) - full,
            sizes(*args, sliding_window=window, **more),
        ),
    }


def encoder(layers: int, *args, **more) -> dict:
    return {"encoder_only": (every(0, layers), sizes(*args, **ENCODER_ONLY, **more))}


def local_encoder(layers: int, full: set[int], window: int, *args) -> dict:
    local = sizes(*args, sliding_window=window, **ENCODER_ONLY)
    return {
        "encoder_only": (full, sizes(*args, sliding_window=None, **ENCODER_ONLY)),
        "encoder_only, sliding_window": (every(0, layers) - full, local),
    }


def latent(layers: int, heads: int) -> dict:
    spec = sizes(heads, 1, 576, head_size_v=512, mla=DEEPSEEK)
    return {"mla": (every(0, layers), spec)}


def encoder_decoder(encoders: int, decoders: int, *args) -> dict:
    types = {"encoder": encoders, "full": decoders, "encoder_decoder": decoders}
    return {
        name: (
            every(0, layers),
            sizes(*args, attn_type="decoder" if name == "full" else name, causal=name == "full"),
        )
        for name, layers in types.items()
    }


def sharing(layers: int, shared: int, full: dict, local: dict) -> dict:
    is_full = every(4, layers, 5)
    first = layers - shared
    return {
        "full": (is_full & every(0, first), full | {"kv_sharing": False}),
        "sliding_window": (every(0, first) - is_full, local | {"kv_sharing": False}),
        "full, kv_sharing": (is_full & every(first, layers), full | {"kv_sharing": True}),
        "sliding_window, kv_sharing": (
            every(first, layers) - is_full,
            local | {"kv_sharing": True},
        ),
    }


#: config file -> {name of the group: (its layers, fields of its spec)}
EXPECTED = {
    "bart": encoder_decoder(12, 12, 16, 16, 64, FP32),
    "bert": encoder(12, 12, 12, 64, FP32),
    "bloom": plain(24, 16, 16, 64, FP16, alibi=True),
    "cohere2": mixed(32, every(3, 32, 4), 4096, 32, 8, 128),
    "deepseek_v2": latent(27, 16),
    "deepseek_v3": latent(61, 128),
    "distilbert": encoder(6, 12, 12, 64, FP32),
    "embeddinggemma": local_encoder(24, every(5, 24, 6), 257, 3, 1, 256, FP32),
    "ernie4_5": plain(18, 16, 2, 128),
    "exaone4": mixed(64, every(3, 64, 4), 4096, 40, 8, 128),
    "falcon_7b": plain(32, 71, 1, 64, alibi=False),
    "falcon_40b": plain(60, 128, 8, 64, alibi=False),
    "falcon_rw": plain(24, 32, 32, 64, alibi=True),
    "gemma": plain(18, 8, 1, 256, logits_soft_cap=None),
    "gemma2": mixed(42, every(1, 42, 2), 4096, 16, 8, 256, logits_soft_cap=50.0),
    "gemma3": mixed(34, every(5, 34, 6), 1024, 8, 4, 256, bidirectional_ranges=True),
    "gemma3_text": mixed(26, every(5, 26, 6), 512, 4, 1, 256, bidirectional_ranges=False),
    "gemma3n": sharing(35, 15, sizes(8, 2, 256), sizes(8, 2, 256, sliding_window=512)),
    "gemma4": sharing(35, 20, sizes(8, 1, 512), sizes(8, 1, 256, sliding_window=512)),
    "glm4": plain(40, 32, 2, 128),
    "glm4_moe": plain(92, 96, 8, 128),
    "gpt2": plain(12, 12, 12, 64, FP32),
    "gpt_bigcode": plain(40, 48, 1, 128, FP32),
    "gpt_neox": plain(44, 64, 64, 96, FP16),
    "gpt_oss": mixed(24, every(1, 24, 2), 128, 64, 8, 64, sinks=True),
    "kimi_k2": latent(61, 64),
    "llama": plain(32, 32, 8, 128, sinks=False, alibi=False, kv_sharing=False, causal=True),
    "llama4": {
        "chunked": (every(0, 48) - every(3, 48, 4), sizes(40, 8, 128, attention_chunk=8192)),
        "full": (every(3, 48, 4), sizes(40, 8, 128, attention_chunk=None)),
    },
    "llava": plain(32, 32, 32, 128, FP16),
    "ministral": mixed(36, every(0, 36, 4), 32768, 32, 8, 128),
    "ministral3": plain(26, 32, 8, 128),
    "mistral": windowed(32, 4096, 32, 8, 128),
    "mistral_no_window": plain(32, 32, 8, 128),
    "mixtral": plain(32, 32, 8, 128),
    "modernbert": local_encoder(22, every(0, 22, 3), 65, 12, 12, 64, FP32),
    "mpt": plain(32, 32, 32, 128, alibi=True),
    "olmo2": plain(32, 32, 32, 128, FP32),
    "olmo3": mixed(32, every(3, 32, 4), 4096, 32, 32, 128),
    "opt": plain(32, 32, 32, 128, FP16),
    "phi3": windowed(32, 2047, 32, 32, 96),
    "qwen2": plain(28, 28, 4, 128),
    "qwen2_moe": plain(24, 16, 16, 128),
    "qwen2_vl": plain(28, 28, 4, 128),
    "qwen2_windowed": mixed(28, every(0, 20), 8192, 28, 4, 128),
    "qwen3": plain(36, 32, 8, 128),
    "qwen3_moe": plain(48, 32, 4, 128),
    "qwen3_vl": plain(36, 32, 8, 128),
    "qwen3_vl_moe": plain(48, 32, 4, 128),
    "roberta": encoder(24, 16, 16, 64, FP32),
    "seed_oss": plain(64, 80, 8, 128),
    "smollm3": plain(36, 16, 4, 128),
    "stablelm": plain(32, 32, 32, 80),
    "starcoder2": windowed(32, 4096, 36, 4, 128),
    "whisper": encoder_decoder(32, 4, 20, 20, 64, FP16),
}


def load(name: str, **changes) -> dict:
    """A stored config with some keys changed; `...` takes a key out."""
    config = load_config(CONFIGS / f"{name}.json") | changes
    return {key: value for key, value in config.items() if value is not ...}


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
