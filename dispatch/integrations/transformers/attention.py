"""The attention function: a call of a transformers model, computed by the layer's backend."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.transformers.keywords import KEYWORD_REASONS, unknown_keywords
from attn_dispatch.integrations.transformers.masks import MaskMeaning, meaning_of
from attn_dispatch.integrations.transformers.ragged import RaggedForm, ragged_form
from attn_dispatch.integrations.transformers.visibility import Visibility
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.selection.overrides import current_rules
from attn_dispatch.selection.registry import registry

__all__ = ["IMPLEMENTATION", "attend", "layers_of"]

#: The name to give as `attn_implementation`.
IMPLEMENTATION = "attn_dispatch"

#: The layers of each attention module, by what they compute and the overrides in force.
_layers: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, tuple[Any, Attention]]] = (
    weakref.WeakKeyDictionary()
)
#: More kinds of calls than any module makes; overrides that change on every call make more.
_MAX_LAYERS_PER_MODULE = 32

#: Forms of attention without a mask, by sizes and device.
_forms: dict[Any, RaggedForm] = {}
_MAX_FORMS = 16


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for `AttentionInterface`.

    Args:
        module: the attention module that calls it.
        query: `(batch_size, num_heads, query_len, head_size)`.
        key: `(batch_size, num_kv_heads, key_len, head_size)`, those of the cache included.
        value: `(batch_size, num_kv_heads, key_len, head_size_v)`.
        attention_mask: what `make_mask` returned, or None.
        **keywords: scaling, softcap, s_aux (the sinks), is_causal, and those without an effect.

    Returns:
        The output, `(batch_size, query_len, num_heads, head_size_v)`, 0 in rows of padding; and
        None in place of the attention weights.

    Raises:
        UnsupportedError: no backend computes exactly this; the message names the layer.
        InvalidInputError: an argument does not fit, or autograd is recording.
    """
    try:
        _check(module, query, key, keywords)
        form, seen = _form(module, query, key, attention_mask, keywords)
        layer = _layer(module, query, key, value, seen, keywords)
        if form.context is None:
            empty = query.new_zeros(0, query.shape[1], value.shape[-1])
            return form.unpack(empty, query.shape[0], query.shape[2]), None
        with forward_context(form.context):
            output = layer(form.pack_queries(query), form.pack_keys(key), form.pack_keys(value))
        assert isinstance(output, torch.Tensor)
        return form.unpack(output, query.shape[0], query.shape[2]), None
    except UnsupportedError as error:
        raise UnsupportedError(f"{_name(module)}: {error}", error.report) from error
    except InvalidInputError as error:
        raise InvalidInputError(f"{_name(module)}: {error}") from error


def layers_of(module: torch.nn.Module) -> list[Attention]:
    """The layers that were made for an attention module so far."""
    return [layer for _, layer in _layers.get(module, {}).values()]


def _name(module: torch.nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    kind = type(module).__name__
    return kind if index is None else f"{kind} of layer {index}"


def _rejected(why: str) -> UnsupportedError:
    return UnsupportedError(f'{why}. Use attn_implementation="sdpa" or "eager" for this.')


def _check(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]
) -> None:
    """Reject what the layers would not see."""
    if keywords.get("dropout"):
        raise _rejected("it asks for dropout; call model.eval()")
    if keywords.get("output_attentions"):
        raise _rejected("it asks for the attention weights (output_attentions), which are not kept")
    for name in unknown_keywords(keywords):
        reason = KEYWORD_REASONS.get(name, f"it passes {name} to its attention function")
        raise _rejected(f"AttentionSpec cannot describe it: {reason}")
    scale = keywords.get("scaling")
    if scale is not None and not isinstance(scale, (int, float)):
        raise _rejected(f"its scale is a {type(scale).__name__}, not a number")
    if query.shape[0] != key.shape[0]:
        raise _rejected(
            f"it has {query.shape[0]} rows of queries and {key.shape[0]} rows of keys in the batch"
        )


