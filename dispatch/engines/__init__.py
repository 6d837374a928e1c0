"""What a plug-in for an engine is made of, see docs/engine_plugins.md.

A plug-in translates an engine's names. Everything else is here: layers over the engine's cache, the
batch of a step, decode graphs, and what is rejected. The plug-ins of vLLM and SGLang import no
other module of this library.
"""

from __future__ import annotations

from attn_dispatch.engines.attention import EngineAttention
from attn_dispatch.engines.graphs import DecodeSteps
from attn_dispatch.engines.plugin import EnginePlugin
from attn_dispatch.engines.steps import batches_by_layer, padded_batch, slot_table_batch
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.kv_layouts import (
    kv_cache_from_sglang,
    kv_cache_from_vllm,
    kv_cache_from_vllm_0_24,
)
from attn_dispatch.interface.kv_view import KVCache, KVCacheView
from attn_dispatch.interface.quantization import kv_cache_dtype_name
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.device_errors import is_capturing
from attn_dispatch.runtime.context import ForwardContext, forward_context
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention
from attn_dispatch.selection.resolve import reasons_against

__all__ = [
    "STRIDE_ORDERS",
    "Attention",
    "AttentionBatch",
    "AttentionSpec",
    "AttentionType",
    "DecodeSteps",
    "EngineAttention",
    "EnginePlugin",
    "ForwardContext",
    "InvalidInputError",
    "KVCache",
    "KVCacheView",
    "MLAAttention",
    "MLADims",
    "UnsupportedError",
    "batches_by_layer",
    "forward_context",
    "is_capturing",
    "kv_cache_dtype_name",
    "kv_cache_from_sglang",
    "kv_cache_from_vllm",
    "kv_cache_from_vllm_0_24",
    "kv_cache_shape",
    "padded_batch",
    "reasons_against",
    "slot_table_batch",
]
