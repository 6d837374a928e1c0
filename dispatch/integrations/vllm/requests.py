"""vLLM's words for a layer as ours: what its flags ask for, and what the plug-in rejects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType

__all__ = [
    "FP8_NAMES",
    "MAX_DECODE_QUERY_LEN",
    "NAME",
    "check_known",
    "kv_cache_dtype_of",
    "layer_arguments",
    "reasons_of_flags",
    "spec_of_flags",
]

#: The name of the backend in vLLM, where it can add one.
NAME = "ATTN_DISPATCH"

#: Requests of more new tokens go to the kernel for prefills, also if they are verified drafts.
MAX_DECODE_QUERY_LEN = 16

#: vLLM's name of an fp8 cache -> ours. Its e4m3 is the device's own form.
FP8_NAMES = {"fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8_e5m2"}
_UNQUANTIZED = ("auto", "float16", "bfloat16")

_TYPES = (AttentionType.DECODER, AttentionType.ENCODER_ONLY)

#: A window that is asked for without its size.
_SOME_WINDOW = 4096

#: Of the sizes of latent attention, vLLM asks by the sum of the latents' and this one.
_ROPE = 64

#: What vLLM can ask for and the plug-in does not have -> the reason.
_REJECTED = {
    "use_mla": "latent attention (MLA) is not wired to vLLM's MLA layers",
    "use_sparse": "no backend has sparse attention by an indexer",
    "use_mm_prefix": "bidirectional ranges of images are not wired to vLLM's metadata",
    "use_per_head_quant_scales": "vLLM does not tell a layer that its cache has scales per head",
    "use_non_causal": "layers of a decoder are causal; vLLM states the opposite step by step",
    "use_pcp": "prefill context parallelism of vLLM is not wired",
    "use_dcp": "decode context parallelism of vLLM is not wired",
    "use_rswa": "no backend has a sliding window with a visible prefix (R-SWA)",
    "use_adaptive_verification": "plans are made of the lengths of queries on the host, and these "
    "differ from the device's",
}

#: What it can ask for that changes nothing here, or that `spec_of_flags` takes.
_TAKEN = frozenset(
    (
        *("head_size", "dtype", "kv_cache_dtype", "block_size", "has_sink", "attn_type"),
        *("has_sliding_window", "use_batch_invariant", "device_capability", "use_kv_connector"),
    )
)


def reasons_of_flags(asked: Mapping[str, Any]) -> list[str]:
    """Why the plug-in itself rejects what vLLM asks for, before any backend is asked.

    Args:
        asked: the keywords of vLLM's `validate_configuration`.
    """
    reasons = [reason for name, reason in _REJECTED.items() if asked.get(name)]
    reasons += [
        f"{name}={value!r} is not known to this version of attn-dispatch"
        for name, value in asked.items()
        if value and name not in _TAKEN and name not in _REJECTED
    ]
    attn_type = asked.get("attn_type", AttentionType.DECODER)
    if attn_type not in [each.value for each in _TYPES]:
        reasons.append(f"attention of type {str(attn_type)!r} is not wired")
    cache = asked.get("kv_cache_dtype")
    if cache not in (None, *_UNQUANTIZED, *FP8_NAMES):
        reasons.append(
            f"a cache of {cache} has another form than any cache here; supported: "
            f"{', '.join((*_UNQUANTIZED, *FP8_NAMES))}"
        )
    return reasons


def check_known(impl: Any, others: Mapping[str, Any]) -> None:
    """Reject what a layer's impl is given in addition to the arguments that it knows.

    Raises:
        UnsupportedError: one of them is not None or False, or ranks of vLLM share keys.
    """
    unknown = [name for name, value in others.items() if value is not None and value is not False]
    if unknown or impl.total_cp_world_size > 1:
        raise UnsupportedError(
            f"vLLM asks for {', '.join(unknown) or 'context parallelism'}, which attn-dispatch's "
            "plug-in does not have. Use another --attention-backend."
        )


def kv_cache_dtype_of(name: str | None) -> str:
    """Our name of vLLM's kv_cache_dtype.

    Raises:
        UnsupportedError: no backend has such a cache.
    """
    if reasons := reasons_of_flags({"kv_cache_dtype": name}):
        raise UnsupportedError(f"{reasons[0]}. Set another --kv-cache-dtype.")
    return FP8_NAMES.get(name or "auto", name or "auto")


def spec_of_flags(
    head_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: str | None = None,
    block_size: int | None = None,
    has_sink: bool = False,
    attn_type: str = AttentionType.DECODER,
    has_sliding_window: bool = False,
    use_batch_invariant: bool = False,
    use_mla: bool = False,
    **_: Any,
) -> AttentionSpec:
    """The spec of a layer that vLLM describes by flags. It leaves the numbers of heads open.

    Raises:
        InvalidInputError: a size is invalid.
        UnsupportedError: the cache or the type is not wired.
    """
    arguments = {
        **layer_arguments(attn_type, _SOME_WINDOW if has_sliding_window else None, False),
        "num_heads": 32,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype_of(kv_cache_dtype),
        "block_size": block_size if AttentionType(attn_type).has_kv_cache else None,
        "sinks": has_sink,
        "batch_invariant": use_batch_invariant,
    }
    if not use_mla:
        size = 128 if head_size is None else head_size
        return AttentionSpec(**arguments, num_kv_heads=8, head_size=size)
    latent = (512 + _ROPE if head_size is None else head_size) - _ROPE
    dims = {"qk_nope_head_dim": 128, "qk_rope_head_dim": _ROPE, "v_head_dim": 128}
    return AttentionSpec.for_mla(**arguments, mla=MLADims(kv_lora_rank=latent, **dims))


def layer_arguments(attn_type: str, sliding_window: int | None, has_drafts: bool) -> dict[str, Any]:
    """What the type of a layer, its window and drafts make of the arguments of `Attention`.

    vLLM knows the true lengths on the host, unless drafts are verified: then it knows bounds of
    them. The window of an encoder is on both sides.

    Raises:
        UnsupportedError: the type is not wired.
    """
    if reasons := reasons_of_flags({"attn_type": attn_type}):
        raise UnsupportedError(f"{reasons[0]}. Use another --attention-backend.")
    arguments: dict[str, Any] = {"attn_type": str(AttentionType(attn_type))}
    if not AttentionType(attn_type).has_kv_cache:
        both = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        return {**arguments, "window_size": both}
    lengths = "upper_bound" if has_drafts else "exact"
    return {**arguments, "sliding_window": sliding_window, "lengths": lengths}
