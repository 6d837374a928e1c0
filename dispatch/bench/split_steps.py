"""Steps whose keys are split over ranks, and the same on one rank: checked, then timed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.bench.accuracy import AccuracyJudge
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import LAYER
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.timing import Clock, CudaClock, Timing, measure
from attn_dispatch.distributed.advice import EXCHANGES, ONE_RANK
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.context_parallel import ContextParallel
from attn_dispatch.errors import BackendFailure, InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_shards import local_length
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention

__all__ = ["RankTimes", "SplitStep", "aligned_clock", "measure_on_ranks", "pace_us"]


class SplitStep:
    """A step of a layer on one rank, and the same step split over a group.

    Every rank makes the same inputs, so that each can check the result of all heads.

    Args:
        case: without `kv_layout`, and with a cache that is not quantized.
        device: of this rank.
        ranks: the group.
        exchanges: names of EXCHANGES.

    Raises:
        InvalidInputError: the case has another cache.
        UnsupportedError: the layer cannot be split.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        ranks: Ranks,
        exchanges: Sequence[str] = tuple(EXCHANGES),
    ) -> None:
        if case.is_quantized or case.kv_layout is not None or not case.has_kv_cache:
            raise InvalidInputError(
                f"{case.name} is not split: steps over a cache of this library in the layer's own "
                "dtype are."
            )
        self.case, self._ranks = case, ranks
        self.inputs = inputs = Inputs(case, device)
        self._judge = AccuracyJudge(inputs)
        batch = _batch_of(inputs, inputs.block_table, case.block_size)
        #: Name -> a call that returns the output of this rank's heads.
        self.calls = {ONE_RANK: self._call_of(None, batch, inputs.kv_cache)}
        table, cache = _local_cache(inputs, ranks)
        local = _batch_of(inputs, table, case.block_size * ranks.size)
        for name in exchanges:
            # Only the cache has the keys, so that none are gathered.
            split = ContextParallel(ranks.group, combine=EXCHANGES[name], prefill="merge")
            self.calls[name] = self._call_of(split, local, cache)

    def _call_of(
        self, split: ContextParallel | None, batch: AttentionBatch, cache: KVCache
    ) -> Callable[[], torch.Tensor]:
        inputs, case, ranks = self.inputs, self.case, self._ranks
        layer = _layer_of(inputs, split)
        own = slice(None)
        if split is not None:
            own = slice(*(n * case.num_heads // ranks.size for n in (ranks.rank, ranks.rank + 1)))
        latent = inputs.latent
        if latent is None:
            given: tuple[Any, ...] = (inputs.query[:, own].contiguous(), None, None)
        else:
            given = (latent.query[:, own].contiguous(), latent.kv_c, latent.k_pe)
        metadata = layer.build_metadata(batch)

        def call() -> torch.Tensor:
            with torch.inference_mode():
                result = layer(*given, kv_cache=cache, attn_metadata=metadata)
            assert isinstance(result, torch.Tensor)
            return result

        return call

    def check(self) -> Mapping[str, float]:
        """The error of each call, for all heads; see AccuracyJudge.

        Raises:
            BackendFailure: one is larger than is allowed.
        """
        variant, found = "" if self.case.mla is None else LAYER, {}
        for name, call in self.calls.items():
            out = call()
            out = out if name == ONE_RANK else self._ranks.gather_heads(out)
            found[name] = self._judge.error_of(out, variant)
        allowed = self._judge.allowed_for(variant)
        wrong = [name for name, error in found.items() if not error <= allowed]
        verdicts = self._ranks.gather_objects(wrong)
        if any(verdicts):
            raise BackendFailure(
                f"{self.case.name} is wrong on ranks: {verdicts}. Errors on rank "
                f"{self._ranks.rank}: {found}; {allowed:.2g} is allowed."
            )
        return found


def _layer_of(inputs: Inputs, split: ContextParallel | None) -> Attention:
    case, spec = inputs.case, inputs.spec
    fields: dict[str, Any] = {
        "scale": case.scale,
        "dtype": spec.dtype,
        "device": inputs.device,
        "block_size": case.block_size,
        "sliding_window": case.sliding_window,
        "logits_soft_cap": case.logits_soft_cap,
        "prefix": case.name,
        "context_parallel": split,
    }
    if inputs.latent is not None:
        assert spec.mla is not None
        return MLAAttention(case.num_heads, spec.mla, inputs.latent.kv_b_proj, **fields)
    return Attention(
        case.num_heads,
        case.head_size,
        num_kv_heads=case.num_kv_heads,
        alibi_slopes=inputs.slopes,
        sinks=inputs.sinks,
        **fields,
    )


def _batch_of(inputs: Inputs, table: torch.Tensor | None, block_size: int) -> AttentionBatch:
    case = inputs.case
    slots = None
    if case.mla is not None:  # its call has latents, which the cache has already
        slots = torch.full((case.num_tokens,), -1, device="cpu")
    return AttentionBatch.create(
        case.query_lens,
        case.seq_lens,
        block_table=table,
        block_size=block_size,
        slot_mapping=slots,
        max_decode_query_len=max(case.query_lens) if case.kind == "decode" else 1,
        device=inputs.device,
    )


def _local_cache(inputs: Inputs, ranks: Ranks) -> tuple[torch.Tensor, KVCache]:
    """The block table of all ranks, and this rank's part of the cache."""
    case, whole, whole_table = inputs.case, inputs.kv_cache, inputs.block_table
    size, device = case.block_size, inputs.device
    columns = [-(-length // (size * ranks.size)) for length in case.seq_lens]
    order = torch.randperm(
        sum(columns), generator=torch.Generator("cpu").manual_seed(1), device="cpu"
    )
    table = torch.nn.utils.rnn.pad_sequence(list(order.int().split(columns)), batch_first=True)
    table = table.to(device)
    cache = torch.zeros((sum(columns), *whole.shape[1:]), dtype=whole.dtype, device=device)
    for request, length in enumerate(case.seq_lens):
        local = torch.arange(local_length(length, ranks.rank, ranks.size), device=device)
        positions = local * ranks.size + ranks.rank
        blocks = whole_table[request, positions // size].long()
        targets = table[request, local // size].long()
        if case.mla is None:
            cache[targets, :, local % size] = whole[blocks, :, positions % size]
        else:
            cache[targets, local % size] = whole[blocks, positions % size]
    return table, cache


def aligned_clock(device: torch.device, ranks: Ranks) -> Clock:
    """A clock that starts at the same time on all ranks.

    On GPUs a small all-reduce comes before the timed call, behind the time for which the devices
    wait for their hosts; so that no rank's time contains a wait for a host of another.
    """
    if device.type != "cuda":
        return _BarrierClock(ranks)
    token = torch.zeros(1, device=device)
    return CudaClock(device, align=lambda: ranks.all_reduce(token))


class _BarrierClock(Clock):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks, self._token = ranks, torch.zeros(1, device="cpu")

    def time_us(self, call: Callable[[], object], host_us: float = 0.0) -> float:
        """See Clock."""
        self._ranks.all_reduce(self._token)
        return super().time_us(call, host_us)


@dataclass(frozen=True)
class RankTimes:
    """A call that all ranks make together: its time on the slowest device, and on the slowest host.

    Attributes:
        timing: of the devices, which begin together.
        host_us: for how long the call keeps a host.
    """

    timing: Timing
    host_us: float


def measure_on_ranks(
    calls: Mapping[str, Callable[[], object]], clock: Clock, ranks: Ranks, rounds: int
) -> dict[str, RankTimes]:
    """Time calls that all ranks make together; each number is that of the slowest rank.

    Every rank makes the same number of calls, whatever they take.

    Raises:
        Exception: what a call raised.
    """
    host_us = {name: _host_us(call, clock) for name, call in calls.items()}
    results = measure(calls, clock, budget_s=0.0, rounds=rounds, host_us=host_us)
    found = {}
    for name, result in results.items():
        if isinstance(result, Exception):
            raise result
        gathered = ranks.gather_objects((dataclasses.astuple(result), host_us[name]))
        timings = [Timing(*values) for values, _ in gathered]
        slowest = max(timings, key=lambda timing: timing.median_us)
        found[name] = RankTimes(slowest, max(host for _, host in gathered))
    return found


def _host_us(call: Callable[[], object], clock: Clock, calls: int = 10) -> float:
    """How long a call keeps the host: the median, with an idle device before the first."""
    call()
    clock.wait()
    samples = []
    for _ in range(calls):
        start = clock.now()
        call()
        samples.append((clock.now() - start) * 1e6)
    return statistics.median(samples)


def pace_us(call: Callable[[], object], clock: Clock, ranks: Ranks, steps: int) -> float:
    """Microseconds a call, if calls follow one another without a wait: device or host decides."""
    call()
    clock.wait()
    ranks.gather_objects(None)
    start = clock.now()
    for _ in range(steps):
        call()
    clock.wait()
    return float(max(ranks.gather_objects((clock.now() - start) / steps * 1e6)))
