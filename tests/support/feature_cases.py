"""A layer for every feature, pairs of features that kernels combine, and a batch for them."""

from __future__ import annotations

import itertools

from support.cases import INT8, Case, layer_spec

FEATURES = {
    "not_causal": {"causal": False},
    "window": {"sliding_window": 3},
    "window_of_one": {"sliding_window": 1},
    "two_sides": {"causal": False, "window_size": (3, 1)},
    "chunks": {"attention_chunk": 3},
    "shard": {"key_positions": True},
    "soft_cap": {"logits_soft_cap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "mask": {"custom_mask": True},
    "ranges": {"bidirectional_ranges": True},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "narrow_values": {"head_size_v": 3},
    "wide_values": {"head_size_v": 12},
    "hnd": {"kv_cache_layout": "HND"},
    "float32_cache": {"kv_cache_dtype": "float32"},
    "fp8_cache": {"kv_cache_dtype": "fp8"},
    "fp8_per_head": {"kv_cache_dtype": "fp8_e5m2", "kv_scales": "per_head"},
    "int8_cache": {"kv_cache_dtype": INT8},
    "sharing": {"kv_sharing": True},
    "no_cache": {"block_size": None},
    "lse": {"returns_lse": True},
}
_WINDOWS = {"window", "window_of_one", "two_sides"}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(FEATURES, 2)
    if not FEATURES[a].keys() & FEATURES[b].keys()
    and not {a, b} <= _WINDOWS
    and not ("no_cache" in (a, b) and FEATURES[a].keys() & {"kv_sharing", "kv_cache_dtype"})
]


def case_of(*features):
    fields = {}
    for name in features:
        fields |= FEATURES[name]
    spec = layer_spec(**fields)
    query_lens, seq_lens = (1, 5, 0, 3, 0), (9, 5, 0, 8, 4)
    ranges = ((1, 1, 4), (3, 4, 8), (0, 2, 9)) if spec.bidirectional_ranges else ()
    return Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens, ranges=ranges)
