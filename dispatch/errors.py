"""Every error that the library raises on purpose, and what each one carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_dispatch.report import Report

__all__ = [
    "AttnDispatchError",
    "BackendFailure",
    "InvalidInputError",
    "UnknownBackendError",
    "UnsupportedError",
]


class AttnDispatchError(Exception):
    """Base of every error raised by attn-dispatch."""


class UnsupportedError(AttnDispatchError):
    """No backend, or not the required one, computes exactly what was asked.

    Attributes:
        report: the verdict and reasons for every candidate, or None where the refusal
            did not come out of a selection.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class UnknownBackendError(AttnDispatchError):
    """An override names a backend that is not registered."""


class InvalidInputError(AttnDispatchError, ValueError):
    """A value, shape, dtype, device or setting that is wrong on its own."""


class BackendFailure(AttnDispatchError):
    """A backend that should have worked broke when it was imported, built or launched."""
