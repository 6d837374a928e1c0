"""FLASHINFER_MLA: absorbed multi-head latent attention by FlashInfer's FA2 and FA3 kernels.

The wrapper is BatchMLAPagedAttentionWrapper (arXiv:2501.01005 for FlashInfer). It is planned on the
host for a batch and a scale, so the first layer of a batch plans it, and layers with the same scale
share the plan. Queries of any lengths share a call, up to the number of tiles that a plan has room
for. Its log-sum-exp is asked for as a natural logarithm.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.common import index_runs, on_device, start_offsets
from attn_dispatch.backends.cuda.flashinfer.wrappers import WrapperPool, record_event, workspace
from attn_dispatch.backends.mla import latent_cache_shape
from attn_dispatch.backends.mla_calls import (
    LATENT_FIELDS,
    LatentCall,
    LatentCallsImpl,
    LatentCallsMetadata,
    check_has_pages,
    latent_calls,
    other_cache_dtype,
)
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import NOT_NONE, Capabilities, OneOf, Reason, ReasonCode
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.metadata import AttentionMetadataBuilder
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.detect import detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["FlashInferMLABackend", "FlashInferMLABuilder", "FlashInferMLAImpl"]

_HOPPER = DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0))
#: A tile holds whole tokens only with these. With others and a causal mask the kernels of 0.7.2
#: leave out a key at some tile boundaries; the wrapper rejects such batches.
_NUM_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
#: Query rows of the smallest tile.
_TILE_ROWS = 64
#: A plan has room for 16384 work items: tiles, and one more for each part of a split. The parts are
#: fewer than the tiles and the multiprocessors together.
_MAX_TILES = 7168


class _Chunk(NamedTuple):
    """Consecutive query rows of one request: rows [first, end) of the call, and the keys they see.

    The last of the rows is aligned with the last of the keys.
    """

    request: int
    first: int
    end: int
    num_keys: int


def _chunks(batch: AttentionBatch, spec: AttentionSpec) -> Iterator[_Chunk]:
    """All query rows of a batch, cut where a request has more than a plan has room for."""
    longest = _MAX_TILES * _TILE_ROWS // spec.num_heads
    for request, (start, end) in enumerate(itertools.pairwise(batch.query_start_list)):
        for first in range(start, end, longest):
            last = min(first + longest, end)
            num_keys = batch.seq_lens_list[request] - (end - last if spec.causal else 0)
            yield _Chunk(request, first, last, num_keys)


def _plans(batch: AttentionBatch, spec: AttentionSpec) -> Iterator[list[_Chunk]]:
    """The chunks in order, as many together as a plan has room for."""
    plan: list[_Chunk] = []
    tiles = 0
    for chunk in _chunks(batch, spec):
        own = -(-(chunk.end - chunk.first) * spec.num_heads // _TILE_ROWS)
        if plan and tiles + own > _MAX_TILES:
            yield plan
            plan, tiles = [], 0
        plan.append(chunk)
        tiles += own
    if plan:
        yield plan


@functools.cache
def _pool(device: torch.device, kernels: str) -> WrapperPool:
    """The wrappers of a device and a set of kernels."""
    return WrapperPool()


class _Planned:
    """A call's wrappers, each with its rows of the call, planned for each scale when it is needed.

    Args:
        builder: of the metadata.
        batch: the call's requests.
    """

    def __init__(self, builder: FlashInferMLABuilder, batch: AttentionBatch) -> None:
        self._builder, self._batch = builder, batch
        self._by_scale: dict[float, list[tuple[slice, Any]]] = {}

    def at(self, scale: float) -> list[tuple[slice, Any]]:
        """(rows, wrapper) for layers with this scale."""
        if scale not in self._by_scale:
            plans = _plans(self._batch, self._builder.spec)
            self._by_scale[scale] = [
                (slice(plan[0].first, plan[-1].end), self._wrapper(plan, scale)) for plan in plans
            ]
        return self._by_scale[scale]

    def _wrapper(self, plan: list[_Chunk], scale: float) -> Any:
        """A wrapper that is planned for these chunks, on the host, without a wait."""
        builder, spec, table = self._builder, self._builder.spec, self._batch.block_table
        device, library = builder.device, import_library("flashinfer.mla")
        size = spec.block_size
        assert size is not None  # the backend declares it as required
        assert spec.mla is not None
        assert table is not None  # by the builder
        # A chunk whose rows are all before the keys gets one key; its rows are cleared afterwards.
        lens = [max(1, chunk.num_keys) for chunk in plan]
        counts = [-(-keys // size) for keys in lens]
        places, columns = index_runs([0] * len(plan), counts, device)
        requests = on_device([chunk.request for chunk in plan], device, torch.int64)
        query_lens = [chunk.end - chunk.first for chunk in plan]
        wrapper = _pool(device, builder.kernels).take(
            lambda: library.BatchMLAPagedAttentionWrapper(
                workspace(device), backend=builder.kernels
            )
        )
        wrapper.plan(
            metadata=library.MLAPlanMetadata.csr(
                qo_indptr=start_offsets(query_lens),
                kv_indptr=start_offsets(counts),
                kv_indices=table[requests[places], columns],
                kv_len_arr=torch.tensor(lens, dtype=torch.int32, device="cpu"),
            ),
            num_heads=spec.num_heads,
            head_dim_ckv=spec.mla.kv_lora_rank,
            head_dim_kpe=spec.mla.qk_rope_head_dim,
            page_size=size,
            causal=spec.causal and max(query_lens) > 1,
            sm_scale=scale,
            q_data_type=spec.dtype,
            kv_data_type=builder.cache_dtype,
            lse_mode="basee" if spec.returns_lse else "none",
            scale_mode="kv-per-tensor" if is_fp8(builder.cache_dtype) else "default",
        )
        _pool(device, builder.kernels).lend(wrapper, self, record_event(device))
        return wrapper


class FlashInferMLABuilder(AttentionMetadataBuilder[LatentCallsMetadata[_Planned]]):
    """Chooses the kernels, and makes a call for each phase of a batch.

    Raises:
        UnsupportedError: the backend does not declare the layers.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, resolve_device(device))  # wrappers are kept for one device
        self.kernels = "fa3" if _HOPPER.matches(detect_device(self.device)) else "fa2"
        self.cache_dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)

    def build(self, batch: AttentionBatch) -> LatentCallsMetadata[_Planned]:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        check_has_pages(batch)
        metadata: LatentCallsMetadata[_Planned] = LatentCallsMetadata.of(batch, self, calls=[])
        plan = functools.partial(_Planned, self)
        metadata.calls += latent_calls(self, batch, batch.phases, plan)
        return metadata


