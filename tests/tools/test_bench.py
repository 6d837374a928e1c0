"""The benchmark: the cases that it reads, its inputs, its oracle, and the error that it allows."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from attn_dispatch.backends.reference.semantics import attend
from attn_dispatch.bench import accuracy as judge_module
from attn_dispatch.bench.accuracy import AccuracyJudge, exact_rows, sample_of
from attn_dispatch.bench.cases import SWEEPS, load_cases, parse_cases, sweep_cases
from attn_dispatch.bench.inputs import Inputs, alibi_slopes
from attn_dispatch.conformance import oracle
from attn_dispatch.errors import InvalidInputError
from support import scalar_oracle
from support.bench_cases import CPU, FEATURES, case, expected_of
from support.paths import ROOT

# --- Cases ----------------------------------------------------------------------------------------


def fields_of(**changes):
    fields = {**case().asdict(), **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def test_project_case_file_has_one_case_per_line():
    path = ROOT / "benchmarks" / "cases.json"
    cases = load_cases(path)
    assert len(cases) == 30
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(cases) + 2
    assert [json.loads(line.rstrip(","))["name"] for line in lines[1:-1]] == [c.name for c in cases]
    assert {c.kind for c in cases} == {"decode", "prefill", "mixed"}


def test_case_json_round_trip():
    for features in FEATURES.values():
        one = case(**features)
        assert parse_cases(json.loads(json.dumps([one.asdict()]))) == [one]


def test_keys_with_defaults_are_optional():
    (one,) = parse_cases([fields_of(block_size=..., dtype=..., sinks=...)])
    assert (one.block_size, one.dtype, one.sinks) == (16, "bfloat16", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "unknown key 'heads'"),
        ({"num_heads": ...}, "the key 'num_heads' is missing"),
        ({"num_heads": 3.5}, "num_heads=3.5"),
        ({"num_heads": True}, "num_heads=True"),
        ({"num_heads": 3}, "num_heads=3 is not a multiple"),
        ({"query_lens": []}, "query_lens is not a list"),
        ({"query_lens": [1, 0, 1]}, "a length in query_lens=0"),
        ({"query_lens": [1]}, "query_lens has 1 requests and seq_lens 3"),
        ({"query_lens": [1, 9, 1]}, "request 1 has 9 new tokens"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype='fp9'"),
        ({"attn_type": "decoders"}, "attn_type='decoders'"),
        ({"attn_type": "encoder"}, "without a cache"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"logits_soft_cap": "50"}, "logits_soft_cap='50'"),
        ({"kv_layout": "vlm"}, "There is no layout 'vlm' of a KV cache"),
        ({"kv_layout": 3}, "There is no layout 3 of a KV cache"),
        ({"alibi": 1}, "alibi=1"),
        ({"alibi": None}, "alibi=None"),
    ],
)
def test_error_names_case_and_key(changes, message):
    good = fields_of(name="a/good")
    with pytest.raises(InvalidInputError) as error:
        parse_cases([good, fields_of(**changes)], "x.json")
    assert "Case 1 ('family/detail') of x.json: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("data", [{}, [], "x"])
def test_case_file_must_hold_a_list(data):
    with pytest.raises(InvalidInputError, match="must hold a list"):
        parse_cases(data)


def test_case_must_be_an_object_with_a_new_name():
    with pytest.raises(InvalidInputError, match=r"Case 0 of .*not an object"):
        parse_cases([3])
    with pytest.raises(InvalidInputError, match="rename one"):
        parse_cases([fields_of(), fields_of()])


def test_error_names_unreadable_file(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_cases(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(InvalidInputError, match="is not JSON"):
        load_cases(tmp_path / "x.json")


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_flops_and_bytes_count_visible_pairs(features):
    one = case(**features)
    pairs, seen = 0, 0
    for query_len, seq_len in zip(one.query_lens, one.seq_lens, strict=True):
        positions = range(seq_len - query_len, seq_len)
        visible = [
            (q, k)
            for q in positions
            for k in range(seq_len)
            if scalar_oracle.sees(q, k, causal=one.causal, window=one.sliding_window)
        ]
        pairs += len(visible)
        seen += len({k for _, k in visible})
    size = one.head_size
    assert one.flops == pairs * one.num_heads * (2 * size + 2 * size)
    itemsize = {"bfloat16": 2, "float32": 4}[one.dtype]
    row = size * itemsize
    if one.kv_cache_dtype != "auto":
        row = size + 4 * (one.kv_cache_dtype == "int8_per_token_head")
    queries_and_output = 2 * sum(one.query_lens) * one.num_heads * size * itemsize
    assert one.bytes == queries_and_output + 2 * seen * one.num_kv_heads * row


def test_kind_of_case():
    assert case().kind == "decode"
    assert case(query_lens=(4, 4, 4)).kind == "decode"
    assert case(query_lens=(20, 30), seq_lens=(20, 30)).kind == "prefill"
    assert case(query_lens=(20, 1), seq_lens=(20, 30)).kind == "mixed"


def test_sweeps_grow_in_powers_of_two():
    layer = case(sliding_window=64, sinks=True)
    contexts, batches = (sweep_cases(name, layer) for name in SWEEPS)
    assert [c.seq_lens for c in contexts] == [(1 << e,) for e in range(10, 21)]
    assert [len(c.seq_lens) for c in batches] == [1 << e for e in range(11)]
    assert {c.seq_lens[0] for c in batches} == {4096}
    assert (contexts[0].name, contexts[-1].name) == ("sweep-context/B1-L1k", "sweep-context/B1-L1M")
    for each in [*contexts, *batches]:
        assert set(each.query_lens) == {1}
        assert (each.sliding_window, each.sinks, each.kind) == (64, True, "decode")


def test_a_sweep_needs_a_decoder_and_a_name():
    with pytest.raises(InvalidInputError, match="context and batch"):
        sweep_cases("size", case())
    encoder = case(**FEATURES["encoder"])
    with pytest.raises(InvalidInputError, match="A sweep decodes"):
        sweep_cases("batch", encoder)


# --- Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_inputs_have_the_cases_shapes_and_are_reproducible(features):
    one = case(**features)
    first, second = Inputs(one, CPU), Inputs(one, CPU)
    assert first.query.shape == (sum(one.query_lens), one.num_heads, one.head_size)
    assert first.query.dtype == one.torch_dtype
    assert torch.equal(first.query, second.query)
    assert first.batch.query_lens == list(one.query_lens)
    assert first.batch.seq_lens_list == list(one.seq_lens)
    assert (first.slopes is not None, first.sinks is not None) == (one.alibi, one.sinks)
    assert (first.kv_cache is None) == (not one.has_kv_cache)
    assert (first.key is not None) == (one.brings_keys or not one.has_kv_cache)
    for request, seq_len in enumerate(one.seq_lens):
        keys, values = first.keys_and_values(request, slice(0, seq_len), slice(None), torch.float64)
        assert keys.shape == values.shape == (seq_len, one.num_kv_heads, one.head_size)
        assert 0.3 < keys.std() < 3  # scales applied
        assert not torch.equal(keys, values)
        again = second.keys_and_values(request, slice(0, seq_len), slice(None), torch.float64)
        assert torch.equal(keys, again[0])
    first.batch.check()


def test_blocks_are_scattered_and_not_shared():
    one = case(query_lens=(1,) * 8, seq_lens=(61,) * 8)
    inputs = Inputs(one, CPU)
    blocks = inputs.block_table.flatten().tolist()
    assert sorted(blocks) == list(range(inputs.kv_cache.shape[0]))
    assert sum(b == a + 1 for a, b in itertools.pairwise(blocks)) < len(blocks) // 4
    assert inputs.batch.slot_mapping.tolist() == [
        int(row[60 // 4]) * 4 + 60 % 4 for row in inputs.block_table
    ]


@pytest.mark.parametrize("name", ["plain", "fp8", "int8", "encoder"])
def test_some_keys_are_a_slice_of_all_keys(name):
    inputs = Inputs(case(**FEATURES[name]), CPU)
    every = inputs.keys_and_values(0, slice(0, 9), slice(None), torch.float64)
    part = inputs.keys_and_values(0, slice(4, 9), slice(1, 2), torch.float64)
    for whole, some in zip(every, part, strict=True):
        assert torch.equal(whole[4:9, 1:2], some)
    ragged, _ = inputs.ragged_keys_and_values()
    assert torch.equal(ragged[:9].double(), every[0].float().double())
    starts = [0, *itertools.accumulate(inputs.case.seq_lens)]
    assert inputs.key_start_loc().tolist() == starts


@pytest.mark.parametrize("seq_lens", [(18, 20), (18, 27)], ids=["no past", "some have a past"])
def test_prefill_brings_the_cached_keys_and_writes_none(seq_lens):
    one = case(query_lens=(18, 20), seq_lens=seq_lens)
    inputs = Inputs(one, CPU)
    assert inputs.batch.slot_mapping.tolist() == [-1] * 38
    for request, rows in enumerate((slice(0, 18), slice(18, 38))):
        stored = inputs.keys_and_values(
            request, slice(0, one.seq_lens[request]), slice(None), one.torch_dtype
        )
        count = one.query_lens[request]
        assert torch.equal(inputs.key[rows], stored[0][-count:])
        assert torch.equal(inputs.value[rows], stored[1][-count:])


def test_call_brings_keys_only_without_past_and_without_rounding():
    fresh = {"query_lens": (18,), "seq_lens": (18,)}
    assert case(**fresh).brings_keys
    assert not case(query_lens=(18,), seq_lens=(19,)).brings_keys
    assert not case(**fresh, kv_cache_dtype="fp8_e4m3").brings_keys
    assert not case(query_lens=(1,), seq_lens=(1,)).brings_keys  # a decode
    assert not case(**fresh, attn_type="encoder_decoder").brings_keys


def test_cache_is_filled_in_chunks(monkeypatch):
    monkeypatch.setattr("attn_dispatch.bench.inputs._CHUNK_TOKENS", 7)
    inputs = Inputs(case(), CPU)
    for request, seq_len in enumerate(inputs.case.seq_lens):
        keys, values = inputs.keys_and_values(
            request, slice(0, seq_len), slice(None), torch.float32
        )
        assert bool((keys != 0).all())
        assert bool((values != 0).all())


def test_alibi_slopes_match_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0 ** (-2 * i) for i in range(1, 5)]
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == alibi_slopes(8).tolist()
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


# --- The oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [None, 1, 300], ids=["at once", "smallest", "small"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_oracle_matches_scalar_oracle(features, piece, monkeypatch):
    if piece is not None:
        monkeypatch.setattr(judge_module, "_MAX_ELEMENTS", piece)
        monkeypatch.setattr(oracle, "_MAX_SCORES", piece)
    inputs = Inputs(case(**features), CPU)
    for request, query_len in enumerate(inputs.case.query_lens):
        found = exact_rows(inputs, request, torch.arange(query_len))
        torch.testing.assert_close(found, expected_of(inputs, request), rtol=1e-10, atol=1e-10)
        some = torch.arange(0, query_len, 2)
        assert torch.equal(exact_rows(inputs, request, some), found[some]) or torch.allclose(
            exact_rows(inputs, request, some), found[some], atol=1e-12
        )


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_pytorch_attention_is_within_the_allowance(features):
    inputs = Inputs(case(**features), CPU)
    judge = AccuracyJudge(inputs)
    ulp = torch.finfo(inputs.case.torch_dtype).eps
    assert judge.sdpa_error < 4 * max(ulp, 1e-5)
    more = {"soft cap", "alibi", "sinks", "fp8", "fp8, e5m2", "int8"}
    spare = 2 if any(FEATURES[name] is features for name in more) else 1
    least = 1e-5 if inputs.case.dtype == "float32" else 0.0
    assert judge.allowed == pytest.approx(max(2 * judge.sdpa_error + spare * ulp, least))
    right = torch.cat([expected_of(inputs, r) for r in range(len(inputs.case.query_lens))])
    assert judge.error_of(right.to(inputs.case.torch_dtype)) <= judge.allowed


def test_missing_key_and_nan_are_detected():
    one = case(query_lens=(1,) * 4, seq_lens=(500,) * 4, dtype="bfloat16", head_size=64)
    inputs = Inputs(one, CPU)
    judge = AccuracyJudge(inputs)
    outputs = []
    for request in range(4):
        keys, values = inputs.keys_and_values(request, slice(0, 500), slice(None), torch.float64)
        query = inputs.query[request : request + 1].double()
        # Without the first key, which every row sees.
        outputs.append(attend(query, keys[1:], values[1:], scale=one.scale, causal=True)[0])
    assert judge.error_of(torch.cat(outputs).bfloat16()) > judge.allowed
    right = torch.cat([expected_of(inputs, r) for r in range(4)]).bfloat16()
    assert judge.error_of(right) <= judge.allowed
    right[3, 1, 7] = math.nan
    assert judge.error_of(right) == math.inf


def test_sample_is_evenly_spaced_and_bounded():
    whole = sample_of(case())
    assert {r: rows.tolist() for r, rows in whole.items()} == {0: [0], 1: [0], 2: [0]}
    long = sample_of(case(query_lens=(16384,), seq_lens=(16384,)))[0]
    assert len(long) == 256
    assert (long[0], long[-1]) == (0, 16383)
    assert int(long.diff().max()) <= 65
    many = case(query_lens=(1,) * 1000, seq_lens=(5,) * 700 + (9,) + (5,) * 299)
    chosen = sample_of(many)
    assert {0, 700, 999} <= set(chosen)
    assert len(chosen) in (128, 129)
    wide = sample_of(case(query_lens=(300,) * 64, seq_lens=(300,) * 64))
    assert {len(rows) for rows in wide.values()} == {64}
