"""ROCM_FLASH_ATTN: TRITON_ATTN with the prefill of flash-attn's CK build, on AMD's Instinct GPUs.

No AMD GPU has run this here. It is written from the sources of flash-attn 2.8.3, and tested with a
stand-in that checks each argument and computes in flash-attn's conventions.

A prefill is one call of `flash_attn_varlen_func` over keys and values without gaps: those that the
step brings where no request has a past, else copies gathered out of the pages, in the layer's
dtype. So blocks of any size, both layouts and quantized caches will do, and what lies beyond a
request's last key, or behind its window, is not there to be read. Writing, gathering and decoding
are TRITON_ATTN's.

Of flash-attn this is not used:
- its own way through pages, which takes blocks of a multiple of 128 tokens alone;
- its soft cap: CK's functions take the argument and do not look at it;
- its Triton build (FLASH_ATTENTION_TRITON_AMD_ENABLE), which drops window, soft cap and block table
  without a word, and is compiled anew for each longest length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_dispatch.backends.triton.backend import TritonAttnBackend, TritonImpl
from attn_dispatch.backends.triton.operands import OutputBuffers, suits_tma
from attn_dispatch.backends.triton.plan import PrefillPlan, TritonBuilder, TritonMetadata, plan_rows
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import (
    Capabilities,
    MultipleOf,
    OneOf,
    Reason,
    ReasonCode,
    SameAs,
)
from attn_dispatch.interface.impl import AttentionLayer, refuse_features
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "VARLEN_FIELDS",
    "FlashAttnImpl",
    "RocmFlashAttnBackend",
    "VarlenBackend",
    "VarlenBuilder",
    "VarlenImpl",
    "VarlenPlan",
]

#: What CK does not compute together as it is meant here. With causality alone its ALiBi is slope
#: times the key's position: that moves a whole row, which the softmax does not notice and the
#: log-sum-exp does. With a window or without causality it is another one, by the distance on either
#: side, whose slope some releases read before they set it. And some return the log-sum-exp of
#: capped scores scaled as if they were not capped.
_CLASHES = (
    ("alibi", "no causality"),
    ("alibi", "sliding_window"),
    ("alibi", "returns_lse"),
    ("alibi", "logits_soft_cap"),
    ("returns_lse", "logits_soft_cap"),
)


def _clashes(features: AttentionSpec | VarlenImpl, alibi: bool) -> list[tuple[str, str]]:
    """The pairs of _CLASHES that a layer has both of."""
    has = {
        "alibi": alibi,
        "no causality": not features.causal,
        "sliding_window": features.sliding_window is not None,
        "returns_lse": features.returns_lse,
        "logits_soft_cap": features.logits_soft_cap is not None,
    }
    return [pair for pair in _CLASHES if all(has[name] for name in pair)]


@dataclass(kw_only=True)
class VarlenPlan(PrefillPlan):
    """A plan whose requests are one call of a function like flash_attn_varlen_func.

    Attributes:
        tokens: which rows of query and output are theirs.
        keys: which rows of key and value, where none of them has a past.
        cu_seqlens_q: (requests + 1,) int32, where each one's rows begin among those.
        cu_seqlens_k: (requests + 1,) int32, the same for keys.
        max_seqlen_q: the most query tokens of one.
        max_seqlen_k: the most keys of one, or more.
        blind: the rows of the query that see no key, of these requests and of those that have
            none; None if there are no such rows.
    """

    tokens: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    blind: torch.Tensor | None


class VarlenBuilder(TritonBuilder):
    """Lays out prefills for one call over keys and values without gaps."""

    def _prefill(self, batch: AttentionBatch, chosen: list[int]) -> PrefillPlan:
        spec, has_pages = self.spec, batch.block_table is not None
        called = [i for i in chosen if batch.query_lens[i] and batch.seq_lens_list[i]]
        rows = plan_rows(batch, called, 1)
        is_theirs = not (spec.custom_mask or spec.bidirectional_ranges or spec.batch_invariant)
        if not (called and is_theirs) or (has_pages and not self._has_room(rows)):
            return super()._prefill(batch, chosen)
        # The tiles are of all: so TRITON_ATTN's kernel, too, computes what this plan is for.
        tiles = self._tiles(plan_rows(batch, chosen, 1), self.launches.prefill.block_m, self._group)
        plan = self._plan(batch, rows, tiles, has_pages)
        max_seqlen_q, max_seqlen_k = max(rows.query_lens), max(rows.seq_lens)
        if not spec.causal and spec.sliding_window is not None:
            # A window that reaches over the longest request counts as none. With more queries than
            # keys the first queries stand before the keys, and are farther away than that.
            max_seqlen_k = max(max_seqlen_k, max_seqlen_q)
        blind = [row for i in chosen for row in self._blind_rows(batch, i)]
        return VarlenPlan(
            **vars(plan),
            tokens=_rows_of(batch.query_start_list, called, self.device),
            keys=_rows_of(batch.key_starts, called, self.device),
            cu_seqlens_q=_starts(rows.query_lens, self.device),
            cu_seqlens_k=_starts(rows.seq_lens, self.device),
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            blind=torch.tensor(blind, device="cpu").to(self.device) if blind else None,
        )

    def _blind_rows(self, batch: AttentionBatch, request: int) -> range:
        """The rows of the query that are a request's and see no key: its first ones, if any."""
        start, query_len = batch.query_start_list[request], batch.query_lens[request]
        seq_len, window = batch.seq_lens_list[request], self.spec.sliding_window
        if not seq_len:
            return range(start, start + query_len)
        # Where rows are more than keys, the first ones stand before the keys. They see ahead:
        ahead = query_len if window is None else window - 1
        before = query_len - seq_len - (0 if self.spec.causal else ahead)
        return range(start, start + min(query_len, max(0, before)))


