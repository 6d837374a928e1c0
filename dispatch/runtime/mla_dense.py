"""Which dense backend computes the expanded prefills of a layer of latent attention, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.runtime.mla_plan import (
    PREFILL_WORKSPACE_BYTES,
    bytes_per_key,
    chunk_size,
    dense_spec,
    why_absorbed,
)
from attn_dispatch.selection import overrides
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Report
from attn_dispatch.selection.resolve import SelectionContext, explained_device

__all__ = ["ExpandedPrefills", "dense_rules", "describe_expanded", "explain_expanded"]


def dense_rules(
    rules: tuple[overrides.Rule, ...], spec: AttentionSpec
) -> tuple[overrides.Rule, ...]:
    """The rules that are about dense attention: those for latents, by kind or name, are not.

    Args:
        rules: the overrides in force.
        spec: of the dense layer.
    """
    candidates = registry.candidates()

    def is_for_latents(name: str) -> bool:
        cls = candidates[name].backend_cls if name in candidates else None
        if cls is None or "mla" not in cls.capabilities.fields:
            return False
        return not cls.capabilities.accepts_somewhere("mla", None, spec)

    return tuple(rule for rule in rules if rule.kind != "mla" and not is_for_latents(rule.name))


def describe_expanded(spec: AttentionSpec, report: Report, chunk: int) -> str:
    """The dense backend of a layer's prefills as a sentence; `chunk` keys are expanded at a time.

    Args:
        spec: the layer of latent attention.
        report: of the dense layer.
        chunk: earlier keys.
    """
    return (
        f"prefill, expanded to {dense_spec(spec)}: {report.picked}, {report.evidence}; earlier "
        f"keys in chunks of {chunk}, {chunk * bytes_per_key(spec)} bytes"
    )


@dataclass(frozen=True)
class ExpandedPrefills:
    """How a layer of latent attention would compute long prefills.

    Attributes:
        spec: the layer.
        report: the decision for the dense layer; None if prefills are never expanded.
        why_absorbed: why they are not, as a sentence; "" if they are.
        chunk: earlier keys that are expanded at a time.
    """

    spec: AttentionSpec
    report: Report | None
    why_absorbed: str
    chunk: int

    def __str__(self) -> str:
        if self.report is None or self.why_absorbed:
            return self.why_absorbed
        return describe_expanded(self.spec, self.report, self.chunk)

    def asdict(self) -> dict[str, Any]:
        """The decision as JSON-ready data."""
        picked = None if self.report is None or self.why_absorbed else self.report.picked
        return {
            "picked": picked,
            "why_absorbed": self.why_absorbed,
            "chunk": self.chunk if picked else 0,
            "workspace_bytes": self.chunk * bytes_per_key(self.spec) if picked else 0,
            "report": None if self.report is None else self.report.asdict(),
        }


def explain_expanded(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    backend: str | None = None,
) -> ExpandedPrefills:
    """How `MLAAttention` would compute the prefills of a layer with these fields.

    Args:
        spec: with mla.
        device: as for `explain`.
        backend: an override, as MLAAttention's `prefill_backend`.

    Raises:
        UnknownBackendError, InvalidInputError: as for `explain`.
    """
    why = why_absorbed(spec)
    if why:
        return ExpandedPrefills(spec, None, why, 0)
    dense = dense_spec(spec)
    rules = dense_rules(overrides.current_rules(backend, registry.names()), dense)
    context = SelectionContext.current(explained_device(device), rules=rules)
    report = context.report(dense, Phase.PREFILL)
    if report.picked is None:
        because = report.because.removesuffix(" The reasons:").removesuffix(":")
        why = f"Prefills are absorbed: no dense backend computes them. {because}"
    return ExpandedPrefills(spec, report, why, chunk_size(spec, PREFILL_WORKSPACE_BYTES))
