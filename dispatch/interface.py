"""The interface of a backend: vLLM's `vllm.attention.backends.abstract`, standalone and strict.

A backend is one `AttentionBackend` subclass with its impl, its metadata and its builder. Nobody
instantiates the backend class, so Python never checks that its abstract members exist: the
registry does, by `attn_dispatch.registry.check_backend_class`, when the backend is registered.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from attn_dispatch.arguments import checked_scale, shown
from attn_dispatch.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from attn_dispatch.batch import AttentionBatch
    from attn_dispatch.capability import Capabilities, Reason
    from attn_dispatch.device import DeviceProfile
    from attn_dispatch.spec import AttentionSpec

__all__ = [
    "INTERFACE_VERSION",
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayer",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionState",
    "AttentionType",
    "GraphRunner",
    "MLAAttentionImpl",
    "Phase",
    "PlaceholderRange",
    "refuse_features",
    "refuse_spec",
]

#: Version of the contract in this file. A backend states the one that it was written for.
INTERFACE_VERSION = 1


class AttentionType(str, Enum):
    """What attends to what. The members are strings, so they compare, hash and print as such."""

    DECODER = "decoder"
    """Self-attention of a decoder over its KV cache."""
    ENCODER = "encoder"
    """Self-attention of an encoder whose output a decoder attends to; no cache."""
    ENCODER_ONLY = "encoder_only"
    """Self-attention of a model that is only an encoder (BERT); no cache."""
    ENCODER_DECODER = "encoder_decoder"
    """A decoder's queries over an encoder's keys, which are cached once."""

    @property
    def has_kv_cache(self) -> bool:
        """Whether keys outlive the step, so that there is a cache, and a decode phase."""
        return self in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    def __str__(self) -> str:
        return str(self.value)


class Phase(str, Enum):
    """The part of serving a request that a call belongs to; each may have its own backend."""

    PREFILL = "prefill"
    DECODE = "decode"

    def __str__(self) -> str:
        return str(self.value)


class PlaceholderRange(NamedTuple):
    """The tokens that one image or audio clip takes: positions [start, end) of a request."""

    request: int
    start: int
    end: int


class AttentionLayer(Protocol):
    """The layer that calls an impl. An impl reads the scales of an fp8 KV cache from it.

    A stored value times its scale is the value meant. `_k_scale` and `_v_scale` are float32 of
    shape () or (num_kv_heads,), on the cache's device. The floats are host copies of the scalar
    ones, for kernels that take an argument by value; per-head scales have none (NaN).

    Queries and probabilities are never quantized here, so `_q_scale` and `_prob_scale` are 1,
    float32 of shape (), on the same device, and cannot be assigned.
    """

    @property
    def _q_scale(self) -> torch.Tensor: ...

    @property
    def _k_scale(self) -> torch.Tensor: ...

    @property
    def _v_scale(self) -> torch.Tensor: ...

    @property
    def _k_scale_float(self) -> float: ...

    @property
    def _v_scale_float(self) -> float: ...

    @property
    def _prob_scale(self) -> torch.Tensor: ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: AttentionMetadata | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of this layer, by its impl: see Attention.forward. No impl calls it."""


