"""Configs of models, and what their layers are."""

from __future__ import annotations

import torch

from attn_dispatch.interface.spec import MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.models.config_file import load_config
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
