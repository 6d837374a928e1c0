"""EnginePlugin: what is known of a plug-in for an engine, and how it rejects what it lacks."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_dispatch.errors import UnsupportedError

__all__ = ["EnginePlugin"]


@dataclass(frozen=True)
class EnginePlugin:
    """A plug-in for an engine: what `attn-dispatch doctor` reports, and how requests are rejected.

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

    @staticmethod
    def reasons(asked: Mapping[str, object]) -> list[str]:
        """What an engine asks for of this, in the order given.

        Args:
            asked: the words for it -> whether it is asked for: a value that is None or False is
                not. For a closed world, give the engine's arguments that the plug-in does not know.
        """
        return [what for what, value in asked.items() if value is not None and value is not False]

    def reject(
        self,
        asked: Mapping[str, object] | Sequence[str],
        subject: str = "this step",
        advice: str = "Use another --attention-backend.",
    ) -> None:
        """Reject what the plug-in does not have.

        Args:
            asked: as for `reasons`; or what `reasons` has found.
            subject: what of the engine would need it.
            advice: what a user of the engine can do.

        Raises:
            UnsupportedError: something of it is asked for; the message has all of it.
        """
        if reasons := self.reasons(asked) if isinstance(asked, Mapping) else asked:
            raise UnsupportedError(
                f"attn-dispatch's plug-in for {self.engine} does not serve {subject}, which asks "
                f"for: {'; '.join(reasons)}. {advice}"
            )
