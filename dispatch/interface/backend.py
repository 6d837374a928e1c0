"""The interface of a backend: vLLM's `vllm.attention.backends.abstract`, standalone and strict.

A backend is one `AttentionBackend` subclass with its impl, its metadata and its builder. Nobody
instantiates the backend class, so Python never checks that its abstract members exist: the
registry does, by `selection.registry.check_backend_class`, when the backend is registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.graphs import AttentionState
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadata, AttentionMetadataBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from attn_dispatch.interface.capability import Capabilities, Reason
    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.platforms.device import DeviceProfile

__all__ = ["INTERFACE_VERSION", "AttentionBackend", "refuse_spec"]

#: Version of the contract in this file. A backend states the one that it was written for.
INTERFACE_VERSION = 1


def refuse_spec(
    backend_cls: type[AttentionBackend], spec: AttentionSpec, device: DeviceProfile
) -> None:
    """For a builder's constructor: refuse layers that the backend does not declare.

    Selection never lets such layers through; this is for a builder that is made by hand. Every call
    needs metadata, so nothing is dropped in silence. Other devices than the declared ones will do.

    Raises:
        UnsupportedError: a field's value, or a combination, is not declared.
    """
    from attn_dispatch.interface.capability import ReasonCode, compare

    by_field = compare(spec, backend_cls.capabilities, device)
    of_layer = (ReasonCode.VALUE, ReasonCode.UNDECLARED)
    reasons = [reason for reason in by_field if reason.code in of_layer]
    reasons = reasons or backend_cls.check_combination(spec, device)
    if reasons:
        raise UnsupportedError(
            f"{backend_cls.get_name()} does not compute this layer: "
            f"{'; '.join(map(str, reasons))}. get_attn_backend finds one that does."
        )


class AttentionBackend(ABC):
    """A way to compute attention: a namespace of classes and of declared capabilities.

    Subclasses state `interface_version` and `capabilities`, and implement the abstract members.
    The module that defines one imports no third-party kernel: that waits until an impl is built.
    """

    interface_version: ClassVar[int]
    capabilities: ClassVar[Capabilities]
    #: Whether a NaN among the scores or values that a row sees makes that row NaN, output and LSE,
    #: as IEEE arithmetic has it (docs/numerics.md). A backend whose kernels turn it into a number
    #: sets this to False.
    propagates_nan: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """The name that overrides and reports use, in capitals."""

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """(module, qualified class name); `registry.resolve_full_cls_name` is the way back."""
        return cls.__module__, cls.__qualname__

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        """The class that computes."""

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """The class of the metadata that impl and builder agree on."""

    @classmethod
    def make_metadata(cls, *args: Any, **kwargs: Any) -> AttentionMetadata:
        """An instance of the metadata class."""
        return cls.get_metadata_cls()(*args, **kwargs)

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        """The class that turns a batch into metadata."""

    @staticmethod
    def get_state_cls() -> type[AttentionState[Any]]:
        """The class of the state across steps."""
        from attn_dispatch.interface.graphs import CommonAttentionState

        return CommonAttentionState

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, ...]:
        """The logical shape of the cache, the same for every backend that is not MLA.

        head_size is that of a stored head: `stored_head_size` of the larger of key's and value's.
        """
        from attn_dispatch.interface.kv_cache import kv_cache_shape

        return kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """The order of the logical dimensions in memory that the backend likes best."""
        from attn_dispatch.interface.kv_cache import STRIDE_ORDERS

        return STRIDE_ORDERS["NHD"]

    @staticmethod
    def swap_blocks(
        src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor
    ) -> None:
        """Copy blocks from one cache to another, e.g. to the host: see kv_cache.swap_blocks."""
        from attn_dispatch.interface.kv_blocks import swap_blocks

        swap_blocks(src_kv_cache, dst_kv_cache, src_to_dst)

    @staticmethod
    def copy_blocks(kv_caches: Sequence[torch.Tensor], src_to_dists: torch.Tensor) -> None:
        """Copy blocks within each cache, for all layers: see kv_cache.copy_blocks."""
        from attn_dispatch.interface.kv_blocks import copy_blocks

        copy_blocks(kv_caches, src_to_dists)

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Why this combination of fields cannot be computed, beyond what each field says."""
        return []

    @classmethod
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """Whose kernels compute such a layer there, where that depends on what is installed.

        Times that were measured with one are not believed of another. "" if there is no choice.
        """
        return ""