def _form(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    keywords: dict[str, Any],
) -> tuple[RaggedForm, Visibility]:
    """The ragged form of a call, and what its queries see."""
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    if mask is None:
        return _form_without_mask(module, sizes, query.device, keywords)
    meaning = meaning_of(mask)
    if meaning is None:
        raise _rejected("the model or its caller made or changed the attention mask itself")
    seen = meaning.visibility
    if seen.problem is not None:
        raise _rejected(seen.problem)
    found = (meaning.batch_size, meaning.query_len, meaning.key_len)
    if found[0] == 1 and meaning.valid is None and meaning.segments is None:
        found = (sizes[0], *found[1:])  # it is the same for all rows
        meaning = replace(meaning, batch_size=sizes[0])
    if found != sizes:
        raise _rejected(
            f"its mask is for (batch_size, query_len, key_len)={found}, and the call has {sizes}"
        )
    return ragged_form(meaning, query.device), seen


def _form_without_mask(
    module: torch.nn.Module,
    sizes: tuple[int, int, int],
    device: torch.device,
    keywords: dict[str, Any],
) -> tuple[RaggedForm, Visibility]:
    """Without a mask the flag decides, as in transformers' sdpa."""
    flag = keywords.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if flag is None else flag)
    _, query_len, key_len = sizes
    if causal and query_len not in (1, key_len):
        raise _rejected(
            f"it is causal and has no mask, so which of the {key_len} keys its {query_len} queries "
            "see is not known"
        )
    if keywords.get("sliding_window") is not None:
        raise _rejected("it has a sliding window and no mask, so what its queries see is not known")
    seen = Visibility(causal=causal, right=0 if causal else None)
    memo = (*sizes, causal, device, torch.is_inference_mode_enabled())
    form = _forms.get(memo)
    if form is None:
        offset = key_len - query_len if causal else 0
        form = ragged_form(MaskMeaning(seen, *sizes, query_offset=offset), device)
        if len(_forms) >= _MAX_FORMS:
            _forms.clear()
        _forms[memo] = form
    return form, seen


def _layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: Visibility,
    keywords: dict[str, Any],
) -> Attention:
    """The layer that computes this call; made once.

    It is kept with its sinks: another tensor of sinks needs another layer.
    """
    sinks = keywords.get("s_aux")
    soft_cap = keywords.get("softcap")
    fields: dict[str, Any] = {
        "num_heads": query.shape[1],
        "head_size": query.shape[3],
        "scale": keywords.get("scaling"),
        "num_kv_heads": key.shape[1],
        "head_size_v": value.shape[3],
        "dtype": query.dtype,
        "logits_soft_cap": float(soft_cap) if soft_cap else None,
        "attn_type": _attn_type(module, query, key, seen),
        "causal": seen.causal,
        "attention_chunk": seen.chunk,
        **_window(seen),
    }
    rules = current_rules(None, registry.names())
    memo = (tuple(fields.values()), id(sinks), rules, *(rule.text for rule in rules))
    layers = _layers.setdefault(module, {})
    made = layers.get(memo)
    if made is None or made[0] is not sinks:
        if len(layers) >= _MAX_LAYERS_PER_MODULE:
            layers.clear()
        layer = Attention(
            **fields,
            sinks=None if sinks is None else sinks.reshape(-1),
            prefix=_name(module),
            device=query.device,
            block_size=None,
        )
        made = layers[memo] = (sinks, layer)
    return made[1]


def _window(seen: Visibility) -> dict[str, Any]:
    if seen.causal or seen.left == seen.right:
        return {
            "sliding_window": None if seen.left is None else seen.left + 1,
            "window_size": None,
        }
    sides = tuple(-1 if side is None else side for side in (seen.left, seen.right))
    return {"sliding_window": None, "window_size": sides}


def _attn_type(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, seen: Visibility
) -> AttentionType:
    if seen.causal:
        return AttentionType.DECODER
    is_cross = getattr(module, "is_cross_attention", False) or getattr(module, "is_decoder", False)
    if is_cross or query.shape[2] != key.shape[2]:
        return AttentionType.ENCODER_DECODER
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return AttentionType.ENCODER
    return AttentionType.ENCODER_ONLY
