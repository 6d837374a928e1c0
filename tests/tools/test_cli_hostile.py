"""The command line with arbitrary values, files and streams: one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch.cli import app
from attn_dispatch.cli.streams import one_line
from support.tiny_model import save_tiny_model

LAYER = ["--num-heads=2", "--num-kv-heads=1", "--head-size=8", "--dtype=float32", "--block-size=4"]
TUNE = ["tune", *LAYER, "--device", "cpu", "--backends", "TORCH_SDPA,REFERENCE"]
TINY = [*TUNE, "--requests", "1", "--lengths", "32", "--rounds", "1", "--steps", "decode"]
SWEEP = ["bench", "--sweep", "batch", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def assert_rejected(*arguments, part=""):
    """The command ends with code 2 and one line on stderr."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 2500
    assert part in result.stderr


VALUES = {
    "5,000 digits": "9" * 5000,
    "negative": "-1",
    "nothing": "",
    "a blank": " ",
    "a word": "x",
    "beyond 64 bits": str(2**70),
    "not a number": "nan",
    "not UTF-8": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "a terminal's escape": "\x1b[31m\n\x07",
    "code": "__import__('os')",
}

#: An option or argument -> the command with a place for its value.
PLACES = {
    "explain num_heads": ["explain", *LAYER, "--num-heads", None],
    "explain sliding_window": ["explain", *LAYER, "--sliding-window", None],
    "explain soft cap": ["explain", *LAYER, "--logits-soft-cap", None],
    "explain mla": ["explain", *LAYER, "--mla", None],
    "explain dtype": ["explain", *LAYER, "--dtype", None],
    "explain attn_type": ["explain", *LAYER, "--attn-type", None],
    "explain device": ["explain", *LAYER, "--device", None],
    "explain backend": ["explain", *LAYER, "--backend", "prefill=", None],
    "explain without": ["explain", *LAYER, "--without", None],
    "explain phase": ["explain", *LAYER, "--phase", None],
    "explain config": ["explain", "--config", None],
    "demo requests": ["demo", "--requests", None],
    "demo device": ["demo", "--device", None],
    "generate model": ["generate", "--prompt", "x", "--model", None],
    "generate prompts": ["generate", "--model", "x", "--prompts", None],
    "generate tokens": ["generate", "--model", "x", "--max-new-tokens", None],
    "generate dtype": ["generate", "--model", "x", "--prompt", "x", "--dtype", None],
    "generate output": ["generate", "--model", "x", "--prompt", "x", "--output", None],
    "tune requests": [*TUNE, "--requests", None],
    "tune lengths": [*TUNE, "--lengths", None],
    "tune steps": [*TUNE, "--steps", None],
    "tune rounds": [*TUNE, "--rounds", None],
    "tune backends": [*TUNE, "--backends", "NO", None],
    "tune cases": [*TUNE[:1], "--device", "cpu", "--cases", None],
    "tune device": ["tune", *LAYER, "--device", None],
    "bench cases": ["bench", "--device", "cpu", "--cases", None],
    "bench sweep": ["bench", "--device", "cpu", "--sweep", None],
    "bench num_heads": [*SWEEP, "--num-heads", None],
    "bench dtype": [*SWEEP, "--dtype", None],
    "bench rounds": [*SWEEP, "--rounds", None],
    "bench backends": [*SWEEP, "--backends", "NO", None],
    "verify name": ["verify", "--", None],
    "verify device": ["verify", "REFERENCE", "--device", None],
    "verify only": ["verify", "REFERENCE", "--device", "cpu", "--quick", "--only", "no such", None],
    "doctor": ["doctor", "--", None],
    "a command": ["--", None],
}


#: (place, value) that are valid.
VALID = {("verify only", "nothing"), ("explain soft cap", "beyond 64 bits")}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_invalid_values_give_one_line(place, name):
    *before, _ = PLACES[place]
    if (place, name) in VALID:
        return
    given = [*before, VALUES[name]]
    if before[-1] in ("prefill=", "NO", "no such"):  # the value is appended
        given = [*before[:-1], before[-1] + VALUES[name]]
    assert_rejected(*given)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["demo", "--requests", "1000000000000"], "32"),
        ([*TUNE, "--requests", "1000000000000"], "accepted is 65536"),
        ([*TUNE, "--lengths", ",".join(map(str, range(1, 5000)))], "at most 64"),
        ([*TUNE, "--rounds", "1000000000000"], "100000"),
        ([*SWEEP, "--rounds", "1000000000000"], "100000"),
        ([*SWEEP, "--num-heads", "1000000000000"], "is too large"),
        ([*SWEEP, "--time-budget", "inf"], "not a number of seconds"),
        ([*TUNE, "--time-budget", "inf"], "not a number of seconds"),
        (["explain", *LAYER, "--sliding-window", str(2**40)], "no layer has"),
        (["explain", *LAYER, "--mla", f"{2**40},1,1,1"], "no layer has"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_numbers_are_limited_before_memory_is_allocated(arguments, part):
    assert_rejected(*arguments, part=part)


@pytest.mark.parametrize(
    "device", ["meta", "xpu", "mps", "vulkan", "cpu:-1", "cuda:99999", "cpu:x"]
)
@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["generate", "--model", "x", "--prompt", "x"],
        TINY,
        SWEEP,
        ["verify", "REFERENCE", "--quick"],
    ],
)
def test_missing_devices_give_one_line(command, device):
    try:
        torch.ones(1, device=device).add(1).item()
    except Exception:
        assert_rejected(*command, "--device", device, part="cannot be used here")
    else:
        pytest.skip("this machine has it")


CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "text": b"mine\n",
    "an object": b'{"mine": 1}',
    "a list": b"[1]",
    "nested without an end": b"[" * 1_000_000,
    "nested deeply": b'{"model_type": ' + b"[" * 900 + b"]" * 900 + b"}",
    "an integer of 5,000 digits": b'{"model_type": "llama", "num_hidden_layers": '
    + b"9" * 5000
    + b"}",
    "an integer of 30 digits": b'{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, '
    b'"num_attention_heads": ' + b"9" * 30 + b"}",
}
SPECIAL = ["FIFO", "folder", "loop of links", "huge file", "device"]

#: Commands that read a file.
READERS = {
    "explain config": ["explain", "--config"],
    "tune config": ["tune", "--device", "cpu", "--config"],
    "tune cases": ["tune", "--device", "cpu", "--cases"],
    "tune show": ["tune", "--device", "cpu", "--show", "--output"],
    "bench cases": ["bench", "--device", "cpu", "--cases"],
}


def special(kind, path):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop of links":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
@pytest.mark.parametrize("reader", READERS)
def test_invalid_files_give_one_line(reader, tmp_path):
    for index, content in enumerate(CONTENTS.values()):
        path = tmp_path / f"{index}.json"
        path.write_bytes(content)
        assert_rejected(*READERS[reader], path)
    for kind in SPECIAL:
        path = tmp_path / kind
        special(kind, path)
        assert_rejected(*READERS[reader], path)


def test_huge_cases_are_rejected(tmp_path):
    good = '"name": "a", "num_heads": 2, "num_kv_heads": 1, "head_size": 8'
    for lens in ("[1000000000000]", f"[{'1,' * 70000}1]", f"[{'100000000,' * 50}1]", "[1.5]", "[]"):
        path = tmp_path / "cases.json"
        path.write_text(f'[{{{good}, "query_lens": {lens}, "seq_lens": {lens}}}]')
        assert_rejected("bench", "--device", "cpu", "--cases", path)
        assert_rejected("tune", "--device", "cpu", "--cases", path)


#: Commands that write a file.
WRITERS = {
    "tune": [*TINY, "--output"],
    "tune again": [*TINY, "--fresh", "--output"],
    "bench": [*SWEEP, "--json"],
    "verify": ["verify", "REFERENCE", "--device", "cpu", "--quick", "--json"],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_programs_are_not_overwritten(writer, tmp_path):
    for index, content in enumerate(CONTENTS.values()):
        path = tmp_path / f"{index}.json"
        path.write_bytes(content)
        if content or writer.startswith("tune"):
            assert_rejected(*WRITERS[writer], path)
        assert path.read_bytes() == content
    for kind in ("FIFO", "folder", "loop of links"):
        path = tmp_path / kind
        special(kind, path)
        before = os.lstat(path)
        assert_rejected(*WRITERS[writer], path)
        assert os.path.samestat(os.lstat(path), before)
    for path in (tmp_path / "0.json" / "x", Path("/proc/no/x"), tmp_path / ("x" * 300)):
        assert_rejected(*WRITERS[writer], path)


def test_tune_continues_its_own_table(tmp_path):
    path = tmp_path / "table.json"
    for _ in range(2):
        result = CliRunner().invoke(app, [*TINY, "--output", str(path)])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("value", "error"),
    [("shadow:" + "9" * 5000, "is not understood"), ("9" * 5000, "is not understood")],
)
def test_long_values_of_a_variable_give_one_line(value, error, monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion="5.24")
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", value)
    model = save_tiny_model(tmp_path)
    words = ("--model", model, "--prompt", "x", "--device", "cpu", "--json")
    assert_rejected("generate", *words, part=error)


def test_one_line_joins_lines_and_cuts_long_words():
    text = "No backend computes it:\n  A: reason\r\n  B: " + "9" * 5000 + "\n"
    assert one_line(text) == (
        f"No backend computes it: A: reason; B: {'9' * 60}... (5000 characters)"
    )
    assert one_line("") == ""


# --- Streams ------------------------------------------------------------------------------------

EXPLAIN = ["explain", *LAYER, "--device", "cpu"]
PROGRAM = "from attn_dispatch.cli import main; main()"


def shell(arguments, redirection):
    """Run the program with its streams redirected by a shell."""
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


posix_streams = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@posix_streams
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        EXPLAIN,
        [*EXPLAIN, "--json"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
@pytest.mark.parametrize(
    ("redirection", "why"), [(">&-", "stdout is closed"), (">/dev/full", "No space left on device")]
)
def test_output_that_cannot_be_written_gives_one_line(arguments, redirection, why):
    done = shell(arguments, redirection)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: The output cannot be written: {why}.\n"


@posix_streams
@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "has_output"),
    [
        ([*EXPLAIN, "--json"], "<&- 2>&-", 0, True),
        (["--version"], "2>&-", 0, True),
        (["--version"], "2>/dev/full", 0, True),
        (["--version"], "<&-", 0, True),
        (["--version"], ">&- 2>&-", 2, False),
        (["--version"], "<&- >&- 2>&-", 2, False),
        (["--version"], ">/dev/full 2>/dev/full", 2, False),
    ],
)
def test_an_answer_only_needs_stdout(arguments, redirection, code, has_output):
    done = shell(arguments, redirection)
    assert (done.returncode, bool(done.stdout), done.stderr) == (code, has_output, "")


@posix_streams
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_exit_code_of_an_error_does_not_need_stderr(redirection):
    assert shell(["explain", "--num-heads", "x"], redirection).returncode == 2


@posix_streams
def test_a_closed_pipe_ends_the_command_without_a_message():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", PROGRAM, *EXPLAIN]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


@posix_streams
def test_arguments_that_are_not_utf8_give_one_line():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "explain", "--config", b"caf\xe9.json"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"There is no file caf\\udce9.json" in done.stderr
    assert done.stderr.count(b"\n") == 1
