"""The interface of a backend, and everything that a backend's author needs, by one import.

Read `backend` first (the class to write), then `impl` and `metadata` (its parts), `spec` and
`capability` (what a layer asks for and what a backend declares), `batch` and `kv_cache` (the data
of a call). The other modules check arguments.
"""

from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import INTERFACE_VERSION, AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch, BatchPart
from attn_dispatch.interface.capability import (
    ANY,
    AnyOf,
    ByDevice,
    Capabilities,
    MultipleOf,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    SameAs,
)
from attn_dispatch.interface.graphs import AttentionState, CommonAttentionState
from attn_dispatch.interface.impl import (
    AttentionImpl,
    AttentionLayer,
    MLAAttentionImpl,
    get_kv_scales,
    store_new_kv,
)
from attn_dispatch.interface.kv_access import gather_kv, read_kv_cache, write_kv_cache
from attn_dispatch.interface.kv_blocks import copy_blocks, swap_blocks
from attn_dispatch.interface.kv_cache import (
    allocate_kv_cache,
    kv_cache_shape,
    layout_of,
    split_token_scales,
    view_kv_cache,
)
from attn_dispatch.interface.metadata import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    BatchMetadata,
)
from attn_dispatch.interface.quantization import stored_head_size
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType, Phase, PlaceholderRange
from attn_dispatch.interface.validation import check_forward, profiling_output
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "ANY",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionImpl",
    "AttentionLayer",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionState",
    "AttentionType",
    "BackendFailure",
    "BatchMetadata",
    "BatchPart",
    "ByDevice",
    "Capabilities",
    "CommonAttentionState",
    "DeviceMatch",
    "DeviceProfile",
    "AnyOf",
    "INTERFACE_VERSION",
    "InvalidInputError",
    "MLAAttentionImpl",
    "MLADims",
    "MultipleOf",
    "OneOf",
    "Phase",
    "PlaceholderRange",
    "Range",
    "Reason",
    "ReasonCode",
    "SameAs",
    "UnsupportedError",
    "allocate_kv_cache",
    "check_forward",
    "copy_blocks",
    "gather_kv",
    "import_library",
    "kv_cache_shape",
    "get_kv_scales",
    "layout_of",
    "profiling_output",
    "read_kv_cache",
    "view_kv_cache",
    "split_token_scales",
    "stored_head_size",
    "swap_blocks",
    "write_kv_cache",
    "store_new_kv",
]
