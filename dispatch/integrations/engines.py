"""What `attn-dispatch doctor` reports of the plug-ins for engines."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["EnginePlugin"]


@dataclass(frozen=True)
class EnginePlugin:
    """A plug-in for an engine, as `attn-dispatch doctor` reports it.

    Attributes:
        engine: the name of the engine's distribution.
        others: names of distributions that have the same package.
        group: the group of entry points that it reads.
        flag: what a user gives to the engine.
        tested: version of the engine -> what was tested with it.
    """

    engine: str
    group: str
    flag: str
    tested: Mapping[str, str]
    others: tuple[str, ...] = ()

    def status(self) -> dict[str, Any]:
        """Whether the engine is installed, and whether it sees the plug-in, as JSON-ready data."""
        version = None
        for name in (*self.others, self.engine):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(name)
        names = {each.name for each in importlib.metadata.entry_points(group=self.group)}
        return {
            "engine": self.engine,
            "version": version,
            "visible": "attn_dispatch" in names,
            "flag": self.flag,
            "tested": dict(self.tested),
            "tested_here": None if version is None else self.tested.get(version.partition("+")[0]),
        }
