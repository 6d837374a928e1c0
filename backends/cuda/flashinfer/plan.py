"""How a batch is planned for FlashInfer: its wrappers, what they are given, and what they refuse.

A wrapper keeps what it was planned with, so each plan has a wrapper of its own until it is dropped.
The float workspace is one per device: what runs on a device follows each other on one stream.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_dispatch.backends.cuda.torch_varlen import LARGEST_WINDOW, first_visible_keys, spread
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Reason, ReasonCode
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "FlashInferCall",
    "FlashInferGraph",
    "FlashInferMetadata",
    "kernels_for",
    "refused_combinations",
]

#: Twice what FlashInfer's documentation recommends.
_WORKSPACE_BYTES = 256 << 20
#: For whose prefills FlashInfer has kernels of their own.
_HOPPER = DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0))
#: The one head size with sinks: FlashInfer names what it compiles for them without the size, so
#: that a process which had another size would go on with the first one's code.
_SINKS_HEAD_SIZE = 64


def _stored(spec: AttentionSpec) -> torch.dtype:
    """The dtype of the cache."""
    return kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)


#: The field, what is asked, what would be accepted, and whether a request asks it.
_REFUSED: tuple[tuple[str, str, str, Callable[[AttentionSpec], bool]], ...] = (
    (
        "sliding_window",
        "a window that looks both ways",
        "a window with causal=True",
        lambda spec: spec.sliding_window is not None and not spec.causal,
    ),
    (
        "kv_cache_dtype",
        "a cache of another 16-bit type than dtype",
        "auto, or an fp8 type",
        lambda spec: _stored(spec) != spec.dtype and not is_fp8(_stored(spec)),
    ),
    (
        "kv_cache_dtype",
        "an fp8 cache with head_size=64",
        "head_size 128 or 256",
        lambda spec: is_fp8(_stored(spec)) and spec.head_size == 64,
    ),
    (
        "cuda_graph",
        "a CUDA graph over an fp8 cache, whose scales would be those of the capture for good",
        "a cache of the layer's dtype",
        lambda spec: spec.cuda_graph and is_fp8(_stored(spec)),
    ),
    (
        "sinks",
        "sinks with another head_size or cache, a soft cap, or the log-sum-exp",
        f"sinks alone or with a window, head_size={_SINKS_HEAD_SIZE}, a cache of the layer's dtype",
        lambda spec: (
            spec.sinks
            and (
                spec.head_size != _SINKS_HEAD_SIZE
                or is_fp8(_stored(spec))
                or spec.logits_soft_cap is not None
                or spec.returns_lse
            )
        ),
    ),
)


def refused_combinations(spec: AttentionSpec) -> list[Reason]:
    """What FlashInfer's kernels do not compute, or would drop, though each value is fine."""
    return [
        Reason(code=ReasonCode.COMBINATION, field=field, asked=asked, allowed=allowed)
        for field, asked, allowed, is_asked in _REFUSED
        if is_asked(spec)
    ]


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Where FlashInfer keeps the parts of split requests, for every wrapper of a device."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def kernels_for(spec: AttentionSpec, device: DeviceProfile) -> dict[Phase, str]:
    """FlashInfer's name of the kernels for each phase.

    Hopper's own take fp8 keys with fp8 queries alone, and do not split long requests.
    """
    suits_hopper = not spec.sinks and not is_fp8(_stored(spec)) and _HOPPER.admits(device)
    return {Phase.PREFILL: "fa3" if suits_hopper else "fa2", Phase.DECODE: "fa2"}


def _window_left(spec: AttentionSpec) -> int:
    """How many keys are seen before the query's own place, −1 for all."""
    window = spec.sliding_window
    return -1 if window is None else min(window - 1, LARGEST_WINDOW)


