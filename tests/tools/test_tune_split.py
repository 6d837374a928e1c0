"""`tune --context-parallel`, its table, and what reads it."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch import Attention, AttentionBatch, AttentionSpec, ContextParallel
from attn_dispatch.cli import app
from attn_dispatch.distributed.advice import SplitAdvice, advice_for, describe_split, predict
from attn_dispatch.distributed.choice import ExchangeChoice
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.selection.timings.reader import parse_table, read_table
from attn_dispatch.selection.timings.store import forget_tables, machine_of, write_table
from attn_dispatch.selection.timings.table import (
    BatchKind,
    LayerTimes,
    Point,
    SplitKey,
    Table,
    split_layer_key,
)
from attn_dispatch.tuning.measure import Tuner
from support.ranks import run_on_ranks

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float32, block_size=8)
FLAGS = ["--num-heads", "4", "--num-kv-heads", "2", "--head-size", "16", "--dtype", "float32"]


def point(keys, one, a2a, ag_rs, requests=2):
    times = {"ONE_RANK": one, "A2A": a2a, "AG_RS": ag_rs}
    return Point(BatchKind.DECODE, requests, requests, keys, times)


def table_of(*points, ranks=2, transport="gloo"):
    machine = machine_of(detect_device("cpu"))
    key = SplitKey(split_layer_key(SPEC), ranks, transport)
    times = LayerTimes(points, "here", machine.device, "2026-11-28")
    return Table(machine, "2026-11-28", {}, "here", {key: times})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file in which ag_rs is faster for long requests, and a split is faster for these only."""
    path = tmp_path / "table.json"
    write_table(table_of(point(32, 10.0, 20.0, 30.0), point(1 << 17, 100.0, 80.0, 60.0)), path)
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(path))
    forget_tables()
    yield path
    forget_tables()


def batch_of(keys, requests=2):
    return AttentionBatch.create(
        [1] * requests,
        [keys] * requests,
        block_table=torch.zeros(requests, keys, dtype=torch.int32),
    )


def test_a_table_with_splits_is_read_as_it_was_written(table):
    found = read_table(table)
    ((key, times),) = found.splits.items()
    assert key == SplitKey(split_layer_key(SPEC), 2, "gloo")
    assert [each.keys for each in times.points] == [32, 1 << 17]
    kept = Tuner(torch.device("cpu"), table).table()  # of the other command
    assert kept.splits[key].points == times.points


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ranks": 0}, "ranks is not an integer"),
        ({"ranks": 1 << 20}, "ranks is more than"),
        ({"transport": ""}, "transport is not a short text"),
        ({"nodes": 3}, "unknown key 'nodes'"),
    ],
)
def test_a_table_with_wrong_splits_is_rejected(change, text, table):
    data = json.loads(table.read_text())
    data["context_parallel"][0] |= change
    with pytest.raises(Exception, match=text):
        parse_table(data, "it")
    data = json.loads(table.read_text())
    data["context_parallel"] *= 2
    with pytest.raises(Exception, match="repeats a layer"):
        parse_table(data, "it")


def test_the_faster_exchange_is_chosen_where_all_ranks_have_its_times(table):
    choice = ExchangeChoice(2, "gloo")
    assert choice.combine_for(SPEC, batch_of(1 << 16)) == "a2a"
    choice.load(detect_device("cpu"))
    assert choice.settle([choice.digest] * 2)
    assert choice.combine_for(SPEC, batch_of(1 << 16)) == "ag_rs"
    assert choice.combine_for(SPEC.replace(returns_lse=True), batch_of(1 << 16)) == "ag_rs"
    assert choice.combine_for(SPEC, batch_of(16)) == "a2a"
    assert choice.combine_for(SPEC, batch_of(1 << 10)) == "a2a"  # no point is near
    assert choice.combine_for(SPEC.replace(num_heads=8), batch_of(1 << 16)) == "a2a"
    assert not choice.settle([choice.digest, "another"])
    assert choice.combine_for(SPEC, batch_of(1 << 16)) == "a2a"
    other = ExchangeChoice(4, "gloo")
    other.load(detect_device("cpu"))
    assert other.digest != choice.digest


def test_an_eager_step_pays_for_its_host():
    times = {"ONE_RANK": 100.0, "A2A": 60.0, "AG_RS": 90.0}
    host = {"ONE_RANK": 110.0, "A2A": 300.0, "AG_RS": 120.0}
    advice = SplitAdvice(Point(BatchKind.DECODE, 1, 1, 64, times, host), True)
    assert advice.exchange(captured=True) == "A2A"
    assert advice.speed_up(captured=True) == pytest.approx(100 / 60)
    assert advice.exchange(captured=False) == "AG_RS"  # 90 and 10 more; a2a is 60 and 190 more
    assert advice.speed_up(captured=False) == pytest.approx(1.0)
    assert "1.67 times as fast in a graph, run eagerly no, 1.00 times as fast" in str(advice)


