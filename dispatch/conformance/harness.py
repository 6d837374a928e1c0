"""Runs a step through `Attention`, the layer that an engine uses."""

from __future__ import annotations

import dataclasses
from typing import Any

from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.latents import LatentStep
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention

__all__ = ["call", "layer_of"]


def layer_of(step: EngineStep, **more: Any) -> Attention:
    """A layer for a step, bound to a copy of its cache; prefills of latents are absorbed.

    Args:
        step: the step.
        **more: further arguments of Attention, such as `backend`.
    """
    spec = step.spec
    derived = {"alibi", "kv_sharing", "mla"}
    given: dict[str, Any] = {"alibi_slopes": step.slopes, "sinks": step.sinks}
    if isinstance(step, LatentStep):
        derived |= {"num_kv_heads", "head_size", "head_size_v", "sinks"}
        given = {"mla": spec.mla, "kv_b_proj": step.kv_b_proj, "prefill": "absorbed"}
    names = {field.name for field in dataclasses.fields(spec)} - derived
    fields = {name: getattr(spec, name) for name in names} | given
    fields |= {
        "scale": step.scale,
        "kv_sharing_target_layer_name": "target" if spec.kv_sharing else None,
        "device": step.device,
    }
    if spec.alibi == ALIBI_SYMMETRIC:
        fields["alibi"] = ALIBI_SYMMETRIC
    layer = (Attention if spec.mla is None else MLAAttention)(**{**fields, **more})
    layer.kv_cache = None if step.kv_cache is None else step.copy_of_cache()
    if step.spec.kv_cache_dtype.startswith("fp8"):
        layer.set_kv_scales(step.layer._k_scale, step.layer._v_scale)
    return layer


def call(layer: Attention, step: EngineStep, **more: Any) -> Any:
    """What the layer returns for a step; `more` are further arguments of its forward."""
    with forward_context(step.batch):
        return layer(step.query, step.key, step.value, **more)
