"""Small cases for the tests of the benchmark, and what attention over them is."""

from __future__ import annotations

import torch

from attn_dispatch.bench.cases import Case
from support import scalar_oracle

CPU = torch.device("cpu")


def case(**fields):
    """A small case; float32 unless said otherwise."""
    plain = {
        "name": "family/detail",
        "query_lens": (1, 1, 1),
        "seq_lens": (37, 5, 16),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "block_size": 4,
        "dtype": "float32",
    }
    return Case(**{**plain, **fields})


FEATURES = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "prefill": {"query_lens": (7, 20), "seq_lens": (7, 33)},
    "window": {"query_lens": (7, 20), "seq_lens": (7, 33), "sliding_window": 5},
    "soft cap": {"logits_soft_cap": 1.5},
    "alibi": {"alibi": True, "query_lens": (3, 2), "seq_lens": (9, 12)},
    "sinks": {"sinks": True, "num_heads": 6},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8, e5m2": {"kv_cache_dtype": "fp8_e5m2", "dtype": "bfloat16"},
    "int8": {"kv_cache_dtype": "int8_per_token_head"},
    "encoder": {"attn_type": "encoder_only", "query_lens": (9, 4), "seq_lens": (9, 4)},
    "encoder, window": {
        "attn_type": "encoder",
        "query_lens": (9, 4),
        "seq_lens": (9, 4),
        "sliding_window": 3,
    },
    "cross": {"attn_type": "encoder_decoder", "query_lens": (9, 1), "seq_lens": (4, 30)},
    "mixed": {"query_lens": (20, 1), "seq_lens": (20, 9)},
    "engine's rows": {"kv_layout": "vllm-LBHNC"},
    "engine's pools": {"kv_layout": "sglang", "kv_cache_dtype": "fp8_e4m3"},
}


def expected_of(inputs, request):
    """A request's attention by the tests' own oracle."""
    one = inputs.case
    start = inputs.batch.query_start_list[request]
    keys, values = inputs.keys_and_values(
        request, slice(0, one.seq_lens[request]), slice(None), torch.float64
    )
    output, _ = scalar_oracle.attention_of_request(
        inputs.query[start : start + one.query_lens[request]].double(),
        keys,
        values,
        scale=one.scale,
        causal=one.causal,
        window=one.sliding_window,
        cap=one.logits_soft_cap,
        slopes=None if inputs.slopes is None else inputs.slopes.tolist(),
        sinks=None if inputs.sinks is None else inputs.sinks.tolist(),
    )
    return output
