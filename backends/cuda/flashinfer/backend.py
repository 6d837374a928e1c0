"""FLASHINFER: FlashInfer's kernels over the paged cache, for NVIDIA's GPUs.

How a batch is planned for them is in `flashinfer_plan.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from attn_dispatch.backends.cuda.flashinfer.plan import (
    FlashInferCall,
    FlashInferGraph,
    FlashInferMetadata,
    kernels_for,
    refused_combinations,
)
from attn_dispatch.backends.cuda.torch_varlen import SMALLEST_SCALE, is_loadable, loadable
from attn_dispatch.backends.triton.backend import TritonImpl
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend, refuse_spec
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import ANY, GIVEN, Capabilities, OneOf, Reason, SameAs
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer, refuse_features
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["FlashInferBackend", "FlashInferBuilder", "FlashInferImpl", "FlashInferState"]


class FlashInferBuilder(AttentionMetadataBuilder[FlashInferMetadata]):
    """Settles which kernels are whose; the planning waits until a layer asks for it.

    Raises:
        UnsupportedError: the layers are not what the backend declares.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, resolve_device(device))  # wrappers are kept for one device
        profile = detect_device(self.device)
        refuse_spec(FlashInferBackend, spec, profile)
        self.kernels = kernels_for(spec, profile)

    def build(self, batch: AttentionBatch) -> FlashInferMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata: FlashInferMetadata = FlashInferMetadata.of(batch, self, kernels=self.kernels)
        if batch.block_table is None:
            raise InvalidInputError(
                "The batch has no block_table, and FLASHINFER reads a paged cache. Give "
                "AttentionBatch.create the requests' block_table."
            )
        return metadata


class FlashInferImpl(AttentionImpl[FlashInferMetadata]):
    """Runs planned wrappers; new keys and values are written by TRITON_ATTN's kernel.

    Raises:
        BackendFailure: FlashInfer or Triton cannot be imported.
        UnsupportedError: it is constructed with a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(self, "FLASHINFER", "alibi_slopes")
        import_library("flashinfer")
        self._writer = TritonImpl(*args, **kwargs)
        self._scale = max(abs(self.scale), SMALLEST_SCALE)

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        self._writer.write_kv(layer, key, value, kv_cache, batch)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: FlashInferMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, FlashInferMetadata)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("FLASHINFER does not quantize its output; TRITON_ATTN does.")
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        if kv_cache is None:
            raise UnsupportedError("FLASHINFER reads a paged cache; give the call its kv_cache.")
        _check_plan(attn_metadata.builder.spec, layer, query, kv_cache)
        if key is not None and value is not None:
            self.write_kv(layer, key, value, kv_cache, batch)
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if output.shape[0] > batch.num_tokens:  # rows that are no request's
            output[batch.num_tokens :] = 0
        lse = None
        if self.returns_lse:
            lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
        for call in attn_metadata.calls:
            self._run(call, layer, query, kv_cache, output, lse)
        return output if lse is None else (output, lse)

    def _run(
        self,
        call: FlashInferCall,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Compute the call's rows of output and lse."""
        tokens = call.tokens
        if call.wrapper is None:
            output[tokens] = 0
            return
        # A negative scale would make the smallest score the largest in the kernel's softmax.
        rows = loadable(query[tokens] if self.scale >= 0 else -query[tokens])
        out = output[tokens]  # a view, if these are next to each other
        is_direct = isinstance(tokens, slice) and out.is_contiguous() and is_loadable(out)
        if not is_direct:
            out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        run = functools.partial(call.wrapper.run, rows, kv_cache)
        if self.sinks is not None:
            sinks = self.sinks.to(query.device, torch.float32).contiguous()
            run(sinks, self._scale, out=out)
        else:
            options: dict[str, Any] = {"q_scale": self._scale, "out": out}
            if is_fp8(kv_cache.dtype):
                options["k_scale"] = layer._k_scale_float
                options["v_scale"] = layer._v_scale_float
            found = run(return_lse=lse is not None, **options)
            if lse is not None:
                lse[tokens] = found[1] * math.log(2)  # it comes in base 2
        if call.blind is not None:
            out.masked_fill_(call.blind[:, None, None], 0)
            if lse is not None:
                lse[tokens] = lse[tokens].masked_fill(call.blind[:, None], -torch.inf)
        if not is_direct:
            output[tokens] = out


