"""Measured selection: the keys of tables, what is picked by them, and what that costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from attn_dispatch import attention_backend, explain, resolve
from attn_dispatch.bench.cases import Case
from attn_dispatch.cli import app
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import OneOf
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.runtime.kv_cache_plan import plan_kv_cache
from attn_dispatch.runtime.routing import Router
from attn_dispatch.selection.overrides import Source
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.selector import select
from attn_dispatch.selection.timings import store
from attn_dispatch.selection.timings.policy import (
    MARGIN,
    PhaseCandidates,
    compare_points,
    routes_of,
)
from attn_dispatch.selection.timings.reader import parse_table, read_table
from attn_dispatch.selection.timings.table import (
    LAYER_FIELDS,
    BatchKind,
    bucket_of,
    layer_key,
    spec_of,
    totals_of,
)
from support.selection import DEEPSEEK, Forbidden, layer, make_backend, mla_layer, registered
from support.timing_tables import FAST_REFERENCE, in_force, point, table_of, times_of

SPEC = layer(dtype=torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A separate cache, no shipped tables, and no warnings so far."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("ATTN_DISPATCH_TUNING", raising=False)
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(folder))
    monkeypatch.setattr(store, "_warned", set())
    store.forget_tables()
    return folder


# --- Layers and buckets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "longest_decode", "expected"),
    [
        ([1, 1, 1], [5, 9, 2], 1, (BatchKind.DECODE, 3, 3, 16)),
        (
            [1, 1, 0],
            [5, 9, 0],
            1,
            (BatchKind.DECODE, 3, 2, 14),
        ),  # the last one pads a graph's batch
        ([4, 4], [5, 9], 4, (BatchKind.VERIFY, 2, 8, 14)),
        ([4, 4], [5, 9], 1, (BatchKind.PREFILL, 2, 8, 14)),
        ([7], [7], 1, (BatchKind.PREFILL, 1, 7, 7)),
        # Of 80 new tokens, 60 see 60 keys and 20 see 100: 70 on average, for each of two requests.
        ([60, 20], [60, 100], 1, (BatchKind.PREFILL, 2, 80, 140)),
        ([1, 1], [60, 100], 1, (BatchKind.DECODE, 2, 2, 160)),
        ([1, 7], [5, 7], 1, (BatchKind.MIXED, 2, 8, 12)),
        ([], [], 1, None),
    ],
)
def test_the_totals_of_a_batch(query_lens, seq_lens, longest_decode, expected):
    batch = AttentionBatch.create(query_lens, seq_lens, max_decode_query_len=longest_decode)
    assert totals_of(batch) == expected


def test_buckets_are_powers_of_two_of_averages():
    def bucket(requests, tokens, keys, captured=False):
        return bucket_of(BatchKind.DECODE, requests, tokens, keys, captured=captured)

    assert bucket(16, 16, 16 * 4096) == (BatchKind.DECODE, 4, 0, 12)
    assert bucket(9, 9, 9 * 2049) == bucket(16, 16, 16 * 4096)
    assert bucket(17, 17, 17 * 4096)[1] == 5
    assert bucket(16, 16, 16 * 4096 + 1)[3] == 13
    assert bucket(1, 0, 0) == (BatchKind.DECODE, 0, 0, 0)
    # One long request among short ones counts by the sum.
    assert bucket(4, 4, 4 * 1024) == bucket(4, 4, 3 + 4093)
    # The keys of a captured decode do not count; those of a prompt, which is not captured, do.
    assert bucket(16, 16, 16, captured=True) == bucket(16, 16, 1 << 20, captured=True)
    prompts = [bucket_of(BatchKind.PREFILL, 1, n, n, captured=True) for n in (64, 4096)]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    "change",
    [
        {"head_size_v": 32},
        {"kv_scales": "per_head", "kv_cache_dtype": "fp8"},
        {"kv_cache_layout": "HND"},
        {"causal": False},
        {"custom_mask": True},
        {"bidirectional_ranges": True},
        {"returns_lse": True},
        {"output_quant": "fp8_e4m3"},
        {"batch_invariant": True},
        {"block_size": None},
    ],
    ids=str,
)
def test_unmeasured_features_have_no_key(change):
    assert layer_key(layer(**change)) is None
    if not {"head_size_v", "kv_scales"} & set(change):
        assert layer_key(mla_layer(**change)) is None


def test_the_key_of_latent_attention_has_its_sizes():
    key = layer_key(mla_layer())
    assert key[-1] == (512, 128, 64, 128)
    assert layer_key(mla_layer(cuda_graph=True)) == key
    narrow = dataclasses.replace(DEEPSEEK, v_head_dim=64)
    assert layer_key(mla_layer(mla=narrow)) not in (None, key)
    assert spec_of(dict(zip(LAYER_FIELDS, key, strict=True)) | {"dtype": torch.bfloat16}) == (
        mla_layer()
    )


def test_a_table_states_latent_attention_by_its_sizes():
    table = table_of({layer(): FAST_REFERENCE, mla_layer(): FAST_REFERENCE})
    data = json.loads(json.dumps(table.asdict()))
    assert [each["layer"].get("mla") for each in data["layers"]] == [None, [512, 128, 64, 128]]
    assert "mla" not in data["layers"][0]["layer"]  # as in tables of earlier versions
    assert list(parse_table(data, "x").layers) == [layer_key(layer()), layer_key(mla_layer())]
    for wrong in ([512, 128, 64], [512, 128, 64, 0], "512", [512, 128, 64, 128, 1]):
        data["layers"][1]["layer"]["mla"] = wrong
        with pytest.raises(InvalidInputError, match=r"layers\[1\].layer.mla"):
            parse_table(data, "x")


def test_the_key_of_a_layer_has_the_fields_that_change_its_time():
    same = [{}, {"cuda_graph": True}, {"kv_sharing": True}, {"kv_cache_layout": "NHD"}]
    assert {layer_key(layer(**change)) for change in same} == {layer_key(layer())}
    assert layer_key(layer(kv_cache_dtype="bfloat16")) == layer_key(layer())
    changes = [{"sliding_window": 8}, {"alibi": True}, {"sinks": True}, {"logits_soft_cap": 3.0}]
    changes += [{"num_heads": 16}, {"block_size": 32}, {"kv_cache_dtype": "fp8"}]
    keys = {layer_key(layer(**change)) for change in changes}
    assert len(keys | {layer_key(layer())}) == len(changes) + 1


def test_the_fields_of_a_table_are_those_of_a_case():
    fields = {field.name for field in dataclasses.fields(Case)}
    # Cases with an engine's layout are not measured for tables.
    assert set(LAYER_FIELDS) == fields - {"name", "query_lens", "seq_lens", "kv_layout"}


# --- What is chosen -----------------------------------------------------------------------------

SIDES = {phase: PhaseCandidates("A", frozenset("ABC")) for phase in Phase}


def chosen(*points, sides=SIDES, captured=False, at):
    """The backend for the batches of a point's bucket."""
    routes = routes_of(times_of(*points), sides, captured=captured)
    return routes.get(bucket_of(*at.key, captured=captured))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"A": 100, "B": 90}, "B"),
        ({"A": 100, "B": 98}, "A"),  # within the margin
        ({"A": 100, "B": 100 / (1 + MARGIN) - 0.01}, "B"),
        ({"A": 100, "B": 90, "C": 80}, "C"),
        ({"A": 100, "B": 120}, "A"),
        ({"A": 100, "D": 1}, "A"),  # it is not eligible
        ({"A": 100}, "A"),
        ({"B": 90, "C": 80}, None),  # the default was not timed
    ],
    ids=str,
)
def test_the_fastest_is_picked_if_it_beats_the_default_by_the_margin(times, expected):
    measured = point("decode", 4, 1, 64, **times)
    assert chosen(measured, at=measured) == expected


