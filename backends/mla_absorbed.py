"""What implementations of multi-head latent attention in absorbed form have in common.

See backends/mla.py for the two forms. In absorbed form it is attention with one KV head: keys of
kv_lora_rank + qk_rope_head_dim elements, whose first kv_lora_rank are the values too. Prefills take
the same form. Their arithmetic for each pair of a query and a key is then 2 * kv_lora_rank +
qk_rope_head_dim multiplications for each head, where the expanded form has qk_nope_head_dim +
qk_rope_head_dim + v_head_dim: for DeepSeek-V3 1088 and 320. So for long prompts this is slower than
the expanded form would be.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.backends.mla import ProjectingMLAImpl
from attn_dispatch.backends.reference.semantics import without_autocast
from attn_dispatch.backends.triton.kv_writer import LatentCacheWriter
from attn_dispatch.backends.triton.operands import on_tensor_device
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.metadata import T as MetadataT
from attn_dispatch.interface.quantization import store_output
from attn_dispatch.interface.validation import check_metadata, profiling_output

__all__ = ["AbsorbedMLAImpl", "Product", "batched_product"]

#: Stores each head's rows of x, (num_tokens, num_heads, K), times its weight, (K, N), in out,
#: (num_tokens, num_heads, N).
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def batched_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The Product of PyTorch's batched matrix product; weight is (num_heads, K, N)."""
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))


class AbsorbedMLAImpl(ProjectingMLAImpl[MetadataT]):
    """Stores the new latents, absorbs W_UK in the queries, attends, and expands by W_UV.

    A subclass implements `_attend_latents`. A Triton kernel writes the cache.

    Raises:
        BackendFailure: Triton cannot be imported.
        InvalidInputError: as ProjectingMLAImpl.
        UnsupportedError: as ProjectingMLAImpl.
    """

    #: The queries are multiplied by this before they are absorbed.
    _query_factor: float = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer = LatentCacheWriter(self, self.mla.kv_lora_rank)

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Static fp8."""
        return quant_key == "fp8_e4m3"

    @without_autocast
    @on_tensor_device
    def forward(
        self,
        layer: AttentionLayer,
        hidden_states_or_cq: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: MetadataT | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See MLAAttentionImpl.forward."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None:
            return profiling_output(
                self, hidden_states_or_cq, output, *scales, head_size_v=self.mla.v_head_dim
            )
        check_metadata(self, attn_metadata, self.backend_cls.get_metadata_cls())
        assert isinstance(attn_metadata, BatchMetadata)
        batch, mla = attn_metadata.batch, self.mla
        query = self._queries(hidden_states_or_cq)
        k_pe = k_pe.flatten(1) if k_pe.dim() > 2 else k_pe
        self._check(layer, query, kv_c_normed, k_pe, kv_cache, batch)
        query = query.unflatten(1, (self.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        self._check_output(query, kv_c_normed, k_pe, kv_cache, output, *scales)
        self._writer.pages(kv_cache)  # checks its strides before anything is written
        self._check_latents(layer, query, kv_cache, attn_metadata)
        self._writer.write(layer, kv_c_normed[:, None], k_pe[:, None], kv_cache, batch)
        up_k, up_v = self._projections(query.dtype)
        product = self._product(attn_metadata)
        absorbed = self._absorbed(query, up_k, product)
        mixed, lse = self._attend_latents(layer, absorbed, kv_cache, attn_metadata)
        expanded = self._expanded(mixed, up_v, output, product)
        if output is None:
            output = expanded
        elif output is not expanded:
            store_output(expanded, output, *scales)
        if not self.returns_lse:
            return output
        assert lse is not None  # by _attend_latents
        return output, lse

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: Any,
        batch: AttentionBatch,
    ) -> None:
        """See MLAAttentionImpl.write_kv."""
        rotated = value if value.dim() > 2 else value[:, None]
        self._writer.write(layer, key[:, None], rotated, kv_cache, batch)

    @abstractmethod
    def _attend_latents(
        self,
        layer: AttentionLayer,
        absorbed: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: MetadataT,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of absorbed queries over the cache, which has the new latents already.

        Args:
            layer: carries the scale of an fp8 cache.
            absorbed: (num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim), contiguous, times
                `_query_factor`; num_tokens counts padding rows.
            kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), entries contiguous.
            metadata: the batch's.

        Returns:
            (num_tokens, num_heads, kv_lora_rank) mixed latents, in the dtype of `absorbed`; and
            with returns_lse (num_tokens, num_heads) float32, natural log. Rows that see no key, and
            rows of no request, are 0 and −inf.
        """

    def _check_latents(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: MetadataT,
    ) -> None:
        """Check what only this backend relies on; nothing has been written.

        Args:
            layer: as for `_attend_latents`.
            query: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim).
            kv_cache: as for `_attend_latents`.
            metadata: the batch's.

        Raises:
            InvalidInputError: an argument does not fit.
            UnsupportedError: an argument asks for something that the backend does not support.
        """

    def _product(self, metadata: MetadataT) -> Product:
        """What multiplies the projections in a call with this metadata."""
        return batched_product

    def _absorbed(self, query: torch.Tensor, up_k: torch.Tensor, product: Product) -> torch.Tensor:
        """(num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim), what is compared with keys."""
        factor, mla = self._query_factor, self.mla
        query = query if factor == 1.0 else query * factor
        nope, rotated = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        absorbed = query.new_empty(*query.shape[:2], self.head_size)
        product(nope, up_k, absorbed[..., : mla.kv_lora_rank])
        absorbed[..., mla.kv_lora_rank :] = rotated
        return absorbed

    def _expanded(
        self,
        mixed: torch.Tensor,
        up_v: torch.Tensor,
        output: torch.Tensor | None,
        product: Product,
    ) -> torch.Tensor:
        """(num_tokens, num_heads, v_head_dim) from latents; in output if its dtype is right."""
        if output is None or output.dtype != mixed.dtype or output.stride(-1) != 1:
            output = mixed.new_empty(*mixed.shape[:2], self.mla.v_head_dim)
        product(mixed, up_v.transpose(1, 2), output)
        return output
