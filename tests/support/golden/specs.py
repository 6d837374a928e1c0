"""The layers in the golden table: models that people serve, and the corners of the request."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _layer(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype = BF16, **fields: Any
) -> AttentionSpec:
    if fields.get("attn_type") not in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        fields.setdefault("block_size", 16)
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype, **fields
    )


def _llama3(**fields: Any) -> AttentionSpec:
    return _layer(32, 8, 128, **fields)


def _mla(num_heads: int, **fields: Any) -> AttentionSpec:
    dims = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    return AttentionSpec.for_mla(num_heads=num_heads, dtype=BF16, mla=dims, **fields)


#: By name. Head counts are those of one device without tensor parallelism.
SPECS: dict[str, AttentionSpec] = {
    "Llama 3 8B": _llama3(),
    "Llama 3 70B": _layer(64, 8, 128),
    "Llama 3 405B": _layer(128, 8, 128),
    "Llama 3 8B, e4m3 cache": _llama3(kv_cache_dtype="fp8_e4m3"),
    "Llama 3 8B, e5m2 cache": _llama3(kv_cache_dtype="fp8_e5m2"),
    "Llama 3 8B, e4m3 cache, scale per head": _llama3(
        kv_cache_dtype="fp8_e4m3", kv_scales="per_head"
    ),
    "Llama 3 8B, int8 cache": _llama3(kv_cache_dtype="int8_per_token_head"),
    "Llama 3 8B, fp8 output": _llama3(output_quant="fp8_e4m3"),
    "Llama 3 8B, fp8 output by groups": _llama3(output_quant="fp8_e4m3_group128"),
    "Llama 3 8B, returns LSE": _llama3(returns_lse=True),
    "Llama 3 8B, tree mask": _llama3(custom_mask=True),
    "Llama 3 8B, batch invariant": _llama3(batch_invariant=True),
    "Llama 3 8B, CUDA graph": _llama3(cuda_graph=True),
    "Llama 3 8B, CUDA graph, tree mask": _llama3(cuda_graph=True, custom_mask=True),
    "Llama 3 8B, CUDA graph, int8 cache": _llama3(
        cuda_graph=True, kv_cache_dtype="int8_per_token_head"
    ),
    "Llama 3 8B, float16": _llama3(dtype=FP16),
    "Llama 3 8B, float32": _llama3(dtype=FP32),
    "Llama 3 8B, float64": _llama3(dtype=FP64),
    "Llama 3 8B, blocks of 1": _llama3(block_size=1),
    "Llama 3 8B, blocks of 48": _llama3(block_size=48),
    "Llama 3 8B, blocks of 256": _llama3(block_size=256),
    "Llama 3 8B, HND": _llama3(kv_cache_layout="HND"),
    "Llama 3 8B, no cache": _llama3(block_size=None),
    "Mistral 7B": _layer(32, 8, 128, sliding_window=4096),
    "Mixtral 8x7B": _layer(32, 8, 128),
    "Qwen2 7B": _layer(28, 4, 128),
    "Qwen3 32B": _layer(64, 8, 128),
    "Phi-3 mini": _layer(32, 32, 96),
    "Falcon 7B": _layer(71, 1, 64),
    "BLOOM 7B": _layer(32, 32, 128, alibi=True),
    "MPT 30B": _layer(64, 64, 112, alibi=True),
    "Gemma 2 9B, local": _layer(16, 8, 256, sliding_window=4096, logits_soft_cap=50.0),
    "Gemma 2 9B, global": _layer(16, 8, 256, logits_soft_cap=50.0),
    "Gemma 3 12B, local": _layer(16, 8, 256, sliding_window=1024),
    "Gemma 3 12B, global": _layer(16, 8, 256),
    "Gemma 3 12B, global with images": _layer(16, 8, 256, bidirectional_ranges=True),
    "Gemma 3n, KV shared": _layer(8, 2, 256, kv_sharing=True),
    "gpt-oss 20B, local": _layer(64, 8, 64, sliding_window=128, sinks=True),
    "gpt-oss 20B, global": _layer(64, 8, 64, sinks=True),
    "gpt-oss 20B, global, CUDA graph": _layer(64, 8, 64, sinks=True, cuda_graph=True),
    "DeepSeek-V2 Lite, MLA": _mla(16, block_size=16),
    "DeepSeek-V3, MLA": _mla(128, block_size=64),
    "DeepSeek-V3, MLA, e4m3 cache": _mla(128, block_size=64, kv_cache_dtype="fp8_e4m3"),
    "DeepSeek-V3, expanded": _layer(128, 128, 192, head_size_v=128, block_size=None),
    "BERT base": _layer(12, 12, 64, FP32, attn_type=AttentionType.ENCODER_ONLY),
    "ModernBERT, local": _layer(
        12, 12, 64, attn_type=AttentionType.ENCODER_ONLY, sliding_window=65
    ),
    "Whisper large, encoder": _layer(20, 20, 64, FP16, attn_type=AttentionType.ENCODER),
    "Whisper large, decoder": _layer(20, 20, 64, FP16),
    "Whisper large, cross": _layer(20, 20, 64, FP16, attn_type=AttentionType.ENCODER_DECODER),
    "heads of 1": _layer(8, 2, 1),
    "heads of 7": _layer(8, 2, 7),
    "heads of 33": _layer(8, 2, 33),
    "heads of 80": _layer(32, 32, 80),
    "heads of 192": _layer(16, 16, 192),
    "heads of 512": _layer(8, 1, 512),
    "heads of 1024": _layer(8, 1, 1024),
}
