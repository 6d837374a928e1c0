"""Cascade attention: keys that all requests of a batch begin with are read once.

Requests that share a prefix, such as a system prompt, have the same blocks in their first columns
of the block table. A decode reads them for each request. Here all queries attend to the prefix as
one request, by the backend of a prefill, and each request to its remaining keys; both parts return
their LSE and are merged. (Hydragen, arXiv:2402.05099; FlashInfer's cascade inference.)

Every query sees all of the prefix, whatever its position. So the query heads of a KV head are given
to the backend as further tokens of one head, which fills the tiles of its kernels. The remaining
keys of a plain decode are all visible, too: then both parts are one batch of such tokens, whose
prefills and decodes a backend may run at the same time.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.reference.semantics import without_autocast
from attn_dispatch.errors import InvalidInputError, UnsupportedError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import kv_cache_torch_dtype, store_output
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_forward
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.device_errors import is_device_lost, is_out_of_memory
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.composed import ComposedImpl, Given, Result, Scales
from attn_dispatch.runtime.functional import merge_parts
from attn_dispatch.runtime.recovery import AttemptFailed
from attn_dispatch.runtime.routing import RoutedImpl
from attn_dispatch.selection.failure_record import BackendFallbackWarning
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["PARTS_US", "bind_cascade", "check_cascade", "pays_off", "pieces_of"]

#: What two parts and their merge take in addition to a decode as a whole, in microseconds.
PARTS_US = 30.0

#: Requests that read the same keys at about the same time find most of them in the L2 cache: this
#: many times as fast as the memory. Measured on an H100, as PARTS_US: docs/concepts.md.
_REUSE = 2.6

#: Of a prefix: the fewest keys of a piece, and the most pieces.
_PIECE, _MAX_PIECES = 2048, 16

#: Programs for each processor that are aimed at; query rows of a program.
_WAVES, _ROWS = 2, 128

#: Fields under which a query does not see the whole prefix, or which add positions to the scores.
_NOT_SHARED = (
    *("sliding_window", "window_size", "attention_chunk", "alibi", "custom_mask"),
    *("bidirectional_ranges", "key_positions", "mla", "batch_invariant"),
)


def check_cascade(spec: AttentionSpec) -> None:
    """Check that a layer of this spec can read a shared prefix once.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    found = [name for name in _NOT_SHARED if getattr(spec, name)]
    if spec.attn_type != AttentionType.DECODER or not spec.causal:
        found.append("attention that is not a decoder's")
    if found:
        raise UnsupportedError(
            f"shared_prefix=True does not go with {', '.join(found)}. Make the layer without it: "
            "then each request reads the whole prefix."
        )


def bind_cascade(
    spec: AttentionSpec,
    device: torch.device,
    context: SelectionContext,
    arguments: Mapping[str, Any],
) -> LayerBinding:
    """The backends of a layer, and those of its two parts for batches with a shared prefix.

    Raises:
        UnsupportedError: no backend computes the layer, or one of the parts.
        AttemptFailed: a backend of the layer raised when it was built.
    """
    whole = LayerBinding.of(spec, device, context, arguments)
    suffix = spec.replace(returns_lse=True, sinks=False, output_quant=None)
    given = {**arguments, "sinks": None}
    try:
        # Every query sees all of it; the heads of a group are tokens.
        prefix = suffix.replace(causal=False, num_heads=spec.num_kv_heads)
        parts = (
            LayerBinding.of(prefix, device, context, given),
            LayerBinding.of(suffix, device, context, given),
        )
    except AttemptFailed as failed:  # the layer works without them
        _warn(failed.__cause__ or failed)
        return whole
    impl: Any = _CascadeImpl(spec, whole, *parts, arguments["sinks"])
    builder = _CascadeBuilder(whole, *parts)
    return dataclasses.replace(
        whole, impl=impl, builder=builder, metadata_key=(builder.route, spec, device)
    )


def _warn(error: BaseException) -> None:
    warnings.warn(
        f"A shared prefix is read by each request from now on, because {summary_of(error)}",
        BackendFallbackWarning,
        stacklevel=3,
    )


@dataclass
class CascadeMetadata(BatchMetadata):
    """A batch as a whole, or in two parts.

    Attributes:
        whole: the metadata of the layer's backends; None if there are parts.
        prefix: that of the prefix, and of plain decodes that of all parts.
        suffix: that of the remaining keys, of other batches.
        pieces: of the prefix.
    """

    whole: Any
    prefix: Any
    suffix: Any
    pieces: int

    def __post_init__(self) -> None:
        batch = self.batch
        super().__post_init__()
        if self.batch is not batch:
            fresh = self.builder.build(self.batch)
            self.whole, self.pieces = fresh.whole, fresh.pieces
            self.prefix, self.suffix = fresh.prefix, fresh.suffix


