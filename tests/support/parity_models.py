"""Small models of many architectures with random weights, for comparisons with eager attention.

`DECODERS` generate text: `AutoModelForCausalLM`. `OTHERS` are encoders, and models of an encoder
and a decoder. Each states the features of attention that it exercises; a test checks these against
the layers that are made, and docs/transformers.md shows them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "DECODERS",
    "OTHERS",
    "VOCABULARY",
    "WINDOW",
    "ParityModel",
    "build",
    "feature_table",
    "features",
    "left_padded_prompts",
]

VOCABULARY = 97
#: Shorter than the prompts, so that windows and chunks hide keys.
WINDOW = 6

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LOCAL = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class ParityModel:
    """A model type, the values of its config, and what its attention exercises.

    Attributes:
        title: the name people know it by.
        config: fields of the config, besides the model type.
        features: what `features` returns after a run.
        auto: the class of transformers that builds it.
    """

    title: str
    config: dict[str, Any] = field(hash=False)
    features: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"


def _decoder(title: str, *features: str, **config: Any) -> ParityModel:
    return ParityModel(title, {**SIZES, **config}, features)


#: By model type.
DECODERS: dict[str, ParityModel] = {
    "llama": _decoder("Llama", "shared heads"),
    "qwen2": _decoder(
        "Qwen2",
        "shared heads",
        hidden_size=224,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "qwen3": _decoder("Qwen3", "shared heads", **HEADS),
    "qwen3_next": _decoder(
        "Qwen3-Next",
        "shared heads",
        "hybrid",
        **HEADS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "mistral": _decoder("Mistral", "shared heads", "window", head_dim=16, sliding_window=WINDOW),
    "mixtral": _decoder("Mixtral", "shared heads", **EXPERTS),
    "gemma2": _decoder(
        "Gemma 2",
        "shared heads",
        "window",
        "soft cap",
        "scale",
        **HEADS,
        **LOCAL,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=24,
        tie_word_embeddings=False,
    ),
    "gemma3_text": _decoder(
        "Gemma 3",
        "shared heads",
        "window",
        "scale",
        **HEADS,
        **LOCAL,
        query_pre_attn_scalar=24,
        tie_word_embeddings=False,
    ),
    "gemma3n_text": _decoder(
        "Gemma 3n",
        "shared heads",
        "window",
        "scale",
        "KV sharing",
        **HEADS,
        sliding_window=WINDOW,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        tie_word_embeddings=False,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "phi3": _decoder("Phi-3", hidden_size=192, num_attention_heads=2, num_key_value_heads=2),
    "gpt_oss": _decoder("gpt-oss", "shared heads", "window", "sinks", **HEADS, **LOCAL, **EXPERTS),
    "cohere2": _decoder("Command R7B (Cohere 2)", "shared heads", "window", **HEADS, **LOCAL),
    "olmo3": _decoder("OLMo 3", "shared heads", "window", **LOCAL),
    "smollm3": _decoder("SmolLM3", "shared heads", no_rope_layers=[1, 0]),
    "glm4": _decoder("GLM-4", "shared heads", **HEADS),
    "minimax_m2": _decoder("MiniMax-M2", "shared heads", **HEADS, **EXPERTS),
    "granitemoehybrid": _decoder(
        "Granite 4",
        "shared heads",
        "scale",
        "hybrid",
        **EXPERTS,
        layer_types=["mamba", "attention"],
        attention_multiplier=0.3,
        shared_intermediate_size=32,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=8,
    ),
    "llama4_text": _decoder(
        "Llama 4",
        "shared heads",
        "chunks",
        **HEADS,
        **{**EXPERTS, "num_experts_per_tok": 1},
        intermediate_size_mlp=96,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        moe_layers=[1],
    ),
    "deepseek_v2": _decoder("DeepSeek-V2", "K and V head sizes", **LATENT, topk_method="greedy"),
    "deepseek_v3": _decoder("DeepSeek-V3", "K and V head sizes", **LATENT),
}

_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

#: By model type.
OTHERS: dict[str, ParityModel] = {
    "bert": ParityModel("BERT", SIZES, ("encoder",), "AutoModel"),
    "modernbert": ParityModel(
        "ModernBERT",
        {
            **SIZES,
            "local_attention": 2 * WINDOW,
            "layer_types": LOCAL["layer_types"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        ("encoder", "window"),
        "AutoModel",
    ),
    "vit": ParityModel(
        "ViT",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        ("encoder",),
        "AutoModel",
    ),
    "bart": ParityModel(
        "BART", _ENCODER_DECODER, ("encoder", "cross-attention"), "AutoModelForSeq2SeqLM"
    ),
    "whisper": ParityModel(
        "Whisper",
        {
            **_ENCODER_DECODER,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        ("encoder", "cross-attention", "scale"),
        "AutoModelForSpeechSeq2Seq",
    ),
}


@functools.lru_cache(maxsize=4)
def build(model_type: str, **changes: Any) -> torch.nn.Module:
    """The model in float32 with eager attention; do not change its weights.

    Matrices are random and large enough that scores differ by several units: softmax is then far
    from uniform, and a soft cap, sink or hidden key that is left out changes the result visibly.
    `changes` are fields of the config.
    """
    import transformers

    entry = DECODERS.get(model_type) or OTHERS[model_type]
    config = transformers.CONFIG_MAPPING[model_type](**entry.config | changes)
    auto = getattr(transformers, entry.auto)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    fan_in = parameter.shape[-1]
                    parameter.normal_(0, 1.5 * fan_in**-0.5)
                elif "sinks" in name:
                    parameter.normal_(1, 1)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = generation.forced_eos_token_id = None
        generation.pad_token_id = 0
    return model


def left_padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, `(3, 13)` each: prompts of 13, 4 and 9 tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (3, 13), generator=generator)
    mask = torch.ones_like(tokens)
    for row, length in enumerate((13, 4, 9)):
        mask[row, : 13 - length] = 0
    return tokens * mask, mask


def features(model: torch.nn.Module) -> set[str]:
    """The features that the attention of a model exercised in the calls so far."""
    from attn_dispatch.integrations.transformers import attention_layers

    found = attention_layers(model)
    layers = [layer for each in found.values() for layer in each]
    modules = dict(model.named_modules())
    count = getattr(model.config, "num_hidden_layers", 0)
    is_plain = {
        name: all(test(layer) for layer in layers)
        for name, test in {
            "shared heads": lambda layer: layer.spec.num_heads == layer.spec.num_kv_heads,
            "K and V head sizes": lambda layer: layer.spec.head_size == layer.spec.head_size_v,
            "scale": lambda layer: layer.scale == layer.spec.head_size**-0.5,
            "window": lambda layer: layer.spec.sliding_window is None,
            "chunks": lambda layer: layer.spec.attention_chunk is None,
            "soft cap": lambda layer: layer.spec.logits_soft_cap is None,
            "sinks": lambda layer: not layer.spec.sinks,
            "encoder": lambda layer: layer.spec.attn_type in ("decoder", "encoder_decoder"),
            "cross-attention": lambda layer: layer.spec.attn_type != "encoder_decoder",
        }.items()
    }
    is_plain["KV sharing"] = not any(
        getattr(modules[name], "is_kv_shared_layer", False) for name in found
    )
    is_plain["hybrid"] = "encoder_layers" in model.config.to_dict() or len(found) == count
    return {name for name, plain in is_plain.items() if not plain}


def feature_table() -> str:
    """The table of docs/transformers.md."""
    rows = ["| Model | `model_type` | Exercises |", "| --- | --- | --- |"]
    for model_type, entry in (DECODERS | OTHERS).items():
        shown = ", ".join(entry.features) or "plain attention"
        rows.append(f"| {entry.title} | `{model_type}` | {shown} |")
    return "\n".join(rows)
