"""The table that is used without transformers: equal to what transformers does, or rejected."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.models.short_table import FAMILIES, layers_from_config
from support.model_cases import EXPECTED, load

BF16 = torch.bfloat16
IN_TABLE = sorted(name for name in EXPECTED if load(name)["model_type"] in FAMILIES)


@pytest.mark.parametrize("name", [name for name in IN_TABLE if name != "qwen2_windowed"])
def test_configs_give_the_specs_of_their_layers(name):
    groups = layers_from_config(load(name))
    assert groups.keys() == EXPECTED[name].keys()
    for group, (layers, fields) in EXPECTED[name].items():
        assert set(groups[group].layers) == layers
        spec = groups[group].spec
        assert {field: getattr(spec, field) for field in fields} == fields


SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "dtype": "bfloat16",
}
#: Keys that a file can lack or have.
CHANGES = {
    "missing": {},
    "given": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24},
    "null": {"num_key_value_heads": None, "sliding_window": None},
}
#: Types whose class in transformers accepts no null for num_key_value_heads.
NOT_NULL = {"mistral", "mixtral", "qwen3_moe"}
AGREEMENT = [
    (model_type, change)
    for model_type in FAMILIES
    for change in CHANGES
    if not (change == "null" and model_type in NOT_NULL)
]


@pytest.mark.parametrize(("model_type", "change"), AGREEMENT)
def test_the_table_agrees_with_transformers(model_type, change):
    transformers = pytest.importorskip("attn_dispatch.integrations.transformers")
    config = {"model_type": model_type, **SMALL, **CHANGES[change]}
    if not FAMILIES[model_type].windowed and not model_type.startswith("qwen"):
        config.pop("sliding_window", None)
    kv_heads = FAMILIES[model_type].num_kv_heads
    if change == "missing" and kv_heads is not None:
        config |= {"num_attention_heads": kv_heads, "hidden_size": 8 * kv_heads}
    groups = layers_from_config(config, block_size=16)
    assert groups == transformers.describe(config, block_size=16).groups


#: Values in a Llama config, or keys of it (`...` takes one out) -> part of the message.
UNSUPPORTED = {
    "unknown model": ({"model_type": "llama5"}, "'llama5' is not known.*pip install"),
    "gemma": ({"model_type": "gemma3_text"}, "'gemma3_text' is not known.*pip install"),
    "chunks": ({"attention_chunk_size": 8192}, "attention_chunk_size=8192.*pip install"),
    "window": ({"sliding_window": 4096}, "sliding_window=4096"),
    "soft cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "scale": ({"attention_multiplier": 0.1}, "attention_multiplier=0.1"),
    "both ways": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "cross": ({"add_cross_attention": True}, "add_cross_attention=True"),
    "indexer": ({"index_topk": 2048}, "index_topk=2048"),
    "latents": ({"kv_lora_rank": 512}, "kv_lora_rank=512"),
    "types": ({"layer_types": ["sliding_attention"] * 32}, "layer_types are not all full"),
    "own code": ({"architectures": ["LlamaBiForMNTP"]}, "both directions"),
    "switched on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64},
        "use_sliding_window=True",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_table_does_not_have_is_rejected(case):
    changes, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=message):
        layers_from_config(load("llama", **changes))


INVALID = {
    "no type": ({"model_type": ...}, "model_type=None"),
    "no heads": ({"num_attention_heads": ...}, "has no num_attention_heads"),
    "text": ({"num_attention_heads": "32"}, "num_attention_heads='32'"),
    "bool": ({"num_attention_heads": True}, "num_attention_heads=True"),
    "nan": ({"hidden_size": float("nan")}, "hidden_size=nan"),
    "huge": ({"num_attention_heads": 10**30}, "num_attention_heads=1000"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "layers without end": ({"num_hidden_layers": 10**6}, "no model has as many"),
    "odd size": ({"hidden_size": 4095}, "32 heads do not divide"),
    "kv heads": ({"num_key_value_heads": 5}, "num_kv_heads=5"),
    "no dtype": ({"torch_dtype": ...}, "states no dtype"),
    "dtype": ({"torch_dtype": "int8"}, "dtype='int8'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_configs_are_rejected(case):
    changes, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        layers_from_config(load("llama", **changes))


def test_fields_that_the_config_decides_are_rejected():
    with pytest.raises(InvalidInputError, match=r"num_heads, sinks cannot be given .*block_size"):
        layers_from_config(load("llama"), num_heads=4, sinks=True)
