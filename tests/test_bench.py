"""The benchmark: what it reads, makes, times, calls right or wrong, and prints."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from pathlib import Path

import oracle
import pytest
import torch
from bench_cases import CPU, FEATURES, case
from selection_helpers import make_backend, registered
from typer.testing import CliRunner

from attn_dispatch.backends.reference.semantics import attend
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.bench import ceilings as ceilings_module
from attn_dispatch.bench import oracle as judge_module
from attn_dispatch.bench import runner, timing
from attn_dispatch.bench.cases import SWEEPS, Case, load_cases, parse_cases, sweep_cases
from attn_dispatch.bench.ceilings import Ceilings, measure_ceilings
from attn_dispatch.bench.inputs import Inputs, alibi_slopes
from attn_dispatch.bench.oracle import Judge, exact_rows, sample_of
from attn_dispatch.bench.runner import Bench
from attn_dispatch.bench.timing import CpuClock, CudaClock, Timing, host_time_us, measure
from attn_dispatch.capability import OneOf
from attn_dispatch.cli import app
from attn_dispatch.errors import InvalidInputError, UnknownBackendError
from attn_dispatch.overrides import attention_backend

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = Ceilings(0.02, 0.01, 0.05, "bfloat16", 1024, "float32 sum")


# --- Cases ----------------------------------------------------------------------------------------


def fields_of(**changes):
    fields = {**case().asdict(), **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def test_the_projects_cases_are_read_and_stand_one_on_a_line():
    path = ROOT / "benchmarks" / "cases.json"
    cases = load_cases(path)
    assert len(cases) == 30
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(cases) + 2
    assert [json.loads(line.rstrip(","))["name"] for line in lines[1:-1]] == [c.name for c in cases]
    assert {c.kind for c in cases} == {"decode", "prefill", "mixed"}


def test_a_case_survives_the_way_to_json_and_back():
    for features in FEATURES.values():
        one = case(**features)
        assert parse_cases(json.loads(json.dumps([one.asdict()]))) == [one]


def test_keys_with_a_default_may_be_left_out():
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
        ({"alibi": 1}, "alibi=1"),
        ({"alibi": None}, "alibi=None"),
    ],
)
def test_a_wrong_case_is_named_with_its_key(changes, message):
    good = fields_of(name="a/good")
    with pytest.raises(InvalidInputError) as error:
        parse_cases([good, fields_of(**changes)], "x.json")
    assert "Case 1 ('family/detail') of x.json: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("data", [{}, [], "x"])
def test_what_is_no_list_of_cases_is_refused(data):
    with pytest.raises(InvalidInputError, match="must hold a list"):
        parse_cases(data)


def test_a_case_that_is_no_object_and_a_second_of_the_same_name_are_refused():
    with pytest.raises(InvalidInputError, match=r"Case 0 of .*not an object"):
        parse_cases([3])
    with pytest.raises(InvalidInputError, match="rename one"):
        parse_cases([fields_of(), fields_of()])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_cases(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(InvalidInputError, match="is not JSON"):
        load_cases(tmp_path / "x.json")


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_operations_and_bytes_are_those_of_the_visible_pairs(features):
    one = case(**features)
    pairs, seen = 0, 0
    for query_len, seq_len in zip(one.query_lens, one.seq_lens, strict=True):
        positions = range(seq_len - query_len, seq_len)
        visible = [
            (q, k)
            for q in positions
            for k in range(seq_len)
            if oracle.sees(q, k, causal=one.causal, window=one.sliding_window)
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


def test_what_bounds_a_case():
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
def test_inputs_have_the_cases_shapes_and_are_the_same_each_time(features):
    one = case(**features)
    first, second = Inputs(one, CPU), Inputs(one, CPU)
    assert first.query.shape == (sum(one.query_lens), one.num_heads, one.head_size)
    assert first.query.dtype == one.torch_dtype
    assert torch.equal(first.query, second.query)
    assert first.batch.query_lens == list(one.query_lens)
    assert first.batch.host_seq_lens == list(one.seq_lens)
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


def test_blocks_lie_scattered_and_belong_to_one_request_each():
    one = case(query_lens=(1,) * 8, seq_lens=(61,) * 8)
    inputs = Inputs(one, CPU)
    blocks = inputs.block_table.flatten().tolist()
    assert sorted(blocks) == list(range(inputs.kv_cache.shape[0]))
    assert sum(b == a + 1 for a, b in itertools.pairwise(blocks)) < len(blocks) // 4
    assert inputs.batch.slot_mapping.tolist() == [
        int(row[60 // 4]) * 4 + 60 % 4 for row in inputs.block_table
    ]


@pytest.mark.parametrize("name", ["plain", "fp8", "int8", "encoder"])
def test_parts_of_keys_are_parts_of_all_keys(name):
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
def test_a_prefill_brings_the_keys_that_are_in_the_cache_and_writes_none(seq_lens):
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


def test_keys_come_beside_the_cache_only_where_a_request_has_no_past_and_nothing_is_rounded():
    fresh = {"query_lens": (18,), "seq_lens": (18,)}
    assert case(**fresh).brings_keys
    assert not case(query_lens=(18,), seq_lens=(19,)).brings_keys
    assert not case(**fresh, kv_cache_dtype="fp8_e4m3").brings_keys
    assert not case(query_lens=(1,), seq_lens=(1,)).brings_keys  # a decode
    assert not case(**fresh, attn_type="encoder_decoder").brings_keys


def test_the_cache_is_filled_in_pieces_like_at_once(monkeypatch):
    monkeypatch.setattr("attn_dispatch.bench.inputs._CHUNK_TOKENS", 7)
    inputs = Inputs(case(), CPU)
    for request, seq_len in enumerate(inputs.case.seq_lens):
        keys, values = inputs.keys_and_values(
            request, slice(0, seq_len), slice(None), torch.float32
        )
        assert bool((keys != 0).all())
        assert bool((values != 0).all())


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0 ** (-2 * i) for i in range(1, 5)]
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == alibi_slopes(8).tolist()
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


# --- Clocks ---------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only calls move."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def __call__(self):
        return self.seconds

    def call(self, name, *durations_us):
        durations = itertools.cycle(durations_us)

        def run():
            self.log.append(name)
            self.seconds += next(durations) * 1e-6

        return run


def test_contestants_take_turns_and_the_median_counts():
    now = FakeTime()
    calls = {"a": now.call("a", 10, 30, 20), "b": now.call("b", 5)}
    timings = measure(calls, CpuClock(now), budget_s=1, rounds=6)
    assert timings["a"].median_us == pytest.approx(20)
    assert (timings["a"].low_us, timings["a"].high_us) == pytest.approx((10, 30))
    assert timings["b"].median_us == pytest.approx(5)
    assert timings["b"].calls == 6
    assert now.log == ["a", "b", "b", "a"] * 3


def test_the_budget_bounds_the_calls():
    now = FakeTime()
    calls = {name: now.call(name, us) for name, us in (("quick", 1), ("slow", 3e5), ("worst", 4e6))}
    timings = measure(calls, CpuClock(now), budget_s=1.0)
    assert timings["quick"].calls == timing.MAX_CALLS
    assert timings["slow"].calls == 4
    assert timings["worst"].calls == 1


def test_a_call_that_raises_does_not_stop_the_others():
    now = FakeTime()

    def broken():
        raise RuntimeError("no such kernel")

    timings = measure({"a": now.call("a", 5), "x": broken}, CpuClock(now), budget_s=1, rounds=3)
    assert timings["a"].calls == 3
    assert str(timings["x"]) == "no such kernel"


def test_host_time_is_that_of_a_call_in_a_short_queue():
    now = FakeTime()
    waits = []
    clock = CpuClock(now)
    clock.wait = lambda: waits.append(len(now.log))
    assert host_time_us(now.call("a", 40), clock, seconds=0.1) == pytest.approx(40)
    assert waits == [0, *(1 + 10 * i for i in range(21))]
    slow = FakeTime()
    assert host_time_us(slow.call("a", 9e6), CpuClock(slow)) == pytest.approx(9e6)
    assert len(slow.log) == 2


class FakeCuda:
    """Notes what is asked of torch.cuda."""

    def __init__(self):
        self.log = log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.number = sum(e == "event" for e in log)
                log.append("event")

            def record(self):
                log.append(f"record {self.number % 2}")

            def elapsed_time(self, end):
                return 0.25  # milliseconds

        self.Event = Event

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=1 << 20, clock_rate=1_000_000)

    def synchronize(self, device):
        self.log.append("wait")

    def _sleep(self, cycles):
        self.log.append(f"sleep {cycles}")


def test_the_gpus_clock_flushes_and_gives_the_host_a_head_start(monkeypatch):
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1000)
    cuda = FakeCuda()
    clock = CudaClock(CPU, cuda)
    clock._flush.fill_(1)
    assert clock._flush.numel() == 2 << 20  # twice the L2 cache

    def call():
        assert not clock._flush.any()
        cuda.log.append("call")

    assert clock.time_us(call, host_us=10) == 250
    assert cuda.log == [
        "event", "event", "sleep 80000", "record 0", "call", "record 1", "wait",
    ]  # fmt: skip


def test_ceilings_are_measured():
    found = measure_ceilings(CPU, CpuClock(), seconds=0.01)
    assert 0 < found.read_tb_s < 10
    assert 0 < found.copy_tb_s < 10
    assert 0 < found.matmul_tflops < 100
    assert found.read_by in ("float32 sum", "float32 sum of rows") or "a" in found.read_by


# --- Who is right ---------------------------------------------------------------------------------


def expected_of(inputs, request):
    """A request's attention by the tests' own oracle."""
    one = inputs.case
    start = inputs.batch.query_starts[request]
    keys, values = inputs.keys_and_values(
        request, slice(0, one.seq_lens[request]), slice(None), torch.float64
    )
    output, _ = oracle.attention_of_request(
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


@pytest.mark.parametrize("piece", [None, 1, 300], ids=["at once", "smallest", "small"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_the_oracle_agrees_with_the_tests_own(features, piece, monkeypatch):
    if piece is not None:
        monkeypatch.setattr(judge_module, "_MAX_ELEMENTS", piece)
        monkeypatch.setattr(judge_module, "_MAX_SCORES", piece)
    inputs = Inputs(case(**features), CPU)
    for request, query_len in enumerate(inputs.case.query_lens):
        found = exact_rows(inputs, request, torch.arange(query_len))
        torch.testing.assert_close(found, expected_of(inputs, request), rtol=1e-10, atol=1e-10)
        some = torch.arange(0, query_len, 2)
        assert torch.equal(exact_rows(inputs, request, some), found[some]) or torch.allclose(
            exact_rows(inputs, request, some), found[some], atol=1e-12
        )


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_pytorchs_own_attention_is_near_the_oracle(features):
    inputs = Inputs(case(**features), CPU)
    judge = Judge(inputs)
    ulp = max(torch.finfo(inputs.case.torch_dtype).eps, 1e-5)
    assert judge.sdpa_error < 4 * ulp
    more = {"soft cap", "alibi", "sinks", "fp8", "fp8, e5m2", "int8"}
    spare = 2 if any(FEATURES[name] is features for name in more) else 1
    assert judge.allowed == pytest.approx(2 * judge.sdpa_error + spare * ulp)
    right = torch.cat([expected_of(inputs, r) for r in range(len(inputs.case.query_lens))])
    assert judge.error_of(right.to(inputs.case.torch_dtype)) <= judge.allowed


def test_a_key_left_out_is_noticed_and_so_is_a_nan():
    one = case(query_lens=(1,) * 4, seq_lens=(500,) * 4, dtype="bfloat16", head_size=64)
    inputs = Inputs(one, CPU)
    judge = Judge(inputs)
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


def test_the_sample_is_spread_and_bounded():
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


# --- The run --------------------------------------------------------------------------------------


def run_cases(*cases, **options):
    return list(Bench(CPU, rounds=3, **options).run(cases))


class OffImpl(ReferenceImpl):
    """A twentieth too large."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output *= 1.05
        return output


