"""Implementations of attention that are timed: an interface, and the registered backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.errors import UnknownBackendError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.routing import RoutedBuilder, RoutedImpl
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Verdict
from attn_dispatch.selection.selector import decide
from attn_dispatch.selection.timings.policy import split_route

__all__ = [
    "BackendImplementation",
    "Call",
    "Implementation",
    "check_registered",
    "class_of",
    "verdicts_of",
]

Call = Callable[[], torch.Tensor]


class Implementation(ABC):
    """A backend, or a peer: another package's attention.

    Attributes:
        name: as it is listed.
        kind: "backend" or "peer".
    """

    name: str
    kind: str

    @abstractmethod
    def supports(self, case: Case) -> str | None:
        """Why it does not compute the case, or None."""

    def variants(self, case: Case) -> Sequence[str]:
        """Ways to compute the case, of which the fastest is shown; "" if there is one."""
        return ("",)

    @abstractmethod
    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """Do what an engine does once per batch.

        Returns:
            A call that returns the output, (num_tokens, num_heads, head_size).
        """


class BackendImplementation(Implementation):
    """A registered backend, called as in an engine's second layer: the metadata is built already.

    Args:
        name: the backend, or "PREFILL+DECODE": two that each compute their phase of a batch.
        device: of the benchmark.
    """

    kind = "backend"

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device

    def supports(self, case: Case) -> str | None:
        """The reasons of selection; two backends are given only if they compute the case."""
        if "+" in self.name:
            return None
        return "; ".join(map(str, verdicts_of(case, self._device)[self.name].reasons)) or None

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """The forward over metadata that is built once."""
        spec, output = inputs.spec, inputs.empty_output()
        routes = split_route(self.name) if "+" in self.name else (self.name,)
        classes = {phase: class_of(name) for phase, name in zip(Phase, routes, strict=False)}
        features = {
            "scale": inputs.case.scale, "alibi_slopes": inputs.slopes, "sinks": inputs.sinks
        }  # fmt: skip
        impls = {phase: cls.make_impl(spec, **features) for phase, cls in classes.items()}
        builders = {p: cls.make_builder(spec, inputs.device) for p, cls in classes.items()}
        impl: Any = impls[Phase.PREFILL]
        builder: Any = builders[Phase.PREFILL]
        if len(routes) > 1:
            impl, builder = RoutedImpl(impls, classes), RoutedBuilder(builders)
        metadata = builder.build(inputs.batch)
        arguments = (inputs.query, inputs.key, inputs.value, inputs.kv_cache, metadata, output)

        def call() -> torch.Tensor:
            impl.forward(inputs.layer, *arguments)
            return output

        return call


def class_of(name: str) -> type[AttentionBackend]:
    """The class of a backend that can be loaded."""
    return registry.candidates()[name].loaded_cls


def verdicts_of(case: Case, device: torch.device) -> dict[str, Verdict]:
    """What selection decides about each registered backend, without overrides."""
    profile, candidates = detect_device(device), registry.candidates()
    report = decide(case.spec(), profile, phase=None, rules=(), candidates=candidates)
    return {verdict.name: verdict for verdict in report.verdicts}


def check_registered(names: Iterable[str]) -> None:
    """Check that backends are registered.

    Raises:
        UnknownBackendError: one is not.
    """
    unknown = sorted(set(names) - registry.names())
    if unknown:
        raise UnknownBackendError(
            f"There is no backend {unknown[0]!r}. Registered are: "
            f"{', '.join(sorted(registry.names()))}."
        )
