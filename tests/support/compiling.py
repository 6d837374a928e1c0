"""Tests that need Triton to compile, where it interprets kernels because there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from triton import knobs

__all__ = ["INTERPRETS", "needs_compiler", "only_where_interpreted", "passed_where_compiled"]

INTERPRETS: bool = knobs.runtime.interpret
needs_compiler = pytest.mark.skipif(INTERPRETS, reason="Triton interprets kernels in this process")
only_where_interpreted = pytest.mark.skipif(not INTERPRETS, reason="Triton compiles kernels here")


def passed_where_compiled(path: str) -> int:
    """How many tests of a file pass in a process in which Triton compiles; all must."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout
    return int(found[1])