class LaterOffImpl(ReferenceImpl):
    """Right the first time only: afterwards it leaves its last row out."""

    def forward(self, *args, **kwargs):
        output = args[6]
        self.calls = getattr(self, "calls", 0) + 1
        kept = output[-1].clone()
        super().forward(*args, **kwargs)
        if self.calls > 1:
            output[-1] = kept
        return output


class BrokenImpl(ReferenceImpl):
    """Raises."""

    def forward(self, *args, **kwargs):
        raise RuntimeError("misaligned address\nand more")


def backend_with(name, impl, **fields):
    cls = make_backend(name, **fields)
    cls.get_impl_cls = staticmethod(lambda: impl)
    return cls


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_the_librarys_backends_are_right_on_every_kind_of_case(features):
    (result,) = run_cases(case(**features), backends=["TORCH_SDPA", "REFERENCE"])
    assert [row.name for row in result.rows] == ["TORCH_SDPA", "REFERENCE"]
    for row in result.rows:
        assert row.status in ("ok", "refused"), row
        if row.status == "ok":
            assert row.error <= result.allowed
            assert row.timing.calls == 3
    assert result.rows[1].status == "ok"
    assert result.failed == []
    assert result.picked_row in ("TORCH_SDPA", "REFERENCE")
    assert result.share(result.best(result.picked_row), CEILINGS) > 0


