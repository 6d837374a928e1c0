"""Multi-head latent attention (MLA) of vLLM, as thin adapters.

vLLM's layer absorbs the queries of decodes and expands the keys of prefills, around two calls of an
impl: forward_mqa and forward_mha. Here every token goes to forward_mha, whose queries are as the
model made them: `MLAAttention` chooses the form of each request itself, and writes the cache.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.v1.attention import backend as theirs

from attn_dispatch import engines
from attn_dispatch.integrations.vllm import backend
from attn_dispatch.integrations.vllm.requests import CACHES, PLUGIN

__all__ = ["AttnDispatchMLABackend", "AttnDispatchMLAImpl", "AttnDispatchMLAMetadata"]


class AttnDispatchMLABackend(backend.AttnDispatchBackend):
    """The backend of models with latent attention."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [n for n in CACHES if n != "fp8_e5m2"]

    @staticmethod
    def get_impl_cls() -> type[backend.BoundImpl]:
        """The class of a layer's impl."""
        return AttnDispatchMLAImpl

    @classmethod
    def is_mla(cls) -> bool:
        """True."""
        return True


class AttnDispatchMLAMetadata(backend.AttnDispatchMetadata):
    """A step, all of whose tokens vLLM's layer gives to forward_mha, as those of prefills."""

    num_decodes = num_decode_tokens = 0
    num_prefills = 1  # or more
    prefill = decode = None


class AttnDispatchMLAImpl(backend.BoundImpl, theirs.MLAAttentionImpl):
    """One layer of latent attention.

    Raises:
        UnsupportedError: no backend computes the layer, with the reasons; or vLLM asks for what the
            plug-in does not know.
    """

    metadata_class = AttnDispatchMLAMetadata

    def __init__(self, *args: Any, **given: Any) -> None:
        sizes = [field.name for field in dataclasses.fields(engines.MLADims)]
        arguments = self.read(args, given, [*sizes, "q_lora_rank", "qk_head_dim", "kv_b_proj"])
        for name in ("alibi_slopes", "kv_sharing_target_layer_name"):
            PLUGIN.reject({name: given.get(name)}, "a layer of latent attention")
        mla = engines.MLADims(**{name: given[name] for name in sizes})
        self.v_head_dim, self.kv_b_proj = mla.v_head_dim, given["kv_b_proj"]
        rows = given["num_heads"] * (mla.qk_nope_head_dim + mla.v_head_dim)
        # The weight of kv_b_proj, without quantization; on no device until it is loaded.
        weight = torch.empty(rows, mla.kv_lora_rank, device="meta")
        self._loaded = types.SimpleNamespace(weight=weight)
        self.attention = engines.EngineAttention(
            layer_class=engines.MLAAttention, **arguments, mla=mla, kv_b_proj=self._loaded
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the weight over, as it was loaded; a quantized one is dequantized, as in vLLM."""
        self._loaded.weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)

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
        self.bind(self.vllm_layer, self.vllm_layer.kv_cache)
        out, step = output.view(len(output), -1, self.v_head_dim), attn_metadata.context
        self.attention.forward(q, kv_c_normed, k_pe, step, out, output_scale)

    def forward_mqa(self, *given: Any, **more: Any) -> Any:
        """Never called: the metadata has no decodes.

        Raises:
            InvalidInputError: always.
        """
        raise engines.InvalidInputError("vLLM called forward_mqa for metadata without decodes.")
