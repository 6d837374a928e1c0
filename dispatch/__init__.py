"""attn-dispatch: describe an attention layer once; the fastest backend that computes it runs.

The public names are imported when they are first used, and no kernel package before it is chosen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dispatch.batch import AttentionBatch
    from attn_dispatch.capability import (
        ANY,
        ByDevice,
        Capabilities,
        EitherOf,
        MultipleOf,
        OneOf,
        Range,
        Reason,
        SameAs,
    )
    from attn_dispatch.context import forward_context
    from attn_dispatch.device import DeviceMatch, DeviceProfile, detect_device, known_device
    from attn_dispatch.errors import (
        AttnDispatchError,
        BackendFailure,
        InvalidInputError,
        UnknownBackendError,
        UnsupportedError,
    )
    from attn_dispatch.functional import attention, merge_states
    from attn_dispatch.interface import (
        INTERFACE_VERSION,
        AttentionBackend,
        AttentionImpl,
        AttentionLayer,
        AttentionMetadata,
        AttentionMetadataBuilder,
        AttentionState,
        AttentionType,
        MLAAttentionImpl,
        Phase,
    )
    from attn_dispatch.kv_cache import (
        KVCachePlan,
        allocate_kv_cache,
        copy_blocks,
        plan_kv_cache,
        swap_blocks,
        write_kv_cache,
    )
    from attn_dispatch.layer import Attention, bind_kv_caches
    from attn_dispatch.overrides import attention_backend
    from attn_dispatch.registry import register_backend, resolve_full_cls_name
    from attn_dispatch.report import Report, Selection
    from attn_dispatch.selector import explain, get_attn_backend, resolve, select
    from attn_dispatch.spec import AttentionSpec, MLADims

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
        "KVCachePlan",
        "allocate_kv_cache",
        "copy_blocks",
        "plan_kv_cache",
        "swap_blocks",
        "write_kv_cache",
    ],
    "layer": ["Attention", "bind_kv_caches"],
    "overrides": ["attention_backend"],
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
