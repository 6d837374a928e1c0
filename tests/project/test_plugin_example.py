"""A backend in a separate package is found, picked and verified; a bad package breaks nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from attn_dispatch import environment
from support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "plugin_backend"
NAME = "STREAMING_ATTN"

PIP = [
    *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"),
    *("--no-index", "--disable-pip-version-check"),
]

#: Prints what a program sees of the plugin: the picks with and without a soft cap, and reasons.
PROGRAM = """
import json, torch, sys
from attn_dispatch import AttnDispatchError, AttentionSpec, explain, resolve
from attn_dispatch.conformance import backend_named

spec = AttentionSpec(num_heads=2, head_size=16, dtype=torch.float32, logits_soft_cap=5.0)
report = explain(spec, "cpu")[0]
plain = resolve(spec.replace(logits_soft_cap=None), "cpu")
try:
    verifying = backend_named("STREAMING_ATTN").get_name()
except AttnDispatchError as error:
    verifying = f"{type(error).__name__}: {error}"
reasons = {v.name: [str(r) for r in v.reasons] for v in report.verdicts}
print(json.dumps({
    "capped": report.picked, "plain": plain.name, "source": str(plain.source), "reasons": reasons,
    "module": (report.full_cls_name or [None])[0],
    "verifying": verifying,
    "imported": "streaming_attn.backend" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package, installed offline into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # building leaves files in it
    subprocess.run(
        [*PIP, "--target", folder / "site", source], check=True, capture_output=True, text=True
    )
    return folder / "site"


@pytest.fixture
def changed(site, tmp_path):
    """A copy of the installed package in which a text is replaced by another."""

    def change(file, old, new):
        folder = shutil.copytree(site, tmp_path / "site")
        (path,) = folder.glob(file)
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return folder

    return change


def run(folder, *arguments, **settings):
    """A fresh Python that has the package on its path."""
    ours = {variable.name for variable in environment.VARIABLES}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env["ATTN_DISPATCH_TUNING"] = "off"
    return subprocess.run(
        [sys.executable, *arguments],
        env=env | settings,
        check=False,
        capture_output=True,
        text=True,
    )


def seen(folder, **settings):
    done = run(folder, "-c", PROGRAM, **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def verify(folder, *options):
    program = "from attn_dispatch.cli import main; main()"
    return run(folder, "-c", program, "verify", NAME, "--device", "cpu", *options)


def test_it_is_found_and_takes_part_in_the_selection(site):
    found = seen(site)
    assert found["capped"] == NAME
    assert found["module"] == "streaming_attn.backend"
    assert found["plain"] == "TORCH_SDPA"
    assert found["imported"]


def test_without_the_package_it_is_not_found(tmp_path):
    found = seen(tmp_path)
    assert NAME not in found["reasons"]
    assert found["capped"] == "REFERENCE"


def test_the_environment_picks_it(site):
    found = seen(site, ATTN_DISPATCH_BACKEND=NAME)
    assert (found["plain"], found["source"]) == (NAME, "environment")


def test_it_passes_its_verification(site):
    done = verify(site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NAME} on cpu" in done.stdout
    assert "none failed" in done.stdout


def test_its_package_verifies_it_by_one_line_of_pytest(site, tmp_path):
    plugin = ["-p", "attn_dispatch.conformance.pytest_plugin", "--rootdir", str(tmp_path)]
    options = ["--attn-dispatch-verify", NAME, "--attn-dispatch-quick", str(tmp_path)]
    done = run(
        site, "-m", "pytest", "-q", *plugin, *options, "--attn-dispatch-device", "cpu",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


# A bad package gives a clear message, and selection works without it.


MODULE, RECORD = "streaming_attn/backend.py", "*.dist-info/entry_points.txt"
BAD = {
    "raises on import": (
        (MODULE, "from __future__ import annotations", "raise OSError('libfast.so: no such file')"),
        "OSError: libfast.so: no such file",
    ),
    "another interface": (
        (MODULE, "interface_version = 2", "interface_version = 99"),
        "interface_version is 99, and this attn-dispatch has interface version 2",
    ),
    "another name": (
        (MODULE, 'name = "STREAMING_ATTN"', 'name = "FASTEST_ATTN"'),
        "calls itself 'FASTEST_ATTN', not 'STREAMING_ATTN'",
    ),
    "a name in small letters": (
        (MODULE, 'name = "STREAMING_ATTN"', 'name = "streaming-attn"'),
        "a name has only capitals, digits and underscores",
    ),
    "no such class": ((RECORD, "StreamingBackend", "NoSuchBackend"), "AttributeError"),
    "an unfinished class": (
        (MODULE, "impl_cls = StreamingImpl", "impl = StreamingImpl"),
        "does not implement impl_cls",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BAD.values(), ids=BAD)
def test_a_bad_package_is_reported_and_selection_works(changed, edit, message):
    folder = changed(*edit)
    found = seen(folder)
    assert found["capped"] == "REFERENCE"
    assert found["plain"] == "TORCH_SDPA"
    (reason,) = found["reasons"][NAME]
    assert "cannot be loaded" in reason
    assert message in reason
    assert found["verifying"].startswith("BackendFailure: ")
    assert message in found["verifying"]


def test_a_package_that_claims_what_it_does_not_compute_is_caught(changed):
    folder = changed(MODULE, "sinks=OneOf(True, False)", "alibi=OneOf(True, False)")
    done = verify(folder, "--quick")
    assert done.returncode == 1
    assert "numbers/alibi" in done.stdout
    assert "asked for alibi, and the output is that of no slopes: it is dropped" in " ".join(
        done.stdout.split()
    )
