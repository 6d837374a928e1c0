"""The keywords that transformers' models pass to their attention function, by what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["KEYWORD_REASONS", "unknown_keywords"]

#: Keywords that do not change the result.
_WITHOUT_EFFECT = frozenset(
    (
        *("cache", "cache_position", "dropout", "layer_idx", "logits_to_keep", "past_key_value"),
        *("past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "deterministic"),
        *("input_ids", "target_dtype", "implementation", "training", "num_items_in_batch"),
    )
)
#: Keywords that are read.
_READ = frozenset(("scaling", "softcap", "s_aux", "sliding_window", "is_causal"))

#: Keywords that AttentionSpec has no field for -> what they ask for.
KEYWORD_REASONS: dict[str, str] = {
    "position_bias": "its scores get a bias learned for relative positions",
    "indices": "an indexer picks the keys that each query attends to (sparse attention)",
}


def unknown_keywords(keywords: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of keywords that have a value and may change the result in an unknown way."""
    known = _WITHOUT_EFFECT | _READ
    return tuple(
        sorted(
            name
            for name, value in keywords.items()
            if value is not None and value is not False and name not in known
        )
    )
