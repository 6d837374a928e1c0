"""How a batch is planned for FlashInfer: its wrappers, their arguments, and what they reject.

A wrapper keeps what it was planned with, so each plan has its own wrapper until it is dropped. The
float workspace is shared by a device's wrappers, because their work runs in order on one stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_dispatch.backends.common import (
    first_visible_keys,
    index_runs,
    start_offsets,
    window_sides,
)
from attn_dispatch.backends.cuda.flashinfer.wrappers import WrapperPool, record_event, workspace
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Reason, ReasonCode
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "FlashInferCall",
    "FlashInferGraph",
    "FlashInferMetadata",
    "kernels_for",
    "rejected_combinations",
]

#: FlashInfer has separate prefill kernels for these.
_HOPPER = DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0))
#: The only head size with sinks: FlashInfer's name for the compiled kernel leaves out the size, so
#: a process that used another size first would run that one's code.
_SINKS_HEAD_SIZE = 64


def _cache_dtype(spec: AttentionSpec) -> torch.dtype:
    return kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)


#: The field, what is asked, what would be accepted, and whether a request asks it.
_REJECTED: tuple[tuple[str, str, str, Callable[[AttentionSpec], bool]], ...] = (
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
        lambda spec: _cache_dtype(spec) != spec.dtype and not is_fp8(_cache_dtype(spec)),
    ),
    (
        "kv_cache_dtype",
        "an fp8 cache with head_size=64",
        "head_size 128 or 256",
        lambda spec: is_fp8(_cache_dtype(spec)) and spec.head_size == 64,
    ),
    (
        "cuda_graph",
        "a CUDA graph over an fp8 cache, which would keep the scales of the capture",
        "a cache of the layer's dtype",
        lambda spec: spec.cuda_graph and is_fp8(_cache_dtype(spec)),
    ),
    (
        "sinks",
        "sinks with another head_size or cache, a soft cap, or the log-sum-exp",
        f"sinks by themselves or with a window, head_size={_SINKS_HEAD_SIZE}, a cache of the "
        "layer's dtype",
        lambda spec: (
            spec.sinks
            and (
                spec.head_size != _SINKS_HEAD_SIZE
                or is_fp8(_cache_dtype(spec))
                or spec.logits_soft_cap is not None
                or spec.returns_lse
            )
        ),
    ),
)


def rejected_combinations(spec: AttentionSpec) -> list[Reason]:
    """What FlashInfer's kernels do not compute, or would drop, though each value is declared."""
    return [
        Reason(code=ReasonCode.COMBINATION, field=field, asked=asked, allowed=allowed)
        for field, asked, allowed, is_asked in _REJECTED
        if is_asked(spec)
    ]


def kernels_for(spec: AttentionSpec, device: DeviceProfile) -> dict[Phase, str]:
    """FlashInfer's name of the kernels for each phase.

    Hopper's own take fp8 keys only with fp8 queries, and do not split long requests.
    """
    suits_hopper = not spec.sinks and not is_fp8(_cache_dtype(spec)) and _HOPPER.matches(device)
    return {Phase.PREFILL: "fa3" if suits_hopper else "fa2", Phase.DECODE: "fa2"}


def _make_wrapper(spec: AttentionSpec, device: torch.device, kernels: str, **graph: Any) -> Any:
    """A wrapper for layers of this spec. It takes the cache in its logical shape, which is NHD.

    Args:
        spec: the layers.
        device: where they run.
        kernels: "fa2" or "fa3". Never "auto": the wrapper would keep its first choice.
        **graph: a CUDA graph's buffers, by FlashInfer's names.
    """
    module = import_library("flashinfer")
    if not spec.sinks:
        return module.BatchPrefillWithPagedKVCacheWrapper(
            workspace(device), "NHD", backend=kernels, **graph
        )
    return module.BatchAttentionWithAttentionSinkWrapper(
        workspace(device),
        "NHD",
        backend=kernels,
        q_data_type=spec.dtype,
        kv_data_type=spec.dtype,
        head_dim_qk=spec.head_size,
        head_dim_vo=spec.head_size,
        window_left=window_sides(spec.causal, spec.sliding_window)[0],
        **graph,
    )


@functools.cache
def _pool(
    device: torch.device, kernels: str, sinks: tuple[torch.dtype, bool] | None
) -> WrapperPool:
    """The wrappers of a device and a set of kernels.

    A wrapper for sinks is made for one dtype, with a window or without.
    """
    return WrapperPool()


