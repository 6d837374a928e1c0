"""What a layer runs on: its selections, and the impls and builders that were made for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch import fallback, libraries
from attn_dispatch.batch import AttentionBatch, BatchMetadata
from attn_dispatch.device import DeviceProfile
from attn_dispatch.interface import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    Phase,
)
from attn_dispatch.overrides import Rule
from attn_dispatch.registry import registry
from attn_dispatch.report import Selection
from attn_dispatch.routing import RoutedBuilder, RoutedImpl, Router
from attn_dispatch.selector import phases_of, select_and_warn
from attn_dispatch.spec import AttentionSpec

__all__ = ["Bound"]


@dataclass(frozen=True)
class Bound:
    """What a layer runs on. It is replaced as a whole, so that every call finds what goes together.

    Attributes:
        spec: the layer.
        rules: the overrides that hold for it.
        profile: of the device.
        selections: of each phase.
        names: of the backends that its batches may go to.
        impl, builder: of the one backend, or of all of them.
        metadata_key: equal for layers that can share metadata.
        failures: those that the selections took into account.
        generation: of failures, when the selections were made.
    """

    spec: AttentionSpec
    rules: tuple[Rule, ...]
    profile: DeviceProfile
    selections: dict[Phase, Selection]
    names: tuple[str, ...]
    impl: AttentionImpl[Any] | RoutedImpl
    builder: AttentionMetadataBuilder[Any]
    metadata_key: tuple[Any, ...]
    failures: tuple[fallback.Failure, ...]
    generation: int

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        device: torch.device,
        profile: DeviceProfile,
        rules: tuple[Rule, ...],
        build_impl: Callable[[str, type[AttentionBackend]], AttentionImpl[Any]],
    ) -> Bound:
        """Select and build, and do so again without each backend that fails to be built.

        Args:
            spec: the layer.
            device: where it runs.
            profile: of this device.
            rules: the overrides that hold for it.
            build_impl: makes the impl of a backend, by its name and class.

        Raises:
            UnsupportedError: the required backend, or every backend, is refused.
            BackendFailure: the required backend, or every backend, fails; or a library turned out
                broken, see `libraries.past_broken_libraries`.
        """
        while True:
            generation = fallback.generation()
            failures = fallback.failures_for(spec, profile)
            selections = {
                phase: select_and_warn(spec, profile, phase=phase, rules=rules)
                for phase in phases_of(spec)
            }
            router, candidates = Router.of(spec, selections), registry.candidates()
            classes = {n: c for n in router.backends if (c := candidates[n].backend_cls)}
            impls: dict[str, AttentionImpl[Any]] = {}
            builders: dict[str, AttentionMetadataBuilder[Any]] = {}
            intact = libraries.generation()
            try:
                for name, backend_cls in classes.items():
                    impls[name] = build_impl(name, backend_cls)
                    builders[name] = backend_cls.get_builder_cls()(spec, device)
            except Exception as error:
                if libraries.generation() != intact:
                    raise  # past_broken_libraries knows what to do
                fallback.give_up(
                    error,
                    name,
                    spec,
                    profile,
                    None,
                    doing="when it was built",
                    rules=rules,
                    known=failures,
                )
                continue
            alone = len(classes) == 1
            return cls(
                spec,
                rules,
                profile,
                selections,
                router.backends,
                next(iter(impls.values())) if alone else RoutedImpl(impls, classes),
                next(iter(builders.values())) if alone else RoutedBuilder(builders, router),
                (router.key, spec, device),
                failures,
                generation,
            )

    @property
    def is_current(self) -> bool:
        """Whether the failures are still those that the selections took into account."""
        return fallback.failures_for(self.spec, self.profile) == self.failures

    def takes(self, metadata: Any) -> bool:
        """Whether metadata was built for the same backends, or keeps no batch to be made anew."""
        if not isinstance(metadata, BatchMetadata):
            return True
        mine, its = (
            (type(each), getattr(each, "route", None)) for each in (self.builder, metadata.builder)
        )
        return mine == its

    def give_up(self, error: Exception, batch: AttentionBatch | None, doing: str) -> None:
        """Record that a backend failed on a batch; raises what `fallback.give_up` raises.

        Args:
            error: what it raised.
            batch: the batch, or None if it is not known.
            doing: when it failed.
        """
        name, phase = self.names[0], None if batch is None else fallback.phase_of(batch)
        if len(self.names) > 1:
            name, phase = fallback.blamed(error) or (name, phase)
        if len(self.selections) == 1:
            phase = None  # an encoder's layer has no phases to tell apart
        fallback.give_up(
            error,
            name,
            self.spec,
            self.profile,
            phase,
            doing=doing,
            rules=self.rules,
            known=self.failures,
        )