def test_the_references_take_no_part_unless_they_are_named_or_picked():
    (plain,) = run_cases(case())
    assert "REFERENCE" not in plain.names
    assert "TORCH_SDPA" in plain.names
    (capped,) = run_cases(case(logits_soft_cap=2.0), backends=["TORCH_SDPA"])
    assert capped.rows[0].status == "refused"
    assert "logits_soft_cap" in capped.rows[0].detail
    assert capped.picked_row == "REFERENCE"
    assert capped.best("REFERENCE").status == "ok"
    assert capped.picked == {"prefill": "REFERENCE", "decode": "REFERENCE"}


def test_a_wrong_backend_is_called_wrong_and_has_no_time():
    wrong = [backend_with("OFF", OffImpl), backend_with("LATER_OFF", LaterOffImpl)]
    with registered(*wrong, backend_with("BROKEN", BrokenImpl)):
        names = ["OFF", "LATER_OFF", "BROKEN", "TORCH_SDPA"]
        (result,) = run_cases(case(), backends=names)
    by_name = {row.name: row for row in result.rows}
    assert by_name["OFF"].status == by_name["LATER_OFF"].status == "wrong"
    assert "is allowed" in by_name["OFF"].detail
    assert by_name["BROKEN"].status == "error"
    assert by_name["BROKEN"].detail == "RuntimeError: misaligned address"
    assert all(row.timing is None for row in result.failed)
    assert {row.name for row in result.failed} == {"OFF", "LATER_OFF", "BROKEN"}
    assert by_name["TORCH_SDPA"].timing is not None


