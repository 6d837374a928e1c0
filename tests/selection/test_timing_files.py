"""Files of times: reading, rejecting, choosing and writing them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from pathlib import Path

import platformdirs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import attention, explain, resolve
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.overrides import Source
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.selector import select
from attn_dispatch.selection.timings import store
from attn_dispatch.selection.timings.policy import split_route
from attn_dispatch.selection.timings.reader import parse_table, read_table
from attn_dispatch.selection.timings.store import (
    TuningWarning,
    conflict_with,
    machine_of,
    write_table,
)
from support.selection import layer
from support.timing_tables import FAST_REFERENCE, H200, MEASURED, in_force, point, table_of

SPEC = layer(dtype=torch.float32)
#: The tables of this package.
BROUGHT = sorted(store._SHIPPED.glob("*.json"))


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


# --- Reading a file -----------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**301),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["decode", "REFERENCE", "os:system", "__import__('os')", "-" * 9999]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


def good_data():
    points = [
        point("decode", 4, 1, 64, {"REFERENCE": 3.0}, ("BROKEN",), REFERENCE=10, TORCH_SDPA=20),
        point("mixed", 4, 8, 64, REFERENCE=10, TORCH_SDPA=20, REFERENCE__TORCH_SDPA=15),
    ]
    return table_of({SPEC: points, layer(logits_soft_cap=3.0): points}).asdict()


def places_in(data, path=()):
    """Every place in nested data: the keys that lead there."""
    yield path
    inside = data if isinstance(data, dict) else {}
    if isinstance(data, list):
        inside = dict(enumerate(data))
    for key, value in inside.items():
        yield from places_in(value, (*path, key))


def changed(data, path, value):
    if not path:
        return value
    data = dict(data) if isinstance(data, dict) else list(data)
    data[path[0]] = changed(data[path[0]], path[1:], value)
    return data


PLACES = list(places_in(good_data()))


@given(JSON)
def test_any_other_json_is_rejected_with_a_message(data):
    with pytest.raises(InvalidInputError, match="is not a table of times: "):
        parse_table(data, "it")


@given(st.sampled_from(PLACES), JSON)
def test_a_table_with_one_changed_value_is_read_or_rejected(place, value):
    data = changed(json.loads(json.dumps(good_data())), place, value)
    try:
        table = parse_table(data, "it")
    except InvalidInputError as error:
        message = str(error)
    else:
        for times in table.layers.values():
            assert all(0 < us < 1e11 for p in times.points for us in p.times_us.values())
        return
    assert message.startswith("it is not a table of times: ")
    assert len(message) < 500


@given(st.sampled_from([place for place in PLACES if place]))
def test_missing_and_unknown_keys_are_rejected(place):
    *outer, name = place
    if isinstance(name, int) or outer[-1:] in (["times_us"], ["host_us"], ["versions"]):
        return  # a list may be shorter, and names are the measurer's
    data = json.loads(json.dumps(good_data()))
    inside = data
    for key in outer:
        inside = inside[key]
    inside["surplus"] = inside[name]
    with pytest.raises(InvalidInputError, match="unknown key 'surplus'"):
        parse_table(data, "it")
    del inside["surplus"], inside[name]
    if name not in ("host_us", "failed"):
        with pytest.raises(InvalidInputError, match=r"has no|version is None"):
            parse_table(data, "it")


WRONG = {
    "a later version": (("version",), 2),
    "a time of nothing": (("layers", 0, "points", 0, "times_us", "REFERENCE"), 0),
    "a negative time": (("layers", 0, "points", 0, "times_us", "REFERENCE"), -1.0),
    "no number": (("layers", 0, "points", 0, "times_us", "REFERENCE"), float("nan")),
    "no end": (("layers", 0, "points", 0, "times_us", "REFERENCE"), float("inf")),
    "true": (("layers", 0, "points", 0, "times_us", "REFERENCE"), True),
    "no requests": (("layers", 0, "points", 0, "requests"), 0),
    "half a request": (("layers", 0, "points", 0, "requests"), 1.5),
    "another step": (("layers", 0, "points", 0, "step"), "train"),
    "code": (("layers", 0, "points", 0, "times_us"), {"os:system": 1.0}),
    "a pair where none can be": (("layers", 0, "points", 0, "times_us"), {"A+B": 1.0}),
    "a repeated layer": (("layers", 1, "layer"), good_data()["layers"][0]["layer"]),
    "too many points": (("layers", 0, "points"), good_data()["layers"][0]["points"] * 1000),
    "no time": (("measured",), "yesterday"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_are_rejected(wrong):
    with pytest.raises(InvalidInputError, match="is not a table of times"):
        parse_table(changed(good_data(), *WRONG[wrong]), "it")


def test_a_written_table_is_read_back(tmp_path):
    table = parse_table(good_data(), "it")
    write_table(table, tmp_path / "new folder" / "table.json")
    again = read_table(tmp_path / "new folder" / "table.json")
    assert again.asdict() == table.asdict() == good_data()
    assert (again.machine, again.measured) == (table.machine, MEASURED)


BAD_FILES = {
    "empty": b"",
    "not text": b"\xff\xfe\x00\xd8",
    "not JSON": b"{",
    "too large": b" " * (5 << 20),
    "nested without end": b"[" * 1_000_000,
    "a number without end": b'{"version": ' + b"9" * 10_000 + b"}",
    "another file": b'{"model_type": "llama"}',
    "nested as deep as the parser goes": b'{"version": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a repeated key": b'{"version": 1, "version": 1}',
    "half a character": b'{"version": "\\ud800", "\\udfff": 1}',
    "no number": b'{"version": NaN}',
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in the cache"])
def test_a_bad_file_is_set_aside_with_one_warning(content, named, tmp_path, monkeypatch):
    path = tmp_path / "table.json" if named else store.table_path(machine_of(detect_device("cpu")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if named:
        monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(path))
    with pytest.warns(TuningWarning, match="attn-dispatch tune") as caught:
        picks = [(resolve(spec, "cpu").name, *explain(spec, "cpu")) for spec in (SPEC, layer())]
    assert [pick for pick, *_ in picks] == ["TORCH_SDPA"] * 2
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


HOSTILE = {
    "a FIFO": os.mkfifo if hasattr(os, "mkfifo") else None,
    "a folder": os.mkdir,
    "a link to nothing": lambda path: os.symlink("nowhere", path),
    "a loop of links": lambda path: os.symlink(path.name, path),
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a file without end": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("where", ["named", "in the cache", "in the cache, of other versions"])
def test_selection_does_not_wait_for_a_special_file(kind, where, tmp_path, monkeypatch):
    path = store.table_path(machine_of(detect_device("cpu")))
    if where == "named":
        path = tmp_path / "table.json"
        monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(path))
    elif where == "in the cache, of other versions":
        path = path.with_name("cpu-0123456789ab.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    HOSTILE[kind](path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve(SPEC, "cpu").name == "TORCH_SDPA"
    assert [each.category for each in caught] in ([], [TuningWarning])
    assert len(caught) == 1 or where == "in the cache"


@contextlib.contextmanager
def another_user():
    """Root may look into every folder: go on as a user that may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(4242)
    try:
        yield
    finally:
        os.seteuid(0)


