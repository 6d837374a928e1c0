"""TRITON_ATTN agrees with REFERENCE: in Triton's interpreter, or on a GPU if there is one.

Here are features, numbers and tensors; test_triton_kernels.py is how the work is cut up.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch.interface.types import AttentionType
from support.cases import FP8, INT8, MEMORY, Case, Step, layer_spec
from support.feature_cases import FEATURES, PAIRS
from support.strategies import cases
from support.triton_cases import (
    DEVICE,
    DTYPES,
    SMALL,
    check,
    in_words,
    mixed,
    needs_gpu,
    rows_of,
    run,
    some,
)

#: Ways of launching that give the same numbers: tiles of all sizes, keys from everywhere.
LAUNCHES = st.fixed_dictionaries(
    {
        "table": st.fixed_dictionaries(
            {"descriptors": st.booleans(), "gather_from": st.sampled_from([0, 10**9])}
        ),
        "decode": st.fixed_dictionaries(
            {
                "block_n": st.sampled_from([16, 32]),
                "min_tiles": st.sampled_from([1, 3]),
                "max_rows": st.sampled_from([16, 64]),
                "programs_per_sm": st.just(1),
            }
        ),
        "prefill": st.fixed_dictionaries(
            {"block_m": st.sampled_from([16, 64]), "block_n": st.sampled_from([16, 32])}
        ),
        "num_sms": st.sampled_from([1, 3, 9, 40]),
    }
)


@given(case=cases("TRITON_ATTN", dtypes=DTYPES))
def test_any_step_agrees_with_reference(case):
    step = Step(case, DEVICE)
    check(step, step.run("TRITON_ATTN"))


@given(case=cases("TRITON_ATTN", dtypes=DTYPES, max_query=40, max_past=90), launch=LAUNCHES)
def test_any_step_agrees_with_any_launch(case, launch):
    step = Step(case, DEVICE)
    check(step, run(step, **launch))


# Features, and pairs of them.


def fields_of(names):
    fields = {}
    for name in names:
        fields |= FEATURES[name]
    return fields


def covering(pairs):
    """Sets of compatible features that contain every pair."""
    allowed, left, rows = set(pairs), dict.fromkeys(pairs), []
    while left:
        row = list(next(iter(left)))
        for name in FEATURES:
            fits = name not in row and all(_pair(name, other) in allowed for other in row)
            if fits and sum(_pair(name, other) in left for other in row) > len(row) // 3:
                row.append(name)
        for pair in itertools.combinations(row, 2):
            left.pop(_pair(*pair), None)
        rows.append(tuple(row))
    return rows


def _pair(one, other):
    order = list(FEATURES)
    return tuple(sorted((one, other), key=order.index))


COVERING = covering(PAIRS)


def test_covering_sets_contain_every_pair():
    held = {pair for row in COVERING for pair in itertools.combinations(sorted(row), 2)}
    assert {tuple(sorted(pair)) for pair in PAIRS} <= held
    assert len(COVERING) < len(PAIRS) / 3


@pytest.mark.parametrize("feature", ["none", *FEATURES])
def test_a_feature_agrees(feature):
    step = mixed(**fields_of([] if feature == "none" else [feature]))
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("names", COVERING, ids="+".join)
def test_features_together_agree(names):
    step = mixed(**fields_of(names))
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", [pytest.param(p, marks=needs_gpu) for p in PAIRS], ids="+".join)
def test_a_pair_of_features_agrees(pair, dtype):
    """With the tiles that the launch table has."""
    step = mixed(dtype, **fields_of(pair))
    check(step, step.run("TRITON_ATTN"))


CACHES = [*FP8, INT8, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), some(8, DTYPES, CACHES), ids=in_words)
def test_caches_of_other_dtypes(dtype, kv_cache_dtype):
    scales = "per_head" if kv_cache_dtype in FP8 else "per_tensor"
    step = mixed(dtype, kv_cache_dtype=kv_cache_dtype, kv_scales=scales, kv_cache_layout="HND")
    check(step, run(step, **SMALL))


@pytest.mark.parametrize(("attn_type", "window"), some(5, AttentionType, [None, 7]), ids=in_words)
def test_every_kind_of_attention(attn_type, window):
    has_cache = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    step = mixed(attn_type=attn_type, block_size=4 if has_cache else None, sliding_window=window)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("brings_keys", [True, False])
def test_cross_attention_with_keys_of_another_sequence(brings_keys):
    spec = layer_spec(dtype=torch.float32, attn_type=AttentionType.ENCODER_DECODER)
    case = Case(
        spec=spec,
        query_lens=(30, 1, 2, 20, 18),
        seq_lens=(7, 50, 0, 66, 0),
        new_lens=(7, 0, 0, 66, 0) if brings_keys else None,
        brings_keys=brings_keys,
    )
    step = Step(case, DEVICE)
    check(step, run(step, **SMALL))


BYTES = [*FP8, INT8]
SIZES = [(16, 1), (7, 16), (16, 15), (15, 40), (80, 48), (16, 16)]


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "sizes", "layout"),
    some(12, DTYPES, BYTES, SIZES, ["NHD", "HND"]),
    ids=in_words,
)
def test_head_sizes_with_8bit_caches(dtype, kv_cache_dtype, sizes, layout):
    """Bytes are read in pairs where possible."""
    spec = layer_spec(
        dtype=dtype,
        head_size=sizes[0],
        head_size_v=sizes[1],
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_layout=layout,
    )
    step = Step(Case(spec=spec, query_lens=(1, 2, 20), seq_lens=(19, 9, 20)), DEVICE)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "feature", ["none", *sorted(FEATURES.keys() - {"no_cache", "float32_cache", "narrow_values"})]
)
def test_features_with_packed_8bit_caches(dtype, feature):
    """Heads of 16 bytes; heads of 8 are not packed."""
    plain = {"head_size": 16, "head_size_v": 16, "kv_cache_dtype": INT8}
    step = mixed(dtype, **plain | FEATURES.get(feature, {}))
    check(step, run(step, **SMALL))


# Windows, masks and ranges at the borders of tiles.


WINDOWS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 10_000, 2**31 - 1, 2**40]


@pytest.mark.parametrize(("window", "causal"), some(12, WINDOWS, [True, False]))
def test_windows_end_anywhere_in_a_tile(window, causal):
    step = mixed(sliding_window=window, causal=causal, num_kv_heads=1, returns_lse=True)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize(
    ("causal", "window", "block_size"), some(5, [True, False], [None, 9, 2**31 - 1], [None, 4])
)
def test_first_queries_see_nothing_if_keys_are_fewer(causal, window, block_size):
    fields = {"causal": causal, "sliding_window": window, "block_size": block_size}
    spec = layer_spec(dtype=torch.float32, returns_lse=True, sinks=True, **fields)
    step = Step(Case(spec=spec, query_lens=(5, 50, 3, 20), seq_lens=(3, 33, 0, 0)), DEVICE)
    output, lse = run(step, **SMALL)
    check(step, (output, lse))
    for request in (2, 3):
        assert not output[rows_of(step, request)].any()
        assert bool((lse[rows_of(step, request)] == -torch.inf).all())


@pytest.mark.parametrize(
    ("window", "start", "length"),
    some(14, [None, 6], [0, 14, 15, 16, 17, 31, 33], [1, 2, 17, 40]),
)
def test_ranges_begin_and_end_anywhere_in_a_tile(window, start, length):
    spec = layer_spec(
        dtype=torch.float32,
        num_heads=1,
        num_kv_heads=1,
        sliding_window=window,
        bidirectional_ranges=True,
    )
    ranges = ((0, start, start + length), (1, start, start + length), (1, 60, 200))
    step = Step(Case(spec=spec, query_lens=(60, 16), seq_lens=(60, 70), ranges=ranges), DEVICE)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 9}, {"bidirectional_ranges": True}], ids=in_words
)
def test_mask_hides_all_keys_or_whole_tiles(fields):
    step = mixed(custom_mask=True, returns_lse=True, **fields)
    for mask in step.masks:
        mask[-1:] = False
        mask[:, 8:36] = False  # all of the second tile
        mask[:, :2] = False
    step.batch = step._make_batch()
    check(step, run(step, **SMALL))


# Sizes, memory, numbers.


HEAD_SIZES = [1, 2, 7, 15, 16, 17, 33, 64, 80, 96, 128, 192, 256, 512]


@pytest.mark.parametrize(("head_size", "head_size_v"), some(14, HEAD_SIZES, [None, 1, 40, 512]))
def test_head_sizes(head_size, head_size_v):
    sizes = {"head_size": head_size, "head_size_v": head_size_v or head_size}
    spec = layer_spec(dtype=torch.float32, num_heads=2, num_kv_heads=1, **sizes)
    step = Step(Case(spec=spec, query_lens=(1, 4, 20), seq_lens=(19, 40, 37)), DEVICE)
    check(step, step.run("TRITON_ATTN"))


@pytest.mark.parametrize(
    ("group", "num_kv_heads", "max_rows"),
    [(1, 3, 16), (2, 1, 64), (3, 3, 16), (7, 1, 16), (7, 3, 64), (64, 1, 16), (64, 1, 64)],
)
def test_query_heads_per_kv_head(group, num_kv_heads, max_rows):
    """Rows of one token fill part of a tile, or several."""
    spec = layer_spec(
        dtype=torch.float32, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, alibi=True,
        sinks=True, returns_lse=True,
    )  # fmt: skip
    step = Step(Case(spec=spec, query_lens=(1, 3, 17), seq_lens=(35, 20, 18)), DEVICE)
    check(step, run(step, **SMALL | {"decode": SMALL["decode"] | {"max_rows": max_rows}}))


@pytest.mark.parametrize(
    ("block_size", "layout", "kv_cache_dtype"),
    some(7, [1, 2, 3, 16, 48, 64, 256], ["NHD", "HND"], ["auto", INT8]),
)
def test_block_sizes_and_layouts(block_size, layout, kv_cache_dtype):
    step = mixed(
        num_heads=2, block_size=block_size, kv_cache_layout=layout, kv_cache_dtype=kv_cache_dtype
    )
    check(step, run(step, **SMALL))


@pytest.mark.parametrize(
    ("memory", "block_size", "sizes"),
    some(12, MEMORY, [None, 4], [(8, 8), (16, 12), (7, 33), (1, 1)]),
    ids=in_words,
)
def test_memory_layouts_of_tensors(memory, block_size, sizes):
    spec = layer_spec(
        dtype=torch.float32, block_size=block_size, head_size=sizes[0], head_size_v=sizes[1]
    )
    case = Case(spec=spec, query_lens=(1, 20, 6), seq_lens=(9, 20, 6), memory=memory, padding=3)
    step = Step(case, DEVICE)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("factor", [0.0, -1.0, -3.0])
@pytest.mark.parametrize(
    "fields", [{}, {"logits_soft_cap": 1.5, "alibi": True, "sinks": True}], ids=in_words
)
def test_zero_and_negative_scales(factor, fields):
    step = mixed(returns_lse=True, kv_cache_dtype="fp8_e4m3", **fields)
    step.scale *= factor
    check(step, run(step, **SMALL))


@pytest.mark.parametrize(
    "fields", [{}, {"custom_mask": True}, {"logits_soft_cap": 30.0}], ids=in_words
)
def test_large_scores_do_not_overflow(fields):
    step = mixed(**fields)
    step.query *= 300
    step.queries = [300 * query for query in step.queries]
    output = run(step, **SMALL)
    assert bool(output.isfinite().all())
    expected = step.expected()[0]
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("sink", "same_as"), [(-torch.inf, "none"), (1e30, "nothing")])
def test_sinks_of_zero_and_of_infinite_weight(sink, same_as):
    step = mixed(sinks=True, custom_mask=True, num_kv_heads=1)
    step.sinks.fill_(sink)
    output = run(step, **SMALL)
    expected = torch.zeros_like(output)
    if same_as == "none":
        step.sinks, step.case = None, step.case.replace(spec=step.spec.replace(sinks=False))
        expected = run(step, **SMALL)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "fields"),
    some(3, DTYPES, [{}, {"logits_soft_cap": 5.0}, {"kv_cache_dtype": INT8}]),
    ids=in_words,
)
def test_long_requests_are_accurate(dtype, fields):
    spec = layer_spec(dtype=dtype, num_heads=2, num_kv_heads=1, head_size=64, **fields)
    step = Step(Case(spec=spec, query_lens=(1, 20, 2), seq_lens=(700, 300, 513)), DEVICE)
    check(step, step.run("TRITON_ATTN"))
