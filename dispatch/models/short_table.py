"""The layers of Llama-like models, for a machine without transformers.

`attn_dispatch.integrations.transformers.describe` understands nearly every model; this table has
the most common ones. A config with a key that may change attention and is not read is rejected.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.config_file import model_type_of, own_code, require_dtype
from attn_dispatch.models.layers import LayerGroup, check_serving_fields, with_serving_fields

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "layers_from_config"]

_INSTALL = (
    "With transformers 5.17 or newer nearly every model is described: "
    "pip install 'attn-dispatch[transformers]'."
)
_MAX_LAYERS = 1_000


class Family(NamedTuple):
    """What transformers assumes for keys that a config does not have."""

    num_kv_heads: int | None = None  # None: as many as heads
    head_size: int | None = None  # None: hidden_size / num_attention_heads
    windowed: bool = False  # whether sliding_window is the window of all layers
    sliding_window: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(num_kv_heads=8, windowed=True, sliding_window=4096),
    "mixtral": Family(num_kv_heads=8, windowed=True),
    "olmo2": Family(),
    "phi3": Family(windowed=True),
    "qwen2": Family(num_kv_heads=32),
    "qwen3": Family(num_kv_heads=32, head_size=128),
    "qwen3_moe": Family(num_kv_heads=4),
}

#: Keys whose names say that they are about attention.
_ABOUT_ATTENTION = re.compile(
    r"attn|attention|window|chunk|causal|direction|layer_?types|layers_block|block_configs|index_|"
    r"sparse|soft_?cap|logit_cap|alibi|position_embedding_type|sink|lora_rank|head_dim|kv_heads|"
    r"kv_shared|per_layer|is_decoder|multi_query|hybrid|multiplier|cross|relative"
)
#: Those of them that are read, or do not change what AttentionSpec describes.
_UNDERSTOOD = re.compile(
    r"attention_(bias|dropout|out_bias|probs_dropout_prob)|_?attn_implementation.*|attn_pdrop|"
    r"final_logit_softcapping|head_dim|layer_types|max_window_layers|num_attention_heads|qkv_bias"
)


def layers_from_config(
    config: Mapping[str, Any], *, dtype: torch.dtype | None = None, **extra: Any
) -> dict[str, LayerGroup]:
    """The layers of a model, which all have one spec, by the name of their kind.

    Args:
        config: the content of a config.json.
        dtype: of the computation; None for the dtype that the config states.
        **extra: fields of AttentionSpec that the engine decides, such as block_size.

    Raises:
        UnsupportedError: the model is not in the table, or has a key that is not read here.
        InvalidInputError: the config is incomplete, or a value is invalid.
    """
    check_serving_fields(extra)
    model_type = model_type_of(config)
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"Without transformers, a model of type {model_type!r} is not known. {_INSTALL} Or "
            "describe a layer by flags such as --num-heads."
        )
    family = FAMILIES[model_type]
    own_class = re.compile(rf"{model_type.replace('_', '')}(Model|For\w+)", re.IGNORECASE)
    own_code(config, is_known=lambda name: own_class.fullmatch(name) is not None)
    num_layers = _required(config, "num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise InvalidInputError(f"This config has {num_layers} layers; no model has as many.")
    window = _size(config, "sliding_window", family.sliding_window) if family.windowed else None
    usual = "full_attention" if window is None else "sliding_attention"
    if config.get("layer_types") not in (None, [usual] * num_layers):
        raise UnsupportedError(f"This config's layer_types are not all {usual}. {_INSTALL}")
    # Qwen's sizes of windows only count with this switch.
    unused = model_type.startswith("qwen") and not config.get("use_sliding_window")
    for key, value in config.items():
        understood = _UNDERSTOOD.fullmatch(key) or value in (None, False, [], {})
        if key == "sliding_window":
            understood = understood or family.windowed or unused
        if not understood and _ABOUT_ATTENTION.search(key):
            raise UnsupportedError(
                f"This config has {key}={reprlib.repr(value)}, which may change attention. "
                f"{_INSTALL}"
            )
    fields = {
        "attn_type": AttentionType.DECODER,
        "num_heads": (heads := _required(config, "num_attention_heads")),
        "num_kv_heads": _size(config, "num_key_value_heads", family.num_kv_heads) or heads,
        "head_size": _size(config, "head_dim", family.head_size) or _quotient(config, heads),
        "sliding_window": window,
    }
    spec = with_serving_fields(fields, dtype or require_dtype(config), extra)
    return {spec.kind: LayerGroup(spec, tuple(range(num_layers)), spec.head_size**-0.5)}


def _quotient(config: Mapping[str, Any], heads: int) -> int:
    size, rest = divmod(_required(config, "hidden_size"), heads)
    if rest or not size:
        raise InvalidInputError(f"This config has a hidden_size that {heads} heads do not divide.")
    return size


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """The default if the key is missing, and None if it is null."""
    value = config.get(key, default)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InvalidInputError(f"This config has {key}={reprlib.repr(value)}, which is no size.")
    return value


def _required(config: Mapping[str, Any], key: str) -> int:
    value = _size(config, key)
    if value is None:
        raise InvalidInputError(f"This config has no {key}. Is it a model's whole config.json?")
    return value
