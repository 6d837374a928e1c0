"""The impl and the builder of a layer whose keys are split over ranks.

A step: the query heads of all ranks are gathered; each rank attends to its own keys, with the
LSE; the parts are merged. Every collective of a step follows from the batch, which is the same on
all ranks. If a rank's attention raises, it takes part in the remaining collectives and raises at
their end; the other ranks get NaN or raise, see `merge_over_ranks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch

from attn_dispatch.backends.reference.semantics import without_autocast
from attn_dispatch.distributed.merge import merge_over_ranks
from attn_dispatch.distributed.options import SplitOptions
from attn_dispatch.distributed.prefill import PrefillByGather
from attn_dispatch.errors import (
    AttnDispatchError,
    BackendFailure,
    InvalidInputError,
    UnsupportedError,
    summary_of,
)
from attn_dispatch.interface.batch import AttentionBatch, BatchPart
from attn_dispatch.interface.batch_parts import select
from attn_dispatch.interface.batch_shards import local_length
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import store_output
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.interface.validation import check_forward
from attn_dispatch.platforms.device_errors import is_device_lost, is_out_of_memory
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.composed import ComposedImpl, Given, Result, Scales
from attn_dispatch.runtime.guard import FinalFailure
from attn_dispatch.runtime.routing import PartFailed, RoutedImpl
from attn_dispatch.selection.report import Selection

__all__ = ["Part", "SplitBuilder", "SplitImpl", "SplitMetadata"]

T = TypeVar("T")


class Part(str, Enum):
    """How requests of a batch are computed."""

    PLAIN = "plain"
    """Each rank attends to its keys without their positions; every query sees all of them."""
    POSITIONS = "positions"
    """Each rank attends to its keys by their positions."""
    GATHERED = "gathered"
    """Earlier keys are gathered, and each rank computes its own heads."""


class SplitPart(NamedTuple):
    """Requests of a batch, and what computes them.

    `planned` is the plan of PrefillByGather; or the metadata of this rank's part, or what its
    backend raised.
    """

    kind: Part
    rows: BatchPart
    planned: Any


@dataclass
class SplitMetadata(BatchMetadata):
    """A batch of all keys, and its parts: at most one that is merged, and one that is gathered.

    Attributes:
        local: the batch over this rank's keys.
        parts: together all requests.
        combine: how the parts of ranks are merged.
        static: of a captured step, the buffers of this rank's batch.
    """

    local: AttentionBatch
    parts: list[SplitPart]
    combine: str
    static: StaticBatch | None = None

    def __post_init__(self) -> None:
        batch = self.batch
        super().__post_init__()
        if self.batch is not batch:
            fresh = self.builder.build(self.batch)
            self.local, self.parts, self.combine = fresh.local, fresh.parts, fresh.combine


class SplitBuilder(AttentionMetadataBuilder[SplitMetadata]):
    """Shards a batch, and plans this rank's part of it.

    Args:
        split: the layer's ContextParallel.
        spec: of the layer.
        device: of the layer.
        bindings: the backends of this rank's parts; POSITIONS, and PLAIN where it exists.
        prefill: for GATHERED, or None.
    """

    def __init__(
        self,
        split: SplitOptions,
        spec: AttentionSpec,
        device: torch.device,
        bindings: Mapping[Part, LayerBinding],
        prefill: PrefillByGather | None,
    ) -> None:
        super().__init__(spec, device)
        self._split, self._bindings, self._prefill = split, bindings, prefill
        keys = tuple((part, each.metadata_key) for part, each in bindings.items())
        #: Equal for builders whose metadata is interchangeable, see LayerBinding.accepts.
        self.route = (
            keys,
            None if prefill is None else prefill.metadata_key,
            id(split.ranks.group),
        )

    def build(self, batch: AttentionBatch) -> SplitMetadata:
        """See AttentionMetadataBuilder.build. What a backend raises is raised in the forward."""
        ranks = self._split.ranks
        local = batch.shard(ranks.rank, ranks.size)
        combine = self._split.combine
        if combine == "auto":
            combine = self._split.choice.combine_for(self.spec, batch)
        metadata: SplitMetadata = SplitMetadata.of(
            batch, self, local=local, parts=[], combine=combine
        )
        for kind, chosen in self._kinds(batch).items():
            rows = BatchPart(batch, slice(None), slice(None))
            if len(chosen) < batch.num_reqs:
                rows = BatchPart(*select(batch, chosen))
                rows.batch.trust()  # the whole batch was checked
            if kind is Part.GATHERED:
                assert self._prefill is not None
                planned = self._prefill.plan(rows.batch)
            else:
                own = local if rows.batch is batch else rows.batch.shard(ranks.rank, ranks.size)
                planned = self._plan(kind, own)
            metadata.parts.append(SplitPart(kind, rows, planned))
        return metadata

    def _plan(self, kind: Part, local: AttentionBatch) -> Any:
        if kind is Part.PLAIN:
            local = dataclasses.replace(local, key_positions=None)
        try:
            return self._bindings[kind].builder.build(local)
        except (InvalidInputError, UnsupportedError):  # the same on every rank
            raise
        except Exception as error:
            return error

    def _kinds(self, batch: AttentionBatch) -> dict[Part, list[int]]:
        """The requests of each kind."""
        kinds: list[Part] = []
        for request, (phase, length) in enumerate(zip(batch.phases, batch.query_lens, strict=True)):
            gathers = phase is Phase.PREFILL and self._prefill is not None
            if gathers and self._prefill is not None and self._prefill.takes(batch, request):
                kinds.append(Part.GATHERED)
            elif length <= 1 and Part.PLAIN in self._bindings:
                kinds.append(Part.PLAIN)
            else:
                kinds.append(Part.POSITIONS)
        if Part.POSITIONS in kinds or not kinds:  # one merge in place of two
            kinds = [Part.POSITIONS if each is Part.PLAIN else each for each in kinds]
        found: dict[Part, list[int]] = {}
        for request, kind in enumerate(kinds):
            found.setdefault(kind, []).append(request)
        return found or {Part.POSITIONS: []}

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> SplitMetadata:
        """See AttentionMetadataBuilder.build_for_graph. Plain decodes are captured.

        Raises:
            UnsupportedError: it is another step.
        """
        if not limits.has_one_token_requests or Part.PLAIN not in self._bindings:
            raise UnsupportedError(
                f"A graph of {limits.kind} is not captured for layers with context_parallel; "
                "decodes with one new token per request are. Run other steps eagerly."
            )
        ranks, combine = self._split.ranks, self._split.combine
        most = local_length(limits.max_seq_len, 0, ranks.size)
        own = dataclasses.replace(limits, max_seq_len=most)
        assert batch.block_table is not None
        static = StaticBatch.make(
            own,
            batch.seq_lens.device,
            block_table=batch.block_table,  # the same on all ranks
            writes_keys=batch.slot_mapping is not None,
        )
        planned = self._bindings[Part.PLAIN].builder.build_for_graph(static.batch, own)
        if combine == "auto":
            combine = self._split.choice.combine_for(self.spec, batch, captured=True)
        rows = BatchPart(batch, slice(None), slice(None))
        metadata: SplitMetadata = SplitMetadata.of(
            batch,
            self,
            local=static.batch,
            parts=[SplitPart(Part.PLAIN, rows, planned)],
            combine=combine,
            static=static,
        )
        return metadata

    def update_for_graph(self, metadata: SplitMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        ranks, static = self._split.ranks, metadata.static
        assert static is not None
        local = batch.shard(ranks.rank, ranks.size, positions=False)
        static.fill(local)
        (part,) = metadata.parts
        self._bindings[Part.PLAIN].builder.update_for_graph(part.planned, local)


class _Attempts:
    """Runs what may raise, until something did; the collectives in between always run."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, function: Callable[[], T], default: T) -> T:
        """What the function returns, or the default if it, or an earlier one, raised."""
        if self.error is None:
            try:
                return function()
            except Exception as error:
                self.error = error
        return default

    def always(self, function: Callable[[], T], default: T) -> T:
        """What a collective returns, which runs in any case; the default if it raised."""
        try:
            return function()
        except FinalFailure as error:
            self.error = self.error or error
        return default

    def finish(self, rank: int) -> None:
        """Raise what was raised, so that no other backend repeats the call on this rank only."""
        error = self.error
        if error is None:
            return
        if isinstance(error, PartFailed) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        is_invalid = isinstance(error, AttnDispatchError) and not isinstance(error, BackendFailure)
        if (
            is_invalid
            or isinstance(error, FinalFailure)
            or is_out_of_memory(error)
            or is_device_lost(error)
        ):
            raise error
        raise FinalFailure(
            f"Attention failed on rank {rank}: {summary_of(error)}. There is no fallback, because "
            "the other ranks are in the same step; exclude the backend by an override on all ranks."
        ) from error


