"""TRITON_MLA: multi-head latent attention in absorbed form, by the decode kernel of TRITON_ATTN.

The kernel reads a tile of latents once, for keys and values. Prefills take the same form, which
backends/mla_absorbed.py compares with the other.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.backends.mla import latent_cache_shape
from attn_dispatch.backends.mla_absorbed import AbsorbedMLAImpl, Product, batched_product
from attn_dispatch.backends.triton.configs import amd
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.launcher import Launchers
from attn_dispatch.backends.triton.mla_plan import MERGE_GROUP, TritonMLABuilder, TritonMLAMetadata
from attn_dispatch.backends.triton.operands import (
    OutputBuffers,
    with_contiguous_heads,
)
from attn_dispatch.backends.triton.plan import DecodePlan
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import (
    ANY,
    NOT_NONE,
    Capabilities,
    OneOf,
    Reason,
    ReasonCode,
)
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, KV_CACHE_DTYPES, AttentionSpec
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["TritonMLABackend", "TritonMLAImpl"]

#: Sizes for which a tile has no gaps. All released models have 512 and 64, or 256 and 32.
_KV_LORA_RANKS = (64, 128, 256, 512)
_ROPE_HEAD_DIMS = (16, 32, 64, 128)
#: An entry has a latent and a rotated key. One scale for both would be inaccurate.
_KV_CACHE_DTYPES = tuple(
    name for name in KV_CACHE_DTYPES if name not in (INT8_PER_TOKEN_HEAD, "float64")
)


class _LatentAttention(TritonImpl):
    """TRITON_ATTN's attention of absorbed queries, over latents in the cache already."""

    _merge_group = MERGE_GROUP

    def over_latents(self, call: Call, whole: DecodePlan | None) -> None:
        """Attention of all requests of a call; `whole` as in TritonMLAMetadata."""
        self._attend(call)
        if whole is not None:
            assert call.cache is not None
            self._decode(call, whole, call.cache)

    @property
    def query_factor(self) -> float:
        """The queries are multiplied by this, and the kernels by the rest of the scale."""
        return self._query_factor

    @property
    def numbers(self) -> tuple[int, float, float, float]:
        """The last arguments of every attention kernel: window, scale * log2(e) and so on."""
        return self._numbers


class TritonMLAImpl(AbsorbedMLAImpl[TritonMLAMetadata]):
    """Launches the decode kernel over latents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attention = _LatentAttention(
            self.num_heads,
            self.head_size,
            self.scale,
            1,
            sliding_window=self.sliding_window,
            kv_cache_dtype=self.kv_cache_dtype,
            logits_soft_cap=self.logits_soft_cap,
            head_size_v=self.mla.kv_lora_rank,
            causal=self.causal,
            returns_lse=self.returns_lse,
            key_positions=self.key_positions,
        )
        self._query_factor = self._attention.query_factor
        from attn_dispatch.backends.triton.kernels import project

        self._project_kernel = project.project_kernel
        self._launchers = Launchers()

    def _attend_latents(
        self,
        layer: AttentionLayer,
        absorbed: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMLAMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See AbsorbedMLAImpl."""
        cache = self._writer.pages(kv_cache)
        mixed = OutputBuffers.of(self._attention, absorbed, None, None, None)
        call = Call(layer, metadata, absorbed, None, None, cache, mixed)
        self._attention.over_latents(call, metadata.whole)
        return mixed.values, mixed.lse if self.returns_lse else None

    def _product(self, metadata: TritonMLAMetadata) -> Product:
        """A kernel of its own with batch_invariant."""
        is_invariant = metadata.builder.spec.batch_invariant
        return self._invariant_product if is_invariant else batched_product

    def _invariant_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As batched_product, and a token's result has the same bits in any batch."""
        tokens, heads, size = x.shape
        if not tokens:
            return
        x = with_contiguous_heads(x)
        width, columns = out.shape[-1], 64
        launch = self._launchers.find(
            (size, width, x.dtype),
            self._project_kernel,
            lambda: {"K": size, "N": width, "TOKENS": 16, "BLOCK_K": 64, "BLOCK_N": columns},
        )
        launch(
            (-(-tokens // 16), -(-width // columns), heads),
            x, weight, out, tokens, *x.stride()[:2], *weight.stride(), *out.stride()[:2],
        )  # fmt: skip


class TritonMLABackend(AttentionBackend):
    """Multi-head latent attention in Triton kernels for NVIDIA's and AMD's GPUs."""

    interface_version = 2
    name = "TRITON_MLA"
    impl_cls = TritonMLAImpl
    builder_cls = TritonMLABuilder
    metadata_cls = TritonMLAMetadata
    capabilities = Capabilities(
        devices=(
            DeviceMatch(vendor="nvidia", min_capability=(8, 0)),
            DeviceMatch(vendor="amd", archs=amd.ARCHS),
        ),
        requires=("triton>=3.6",),
        num_heads=ANY,
        num_kv_heads=OneOf(1),
        head_size=ANY,
        head_size_v=OneOf(*_KV_LORA_RANKS),
        dtype=OneOf(torch.bfloat16, torch.float16, torch.float32),
        kv_cache_dtype=OneOf(*_KV_CACHE_DTYPES),
        lengths=OneOf(*LENGTHS),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(AttentionType.DECODER),
        causal=OneOf(True, False),
        sliding_window=ANY,
        key_positions=OneOf(True, False),
        logits_soft_cap=ANY,
        kv_sharing=OneOf(True, False),
        mla=NOT_NONE,
        returns_lse=OneOf(True, False),
        output_quant=OneOf(None, "fp8_e4m3"),
        batch_invariant=OneOf(True, False),
        cuda_graph=OneOf(True, False),
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """The rotated parts must fill a tile."""
        rope = spec.mla.qk_rope_head_dim if spec.mla is not None else None
        if rope is None or rope in _ROPE_HEAD_DIMS:
            return []
        allowed = "qk_rope_head_dim " + ", ".join(map(str, _ROPE_HEAD_DIMS))
        asked = f"qk_rope_head_dim={rope}"
        return [Reason(code=ReasonCode.COMBINATION, field="mla", asked=asked, allowed=allowed)]

    get_kv_cache_shape = staticmethod(latent_cache_shape)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
