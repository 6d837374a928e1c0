"""FLASH_ATTN_MLA: absorbed multi-head latent attention by FlashAttention 3.

FlashAttention 3 (arXiv:2407.08608) has an argument for it: queries with two parts, of which `q_v`
is compared with the values, so that latents are loaded once. Queries of any lengths share a call.
Its log-sum-exp is a natural logarithm.

Pages of a multiple of 64 tokens would be loaded by TMA, whole, with what follows a request's last
key, and a NaN there times a weight of zero is NaN. So larger pages are passed as several smaller
ones, which are loaded entry by entry, up to the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from attn_dispatch.backends.mla_calls import (
    LATENT_FIELDS,
    LatentCall,
    LatentCallsImpl,
    LatentCallsMetadata,
    PerPass,
)
from attn_dispatch.backends.mla_packages import PackageMLABackend, PackageMLABuilder
from attn_dispatch.backends.packages import Functions, Package
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, MultipleOf, OneOf
from attn_dispatch.interface.captured import GraphLimits
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.types import LENGTHS
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["FlashAttnMLABackend", "FlashAttnMLABuilder", "FlashAttnMLAImpl"]

#: The sizes of a page that are not loaded by TMA, largest first.
_PAGE_SIZES = (48, 32, 16)


class _Args(NamedTuple):
    """A call of the kernel.

    Attributes:
        batch: its requests.
        rows: the rotated parts of queries and keys, and the latents: (num_rows, num_heads, 64),
            (num_pages, page_size, 1, 64) and (num_pages, page_size, 1, 512).
        q_v: (num_rows, num_heads, 512), compared with the latents.
        table: the page table, (num_reqs, max_pages) int32.
        schedule: the result of get_scheduler_metadata, or None.
        scale: of the scores, positive.
        causal: masks align to the end of the keys.
    """

    batch: AttentionBatch
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    q_v: torch.Tensor
    table: torch.Tensor
    schedule: torch.Tensor | None
    scale: float
    causal: bool


class _Kernel(NamedTuple):
    """A package's functions.

    Attributes:
        attend: computes (output (num_rows, num_heads, 512), lse (num_heads, num_rows)).
        get_schedule: get_scheduler_metadata, if the package has it.
    """

    attend: Callable[[_Args], tuple[torch.Tensor, torch.Tensor]]
    get_schedule: Callable[..., torch.Tensor] | None


def _bind_vllm(functions: Functions) -> _Kernel:
    """vllm.vllm_flash_attn."""
    function = functions["flash_attn_varlen_func"]

    def attend(args: _Args) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = function(
            *args.rows,
            q_v=args.q_v,
            max_seqlen_q=args.batch.max_query_len,
            cu_seqlens_q=args.batch.query_start_loc,
            max_seqlen_k=args.table.shape[1] * args.rows[1].shape[1],
            seqused_k=args.batch.seq_lens,
            block_table=args.table,
            softmax_scale=args.scale,
            causal=args.causal,
            scheduler_metadata=args.schedule,
            return_softmax_lse=True,
            fa_version=3,
        )
        return output, lse

    return _Kernel(attend, functions["get_scheduler_metadata"])


def _bind_upstream(functions: Functions) -> _Kernel:
    """flash_attn_interface and sgl_kernel."""
    function = functions["flash_attn_with_kvcache"]

    def attend(args: _Args) -> tuple[torch.Tensor, torch.Tensor]:
        options = {} if args.schedule is None else {"scheduler_metadata": args.schedule}
        output, lse, *_ = function(
            *args.rows,
            qv=args.q_v,
            cache_seqlens=args.batch.seq_lens,
            page_table=args.table,
            cu_seqlens_q=args.batch.query_start_loc,
            max_seqlen_q=args.batch.max_query_len,
            softmax_scale=args.scale,
            causal=args.causal,
            return_softmax_lse=True,
            **options,
        )
        return output, lse

    return _Kernel(attend, functions.get("get_scheduler_metadata"))


#: In the order in which they are tried.
PACKAGES: tuple[Package[_Kernel], ...] = (
    Package(
        name="vLLM's FlashAttention 3",
        requires=("vllm>=0.11",),
        imports=("vllm.vllm_flash_attn", "vllm.vllm_flash_attn._vllm_fa3_C"),
        functions=("flash_attn_varlen_func",),
        optional=("get_scheduler_metadata",),
        bind=_bind_vllm,
    ),
    Package(
        name="FlashAttention 3",
        requires=("flash_attn_interface",),
        imports=("flash_attn_interface",),
        functions=("flash_attn_with_kvcache",),
        optional=("get_scheduler_metadata",),
        bind=_bind_upstream,
    ),
    Package(
        name="SGLang's FlashAttention 3",
        requires=("sgl_kernel>=0.1",),
        imports=("sgl_kernel.flash_attn",),
        functions=("flash_attn_with_kvcache",),
        bind=_bind_upstream,
    ),
)


class _Plan(NamedTuple):
    """What the layers of a step share in one call.

    Attributes:
        kernel: the package's functions.
        page_size: tokens of a page, as the kernel sees pages.
        shared: the page table, (num_reqs, max_pages) int32, and the result of the package's
            get_scheduler_metadata, or None.
    """

    kernel: _Kernel
    page_size: int
    shared: PerPass[tuple[torch.Tensor, torch.Tensor | None]]


class FlashAttnMLABuilder(PackageMLABuilder[_Kernel, _Plan]):
    """Makes a call for each phase; see PackageMLABuilder."""

    def _groups(self, batch: AttentionBatch) -> Sequence[object]:
        return [p if q else None for p, q in zip(batch.phases, batch.query_lens, strict=True)]

    def build_for_graph(
        self, batch: AttentionBatch, limits: GraphLimits
    ) -> LatentCallsMetadata[_Plan]:
        """See AttentionMetadataBuilder.build_for_graph. Any kind of step is one call."""
        return self._metadata(batch, [0] * batch.num_reqs)

    def _plan(self, batch: AttentionBatch) -> _Plan:
        assert self.spec.block_size is not None  # the backend declares it as required
        size = next(size for size in _PAGE_SIZES if self.spec.block_size % size == 0)
        make = functools.partial(self._shared, batch, size)
        return _Plan(self.kernel, size, PerPass(make, self.spec.cuda_graph))

    def _shared(
        self, batch: AttentionBatch, page_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The page table and the schedule of a call; see _Plan."""
        spec, table = self.spec, batch.block_table
        assert table is not None
        assert spec.block_size is not None
        assert spec.mla is not None
        table = table[:, : max(1, -(-batch.max_seq_len // spec.block_size))]
        pages = spec.block_size // page_size
        if pages > 1:
            parts = torch.arange(pages, dtype=torch.int32, device=table.device)
            table = (table[..., None] * pages + parts).flatten(1)
        if self.kernel.get_schedule is None or spec.cuda_graph:
            return table, None
        # The kernel relies on the arguments of this function, so it gets the same ones.
        schedule = self.kernel.get_schedule(
            batch.num_reqs,
            batch.max_query_len,
            table.shape[1] * page_size,
            spec.num_heads,
            1,
            spec.mla.qk_rope_head_dim,
            batch.seq_lens,
            qkv_dtype=spec.dtype,
            headdim_v=spec.mla.kv_lora_rank,
            cu_seqlens_q=batch.query_start_loc,
            page_size=page_size,
            causal=spec.causal,
        )
        return table, schedule


class FlashAttnMLAImpl(LatentCallsImpl[LatentCallsMetadata[_Plan]]):
    """Calls the metadata's package. A Triton kernel writes the cache."""

    def _check_latents(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LatentCallsMetadata[_Plan],
    ) -> None:
        super()._check_latents(layer, query, kv_cache, metadata)
        blocks, size = kv_cache.shape[:2]
        strides = kv_cache.stride()
        if size > _PAGE_SIZES[0] and blocks > 1 and strides[0] != size * strides[1]:
            raise InvalidInputError(
                f"kv_cache has strides {strides}, with a gap between blocks of {size} tokens. "
                "FLASH_ATTN_MLA passes such blocks as several pages, which must follow each other. "
                "Make the cache by allocate_kv_cache, or with blocks of up to "
                f"{_PAGE_SIZES[0]} tokens."
            )

    def _run(
        self,
        layer: AttentionLayer,
        call: LatentCall[_Plan],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See LatentCallsImpl."""
        rank, size = self.mla.kv_lora_rank, call.plan.page_size
        pages = kv_cache.unflatten(1, (-1, size)).flatten(0, 1)[:, :, None]
        q_v, rotated = query.split([rank, query.shape[-1] - rank], dim=-1)
        table, schedule = call.plan.shared.get(self)
        output, lse = call.plan.kernel.attend(
            _Args(
                batch=call.batch,
                rows=(rotated, pages[..., rank:], pages[..., :rank]),
                q_v=q_v,
                table=table,
                schedule=schedule,
                scale=self._kernel_scale,
                causal=self.causal,
            )
        )
        return output, lse.T.contiguous() if self.returns_lse else None


class FlashAttnMLABackend(PackageMLABackend):
    """FlashAttention 3 with `q_v`, for DeepSeek's sizes on Hopper.

    What it returns for NaN and infinity has not been measured, so that is not declared.
    """

    interface_version = 2
    name = "FLASH_ATTN_MLA"
    packages = PACKAGES
    impl_cls = FlashAttnMLAImpl
    builder_cls = FlashAttnMLABuilder
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        requires=("triton>=3.6",),  # its kernel writes the cache without waiting for the device
        **LATENT_FIELDS,
        block_size=MultipleOf(16),
        lengths=OneOf(*LENGTHS),
        cuda_graph=OneOf(True, False),
    )
