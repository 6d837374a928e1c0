"""What a check finds: an error and the one that is allowed, or a sentence on what is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CheckFailed", "ErrorBound", "require"]


@dataclass(frozen=True)
class ErrorBound:
    """How large the error was, and how large it may be; both 0 where nothing is measured."""

    error: float = 0.0
    allowed: float = 0.0

    @property
    def ratio(self) -> float:
        """The error as a part of what is allowed."""
        return self.error / self.allowed if self.allowed else (math.inf if self.error else 0.0)


class CheckFailed(Exception):
    """A check found something wrong; the message says what, as a sentence."""

    def __init__(self, message: str, finding: ErrorBound | None = None) -> None:
        super().__init__(message)
        self.finding = finding or ErrorBound()


def require(holds: bool, message: str) -> None:
    """Fail with a sentence unless it holds."""
    if not holds:
        raise CheckFailed(message)