@dataclass
class AttentionMetadata(ABC):
    """What a backend needs to know of a batch, made once per batch by its builder.

    Attributes:
        num_prefills: requests in the prefill phase. The counts are for the engine and its logs:
            backends plan from the batch.
        num_prefill_tokens: their new tokens, together.
        num_decode_tokens: the new tokens of the requests in the decode phase.
        slot_mapping: (num_tokens,) int64, where each new token's key and value go in the cache:
            block * block_size + offset, or −1 for a token that is padding. None without a cache.
        multi_modal_placeholder_index_maps: modality -> the ranges that its items take, or None.
            Layers with `bidirectional_ranges` let the tokens of a range see each other.
        enable_kv_scales_calculation: the layer derives its fp8 cache's scales from this batch's
            keys and values before it writes them.
    """

    num_prefills: int
    num_prefill_tokens: int
    num_decode_tokens: int
    slot_mapping: torch.Tensor | None
    multi_modal_placeholder_index_maps: Mapping[str, Sequence[PlaceholderRange]] | None
    enable_kv_scales_calculation: bool

    @property
    @abstractmethod
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The same for the requests in the prefill phase alone, or None if there are none."""

    @property
    @abstractmethod
    def decode_metadata(self) -> AttentionMetadata | None:
        """The same for the requests in the decode phase alone, or None if there are none."""

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """The fields by name, tensors shared and not copied (`dataclasses.asdict` copies them)."""
        skip = skip_fields or set()
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in skip
        }


T = TypeVar("T", bound=AttentionMetadata)


class AttentionMetadataBuilder(ABC, Generic[T]):
    """Turns an engine's batch into a backend's metadata, once per batch for all alike layers.

    Args:
        spec: the layers that the metadata is for.
        device: where the metadata's tensors go.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    @abstractmethod
    def build(self, batch: AttentionBatch) -> T:
        """The backend's metadata for this batch.

        Raises:
            InvalidInputError: the batch lacks what the layers need, e.g. a block table.
        """


def _check_per_head(name: str, values: Any, heads: int) -> None:
    """Check slopes or sinks: a number for each query head, or a dense floating-point tensor."""
    import torch

    if values is None:
        return
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided or values.is_meta or not values.is_floating_point():
            found = "on the meta device" if values.is_meta else f"{values.dtype} {values.layout}"
            raise InvalidInputError(f"{name} is {found}; give a dense floating-point tensor.")
        shape: tuple[int, ...] = tuple(values.shape)
    elif isinstance(values, (list, tuple)) and all(
        isinstance(value, Real) and not isinstance(value, bool) for value in values
    ):
        shape = (len(values),)
    else:
        raise InvalidInputError(
            f"{name}={shown(values)} is neither a list of numbers nor a tensor. Give one value for "
            "each query head."
        )
    if shape != (heads,):
        raise InvalidInputError(
            f"{name} has shape {shape}; the layer has {heads} query heads and needs one value for "
            "each."
        )


class AttentionImpl(ABC, Generic[T]):
    """Computes one layer's attention. Whether it can was settled by capabilities before.

    Args:
        num_heads: query heads.
        head_size: elements per query and key head.
        scale: factor on the scores, usually head_size ** -0.5.
        num_kv_heads: key and value heads; None for num_heads.
        alibi_slopes: num_heads slopes, or None.
        sliding_window: tokens a query sees, itself included, or None.
        kv_cache_dtype: element type of the cache, "auto" for that of the keys.
        logits_soft_cap: cap of the scores; None or 0 for none.
        attn_type: one of AttentionType.
        kv_sharing_target_layer_name: the layer whose cache this one reads and never writes.
        sinks: (num_heads,) one more logit per head, or None.
        head_size_v: elements per value head; None for head_size.
        causal: a query sees no later key; None for what attn_type implies.
        returns_lse: forward returns (output, lse) instead of output.
        alibi_symmetric: the slopes are times -abs(distance), as the spec's alibi="symmetric".

    Attributes:
        alibi: what the spec's field has for such a layer: False, True or "symmetric".

    Raises:
        InvalidInputError: there are not num_heads slopes or sinks, or scale is not a finite number.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | torch.Tensor | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        *,
        head_size_v: int | None = None,
        causal: bool | None = None,
        returns_lse: bool = False,
        alibi_symmetric: bool = False,
    ) -> None:
        _check_per_head("alibi_slopes", alibi_slopes, num_heads)
        if isinstance(sinks, (list, tuple)):
            raise InvalidInputError("sinks is a list; give a (num_heads,) tensor.")
        _check_per_head("sinks", sinks, num_heads)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = checked_scale(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = alibi_slopes
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.attn_type = AttentionType(attn_type)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.head_size_v = head_size if head_size_v is None else head_size_v
        self.causal = self.attn_type == AttentionType.DECODER if causal is None else causal
        self.returns_lse = returns_lse
        self.alibi_symmetric = alibi_symmetric
        self.alibi: bool | str = alibi_slopes is not None
        if self.alibi and alibi_symmetric:
            self.alibi = "symmetric"

    @abstractmethod
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: T | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values to the cache, then attend.

        Args:
            layer: carries the scales of an fp8 cache.
            query: (num_tokens, num_heads, head_size).
            key: (num_key_tokens, num_kv_heads, head_size); None if the cache holds them all.
            value: (num_key_tokens, num_kv_heads, head_size_v); None if and only if key is.
            kv_cache: (num_blocks, 2, block_size, num_kv_heads, stored), where stored is
                stored_head_size(kv_cache_dtype, max(head_size, head_size_v)), which is that
                maximum itself but for int8; or None for attention over key and value alone.
            attn_metadata: made by this backend's builder for this batch. None in an engine's
                profiling run: the output is zeros, and nothing is read or written; see
                `validation.profiling_output`.
            output: (num_tokens, num_heads, head_size_v), written and returned; made if None.
            output_scale: () float32: the output is divided by it and stored as fp8.
            output_block_scale: (num_tokens, num_heads * head_size_v // 128) float32, written: the
                scale that each group of 128 output values was divided by before it became fp8.

        Returns:
            output; with returns_lse also lse, (num_tokens, num_heads) float32, natural log,
            −inf where a row saw no key, sinks left out.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """Store a batch's new keys and values, as `forward` does; in PyTorch unless overridden.

        The arguments are those of forward, which were checked.
        """
        from attn_dispatch.kv_cache import write_new_kv

        write_new_kv(self, layer, key, value, kv_cache, batch)

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Whether forward can store this layer's output quantized so.

        Args:
            quant_key: one of spec.OUTPUT_QUANTS. The answer to anything else, such as a QuantKey
                of vLLM, is False.
        """
        return False