def test_host_time_counts_without_a_graph():
    slow_host = point("decode", 4, 1, 64, {"A": 5.0, "B": 50.0}, A=20, B=10)
    assert chosen(slow_host, at=slow_host) == "A"
    assert chosen(slow_host, captured=True, at=slow_host) == "B"


def test_host_time_up_to_the_defaults_is_ignored():
    hiccup = point("prefill", 1, 4096, 4096, {"A": 400.0, "B": 90.0}, A=270, B=360)
    assert chosen(hiccup, at=hiccup) == "A"
    both_long = point("prefill", 1, 512, 512, {"A": 98.0, "B": 96.0}, A=23, B=19)
    assert chosen(both_long, at=both_long) == "B"
    hidden = point("prefill", 8, 2048, 2048, {"A": 100.0, "B": 450.0}, A=700, B=600)
    assert chosen(hidden, at=hidden) == "B"
    prompt = point("prefill", 4, 64, 64, {"A": 5.0, "B": 50.0}, A=20, B=10)
    assert chosen(prompt, captured=True, at=prompt) == "A"  # prompts are not captured


def test_all_points_near_a_bucket_must_agree():
    short, long = point("decode", 4, 1, 64, A=20, B=10), point("decode", 4, 1, 256, A=10, B=20)
    between, beyond = point("decode", 4, 1, 128), point("decode", 4, 1, 512)
    assert chosen(short, long, at=short) == "B"
    assert chosen(short, long, at=between) == "A"
    assert chosen(short, long, at=long) == "A"
    assert chosen(short, long, at=beyond) == "A"
    assert chosen(short, at=between) == "B"
    assert chosen(short, at=long) is None  # a factor of four away nothing was measured
    close = point("decode", 4, 1, 128, A=10, B=20)
    assert chosen(short, close, at=short) == "A"  # a measured one among them, too
    gap = point("decode", 4, 1, 256, A=20, C=10)
    assert chosen(short, gap, at=between) == "A"  # neither beats A at both


