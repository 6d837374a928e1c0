"""Describe a model's attention layers by running transformers' own class once, without weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.transformers.build import (
    ALIASES,
    MAX_LAYERS,
    config_object,
    other_mixer,
    run_model,
    text_part,
)
from attn_dispatch.integrations.transformers.description import ModelDescription
from attn_dispatch.integrations.transformers.failures import own_attention
from attn_dispatch.integrations.transformers.keywords import KEYWORD_REASONS
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.config_file import model_type_of, own_code, require_dtype
from attn_dispatch.models.layers import (
    LayerGroup,
    check_serving_fields,
    group_names,
    with_serving_fields,
)

if TYPE_CHECKING:
    import torch

    from attn_dispatch.integrations.transformers.recording import Call

__all__ = ["describe"]

#: The name of layers that are not known to have something else.
_NO_CALL = "no call of the attention function"
#: Names of layers that are known to have something else than softmax attention.
_OTHER = re.compile(r"linear|mamba|conv|recurrent|delta|rwkv|lstm", re.IGNORECASE)
#: Nested configs of wrappers that transformers does not know.
_INNER_KEYS = ("text_config", "llm_config", "language_config")
#: Wrappers whose image tokens see each other both ways.
_BIDIRECTIONAL_IMAGES = frozenset(("gemma3", "paligemma"))

#: Attributes of attention modules -> what they compute that AttentionSpec has no field for.
_MARKERS: dict[str, str] = {
    "compressor": "its keys are compressed into fewer ones before attention",
    "indexer": "an indexer picks the keys that each query attends to (sparse attention)",
    "lambda_q1": "differential attention: a difference of two softmaxes",
    "relative_attention_bias": "its scores get a bias learned for relative positions",
}
#: Keys of configs that transformers has no model for -> the same.
_KEYS: dict[str, str] = {
    "block_configs": "its block_configs give each layer its own heads, and some have no attention",
    "index_topk": "an indexer picks the keys that each query attends to (sparse attention)",
}


def describe(
    config_or_model: Any, *, dtype: torch.dtype | None = None, **extra: Any
) -> ModelDescription:
    """The attention layers of a model.

    transformers' class for the model is built on the meta device and run once with an attention
    function that records how it is called. No code of a checkpoint is run, and no weights are read.
    For a multimodal model these are the layers of the language model.

    Args:
        config_or_model: the content of a config.json, a config object, or a model of transformers.
        dtype: of the computation; None for the dtype that the config or model states.
        **extra: fields of AttentionSpec that the engine decides, such as block_size.

    Raises:
        UnsupportedError: no layer of the model can be described; the message has the reason.
        InvalidInputError: the config is incomplete or a value invalid, or it states no dtype and
            none is given.

    Example:
        >>> from transformers import Gemma2Config
        >>> found = describe(Gemma2Config(dtype="bfloat16"), block_size=16)
        >>> found.groups["sliding_window"].spec.sliding_window
        4096
    """
    check_serving_fields(extra)
    content, dtype = _content(config_or_model, dtype)
    notes: list[str] = []
    content = _known_part(content, notes)
    _check_layers(content)
    _check_own_code(content, notes)
    config = config_object(content)
    text, model, calls = _run_text_part(config)
    _note_left_out(config, text, notes)
    dtype = dtype or _stated_dtype(text, config)
    images = config is not text and config.model_type in _BIDIRECTIONAL_IMAGES
    return _description(text, model, calls, images, dtype, extra, notes)


def _run_text_part(config: Any) -> tuple[Any, torch.nn.Module, list[Call]]:
    """The config of the language model, and what `run_model` gives for it."""
    text = text_part(config)
    try:
        return (text, *run_model(text))
    except UnsupportedError:
        try:
            inner = config.get_text_config()
        except ValueError:  # it has several
            inner = text
        if inner.model_type == text.model_type:
            raise
        # An encoder of something else with a decoder of text, or a detector that reads text.
        return (inner, *run_model(inner))


def _content(given: Any, dtype: torch.dtype | None) -> tuple[dict[str, Any], torch.dtype | None]:
    """The content of the config, and the dtype."""
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    if isinstance(given, PreTrainedModel):
        dtype = dtype or given.dtype
        given = given.config
    if isinstance(given, PreTrainedConfig):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise InvalidInputError(
            f"describe() got a {type(given).__name__}. Give the content of config.json, or a "
            "config or model of transformers."
        )
    model_type_of(given)
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dict(given), dtype


def _known_part(content: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The content, or that of its language model where transformers does not know the wrapper.

    Raises:
        UnsupportedError: transformers knows neither.
    """
    from transformers import CONFIG_MAPPING

    model_type = content["model_type"]
    if ALIASES.get(model_type, model_type) in CONFIG_MAPPING:
        return content
    for key, reason in _KEYS.items():
        if content.get(key):
            raise UnsupportedError(
                f"AttentionSpec cannot describe this model of type {model_type!r}: {reason}."
            )
    for key in _INNER_KEYS:
        inner = content.get(key)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("model_type"), str):
            continue
        kind = inner["model_type"]
        if ALIASES.get(kind, kind) in CONFIG_MAPPING:
            notes.append(
                f"transformers does not know {model_type!r}; its language model ({key}, {kind}) is "
                "described, and what the wrapper changes is not known."
            )
            outer = {name: content[name] for name in ("dtype", "torch_dtype") if name in content}
            return {**outer, **inner}
    raise UnsupportedError(_unknown(model_type, content))


