"""From a model's Hugging Face config to the AttentionSpec of each kind of layer in it.

The meaning of each model's keys is data, see `families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.families import (
    ATTENTION_KEYS,
    FAMILIES,
    UNSUPPORTED,
    WRAPPERS,
    Stack,
    Wrapper,
)
from attn_dispatch.models.hf import ConfigReader, read_dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "SERVING_FIELDS",
    "LayerGroup",
    "check_serving_fields",
    "group_names",
    "layers_from_config",
    "with_serving_fields",
]

_CACHE_FIELDS = ("kv_cache_dtype", "kv_scales", "block_size", "kv_cache_layout")
#: Fields of AttentionSpec that the engine decides and no config.json contains. Those of the cache
#: only apply to layers that have one.
SERVING_FIELDS = (
    *_CACHE_FIELDS,
    "lengths",
    "custom_mask",
    "key_positions",
    "returns_lse",
    "output_quant",
    "batch_invariant",
    "cuda_graph",
)

_SLIDING, _FULL, _CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
#: More layers than any model has; a larger number is a mistake.
_MAX_LAYERS = 10_000

_ADVICE = (
    "Describe the layer field by field instead: an AttentionSpec, or explain's flags such as "
    "--num-heads."
)


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a model that share one spec.

    Attributes:
        spec: of each of them.
        layers: their indices, from 0; an encoder and its decoder are counted separately.
        scale: what the model multiplies the scores by; None if it is not known.
    """

    spec: AttentionSpec
    layers: tuple[int, ...]
    scale: float | None = None


def layers_from_config(
    config: Mapping[str, Any], *, dtype: torch.dtype | None = None, **extra: Any
) -> dict[str, LayerGroup]:
    """The kinds of layer in a model, by name, in the order of their first layer.

    For a multimodal model these are the layers of the language model.

    Args:
        config: the content of a Hugging Face config.json, e.g. from `hf.load_config`.
        dtype: of the computation; None for the config's dtype, or float32 if it has none.
        **extra: fields of SERVING_FIELDS.

    Returns:
        A LayerGroup for each kind: "full" and "sliding_window" for Gemma 2, "encoder", "full" and
        "encoder_decoder" for Whisper. The names are AttentionSpec.kind, with a suffix if two groups
        have the same kind.

    Raises:
        UnsupportedError: the model is not in the tables, or has an attention feature that
            AttentionSpec or the model's entry does not cover.
        InvalidInputError: the config is incomplete, or a value is invalid.

    Example:
        >>> groups = layers_from_config(load_config("gemma-2-9b"), block_size=16)
        >>> groups["sliding_window"].spec.sliding_window
        4096
    """
    import torch

    if not isinstance(config, Mapping):
        raise InvalidInputError(
            f"config is a {type(config).__name__}, not a mapping. Give the content of "
            "config.json, or to_dict() of a transformers config object."
        )
    check_serving_fields(extra)
    model_type = _model_type(config)
    wrapper = WRAPPERS.get(model_type)
    text, image_tokens = config, None
    defaults: Mapping[str, Any] = {}
    if wrapper is not None:
        text, model_type, image_tokens = _unwrap(config, model_type, wrapper)
        defaults = wrapper.text_defaults.get(model_type, {})
    _require_known(model_type)
    dtype = dtype or read_dtype(text) or read_dtype(config) or torch.float32
    groups: dict[AttentionSpec, list[int]] = {}
    readers = []
    for stack in FAMILIES[model_type]:
        reader = ConfigReader(text, model_type, {**stack.defaults, **defaults})
        readers.append(reader)
        for layer, fields in enumerate(_layers(reader, stack, image_tokens)):
            groups.setdefault(with_serving_fields(fields, dtype, extra), []).append(layer)
    _reject_unread(readers)
    named = zip(group_names(list(groups)), groups.items(), strict=True)
    return {name: LayerGroup(spec, tuple(layers)) for name, (spec, layers) in named}


def check_serving_fields(extra: Mapping[str, Any]) -> None:
    """Raise InvalidInputError for a field that a model decides, not its engine."""
    foreign = sorted(set(extra) - set(SERVING_FIELDS))
    if foreign:
        raise InvalidInputError(
            f"{', '.join(foreign)} cannot be given with a config, which decides it. Besides "
            f"dtype, a config leaves open: {', '.join(SERVING_FIELDS)}. {_ADVICE}"
        )


def _model_type(config: Mapping[str, Any], default: str | None = None) -> str:
    model_type = config.get("model_type", default)
    if not isinstance(model_type, str) or not model_type:
        raise InvalidInputError(
            f"This config has model_type={model_type!r}, so the model is unknown. Is it a "
            f"Hugging Face model's own config.json? If there is none: {_ADVICE}"
        )
    return model_type


