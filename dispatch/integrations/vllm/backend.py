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

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.vllm.batches import batch_of
from attn_dispatch.integrations.vllm.private import scales_of
from attn_dispatch.integrations.vllm.requests import (
    FP8_NAMES,
    MAX_DECODE_QUERY_LEN,
    NAME,
    check_known,
    kv_cache_dtype_of,
    layer_arguments,
    reasons_of_flags,
    spec_of_flags,
)
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.kv_layouts import kv_cache_from_vllm, kv_cache_from_vllm_0_24
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.context import ForwardContext
from attn_dispatch.runtime.engine_attention import DecodeSteps, EngineAttention
from attn_dispatch.selection.resolve import reasons_against

__all__ = ["AttnDispatchBackend", "AttnDispatchBuilder", "AttnDispatchImpl", "AttnDispatchMetadata"]

#: Kernel block sizes that are tried. A smaller one is possible, but no fast kernel reads it.
_BLOCK_SIZES = (16, 32, 64, 128, 256)

#: What the constructor of a layer's impl is given, by position.
ARGUMENTS = (
    *("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
    *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name"),
)

#: From how many keys on, and for how many requests, a shared prefix is read once.
_MIN_PREFIX, _MIN_REQUESTS = 256, 8


def _supports(flag: str) -> Any:
    """A method of a backend: whether it accepts a value of a flag, or the flag itself."""

    def supports(cls: type[AttnDispatchBackend], *value: Any, **named: Any) -> bool:
        asked = [*value, *named.values()] or [True]
        return cls._accepts(**{flag: asked[0]})

    return classmethod(supports)


class AttnDispatchBackend(theirs.AttentionBackend):
    """The backend that `--attention-backend` names. What it supports is what our backends do."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8_NAMES]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enum: CUSTOM in versions that have no added names."""
        return NAME if NAME in AttentionBackendEnum.__members__ else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttnDispatchImpl]:
        """The class of a layer's impl."""
        return AttnDispatchImpl

    @staticmethod
    def get_builder_cls() -> type[AttnDispatchBuilder]:
        """The class that builds the metadata of a step."""
        return AttnDispatchBuilder

    @classmethod
    def validate_configuration(cls, *args: Any, **asked: Any) -> list[str]:
        """Why no backend computes such layers here; empty if one does.

        vLLM gives everything by name. What this version of the plug-in does not know is rejected.
        """
        if args:
            return ["validate_configuration takes its arguments by name"]
        return reasons_of_flags(asked) or reasons_against(spec_of_flags(**asked))

    @classmethod
    def _accepts(cls, **asked: Any) -> bool:
        return not cls.validate_configuration(**asked)

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
        sizes = [size for size in _BLOCK_SIZES if cls._accepts(block_size=size)]
        if sizes and cls._accepts(block_size=3 * sizes[0]):
            return [theirs.MultipleOf(sizes[0])]
        return sizes

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The logical shape of a cache, for vLLM 0.24."""
        return kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The physical order of a cache in the layout that vLLM 0.24 has set."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        layout = get_kv_cache_layout()
        if include_num_layers_dimension:  # of all layers in one allocation, blocks outermost
            return {"NHD": (1, 0, 2, 3, 4, 5), "HND": (1, 4, 0, 2, 3, 5)}[layout]
        return STRIDE_ORDERS[layout]


@dataclass
class AttnDispatchMetadata(theirs.AttentionMetadata):
    """A step for the layers of one group; equal layers share what is planned in `context`."""

    context: ForwardContext
    num_actual_tokens: int
    max_query_len: int


class AttnDispatchBuilder(theirs.AttentionMetadataBuilder):
    """Makes an AttentionBatch of vLLM's metadata. Each layer's backend plans when it first runs."""

    metadata_class: ClassVar[type[AttnDispatchMetadata]] = AttnDispatchMetadata

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = vllm_config.compilation_config.static_forward_context
        self._layers = [found[name] for name in layer_names]
        self._attentions = [layer.impl.attention for layer in self._layers]
        self._graphs: DecodeSteps | None = None
        size, size_v = kv_cache_spec.head_size, getattr(kv_cache_spec, "head_size_v", None)
        if size_v not in (None, 0, size):  # 0: latents, which are keys and values
            raise UnsupportedError(
                f"Layers {layer_names} have values of {size_v} elements and keys of {size}. vLLM "
                "does not tell a plug-in's layers that: use another --attention-backend."
            )
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        self._max_decode_query_len = min(1 + drafts, MAX_DECODE_QUERY_LEN)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Plain decodes, if each layer's backends can be captured; NEVER with drafts.

        vLLM's drafters change lengths inside of their graphs, and the steps here are copied by the
        host. With NEVER, vLLM captures the pieces between attention layers, which run eagerly.
        """
        found = vllm_config.compilation_config.static_forward_context.values()
        found = [layer for layer in found if hasattr(layer, "impl")]
        ours = [layer.impl.attention for layer in found if isinstance(layer.impl, BoundImpl)]
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
        if int(common_attn_metadata.max_query_len) != 1:
            raise UnsupportedError(
                "attn-dispatch's plug-in captures decodes of one new token. Set "
                "cudagraph_mode=PIECEWISE."
            )
        if self._graphs is None:
            for layer in self._layers:
                layer.impl.bind(layer, layer.kv_cache)
            self._graphs = DecodeSteps(
                [layer for each in self._attentions for layer in each.layers],
                max_num_seqs=max(num_reqs, self.vllm_config.scheduler_config.max_num_seqs),
                max_seq_len=self.vllm_config.model_config.max_model_len,
            )
        step = self._graphs.capture(num_reqs)
        for each in self._attentions:
            each.warm_up(step)
        return self.metadata_class(step, num_reqs, 1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> AttnDispatchMetadata:
        """See AttentionMetadataBuilder.build of vLLM.

        Raises:
            UnsupportedError: the step needs what these layers were not made for.
        """
        batch = batch_of(
            common_attn_metadata,
            self._attentions[0].layer.spec,
            block_size=self.kv_cache_spec.block_size,
            max_decode_query_len=self._max_decode_query_len,
            shared_prefix_len=common_prefix_len,
        )
        num_reqs = int(common_attn_metadata.num_reqs)  # of a graph, if it is padded
        is_decode = int(common_attn_metadata.max_query_len) == 1 and not common_prefix_len
        if self._graphs is not None and is_decode and num_reqs in self._graphs:
            self._graphs.prepare(num_reqs, batch)
        return self.metadata_class(ForwardContext(batch), batch.num_tokens, batch.max_query_len)

    def use_cascade_attention(
        self, common_prefix_len: int, query_lens: Sequence[int], **_: Any
    ) -> bool:
        """Whether the prefix that all requests share is read once, in vLLM 0.24."""
        return (
            common_prefix_len >= _MIN_PREFIX
            and len(query_lens) >= _MIN_REQUESTS
            and all(each.shares_prefix for each in self._attentions)
        )


class BoundImpl:
    """What the impls of layers have in common: they follow the cache of vLLM's layer.

    Attributes:
        attention: the layer of this library.
    """

    attention: EngineAttention
    total_cp_world_size: int

    def read(self, given: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
        """What every kind of layer's constructor is given, as arguments of an `EngineAttention`.

        Args:
            given: by vLLM, by the names of `ARGUMENTS` and others.
            known: the others that the impl reads itself.

        Raises:
            UnsupportedError: vLLM asks for what the plug-in does not know.
        """
        known = (*ARGUMENTS, *known)
        check_known(self, {name: value for name, value in given.items() if name not in known})
        for name in ARGUMENTS[:4]:
            setattr(self, name, given[name])
        config = get_current_vllm_config()
        mode = getattr(config.compilation_config, "cudagraph_mode", None)
        has_graphs = mode is not None and mode.has_full_cudagraphs()
        has_drafts = config.speculative_config is not None
        window, attn_type = given.get("sliding_window"), given.get("attn_type", "decoder")
        return {
            **layer_arguments(attn_type, window, has_drafts),
            "num_heads": given["num_heads"],
            "scale": float(given["scale"]),
            "kv_cache_dtype": kv_cache_dtype_of(given.get("kv_cache_dtype")),
            "logits_soft_cap": given.get("logits_soft_cap"),
            "batch_invariant": bool(vllm.envs.VLLM_BATCH_INVARIANT),
            "try_cuda_graph": has_graphs and not has_drafts,
        }

    def bind(self, layer: Any, kv_cache: torch.Tensor) -> None:
        """Use the cache and the scales that vLLM's layer has now.

        Raises:
            InvalidInputError, UnsupportedError: as for `bind_kv_caches`.
        """
        attention, spec = self.attention, self.attention.layer.spec
        if not AttentionType(spec.attn_type).has_kv_cache:
            return
        attention.set_scales(*self.scales_of(layer))
        if attention.is_bound_to(kv_cache):
            return
        dtype = None
        if kv_cache.dtype == torch.uint8:
            arch = detect_device(kv_cache.device).arch
            dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)
        attention.bind(self.view_of(kv_cache, dtype), kv_cache, layer.layer_name)

    def scales_of(self, layer: Any) -> tuple[float, float]:
        """The scales of keys and of values."""
        k_scale, v_scale = scales_of(layer)
        return k_scale, v_scale

    def view_of(self, kv_cache: torch.Tensor, dtype: torch.dtype | None) -> KVCache:
        """vLLM's cache as a view of its memory; bytes as dtype."""
        convert = kv_cache_from_vllm_0_24 if kv_cache.dim() == 5 else kv_cache_from_vllm
        return convert(kv_cache, self.attention.layer.spec.head_size, dtype=dtype)


class AttnDispatchImpl(BoundImpl, theirs.AttentionImpl):
    """One attention layer of a model.

    Raises:
        UnsupportedError: no backend computes the layer, with the reasons; or vLLM asks for what the
            plug-in does not know.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        given |= dict(zip(ARGUMENTS, args, strict=False))
        given.setdefault("num_kv_heads", given["num_heads"])
        self.attention = EngineAttention(
            **self.read(given, ["sinks"]),
            head_size=given["head_size"],
            num_kv_heads=given["num_kv_heads"],
            alibi_slopes=given.get("alibi_slopes"),
            kv_sharing_target_layer_name=given.get("kv_sharing_target_layer_name"),
            sinks=given.get("sinks"),
            # vLLM 0.33 has no cascade attention: it looks no common prefix up.
            try_shared_prefix=hasattr(theirs.AttentionMetadataBuilder, "use_cascade_attention"),
        )
        self.kv_cache_dtype = given.get("kv_cache_dtype")
        self.kv_sharing_target_layer_name = given.get("kv_sharing_target_layer_name")

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
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        if output_block_scale is not None:
            raise InvalidInputError(
                "output_block_scale was given, and fused_output_quant_supported rejects outputs "
                "with a scale for each block."
            )
        if attn_metadata is None:
            return output.fill_(0)
        self.bind(layer, kv_cache)
        self.attention.forward(query, key, value, attn_metadata.context, output, output_scale)
        return output
