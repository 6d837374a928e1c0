"""vLLM's classes, as thin adapters: the backend, the metadata of a step, and one layer's impl.

vLLM imports this module by name, so that everything here may import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vllm.envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.v1.attention import backend as theirs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from attn_dispatch import engines
from attn_dispatch.integrations.vllm import requests
from attn_dispatch.integrations.vllm.private import scales_of
from attn_dispatch.integrations.vllm.requests import NAME, PLUGIN

__all__ = ["AttnDispatchBackend", "AttnDispatchBuilder", "AttnDispatchImpl", "AttnDispatchMetadata"]

#: Kernel block sizes that are tried. A smaller one is possible, but no fast kernel reads it.
_BLOCK_SIZES = (16, 32, 64, 128, 256)

#: Requests of more new tokens go to the kernel for prefills, also if they are verified drafts.
_MAX_DECODE_QUERY_LEN = 16

#: Of vLLM 0.24: the physical order of a layer's cache, and of all layers' in one allocation.
_ORDERS = {
    "NHD": (engines.STRIDE_ORDERS["NHD"], (1, 0, 2, 3, 4, 5)),
    "HND": (engines.STRIDE_ORDERS["HND"], (1, 4, 0, 2, 3, 5)),
    "latents": ((0, 1, 2), (1, 0, 2, 3)),
}

#: What the constructor of a layer's impl is given, by position.
ARGUMENTS = (
    *("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
    *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name"),
)


def _supports(flag: str) -> Any:
    """A method of a backend: whether it accepts a value of a flag, or the flag itself."""

    def supports(cls: type[AttnDispatchBackend], *value: Any, **named: Any) -> bool:
        asked = [*value, *named.values()] or [True]
        return not cls.validate_configuration(**{flag: asked[0]})

    return classmethod(supports)


class AttnDispatchBackend(theirs.AttentionBackend):
    """The backend that `--attention-backend` names. What it supports is what our backends do."""

    forward_includes_kv_cache_update = True
    supported_kv_cache_dtypes: ClassVar[list[str]] = [*requests.CACHES]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enum: CUSTOM in versions that have no added names."""
        return NAME if NAME in AttentionBackendEnum.__members__ else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BoundImpl]:
        """The class of a layer's impl."""
        return AttnDispatchImpl

    @staticmethod
    def get_builder_cls() -> type[AttnDispatchBuilder]:
        """The class that builds the metadata of a step."""
        return AttnDispatchBuilder

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Why no backend computes such layers here; empty if one does.

        vLLM gives everything by name. What this version of the plug-in does not know is rejected.
        """
        asked = {"use_mla": cls.is_mla(), **asked}
        if asked["use_mla"] != cls.is_mla():
            return ["a model that mixes layers with and without latents (MLA) is not wired"]
        try:
            reasons = requests.reasons_of_flags(asked, cls.supported_kv_cache_dtypes)
            return reasons or engines.reasons_against(requests.spec_of_flags(asked))
        except engines.InvalidInputError as error:
            return [str(error)]

    supports_head_size = _supports("head_size")
    supports_dtype = _supports("dtype")
    supports_kv_cache_dtype = _supports("kv_cache_dtype")
    supports_block_size = _supports("block_size")
    supports_attn_type = _supports("attn_type")
    supports_sink = _supports("has_sink")
    supports_sliding_window = _supports("has_sliding_window")
    supports_batch_invariance = _supports("use_batch_invariant")
    supports_device_cpu_query_lens_mismatch = _supports("use_adaptive_verification")

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """The block sizes that a backend takes here."""
        sizes = [size for size in _BLOCK_SIZES if cls.supports_block_size(size)]
        takes_multiples = sizes and cls.supports_block_size(3 * sizes[0])
        return [theirs.MultipleOf(sizes[0])] if takes_multiples else sizes

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: str, **__: str
    ) -> tuple[int, ...]:
        """The logical shape of a cache, for vLLM 0.24."""
        if cls.is_mla():
            return (num_blocks, block_size, head_size)
        return engines.kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)

    @classmethod
    def get_kv_cache_stride_order(
        cls, include_num_layers_dimension: bool = False
    ) -> tuple[int, ...]:
        """The physical order of a cache in the layout that vLLM 0.24 has set."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        layout = "latents" if cls.is_mla() else get_kv_cache_layout()
        return _ORDERS[layout][include_num_layers_dimension]