class SplitImpl(ComposedImpl):
    """Computes a batch together with the other ranks.

    Args:
        split: the layer's ContextParallel.
        spec: of the layer.
        bindings: as for SplitBuilder.
        prefill: as for SplitBuilder.
        sinks: (num_heads,) of all ranks, or None.
    """

    metadata_cls = SplitMetadata
    forward = without_autocast(ComposedImpl.forward)

    def __init__(
        self,
        split: SplitOptions,
        spec: AttentionSpec,
        bindings: Mapping[Part, LayerBinding],
        prefill: PrefillByGather | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self._split, self._ranks, self._spec = split, split.ranks, spec
        self._bindings = dict(bindings)
        if prefill is not None:
            self._bindings[Part.GATHERED] = prefill.binding
        self._impls = {part: each.impl for part, each in bindings.items()}
        impl = self._impls[Part.POSITIONS]
        self._first: Any = (
            next(iter(impl._impls.values())) if isinstance(impl, RoutedImpl) else impl
        )
        self._prefill = prefill
        self._sinks = sinks
        self._is_sharded = split.heads == "sharded"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The kinds of requests that are computed differently."""
        return tuple(self._bindings)

    def selections(self, part: Part) -> Mapping[Phase, Selection]:
        """The backends of a kind of requests; empty if there is no such kind."""
        return self._bindings[part].selections if part in self._bindings else {}

    def _compute(
        self, given: Given, metadata: SplitMetadata, output: torch.Tensor, scales: Scales
    ) -> Result:
        attempts, parts = _Attempts(), metadata.parts
        if len(parts) > 1 or parts[0].kind is Part.GATHERED:
            # Requests may share a prefix, so write all new keys before any part is read.
            attempts.run(lambda: self._write(given, metadata.local), None)
        size, combine = output.shape[2], metadata.combine
        if len(parts) == 1:
            into = output if scales == (None, None) else None
            values, lse = self._compute_part(parts[0], given, size, combine, attempts, into)
        else:
            values = output.new_zeros(output.shape, dtype=given.query.dtype)
            lse = values.new_full(output.shape[:2], float("-inf"), dtype=torch.float32)
            for part in parts:
                own = _rows_of(given, part.rows)
                found = self._compute_part(part, own, size, combine, attempts)
                values[part.rows.tokens], lse[part.rows.tokens] = found
        attempts.finish(self._ranks.rank)
        if values is not output:
            store_output(values, output, *scales)
        return (output, lse) if self._spec.returns_lse else output

    def _write(self, given: Given, local: AttentionBatch) -> None:
        layer, query, key, value, kv_cache = given
        if kv_cache is None:
            raise InvalidInputError(
                "kv_cache is None; a layer with context_parallel needs this rank's cache. Bind the "
                "caches by bind_kv_caches."
            )
        whole = query[:, :1].expand(-1, self._spec.num_heads, -1)  # as after the gather
        check_forward(self._first, whole, key, value, kv_cache, local)
        if key is not None and value is not None:
            self._first.write_kv(layer, key, value, kv_cache, local)

    def _compute_part(
        self,
        part: SplitPart,
        given: Given,
        size: int,
        combine: str,
        attempts: _Attempts,
        into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and LSE of the rows of a part, which are given, for the heads of a call.

        A merged output is written to `into`, if it is given.
        """
        if part.kind is Part.GATHERED:
            return self._gathered(given, part.planned, size, attempts)
        if isinstance(part.planned, Exception):
            attempts.error = attempts.error or part.planned
        if self._is_sharded:
            given = given._replace(query=self._ranks.gather_heads(given.query))
        query = given.query
        out = query.new_empty((*query.shape[:2], size))
        impl, metadata = self._impls[part.kind], part.planned
        found: Any = attempts.run(lambda: impl.forward(*given, metadata, out), None)
        if found is None:  # this rank failed; what it sends is marked so
            found = out, query.new_full(query.shape[:2], float("nan"), dtype=torch.float32)
        failed = attempts.error is not None
        merged = attempts.always(
            lambda: self._merge(found[0], found[1], combine, failed, into), None
        )
        if merged is None:  # what is raised afterwards
            pieces = self._ranks.size if self._is_sharded else 1
            return found[0].chunk(pieces, dim=1)[0], found[1].chunk(pieces, dim=1)[0]
        return merged

    def _merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        combine: str,
        failed: bool,
        into: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        heads = "scatter" if self._is_sharded else "replicate"
        sinks = self._own_sinks(out.device)
        return merge_over_ranks(
            self._ranks, out, lse, sinks, heads, combine, failed=failed, into=into
        )

    def _own_sinks(self, device: torch.device) -> torch.Tensor | None:
        if self._sinks is None:
            return None
        sinks = self._sinks.to(device, non_blocking=True)
        return sinks.chunk(self._ranks.size)[self._ranks.rank] if self._is_sharded else sinks

    def _gathered(
        self, given: Given, plan: Any, size: int, attempts: _Attempts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, query, key, value = given[:4]
        cache: Any = given.kv_cache
        prefill = self._prefill
        assert prefill is not None
        if key is None or value is None:  # the same on every rank
            raise InvalidInputError(
                "key is None, and the batch has new tokens of a prompt with slots for their keys. "
                "Give key and value, or make the layer with ContextParallel(..., prefill='merge')."
            )
        if not self._is_sharded:
            query = query.chunk(self._ranks.size, dim=1)[self._ranks.rank]
        sent = prefill.empty(plan, query)
        sent = attempts.run(lambda: prefill.collect(plan, cache, query.dtype), sent)
        received = self._ranks.all_to_all(sent) if plan.num_rows else sent
        out = query.new_full((*query.shape[:2], size), float("nan"))
        lse = query.new_full(query.shape[:2], float("nan"), dtype=torch.float32)
        out, lse = attempts.run(
            lambda: prefill.attend(layer, query, key, value, received, plan, out), (out, lse)
        )
        if not self._is_sharded:
            out, lse = self._ranks.gather_heads(out), self._ranks.gather_heads(lse)
        return out, lse


def _rows_of(given: Given, rows: BatchPart) -> Given:
    """The rows of a part of the batch."""
    key, value = (each if each is None else each[rows.keys] for each in (given.key, given.value))
    return given._replace(query=given.query[rows.tokens], key=key, value=value)
