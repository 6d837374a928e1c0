"""A model, or its keys, split over two processes: the answers are those of one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5.24")

from typer.testing import CliRunner

from attn_dispatch.cli import app
from support.tiny_model import save_tiny_model

pytestmark = pytest.mark.models

MAIN = "from attn_dispatch.cli import main; main()"


@pytest.mark.parametrize("split", [["--tensor-parallel"], ["--context-parallel", "2"]], ids=str)
def test_two_processes_answer_like_one(split, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    words = ["generate", "--model", str(save_tiny_model(tmp_path / "model")), "--device", "cpu"]
    words += ["--cache-bytes", "100000", "--max-new-tokens", "8", "--json", "--raw"]
    words += ["--prompt", "Hello", "--prompt", "A longer prompt"]
    whole = json.loads(CliRunner().invoke(app, words).stdout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), *words, *split],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one process prints
    ids = lambda run: [each["token_ids"] for each in run["answers"]]
    assert ids(found) == ids(whole)
    # Each process keeps half of the heads, or every other token.
    tokens = lambda run: run["limits"]["num_blocks"] * run["block_size"]
    assert tokens(found) == 2 * tokens(whole)
