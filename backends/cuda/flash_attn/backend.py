"""FLASH_ATTN: FlashAttention 2, 3 and 4, whichever package brings the one that fits.

Which package that is says `flash_attn_providers.py`. The builder takes a batch apart into calls:
decodes, prompts, and long prompts alone where that is faster, and the layers make them. What stands
in the cache and belongs to nobody is kept from the kernels, which multiply what they do not see by
zero: blocks that a sliding window has passed are cut out of the block table, and rows of keys are
given so that none is loaded with another request's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.flash_attn.calls import (
    PAGES_OF_ONE,
    FlashCall,
    Operands,
    aligned,
    check_block_size,
    check_strides,
    gather,
    is_aligned,
    part,
)
from attn_dispatch.backends.cuda.flash_attn.providers import (
    Provider,
    declared_fields,
    pick_provider,
    require_provider,
)
from attn_dispatch.backends.triton.backend import TritonImpl
from attn_dispatch.backends.triton.plan import MAX_GATHERED_BYTES
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, Reason
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.interface.validation import (
    check_forward,
    check_int32,
    check_metadata,
    profiling_output,
)
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

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
#: Batches that would take more calls than this beside the long prompts', because their phases
#: alternate, take one.
_MOST_CALLS = 8


@dataclass
class FlashAttnMetadata(BatchMetadata):
    """The batch, and the calls that compute it.

    Attributes:
        calls: in any order.
    """

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
        metadata: FlashAttnMetadata = FlashAttnMetadata.of(batch, self, calls=[])
        metadata.calls += [self._call(batch, *run) for run in self._runs(batch)]
        for call in metadata.calls:
            call.prepare()
        return metadata

    def _runs(self, batch: AttentionBatch) -> Iterator[tuple[int, int, bool]]:
        """(first request, the one after the last, whether it is called for alone)."""
        labels = self._labels(batch)
        runs = [(label, len(list(run))) for label, run in itertools.groupby(labels)]
        together = sum(not isinstance(label, int) for label, _ in runs)
        if together > _MOST_CALLS and self._has_pages(batch):
            runs = [(None, len(labels))]
        first = 0
        for label, length in runs:
            end = first + length
            is_alone = isinstance(label, int) or (isinstance(label, tuple) and length == 1)
            if batch.query_start_list[first] < batch.query_start_list[end]:
                yield first, end, is_alone
            first = end

    def _has_pages(self, batch: AttentionBatch) -> bool:
        """Whether any requests may be called for together: by pages, if only of one row each."""
        return batch.block_table is not None or self.provider.takes_pages_of_one

    def _labels(self, batch: AttentionBatch) -> list[object]:
        """What sets neighbours apart: a number is a request's own, to be called for alone."""
        few, lengths = batch.max_decode_query_len, batch.seq_lens_list
        has_cache = batch.block_table is not None
        if not has_cache and (not self.provider.reads_past_rows or len(set(lengths)) == 1):
            return [None] * len(lengths)

        def label(request: int, query_len: int, seq_len: int) -> object:
            if self._pays_alone(query_len, seq_len):
                # Neighbours without a past that are equally long may be read together.
                new = batch.key_starts[request + 1] - batch.key_starts[request]
                is_fresh = has_cache and new == seq_len and not self.spec.kv_sharing
                return (seq_len,) if is_fresh else request
            if has_cache:
                return Phase.DECODE if query_len <= few else Phase.PREFILL
            return None if self.provider.takes_pages_of_one else (seq_len,)

        return list(map(label, range(len(lengths)), batch.query_lens, lengths))

    def _pays_alone(self, query_len: int, seq_len: int) -> bool:
        spec = self.spec
        row_bytes = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
        fits = seq_len * row_bytes <= MAX_GATHERED_BYTES
        return self.provider.gathers and query_len >= _ALONE_FROM and fits

    def _call(self, batch: AttentionBatch, first: int, end: int, alone: bool) -> FlashCall:
        spec, table = self.spec, batch.block_table
        query_lens, seq_lens = batch.query_lens[first:end], batch.seq_lens_list[first:end]
        # A graph is captured for lengths up to the batch's limit.
        longest = batch.max_seq_len if spec.cuda_graph else max(seq_lens)
        starts = batch.query_start_loc[first : end + 1]
        if table is not None:
            table = table[first:end, : max(1, -(-longest // (spec.block_size or 1)))]
        return FlashCall(
            spec=spec,
            bind=functools.partial(self.provider.bind, self.functions),
            get_schedule=self.functions.get("get_scheduler_metadata"),
            tokens=slice(batch.query_start_list[first], batch.query_start_list[end]),
            keys=self._rows(batch, first, end),
            row_shape=self._row_shape(seq_lens),
            gathered=self._gathered(batch, first) if alone and table is not None else None,
            query_start_list=starts - batch.query_start_list[first] if first else starts,
            seq_lens=batch.seq_lens[first:end],
            block_table=table,
            max_query_len=max(query_lens),
            max_row_len=max(seq_lens),
            is_decode=set(query_lens) == {1},
            has_no_keys=longest == 0,
        )

    def _row_shape(self, seq_lens: list[int]) -> tuple[int, int] | None:
        """How rows of keys are given, so that none is read with another request's: see VarlenArgs."""
        if not self.provider.reads_past_rows:
            return None
        return (len(seq_lens), -1) if len(set(seq_lens)) == 1 else PAGES_OF_ONE

    def _rows(self, batch: AttentionBatch, first: int, end: int) -> slice | None:
        """The rows of key and value that are these requests', if they may be read there."""
        rows = slice(batch.key_starts[first], batch.key_starts[end])
        if batch.block_table is None:
            return rows
        lengths = [e - s for s, e in itertools.pairwise(batch.key_starts[first : end + 1])]
        is_fresh = lengths == batch.seq_lens_list[first:end] and not self.spec.kv_sharing
        is_safe = len(set(lengths)) == 1 or not self.provider.reads_past_rows
        # A graph of decodes may have been captured for requests that happen to have no past.
        return rows if is_fresh and is_safe and batch.max_query_len > 1 else None

    def _gathered(self, batch: AttentionBatch, request: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold what a request sees, and how many keys from there on."""
        spec = self.spec
        assert batch.block_table is not None
        assert spec.block_size is not None
        seq_len, passed = batch.seq_lens_list[request], 0
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
        self._scale = abs(self.scale) or 1.0
        self._slopes: torch.Tensor | None = None
        self._last_cache: tuple[Any, torch.Tensor, torch.Tensor] | None = None

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

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: FlashAttnMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, FlashAttnMetadata)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("FLASH_ATTN does not quantize its output; TRITON_ATTN does.")
        check_forward(self, query, key, value, kv_cache, attn_metadata.batch, output)
        cache = None
        if kv_cache is not None:
            cache = self._split(kv_cache, attn_metadata.builder.spec)
            if key is not None and value is not None:
                self.write_kv(layer, key, value, kv_cache, attn_metadata.batch)
        elif attn_metadata.batch.block_table is not None:
            attn_metadata = attn_metadata.without_pages
        if self.scale <= 0:  # the kernels take the largest product for the largest score
            query = -query if self.scale else torch.zeros_like(query)
        query = aligned(query)
        shape = (query.shape[0], self.num_heads, self.head_size_v)
        out = output
        if out is None or not is_aligned(out):
            out = query.new_empty(shape)
        lse = query.new_empty(shape[:2], dtype=torch.float32) if self.returns_lse else None
        num_tokens = attn_metadata.batch.num_tokens
        if shape[0] > num_tokens:  # rows that are no request's
            out[num_tokens:] = 0
            if lse is not None:
                lse[num_tokens:] = float("-inf")
        for call in attn_metadata.calls:
            self._make(call, query, key, value, cache, out, lse)
        if output is not None and output is not out:
            out = output.copy_(out)
        return out if lse is None else (out, lse)

    def _split(
        self, kv_cache: torch.Tensor, spec: AttentionSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cache; those of the last one are remembered."""
        if self._last_cache is None or self._last_cache[0]() is not kv_cache:
            check_strides(kv_cache)
            views = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
            self._last_cache = (weakref.ref(kv_cache), *views)
        check_block_size(kv_cache, spec)
        return self._last_cache[1:]

    def _make(
        self,
        call: FlashCall,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Make one call, and put its results into their rows."""
        query, out = part(query, call.tokens), part(out, call.tokens)
        lse = None if lse is None else part(lse, call.tokens)
        if call.has_no_keys:
            out.zero_()
            if lse is not None:
                lse.fill_(float("-inf"))
            return
        if call.keys is not None and key is not None and value is not None:
            attend = call.over_rows
            keys, values = (call.as_rows(aligned(part(new, call.keys))) for new in (key, value))
        else:
            assert cache is not None  # check_forward saw to it
            attend, (keys, values) = call.over_pages, cache
            if call.gathered is not None:
                keys, values = (call.as_rows(gather(each, *call.gathered)) for each in cache)
        slopes, sinks = self._slopes_on(query.device), self._sinks_on(query.device)
        result, found = attend(Operands(query, keys, values, out, self._scale, slopes, sinks))
        if result.data_ptr() != out.data_ptr():
            out.copy_(result)
        if lse is not None:
            assert found is not None
            lse.copy_(found.T)

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
    """FlashAttention 2, 3 and 4: flash-attn's own packages, vLLM's build and SGLang's.

    A row that sees a NaN among its scores has NaN as its output, and the log-sum-exp of a row that
    sees no key; scores that are all −inf can give 0. Measured with vLLM's FlashAttention 3.
    """

    interface_version = 2
    propagates_nan = False
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
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """The provider."""
        picked = pick_provider(spec, device)
        return picked.name if isinstance(picked, Provider) else ""

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Each provider has its limits: one that is installed here must serve the whole request."""
        picked = pick_provider(spec, device)
        return [] if isinstance(picked, Provider) else picked
