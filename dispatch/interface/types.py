"""Attention types, phases and placeholder ranges."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["LENGTHS", "AttentionType", "Phase", "PlaceholderRange"]

#: What the host knows of the key counts of a batch: all of them, or a bound of each.
LENGTHS = ("exact", "upper_bound")


class AttentionType(str, Enum):
    """What attends to what. The members are strings, so they compare, hash and print as such."""

    DECODER = "decoder"
    """Self-attention of a decoder over its KV cache."""
    ENCODER = "encoder"
    """Self-attention of an encoder whose output a decoder attends to; no cache."""
    ENCODER_ONLY = "encoder_only"
    """Self-attention of a model that is only an encoder (BERT); no cache."""
    ENCODER_DECODER = "encoder_decoder"
    """A decoder's queries over an encoder's keys, which are cached once."""

    @property
    def has_kv_cache(self) -> bool:
        """Whether keys outlive the step, so that there is a cache, and a decode phase."""
        return self in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    def __str__(self) -> str:
        return str(self.value)


class Phase(str, Enum):
    """Prefill or decode; each may have its own backend."""

    PREFILL = "prefill"
    DECODE = "decode"

    def __str__(self) -> str:
        return str(self.value)


class PlaceholderRange(NamedTuple):
    """The tokens that one image or audio clip takes: positions [start, end) of a request."""

    request: int
    start: int
    end: int