def test_equal_backends_keep_the_one_of_shorter_batches():
    first = point("decode", 4, 1, 64, A=20, B=10, C=10.2)
    second = point("decode", 4, 1, 128, A=20, B=10.2, C=10.1)
    third = point("decode", 4, 1, 512, A=20, B=10.1, C=10)
    fourth = point("decode", 4, 1, 2048, A=20, B=12, C=10)
    measured = (first, second, third, fourth)
    assert [chosen(*measured, at=each) for each in measured] == ["B", "B", "B", "C"]
    # Without the shorter points, another is picked.
    assert chosen(third, at=third) == "C"


def test_captured_batches_of_all_lengths_share_a_backend():
    short, long = point("decode", 4, 1, 64, A=20, B=10), point("decode", 4, 1, 4096, A=10, B=20)
    both = point("decode", 16, 1, 64, A=20, B=10), point("decode", 16, 1, 4096, A=20, B=15)
    for each in (short, long):
        assert chosen(short, long, *both, captured=True, at=each) == "A"
    for each in both:
        assert chosen(short, long, *both, captured=True, at=each) == "B"


def test_points_apply_only_to_their_kind_of_batch():
    decode = point("decode", 4, 1, 64, A=20, B=10)
    for step, tokens in (("verify", 2), ("prefill", 64), ("mixed", 8)):
        assert chosen(decode, at=point(step, 4, tokens, 64)) is None


@pytest.mark.parametrize(
    ("prefill", "decode", "times", "expected"),
    [
        ("A", "A", {"A": 20, "B": 10}, "B"),
        ("A", "A", {"A": 20, "A__B": 10}, "A+B"),
        ("A", "A", {"A": 20, "A__B": 19.9}, "A"),
        ("A", "B", {"A__B": 20, "A": 10}, "A"),
        ("A", "B", {"A__B": 20, "A": 30}, "A+B"),
        ("A", "B", {"A": 30, "B": 10}, None),
        ("A", "A", {"A": 20, "B__D": 10}, "A"),
    ],
    ids=str,
)
def test_times_decide_whether_a_mixed_batch_is_split(prefill, decode, times, expected):
    mixed = point("mixed", 4, 16, 64, **times)
    everyone = frozenset("ABC")
    sides = {
        Phase.PREFILL: PhaseCandidates(prefill, everyone),
        Phase.DECODE: PhaseCandidates(decode, everyone),
    }
    assert chosen(mixed, sides=sides, at=mixed) == expected


NAMES = st.sampled_from("ABCD")
POINTS = st.lists(
    st.builds(
        lambda step, requests, tokens, keys, times: point(
            step, 1 << requests, tokens, tokens << keys, **times
        ),
        st.sampled_from(["prefill", "decode"]),
        st.integers(0, 3),
        st.sampled_from([1, 8]),
        st.integers(0, 3),
        st.dictionaries(NAMES, st.floats(1, 9), min_size=1),
    ),
    min_size=1,
    max_size=12,
)


@given(POINTS, st.booleans(), NAMES, st.frozensets(NAMES))
def test_no_table_makes_a_measured_point_slower(points, captured, declared, admitted):
    sides = {phase: PhaseCandidates(declared, admitted | {declared}) for phase in Phase}
    for each in compare_points(times_of(*points), sides, captured=captured):
        assert each.picked in admitted | {declared}
        assert each.picked_us <= each.default_us
        if each.picked != each.default:
            assert each.picked_us * (1 + MARGIN) <= each.default_us * 1.000001


# --- Selection ----------------------------------------------------------------------------------


