"""The batch: what an engine fills once per step, and every builder reads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    Phase,
    PlaceholderRange,
)

__all__ = ["AttentionBatch", "BatchMetadata", "BatchPart", "slots_of"]


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """The requests of one step, in any order; one per group of layers that share a block table.

    `create` fills in what can be derived. Tensors are on the device unless they end in `_cpu`.

    Attributes:
        query_start_loc: (num_reqs + 1,) int32, where each request's new tokens start.
        seq_lens: (num_reqs,) int32, keys of each request, the new ones included.
        query_start_loc_cpu: host copy.
        seq_lens_cpu: host copy.
        max_query_len: longest query; at least the true one (a graph fixes it at capture).
        max_seq_len: most keys; at least the true one.
        block_table: (num_reqs, max_blocks) int32, the blocks of each request in order; entries
            past its length are never used. None without a cache.
        slot_mapping: (num_key_tokens,) int64, where each new key goes; −1 for padding. None if
            nothing is written.
        key_start_loc_cpu: (num_reqs + 1,) int32, where each request's rows of key and value
            start, if they are not the query's rows (cross-attention). None if they are.
        custom_mask: (sum of query_len * seq_len,) bool, each request's (query_len, seq_len) mask
            flattened, one after another; True lets a query see a key. It narrows what the spec's
            causality and window leave.
        multi_modal_placeholder_index_maps: modality -> the ranges of its items.
        enable_kv_scales_calculation: derive an fp8 cache's scales from this batch.
        max_decode_query_len: a request with this many new tokens or fewer, and some before them,
            is in the decode phase. 1, or more for speculative decoding.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_query_len: int
    max_seq_len: int
    block_table: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    key_start_loc_cpu: torch.Tensor | None = None
    custom_mask: torch.Tensor | None = None
    multi_modal_placeholder_index_maps: Mapping[str, Sequence[PlaceholderRange]] | None = None
    enable_kv_scales_calculation: bool = False
    max_decode_query_len: int = 1

    @classmethod
    def create(
        cls,
        query_lens: Sequence[int] | torch.Tensor,
        seq_lens: Sequence[int] | torch.Tensor,
        *,
        block_table: torch.Tensor | None = None,
        block_size: int | None = None,
        slot_mapping: torch.Tensor | None = None,
        key_lens: Sequence[int] | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> AttentionBatch:
        """A batch out of each request's lengths.

        Args:
            query_lens: new tokens of each request.
            seq_lens: keys of each request, the new ones included.
            block_table: as the attribute.
            block_size: with it and a block table, but without a slot_mapping, the slots of the
                new tokens are derived: they are the last query_len ones of each request.
            slot_mapping: as the attribute.
            key_lens: rows of key and value of each request, if not query_lens.
            device: where the tensors go.
            **more: any other attribute.

        Raises:
            InvalidInputError: the lengths contradict each other or the block table.
        """
        queries, seqs = _lengths("query_lens", query_lens), _lengths("seq_lens", seq_lens)
        if queries.shape != seqs.shape:
            raise InvalidInputError(
                f"query_lens has {len(queries)} requests and seq_lens {len(seqs)}; give both for "
                "the same requests."
            )
        query_start_loc_cpu = _starts(queries)
        if block_table is not None:
            _check_block_table(block_table, seqs, block_size)
            block_table = block_table.to(device=device, dtype=torch.int32)
            if slot_mapping is None and block_size is not None and key_lens is None:
                slot_mapping = slots_of(queries, seqs, block_table, block_size)
        key_starts = None if key_lens is None else _starts(_lengths("key_lens", key_lens))
        return cls(
            query_start_loc=query_start_loc_cpu.to(device),
            seq_lens=seqs.to(device),
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens_cpu=seqs,
            max_query_len=int(queries.max()) if len(queries) else 0,
            max_seq_len=int(seqs.max()) if len(seqs) else 0,
            block_table=block_table,
            slot_mapping=None if slot_mapping is None else slot_mapping.to(device, torch.int64),
            key_start_loc_cpu=key_starts,
            **more,
        )

    @property
    def num_reqs(self) -> int:
        """Requests in the batch."""
        return int(self.seq_lens.shape[0])

    @functools.cached_property
    def query_starts(self) -> list[int]:
        """query_start_loc as a list on the host."""
        return self.query_start_loc_cpu.tolist()

    @functools.cached_property
    def key_starts(self) -> list[int]:
        """Where each request's rows of key and value start, on the host."""
        if self.key_start_loc_cpu is None:
            return self.query_starts
        return self.key_start_loc_cpu.tolist()

    @functools.cached_property
    def host_seq_lens(self) -> list[int]:
        """seq_lens as a list on the host."""
        return self.seq_lens_cpu.tolist()

    @functools.cached_property
    def query_lens(self) -> list[int]:
        """New tokens of each request, on the host."""
        return [end - start for start, end in itertools.pairwise(self.query_starts)]

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return self.query_starts[-1]

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The phase of each request."""
        return [
            Phase.DECODE if query <= self.max_decode_query_len and seq > query else Phase.PREFILL
            for query, seq in zip(self.query_lens, self.host_seq_lens, strict=True)
        ]

    @functools.cached_property
    def parts(self) -> dict[Phase, BatchPart]:
        """The batch taken apart by phase; a phase without requests is absent."""
        found = set(self.phases)
        if len(found) == 1:
            whole = slice(0, self.num_tokens)
            return {found.pop(): BatchPart(self, whole)}
        return {phase: self._part(phase) for phase in Phase if phase in found}

    def _part(self, phase: Phase) -> BatchPart:
        if self.key_start_loc_cpu is not None:
            raise InvalidInputError(
                "A batch whose keys are not its queries' rows (cross-attention) cannot be taken "
                "apart by phase. Use one backend for both phases of such layers."
            )
        chosen = [i for i, each in enumerate(self.phases) if each is phase]
        rows = [range(self.query_starts[i], self.query_starts[i + 1]) for i in chosen]
        tokens = _slice_or_index([row for each in rows for row in each], self.seq_lens.device)
        requests = _slice_or_index(chosen, self.seq_lens.device)
        queries = torch.tensor([self.query_lens[i] for i in chosen], dtype=torch.int32)
        seqs = torch.tensor([self.host_seq_lens[i] for i in chosen], dtype=torch.int32)
        ranges = self.multi_modal_placeholder_index_maps
        part = AttentionBatch.create(
            queries,
            seqs,
            block_table=None if self.block_table is None else self.block_table[requests],
            slot_mapping=None if self.slot_mapping is None else self.slot_mapping[tokens],
            device=self.seq_lens.device,
            custom_mask=self._mask_of(chosen),
            multi_modal_placeholder_index_maps=None if ranges is None else _select(ranges, chosen),
            enable_kv_scales_calculation=self.enable_kv_scales_calculation,
            max_decode_query_len=self.max_decode_query_len,
        )
        return BatchPart(part, tokens)

    def _mask_of(self, chosen: list[int]) -> torch.Tensor | None:
        if self.custom_mask is None:
            return None
        return torch.cat([self.request_mask(i).reshape(-1) for i in chosen])

    @functools.cached_property
    def _mask_starts(self) -> list[int]:
        sizes = (q * s for q, s in zip(self.query_lens, self.host_seq_lens, strict=True))
        return [0, *itertools.accumulate(sizes)]

    def request_mask(self, request: int) -> torch.Tensor:
        """(query_len, seq_len) bool, the custom mask of one request.

        Raises:
            InvalidInputError: the batch has no custom mask, or one of the wrong size.
        """
        starts = self._mask_starts
        if self.custom_mask is None or self.custom_mask.shape != (starts[-1],):
            found = None if self.custom_mask is None else tuple(self.custom_mask.shape)
            raise InvalidInputError(
                f"custom_mask has shape {found}; the layer needs ({starts[-1]},): query_len * "
                "seq_len values for each request, one request after another."
            )
        rows = self.custom_mask[starts[request] : starts[request + 1]]
        return rows.view(self.query_lens[request], self.host_seq_lens[request])


@dataclass(frozen=True)
class BatchPart:
    """The requests of one phase as a batch of their own, and which rows of the tokens are theirs.

    `tokens` is a slice where the phase's requests stand together, else an index tensor.
    """

    batch: AttentionBatch
    tokens: slice | torch.Tensor


@dataclass
class BatchMetadata(AttentionMetadata):
    """Metadata that keeps its batch; what a backend adds goes into a subclass's further fields."""

    batch: AttentionBatch
    builder: AttentionMetadataBuilder[Any]

    @classmethod
    def of(cls, batch: AttentionBatch, builder: AttentionMetadataBuilder[Any], **more: Any) -> Any:
        """The metadata of a batch; `more` are a subclass's further fields.

        Raises:
            InvalidInputError: the batch brings a mask, and the layers were not said to take one.
        """
        if batch.custom_mask is not None and not builder.spec.custom_mask:
            raise InvalidInputError(
                "The batch has a custom_mask, and the layer was described without one, so it "
                "would be ignored. Describe the layer with custom_mask=True."
            )
        prefills = [
            query
            for query, phase in zip(batch.query_lens, batch.phases, strict=True)
            if phase is Phase.PREFILL
        ]
        return cls(
            num_prefills=len(prefills),
            num_prefill_tokens=sum(prefills),
            num_decode_tokens=batch.num_tokens - sum(prefills),
            slot_mapping=batch.slot_mapping,
            multi_modal_placeholder_index_maps=batch.multi_modal_placeholder_index_maps,
            enable_kv_scales_calculation=batch.enable_kv_scales_calculation,
            batch=batch,
            builder=builder,
            **more,
        )

    def ranges_of(self, request: int) -> list[tuple[int, int]]:
        """The ranges [start, end) whose tokens see each other; none if the layers know none."""
        if not self.builder.spec.bidirectional_ranges:
            return []
        maps = self.multi_modal_placeholder_index_maps or {}
        return [(r.start, r.end) for each in maps.values() for r in each if r.request == request]

    @functools.cached_property
    def _by_phase(self) -> dict[Phase, Any]:
        if len(self.batch.parts) == 1:
            return dict.fromkeys(self.batch.parts, self)
        return {phase: self.builder.build(part.batch) for phase, part in self.batch.parts.items()}

    @property
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The same for the requests in the prefill phase, or None."""
        return self._by_phase.get(Phase.PREFILL)

    @property
    def decode_metadata(self) -> AttentionMetadata | None:
        """The same for the requests in the decode phase, or None."""
        return self._by_phase.get(Phase.DECODE)


def slots_of(
    query_lens: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """(num_tokens,) int64, the slots of each request's last query_len positions, row by row.

    Args:
        query_lens: (num_reqs,) on the host.
        seq_lens: (num_reqs,) on the host.
        block_table: (num_reqs, max_blocks).
        block_size: tokens per block.
    """
    requests = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens.long())
    ends = torch.cumsum(query_lens, 0).long()
    positions = torch.arange(len(requests)) + (seq_lens.long() - ends)[requests]
    requests, positions = requests.to(block_table.device), positions.to(block_table.device)
    blocks = block_table[requests, positions // block_size].long()
    return blocks * block_size + positions % block_size


def _lengths(name: str, values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    lengths = torch.as_tensor(values, device="cpu")
    if lengths.numel() == 0:
        lengths = lengths.to(torch.int32)
    if lengths.dim() != 1 or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise InvalidInputError(f"{name} is not a list of integers, one for each request.")
    if len(lengths) and int(lengths.min()) < 0:
        raise InvalidInputError(f"{name} holds {int(lengths.min())}; lengths are 0 or more.")
    return lengths.to(torch.int32)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0)).to(torch.int32)


def _check_block_table(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int | None
) -> None:
    if block_table.dim() != 2 or block_table.shape[0] != len(seq_lens):
        raise InvalidInputError(
            f"block_table has shape {tuple(block_table.shape)}; it must be (num_reqs, max_blocks) "
            f"with num_reqs={len(seq_lens)}."
        )
    longest = int(seq_lens.max()) if len(seq_lens) else 0
    if block_size is not None and longest > block_table.shape[1] * block_size:
        raise InvalidInputError(
            f"block_table has {block_table.shape[1]} blocks of {block_size} tokens for a request, "
            f"and the longest has {longest} keys. Give it "
            f"{-(-longest // block_size)} columns."
        )


def _slice_or_index(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    if rows and rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _select(
    maps: Mapping[str, Sequence[PlaceholderRange]], chosen: list[int]
) -> dict[str, list[PlaceholderRange]]:
    place = {request: i for i, request in enumerate(chosen)}
    return {
        modality: [
            PlaceholderRange(place[r.request], r.start, r.end) for r in ranges if r.request in place
        ]
        for modality, ranges in maps.items()
    }
