"""The frame of `forward` for backends that do not quantize their output: checks, cache, output."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer, get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output

__all__ = ["ForwardArgs", "UnquantizedImpl"]

M = TypeVar("M", bound=BatchMetadata)


@dataclass(slots=True, eq=False)
class ForwardArgs(Generic[M]):
    """The arguments of AttentionImpl.forward that an impl reads."""

    layer: AttentionLayer
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    kv_cache: KVCache | None
    metadata: M

    def request_kv(self, request: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's keys and values, (seq_len, num_kv_heads, size), from cache or arguments."""
        batch, spec = self.metadata.batch, self.metadata.builder.spec
        if self.kv_cache is None:
            assert self.key is not None
            assert self.value is not None
            rows = slice(*batch.key_starts[request : request + 2])
            return self.key[rows].to(dtype), self.value[rows].to(dtype)
        assert batch.block_table is not None
        blocks, seq_len = batch.block_table[request], batch.seq_lens_list[request]
        views = view_kv_cache(self.kv_cache, spec.head_size, spec.head_size_v)
        keys, values = (
            gather_kv(view, blocks, seq_len, scale, dtype)
            for view, scale in zip(views, get_kv_scales(self.layer, self.kv_cache), strict=True)
        )
        return keys, values


class UnquantizedImpl(AttentionImpl[M]):
    """An impl whose output has the query's dtype: `forward` checks the call, `_attend` computes."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        attn_metadata: M | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, self.backend_cls.get_metadata_cls())
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(
                f"{self.backend_cls.get_name()} does not quantize its output; TRITON_ATTN and "
                "REFERENCE do."
            )
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        args = ForwardArgs(layer, query, key, value, kv_cache, attn_metadata)
        self._check_call(args)
        if kv_cache is not None and key is not None and value is not None:
            self.write_kv(layer, key, value, kv_cache, batch)
        shape, lse = (query.shape[0], self.num_heads, self.head_size_v), None
        if output is None:
            output = query.new_empty(shape)
        if self.returns_lse:
            lse = query.new_empty(shape[:2], dtype=torch.float32)
        if shape[0] > batch.num_tokens:  # padding rows
            output[batch.num_tokens :] = 0
            if lse is not None:
                lse[batch.num_tokens :] = -torch.inf
        self._attend(args, output, lse)
        return output if lse is None else (output, lse)

    def _check_call(self, args: ForwardArgs[M]) -> None:
        """Reject what this backend cannot read. Nothing has been written yet."""

    @abstractmethod
    def _attend(self, args: ForwardArgs[M], output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Fill the rows of the batch's tokens in output and lse. The cache holds the new keys."""
