"""examples/wrong_backend.py as a module: backends with a fault each."""

from __future__ import annotations

import importlib.util
import sys

from support.paths import EXAMPLES

__all__ = ["EXAMPLE", "wrong"]

EXAMPLE = EXAMPLES / "wrong_backend.py"

_spec = importlib.util.spec_from_file_location("wrong_backend", EXAMPLE)
wrong = importlib.util.module_from_spec(_spec)
sys.modules["wrong_backend"] = wrong
_spec.loader.exec_module(wrong)
