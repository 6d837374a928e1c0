"""The policy: which backend serves which batches of a layer, by measured times. Pure.

A backend replaces the platform's default only if it is faster by `MARGIN` at every neighbouring
measurement. So a table can only make things faster, and noise changes nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.timings.table import (
    BatchKind,
    Bucket,
    LayerTimes,
    Point,
    Table,
    bucket_of,
    layer_key,
)

__all__ = [
    "MARGIN",
    "Comparison",
    "PhaseCandidates",
    "TimingEvidence",
    "compare_points",
    "evaluate_timings",
    "routes_of",
    "split_route",
    "times_for",
]

#: How much faster a backend must be to count as faster. Noise is below that.
MARGIN = 0.03


@dataclass(frozen=True)
class PhaseCandidates:
    """One phase of a layer: the first in the platform's order, and all that may serve it."""

    default: str
    eligible: frozenset[str]


_PHASES_OF: dict[BatchKind, tuple[Phase, ...]] = {
    BatchKind.PREFILL: (Phase.PREFILL,),
    BatchKind.RAGGED: (Phase.PREFILL,),
    BatchKind.DECODE: (Phase.DECODE,),
    BatchKind.VERIFY: (Phase.DECODE,),
    BatchKind.MIXED: (Phase.PREFILL, Phase.DECODE),
}

_ByPhase = Mapping[Phase, PhaseCandidates]

#: Name -> the cost of a batch, for the eligible backends.
_Costs = Mapping[str, float]


def split_route(name: str) -> tuple[str, str]:
    """The backends of prefill and of decode in a name such as "A" or "A+B"."""
    prefill, _, decode = name.partition("+")
    return prefill, decode or prefill


def _is_eligible(name: str, step: BatchKind, candidates: _ByPhase) -> bool:
    each = dict(zip(Phase, split_route(name), strict=True))
    return all(each[phase] in candidates[phase].eligible for phase in _PHASES_OF[step])


def _default_of(step: BatchKind, candidates: _ByPhase) -> str:
    return "+".join(dict.fromkeys(candidates[phase].default for phase in _PHASES_OF[step]))


def _costs_of(
    points: Iterable[Point], default: str, is_eligible: Callable[[str], bool], *, captured: bool
) -> list[_Costs]:
    """The costs at each point where the default was timed."""
    return [
        {
            name: point.cost_us(name, default, captured=captured)
            for name in point.times_us
            if is_eligible(name)
        }
        for point in points
        if default in point.times_us
    ]


def _pick(near: Sequence[_Costs], default: str, incumbent: str | None = None) -> str:
    """The backend for the batches near these points.

    `incumbent` serves the shorter batches: it stays unless another is faster by the margin.
    """
    shares = {default: 1.0}  # name -> its cost over the default's, the geometric mean
    for name in near[0]:
        if name != default and all(
            name in each and each[name] * (1 + MARGIN) <= each[default] for each in near
        ):
            product = math.prod(each[name] / each[default] for each in near)
            shares[name] = product ** (1 / len(near))
    best = min(shares, key=lambda name: (shares[name], name))
    if incumbent in shares and shares[incumbent] <= shares[best] * (1 + MARGIN):
        return incumbent
    return best


def _around(bucket: Bucket) -> Iterable[Bucket]:
    step, *place = bucket
    for requests, tokens, keys in itertools.product(*((i - 1, i, i + 1) for i in place)):
        if min(requests, tokens, keys) >= 0:
            yield step, requests, tokens, keys


def routes_of(times: LayerTimes, candidates: _ByPhase, *, captured: bool) -> Mapping[Bucket, str]:
    """Bucket -> the backend for its batches, for every bucket that is near measured points.

    Names are those of `Point.times_us`. The points near a bucket are those in it and in the ones
    next to it: half or twice as many requests, tokens or keys. A mixed step needs the candidates of
    both phases.
    """
    return _routes(times, tuple(candidates.items()), captured)


@functools.lru_cache(maxsize=1024)
def _routes(
    times: LayerTimes, pairs: tuple[tuple[Phase, PhaseCandidates], ...], captured: bool
) -> Mapping[Bucket, str]:
    candidates, found = dict(pairs), dict[Bucket, str]()
    for step, phases in _PHASES_OF.items():
        if not candidates.keys() >= set(phases):
            continue
        default = _default_of(step, candidates)
        is_eligible = functools.partial(_is_eligible, step=step, candidates=candidates)
        near = defaultdict[Bucket, list[_Costs]](list)
        for point in times.points:
            if point.step is step:
                costs = _costs_of([point], default, is_eligible, captured=captured)
                for bucket in _around(bucket_of(*point.key, captured=captured)):
                    near[bucket] += costs
        for bucket in sorted(near):  # the shorter of two that differ in their keys comes first
            if near[bucket]:
                shorter = (*bucket[:3], bucket[3] - 1)
                found[bucket] = _pick(near[bucket], default, found.get(shorter))
    return found


