"""FLASH_ATTN: FlashAttention 2, 3 and 4, whichever package brings the one that fits.

Which package that is says `flash_attn_providers.py`. The builder takes a batch apart into calls:
decodes, prompts, and long prompts alone where that is faster, and the layers make them. What stands
in the cache and belongs to nobody is kept from the kernels, which multiply what they do not see by
zero: blocks that a sliding window has passed are cut out of the block table, and rows end where a
request ends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.flash_attn_calls import (
    FlashCall,
    Functions,
    Work,
    aligned,
    check_cache,
    gather,
    schedule_of,
    sides,
    sums,
)
from attn_dispatch.backends.cuda.flash_attn_providers import (
    Provider,
    declared_fields,
    pick_provider,
    require_provider,
)
from attn_dispatch.backends.triton_arguments import on_its_device, suits_tma
from attn_dispatch.backends.triton_attn import TritonImpl
from attn_dispatch.backends.triton_plan import MAX_GATHERED_BYTES
from attn_dispatch.batch import AttentionBatch, BatchMetadata
from attn_dispatch.capability import Capabilities, Reason
from attn_dispatch.device import DeviceMatch, DeviceProfile, detect_device
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    Phase,
)
from attn_dispatch.kv_cache import split_kv_cache
from attn_dispatch.spec import AttentionSpec
from attn_dispatch.validation import check_forward, check_int32, check_metadata

__all__ = [
    "FlashAttnBackend",
    "FlashAttnBuilder",
    "FlashAttnImpl",
    "FlashAttnMetadata",
]

#: From so many query tokens on, a request is called for alone, over rows. On an H200 those were
#: faster than pages of 16: 229 to 249 µs at 4k tokens, and 754 to 783 for 2k over 16k keys, the
#: copying included (benchmarks/RESULTS.md).
_ALONE_FROM = 2048
#: Batches that would take more calls than this, because their phases alternate, take one.
_MOST_CALLS = 8


@dataclass
class FlashAttnMetadata(BatchMetadata):
    """The batch, and the calls that compute it.

    Attributes:
        provider: whose functions are called.
        functions: these functions.
        calls: in any order.
    """

    provider: Provider
    functions: Functions
    calls: list[FlashCall]

    @functools.cached_property
    def without_pages(self) -> FlashAttnMetadata:
        """The same for a call that brings no cache, whose keys are the rows that it brings."""
        batch = dataclasses.replace(self.batch, block_table=None)
        metadata: FlashAttnMetadata = self.builder.build(batch)
        return metadata


class FlashAttnBuilder(AttentionMetadataBuilder[FlashAttnMetadata]):
    """Picks the provider, and takes batches apart into calls.

    Raises:
        UnsupportedError: no provider that is installed here can serve the layers.
        BackendFailure: the provider cannot be imported.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.provider = require_provider(spec, detect_device(device))
        self.functions = self.provider.load()

    def build(self, batch: AttentionBatch) -> FlashAttnMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        check_int32(batch)
        if self.spec.block_size is None and batch.block_table is not None:
            batch = dataclasses.replace(batch, block_table=None)
        metadata: FlashAttnMetadata = FlashAttnMetadata.of(
            batch, self, provider=self.provider, functions=self.functions, calls=[]
        )
        metadata.calls += [self._call(batch, *run) for run in self._runs(batch)]
        return metadata

    def _runs(self, batch: AttentionBatch) -> Iterator[tuple[int, int, bool]]:
        """(first request, the one after the last, whether to copy its pages into rows)."""
        labels = self._labels(batch)
        runs = [len(list(run)) for _, run in itertools.groupby(labels)]
        if len(runs) > _MOST_CALLS and batch.block_table is not None:
            labels, runs = [None] * len(labels), [len(labels)]
        first = 0
        for length in runs:
            end = first + length
            if batch.query_starts[first] < batch.query_starts[end]:
                yield first, end, isinstance(labels[first], int)
            first = end

    def _labels(self, batch: AttentionBatch) -> list[object]:
        """What sets neighbours apart: a number is a request's own, to be called for alone."""
        if batch.block_table is None:
            is_apart = self.provider.reads_past_rows
            return [i if is_apart else None for i in range(batch.num_reqs)]
        few = batch.max_decode_query_len
        return [
            i
            if self._pays_alone(query_len, seq_len)
            else (Phase.DECODE if query_len <= few else Phase.PREFILL)
            for i, (query_len, seq_len) in enumerate(
                zip(batch.query_lens, batch.host_seq_lens, strict=True)
            )
        ]

    def _pays_alone(self, query_len: int, seq_len: int) -> bool:
        spec = self.spec
        row_bytes = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
        fits = seq_len * row_bytes <= MAX_GATHERED_BYTES
        return self.provider.gathers and query_len >= _ALONE_FROM and fits

    def _call(self, batch: AttentionBatch, first: int, end: int, alone: bool) -> FlashCall:
        spec, table = self.spec, batch.block_table
        query_lens, seq_lens = batch.query_lens[first:end], batch.host_seq_lens[first:end]
        # A graph is captured for lengths up to the batch's limit.
        longest = batch.max_seq_len if spec.cuda_graph else max(seq_lens)
        starts, rows = batch.query_start_loc[first : end + 1], self._rows(batch, first, end)
        columns = None
        if table is not None:
            table = table[first:end, : max(1, -(-longest // (spec.block_size or 1)))]
            columns = torch.arange(table.shape[1], device=table.device)
        call = FlashCall(
            tokens=slice(batch.query_starts[first], batch.query_starts[end]),
            keys=rows,
            gathered=self._gathered(batch, first) if alone and table is not None else None,
            query_starts=starts - batch.query_starts[first] if first else starts,
            seq_lens=batch.seq_lens[first:end],
            block_table=table,
            columns=columns,
            row_starts=None if rows is None else sums(batch.seq_lens[first:end]),
            max_query_len=max(query_lens),
            # FlashAttention 2 takes a window that is longer than this for one without an end,
            # which it is not for a query that stands before the first key.
            max_seq_len=max(longest, *query_lens),
            is_uniform=set(query_lens) == {1},
            is_blind=longest == 0,
        )
        if table is not None and not spec.cuda_graph and not call.is_blind:
            call.pages = call.live_pages(spec)
            schedule = self.functions.get("get_scheduler_metadata")
            if schedule is not None and call.keys is None and call.gathered is None:
                call.schedule = schedule_of(schedule, spec, call, call.pages)
        return call

    def _rows(self, batch: AttentionBatch, first: int, end: int) -> slice | None:
        """The rows of key and value that are these requests', if they may be read there."""
        rows = slice(batch.key_starts[first], batch.key_starts[end])
        if batch.block_table is None:
            return rows
        lengths = [e - s for s, e in itertools.pairwise(batch.key_starts[first : end + 1])]
        is_fresh = lengths == batch.host_seq_lens[first:end] and not self.spec.kv_sharing
        is_safe = end - first == 1 or not self.provider.reads_past_rows
        # A graph of decodes may have been captured for requests that happen to have no past.
        return rows if is_fresh and is_safe and batch.max_query_len > 1 else None

    def _gathered(self, batch: AttentionBatch, request: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold what a request sees, and how many keys from there on."""
        spec = self.spec
        assert batch.block_table is not None
        assert spec.block_size is not None
        seq_len, passed = batch.host_seq_lens[request], 0
        if spec.sliding_window is not None:
            before = seq_len - batch.query_lens[request] + 1 - spec.sliding_window
            passed = max(0, before) // spec.block_size
        blocks = batch.block_table[request, passed : -(-seq_len // spec.block_size)]
        return blocks, seq_len - passed * spec.block_size


class FlashAttnImpl(AttentionImpl[FlashAttnMetadata]):
    """Writes the cache by the project's own kernel, and calls the provider of the metadata.

    Sinks are rounded to bfloat16, the dtype of the layers that may have them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer = TritonImpl(*args, **kwargs)
        self._slopes: torch.Tensor | None = None

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        if kv_cache.is_cuda:
            self._writer.write_kv(layer, key, value, kv_cache, batch)
        else:
            super().write_kv(layer, key, value, kv_cache, batch)

    @on_its_device
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: FlashAttnMetadata,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        check_metadata(self, attn_metadata, FlashAttnMetadata)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("FLASH_ATTN does not quantize its output; TRITON_ATTN does.")
        check_forward(self, query, key, value, kv_cache, attn_metadata.batch, output)
        if kv_cache is None:
            if attn_metadata.batch.block_table is not None:
                attn_metadata = attn_metadata.without_pages
        else:
            check_cache(kv_cache, attn_metadata.builder.spec)
            if key is not None and value is not None:
                self.write_kv(layer, key, value, kv_cache, attn_metadata.batch)
        if self.scale <= 0:  # the kernels take the largest product for the largest score
            query = -query if self.scale else torch.zeros_like(query)
        query = aligned(query)
        shape = (query.shape[0], self.num_heads, self.head_size_v)
        out = output
        if out is None or not suits_tma(out):
            out = query.new_empty(shape)
        lse = None
        if self.returns_lse:
            lse = query.new_full(shape[:2], float("-inf"), dtype=torch.float32)
        for call in attn_metadata.calls:
            self._make(call, attn_metadata, query, key, value, kv_cache, out, lse)
        if output is not None and output is not out:
            out = output.copy_(out)
        return out if lse is None else (out, lse)

    def _make(
        self,
        call: FlashCall,
        metadata: FlashAttnMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Make one call, and put its results into their rows."""
        out = out[call.tokens]
        if call.is_blind:
            out.zero_()
            return
        work = Work(
            query=query[call.tokens],
            **self._source(call, metadata, key, value, kv_cache),
            out=out,
            query_starts=call.query_starts,
            max_query_len=call.max_query_len,
            max_seq_len=call.max_seq_len,
            is_uniform=call.is_uniform,
            scale=abs(self.scale) or 1.0,
            causal=self.causal,
            window=sides(self.causal, self.sliding_window),
            soft_cap=self.logits_soft_cap or 0.0,
            slopes=self._slopes_on(query.device),
            sinks=self._sinks_on(query.device),
            returns_lse=self.returns_lse,
        )
        result, found = metadata.provider.call(metadata.functions, work)
        if result.data_ptr() != out.data_ptr():
            out.copy_(result)
        if lse is not None:
            assert found is not None
            # A row without keys has +inf from some of them.
            lse[call.tokens] = found.T.masked_fill(found.T.isposinf(), float("-inf"))

    def _source(
        self,
        call: FlashCall,
        metadata: FlashAttnMetadata,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Where keys are, as Work says it: in rows as they came, in rows once copied, in pages."""
        if call.keys is not None and key is not None and value is not None:
            keys, values = (aligned(new[call.keys]) for new in (key, value))
            return {
                "keys": keys,
                "values": values,
                "seq_lens": call.seq_lens,
                "key_starts": call.row_starts,
            }
        assert kv_cache is not None  # check_forward saw to it
        keys, values = split_kv_cache(kv_cache, self.head_size, self.head_size_v)
        pages = call.pages or call.live_pages(metadata.builder.spec)
        lengths = {"seq_lens": pages.seq_lens, "key_starts": pages.key_starts}
        if call.gathered is not None:
            keys, values = (gather(cache, *call.gathered) for cache in (keys, values))
            return {"keys": keys, "values": values, **lengths}
        table = {"block_table": pages.block_table, "schedule": call.schedule}
        return {"keys": keys, "values": values, **lengths, **table}

    def _slopes_on(self, device: torch.device) -> torch.Tensor | None:
        if self.alibi_slopes is None:
            return None
        if self._slopes is None or self._slopes.device != device:
            self._slopes = torch.as_tensor(
                self.alibi_slopes, dtype=torch.float32, device=device
            ).contiguous()
        return self._slopes

    def _sinks_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.sinks is None else self.sinks.to(device, torch.bfloat16).contiguous()


class FlashAttnBackend(AttentionBackend):
    """FlashAttention 2, 3 and 4: flash-attn's own packages, vLLM's build and SGLang's."""

    interface_version = 1
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(8, 0)),),
        requires=("triton>=3.6",),  # whose kernel writes the cache without waiting for the device
        **declared_fields(),
    )

    @staticmethod
    def get_name() -> str:
        """FLASH_ATTN."""
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type[FlashAttnImpl]:
        """FlashAttnImpl."""
        return FlashAttnImpl

    @staticmethod
    def get_metadata_cls() -> type[FlashAttnMetadata]:
        """FlashAttnMetadata."""
        return FlashAttnMetadata

    @staticmethod
    def get_builder_cls() -> type[FlashAttnBuilder]:
        """FlashAttnBuilder."""
        return FlashAttnBuilder

    @classmethod
    def served_by(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """The provider."""
        picked = pick_provider(spec, device)
        return picked.name if isinstance(picked, Provider) else ""

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Each provider has its limits: one that is installed here must serve the whole request."""
        picked = pick_provider(spec, device)
        return [] if isinstance(picked, Provider) else picked