class FlashInferMLAImpl(LatentCallsImpl[LatentCallsMetadata[_Planned]]):
    """Runs planned wrappers. A Triton kernel writes the cache.

    Raises:
        BackendFailure: FlashInfer or Triton cannot be imported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("flashinfer")

    def _run(
        self,
        layer: AttentionLayer,
        call: LatentCall[_Planned],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See LatentCallsImpl."""
        values = query.new_empty(*query.shape[:2], self.mla.kv_lora_rank)
        lse: torch.Tensor | None = None
        options: dict[str, Any] = {}
        if self.returns_lse:
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
            options = {"return_lse": True, "return_lse_base_on_e": True}
        if is_fp8(kv_cache.dtype):
            scale = layer._k_scale_float
            options |= {"ckv_scale": scale, "kpe_scale": scale}
        for rows, wrapper in call.plan.at(self._kernel_scale):
            if lse is not None:
                options["lse"] = lse[rows]
            wrapper.run(query=query[rows], kv_cache=kv_cache, out=values[rows], **options)
        return values, lse


class FlashInferMLABackend(AttentionBackend):
    """FlashInfer's MLA kernels for DeepSeek's sizes: FA3 on Hopper, FA2 on the other GPUs.

    Its wrapper plans on the host, so it needs exact lengths, and CUDA graphs are not declared. What
    its kernels return for NaN and infinity has not been measured, so that is not declared either.
    """

    interface_version = 2
    name = "FLASHINFER_MLA"
    impl_cls = FlashInferMLAImpl
    builder_cls = FlashInferMLABuilder
    metadata_cls = LatentCallsMetadata
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(8, 0)),),
        requires=("flashinfer>=0.7.2", "triton>=3.6"),
        **{
            **LATENT_FIELDS,
            "num_heads": OneOf(*_NUM_HEADS),
            "kv_cache_dtype": OneOf("auto", "bfloat16", "float16", "fp8", "fp8_e4m3"),
        },
        block_size=NOT_NONE,
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """An fp8 cache needs Hopper's kernels and bfloat16; any other has the layer's dtype."""
        if not is_fp8(kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype)):
            return other_cache_dtype(spec)
        if spec.dtype == torch.bfloat16 and _HOPPER.matches(device):
            return []
        return [
            Reason(
                code=ReasonCode.COMBINATION,
                field="kv_cache_dtype",
                asked=f"{spec.kv_cache_dtype} with dtype={spec.dtype} on {device.arch}",
                allowed="an fp8 cache with bfloat16 on sm90; or a cache of the layer's dtype",
            )
        ]

    get_kv_cache_shape = staticmethod(latent_cache_shape)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
