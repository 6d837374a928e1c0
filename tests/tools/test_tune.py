"""`attn-dispatch tune`: the grid, the points that are kept, and the command."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch import explain
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.bench.cases import Case as BenchCase
from attn_dispatch.bench.timing import Clock
from attn_dispatch.cli import app
from attn_dispatch.errors import InvalidInputError, UnknownBackendError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.routing import Router
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.timings import store
from attn_dispatch.selection.timings.policy import PhaseCandidates, routes_of
from attn_dispatch.selection.timings.reader import read_table
from attn_dispatch.selection.timings.store import machine_of, write_table
from attn_dispatch.selection.timings.table import LAYER_FIELDS, LayerTimes, Point, layer_key
from attn_dispatch.selection.timings.table import BatchKind as Kind
from attn_dispatch.tuning.measure import Grid, Tuner, cases_of, place_of
from support.bench_cases import case as bench_case
from support.cases import Case, Step, call, layer_of, layer_spec
from support.selection import layer, make_backend, registered
from support.timing_tables import FAST_REFERENCE, H200, point, table_of

SPEC = layer(dtype=torch.float32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("ATTN_DISPATCH_TUNING", raising=False)
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    store.forget_tables()


# --- Measuring ----------------------------------------------------------------------------------


class BrokenImpl(ReferenceImpl):
    def forward(self, *arguments, **more):
        raise RuntimeError("illegal memory access")


@pytest.fixture
def implementations():
    """Backends with given times, by a clock that only they advance; one is wrong."""
    state = {"now": 0.0, "calls": []}

    def impl(name, seconds, add=0.0):
        class Impl(ReferenceImpl):
            def forward(self, *arguments, **more):
                state["now"] += seconds(arguments[5].batch)
                state["calls"].append(name)
                return super().forward(*arguments, **more).add_(add)

        return Impl

    impls = {
        "STEADY": impl("STEADY", lambda batch: 4.0),
        "BY_SIZE": impl("BY_SIZE", lambda batch: float(batch.num_reqs)),
        "WRONG": impl("WRONG", lambda batch: 0.5, add=0.1),
    }
    backends = [make_backend(name) for name in impls]
    for backend, cls in zip(backends, impls.values(), strict=True):
        backend.get_impl_cls = staticmethod(lambda cls=cls: cls)
    state["clock"] = Clock(lambda: state["now"])
    with registered(*backends):
        yield state


SMALL = layer(num_heads=2, num_kv_heads=1, head_size=8, block_size=4, dtype=torch.float32)
SMALL_GRID = Grid(requests=(1, 3), lengths=(32,))


def tuner_of(path, implementations, **more):
    return Tuner(
        CPU,
        path,
        ["STEADY", "BY_SIZE", "WRONG"],
        clock=implementations["clock"],
        rounds=1,
        **more,
    )


def test_the_grid_has_every_step():
    cases = cases_of("full", layer(), Grid())
    places = [place_of(case) for case in cases]
    assert len(set(places)) == len(places)
    assert {place[0] for place in places} == set(Kind)
    for case, (step, requests, tokens, keys) in zip(cases, places, strict=True):
        assert f"/{step}/" in case.name
        assert requests == len(case.seq_lens)
        if step in (Kind.PREFILL, Kind.RAGGED):
            pairs = sum(q * k for q, k in zip(case.query_lens, case.seq_lens, strict=True))
            assert abs(tokens * keys - pairs * requests) <= tokens / 2
        else:
            assert keys == sum(case.seq_lens)
        assert layer_key(case.spec()) == layer_key(layer())
    # Any number of cases from the start has some of each step.
    assert {place[0] for place in places[:8]} == set(Kind)
    prompts = [case for case in cases if "/prefill/" in case.name]
    assert {case.has_past for case in prompts} == {True, False}
    encoder = layer(attn_type="encoder_only", block_size=None)
    places = {place_of(case)[0] for case in cases_of("encoder", encoder, Grid())}
    assert places == {Kind.PREFILL, Kind.RAGGED}


def test_the_grid_has_prompts_and_chunks_of_unequal_lengths():
    """The same in each run, with the averages of the equal ones, and none that is a decode."""
    grid = Grid(steps=(Kind.RAGGED,), requests=(1, 4, 64), lengths=(256, 1024, 16384))
    ragged = cases_of("full", layer(), grid)
    assert ragged == cases_of("full", layer(), grid)
    assert {(len(case.query_lens), case.has_past) for case in ragged} == {
        (number, has_past) for number in (4, 64) for has_past in (True, False)
    }
    for case in ragged:
        assert min(case.query_lens) > 16
        assert case.kind == "prefill"
        number = len(case.seq_lens)
        average = min((256, 1024, 16384), key=lambda n: abs(n * number - sum(case.seq_lens)))
        assert sum(case.seq_lens) == pytest.approx(average * number, rel=0.1)
        assert place_of(case)[0] is Kind.RAGGED


def test_unequal_prefills_are_looked_up_by_their_work(tmp_path):
    """A backend that is only faster if lengths differ gets such batches, and no others."""
    spec = layer(num_heads=2, num_kv_heads=1, head_size=8, block_size=4, dtype=torch.float32)
    points = []
    grid = Grid(steps=(Kind.PREFILL, Kind.RAGGED), lengths=(1024, 4096, 16384))
    for case in cases_of("full", spec, grid):
        step, *place = place_of(case)
        us = {"TORCH_SDPA": 100.0, "REFERENCE": 50.0 if step is Kind.RAGGED else 200.0}
        points.append(Point(step, *place, us))
    times = LayerTimes(tuple(points), "a test", "CPU", "2026-11-28T00:00:00+00:00")
    candidates = {
        phase: PhaseCandidates("TORCH_SDPA", frozenset(["TORCH_SDPA", "REFERENCE"]))
        for phase in Phase
    }
    router = Router(
        dict.fromkeys(Phase, "TORCH_SDPA"), routes_of(times, candidates, captured=False)
    )

    def pick(*lens):
        ((name, _),) = router(AttentionBatch.create(*zip(*lens, strict=True)))
        return name

    assert pick((1024, 1024)) == "TORCH_SDPA"
    assert pick(*[(1024, 1024)] * 64) == "TORCH_SDPA"
    # Most of the work is in the long ones: 64 requests of 1000 tokens, whose tokens see 6000 keys.
    assert pick(*[(200, 200)] * 56, *[(7000, 7000)] * 8) == "REFERENCE"
    # What is not measured for unequal requests is looked up among the equal ones.
    equal = {bucket: name for bucket, name in router.routes.items() if bucket[0] is Kind.PREFILL}
    router = Router(router.picks, dict.fromkeys(equal, "REFERENCE"))
    assert pick(*[(200, 200)] * 56, *[(7000, 7000)] * 8) == "REFERENCE"


def test_measurements_become_a_table(implementations, tmp_path):
    path = tmp_path / "table.json"
    tuner = tuner_of(path, implementations)
    tasks, notes = tuner.tasks(cases_of("full", SMALL, SMALL_GRID))
    done = list(tuner.run(tasks))
    assert not notes
    points = read_table(path).layers[layer_key(SMALL)].points
    assert [each.point for each in done] == list(points)
    assert {point.step for point in points} == set(Kind)
    for each in points:
        alone = {"STEADY": 4e6, "BY_SIZE": 1e6 * each.requests}
        assert {name: each.times_us[name] for name in alone} == alone
        split = set() if each.step is not Kind.MIXED else {"STEADY+BY_SIZE", "BY_SIZE+STEADY"}
        assert set(each.times_us) == {*alone, *split}
        assert "WRONG" in each.failed
        if split:  # one prompt and two decodes
            assert each.times_us["STEADY+BY_SIZE"] == 6e6
            assert each.times_us["BY_SIZE+STEADY"] == 5e6
    assert {row.name for each in done for row in each.problems} >= {"WRONG"}
    assert all(row.status == "wrong" for each in done for row in each.problems)


def test_busy_periods_do_not_change_times(implementations, tmp_path):
    """Most calls of a stretch may be slow; what counts is what a fifth of them stay below."""
    calls = iter(range(10**6))

    def busy(batch):
        return 4.0 if next(calls) % 3 == 0 else 40.0

    class Impl(ReferenceImpl):
        def forward(self, *arguments, **more):
            implementations["now"] += busy(arguments[5].batch)
            return super().forward(*arguments, **more)

    steady = registry.candidates()["STEADY"].backend_cls
    steady.get_impl_cls = staticmethod(lambda: Impl)
    tuner = tuner_of(tmp_path / "table.json", implementations)
    tuner.rounds = 15
    tasks, _ = tuner.tasks(cases_of("full", SMALL, SMALL_GRID)[:1])
    (done,) = tuner.run(tasks)
    assert done.point.times_us["STEADY"] == 4e6


def test_table_keeps_the_kernel_provider(implementations, tmp_path, monkeypatch):
    steady = registry.candidates()["STEADY"].backend_cls
    monkeypatch.setattr(steady, "kernel_provider", classmethod(lambda *_: "somebody's, version 3"))
    path = tmp_path / "table.json"
    for fresh in (True, False):  # a run that goes on keeps what it finds
        tuner = tuner_of(path, implementations, fresh=fresh)
        tasks, _ = tuner.tasks(cases_of("full", SMALL, SMALL_GRID))
        next(tuner.run(tasks))
        (times,) = read_table(path).layers.values()
        assert times.kernel_provider == {"STEADY": "somebody's, version 3"}


def test_interrupted_run_resumes(implementations, tmp_path):
    path = tmp_path / "table.json"
    cases = cases_of("full", SMALL, SMALL_GRID)
    tasks, _ = tuner_of(path, implementations).tasks(cases)
    tuner = tuner_of(path, implementations)
    run = tuner.run(tasks)
    for _ in range(2):
        next(run)
    run.close()  # as Ctrl-C does
    kept = read_table(path).layers[layer_key(SMALL)].points
    assert len(kept) == 2
    implementations["calls"].clear()
    again = tuner_of(path, implementations)
    left, _ = again.tasks(cases)
    assert left == tasks[2:]
    list(again.run(left))
    assert read_table(path).layers[layer_key(SMALL)].points[:2] == kept
    assert tuner_of(path, implementations).tasks(cases)[0] == []
    assert len(tuner_of(path, implementations, fresh=True).tasks(cases)[0]) == len(tasks)


WIDER = SMALL.replace(num_heads=4)


def test_two_runs_can_fill_one_table(implementations, tmp_path):
    """Their points alternate: of two layers, and of one layer at two lengths."""
    path = tmp_path / "table.json"
    steps = (Kind.DECODE, Kind.VERIFY)
    work = [
        cases_of("full", SMALL, Grid(steps, (1, 3), (32,))),
        cases_of("wide", WIDER, Grid(steps, (1,), (32,))),
        cases_of("long", SMALL, Grid(steps, (1,), (64,))),
    ]
    tuners = [tuner_of(path, implementations) for _ in work]
    tasks = [tuner.tasks(cases)[0] for tuner, cases in zip(tuners, work, strict=True)]
    runs = [tuner.run(mine) for tuner, mine in zip(tuners, tasks, strict=True)]
    for each in range(max(map(len, tasks))):
        for run, mine in zip(runs, tasks, strict=True):
            if each < len(mine):
                next(run)
    layers = read_table(path).layers
    found = {(key, point.key) for key in layers for point in layers[key].points}
    assert found == {(task.key, task.place) for mine in tasks for task in mine}
    assert os.listdir(tmp_path) == ["table.json"]


def test_fresh_run_replaces_only_its_own_layers(implementations, tmp_path):
    path = tmp_path / "table.json"
    for spec, lengths in ((SMALL, (32, 64)), (WIDER, (32,))):
        tuner = tuner_of(path, implementations)
        list(tuner.run(tuner.tasks(cases_of("full", spec, Grid((Kind.DECODE,), (1,), lengths)))[0]))
    wide = read_table(path).layers[layer_key(WIDER)].points
    fresh, other = tuner_of(path, implementations, fresh=True), tuner_of(path, implementations)
    long = cases_of("full", SMALL, Grid((Kind.DECODE,), (3,), (128,)))
    list(other.run(other.tasks(long)[0]))  # meanwhile, of the same layer
    tasks, _ = fresh.tasks(cases_of("full", SMALL, Grid((Kind.DECODE,), (1,), (32,))))
    list(fresh.run(tasks))
    layers = read_table(path).layers
    assert layers[layer_key(WIDER)].points == wide
    assert {p.keys for p in layers[layer_key(SMALL)].points} == {32, 3 * 128}


def test_file_that_is_not_a_table_is_never_overwritten(implementations, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("mine")
    for fresh in (False, True):
        with pytest.raises(InvalidInputError, match="is not JSON"):
            tuner_of(path, implementations, fresh=fresh)
    path.unlink()
    tuner = tuner_of(path, implementations)
    run = tuner.run(tuner.tasks(cases_of("full", SMALL, SMALL_GRID))[0])
    next(run)
    path.write_text("mine")  # by somebody else, in the middle of the run
    with pytest.raises(InvalidInputError, match="is not JSON"):
        next(run)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["requests", "lengths"])
@pytest.mark.parametrize("numbers", [(10**12,), (0,), (-1,), (2**70,), (True,), (1.5,), (1,) * 65])
def test_invalid_grid_is_rejected(name, numbers):
    with pytest.raises(InvalidInputError, match=f"^(a number in )?{name}"):
        Grid(**{name: numbers})


def test_largest_grid_numbers_make_no_lists():
    grid = Grid(requests=(1 << 16,), lengths=(1 << 22,))
    assert cases_of("full", SMALL, grid) == []


def test_new_backend_is_measured_with_the_others(implementations, tmp_path):
    path, cases = tmp_path / "table.json", cases_of("full", SMALL, SMALL_GRID)
    two = Tuner(CPU, path, ["STEADY", "BY_SIZE"], clock=implementations["clock"], rounds=1)
    list(two.run(two.tasks(cases)[0]))
    assert len(tuner_of(path, implementations).tasks(cases)[0]) == len(cases)


def test_unreadable_table_is_not_written(implementations, tmp_path):
    path = tmp_path / "table.json"
    points = [point("decode", 1, 1, keys + 1, STEADY=1) for keys in range(1025)]
    with pytest.raises(InvalidInputError, match="at most 1024"):
        write_table(table_of({SPEC: points}), path)
    assert not path.exists()


def test_point_without_results_is_retried(implementations, tmp_path):
    path, cases = tmp_path / "table.json", cases_of("full", SMALL, SMALL_GRID)[:1]
    with registered(make_backend("BROKEN_A"), make_backend("BROKEN_B")):
        for name in ("BROKEN_A", "BROKEN_B"):
            cls = registry.candidates()[name].backend_cls
            cls.get_impl_cls = staticmethod(lambda: BrokenImpl)
        tuner = Tuner(CPU, path, ["BROKEN_A", "BROKEN_B"], rounds=1)
        (done,) = tuner.run(tuner.tasks(cases)[0])
        assert (done.point, done.skipped) == (None, "no backend has a result")
        assert [row.status for row in done.problems] == ["error", "error"]
        assert len(tuner.tasks(cases)[0]) == 1
    assert not path.exists()


def test_table_of_another_machine_is_not_overwritten(implementations, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(InvalidInputError, match=r"notes\.json"):
        tuner_of(path, implementations)
    write_table(table_of({SPEC: FAST_REFERENCE}, H200), path)
    with pytest.raises(InvalidInputError, match="--fresh"):
        tuner_of(path, implementations)
    with pytest.raises(UnknownBackendError, match="NO_SUCH"):
        Tuner(CPU, tmp_path / "new.json", ["NO_SUCH"])


def test_one_backend_has_nothing_to_compare(tmp_path):
    tuner = Tuner(CPU, tmp_path / "table.json", ["REFERENCE"])
    tasks, notes = tuner.tasks(cases_of("full", SMALL, SMALL_GRID))
    assert tasks == []
    assert ["only REFERENCE" in note for note in notes] == [True]


# --- The command --------------------------------------------------------------------------------

FLAGS = "--num-heads 2 --num-kv-heads 1 --head-size 8 --dtype float32 --block-size 4 --device cpu"
TINY = "--backends torch_sdpa,REFERENCE --requests 1,2 --lengths 32 --rounds 1"


def run(text, code=0):
    result = CliRunner().invoke(app, ["tune", *text.split()], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_tune_measures_stores_and_shows():
    text = run(f"{FLAGS} {TINY} --time-budget 0")
    assert "0 measured now, 8 still to do" in text
    text = run(f"{FLAGS} {TINY}")
    assert "8 measured now, 0 still to do" in text
    text = run(f"{FLAGS} {TINY}")
    assert "0 measured now, 0 still to do" in text
    assert "8 points" in text
    assert "decode of 2 requests with 32 keys each" in run("--show --device cpu")
    assert "cpu-" in run("--list --device cpu")
    # Selection reads it at once, and everything in it is a backend that was admitted.
    (report,) = explain(SMALL, "cpu", phase=Phase.DECODE)
    assert report.measured is not None
    assert {each.point.step for each in report.measured.comparisons} == {Kind.DECODE, Kind.VERIFY}


def test_the_layout_of_an_engine_is_not_measured(tmp_path):
    assert "for this library's own layout" in run(f"{FLAGS} {TINY} --kv-layout vllm", 2)
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([bench_case(kv_layout="sglang").asdict()]), encoding="utf-8")
    text = run(f"--device cpu --cases {path}", 2)
    assert "has a kv_layout" in text
    assert "for this library's own layout" in text


def test_interrupted_command_shows_its_points(monkeypatch):
    measure, begun = Tuner._measure, []

    def interrupted(self, task, clock):
        begun.append(task)
        if len(begun) > 1:
            raise KeyboardInterrupt
        return measure(self, task, clock)

    with monkeypatch.context() as world:
        world.setattr(Tuner, "_measure", interrupted)
        text = run(f"{FLAGS} {TINY}", 130)
    assert "1 measured now, 7 still to do" in text
    assert "7 measured now, 0 still to do" in run(f"{FLAGS} {TINY}")


def test_tune_measures_a_model_and_a_case_file(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "gemma2",
                "num_hidden_layers": 2,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 8,
                "attn_logit_softcapping": 50.0,
                "torch_dtype": "float32",
            }
        )
    )
    output = tmp_path / "table.json"
    grid = "--steps decode --requests 1 --lengths 32 --rounds 1 --device cpu"
    run(f"--config {config} --backends REFERENCE,TORCH_SDPA {grid} --output {output}")
    assert not output.exists()  # soft caps: the reference alone
    with registered(make_backend("SECOND")):
        run(f"--config {config} --backends REFERENCE,SECOND {grid} --output {output}")
        layers = [dict(zip(LAYER_FIELDS, key, strict=True)) for key in read_table(output).layers]
        assert sorted(str(each["sliding_window"]) for each in layers) == ["8", "None"]
    cases = tmp_path / "cases.json"
    ragged = BenchCase(
        name="ragged",
        query_lens=(1, 1),
        seq_lens=(5, 17),
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        block_size=4,
        dtype="float32",
    )
    cases.write_text(json.dumps([ragged.asdict()]))
    other = tmp_path / "other.json"
    run(f"--cases {cases} --backends REFERENCE,TORCH_SDPA --rounds 1 --device cpu --output {other}")
    (times,) = read_table(other).layers.values()
    assert [each.key for each in times.points] == [(Kind.DECODE, 2, 2, 22)]


def test_tune_names_wrong_backends(implementations):
    text = run(f"{FLAGS} --backends STEADY,BY_SIZE,WRONG --requests 1 --lengths 32 --rounds 1", 1)
    assert "WRONG is left out, wrong: its error is" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--num-heads 2", "A layer needs --head-size, --dtype"),
        (f"{FLAGS} --steps train", "prefill, ragged, decode, verify, mixed"),
        (f"{FLAGS} --requests 0", "not a number such as 16 or 4k"),
        (f"{FLAGS} --lengths ,", "needs a number"),
        (f"{FLAGS} --requests 1000000000000", "the largest that is accepted is 65536"),
        (f"{FLAGS} --lengths 9999999999999999k", "the largest that is accepted is 4194304"),
        (f"{FLAGS} --lengths {'9' * 5000}", "a number of 5000 digits"),
        (f"{FLAGS} --time-budget inf", "not a number of seconds"),
        (f"{FLAGS} --output /proc/no/such.json", "cannot be written"),
        (f"{FLAGS} --output /dev/null", "cannot be written: it is not a regular file"),
        (f"{FLAGS} --custom-mask", "has fields other than num_heads"),
        (f"{FLAGS} --cases cases.json", "leave out --config and the flags of a layer"),
        (f"{FLAGS} --backends NO_SUCH", "There is no backend 'NO_SUCH'"),
        ("--list --output /no/such/file.json", "cannot be read"),
    ],
)
def test_tune_errors_are_sentences(text, message):
    assert message in run(text, 2)


def test_unreadable_cache_file_is_replaced():
    path = store.table_path(machine_of(detect_device("cpu")))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert "It is measured again" in run(f"{FLAGS} {TINY} --steps decode")
    assert read_table(path).layers


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layer_on_a_gpu_uses_measured_times(tmp_path, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    spec = layer_spec(
        num_heads=8, num_kv_heads=2, head_size=64, block_size=16, dtype=torch.bfloat16
    )
    path = tmp_path / "table.json"
    tuner = Tuner(device, path, rounds=5)
    tasks, _ = tuner.tasks(cases_of("full", spec, Grid(requests=(1, 4), lengths=(64, 256))))
    assert tasks
    assert [each.skipped for each in tuner.run(tasks)] == [""] * len(tasks)
    table = read_table(path)
    assert table.machine == machine_of(detect_device(device))
    assert table.machine.driver is None or table.machine.driver[0].isdigit()
    for each in table.layers[layer_key(spec)].points:
        assert each.times_us
        assert set(each.host_us) == set(each.times_us)
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(path))
    for query_lens, seq_lens in (((1,), (60,)), ((1, 50, 1, 1), (200, 50, 64, 250))):
        step = Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens), device)
        layer = layer_of(step)
        assert all(s.report.measured is not None for s in layer.selections.values())
        step.check(call(layer, step))
