"""The supported models: the meaning of the keys in their Hugging Face configs, by `model_type`.

A model that is not in the tables is rejected. A key that changes attention (`ATTENTION_KEYS`) must
be read for the model, or have a neutral value.

To add a model, add one entry. Its modeling file shows which keys its attention reads, and the
values of missing ones (`defaults`). Models that AttentionSpec cannot describe go to `UNSUPPORTED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.hf import ConfigReader

__all__ = ["ATTENTION_KEYS", "FAMILIES", "UNSUPPORTED", "WRAPPERS", "Stack", "Window", "Wrapper"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which layers of a stack have a sliding window, and the key of its size.

    Attributes:
        size: key of the window in tokens, the query itself included.
        switch: key that enables windows; None if there is no such key.
        first: key of the index of the first layer with a window; None for 0.
        full_every: every n-th layer has no window; None if all have one.
        full_every_key: key that overrides this n.
        full_leads: the first of n layers has no window, not the last.
        last_is_full: the last layer of the model never has a window.
        by_type: `layer_types` decides if it is given; otherwise it must agree with the rule.
        both_sides: the size covers both sides of the query.
    """

    size: str = "sliding_window"
    switch: str | None = None
    first: str | None = None
    full_every: int | None = None
    full_every_key: str | None = None
    full_leads: bool = False
    last_is_full: bool = False
    by_type: bool = False
    both_sides: bool = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of layers with the same kind of attention, as keys of the config.

    Attributes:
        attn_type: see AttentionSpec.
        num_layers, num_heads, hidden_size: the keys of these sizes.
        num_kv_heads: the key, or a function of the config; None, or null there: num_heads.
        head_size: the key; None, or null there: hidden_size / num_heads.
        window: which layers have a sliding window.
        logits_soft_cap: the key of the soft cap.
        alibi: whether there are ALiBi slopes, or the key of that flag.
        sinks: whether each head has a sink.
        chunk: the key of the size of the chunks in which layers attend that `layer_types` names
            chunked_attention; without these, those of which `chunked` is true.
        chunked: for each layer of a config without layer_types, whether it attends in chunks.
        kv_shared_layers: the key of the number of last layers that read the caches of earlier ones.
        mla: multi-head latent attention, with DeepSeek's keys.
        bidirectional: the key of a flag that makes the model an encoder.
        full_layers: the sizes of the layers without a window, if they differ.
        defaults: the values of missing keys in transformers.
        requires: keys that must have one of these values; otherwise the config is rejected.
        ignores: keys without effect, given the required values.
    """

    attn_type: AttentionType = AttentionType.DECODER
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    hidden_size: str = "hidden_size"
    num_kv_heads: str | Callable[[ConfigReader], int] | None = "num_key_value_heads"
    head_size: str | None = "head_dim"
    window: Window | None = None
    logits_soft_cap: str | None = None
    alibi: bool | str = False
    sinks: bool = False
    chunk: str | None = None
    chunked: Callable[[ConfigReader, int], list[bool]] | None = None
    kv_shared_layers: str | None = None
    mla: bool = False
    bidirectional: str | None = None
    full_layers: Callable[[ConfigReader], dict[str, int]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal model, with the config of its language model nested in its own.

    Attributes:
        text: model_type of the language model if the nested config has none.
        may_be_flat: older files have the language model's keys next to the others.
        range_tokens: key of the number of tokens of one image, which see each other both ways; None
            if images are causal like text.
        defaults: the values of missing keys of the outer config in transformers.
        text_defaults: sizes that published nested configs omit, by their model_type.
        requires: as for Stack, for the nested config.
    """

    text: str
    may_be_flat: bool = False
    range_tokens: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_OFF = (None, False)

