"""A model that is split over two processes answers like a whole one."""

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


def test_two_processes_answer_like_one(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    words = ["generate", "--model", str(save_tiny_model(tmp_path / "model")), "--device", "cpu"]
    words += ["--cache-bytes", "100000", "--max-new-tokens", "8", "--json", "--raw"]
    words += ["--prompt", "Hello", "--prompt", "A longer prompt"]
    whole = json.loads(CliRunner().invoke(app, words).stdout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), *words, "--tensor-parallel"],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    split = json.loads(done.stdout)  # one process prints
    ids = lambda run: [each["token_ids"] for each in run["answers"]]
    assert ids(split) == ids(whole)
    # Half the heads take half the memory.
    assert split["limits"]["num_blocks"] == 2 * whole["limits"]["num_blocks"]