def refuse_features(impl: AttentionImpl[Any], backend: str, *features: str) -> None:
    """For an impl's constructor: refuse what the backend does not declare, instead of dropping it.

    Selection never lets such a request through; this is for an impl that is constructed by hand.

    Raises:
        UnsupportedError: one of these attributes of the impl is set.
    """
    for feature in features:
        if getattr(impl, feature) is not None and getattr(impl, feature) is not False:
            raise UnsupportedError(
                f"{backend} does not support {feature}. get_attn_backend finds one that does."
            )


def refuse_spec(
    backend_cls: type[AttentionBackend], spec: AttentionSpec, device: DeviceProfile
) -> None:
    """For a builder's constructor: refuse layers that the backend does not declare.

    Selection never lets such layers through; this is for a builder that is made by hand. Every call
    needs metadata, so nothing is dropped in silence. Other devices than the declared ones will do.

    Raises:
        UnsupportedError: a field's value, or a combination, is not declared.
    """
    from attn_dispatch.capability import ReasonCode, compare

    by_field = compare(spec, backend_cls.capabilities, device)
    of_layer = (ReasonCode.VALUE, ReasonCode.UNDECLARED)
    reasons = [reason for reason in by_field if reason.code in of_layer]
    reasons = reasons or backend_cls.check_combination(spec, device)
    if reasons:
        raise UnsupportedError(
            f"{backend_cls.get_name()} does not compute this layer: "
            f"{'; '.join(map(str, reasons))}. get_attn_backend finds one that does."
        )