def test_a_measurement_decides_and_is_reported_with_numbers(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    in_force(monkeypatch, path, {SPEC: FAST_REFERENCE})
    prefill, decode = explain(SPEC, "cpu")
    assert (prefill.picked, prefill.source) == ("TORCH_SDPA", Source.PLATFORM)
    assert prefill.measured is None
    assert (decode.picked, decode.source) == ("REFERENCE", Source.MEASURED)
    for part in (
        "10.0 us instead of 20.0 us",
        "decode of 4 requests with 64 keys each: ",
        str(path),
    ):
        assert part in decode.because
    data = json.loads(json.dumps(decode.asdict()))
    assert data["source"] == "measured table"
    assert data["measured"]["points"] == [
        {
            "step": "decode",
            "requests": 4,
            "tokens": 4,
            "keys": 256,
            "picked": "REFERENCE",
            "picked_us": 10.0,
            "declared": "TORCH_SDPA",
            "declared_us": 20.0,
        }
    ]
    flags = "--num-heads 8 --num-kv-heads 2 --head-size 64 --dtype float32 --block-size 16"
    shown = CliRunner().invoke(app, ["explain", *flags.split(), "--device", "cpu"])
    assert "10.0 us instead of 20.0 us" in " ".join(shown.output.split())


def test_the_order_decides_if_points_disagree(tmp_path, monkeypatch):
    points = [*FAST_REFERENCE, point("decode", 64, 1, 64, REFERENCE=30, TORCH_SDPA=20)]
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: points})
    (report,) = explain(SPEC, "cpu", phase=Phase.DECODE)
    assert (report.picked, report.source) == ("TORCH_SDPA", Source.PLATFORM)
    assert "go to REFERENCE near 1 of 2 measured points" in report.because
    assert report.others == ("REFERENCE",)


def test_one_backend_for_both_phases_must_be_faster_in_both(tmp_path, monkeypatch):
    in_force(monkeypatch, tmp_path / "one.json", {SPEC: FAST_REFERENCE})
    assert resolve(SPEC, "cpu").name == "REFERENCE"
    slow = point("prefill", 4, 64, 64, REFERENCE=30, TORCH_SDPA=20)
    in_force(monkeypatch, tmp_path / "two.json", {SPEC: [*FAST_REFERENCE, slow]})
    assert resolve(SPEC, "cpu").name == "TORCH_SDPA"
    assert resolve(SPEC, "cpu", phase=Phase.DECODE).name == "REFERENCE"


def test_overrides_outrank_the_table(tmp_path, monkeypatch):
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: FAST_REFERENCE})

    def pick(**arguments):
        selection = resolve(SPEC, "cpu", phase=Phase.DECODE, **arguments)
        return selection.name, selection.source

    assert pick() == ("REFERENCE", Source.MEASURED)
    assert pick(backend="TORCH_SDPA") == ("TORCH_SDPA", Source.ARGUMENT)
    assert pick(backend="decode=TORCH_SDPA?") == ("TORCH_SDPA", Source.ARGUMENT)
    assert pick(backend="-REFERENCE") == ("TORCH_SDPA", Source.PLATFORM)
    with attention_backend("full=TORCH_SDPA"):
        assert pick() == ("TORCH_SDPA", Source.CONTEXT)
    with monkeypatch.context() as world:
        world.setenv("ATTN_DISPATCH_BACKEND", "TORCH_SDPA")
        assert pick() == ("TORCH_SDPA", Source.ENVIRONMENT)
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick() == ("TORCH_SDPA", Source.PLATFORM)


def test_a_table_does_not_make_a_request_ambiguous(tmp_path, monkeypatch):
    """With a rule for one phase and a request for one backend, times must not split the pick."""
    slow = point("prefill", 4, 64, 64, REFERENCE=30, TORCH_SDPA=20)
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: [*FAST_REFERENCE, slow]})
    assert resolve(SPEC, "cpu", backend="decode=-REFERENCE_MLA").name == "TORCH_SDPA"


def test_only_supported_backends_are_picked(tmp_path, monkeypatch):
    points = [point("decode", 4, 1, 64, NO_SUCH=1, NARROW=2, REFERENCE=10, TORCH_SDPA=20)]
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: points})
    assert resolve(SPEC, "cpu", phase=Phase.DECODE).name == "REFERENCE"
    with registered(make_backend("NARROW", num_heads=OneOf(1))):
        assert resolve(SPEC, "cpu", phase=Phase.DECODE).name == "REFERENCE"
    with registered(make_backend("NARROW")):
        assert resolve(SPEC, "cpu", phase=Phase.DECODE).name == "NARROW"


def test_a_substitute_accepts_the_planned_cache():
    points = [point("decode", 4, 1, 64, CHOOSY=2, TORCH_SDPA=20)]
    tables = (table_of({SPEC: points}),)
    cpu = detect_device("cpu")
    with registered(make_backend("CHOOSY", kv_cache_layout=OneOf(None, "NHD"))):
        assert select(SPEC, cpu, phase=Phase.DECODE, tables=tables).name == "TORCH_SDPA"
        nhd = SPEC.replace(kv_cache_layout="NHD")
        assert select(nhd, cpu, phase=Phase.DECODE, tables=tables).name == "CHOOSY"


