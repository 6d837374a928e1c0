"""FLASHMLA: absorbed multi-head latent attention by FlashMLA's dense kernel, on Hopper.

The kernel takes requests with the same number of query tokens, and pages of 64. So a batch becomes
one call for each number of query tokens: one for decodes or for drafts of one length, and as many
as there are lengths for prompts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from attn_dispatch.backends.cuda.flashmla.packages import PACKAGES
from attn_dispatch.backends.mla import latent_cache_shape
from attn_dispatch.backends.mla_calls import (
    LATENT_FIELDS,
    LatentCall,
    LatentCallsImpl,
    LatentCallsMetadata,
    PerPass,
    check_has_pages,
    latent_calls,
    other_cache_dtype,
)
from attn_dispatch.backends.packages import Package, pick_package, require_package
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, OneOf, Reason
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.metadata import AttentionMetadataBuilder
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import LENGTHS
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile

__all__ = ["FlashMLABackend", "FlashMLABuilder", "FlashMLAImpl"]

#: How a call's requests are split over multiprocessors, in the release's form.
_Schedule = PerPass[Any]


class FlashMLABuilder(AttentionMetadataBuilder[LatentCallsMetadata[_Schedule]]):
    """Picks the package, and makes a call for each number of query tokens.

    Raises:
        UnsupportedError: no package is installed.
        BackendFailure: the package cannot be imported, or has no dense decode kernel.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        package = require_package("FLASHMLA", PACKAGES, detect_device(device))
        self.kernel = package.load("FLASHMLA")

    def build(self, batch: AttentionBatch) -> LatentCallsMetadata[_Schedule]:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        check_has_pages(batch)
        metadata: LatentCallsMetadata[_Schedule] = LatentCallsMetadata.of(batch, self, calls=[])
        metadata.calls += latent_calls(self, batch, batch.query_lens, self._plan)
        return metadata

    def _plan(self, batch: AttentionBatch) -> _Schedule:
        rows = batch.query_lens[0] * self.spec.num_heads
        make = functools.partial(self.kernel.make_schedule, batch.seq_lens, rows)
        return PerPass(make, self.spec.cuda_graph)


class FlashMLAImpl(LatentCallsImpl[LatentCallsMetadata[_Schedule]]):
    """Calls the metadata's package. A Triton kernel writes the cache."""

    def _run(
        self,
        layer: AttentionLayer,
        call: LatentCall[_Schedule],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LatentCallsMetadata[_Schedule],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See LatentCallsImpl."""
        batch = call.batch
        query_len = batch.query_lens[0]
        output, lse = metadata.builder.kernel.attend(
            query.unflatten(0, (-1, query_len)),
            kv_cache[:, :, None],
            batch.block_table,
            batch.seq_lens,
            call.plan.get(self),
            scale=self._kernel_scale,
            causal=self.causal and query_len > 1,
        )
        lse = lse.transpose(1, 2).flatten(0, 1) if self.returns_lse else None
        return output.flatten(0, 1), lse


class FlashMLABackend(AttentionBackend):
    """FlashMLA's dense kernel for DeepSeek's sizes: sgl-flash-mla, flash-mla, or vLLM's build.

    What it returns for NaN and infinity has not been measured, so that is not declared.
    """

    interface_version = 2
    name = "FLASHMLA"
    impl_cls = FlashMLAImpl
    builder_cls = FlashMLABuilder
    metadata_cls = LatentCallsMetadata
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        requires=("triton>=3.6",),  # its kernel writes the cache without waiting for the device
        **LATENT_FIELDS,
        block_size=OneOf(64),
        lengths=OneOf(*LENGTHS),
        cuda_graph=OneOf(True, False),
    )

    @classmethod
    def kernel_provider(cls, spec: AttentionSpec, device: DeviceProfile) -> str:
        """The package."""
        picked = pick_package(PACKAGES, device)
        return picked.name if isinstance(picked, Package) else ""

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """A package must be installed, and the cache have the layer's dtype."""
        picked = pick_package(PACKAGES, device)
        return other_cache_dtype(spec) + ([] if isinstance(picked, Package) else picked)

    get_kv_cache_shape = staticmethod(latent_cache_shape)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        """Unchanged."""
        return 0, 1, 2