class MLAAttentionImpl(AttentionImpl[T]):
    """Computes multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a latent cache.

    The constructor takes AttentionImpl's arguments, where head_size is kv_lora_rank +
    qk_rope_head_dim and num_kv_heads is 1, and what implementations add by keyword.
    """

    @abstractmethod
    def forward(  # type: ignore[override]
        self,
        layer: AttentionLayer,
        hidden_states_or_cq: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: T | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new latents to the cache, then attend.

        Args:
            layer: carries the scales of an fp8 cache.
            hidden_states_or_cq: (num_tokens, ...), what q_proj maps to queries; without a q_proj
                the queries, (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim), rotary
                embedding applied.
            kv_c_normed: (num_tokens, kv_lora_rank), the normalized latents of the new tokens.
            k_pe: (num_tokens, qk_rope_head_dim) or (num_tokens, 1, qk_rope_head_dim), the rotated
                part of the new keys, shared by all heads.
            kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim).
            attn_metadata: as in AttentionImpl.forward.
            output: (num_tokens, num_heads, v_head_dim), written and returned; made if None.
            output_scale: as in AttentionImpl.forward.
            output_block_scale: as in AttentionImpl.forward.
        """


class GraphRunner(Protocol):
    """What an AttentionState needs to know of the engine that owns it."""

    metadata_builder: AttentionMetadataBuilder[Any]
    device: torch.device
    max_blocks_per_request: int
    max_seq_len: int


class AttentionState(ABC, Generic[T]):
    """A backend's state across steps: the static buffers that captured CUDA graphs read.

    An engine captures one graph per batch size in `graph_capture`, on the metadata of
    `graph_capture_get_metadata_for_batch`, keeps what `get_graph_input_buffers` names, and before
    each replay copies the real batch's metadata there by `prepare_graph_input_buffers`.

    Args:
        runner: the engine that owns the state.
    """

    @abstractmethod
    def __init__(self, runner: GraphRunner) -> None:
        self.runner = runner

    @abstractmethod
    def begin_forward(self, model_input: AttentionBatch) -> None:
        """Prepare for a step over this batch: what must happen outside of a captured graph."""

    @abstractmethod
    def graph_capture(self, max_batch_size: int) -> AbstractContextManager[None]:
        """The context in which graphs of up to max_batch_size requests are captured."""

    @abstractmethod
    def graph_clone(self, batch_size: int) -> AttentionState[T]:
        """A state for the graph of this batch size, sharing the buffers of this one."""

    @abstractmethod
    def graph_capture_get_metadata_for_batch(
        self, batch_size: int, is_encoder_decoder_model: bool = False
    ) -> T:
        """Metadata of batch_size one-token requests over the static buffers.

        With is_encoder_decoder_model, for cross-attention: the step brings no new keys.
        """

    @abstractmethod
    def get_graph_input_buffers(
        self, attn_metadata: T, is_encoder_decoder_model: bool = False
    ) -> dict[str, torch.Tensor]:
        """The tensors of captured metadata that change from step to step, by name."""

    @abstractmethod
    def prepare_graph_input_buffers(
        self,
        input_buffers: dict[str, torch.Tensor],
        attn_metadata: T,
        is_encoder_decoder_model: bool = False,
    ) -> None:
        """Copy a step's metadata into the buffers that the captured graph reads."""


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
        from attn_dispatch.state import CommonAttentionState

        return CommonAttentionState

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, ...]:
        """The logical shape of the cache, the same for every backend that is not MLA.

        head_size is that of a stored head: `stored_head_size` of the larger of key's and value's.
        """
        from attn_dispatch.kv_cache import kv_cache_shape

        return kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """The order of the logical dimensions in memory that the backend likes best."""
        from attn_dispatch.kv_cache import STRIDE_ORDERS

        return STRIDE_ORDERS["NHD"]

    @staticmethod
    def swap_blocks(
        src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor
    ) -> None:
        """Copy blocks from one cache to another, e.g. to the host: see kv_cache.swap_blocks."""
        from attn_dispatch.kv_cache import swap_blocks

        swap_blocks(src_kv_cache, dst_kv_cache, src_to_dst)

    @staticmethod
    def copy_blocks(kv_caches: Sequence[torch.Tensor], src_to_dists: torch.Tensor) -> None:
        """Copy blocks within each cache, for all layers: see kv_cache.copy_blocks."""
        from attn_dispatch.kv_cache import copy_blocks

        copy_blocks(kv_caches, src_to_dists)

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Why this combination of fields cannot be computed, beyond what each field says."""
        return []

    @classmethod
    def served_by(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """Whose kernels compute such a layer there, where that depends on what is installed.

        Times that were measured with one are not believed of another. "" if there is no choice.
        """
        return ""
