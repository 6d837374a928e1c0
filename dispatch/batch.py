"""The batch: what an engine fills once per step, and every builder reads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attn_dispatch import environment
from attn_dispatch.arguments import INT32_MAX, as_int, shown
from attn_dispatch.device import usable_device
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    Phase,
    PlaceholderRange,
)

__all__ = ["AttentionBatch", "BatchMetadata", "BatchPart", "Totals", "slots_of"]


class Totals(NamedTuple):
    """How many requests, how many new tokens they have, and how many keys with these."""

    requests: int
    tokens: int
    keys: int


_NOTHING = Totals(0, 0, 0)
#: The fields that metadata has from its batch.
_OF_BATCH = frozenset(field.name for field in dataclasses.fields(AttentionMetadata))

#: Stands among `checked` for a batch that agrees with itself.
_ITSELF = ("batch",)

_INTEGERS = (torch.int32, torch.int64)
#: What `create` takes by name beside its own arguments, and hands on.
_HANDED_ON = (
    "custom_mask",
    "multi_modal_placeholder_index_maps",
    "enable_kv_scales_calculation",
    "max_decode_query_len",
)


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
            is in the decode phase; so is one without keys, which pads a graph's batch. 1, or more
            for speculative decoding.
        block_size: tokens per block of the block table, so that a call can be refused whose cache
            has other blocks; None if it is not known.
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
        device: torch.device | str | None = "cpu",
        **more: Any,
    ) -> AttentionBatch:
        """A batch out of each request's lengths.

        What is on the host is checked here, whatever the device: lengths and their sums have to
        fit int32, block ids too, and slots are −1 or more. What is on a device is not read, unless
        under ATTN_DISPATCH_CHECK=1: an int64 block table there is narrowed as it is.

        Args:
            query_lens: new tokens of each request.
            seq_lens: keys of each request, the new ones included.
            block_table: as the attribute; int64 is taken too.
            block_size: as the attribute. With it and a block table, but without a slot_mapping,
                the slots of the new tokens are derived: they are the last query_len ones of each
                request, and −1 for a request without keys, which pads the batch.
            slot_mapping: as the attribute; int32 is taken too.
            key_lens: rows of key and value of each request, if not query_lens.
            device: where the tensors go; None for the default device.
            **more: custom_mask, multi_modal_placeholder_index_maps, enable_kv_scales_calculation
                or max_decode_query_len: as the attributes.

        Raises:
            InvalidInputError: an argument is of another type or out of range, or the lengths
                contradict each other or the block table.
        """
        unknown = [name for name in more if name not in _HANDED_ON]
        if unknown:
            raise InvalidInputError(
                f"AttentionBatch.create takes no {unknown[0]}. What it takes as well as its own "
                f"arguments: {', '.join(_HANDED_ON)}. The rest is derived from the lengths."
            )
        device = usable_device(device)
        queries, max_query_len = _lengths("query_lens", query_lens)
        seqs, max_seq_len = _lengths("seq_lens", seq_lens)
        _check_same_requests("query_lens", queries, seqs)
        keys = None if key_lens is None else _lengths("key_lens", key_lens)[0]
        if keys is not None:
            _check_same_requests("key_lens", keys, seqs)
        if block_size is not None:
            block_size = as_int("block_size", block_size, 1, INT32_MAX)
        given = {"block_table": block_table, "slot_mapping": slot_mapping}
        for name, tensor in (given | {"custom_mask": more.get("custom_mask")}).items():
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and device.type != "meta":
                raise InvalidInputError(
                    f"{name} is on the meta device, where tensors hold nothing."
                )
        if block_table is not None:
            _check_block_table(block_table, len(seqs))
            _check_block_ids(block_table, seqs, block_size)
        if slot_mapping is not None:
            _check_slots(slot_mapping)
            slot_mapping = slot_mapping.to(device, torch.int64)
        elif block_table is not None and block_size is not None and keys is None:
            _check_room(block_table, queries, seqs, max_seq_len, block_size)
            slot_mapping = _slots_of(queries, seqs, block_table, block_size).to(device)
        mask = more.get("custom_mask")
        if mask is not None:
            _check_tensor("custom_mask", mask, "a bool tensor of one dimension")
            more["custom_mask"] = mask.to(device)
        batch = cls._of_lengths(
            queries,
            seqs,
            keys,
            device,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table=None if block_table is None else block_table.to(device, torch.int32),
            slot_mapping=slot_mapping,
            block_size=block_size,
            **more,
        )
        batch._check()
        batch.checked.add(_ITSELF)
        return batch

    @classmethod
    def _of_lengths(
        cls,
        queries: torch.Tensor,
        seqs: torch.Tensor,
        keys: torch.Tensor | None,
        device: torch.device,
        **more: Any,
    ) -> AttentionBatch:
        """A batch of these lengths, (num_reqs,) int32 on the host, and these other attributes."""
        query_start_loc_cpu = _starts("query_lens", queries)
        return cls(
            query_start_loc=query_start_loc_cpu.to(device),
            seq_lens=seqs.to(device),
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens_cpu=seqs,
            key_start_loc_cpu=None if keys is None else _starts("key_lens", keys),
            **more,
        )

    @functools.cached_property
    def checked(self) -> set[tuple[object, ...]]:
        """The forms of arguments that were checked against this batch: see validation.py."""
        return set()

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
        return list(map(operator.sub, self.query_starts[1:], self.query_starts))

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return self.query_starts[-1]

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The phase of each request."""
        decode, prefill, longest = Phase.DECODE, Phase.PREFILL, self.max_decode_query_len
        return [
            decode if query <= longest and (seq > query or seq == 0) else prefill
            for query, seq in zip(self.query_lens, self.host_seq_lens, strict=True)
        ]

    @functools.cached_property
    def total(self) -> Totals:
        """Of all requests."""
        return Totals(len(self.phases), self.num_tokens, sum(self.host_seq_lens))

    @functools.cached_property
    def totals(self) -> dict[Phase, Totals]:
        """Of each phase; one without requests is absent."""
        phases, seq_lens = self.phases, self.host_seq_lens
        if not phases:
            return {}
        first, count = phases[0], phases.count(phases[0])
        if count == len(phases):
            return {first: self.total}
        if phases[:count].count(first) == count:  # one phase after the other, as engines have it
            own = Totals(count, self.query_starts[count], sum(seq_lens[:count]))
        else:
            rows = [phase is first for phase in phases]
            lens = (itertools.compress(each, rows) for each in (self.query_lens, seq_lens))
            own = Totals(count, *map(sum, lens))
        other = Phase.DECODE if first is Phase.PREFILL else Phase.PREFILL
        return {first: own, other: Totals(*map(operator.sub, self.total, own))}

    @functools.cached_property
    def parts(self) -> dict[Phase, BatchPart]:
        """The batch taken apart by phase; a phase without requests is absent."""
        found = set(self.phases)
        if len(found) == 1:
            return {found.pop(): BatchPart(self, slice(None), slice(None))}
        parts = {phase: self._part(phase) for phase in Phase if phase in found}
        if _ITSELF in self.checked:
            for part in parts.values():
                part.batch.checked.add(_ITSELF)
        return parts

    def _part(self, phase: Phase) -> BatchPart:
        chosen = [i for i, each in enumerate(self.phases) if each is phase]
        first, end = chosen[0], chosen[-1] + 1
        mask, ranges = self._mask_of(chosen), self.multi_modal_placeholder_index_maps
        ranges = None if ranges is None else _select(ranges, chosen)
        own: dict[str, Any] = {"custom_mask": mask, "multi_modal_placeholder_index_maps": ranges}
        if end - first == len(chosen):
            return self._between(first, end, own)
        device = self.seq_lens.device
        tokens, query_lens = _rows_of(chosen, self.query_starts, device)
        keys, key_lens = _rows_of(chosen, self.key_starts, device)
        requests = torch.tensor(chosen, device=device)
        seq_lens = [self.host_seq_lens[i] for i in chosen]
        part = self._of_lengths(
            torch.tensor(query_lens, dtype=torch.int32, device="cpu"),
            torch.tensor(seq_lens, dtype=torch.int32, device="cpu"),
            None
            if self.key_start_loc_cpu is None
            else torch.tensor(key_lens, dtype=torch.int32, device="cpu"),
            device,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table=None if self.block_table is None else self.block_table[requests],
            slot_mapping=None if self.slot_mapping is None else self.slot_mapping[keys],
            block_size=self.block_size,
            enable_kv_scales_calculation=self.enable_kv_scales_calculation,
            max_decode_query_len=self.max_decode_query_len,
            **own,
        )
        return BatchPart(part, tokens, keys)

    def _between(self, first: int, end: int, own: dict[str, Any]) -> BatchPart:
        """The requests from `first` to before `end`; nothing is copied from the host."""
        requests, bounds = slice(first, end), slice(first, end + 1)
        tokens, keys = (
            slice(starts[first], starts[end]) for starts in (self.query_starts, self.key_starts)
        )
        key_starts, table, slots = self.key_start_loc_cpu, self.block_table, self.slot_mapping
        part = dataclasses.replace(
            self,
            query_start_loc=self.query_start_loc[bounds] - tokens.start,
            seq_lens=self.seq_lens[requests].clone(),  # aligned, as kernels were compiled for
            query_start_loc_cpu=self.query_start_loc_cpu[bounds] - tokens.start,
            seq_lens_cpu=self.seq_lens_cpu[requests],
            max_query_len=max(self.query_lens[requests]),
            max_seq_len=max(self.host_seq_lens[requests]),
            block_table=None if table is None else table[requests],
            slot_mapping=None if slots is None else slots[keys],
            key_start_loc_cpu=None if key_starts is None else key_starts[bounds] - keys.start,
            **own,
        )
        return BatchPart(part, tokens, keys)

    def _mask_of(self, chosen: list[int]) -> torch.Tensor | None:
        if self.custom_mask is None:
            return None
        return torch.cat([self.request_mask(i).reshape(-1) for i in chosen])

    @functools.cached_property
    def mask_starts(self) -> list[int]:
        """Where each request's part of custom_mask begins, and where the last one ends."""
        sizes = (q * s for q, s in zip(self.query_lens, self.host_seq_lens, strict=True))
        return [0, *itertools.accumulate(sizes)]

    def request_mask(self, request: int) -> torch.Tensor:
        """(query_len, seq_len) bool, the part of custom_mask that is one request's."""
        assert self.custom_mask is not None
        starts = self.mask_starts
        rows = self.custom_mask[starts[request] : starts[request + 1]]
        return rows.view(self.query_lens[request], self.host_seq_lens[request])

    def check(self) -> None:
        """Check that the batch agrees with itself, as far as the host can see; once.

        Raises:
            InvalidInputError: it says what contradicts what.
        """
        if _ITSELF not in self.checked:
            self._check_types()  # the others read these
            self._check_contents()
            self._check()
            self.checked.add(_ITSELF)

    def _check(self) -> None:
        self._check_types()
        num_reqs = self.num_reqs
        starts = {"query_start_loc_cpu": self.query_starts, "key_start_loc_cpu": self.key_starts}
        for name, values in starts.items():
            if len(values) != num_reqs + 1 or values[0] != 0 or values != sorted(values):
                raise InvalidInputError(
                    f"{name} is {values[:8]}; for {num_reqs} requests it takes {num_reqs + 1} "
                    "values that start at 0 and never fall."
                )
            if values[-1] > INT32_MAX:
                raise InvalidInputError(f"{name} ends at {values[-1]}, which int32 cannot hold.")
        if len(self.query_start_loc) != num_reqs + 1:
            raise InvalidInputError(
                f"query_start_loc has {len(self.query_start_loc)} values; for {num_reqs} requests "
                f"it takes {num_reqs + 1}."
            )
        seqs = self.host_seq_lens
        if len(seqs) != num_reqs or min(seqs, default=0) < 0 or max(seqs, default=0) > INT32_MAX:
            raise InvalidInputError(
                f"seq_lens_cpu is {seqs[:8]}; for {num_reqs} requests it takes as many lengths of "
                f"0 or more, and at most {INT32_MAX}."
            )
        longest = {"max_query_len": self.query_lens, "max_seq_len": seqs}
        for name, lengths in longest.items():
            if getattr(self, name) < max(lengths, default=0):
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)}, and a request has {max(lengths)}. It must "
                    "be the longest or more."
                )
        for name in ("query_start_loc", "block_table", "slot_mapping", "custom_mask"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.seq_lens.device:
                raise InvalidInputError(
                    f"{name} is on {tensor.device}, and seq_lens on {self.seq_lens.device}. Make "
                    "the batch by AttentionBatch.create, with device=."
                )
        mask = self.custom_mask
        size = 0 if mask is None else self.mask_starts[-1]
        if mask is not None and (mask.shape != (size,) or mask.dtype != torch.bool):
            raise InvalidInputError(
                f"custom_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be "
                f"({size},) bool: query_len * seq_len values for each request, one after another."
            )
        slots, num_keys = self.slot_mapping, self.key_starts[-1]
        if slots is not None and (slots.dim() != 1 or len(slots) < num_keys):
            raise InvalidInputError(
                f"The batch has slot_mapping {tuple(slots.shape)} for {num_keys} new keys. Give a "
                "slot for each, int64: block * block_size + offset, or −1 for padding."
            )
        if self.multi_modal_placeholder_index_maps is not None:
            _check_placeholders(self.multi_modal_placeholder_index_maps, num_reqs)

    def _check_types(self) -> None:
        """Check each attribute by itself."""
        for name in _LENGTHS:
            tensor = getattr(self, name)
            if tensor is None and name == "key_start_loc_cpu":
                continue
            _check_tensor(name, tensor, "an int32 tensor with a value for each request")
            if tensor.dim() != 1 or tensor.dtype not in _INTEGERS:
                raise InvalidInputError(
                    f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; it must be "
                    "int32 of one dimension."
                )
            if name.endswith("_cpu") and tensor.device.type != "cpu":
                raise InvalidInputError(f"{name} is on {tensor.device}; it must be on the host.")
        if self.custom_mask is not None:
            _check_tensor("custom_mask", self.custom_mask, "a bool tensor of one dimension")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= INT32_MAX:
                if value is None and name == "block_size":
                    continue
                raise InvalidInputError(
                    f"{name}={shown(value)} is not a Python integer from {least} to {INT32_MAX}."
                )
        if type(self.enable_kv_scales_calculation) is not bool:
            raise InvalidInputError(
                f"enable_kv_scales_calculation={shown(self.enable_kv_scales_calculation)} is not "
                "True or False."
            )

    def _check_contents(self) -> None:
        """Check the block table and the slots; what they hold, if that is on the host."""
        if self.block_table is not None:
            _check_block_table(self.block_table, self.num_reqs)
            _check_block_ids(self.block_table, self.seq_lens_cpu, self.block_size)
        if self.slot_mapping is not None:
            _check_slots(self.slot_mapping)


#: The attributes that are lengths, or where they add up to.
_LENGTHS = (
    "query_start_loc",
    "seq_lens",
    "query_start_loc_cpu",
    "seq_lens_cpu",
    "key_start_loc_cpu",
)
#: The attributes that are integers, and their smallest values.
_COUNTS = {"max_query_len": 0, "max_seq_len": 0, "max_decode_query_len": 1, "block_size": 1}


class BatchPart(NamedTuple):
    """The requests of one phase as a batch of their own, and which rows are theirs.

    `tokens` are their rows of query and output, `keys` those of key and value: a slice where the
    phase's requests stand together, of everything if there are no others; else an index tensor.
    """

    batch: AttentionBatch
    tokens: slice | torch.Tensor
    keys: slice | torch.Tensor


def _of_batch(name: str) -> Any:
    """A field of metadata that is its batch's. Assigning it builds the metadata again."""

    def put(metadata: BatchMetadata, value: Any) -> None:
        if not metadata._is_given(name, value):
            metadata._build_again(name, value)

    return property(operator.attrgetter(f"batch.{name}"), put)


def _counted(name: str, count: Callable[[AttentionBatch], int]) -> Any:
    """A field of metadata that is counted in its batch, and cannot be assigned."""

    def get(metadata: BatchMetadata) -> int:
        return count(metadata.batch)

    def put(metadata: BatchMetadata, value: Any) -> None:
        if not metadata._is_given(name, value):
            raise AttributeError(
                f"{name} is counted in the batch and cannot be assigned. Build the metadata from "
                "another batch."
            )

    return property(get, put)


def _prompts(batch: AttentionBatch) -> Totals:
    return batch.totals.get(Phase.PREFILL, _NOTHING)


@functools.cache
def _factories(cls: type[BatchMetadata]) -> tuple[tuple[str, Callable[[], Any]], ...]:
    """The defaults that a subclass makes again for each instance."""
    made = ((field.name, field.default_factory) for field in dataclasses.fields(cls))
    return tuple((name, make) for name, make in made if make is not dataclasses.MISSING)


@dataclass
class BatchMetadata(AttentionMetadata):
    """Metadata that keeps its batch; what a backend adds goes into a subclass's further fields.

    The fields of AttentionMetadata are read from the batch. Assigning `slot_mapping`,
    `multi_modal_placeholder_index_maps` or `enable_kv_scales_calculation` builds the metadata
    again, from a batch with the new value. Assigning a count raises AttributeError.

    Raises:
        InvalidInputError: an assigned value does not fit the batch, and the metadata stays as it
            was; or a constructor's arguments contradict its batch.
    """

    batch: AttentionBatch
    builder: AttentionMetadataBuilder[Any]

    num_prefills = _counted("num_prefills", lambda batch: _prompts(batch).requests)
    num_prefill_tokens = _counted("num_prefill_tokens", lambda batch: _prompts(batch).tokens)
    num_decode_tokens = _counted(
        "num_decode_tokens", lambda batch: batch.num_tokens - _prompts(batch).tokens
    )
    slot_mapping = _of_batch("slot_mapping")
    multi_modal_placeholder_index_maps = _of_batch("multi_modal_placeholder_index_maps")
    enable_kv_scales_calculation = _of_batch("enable_kv_scales_calculation")

    @classmethod
    def of(cls, batch: AttentionBatch, builder: AttentionMetadataBuilder[Any], **more: Any) -> Any:
        """The metadata of a batch; `more` are a subclass's further fields.

        Raises:
            InvalidInputError: the batch contradicts itself, or it brings a mask and the layers
                were not said to take one.
        """
        batch.check()
        if batch.custom_mask is not None and not builder.spec.custom_mask:
            raise InvalidInputError(
                "The batch has a custom_mask, and the layer was described without one, so it "
                "would be ignored. Describe the layer with custom_mask=True."
            )
        metadata = cls.__new__(cls)  # the constructor would take what the batch has already
        metadata.batch, metadata.builder = batch, builder
        for name, make in _factories(cls):
            if name not in more:
                setattr(metadata, name, make())
        for name, value in more.items():
            setattr(metadata, name, value)
        metadata.__post_init__()
        return metadata

    def __post_init__(self) -> None:
        given = self.__dict__.pop("_given", None)
        if given is None:
            return
        # Slots and the wish for scales are read at each call; a builder may plan by the rest.
        read = {name: given.pop(name) for name in ("slot_mapping", "enable_kv_scales_calculation")}
        if any(value is not getattr(self, name) for name, value in read.items()):
            self.batch = dataclasses.replace(self.batch, **read)
        wrong = [name for name, value in given.items() if value != getattr(self, name)]
        if wrong:
            raise InvalidInputError(
                f"{', '.join(wrong)} of the metadata differ from those of its batch. Make it by "
                "builder.build(batch)."
            )

    def _is_given(self, name: str, value: Any) -> bool:
        """Whether a field is not assigned but set by the generated constructor; it keeps it."""
        if "builder" in self.__dict__:
            return False
        self.__dict__.setdefault("_given", {})[name] = value
        return True

    def _build_again(self, name: str, value: Any) -> None:
        """Become the metadata of a batch in which this attribute has another value."""
        if name == "slot_mapping" and not (value is None or isinstance(value, torch.Tensor)):
            raise InvalidInputError(
                f"slot_mapping is a {type(value).__name__}; it must be a tensor, or None."
            )
        fresh = self.builder.build(dataclasses.replace(self.batch, **{name: value}))
        own = [f.name for f in dataclasses.fields(self) if f.name not in _OF_BATCH]
        for cached in self.__dict__.keys() - set(own):
            del self.__dict__[cached]
        for field in own:
            setattr(self, field, getattr(fresh, field))

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

    A row that stands before the first position has slot −1.

    Args:
        query_lens: (num_reqs,) integers on the host.
        seq_lens: (num_reqs,) integers on the host.
        block_table: (num_reqs, max_blocks) int32 or int64, with room for the longest request.
        block_size: tokens per block.

    Raises:
        InvalidInputError: an argument is of another type or out of range, or they contradict each
            other. What a table on a device holds is not read unless under ATTN_DISPATCH_CHECK=1.
    """
    queries, _ = _lengths("query_lens", query_lens)
    seqs, max_seq_len = _lengths("seq_lens", seq_lens)
    _check_same_requests("query_lens", queries, seqs)
    block_size = as_int("block_size", block_size, 1, INT32_MAX)
    _check_block_table(block_table, len(seqs))
    _check_block_ids(block_table, seqs, block_size)
    _check_columns(block_table, max_seq_len, block_size)
    return _slots_of(queries, seqs, block_table, block_size)


def _slots_of(
    query_lens: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The same for arguments that were checked but for the blocks of the new tokens."""
    requests = torch.arange(len(query_lens), device="cpu").repeat_interleave(query_lens.long())
    ends = torch.cumsum(query_lens, 0).long()
    positions = torch.arange(len(requests), device="cpu") + (seq_lens.long() - ends)[requests]
    requests, positions = requests.to(block_table.device), positions.to(block_table.device)
    if not block_table.numel():
        return torch.full_like(positions, -1)
    blocks = block_table[requests, positions.clamp(min=0) // block_size].long()
    if _is_readable(blocks) and (missing := (blocks < 0) & (positions >= 0)).any():
        row = int(missing.nonzero()[0])
        raise InvalidInputError(
            f"block_table of request {int(requests[row])} names block {int(blocks[row])} for a new "
            f"token; ids of blocks are 0 to {INT32_MAX}."
        )
    return torch.where(positions < 0, -1, blocks * block_size + positions % block_size)


def _check_tensor(name: str, value: object, wanted: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise InvalidInputError(f"{name} is a {type(value).__name__}; it must be {wanted}.")
    if value.layout is not torch.strided or value.is_nested:
        raise InvalidInputError(f"{name} is sparse or nested; it must be {wanted}.")


def _lengths(name: str, values: Any) -> tuple[torch.Tensor, int]:
    """(num_reqs,) int32 on the host, lengths as they were given, and the largest; 0 of none."""
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        values = list(values)
        if set(map(type, values)) - {int}:
            values = [_length(name, value) for value in values]
        most = max(values, default=0)
        _check_length(name, min(values, default=0), most)
        return torch.tensor(values, dtype=torch.int32, device="cpu"), most
    lengths, most = _lengths_of_array(name, values), 0
    if len(lengths):
        least, most = (int(end) for end in lengths.aminmax())
        _check_length(name, least, most)
    return lengths.to(torch.int32), most


def _check_length(name: str, least: int, most: int) -> None:
    if least < 0:
        raise InvalidInputError(f"{name} holds {shown(least)}; lengths are 0 or more.")
    if most > INT32_MAX:
        raise InvalidInputError(f"{name} holds {shown(most)}; a length is at most {INT32_MAX}.")


def _length(name: str, value: Any) -> int:
    """A length that is no plain int: a NumPy integer, say."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidInputError(
            f"{name} is not a list of integers, one for each request: it holds {shown(value)}."
        )
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor of other than one integer
        raise InvalidInputError(
            f"{name} is not a list of integers, one for each request: it holds {shown(value)}."
        ) from error


def _lengths_of_array(name: str, values: Any) -> torch.Tensor:
    """An array or a tensor as int64 on the host."""
    try:
        lengths = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInputError(
            f"{name} is a {type(values).__name__}, not a list of integers, one for each request."
        ) from error
    _check_tensor(name, lengths, "a list of integers, one for each request")
    is_integer = not (
        lengths.is_floating_point()
        or lengths.is_complex()
        or lengths.is_quantized
        or lengths.dtype == torch.bool
    )
    if lengths.dim() != 1 or lengths.device.type == "meta" or not (is_integer or not len(lengths)):
        raise InvalidInputError(
            f"{name} is not a list of integers, one for each request: it has shape "
            f"{tuple(lengths.shape)} and dtype {lengths.dtype} on {lengths.device}."
        )
    if lengths.dtype in _INTEGERS:
        return lengths.cpu()
    return lengths.to("cpu", torch.int64)  # uint64 beyond int64 becomes negative, and is rejected


def _check_same_requests(name: str, lengths: torch.Tensor, seqs: torch.Tensor) -> None:
    if lengths.shape != seqs.shape:
        raise InvalidInputError(
            f"{name} has {len(lengths)} requests and seq_lens {len(seqs)}; give both for the same "
            "requests."
        )


def _starts(name: str, lengths: torch.Tensor) -> torch.Tensor:
    """(num_reqs + 1,) int32, where each request begins, and where the last one ends."""
    starts = torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))  # int64
    if int(starts[-1]) > INT32_MAX:
        raise InvalidInputError(
            f"{name} adds up to {int(starts[-1])}; a batch has at most {INT32_MAX} tokens. Split "
            "it into several batches."
        )
    return starts.to(torch.int32)


def _check_block_table(block_table: torch.Tensor, num_reqs: int) -> None:
    """Check that it is a table for these requests, whatever it holds."""
    _check_tensor("block_table", block_table, "a tensor of (num_reqs, max_blocks), int32 or int64")
    if (
        block_table.dim() != 2
        or block_table.shape[0] != num_reqs
        or block_table.dtype not in _INTEGERS
    ):
        raise InvalidInputError(
            f"block_table has shape {tuple(block_table.shape)} and dtype {block_table.dtype}; it "
            f"must be (num_reqs, max_blocks) with num_reqs={num_reqs}, int32 or int64."
        )


def _check_block_ids(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int | None
) -> None:
    """Check that the ids of blocks that requests have fit int32.

    A table on a device is read under ATTN_DISPATCH_CHECK=1 only, since that waits for the device.
    Without a block size all entries count. An id below 0 may stand for a block that was freed
    because the layers' window has passed it.
    """
    if block_table.dtype == torch.int32 or not block_table.numel() or not _is_readable(block_table):
        return
    least, most = (int(end) for end in block_table.aminmax())
    if least >= 0 and most <= INT32_MAX:
        return
    if block_size is not None:
        table, seq_lens = block_table.cpu(), seq_lens.cpu().long()
        first_positions = torch.arange(table.shape[1], device="cpu") * block_size
        used = table[first_positions < seq_lens[:, None]]
        if not len(used):
            return
        least, most = (int(end) for end in used.aminmax())
    if least < -INT32_MAX - 1 or most > INT32_MAX:
        raise InvalidInputError(
            f"block_table names blocks {least} to {most}; ids of blocks are 0 to {INT32_MAX}. Give "
            "the blocks of the layers' caches."
        )


def _check_slots(slots: torch.Tensor) -> None:
    """Check that it is a list of slots; what it holds, under the conditions of block ids."""
    wanted = "a tensor of (num_key_tokens,), int64"
    _check_tensor("slot_mapping", slots, wanted)
    if slots.dim() != 1 or slots.dtype not in _INTEGERS:
        raise InvalidInputError(
            f"slot_mapping is {tuple(slots.shape)} {slots.dtype} and must be (num_key_tokens,) "
            "int64: block * block_size + offset for each new key, or −1 for padding."
        )
    if _is_readable(slots) and slots.numel() and int(slots.min()) < -1:
        raise InvalidInputError(
            f"slot_mapping names slots {int(slots.min())} to {int(slots.max())}; slots are 0 or "
            "more, and −1 is padding."
        )


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether what a tensor holds may be looked at here."""
    kind = tensor.device.type
    return kind == "cpu" or (kind != "meta" and environment.check_mode())


def _check_room(
    block_table: torch.Tensor,
    queries: torch.Tensor,
    seqs: torch.Tensor,
    longest: int,
    block_size: int,
) -> None:
    """Check that the last query_len positions of each request exist and have blocks."""
    wrong = (seqs < queries) & (seqs > 0)
    if wrong.any():
        request = int(wrong.nonzero()[0])
        raise InvalidInputError(
            f"Request {request} has {int(queries[request])} new tokens and {int(seqs[request])} "
            "keys. seq_lens counts the new ones too."
        )
    _check_columns(block_table, longest, block_size)


def _check_columns(block_table: torch.Tensor, longest: int, block_size: int) -> None:
    if longest > block_table.shape[1] * block_size:
        raise InvalidInputError(
            f"block_table has {block_table.shape[1]} blocks of {block_size} tokens for a request, "
            f"and the longest has {longest} keys. Give it "
            f"{-(-longest // block_size)} columns."
        )


def _rows_of(
    requests: list[int], starts: list[int], device: torch.device
) -> tuple[torch.Tensor, list[int]]:
    """Which rows are these requests', and how many each has."""
    lens = [starts[i + 1] - starts[i] for i in requests]
    before = itertools.accumulate(lens, initial=0)
    pairs = zip(requests, before, strict=False)  # the last of `before` is the number of rows
    shifts = torch.tensor([starts[i] - row for i, row in pairs], device="cpu")
    shifts = shifts.repeat_interleave(torch.tensor(lens, device="cpu"))
    return (torch.arange(len(shifts), device="cpu") + shifts).to(device), lens


def _check_placeholders(maps: object, num_reqs: int) -> None:
    """Check that placeholder maps name ranges of positions in the batch's requests."""
    if not isinstance(maps, Mapping):
        raise InvalidInputError(
            f"multi_modal_placeholder_index_maps is a {type(maps).__name__}; give a mapping from "
            "modality to a sequence of PlaceholderRange(request, start, end)."
        )
    for modality, ranges in maps.items():
        is_sequence = isinstance(ranges, Sequence) and not hasattr(ranges, "src")
        if not is_sequence or not all(isinstance(each, PlaceholderRange) for each in ranges):
            raise InvalidInputError(
                f"multi_modal_placeholder_index_maps has a {type(ranges).__name__} for "
                f"{modality!r}; give a sequence of PlaceholderRange(request, start, end), which "
                "names the positions [start, end) of one request. vLLM's IndexMap does not say "
                "which request an item belongs to, so it cannot be converted."
            )
        for each in ranges:
            if not all(type(number) is int for number in each):
                raise InvalidInputError(
                    f"The {modality!r} range {tuple(each)} has a member that is not an int; give "
                    "PlaceholderRange(request, start, end) as Python integers."
                )
            if not (0 <= each.request < num_reqs and 0 <= each.start <= each.end):
                raise InvalidInputError(
                    f"The {modality!r} range {tuple(each)} fits none of the {num_reqs} "
                    "requests; give (request, start, end) with start <= end."
                )


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
