"""ROCM_AITER: TRITON_ATTN with AITER's prefill, on AMD Instinct GPUs from MI300 on.

This has not run on an AMD GPU here. It is written from the sources of AITER 0.1.20, whose function
has had these arguments since 0.1.10, and tested with a fake that checks each argument and
computes by AITER's conventions. AITER compiles a kernel on its first call, which takes minutes.

A prefill is one call of `flash_attn_varlen_func`, AITER's assembly or CK kernels, over contiguous
keys and values; see `flash_attn_ck.py`. TRITON_ATTN writes, gathers and decodes.

Not used of AITER:
- its paged decode (`paged_attention_v1`, `paged_attention_ragged`, `pa_fwd_asm`): it needs a cache
  whose heads are split into pieces of 16 bytes, which no other backend could share;
- `unified_attention`, which reads this cache: where a tile is a block, it reads a request's last
  block to its end and multiplies the remainder by zero, and NaN times zero is NaN. It does the same
  with keys before the window. It returns no log-sum-exp;
- its sinks: the assembly kernels, which run for bfloat16 heads of 128, do not receive them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attn_dispatch.backends.rocm.flash_attn_ck import VARLEN_FIELDS, VarlenBackend, VarlenImpl
from attn_dispatch.errors import BackendFailure
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

#: The only head sizes that differ for keys and values and have kernels: DeepSeek's, expanded.
_MIXED_SIZES = (192, 128)
#: A window of one token is 0 keys to the left and 0 to the right, which AITER's kernel selection
#: takes for no window.
_SMALLEST_WINDOW = 2


class AiterImpl(VarlenImpl):
    """Prefills by aiter.

    Raises:
        UnsupportedError: an argument asks for a feature that the backend does not declare.
        BackendFailure: aiter is broken, or runs without CK.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
    """TRITON_ATTN with AITER's prefill, on AMD Instinct GPUs from MI300 on."""

    interface_version = 2
    name = "ROCM_AITER"
    impl_cls = AiterImpl
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=(DeviceMatch(vendor="amd", archs=("gfx942", "gfx950")),),
        requires=("triton>=3.6", "aiter>=0.1.10,<0.2"),
        **{
            **VARLEN_FIELDS,
            "head_size_v": AnyOf(SameAs("head_size"), OneOf(_MIXED_SIZES[1])),
            "sliding_window": AnyOf(OneOf(None), Range(_SMALLEST_WINDOW, math.inf)),
        },
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """What CK does not compute together, and unequal head sizes without a kernel."""
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