@dataclass(frozen=True)
class Comparison:
    """One measured point: the picked backend, the platform's default, and the times of both."""

    point: Point
    picked: str
    picked_us: float
    default: str
    default_us: float

    def __str__(self) -> str:
        return (
            f"{self.point.describe()}: {self.picked_us:.1f} us instead of {self.default_us:.1f} us"
        )


@dataclass(frozen=True)
class TimingEvidence:
    """What a table states about a phase of a layer.

    Attributes:
        times: all of the layer's.
        candidates: the compared backends.
        pick: the backend for the whole phase: the one that is faster than the default at all
            points, or the default.
        comparisons: one for each measured point of the phase.
    """

    times: LayerTimes = field(repr=False)
    candidates: PhaseCandidates
    pick: str
    comparisons: tuple[Comparison, ...]

    @property
    def _gains(self) -> list[Comparison]:
        return [each for each in self.comparisons if each.picked != each.default]

    @property
    def best(self) -> Comparison | None:
        """The point with the largest gain over the default; None if no backend beats it."""
        return min(self._gains, key=lambda each: each.picked_us / each.default_us, default=None)

    @property
    def because(self) -> str:
        """What was found, where and when, as a clause."""
        times, gains, best, total = self.times, self._gains, self.best, len(self.comparisons)
        source = f"measured on {times.device}, {times.measured[:10]}, {times.origin}"
        if best is None:
            return f"no measured backend beats it by {MARGIN:.0%} ({total} points; {source})"
        if self.pick != self.candidates.default:
            return (
                f"faster than {self.candidates.default}, the first in this platform's order, at "
                f"each of {total} measured points, most of all in {best} ({source})"
            )
        names = ", ".join(dict.fromkeys(each.picked for each in gains))
        return (
            f"a layer's batches go to {names} near {len(gains)} of {total} measured points, and "
            f"gain most in {best} ({source})"
        )

    def asdict(self) -> dict[str, Any]:
        """The evidence as JSON-ready data."""
        return {
            "origin": self.times.origin,
            "device": self.times.device,
            "measured": self.times.measured,
            "declared": self.candidates.default,
            "picked": self.pick,
            "points": [
                {
                    "step": each.point.step,
                    "requests": each.point.requests,
                    "tokens": each.point.tokens,
                    "keys": each.point.keys,
                    "picked": each.picked,
                    "picked_us": each.picked_us,
                    "declared": each.default,
                    "declared_us": each.default_us,
                }
                for each in self.comparisons
            ],
        }


def times_for(tables: Sequence[Table], spec: AttentionSpec) -> LayerTimes | None:
    """The times of a layer in the first table that has any."""
    key = layer_key(spec) if tables else None
    if key is None:
        return None
    return next((table.layers[key] for table in tables if key in table.layers), None)


def compare_points(
    times: LayerTimes, candidates: _ByPhase, *, captured: bool
) -> tuple[Comparison, ...]:
    """A comparison for each measured point where the default was timed; see `routes_of`."""
    routes = routes_of(times, candidates, captured=captured)
    found = []
    for point in times.points:
        if not candidates.keys() >= set(_PHASES_OF[point.step]):
            continue
        default = _default_of(point.step, candidates)
        if default in point.times_us:
            picked = routes[bucket_of(*point.key, captured=captured)]
            us, default_us = (
                point.cost_us(name, default, captured=captured) for name in (picked, default)
            )
            found.append(Comparison(point, picked, us, default, default_us))
    return tuple(found)


def evaluate_timings(
    times: LayerTimes, candidates: PhaseCandidates, phase: Phase | None, *, captured: bool
) -> TimingEvidence | None:
    """The evidence for a phase, or with None for one backend that serves both.

    None if the default was timed at no point of the phase.
    """
    by_phase = {each: candidates for each in Phase if phase in (None, each)}
    comparisons = compare_points(times, by_phase, captured=captured)
    if not comparisons:
        return None
    points = [each.point for each in comparisons]
    default, is_eligible = candidates.default, candidates.eligible.__contains__
    pick = _pick(_costs_of(points, default, is_eligible, captured=captured), default)
    return TimingEvidence(times, candidates, pick, comparisons)
