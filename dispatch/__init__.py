"""attn-dispatch: describe an attention layer once; a backend that computes exactly it runs.

The public names are imported when they are first used, and no kernel package before it is chosen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dispatch.batch import AttentionBatch as AttentionBatch
    from attn_dispatch.capability import ANY as ANY
    from attn_dispatch.capability import ByDevice as ByDevice
    from attn_dispatch.capability import Capabilities as Capabilities
    from attn_dispatch.capability import EitherOf as EitherOf
    from attn_dispatch.capability import MultipleOf as MultipleOf
    from attn_dispatch.capability import OneOf as OneOf
    from attn_dispatch.capability import Range as Range
    from attn_dispatch.capability import Reason as Reason
    from attn_dispatch.capability import SameAs as SameAs
    from attn_dispatch.context import forward_context as forward_context
    from attn_dispatch.device import DeviceMatch as DeviceMatch
    from attn_dispatch.device import DeviceProfile as DeviceProfile
    from attn_dispatch.device import detect_device as detect_device
    from attn_dispatch.device import known_device as known_device
    from attn_dispatch.errors import AttnDispatchError as AttnDispatchError
    from attn_dispatch.errors import BackendFailure as BackendFailure
    from attn_dispatch.errors import InvalidInputError as InvalidInputError
    from attn_dispatch.errors import UnknownBackendError as UnknownBackendError
    from attn_dispatch.errors import UnsupportedError as UnsupportedError
    from attn_dispatch.fallback import BackendFallbackWarning as BackendFallbackWarning
    from attn_dispatch.fallback import failures as failures
    from attn_dispatch.fallback import forget_failures as forget_failures
    from attn_dispatch.functional import attention as attention
    from attn_dispatch.functional import merge_states as merge_states
    from attn_dispatch.interface import INTERFACE_VERSION as INTERFACE_VERSION
    from attn_dispatch.interface import AttentionBackend as AttentionBackend
    from attn_dispatch.interface import AttentionImpl as AttentionImpl
    from attn_dispatch.interface import AttentionLayer as AttentionLayer
    from attn_dispatch.interface import AttentionMetadata as AttentionMetadata
    from attn_dispatch.interface import AttentionMetadataBuilder as AttentionMetadataBuilder
    from attn_dispatch.interface import AttentionState as AttentionState
    from attn_dispatch.interface import AttentionType as AttentionType
    from attn_dispatch.interface import MLAAttentionImpl as MLAAttentionImpl
    from attn_dispatch.interface import Phase as Phase
    from attn_dispatch.kv_cache import allocate_kv_cache as allocate_kv_cache
    from attn_dispatch.kv_cache import copy_blocks as copy_blocks
    from attn_dispatch.kv_cache import swap_blocks as swap_blocks
    from attn_dispatch.kv_cache import write_kv_cache as write_kv_cache
    from attn_dispatch.kv_cache_plan import KVCachePlan as KVCachePlan
    from attn_dispatch.kv_cache_plan import plan_kv_cache as plan_kv_cache
    from attn_dispatch.layer import Attention as Attention
    from attn_dispatch.layer import bind_kv_caches as bind_kv_caches
    from attn_dispatch.overrides import attention_backend as attention_backend
    from attn_dispatch.quantization import stored_head_size as stored_head_size
    from attn_dispatch.registry import register_backend as register_backend
    from attn_dispatch.registry import resolve_full_cls_name as resolve_full_cls_name
    from attn_dispatch.report import Report as Report
    from attn_dispatch.report import Selection as Selection
    from attn_dispatch.selector import explain as explain
    from attn_dispatch.selector import get_attn_backend as get_attn_backend
    from attn_dispatch.selector import resolve as resolve
    from attn_dispatch.selector import select as select
    from attn_dispatch.spec import AttentionSpec as AttentionSpec
    from attn_dispatch.spec import MLADims as MLADims

_HOMES = {
    "batch": ["AttentionBatch"],
    "capability": [
        "ANY",
        "ByDevice",
        "Capabilities",
        "EitherOf",
        "MultipleOf",
        "OneOf",
        "Range",
        "Reason",
        "SameAs",
    ],
    "device": ["DeviceMatch", "DeviceProfile", "detect_device", "known_device"],
    "errors": [
        "AttnDispatchError",
        "BackendFailure",
        "InvalidInputError",
        "UnknownBackendError",
        "UnsupportedError",
    ],
    "context": ["forward_context"],
    "fallback": ["BackendFallbackWarning", "failures", "forget_failures"],
    "functional": ["attention", "merge_states"],
    "interface": [
        "INTERFACE_VERSION",
        "AttentionBackend",
        "AttentionImpl",
        "AttentionLayer",
        "AttentionMetadata",
        "AttentionMetadataBuilder",
        "AttentionState",
        "AttentionType",
        "MLAAttentionImpl",
        "Phase",
    ],
    "kv_cache": [
        "allocate_kv_cache",
        "copy_blocks",
        "swap_blocks",
        "write_kv_cache",
    ],
    "kv_cache_plan": ["KVCachePlan", "plan_kv_cache"],
    "layer": ["Attention", "bind_kv_caches"],
    "overrides": ["attention_backend"],
    "quantization": ["stored_head_size"],
    "registry": ["register_backend", "resolve_full_cls_name"],
    "report": ["Report", "Selection"],
    "selector": ["explain", "get_attn_backend", "resolve", "select"],
    "spec": ["AttentionSpec", "MLADims"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
