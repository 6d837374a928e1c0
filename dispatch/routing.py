"""Routing: one batch on different backends, by its phases and its size, over the same cache.

Who serves what is decided on the host, once per batch, by a dictionary. A layer that one backend
serves in every case has no router, and nothing here costs anything.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch.batch import AttentionBatch, BatchMetadata, BatchPart
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.fallback import blaming
from attn_dispatch.interface import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    Phase,
)
from attn_dispatch.quantization import indexable
from attn_dispatch.report import Selection
from attn_dispatch.spec import AttentionSpec
from attn_dispatch.tuning.choose import Side, parts_of, routes_of
from attn_dispatch.tuning.table import Bucket, LayerTimes, Step, bucket_of, totals_of
from attn_dispatch.validation import check_forward, check_metadata

__all__ = [
    "RoutedBuilder",
    "RoutedImpl",
    "RoutedMetadata",
    "RoutedPart",
    "Router",
    "by_phase",
]

#: Who serves which requests of a batch: a backend, and their phase, None for all of them. One that
#: serves all stands alone.
Route = Sequence[tuple[str, "Phase | None"]]


def by_phase(batch: AttentionBatch) -> Route:
    """Each phase by itself, on whoever stands under its name."""
    return [(phase, phase) for phase in batch.parts]


@dataclass(frozen=True)
class Router:
    """Says who serves a batch of a layer.

    Attributes:
        picks: phase -> the backend for what no measurement speaks of.
        routes: bucket -> the backend, or "PREFILL+DECODE", that was measured to be the fastest.
        captured: as for `bucket_of`.
        key: equal for routers that say the same.
    """

    picks: Mapping[Phase, str]
    routes: Mapping[Bucket, str] = field(default_factory=dict)
    captured: bool = False
    key: str = field(init=False)

    def __post_init__(self) -> None:
        told = repr((sorted(self.picks.items()), sorted(self.routes.items()), self.captured))
        object.__setattr__(self, "key", hashlib.sha256(told.encode()).hexdigest())

    @classmethod
    def of(cls, spec: AttentionSpec, selections: Mapping[Phase, Selection]) -> Router:
        """The router of a layer whose phases were decided so; it routes where a table speaks."""
        picks = {phase: selection.name for phase, selection in selections.items()}
        evidence = {phase: s.report.measured for phase, s in selections.items()}
        times = next((each.times for each in evidence.values() if each is not None), None)
        if times is None:
            return cls(picks)
        sides = {
            phase: Side(picks[phase], frozenset([picks[phase]])) if each is None else each.side
            for phase, each in evidence.items()
        }
        return _router(tuple(picks.items()), times, tuple(sides.items()), spec.cuda_graph)

    @property
    def backends(self) -> tuple[str, ...]:
        """Everyone who may be chosen, each once."""
        named = (part for name in self.routes.values() for part in parts_of(name))
        return tuple(dict.fromkeys([*self.picks.values(), *named]))

    def __call__(self, batch: AttentionBatch) -> Route:
        """Who serves this batch."""
        totals = totals_of(batch)
        if totals is None:
            return ()
        step = totals[0]
        if step is not Step.MIXED:
            return ((self._one(*totals), None),)
        name = self.routes.get(bucket_of(*totals, captured=self.captured))
        prefill, decode = self._each_phase(batch, *totals[1:]) if name is None else parts_of(name)
        if prefill == decode:
            return ((prefill, None),)
        return ((prefill, Phase.PREFILL), (decode, Phase.DECODE))

    def _one(self, step: Step, requests: int, tokens: int, keys: int) -> str:
        name = self.routes.get(bucket_of(step, requests, tokens, keys, captured=self.captured))
        if name is not None:
            return name
        phase = Phase.PREFILL if step is Step.PREFILL else Phase.DECODE
        return self.picks.get(phase, self.picks[Phase.PREFILL])  # an encoder has no decode

    def _each_phase(
        self, batch: AttentionBatch, requests: int, tokens: int, keys: int
    ) -> tuple[str, str]:
        """Who would serve prefill and decode of a mixed batch if each came alone."""
        decode, query_lens, seq_lens = Phase.DECODE, batch.query_lens, batch.host_seq_lens
        prompts = [i for i, phase in enumerate(batch.phases) if phase is not decode]
        new, read = sum(query_lens[i] for i in prompts), sum(seq_lens[i] for i in prompts)
        count, others = len(prompts), requests - len(prompts)
        step = Step.DECODE if tokens - new <= others else Step.VERIFY
        return (
            self._one(Step.PREFILL, count, new, read),
            self._one(step, others, tokens - new, keys - read),
        )


@functools.lru_cache(maxsize=1024)
def _router(
    picks: tuple[tuple[Phase, str], ...],
    times: LayerTimes,
    sides: tuple[tuple[Phase, Side], ...],
    captured: bool,
) -> Router:
    """Made once for all layers that are alike."""
    return Router(dict(picks), routes_of(times, dict(sides), captured=captured), captured)


@dataclass(frozen=True)
class RoutedPart:
    """Requests of a batch, who serves them, and the metadata of that backend.

    `phase` is None for all requests of the batch.
    """

    backend: str
    phase: Phase | None
    rows: BatchPart
    metadata: Any


@dataclass
class RoutedMetadata(BatchMetadata):
    """A batch in parts, each with the metadata of the backend that serves it."""

    parts: list[RoutedPart]

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
    """Builds each part's metadata with the builder of the backend that serves it.

    Args:
        builders: by the names that `route` gives: by default, of each phase.
        route: says who serves a batch.
    """

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
            with blaming(name, rows.batch):
                built = self._builders[name].build(rows.batch)
            metadata.parts.append(RoutedPart(name, phase, rows, built))
        return metadata


class RoutedImpl:
    """Runs each part of a batch on the impl of the backend that serves it.

    Args:
        impls: by the names that the builder's `route` gives, for the same layer.
        backends: likewise.
    """

    def __init__(
        self,
        impls: Mapping[Any, AttentionImpl[Any]],
        backends: Mapping[Any, type[AttentionBackend]],
    ) -> None:
        self._impls = impls
        self._metadata_classes = {name: cls.get_metadata_cls() for name, cls in backends.items()}

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: RoutedMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward; only that output must be given."""
        scales = (output_scale, output_block_scale)
        if isinstance(attn_metadata, RoutedMetadata) and len(attn_metadata.parts) == 1:
            (part,) = attn_metadata.parts  # it is the whole batch; its impl checks the arguments
            impl, own = self._impl_of(part), part.metadata
            with blaming(part.backend, part.rows.batch):
                return impl.forward(layer, query, key, value, kv_cache, own, output, *scales)
        first = next(iter(self._impls.values()))
        check_metadata(first, attn_metadata, RoutedMetadata)
        batch, parts = attn_metadata.batch, attn_metadata.parts
        impls = [self._impl_of(part) for part in parts]
        check_forward(first, query, key, value, kv_cache, batch, output, *scales)

        if kv_cache is not None and key is not None and value is not None:
            # A part may read what another writes: a prefix that their requests share. So what the
            # later parts write must be there before the first one reads.
            for impl, part in zip(impls[1:], parts[1:], strict=True):
                new = (key[part.rows.keys], value[part.rows.keys])
                with blaming(part.backend, part.rows.batch):
                    impl.write_kv(layer, *new, kv_cache, part.rows.batch)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        # What lies beyond the batch's tokens is in no part.
        indexable(output)[batch.num_tokens :] = 0
        lse[batch.num_tokens :] = float("-inf")
        for impl, part in zip(impls, parts, strict=True):
            tokens, keys = part.rows.tokens, part.rows.keys
            part_output = output[tokens]
            block_scale = None if output_block_scale is None else output_block_scale[tokens]
            with blaming(part.backend, part.rows.batch):
                result = impl.forward(
                    layer,
                    query[tokens],
                    None if key is None else key[keys],
                    None if value is None else value[keys],
                    kv_cache,
                    part.metadata,
                    part_output,
                    output_scale,
                    block_scale,
                )
            if first.returns_lse:
                lse[tokens] = result[1]
            if not isinstance(tokens, slice):  # indexing made copies: put them back
                indexable(output)[tokens] = indexable(part_output)
                if output_block_scale is not None and block_scale is not None:
                    output_block_scale[tokens] = block_scale
        return (output, lse) if first.returns_lse else output

    def _impl_of(self, part: RoutedPart) -> AttentionImpl[Any]:
        wanted = self._metadata_classes.get(part.backend)
        if wanted is None or not isinstance(part.metadata, wanted):
            raise InvalidInputError(
                f"attn_metadata has a {type(part.metadata).__name__} for {part.backend}, and this "
                "layer has another backend there. Make it by layer.build_metadata."
            )
        return self._impls[part.backend]
