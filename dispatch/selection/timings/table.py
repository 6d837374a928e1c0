"""A table as data: the times of each backend for a layer, at some points, on one device."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from attn_dispatch.interface.batch import AttentionBatch, BatchTotals
from attn_dispatch.interface.spec import AttentionSpec, MLADims, plain_value
from attn_dispatch.interface.types import AttentionType, Phase

__all__ = [
    "LAYER_FIELDS",
    "MLA_FIELDS",
    "VERSION",
    "Bucket",
    "LayerKey",
    "LayerTimes",
    "Machine",
    "Point",
    "BatchKind",
    "Table",
    "bucket_of",
    "cost_totals",
    "is_ragged",
    "layer_key",
    "mla_of",
    "spec_of",
    "step_of",
    "totals_of",
]

#: Of the file; it increases when an older reader would misunderstand it.
VERSION = 1


class BatchKind(str, Enum):
    """The kinds of batches that are timed separately."""

    PREFILL = "prefill"  # prompts, or chunks of prompts
    RAGGED = "ragged"  # the same, with unequal work
    DECODE = "decode"  # one new token for each request
    VERIFY = "verify"  # decode with several new tokens for a request: drafts are verified
    MIXED = "mixed"  # requests of both phases

    def __str__(self) -> str:
        return str(self.value)


#: BatchKind; and the binary logarithms, rounded up, of the number of requests, of the average new
#: tokens of a request, and of its average keys, see `cost_totals`.
Bucket = tuple[BatchKind, int, int, int]


def bucket_of(step: BatchKind, requests: int, tokens: int, keys: int, *, captured: bool) -> Bucket:
    """The cell of the grid that a batch belongs to.

    Args:
        step: see BatchKind.
        requests: in the batch, 1 or more.
        tokens, keys: of all requests, see `cost_totals`.
        captured: decodes are captured into graphs, whose number of requests is fixed and whose
            keys are not: the keys are left out.
    """
    length = 0
    if not (captured and step in (BatchKind.DECODE, BatchKind.VERIFY)):
        length = _log2_of_average(keys, requests)
    return step, (requests - 1).bit_length(), _log2_of_average(tokens, requests), length


def _log2_of_average(total: int, number: int) -> int:
    return (((total or 1) - 1) // number).bit_length()


#: The mean square of the requests' work over the square of their mean: with more, a batch is
#: ragged. Kernels differ in how they share such work out, so their order differs from equal
#: requests'.
RAGGED_FROM = 1.5


def is_ragged(work: Sequence[int]) -> bool:
    """Whether requests with this work, each, are so unequal that they are timed separately."""
    squares: int = sum(map(operator.mul, work, work))
    return squares * len(work) > RAGGED_FROM * sum(work) ** 2


def step_of(batch: AttentionBatch, phase: Phase) -> BatchKind:
    """The kind of the batch of a phase's requests."""
    if phase is Phase.DECODE:
        totals = batch.totals_by_phase[phase]
        return BatchKind.VERIFY if totals.tokens > totals.requests else BatchKind.DECODE
    return BatchKind.RAGGED if is_ragged(batch.prefill_pairs) else BatchKind.PREFILL


