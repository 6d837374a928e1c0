"""The classes that compute one layer's attention."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

import torch

from attn_dispatch.arguments import checked_scale, shown
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_access import write_mla_cache, write_rows
from attn_dispatch.interface.kv_cache import split_token_scales
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import AttentionMetadata, T
from attn_dispatch.interface.quantization import has_token_scales
from attn_dispatch.interface.reach import folded_window
from attn_dispatch.interface.spec import IMPL_FIELDS, AttentionSpec, plain_value
from attn_dispatch.interface.types import AttentionType

if TYPE_CHECKING:
    from attn_dispatch.interface.batch import AttentionBatch

__all__ = ["AttentionImpl", "AttentionLayer", "MLAAttentionImpl", "get_kv_scales", "store_new_kv"]


class AttentionLayer(Protocol):
    """The layer that calls an impl. An impl reads the scales of an fp8 KV cache from it.

    A value is its stored element times the scale. `_k_scale` and `_v_scale` are float32 of shape ()
    or (num_kv_heads,), on the cache's device. The floats are host copies of scalar scales, for
    kernels that take an argument by value; NaN for scales per head.

    Queries and probabilities are never quantized, so `_q_scale` and `_prob_scale` are 1, float32 of
    shape (), on the same device, and cannot be assigned.
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
        kv_cache: KVCache | None,
        attn_metadata: AttentionMetadata | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of this layer, by its impl: see Attention.forward. No impl calls it."""


def _check_per_head(name: str, values: Any, heads: int) -> None:
    """Check slopes or sinks: numbers or a dense floating-point tensor, one for each query head."""
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
            f"{name} has shape {shape}; it must be ({heads},), for {heads} query heads."
        )


#: The fields of a spec that an impl states, as `_layer_of` and two more give their values.
_LAYER_FIELDS = (*IMPL_FIELDS, "alibi", "sinks", "kv_sharing")
_layer_of = operator.attrgetter(*IMPL_FIELDS, "alibi")
#: Those that select a feature, and the argument that does.
_FEATURES = {
    "kv_cache_dtype": "kv_cache_dtype",
    "attn_type": "attn_type",
    "causal": "causal",
    "sliding_window": "sliding_window",
    "window_size": "window_size",
    "attention_chunk": "attention_chunk",
    "key_positions": "key_positions",
    "logits_soft_cap": "logits_soft_cap",
    "returns_lse": "returns_lse",
    "alibi": "alibi_slopes",
    "sinks": "sinks",
    "kv_sharing": "kv_sharing_target_layer_name",
}


@functools.lru_cache(maxsize=4096)  # for layers that pass; an error is not cached
def _check_declared(backend_cls: Any, layer: tuple[Any, ...]) -> None:
    """Check that a backend declares the features of an impl, so that it drops no argument."""
    fields = dict(zip(_LAYER_FIELDS, layer, strict=True))
    spec = AttentionSpec(dtype=torch.bfloat16, **fields)
    for field, argument in _FEATURES.items():
        value = plain_value(getattr(spec, field))
        if not backend_cls.capabilities.accepts_somewhere(field, value, spec):
            given = argument if value is True else f"{argument}={value!r}"
            raise UnsupportedError(
                f"{backend_cls.get_name()} does not support {given}. get_attn_backend finds one "
                "that does."
            )


class AttentionImpl(ABC, Generic[T]):
    """Computes one layer's attention.

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
        window_size: see AttentionSpec. The attributes have the spec's form: what causal and
            sliding_window can state becomes these.
        attention_chunk: see AttentionSpec.
        key_positions: see AttentionSpec.
        alibi_symmetric: the slopes are times -abs(distance), as the spec's alibi="symmetric".

    Attributes:
        alibi: the value of the spec's field for such a layer: False, True or "symmetric".

    Raises:
        InvalidInputError: there are not num_heads slopes or sinks, or scale is not a finite number.
        UnsupportedError: the backend does not declare a feature that an argument asks for.
    """

    #: Set by the definition of the backend.
    backend_cls: ClassVar[Any] = None

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
        window_size: tuple[int, int] | None = None,
        attention_chunk: int | None = None,
        key_positions: bool = False,
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
        self.window_size = window_size
        if window_size is not None:
            self.causal, self.sliding_window, self.window_size = folded_window(
                self.causal, sliding_window, window_size
            )
        self.attention_chunk = attention_chunk
        self.key_positions = key_positions
        self.returns_lse = returns_lse
        self.alibi_symmetric = alibi_symmetric
        self.alibi: bool | str = alibi_slopes is not None
        if self.alibi and alibi_symmetric:
            self.alibi = "symmetric"
        if self.backend_cls is not None:
            is_shared = kv_sharing_target_layer_name is not None
            _check_declared(self.backend_cls, (*_layer_of(self), sinks is not None, is_shared))

    @abstractmethod
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
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
                maximum except for int8; or a KVCacheView of such keys and values; or None for
                attention over key and value only.
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
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """Store a batch's new keys and values as `forward` does; the arguments were checked."""
        store_new_kv(self, layer, key, value, kv_cache, batch)

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Whether forward can store this layer's output quantized so.

        Args:
            quant_key: one of spec.OUTPUT_QUANTS. False for anything else, e.g. vLLM's QuantKey.
        """
        return False


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

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """Store a batch's new latents and rotated key parts, `key` and `value`, as `forward` does.

        Nothing is stored without slots, or for a layer that shares another's cache.
        """
        slots = batch.slot_mapping
        if self.kv_sharing_target_layer_name is not None or slots is None:
            return
        assert isinstance(kv_cache, torch.Tensor)
        rows = len(slots)
        rotated = value.flatten(1) if value.dim() > 2 else value
        write_mla_cache(key[:rows], rotated[:rows], kv_cache, slots, layer._k_scale)


def get_kv_scales(layer: AttentionLayer, kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of keys and values, as `gather_kv` takes them.

    Those in the cache if it is int8, else those of the layer: () or (num_kv_heads,) float32.
    """
    if has_token_scales(kv_cache.dtype):
        return split_token_scales(kv_cache)
    return layer._k_scale, layer._v_scale


def store_new_kv(
    impl: AttentionImpl[Any],
    layer: AttentionLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: KVCache,
    batch: AttentionBatch,
) -> None:
    """Store a batch's new keys and values, unless the layer shares another's cache.

    The arguments are those of AttentionImpl.forward, checked by validation.check_forward.
    """
    if impl.kv_sharing_target_layer_name is not None:
        return
    slots = batch.slot_mapping
    assert slots is not None  # by check_forward
    rows = len(slots)
    write_rows(key[:rows], value[:rows], kv_cache, slots, layer._k_scale, layer._v_scale)
