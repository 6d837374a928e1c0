"""The command `verify`, and the pytest plugin that runs the same checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from attn_dispatch import environment
from attn_dispatch.cli import app
from support.paths import ROOT
from support.selection import registered
from support.wrong_backend import wrong


def call(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


def test_command_prints_groups_and_writes_json(tmp_path):
    path = tmp_path / "report.json"
    done = call("torch_sdpa", "--device", "cpu", "--quick", "--only", "cache/", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "TORCH_SDPA on cpu" in done.stdout
    assert "none failed" in done.stdout
    report = json.loads(path.read_text())
    assert (report["backend"], report["passed"]) == ("TORCH_SDPA", True)
    assert {outcome["group"] for outcome in report["outcomes"]} == {"cache"}


def test_command_prints_failures_as_sentences():
    with registered(wrong.wrong_backend("drops the soft cap")):
        done = call("WRONG", "--device", "cpu", "--quick", "--only", "soft_cap")
    assert done.exit_code == 1
    printed = " ".join(done.stdout.split())
    assert "asked for logits_soft_cap=1.5, and the output is that of no soft cap" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TORCH_SDAP"], "Did you mean TORCH_SDPA?"),
        (["-TORCH_SDPA"], ""),
        (["TORCH_SDPA,REFERENCE"], "requires both"),
        (["decode=REFERENCE"], "not the name of one backend"),
        (["REFERENCE", "--device", "cpu", "--only", "no such"], "The groups are: declaration"),
        (["REFERENCE", "--json", "/no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_unverifiable_backend_gives_exit_code_2(arguments, message):
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


# The pytest plugin.


def run_python(*arguments, **settings):
    ours = {variable.name for variable in environment.VARIABLES}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *arguments],
        env=env | settings,
        check=False,
        capture_output=True,
        text=True,
    )


PLUGIN = ["-p", "attn_dispatch.conformance.pytest_plugin"]
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

#: A package of ours in which torch cannot be imported.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import pytest
status = pytest.main(sys.argv[1:])
assert not [name for name in sys.modules if name.startswith("attn_dispatch.backends")]
sys.exit(int(status))
"""


def test_plugin_needs_no_torch_until_it_is_used(tmp_path):
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass")
    options = [*PLUGIN, "-q", "--rootdir", str(tmp_path), str(tmp_path)]
    done = run_python("-c", WITHOUT_TORCH, *options, **ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    done = run_python("-c", WITHOUT_TORCH, *options, "--attn-dispatch-verify", "REFERENCE", **ALONE)
    assert done.returncode == 4
    assert "--attn-dispatch-verify needs the packages that attn-dispatch depends on" in done.stderr


#: A conftest that registers a backend, as that of a third party's tests may.
CONFTEST = """
import sys
sys.path.insert(0, {examples!r})
from wrong_backend import wrong_backend
from attn_dispatch import register_backend
register_backend(wrong_backend({fault!r}))
"""
OWN_TEST = """
import pytest
from attn_dispatch.conformance.pytest_plugin import assert_conforms, conformance_checks

@pytest.mark.parametrize("check", conformance_checks("WRONG", "cpu", quick=True)[:9])
def test_mine(check):
    assert_conforms(check)
"""


def test_plugin_collects_an_item_for_each_check(tmp_path):
    fault = CONFTEST.format(examples=str(ROOT / "examples"), fault="ignores sinks")
    (tmp_path / "conftest.py").write_text(fault)
    (tmp_path / "test_mine.py").write_text(OWN_TEST)
    options = [*PLUGIN, "-q", "--rootdir", str(tmp_path), str(tmp_path), "-k", "mine or sinks"]
    verifying = ["--attn-dispatch-verify", "WRONG", "--attn-dispatch-quick"]
    done = run_python(
        "-m", "pytest", *options, *verifying, "--attn-dispatch-device", "cpu", **ALONE
    )
    assert done.returncode == 1
    assert "WRONG::numbers/sinks" in done.stdout
    assert "that of no sinks: it is dropped" in done.stdout
    assert "test_mine" not in done.stdout.partition("short test summary")[2]


def test_plugin_rejects_unknown_names(tmp_path):
    options = [*PLUGIN, "--rootdir", str(tmp_path), str(tmp_path)]
    done = run_python("-m", "pytest", *options, "--attn-dispatch-verify", "TORCH_SDAP", **ALONE)
    assert done.returncode == 4
    assert "Did you mean TORCH_SDPA?" in done.stderr


def test_entry_point_names_the_plugin():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\nattn_dispatch = "attn_dispatch.conformance.' in text
    assert PLUGIN[1] in text
