"""Tuning of context parallelism: one rank next to all ranks of a group, point by point."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.split_steps import SplitStep, aligned_clock, measure_on_ranks
from attn_dispatch.distributed.advice import SplitAdvice
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.errors import AttnDispatchError, InvalidInputError, summary_of
from attn_dispatch.files import check_writable, locked
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device_errors import is_device_lost
from attn_dispatch.selection.timings.reader import read_table
from attn_dispatch.selection.timings.store import conflict_with, machine_of, write_table
from attn_dispatch.selection.timings.table import (
    LayerTimes,
    Point,
    SplitKey,
    Table,
    split_layer_key,
)
from attn_dispatch.tuning.measure import place_of

__all__ = ["MeasuredSplit", "SplitTuner"]

#: Calls of each at a point.
_ROUNDS = 30

#: The part of the free memory that a step may take: the whole cache, this rank's part, the check.
_MEMORY = 0.35


@dataclass(frozen=True)
class MeasuredSplit:
    """The result at one point, or the reason why there is none."""

    case: Case
    advice: SplitAdvice | None
    skipped: str = ""


@dataclass
class SplitTuner:
    """Measures steps on all ranks of a group; rank 0 writes each point to the file at once.

    Every rank makes one with the same arguments, and runs the same cases.

    Args:
        device: of this rank.
        path: the file of rank 0; its points are kept, and not measured again.
        ranks: the group.
        fresh: measure again what the file has.
        rounds: calls of each at a point; None for 30.
        replaces_unreadable: a file that cannot be read is replaced, because it is the cache's own.

    Raises:
        InvalidInputError: on every rank, if rank 0's file is not a table, is one of another device
            or other versions, or cannot be written.
    """

    device: torch.device
    path: Path
    ranks: Ranks
    fresh: bool = False
    rounds: int | None = None
    replaces_unreadable: bool = False
    _known: Mapping[SplitKey, LayerTimes] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.machine = machine_of(detect_device(self.device))
        problem, known = "", {}
        if self.ranks.rank == 0:
            try:
                check_writable(self.path)
                known = dict(self._table().splits)
            except AttnDispatchError as error:
                problem = str(error)
        problem, known = self.ranks.gather_objects((problem, known))[0]
        if problem:
            raise InvalidInputError(problem)
        self._known = {} if self.fresh else known

    def _table(self) -> Table:
        """The file's table; an empty one if there is no file, or it will be replaced."""
        empty = Table(self.machine, _now(), {}, str(self.path))
        if not os.path.exists(self.path):
            return empty
        try:
            table = read_table(self.path)
        except InvalidInputError:
            if not self.replaces_unreadable:
                raise
            return empty
        problem = conflict_with(table, self.machine)
        if problem and self.fresh:
            return empty
        if problem:
            raise InvalidInputError(
                f"{self.path} cannot be continued: {problem}. Name another file, or start again by "
                "--fresh."
            )
        return table

    def _key_of(self, case: Case) -> SplitKey | None:
        layer = split_layer_key(case.spec())
        return None if layer is None else SplitKey(layer, self.ranks.size, self.ranks.transport)

    def cases_left(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that the file has no point for; the same on every rank."""
        found = []
        for case in cases:
            key = self._key_of(case)
            known = self._known.get(key) if key is not None else None
            places = set() if known is None else {point.key for point in known.points}
            if place_of(case) not in places:
                found.append(case)
        return found

    def run(self, cases: Sequence[Case]) -> Iterator[MeasuredSplit]:
        """Measure the cases and store their points; all ranks go through all of them."""
        for case in cases:
            yield self._measure(case)

    def _measure(self, case: Case) -> MeasuredSplit:
        key, reason = self._key_of(case), self._reason_against(case)
        if key is None:
            reason = "tables do not state all fields of such a layer"
        reasons = [each for each in self.ranks.gather_objects(reason) if each]
        if reasons or key is None:
            return MeasuredSplit(case, None, reasons[0])
        try:
            step = SplitStep(case, self.device, self.ranks)
            step.check()
            clock = aligned_clock(self.device, self.ranks)
            timings = measure_on_ranks(step.calls, clock, self.ranks, self.rounds or _ROUNDS)
        except Exception as error:  # the same on all ranks, or they end by the group's timeout
            if is_device_lost(error):
                raise
            return MeasuredSplit(case, None, summary_of(error))
        times = {name: _rounded(each.timing.low_us) for name, each in timings.items()}
        host = {name: _rounded(each.host_us) for name, each in timings.items()}
        point = Point(*place_of(case), times_us=times, host_us=host)
        if self.ranks.rank == 0:
            self._keep(key, point)
        return MeasuredSplit(case, SplitAdvice(point, True))

    def _reason_against(self, case: Case) -> str:
        """Why this rank cannot measure a case, or ""."""
        if self.device.type != "cuda":
            return ""
        free, _ = torch.cuda.mem_get_info(self.device)
        needed = case.bytes_held
        if needed > free * _MEMORY:
            return f"it takes {needed >> 20} MiB, and {free >> 20} MiB are free on a rank"
        return ""

    def _keep(self, key: SplitKey, point: Point) -> None:
        """Write a point into the file, and keep everything else there."""
        with locked(self.path):
            table = self._table()
            old = table.splits.get(key)
            points = {each.key: each for each in (() if old is None else old.points)}
            points[point.key] = point
            now = _now()
            times = LayerTimes(tuple(points.values()), str(self.path), self.machine.device, now)
            splits = {**table.splits, key: times}
            write_table(dataclasses.replace(table, measured=now, splits=splits), self.path)


def _rounded(us: float) -> float:
    return float(f"{us:.5g}")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
