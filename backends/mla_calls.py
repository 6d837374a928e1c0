"""Multi-head latent attention by another package's kernel: the calls of a batch, and their frame.

A package takes absorbed queries of some requests over the paged latents (backends/mla_absorbed.py).
What the packages share is here: how a batch is split into calls, what a call must check, and the
rows that see no key, for which each package returns something else.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from attn_dispatch.backends.common import is_aligned
from attn_dispatch.backends.mla_absorbed import AbsorbedMLAImpl
from attn_dispatch.backends.reference.semantics import split_scale
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_parts import select
from attn_dispatch.interface.capability import (
    ANY,
    NOT_NONE,
    Constraint,
    OneOf,
    Reason,
    ReasonCode,
)
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_int32

__all__ = [
    "LATENT_FIELDS",
    "LatentCall",
    "LatentCallsImpl",
    "LatentCallsMetadata",
    "PerPass",
    "check_has_pages",
    "latent_calls",
    "other_cache_dtype",
]

V = TypeVar("V")
M = TypeVar("M", bound="LatentCallsMetadata[Any]")
C = TypeVar("C")

#: What all of these packages compute: DeepSeek's sizes, in 16 bits.
LATENT_FIELDS: dict[str, Constraint] = {
    "num_heads": ANY,
    "num_kv_heads": OneOf(1),
    "head_size": OneOf(576),
    "head_size_v": OneOf(512),
    "dtype": OneOf(torch.bfloat16, torch.float16),
    "kv_cache_dtype": OneOf("auto", "bfloat16", "float16"),
    "kv_cache_layout": OneOf(None, "NHD", "HND"),
    "attn_type": OneOf(AttentionType.DECODER),
    "causal": OneOf(True, False),
    "kv_sharing": OneOf(True, False),
    "mla": NOT_NONE,
    "returns_lse": OneOf(True, False),
    "output_quant": OneOf(None, "fp8_e4m3"),
}


def other_cache_dtype(spec: AttentionSpec) -> list[Reason]:
    """Why a kernel that takes queries and latents of one dtype rejects a layer, if it does."""
    if kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype) == spec.dtype:
        return []
    asked = f"{spec.kv_cache_dtype} with dtype={spec.dtype}"
    allowed = "a cache of the layer's dtype"
    code = ReasonCode.COMBINATION
    return [Reason(code=code, field="kv_cache_dtype", asked=asked, allowed=allowed)]


class PerPass(Generic[V]):
    """A value derived from a batch on the device, which the layers of a step share.

    The first layer that asks has it made. Layers with cuda_graph may be captured, and a replay must
    derive it from the lengths of its own step: so there it is made again when the layer that had it
    made asks again, which is the next pass, and when a capture begins or ends.

    Args:
        make: makes the value, without waiting for the device.
        is_captured: the layers have cuda_graph.
    """

    def __init__(self, make: Callable[[], V], is_captured: bool) -> None:
        self._make, self._is_captured = make, is_captured
        self._made: tuple[V, weakref.ref[Any], bool] | None = None

    def get(self, layer: Any) -> V:
        """The value, for an impl."""
        if not self._is_captured:
            if self._made is None:
                self._made = self._make(), weakref.ref(layer), False
            return self._made[0]
        now = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._made is None or self._made[1]() in (layer, None) or self._made[2] != now:
            self._made = self._make(), weakref.ref(layer), now
        return self._made[0]


@dataclass(eq=False)
class LatentCall(Generic[C]):
    """Requests that one call of the kernel computes.

    Attributes:
        tokens: their rows of query and output.
        batch: the requests. Each has a query token, except in captured steps.
        has_no_keys: (number of their rows,) bool, the rows that see no key; None if the host knows
            that each sees one.
        plan: what the package needs for them.
    """

    tokens: slice | torch.Tensor
    batch: AttentionBatch
    has_no_keys: PerPass[torch.Tensor] | None
    plan: C


@dataclass
class LatentCallsMetadata(BatchMetadata, Generic[C]):
    """The batch, and the calls that compute it.

    Attributes:
        calls: of different requests, in any order.
    """

    calls: list[LatentCall[C]]


def check_has_pages(batch: AttentionBatch) -> None:
    """Check what any of these packages needs of a batch.

    Raises:
        InvalidInputError: it has no block table, or a tensor that is not int32.
    """
    if batch.block_table is None:
        raise InvalidInputError("Multi-head latent attention needs a block_table in the batch.")
    check_int32(batch)


def latent_calls(
    builder: AttentionMetadataBuilder[Any],
    batch: AttentionBatch,
    keys: Sequence[object],
    plan: Callable[[AttentionBatch], C],
) -> list[LatentCall[C]]:
    """The calls of a batch.

    Args:
        builder: of the metadata.
        batch: the step's.
        keys: for each request; those with equal ones share a call, and None is for none. Requests
            that the host knows to have no queries or no keys get none either.
        plan: makes a call's plan, for its requests.
    """
    spec = builder.spec
    groups: dict[object, list[int]] = {}
    for i, (query_len, seq_len) in enumerate(
        zip(batch.query_lens, batch.seq_lens_list, strict=True)
    ):
        # A graph is captured for requests whose lengths are not known yet.
        if keys[i] is not None and (spec.cuda_graph or (query_len and seq_len)):
            groups.setdefault(keys[i], []).append(i)
    calls = []
    for chosen in groups.values():
        part, tokens = _whole(batch)
        if len(chosen) < batch.num_reqs:
            part, tokens = select(batch, chosen)[:2]
        has_no_keys = None
        if spec.cuda_graph or part.lengths != "exact" or _has_rows_without_keys(part, spec):
            has_no_keys = PerPass(_RowsWithoutKeys(part, spec), spec.cuda_graph)
        calls.append(LatentCall(tokens, part, has_no_keys, plan(part)))
    return calls


def _whole(batch: AttentionBatch) -> tuple[AttentionBatch, slice | torch.Tensor]:
    return batch, slice(0, batch.num_tokens)


def _has_rows_without_keys(batch: AttentionBatch, spec: AttentionSpec) -> bool:
    pairs = zip(batch.query_lens, batch.seq_lens_list, strict=True)
    return any(seq < (query if spec.causal else 1) for query, seq in pairs)


@dataclass
class _RowsWithoutKeys:
    """Computes (num_tokens,) bool on the device: which rows see no key, or are of no request."""

    batch: AttentionBatch
    spec: AttentionSpec

    def __call__(self) -> torch.Tensor:
        batch = self.batch
        starts, seq_lens = batch.query_start_loc, batch.seq_lens
        rows = torch.arange(batch.num_tokens, dtype=starts.dtype, device=starts.device)
        # Before which row of the output a request sees nothing. The last of its queries sees all of
        # its keys, and each one before it one key less.
        firsts = starts[1:] - seq_lens
        if not self.spec.causal:
            firsts = torch.where(seq_lens > 0, 0, starts[1:])
        # In a captured step, the rows after those of the requests see nothing either.
        firsts = torch.nn.functional.pad(firsts, (0, 1), value=batch.num_tokens)
        requests = torch.bucketize(rows, starts[1:], right=True)
        return rows < firsts[requests]


class LatentCallsImpl(AbsorbedMLAImpl[M]):
    """Runs the calls of the metadata. A subclass implements `_run`.

    A kernel gets a positive scale: with a negative one it would take the wrong maximum.
    """

    #: The kernel takes scales from about this one on.
    _smallest_scale = 2.0**-60

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._query_factor, self._kernel_scale = split_scale(self.scale, self._smallest_scale)

    @abstractmethod
    def _run(
        self,
        layer: AttentionLayer,
        call: LatentCall[Any],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a call.

        Args:
            layer: carries the scale of an fp8 cache.
            call: which one.
            query: (num_rows, num_heads, 576), absorbed, contiguous, at a multiple of 16 bytes.
            kv_cache: as for `_attend_latents`.

        Returns:
            (num_rows, num_heads, 512) in the query's dtype, which nothing else uses; and
            (num_rows, num_heads) float32, natural log, which may be None without returns_lse.
            Anything for the rows that see no key.
        """

    def _check_latents(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: M,
    ) -> None:
        """Check what was planned before the tensors existed, and what the kernels rely on."""
        spec = metadata.builder.spec
        cache_dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
        for name, found, planned in (
            ("query's dtype", query.dtype, spec.dtype),
            ("kv_cache's dtype", kv_cache.dtype, cache_dtype),
            ("kv_cache's block_size", kv_cache.shape[1], spec.block_size),
        ):
            if found != planned:
                raise InvalidInputError(
                    f"The {name} is {found}, and the layer was described with {planned}, which the "
                    "plan is for. Describe the layer as it is."
                )
        if not is_aligned(kv_cache):
            raise InvalidInputError(
                f"kv_cache has strides {kv_cache.stride()} from address {kv_cache.data_ptr():#x} "
                f"on, and {self.backend_cls.get_name()} loads 16 bytes at a time, at multiples of "
                "16. Make the cache by allocate_kv_cache."
            )

    def _attend_latents(
        self,
        layer: AttentionLayer,
        absorbed: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: M,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See AbsorbedMLAImpl."""
        calls = metadata.calls
        if len(calls) == 1 and calls[0].tokens == slice(0, len(absorbed)):
            return self._computed(layer, calls[0], absorbed, kv_cache)
        mixed = absorbed.new_zeros(*absorbed.shape[:2], self.mla.kv_lora_rank)
        lse = None
        if self.returns_lse:
            lse = mixed.new_full(mixed.shape[:2], -torch.inf, dtype=torch.float32)
        for call in calls:
            rows = absorbed[call.tokens]
            values, found = self._computed(layer, call, rows, kv_cache)
            mixed[call.tokens] = values
            if lse is not None and found is not None:
                lse[call.tokens] = found
        return mixed, lse

    def _computed(
        self,
        layer: AttentionLayer,
        call: LatentCall[Any],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A call's result, with 0 and −inf for the rows that see no key."""
        values, lse = self._run(layer, call, query, kv_cache)
        if call.has_no_keys is not None:
            rows = call.has_no_keys.get(self)[:, None]
            values = values.masked_fill_(rows[..., None], 0)
            lse = None if lse is None else lse.masked_fill(rows, -torch.inf)
        return values, lse if self.returns_lse else None
