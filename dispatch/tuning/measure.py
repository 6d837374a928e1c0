"""Tuning: a grid of batches, its cases, and a table that is filled and stored point by point."""

from __future__ import annotations

import datetime
import itertools
import operator
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attn_dispatch.arguments import as_int
from attn_dispatch.bench.cases import DECODE_QUERY_LEN, Case, short_number
from attn_dispatch.bench.implementations import (
    BackendImplementation,
    check_registered,
    class_of,
    verdicts_of,
)
from attn_dispatch.bench.runner import Bench, CaseResult, Row
from attn_dispatch.bench.timing import Clock, clock_for
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.files import check_writable, locked
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.priorities import LAST_RESORT
from attn_dispatch.selection.selector import phases_of, select
from attn_dispatch.selection.timings.policy import Comparison, compare_points
from attn_dispatch.selection.timings.reader import read_table
from attn_dispatch.selection.timings.store import conflict_with, machine_of, write_table
from attn_dispatch.selection.timings.table import (
    LAYER_FIELDS,
    BatchKind,
    LayerKey,
    LayerTimes,
    Point,
    SplitKey,
    Table,
    is_ragged,
    layer_key,
    spec_of,
    totals_of,
)

__all__ = ["Grid", "Measured", "Task", "Tuner", "cases_of", "place_of"]

#: The steps, in the order in which they take turns.
_STEPS = (
    BatchKind.DECODE,
    BatchKind.PREFILL,
    BatchKind.VERIFY,
    BatchKind.RAGGED,
    BatchKind.MIXED,
)

#: New tokens of a request that verifies drafts; of a chunk of a prompt; of a mixed step.
_DRAFTS, _CHUNK, _MIXED = 4, 1024, 2048

#: The limits of a point: new tokens, and keys, of all requests.
_MAX_TOKENS, _MAX_KEYS = 1 << 16, 1 << 22

#: Tries to draw lengths that are unequal enough.
_MAX_DRAWS = 100

#: Numbers in one list of a grid.
_MAX_NUMBERS = 64

#: Seconds to time each candidate at a point.
_SECONDS = 0.1


@dataclass(frozen=True)
class Grid:
    """The batches to measure: every step, with every number of requests, with every length.

    They are a power of four apart, so that a measured bucket is next to each bucket of the table.

    Raises:
        InvalidInputError: a number is not an integer of 1 or more, is too large for a batch, or
            there are too many numbers.
    """

    steps: tuple[BatchKind, ...] = tuple(BatchKind)
    requests: tuple[int, ...] = (1, 4, 16, 64, 256)
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)

    def __post_init__(self) -> None:
        for name, most in (("requests", _MAX_TOKENS), ("lengths", _MAX_KEYS)):
            numbers = getattr(self, name)
            if len(numbers) > _MAX_NUMBERS:
                raise InvalidInputError(
                    f"{name} has {len(numbers)} numbers. Give at most {_MAX_NUMBERS}."
                )
            for each in numbers:
                as_int(f"a number in {name}", each, 1, most)


