"""How a batch is laid out for TRITON_MLA: every request goes to the decode kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.operands import block_of
from attn_dispatch.backends.triton.plan import (
    INVARIANT_PARTS,
    DecodePlan,
    Launches,
    TritonMetadata,
    int32_tensor,
    part_bytes,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.metadata import AttentionMetadataBuilder
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.validation import check_int32
from attn_dispatch.platforms.detect import detect_device

__all__ = ["MERGE_GROUP", "TritonMLABuilder", "TritonMLAMetadata"]

#: See DecodeSchedule. A part is 128 KiB with 64 rows, and one program would read all of 64 parts.
MERGE_GROUP = 8


@dataclass
class TritonMLAMetadata(TritonMetadata):
    """The batch, and its layout for the decode kernel.

    Attributes:
        whole: with batch_invariant, for the requests of several query tokens, whose keys are not
            split; or None.
    """

    whole: DecodePlan | None = None


class TritonMLABuilder(AttentionMetadataBuilder[TritonMLAMetadata]):
    """Lays out a batch for the decode kernel."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.launches = Launches.of(spec, detect_device(device))
        cache = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
        #: Of the wider of queries and latents: tiles of both are in shared memory.
        self._element_bytes = max(spec.dtype.itemsize, cache.itemsize)

    def build(self, batch: AttentionBatch) -> TritonMLAMetadata:
        """See AttentionMetadataBuilder.build."""
        self._check(batch)
        metadata: TritonMLAMetadata = TritonMLAMetadata.of(
            batch, self, launches=self.launches, decode=None, prefill=None
        )
        if not self.spec.batch_invariant:
            metadata.decode = self._plan(None, batch.num_reqs, batch.max_query_len, parts=0)
        elif batch.max_query_len <= 1:
            metadata.decode = self._plan(None, batch.num_reqs, 1, parts=INVARIANT_PARTS)
        else:  # parts of many rows would take too much memory
            lens = batch.query_lens
            decodes = [i for i, query_len in enumerate(lens) if query_len <= 1]
            others = [i for i, query_len in enumerate(lens) if query_len > 1]
            if decodes:
                metadata.decode = self._plan(decodes, len(decodes), 1, parts=INVARIANT_PARTS)
            metadata.whole = self._plan(others, len(others), 1, parts=1)
        return metadata

    def _check(self, batch: AttentionBatch) -> None:
        if batch.block_table is None:
            raise InvalidInputError("Multi-head latent attention needs a block_table in the batch.")
        check_int32(batch)

    def _plan(
        self, chosen: list[int] | None, num_reqs: int, longest: int, *, parts: int
    ) -> DecodePlan:
        """The plan for these requests.

        Args:
            chosen: the requests; None for all of the batch.
            num_reqs: how many they are.
            longest: query tokens that a tile should have room for, if it can. With batch_invariant
                it must not depend on the batch.
            parts: see DecodePlan.
        """
        spec, launches = self.spec, self.launches
        rows, launch = launches.table.latents_for(
            spec.head_size_v, self._element_bytes, block_of(longest * spec.num_heads)
        )
        grid = launches.num_sms * launch.programs_per_sm
        slots, at_once = 2 * (grid + -(-grid // MERGE_GROUP)), num_reqs
        if parts == 1:
            slots = 1
        elif parts:
            each = -(-spec.num_heads // rows) * parts
            limit = scratch.MAX_SCRATCH_BYTES // (each * part_bytes(rows, spec.head_size_v))
            at_once = min(num_reqs, max(1, limit))
            slots = at_once * each
        floats = torch.empty(
            slots * rows * (spec.head_size_v + 1), dtype=torch.float32, device=self.device
        )
        return DecodePlan(
            launch=launch,
            requests=None if chosen is None else int32_tensor(chosen, self.device),
            num_reqs=num_reqs,
            longest=longest,
            rows=rows,
            grid=grid,
            part_out=floats[slots * rows :],
            part_lse=floats[: slots * rows],
            counters=torch.zeros(slots, dtype=torch.int32, device=self.device),
            parts=parts,
        ).in_turns_of(at_once)
