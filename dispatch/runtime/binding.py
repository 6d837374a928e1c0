"""What a layer runs on: its selections, and the impls and builders that were made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.runtime.guard import GuardedImpl
from attn_dispatch.runtime.recovery import raise_attempt_failed
from attn_dispatch.runtime.routing import RoutedBuilder, RoutedImpl, Router
from attn_dispatch.selection import failure_record
from attn_dispatch.selection.failure_record import Failure
from attn_dispatch.selection.overrides import Rule
from attn_dispatch.selection.registry import is_builtin, registry
from attn_dispatch.selection.report import Selection
from attn_dispatch.selection.resolve import resolve_uncached
from attn_dispatch.selection.selector import phases_of

__all__ = ["LayerBinding"]


@dataclass(frozen=True)
class LayerBinding:
    """What a layer runs on. It is replaced as a whole, so that every call finds what goes together.

    Attributes:
        spec: the layer.
        profile: of the device.
        selections: of each phase.
        names: of the backends that its batches may go to.
        impl, builder: of the one backend, or of all of them.
        metadata_key: equal for layers that can share metadata.
        failed: the keys of the failures that the selections took into account.
        generation, libraries: of failures and of broken libraries, before the selections were made.
    """

    spec: AttentionSpec
    profile: DeviceProfile
    selections: dict[Phase, Selection]
    names: tuple[str, ...]
    impl: AttentionImpl[Any] | RoutedImpl
    builder: AttentionMetadataBuilder[Any]
    metadata_key: tuple[Any, ...]
    failed: frozenset[tuple[object, ...]]
    generation: int
    libraries: int

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        device: torch.device,
        profile: DeviceProfile,
        rules: tuple[Rule, ...],
        build_impl: Callable[[str, type[AttentionBackend]], AttentionImpl[Any]],
        unrecorded: Sequence[Failure] = (),
    ) -> LayerBinding:
        """Select backends, and build their impls and builders.

        Args:
            spec: the layer.
            device: where it runs.
            profile: of this device.
            rules: the overrides that hold for it.
            build_impl: makes the impl of a backend, by its name and class.
            unrecorded: failures of the call in progress.

        Raises:
            UnsupportedError: the required backend, or every backend, is refused.
            AttemptFailed: a backend raised when it was built.
        """
        generation = failure_record.generation()
        failures = failure_record.failures_for(spec, profile, unrecorded=unrecorded)
        intact = libraries.generation()
        selections = {
            phase: resolve_uncached(spec, profile, phase=phase, rules=rules, unrecorded=unrecorded)
            for phase in phases_of(spec)
        }
        router, candidates = Router.of(spec, selections), registry.candidates()
        classes = {n: c for n in router.backends if (c := candidates[n].backend_cls)}
        impls: dict[str, AttentionImpl[Any]] = {}
        builders: dict[str, AttentionMetadataBuilder[Any]] = {}
        for name, backend_cls in classes.items():
            try:
                impl = build_impl(name, backend_cls)
                impls[name] = impl if is_builtin(backend_cls) else GuardedImpl(name, impl)
                builders[name] = backend_cls.make_builder(spec, device)
            except Exception as error:
                raise_attempt_failed(error, name, None, "when it was built", intact)
        is_single = len(classes) == 1
        return cls(
            spec=spec,
            profile=profile,
            selections=selections,
            names=router.backends,
            impl=next(iter(impls.values())) if is_single else RoutedImpl(impls, classes),
            builder=(
                next(iter(builders.values())) if is_single else RoutedBuilder(builders, router)
            ),
            metadata_key=(router.key, spec, device),
            failed=frozenset(failure.key for failure in failures),
            generation=generation,
            libraries=intact,
        )

    @property
    def is_current(self) -> bool:
        """Whether the recorded failures are those that the selections took into account."""
        recorded = failure_record.failures_for(self.spec, self.profile)
        return {failure.key for failure in recorded} == self.failed

    def accepts(self, metadata: BatchMetadata) -> bool:
        """Whether metadata was built for the same backends."""
        mine, its = (
            (type(each), getattr(each, "route", None)) for each in (self.builder, metadata.builder)
        )
        return mine == its