def _unknown(model_type: str, content: Mapping[str, Any]) -> str:
    """The message about a type that transformers does not know."""
    from difflib import get_close_matches

    from transformers import CONFIG_MAPPING, __version__

    near = get_close_matches(model_type, list(CONFIG_MAPPING), n=3, cutoff=0.6)
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    heads = content.get("num_attention_heads")
    size = content.get("head_dim")
    hidden = content.get("hidden_size")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    values = {
        "--num-heads": heads,
        "--num-kv-heads": content.get("num_key_value_heads"),
        "--head-size": size,
        "--sliding-window": content.get("sliding_window"),
        "--dtype": content.get("dtype") or content.get("torch_dtype"),
    }
    flags = " ".join(
        f"{flag} {value}"
        for flag, value in values.items()
        if isinstance(value, (int, str)) and not isinstance(value, bool)
    )
    return (
        f"transformers {__version__} has no model of type {model_type!r}, and its attention is not "
        f"guessed.{nearest} Describe a layer by flags instead; the file has: {flags or 'none'}."
    )


def _check_layers(content: Mapping[str, Any]) -> None:
    parts = [content, *(content.get(key) for key in _INNER_KEYS)]
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        for key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"):
            count = part.get(key)
            if isinstance(count, int) and count > MAX_LAYERS:
                raise InvalidInputError(f"This config has {key}={count}, but no model has as many.")


def _check_own_code(content: Mapping[str, Any], notes: list[str]) -> None:
    """Note or reject a checkpoint that brings classes of its own."""
    own = own_code(content, is_known=lambda name: name in _names_in_transformers())
    if own:
        notes.append(
            f"The file names code of its own ({', '.join(own[:3])}). It is not run: this describes "
            f"transformers' own {content['model_type']!r}."
        )


@functools.cache
def _names_in_transformers() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))


def _note_left_out(config: Any, text: Any, notes: list[str]) -> None:
    if text is config:
        return
    others = [
        name
        for name in getattr(config, "sub_configs", {})
        if getattr(config, name, None) is not None and getattr(config, name) is not text
    ]
    left_out = f" Not described: {', '.join(others)}." if others else ""
    notes.append(f"Only the language model ({text.model_type}).{left_out}")
    if getattr(text, "use_bidirectional_attention", None) == "vision":
        notes.append(
            "Tokens of one image see each other both ways in the layers with a sliding window; "
            "this describes requests without images."
        )


def _stated_dtype(text: Any, config: Any) -> torch.dtype:
    dtypes = (getattr(each, "dtype", None) for each in (text, config))
    stated = next((dtype for dtype in dtypes if dtype is not None), None)
    return require_dtype({} if stated is None else {"dtype": str(stated)})


def _description(
    config: Any,
    model: torch.nn.Module,
    calls: Sequence[Call],
    images: bool,
    dtype: torch.dtype,
    extra: Mapping[str, Any],
    notes: list[str],
) -> ModelDescription:
    groups: dict[tuple[AttentionSpec, float | None], list[int]] = {}
    rejected: dict[str, list[int]] = {}
    counts: dict[AttentionType, int] = {}
    described: set[int] = set()
    numbered = True
    for call in calls:
        attn_type = _attn_type(call, config)
        count = counts[attn_type] = counts.get(attn_type, -1) + 1
        own = getattr(call.module, "layer_idx", None)
        numbered = numbered and isinstance(own, int)
        layer = own if isinstance(own, int) else count
        described.add(layer)
        reason = _reason(call, attn_type, config)
        if reason is None:
            fields = _fields(call, attn_type, images)
            spec = with_serving_fields(fields, dtype, extra)
            groups.setdefault((spec, call.scale), []).append(layer)
        else:
            rejected.setdefault(reason, []).append(layer)
    others = (
        {} if getattr(config, "is_encoder_decoder", False) else _others(config, model, described)
    )
    if not groups:
        raise UnsupportedError(_nothing(config, model, rejected, others))
    _note_unused_windows(config, groups, notes)
    names = group_names([spec for spec, _ in groups])
    return ModelDescription(
        model_type=config.model_type,
        groups={
            name: LayerGroup(spec, tuple(dict.fromkeys(layers)), scale)
            for name, ((spec, scale), layers) in zip(names, groups.items(), strict=True)
        },
        others={name: tuple(layers) for name, layers in others.items()},
        rejected={reason: tuple(dict.fromkeys(layers)) for reason, layers in rejected.items()},
        notes=tuple(notes),
    )


