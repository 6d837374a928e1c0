"""A backend without optional features, as the only one that may be selected."""

from __future__ import annotations

import contextlib

from attn_dispatch import Capabilities, OneOf, attention_backend, register_backend
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.selection.registry import registry

#: What it does not declare. It also lacks encoders.
LACKING = ("sinks", "logits_soft_cap", "sliding_window", "window_size", "alibi")


@contextlib.contextmanager
def plain_backend():
    """REFERENCE for decoders without the features of LACKING, as PLAIN; it is required."""
    known = ReferenceBackend.capabilities

    @register_backend
    class Plain(ReferenceBackend):
        name = "PLAIN"
        capabilities = Capabilities(
            devices=known.devices,
            **{n: v for n, v in known.fields.items() if n not in LACKING}
            | {"attn_type": OneOf("decoder")},
        )

    try:
        with attention_backend("PLAIN"):
            yield
    finally:
        registry.unregister("PLAIN")
