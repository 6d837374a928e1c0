"""The interface of a backend: vLLM's `vllm.attention.backends.abstract`, standalone and strict.

A backend is a subclass of `AttentionBackend` with its impl, metadata and builder. The class is
never instantiated; `selection.registry.check_backend_class` checks it when it is registered.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.capability import Capabilities, Reason, ReasonCode, compare
from attn_dispatch.interface.graphs import AttentionState, CommonAttentionState
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.kv_blocks import copy_blocks, swap_blocks
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.metadata import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    BatchMetadata,
    BatchMetadataBuilder,
)
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.detect import detect_device

if TYPE_CHECKING:
    import torch

    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.interface.types import Phase
    from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["INTERFACE_VERSION", "AttentionBackend"]

#: Version of this interface. A backend states the version that it was written for.
INTERFACE_VERSION = 2


@functools.lru_cache(maxsize=4096)  # for layers that pass; an error is not cached
def _check_declared(
    cls: type[AttentionBackend], spec: AttentionSpec, device: DeviceProfile, generation: int
) -> None:
    codes = (ReasonCode.VALUE, ReasonCode.UNDECLARED)
    reasons = [reason for reason in compare(spec, cls.capabilities, device) if reason.code in codes]
    reasons = reasons or cls.check_combination(spec, device)
    if reasons:
        raise UnsupportedError(
            f"{cls.get_name()} does not compute this layer: {'; '.join(map(str, reasons))}. "
            "get_attn_backend finds one that does."
        )


class AttentionBackend:
    """A way to compute attention: a namespace of classes and of declared capabilities.

    A subclass states `interface_version`, `name`, `capabilities` and `impl_cls`, and what differs
    from the defaults below. Its module imports no third-party kernel: the impl's constructor does.

    Attributes:
        name: the name that overrides and reports use, in capitals.
        capabilities: what the backend computes. Its impl and builder reject everything else.
        impl_cls: the class that computes.
        builder_cls: the class that turns a batch into metadata; by default it only wraps the batch.
        metadata_cls: the class of the metadata that impl and builder agree on.
        state_cls: the class of the state across steps.
        propagates_nan: whether a NaN among the scores or values that a row sees makes that row NaN,
            output and LSE, as IEEE arithmetic has it (docs/numerics.md). False for a backend whose
            kernels turn it into a number.
    """

    interface_version: ClassVar[int]
    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    impl_cls: ClassVar[type[AttentionImpl[Any]]]
    builder_cls: ClassVar[type[AttentionMetadataBuilder[Any]]] = BatchMetadataBuilder
    metadata_cls: ClassVar[type[AttentionMetadata]] = BatchMetadata
    state_cls: ClassVar[type[AttentionState[Any]]] = CommonAttentionState
    propagates_nan: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the backend its own impl and builder classes, which check its capabilities."""
        super().__init_subclass__(**kwargs)
        for attribute in ("impl_cls", "builder_cls"):
            part: Any = getattr(cls, attribute, None)
            if not isinstance(part, type):
                continue  # the registry reports it
            if attribute not in vars(cls) or "backend_cls" in vars(part):
                # It is the default, or another backend's.
                names = {
                    "__module__": cls.__module__,
                    "__qualname__": f"{cls.__qualname__}.{attribute}",
                }
                part = type(part.__name__, (part,), names)
                setattr(cls, attribute, part)
            part.backend_cls = cls

    @classmethod
    def get_name(cls) -> str:
        """The backend's `name`. vLLM's code calls this, and the getters below."""
        return cls.name

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """(module, qualified class name); `registry.resolve_full_cls_name` is the way back."""
        return cls.__module__, cls.__qualname__

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl[Any]]:
        """The backend's `impl_cls`."""
        return cls.impl_cls

    @classmethod
    def get_metadata_cls(cls) -> type[AttentionMetadata]:
        """The backend's `metadata_cls`."""
        return cls.metadata_cls

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder[Any]]:
        """The backend's `builder_cls`."""
        return cls.builder_cls

    @classmethod
    def get_state_cls(cls) -> type[AttentionState[Any]]:
        """The backend's `state_cls`."""
        return cls.state_cls

    @classmethod
    def make_impl(cls, spec: AttentionSpec, **arguments: Any) -> AttentionImpl[Any]:
        """An impl for layers of this spec.

        Args:
            spec: the layer.
            **arguments: the constructor's arguments that the spec does not state: scale,
                alibi_slopes, sinks, kv_sharing_target_layer_name.

        Raises:
            UnsupportedError: the backend does not declare a feature of the layer.
        """
        return cls.get_impl_cls()(**spec.impl_arguments(), **arguments)

    @classmethod
    def make_builder(
        cls, spec: AttentionSpec, device: torch.device
    ) -> AttentionMetadataBuilder[Any]:
        """A builder for layers of this spec.

        Raises:
            UnsupportedError: the backend does not declare the layer.
        """
        return cls.get_builder_cls()(spec, device)

    @classmethod
    def check_declared(cls, spec: AttentionSpec, device: torch.device) -> None:
        """Check that the backend declares a layer; it may be on another device than declared.

        Raises:
            UnsupportedError: a field's value, or a combination, is not declared.
        """
        backend_cls: Any = cls  # mypy does not count a class as hashable
        _check_declared(backend_cls, spec, detect_device(device), libraries.generation())

    @classmethod
    def make_metadata(cls, *args: Any, **kwargs: Any) -> AttentionMetadata:
        """An instance of the metadata class."""
        return cls.get_metadata_cls()(*args, **kwargs)

    #: The logical shape of the cache; the same for every backend that is not MLA.
    get_kv_cache_shape = staticmethod(kv_cache_shape)
    swap_blocks = staticmethod(swap_blocks)
    copy_blocks = staticmethod(copy_blocks)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """The order of the logical dimensions in memory that the backend prefers."""
        return STRIDE_ORDERS["NHD"]

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Why this combination of values cannot be computed, if each value can."""
        return []

    @classmethod
    def kernel_notes(
        cls, spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
    ) -> tuple[str, ...]:
        """What keeps the backend's fastest kernel from a layer that it computes, as sentences.

        Reports show it under the pick. Each sentence names the cause (the cache's layout, block
        size or dtype), what the fast kernel needs, and which one runs instead.

        Args:
            spec: the layer.
            device: where.
            phase: only what concerns this phase; None for both.
        """
        return ()

    @classmethod
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """Name of the package whose kernels would run, if that depends on what is installed.

        Timings that were recorded for a different package are ignored. "" if there is no choice.
        """
        return ""
