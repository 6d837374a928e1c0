"""Attention: the module that an engine's model is made of, and the custom op behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.arguments import checked_scale, shown
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_view import KVCache, as_kv_cache
from attn_dispatch.interface.metadata import AttentionMetadata, BatchMetadata
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec, alibi_of
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_no_grad, profiling_output
from attn_dispatch.log import logger
from attn_dispatch.platforms.detect import usable_device
from attn_dispatch.platforms.device_errors import is_capturing
from attn_dispatch.platforms.waits import watched
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.context import current_context
from attn_dispatch.runtime.hooks import observer
from attn_dispatch.runtime.kv_scales import CacheState, LayerScales
from attn_dispatch.runtime.layer_checks import (
    check_block_size,
    check_dtype,
    check_features,
    check_quantized,
    check_query,
    derives_scales,
    unflatten,
)
from attn_dispatch.runtime.ops import CalledByOp, attention_op
from attn_dispatch.runtime.recovery import AttemptFailed, with_fallback
from attn_dispatch.runtime.split import HasBackends, checked_split
from attn_dispatch.selection import overrides
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.resolve import SelectionContext
from attn_dispatch.selection.version import version

__all__ = ["Attention"]


class Attention(LayerScales, HasBackends, CalledByOp):
    """One attention layer. Its backends are picked when it is made; see `selections`.

    If a backend that was picked automatically fails, when it is built or on a call, another one
    serves the layer from then on (see `recovery`), and `selections` change. A backend that is
    required raises.

    Call it inside of `forward_context(batch)`, with or without torch.compile; or with explicit
    `kv_cache` and `attn_metadata`. The overrides in force when the layer is made are the ones that
    count, also if the layer is moved to another device. A copied or unpickled layer is a separate
    layer without a cache.

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
        sinks: (num_heads,) one more logit per head, or None. Kept as it is: load weights into it
            in place.
        prefix: the layer's name in the model, e.g. "model.layers.0.attn".
        dtype: of queries, keys and values; None for torch's default.
        device: where it will run first; None for the default device.
        block_size: tokens per block of the cache; None for what `bind_kv_caches` brings.
        alibi: "symmetric" for slopes times −abs(distance) where attention is not causal; None for
            slopes times the signed distance, if there are slopes.
        backend: an override with the authority of an argument.
        context_parallel: a ContextParallel, if ranks share the keys of each request; or None.
        shared_prefix: read what a batch's shared_prefix_len names once, for all requests.
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
        alibi: bool | str | None = None,
        backend: str | None = None,
        context_parallel: Any = None,
        shared_prefix: bool = False,
        **features: Any,
    ) -> None:
        super().__init__()
        check_features("Attention", features)
        no_cap = isinstance(logits_soft_cap, (int, float)) and not logits_soft_cap
        spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,  # type: ignore[arg-type]
            head_size=head_size,
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            attn_type=attn_type,
            sliding_window=sliding_window,
            logits_soft_cap=None if no_cap else logits_soft_cap,
            alibi=alibi_of(alibi, alibi_slopes),
            sinks=sinks is not None,
            kv_sharing=kv_sharing_target_layer_name is not None,
            **features,
        )
        if spec.mla is not None:
            raise InvalidInputError("Attention does not take mla=; use MLAAttention.")
        # In a dict, so that sinks which are a Parameter are not registered in this module too.
        self._per_head = {"alibi_slopes": alibi_slopes, "sinks": sinks}
        rules = overrides.current_rules(backend, registry.names())
        self._set_up(spec, prefix, scale, kv_sharing_target_layer_name, rules, context_parallel)
        self._set_cascade(shared_prefix)
        self._bind_first(device)

    def _set_up(
        self,
        spec: AttentionSpec,
        prefix: str,
        scale: float | None,
        kv_sharing_target_layer_name: str | None,
        rules: Sequence[overrides.Rule],
        context_parallel: Any = None,
    ) -> None:
        """Set what every kind of layer has; `_bind_first` is called after a kind's own."""
        if not isinstance(prefix, str):
            raise InvalidInputError(f"prefix={shown(prefix)} is not a string.")
        has_kv_cache = AttentionType(spec.attn_type).has_kv_cache
        self.spec = spec if has_kv_cache else spec.replace(block_size=None)
        self._declared_spec = self.spec  # a cache that is bound fills in what this leaves open
        self.prefix = prefix
        self.scale = spec.head_size**-0.5 if scale is None else checked_scale(scale)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.kv_cache: KVCache | None = None
        self._rules = tuple(rules)
        split = self.context_parallel = checked_split(context_parallel, self.spec)
        #: The heads of a call: with context_parallel those of this rank.
        self._call_spec = self.spec if split is None else split.call_spec(self.spec)
        self._output_size = spec.head_size_v if spec.mla is None else spec.mla.v_head_dim
        # Not buffers: a scale must stay float32 when the module is cast.
        self._cache_state = CacheState()
        self._device: torch.device | None = None
        self._binding: LayerBinding | None = None
        self._was_rebound = False
        self._selected_at = version()
        self._fp8_dtype = torch.float8_e4m3fn
        self._register()

    def _bind_first(self, device: torch.device | str | None) -> None:
        if (chosen := usable_device(device)).type == "meta":
            return
        chosen = torch.empty(0, device=chosen).device  # "cuda" becomes "cuda:0"
        if self.context_parallel is None:
            self._bind(chosen)
        else:
            self.context_parallel.agree(self.prefix, lambda: self._bind(chosen) or self._picks())

    def _bind(
        self,
        device: torch.device,
        run: Callable[[LayerBinding], Any] | None = None,
        failed: AttemptFailed | None = None,
    ) -> Any:
        """Bind the layer to the first backends that can be built and on which `run` does not raise.

        `run` is a call of the layer, whose result is returned; `failed` is how it ended before.
        """

        def attempt(context: SelectionContext) -> tuple[LayerBinding, Any]:
            binding = self._binding_of(device, context)
            return binding, None if run is None else run(binding)

        context = SelectionContext.current(device, rules=self._rules)
        binding, result = with_fallback(self._selected_spec, context, attempt, failed)
        self._was_rebound = self._binding is not None
        self._selected_at = binding.version
        self._binding = binding
        self._cache_state.to(device)
        self._fp8_dtype = kv_cache_torch_dtype("fp8", self.spec.dtype, binding.profile.arch)
        self._device = device
        if logger.isEnabledFor(logging.INFO):
            for phase, each in binding.selections.items():
                logger.info(
                    "layer %s: %s %s, %s", self.prefix, phase, each.name, each.report.evidence
                )
        return result

    def _follow_cache(self, spec: AttentionSpec) -> None:
        """Take over a spec with the block size, layout and strides of the cache that is bound."""
        if spec == self.spec:
            return
        before, self.spec = self.spec, spec
        try:
            if self._device is not None:
                self._bind(self._device)
        except Exception:
            self.spec = before
            raise

    def _refresh(self) -> None:
        """Bind again if a backend failed in an equal layer, or failures were forgotten."""
        binding = self._binding
        if binding is None or self._device is None or is_capturing():
            return  # nothing is built while a graph is captured
        context = SelectionContext.current(self._device, rules=self._rules)
        if binding.failures == set(context.failures_of(self._selected_spec)):
            self._selected_at = context.version
        else:
            self._bind(self._device)

    def _impl_arguments(self) -> dict[str, Any]:
        """The arguments of an impl's constructor that the spec does not state."""
        return {
            "scale": self.scale,
            **self._per_head,
            "kv_sharing_target_layer_name": self.kv_sharing_target_layer_name,
        }

    def build_metadata(self, batch: AttentionBatch) -> AttentionMetadata:
        """The metadata of a batch, for this layer and all others with the same spec.

        Raises:
            InvalidInputError: the batch contradicts itself or the layer.
        """
        if not isinstance(batch, AttentionBatch):
            raise InvalidInputError(
                f"batch is a {type(batch).__name__}. Make it by AttentionBatch.create."
            )
        if self._selected_at != version():
            self._refresh()
        binding = self._require_binding()
        plan = watched(self._plan)  # but a backend that is built may wait
        metadata: AttentionMetadata
        try:
            metadata = plan(binding, None, batch)
        except AttemptFailed as failed:
            assert self._device is not None
            metadata = self._bind(self._device, lambda other: plan(other, None, batch), failed)
        return metadata

    def _plan(
        self, binding: LayerBinding, metadata: Any, batch: AttentionBatch | None = None
    ) -> Any:
        """The metadata for these backends, built again if it is for the layer's earlier ones."""
        build = binding.builder.build
        try:
            if batch is not None:
                return build(batch)
            if metadata is None:
                return current_context().metadata(self.prefix, binding.metadata_key, build)
            is_other = self._was_rebound or binding is not self._binding
            if is_other and isinstance(metadata, BatchMetadata) and not binding.accepts(metadata):
                return build(metadata.batch)
            return metadata
        except (InvalidInputError, UnsupportedError):
            raise
        except Exception as error:
            batch = batch or self._batch_of(metadata)
            binding.raise_failed(error, batch, "when it planned a batch")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        kv_cache: KVCache | tuple[torch.Tensor, torch.Tensor] | None = None,
        attn_metadata: AttentionMetadata | None = None,
        *,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values to the cache, then attend.

        Args:
            query: (num_tokens, num_heads, head_size), or with the last two flattened into one.
            key: (num_key_tokens, num_kv_heads, head_size) or flattened; None if the cache has all.
            value: (num_key_tokens, num_kv_heads, head_size_v) or flattened.
            kv_cache: the cache to use, a tensor, a KVCacheView or its pair; None for the one that
                is bound to the layer.
            attn_metadata: from `build_metadata`; None to take it from forward_context. In a
                profiling run, `forward_context(None)`, the output is zeros.
            output: where the result goes, (num_tokens, num_heads, head_size_v); made if None.
            output_scale: see AttentionImpl.forward.
            output_block_scale: see AttentionImpl.forward.

        Returns:
            The output, flattened if the query is; with returns_lse also lse, (num_tokens,
            num_heads) float32. Rows beyond the batch's tokens are padding: 0, and −inf in lse.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        spec = self.spec
        check_query(query, output)
        if torch.is_grad_enabled():  # the op hides autograd from what it calls
            check_no_grad(query, key, value, output, *self._per_head.values())
        is_flat = query.dim() == 2
        query = unflatten(self, "query", query, self._call_spec.num_heads, spec.head_size)
        if key is not None and value is not None:
            key = unflatten(self, "key", key, spec.num_kv_heads, spec.head_size)
            value = unflatten(self, "value", value, spec.num_kv_heads, spec.head_size_v)
        scales = (output_scale, output_block_scale)
        return self._call(query, key, value, kv_cache, attn_metadata, output, scales, is_flat)

    def _call(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: Any,
        attn_metadata: AttentionMetadata | None,
        output: torch.Tensor | None,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        is_flat: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Make the results, and run the op or its body."""
        spec = self.spec
        if output is None:
            shape = (query.shape[0], self._call_spec.num_heads, self._output_size)
            dtype = self._fp8_dtype if spec.output_quant else query.dtype
            output = torch.empty(shape, dtype=dtype, device=query.device)
        lse = None
        if spec.returns_lse:
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        arguments = (query, key, value, output, lse, *scales)
        if torch.compiler.is_compiling():
            if kv_cache is not None or attn_metadata is not None:
                raise InvalidInputError(
                    "Under torch.compile the cache is the one that is bound to the layer and the "
                    "metadata comes from forward_context; do not pass them."
                )
            attention_op(*arguments, self._cache_state.token, self._op_key)
        else:
            self._run(*arguments, kv_cache, attn_metadata)
        result = output.flatten(1) if is_flat else output
        return result if lse is None else (result, lse)

    def _run(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
        kv_cache: Any = None,
        metadata: Any = None,
    ) -> None:
        """The body of the op: check the call, and run it on the layer's backends."""
        spec = self.spec
        if query.device != self._device:
            self._bind(query.device)
        elif self._selected_at != version():
            self._refresh()
        check_dtype(self, query)
        if spec.output_quant is not None or is_fp8(output.dtype):
            check_quantized(self, output, output_scale, output_block_scale)
        if kv_cache is None:
            kv_cache = self.kv_cache
        else:
            kv_cache = as_kv_cache(kv_cache)
            check_block_size(self, kv_cache)
        given = (query, key, value, kv_cache)
        results = (output, lse, output_scale, output_block_scale)
        attend = watched(self._attend)
        try:
            attend(self._require_binding(), metadata, given, *results)
        except AttemptFailed as failed:
            self._bind(query.device, lambda other: attend(other, metadata, given, *results), failed)

    def _attend(
        self,
        binding: LayerBinding,
        metadata: Any,
        given: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, KVCache | None],
        output: torch.Tensor,
        lse: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
    ) -> None:
        """Plan and compute a call on these backends; `given` are query, key, value and cache.

        A second call, after a first one that failed, repeats whatever that one did: the same keys
        and values go to the same slots by the same scales, no slot is read before that, and all of
        the output is written.
        """
        used = self._plan(binding, metadata)
        scales = (output_scale, output_block_scale)
        if used is None:  # a profiling run
            size = self._output_size
            result = profiling_output(self._call_spec, given[0], output, *scales, head_size_v=size)
            if lse is not None:
                lse.copy_(result[1])
            return
        derived_scales = False
        if derives_scales(used) and not self._cache_state.scales_are_final:
            derived_scales = self._derive_scales(*given[1:], used.slot_mapping)
        observe = observer() if self.context_parallel is None else None  # it sees no other rank
        seen = None if observe is None else observe(self, *given, self._batch_of(metadata))
        try:
            result = binding.impl.forward(self, *given, used, output, *scales)
        except (InvalidInputError, UnsupportedError):
            raise
        except Exception as error:
            binding.raise_failed(error, self._batch_of(metadata), "at its launch")
        if lse is not None:
            lse.copy_(result[1])
        if derived_scales:
            self._cache_state.scales_are_final = True
        if seen is not None:
            seen.compare(result, used, *scales)

    def _batch_of(self, metadata: Any) -> AttentionBatch | None:
        """The batch behind metadata, None if it keeps none; without metadata the context's."""
        if metadata is None:
            return current_context().batch_for(self.prefix)
        batch: AttentionBatch | None = getattr(metadata, "batch", None)
        return batch

    def extra_repr(self) -> str:
        """The request and the picks, for print(model)."""
        split = "" if self.context_parallel is None else f", {self.context_parallel!r}"
        return f"{self.spec}, backends={self._picks()}{split}"