def _make_wrapper(spec: AttentionSpec, device: torch.device, kernels: str, **graph: Any) -> Any:
    """A wrapper for layers like `spec`.

    It takes the cache in its logical shape, which is NHD, and reads the strides.

    Args:
        spec: the layers.
        device: where they run.
        kernels: FlashInfer's name for them, "fa2" or "fa3". It is always given: what "auto" once
            chose would stay with the wrapper.
        **graph: a CUDA graph's buffers, by FlashInfer's names.
    """
    module = import_library("flashinfer")
    if not spec.sinks:
        return module.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(device), "NHD", backend=kernels, **graph
        )
    return module.BatchAttentionWithAttentionSinkWrapper(
        _workspace(device),
        "NHD",
        backend=kernels,
        q_data_type=spec.dtype,
        kv_data_type=spec.dtype,
        head_dim_qk=spec.head_size,
        head_dim_vo=spec.head_size,
        window_left=_window_left(spec),
        **graph,
    )


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event that comes once the device has done all that it was given."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Pool:
    """Wrappers of one kind, each lent to one plan at a time.

    A wrapper copies a plan to the device out of memory that its next plan writes. So one that came
    back is lent again only once that copy is done.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._free: deque[tuple[Any, torch.cuda.Event | None]] = deque()

    def take(self, make: Callable[[], Any]) -> Any:
        """A wrapper that nobody has; made if there is none."""
        with self._lock:
            for _ in range(len(self._free)):
                wrapper, copied = self._free.popleft()
                if copied is None or copied.query():
                    return wrapper
                self._free.append((wrapper, copied))
        return make()

    def lend(self, wrapper: Any, borrower: object, copied: torch.cuda.Event | None) -> None:
        """Have the wrapper back once the borrower is gone."""
        weakref.finalize(borrower, self._free.append, (wrapper, copied)).atexit = False


@functools.cache
def _pool(device: torch.device, kernels: str, sinks: tuple[torch.dtype, bool] | None) -> _Pool:
    """The wrappers of a device and a set of kernels.

    What a wrapper for sinks computes is settled when it is made: a dtype, with a window or without.
    """
    return _Pool()


def _host_int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


@dataclass(frozen=True)
class _Pages:
    """The blocks that a batch reads, as FlashInfer takes them.

    Attributes:
        starts: (num_reqs + 1,) int32 on the host, where each request's begin in `indices`.
        indices: (starts[-1],) int32 on the device, blocks of the cache.
        last_lens: (num_reqs,) int32 on the host, tokens in each request's last block.
    """

    starts: torch.Tensor
    indices: torch.Tensor
    last_lens: torch.Tensor

    @classmethod
    def of(cls, batch: AttentionBatch, spec: AttentionSpec, device: torch.device) -> _Pages:
        """Of a batch.

        Blocks that the window has passed are left out: they may be another's, and hold anything.
        A request without keys is given one token of block 0, so that kernels always find one;
        its rows are blind, and cleared.
        """
        size, table = spec.block_size, batch.block_table
        assert size is not None  # it is declared so
        assert table is not None  # and the builder saw to this
        passed = [first // size for first in first_visible_keys(batch, spec.sliding_window)]
        pairs = zip(batch.seq_lens_list, passed, strict=True)
        lens = [max(1, seq_len - blocks * size) for seq_len, blocks in pairs]
        counts = [-(-tokens // size) for tokens in lens]
        requests, columns = spread(passed, counts, device)
        indices = torch.zeros(len(requests), dtype=torch.int32, device=device)
        if table.shape[1]:
            has_keys = (batch.seq_lens > 0)[requests]
            indices = torch.where(has_keys, table[requests, columns], indices).to(torch.int32)
        return cls(
            starts=_host_int32([0, *itertools.accumulate(counts)]),
            indices=indices,
            last_lens=_host_int32([(tokens - 1) % size + 1 for tokens in lens]),
        )


def _num_blind(batch: AttentionBatch, spec: AttentionSpec) -> list[int]:
    """How many of each request's first tokens see no key."""
    lens = zip(batch.query_lens, batch.seq_lens_list, strict=True)
    return [
        max(0, query - seq) if spec.causal and seq else query * (seq == 0) for query, seq in lens
    ]


def _blind_rows(batch: AttentionBatch, counts: list[int]) -> torch.Tensor:
    """(num_tokens,) bool on the host: whether a token sees no key."""
    pairs = zip(batch.query_lens, counts, strict=True)
    rows = [row < blind for query_len, blind in pairs for row in range(query_len)]
    return torch.tensor(rows, dtype=torch.bool, device="cpu")


@dataclass(eq=False)
class FlashInferCall:
    """Requests that one wrapper computes.

    Attributes:
        tokens: which rows of query and output are theirs.
        wrapper: planned for them; None if no token sees a key.
        blind: (their tokens,) bool, those that see no key; None if there are none.
    """

    tokens: slice | torch.Tensor
    wrapper: Any = None
    blind: torch.Tensor | None = None


