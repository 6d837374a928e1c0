"""Whether splitting the keys of a layer pays off: by measured times, or by a cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.timings.policy import MARGIN
from attn_dispatch.selection.timings.store import tables_for
from attn_dispatch.selection.timings.table import (
    BatchKind,
    LayerTimes,
    Point,
    SplitKey,
    split_layer_key,
)

__all__ = [
    "EXCHANGES",
    "NEEDS_POSITIONS",
    "ONE_RANK",
    "SplitAdvice",
    "advice_for",
    "describe_split",
    "predict",
    "split_times_for",
    "tune_command",
    "why_not_split",
]

#: The name in tables of one rank that has all heads and all keys.
ONE_RANK = "ONE_RANK"

#: Names in tables of the ways to exchange parts -> `combine` of ContextParallel.
EXCHANGES = {"A2A": "a2a", "AG_RS": "ag_rs"}

#: The cost model's collectives: microseconds of one, and bytes a microsecond between two GPUs. By
#: times of NCCL on two H100 GPUs with NVLink: docs/distributed.md.
_COLLECTIVE_US, _BYTES_PER_US = 10.0, 2e5

#: Fields under which the keys that a query sees, or their scores, depend on positions, also for
#: a request with one new token.
NEEDS_POSITIONS = (
    *("sliding_window", "window_size", "attention_chunk", "alibi", "custom_mask"),
    "bidirectional_ranges",
)

#: (requests, keys of each) for which the cost model is shown.
_TYPICAL = ((1, 1 << 17), (16, 1 << 16), (64, 1 << 12))


@dataclass(frozen=True)
class SplitAdvice:
    """A batch on one rank, and split over all.

    Attributes:
        point: the batch; `times_us` has ONE_RANK and at least one of EXCHANGES.
        is_measured: else the times are those of the cost model.
    """

    point: Point
    is_measured: bool

    def cost_us(self, name: str, *, captured: bool) -> float:
        """Of ONE_RANK or an exchange; a step that is not captured pays for its host, too.

        See Point.cost_us.
        """
        device_us = self.point.times_us[name]
        return device_us if captured else self.point.cost_us(name, ONE_RANK, captured=False)

    def exchange(self, *, captured: bool) -> str:
        """The fastest of EXCHANGES."""
        names = [name for name in EXCHANGES if name in self.point.times_us]
        return min(names, key=lambda name: self.cost_us(name, captured=captured))

    def speed_up(self, *, captured: bool) -> float:
        """How many times as fast as one rank the fastest exchange is."""
        split = self.cost_us(self.exchange(captured=captured), captured=captured)
        return self.cost_us(ONE_RANK, captured=captured) / split

    def pays_off(self, *, captured: bool) -> bool:
        """Whether the split is faster, by more than noise."""
        return self.speed_up(captured=captured) >= 1 + MARGIN

    def verdict(self, *, captured: bool) -> str:
        """ "1.52 times as fast", or "no, 0.56 times as fast"."""
        words = f"{self.speed_up(captured=captured):.2f} times as fast"
        return words if self.pays_off(captured=captured) else f"no, {words}"

    def __str__(self) -> str:
        times, host = self.point.times_us, self.point.host_us
        split = ", ".join(f"{EXCHANGES[n]} {times[n]:.1f}" for n in EXCHANGES if n in times)
        figures = f"one rank {times[ONE_RANK]:.1f} us, {split}"
        if not self.is_measured:
            verdict = self.verdict(captured=True)
            return f"{self.point.describe()}: {verdict} (predicted, not measured: {figures})"
        verdicts = self.verdict(captured=True)
        if host:
            verdicts = f"{verdicts} in a graph, run eagerly {self.verdict(captured=False)}"
            name = self.exchange(captured=False)
            figures += f"; of the host {host.get(ONE_RANK, 0.0):.0f} and {host.get(name, 0.0):.0f}"
        return f"{self.point.describe()}: {verdicts} (measured: {figures})"

    def asdict(self) -> dict[str, Any]:
        """The advice as JSON-ready data."""
        kinds = {"captured": True, "eager": False} if self.is_measured else {"captured": True}
        return {
            **self.point.asdict(),
            "measured": self.is_measured,
            **{
                kind: {
                    "exchange": EXCHANGES[self.exchange(captured=captured)],
                    "speed_up": self.speed_up(captured=captured),
                    "pays_off": self.pays_off(captured=captured),
                }
                for kind, captured in kinds.items()
            },
        }


def why_not_split(spec: AttentionSpec, ranks: int, *, sharded_heads: bool = True) -> str | None:
    """Why the keys of such a layer cannot be split over ranks, as a sentence; None if they can."""
    if spec.attn_type != AttentionType.DECODER:
        return f"attn_type is {str(spec.attn_type)!r}, and only a decoder's cache is split."
    if spec.key_positions:
        return "It has key_positions, so its keys are one rank's already."
    if spec.lengths != "exact":
        return (
            "It has lengths='upper_bound', and which keys are on a rank follows from the true "
            "key counts."
        )
    positional = [name for name in NEEDS_POSITIONS if getattr(spec, name)]
    if spec.cuda_graph and (positional or not spec.causal):
        what = ", ".join(positional) or "no causal mask"
        return f"It has cuda_graph=True, and steps with {what} are not captured on ranks."
    if sharded_heads and spec.num_heads % ranks:
        return f"{spec.num_heads} query heads are not a multiple of {ranks} ranks."
    return None


def split_times_for(
    profile: DeviceProfile, ranks: int, transport: str
) -> Mapping[SplitKey, LayerTimes]:
    """The measured times of groups like this, of the first table that has a layer."""
    found: dict[SplitKey, LayerTimes] = {}
    for table in reversed(tables_for(profile)):
        found |= {k: t for k, t in table.splits.items() if k[1:] == (ranks, transport)}
    return found


def advice_for(
    spec: AttentionSpec, profile: DeviceProfile, ranks: int, transport: str = "nccl"
) -> Sequence[SplitAdvice]:
    """What is measured of a layer over this many ranks, or else predicted for typical batches.

    Empty if nothing is measured and the device's memory bandwidth is not known.
    """
    key = split_layer_key(spec)
    times = None
    if key is not None:
        table = split_times_for(profile, ranks, transport)
        times = table.get(SplitKey(key, ranks, transport))
    measured = [] if times is None else [SplitAdvice(p, True) for p in times.points if _is_whole(p)]
    if measured:
        return measured
    predicted = (
        predict(spec, profile, ranks, requests, requests, requests * keys)
        for requests, keys in _TYPICAL
    )
    return [SplitAdvice(point, False) for point in predicted if point is not None]


def tune_command(ranks: int) -> str:
    """How to measure."""
    return (
        f"torchrun --nproc-per-node {ranks} --no-python attn-dispatch tune --context-parallel "
        f"{ranks} ..."
    )


def describe_split(
    spec: AttentionSpec, profile: DeviceProfile, ranks: int, transport: str = "nccl"
) -> list[str]:
    """`advice_for`, in sentences, and how to measure what is not measured."""
    if reason := why_not_split(spec, ranks, sharded_heads=False):
        return [f"The keys cannot be split over {ranks} ranks. {reason}"]
    advice = advice_for(spec, profile, ranks, transport)
    lines = [f"Compared with one rank, {each}." for each in advice]
    if not any(each.is_measured for each in advice):
        lines.append(f"Whether the split pays off is not measured: run {tune_command(ranks)}")
    return lines


def _is_whole(point: Point) -> bool:
    return ONE_RANK in point.times_us and any(name in point.times_us for name in EXCHANGES)


def predict(
    spec: AttentionSpec, profile: DeviceProfile, ranks: int, requests: int, tokens: int, keys: int
) -> Point | None:
    """A decode step by the cost model of docs/distributed.md; None without a memory bandwidth."""
    if not profile.memory_bandwidth:
        return None
    mla, size = spec.mla, spec.dtype.itemsize
    stored = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, profile.arch).itemsize
    row = spec.head_size if mla is not None else spec.head_size + spec.head_size_v
    query = spec.head_size if mla is None else mla.qk_nope_head_dim + mla.qk_rope_head_dim
    output = spec.head_size_v if mla is None else mla.v_head_dim
    one_us = keys * spec.num_kv_heads * row * stored / profile.memory_bandwidth * 1e6
    rows = tokens * spec.num_heads * (ranks - 1) / ranks
    gather_us = _COLLECTIVE_US + rows * query * size / _BYTES_PER_US
    exchange_us = _COLLECTIVE_US + rows * (output * size + 4) / _BYTES_PER_US
    times = {ONE_RANK: one_us, "A2A": one_us / ranks + gather_us + exchange_us}
    step = BatchKind.VERIFY if tokens > requests else BatchKind.DECODE
    return Point(step, requests, tokens, keys, times)
