"""FLASH_ATTN: FlashAttention 2, 3 and 4, from the first package that supports the layer.

`providers.py` picks the package. The builder splits a batch into calls: decodes, prompts, and long
prompts one by one where that is faster. The kernels multiply what they mask by zero, so a NaN that
they load reaches the result. Therefore blocks that the sliding window has passed are cut out of the
block table, and rows of keys are laid out so that no request's are loaded with another's.

FlashAttention: arXiv:2205.14135; FlashAttention-2: arXiv:2307.08691; FlashAttention-3:
arXiv:2407.08608.
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

from attn_dispatch.backends.common import aligned, on_device
from attn_dispatch.backends.cuda.flash_attn.calls import (
    PAGES_OF_ONE,
    FlashCall,
    Operands,
    check_block_size,
    check_strides,
    gather,
    has_aligned_heads,
    select_rows,
)
from attn_dispatch.backends.cuda.flash_attn.providers import (
    Provider,
    declared_fields,
    pick_provider,
    require_provider,
)
from attn_dispatch.backends.triton import scratch
from attn_dispatch.backends.triton.kv_writer import KVCacheWriter
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, Reason
from attn_dispatch.interface.captured import GraphLimits, StagedBuffers
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.interface.unquantized import ForwardArgs, UnquantizedImpl
from attn_dispatch.interface.validation import check_int32
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["FlashAttnBackend", "FlashAttnBuilder", "FlashAttnImpl", "FlashAttnMetadata"]

#: A request with this many query tokens or more gets a call of its own, over rows. On an H200 rows
#: were faster than pages of 16: 229 to 249 µs at 4k tokens, and 754 to 783 for 2k over 16k keys,
#: copying included (benchmarks/RESULTS.md).
_OWN_CALL_QUERY_LEN = 2048
#: A batch whose phases alternate is one call if it would need more calls than this, long prompts
#: not counted.
_MAX_CALLS = 8


@dataclass
class FlashAttnMetadata(BatchMetadata):
    """The batch, and the calls that compute it.

    Attributes:
        calls: in any order.
        padding: in a captured step of drafts, whose number of tokens differs, which rows of output
            have no token: "rows", (num_tokens,) bool.
    """

    calls: list[FlashCall]
    padding: StagedBuffers | None = None

    @functools.cached_property
    def without_pages(self) -> FlashAttnMetadata:
        """The same for a call without a cache, whose keys are the given rows."""
        batch = dataclasses.replace(self.batch, block_table=None)
        metadata: FlashAttnMetadata = self.builder.build(batch)
        return metadata


class FlashAttnBuilder(AttentionMetadataBuilder[FlashAttnMetadata]):
    """Picks the provider, and splits batches into calls.

    Raises:
        UnsupportedError: no installed provider supports the layers.
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

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> FlashAttnMetadata:
        """See AttentionMetadataBuilder.build_for_graph. Drafts can be captured too, in one call.

        In a step with prompts, which requests share a call depends on their lengths.
        """
        if limits.phase is not Phase.DECODE or limits.has_one_token_requests:
            return super().build_for_graph(batch, limits)
        metadata = self.build(batch)
        metadata.padding = StagedBuffers(self.device, rows=((limits.num_tokens,), torch.bool))
        return metadata

    def update_for_graph(self, metadata: FlashAttnMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        if metadata.padding is not None:
            staged = metadata.padding.stage()
            staged["rows"][: batch.num_tokens] = False
            staged["rows"][batch.num_tokens :] = True
            metadata.padding.send(staged)

    def _runs(self, batch: AttentionBatch) -> Iterator[tuple[int, int, bool]]:
        """(first request, the one after the last, whether it is a single long prompt)."""
        labels = self._labels(batch)
        runs = [(label, len(list(run))) for label, run in itertools.groupby(labels)]
        shared = sum(not isinstance(label, int) for label, _ in runs)
        can_join_all = batch.block_table is not None or self.provider.takes_pages_of_one
        if shared > _MAX_CALLS and can_join_all:
            runs = [(None, len(labels))]
        first = 0
        for label, length in runs:
            end = first + length
            is_single = isinstance(label, int) or (isinstance(label, tuple) and length == 1)
            if batch.query_start_list[first] < batch.query_start_list[end]:
                yield first, end, is_single
            first = end

    def _labels(self, batch: AttentionBatch) -> list[object]:
        """Neighbours with equal labels share a call. An integer label belongs to one request."""
        seq_lens, has_cache = batch.seq_lens_list, batch.block_table is not None
        if not has_cache and (not self.provider.reads_past_rows or len(set(seq_lens)) == 1):
            return [None] * len(seq_lens)

        def label(request: int, query_len: int, seq_len: int) -> object:
            if self._needs_own_call(query_len, seq_len):
                # Neighbours without a past and of one length may be read together.
                is_fresh = has_cache and batch.new_lens[request] == seq_len
                if is_fresh and not self.spec.kv_sharing:
                    return (seq_len,)
                if batch.lengths == "exact":  # which blocks are copied is decided on the host
                    return request
            if has_cache:
                return Phase.DECODE if query_len <= batch.max_decode_query_len else Phase.PREFILL
            return None if self.provider.takes_pages_of_one else (seq_len,)

        return list(map(label, range(len(seq_lens)), batch.query_lens, seq_lens))

    def _needs_own_call(self, query_len: int, seq_len: int) -> bool:
        spec = self.spec
        row_bytes = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
        fits = seq_len * row_bytes <= scratch.MAX_SCRATCH_BYTES
        return self.provider.gathers and query_len >= _OWN_CALL_QUERY_LEN and fits

    def _call(self, batch: AttentionBatch, first: int, end: int, is_single: bool) -> FlashCall:
        spec, table = self.spec, batch.block_table
        query_lens, seq_lens = batch.query_lens[first:end], batch.seq_lens_list[first:end]
        # A graph is captured for lengths up to the batch's limit.
        longest = batch.max_seq_len if spec.cuda_graph else max(seq_lens)
        starts = batch.query_start_loc[first : end + 1]
        if table is not None:
            table = table[first:end, : max(1, -(-longest // (spec.block_size or 1)))]
        row_shape = None
        if self.provider.reads_past_rows:
            row_shape = (len(seq_lens), -1) if len(set(seq_lens)) == 1 else PAGES_OF_ONE
        return FlashCall(
            spec=spec,
            bind=functools.partial(self.provider.bind, self.functions),
            get_schedule=self.functions.get("get_scheduler_metadata"),
            tokens=slice(batch.query_start_list[first], batch.query_start_list[end]),
            keys=self._key_rows(batch, first, end),
            row_shape=row_shape,
            gathered=self._gathered(batch, first) if is_single and table is not None else None,
            query_start_loc=starts - batch.query_start_list[first] if first else starts,
            seq_lens=batch.seq_lens[first:end],
            block_table=table,
            max_query_len=max(query_lens),
            max_row_len=max(seq_lens),
            is_decode=set(query_lens) == {1},
            has_no_keys=longest == 0,
        )

    def _key_rows(self, batch: AttentionBatch, first: int, end: int) -> slice | None:
        """The requests' rows of key and value, if they hold all keys and can be read as rows."""
        rows = slice(batch.key_starts[first], batch.key_starts[end])
        if batch.block_table is None:
            return rows
        lengths = [e - s for s, e in itertools.pairwise(batch.key_starts[first : end + 1])]
        is_fresh = lengths == batch.seq_lens_list[first:end] and not self.spec.kv_sharing
        is_safe = len(set(lengths)) == 1 or not self.provider.reads_past_rows
        # A graph of decodes may have been captured for requests that happen to have no past.
        return rows if is_fresh and is_safe and batch.max_query_len > 1 else None

    def _gathered(self, batch: AttentionBatch, request: int) -> tuple[torch.Tensor, int]:
        """The blocks that a request sees, and the number of keys from their start on."""
        spec = self.spec
        assert batch.block_table is not None
        assert spec.block_size is not None
        seq_len = batch.seq_lens_list[request]
        first_position = seq_len - batch.query_lens[request]
        skipped = Reach.of(spec).first(first_position) // spec.block_size
        blocks = batch.block_table[request, skipped : -(-seq_len // spec.block_size)]
        return blocks, seq_len - skipped * spec.block_size


class FlashAttnImpl(UnquantizedImpl[FlashAttnMetadata]):
    """Writes the cache by the project's own kernel, and calls the metadata's provider.

    Sinks are rounded to bfloat16, the dtype of every layer that may have them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer = KVCacheWriter(self)
        self._scale = abs(self.scale) or 1.0
        self._slopes: torch.Tensor | None = None
        self._last_cache: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        write = self._writer.write if kv_cache.device.type == "cuda" else super().write_kv
        write(layer, key, value, kv_cache, batch)

    def _check_call(self, args: ForwardArgs[FlashAttnMetadata]) -> None:
        if args.kv_cache is not None:
            self._view(args.kv_cache)
            check_block_size(args.kv_cache, args.metadata.builder.spec)

    def _view(self, kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cache. Repeated calls with the same cache are cheap."""
        if self._last_cache is None or self._last_cache[0]() is not kv_cache:
            check_strides(kv_cache)
            views = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
            self._last_cache = (weakref.ref(kv_cache), *views)
        return self._last_cache[1:]

    def _attend(
        self, args: ForwardArgs[FlashAttnMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        metadata, query = args.metadata, args.query
        if args.kv_cache is None and metadata.batch.block_table is not None:
            metadata = metadata.without_pages
        if self.scale <= 0:  # with a negative scale the kernels would take the wrong maximum
            query = -query if self.scale else torch.zeros_like(query)
        query = aligned(query, has_aligned_heads)
        out = output if has_aligned_heads(output) else query.new_empty(output.shape)
        for call in metadata.calls:
            rows = select_rows(query, call.tokens), select_rows(out, call.tokens)
            self._run(call, args, *rows, None if lse is None else select_rows(lse, call.tokens))
        if out is not output:
            output[: metadata.batch.num_tokens] = out[: metadata.batch.num_tokens]
        if metadata.padding is not None:
            is_padding = metadata.padding.tensors["rows"]
            output[: len(is_padding)].masked_fill_(is_padding[:, None, None], 0)
            if lse is not None:
                lse[: len(is_padding)].masked_fill_(is_padding[:, None], float("-inf"))

    def _run(
        self,
        call: FlashCall,
        args: ForwardArgs[FlashAttnMetadata],
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Run one call, with its rows of query, output and lse."""
        if call.has_no_keys:
            out.zero_()
            if lse is not None:
                lse.fill_(float("-inf"))
            return
        if call.keys is not None and args.key is not None and args.value is not None:
            attend = call.over_rows
            rows = (select_rows(new, call.keys) for new in (args.key, args.value))
            keys, values = (call.as_rows(aligned(each, has_aligned_heads)) for each in rows)
        else:
            assert args.kv_cache is not None  # by check_forward
            attend, (keys, values) = call.over_pages, self._view(args.kv_cache)
            if call.gathered is not None:
                pages = (keys, values)
                keys, values = (call.as_rows(gather(each, *call.gathered)) for each in pages)
        slopes, sinks = self._slopes_on(query.device), None
        if self.sinks is not None:
            sinks = on_device(self.sinks, query.device, torch.bfloat16).contiguous()
        result, found = attend(Operands(query, keys, values, out, self._scale, slopes, sinks))
        if result.data_ptr() != out.data_ptr():
            out.copy_(result)
        if lse is not None:
            assert found is not None
            lse.copy_(found.T)

    def _slopes_on(self, device: torch.device) -> torch.Tensor | None:
        if self.alibi_slopes is not None and (
            self._slopes is None or self._slopes.device != device
        ):
            self._slopes = on_device(self.alibi_slopes, device, torch.float32).contiguous()
        return self._slopes


class FlashAttnBackend(AttentionBackend):
    """FlashAttention 2, 3 and 4: flash-attn's own packages, vLLM's build and SGLang's.

    A row with a NaN among its scores has NaN as its output, and the log-sum-exp of a row that sees
    no key. Scores that are all −inf can give 0. Measured with vLLM's FlashAttention 3.
    """

    interface_version = 2
    name = "FLASH_ATTN"
    impl_cls = FlashAttnImpl
    builder_cls = FlashAttnBuilder
    metadata_cls = FlashAttnMetadata
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(8, 0)),),
        requires=("triton>=3.6",),  # its kernel writes the cache without waiting for the device
        **declared_fields(),
    )

    @classmethod
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """The provider."""
        picked = pick_provider(spec, device)
        return picked.name if isinstance(picked, Provider) else ""

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Each provider has limits; one that is installed here must support the whole request."""
        picked = pick_provider(spec, device)
        return [] if isinstance(picked, Provider) else picked