def test_what_selection_would_pick_is_timed_also_where_phases_differ():
    mixed = case(query_lens=(20, 1), seq_lens=(20, 9))
    with attention_backend("prefill=TORCH_SDPA,decode=REFERENCE"):
        (result,) = run_cases(mixed, backends=["TORCH_SDPA"])
        (decode,) = run_cases(case(), backends=["TORCH_SDPA"])
    assert result.picked_row == "TORCH_SDPA+REFERENCE"
    assert result.best(result.picked_row).status == "ok"
    assert decode.picked_row == "REFERENCE"


def test_a_case_that_does_not_fit_is_skipped():
    (result,) = run_cases(case(), free_bytes=lambda device: 1000)
    assert "GiB" in result.skipped
    assert result.rows == []
    (result,) = run_cases(case(), free_bytes=lambda device: None)
    assert result.skipped == ""


def test_a_case_that_cannot_be_set_up_does_not_stop_the_run(monkeypatch):
    class NoMemory(Judge):
        def __init__(self, inputs):
            if inputs.case.name == "x":
                raise torch.OutOfMemoryError("Tried to allocate 80 GiB")
            super().__init__(inputs)

    monkeypatch.setattr(runner, "Judge", NoMemory)
    first, second = run_cases(case(name="x"), case())
    assert "Tried to allocate 80 GiB" in first.skipped
    assert second.skipped == ""


def test_a_backend_that_is_not_registered_is_an_error():
    with pytest.raises(UnknownBackendError, match="no backend 'TORCH_SPDA'"):
        Bench(CPU, backends=["TORCH_SPDA"])


def test_a_run_without_contestants_is_an_error(monkeypatch):
    monkeypatch.setattr(runner, "verdicts_of", lambda case, device: runner_verdicts(case))
    with pytest.raises(InvalidInputError, match="--backends"):
        run_cases(case())


