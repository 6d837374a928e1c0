"""The vLLM plug-in on the files of vLLM's released wheels: `make contracts`."""

from __future__ import annotations

import inspect

import pytest
import torch

from attn_dispatch.integrations.vllm import PLUGIN
from support import fake_vllm, vllm_cases
from support.vllm_files import VERSIONS, vllm_engine

pytestmark = pytest.mark.contracts


@pytest.fixture(params=VERSIONS)
def engine(request, monkeypatch):
    with vllm_engine(request.param, monkeypatch) as found:
        yield found


def test_the_versions_that_doctor_names_are_those():
    assert tuple(PLUGIN.tested) == VERSIONS == fake_vllm.VERSIONS


@pytest.mark.parametrize("index", range(6))
def test_a_step_uses_the_memory_of_the_engine(engine, index):
    layouts = vllm_cases.LAYOUTS[engine.version]
    if index < len(layouts):
        vllm_cases.check_layout(engine, layouts[index])


@pytest.mark.parametrize("name", vllm_cases.FEATURES)
def test_features_change_the_output_as_they_should(engine, name):
    vllm_cases.check_feature(engine, name)


@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_sees_both_ways(engine, window):
    vllm_cases.check_encoder_only(engine, window)


@pytest.mark.parametrize(
    "check",
    [
        vllm_cases.check_bounds,
        vllm_cases.check_cascade,
        vllm_cases.check_kv_sharing,
        vllm_cases.check_fp8_cache,
        vllm_cases.check_fp8_output,
        vllm_cases.check_profiling,
        vllm_cases.check_validation,
        vllm_cases.check_rejected_steps,
    ],
)
def test_the_plugin(engine, check):
    check(engine)


@pytest.mark.parametrize(
    "check",
    [vllm_cases.check_start_up_errors, vllm_cases.check_overrides, vllm_cases.check_registration],
)
def test_the_plugin_in_an_environment(engine, check, monkeypatch):
    check(engine, monkeypatch)
