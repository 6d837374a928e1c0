"""REFERENCE_MLA: multi-head latent attention in plain PyTorch, any device, any dtype."""

from __future__ import annotations

import torch

from attn_dispatch.backends.mla import ProjectingMLAImpl, latent_cache_shape
from attn_dispatch.backends.reference.semantics import attend, compute_dtype, without_autocast
from attn_dispatch.backends.reference.torch_ref import FLOATS
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import ANY, NOT_NONE, Capabilities, OneOf
from attn_dispatch.interface.contents import with_exact_lengths
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.kv_access import gather_kv, write_mla_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import store_output
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, KV_CACHE_DTYPES
from attn_dispatch.interface.types import LENGTHS, AttentionType, Phase
from attn_dispatch.interface.validation import check_metadata, profiling_output
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["ReferenceMLABackend", "ReferenceMLABuilder", "ReferenceMLAImpl", "ReferenceMLAMetadata"]

#: The result of AttentionBatch.positions_of.
_Positions = tuple[torch.Tensor, torch.Tensor] | None
#: An entry has a latent and a rotated key. One scale for both would be inaccurate.
_KV_CACHE_DTYPES = tuple(name for name in KV_CACHE_DTYPES if name != INT8_PER_TOKEN_HEAD)


class ReferenceMLAMetadata(BatchMetadata):
    """The batch as it is; REFERENCE_MLA plans nothing."""


class ReferenceMLABuilder(AttentionMetadataBuilder[ReferenceMLAMetadata]):
    """Checks that the batch has a block table; upper bounds are replaced by the true lengths."""

    def build(self, batch: AttentionBatch) -> ReferenceMLAMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        if batch.block_table is None:
            raise InvalidInputError("Multi-head latent attention needs a block_table in the batch.")
        exact = with_exact_lengths(batch, self.spec)
        metadata: ReferenceMLAMetadata = ReferenceMLAMetadata.of(exact, self)
        return metadata


class ReferenceMLAImpl(ProjectingMLAImpl[ReferenceMLAMetadata]):
    """Computes request by request: prefill expanded, decode absorbed."""

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
        query = self._queries(hidden_states_or_cq)
        k_pe = k_pe.flatten(1) if k_pe.dim() > 2 else k_pe
        self._check(layer, query, kv_c_normed, k_pe, kv_cache, batch)
        query = query.unflatten(1, (self.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        shape = (len(query), self.num_heads, mla.v_head_dim)
        tensors = (query, kv_c_normed, k_pe, kv_cache)
        self._check_output(*tensors, output, output_scale, output_block_scale)
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
            positions = batch.positions_of(request)
            result[rows], lse[rows] = compute(query[rows].to(dtype), latents, rotated, positions)
        if output is None:
            output = torch.empty_like(result, dtype=query.dtype)
        store_output(result, output, output_scale, output_block_scale)
        return (output, lse) if self.returns_lse else output

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

    def _expanded(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        positions: _Positions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up_k, up_v = self._projections(query.dtype)
        keys = torch.einsum("kr,hnr->khn", latents, up_k)
        rotated = rotated[:, None].expand(-1, self.num_heads, -1)
        values = torch.einsum("kr,hvr->khv", latents, up_v)
        return self._attend(query, torch.cat([keys, rotated], dim=-1), values, positions)

    def _absorbed(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        positions: _Positions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up_k, up_v = self._projections(query.dtype)
        nope, pe = query.split([self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], dim=-1)
        query = torch.cat([torch.einsum("qhn,hnr->qhr", nope, up_k), pe], dim=-1)
        keys = torch.cat([latents, rotated], dim=-1)[:, None]
        mixed, lse = self._attend(query, keys, latents[:, None], positions)
        return torch.einsum("qhr,hvr->qhv", mixed, up_v), lse

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: _Positions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(
            query,
            keys,
            values,
            scale=self.scale,
            causal=self.causal,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            positions=positions,
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
        lengths=OneOf(*LENGTHS),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(AttentionType.DECODER),
        causal=OneOf(True, False),
        sliding_window=ANY,
        key_positions=OneOf(True, False),
        logits_soft_cap=ANY,
        kv_sharing=OneOf(True, False),
        mla=NOT_NONE,
        returns_lse=OneOf(True, False),
        output_quant=OneOf(None, "fp8_e4m3"),
    )

    get_kv_cache_shape = staticmethod(latent_cache_shape)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