#: Keys that change attention, with their neutral values. A config with another value in a key that
#: its model's entry does not read is rejected.
ATTENTION_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("add_cross_attention", "alibi", "attention_k_eq_v", "multi_query"),
            *("add_full_attention_sink_bias", "add_swa_attention_sink_bias"),
            *("relative_attention", "use_relative_position_embeddings"),
            *("use_bidirectional_attention", "use_sliding_window"),
        ),
        _OFF,
    ),
    **dict.fromkeys(
        (
            *("attention_chunk_size", "attention_types", "attention_window"),
            *("attention_logit_cap", "attn_logit_softcapping", "logits_soft_cap"),
            *("attention_window_size", "local_attention", "sliding_window"),
            *("attn_config", "attn_layer_indices", "attn_layer_period", "block_configs"),
            *("dual_chunk_attention_config", "index_topk", "kv_lora_rank", "v_head_dim"),
            *("full_attention_interval", "global_attn_every_n_layers", "sliding_window_pattern"),
            *("global_head_dim", "num_global_key_value_heads", "num_kv_heads", "per_layer_config"),
            *("hybrid_override_pattern", "layers_block_type", "linear_attn_config"),
            *("num_attention_heads_per_layer", "num_key_value_heads_per_layer"),
            *("relative_attention_num_buckets",),
            *("swa_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads"),
        ),
        (None,),
    ),
    "cross_attention_layers": (None, []),
    "is_causal": (None, True),
    "num_kv_shared_layers": (None, 0),
    "position_embedding_type": (None, "absolute", "learned", "rope", "rope_gptj", "rotary"),
}


def _kv(heads: int, **others: Any) -> dict[str, Any]:
    """Defaults of a model whose class has its own number of KV heads."""
    return {"num_key_value_heads": heads, **others}


def _falcon_kv_heads(config: ConfigReader) -> int:
    given = config.optional_integer("num_kv_heads") or config.integer("num_attention_heads")
    multi_query = config.flag("multi_query")
    if config.flag("new_decoder_architecture"):
        return given
    return 1 if multi_query else given


def _bigcode_kv_heads(config: ConfigReader) -> int:
    return 1 if config.flag("multi_query") else config.integer("n_head|num_attention_heads")


def _gemma4_full_layers(config: ConfigReader) -> dict[str, int]:
    sizes = {"head_size": config.integer("global_head_dim")}
    kv_heads = config.optional_integer("num_global_key_value_heads")
    if config.flag("attention_k_eq_v") and kv_heads is not None:
        sizes["num_kv_heads"] = kv_heads
    return sizes


def _llama4_chunked(config: ConfigReader, num_layers: int) -> list[bool]:
    """The layers with rotary embeddings attend in chunks: no_rope_layers is 1 for these."""
    given = config.get("no_rope_layers")
    if given:
        if not isinstance(given, (list, tuple)) or len(given) != num_layers:
            raise config.problem(
                f"has no_rope_layers={given!r}, which is no list of {num_layers} numbers."
            )
        return [bool(each) for each in given]
    every = config.integer("no_rope_layer_interval")
    return [(layer + 1) % every != 0 for layer in range(num_layers)]


_PLAIN = Stack()
_NO_WINDOW: Mapping[str, tuple[Any, ...]] = {"use_sliding_window": _OFF}
_WINDOW_KEYS = ("sliding_window", "max_window_layers")

_QWEN_WINDOW = Window(switch="use_sliding_window", first="max_window_layers", by_type=True)
_QWEN2 = Stack(window=_QWEN_WINDOW, defaults=_kv(32, sliding_window=4096, max_window_layers=28))
_QWEN2_VL = Stack(window=_QWEN_WINDOW, defaults=_kv(8, sliding_window=4096, max_window_layers=80))

_NO_GQA = Stack(num_kv_heads=None, head_size=None)
_GPT2 = replace(
    _NO_GQA,
    num_layers="n_layer|num_hidden_layers",
    num_heads="n_head|num_attention_heads",
    hidden_size="n_embd|hidden_size",
)

_GEMMA3 = Stack(
    window=Window(
        full_every=6, full_every_key="sliding_window_pattern|_sliding_window_pattern", by_type=True
    ),
    bidirectional="use_bidirectional_attention",
    defaults=_kv(4, num_attention_heads=8, head_dim=256, sliding_window=4096),
)
_GEMMA3N = Stack(
    window=Window(full_every=5, by_type=True),
    kv_shared_layers="num_kv_shared_layers",
    defaults=_kv(
        2, num_attention_heads=8, head_dim=256, sliding_window=512, num_kv_shared_layers=15
    ),
)
_GEMMA4 = Stack(
    window=Window(full_every=6, last_is_full=True, by_type=True),
    kv_shared_layers="num_kv_shared_layers",
    full_layers=_gemma4_full_layers,
    defaults=_kv(4, num_attention_heads=8, head_dim=256, sliding_window=512, global_head_dim=512),
    # "vision" is checked in the wrapper; the language model itself is causal.
    requires={"use_bidirectional_attention": (*_OFF, "vision")},
)

