"""The examples run, and a backend that only an entry point names is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from attn_dispatch import environment
from support.paths import EXAMPLES


def run(*arguments, path=""):
    """What a fresh Python prints, without overrides and tables from outside."""
    settings = {variable.name for variable in environment.VARIABLES}
    env = {name: value for name, value in os.environ.items() if name not in settings}
    env |= {"PYTHONPATH": str(path), "ATTN_DISPATCH_TUNING": "off"}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minimal_backend_runs():
    printed = run(str(EXAMPLES / "minimal_backend.py"))
    assert "with a soft cap: MINIMAL" in printed
    assert "and with sinks:  REFERENCE" in printed
    assert "MINIMAL: sinks=True is not supported" in printed
    assert "MINIMAL and REFERENCE agree" in printed


def test_a_model_runs_with_and_without_graphs():
    printed = run(str(EXAMPLES / "cuda_graphs.py"))
    for kind in ("decode", "drafts", "chunks"):
        assert re.search(
            rf"^{kind}: .* tokens, the largest difference from .* is 0\.0", printed, re.M
        )


def test_latent_attention_equals_float64():
    printed = run(str(EXAMPLES / "mla_layer.py"))
    found = re.findall(r"^a (.*) of \d+, (\w+): largest difference (\S+)$", printed, re.M)
    forms = [(what, form) for what, form, _ in found]
    assert forms == [
        ("prompt", "expanded"), ("chunk", "expanded"),
        ("small chunk", "absorbed"), ("decode", "absorbed"),
    ]  # fmt: skip
    assert all(float(error) < 2e-6 for _, _, error in found)


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_a_transformers_model_generates_the_same_tokens():
    printed = run(str(EXAMPLES / "transformers_generate.py"))
    assert "same tokens as eager: True" in printed
    assert "sliding_window, decode: REFERENCE, 2 layers" in printed
    assert "full, prefill: REFERENCE, 2 layers" in printed


def test_keys_of_a_request_are_on_two_ranks():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, str(EXAMPLES / "context_parallel.py"))
    errors = re.findall(r"^(.*): largest difference from float64 (\S+)$", printed, re.M)
    assert [what for what, _ in errors] == [
        "prompt, ring",
        *(f"token {n}" for n in (101, 102, 103)),
    ]
    assert all(float(error) < 2e-6 for _, error in errors)
    assert "Keys on 2 ranks, this is rank 0" in printed


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_a_kernel_runs_on_emulated_gpus():
    printed = run(str(EXAMPLES / "emulate_kernel.py"))
    errors = re.findall(r"^softmax on (gfx\w+) \(emulated\).* largest error (\S+)$", printed, re.M)
    assert len(errors) == 5
    assert all(float(error) < 1e-7 for _, error in errors)
    assert "is outside of all regions" in printed
    assert "(emulate_kernel.py:27:" in printed


def test_minimal_backend_passes_its_verification():
    program = """
from attn_dispatch.conformance import verify
from minimal_backend import MinimalBackend
report = verify(MinimalBackend, "cpu")
print(*report.failures, sep="\\n")
print(report.passed)
"""
    assert run("-c", program, path=EXAMPLES) == "\nTrue\n"


#: The second entry point names a module that does not exist.
ENTRY_POINTS = """
[attn_dispatch.backends]
MINIMAL = minimal_backend:MinimalBackend
BROKEN = no_such_module:Backend
TORCH_SDPA = minimal_backend:MinimalBackend
"""

PROGRAM = """
import torch
from attn_dispatch import AttentionSpec, explain, resolve

spec = AttentionSpec(num_heads=2, head_size=16, dtype=torch.float32, logits_soft_cap=5.0)
selection = resolve(spec, "cpu")
print(selection.name, selection.full_cls_name)
print(*[v.reasons[0].code for v in selection.verdicts if v.name == "BROKEN"])
print(resolve(spec.replace(logits_soft_cap=None), "cpu").full_cls_name)
"""


def test_an_entry_point_is_enough(tmp_path):
    """A package's record is all that an installer leaves behind of an entry point."""
    record = tmp_path / "minimal_backend-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: minimal-backend\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(ENTRY_POINTS)
    source = (EXAMPLES / "minimal_backend.py").read_text(encoding="utf-8")
    (tmp_path / "minimal_backend.py").write_text(source, encoding="utf-8")

    picked, broken, builtin = run("-c", PROGRAM, path=tmp_path).splitlines()
    assert picked == "MINIMAL ('minimal_backend', 'MinimalBackend')"
    assert broken == "load"
    assert "torch_sdpa" in builtin, "a plugin took the name of a built-in backend"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_in_the_readme(example):
    assert f"({example.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