def cost_totals(batch: AttentionBatch, phase: Phase) -> BatchTotals:
    """The totals of a phase's requests, by which the cost of a batch is looked up.

    Decodes read all of their keys once, so the sum of the keys counts, and not the longest request.
    A prefill computes new tokens times their keys: its total keys are those that a new token has
    on average, times the number of requests. So for any lengths, tokens times keys, divided by the
    requests, is the number of pairs, and for equal requests these are the sums.
    """
    totals = batch.totals_by_phase[phase]
    if phase is Phase.DECODE or not totals.tokens:
        return totals
    pairs = sum(batch.prefill_pairs) * totals.requests
    return totals._replace(keys=(pairs + totals.tokens // 2) // totals.tokens)


def totals_of(batch: AttentionBatch) -> tuple[BatchKind, int, int, int] | None:
    """(step, requests, new tokens, keys) of a batch, see `cost_totals`; None without requests."""
    phases = list(batch.totals_by_phase)
    if not phases:
        return None
    if len(phases) > 1:
        return BatchKind.MIXED, *batch.totals
    return step_of(batch, phases[0]), *cost_totals(batch, phases[0])


#: The fields of a request that a table states: those of `bench.cases.Case`.
LAYER_FIELDS = (
    "num_heads",
    "num_kv_heads",
    "head_size",
    "block_size",
    "dtype",
    "kv_cache_dtype",
    "attn_type",
    "sliding_window",
    "logits_soft_cap",
    "alibi",
    "sinks",
    "mla",
)

#: The sizes of multi-head latent attention, in the order of a case and of a table.
MLA_FIELDS = tuple(each.name for each in dataclasses.fields(MLADims))

#: The values of LAYER_FIELDS: dtypes by name, MLADims as a tuple of its fields.
LayerKey = tuple[Any, ...]

#: Fields that decide which backends support a layer, but not which of them is fastest.
_WITHOUT_EFFECT = {
    "cuda_graph": False,
    "kv_sharing": False,
    "kv_cache_layout": None,
    "kv_strides": None,
    "lengths": "exact",
}


def layer_key(spec: AttentionSpec) -> LayerKey | None:
    """The key of a layer in tables; None if no table has such layers.

    That is so if a field outside of LAYER_FIELDS changes the work (masks, a quantized output), if
    the cache is HND or not aligned, which is not measured, and with batch_invariant: a choice by
    the batch's size would make a request's bits depend on the rest of the batch.
    """
    if spec.kv_cache_layout == "HND":
        return None
    if spec.kv_strides is not None and not spec.kv_strides.is_aligned:
        return None
    if AttentionType(spec.attn_type).has_kv_cache and spec.block_size is None:
        return None
    fields = {name: getattr(spec, name) for name in LAYER_FIELDS}
    fields["mla"] = None if spec.mla is None else dataclasses.astuple(spec.mla)
    if spec_of(fields) != spec.replace(**_WITHOUT_EFFECT):
        return None
    plain = {n: value if n == "mla" else plain_value(value) for n, value in fields.items()}
    if plain["kv_cache_dtype"] == plain["dtype"]:
        plain["kv_cache_dtype"] = "auto"
    return tuple(plain.values())


def mla_of(sizes: Sequence[int]) -> MLADims:
    """MLADims from the values of MLA_FIELDS."""
    return MLADims(**dict(zip(MLA_FIELDS, sizes, strict=True)))


def spec_of(fields: Mapping[str, Any]) -> AttentionSpec:
    """The layer with these values of LAYER_FIELDS, dtype a torch.dtype.

    Raises:
        InvalidInputError: they contradict each other.
    """
    sizes = fields["mla"]
    if sizes is None:
        return AttentionSpec(**fields)
    mla = mla_of(sizes)
    return AttentionSpec(**{**fields, "mla": mla, "head_size_v": mla.kv_lora_rank})


@dataclass(frozen=True)
class Point:
    """The times of one batch.

    Attributes:
        step, requests, tokens, keys: as for `bucket_of`.
        times_us: name -> microseconds on the device. A name is a backend's; in a mixed step also
            "PREFILL+DECODE", two backends that each serve their phase.
        host_us: name -> microseconds of host time of the call, where that was measured.
        failed: names that were tried and gave no time, or a wrong result.
    """

    step: BatchKind
    requests: int
    tokens: int
    keys: int
    times_us: Mapping[str, float]
    host_us: Mapping[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[BatchKind, int, int, int]:
        """It differs between the points of a layer."""
        return self.step, self.requests, self.tokens, self.keys

    def describe(self) -> str:
        """The batch in words."""
        plural = "" if self.requests == 1 else "s"
        tokens, keys = (round(total / self.requests) for total in (self.tokens, self.keys))
        new = "" if self.step is BatchKind.DECODE else f"{tokens} new tokens and "
        return f"{self.step} of {self.requests} request{plural} with {new}{keys} keys each"

    def cost_us(self, name: str, default: str, *, captured: bool) -> float:
        """The cost of the batch for an engine: device time, and host time that is not hidden.

        Host time is hidden up to the device time, and up to the host time of the platform's
        default: the host does more than attention, and runs ahead. A replayed graph takes no host
        time.
        """
        device_us = self.times_us[name]
        if captured and self.step in (BatchKind.DECODE, BatchKind.VERIFY):
            return device_us
        hidden = max(device_us, self.host_us.get(default, 0.0))
        return device_us + max(0.0, self.host_us.get(name, 0.0) - hidden)

    def asdict(self) -> dict[str, Any]:
        """The point in the form of the file."""
        data = dataclasses.asdict(self) | {"step": str(self.step), "failed": list(self.failed)}
        return {n: value for n, value in data.items() if value or n not in ("host_us", "failed")}


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """The points of one kind of layer, and their origin. Compared by identity.

    `kernel_provider` has AttentionBackend.kernel_provider of each backend that returned one when
    it was measured.
    """

    points: tuple[Point, ...]
    origin: str
    device: str
    measured: str
    kernel_provider: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What times depend on: the device, its driver, and versions of libraries."""

    device: str
    arch: str
    driver: str | None
    versions: tuple[tuple[str, str], ...]

    def asdict(self) -> dict[str, Any]:
        """The machine in the form of the file."""
        device = {"name": self.device, "arch": self.arch, "driver": self.driver}
        return {"device": device, "versions": dict(self.versions)}


@dataclass(frozen=True, eq=False)
class Table:
    """The content of a file of times.

    Attributes:
        machine: where they were measured.
        measured: when, ISO 8601.
        layers: by LayerKey.
        origin: its name in messages.
    """

    machine: Machine
    measured: str
    layers: Mapping[LayerKey, LayerTimes]
    origin: str

    def asdict(self) -> dict[str, Any]:
        """The table in the form of the file."""
        return {
            "version": VERSION,
            "measured": self.measured,
            **self.machine.asdict(),
            "layers": [
                {
                    "layer": _layer_as_dict(key),
                    **({"kernel_provider": dict(providers)} if providers else {}),
                    "points": [point.asdict() for point in times.points],
                }
                for key, times in self.layers.items()
                for providers in [times.kernel_provider]
            ],
        }


def _layer_as_dict(key: LayerKey) -> dict[str, Any]:
    """A layer in the form of the file, where only latent attention has `mla`."""
    fields = dict(zip(LAYER_FIELDS, key, strict=True))
    mla = fields.pop("mla")
    return fields if mla is None else {**fields, "mla": list(mla)}
