"""The suite that any backend must pass, of this package or another, made from what it declares.

    report = verify(MyBackend, "cuda")
    assert report.passed, report.failures

The names are imported when they are first used: the pytest plugin in this package must cost nothing
unless it is used. `__init__.pyi` has the same names for type checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Check", "Conformance", "Outcome", "backend_named", "checks_for", "run", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.suite"), name)
