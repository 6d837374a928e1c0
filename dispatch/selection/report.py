"""The record of a decision: the request, the pick and its reason, and every rejection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import Reason
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.overrides import Source
from attn_dispatch.selection.timings.policy import TimingEvidence

__all__ = ["Report", "Selection", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """Whether one candidate can serve the request, and if not, every reason."""

    name: str
    reasons: tuple[Reason, ...] = ()

    @property
    def supported(self) -> bool:
        """Whether the candidate computes exactly the request on this device."""
        return not self.reasons

    def asdict(self) -> dict[str, Any]:
        """The verdict as JSON-ready data."""
        return {
            "name": self.name,
            "supported": self.supported,
            "reasons": [reason.asdict() for reason in self.reasons],
        }


@dataclass(frozen=True)
class Report:
    """A decision as data; `str` formats it for people.

    Attributes:
        spec: the request.
        device: where.
        phase: prefill or decode; None for a decision that serves both.
        picked: the backend's name, or None if no backend could be picked.
        source: what decided, or None.
        because: the reason, as one sentence.
        full_cls_name: (module, class) of the backend, or None.
        verdicts: one for every registered backend, in the order in which they were considered.
        measured: the evidence of a table of times; None without one, or if an override decided.
        notes: what keeps the pick's fastest kernel from this layer; AttentionBackend.kernel_notes.
    """

    spec: AttentionSpec
    device: DeviceProfile
    phase: Phase | None
    picked: str | None
    source: Source | None
    because: str
    full_cls_name: tuple[str, str] | None
    verdicts: tuple[Verdict, ...]
    measured: TimingEvidence | None = None
    notes: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[str, ...]:
        """The other backends that support the request, in the order in which they are tried."""
        return tuple(v.name for v in self.verdicts if v.supported and v.name != self.picked)

    @property
    def evidence(self) -> str:
        """What decided, in a few words."""
        best = self.measured and self.measured.best
        if self.source is Source.MEASURED and best:
            return f"measured {best.picked_us:.1f} us vs {best.default_us:.1f} us"
        if self.source is Source.PLATFORM:
            return "first in the platform's order"
        return self.because

    def asdict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "spec": self.spec.asdict(),
            "kind": self.spec.kind,
            "device": {"name": self.device.name, "arch": self.device.arch},
            "phase": None if self.phase is None else str(self.phase),
            "picked": self.picked,
            "source": None if self.source is None else str(self.source),
            "because": self.because,
            "full_cls_name": None if self.full_cls_name is None else list(self.full_cls_name),
            "verdicts": [verdict.asdict() for verdict in self.verdicts],
            "measured": None if self.measured is None else self.measured.asdict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        phase = f", {self.phase}" if self.phase else ""
        lines = [f"{self.spec} on {self.device.name} ({self.device.arch}){phase}"]
        lines.append(f"picked {self.picked}: {self.because}" if self.picked else self.because)
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {each.name}: {reason}" for each in self.verdicts for reason in each.reasons]
        return "\n".join(lines)


@dataclass(frozen=True)
class Selection:
    """A backend that was picked, with the report that explains the pick."""

    backend_cls: type[AttentionBackend]
    report: Report

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend_cls.get_name()

    @property
    def full_cls_name(self) -> tuple[str, str]:
        """(module, class) of the backend."""
        return self.backend_cls.full_cls_name()

    @property
    def source(self) -> Source:
        """What decided."""
        assert self.report.source is not None
        return self.report.source

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for every registered backend."""
        return self.report.verdicts

    def __str__(self) -> str:
        return str(self.report)
