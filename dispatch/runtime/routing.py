"""Routing: one batch on different backends, by its phases and its size, over the same cache.

The host decides once per batch, by a look-up in a dictionary. A layer with only one backend is not
routed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch, BatchPart
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.metadata import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    BatchMetadata,
)
from attn_dispatch.interface.quantization import as_indexable_bytes
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import Phase
from attn_dispatch.interface.validation import check_forward, check_metadata
from attn_dispatch.runtime.composed import ComposedImpl, Given, Result, Scales
from attn_dispatch.selection.report import Selection
from attn_dispatch.selection.timings.policy import PhaseCandidates, routes_of, split_route
from attn_dispatch.selection.timings.table import (
    BatchKind,
    Bucket,
    LayerTimes,
    bucket_of,
    cost_totals,
    step_of,
)

__all__ = [
    "PartFailed",
    "RoutedBuilder",
    "RoutedImpl",
    "RoutedMetadata",
    "RoutedPart",
    "Router",
    "by_phase",
]

T = TypeVar("T")

#: Used for every batch. On Python 3.11 an Enum takes 0.2 us to find a member.
_PREFILL, _DECODE, _MIXED = Phase.PREFILL, Phase.DECODE, BatchKind.MIXED

#: (backend, phase) pairs: the backend serves the requests of the phase. A single pair with None
#: serves all requests.
Route = Sequence[tuple[str, "Phase | None"]]


def by_phase(batch: AttentionBatch) -> Route:
    """Each phase on the backend under the phase's name."""
    return [(phase, phase) for phase in batch.parts]


@dataclass(frozen=True)
class Router:
    """Picks the backends for each batch of a layer.

    Attributes:
        picks: phase -> the backend for batches without a measurement.
        routes: bucket -> the backend, or "PREFILL+DECODE", that was measured to be the fastest.
        captured: as for `bucket_of`.
        key: equal for routers that route in the same way.
    """

    picks: Mapping[Phase, str]
    routes: Mapping[Bucket, str] = field(default_factory=dict)
    captured: bool = False
    key: str = field(init=False)

    def __post_init__(self) -> None:
        content = repr((sorted(self.picks.items()), sorted(self.routes.items()), self.captured))
        object.__setattr__(self, "key", hashlib.sha256(content.encode()).hexdigest())

    @classmethod
    def of(cls, spec: AttentionSpec, selections: Mapping[Phase, Selection]) -> Router:
        """The router of a layer with these selections; it routes by size if a table has times."""
        picks = {phase: selection.name for phase, selection in selections.items()}
        evidence = {phase: s.report.measured for phase, s in selections.items()}
        times = next((each.times for each in evidence.values() if each is not None), None)
        candidates = {
            phase: PhaseCandidates(picks[phase], frozenset([picks[phase]]))
            if each is None
            else each.candidates
            for phase, each in evidence.items()
        }
        return _router(tuple(picks.items()), times, tuple(candidates.items()), spec.cuda_graph)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that it may pick, each once."""
        named = (part for name in self.routes.values() for part in split_route(name))
        return tuple(dict.fromkeys([*self.picks.values(), *named]))

    def __call__(self, batch: AttentionBatch) -> Route:
        """The backends for this batch."""
        totals = batch.totals_by_phase
        if not totals:
            return ()
        if len(totals) == 1:
            (phase,) = totals
            return ((self._pick(phase, batch), None),)
        name = self.routes.get(bucket_of(_MIXED, *batch.totals, captured=self.captured))
        if name is None:
            prefill, decode = (self._pick(each, batch) for each in (_PREFILL, _DECODE))
        else:
            prefill, decode = split_route(name)
        if prefill == decode:
            return ((prefill, None),)
        return ((prefill, _PREFILL), (decode, _DECODE))

    def _pick(self, phase: Phase, batch: AttentionBatch) -> str:
        """The backend for a phase's requests if no others are in the batch."""
        kind, totals = step_of(batch, phase), cost_totals(batch, phase)
        name = self.routes.get(bucket_of(kind, *totals, captured=self.captured))
        if name is None and kind is BatchKind.RAGGED:  # not measured: as equal ones of that work
            name = self.routes.get(bucket_of(BatchKind.PREFILL, *totals, captured=self.captured))
        return name or self.picks.get(phase) or self.picks[_PREFILL]  # an encoder has no decode