def _require_known(model_type: str) -> None:
    if model_type in UNSUPPORTED:
        raise UnsupportedError(
            f"AttentionSpec cannot describe a model of type {model_type!r}: "
            f"{UNSUPPORTED[model_type]}, and it has no field for that. No backend here computes it."
        )
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *WRAPPERS}))
        raise UnsupportedError(
            f"Models of type {model_type!r} are not supported, and their attention is not guessed. "
            f"{_ADVICE} Supported are: {known}."
        )


def _unwrap(
    config: Mapping[str, Any], model_type: str, wrapper: Wrapper
) -> tuple[Mapping[str, Any], str, int | None]:
    """The language model's config, its model_type, and the tokens of an image if they count."""
    outer = ConfigReader(config, model_type, wrapper.defaults)
    text, text_type = config.get("text_config"), wrapper.text
    if text is None and wrapper.may_be_flat:
        text = config
    elif isinstance(text, Mapping):
        text_type = _model_type(text, wrapper.text)
    else:
        raise outer.problem(
            f"has text_config={text!r}, which is not the language model's config. "
            "Is it the whole config.json?"
        )
    _check_requires(ConfigReader(text, text_type, {}), wrapper.requires)
    tokens = outer.optional_integer(wrapper.range_tokens) if wrapper.range_tokens else None
    return text, text_type, tokens


def _layers(reader: ConfigReader, stack: Stack, image_tokens: int | None) -> list[dict[str, Any]]:
    """The fields of AttentionSpec of each layer of a stack."""
    _check_requires(reader, stack.requires)
    for key in stack.ignores:
        reader.get(key)
    num_layers = reader.integer(stack.num_layers)
    if num_layers > _MAX_LAYERS:
        raise reader.problem(f"has {stack.num_layers}={num_layers}, but no model has as many.")
    base = _sizes(reader, stack)
    base["attn_type"] = stack.attn_type
    if stack.logits_soft_cap:
        base["logits_soft_cap"] = reader.number(stack.logits_soft_cap)
    alibi = stack.alibi
    base["alibi"] = reader.flag(alibi) if isinstance(alibi, str) else alibi
    base["sinks"] = stack.sinks
    chunks = _chunks(reader, stack, num_layers)
    windows: list[int | None] = [None] * num_layers
    if stack.chunk is None:
        windows = _windows(reader, stack, num_layers)
    if stack.bidirectional and reader.flag(stack.bidirectional):
        base["attn_type"] = AttentionType.ENCODER_ONLY
        windows = [None if window is None else window // 2 + 1 for window in windows]
    elif image_tokens is not None:
        _check_ranges(reader, windows, image_tokens)
        base["bidirectional_ranges"] = True
    full = stack.full_layers(reader) if stack.full_layers else {}
    shared = 0
    if stack.kv_shared_layers:
        shared = reader.optional_integer(stack.kv_shared_layers, minimum=0) or 0
        if shared >= num_layers:
            raise reader.problem(
                f"has {stack.kv_shared_layers}={shared} of {num_layers} layers, so that no layer "
                "writes the caches that they read."
            )
    return [
        base
        | (full if window is None else {})
        | {"sliding_window": window, "kv_sharing": layer >= num_layers - shared}
        | {"attention_chunk": chunks[layer]}
        for layer, window in enumerate(windows)
    ]


def _sizes(reader: ConfigReader, stack: Stack) -> dict[str, Any]:
    num_heads = reader.integer(stack.num_heads)
    if stack.mla:
        sizes = {key: reader.integer(key) for key in MLADims.__dataclass_fields__}
        return {"num_heads": num_heads, "mla": MLADims(**sizes)}
    if callable(stack.num_kv_heads):
        num_kv_heads: int | None = stack.num_kv_heads(reader)
    else:
        num_kv_heads = reader.optional_integer(stack.num_kv_heads) if stack.num_kv_heads else None
    head_size = None
    if stack.head_size:
        # If the model has its own default, null is a mistake; otherwise it means to divide.
        own = stack.head_size in stack.defaults
        head_size = (reader.integer if own else reader.optional_integer)(stack.head_size)
    if head_size is None:
        hidden_size = reader.integer(stack.hidden_size)
        head_size, rest = divmod(hidden_size, num_heads)
        if rest:
            raise reader.problem(
                f"has a hidden size of {hidden_size}, which {num_heads} heads do not divide."
            )
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads or num_heads,
        "head_size": head_size,
    }


def _windows(reader: ConfigReader, stack: Stack, num_layers: int) -> list[int | None]:
    """The sliding window of each layer, or None."""
    types = reader.names("layer_types", num_layers)
    _check_types(types or [], {_SLIDING, _FULL})
    size, sliding = _pattern(reader, stack, num_layers, by_type=types is not None)
    if types is not None:
        given = [kind == _SLIDING for kind in types]
        if stack.window is not None and stack.window.last_is_full:
            given[-1] = False
        if stack.window is not None and stack.window.by_type:
            sliding = given
        elif given != sliding:
            raise UnsupportedError(
                "This config's layer_types contradict the layers of models of type "
                f"{reader.model_type!r}, with sliding_window={reader.get('sliding_window')!r}. "
                "Correct the one that is wrong."
            )
    if size is None and any(sliding):
        raise reader.problem(
            "has layers with a sliding window but no window size: it is null, missing or switched "
            "off. Set it, or make the layers full_attention."
        )
    return [size if windowed else None for windowed in sliding]


