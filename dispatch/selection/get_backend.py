"""vLLM's entry point: the backend class for a layer that is described by keywords."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.registry import NO_ATTENTION, resolve_full_cls_name
from attn_dispatch.selection.resolve import resolve

__all__ = ["get_attn_backend"]


@functools.lru_cache(maxsize=4096, typed=True)  # 1 is not True, and 128.0 not 128
def _make_spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**fields)


#: A layer whose head counts are left open: its KV heads, and the query heads of each.
_OPEN_KV_HEADS, _OPEN_GROUP = 8, 4

#: The same for multi-head latent attention: those of DeepSeek-V3.
_OPEN_MLA_HEADS = 128
_OPEN_MLA = {"qk_nope_head_dim": 128, "v_head_dim": 128}


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None = "auto",
    block_size: int | None = 16,
    is_attention_free: bool = False,
    use_mla: bool = False,
    has_sink: bool = False,
    *,
    is_blocksparse: bool = False,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    device: torch.device | str | DeviceProfile | None = None,
    phase: Phase | None = None,
    backend: str | None = None,
    **fields: Any,
) -> type[AttentionBackend]:
    """The backend class for a layer: vLLM 0.10.2's function, extended by every feature.

    Args:
        head_size: elements per query and key head; with use_mla, kv_lora_rank + qk_rope_head_dim.
        dtype: dtype of queries, keys and values.
        kv_cache_dtype: element type of the cache; None or "auto" for that of dtype.
        block_size: tokens per block of the cache; None without one.
        is_attention_free: the model has no attention layer. The result is a backend that computes
            nothing, whatever the other arguments are.
        use_mla: multi-head latent attention. Without `mla`, the sizes of DeepSeek-V3 are used: 64
            elements of head_size (half of them, if it is less than 128) are the rotated part, and
            the rest is the latent.
        has_sink: the same as sinks=True.
        is_blocksparse: no backend computes block-sparse attention, so True is rejected.
        num_heads: query heads. None, as in vLLM, leaves the counts open: selection uses 32 query
            heads and 8 KV heads (128 and 1 with use_mla), or 4 query heads for each KV head if
            num_kv_heads is given. A backend may be limited to certain counts: its builder
            rejects layers that it cannot compute.
        num_kv_heads: key and value heads; None for num_heads.
        device: as for `resolve`.
        phase: as for `resolve`.
        backend: as for `resolve`.
        **fields: any other field of AttentionSpec.

    Raises:
        UnsupportedError, UnknownBackendError, InvalidInputError: as for `resolve`.

    Example:
        >>> get_attn_backend(128, torch.bfloat16, "auto", 16).get_name()
        >>> get_attn_backend(128, torch.bfloat16, num_heads=32, num_kv_heads=8, sliding_window=4096)
    """
    if any(type(flag) is not bool for flag in (is_attention_free, use_mla, has_sink)):
        raise InvalidInputError(
            "is_attention_free, use_mla and has_sink are True or False, and one is not. Name all "
            "arguments after block_size, such as num_heads=32."
        )
    if is_blocksparse:
        raise UnsupportedError(
            "is_blocksparse=True means block-sparse attention, which no backend computes. Give "
            "the layer a custom_mask, or leave is_blocksparse out."
        )
    if is_attention_free:
        if backend is not None:
            raise InvalidInputError(
                f"backend={backend!r} names a backend for a model that is_attention_free. Leave "
                "one of the two out."
            )
        return resolve_full_cls_name(NO_ATTENTION)
    if has_sink:
        fields["sinks"] = True
    if use_mla or fields.get("mla") is not None:
        fields = _mla_fields(head_size, fields)
        num_heads = _OPEN_MLA_HEADS if num_heads is None else num_heads
        num_kv_heads = 1 if num_kv_heads is None else num_kv_heads
    elif num_heads is None:
        num_kv_heads = _OPEN_KV_HEADS if num_kv_heads is None else num_kv_heads
        num_heads = _OPEN_GROUP * num_kv_heads
    try:
        spec = _make_spec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
            block_size=block_size,
            **fields,
        )
    except TypeError as error:
        raise InvalidInputError(f"This is not an AttentionSpec: {error}.") from error
    return resolve(spec, device, phase=phase, backend=backend).backend_cls


def _mla_fields(head_size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the sizes of multi-head latent attention filled in."""
    mla = fields.get("mla")
    if mla is None:
        if type(head_size) is not int or head_size < 2:
            raise InvalidInputError(
                f"head_size={head_size!r}; with use_mla it is kv_lora_rank + qk_rope_head_dim, "
                "e.g. 576."
            )
        rope = min(64, head_size // 2)
        mla = MLADims(kv_lora_rank=head_size - rope, qk_rope_head_dim=rope, **_OPEN_MLA)
    return {"head_size_v": getattr(mla, "kv_lora_rank", None), **fields, "mla": mla}
