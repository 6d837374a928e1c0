"""ROCM_FLASH_ATTN: TRITON_ATTN with the prefill of flash-attn's CK build, on AMD Instinct GPUs.

This has not run on an AMD GPU here. It is written from the sources of flash-attn 2.8.3, and tested
with a fake that checks each argument and computes by flash-attn's conventions.

A prefill is one call of `flash_attn_varlen_func` over contiguous keys and values: the given rows if
no request has a past, else copies gathered from the pages, in the layer's dtype. So any block size,
both layouts and quantized caches work, and the kernel cannot read beyond a request's last key or
before its window. TRITON_ATTN writes, gathers and decodes.

Not used of flash-attn:
- its own paged prefill, which takes only block sizes that are multiples of 128;
- its soft cap: CK's functions accept the argument and ignore it;
- its Triton build (FLASH_ATTENTION_TRITON_AMD_ENABLE), which silently drops window, soft cap and
  block table, and is compiled again for each longest length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attn_dispatch.backends.common import aligned, start_offsets, window_sides
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.graph_plan import TritonGraphBuilder
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.operands import KVSource, suits_tma
from attn_dispatch.backends.triton.prefill_plan import KeyGroup, PrefillPlan, plan_rows
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_checks import rows_of
from attn_dispatch.interface.capability import (
    Capabilities,
    MultipleOf,
    OneOf,
    Reason,
    ReasonCode,
    SameAs,
)
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

#: Pairs that CK does not compute as defined here. With causality and no window its ALiBi is slope
#: times the key's position, which shifts a whole row: the softmax stays the same and the
#: log-sum-exp does not. With a window or without causality its ALiBi depends on the distance to
#: either side, and some releases read its slope before they set it. Some return the log-sum-exp of
#: capped scores with the scale of uncapped ones.
_CONFLICTS = (
    ("alibi", "no causality"),
    ("alibi", "sliding_window"),
    ("alibi", "returns_lse"),
    ("alibi", "logits_soft_cap"),
    ("returns_lse", "logits_soft_cap"),
)


def _conflicts(features: AttentionSpec | VarlenImpl, alibi: bool) -> list[tuple[str, str]]:
    """The pairs of _CONFLICTS that a layer has both of."""
    has = {
        "alibi": alibi,
        "no causality": not features.causal,
        "sliding_window": features.sliding_window is not None,
        "returns_lse": features.returns_lse,
        "logits_soft_cap": features.logits_soft_cap is not None,
    }
    return [pair for pair in _CONFLICTS if all(has[name] for name in pair)]


@dataclass(kw_only=True)
class VarlenPlan(PrefillPlan):
    """A plan whose requests are one call of flash_attn_varlen_func.

    Attributes:
        tokens: their rows of query and output.
        keys: their rows of key and value, for requests without a past.
        cu_seqlens_q: (requests + 1,) int32, where each one's rows start among those.
        cu_seqlens_k: (requests + 1,) int32, the same for keys.
        max_seqlen_q: the longest query.
        max_seqlen_k: the most keys of a request, or more.
        rows_without_keys: the query rows that see no key, also of requests without any keys; None
            if there are no such rows.
    """

    tokens: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    rows_without_keys: torch.Tensor | None


class VarlenBuilder(TritonGraphBuilder):
    """Plans prefills as one call over contiguous keys and values.

    In a captured step TRITON_ATTN's own kernel computes them.
    """

    def _prefill(self, batch: AttentionBatch, chosen: list[int], free_bytes: int) -> PrefillPlan:
        called = [i for i in chosen if batch.query_lens[i] and batch.seq_lens_list[i]]
        if not called:
            return super()._prefill(batch, chosen, free_bytes)
        has_pages = batch.block_table is not None
        groups = [KeyGroup(plan_rows(batch, called, 1), gathers=False)]
        if has_pages:
            groups = self._groups(groups[0].rows, free_bytes)
            if not any(each.gathers for each in groups):
                return super()._prefill(batch, chosen, free_bytes)
        if len(groups) == 1:
            return self._varlen_plan(batch, chosen, called, gathers=has_pages)
        whole = self._varlen_plan(batch, chosen, called, gathers=False)
        rest = set(chosen)
        parts: list[PrefillPlan] = []
        for rows, gathers in groups:
            if gathers:
                its = sorted(rows.requests)
                parts.append(self._varlen_plan(batch, its, its, gathers=True))
                rest -= set(its)
        if rest:
            parts.append(super()._prefill(batch, sorted(rest), 0))
        return replace(whole, parts=tuple(each.sharing(whole.buffers) for each in parts))

    def _varlen_plan(
        self, batch: AttentionBatch, chosen: list[int], called: list[int], *, gathers: bool
    ) -> VarlenPlan:
        """The plan for these requests, of which some have queries and keys."""
        spec, rows = self.spec, plan_rows(batch, called, 1)
        # The tiles cover all requests, so TRITON_ATTN's own kernel can run this plan too.
        tiles = self._tiles(plan_rows(batch, chosen, 1), self.launches.prefill.block_m, self._group)
        plan = self._plan(batch, [KeyGroup(rows, gathers)], [tiles], PrefillPlan)
        max_seqlen_q, max_seqlen_k = max(rows.query_lens), max(rows.seq_lens)
        if not spec.causal and spec.sliding_window is not None:
            # A window longer than max_seqlen_k is treated as none. But with more queries than keys
            # the first queries are before the keys, and farther away from the last than that.
            max_seqlen_k = max(max_seqlen_k, max_seqlen_q)
        without_keys = [row for i in chosen for row in self._rows_without_keys(batch, i)]
        return VarlenPlan(
            **vars(plan),
            tokens=_rows_of(batch.query_start_list, called, self.device),
            keys=_rows_of(batch.key_starts, called, self.device),
            cu_seqlens_q=start_offsets(rows.query_lens, self.device),
            cu_seqlens_k=start_offsets(rows.seq_lens, self.device),
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            rows_without_keys=(
                torch.tensor(without_keys, device="cpu").to(self.device) if without_keys else None
            ),
        )

    def _rows_without_keys(self, batch: AttentionBatch, request: int) -> range:
        """The query rows of a request that see no key: its first ones, if any."""
        start, query_len = batch.query_start_list[request], batch.query_lens[request]
        seq_len, window = batch.seq_lens_list[request], self.spec.sliding_window
        if not seq_len:
            return range(start, start + query_len)
        # With more rows than keys, the first rows are before the keys. How far they see ahead:
        ahead = query_len if window is None else window - 1
        before = query_len - seq_len - (0 if self.spec.causal else ahead)
        return range(start, start + min(query_len, max(0, before)))


def _rows_of(starts: list[int], requests: list[int], device: torch.device) -> slice | torch.Tensor:
    """The rows of these requests: a slice if they are contiguous, else an index."""
    if all(starts[i + 1] == starts[j] for i, j in itertools.pairwise(requests)):
        return slice(starts[requests[0]], starts[requests[-1] + 1])
    return rows_of(requests, starts, device)[0]


class VarlenImpl(TritonImpl):
    """Prefills by a function like flash_attn_varlen_func; everything else is TRITON_ATTN's.

    A subclass sets `_function`, and `_options`, the arguments that not all such functions have.

    Raises:
        UnsupportedError: the arguments combine features that CK does not compute together.
    """

    _function: Callable[..., Any]
    _options: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for one, other in _conflicts(self, self.alibi_slopes is not None):
            raise UnsupportedError(
                f"{self.backend_cls.get_name()} does not support {one} with {other}. "
                "get_attn_backend finds one that does."
            )

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """No: these functions do not quantize."""
        return False

    def _prefill(self, call: Call, plan: PrefillPlan, source: KVSource) -> None:
        if not isinstance(plan, VarlenPlan):
            super()._prefill(call, plan, source)
            return
        query, out = call.query, call.out
        is_gathered = source.starts is plan.gathered_start_loc
        keys = slice(None) if is_gathered else plan.keys
        result = self._function(
            aligned(query[plan.tokens], suits_tma),
            aligned(source.k[keys][..., : self.head_size], suits_tma),
            aligned(source.v[keys][..., : self.head_size_v], suits_tma),
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            softmax_scale=abs(self.scale),  # forward has applied the sign to the query
            causal=self.causal,
            window_size=window_sides(self.causal, self.sliding_window, plan.max_seqlen_k),
            alibi_slopes=None if self.alibi_slopes is None else self._per_head(query)[0],
            **self._options,
        )
        output, lse = result[:2] if self.returns_lse else (result, None)
        out.values[plan.tokens] = output
        if lse is not None:
            out.lse[plan.tokens] = lse.T
        # The functions differ in what they return for these rows: NaN, 0, or infinity.
        if plan.rows_without_keys is not None:
            out.values[plan.rows_without_keys] = 0
            if lse is not None:
                out.lse[plan.rows_without_keys] = float("-inf")


#: What TRITON_ATTN declares, limited to what these functions compute too.
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
    "lengths": OneOf("exact"),  # CK's kernel is given the lengths by the host
}


class VarlenBackend(TritonAttnBackend):
    """What the backends with such a function share; not a backend by itself."""

    builder_cls = VarlenBuilder
    #: What the functions do with NaN has not been seen on an AMD GPU.
    propagates_nan = False

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """What CK does not compute together."""
        return super().check_combination(spec, device) + [
            Reason(
                code=ReasonCode.COMBINATION,
                field=one,
                asked=f"{one} with {other}",
                allowed=f"{one} without {other}",
            )
            for one, other in _conflicts(spec, bool(spec.alibi))
        ]


class FlashAttnImpl(VarlenImpl):
    """Prefills by flash_attn.

    Raises:
        UnsupportedError: an argument asks for a feature that the backend does not declare.
        BackendFailure: flash_attn is broken, or runs its Triton build.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        library = import_library("flash_attn.flash_attn_interface")
        if getattr(library, "USE_TRITON_ROCM", False):
            raise BackendFailure(
                "flash_attn runs its Triton build here, which drops windows and soft caps. Unset "
                "FLASH_ATTENTION_TRITON_AMD_ENABLE, or exclude this backend by -ROCM_FLASH_ATTN."
            )
        self._function = library.flash_attn_varlen_func
        self._options = {"return_attn_probs": self.returns_lse}


class RocmFlashAttnBackend(VarlenBackend):
    """TRITON_ATTN with the prefill of flash-attn's CK build, on AMD Instinct GPUs."""

    interface_version = 2
    name = "ROCM_FLASH_ATTN"
    impl_cls = FlashAttnImpl
    capabilities: ClassVar[Capabilities] = Capabilities(
        # What flash-attn's setup builds for.
        devices=(DeviceMatch(vendor="amd", archs=("gfx90a", "gfx942", "gfx950")),),
        # The last is the module that CK is compiled into; the Triton build does not have it.
        requires=("triton>=3.6", "flash-attn>=2.8,<3", "flash_attn_2_cuda"),
        **{**VARLEN_FIELDS, "logits_soft_cap": OneOf(None)},
    )
