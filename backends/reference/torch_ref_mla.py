"""REFERENCE_MLA: multi-head latent attention in plain PyTorch, any device, any dtype.

DeepSeek-V2 (arXiv:2405.04434), section 2.1. The cache holds one latent c and one rotated key part
per token, for all heads together; kv_b_proj expands a latent to each head's keys and values:

    expanded (prefill):  key = [W_UK c, k_pe], value = W_UV c
    absorbed (decode):   query = [W_UK^T q_nope, q_pe], key = [c, k_pe], value = c, output = W_UV o

Both compute the same; the first multiplies each key once, the second each query once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.backends.reference.semantics import attend, compute_dtype, without_autocast
from attn_dispatch.backends.reference.torch_ref import FLOATS
from attn_dispatch.environment import check_mode
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import ANY, NOT_NONE, Capabilities, OneOf
from attn_dispatch.interface.contents import check_batch_contents
from attn_dispatch.interface.impl import AttentionLayer, MLAAttentionImpl
from attn_dispatch.interface.kv_access import gather_kv, write_mla_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import store_output
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, KV_CACHE_DTYPES, MLADims
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.interface.validation import (
    check_block_size,
    check_block_table,
    check_cache_tensor,
    check_metadata,
    check_no_grad,
    check_output,
    check_slot_mapping,
    profiling_output,
)
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["ReferenceMLABackend", "ReferenceMLABuilder", "ReferenceMLAImpl", "ReferenceMLAMetadata"]

#: An entry has a latent and a rotated key. One scale for both would be inaccurate.
_KV_CACHE_DTYPES = tuple(name for name in KV_CACHE_DTYPES if name != INT8_PER_TOKEN_HEAD)


class ReferenceMLAMetadata(BatchMetadata):
    """The batch as it is; REFERENCE_MLA plans nothing."""


class ReferenceMLABuilder(AttentionMetadataBuilder[ReferenceMLAMetadata]):
    """Checks that the batch has a block table."""

    def build(self, batch: AttentionBatch) -> ReferenceMLAMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        if batch.block_table is None:
            raise InvalidInputError("Multi-head latent attention needs a block_table in the batch.")
        metadata: ReferenceMLAMetadata = ReferenceMLAMetadata.of(batch, self)
        return metadata


class ReferenceMLAImpl(MLAAttentionImpl[ReferenceMLAMetadata]):
    """Computes request by request: prefill expanded, decode absorbed.

    Args:
        *args: AttentionImpl's arguments, as MLAAttentionImpl describes them.
        mla: the sizes.
        kv_b_proj: (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank), or a module whose
            `weight` that is; each head has its key rows first, then its value rows.
        q_proj: maps hidden_states_or_cq to the queries, rotary embedding applied; None if
            hidden_states_or_cq are the queries.
        **kwargs: AttentionImpl's arguments by keyword.

    Raises:
        InvalidInputError: kv_b_proj has another shape or a bias, or head_size and num_kv_heads are
            not those of the latent cache.
        UnsupportedError: an argument asks for a feature that the backend does not declare.
    """

    def __init__(
        self,
        *args: Any,
        mla: MLADims,
        kv_b_proj: torch.Tensor | torch.nn.Module,
        q_proj: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mla = mla
        self.kv_b_proj = kv_b_proj
        self.q_proj = q_proj
        self.head_size_v = mla.kv_lora_rank
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        if (self.head_size, self.num_kv_heads) != (latent, 1):
            raise InvalidInputError(
                f"head_size={self.head_size} and num_kv_heads={self.num_kv_heads} do not describe "
                f"the latent cache; give kv_lora_rank + qk_rope_head_dim = {latent} and 1."
            )
        if getattr(kv_b_proj, "bias", None) is not None:
            raise InvalidInputError(
                "kv_b_proj has a bias, which multi-head latent attention does not support. Give a "
                "module without one."
            )
        weight = self._weight()
        wanted = (self.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        if tuple(weight.shape) != wanted:
            raise InvalidInputError(
                f"kv_b_proj has shape {tuple(weight.shape)}; the layer takes {wanted}: "
                "(num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank)."
            )

    def _weight(self) -> torch.Tensor:
        given = self.kv_b_proj
        weight = given if isinstance(given, torch.Tensor) else given.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Static fp8."""
        return quant_key == "fp8_e4m3"

    @without_autocast
    def forward(
        self,
        layer: AttentionLayer,
        hidden_states_or_cq: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ReferenceMLAMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See MLAAttentionImpl.forward."""
        if attn_metadata is None:
            scales = (output_scale, output_block_scale)
            return profiling_output(
                self, hidden_states_or_cq, output, *scales, head_size_v=self.mla.v_head_dim
            )
        check_metadata(self, attn_metadata, ReferenceMLAMetadata)
        batch, mla = attn_metadata.batch, self.mla
        query = hidden_states_or_cq if self.q_proj is None else self.q_proj(hidden_states_or_cq)
        query, k_pe = (t.flatten(1) if t.dim() > 2 else t for t in (query, k_pe))
        self._check(query, kv_c_normed, k_pe, kv_cache, batch)
        if layer._k_scale.dim():
            raise InvalidInputError(
                "The layer's scale is per head; a latent cache has one per tensor."
            )
        query = query.unflatten(1, (self.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        shape = (len(query), self.num_heads, mla.v_head_dim)
        check_output(shape, query, output, output_scale, output_block_scale)
        if self.kv_sharing_target_layer_name is None:
            slots = batch.slot_mapping
            assert slots is not None  # by _check
            new = (kv_c_normed[: len(slots)], k_pe[: len(slots)])
            write_mla_cache(*new, kv_cache, slots, layer._k_scale)

        dtype = compute_dtype(query.dtype)
        result = torch.zeros(shape, dtype=dtype, device=query.device)
        lse = torch.full(shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
        for request, phase in enumerate(batch.phases):
            if batch.query_lens[request] == 0 or batch.seq_lens_list[request] == 0:
                continue
            rows = slice(batch.query_start_list[request], batch.query_start_list[request + 1])
            latents, rotated = self._latents_of(request, layer, kv_cache, batch, dtype)
            compute = self._absorbed if phase is Phase.DECODE else self._expanded
            result[rows], lse[rows] = compute(query[rows].to(dtype), latents, rotated)
        if output is None:
            output = torch.empty_like(result, dtype=query.dtype)
        store_output(result, output, output_scale, output_block_scale)
        return (output, lse) if self.returns_lse else output

    def _check(
        self,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        mla = self.mla
        check_no_grad(query, kv_c_normed, k_pe, kv_cache)
        widths = {
            "query": (query, self.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)),
            "kv_c_normed": (kv_c_normed, mla.kv_lora_rank),
            "k_pe": (k_pe, mla.qk_rope_head_dim),
        }
        for name, (tensor, width) in widths.items():
            if tensor.dim() != 2 or tensor.shape[1] != width or len(tensor) < batch.num_tokens:
                raise InvalidInputError(
                    f"{name} has shape {tuple(tensor.shape)}; the layer takes {width} values for "
                    f"each of the batch's {batch.num_tokens} tokens."
                )
            if tensor.dtype != query.dtype or tensor.device != query.device:
                raise InvalidInputError(
                    f"{name} is {tensor.dtype} on {tensor.device}, and the query is {query.dtype} "
                    f"on {query.device}. Give both in the same dtype, on the same device."
                )
        width = mla.kv_lora_rank + mla.qk_rope_head_dim
        if kv_cache.dim() != 3 or kv_cache.shape[2] != width:
            raise InvalidInputError(
                f"kv_cache has shape {tuple(kv_cache.shape)}; the layer takes "
                f"(num_blocks, block_size, {width})."
            )
        check_cache_tensor(self.kv_cache_dtype, query, kv_cache)
        check_block_size(batch, kv_cache.shape[1])
        check_block_table(batch, kv_cache.shape[1], query.device)
        if self.kv_sharing_target_layer_name is None:
            check_slot_mapping(batch, min(len(kv_c_normed), len(k_pe)), query.device)
        if query.device.type == "cpu" or check_mode():
            check_batch_contents(batch, kv_cache)

    def _latents_of(
        self,
        request: int,
        layer: AttentionLayer,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The request's latents (seq_len, kv_lora_rank) and key parts (seq_len, rope)."""
        assert batch.block_table is not None
        blocks, seq_len = batch.block_table[request], batch.seq_lens_list[request]
        stored = gather_kv(kv_cache[:, :, None], blocks, seq_len, layer._k_scale, dtype)
        latents, rotated = stored[:, 0].split(
            [self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=-1
        )
        return latents, rotated

    def _projections(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK (num_heads, qk_nope_head_dim, rank) and W_UV (num_heads, v_head_dim, rank)."""
        weight = self._weight().to(dtype).view(self.num_heads, -1, self.mla.kv_lora_rank)
        up_k, up_v = weight.split([self.mla.qk_nope_head_dim, self.mla.v_head_dim], dim=1)
        return up_k, up_v

    def _expanded(
        self, query: torch.Tensor, latents: torch.Tensor, rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up_k, up_v = self._projections(query.dtype)
        keys = torch.einsum("kr,hnr->khn", latents, up_k)
        rotated = rotated[:, None].expand(-1, self.num_heads, -1)
        values = torch.einsum("kr,hvr->khv", latents, up_v)
        return self._attend(query, torch.cat([keys, rotated], dim=-1), values)

    def _absorbed(
        self, query: torch.Tensor, latents: torch.Tensor, rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up_k, up_v = self._projections(query.dtype)
        nope, pe = query.split([self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], dim=-1)
        query = torch.cat([torch.einsum("qhn,hnr->qhr", nope, up_k), pe], dim=-1)
        keys = torch.cat([latents, rotated], dim=-1)[:, None]
        mixed, lse = self._attend(query, keys, latents[:, None])
        return torch.einsum("qhr,hvr->qhv", mixed, up_v), lse

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(
            query,
            keys,
            values,
            scale=self.scale,
            causal=self.causal,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
        )


class ReferenceMLABackend(AttentionBackend):
    """Multi-head latent attention in plain PyTorch."""

    interface_version = 2
    name = "REFERENCE_MLA"
    impl_cls = ReferenceMLAImpl
    builder_cls = ReferenceMLABuilder
    metadata_cls = ReferenceMLAMetadata
    capabilities = Capabilities(
        devices=(DeviceMatch(),),
        num_heads=ANY,
        num_kv_heads=OneOf(1),
        head_size=ANY,
        head_size_v=ANY,
        dtype=FLOATS,
        kv_cache_dtype=OneOf(*_KV_CACHE_DTYPES),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(AttentionType.DECODER),
        causal=OneOf(True, False),
        sliding_window=ANY,
        logits_soft_cap=ANY,
        kv_sharing=OneOf(True, False),
        mla=NOT_NONE,
        returns_lse=OneOf(True, False),
        output_quant=OneOf(None, "fp8_e4m3"),
    )

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, ...]:
        """(num_blocks, block_size, head_size): one latent and key part for all heads."""
        return num_blocks, block_size, head_size

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