def test_a_plan_ignores_the_table(tmp_path, monkeypatch):
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: FAST_REFERENCE})
    with_table = plan_kv_cache({"layer": SPEC.replace(block_size=None)}, "cpu")
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", "off")
    assert with_table == plan_kv_cache({"layer": SPEC.replace(block_size=None)}, "cpu")


def test_select_uses_only_the_given_tables(tmp_path, monkeypatch):
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: FAST_REFERENCE})
    cpu = detect_device("cpu")
    assert select(SPEC, cpu, phase=Phase.DECODE).name == "TORCH_SDPA"
    tables = (table_of({layer(): FAST_REFERENCE}), table_of({SPEC: FAST_REFERENCE}))
    assert select(SPEC, cpu, phase=Phase.DECODE, tables=tables).name == "REFERENCE"


def test_select_reads_nothing_but_its_arguments(monkeypatch):
    cpu, candidates = detect_device("cpu"), registry.candidates()
    tables = (table_of({SPEC: FAST_REFERENCE}),)
    with monkeypatch.context() as world:
        world.setattr("os.environ", Forbidden("os.environ"))
        world.setattr("builtins.open", Forbidden("a file"))
        pick = select(SPEC, cpu, phase=Phase.DECODE, candidates=candidates, tables=tables)
    assert pick.source is Source.MEASURED


# --- What it costs ------------------------------------------------------------------------------


def test_choosing_takes_microseconds():
    """The minimum of many runs. The bound is generous, for machines that are busy."""
    grid = itertools.product((1, 4, 16, 64, 256), (256, 1024, 4096, 16384))
    points = [point("decode", n, 1, length, A=20, B=10) for n, length in grid]
    routes = routes_of(times_of(*points), SIDES, captured=False)
    router = Router(dict.fromkeys(Phase, "A"), routes)
    batch = AttentionBatch.create([1] * 64, [4000] * 64)
    assert router(batch) == (("B", None),)  # it also fills the cached properties of the batch

    def mean_us():
        start = time.perf_counter()
        for _ in range(100):
            router(batch)
        return (time.perf_counter() - start) * 1e4

    assert min(mean_us() for _ in range(50)) < 50


# --- Kernels of other packages -------------------------------------------------------------------


def table_served_by(provider):
    """A table in which REFERENCE is the fastest, with the kernels of this provider."""
    times = dataclasses.replace(times_of(*FAST_REFERENCE), kernel_provider={"REFERENCE": provider})
    return dataclasses.replace(table_of({}), layers={layer_key(SPEC): times})


@pytest.mark.parametrize(("provider", "picked"), [("ours", "REFERENCE"), ("others", "TORCH_SDPA")])
def test_times_of_another_packages_kernels_are_ignored(provider, picked, monkeypatch):
    reference = registry.candidates()["REFERENCE"].backend_cls
    monkeypatch.setattr(reference, "kernel_provider", classmethod(lambda *_: "ours"))
    selection = select(
        SPEC, detect_device("cpu"), phase=Phase.DECODE, tables=(table_served_by(provider),)
    )
    assert selection.name == picked


def test_a_backend_whose_kernel_provider_raises_is_not_picked(monkeypatch):
    def fail(*_):
        raise RuntimeError("no provider")

    reference = registry.candidates()["REFERENCE"].backend_cls
    monkeypatch.setattr(reference, "kernel_provider", classmethod(fail))
    tables = (table_served_by("ours"),)
    assert select(SPEC, detect_device("cpu"), phase=Phase.DECODE, tables=tables).name == (
        "TORCH_SDPA"
    )


def test_times_apply_only_to_the_measured_flash_attention_package():
    """The table of the H200 was measured with vLLM's build of version 3."""
    spec = AttentionSpec(
        num_heads=64, num_kv_heads=8, head_size=64, dtype=torch.bfloat16, block_size=16
    )
    shipped = Path(store.__file__).parent / "nvidia-h200.json"
    tables = (read_table(shipped),)
    picks = {}
    for present in ("vllm", "flash_attn_interface"):
        found = [Library(name, "unknown") for name in ("torch", "triton", present)]
        device = known_device("H200").with_libraries(*found)
        picks[present] = select(spec, device, phase=Phase.PREFILL, tables=tables).name
    assert picks == {"vllm": "FLASH_ATTN", "flash_attn_interface": "HOPPER_ATTN"}