def _plan(wrapper: Any, spec: AttentionSpec, batch: AttentionBatch, device: torch.device) -> None:
    """Plan a wrapper for a batch: on the host, while the device goes on."""
    pages = _Pages.of(batch, spec, device)
    wrapper.plan(
        qo_indptr=batch.query_start_loc_cpu.to(torch.int32),
        paged_kv_indptr=pages.starts,
        paged_kv_indices=pages.indices,
        paged_kv_last_page_len=pages.last_lens,
        num_qo_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim_qk=spec.head_size,
        page_size=spec.block_size,
        causal=spec.causal and batch.max_query_len > 1,  # one query sees all keys that there are
        sm_scale=1.0,  # each layer multiplies its own to it
        window_left=_window_left(spec),
        logits_soft_cap=spec.logits_soft_cap,
        q_data_type=spec.dtype,
        kv_data_type=_stored(spec),
    )


class FlashInferGraph:
    """The call that a CUDA graph captured: planned anew, into the same buffers, for each replay.

    Args:
        spec: the layers.
        device: where they run.
        batch: one-token requests, over the graph's static buffers.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device, batch: AttentionBatch) -> None:
        self._spec, self._device, self._batch = spec, device, batch
        self._copied: torch.cuda.Event | None = None
        assert batch.block_table is not None  # the builder saw to it
        size, columns = batch.block_table.shape
        buffer = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        wrapper = _make_wrapper(
            spec,
            device,
            "fa2",
            use_cuda_graph=True,
            qo_indptr_buf=buffer(size + 1),
            paged_kv_indptr_buf=buffer(size + 1),
            paged_kv_indices_buf=buffer(size * max(1, columns)),
            paged_kv_last_page_len_buf=buffer(size),
        )
        self._blind = torch.zeros(size, dtype=torch.bool, device=device)
        self.call = FlashInferCall(slice(0, size), wrapper, self._blind)
        self.plan(batch.seq_lens_list)

    def plan(self, seq_lens: list[int]) -> None:
        """Plan for the requests that are in the static buffers now.

        Args:
            seq_lens: their keys; the requests behind them pad the batch, and have none.
        """
        if self._copied is not None:
            self._copied.synchronize()  # of the plan before, whose memory this one writes
        padding = [0] * (self._batch.num_reqs - len(seq_lens))
        batch = replace(self._batch, seq_lens_cpu=_host_int32(seq_lens + padding))
        rows = _blind_rows(batch, _num_blind(batch, self._spec))
        self._blind.copy_(rows, non_blocking=True)
        _plan(self.call.wrapper, self._spec, batch, self._device)
        self._copied = _mark(self._device)


def _planned_call(
    spec: AttentionSpec,
    device: torch.device,
    kernels: str,
    tokens: slice | torch.Tensor,
    batch: AttentionBatch,
) -> FlashInferCall:
    """The call for a batch, planned with a wrapper that it has to itself."""
    call, blind = FlashInferCall(tokens), _num_blind(batch, spec)
    if sum(blind) == batch.num_tokens:
        return call
    if any(blind):
        call.blind = _blind_rows(batch, blind).to(device, non_blocking=True)
    sinks = (spec.dtype, spec.sliding_window is not None) if spec.sinks else None
    pool = _pool(device, kernels, sinks)
    call.wrapper = pool.take(lambda: _make_wrapper(spec, device, kernels))
    _plan(call.wrapper, spec, batch, device)
    pool.lend(call.wrapper, call, _mark(device))
    return call


@dataclass
class FlashInferMetadata(BatchMetadata):
    """The batch, and the calls that compute it.

    Attributes:
        kernels: FlashInfer's name of those for each phase.
        graph: the one call of a batch that a CUDA graph captures, else None.
    """

    kernels: Mapping[Phase, str]
    graph: FlashInferGraph | None = None

    @functools.cached_property
    def calls(self) -> list[FlashInferCall]:
        """One for each phase. Planned when a layer first asks: a graph's replay never does."""
        if self.graph is not None:
            return [self.graph.call]
        batch, whole = self.batch, slice(0, self.batch.num_tokens)
        return [
            _planned_call(
                self.builder.spec,
                self.builder.device,
                self.kernels[phase],
                whole if part.batch is batch else part.tokens,
                part.batch,
            )
            for phase, part in batch.parts.items()
        ]
