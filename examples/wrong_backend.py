"""Backends that are wrong on purpose, each in one way: what `attn-dispatch verify` is for.

    python examples/wrong_backend.py

Every fault here has been in a backend that people served models with: the output looks plausible,
no error is raised, and the model is only somewhat worse. Each backend computes as REFERENCE does
but for its fault, declares the feature all the same, and is caught.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.backends.reference.torch_ref import (
    ReferenceBackend,
    ReferenceImpl,
    ReferenceMetadata,
)
from attn_dispatch.batch import AttentionBatch
from attn_dispatch.conformance import verify
from attn_dispatch.kv_cache import write_new_kv
from attn_dispatch.quantization import is_fp8

__all__ = ["FAULTS", "WrongImpl", "wrong_backend"]


class WrongImpl(ReferenceImpl):
    """The reference with one fault; without one it is right.

    Attributes:
        fault: one of FAULTS, or "".
    """

    fault = ""

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any,
        *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        """See AttentionImpl.forward."""
        arguments = [layer, query, key, value, kv_cache, attn_metadata, *more]
        if not self.fault:
            return super().forward(*arguments, **named)
        impl = copy.copy(self)
        impl.fault = ""
        return FAULTS[self.fault](impl, arguments, named)


def _forget(name: str, value: Any = None) -> Callable[..., Any]:
    """Compute as if the layer had another value of this attribute."""

    def forward(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
        asked = getattr(impl, name)
        if asked is None:
            return impl.forward(*arguments, **named)
        arguments[5] = _metadata_without(arguments[5], name, value(asked) if value else None)
        setattr(impl, name, value(asked) if value else None)
        return impl.forward(*arguments, **named)

    return forward


def _metadata_without(metadata: ReferenceMetadata, name: str, value: Any) -> ReferenceMetadata:
    """The metadata, as if made for layers with this value: a check compares it with the impl."""
    field = {"alibi_slopes": "alibi"}.get(name, name)
    builder = copy.copy(metadata.builder)
    switch = getattr(builder.spec, field) is True
    builder.spec = builder.spec.replace(**{field: False if switch else value})
    return dataclasses.replace(metadata, builder=builder)


def _lse_in_base_2(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    returned = impl.forward(*arguments, **named)
    return (returned[0], returned[1] / math.log(2)) if impl.returns_lse else returned


def _read_past_the_end(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Decodes read to the end of their last block, whatever lies there."""
    query, kv_cache, metadata = arguments[1], arguments[4], arguments[5]
    returned = impl.forward(*arguments, **named)
    batch: AttentionBatch = metadata.batch
    if kv_cache is None or batch.block_table is None:
        return returned
    block_size = kv_cache.shape[2]
    output = returned[0] if impl.returns_lse else returned
    for request, (query_len, seq_len) in enumerate(
        zip(batch.query_lens, batch.host_seq_lens, strict=True)
    ):
        if query_len != 1 or seq_len == 0 or output.dtype != query.dtype:
            continue
        whole_blocks = -(-seq_len // block_size) * block_size
        row = batch.query_starts[request]
        longer = AttentionBatch.create(
            [1],
            [whole_blocks],
            block_table=batch.block_table[request : request + 1],
            device=query.device,
        )
        plain = metadata.builder.build(longer)
        result = impl.forward(arguments[0], query[row : row + 1], None, None, kv_cache, plain)
        output[row : row + 1] = result[0] if impl.returns_lse else result
    return returned


def _write_a_shared_cache(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    returned = impl.forward(*arguments, **named)
    layer, _, key, value, kv_cache, metadata = arguments[:6]
    if impl.kv_sharing_target_layer_name is not None and metadata.batch.slot_mapping is not None:
        impl.kv_sharing_target_layer_name = None
        write_new_kv(impl, layer, key, value, kv_cache, metadata.batch)
    return returned


def _ignore_k_scale(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Keys are stored by their scale, and read as if it were 1."""
    layer, _, key, value, kv_cache, metadata = arguments[:6]
    if kv_cache is None or not is_fp8(kv_cache.dtype):
        return impl.forward(*arguments, **named)
    if key is not None:
        write_new_kv(impl, layer, key, value, kv_cache, metadata.batch)
        arguments[2] = arguments[3] = None
    arguments[0] = copy.copy(layer)
    arguments[0]._k_scale, arguments[0]._k_scale_float = torch.ones_like(layer._k_scale), 1.0
    return impl.forward(*arguments, **named)


#: What can be wrong, and how it is done.
FAULTS: dict[str, Callable[..., Any]] = {
    "drops the soft cap": _forget("logits_soft_cap"),
    "ignores ALiBi": _forget("alibi_slopes"),
    "ignores sinks": _forget("sinks"),
    "window off by one": _forget("sliding_window", lambda window: window + 1),
    "lse in base 2": _lse_in_base_2,
    "reads past a request's end": _read_past_the_end,
    "writes a shared cache": _write_a_shared_cache,
    "ignores k_scale": _ignore_k_scale,
}


def wrong_backend(fault: str = "") -> type[ReferenceBackend]:
    """A backend that declares what REFERENCE declares, and has this fault.

    Args:
        fault: one of FAULTS; "" for a backend that is right.
    """
    impl = type("FaultyImpl", (WrongImpl,), {"fault": fault})

    class WrongBackend(ReferenceBackend):
        @staticmethod
        def get_name() -> str:
            return "WRONG"

        @staticmethod
        def get_impl_cls() -> type[ReferenceImpl]:
            return impl

    return WrongBackend


def main() -> None:
    """Verify each, and show the first sentence that catches it."""
    for fault in ("", *FAULTS):
        report = verify(wrong_backend(fault), "cpu", quick=True)
        print(f"{fault or 'no fault'}: {len(report.failures)} of {len(report.outcomes)} failed")
        for failure in report.failures[:1]:
            print(f"    {failure.check.full_name}: {failure.message}")


if __name__ == "__main__":
    main()