def _closed(path: Path) -> None:
    path.mkdir()
    path.chmod(0)


FOLDERS = {
    "missing": lambda path: None,
    "a file": lambda path: path.write_text("mine"),
    "a FIFO": HOSTILE["a FIFO"],
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "in a folder that is closed": lambda path: _closed(path.parent / "closed"),
    "closed": _closed,
}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="is about permissions of POSIX")
@pytest.mark.parametrize("kind", FOLDERS)
def test_selection_works_whatever_the_cache_folder_is(kind, tmp_path, monkeypatch):
    resolve(SPEC, "cpu")  # what is imported is imported
    folder = tmp_path / "it"
    FOLDERS[kind](folder)
    if kind == "in a folder that is closed":
        folder = tmp_path / "closed" / "it"
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(folder))
    query = torch.zeros(2, 1, 8)
    try:
        with another_user(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve(SPEC, "cpu").name == "TORCH_SDPA"
            assert attention(query, query, query).shape == query.shape
    finally:
        for path in tmp_path.iterdir():
            if path.is_dir():
                path.chmod(0o700)


@pytest.mark.parametrize("kind", ["raises", "no home", "relative"])
def test_selection_works_without_a_cache_folder(kind, monkeypatch):
    def user_cache_dir(*_, **__):
        if kind == "raises":
            raise RuntimeError("no home directory")
        return "~/.cache/attn-dispatch" if kind == "no home" else "cache"

    monkeypatch.delenv("ATTN_DISPATCH_CACHE_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_dir", user_cache_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(SPEC, "cpu").name == "TORCH_SDPA"
    with pytest.raises(InvalidInputError, match="Set ATTN_DISPATCH_CACHE_DIR to a folder"):
        store.table_path(machine_of(detect_device("cpu")))


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "/dev/zero"])
def test_a_file_that_cannot_be_opened_is_set_aside(path, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", path)
    with pytest.warns(TuningWarning):
        assert resolve(SPEC, "cpu").name == "TORCH_SDPA"


@given(st.binary(max_size=200) | JSON.map(lambda data: json.dumps(data).encode()))
def test_selection_works_whatever_the_file_holds(content):
    with pytest.MonkeyPatch.context() as world, warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        folder = store.cache_folder()
        folder.mkdir(exist_ok=True)
        (folder / "any.json").write_bytes(content)
        world.setenv("ATTN_DISPATCH_TUNING", str(folder / "any.json"))
        store.forget_tables()
        assert select(
            SPEC, detect_device("cpu"), tables=store.tables_for(detect_device("cpu"))
        ).name


# --- Where a table counts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem", "problem_of_a_shipped_one"),
    [
        ({}, "", ""),
        ({"device": "NVIDIA H100"}, "it is of NVIDIA H200", "it is of NVIDIA H200"),
        ({"driver": "580.2"}, "driver 570.1, and here is 580.2", ""),
        ({"versions": (("torch", "2.11.1"), ("triton", "3.6.0"))}, "torch 2.11.0", ""),
        ({"versions": (("torch", "2.12.0"), ("triton", "3.6.0"))}, "torch 2.11.0", "torch 2.11"),
        ({"versions": (("torch", "2.11.0+cu130"),)}, "triton 3.6.0, and here is none", ""),
        ({"versions": (*H200.versions, ("flashinfer", "0.7"))}, "flashinfer missing", ""),
        ({"versions": (("torch", "unknown"), ("triton", "unknown"))}, "torch 2.11.0", ""),
    ],
    ids=str,
)
def test_conflicts_of_a_table_with_a_machine(change, problem, problem_of_a_shipped_one):
    table = table_of({SPEC: FAST_REFERENCE}, H200)
    now = dataclasses.replace(H200, **change)
    for found, expected in (
        (conflict_with(table, now), problem),
        (conflict_with(table, now, shipped=True), problem_of_a_shipped_one),
    ):
        assert (expected in found) if expected else (found == "")


