"""FLASHINFER: FlashInfer's kernels over the paged cache, for NVIDIA GPUs.

`plan.py` plans a batch for them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from attn_dispatch.backends.common import (
    SMALLEST_SCALE,
    aligned,
    is_aligned,
    on_device,
)
from attn_dispatch.backends.cuda.flashinfer.plan import (
    FlashInferCall,
    FlashInferGraph,
    FlashInferMetadata,
    kernels_for,
    rejected_combinations,
)
from attn_dispatch.backends.triton.kv_writer import KVCacheWriter
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import (
    ANY,
    NOT_NONE,
    Capabilities,
    OneOf,
    Reason,
    SameAs,
    Strides,
)
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.kv_view import KVCache, KVCacheView, keys_and_values
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.unquantized import ForwardArgs, UnquantizedImpl
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["FlashInferBackend", "FlashInferBuilder", "FlashInferImpl", "FlashInferState"]


class FlashInferBuilder(AttentionMetadataBuilder[FlashInferMetadata]):
    """Chooses the kernels of each phase. Planning waits until a layer needs it.

    Raises:
        UnsupportedError: the backend does not declare the layers.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, resolve_device(device))  # wrappers are kept for one device
        self.kernels = kernels_for(spec, detect_device(self.device))

    def build(self, batch: AttentionBatch) -> FlashInferMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata: FlashInferMetadata = FlashInferMetadata.of(batch, self, kernels=self.kernels)
        if batch.block_table is None:
            raise InvalidInputError(
                "The batch has no block_table, and FLASHINFER reads a paged cache. Give "
                "AttentionBatch.create the requests' block_table."
            )
        return metadata

    def build_for_graph(self, batch: AttentionBatch, limits: GraphLimits) -> FlashInferMetadata:
        """See AttentionMetadataBuilder.build_for_graph."""
        metadata = super().build_for_graph(batch, limits)
        metadata.graph = FlashInferGraph(self.spec, self.device, batch)
        return metadata

    def update_for_graph(self, metadata: FlashInferMetadata, batch: AttentionBatch) -> None:
        """See AttentionMetadataBuilder.update_for_graph. Waits for the copies of the last plan."""
        assert metadata.graph is not None  # by build_for_graph
        metadata.graph.plan(batch.seq_lens_list)


class FlashInferImpl(UnquantizedImpl[FlashInferMetadata]):
    """Runs planned wrappers. A Triton kernel writes new keys and values.

    Raises:
        BackendFailure: FlashInfer or Triton cannot be imported.
        UnsupportedError: an argument asks for a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("flashinfer")
        self._writer = KVCacheWriter(self)
        self._scale = max(abs(self.scale), SMALLEST_SCALE)

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        batch: AttentionBatch,
    ) -> None:
        """See AttentionImpl.write_kv."""
        self._writer.write(layer, key, value, kv_cache, batch)

    def _check_call(self, args: ForwardArgs[FlashInferMetadata]) -> None:
        """Check what was planned before the tensors existed, and what the kernels rely on."""
        spec, kv_cache, layer = args.metadata.builder.spec, args.kv_cache, args.layer
        if kv_cache is None:
            raise UnsupportedError("FLASHINFER reads a paged cache; give the call its kv_cache.")
        cache_dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)
        for name, found, planned in (
            ("query's dtype", args.query.dtype, spec.dtype),
            ("kv_cache's dtype", kv_cache.dtype, cache_dtype),
            ("kv_cache's block_size", kv_cache.shape[2], spec.block_size),
        ):
            if found != planned:
                raise InvalidInputError(
                    f"The {name} is {found}, and the layer was described with {planned}, which the "
                    "plan is for. Describe the layer as it is."
                )
        for part in keys_and_values(kv_cache):
            if not is_aligned(part):
                raise InvalidInputError(
                    f"kv_cache has strides {part.stride()} from address {part.data_ptr():#x} on, "
                    "and FLASHINFER loads 16 bytes at a time, at multiples of 16. Make the cache "
                    "by allocate_kv_cache."
                )
        if is_fp8(kv_cache.dtype) and math.isnan(layer._k_scale_float + layer._v_scale_float):
            raise UnsupportedError("FLASHINFER does not take scales per head; TRITON_ATTN does.")

    def _attend(
        self, args: ForwardArgs[FlashInferMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        for call in args.metadata.calls:
            self._run(call, args, output, lse)

    def _run(
        self,
        call: FlashInferCall,
        args: ForwardArgs[FlashInferMetadata],
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Compute the call's rows of output and lse."""
        tokens, query, kv_cache = call.tokens, args.query, args.kv_cache
        assert kv_cache is not None  # by _check_call
        if call.wrapper is None:
            output[tokens] = 0
            if lse is not None:
                lse[tokens] = -torch.inf
            return
        # A negative scale would make the kernel's softmax take the wrong maximum.
        rows = aligned(query[tokens] if self.scale >= 0 else -query[tokens])
        out = output[tokens]  # a view, if these are next to each other
        is_direct = isinstance(tokens, slice) and out.is_contiguous() and is_aligned(out)
        if not is_direct:
            out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        # FlashInfer takes one tensor, or the pair.
        cache = (kv_cache.key, kv_cache.value) if isinstance(kv_cache, KVCacheView) else kv_cache
        run = functools.partial(call.wrapper.run, rows, cache)
        if self.sinks is not None:
            sinks = on_device(self.sinks, query.device, torch.float32).contiguous()
            run(sinks, self._scale, out=out)
        else:
            options: dict[str, Any] = {"q_scale": self._scale, "out": out}
            if is_fp8(kv_cache.dtype):
                options["k_scale"] = args.layer._k_scale_float
                options["v_scale"] = args.layer._v_scale_float
            found = run(return_lse=lse is not None, **options)
            if lse is not None:
                lse[tokens] = found[1] * math.log(2)  # FlashInfer's is in base 2
        if call.has_no_keys is not None:
            out.masked_fill_(call.has_no_keys[:, None, None], 0)
            if lse is not None:
                lse[tokens] = lse[tokens].masked_fill(call.has_no_keys[:, None], -torch.inf)
        if not is_direct:
            output[tokens] = out


class FlashInferState(CommonAttentionState):
    """CommonAttentionState that plans FlashInfer's wrappers before each replay.

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
        # If each phase has its own backend, FlashInfer's part.
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

    FlashInfer has ALiBi, whose slopes it makes itself; custom masks, whose packing waits for the
    device; and batch invariance. None of these is declared. What its kernels return for NaN and
    infinity has not been measured, so that is not declared either.
    """

    interface_version = 2
    name = "FLASHINFER"
    impl_cls = FlashInferImpl
    builder_cls = FlashInferBuilder
    metadata_cls = FlashInferMetadata
    state_cls = FlashInferState
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
        block_size=NOT_NONE,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        kv_strides=Strides(aligned=True, equal=True),
        attn_type=OneOf(AttentionType.DECODER, AttentionType.ENCODER_DECODER),
        causal=OneOf(True, False),
        sliding_window=ANY,
        logits_soft_cap=ANY,
        sinks=OneOf(True, False),
        kv_sharing=OneOf(True, False),
        returns_lse=OneOf(True, False),
        cuda_graph=OneOf(True, False),
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """See plan.rejected_combinations."""
        return rejected_combinations(spec)
