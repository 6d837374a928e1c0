"""The batch: what an engine fills once per step, and every builder reads."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attn_dispatch.arguments import INT32_MAX, as_int
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch_checks import (
    check_batch,
    check_block_ids,
    check_room,
    check_same_requests,
    check_slot_tensor,
    check_table,
    check_types,
    checked_lengths,
    compute_slots,
    is_readable,
    known_lengths,
    start_locs,
)
from attn_dispatch.interface.batch_parts import select
from attn_dispatch.interface.batch_shards import shard_batch
from attn_dispatch.interface.host_copies import pack_to_device, to_device
from attn_dispatch.interface.key_positions import KeyPositions, check_key_positions
from attn_dispatch.interface.tensors import check_dense
from attn_dispatch.interface.types import Phase, PlaceholderRange
from attn_dispatch.platforms.detect import usable_device
from attn_dispatch.platforms.waits import never_waits

__all__ = ["AttentionBatch", "BatchPart", "BatchTotals"]


class BatchTotals(NamedTuple):
    """How many requests, how many new tokens they have, and how many keys with these."""

    requests: int
    tokens: int
    keys: int


NO_REQUESTS = BatchTotals(0, 0, 0)

#: An entry of `checked`: the batch is consistent.
_ITSELF = ("batch",)

#: Further arguments of `create`, which become attributes.
_FURTHER = (
    "custom_mask",
    "multi_modal_placeholder_index_maps",
    "enable_kv_scales_calculation",
    "max_decode_query_len",
    "key_positions",
    "shared_prefix_len",
)


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """The requests of one step, in any order; one per group of layers that share a block table.

    `create` fills in what can be derived. Tensors are on the device unless they end in `_cpu`.

    Attributes:
        query_start_loc: (num_reqs + 1,) int32, where each request's new tokens start.
        seq_lens: (num_reqs,) int32, keys of each request, the new ones included.
        query_start_loc_cpu: host copy.
        seq_lens_cpu: host copy; with lengths="upper_bound" a bound of each, of which plans are made
            but no result.
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
            is in the decode phase; so is one without keys, which pads a graph's batch. 1, or more
            for speculative decoding.
        block_size: tokens per block of the block table, so that a call with a cache of other
            blocks is rejected; None if it is not known.
        lengths: "exact", or "upper_bound" where only the device has the true key counts. Phases
            and totals are then those of the bounds. Such a batch needs a block table, and layers
            that were made with lengths="upper_bound".
        key_positions: the positions of the keys, if they are only some of each request's, for
            layers with key_positions; see KeyPositions. seq_lens then counts the keys that are
            here. None if key j is at position j.
        shared_prefix_len: the first keys, this many, of all requests are in the same blocks: whole
            blocks, before the new keys. Layers with shared_prefix=True read them once.
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
    block_size: int | None = None
    lengths: str = "exact"
    key_positions: KeyPositions | None = None
    shared_prefix_len: int = 0

    @classmethod
    @never_waits
    def create(
        cls,
        query_lens: Sequence[int] | torch.Tensor,
        seq_lens: Sequence[int] | torch.Tensor,
        *,
        block_table: torch.Tensor | None = None,
        block_size: int | None = None,
        slot_mapping: torch.Tensor | None = None,
        key_lens: Sequence[int] | torch.Tensor | None = None,
        device: torch.device | str | None = "cpu",
        lengths: str = "exact",
        seq_lens_upper_bound: Sequence[int] | torch.Tensor | None = None,
        max_seq_len: int | None = None,
        **more: Any,
    ) -> AttentionBatch:
        """A batch made from each request's lengths.

        Tensors on the host are checked: lengths, their sums and block ids fit int32, and slots are
        −1 or more. Tensors on a device are read only under ATTN_DISPATCH_CHECK=1; without it an
        int64 block table there is narrowed unchecked. A step waits for the device only if lengths
        are on it, and are not those of lengths="upper_bound".

        Args:
            query_lens: new tokens of each request.
            seq_lens: keys of each request, the new ones included. With lengths="upper_bound" a
                tensor on the device, which is read when the layers run.
            block_table: as the attribute; int64 is taken too.
            block_size: as the attribute. With it and a block table, but without a slot_mapping,
                the slots of the new keys are derived: they are the last ones of each request,
                key_lens of them or else query_lens, and −1 for a request without keys, which pads
                the batch. Not with key_positions: there give the slots, −1 for the new keys that
                belong to another GPU.
            slot_mapping: as the attribute; int32 is taken too.
            key_lens: rows of key and value of each request, if not query_lens.
            device: where the tensors go; None for the default device.
            lengths: as the attribute.
            seq_lens_upper_bound: with lengths="upper_bound", at least the keys of each request, on
                the host: what an asynchronous scheduler knows before the last step has finished.
            max_seq_len: as the attribute; None for the largest of the lengths or bounds.
            **more: custom_mask, multi_modal_placeholder_index_maps, enable_kv_scales_calculation,
                max_decode_query_len, key_positions or shared_prefix_len: as the attributes.

        Raises:
            InvalidInputError: an argument has another type or is out of range, or the lengths
                contradict each other or the block table.
        """
        unknown = [name for name in more if name not in _FURTHER]
        if unknown:
            raise InvalidInputError(
                f"AttentionBatch.create takes no {unknown[0]}. Its further arguments are: "
                f"{', '.join(_FURTHER)}. The rest is derived from the lengths."
            )
        device = usable_device(device)
        queries, max_query_len = checked_lengths("query_lens", query_lens)
        seqs, longest, true = known_lengths(lengths, seq_lens, seq_lens_upper_bound, device)
        if max_seq_len is not None:
            max_seq_len = as_int("max_seq_len", max_seq_len, longest, INT32_MAX)
        check_same_requests("query_lens", queries, seqs)
        keys = None if key_lens is None else checked_lengths("key_lens", key_lens)[0]
        if keys is not None:
            check_same_requests("key_lens", keys, seqs)
        if block_size is not None:
            block_size = as_int("block_size", block_size, 1, INT32_MAX)
        positions = more.get("key_positions")
        if isinstance(positions, KeyPositions):
            more["key_positions"] = positions.to(device)
        given = {"block_table": block_table, "slot_mapping": slot_mapping}
        for name, tensor in (given | {"custom_mask": more.get("custom_mask")}).items():
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and device.type != "meta":
                raise InvalidInputError(f"{name} is on the meta device and has no data.")
        if block_table is not None:
            check_table(block_table, len(seqs))
            check_block_ids(block_table, true if is_readable(true) else seqs, block_size)
        if slot_mapping is not None:
            check_slot_tensor(slot_mapping)
            slot_mapping = to_device(slot_mapping, device, torch.int64)
        elif block_table is not None and block_size is not None and positions is None:
            written = queries if keys is None else keys
            table = block_table if lengths == "exact" else to_device(block_table, device)
            if is_readable(true):
                check_room(table, written, true.cpu(), block_size, is_query=keys is None)
            slot_mapping = to_device(compute_slots(written, true, table, block_size), device)
        mask = more.get("custom_mask")
        if mask is not None:
            check_dense("custom_mask", mask, "a bool tensor of one dimension", meta=True)
            more["custom_mask"] = to_device(mask, device)
        batch = cls.of_lengths(
            queries,
            seqs,
            keys,
            device,
            None if lengths == "exact" else true,
            max_query_len=max_query_len,
            max_seq_len=longest if max_seq_len is None else max_seq_len,
            block_table=None
            if block_table is None
            else to_device(block_table, device, torch.int32),
            slot_mapping=slot_mapping,
            block_size=block_size,
            lengths=lengths,
            **more,
        )
        check_batch(batch)
        if positions is not None:
            check_key_positions(batch.key_positions, batch)
        batch.checked.add(_ITSELF)
        return batch

    @classmethod
    def of_lengths(
        cls,
        queries: torch.Tensor,
        seqs: torch.Tensor,
        keys: torch.Tensor | None,
        device: torch.device,
        on_device: torch.Tensor | None,
        **more: Any,
    ) -> AttentionBatch:
        """A batch of these lengths, (num_reqs,) int32 on the host, and these other attributes.

        `on_device` are the true key counts if `seqs` are bounds.
        """
        query_start_loc_cpu = start_locs("query_lens", queries)
        copied = [query_start_loc_cpu, *([seqs] if on_device is None else [])]
        query_start_loc, *others = pack_to_device(device, *copied)
        return cls(
            query_start_loc=query_start_loc,
            seq_lens=others[0] if on_device is None else on_device,
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens_cpu=seqs,
            key_start_loc_cpu=None if keys is None else start_locs("key_lens", keys),
            **more,
        )

    @functools.cached_property
    def checked(self) -> set[tuple[object, ...]]:
        """Keys of the checks that this batch passed: see validation.py."""
        return set()

    @property
    def num_reqs(self) -> int:
        """Requests in the batch."""
        return int(self.seq_lens.shape[0])

    @functools.cached_property
    def query_start_list(self) -> list[int]:
        """query_start_loc as a list on the host."""
        return self.query_start_loc_cpu.tolist()

    @functools.cached_property
    def key_starts(self) -> list[int]:
        """Where each request's rows of key and value start, on the host."""
        if self.key_start_loc_cpu is None:
            return self.query_start_list
        return self.key_start_loc_cpu.tolist()

    @functools.cached_property
    def seq_lens_list(self) -> list[int]:
        """seq_lens_cpu as a list: the keys of each request, or bounds of them."""
        return self.seq_lens_cpu.tolist()

    @functools.cached_property
    def global_lens(self) -> list[int]:
        """The length of each request: its seq_lens, or with key_positions theirs, on the host."""
        if self.key_positions is None:
            return self.seq_lens_list
        return self.key_positions.seq_lens_cpu.tolist()

    @functools.cached_property
    def query_lens(self) -> list[int]:
        """New tokens of each request, on the host."""
        return list(map(operator.sub, self.query_start_list[1:], self.query_start_list))

    @functools.cached_property
    def new_lens(self) -> list[int]:
        """Rows of key and value of each request, on the host."""
        return list(map(operator.sub, self.key_starts[1:], self.key_starts))

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return self.query_start_list[-1]

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The phase of each request; with bounds, that of a request with as many keys."""
        decode, prefill, longest = Phase.DECODE, Phase.PREFILL, self.max_decode_query_len
        return [
            decode if query <= longest and (seq > query or seq == 0) else prefill
            for query, seq in zip(self.query_lens, self.global_lens, strict=True)
        ]

    @functools.cached_property
    def totals(self) -> BatchTotals:
        """Sums over all requests."""
        return BatchTotals(len(self.phases), self.num_tokens, sum(self.seq_lens_list))

    @functools.cached_property
    def totals_by_phase(self) -> dict[Phase, BatchTotals]:
        """Sums over the requests of each phase; a phase without requests is absent."""
        phases, seq_lens = self.phases, self.seq_lens_list
        if not phases:
            return {}
        first, count = phases[0], phases.count(phases[0])
        if count == len(phases):
            return {first: self.totals}
        if phases[:count].count(first) == count:  # one phase after the other, as in engines
            own = BatchTotals(count, self.query_start_list[count], sum(seq_lens[:count]))
        else:
            rows = [phase is first for phase in phases]
            lens = (itertools.compress(each, rows) for each in (self.query_lens, seq_lens))
            own = BatchTotals(count, *map(sum, lens))
        other = Phase.DECODE if first is Phase.PREFILL else Phase.PREFILL
        return {first: own, other: BatchTotals(*map(operator.sub, self.totals, own))}

    @functools.cached_property
    def prefill_pairs(self) -> list[int]:
        """Pairs of a new token and a key, for each request that is prefilled."""
        lens = zip(self.phases, self.query_lens, self.seq_lens_list, strict=True)
        return [new * keys for phase, new, keys in lens if phase is Phase.PREFILL]

    @functools.cached_property
    def parts(self) -> dict[Phase, BatchPart]:
        """The requests of each phase as a batch; a phase without requests is absent."""
        found = set(self.phases)
        if len(found) == 1:
            return {found.pop(): BatchPart(self, slice(None), slice(None))}
        parts = {
            phase: BatchPart(
                *select(self, [i for i, each in enumerate(self.phases) if each is phase])
            )
            for phase in Phase
            if phase in found
        }
        if _ITSELF in self.checked:
            for part in parts.values():
                part.batch.checked.add(_ITSELF)
        return parts

    def shard(self, rank: int, world: int, *, positions: bool = True) -> AttentionBatch:
        """The batch over the keys that one of several ranks has: every world-th, from `rank` on.

        Lengths, slots and the mask become local; the block table is the same, and each of its
        blocks holds 1 / world of the tokens here. The queries are those of the whole batch.

        Args:
            rank: 0 to world - 1.
            world: how many ranks share each request's keys.
            positions: give the batch key_positions. Without them causality, windows and ALiBi are
                those of the local keys, which is right only for requests with one new token, under
                no rule but causality.

        Raises:
            InvalidInputError: an argument is out of range, the batch has key_positions, or its
                block_size is not a multiple of world.
            UnsupportedError: the batch has lengths="upper_bound", or key_lens.
        """
        sharded: AttentionBatch = shard_batch(self, rank, world, positions=positions)
        sharded.check()
        return sharded

    def positions_of(self, request: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """With key_positions, those of a request's queries and keys, int64; else None.

        Returns:
            (query_len,) and (seq_len,), on the batch's device.
        """
        positions = self.key_positions
        if positions is None:
            return None
        length, device = self.global_lens[request], self.seq_lens.device
        keys = torch.arange(self.seq_lens_list[request], device=device)
        queries = torch.arange(length - self.query_lens[request], length, device=device)
        return queries, positions.offset + positions.step * keys

    @functools.cached_property
    def mask_starts(self) -> list[int]:
        """Where each request's part of custom_mask starts, and where the last one ends."""
        sizes = (q * s for q, s in zip(self.query_lens, self.seq_lens_list, strict=True))
        return [0, *itertools.accumulate(sizes)]

    def request_mask(self, request: int) -> torch.Tensor:
        """(query_len, seq_len) bool, one request's part of custom_mask."""
        assert self.custom_mask is not None
        starts = self.mask_starts
        rows = self.custom_mask[starts[request] : starts[request + 1]]
        return rows.view(self.query_lens[request], self.seq_lens_list[request])

    def trust(self) -> None:
        """Do not check the batch: its maker vouches for it, as for one over static buffers."""
        self.checked.add(_ITSELF)

    def check(self) -> None:
        """Check once that the batch is consistent, without waiting for a device.

        Raises:
            InvalidInputError: it is not.
        """
        if _ITSELF not in self.checked:
            check_types(self)  # the others read these
            if self.block_table is not None:
                check_table(self.block_table, self.num_reqs)
                check_block_ids(self.block_table, self.seq_lens_cpu, self.block_size)
            if self.slot_mapping is not None:
                check_slot_tensor(self.slot_mapping)
            check_batch(self)
            if self.key_positions is not None:
                check_key_positions(self.key_positions, self)
            self.checked.add(_ITSELF)


class BatchPart(NamedTuple):
    """The requests of one phase as a batch, and their rows.

    `tokens` are their rows of query and output, `keys` those of key and value: a slice if the
    phase's requests are consecutive, else an index tensor.
    """

    batch: AttentionBatch
    tokens: slice | torch.Tensor
    keys: slice | torch.Tensor