def _note_unused_windows(
    config: Any, groups: Iterable[tuple[AttentionSpec, float | None]], notes: list[str]
) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    windows = {spec.sliding_window for spec, _ in groups if spec.sliding_window is not None}
    if not isinstance(longest, int):
        return
    for window in sorted(window for window in windows if window >= longest):
        notes.append(
            f"The sliding window of {window} tokens hides nothing: the longest context of the "
            f"model is {longest} (max_position_embeddings)."
        )


def _attn_type(call: Call, config: Any) -> AttentionType:
    if call.key_len != call.query_len:
        return AttentionType.ENCODER_DECODER
    if call.visibility.causal:
        return AttentionType.DECODER
    if _has_encoder(config):
        return AttentionType.ENCODER
    return AttentionType.ENCODER_ONLY


def _reason(call: Call, attn_type: AttentionType, config: Any) -> str | None:
    """Why AttentionSpec cannot describe the layer, or None."""
    if attn_type == AttentionType.ENCODER_DECODER and not _has_encoder(config):
        return "it attends to another number of keys than there are tokens"
    for name, reason in _MARKERS.items():
        if getattr(call.module, name, None) is not None:
            return reason
    for name in call.unknown:
        return KEYWORD_REASONS.get(name, f"it passes {name} to its attention function")
    if call.visibility.problem is not None:
        return call.visibility.problem
    return None


def _has_encoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _fields(call: Call, attn_type: AttentionType, images: bool) -> dict[str, Any]:
    seen = call.visibility
    fields: dict[str, Any] = {
        "num_heads": call.num_heads,
        "attn_type": attn_type,
        "logits_soft_cap": call.logits_soft_cap,
        "sinks": call.sinks,
        "attention_chunk": seen.chunk,
        "kv_sharing": bool(getattr(call.module, "is_kv_shared_layer", False)),
        "bidirectional_ranges": images and seen.causal,
    }
    mla = _mla(call)
    if mla is not None:
        fields["mla"] = mla
    else:
        fields |= {
            "num_kv_heads": call.num_kv_heads,
            "head_size": call.head_size,
            "head_size_v": call.head_size_v,
        }
    if attn_type == AttentionType.ENCODER_DECODER:
        return fields
    if seen.causal or seen.left == seen.right:
        fields["sliding_window"] = None if seen.left is None else seen.left + 1
    else:
        sides = (seen.left, seen.right)
        fields["window_size"] = tuple(-1 if side is None else side for side in sides)
    return fields


def _mla(call: Call) -> MLADims | None:
    """The sizes of latent attention, which its module has by these names."""
    sizes: dict[str, int] = {}
    for name in MLADims.__dataclass_fields__:
        size = getattr(call.module, name, None)
        if not isinstance(size, int) or size <= 0:
            return None
        sizes[name] = size
    return MLADims(**sizes) if hasattr(call.module, "kv_b_proj") else None


def _others(config: Any, model: torch.nn.Module, described: set[int]) -> dict[str, list[int]]:
    """The layers that called no attention function, by what they have instead."""
    import torch

    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return {}
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    stacks = [module for module in lists if len(module) == count]
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    found: dict[str, list[int]] = {}
    for layer in sorted(set(range(count)) - described):
        parts = []
        if isinstance(types, (list, tuple)) and len(types) == count:
            parts.append(str(types[layer]))
        mixer = other_mixer(stacks[0][layer]) if stacks else None
        if mixer is not None:
            parts.append(mixer)
        found.setdefault(": ".join(parts) or _NO_CALL, []).append(layer)
    return found


def _nothing(
    config: Any,
    model: torch.nn.Module,
    rejected: Mapping[str, Sequence[int]],
    others: Mapping[str, Sequence[int]],
) -> str:
    """The message about a model without a layer that can be described."""
    kind = config.model_type
    if rejected:
        return f"AttentionSpec cannot describe a model of type {kind!r}: {'; '.join(rejected)}."
    for module in model.modules():
        for name, reason in _MARKERS.items():
            if getattr(module, name, None) is not None:
                return f"AttentionSpec cannot describe a model of type {kind!r}: {reason}."
    mixers = [name for name in others if _OTHER.search(name)]
    if mixers and len(mixers) == len(others):
        return (
            f"A model of type {kind!r} has no softmax attention: its layers are "
            f"{', '.join(mixers)}."
        )
    return own_attention(type(model))