def _chunks(reader: ConfigReader, stack: Stack, num_layers: int) -> list[int | None]:
    """The size of the chunks that each layer attends in, or None."""
    if stack.chunk is None or stack.chunked is None:
        return [None] * num_layers
    size = reader.optional_integer(stack.chunk)
    types = reader.names("layer_types", num_layers)
    chunked = stack.chunked(reader, num_layers)
    if types is not None:
        _check_types(types, {_CHUNKED, _FULL})
        chunked = [kind == _CHUNKED for kind in types]
    if size is None and any(chunked):
        raise reader.problem(
            f"has layers that attend in chunks, and {stack.chunk} is null. Set it, or make the "
            "layers full_attention."
        )
    return [size if each else None for each in chunked]


def _check_types(types: list[str], known: set[str]) -> None:
    unknown = sorted(set(types) - known)
    if unknown:
        raise UnsupportedError(
            f"This config has layers of type {', '.join(unknown)}, which is not supported for "
            f"this model. {_ADVICE}"
        )


def _pattern(
    reader: ConfigReader, stack: Stack, num_layers: int, *, by_type: bool
) -> tuple[int | None, list[bool]]:
    """The size of the window, and the layers that have it if there are no layer_types."""
    rule = stack.window
    if rule is None:
        return None, [False] * num_layers
    size = reader.optional_integer(rule.size)
    switched_on = rule.switch is None or reader.flag(rule.switch)
    if size is not None and rule.both_sides:
        size = size // 2 + 1
    if not switched_on:
        size = None
    first = reader.optional_integer(rule.first, minimum=0) if rule.first else 0
    every = rule.full_every
    if rule.full_every_key:
        reader.get(rule.full_every_key)
        if not by_type:
            every = reader.optional_integer(rule.full_every_key) or every
    if every is None and size is None:
        return None, [False] * num_layers
    is_full = 0 if rule.full_leads else (every or 1) - 1
    sliding = [
        layer >= (first or 0) and (every is None or layer % every != is_full)
        for layer in range(num_layers)
    ]
    if rule.last_is_full:
        sliding[-1] = False
    return size, sliding


def _check_ranges(reader: ConfigReader, windows: list[int | None], tokens: int) -> None:
    """Tokens of a range see each other in spite of the window, so a range must fit into it."""
    window = min((window for window in windows if window is not None), default=tokens)
    if window < tokens:
        raise UnsupportedError(
            f"This config (read as {reader.model_type!r}) has images of {tokens} tokens in a "
            f"sliding window of {window}: not all of them see each other, but "
            "with AttentionSpec.bidirectional_ranges they would."
        )


def _check_requires(reader: ConfigReader, requires: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in requires.items():
        value = reader.get(key)
        if value not in allowed:
            raise _not_understood(reader, key, value)


def _reject_unread(readers: list[ConfigReader]) -> None:
    """Reject a config with a key that changes attention and that was not read."""
    read = set().union(*(reader.read for reader in readers))
    content = readers[0].content
    for key, neutral in ATTENTION_KEYS.items():
        if key not in read and key in content and content[key] not in neutral:
            raise _not_understood(readers[0], key, content[key])


def _not_understood(reader: ConfigReader, key: str, value: Any) -> UnsupportedError:
    return UnsupportedError(
        f"This config has {key}={value!r}, which changes attention in a way that is not supported "
        f"for models of type {reader.model_type!r}. {_ADVICE}"
    )


def with_serving_fields(
    fields: dict[str, Any], dtype: torch.dtype, extra: Mapping[str, Any]
) -> AttentionSpec:
    """The spec of a layer, with those serving fields that apply to it."""
    if not fields["attn_type"].has_kv_cache:
        extra = {name: value for name, value in extra.items() if name not in _CACHE_FIELDS}
    fields = {**fields, "dtype": dtype, **extra}
    return AttentionSpec.for_mla(**fields) if "mla" in fields else AttentionSpec(**fields)


def group_names(specs: list[AttentionSpec]) -> list[str]:
    """A name for each: the kind of layer, with a suffix if that is ambiguous."""
    names: list[str] = []
    for spec in specs:
        parts = [spec.kind]
        if spec.sliding_window is not None and spec.kind != "sliding_window":
            parts.append("sliding_window")
        if spec.attention_chunk is not None and spec.kind != "chunked":
            parts.append("chunked")
        if spec.kv_sharing:
            parts.append("kv_sharing")
        name = ", ".join(parts)
        others = sum(1 for other in names if other.split(" #")[0] == name)
        names.append(f"{name} #{others + 1}" if others else name)
    return names