def _batches(
    step: BatchKind, requests: int, length: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(query_lens, seq_lens) of the batches of a step for a number of requests and a length."""
    if step is BatchKind.MIXED:
        # One prompt together with decodes: as many tokens as an engine has in a step.
        decodes = requests - 1
        prompt = min(length, _MIXED) - decodes
        if not decodes or prompt <= DECODE_QUERY_LEN:
            return []
        return [((1,) * decodes + (prompt,), (length,) * decodes + (prompt,))]
    if step is BatchKind.RAGGED:
        return _ragged(requests, length)
    if step is BatchKind.PREFILL:  # a short one would count as decode
        new = [length] * (length > DECODE_QUERY_LEN) + [_CHUNK] * (length > _CHUNK)
    else:
        tokens = _DRAFTS if step is BatchKind.VERIFY else 1
        new = [tokens] * (length > tokens)
    return [((each,) * requests, (length,) * requests) for each in new]


def _ragged(requests: int, length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(query_lens, seq_lens) of prefills as engines send them: unequal prompts, and chunks.

    Lengths are lognormal, with the same seed for the same numbers. `length` is that of a prompt on
    average; or of the keys of a chunk, of which half are new, up to 1024 on average.
    """
    rng = random.Random(requests * _MAX_KEYS + length)
    new = min(length // 2, _CHUNK)
    found = []
    for tokens, past in ((length, 0), (new, length - new)):
        for _ in range(_MAX_DRAWS):
            queries = _lognormal(requests, tokens, DECODE_QUERY_LEN + 1, rng)
            keys = tuple(map(operator.add, queries, _lognormal(requests, past, 0, rng)))
            if is_ragged(tuple(map(operator.mul, queries, keys))):
                found.append((queries, keys))
                break
    return found


def _lognormal(number: int, average: int, least: int, rng: random.Random) -> tuple[int, ...]:
    """This many lengths whose logarithms have a standard deviation of 0.8, and this average."""
    drawn = [rng.lognormvariate(0, 0.8) for _ in range(number)]
    factor = number * average / sum(drawn)
    return tuple(max(least, round(each * factor)) for each in drawn)


def cases_of(name: str, spec: AttentionSpec, grid: Grid) -> list[Case]:
    """The points of a grid for one layer, as cases; steps take turns.

    Args:
        name: of the layer.
        spec: the layer, of which `layer_key` gives a key.
        grid: the batches.
    """
    fields = dict(zip(LAYER_FIELDS, layer_key(spec) or (), strict=True))
    fields = {key: value for key, value in fields.items() if value is not None}
    by_step: dict[BatchKind, list[Case]] = {step: [] for step in _STEPS if step in grid.steps}
    for step, requests, length in itertools.product(by_step, grid.requests, grid.lengths):
        if requests * length > _MAX_KEYS:
            continue
        for queries, keys in _batches(step, requests, length):
            if sum(queries) > _MAX_TOKENS:
                continue
            sizes = f"B{requests}-Q{short_number(max(queries))}-L{short_number(max(keys))}"
            case = Case(name=f"{name}/{step}/{sizes}", query_lens=queries, seq_lens=keys, **fields)
            if case.has_kv_cache or not case.has_past:
                by_step[step].append(case)
    rounds = itertools.zip_longest(*by_step.values())
    return [case for each in rounds for case in each if case is not None]


def place_of(case: Case) -> tuple[BatchKind, int, int, int]:
    """The place of a case in the grid: (step, requests, new tokens, keys)."""
    longest = max(case.query_lens) if case.kind == "decode" else 1
    batch = AttentionBatch.create(case.query_lens, case.seq_lens, max_decode_query_len=longest)
    totals = totals_of(batch)
    assert totals is not None  # a case has a request
    return totals


@dataclass(frozen=True)
class Task:
    """One point to measure: a case, its place, and the backends."""

    case: Case
    key: LayerKey
    place: tuple[BatchKind, int, int, int]
    names: tuple[str, ...]

    @property
    def entries(self) -> tuple[str, ...]:
        """Everything that is timed: in a mixed step also pairs of backends that split it.

        Pairs for latent attention are left out: RoutedImpl takes queries, keys and values.
        """
        if self.place[0] is not BatchKind.MIXED or self.case.mla is not None:
            return self.names
        return self.names + tuple("+".join(pair) for pair in itertools.permutations(self.names, 2))


@dataclass(frozen=True)
class Measured:
    """The result of a task: a point, or the reason why there is none; and backends that failed."""

    task: Task
    point: Point | None
    skipped: str = ""
    problems: tuple[Row, ...] = ()


#: Layer -> place -> point.
_Points = dict[LayerKey, dict[tuple[BatchKind, int, int, int], Point]]


@dataclass
class Tuner:
    """Fills a table, one point after another; each is written to the file at once.

    Several tuners, in one process or in several, may fill the same file: before a point is written,
    the file is read again, under a lock.

    Args:
        device: to measure.
        path: the file; its points are kept, and not measured again.
        backends: the backends to time; None for all that compute the layer, except the references.
        fresh: measure the layers again: the first new point of a layer removes its old ones. A
            table of another device or other versions is replaced.
        clock: of the device; by default, a new one.
        rounds: this many calls of each at a point, instead of a tenth of a second.
        replaces_unreadable: a file that cannot be read is replaced, because it is the cache's own.

    Raises:
        UnknownBackendError: a backend is not registered.
        InvalidInputError: the file is not a table, or one of another device or other versions, or
            cannot be written.
    """

    device: torch.device
    path: Path
    backends: Sequence[str] | None = None
    fresh: bool = False
    clock: Clock | None = None
    rounds: int | None = None
    replaces_unreadable: bool = False
    #: Why the file could not be read, if it is replaced for that reason.
    unreadable: str = field(default="", init=False)
    #: The file's points, replaced by this tuner's own.
    _points: _Points = field(default_factory=dict, init=False)
    _own: _Points = field(default_factory=dict, init=False)
    #: With `fresh`, the file's points at the start.
    _old: _Points = field(default_factory=dict, init=False)
    _providers: dict[LayerKey, dict[str, str]] = field(default_factory=dict, init=False)
    #: Of the file, which this tuner only keeps.
    _splits: Mapping[SplitKey, LayerTimes] = field(default_factory=dict, init=False)
    _has_written: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_registered(self.backends or ())
        self._profile = detect_device(self.device)
        self.machine = machine_of(self._profile)
        check_writable(self.path)
        self._merge_file()
        if self.fresh:
            self._old = self._points

    def _merge_file(self) -> None:
        """Read the file, except points that this tuner measured or is going to measure again."""
        self._points = {}
        for key, times in self._layers_in_file().items():
            old = self._old.get(key, {}) if key in self._own else {}
            left = (point for point in times.points if old.get(point.key) != point)
            self._points[key] = {point.key: point for point in left}
            self._providers[key] = {**times.kernel_provider, **self._providers.get(key, {})}
        for key, own in self._own.items():
            self._points.setdefault(key, {}).update(own)

    def _layers_in_file(self) -> Mapping[LayerKey, LayerTimes]:
        """The file's layers; none if there is no file, or it will be replaced.

        Raises:
            InvalidInputError: it is not a table, or not one of this machine.
        """
        self._splits = {}
        if not os.path.exists(self.path):
            return {}
        try:
            table = read_table(self.path)
        except InvalidInputError as error:
            if not self.replaces_unreadable:
                raise
            self.unreadable = str(error)
            return {}
        problem = conflict_with(table, self.machine)
        if not problem:
            self._splits = table.splits
            return table.layers
        if self.fresh and not self._has_written:
            return {}
        raise InvalidInputError(
            f"{self.path} cannot be continued: {problem}. Name another file, or start again by "
            "--fresh."
        )

    def tasks(self, cases: Sequence[Case]) -> tuple[list[Task], list[str]]:
        """The tasks that are left of these cases; and a sentence for each layer without a task."""
        found, nothing = [], {}
        for case in cases:
            key = layer_key(case.spec())
            verdicts = verdicts_of(case, self.device).values()
            names = tuple(v.name for v in verdicts if v.supported and self._takes_part(v.name))
            assert key is not None  # a case has no other fields
            if len(names) < 2:
                able = f"only {names[0]}" if names else "none of the backends to time"
                nothing[key] = f"Nothing to compare for {case.spec()}: {able} computes it here."
                continue
            task = Task(case, key, place_of(case), names)
            known = (self._own if self.fresh else self._points).get(key, {}).get(task.place)
            if known is None or not {*known.times_us, *known.failed} >= set(task.entries):
                found.append(task)
        return found, list(nothing.values())

    def _takes_part(self, name: str) -> bool:
        return name not in LAST_RESORT if self.backends is None else name in self.backends

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """Measure the tasks and store their points; the caller may stop at any time.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        clock = self.clock or clock_for(self.device)
        for task in tasks:
            yield self._measure(task, clock)

    def _measure(self, task: Task, clock: Clock) -> Measured:
        splits = [entry for entry in task.entries if "+" in entry]
        bench = Bench(
            self.device,
            backends=task.names,
            peers=[
                BackendImplementation(entry, self.device, whole_layers=True) for entry in splits
            ],
            whole_layers=True,
            clock=clock,
            budget_s=_SECONDS,
            rounds=self.rounds,
        )
        (result,) = bench.run([task.case])
        if result.skipped:
            return Measured(task, None, result.skipped)
        point = _point_of(task, result)
        problems = tuple(row for row in result.failed if row.name in task.entries)
        if not point.times_us:  # a lost device, for instance: to be tried again
            return Measured(task, None, "no backend has a result", problems)
        self._keep(task, point)
        return Measured(task, point, "", problems)

    def _keep(self, task: Task, point: Point) -> None:
        """Write a point into the file, and keep the points of other tuners there."""
        providers = self._providers.setdefault(task.key, {})
        for name in task.names:
            provider = class_of(name).kernel_provider(task.case.spec(), self._profile)
            if provider:
                providers[name] = provider
        self._own.setdefault(task.key, {})[task.place] = point
        with locked(self.path):
            self._merge_file()
            write_table(self.table(), self.path)
        self._has_written = True

    def table(self) -> Table:
        """The points so far."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        layers: Mapping[LayerKey, LayerTimes] = {
            key: LayerTimes(
                tuple(points.values()),
                str(self.path),
                self.machine.device,
                now,
                self._providers.get(key, {}),
            )
            for key, points in self._points.items()
        }
        return Table(self.machine, now, layers, str(self.path), self._splits)


def _point_of(task: Task, result: CaseResult) -> Point:
    """The times of backends whose results were right before and after they were timed.

    A fifth of the calls were shorter: other work of the machine only makes calls longer.
    """
    timed = {
        row.name: row for row in result.rows if row.timing is not None and row.name in task.entries
    }
    return Point(
        *task.place,
        times_us={n: _rounded(r.timing.low_us) for n, r in timed.items() if r.timing},
        host_us={n: _rounded(r.host_us) for n, r in timed.items() if r.host_us is not None},
        failed=tuple(name for name in task.entries if name not in timed),
    )


def _rounded(us: float) -> float:
    """To five digits, which is more than the measurement gives."""
    return float(f"{us:.5g}")


def chosen_in(
    table: Table, device: torch.device
) -> Iterator[tuple[AttentionSpec, tuple[Comparison, ...]]]:
    """Each layer of a table, and the backends that are chosen at its points.

    By only this table, without overrides. Layers that no backend computes here are left out, as
    are fields that no request has.
    """
    profile = detect_device(device)
    for key, times in table.layers.items():
        try:
            spec = _spec_of(key)
            selections = {
                phase: select(spec, profile, phase=phase, tables=(table,))
                for phase in phases_of(spec)
            }
        except (InvalidInputError, UnsupportedError):
            continue
        candidates = {
            phase: selection.report.measured.candidates
            for phase, selection in selections.items()
            if selection.report.measured is not None
        }
        yield spec, compare_points(times, candidates, captured=False)


_DTYPES = {str(each).removeprefix("torch."): each for each in (
    torch.bfloat16, torch.float16, torch.float32, torch.float64
)}  # fmt: skip


def _spec_of(key: LayerKey) -> AttentionSpec:
    fields = dict(zip(LAYER_FIELDS, key, strict=True))
    return spec_of(fields | {"dtype": _DTYPES.get(fields["dtype"])})