@pytest.mark.filterwarnings("ignore:The table")
def test_the_advice_is_what_was_measured_or_else_a_prediction(table):
    short, long = advice_for(SPEC, detect_device("cpu"), 2, "gloo")
    for captured in (False, True):  # without a host's time both are the same
        assert (short.exchange(captured=captured), short.speed_up(captured=captured)) == (
            "A2A",
            0.5,
        )
        assert not short.pays_off(captured=captured)
        assert long.pays_off(captured=captured)
        assert long.exchange(captured=captured) == "AG_RS"
    assert "no, 0.50 times as fast (measured: one rank 10.0 us, a2a 20.0, ag_rs 30.0)" in str(short)
    assert not advice_for(SPEC, detect_device("cpu"), 4, "gloo")  # no bandwidth to predict with
    assert (
        "not measured: run torchrun --nproc-per-node 4"
        in describe_split(SPEC, detect_device("cpu"), 4)[-1]
    )
    dense = AttentionSpec(
        num_heads=32, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, block_size=16
    )
    h200 = known_device("sm90")
    predicted = advice_for(dense, h200, 2)
    assert [each.pays_off(captured=True) for each in predicted] == [True] * 3
    assert not any(each.is_measured for each in predicted)
    one = predict(dense, h200, 2, 16, 16, 16 << 16).times_us["ONE_RANK"]
    assert one == pytest.approx((16 << 16) * 8 * 256 * 2 / h200.memory_bandwidth * 1e6)
    encoder = SPEC.replace(attn_type="encoder_only", block_size=None)
    assert "cannot be split" in describe_split(encoder, h200, 2)[0]


def test_explain_and_doctor_show_the_table(table):
    flags = ["--device", "cpu", *FLAGS, "--context-parallel", "2"]
    shown = CliRunner().invoke(app, ["explain", *flags, "--block-size", "8"])
    text = " ".join(shown.output.split())
    assert "Keys split over 2 ranks" in text
    assert "0.50 times as fast (measured: one rank 10.0 us" in text
    found = json.loads(CliRunner().invoke(app, ["explain", *flags, "--json"]).output)
    split = found["sections"][0]["context_parallel"]
    assert [each["eager"]["exchange"] for each in split["batches"]] == ["a2a", "ag_rs"]
    shown = "".join(CliRunner().invoke(app, ["doctor"]).output.split())  # a long path is wrapped
    assert f"2ranksovergloo:measured,{table}" in shown
    assert CliRunner().invoke(app, ["tune", *FLAGS, "--context-parallel", "2"]).exit_code == 2


def check_layers(rank, world, path):
    """A layer's steps use the table if both ranks have it."""
    texts = []
    for files in ((path, path), (path, "off")):
        os.environ["ATTN_DISPATCH_TUNING"] = files[rank]
        forget_tables()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            layer = Attention(
                4, 16, num_kv_heads=2, dtype=torch.float32, device="cpu", block_size=8,
                context_parallel=ContextParallel(),
            )  # fmt: skip
        batch = AttentionBatch.create(
            [1, 1], [1 << 16] * 2, block_table=torch.zeros(2, 1 << 12, dtype=torch.int32),
            block_size=16,
        )  # fmt: skip
        combine = layer.build_metadata(batch).combine
        text = layer.context_parallel.explain(layer)
        told = sum("different tables" in str(each.message) for each in warned)
        texts.append((combine, "that was measured to be faster" in text, told))
    return texts


def test_layers_use_a_table_that_all_ranks_have(table):
    first, second = run_on_ranks(2, check_layers, str(table))
    assert first == [("ag_rs", True, 0), ("a2a", False, 1)]
    assert second == [("ag_rs", True, 0), ("a2a", False, 0)]


def check_tune(rank, world, path):
    """The command, on a rank that is started as torchrun does; twice."""
    os.environ["WORLD_SIZE"], outputs = str(world), []
    for lengths in ("64", "64,96"):
        given = ["--context-parallel", "2", *FLAGS, "--rounds", "2", "--output", path]
        more = ["--requests", "1", "--device", "cpu", "--lengths", lengths]
        result = CliRunner().invoke(app, ["tune", *given, *more])
        assert result.exit_code == 0, result.output
        points = 0
        if rank == 0:  # it has written them when it returns
            ((_, times),) = read_table(path).splits.items()
            points = len(times.points)
        outputs.append((result.stdout, points))
    return outputs


def test_ranks_measure_and_continue(tmp_path):
    path = tmp_path / "table.json"
    first, second = run_on_ranks(2, check_tune, str(path))
    assert [points for _, points in first] == [1, 2]
    assert all("1 measured now, 0 still to do" in text for text, _ in first)
    assert second == [("", 0), ("", 0)]  # only rank 0 prints
    (key,) = read_table(path).splits
    assert key == SplitKey(split_layer_key(SPEC), 2, "gloo")
