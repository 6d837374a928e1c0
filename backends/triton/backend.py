"""TRITON_ATTN: every feature, over the paged cache, in Triton kernels for NVIDIA and AMD GPUs.

`kernels/` has the kernels, `configs/` how they are launched, plan.py how a batch is laid out for
them, and operands.py what they are given.
"""

from __future__ import annotations

import torch

from attn_dispatch.backends.triton.configs import amd
from attn_dispatch.backends.triton.graph_plan import TritonGraphBuilder
from attn_dispatch.backends.triton.impl import GROUPED_HEADS, TritonImpl
from attn_dispatch.backends.triton.plan import (
    TritonMetadata,
)
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import (
    ANY,
    Capabilities,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    Strides,
)
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    KV_CACHE_DTYPES,
    OUTPUT_QUANTS,
    AttentionSpec,
)
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["TritonAttnBackend"]


class TritonAttnBackend(AttentionBackend):
    """Triton kernels for NVIDIA's and AMD's GPUs, compiled on the spot, for nearly every layer."""

    interface_version = 2
    name = "TRITON_ATTN"
    impl_cls = TritonImpl
    builder_cls = TritonGraphBuilder
    metadata_cls = TritonMetadata
    capabilities = Capabilities(
        devices=(
            DeviceMatch(vendor="nvidia", min_capability=(8, 0)),
            DeviceMatch(vendor="amd", archs=amd.ARCHS),
        ),
        requires=("triton>=3.6",),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=Range(1, 512),
        head_size_v=Range(1, 512),
        dtype=OneOf(torch.bfloat16, torch.float16, torch.float32),
        kv_cache_dtype=OneOf(*(name for name in KV_CACHE_DTYPES if name != "float64")),
        kv_scales=OneOf("per_tensor", "per_head"),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        kv_strides=Strides(),
        lengths=OneOf(*LENGTHS),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        window_size=ANY,
        attention_chunk=ANY,
        key_positions=OneOf(True, False),
        logits_soft_cap=ANY,
        alibi=OneOf(True, False, ALIBI_SYMMETRIC),
        sinks=OneOf(True, False),
        kv_sharing=OneOf(True, False),
        custom_mask=OneOf(True, False),
        bidirectional_ranges=OneOf(True, False),
        mla=OneOf(None),
        returns_lse=OneOf(True, False),
        output_quant=OneOf(None, *OUTPUT_QUANTS),
        batch_invariant=OneOf(True, False),
        cuda_graph=OneOf(True, False),
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """Groups of output values lie in one head."""
        found = []
        if spec.output_quant == "fp8_e4m3_group128" and spec.head_size_v not in GROUPED_HEADS:
            asked = f"fp8_e4m3_group128 with head_size_v={spec.head_size_v}"
            allowed = "head_size_v " + ", ".join(map(str, GROUPED_HEADS))
            found.append(("output_quant", asked, allowed))
        code = ReasonCode.COMBINATION
        return [Reason(code=code, field=f, asked=asked, allowed=ok) for f, asked, ok in found]
