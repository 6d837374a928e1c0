"""What every implementation of multi-head latent attention has in common.

DeepSeek-V2 (arXiv:2405.04434), section 2.1. The cache holds one latent c and one rotated key part
per token, for all heads together; kv_b_proj expands a latent to each head's keys and values:

    expanded (prefill):  key = [W_UK c, k_pe], value = W_UV c
    absorbed (decode):   query = [W_UK^T q_nope, q_pe], key = [c, k_pe], value = c, output = W_UV o

Both compute the same; the first multiplies each key once, the second each query once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.environment import check_mode
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.contents import check_batch_contents
from attn_dispatch.interface.impl import AttentionLayer, MLAAttentionImpl
from attn_dispatch.interface.metadata import T
from attn_dispatch.interface.shared_memory import check_shared_memory, may_share_memory
from attn_dispatch.interface.spec import MLADims
from attn_dispatch.interface.validation import (
    check_block_size,
    check_block_table,
    check_cache_tensor,
    check_no_grad,
    check_output,
    check_slot_mapping,
)

__all__ = ["ProjectingMLAImpl", "latent_cache_shape"]

#: What the checks of a call read of its tensors.
_form = operator.attrgetter("shape", "dtype", "device")


def latent_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """(num_blocks, block_size, head_size): one latent and key part for all heads."""
    return num_blocks, block_size, head_size


class ProjectingMLAImpl(MLAAttentionImpl[T]):
    """An impl that holds the layer's projections, and checks its calls.

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
        #: What the checks of a call depend on, for AttentionBatch.checked.
        self._checked_as = repr(
            (mla, self.num_heads, self.kv_cache_dtype, self.kv_sharing_target_layer_name is None)
        )

    def _weight(self) -> torch.Tensor:
        given = self.kv_b_proj
        weight = given if isinstance(given, torch.Tensor) else given.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _projections(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK (num_heads, qk_nope_head_dim, rank) and W_UV (num_heads, v_head_dim, rank).

        Views of kv_b_proj if it has this dtype. Made at each call, because a model may load its
        weights later, or move them.
        """
        weight = self._weight().to(dtype).view(self.num_heads, -1, self.mla.kv_lora_rank)
        up_k, up_v = weight.split([self.mla.qk_nope_head_dim, self.mla.v_head_dim], dim=1)
        return up_k, up_v

    def _queries(self, hidden_states_or_cq: torch.Tensor) -> torch.Tensor:
        """(num_tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)), not checked."""
        given = hidden_states_or_cq
        query = given if self.q_proj is None else self.q_proj(given)
        return query.flatten(1) if query.dim() > 2 else query

    def check_call(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> None:
        """Check the arguments of `forward`, for a caller that gives it a batch in parts.

        Args:
            layer: as for `forward`, like the others.
            query: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim).
            kv_c_normed, k_pe, kv_cache: as for `forward`.
            batch: all of it.
            output, output_scale, output_block_scale: as for `forward`.

        Raises:
            InvalidInputError: an argument does not fit.
        """
        flat = (each.flatten(1) if each.dim() > 2 else each for each in (query, k_pe))
        flat_query, flat_rope = flat
        self._check(layer, flat_query, kv_c_normed, flat_rope, kv_cache, batch)
        tensors = (query, kv_c_normed, k_pe, kv_cache)
        self._check_output(*tensors, output, output_scale, output_block_scale)

    def _check_output(
        self,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
    ) -> None:
        """Check the output and its scales, and that what is written is not still to be read.

        Raises:
            InvalidInputError: an argument does not fit.
        """
        shape = (len(query), self.num_heads, self.mla.v_head_dim)
        check_output(shape, query, output, output_scale, output_block_scale)
        tensors = (query, kv_c_normed, k_pe, kv_cache, output)
        if may_share_memory(*tensors):
            check_shared_memory(*tensors)

    def _check(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """Check a call's arguments, query and k_pe as (num_tokens, width).

        What passed for one layer of a batch is not checked again for layers of the same sizes.

        Raises:
            InvalidInputError: an argument does not fit.
        """
        check_no_grad(query, kv_c_normed, k_pe, kv_cache)
        signature = (
            self._checked_as, _form(query), _form(kv_c_normed), _form(k_pe), _form(kv_cache),
            kv_cache.stride(), layer._k_scale.dim(),
        )  # fmt: skip
        if signature not in batch.checked:
            self._check_forms(layer, query, kv_c_normed, k_pe, kv_cache, batch)
            batch.checked.add(signature)
        if query.device.type == "cpu" or check_mode():
            check_batch_contents(batch, kv_cache)

    def _check_forms(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        mla = self.mla
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
        if layer._k_scale.dim():
            raise InvalidInputError(
                "The layer's scale is per head; a latent cache has one per tensor."
            )