@functools.lru_cache(maxsize=1024)
def _router(
    picks: tuple[tuple[Phase, str], ...],
    times: LayerTimes | None,
    candidates: tuple[tuple[Phase, PhaseCandidates], ...],
    captured: bool,
) -> Router:
    """Made once for all layers with the same selections."""
    if times is None:
        return Router(dict(picks))
    return Router(dict(picks), routes_of(times, dict(candidates), captured=captured), captured)


class PartFailed(Exception):
    """The backend of a part of a batch raised; `__cause__` is what it raised."""

    def __init__(self, backend: str, batch: AttentionBatch) -> None:
        super().__init__(backend)
        self.backend, self.batch = backend, batch


class RoutedPart(NamedTuple):
    """Requests of a batch, their backend, and its metadata; phase None for the whole batch."""

    backend: str
    phase: Phase | None
    rows: BatchPart
    metadata: Any


def _call(part: RoutedPart, method: Callable[..., T], *arguments: Any) -> T:
    """Call a method of the backend that serves a part; PartFailed if the backend is at fault."""
    try:
        return method(*arguments)
    except (InvalidInputError, UnsupportedError):
        raise
    except Exception as error:
        raise PartFailed(part.backend, part.rows.batch) from error


@dataclass
class RoutedMetadata(BatchMetadata):
    """A batch in parts, each with the metadata of the backend that serves it."""

    parts: list[RoutedPart]

    def __post_init__(self) -> None:
        batch = self.batch
        super().__post_init__()
        if self.batch is not batch:
            self.parts = self.builder.build(self.batch).parts

    def _of(self, phase: Phase) -> AttentionMetadata | None:
        for part in self.parts:
            if part.phase in (None, phase):
                own: AttentionMetadata = part.metadata
                whole = part.phase is None
                return getattr(own, f"{phase}_metadata") if whole else own
        return None

    @property
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in prefill, by the backend that serves them, or None."""
        return self._of(Phase.PREFILL)

    @property
    def decode_metadata(self) -> AttentionMetadata | None:
        """The metadata of the requests in decode, by the backend that serves them, or None."""
        return self._of(Phase.DECODE)


class RoutedBuilder(AttentionMetadataBuilder[RoutedMetadata]):
    """Builds each part's metadata by the backend's builder, under the name in the route."""

    def __init__(
        self,
        builders: Mapping[Any, AttentionMetadataBuilder[Any]],
        route: Callable[[AttentionBatch], Route] = by_phase,
    ) -> None:
        first = next(iter(builders.values()))
        super().__init__(first.spec, first.device)
        self._builders = builders
        self.route = route

    def build(self, batch: AttentionBatch) -> RoutedMetadata:
        """The metadata of every part."""
        metadata: RoutedMetadata = RoutedMetadata.of(batch, self, parts=[])
        for name, phase in self.route(batch):
            rows = batch.parts[phase] if phase else BatchPart(batch, slice(None), slice(None))
            part = RoutedPart(name, phase, rows, None)
            built = _call(part, self._builders[name].build, rows.batch)
            metadata.parts.append(part._replace(metadata=built))
        return metadata

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> RoutedMetadata:
        """See AttentionMetadataBuilder.build_for_graph. One backend serves all requests.

        It is the one that `route` picks for a batch of the graph's size. In a step with prompts it
        is that of the prefills, as the rows of each phase would be others in each step.
        """
        prompts = batch.parts.get(Phase.PREFILL)
        ((name, _),) = self.route(batch if prompts is None else prompts.batch)
        part = RoutedPart(name, None, BatchPart(batch, slice(None), slice(None)), None)
        built = _call(part, self._builders[name].build_for_graph, batch, limits)
        metadata: RoutedMetadata = RoutedMetadata.of(
            batch, self, parts=[part._replace(metadata=built)]
        )
        return metadata

    def update_for_graph(self, metadata: RoutedMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        (part,) = metadata.parts
        _call(part, self._builders[part.backend].update_for_graph, part.metadata, batch)


class RoutedImpl(ComposedImpl):
    """Runs each part of a batch on the impl and class under the name in the builder's route."""

    metadata_cls = RoutedMetadata

    def __init__(
        self,
        impls: Mapping[Any, AttentionImpl[Any]],
        backends: Mapping[Any, type[AttentionBackend]],
    ) -> None:
        self._impls = impls
        self._metadata_classes = {name: cls.get_metadata_cls() for name, cls in backends.items()}

    def _compute(
        self, given: Given, metadata: RoutedMetadata, output: torch.Tensor, scales: Scales
    ) -> Result:
        batch, parts = metadata.batch, metadata.parts
        if len(parts) == 1:
            (part,) = parts  # the whole batch; its impl checks the arguments
            impl, own = self._impl_of(part), part.metadata
            return _call(part, impl.forward, *given, own, output, *scales)
        layer, query, key, value, kv_cache = given
        first = next(iter(self._impls.values()))
        check_metadata(first, metadata, RoutedMetadata)
        impls = [self._impl_of(part) for part in parts]
        if isinstance(getattr(first, "mla", None), MLADims):
            check: Any = getattr(first, "check_call", None)  # backends of this package have it
            if check is not None:
                check(*given, batch, output, *scales)
        else:
            check_forward(first, query, key, value, kv_cache, batch, output, *scales)

        new: list[tuple[Any, Any]] = [(None, None)] * len(parts)
        if key is not None and value is not None:
            new = [(key[part.rows.keys], value[part.rows.keys]) for part in parts]
        work = list(zip(impls, parts, new, strict=True))
        if kv_cache is not None and key is not None:
            # Requests in different parts may share a prefix, so write all KV before any part
            # attends.
            for impl, part, (part_key, part_value) in work[1:]:
                # The part's metadata may have been given other slots than the batch had.
                own_batch = getattr(part.metadata, "batch", part.rows.batch)
                _call(part, impl.write_kv, layer, part_key, part_value, kv_cache, own_batch)
        lse = None
        if first.returns_lse:
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        if len(output) > batch.num_tokens:  # padding belongs to no part
            as_indexable_bytes(output)[batch.num_tokens :] = 0
            if lse is not None:
                lse[batch.num_tokens :] = float("-inf")
        scale, block_scales = scales
        for impl, part, (part_key, part_value) in work:
            tokens = part.rows.tokens
            part_output = output[tokens]
            block_scale = None if block_scales is None else block_scales[tokens]
            arguments = (layer, query[tokens], part_key, part_value, kv_cache, part.metadata)
            result = _call(part, impl.forward, *arguments, part_output, scale, block_scale)
            if lse is not None:
                lse[tokens] = result[1]
            if not isinstance(tokens, slice):  # indexing made copies: put them back
                as_indexable_bytes(output)[tokens] = as_indexable_bytes(part_output)
                if block_scales is not None and block_scale is not None:
                    block_scales[tokens] = block_scale
        return output if lse is None else (output, lse)

    def _impl_of(self, part: RoutedPart) -> AttentionImpl[Any]:
        wanted = self._metadata_classes.get(part.backend)
        if wanted is None or not isinstance(part.metadata, wanted):
            raise InvalidInputError(
                f"attn_metadata has a {type(part.metadata).__name__} for {part.backend}, and this "
                "layer has another backend there. Make it by layer.build_metadata."
            )
        return self._impls[part.backend]
