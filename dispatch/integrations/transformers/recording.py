"""An attention and a mask function that record how a model calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attn_dispatch.integrations.transformers.keywords import unknown_keywords
from attn_dispatch.integrations.transformers.visibility import Visibility, read_visibility

__all__ = ["RECORDER", "Call", "Recording", "recording"]

#: The name to give as `attn_implementation`.
RECORDER = "attn_dispatch_recorder"


@dataclass(frozen=True)
class Call:
    """One call of the attention function.

    Attributes:
        module: the attention module.
        num_heads, num_kv_heads, head_size, head_size_v: of the tensors.
        query_len, key_len: in tokens.
        scale: of the scores; None if the model leaves it to the function.
        logits_soft_cap, sinks: as in AttentionSpec.
        visibility: what the queries see.
        unknown: keywords that may change the result and have no field here.
    """

    module: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    query_len: int
    key_len: int
    scale: float | None
    logits_soft_cap: float | None
    sinks: bool
    visibility: Visibility
    unknown: tuple[str, ...]


@dataclass
class Recording:
    """The calls of one forward pass, and the masks it made."""

    chunk: int | None = None
    calls: list[Call] = field(default_factory=list)
    _masks: list[tuple[torch.Tensor, Visibility]] = field(default_factory=list)

    def add_mask(self, mask: torch.Tensor, visibility: Visibility) -> None:
        """Remember what a mask means; the mask itself has no values."""
        self._masks.append((mask, visibility))

    def visibility_of(self, mask: Any, module: torch.nn.Module, is_causal: Any) -> Visibility:
        """What a mask shows; without one, the flag decides, as in transformers' sdpa."""
        if mask is None:
            flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
            return Visibility(causal=bool(flag), right=0 if flag else None)
        base = mask._base if isinstance(mask, torch.Tensor) and mask._base is not None else mask
        for known, visibility in self._masks:
            if base is known:
                return visibility
        return Visibility(causal=False, problem="the model makes its mask itself")


_current: ContextVar[Recording | None] = ContextVar("attn_dispatch_recording", default=None)


@contextlib.contextmanager
def recording(chunk: int | None) -> Iterator[Recording]:
    """Record the calls in this context of models with RECORDER as their implementation.

    Args:
        chunk: the model's `attention_chunk_size`, if it has one.
    """
    AttentionInterface.register(RECORDER, _attention)
    AttentionMaskInterface.register(RECORDER, _mask)
    record = Recording(chunk)
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kw: Any,
) -> tuple[torch.Tensor, None]:
    """Record a call; the output has the right shape, `(batch, query_len, num_heads, head_size_v)`.

    Args:
        query, key, value: `(batch, num_heads, num_tokens, head_size)`.
    """
    record = _current.get()
    if record is not None:
        soft_cap = kw.get("softcap")
        scale = kw.get("scaling")
        call = Call(
            module=module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_size=query.shape[-1],
            head_size_v=value.shape[-1],
            query_len=query.shape[2],
            key_len=key.shape[2],
            scale=float(scale) if isinstance(scale, (int, float)) else None,
            logits_soft_cap=float(soft_cap) if soft_cap else None,
            sinks=kw.get("s_aux") is not None,
            visibility=record.visibility_of(attention_mask, module, kw.get("is_causal")),
            unknown=unknown_keywords(kw),
        )
        record.calls.append(call)
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return query.new_empty(shape), None


def _mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    mask_function: Any = None,
    local_size: int | None = None,
    **kw: Any,
) -> torch.Tensor:
    """A mask without values, `(batch, 1, query_len, key_len)`, whose meaning is remembered."""
    query_len = q_length if isinstance(q_length, int) else len(q_length)
    mask = torch.empty(batch_size, 1, query_len, kv_length, dtype=torch.bool, device="meta")
    record = _current.get()
    if record is not None:
        record.add_mask(mask, read_visibility(mask_function, local_size, record.chunk))
    return mask
