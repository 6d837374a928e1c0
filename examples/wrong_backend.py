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
from attn_dispatch.conformance import verify
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import store_new_kv
from attn_dispatch.interface.quantization import is_fp8

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
        if name == "alibi_slopes":
            impl.alibi = False
        return impl.forward(*arguments, **named)

    return forward


def _metadata_without(metadata: ReferenceMetadata, name: str, value: Any) -> ReferenceMetadata:
    """The metadata, as if made for layers with this value: a check compares it with the impl."""
    field = {"alibi_slopes": "alibi"}.get(name, name)
    builder = copy.copy(metadata.builder)
    is_switch = field in ("alibi", "sinks")
    builder.spec = builder.spec.replace(**{field: False if is_switch else value})
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
        zip(batch.query_lens, batch.seq_lens_list, strict=True)
    ):
        if query_len != 1 or seq_len == 0 or output.dtype != query.dtype:
            continue
        whole_blocks = -(-seq_len // block_size) * block_size
        row = batch.query_start_list[request]
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
        store_new_kv(impl, layer, key, value, kv_cache, metadata.batch)
    return returned


def _ignore_k_scale(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Keys are stored by their scale, and read as if it were 1."""
    layer, _, key, value, kv_cache, metadata = arguments[:6]
    if kv_cache is None or not is_fp8(kv_cache.dtype):
        return impl.forward(*arguments, **named)
    if key is not None:
        store_new_kv(impl, layer, key, value, kv_cache, metadata.batch)
        arguments[2] = arguments[3] = None
    arguments[0] = copy.copy(layer)
    arguments[0]._k_scale, arguments[0]._k_scale_float = torch.ones_like(layer._k_scale), 1.0
    return impl.forward(*arguments, **named)


def _take_symmetric_for_signed(impl: WrongImpl, arguments: list[Any], named: Any) -> Any:
    if impl.alibi_symmetric:
        arguments[5] = _metadata_without(arguments[5], "alibi", True)
        arguments[5].builder.spec = arguments[5].builder.spec.replace(alibi=True)
        impl.alibi_symmetric, impl.alibi = False, True
    return impl.forward(*arguments, **named)


def _take_the_scale_for_positive(impl: WrongImpl, arguments: list[Any], named: Any) -> Any:
    impl.scale = abs(impl.scale)
    return impl.forward(*arguments, **named)


def _parts(returned: Any) -> tuple[torch.Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def _swallow_nan(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """A guard for rows that see nothing takes rows with NaN for such."""
    returned = impl.forward(*arguments, **named)
    for part, blind in zip(_parts(returned), (0.0, -math.inf), strict=False):
        if part.dtype.itemsize > 1:
            part.nan_to_num_(nan=blind, posinf=math.inf, neginf=-math.inf)
    return returned


def _unwritten(from_token: Callable[[AttentionBatch], int]) -> Callable[..., Any]:
    """Rows of the output from a token on are left as they were, or as they were allocated."""

    def forward(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
        first = from_token(arguments[5].batch)
        given = named.get("output")
        rows = arguments[1][first:, :, :1] if given is None else given[first:]
        before = torch.full_like(rows, math.nan) if given is None else rows.clone()
        returned = impl.forward(*arguments, **named)
        output = _parts(returned)[0]
        if output.dtype == before.dtype:
            output[first:] = before
        return returned

    return forward


def _count_seq_lens_up(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """A kernel counts the new tokens itself, in the engine's own tensor."""
    returned = impl.forward(*arguments, **named)
    arguments[5].batch.seq_lens.add_(1)
    return returned


def _scale_the_query_in_place(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    returned = impl.forward(*arguments, **named)
    arguments[1].mul_(impl.scale)
    return returned


def _return_nothing(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """The result is in the output that was given, and forward does not return it."""
    impl.forward(*arguments, **named)


def _clear_the_output_first(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """The output is set to 0 before the query is read, which may be the same memory."""
    output = named.get("output")
    if output is None or output.dtype != arguments[1].dtype:
        return impl.forward(*arguments, **named)
    output.zero_()
    result = _parts(impl.forward(*arguments))
    output.copy_(result[0])
    return (output, *result[1:]) if impl.returns_lse else output


def _exit(impl: WrongImpl, arguments: list[Any], named: dict[str, Any]) -> Any:
    """A script that was made into a backend."""
    raise SystemExit("no kernel for this GPU")


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
    "takes symmetric ALiBi for signed": _take_symmetric_for_signed,
    "takes the scale for positive": _take_the_scale_for_positive,
    "swallows NaN": _swallow_nan,
    "leaves padding rows unwritten": _unwritten(lambda batch: batch.num_tokens),
    "leaves the last row unwritten": _unwritten(lambda batch: max(0, batch.num_tokens - 1)),
    "counts seq_lens up": _count_seq_lens_up,
    "scales the query in place": _scale_the_query_in_place,
    "returns nothing": _return_nothing,
    "clears the output first": _clear_the_output_first,
    "exits": _exit,
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