def _rows_of(starts: list[int], requests: list[int], device: torch.device) -> slice | torch.Tensor:
    """Which rows are these requests': a slice if they lie together, else an index."""
    spans = [(starts[i], starts[i + 1]) for i in requests]
    if all(end == start for (_, end), (start, _) in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(*span, device="cpu") for span in spans]).to(device)


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    starts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


class VarlenImpl(TritonImpl):
    """Prefills by a function like flash_attn_varlen_func, and the rest as TRITON_ATTN does.

    A subclass sets `backend`, its backend's name; `_function`; and `_options`, what that takes
    beside what all of them take.

    Raises:
        UnsupportedError: it is constructed with sinks, or with what CK does not compute together;
            or called for a quantized output.
    """

    backend: ClassVar[str]
    _function: Callable[..., Any]
    _options: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(self, self.backend, "sinks")
        for one, other in _clashes(self, self.alibi_slopes is not None):
            raise UnsupportedError(
                f"{self.backend} does not support {one} with {other}. get_attn_backend finds one "
                "that does."
            )

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """No: these functions do not quantize."""
        return False

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: TritonMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        is_quantized = output_scale is not None or output_block_scale is not None
        if is_quantized and attn_metadata is not None:
            raise UnsupportedError(
                f"{self.backend} does not quantize its output; TRITON_ATTN does."
            )
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )

    def _prefill(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        query: torch.Tensor,
        source: KVSource,
        out: OutputBuffers,
    ) -> None:
        if not isinstance(plan, VarlenPlan):
            super()._prefill(layer, metadata, plan, query, source, out)
            return
        is_gathered = plan.gathered is not None and source.k is plan.gathered[0]
        keys = slice(None) if is_gathered else plan.keys
        result = self._function(
            _aligned(query[plan.tokens]),
            _aligned(source.k[keys][..., : self.head_size]),
            _aligned(source.v[keys][..., : self.head_size_v]),
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            softmax_scale=abs(self.scale),  # forward took care of the sign
            causal=self.causal,
            window_size=self._window(plan.max_seqlen_k),
            alibi_slopes=None if self.alibi_slopes is None else self._per_head(query)[0],
            **self._options,
        )
        output, lse = result[:2] if self.returns_lse else (result, None)
        # What the function does to rows that see nothing differs: NaN, 0, infinity of either sign.
        out.values[plan.tokens] = output
        if plan.blind is not None:
            out.values[plan.blind] = 0
        if lse is not None:
            out.lse[plan.tokens] = lse.T
            if plan.blind is not None:
                out.lse[plan.blind] = float("-inf")

    def _window(self, longest: int) -> tuple[int, int]:
        """(left, right): how many keys a query sees beside its own, −1 for all."""
        if self.sliding_window is None:
            return -1, -1
        left = min(self.sliding_window - 1, longest)
        return left, 0 if self.causal else left


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its heads do not begin at multiples of 16 bytes: CK loads so."""
    return tensor if suits_tma(tensor) else tensor.clone(memory_format=torch.contiguous_format)


#: What TRITON_ATTN declares, as far as these functions compute it too.
VARLEN_FIELDS = {
    **TritonAttnBackend.capabilities.fields,
    "head_size": MultipleOf(8, largest=256),
    "head_size_v": SameAs("head_size"),
    "dtype": OneOf(torch.bfloat16, torch.float16),
    "alibi": OneOf(True, False),
    "sinks": OneOf(False),
    "custom_mask": OneOf(False),
    "bidirectional_ranges": OneOf(False),
    "output_quant": OneOf(None),
    "batch_invariant": OneOf(False),
}


class VarlenBackend(TritonAttnBackend):
    """What the backends with such a function share; not a backend by itself."""

    #: No AMD GPU has shown what the functions make of NaN.
    propagates_nan = False

    @staticmethod
    def get_builder_cls() -> type[VarlenBuilder]:
        """VarlenBuilder."""
        return VarlenBuilder

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """What CK does not compute together."""
        reasons = super().check_combination(spec, device)
        for one, other in _clashes(spec, bool(spec.alibi)):
            reasons.append(
                Reason(
                    code=ReasonCode.COMBINATION,
                    field=one,
                    asked=f"{one} with {other}",
                    allowed=f"{one} without {other}",
                )
            )
        return reasons


class FlashAttnImpl(VarlenImpl):
    """Prefills by flash_attn.

    Raises:
        UnsupportedError: it is constructed with a feature that the backend does not declare.
        BackendFailure: flash_attn is broken, or runs its Triton build.
    """

    backend = "ROCM_FLASH_ATTN"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(self, self.backend, "logits_soft_cap")
        library = import_library("flash_attn.flash_attn_interface")
        if getattr(library, "USE_TRITON_ROCM", False):
            raise BackendFailure(
                "flash_attn runs its Triton build here, which drops windows and soft caps. Unset "
                "FLASH_ATTENTION_TRITON_AMD_ENABLE, or exclude this backend by -ROCM_FLASH_ATTN."
            )
        self._function = library.flash_attn_varlen_func
        self._options = {"return_attn_probs": self.returns_lse}


class RocmFlashAttnBackend(VarlenBackend):
    """TRITON_ATTN with the prefill of flash-attn's CK build, on AMD's Instinct GPUs."""

    interface_version = 2
    capabilities: ClassVar[Capabilities] = Capabilities(
        # What flash-attn's setup builds for.
        devices=(DeviceMatch(vendor="amd", archs=("gfx90a", "gfx942", "gfx950")),),
        # The last is the module that CK is compiled into, and that the Triton build comes without.
        requires=("triton>=3.6", "flash-attn>=2.8,<3", "flash_attn_2_cuda"),
        **{**VARLEN_FIELDS, "logits_soft_cap": OneOf(None)},
    )

    @staticmethod
    def get_name() -> str:
        """ROCM_FLASH_ATTN."""
        return "ROCM_FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type[FlashAttnImpl]:
        """FlashAttnImpl."""
        return FlashAttnImpl