#: A BERT can also be a decoder, or add a bias for relative positions; both are rejected.
_BERT = replace(
    _NO_GQA,
    attn_type=AttentionType.ENCODER_ONLY,
    requires={"is_decoder": _OFF, "is_causal": _OFF},
)


_DECODER_SIDE = replace(
    _NO_GQA,
    num_layers="decoder_layers",
    num_heads="decoder_attention_heads",
    hidden_size="d_model",
    requires={"is_encoder_decoder": (None, True)},
)
_ENCODER_SIDE = replace(
    _DECODER_SIDE,
    attn_type=AttentionType.ENCODER,
    num_layers="encoder_layers",
    num_heads="encoder_attention_heads",
)
_ENCODER_DECODER = (
    _ENCODER_SIDE,
    _DECODER_SIDE,
    replace(_DECODER_SIDE, attn_type=AttentionType.ENCODER_DECODER),
)

_MLA = Stack(mla=True)

FAMILIES: dict[str, tuple[Stack, ...]] = {
    # Decoders without sliding windows.
    **dict.fromkeys(("llama", "olmo", "olmo2", "olmoe", "cohere", "nemotron"), (_PLAIN,)),
    **dict.fromkeys(("granite", "granitemoe", "phi"), (_PLAIN,)),
    "gemma": (Stack(defaults=_kv(16, head_dim=256)),),
    "stablelm": (Stack(defaults=_kv(32)),),
    **dict.fromkeys(("glm", "glm4"), (Stack(defaults=_kv(2, head_dim=128)),)),
    "glm4_moe": (Stack(defaults=_kv(8)),),
    "ernie4_5": (Stack(defaults=_kv(2, head_dim=128)),),
    "seed_oss": (Stack(defaults=_kv(8, head_dim=128)),),
    "qwen2_moe": (Stack(defaults=_kv(16), requires=_NO_WINDOW, ignores=_WINDOW_KEYS),),
    "smollm3": (Stack(defaults=_kv(4), requires=_NO_WINDOW, ignores=_WINDOW_KEYS),),
    "qwen3_vl_text": (Stack(defaults=_kv(32, head_dim=128)),),
    "qwen3_vl_moe_text": (Stack(defaults=_kv(16)),),
    **dict.fromkeys(("gpt2", "gptj"), (_GPT2,)),
    "gpt_bigcode": (
        replace(_GPT2, num_kv_heads=_bigcode_kv_heads, defaults={"multi_query": True}),
    ),
    **dict.fromkeys(("gpt_neox", "opt"), (_NO_GQA,)),
    # Decoders with ALiBi.
    "bloom": (replace(_GPT2, hidden_size="hidden_size|n_embed", alibi=True),),
    "mpt": (
        replace(
            _NO_GQA,
            num_layers="n_layers|num_hidden_layers",
            num_heads="n_heads|num_attention_heads",
            hidden_size="d_model|hidden_size",
            alibi="attn_config.alibi",
            defaults={"attn_config.alibi": True},
            requires={
                "attn_config.attn_type": (None, "multihead_attention"),
                "attn_config.attn_uses_sequence_id": _OFF,
                "attn_config.kv_n_heads": (None,),
                "attn_config.prefix_lm": _OFF,
                "attn_config.sliding_window_size": (None, -1),
            },
        ),
    ),
    "falcon": (
        replace(
            _NO_GQA,
            num_kv_heads=_falcon_kv_heads,
            alibi="alibi",
            defaults={"multi_query": True},
        ),
    ),
    # Decoders with a sliding window in every layer, or in none.
    "mistral": (Stack(window=Window(), defaults=_kv(8, sliding_window=4096)),),
    **dict.fromkeys(("mixtral", "phimoe"), (Stack(window=Window(), defaults=_kv(8)),)),
    "ministral3": (Stack(window=Window(), defaults=_kv(8, head_dim=128)),),
    "phi3": (Stack(window=Window()),),
    "starcoder2": (Stack(window=Window(), defaults=_kv(2)),),
    "qwen3_moe": (
        Stack(window=Window(switch="use_sliding_window"), defaults=_kv(4, sliding_window=4096)),
    ),
    # Decoders with a sliding window in some layers.
    "ministral": (Stack(window=Window(by_type=True), defaults=_kv(8, sliding_window=4096)),),
    "qwen2": (_QWEN2,),
    "qwen3": (
        Stack(
            window=_QWEN_WINDOW,
            defaults=_kv(32, head_dim=128, sliding_window=4096, max_window_layers=28),
        ),
    ),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), (_QWEN2_VL,)),
    "gemma2": (
        Stack(
            window=Window(full_every=2, by_type=True),
            logits_soft_cap="attn_logit_softcapping",
            defaults=_kv(4, head_dim=256, sliding_window=4096, attn_logit_softcapping=50.0),
        ),
    ),
    "gemma3_text": (_GEMMA3,),
    "gemma3n_text": (_GEMMA3N,),
    "gemma4_text": (_GEMMA4,),
    "gpt_oss": (
        Stack(
            window=Window(full_every=2, by_type=True),
            sinks=True,
            defaults=_kv(8, head_dim=64, sliding_window=128),
        ),
    ),
    "cohere2": (
        Stack(
            window=Window(
                full_every=4,
                full_every_key="sliding_window_pattern|_sliding_window_pattern",
                by_type=True,
            ),
            defaults={"sliding_window": 4096},
        ),
    ),
    "olmo3": (Stack(window=Window(full_every=4, by_type=True), defaults={"sliding_window": 4096}),),
    "exaone4": (
        Stack(
            window=Window(full_every=4, full_every_key="sliding_window_pattern", by_type=True),
            defaults=_kv(32, sliding_window=4096),
        ),
    ),
    # Decoders that attend in chunks in most layers.
    "llama4_text": (
        Stack(
            chunk="attention_chunk_size",
            chunked=_llama4_chunked,
            defaults=_kv(
                8,
                num_attention_heads=40,
                num_hidden_layers=48,
                hidden_size=5120,
                head_dim=128,
                attention_chunk_size=8192,
                no_rope_layer_interval=4,
            ),
        ),
    ),
    # Decoders with multi-head latent attention.
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), (_MLA,)),
    # Encoders.
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), (_BERT,)),
    "distilbert": (
        replace(
            _BERT,
            num_layers="n_layers|num_hidden_layers",
            num_heads="n_heads|num_attention_heads",
            hidden_size="dim|hidden_size",
        ),
    ),
    "modernbert": (
        replace(
            _BERT,
            window=Window(
                size="local_attention",
                full_every=3,
                full_every_key="global_attn_every_n_layers",
                full_leads=True,
                by_type=True,
                both_sides=True,
            ),
            defaults={"local_attention": 128},
        ),
    ),
    # Encoders with a decoder that attends to them.
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100", "whisper"), _ENCODER_DECODER),
}

