"""What the library logs: the backends of a layer, fallbacks, timing tables, plug-ins."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from attn_dispatch import Attention, attention, resolve
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.failure_record import BackendFallbackWarning, forget_failures
from attn_dispatch.selection.registry import Registry
from attn_dispatch.selection.timings import store
from attn_dispatch.selection.timings.store import TuningWarning
from support.cases import layer_spec
from support.fallback import faulty
from support.selection import registered
from support.timing_tables import FAST_REFERENCE, in_force

SIZES = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


def made(**more) -> Attention:
    return Attention(**SIZES, prefix="layers.3", device="cpu", **more)


@pytest.fixture
def messages(caplog, monkeypatch):
    """The records at INFO and above, as (level, text)."""
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", "off")
    caplog.set_level(logging.INFO, logger="attn_dispatch")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_layer_logs_one_line_for_each_phase(messages):
    made()
    assert messages() == [
        ("INFO", f"layer layers.3: {phase} TORCH_SDPA, first in the platform's order")
        for phase in Phase
    ]


def test_equal_layers_log_their_own_lines(messages):
    made()
    made()
    assert len(messages()) == 4


def test_an_override_is_logged_as_the_reason(messages):
    made(backend="REFERENCE")
    assert messages()[0] == (
        "INFO",
        "layer layers.3: prefill REFERENCE, selected by the argument 'REFERENCE'",
    )


def test_measured_times_are_logged(messages, tmp_path, monkeypatch):
    spec = layer_spec(**SIZES, block_size=16)
    in_force(monkeypatch, tmp_path / "table.json", {spec: FAST_REFERENCE})
    made()
    assert messages()[-1] == (
        "INFO",
        "layer layers.3: decode REFERENCE, measured 10.0 us vs 20.0 us",
    )


def test_a_fallback_is_logged_as_a_warning(messages):
    query = torch.randn(3, 2, 8)
    try:
        with registered(faulty("launch")), pytest.warns(BackendFallbackWarning):
            attention(query, query, query)
    finally:
        forget_failures()
    (level, text) = messages()[-1]
    assert level == "WARNING"
    assert text.startswith("TORCH_SDPA failed when it was called: RuntimeError: no kernel image")
    assert "From now on REFERENCE serves its layers" in text


def test_a_table_that_is_set_aside_is_logged_as_a_warning(messages, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", str(tmp_path / "missing.json"))
    with pytest.warns(TuningWarning):
        resolve(layer_spec(), "cpu")
    (level, text) = messages()[-1]
    assert level == "WARNING"
    assert "It is set aside" in text


@pytest.mark.parametrize(
    ("target", "level", "text"),
    [
        ("attn_dispatch.backends.reference.torch_ref:ReferenceBackend", "INFO", "loaded from"),
        ("no_such_module:Backend", "WARNING", "is not available: no_such_module:Backend cannot"),
    ],
)
def test_a_plug_in_is_logged(target, level, text, messages, monkeypatch):
    monkeypatch.setattr(
        "attn_dispatch.selection.registry._entry_points", lambda: {"REFERENCE": target}
    )
    Registry({}).candidates()
    ((found, message),) = messages()
    assert found == level
    assert message.startswith(f"plug-in REFERENCE {text}")


def test_nothing_is_logged_on_a_call(messages):
    query = torch.randn(3, 2, 8)
    attention(query, query, query)
    before = len(messages())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(query, query, query)
    assert len(messages()) == before
