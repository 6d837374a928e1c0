"""Attention: the module that an engine's model is made of, and the custom op behind it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attn_dispatch import overrides
from attn_dispatch.batch import AttentionBatch
from attn_dispatch.context import current_context
from attn_dispatch.device import default_torch_device, detect_device
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    Phase,
)
from attn_dispatch.ops import attention_op, layers_by_key
from attn_dispatch.quantization import is_fp8, scale_for
from attn_dispatch.registry import registry
from attn_dispatch.report import Selection
from attn_dispatch.routing import RoutedBuilder, RoutedMetadata, forward_routed
from attn_dispatch.selector import phases_of, select_and_warn
from attn_dispatch.spec import AttentionSpec

__all__ = ["Attention", "bind_kv_caches"]

_serial = itertools.count()


class Attention(nn.Module):
    """One attention layer: its backends are picked when it is made, and explained by `selections`.

    Called inside of `forward_context(batch)`, with or without torch.compile; or with explicit
    `kv_cache` and `attn_metadata`. The overrides in force when the layer is made are the ones that
    count, also if the layer is moved to another device afterwards.

    Args:
        num_heads: query heads.
        head_size: elements per query and key head.
        scale: factor on the scores; None for head_size ** -0.5.
        num_kv_heads: key and value heads; None for num_heads.
        alibi_slopes: (num_heads,) slopes, or None.
        sliding_window: tokens a query sees, itself included, or None.
        kv_cache_dtype: element type of the cache, see spec.KV_CACHE_DTYPES.
        logits_soft_cap: cap of the scores; None or 0 for none.
        attn_type: one of AttentionType.
        kv_sharing_target_layer_name: the layer whose cache this one reads and never writes.
        sinks: (num_heads,) one more logit per head, or None.
        prefix: the layer's name in the model, e.g. "model.layers.0.attn".
        dtype: of queries, keys and values; None for torch's default.
        device: where it will run first; None for the default device.
        block_size: tokens per block of the cache; None without one.
        backend: an override with the authority of an argument.
        **features: any other field of AttentionSpec.

    Raises:
        UnsupportedError, UnknownBackendError, InvalidInputError: as for `resolve`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | torch.Tensor | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        *,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int | None = 16,
        backend: str | None = None,
        **features: Any,
    ) -> None:
        super().__init__()
        has_cache = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
        self.spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,  # type: ignore[arg-type]
            head_size=head_size,
            dtype=dtype or torch.get_default_dtype(),
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size if has_cache else None,
            attn_type=attn_type,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap or None,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            kv_sharing=kv_sharing_target_layer_name is not None,
            **features,
        )
        if self.spec.mla is not None:
            raise InvalidInputError(
                "Attention has no multi-head latent attention; use the impl of "
                "resolve(spec).backend_cls."
            )
        self.prefix = prefix
        self.scale = head_size**-0.5 if scale is None else float(scale)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.kv_cache: torch.Tensor | None = None
        self._alibi_slopes = alibi_slopes
        self._sinks = sinks
        self._rules = overrides.current_rules(backend, registry.names())
        self._scales_are_set = False
        # Not buffers: a scale must stay float32 when the module is cast.
        self._k_scale = torch.ones(())
        self._v_scale = torch.ones(())
        self._k_scale_float = self._v_scale_float = 1.0
        self._device: torch.device | None = None
        self._register()
        chosen = default_torch_device() if device is None else torch.device(device)
        if chosen.type != "meta":
            self._bind(chosen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()  # a copy is a layer of its own

    def _register(self) -> None:
        self._op_key = f"{self.prefix or 'attention'}#{next(_serial)}"
        layers_by_key[self._op_key] = weakref.ref(self)

    def _bind(self, device: torch.device) -> None:
        """Pick backends for a device and build their impls."""
        spec, profile = self.spec, detect_device(device)
        self.selections: dict[Phase, Selection] = {
            phase: select_and_warn(spec, profile, phase=phase, rules=self._rules)
            for phase in phases_of(spec)
        }
        self._impls: dict[Phase, AttentionImpl[Any]] = {}
        self._builders: dict[Phase, AttentionMetadataBuilder[Any]] = {}
        made: dict[str, Phase] = {}
        for phase, selection in self.selections.items():
            twin = made.setdefault(selection.name, phase)
            if twin is phase:
                cls = selection.backend_cls
                self._impls[phase] = cls.get_impl_cls()(**self._impl_arguments())
                self._builders[phase] = cls.get_builder_cls()(spec, device)
            else:
                self._impls[phase] = self._impls[twin]
                self._builders[phase] = self._builders[twin]
        first = next(iter(self._builders.values()))
        self._build = first.build if len(made) == 1 else RoutedBuilder(self._builders).build
        self._metadata_key = (tuple(made), spec, device)
        self._k_scale, self._v_scale = self._k_scale.to(device), self._v_scale.to(device)
        self._device = device

    def _impl_arguments(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "num_heads": spec.num_heads,
            "head_size": spec.head_size,
            "scale": self.scale,
            "num_kv_heads": spec.num_kv_heads,
            "alibi_slopes": self._alibi_slopes,
            "sliding_window": spec.sliding_window,
            "kv_cache_dtype": spec.kv_cache_dtype,
            "logits_soft_cap": spec.logits_soft_cap,
            "attn_type": spec.attn_type,
            "kv_sharing_target_layer_name": self.kv_sharing_target_layer_name,
            "sinks": self._sinks,
            "head_size_v": spec.head_size_v,
            "causal": spec.causal,
            "returns_lse": spec.returns_lse,
        }

    def set_kv_scales(self, k_scale: float | torch.Tensor, v_scale: float | torch.Tensor) -> None:
        """Set the scales of an fp8 cache.

        Args:
            k_scale: a number or (), or (num_kv_heads,) with kv_scales="per_head".
            v_scale: the same for values.

        Raises:
            InvalidInputError: the shape does not go with the spec's kv_scales, or a scale is not
                positive and finite.
        """
        scales = [torch.as_tensor(s, dtype=torch.float32).detach() for s in (k_scale, v_scale)]
        shape = (self.spec.num_kv_heads,) if self.spec.kv_scales == "per_head" else ()
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if tuple(scale.shape) != shape:
                raise InvalidInputError(
                    f"{name} has shape {tuple(scale.shape)}; with kv_scales="
                    f"{self.spec.kv_scales!r} it must be {shape}."
                )
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise InvalidInputError(f"{name} must be positive and finite.")
        device = self._device or scales[0].device
        self._k_scale, self._v_scale = (scale.to(device) for scale in scales)
        self._k_scale_float, self._v_scale_float = (
            float("nan") if scale.dim() else float(scale) for scale in scales
        )
        self._scales_are_set = True

    def _derive_scales(
        self,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
    ) -> None:
        """Derive the scales from these keys and values; once, since the cache depends on them."""
        if key is None or value is None or kv_cache is None or not is_fp8(kv_cache.dtype):
            return
        dims = (0, 2) if self.spec.kv_scales == "per_head" else (0, 1, 2)
        self.set_kv_scales(*(scale_for(t, kv_cache.dtype, dims) for t in (key, value)))

    def build_metadata(self, batch: AttentionBatch) -> AttentionMetadata:
        """The metadata for this layer, and all alike, of a batch."""
        metadata: AttentionMetadata = self._build(batch)
        return metadata

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        kv_cache: torch.Tensor | None = None,
        attn_metadata: AttentionMetadata | None = None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values to the cache, then attend.

        Args:
            query: (num_tokens, num_heads, head_size), or with the last two flattened into one.
            key: (num_key_tokens, num_kv_heads, head_size) or flattened; None if the cache has all.
            value: (num_key_tokens, num_kv_heads, head_size_v) or flattened.
            kv_cache: the cache to use; None for the one that is bound to the layer.
            attn_metadata: from `build_metadata`; None to take it from forward_context.
            output: where the result goes, (num_tokens, num_heads, head_size_v); made if None.
            output_scale: see AttentionImpl.forward.
            output_block_scale: see AttentionImpl.forward.

        Returns:
            The output, flattened if the query is; with returns_lse also lse, (num_tokens,
            num_heads) float32. Rows beyond the batch's tokens are padding and hold nothing.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        spec = self.spec
        is_flat = query.dim() == 2
        query = self._unflatten("query", query, spec.num_heads, spec.head_size)
        if key is not None and value is not None:
            key = self._unflatten("key", key, spec.num_kv_heads, spec.head_size)
            value = self._unflatten("value", value, spec.num_kv_heads, spec.head_size_v)
        if output is None:
            shape = (query.shape[0], spec.num_heads, spec.head_size_v)
            dtype = torch.float8_e4m3fn if spec.output_quant else query.dtype
            output = torch.empty(shape, dtype=dtype, device=query.device)
        lse = None
        if spec.returns_lse:
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        arguments = (query, key, value, output, lse, output_scale, output_block_scale)
        if torch.compiler.is_compiling():
            if kv_cache is not None or attn_metadata is not None:
                raise InvalidInputError(
                    "Under torch.compile the cache is the one that is bound to the layer and the "
                    "metadata comes from forward_context; do not pass them."
                )
            attention_op(*arguments, self._op_key)
        else:
            self._run(*arguments, kv_cache, attn_metadata)
        result = output.flatten(1) if is_flat else output
        return result if lse is None else (result, lse)

    def _unflatten(self, name: str, tensor: torch.Tensor, heads: int, size: int) -> torch.Tensor:
        if tensor.dim() == 3:
            return tensor
        if tensor.dim() != 2 or tensor.shape[1] != heads * size:
            raise InvalidInputError(
                f"{name} has shape {tuple(tensor.shape)}; layer {self.prefix!r} takes "
                f"(num_tokens, {heads}, {size}) or (num_tokens, {heads * size})."
            )
        return tensor.view(tensor.shape[0], heads, size)

    def _run(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
        kv_cache: torch.Tensor | None = None,
        metadata: Any = None,
    ) -> None:
        """What the op does: find cache and metadata, and run the impl of each phase."""
        spec = self.spec
        if query.device != self._device:
            self._bind(query.device)
        if query.dtype != spec.dtype:
            raise InvalidInputError(
                f"query is {query.dtype}; layer {self.prefix!r} was made for {spec.dtype}. Cast "
                "the query, or make the layer with dtype=."
            )
        if (spec.output_quant is not None) != is_fp8(output.dtype):
            raise InvalidInputError(
                f"output is {output.dtype}; layer {self.prefix!r} was made with output_quant="
                f"{spec.output_quant!r}."
            )
        if kv_cache is None:
            kv_cache = self.kv_cache
        if metadata is None:
            metadata = current_context().metadata(self.prefix, self._metadata_key, self._build)
        if metadata.enable_kv_scales_calculation and not self._scales_are_set:
            self._derive_scales(key, value, kv_cache)
        if isinstance(metadata, RoutedMetadata):
            forward_routed(
                self._impls,
                self,
                query,
                key,
                value,
                kv_cache,
                metadata,
                output,
                output_scale,
                output_block_scale,
                lse,
            )
            return
        impl = next(iter(self._impls.values()))
        result = impl.forward(
            self, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale
        )
        if lse is not None:
            lse.copy_(result[1])

    def extra_repr(self) -> str:
        """The request and the picks, for print(model)."""
        picks = {str(phase): s.name for phase, s in getattr(self, "selections", {}).items()}
        return f"{self.spec}, backends={picks}"


def bind_kv_caches(
    layers: nn.Module | Mapping[str, Attention], caches: Mapping[str, torch.Tensor]
) -> None:
    """Give each layer its cache, by name; a layer that shares another's gets that one's.

    Args:
        layers: a model, whose Attention layers are named by their prefix; or layers by name.
        caches: layer name -> cache, as KVCachePlan.allocate makes them.

    Raises:
        InvalidInputError: a layer that needs a cache has none in `caches`, or two layers of the
            model have the same prefix.
    """
    named = _attention_layers(layers) if isinstance(layers, nn.Module) else dict(layers)
    for name, layer in named.items():
        if layer.spec.block_size is None:
            continue
        source = layer.kv_sharing_target_layer_name or name
        if source not in caches:
            raise InvalidInputError(
                f"There is no cache for layer {source!r}. Plan the caches over all layers of the "
                "model, under the names that the layers have."
            )
        layer.kv_cache = caches[source]


def _attention_layers(model: nn.Module) -> dict[str, Attention]:
    named: dict[str, Attention] = {}
    for module in model.modules():
        if isinstance(module, Attention) and named.setdefault(module.prefix, module) is not module:
            raise InvalidInputError(
                f"Two layers of the model have the prefix {module.prefix!r}. Give each its own."
            )
    return named
