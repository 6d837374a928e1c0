"""TRITON_MLA: multi-head latent attention in absorbed form, by the decode kernel of TRITON_ATTN.

In absorbed form (backends/mla.py) it is attention with one KV head: keys of kv_lora_rank +
qk_rope_head_dim elements, whose first kv_lora_rank are the values too. The kernel reads a tile of
latents once for both. Prefills take the same form. Their arithmetic for each pair of a query and a
key is then 2 * kv_lora_rank + qk_rope_head_dim multiplications for each head, where the expanded
form has qk_nope_head_dim + qk_rope_head_dim + v_head_dim: for DeepSeek-V3 1088 and 320. So for long
prompts this is slower than the expanded form would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.backends.mla import ProjectingMLAImpl, latent_cache_shape
from attn_dispatch.backends.reference.semantics import without_autocast
from attn_dispatch.backends.triton.configs import amd
from attn_dispatch.backends.triton.impl import Call, TritonImpl
from attn_dispatch.backends.triton.kv_writer import LatentCacheWriter
from attn_dispatch.backends.triton.launcher import Launchers
from attn_dispatch.backends.triton.mla_plan import MERGE_GROUP, TritonMLABuilder, TritonMLAMetadata
from attn_dispatch.backends.triton.operands import (
    OutputBuffers,
    on_tensor_device,
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
from attn_dispatch.interface.quantization import store_output
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, KV_CACHE_DTYPES, AttentionSpec
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.interface.validation import check_metadata, check_output, profiling_output
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["TritonMLABackend", "TritonMLAImpl"]

#: Sizes for which a tile has no gaps. All released models have 512 and 64, or 256 and 32.
_KV_LORA_RANKS = (64, 128, 256, 512)
_ROPE_HEAD_DIMS = (16, 32, 64, 128)
#: An entry has a latent and a rotated key. One scale for both would be inaccurate.
_KV_CACHE_DTYPES = tuple(
    name for name in KV_CACHE_DTYPES if name not in (INT8_PER_TOKEN_HEAD, "float64")
)


_Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def _product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Store each head's rows of x, (num_tokens, num_heads, K), times its weight, (K, N), in out."""
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))


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


class TritonMLAImpl(ProjectingMLAImpl[TritonMLAMetadata]):
    """Absorbs the projections by batched products, and launches the kernel in between."""

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
        )
        self._writer = LatentCacheWriter(self, self.mla.kv_lora_rank)
        from attn_dispatch.backends.triton.kernels import project

        self._project_kernel = project.project_kernel
        self._launchers = Launchers()

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Static fp8."""
        return quant_key == "fp8_e4m3"

    @without_autocast
    @on_tensor_device
    def forward(
        self,
        layer: AttentionLayer,
        hidden_states_or_cq: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See MLAAttentionImpl.forward."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None:
            return profiling_output(
                self, hidden_states_or_cq, output, *scales, head_size_v=self.mla.v_head_dim
            )
        check_metadata(self, attn_metadata, TritonMLAMetadata)
        batch, mla = attn_metadata.batch, self.mla
        query = self._queries(hidden_states_or_cq)
        k_pe = k_pe.flatten(1) if k_pe.dim() > 2 else k_pe
        self._check(layer, query, kv_c_normed, k_pe, kv_cache, batch)
        query = query.unflatten(1, (self.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        shape = (len(query), self.num_heads, mla.v_head_dim)
        check_output(shape, query, output, *scales)
        cache = self._writer.pages(kv_cache)
        self._writer.write(layer, kv_c_normed[:, None], k_pe[:, None], kv_cache, batch)
        up_k, up_v = self._projections(query.dtype)
        is_invariant = attn_metadata.builder.spec.batch_invariant
        product = self._invariant_product if is_invariant else _product
        absorbed = self._absorbed(query, up_k, product)
        mixed = OutputBuffers.of(self._attention, absorbed, None, None, None)
        call = Call(layer, attn_metadata, absorbed, None, None, cache, mixed)
        self._attention.over_latents(call, attn_metadata.whole)
        expanded = self._expanded(mixed.values, up_v, output, product)
        if output is None:
            output = expanded
        elif output is not expanded:
            store_output(expanded, output, *scales)
        return (output, mixed.lse) if self.returns_lse else output

    def _absorbed(self, query: torch.Tensor, up_k: torch.Tensor, product: _Product) -> torch.Tensor:
        """(num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim), what is compared with keys."""
        factor, mla = self._attention.query_factor, self.mla
        query = query if factor == 1.0 else query * factor
        nope, rotated = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        absorbed = query.new_empty(*query.shape[:2], self.head_size)
        product(nope, up_k, absorbed[..., : mla.kv_lora_rank])
        absorbed[..., mla.kv_lora_rank :] = rotated
        return absorbed

    def _expanded(
        self,
        mixed: torch.Tensor,
        up_v: torch.Tensor,
        output: torch.Tensor | None,
        product: _Product,
    ) -> torch.Tensor:
        """(num_tokens, num_heads, v_head_dim) from latents; in output if its dtype is right."""
        if output is None or output.dtype != mixed.dtype or output.stride(-1) != 1:
            output = mixed.new_empty(*mixed.shape[:2], self.mla.v_head_dim)
        product(mixed, up_v.transpose(1, 2), output)
        return output

    def _invariant_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As _product, and a token's result has the same bits in any batch."""
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