def test_a_table_of_this_machine_applies_until_a_version_changes(monkeypatch):
    machine = machine_of(detect_device("cpu"))
    write_table(table_of({SPEC: FAST_REFERENCE}), store.table_path(machine))
    assert resolve(SPEC, "cpu", phase=Phase.DECODE).source is Source.MEASURED
    newer = detect_device("cpu").with_libraries(Library("torch", "99.0"))
    with pytest.warns(TuningWarning, match=r"measured with torch .*here is 99\.0") as caught:
        assert resolve(SPEC, newer, phase=Phase.DECODE).source is Source.PLATFORM
    assert len(caught) == 1
    with warnings.catch_warnings():  # for a device elsewhere, it gives no warning
        warnings.simplefilter("error")
        assert explain(SPEC, "H200")[1].source is Source.PLATFORM


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 1 2026", "570.86.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release",
            "580.65.06",
        ),
        ("6.10.5\n", "6.10.5"),
        ("", None),
    ],
    ids=str,
)
def test_the_drivers_version_is_read(text, version, tmp_path, monkeypatch):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(store, "_DRIVER_FILES", {"nvidia": str(tmp_path / "version")})
    assert store.driver_version("nvidia") == version
    assert store.driver_version("cpu") is None


def test_a_device_with_a_longer_name_is_another_device(cache):
    near = dataclasses.replace(H200, device="NVIDIA H200 NVL")
    write_table(table_of({SPEC: FAST_REFERENCE}, near), store.table_path(near))
    h200 = known_device("H200").with_libraries(Library("torch", "2.11.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.tables_for(h200) == ()


def test_a_shipped_table_applies_without_one_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_SHIPPED", tmp_path)
    h200 = known_device("H200").with_libraries(Library("torch", "2.11.3"), Library("triton", "3.6"))
    in_order = [v.name for v in select(SPEC, h200).verdicts if v.supported]
    points = [point("decode", 4, 1, 64, **{in_order[0]: 20, in_order[1]: 10})]
    write_table(table_of({SPEC: points}, H200), store.shipped_path(H200))
    assert (tmp_path / "nvidia-h200.json").exists()
    assert resolve(SPEC, h200, phase=Phase.DECODE).name == in_order[1]
    assert explain(SPEC, "H200")[1].source is Source.MEASURED
    other = h200.with_libraries(Library("torch", "2.12.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.forget_tables()
        assert resolve(SPEC, other, phase=Phase.DECODE).source is Source.PLATFORM
    # The table of this machine decides.
    own = [point("decode", 4, 1, 64, **{in_order[0]: 20, in_order[1]: 30})]
    machine = machine_of(h200)
    write_table(table_of({SPEC: own}, machine), store.table_path(machine))
    store.forget_tables()
    assert explain(SPEC, h200, phase=Phase.DECODE)[0].picked == in_order[0]


@pytest.mark.parametrize("path", BROUGHT, ids=lambda path: path.name)
def test_shipped_tables_are_valid_and_name_builtin_backends(path):
    table = read_table(path)
    assert store.shipped_path(table.machine).name == path.name
    points = [point for times in table.layers.values() for point in times.points]
    assert points
    assert {part for p in points for name in p.times_us for part in split_route(name)} <= set(
        BUILTIN
    )


def test_a_table_of_another_device_is_set_aside(tmp_path, monkeypatch):
    in_force(monkeypatch, tmp_path / "table.json", {SPEC: FAST_REFERENCE}, H200)
    with pytest.warns(TuningWarning, match="it is of NVIDIA H200"):
        assert resolve(SPEC, "cpu", phase=Phase.DECODE).source is Source.PLATFORM


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_is_written_completely_or_not_at_all(fails, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_table(table_of({SPEC: FAST_REFERENCE}), path)
    before = path.read_bytes()

    def stop(*_):
        raise OSError("no space left")

    with monkeypatch.context() as world:
        world.setattr(os, fails, stop)
        with pytest.raises(InvalidInputError, match="no space left"):
            write_table(table_of({SPEC: FAST_REFERENCE * 9}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
