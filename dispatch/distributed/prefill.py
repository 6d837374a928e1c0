"""Prefills of a layer whose keys are split over ranks, without a merge.

The new keys are on every rank. So the earlier ones are exchanged, each rank getting the KV heads
of its own query heads, and it attends with these heads to all keys. A prompt's first chunk needs no
message at all. This is the exchange of DeepSpeed-Ulysses (arXiv:2309.14509), for keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.distributed.options import SplitOptions
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_shards import local_length
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.kv_view import KVCache, keys_and_values
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.recovery import AttemptFailed
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["GatherPlan", "PrefillByGather"]


@dataclass(frozen=True)
class GatherPlan:
    """Where the keys of some prompts are.

    Attributes:
        num_rows: rows that each rank sends, one for each of the earlier keys that rank 0 has.
        blocks, offsets: (num_rows,) int64, where these are in this rank's cache.
        order: (num_keys,) int64, the keys of all requests in order: row r * num_rows + i is what
            rank r sent as its row i; the rows after them are the new keys.
        metadata: of the dense attention, or what its backend raised.
    """

    num_rows: int
    blocks: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor
    metadata: Any


class PrefillByGather:
    """Computes this rank's query heads of prompts over all keys.

    Args:
        split: the layer's ContextParallel.
        spec: of the layer.
        binding: the backends of dense attention for this rank's heads.
        kv_heads: how many KV heads each rank's query heads have; rank r's begin at
            first_kv_heads[r].
        first_kv_heads: see kv_heads.
    """

    def __init__(
        self,
        split: SplitOptions,
        spec: AttentionSpec,
        binding: LayerBinding,
        kv_heads: int,
        first_kv_heads: list[int],
    ) -> None:
        self._split, self._spec, self.binding = split, spec, binding
        self._kv_heads, self._first_kv_heads = kv_heads, first_kv_heads

    @classmethod
    def of(
        cls,
        split: SplitOptions,
        spec: AttentionSpec,
        device: torch.device,
        context: SelectionContext,
        arguments: Mapping[str, Any],
        sinks: torch.Tensor | None,
    ) -> PrefillByGather | None:
        """For a layer of this spec; None if it cannot be computed so."""
        ranks = split.ranks
        heads, group = spec.num_heads // ranks.size, spec.num_heads // spec.num_kv_heads
        is_even = spec.num_heads % ranks.size == 0 and (heads % group == 0 or group % heads == 0)
        stored = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, context.device.arch)
        # A quantized cache holds other keys than the new ones that a call brings.
        is_plain = spec.mla is None and stored == spec.dtype and not spec.kv_sharing
        if not is_even or not is_plain or spec.custom_mask or spec.bidirectional_ranges:
            return None
        kv_heads = max(1, heads // group)
        own = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
        slopes = arguments["alibi_slopes"]
        dense = spec.replace(
            num_heads=heads,
            num_kv_heads=kv_heads,
            block_size=None,
            kv_cache_dtype="auto",
            kv_cache_layout=None,
            kv_strides=None,
            output_quant=None,
            returns_lse=True,
            cuda_graph=False,
        )
        arguments = {
            **arguments,
            "alibi_slopes": None if slopes is None else slopes[own],
            "sinks": None if sinks is None else sinks[own],
        }
        try:
            binding = LayerBinding.of(dense, device, context, arguments)
        except (UnsupportedError, AttemptFailed):
            return None
        first = [rank * heads // group for rank in range(ranks.size)]
        return cls(split, spec, binding, kv_heads, first)

    @property
    def metadata_key(self) -> tuple[Any, ...]:
        """Equal for those whose plans are interchangeable."""
        return self.binding.metadata_key

    def takes(self, batch: AttentionBatch, request: int) -> bool:
        """Whether a prefill is computed so: always, or where it moves fewer bytes to a rank."""
        if batch.slot_mapping is None or batch.block_table is None:
            return False  # the new keys are not given
        if self._split.prefill == "gather":
            return True
        spec, world = self._spec, self._split.size
        new, heads = batch.query_lens[request], spec.num_heads // world
        earlier = batch.seq_lens_list[request] - new
        # Elements, divided by (world - 1) for both; an LSE counts as two.
        moved = earlier / world * self._kv_heads * (spec.head_size + spec.head_size_v)
        if self._split.heads == "sharded":
            return moved <= new * heads * (spec.head_size + spec.head_size_v + 2)
        return moved + new * heads * spec.head_size_v <= new * spec.num_heads * (
            spec.head_size_v + 2
        )

    def plan(self, batch: AttentionBatch) -> GatherPlan:
        """The plan of prompts whose batch has the keys of all ranks."""
        ranks, device = self._split.ranks, batch.seq_lens.device
        assert batch.block_table is not None
        requests, places, order = [], [], []
        earlier_lens = [s - q for s, q in zip(batch.seq_lens_list, batch.query_lens, strict=True)]
        num_rows = sum(local_length(earlier, 0, ranks.size) for earlier in earlier_lens)
        first = 0
        for request, earlier in enumerate(earlier_lens):
            rows = local_length(earlier, 0, ranks.size)
            local = torch.arange(rows, device="cpu")
            is_here = local < local_length(earlier, ranks.rank, ranks.size)
            places.append(torch.where(is_here, local, -1))
            requests.append(torch.full((rows,), request, device="cpu"))
            positions = torch.arange(earlier, device="cpu")
            order.append(positions % ranks.size * num_rows + first + positions // ranks.size)
            new = torch.arange(batch.query_start_list[request], batch.query_start_list[request + 1],
                               device="cpu")  # fmt: skip
            order.append(ranks.size * num_rows + new)
            first += rows
        empty = [torch.empty(0, dtype=torch.int64, device="cpu")]
        request_of, local_of = to_device(
            torch.stack([torch.cat([*empty, *requests]), torch.cat([*empty, *places])]), device
        )
        size = batch.block_size // ranks.size if batch.block_size else self._block_size
        is_here = local_of >= 0
        local_of = local_of.clamp(min=0)
        blocks = torch.where(is_here, batch.block_table[request_of, local_of // size].long(), 0)
        dense = AttentionBatch.create(
            batch.query_lens,
            batch.seq_lens_list,
            key_lens=batch.seq_lens_list,
            device=device,
            max_decode_query_len=batch.max_decode_query_len,
        )
        return GatherPlan(
            num_rows,
            blocks,
            torch.where(is_here, local_of % size, 0),
            to_device(torch.cat([*empty, *order]), device),
            self._metadata_of(dense),
        )

    def _metadata_of(self, dense: AttentionBatch) -> Any:
        try:
            return self.binding.builder.build(dense)
        except Exception as error:  # raised by `attend`, after what the other ranks wait for
            return error

    @property
    def _block_size(self) -> int:
        assert self._spec.block_size is not None
        return self._spec.block_size

    def empty(self, plan: GatherPlan, query: torch.Tensor) -> torch.Tensor:
        """What is sent if this rank failed: zeros of the shape of `collect`."""
        size = self._spec.head_size + self._spec.head_size_v
        return query.new_zeros((self._split.size, plan.num_rows, self._kv_heads, size))

    def collect(self, plan: GatherPlan, kv_cache: KVCache, dtype: torch.dtype) -> torch.Tensor:
        """(world, num_rows, kv_heads, head_size + head_size_v): to each rank the heads it needs."""
        keys, values = keys_and_values(kv_cache)
        spec = self._spec
        found = torch.cat(
            [
                keys[plan.blocks, plan.offsets][..., : spec.head_size],
                values[plan.blocks, plan.offsets][..., : spec.head_size_v],
            ],
            dim=-1,
        ).to(dtype)
        count = self._kv_heads
        return torch.stack([found[:, first : first + count] for first in self._first_kv_heads])

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        received: torch.Tensor,
        plan: GatherPlan,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and LSE of this rank's heads, with the sinks counted."""
        if isinstance(plan.metadata, Exception):
            raise plan.metadata
        sizes = [self._spec.head_size, self._spec.head_size_v]
        first = self._first_kv_heads[self._split.ranks.rank]
        own = slice(first, first + self._kv_heads)
        all_keys, all_values = (
            torch.cat([earlier, new[:, own]])[plan.order]
            for earlier, new in zip(
                received.flatten(0, 1).split(sizes, dim=-1), (key, value), strict=True
            )
        )
        result: tuple[torch.Tensor, torch.Tensor]
        result = self.binding.impl.forward(
            layer, query, all_keys, all_values, None, plan.metadata, out
        )  # type: ignore[assignment]
        return result
