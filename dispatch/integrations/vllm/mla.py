"""Multi-head latent attention (MLA) of vLLM, as thin adapters.

vLLM's layer absorbs the queries of decodes and expands the keys of prefills, around two calls of an
impl: forward_mqa and forward_mha. Here every token goes to forward_mha, whose queries are as the
model made them: `MLAAttention` chooses the form of each request itself, and writes the cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.v1.attention import backend as theirs

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.integrations.vllm.backend import (
    ARGUMENTS,
    AttnDispatchBackend,
    AttnDispatchBuilder,
    AttnDispatchMetadata,
    BoundImpl,
)
from attn_dispatch.integrations.vllm.requests import check_known, reasons_of_flags, spec_of_flags
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.spec import MLADims
from attn_dispatch.runtime.engine_attention import EngineAttention
from attn_dispatch.runtime.mla_layer import MLAAttention
from attn_dispatch.selection.resolve import reasons_against

__all__ = [
    "AttnDispatchMLABackend",
    "AttnDispatchMLABuilder",
    "AttnDispatchMLAImpl",
    "AttnDispatchMLAMetadata",
]


class AttnDispatchMLABackend(AttnDispatchBackend):
    """The backend of models with latent attention."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        *("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")
    ]

    @staticmethod
    def get_impl_cls() -> type[AttnDispatchMLAImpl]:
        """The class of a layer's impl."""
        return AttnDispatchMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AttnDispatchMLABuilder]:
        """The class that builds the metadata of a step."""
        return AttnDispatchMLABuilder

    @classmethod
    def is_mla(cls) -> bool:
        """True."""
        return True

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Why no backend computes such layers here; empty if one does."""
        asked = {"use_mla": True, **asked}
        if not asked["use_mla"]:
            return ["a layer without latents in a model with latent attention (MLA) is not wired"]
        if asked.get("kv_cache_dtype") not in (None, *cls.supported_kv_cache_dtypes):
            return [f"vLLM has no latents of {asked['kv_cache_dtype']}"]
        try:
            reasons = reasons_of_flags({**asked, "use_mla": False})
            return reasons or reasons_against(spec_of_flags(**asked))
        except InvalidInputError as error:
            return [str(error)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The shape of a cache of latents, for vLLM 0.24."""
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The physical order of a cache; blocks outermost if it is that of all layers."""
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)


class AttnDispatchMLAMetadata(AttnDispatchMetadata):
    """A step, all of whose tokens vLLM's layer gives to forward_mha, as those of prefills."""

    num_decodes = num_decode_tokens = 0
    num_prefills = 1  # or more
    prefill = decode = None


class AttnDispatchMLABuilder(AttnDispatchBuilder):
    """Makes an AttentionBatch of vLLM's metadata, for layers of latent attention."""

    metadata_class = AttnDispatchMLAMetadata

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        for layer in self._layers:
            layer.impl.vllm_layer = layer  # forward_mha is not given it


class _LoadedWeight:
    """The weight of vLLM's kv_b_proj, without quantization; on no device until it is loaded."""

    def __init__(self, rows: int, columns: int) -> None:
        self.weight = torch.empty(rows, columns, device="meta")


class AttnDispatchMLAImpl(BoundImpl, theirs.MLAAttentionImpl):
    """One layer of latent attention.

    Raises:
        UnsupportedError: no backend computes the layer, with the reasons; or vLLM asks for what the
            plug-in does not know.
    """

    vllm_layer: Any = None

    def __init__(self, *args: Any, **given: Any) -> None:
        given |= dict(zip(ARGUMENTS, args, strict=False))
        sizes = [field.name for field in dataclasses.fields(MLADims)]
        arguments = self.read(given, [*sizes, "q_lora_rank", "qk_head_dim", "kv_b_proj"])
        for name in ("alibi_slopes", "kv_sharing_target_layer_name"):
            check_known(self, {name: given.get(name)})
        mla = MLADims(**{name: given[name] for name in sizes})
        self.v_head_dim, self.kv_b_proj = mla.v_head_dim, given["kv_b_proj"]
        rows = self.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self._weight = _LoadedWeight(rows, mla.kv_lora_rank)
        self.attention = EngineAttention(
            layer_class=MLAAttention, **arguments, mla=mla, kv_b_proj=self._weight
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the weight over, as it was loaded; a quantized one is dequantized, as in vLLM."""
        self._weight.weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)

    def do_kv_cache_update(self, *given: Any, **more: Any) -> None:
        """Nothing: forward_mha writes the new latents."""

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: AttnDispatchMLAMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Write the new latents and attend, for every token of a step.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        self.bind(self.vllm_layer, self.vllm_layer.kv_cache)  # given a new view of an fp8 cache
        out = output.view(-1, self.num_heads, self.v_head_dim)
        self.attention.forward(q, kv_c_normed, k_pe, attn_metadata.context, out, output_scale)

    def bind(self, layer: Any, kv_cache: torch.Tensor) -> None:
        """Use the cache, the scales and the weight that vLLM's layer has now."""
        if not self.attention.is_bound_to(kv_cache):  # 0.24 does not call it
            self.process_weights_after_loading(self.attention.layer.spec.dtype)
        super().bind(layer, kv_cache)

    def scales_of(self, layer: Any) -> tuple[float, float]:
        """One scale: the entries are keys and values."""
        k_scale, _ = super().scales_of(layer)
        return k_scale, k_scale

    def view_of(self, kv_cache: torch.Tensor, dtype: torch.dtype | None) -> KVCache:
        """vLLM's cache; bytes as dtype."""
        return kv_cache if dtype is None else kv_cache.view(dtype)

    def forward_mqa(self, *given: Any, **more: Any) -> Any:
        """Never called: the metadata has no decodes.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            "vLLM called forward_mqa, for metadata that attn-dispatch did not make."
        )