def _check_plan(
    spec: AttentionSpec, layer: AttentionLayer, query: torch.Tensor, kv_cache: torch.Tensor
) -> None:
    """Check what is planned before the tensors are there, and what the kernels count on."""
    stored = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
    for name, found, planned in (
        ("query's dtype", query.dtype, spec.dtype),
        ("kv_cache's dtype", kv_cache.dtype, stored),
        ("kv_cache's block_size", kv_cache.shape[2], spec.block_size),
    ):
        if found != planned:
            raise InvalidInputError(
                f"The {name} is {found}, and the layer was described with {planned}, which is "
                "planned for. Describe the layer as it is."
            )
    if not is_loadable(kv_cache):
        raise InvalidInputError(
            f"kv_cache has strides {kv_cache.stride()} from address {kv_cache.data_ptr():#x} on, "
            "and FLASHINFER loads 16 bytes at a time, at multiples of 16. Make the cache by "
            "allocate_kv_cache."
        )
    if is_fp8(kv_cache.dtype) and math.isnan(layer._k_scale_float + layer._v_scale_float):
        raise UnsupportedError("FLASHINFER does not take scales per head; TRITON_ATTN does.")


class FlashInferState(CommonAttentionState):
    """CommonAttentionState, which plans FlashInfer's wrappers before each replay.

    Args:
        runner: the engine that owns the state.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        #: batch size -> what its graph captured.
        self._graphs: dict[int, FlashInferGraph] = {}

    def graph_clone(self, batch_size: int) -> FlashInferState:
        """See AttentionState.graph_clone."""
        clone = super().graph_clone(batch_size)
        assert isinstance(clone, FlashInferState)
        clone._graphs = self._graphs
        return clone

    def graph_capture_get_metadata_for_batch(
        self, batch_size: int, is_encoder_decoder_model: bool = False
    ) -> BatchMetadata:
        """See AttentionState.graph_capture_get_metadata_for_batch."""
        metadata = super().graph_capture_get_metadata_for_batch(
            batch_size, is_encoder_decoder_model
        )
        # Where the phases have backends of their own, the part that is FlashInfer's.
        own = metadata.decode_metadata or metadata.prefill_metadata
        if isinstance(own, FlashInferMetadata):
            own.graph = FlashInferGraph(own.builder.spec, own.builder.device, own.batch)
            self._graphs[batch_size] = own.graph
        return metadata

    def prepare_graph_input_buffers(
        self,
        input_buffers: dict[str, torch.Tensor],
        attn_metadata: BatchMetadata,
        is_encoder_decoder_model: bool = False,
    ) -> None:
        """See AttentionState.prepare_graph_input_buffers."""
        super().prepare_graph_input_buffers(input_buffers, attn_metadata, is_encoder_decoder_model)
        graph = self._graphs.get(len(input_buffers["seq_lens"]))
        if graph is not None:
            graph.plan(attn_metadata.batch.seq_lens_list)


class FlashInferBackend(AttentionBackend):
    """FlashInfer's FA2 and FA3 kernels over pages.

    Not declared, though FlashInfer has something of the name: ALiBi, whose slopes it makes itself;
    custom masks, whose packing waits for the device; batch invariance. What its kernels make of NaN
    and infinity has not been measured, so it is not declared either.
    """

    interface_version = 2
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(8, 0)),),
        requires=("flashinfer>=0.7.2", "triton>=3.6"),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=OneOf(64, 128, 256),
        head_size_v=SameAs("head_size"),
        dtype=OneOf(torch.bfloat16, torch.float16),
        kv_cache_dtype=OneOf("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
        block_size=GIVEN,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(AttentionType.DECODER, AttentionType.ENCODER_DECODER),
        causal=OneOf(True, False),
        sliding_window=ANY,
        logits_soft_cap=ANY,
        sinks=OneOf(True, False),
        kv_sharing=OneOf(True, False),
        returns_lse=OneOf(True, False),
        cuda_graph=OneOf(True, False),
    )

    @staticmethod
    def get_name() -> str:
        """FLASHINFER."""
        return "FLASHINFER"

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        """FlashInferImpl."""
        return FlashInferImpl

    @staticmethod
    def get_metadata_cls() -> type[FlashInferMetadata]:
        """FlashInferMetadata."""
        return FlashInferMetadata

    @staticmethod
    def get_builder_cls() -> type[FlashInferBuilder]:
        """FlashInferBuilder."""
        return FlashInferBuilder

    @staticmethod
    def get_state_cls() -> type[FlashInferState]:
        """FlashInferState."""
        return FlashInferState

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """See flashinfer_plan.refused_combinations."""
        return refused_combinations(spec)