def runner_verdicts(one):
    """Every backend is for another device."""
    from attn_dispatch.capability import Reason, ReasonCode
    from attn_dispatch.registry import registry
    from attn_dispatch.report import Verdict

    reason = Reason(code=ReasonCode.DEVICE, field="device", asked="CPU")
    return {name: Verdict(name, (reason,)) for name in registry.candidates()}


class FakePeer:
    """A peer with two ways, one of them wrong, which are as fast as is said."""

    name, kind = "Fake", "peer"

    def __init__(self, right=True):
        self.right = right

    def supports(self, one):
        return "no windows" if one.sliding_window else None

    def variants(self, one):
        return ("good", "bad", "broken")

    def prepare(self, inputs, variant):
        if variant == "broken":
            raise OSError("no nvcc")
        rows = [expected_of(inputs, r) for r in range(len(inputs.case.query_lens))]
        output = torch.cat(rows).to(inputs.case.torch_dtype)
        if variant == "bad":
            output = 2 * output
        return output.clone


def test_of_a_peers_variants_the_fastest_that_is_right_is_shown():
    plain, window = run_cases(case(), case(name="w", sliding_window=3), peers=[FakePeer()])
    rows = [row for row in plain.rows if row.kind == "peer"]
    assert [(row.variant, row.status) for row in rows] == [
        ("good", "ok"), ("bad", "wrong"), ("broken", "error"),
    ]  # fmt: skip
    assert plain.best("Fake").variant == "good"
    assert plain.failed == []  # peers do not fail a run
    assert window.best("Fake").detail == "no windows"


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The command without its ceilings, which take a second."""
    monkeypatch.setattr(ceilings_module, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "110")


def bench(*args, code=0):
    options = ["--device", "cpu", "--rounds", "2"]
    result = CliRunner().invoke(app, ["bench", *map(str, args), *options])
    assert result.exit_code == code, result.output
    return result


def write_cases(folder, *cases):
    path = folder / "cases.json"
    path.write_text(json.dumps([one.asdict() for one in cases]), encoding="utf-8")
    return path


@pytest.mark.usefixtures("quick")
def test_the_table_names_cases_contestants_and_reasons(tmp_path):
    path = write_cases(tmp_path, case(name="decode/a"), case(name="decode/b", logits_soft_cap=2.0))
    result = bench("--cases", path, "--backends", "torch_sdpa", "--peers")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["decode/a"] in lines
    assert ["picked:", "TORCH_SDPA"] in [line[:2] for line in lines]
    assert ["picked:", "REFERENCE"] in [line[:2] for line in lines]
    assert ["TORCH_SDPA", "-", "-", "-", "-", "-", "-"] in lines
    assert "TORCH_SDPA does not compute decode/b: logits_soft_cap=2.0" in result.stdout
    assert "FlashInfer is not measured: it needs a GPU" in result.stdout
    assert "read 10.0 GB/s" in result.stdout
    assert "[0/2] decode/a" in result.stderr
    assert "WRONG" not in result.stdout


@pytest.mark.usefixtures("quick")
def test_a_wrong_backend_makes_exit_status_1(tmp_path):
    path, out = write_cases(tmp_path, case(name="decode/a")), tmp_path / "out.json"
    with registered(backend_with("OFF", OffImpl, head_size=OneOf(16))):
        text = bench("--cases", path, "--backends", "OFF", "--json", out, code=1).stdout
    assert "WRONG" in text
    assert "OFF is WRONG on decode/a: its error is" in text
    (row, *_) = json.loads(out.read_text())["cases"][0]["rows"]
    assert (row["name"], row["status"], row["timing"]) == ("OFF", "wrong", None)
    assert "tb_s" not in row


@pytest.mark.usefixtures("quick")
def test_json_has_everything(tmp_path):
    window = case(name="decode/b", sliding_window=3)
    path, out = write_cases(tmp_path, case(name="decode/a"), window), tmp_path / "out.json"
    bench("--cases", path, "--json", out, "--backends", "TORCH_SDPA,REFERENCE")
    data = json.loads(out.read_text())
    assert data["complete"] is True
    assert data["ceilings"]["read_tb_s"] == CEILINGS.read_tb_s
    assert {"device", "driver", "torch", "command", "attn_dispatch"} <= set(data["machine"])
    assert [Case(**tuples(each["case"])) for each in data["cases"]] == load_cases(path)
    first = data["cases"][0]
    assert (first["bytes"], first["flops"]) == (case().bytes, case().flops)
    assert first["picked"] == {"prefill": "TORCH_SDPA", "decode": "TORCH_SDPA"}
    for row in first["rows"]:
        assert row["error"] <= first["allowed_error"]
        seconds = row["timing"]["median_us"] * 1e-6
        assert row["tb_s"] == pytest.approx(first["bytes"] / seconds / 1e12)
        assert row["tflops"] == pytest.approx(first["flops"] / seconds / 1e12)
        assert row["share"] == pytest.approx(row["share_of_read"])
        assert row["share_of_read"] == pytest.approx(row["tb_s"] / 0.01)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / 0.05)
    assert '"seq_lens": [37,5,16]' in out.read_text()


def tuples(fields):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


@pytest.mark.usefixtures("quick")
def test_the_filter_picks_by_name(tmp_path):
    path = write_cases(tmp_path, case(name="decode/a"), case(name="decode/b"))
    text = bench("--cases", path, "--filter", "/b").stdout
    assert "decode/b" in text
    assert "decode/a" not in text
    assert "no case of" in bench("--cases", path, "--filter", "x", code=2).output


@pytest.mark.usefixtures("quick")
def test_a_sweep_takes_its_layer_from_flags_or_the_first_case(tmp_path, monkeypatch):
    swept = []
    monkeypatch.setattr(Bench, "run", lambda self, cases: iter(swept.extend(cases) or ()))
    with pytest.raises(StopIteration):
        CliRunner().invoke(app, ["bench", "--sweep", "batch"], catch_exceptions=False)
    assert (swept[0].num_heads, swept[0].num_kv_heads, swept[0].head_size) == (32, 8, 128)
    swept.clear()
    path = write_cases(tmp_path, case(sinks=True), case(name="b"))
    flags = ["--cases", str(path), "--sweep", "context", "--head-size", "32"]
    with pytest.raises(StopIteration):
        CliRunner().invoke(app, ["bench", *flags], catch_exceptions=False)
    assert (swept[0].num_heads, swept[0].head_size, swept[0].sinks) == (4, 32, True)
    assert len(swept) == 11


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--cases"),
        (["--sweep", "size"], "context and batch"),
        (["--sweep", "batch", "--num-heads", "7"], "the layer of the sweep"),
        (["--cases", "CASES", "--head-size", "8"], "--head-size describes the layer of a --sweep"),
        (["--cases", "CASES", "--json", "no/such/x.json"], "there is no folder"),
        (["--cases", "CASES", "--backends", "NOPE"], "There is no backend 'NOPE'"),
    ],
)
def test_flags_that_cannot_be_meant_are_errors(args, message, tmp_path):
    path = write_cases(tmp_path, case())
    output = bench(*[path if arg == "CASES" else arg for arg in args], code=2).output
    assert message in " ".join(output.split())


def test_help_shows_the_flags():
    assert "--time-budget" in CliRunner().invoke(app, ["bench", "--help"]).output


@pytest.mark.usefixtures("quick")
def test_a_plot_without_matplotlib_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_cases(tmp_path, case())
    output = bench("--cases", path, "--plot", tmp_path / "x.png", code=2).output
    assert "attn-dispatch[bench]" in output


@pytest.mark.usefixtures("quick")
def test_a_plot_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    path = write_cases(
        tmp_path,
        *(case(name=f"decode/{i}") for i in range(11)),
        case(name="prefill/a", query_lens=(20,), seq_lens=(20,)),
    )
    bench("--cases", path, "--plot", picture, "--backends", "TORCH_SDPA,REFERENCE")
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(SWEEPS, "batch", [(1, 8), (2, 8), (4, 8)])
    lines = tmp_path / "y.png"
    bench("--cases", path, "--sweep", "batch", "--plot", lines)
    assert lines.read_bytes().startswith(b"\x89PNG")


def test_timing_summarizes():
    assert Timing.of([5.0, 1.0, 3.0]) == Timing(3.0, 1.0, 5.0, 3)
