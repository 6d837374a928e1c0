"""LayerGroup: layers of a model with the same spec, and the fields that its engine adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.spec import AttentionSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "SERVING_FIELDS",
    "LayerGroup",
    "check_serving_fields",
    "group_names",
    "with_serving_fields",
]

_CACHE_FIELDS = ("kv_cache_dtype", "kv_scales", "block_size", "kv_cache_layout")
#: Fields of AttentionSpec that the engine decides and no config.json contains. Those of the cache
#: only apply to layers that have one.
SERVING_FIELDS = (
    *_CACHE_FIELDS,
    "lengths",
    "custom_mask",
    "key_positions",
    "returns_lse",
    "output_quant",
    "batch_invariant",
    "cuda_graph",
)


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a model that share one spec.

    Attributes:
        spec: of each of them.
        layers: their indices, from 0; an encoder and its decoder are counted separately.
        scale: what the model multiplies the scores by; None if it is not known.
    """

    spec: AttentionSpec
    layers: tuple[int, ...]
    scale: float | None = None


def check_serving_fields(extra: Mapping[str, Any]) -> None:
    """Raise InvalidInputError for a field that a model decides, not its engine."""
    foreign = sorted(set(extra) - set(SERVING_FIELDS))
    if foreign:
        raise InvalidInputError(
            f"{', '.join(foreign)} cannot be given with a config, which decides it. Besides "
            f"dtype, a config leaves open: {', '.join(SERVING_FIELDS)}. Describe the layer field "
            "by field instead: an AttentionSpec, or explain's flags such as --num-heads."
        )


def with_serving_fields(
    fields: dict[str, Any], dtype: torch.dtype, extra: Mapping[str, Any]
) -> AttentionSpec:
    """The spec of a layer, with those serving fields that apply to it."""
    if not fields["attn_type"].has_kv_cache:
        extra = {name: value for name, value in extra.items() if name not in _CACHE_FIELDS}
    fields = {**fields, "dtype": dtype, **extra}
    return AttentionSpec.for_mla(**fields) if "mla" in fields else AttentionSpec(**fields)


def group_names(specs: list[AttentionSpec]) -> list[str]:
    """A name for each: the kind of layer, with a suffix if that is ambiguous."""
    names: list[str] = []
    for spec in specs:
        parts = [spec.kind]
        if spec.sliding_window is not None and spec.kind != "sliding_window":
            parts.append("sliding_window")
        if spec.attention_chunk is not None and spec.kind != "chunked":
            parts.append("chunked")
        if spec.kv_sharing:
            parts.append("kv_sharing")
        name = ", ".join(parts)
        others = sum(1 for other in names if other.split(" #")[0] == name)
        names.append(f"{name} #{others + 1}" if others else name)
    return names