class _CascadeBuilder(AttentionMetadataBuilder[CascadeMetadata]):
    def __init__(self, whole: LayerBinding, prefix: LayerBinding, suffix: LayerBinding) -> None:
        super().__init__(whole.builder.spec, whole.builder.device)
        self._whole, self._parts = whole, (prefix, suffix)
        #: Equal for builders whose metadata is interchangeable, see LayerBinding.accepts.
        self.route = tuple(each.metadata_key for each in (whole, prefix, suffix))
        self.has_failed = False

    def build(self, batch: AttentionBatch) -> CascadeMetadata:
        """See AttentionMetadataBuilder.build."""
        profile = self._whole.profile
        if not self.has_failed and pays_off(batch, self.spec, profile):
            batch.check()
            try:
                return self._in_parts(batch, pieces_of(batch, self.spec, profile.num_sms or 1))
            except (InvalidInputError, UnsupportedError):
                raise
            except Exception as error:
                self.fail(error)
        return self._as_whole(batch, self.build_whole(batch))

    def _in_parts(self, batch: AttentionBatch, pieces: int) -> CascadeMetadata:
        is_decode = min(batch.query_lens) == max(batch.query_lens) == 1
        prefix, suffix = self._parts
        group = self.spec.num_heads // self.spec.num_kv_heads
        first = _packed_batch(batch, pieces, group, with_rest=is_decode)
        metadata: CascadeMetadata = CascadeMetadata.of(
            batch,
            self,
            whole=None,
            prefix=prefix.builder.build(first),
            suffix=None if is_decode else suffix.builder.build(_rest_of(batch)),
            pieces=first.num_reqs - batch.num_reqs * is_decode,
        )
        return metadata

    def _as_whole(self, batch: AttentionBatch, whole: Any) -> CascadeMetadata:
        metadata: CascadeMetadata = CascadeMetadata.of(
            batch, self, whole=whole, prefix=None, suffix=None, pieces=0
        )
        return metadata

    def fail(self, error: Exception) -> None:
        """Plan no parts from now on."""
        if is_out_of_memory(error) or is_device_lost(error):
            raise error
        self.has_failed = True
        _warn(error)

    def build_whole(self, batch: AttentionBatch) -> Any:
        """The metadata of the layer's backends."""
        return self._whole.builder.build(batch)

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> CascadeMetadata:
        """See AttentionMetadataBuilder.build_for_graph. Captured steps have no shared prefix."""
        return self._as_whole(batch, self._whole.builder.build_for_graph(batch, limits))

    def update_for_graph(self, metadata: CascadeMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        self._whole.builder.update_for_graph(metadata.whole, batch)


def pays_off(batch: AttentionBatch, spec: AttentionSpec, profile: DeviceProfile) -> bool:
    """Whether a prefix is read once: if that saves more than PARTS_US.

    Not if its queries are more than its keys, as in prefills. Else always on a device whose memory
    bandwidth is not known.
    """
    length, requests = batch.shared_prefix_len, batch.num_reqs
    if requests < 2 or batch.lengths != "exact" or length <= batch.num_tokens:
        return False
    if not profile.memory_bandwidth:
        return True
    stored = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, profile.arch).itemsize
    key_bytes = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * stored
    once_us = length * key_bytes / profile.memory_bandwidth * 1e6
    return ((requests - 1) / _REUSE - 1) * once_us > PARTS_US