@dataclass(frozen=True)
class _Pages:
    """The blocks that a batch reads, in FlashInfer's form.

    Attributes:
        starts: (num_reqs + 1,) int32 on the host, where each request's blocks start in `indices`.
        indices: (starts[-1],) int32 on the device, blocks of the cache.
        last_lens: (num_reqs,) int32 on the host, tokens in each request's last block.
    """

    starts: torch.Tensor
    indices: torch.Tensor
    last_lens: torch.Tensor

    @classmethod
    def of(cls, batch: AttentionBatch, spec: AttentionSpec, device: torch.device) -> _Pages:
        """The pages of a batch.

        Blocks that the window has passed are left out: another request may use them by now. A
        request without keys gets one token of block 0, because the kernels need one; its rows are
        cleared afterwards.
        """
        size, table = spec.block_size, batch.block_table
        assert size is not None  # the backend declares it as required
        assert table is not None  # by the builder
        skipped = [first // size for first in first_visible_keys(batch, spec.sliding_window)]
        pairs = zip(batch.seq_lens_list, skipped, strict=True)
        lens = [max(1, seq_len - blocks * size) for seq_len, blocks in pairs]
        counts = [-(-tokens // size) for tokens in lens]
        requests, columns = index_runs(skipped, counts, device)
        indices = torch.zeros(len(requests), dtype=torch.int32, device=device)
        if table.shape[1]:
            has_keys = (batch.seq_lens > 0)[requests]
            indices = torch.where(has_keys, table[requests, columns], indices).to(torch.int32)
        last_lens = [(tokens - 1) % size + 1 for tokens in lens]
        return cls(
            starts=start_offsets(counts),
            indices=indices,
            last_lens=torch.tensor(last_lens, dtype=torch.int32, device="cpu"),
        )


def _count_rows_without_keys(batch: AttentionBatch, spec: AttentionSpec) -> list[int]:
    """How many of each request's first rows see no key."""
    lens = zip(batch.query_lens, batch.seq_lens_list, strict=True)
    return [
        max(0, query - seq) if spec.causal and seq else query * (seq == 0) for query, seq in lens
    ]


def _mask_rows_without_keys(batch: AttentionBatch, counts: list[int]) -> torch.Tensor:
    """(num_tokens,) bool on the host: whether a row sees no key."""
    pairs = zip(batch.query_lens, counts, strict=True)
    rows = [row < count for query_len, count in pairs for row in range(query_len)]
    return torch.tensor(rows, dtype=torch.bool, device="cpu")


@dataclass(eq=False)
class FlashInferCall:
    """Requests that one wrapper computes.

    Attributes:
        tokens: their rows of query and output.
        wrapper: planned for them; None if no row sees a key.
        has_no_keys: (number of their rows,) bool, the rows that see no key; None if there are none.
    """

    tokens: slice | torch.Tensor
    wrapper: Any = None
    has_no_keys: torch.Tensor | None = None


def _plan(wrapper: Any, spec: AttentionSpec, batch: AttentionBatch, device: torch.device) -> None:
    """Plan a wrapper for a batch, on the host, without waiting for the device."""
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
        causal=spec.causal and batch.max_query_len > 1,  # a single query sees every key
        sm_scale=1.0,  # each layer passes its own as q_scale
        window_left=window_sides(spec.causal, spec.sliding_window)[0],
        logits_soft_cap=spec.logits_soft_cap,
        q_data_type=spec.dtype,
        kv_data_type=_cache_dtype(spec),
    )


class FlashInferGraph:
    """The call that a CUDA graph captured. Each replay plans it again, into the same buffers.

    Args:
        spec: the layers.
        device: where they run.
        batch: one-token requests, over the graph's static buffers.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device, batch: AttentionBatch) -> None:
        self._spec, self._device, self._batch = spec, device, batch
        self._copied: torch.cuda.Event | None = None
        assert batch.block_table is not None  # by the builder
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
        self._has_no_keys = torch.zeros(size, dtype=torch.bool, device=device)
        self.call = FlashInferCall(slice(0, size), wrapper, self._has_no_keys)
        self.plan(batch.seq_lens_list)

    def plan(self, seq_lens: list[int]) -> None:
        """Plan for the requests that are in the static buffers now.

        Args:
            seq_lens: their keys; the requests after them pad the batch, and have none.
        """
        if self._copied is not None:
            self._copied.synchronize()  # of the previous plan, whose memory this one overwrites
        padding = [0] * (self._batch.num_reqs - len(seq_lens))
        lens = torch.tensor(seq_lens + padding, dtype=torch.int32, device="cpu")
        batch = replace(self._batch, seq_lens_cpu=lens)
        rows = _mask_rows_without_keys(batch, _count_rows_without_keys(batch, self._spec))
        self._has_no_keys.copy_(rows, non_blocking=True)
        _plan(self.call.wrapper, self._spec, batch, self._device)
        self._copied = record_event(self._device)


def _planned_call(
    spec: AttentionSpec,
    device: torch.device,
    kernels: str,
    tokens: slice | torch.Tensor,
    batch: AttentionBatch,
) -> FlashInferCall:
    """The call for a batch, planned with its own wrapper."""
    call, counts = FlashInferCall(tokens), _count_rows_without_keys(batch, spec)
    if sum(counts) == batch.num_tokens:
        return call
    if any(counts):
        mask = _mask_rows_without_keys(batch, counts)
        call.has_no_keys = mask.to(device, non_blocking=True)
    sinks = (spec.dtype, spec.sliding_window is not None) if spec.sinks else None
    pool = _pool(device, kernels, sinks)
    call.wrapper = pool.take(lambda: _make_wrapper(spec, device, kernels))
    _plan(call.wrapper, spec, batch, device)
    pool.lend(call.wrapper, call, record_event(device))
    return call


@dataclass
class FlashInferMetadata(BatchMetadata):
    """The batch, and the calls that compute it.

    Attributes:
        kernels: FlashInfer's name of the kernels for each phase.
        graph: the only call of a batch that a CUDA graph captures, else None.
    """

    kernels: Mapping[Phase, str]
    graph: FlashInferGraph | None = None

    @functools.cached_property
    def calls(self) -> list[FlashInferCall]:
        """One for each phase. Planned when a layer first needs it, which a replay never does."""
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
            for phase, part in self.batch.parts.items()
        ]
