"""Multi-head latent attention of a layer: prefills expanded, everything else by its backend.

The layer's backend computes in absorbed form, over the cache of latents. For prefills that takes
more multiplications than dense attention over expanded keys (DeepSeek-V2, arXiv:2405.04434):

    key = [W_UK c, k_pe], value = W_UV c

So the new keys and values of prefills are expanded, and attended by the dense backend that is
picked for such heads. Earlier keys, of a prefix or of earlier chunks of a prompt, are read from the
cache and expanded chunk by chunk. Each part returns its LSE, and the parts are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from attn_dispatch.backends.reference.semantics import without_autocast
from attn_dispatch.errors import BackendFailure, InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch, BatchPart
from attn_dispatch.interface.batch_parts import select
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import (
    as_indexable_bytes,
    dequantize,
    is_fp8,
    store_output,
)
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.runtime.composed import ComposedImpl, Given, Result, Scales
from attn_dispatch.runtime.functional import merge_into
from attn_dispatch.runtime.guard import FinalFailure
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_plan import (
    ExpandedPlan,
    KeyRanges,
    expanded_requests,
    plan_expanded,
)
from attn_dispatch.runtime.mla_weights import KVProjection
from attn_dispatch.runtime.routing import RoutedImpl

__all__ = ["ExpandedPrefill", "MLABuilder", "MLAImpl", "MLAMetadata"]


@dataclass
class MLAMetadata(BatchMetadata):
    """A batch of latent attention: the requests in absorbed form, and those in expanded form.

    Attributes:
        absorbed: the backend's metadata of its requests; None if there are none.
        absorbed_rows: these requests and their rows.
        expanded: the plan of the others; None if there are none.
        expanded_rows: these requests and their rows.
    """

    absorbed: Any
    absorbed_rows: BatchPart | None
    expanded: ExpandedPlan | None
    expanded_rows: BatchPart | None

    def __post_init__(self) -> None:
        batch = self.batch
        super().__post_init__()
        if self.batch is not batch:
            fresh = self.builder.build(self.batch)
            self.absorbed, self.absorbed_rows = fresh.absorbed, fresh.absorbed_rows
            self.expanded, self.expanded_rows = fresh.expanded, fresh.expanded_rows


class MLABuilder(AttentionMetadataBuilder[MLAMetadata]):
    """Splits a batch by the form, and plans both parts.

    Args:
        inner: the builder of the layer's backends.
        chunk: earlier keys that are expanded at a time; 0 if no request is expanded.
        always: expand all prefills, and not only where that takes fewer multiplications.
    """

    def __init__(self, inner: AttentionMetadataBuilder[Any], chunk: int, always: bool) -> None:
        super().__init__(inner.spec, inner.device)
        self._inner, self._chunk, self._always = inner, chunk, always
        #: Equal for builders whose metadata is interchangeable, see LayerBinding.accepts.
        self.route = (type(inner), getattr(inner, "route", None), chunk, always)

    def build(self, batch: AttentionBatch) -> MLAMetadata:
        """The metadata of both parts; see AttentionMetadataBuilder.build."""
        metadata: MLAMetadata = MLAMetadata.of(
            batch, self, absorbed=None, absorbed_rows=None, expanded=None, expanded_rows=None
        )
        chosen = self.expanded_requests(batch)
        rest = sorted(set(range(batch.num_reqs)) - set(chosen))
        whole = BatchPart(batch, slice(None), slice(None))
        if chosen:
            rows = whole if not rest else _part(batch, chosen)
            metadata.expanded_rows = rows
            metadata.expanded = plan_expanded(rows.batch, self._chunk)
        if rest or not chosen:
            rows = whole if not chosen else _part(batch, rest)
            metadata.absorbed_rows = rows
            metadata.absorbed = self._inner.build(rows.batch)
        return metadata

    def expanded_requests(self, batch: AttentionBatch) -> list[int]:
        """The requests of a batch that are computed in expanded form."""
        mla = self.spec.mla
        assert mla is not None
        return expanded_requests(batch, mla, always=self._always) if self._chunk else []

    def build_absorbed(self, batch: AttentionBatch) -> Any:
        """The backend's metadata of a batch, all of it in absorbed form."""
        return self._inner.build(batch)

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> MLAMetadata:
        """See AttentionMetadataBuilder.build_for_graph. Captured steps are absorbed."""
        metadata: MLAMetadata = MLAMetadata.of(
            batch,
            self,
            absorbed=self._inner.build_for_graph(batch, limits),
            absorbed_rows=BatchPart(batch, slice(None), slice(None)),
            expanded=None,
            expanded_rows=None,
        )
        return metadata

    def update_for_graph(self, metadata: MLAMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        self._inner.update_for_graph(metadata.absorbed, batch)


def _part(batch: AttentionBatch, chosen: list[int]) -> BatchPart:
    part = BatchPart(*select(batch, chosen))
    part.batch.trust()  # the whole batch was checked
    return part


class ExpandedPrefill:
    """Dense attention over keys and values that are expanded from the cache of latents.

    Args:
        spec: of the layer, with mla.
        projection: the layer's kv_b_proj.
        new: the dense layer of the new keys.
        earlier: that of the keys before them.
    """

    def __init__(
        self, spec: AttentionSpec, projection: KVProjection, new: Attention, earlier: Attention
    ) -> None:
        assert spec.mla is not None
        self._num_heads, self._dtype = spec.num_heads, spec.dtype
        self._mla: MLADims = spec.mla
        self._projection = projection
        self.new, self.earlier = new, earlier

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: torch.Tensor, plan: ExpandedPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of requests whose new latents are in the cache already.

        Args:
            query: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim).
            kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim).
            scale: () float32, of an fp8 cache.
            plan: of these requests.

        Returns:
            (num_tokens, num_heads, v_head_dim), in the query's dtype, or in float32 if there were
            parts to merge; and lse, (num_tokens, num_heads) float32.
        """
        output, lse = self._part(self.new, query, kv_cache, scale, plan.new)
        if not plan.earlier:
            return output, lse
        merged = output.to(torch.promote_types(output.dtype, torch.float32))
        for ranges in plan.earlier:
            rows = ranges.rows
            part, part_lse = self._part(self.earlier, query[rows], kv_cache, scale, ranges)
            merge_into(merged[rows], lse[rows], part, part_lse)
        return merged, lse

    def _part(
        self,
        layer: Attention,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: torch.Tensor,
        ranges: KeyRanges,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._expand(kv_cache, scale, ranges)
        result = layer(query, key, value, attn_metadata=ranges.metadata_for(layer))
        output, lse = result
        return output, lse

    def _expand(
        self, kv_cache: torch.Tensor, scale: torch.Tensor, ranges: KeyRanges
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all heads, (num_keys, num_heads, size)."""
        mla, heads = self._mla, self._num_heads
        places = ranges.places(kv_cache.shape[1])
        entries = as_indexable_bytes(kv_cache)[places].view(kv_cache.dtype)
        if is_fp8(kv_cache.dtype):
            entries = dequantize(entries, scale, self._dtype)
        latents, rotated = entries.to(self._dtype).split(
            [mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1
        )
        product = linear(latents, self._projection.weight.to(self._dtype))
        product = product.view(-1, heads, mla.qk_nope_head_dim + mla.v_head_dim)
        nope, value = product.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        key = product.new_empty(len(product), heads, size)
        key[..., : mla.qk_nope_head_dim] = nope
        key[..., mla.qk_nope_head_dim :] = rotated[:, None]
        return key, value


class MLAImpl(ComposedImpl):
    """Runs each part of a batch in its form.

    Args:
        inner: the impl of the layer's backends, absorbed form.
        expanded: the other form; None if no request is expanded.
        falls_back: if dense attention fails, compute these requests in absorbed form.
        warn: is called with the failure then.
    """

    metadata_cls = MLAMetadata
    forward = without_autocast(ComposedImpl.forward)

    def __init__(
        self,
        inner: Any,
        expanded: ExpandedPrefill | None,
        falls_back: bool,
        warn: Callable[[BackendFailure], None],
    ) -> None:
        self._inner, self._expanded = inner, expanded
        self._falls_back, self._warn = falls_back, warn
        self._first = next(iter(inner._impls.values())) if isinstance(inner, RoutedImpl) else inner

    def _compute(
        self, given: Given, attn_metadata: MLAMetadata, output: torch.Tensor, scales: Scales
    ) -> Result:
        layer, query, kv_c_normed, k_pe, kv_cache = given
        if not isinstance(kv_cache, torch.Tensor):
            kind = "None" if kv_cache is None else f"a {type(kv_cache).__name__}"
            raise InvalidInputError(
                f"kv_cache is {kind}; latent attention needs a tensor, (num_blocks, block_size, "
                "kv_lora_rank + qk_rope_head_dim). Bind the caches by bind_kv_caches."
            )
        new: tuple[Any, Any] = (kv_c_normed, k_pe)
        if attn_metadata.expanded is None or self._expanded is None:
            metadata = attn_metadata.absorbed
            if attn_metadata.expanded is not None:  # the dense layers have failed since
                metadata = self._absorbed_metadata(attn_metadata, attn_metadata.batch)
            result: Result = self._inner.forward(*given, metadata, output, *scales)
            return result
        batch = attn_metadata.batch
        check = getattr(self._first, "check_call", None)
        if check is not None:
            check(layer, query, *new, kv_cache, batch, output, *scales)
        # Requests of both parts may share a prefix, so write all latents before any part attends.
        self._first.write_kv(layer, *new, kv_cache, batch)
        lse = None
        if self._first.returns_lse:
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        if len(output) > batch.num_tokens:  # padding belongs to no part
            as_indexable_bytes(output)[batch.num_tokens :] = 0
            if lse is not None:
                lse[batch.num_tokens :] = float("-inf")
        rows = attn_metadata.expanded_rows
        assert rows is not None
        try:
            found, found_lse = self._expanded.attend(
                query[: batch.num_tokens][rows.tokens],
                kv_cache,
                layer._k_scale,
                attn_metadata.expanded,
            )
        except BackendFailure as error:
            if not self._falls_back:
                raise FinalFailure(str(error)) from error
            self._warn(error)
            self._expanded = None  # for this layer, from now on
            return self.forward(layer, query, *new, kv_cache, attn_metadata, output, *scales)
        own = output[rows.tokens]
        own = own[: batch.num_tokens]
        store_output(found, own, *scales)
        if not isinstance(rows.tokens, slice):  # indexing made a copy: put it back
            as_indexable_bytes(output)[rows.tokens] = as_indexable_bytes(own)
        if lse is not None:
            lse[: batch.num_tokens][rows.tokens] = found_lse
        if attn_metadata.absorbed_rows is not None:
            self._attend_rest(layer, query, new, kv_cache, attn_metadata, output, lse, scales)
        return output if lse is None else (output, lse)

    def _attend_rest(
        self,
        layer: Any,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        metadata: MLAMetadata,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        """The requests in absorbed form, by the layer's backend; output and lse are written."""
        rows = metadata.absorbed_rows
        assert rows is not None
        tokens, own = rows.tokens, output[rows.tokens]
        latents = (each[rows.keys] for each in new)
        result = self._inner.forward(
            layer, query[tokens], *latents, kv_cache, metadata.absorbed, own, *scales
        )
        if not isinstance(tokens, slice):  # indexing made a copy: put it back
            as_indexable_bytes(output)[tokens] = as_indexable_bytes(own)
        if lse is not None:
            lse[tokens] = result[1]

    @staticmethod
    def _absorbed_metadata(metadata: MLAMetadata, batch: AttentionBatch) -> Any:
        builder = metadata.builder
        assert isinstance(builder, MLABuilder)
        return builder.build_absorbed(batch)
