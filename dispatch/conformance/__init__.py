"""The suite that any backend must pass, ours or not, generated from what it declares.

    report = verify(MyBackend, "cuda")
    assert report.passed, report.failures

The names are imported when they are first used, so that the pytest plugin in here costs nothing
where nobody asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dispatch.conformance.check import Check as Check
    from attn_dispatch.conformance.check import Outcome as Outcome
    from attn_dispatch.conformance.check import run as run
    from attn_dispatch.conformance.suite import Conformance as Conformance
    from attn_dispatch.conformance.suite import backend_named as backend_named
    from attn_dispatch.conformance.suite import checks_for as checks_for
    from attn_dispatch.conformance.suite import verify as verify

_HOME_OF = {
    "Check": "check",
    "Outcome": "check",
    "run": "check",
    "Conformance": "suite",
    "backend_named": "suite",
    "checks_for": "suite",
    "verify": "suite",
}

__all__ = [
    "Check",
    "Conformance",
    "Outcome",
    "backend_named",
    "checks_for",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
