"""The packages that contain FlashMLA's dense decode kernel, and how each is called.

Releases differ in who plans the split of requests over multiprocessors. Until 2025 the caller did,
by `get_mla_metadata(lengths, rows, heads)`. Since then `get_mla_metadata()` returns an empty
schedule, which the first call fills, on the device. The release of 2026-09-30 has no dense decode;
SGLang's fork kept it, behind `use_legacy`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.packages import Functions, Package
from attn_dispatch.errors import BackendFailure

__all__ = ["PACKAGES", "Kernel"]

#: The size of the values.
_HEAD_SIZE_V = 512


class Kernel(NamedTuple):
    """A release's functions.

    Attributes:
        make_schedule: makes what the layers of a step share, from (num_reqs,) int32 key counts on
            the device, and query rows per request, heads counted.
        attend: computes (output (num_reqs, query_len, num_heads, 512), lse (num_reqs, num_heads,
            query_len) float32, natural log) from the queries (num_reqs, query_len, num_heads, 576),
            the cache (num_blocks, 64, 1, 576), block table, key counts, schedule, scale, causal.
    """

    make_schedule: Callable[[torch.Tensor, int], Any]
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _bind(functions: Functions) -> Kernel:
    """The kernel by the release's signatures.

    Raises:
        BackendFailure: the release has no dense decode kernel.
    """
    get_metadata = functions["get_mla_metadata"]
    function = functions["flash_mla_with_kvcache"]
    arguments = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    has_legacy = functions.get("has_legacy")
    if "use_legacy" in arguments:
        options["use_legacy"] = True
        if has_legacy is not None and not has_legacy():
            raise BackendFailure("flash_mla was built without its kernels for Hopper.")
    elif "enable_batch_invariant" in arguments:
        raise BackendFailure(
            "This release of flash_mla has no dense decode kernel. Install sgl-flash-mla, or a "
            "release before 2026-09-30."
        )
    plans_itself = _takes_no_arguments(get_metadata)

    def make_schedule(seq_lens: torch.Tensor, rows: int) -> Any:
        if plans_itself:
            return get_metadata()[0], None
        return get_metadata(seq_lens, rows, 1)

    def attend(
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        seq_lens: torch.Tensor,
        schedule: Any,
        *,
        scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = function(
            query,
            cache,
            table,
            seq_lens,
            _HEAD_SIZE_V,
            *schedule,
            softmax_scale=scale,
            causal=causal,
            **options,
        )
        return output, lse

    return Kernel(make_schedule, attend)


def _takes_no_arguments(function: Any) -> bool:
    kinds = inspect.Parameter
    required = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    return not any(p.kind in required for p in inspect.signature(function).parameters.values())


#: In the order in which they are tried.
PACKAGES: tuple[Package[Kernel], ...] = (
    Package(
        name="FlashMLA",  # SGLang's fork, or DeepSeek's
        requires=("flash_mla",),
        imports=("flash_mla",),
        functions=("get_mla_metadata", "flash_mla_with_kvcache"),
        optional=("has_legacy",),
        bind=_bind,
    ),
    Package(
        name="vLLM's FlashMLA",
        requires=("vllm>=0.24",),
        imports=("vllm.third_party.flashmla.flash_mla_interface", "vllm._flashmla_C"),
        functions=("get_mla_metadata", "flash_mla_with_kvcache"),
        bind=_bind,
    ),
)
