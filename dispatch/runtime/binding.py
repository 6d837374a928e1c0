"""The backends that serve a layer: its selections, and the impls and builders made for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from attn_dispatch.errors import BackendFailure
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.runtime.guard import make_impl
from attn_dispatch.runtime.recovery import raise_attempt_failed
from attn_dispatch.runtime.routing import PartFailed, RoutedBuilder, RoutedImpl, Router
from attn_dispatch.selection.failure_record import Failure
from attn_dispatch.selection.report import Selection
from attn_dispatch.selection.resolve import SelectionContext
from attn_dispatch.selection.selector import phases_of

__all__ = ["LayerBinding"]


@dataclass(frozen=True)
class LayerBinding:
    """The backends of a layer. A layer replaces it as a whole, so that its parts fit each other.

    Attributes:
        profile: of the device.
        selections: of each phase.
        names: of the backends that its batches may go to.
        impl, builder: of the one backend, or of all of them.
        metadata_key: equal for layers that can share metadata.
        failures: that the selections took into account.
        version: of the context of the selections.
    """

    profile: DeviceProfile
    selections: dict[Phase, Selection]
    names: tuple[str, ...]
    impl: AttentionImpl[Any] | RoutedImpl
    builder: AttentionMetadataBuilder[Any]
    metadata_key: tuple[Any, ...]
    failures: frozenset[Failure]
    version: int

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        device: torch.device,
        context: SelectionContext,
        arguments: Mapping[str, Any],
    ) -> LayerBinding:
        """Select backends, and build their builders and, with these arguments, their impls.

        Raises:
            UnsupportedError: the required backend, or every backend, is rejected.
            AttemptFailed: a backend raised when it was built.
        """
        selections = {phase: context.select(spec, phase) for phase in phases_of(spec)}
        router = Router.of(spec, selections)
        classes: dict[str, type[AttentionBackend]] = {}
        impls: dict[str, Any] = {}
        builders: dict[str, AttentionMetadataBuilder[Any]] = {}
        for name in router.backends:
            backend_cls = classes[name] = context.candidates[name].loaded_cls
            try:
                impls[name] = make_impl(backend_cls, spec, **arguments)
                _check_output_quant(name, impls[name], spec)
                builders[name] = backend_cls.make_builder(spec, device)
            except Exception as error:
                raise_attempt_failed(error, name, None, "when it was built", context.version)
        first, *others = router.backends
        return cls(
            profile=context.device,
            selections=selections,
            names=router.backends,
            impl=RoutedImpl(impls, classes) if others else impls[first],
            builder=RoutedBuilder(builders, router) if others else builders[first],
            metadata_key=(router.key, spec, device),
            failures=frozenset(context.failures_of(spec)),
            version=context.version,
        )

    def raise_failed(self, error: Exception, batch: AttentionBatch | None, doing: str) -> NoReturn:
        """Raise AttemptFailed for the backend that raised, or the error itself if it is final."""
        name = self.names[0]
        if isinstance(error, PartFailed):
            name, batch, cause = error.backend, error.batch, error.__cause__
            assert isinstance(cause, Exception)
            error = cause
        phases = set() if batch is None else set(batch.phases)
        # The phase is not stated for an encoder's layer, which has only one.
        is_stated = len(phases) == 1 and len(self.selections) > 1
        raise_attempt_failed(error, name, phases.pop() if is_stated else None, doing, self.version)

    def accepts(self, metadata: BatchMetadata) -> bool:
        """Whether metadata was built for the same backends."""
        builders = (self.builder, metadata.builder)
        mine, its = ((type(each), getattr(each, "route", None)) for each in builders)
        return mine == its


def _check_output_quant(name: str, impl: AttentionImpl[Any], spec: AttentionSpec) -> None:
    quant = spec.output_quant
    if quant is not None and not impl.fused_output_quant_supported(quant):
        raise BackendFailure(
            f"{name} declares output_quant={quant!r}, and its impl does not support it. That "
            f"is a bug of the backend; exclude it by the override -{name}."
        )
