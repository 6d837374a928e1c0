"""What times say: which backend serves which batches of a layer. Pure.

Whoever is not the first in the platform's order must beat that one: by a margin, at every measured
point near by. So a table can only make things faster, and noise changes nothing.
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
    "TimingEvidence",
    "PhaseCandidates",
    "split_route",
    "routes_of",
    "times_for",
    "evaluate_timings",
]

#: By how much one must be faster than another to be taken for faster: noise is below that.
MARGIN = 0.03


@dataclass(frozen=True)
class PhaseCandidates:
    """One phase of a layer: the first in the platform's order, and who may take its place."""

    declared: str
    admitted: frozenset[str]


#: The phases whose backends a step depends on.
_PHASES_OF: dict[BatchKind, tuple[Phase, ...]] = {
    BatchKind.PREFILL: (Phase.PREFILL,),
    BatchKind.DECODE: (Phase.DECODE,),
    BatchKind.VERIFY: (Phase.DECODE,),
    BatchKind.MIXED: (Phase.PREFILL, Phase.DECODE),
}


def split_route(name: str) -> tuple[str, str]:
    """The backends of prefill and of decode that a name in a table stands for."""
    prefill, _, decode = name.partition("+")
    return prefill, decode or prefill


def _admits(name: str, step: BatchKind, sides: Mapping[Phase, PhaseCandidates]) -> bool:
    each = dict(zip(Phase, split_route(name), strict=True))
    return all(each[phase] in sides[phase].admitted for phase in _PHASES_OF[step])


def _declared(step: BatchKind, sides: Mapping[Phase, PhaseCandidates]) -> str:
    return "+".join(dict.fromkeys(sides[phase].declared for phase in _PHASES_OF[step]))


#: Name -> what a batch costs with it, for those who are admitted.
_Costs = Mapping[str, float]


def _costs_of(
    points: Iterable[Point], declared: str, admits: Callable[[str], bool], *, captured: bool
) -> list[_Costs]:
    """The costs at each point that has one for `declared`."""
    return [
        {
            name: point.cost_us(name, declared, captured=captured)
            for name in point.times_us
            if admits(name)
        }
        for point in points
        if declared in point.times_us
    ]


def _pick(near: Sequence[_Costs], declared: str, incumbent: str | None = None) -> str:
    """Who serves the batches that all these points speak of.

    `incumbent` serves the shorter batches: it stays unless another is faster by the margin.
    """
    shares = {declared: 1.0}  # name -> its cost over that of `declared`, the geometric mean
    for name in near[0]:
        if name != declared and all(
            name in each and each[name] * (1 + MARGIN) <= each[declared] for each in near
        ):
            shares[name] = math.prod(each[name] / each[declared] for each in near) ** (
                1 / len(near)
            )
    best = min(shares, key=lambda name: (shares[name], name))
    if incumbent in shares and shares[incumbent] <= shares[best] * (1 + MARGIN):
        return incumbent
    return best


def _around(bucket: Bucket) -> Iterable[Bucket]:
    step, *place = bucket
    for requests, tokens, keys in itertools.product(*((i - 1, i, i + 1) for i in place)):
        if min(requests, tokens, keys) >= 0:
            yield step, requests, tokens, keys


def routes_of(
    times: LayerTimes, sides: Mapping[Phase, PhaseCandidates], *, captured: bool
) -> Mapping[Bucket, str]:
    """Bucket -> who serves its batches, for every bucket that measured points are near to.

    Args:
        times: of the layer.
        sides: of each phase that is asked about; a mixed step needs both.
        captured: as for `bucket_of`.

    Returns:
        Names as in `Point.times_us`. The points near a bucket are those in it and in the ones next
        to it: half or twice as many requests, tokens or keys.
    """
    return _routes(times, tuple(sides.items()), captured)