_7B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
_LLAVA = Wrapper(text="llama", text_defaults={"llama": _7B, "mistral": _7B})

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        text="gemma3_text",
        range_tokens="mm_tokens_per_image",
        defaults={"mm_tokens_per_image": 256},
    ),
    "gemma3n": Wrapper(text="gemma3n_text"),
    # "vision": an image's tokens see each other, but only inside the window, and the config does
    # not contain the number of tokens of an image.
    "gemma4": Wrapper(text="gemma4_text", requires={"use_bidirectional_attention": _OFF}),
    "internvl": Wrapper(text="qwen2"),
    "kimi_k25": Wrapper(text="deepseek_v3"),
    **dict.fromkeys(("llava", "llava_next"), _LLAVA),
    "llama4": Wrapper(text="llama4_text"),
    "mistral3": Wrapper(text="mistral"),
    "qwen2_vl": Wrapper(text="qwen2_vl_text", may_be_flat=True),
    "qwen2_5_vl": Wrapper(text="qwen2_5_vl_text", may_be_flat=True),
    "qwen3_vl": Wrapper(text="qwen3_vl_text"),
    "qwen3_vl_moe": Wrapper(text="qwen3_vl_moe_text"),
}

_RELATIVE = "its scores get a bias learned for relative positions"
_LINEAR = "most of its layers are linear attention"

#: Models that AttentionSpec cannot describe, with the feature that it has no field for.
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), _RELATIVE),
    **dict.fromkeys(("deberta", "deberta-v2", "mpnet"), _RELATIVE),
    **dict.fromkeys(("kimi_linear", "qwen3_next"), _LINEAR),
    "deepseek_v32": "its queries attend to the keys that an indexer picks",
}
