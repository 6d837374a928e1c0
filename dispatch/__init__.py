"""attn-dispatch: describe an attention layer once; a backend that computes exactly it runs.

The public names are imported when they are first used, and no kernel package before it is chosen.
`__init__.pyi` has the same names for type checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

from attn_dispatch.version import __version__ as __version__

_HOMES = {
    "distributed.context_parallel": "ContextParallel",
    "distributed.merge": "merge_states_distributed",
    "distributed.ring": "ring_attention zigzag_rows",
    "engines.attention": "EngineAttention",
    "engines.graphs": "DecodeSteps",
    "engines.plugin": "EnginePlugin",
    "engines.steps": "batches_by_layer padded_batch slot_table_batch",
    "errors": "AttnDispatchError BackendFailure DeviceWaitError InvalidInputError "
    "UnknownBackendError UnsupportedError",
    "interface.backend": "AttentionBackend INTERFACE_VERSION",
    "interface.batch": "AttentionBatch",
    "interface.capability": "ANY ByDevice Capabilities AnyOf MultipleOf OneOf Range Reason SameAs "
    "Strides",
    "interface.graphs": "AttentionState",
    "interface.impl": "AttentionImpl AttentionLayer MLAAttentionImpl",
    "interface.key_positions": "KeyPositions",
    "interface.kv_access": "gather_kv write_kv_cache write_mla_cache",
    "interface.kv_blocks": "copy_blocks swap_blocks",
    "interface.kv_cache": "STRIDE_ORDERS allocate_kv_cache kv_cache_shape split_token_scales "
    "view_kv_cache",
    "interface.kv_layout_table": "KV_LAYOUTS KVLayout with_kv_layout",
    "interface.kv_layouts": "kv_cache_from_flashinfer kv_cache_from_sglang "
    "kv_cache_from_transformers kv_cache_from_transformers_5_12 kv_cache_from_vllm "
    "kv_cache_from_vllm_0_10 kv_cache_from_vllm_0_24",
    "interface.kv_strides": "KVStrides",
    "interface.kv_view": "KVCacheView kv_strides_of",
    "interface.metadata": "AttentionMetadata AttentionMetadataBuilder",
    "interface.quantization": "kv_cache_torch_dtype stored_head_size",
    "interface.spec": "AttentionSpec MLADims",
    "interface.types": "AttentionType Phase PlaceholderRange",
    "platforms.detect": "detect_device",
    "platforms.device": "DeviceMatch DeviceProfile",
    "platforms.known_devices": "known_device",
    "runtime.context": "forward_context",
    "runtime.functional": "attention merge_states",
    "runtime.graph_state": "ModelGraphState graph_state",
    "runtime.graph_step": "GraphStep",
    "runtime.kv_binding": "bind_kv_caches",
    "runtime.kv_cache_plan": "KVCachePlan plan_kv_cache",
    "runtime.kv_regions": "KVRegion",
    "runtime.layer": "Attention",
    "runtime.mla_layer": "MLAAttention",
    "selection.failure_record": "BackendFallbackWarning failures forget_failures",
    "selection.get_backend": "get_attn_backend",
    "selection.overrides": "attention_backend",
    "selection.registry": "register_backend resolve_full_cls_name",
    "selection.report": "Report Selection",
    "selection.resolve": "explain reasons_against resolve",
    "selection.selector": "select",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
