"""Setup of every test: a clean environment, one thread, a hypothesis profile."""

from __future__ import annotations

import contextlib
import gc
import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from support.selection import fake_site  # after the variable is set

hypothesis.settings.register_profile("ci", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile("slow", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=400, deadline=None)
_PROFILE = "slow" if torch.cuda.is_available() else "ci"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", _PROFILE))

#: Devices of the property tests.
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Garbage collections, which `bench` and others ask for, do not visit modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc) -> None:
    """Without a GPU, of the many cases that need one only the first is collected, to be skipped."""
    if torch.cuda.is_available():
        return
    definition = metafunc.definition
    needs_gpu = definition.get_closest_marker("gpu") is not None
    definition.own_markers[:] = [
        _without_gpu_cases(mark, needs_gpu) if mark.name == "parametrize" else mark
        for mark in definition.own_markers
    ]


def _without_gpu_cases(mark: pytest.Mark, needs_gpu: bool) -> pytest.Mark:
    """A parametrize mark with the first of its values that need a GPU and all the others."""
    names, values, *more = mark.args
    values, ids = list(values), mark.kwargs.get("ids")
    on_gpu = [needs_gpu or any(m.name == "gpu" for m in getattr(v, "marks", ())) for v in values]
    kept = [i for i, is_on_gpu in enumerate(on_gpu) if not is_on_gpu or i == on_gpu.index(True)]
    kwargs = dict(mark.kwargs)
    if ids is not None and not callable(ids):
        ids = list(ids)
        kwargs["ids"] = [ids[i] for i in kept]
    return pytest.mark.parametrize(names, [values[i] for i in kept], *more, **kwargs).mark


#: A test with this many cases of two parameters or more is sampled, of this many cases one.
_MANY_CASES, _EVERY = 20, 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Of a test that is sampled, all but some cases get the mark `slow`.

    Those are tests with the mark `sampled`, and any with many combinations of parameters.
    """
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        mark = each[0].get_closest_marker("sampled")
        has_many = len(each) >= _MANY_CASES and len(each[0].callspec.params) > 1
        if mark is None and not has_many:
            continue
        every = mark.args[0] if mark else _EVERY
        chosen = _sample(each, -(-len(each) // every))
        for item in each:
            if item not in chosen:
                item.add_marker("slow")


def _sample(items: list[pytest.Function], number: int) -> list[pytest.Function]:
    """About `number` cases of one test, and with each value of each parameter at least one."""
    values = {  # cases share the objects that are their values
        item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in items
    }
    missing, chosen = set().union(*values.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(values[item] & missing)))
        missing -= values[chosen[-1]]
    left = [item for item in items if item not in chosen]
    more = max(0, number - len(chosen))
    return chosen + left[:: -(-len(left) // more)] if more else chosen


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Unset the variables of overrides, checks and timing tables; a test sets what it needs."""
    for name in list(os.environ):
        if name.startswith("ATTN_DISPATCH_") or name == "VLLM_ATTENTION_BACKEND":
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", "off")  # a timing table would change the picks


@pytest.fixture
def site(tmp_path):
    """A folder on sys.path for packages that a test installs: a FakeSite."""
    with fake_site(tmp_path) as folder:
        yield folder


@pytest.fixture
def misleading_defaults():
    """A context in which tensors made without a device and dtype are on meta, in bfloat16."""

    @contextlib.contextmanager
    def mislead():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(before)

    return mislead


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)
