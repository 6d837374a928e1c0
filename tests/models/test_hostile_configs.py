"""Configs with values that no model has are rejected with a sentence, or described."""

from __future__ import annotations

import pytest

from attn_dispatch.errors import AttnDispatchError
from support.model_cases import load

pytest.importorskip("transformers", minversion="5.17")

from attn_dispatch.integrations.transformers import describe


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"text_config": value}
    return value


#: (config, key, value)
HOSTILE = [
    ("llama", "num_hidden_layers", 10**6),
    ("llama", "num_hidden_layers", -1),
    ("llama", "num_hidden_layers", 10**39),
    ("llama", "num_hidden_layers", float("nan")),
    ("llama", "hidden_size", 10**18),
    ("llama", "vocab_size", 10**30),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_key_value_heads", [8]),
    ("llama", "head_dim", float("inf")),
    ("llama", "rope_scaling", "linear"),
    ("llama", "rope_scaling", nested(50)),
    ("llama", "architectures", {"a": 1}),
    ("llama", "architectures", 5),
    ("llama", "auto_map", ["x"]),
    ("llama", "torch_dtype", {"a": 1}),
    ("llama", "quantization_config", 3),
    ("llama", "text_config", nested(50)),
    ("llama", "attn_implementation", "flash_attention_2"),
    ("llama", "_attn_implementation", "no such"),
    ("gemma2", "layer_types", ["full_attention"] * 3),
    ("gemma2", "layer_types", "full_attention"),
    ("gemma2", "sliding_window", -5),
    ("gemma2", "sliding_window", 10**30),
    ("gemma2", "attn_logit_softcapping", float("nan")),
    ("gemma2", "query_pre_attn_scalar", 0),
    ("gemma3", "text_config", None),
    ("gemma3", "text_config", []),
    ("gemma3", "vision_config", 7),
    ("whisper", "encoder_layers", 10**6),
    ("whisper", "max_source_positions", "long"),
    ("deepseek_v3", "kv_lora_rank", None),
    ("deepseek_v3", "n_routed_experts", 10**12),
]


@pytest.mark.parametrize(("name", "key", "value"), HOSTILE)
def test_values_that_no_model_has_give_a_sentence(name, key, value):
    layers = {} if key == "num_hidden_layers" or name == "whisper" else {"num_hidden_layers": 2}
    config = load(name, layer_types=...) | layers | {key: value}
    try:
        found = describe(config)
    except AttnDispatchError as error:
        message = str(error)
    else:
        message = " ".join(found.notes)
        assert found.groups
    assert len(message) < 600
    assert "\n" not in message
