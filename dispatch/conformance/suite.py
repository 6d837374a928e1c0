"""Every check of a backend, generated from its capabilities; and the report of running them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch.conformance import (
    cache,
    calls,
    inputs,
    integration,
    kv_layouts,
    lengths,
    non_finite,
    numeric,
    overlaps,
    real_sizes,
)
from attn_dispatch.conformance.check import BackendUnderTest, Check, Outcome, run
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.conformance.tolerance import worst_of
from attn_dispatch.errors import (
    AttnDispatchError,
    BackendFailure,
    InvalidInputError,
    UnsupportedError,
    summary_of,
)
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import compare_availability
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.overrides import Mode, Source, parse_override
from attn_dispatch.selection.registry import registry

__all__ = ["GROUPS", "Conformance", "backend_named", "checks_for", "verify"]

#: The groups of checks, in the order in which they run. Refusals are last: a kernel that is
#: launched for what it does not support may break the device.
GROUPS: dict[str, Callable[[BackendUnderTest], Iterable[Check]]] = {
    "declaration": numeric.declaration,
    "numbers": numeric.numbers,
    "pairs": numeric.pairs,
    "lse": numeric.lse,
    "inputs": inputs.inputs,
    "garbage": inputs.garbage,
    "scales": numeric.scales,
    "non_finite": non_finite.non_finite,
    "rows": inputs.rows,
    "calls": calls.calls,
    "memory": inputs.memory,
    "overlaps": overlaps.overlaps,
    "cache": cache.cache,
    "kv_layouts": kv_layouts.kv_layouts,
    "batches": integration.batches,
    "lengths": lengths.lengths,
    "layer": integration.layers,
    "bits": integration.bits,
    "graphs": integration.graphs,
    "real_sizes": real_sizes.real_sizes,
    "refusals": numeric.refused,
}


def checks_for(
    backend_cls: type[AttentionBackend],
    device: torch.device | str | None = None,
    *,
    quick: bool = False,
    profile: DeviceProfile | None = None,
    emulate: EmulatedDevice | str | None = None,
) -> list[Check]:
    """The checks that a backend must pass, generated from its capabilities.

    Args:
        backend_cls: the backend.
        device: where to run; None for the default device.
        quick: one value of each field, few sets of features, no compiler.
        profile: the device to test for, if not the real one: Triton's interpreter runs on a CPU
            what is declared for a GPU.
        emulate: a GPU, such as "gfx942" or "sm90", on whose emulation each check runs; instead
            of `device` and `profile`.

    Raises:
        UnsupportedError: the backend does not run on the device.
        InvalidInputError: it accepts no layer that could be tried; the GPU cannot be emulated.
        BackendFailure: its declaration raises an exception.
    """
    if emulate is not None:
        if device is not None or profile is not None:
            raise InvalidInputError("Give a device or one to emulate, not both.")
        emulate = EmulatedDevice.named(emulate) if isinstance(emulate, str) else emulate
        device, profile = emulate.torch_device, emulate.profile
    torch_device = resolve_device(device)
    profile = profile or detect_device(torch_device)
    try:
        reasons = compare_availability(backend_cls.capabilities, profile)
        if reasons:
            raise UnsupportedError(
                f"{backend_cls.get_name()} cannot be verified here: "
                f"{'; '.join(map(str, reasons))}. Give a --device that it runs on."
            )
        min_cache_bytes = emulate.min_cache_bytes if emulate is not None else 0
        target = BackendUnderTest(backend_cls, torch_device, profile, quick, min_cache_bytes)
        checks = [
            dataclasses.replace(check, group=name)
            for name, group in GROUPS.items()
            for check in group(target)
        ]
        if emulate is not None:
            return [emulate.check_on_it(check, backend_cls) for check in checks]
        return [check for check in checks if check.needs in ("", torch_device.type)]
    except (AttnDispatchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the backend's own code runs, and may raise anything
        raise BackendFailure(
            f"{backend_cls.__qualname__} cannot be verified: its declaration raises "
            f"{summary_of(error)}. Repair it."
        ) from error


def backend_named(name: str) -> type[AttentionBackend]:
    """The backend that is registered under a name, in upper or lower case.

    Raises:
        UnknownBackendError: there is none; the message has similar names.
        InvalidInputError: it is not one name.
        BackendFailure: it cannot be loaded.
    """
    rules = parse_override(name, Source.ARGUMENT, registry.names())
    if len(rules) != 1 or rules[0].mode is not Mode.REQUIRE or rules[0].scopes:
        raise InvalidInputError(f"{name!r} is not the name of one backend, such as REFERENCE.")
    (rule,) = rules
    candidate = registry.candidates()[rule.name]
    if candidate.backend_cls is None:
        raise BackendFailure(f"{rule.name} {candidate.problem}.")
    return candidate.backend_cls


@dataclass
class Conformance:
    """The outcomes of the checks of a backend.

    Attributes:
        backend: its name.
        device: PyTorch's name of the device, or that of an emulated one.
        outcomes: of the checks that were run, in their order.
    """

    backend: str
    device: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return not self.failures and any(o.status == "passed" for o in self.outcomes)

    def groups(self) -> list[dict[str, Any]]:
        """A row for each group: counts of outcomes, and the largest error by its allowance."""
        return [
            _summary(name, [o for o in self.outcomes if o.check.group == name])
            for name in dict.fromkeys(outcome.check.group for outcome in self.outcomes)
        ]

    def asdict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "backend": self.backend,
            "device": self.device,
            "passed": self.passed,
            "groups": self.groups(),
            "outcomes": [outcome.asdict() for outcome in self.outcomes],
        }


def _summary(group: str, outcomes: list[Outcome]) -> dict[str, Any]:
    worst = worst_of(o.finding for o in outcomes if o.finding and o.finding.allowed)
    statuses = [outcome.status for outcome in outcomes]
    return {
        "group": group,
        "checks": len(outcomes),
        **{status: statuses.count(status) for status in ("passed", "failed", "skipped")},
        # Infinity is for NaN, whose error is not a number.
        "largest_error": worst.error if worst.allowed and worst.error < math.inf else None,
        "allowed": worst.allowed or None,
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 3),
    }


def verify(
    backend_cls: type[AttentionBackend],
    device: torch.device | str | None = None,
    *,
    quick: bool = False,
    only: str = "",
    profile: DeviceProfile | None = None,
    emulate: EmulatedDevice | str | None = None,
) -> Conformance:
    """Run the checks of a backend.

    Args:
        backend_cls: the backend; only the checks of layers need it to be registered.
        device: as for `checks_for`.
        quick: as for `checks_for`.
        only: checks whose `group/name` contains this, or one of these texts, separated by commas.
        profile: as for `checks_for`.
        emulate: as for `checks_for`.

    Raises:
        UnsupportedError, InvalidInputError, BackendFailure: as for `checks_for`.
    """
    if isinstance(emulate, str):
        emulate = EmulatedDevice.named(emulate)
    report = Conformance(backend_cls.get_name(), str(emulate or resolve_device(device)))
    checks = checks_for(backend_cls, device, quick=quick, profile=profile, emulate=emulate)
    report.outcomes += [run(check) for check in checks if check.is_among(only)]
    return report
