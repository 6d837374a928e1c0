"""Backends of multi-head latent attention whose kernels come in one of several packages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch

from attn_dispatch.backends.mla import latent_cache_shape
from attn_dispatch.backends.mla_calls import (
    LatentCallsMetadata,
    check_has_pages,
    latent_calls,
    other_cache_dtype,
)
from attn_dispatch.backends.packages import Package, pick_package, require_package
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Reason
from attn_dispatch.interface.metadata import AttentionMetadataBuilder
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["PackageMLABackend", "PackageMLABuilder"]

K = TypeVar("K")
P = TypeVar("P")


class PackageMLABuilder(AttentionMetadataBuilder[LatentCallsMetadata[P]], Generic[K, P]):
    """Picks the package, and splits batches into calls.

    Attributes:
        kernel: the package's functions.

    Raises:
        UnsupportedError: no package is installed, or the backend does not declare the layers.
        BackendFailure: the package cannot be imported.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        name = self._backend_name
        packages: tuple[Package[K], ...] = self.backend_cls.packages
        self.kernel = require_package(name, packages, detect_device(device)).load(name)

    def build(self, batch: AttentionBatch) -> LatentCallsMetadata[P]:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        return self._metadata(batch, self._groups(batch))

    def _metadata(self, batch: AttentionBatch, keys: Sequence[object]) -> LatentCallsMetadata[P]:
        """The metadata with these calls; `keys` as for latent_calls."""
        check_has_pages(batch)
        metadata: LatentCallsMetadata[P] = LatentCallsMetadata.of(batch, self, calls=[])
        metadata.calls += latent_calls(self, batch, keys, self._plan)
        return metadata

    @abstractmethod
    def _groups(self, batch: AttentionBatch) -> Sequence[object]:
        """For each request a key, as latent_calls takes them."""

    @abstractmethod
    def _plan(self, batch: AttentionBatch) -> P:
        """What the package needs for the requests of a call."""


class PackageMLABackend(AttentionBackend):
    """A subclass states `packages` and the parts of any backend.

    Attributes:
        packages: in the order in which they are tried.
    """

    packages: ClassVar[tuple[Package[Any], ...]]
    metadata_cls = LatentCallsMetadata

    @classmethod
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """The package."""
        picked = pick_package(cls.packages, device)
        return picked.name if isinstance(picked, Package) else ""

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """A package must be installed, and the cache have the layer's dtype."""
        picked = pick_package(cls.packages, device)
        return other_cache_dtype(spec) + ([] if isinstance(picked, Package) else picked)

    get_kv_cache_shape = staticmethod(latent_cache_shape)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
