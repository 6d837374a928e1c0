"""Implementations of attention that are timed: an interface, and the registered backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from attn_dispatch.backends.mla_absorbed import AbsorbedMLAImpl
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
    "LATENTS",
    "LAYER",
    "BackendImplementation",
    "Call",
    "Implementation",
    "check_registered",
    "class_of",
    "verdicts_of",
]

Call = Callable[[], torch.Tensor]

#: Variants of latent attention: attention of absorbed queries over the cached latents, which is
#: what other packages compute; and the whole layer, with the projections before and after.
LATENTS, LAYER = "latents", "layer"


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
            A call that returns the output, (num_tokens, num_heads, head_size). Of latent attention
            it has kv_lora_rank elements for a head, or with the variant LAYER v_head_dim.
        """


class BackendImplementation(Implementation):
    """A registered backend, called as in an engine's second layer: the metadata is built already.

    Args:
        name: the backend, or "PREFILL+DECODE": two that each compute their phase of a batch.
        device: of the benchmark.
        whole_layers: only time whole layers, as an engine calls them.
    """

    kind = "backend"

    def __init__(self, name: str, device: torch.device, *, whole_layers: bool = False) -> None:
        self.name, self._device, self._whole_layers = name, device, whole_layers

    def supports(self, case: Case) -> str | None:
        """The reasons of selection; two backends are given only if they compute the case."""
        if "+" in self.name:
            is_latent = case.mla is not None
            return "latent attention is not split between two backends here" if is_latent else None
        return "; ".join(map(str, verdicts_of(case, self._device)[self.name].reasons)) or None

    def variants(self, case: Case) -> Sequence[str]:
        """Of latent attention, LATENTS if the backend has the absorbed form, and LAYER."""
        if case.mla is None:
            return ("",)
        if self._whole_layers:
            return (LAYER,)
        is_absorbed = issubclass(class_of(self.name).get_impl_cls(), AbsorbedMLAImpl)
        return (LATENTS, LAYER) if is_absorbed else (LAYER,)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """The forward over metadata that is built once."""
        spec, output = inputs.spec, inputs.empty_layer_output()
        routes = split_route(self.name) if "+" in self.name else (self.name,)
        classes = {phase: class_of(name) for phase, name in zip(Phase, routes, strict=False)}
        features: dict[str, Any] = {
            "scale": inputs.case.scale, "alibi_slopes": inputs.slopes, "sinks": inputs.sinks
        }  # fmt: skip
        latent = inputs.latent
        new: tuple[Any, ...] = (inputs.query, inputs.key, inputs.value)
        if latent is not None:
            features |= {"mla": inputs.case.mla_dims, "kv_b_proj": latent.kv_b_proj}
            new = (latent.query.flatten(1), latent.kv_c, latent.k_pe)
        impls = {phase: cls.make_impl(spec, **features) for phase, cls in classes.items()}
        builders = {p: cls.make_builder(spec, inputs.device) for p, cls in classes.items()}
        impl: Any = impls[Phase.PREFILL]
        builder: Any = builders[Phase.PREFILL]
        if len(routes) > 1:
            impl, builder = RoutedImpl(impls, classes), RoutedBuilder(builders)
        metadata = builder.build(inputs.batch)
        if variant == LATENTS:
            return _over_latents(impl, inputs, metadata)
        arguments = (*new, inputs.kv_cache, metadata, output)

        def call() -> torch.Tensor:
            impl.forward(inputs.layer, *arguments)
            return output

        return call


def _over_latents(impl: AbsorbedMLAImpl[Any], inputs: Inputs, metadata: Any) -> Call:
    """Attention of the absorbed queries over the cache."""
    assert inputs.latent is not None
    impl._check_latents(inputs.layer, inputs.latent.query, inputs.kv_cache, metadata)
    query = inputs.query * impl._query_factor

    def call() -> torch.Tensor:
        mixed, _ = impl._attend_latents(inputs.layer, query, inputs.kv_cache, metadata)
        return mixed

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