@functools.lru_cache(maxsize=1024)
def _routes(
    times: LayerTimes, sides: tuple[tuple[Phase, PhaseCandidates], ...], captured: bool
) -> Mapping[Bucket, str]:
    by_phase, found = dict(sides), dict[Bucket, str]()
    for step, phases in _PHASES_OF.items():
        if not by_phase.keys() >= set(phases):
            continue
        declared = _declared(step, by_phase)
        admits = functools.partial(_admits, step=step, sides=by_phase)
        measured: dict[Bucket, list[_Costs]] = defaultdict(list)
        for point in times.points:
            if point.step is step:
                bucket = bucket_of(*point.place, captured=captured)
                measured[bucket] += _costs_of([point], declared, admits, captured=captured)
        reached = defaultdict[Bucket, list[_Costs]](list)
        for bucket, costs in measured.items():
            for each in _around(bucket):
                reached[each] += costs
        for bucket in sorted(reached):  # of two that differ in their keys, the shorter first
            if reached[bucket]:
                shorter = (*bucket[:3], bucket[3] - 1)
                found[bucket] = _pick(reached[bucket], declared, found.get(shorter))
    return found


@dataclass(frozen=True)
class Comparison:
    """One measured point: who serves it, who is the first in the order, and the times of both."""

    point: Point
    picked: str
    picked_us: float
    declared: str
    declared_us: float

    def __str__(self) -> str:
        words = self.point.words
        return f"{words}: {self.picked_us:.1f} us instead of {self.declared_us:.1f} us"


@dataclass(frozen=True)
class TimingEvidence:
    """What a table says of a layer in a phase.

    Attributes:
        times: all of the layer's.
        side: who was compared.
        pick: who serves the layer where one backend is wanted for the phase: who is faster than
            the first in the order at all points, or that one.
        comparisons: one for each measured point of the phase.
    """

    times: LayerTimes = field(repr=False)
    side: PhaseCandidates
    pick: str
    comparisons: tuple[Comparison, ...]

    @property
    def _gains(self) -> list[Comparison]:
        return [each for each in self.comparisons if each.picked != each.declared]

    @property
    def best(self) -> Comparison | None:
        """The point with the largest gain over the default; None if no backend beats it."""
        return min(self._gains, key=lambda c: c.picked_us / c.declared_us, default=None)

    @property
    def because(self) -> str:
        """What was found, where and when, as a clause."""
        times, declared = self.times, self.side.declared
        source = f"measured on {times.device}, {times.measured[:10]}, {times.origin}"
        gains, best = self._gains, self.best
        total = len(self.comparisons)
        if best is None:
            return f"no measured backend beats it by {MARGIN:.0%} ({total} points; {source})"
        if self.pick != declared:
            return (
                f"faster than {declared}, the first in this platform's order, at each of {total} "
                f"measured points, most of all in {best} ({source})"
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
            "declared": self.side.declared,
            "picked": self.pick,
            "points": [
                {
                    "step": str(each.point.step),
                    "requests": each.point.requests,
                    "tokens": each.point.tokens,
                    "keys": each.point.keys,
                    "picked": each.picked,
                    "picked_us": each.picked_us,
                    "declared": each.declared,
                    "declared_us": each.declared_us,
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
    times: LayerTimes, sides: Mapping[Phase, PhaseCandidates], *, captured: bool
) -> tuple[Comparison, ...]:
    """Who serves the batch of each measured point; arguments as for `routes_of`.

    Points without a time of the first in the order compare nothing, and are left out.
    """
    routes = routes_of(times, sides, captured=captured)
    found = []
    for point in times.points:
        if not sides.keys() >= set(_PHASES_OF[point.step]):
            continue
        declared = _declared(point.step, sides)
        if declared in point.times_us:
            picked = routes[bucket_of(*point.place, captured=captured)]
            us, declared_us = (
                point.cost_us(name, declared, captured=captured) for name in (picked, declared)
            )
            found.append(Comparison(point, picked, us, declared, declared_us))
    return tuple(found)


def evaluate_timings(
    times: LayerTimes, side: PhaseCandidates, phase: Phase | None, *, captured: bool
) -> TimingEvidence | None:
    """What a layer's times say of a phase, or with None of one backend for both.

    None if no point of the phase has a time of the first in the order.
    """
    sides = {each: side for each in Phase if phase in (None, each)}
    comparisons = compare_points(times, sides, captured=captured)
    if not comparisons:
        return None
    points = [each.point for each in comparisons]
    admits = side.admitted.__contains__
    pick = _pick(_costs_of(points, side.declared, admits, captured=captured), side.declared)
    return TimingEvidence(times, side, pick, comparisons)
