"""Hypothesis strategies for any step that a backend declares."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.selection.registry import registry
from support.cases import FP8, INT8, MEMORY, Case, layer_spec


def cases(backend, *, dtypes=(torch.float32,), max_query=12, max_past=40):
    """Cases that a backend declares for a CPU."""
    fields = registry.candidates()[backend].backend_cls.capabilities.fields

    def options(name, *values):
        """The values that the backend declares; the first one disables the feature."""
        constraint = fields.get(name)
        if constraint is None:
            return st.just(values[0])
        spec = layer_spec()
        return st.sampled_from([v for v in values if constraint.accepts(v, spec, _CPU)])

    @st.composite
    def build(draw):
        attn_type = draw(options("attn_type", *AttentionType))
        is_encoder = attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
        is_cross = attn_type is AttentionType.ENCODER_DECODER
        has_cache = is_cross or (not is_encoder and draw(st.integers(0, 3)) > 0)
        num_kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
        group = draw(st.sampled_from([1, 2, 3, 8, 64]))
        head_size = draw(st.sampled_from([1, 2, 7, 16, 64, 80, 128, 256, 512]))
        num_kv_heads = max(1, min(num_kv_heads, 2048 // (group * head_size)))
        is_sharded = draw(options("key_positions", False, False, True))
        sides = draw(options("window_size", None, None, (3, 1), (0, 7), (-1, 2), (4, -1)))
        spec = AttentionSpec(
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            head_size_v=draw(st.sampled_from([head_size, head_size, 1, 16, 40, 128])),
            dtype=draw(st.sampled_from(dtypes)),
            attn_type=attn_type,
            causal=draw(st.booleans()),
            sliding_window=draw(options("sliding_window", None, None, 1, 5, 10_000))
            if sides is None
            else None,
            window_size=sides,
            attention_chunk=draw(options("attention_chunk", None, None, 1, 6, 10_000)),
            key_positions=is_sharded,
            logits_soft_cap=draw(options("logits_soft_cap", None, None, 2.0, 50.0)),
            alibi=draw(options("alibi", False, True, "symmetric")),
            sinks=draw(options("sinks", False, True)),
            custom_mask=draw(options("custom_mask", False, True)),
            bidirectional_ranges=draw(options("bidirectional_ranges", False, True)),
            returns_lse=draw(options("returns_lse", False, True)),
        )
        if has_cache:
            names = ("auto", "float32", "fp8", *FP8, INT8)
            kv_cache_dtype = draw(options("kv_cache_dtype", *names))
            kv_scales = draw(options("kv_scales", "per_tensor", "per_head"))
            spec = spec.replace(
                block_size=draw(st.sampled_from([1, 2, 3, 16, 64, 256])),
                kv_cache_layout=draw(st.sampled_from([None, "NHD", "HND"])),
                kv_cache_dtype=kv_cache_dtype,
                kv_scales="per_tensor" if kv_cache_dtype == INT8 else kv_scales,
                kv_sharing=draw(options("kv_sharing", False, True)),
            )
        lens = draw(st.lists(_lengths(max_query, max_past), max_size=5))
        query_lens, seq_lens = [q for q, _ in lens], [q + past for q, past in lens]
        if is_cross or not has_cache:  # the numbers of keys and queries are independent
            seq_lens = [past for _, past in lens]
        new_lens = None
        if is_cross:
            new_lens = tuple(n if draw(st.booleans()) else 0 for n in seq_lens)
        elif has_cache and not spec.kv_sharing:
            # A request that pads a graph's batch: one token, no keys.
            seq_lens = [0 if q == s == 1 else s for q, s in zip(query_lens, seq_lens, strict=True)]
        return Case(
            spec=spec,
            query_lens=tuple(query_lens),
            seq_lens=tuple(seq_lens),
            new_lens=new_lens,
            brings_keys=not has_cache or draw(st.integers(0, 3)) > 0,
            memory=draw(st.sampled_from(MEMORY)),
            padding=draw(st.sampled_from([0, 0, 3])),
            ranges=draw(_ranges(seq_lens)) if spec.bidirectional_ranges else (),
            seed=draw(st.integers(0, 99)),
        )

    return build()


_CPU = KNOWN_DEVICES["cpu"]


@st.composite
def _lengths(draw, max_query, max_past):
    """(query_len, keys before it) of a request: decode, prefill, a chunk of a prefill, nothing."""
    return draw(
        st.one_of(
            st.tuples(st.just(1), st.integers(0, max_past)),
            st.tuples(st.integers(1, max_query), st.just(0)),
            st.tuples(st.integers(1, max_query), st.integers(1, max_past)),
            st.tuples(st.just(0), st.integers(0, max_past)),
        )
    )


@st.composite
def _ranges(draw, seq_lens):
    ranges = []
    for request, seq_len in enumerate(seq_lens):
        if seq_len and draw(st.booleans()):
            start = draw(st.integers(0, seq_len - 1))
            ranges.append((request, start, draw(st.integers(start, seq_len))))
    return tuple(ranges)
