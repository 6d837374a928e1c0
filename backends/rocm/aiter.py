"""ROCM_AITER: TRITON_ATTN with AITER's prefill, on AMD's Instinct GPUs from MI300 on.

No AMD GPU has run this here. It is written from the sources of AITER 0.1.20, whose function has had
these arguments since 0.1.10, and tested with a stand-in that checks each argument and computes in
AITER's conventions. AITER compiles a kernel when it is first called, which takes minutes.

A prefill is one call of `flash_attn_varlen_func`, AITER's assembly or CK kernels, over keys and
values without gaps; see `flash_attn.py`. Writing, gathering and decoding are TRITON_ATTN's.

Of AITER this is not used:
- its paged decode (`paged_attention_v1`, `paged_attention_ragged`, `pa_fwd_asm`): it takes a cache
  whose heads are cut into pieces of 16 bytes, which no other backend could share;
- `unified_attention`, which takes this cache: where a tile is a block, it reads a request's last
  block to its end and multiplies what is not the request's by a weight of zero, and NaN times zero
  is NaN. The same goes for what a window has passed. It returns no log-sum-exp;
- its sinks: the assembly kernels, picked for bfloat16 heads of 128, are not given them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attn_dispatch.backends.rocm.flash_attn_ck import VARLEN_FIELDS, VarlenBackend, VarlenImpl
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.capability import (
    AnyOf,
    Capabilities,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    SameAs,
)
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["AiterImpl", "RocmAiterBackend"]

#: Sizes of key and value heads that differ, and have kernels: DeepSeek's, expanded.
_MIXED_SIZES = (192, 128)
#: A window of one token is told to the kernels as 0 keys to the left and 0 to the right, and what
#: picks among them takes that for no window.
_SMALLEST_WINDOW = 2


class AiterImpl(VarlenImpl):
    """Prefills by aiter.

    Raises:
        UnsupportedError: it is constructed with a feature that the backend does not declare.
        BackendFailure: aiter is broken, or runs without CK.
    """

    backend = "ROCM_AITER"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sliding_window is not None and self.sliding_window < _SMALLEST_WINDOW:
            raise UnsupportedError(
                f"{self.backend} does not support sliding_window={self.sliding_window}. "
                "get_attn_backend finds one that does."
            )
        library = import_library("aiter.ops.mha")
        if not getattr(library, "ENABLE_CK", True):
            raise BackendFailure(
                "aiter runs without CK here, and then drops soft caps. Unset ENABLE_CK, or exclude "
                "this backend by -ROCM_AITER."
            )
        self._function = library.flash_attn_varlen_func
        self._options = {
            "return_lse": self.returns_lse,
            "logits_soft_cap": self.logits_soft_cap or 0.0,
        }


class RocmAiterBackend(VarlenBackend):
    """TRITON_ATTN with AITER's prefill, on AMD's Instinct GPUs from MI300 on."""

    interface_version = 2
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=(DeviceMatch(vendor="amd", archs=("gfx942", "gfx950")),),
        requires=("triton>=3.6", "aiter>=0.1.10,<0.2"),
        **{
            **VARLEN_FIELDS,
            "head_size_v": AnyOf(SameAs("head_size"), OneOf(_MIXED_SIZES[1])),
            "sliding_window": AnyOf(OneOf(None), Range(_SMALLEST_WINDOW, math.inf)),
        },
    )

    @staticmethod
    def get_name() -> str:
        """ROCM_AITER."""
        return "ROCM_AITER"

    @staticmethod
    def get_impl_cls() -> type[AiterImpl]:
        """AiterImpl."""
        return AiterImpl

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """What CK does not compute together, and sizes of heads that differ."""
        reasons = super().check_combination(spec, device)
        sizes = (spec.head_size, spec.head_size_v)
        if sizes[0] != sizes[1] and sizes != _MIXED_SIZES:
            reasons.append(
                Reason(
                    code=ReasonCode.COMBINATION,
                    field="head_size_v",
                    asked=f"{sizes[1]} with head_size={sizes[0]}",
                    allowed="the same as head_size; or {1} with head_size={0}".format(
                        *_MIXED_SIZES
                    ),
                )
            )
        return reasons