@dataclass
class AttnDispatchMetadata(theirs.AttentionMetadata):
    """A step for the layers of one group; equal layers share what is planned in `context`."""

    context: engines.ForwardContext
    num_actual_tokens: int
    max_query_len: int


class AttnDispatchBuilder(theirs.AttentionMetadataBuilder):
    """Makes an AttentionBatch of vLLM's metadata. Each layer's backend plans when it first runs."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = vllm_config.compilation_config.static_forward_context
        self._layers = [found[name] for name in layer_names]
        for layer in self._layers:
            layer.impl.vllm_layer = layer  # not every call of an impl is given it
        self._attentions = [layer.impl.attention for layer in self._layers]
        self._metadata: type[AttnDispatchMetadata] = self._layers[0].impl.metadata_class
        self._graphs = engines.DecodeSteps(
            self._attentions,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_seq_len=vllm_config.model_config.max_model_len,
        )
        size, size_v = kv_cache_spec.head_size, getattr(kv_cache_spec, "head_size_v", None)
        asked = f"values of {size_v} elements and keys of {size}, which it does not tell a plug-in"
        # 0: latents, which are keys and values
        PLUGIN.reject({asked: size_v not in (None, 0, size)}, f"layers {layer_names}")
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        self._max_decode_query_len = min(1 + drafts, _MAX_DECODE_QUERY_LEN)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Plain decodes, if each layer's backends can be captured; NEVER with drafts.

        vLLM's drafters change lengths inside of their graphs, and the steps here are copied by the
        host. With NEVER, vLLM captures the pieces between attention layers, which run eagerly.
        """
        found = vllm_config.compilation_config.static_forward_context.values()
        impls = [getattr(layer, "impl", None) for layer in found]
        ours = [impl.attention for impl in impls if isinstance(impl, BoundImpl)]
        if vllm_config.speculative_config is None and ours and all(a.has_graphs for a in ours):
            return theirs.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return theirs.AttentionCGSupport.NEVER

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> AttnDispatchMetadata:
        """The metadata that a decode graph is captured with; `build` copies later steps to it.

        Raises:
            UnsupportedError: requests have more than one new token, or a backend cannot be
                captured.
        """
        num_reqs = int(common_attn_metadata.num_reqs)
        asked = {"more than one new token": int(common_attn_metadata.max_query_len) != 1}
        PLUGIN.reject(asked, "graphs of requests", "Set cudagraph_mode=PIECEWISE.")
        for layer in self._layers:
            layer.impl.bind(layer, layer.kv_cache)
        return self._metadata(self._graphs.capture(num_reqs, warm_up=True), num_reqs, 1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> AttnDispatchMetadata:
        """See AttentionMetadataBuilder.build of vLLM.

        Raises:
            UnsupportedError: the step needs what these layers were not made for.
        """
        batch = requests.batch_of(
            common_attn_metadata,
            self._attentions[0].layer.spec,
            block_size=self.kv_cache_spec.block_size,
            max_decode_query_len=self._max_decode_query_len,
            shared_prefix_len=common_prefix_len,
        )
        num_reqs = int(common_attn_metadata.num_reqs)  # of a graph, if it is padded
        is_decode = int(common_attn_metadata.max_query_len) == 1 and not common_prefix_len
        if is_decode and num_reqs in self._graphs:
            self._graphs.prepare(num_reqs, batch)
        return self._metadata(engines.ForwardContext(batch), batch.num_tokens, batch.max_query_len)

    def use_cascade_attention(self, common_prefix_len: int, query_lens: Any, **_: Any) -> bool:
        """Whether the prefix that all requests share is read once, in vLLM 0.24."""
        step = (common_prefix_len, len(query_lens))
        return all(each.uses_shared_prefix(*step) for each in self._attentions)


class BoundImpl:
    """What the impls of layers have in common: they follow the cache of vLLM's layer.

    Attributes:
        attention: the layer of this library.
        vllm_layer: vLLM's own, once its metadata has a builder.
    """

    metadata_class: ClassVar[type[AttnDispatchMetadata]] = AttnDispatchMetadata
    attention: engines.EngineAttention
    vllm_layer: Any = None
    total_cp_world_size: int

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Nothing: only layers of latent attention have a weight."""

    def read(self, args: Sequence[Any], given: dict[str, Any], known: Any) -> dict[str, Any]:
        """What every kind of layer's constructor is given, as arguments of an `EngineAttention`.

        Args:
            args: by vLLM, in the order of `ARGUMENTS`.
            given: by vLLM, by name; those of args are added to it.
            known: the names that the impl reads itself, in addition to `ARGUMENTS`.

        Raises:
            UnsupportedError: vLLM asks for what the plug-in does not know.
        """
        given |= dict(zip(ARGUMENTS, args, strict=False))
        others = {n: value for n, value in given.items() if n not in (*ARGUMENTS, *known)}
        others["context parallelism"] = self.total_cp_world_size > 1
        flags = {n: value for n, value in given.items() if n in ("kv_cache_dtype", "attn_type")}
        PLUGIN.reject([*PLUGIN.reasons(others), *requests.reasons_of_flags(flags)], "a layer")
        vars(self).update((name, given.get(name)) for name in ARGUMENTS)  # vLLM reads some of them
        config = get_current_vllm_config()
        mode = getattr(config.compilation_config, "cudagraph_mode", None)
        has_drafts = config.speculative_config is not None
        kind = engines.AttentionType(given.get("attn_type", "decoder"))
        cache = given.get("kv_cache_dtype") or "auto"
        return {
            "attn_type": kind.value,
            "sliding_window": given.get("sliding_window"),
            # The host knows the true lengths; bounds of them where drafts are verified.
            "lengths": "upper_bound" if has_drafts and kind.has_kv_cache else "exact",
            "num_heads": given["num_heads"],
            "scale": float(given["scale"]),
            "kv_cache_dtype": requests.FP8_NAMES.get(cache, cache),
            "logits_soft_cap": given.get("logits_soft_cap"),
            "batch_invariant": bool(vllm.envs.VLLM_BATCH_INVARIANT),
            "try_cuda_graph": bool(mode and mode.has_full_cudagraphs()) and not has_drafts,
        }

    def bind(self, layer: Any, kv_cache: torch.Tensor) -> None:
        """Use the cache and the scales that vLLM's layer has now.

        Raises:
            InvalidInputError, UnsupportedError: as for `EngineAttention.follow`.
        """
        if not self.attention.is_bound_to(kv_cache):  # 0.24 does not call it for latents
            self.process_weights_after_loading(self.attention.layer.spec.dtype)
        self.attention.follow(kv_cache, self.view_of, scales_of(layer), layer.layer_name)

    def view_of(self, kv_cache: torch.Tensor) -> engines.KVCache:
        """vLLM's cache as a view of its memory: of latents, or by its version."""
        dtype = self.attention.dtype_of_bytes(kv_cache)
        if kv_cache.dim() == 3:
            return kv_cache.view(dtype or kv_cache.dtype)
        is_older = kv_cache.dim() == 5
        convert = engines.kv_cache_from_vllm_0_24 if is_older else engines.kv_cache_from_vllm
        return convert(kv_cache, self.attention.layer.spec.head_size, dtype=dtype)


class AttnDispatchImpl(BoundImpl, theirs.AttentionImpl):
    """One attention layer of a model.

    Raises:
        UnsupportedError: no backend computes the layer, with the reasons; or vLLM asks for what the
            plug-in does not know.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        arguments = self.read(args, given, ["sinks"])
        names = ("head_size", "num_kv_heads", "alibi_slopes", "kv_sharing_target_layer_name")
        arguments |= {name: given.get(name) for name in (*names, "sinks")}
        self.attention = engines.EngineAttention(
            **arguments,
            # vLLM 0.33 has no cascade attention: it looks no common prefix up.
            try_shared_prefix=hasattr(theirs.AttentionMetadataBuilder, "use_cascade_attention"),
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Whether the output can be fp8 by a static scale; no other quantization is fused."""
        return bool(quant_key == kFp8StaticTensorSym) and self.attention.quantizes_output()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttnDispatchMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionImpl.forward of vLLM. Without metadata, as in profiling, it writes zeros.

        Raises:
            UnsupportedError: there is an output_block_scale, which is for other quantizations.
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        PLUGIN.reject({"output_block_scale": output_block_scale}, "a call of a layer")
        if attn_metadata is None:
            return output.fill_(0)
        self.bind(layer, kv_cache)
        step = attn_metadata.context
        return self.attention.forward(query, key, value, step, output, output_scale)