def pieces_of(batch: AttentionBatch, spec: AttentionSpec, num_sms: int) -> int:
    """In how many pieces the prefix is read.

    A kernel of prefills has a program for each KV head and some rows. If that leaves processors
    idle, each piece is a request of its own, with all queries, and the pieces are merged like other
    parts (as the splits of Flash-Decoding).
    """
    rows = batch.num_tokens * spec.num_heads // spec.num_kv_heads
    programs = spec.num_kv_heads * -(-rows // _ROWS)
    most = min(_MAX_PIECES, batch.shared_prefix_len // _PIECE)
    return max(1, min(most, -(-_WAVES * num_sms // programs)))


def _packed_batch(
    batch: AttentionBatch, pieces: int, group: int, *, with_rest: bool
) -> AttentionBatch:
    """Requests of one head for each KV head: all rows over each piece of the prefix.

    With the rest, then those of each request over its keys after the prefix.
    """
    columns, block_size, table = _prefix_of(batch)
    own = -(-columns // pieces)  # blocks of a piece
    seq_lens = [min(own, columns - first) * block_size for first in range(0, columns, own)]
    query_lens = [batch.num_tokens * group] * len(seq_lens)
    tables = _padded(table[:1, :columns], own * len(seq_lens)).view(len(seq_lens), own)
    if with_rest:
        rest = table[:, columns:]
        width = max(own, rest.shape[1])
        tables = torch.cat([_padded(each, width) for each in (tables, rest)])
        seq_lens += [length - batch.shared_prefix_len for length in batch.seq_lens_list]
        query_lens += [group] * batch.num_reqs
    return AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=tables,
        max_decode_query_len=group,
        device=batch.seq_lens.device,
    )


def _padded(table: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(table, (0, columns - table.shape[1]))


def _prefix_of(batch: AttentionBatch) -> tuple[int, int, torch.Tensor]:
    """Its blocks, their size, and the block table."""
    assert batch.block_table is not None
    assert batch.block_size is not None
    return batch.shared_prefix_len // batch.block_size, batch.block_size, batch.block_table


def _rest_of(batch: AttentionBatch) -> AttentionBatch:
    """Each request over its keys after the prefix."""
    length, (columns, _, table) = batch.shared_prefix_len, _prefix_of(batch)
    return dataclasses.replace(
        batch,
        seq_lens=batch.seq_lens - length,
        seq_lens_cpu=batch.seq_lens_cpu - length,
        max_seq_len=batch.max_seq_len - length,
        block_table=table[:, columns:].contiguous(),  # as kernels expect
        shared_prefix_len=0,
    )


class _CascadeImpl(ComposedImpl):
    """Computes a batch in two parts, if it was planned so."""

    metadata_cls = CascadeMetadata
    forward = without_autocast(ComposedImpl.forward)

    def __init__(
        self,
        spec: AttentionSpec,
        whole: LayerBinding,
        prefix: LayerBinding,
        suffix: LayerBinding,
        sinks: torch.Tensor | None,
    ) -> None:
        self._returns_lse, self._sinks = spec.returns_lse, sinks
        self._kv_heads = spec.num_kv_heads
        self._first: Any = whole.impl
        if isinstance(self._first, RoutedImpl):
            self._first = next(iter(self._first._impls.values()))
        self._whole, self._prefix, self._suffix = whole.impl, prefix.impl, suffix.impl

    def _compute(
        self, given: Given, metadata: CascadeMetadata, output: torch.Tensor, scales: Scales
    ) -> Result:
        whole = metadata.whole
        if whole is None:
            into = output if scales == (None, None) else None
            try:
                merged, lse = self._in_parts(given, metadata, output.shape[2], into)
            except (InvalidInputError, UnsupportedError):
                raise
            except Exception as error:
                builder = metadata.builder
                assert isinstance(builder, _CascadeBuilder)
                builder.fail(error)
                whole = builder.build_whole(metadata.batch)
            else:
                if merged is not output:
                    store_output(merged, output, *scales)
                return (output, lse) if self._returns_lse else output
        return self._whole.forward(*given, whole, output, *scales)

    def _in_parts(
        self, given: Given, metadata: CascadeMetadata, size: int, into: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, query, key, value, kv_cache = given
        batch, pieces = metadata.batch, metadata.pieces
        tokens, is_joint = batch.num_tokens, metadata.suffix is None
        if is_joint:
            check_forward(self._first, query, key, value, kv_cache, batch)
            if key is not None:
                self._first.write_kv(layer, key, value, kv_cache, batch)
        else:  # it writes the new keys
            out = query.new_empty((*query.shape[:2], size))
            suffix: Any = self._suffix.forward(*given, metadata.suffix, out)
        # Padding belongs to no part. (tokens, group, KV heads, size), once for each part.
        packed = query[:tokens].unflatten(1, (self._kv_heads, -1)).transpose(1, 2)
        shape = (pieces + is_joint, *packed.shape[:3])
        queries = packed.new_empty((*shape, packed.shape[3])).copy_(packed)
        out = query.new_empty((*shape, size))
        parts: Any = self._prefix.forward(
            layer, queries.flatten(0, 2), None, None, kv_cache, metadata.prefix, out.flatten(0, 2)
        )
        outs, lses = (each.unflatten(0, shape[:3]).transpose(2, 3) for each in parts)
        first, rest = (outs[-1], lses[-1]), (outs[:-1], lses[:-1])
        if not is_joint:
            first = tuple(each[:tokens].unflatten(1, (self._kv_heads, -1)) for each in suffix)
            rest = (outs, lses)
        sinks = None if self._sinks is None else self._sinks.to(query.device, non_blocking=True)
        target = query.new_empty((*query.shape[:2], size)) if into is None else into
        _, lse = merge_parts(first, rest, sinks, target[:tokens])
        if tokens < len(target):
            target[tokens:] = 0
            padding = lse.new_full((len(target) - tokens, lse.shape[1]), float("-inf"))
            lse = torch.cat([lse, padding])
        return target, lse
