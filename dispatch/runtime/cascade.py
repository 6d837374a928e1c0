"""Cascade attention: keys that all requests of a batch begin with are read once.

Requests that share a prefix, such as a system prompt, have the same blocks in their first columns
of the block table. A decode reads them for each request. Here all queries attend to the prefix as
one request, by the backend of a prefill, and each request to its remaining keys; both parts return
their LSE and are merged. (Hydragen, arXiv:2402.05099; FlashInfer's cascade inference.)
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
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.device_errors import is_device_lost, is_out_of_memory
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.composed import ComposedImpl, Given, Result, Scales
from attn_dispatch.runtime.functional import merge_parts
from attn_dispatch.runtime.recovery import AttemptFailed
from attn_dispatch.selection.failure_record import BackendFallbackWarning
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["PARTS_US", "bind_cascade", "check_cascade", "pays_off", "pieces_of"]

#: What two parts and their merge take in addition to a decode as a whole, in microseconds.
PARTS_US = 20.0

#: Of a prefix: the fewest keys of a piece, and the most pieces.
_PIECE, _MAX_PIECES = 1024, 16

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
        prefix = suffix.replace(causal=False)  # every query sees all of it
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
        prefix, suffix: those of the parts.
    """

    whole: Any
    prefix: Any
    suffix: Any

    def __post_init__(self) -> None:
        batch = self.batch
        super().__post_init__()
        if self.batch is not batch:
            fresh = self.builder.build(self.batch)
            self.whole, self.prefix, self.suffix = fresh.whole, fresh.prefix, fresh.suffix


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
            pieces = pieces_of(batch, self.spec.num_heads, profile.num_sms or 1)
            try:
                prefix, suffix = (
                    part.builder.build(own)
                    for part, own in zip(self._parts, _parts_of(batch, pieces), strict=True)
                )
                return _metadata_of(batch, self, None, prefix, suffix)
            except (InvalidInputError, UnsupportedError):
                raise
            except Exception as error:
                self.fail(error)
        return _metadata_of(batch, self, self.build_whole(batch), None, None)

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
        whole = self._whole.builder.build_for_graph(batch, limits)
        return _metadata_of(batch, self, whole, None, None)

    def update_for_graph(self, metadata: CascadeMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph."""
        self._whole.builder.update_for_graph(metadata.whole, batch)


def _metadata_of(
    batch: AttentionBatch, builder: _CascadeBuilder, whole: Any, prefix: Any, suffix: Any
) -> CascadeMetadata:
    metadata: CascadeMetadata = CascadeMetadata.of(
        batch, builder, whole=whole, prefix=prefix, suffix=suffix
    )
    return metadata


def pays_off(batch: AttentionBatch, spec: AttentionSpec, profile: DeviceProfile) -> bool:
    """Whether a prefix is read once: if reading it for each request takes longer than PARTS_US.

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
    saved_us = (requests - 1) * length * key_bytes / profile.memory_bandwidth * 1e6
    return saved_us > PARTS_US


def pieces_of(batch: AttentionBatch, num_heads: int, num_sms: int) -> int:
    """In how many pieces the prefix is read.

    A kernel of prefills has a program for each head and some rows. If that leaves processors idle,
    each piece is a request of its own, with all queries, and the pieces are merged like other parts
    (as the splits of Flash-Decoding).
    """
    programs = num_heads * -(-batch.num_tokens // _ROWS)
    most = min(_MAX_PIECES, batch.shared_prefix_len // _PIECE)
    return max(1, min(most, -(-_WAVES * num_sms // programs)))


def _parts_of(batch: AttentionBatch, pieces: int) -> tuple[AttentionBatch, AttentionBatch]:
    """All queries over each piece of the prefix, and each request's over the keys after it."""
    length, table, block_size = batch.shared_prefix_len, batch.block_table, batch.block_size
    assert table is not None
    assert block_size is not None
    columns = length // block_size
    own = -(-columns // pieces)  # blocks of a piece
    lens = [min(own, columns - first) * block_size for first in range(0, columns, own)]
    tables = torch.nn.functional.pad(table[0, :columns], (0, own * len(lens) - columns))
    prefix = AttentionBatch.create(
        [batch.num_tokens] * len(lens),
        lens,
        block_table=tables.view(len(lens), own),
        device=batch.seq_lens.device,
    )
    suffix = dataclasses.replace(
        batch,
        seq_lens=batch.seq_lens - length,
        seq_lens_cpu=batch.seq_lens_cpu - length,
        max_seq_len=batch.max_seq_len - length,
        block_table=table[:, columns:].contiguous(),  # as kernels expect
        shared_prefix_len=0,
    )
    return prefix, suffix


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
        suffix_out, tokens = query.new_empty((*query.shape[:2], size)), metadata.batch.num_tokens
        suffix: Any = self._suffix.forward(  # it writes the new keys
            layer, query, key, value, kv_cache, metadata.suffix, suffix_out
        )
        # Each piece of the prefix has all queries; padding belongs to none.
        pieces = metadata.prefix.batch.num_reqs
        queries = query[:tokens] if pieces == 1 else query[:tokens].repeat(pieces, 1, 1)
        out = query.new_empty((*queries.shape[:2], size))
        prefix: Any = self._prefix.forward(
            layer, queries, None, None, kv_cache, metadata.prefix, out
        )
        sinks = None if self._sinks is None else self._sinks.to(query.device, non_blocking=True)
        target = query.new_empty((*query.shape[:2], size)) if into is None else into
        first = (suffix[0][:tokens], suffix[1][:tokens])
        rest = (prefix[0].unflatten(0, (pieces, tokens)), prefix[1].unflatten(0, (pieces, tokens)))
        _, lse = merge_parts(first, rest, sinks, target[:tokens])
        if tokens < len(target):
            target[tokens:] = 0
            lse = torch.cat([lse, suffix[1][tokens:]])
        return target, lse
