"""FLASHMLA: absorbed multi-head latent attention by FlashMLA's dense kernel, on Hopper.

The kernel takes requests with the same number of query tokens, and pages of 64. So a batch becomes
one call for each number of query tokens: one for decodes or for drafts of one length, and as many
as there are lengths for prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attn_dispatch.backends.cuda.flashmla.packages import PACKAGES, Kernel
from attn_dispatch.backends.mla_calls import (
    LATENT_FIELDS,
    LatentCall,
    LatentCallsImpl,
    LatentCallsMetadata,
    PerPass,
)
from attn_dispatch.backends.mla_packages import PackageMLABackend, PackageMLABuilder
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities, OneOf
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.types import LENGTHS
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["FlashMLABackend", "FlashMLABuilder", "FlashMLAImpl"]


class _Plan(NamedTuple):
    """What the layers of a step share in one call.

    Attributes:
        kernel: the package's functions.
        schedule: how the requests are split over multiprocessors, in the release's form.
    """

    kernel: Kernel
    schedule: PerPass[Any]


class FlashMLABuilder(PackageMLABuilder[Kernel, _Plan]):
    """Makes a call for each number of query tokens; see PackageMLABuilder."""

    def _groups(self, batch: AttentionBatch) -> Sequence[object]:
        return [query_len or None for query_len in batch.query_lens]

    def _plan(self, batch: AttentionBatch) -> _Plan:
        rows = batch.query_lens[0] * self.spec.num_heads
        make = functools.partial(self.kernel.make_schedule, batch.seq_lens, rows)
        return _Plan(self.kernel, PerPass(make, self.spec.cuda_graph))


class FlashMLAImpl(LatentCallsImpl[LatentCallsMetadata[_Plan]]):
    """Calls the metadata's package. A Triton kernel writes the cache.

    The kernel hides a score by setting it to -1e33, and starts from a maximum of -1e30 of scores
    times scale. So where a row sees nothing of the first page of its part of a request, it relies
    on scale * log2(e) * 1e33 being more than 1e30. With smaller scales such rows are NaN.
    """

    _smallest_scale = 2.0**-8

    def _run(
        self,
        layer: AttentionLayer,
        call: LatentCall[_Plan],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See LatentCallsImpl."""
        batch = call.batch
        query_len = batch.query_lens[0]
        output, lse = call.plan.kernel.attend(
            query.unflatten(0, (-1, query_len)),
            kv_cache[:, :, None],
            batch.block_table,
            batch.seq_lens,
            call.plan.schedule.get(self),
            scale=self._kernel_scale,
            causal=self.causal and query_len > 1,
        )
        return output.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


class FlashMLABackend(PackageMLABackend):
    """FlashMLA's dense kernel for DeepSeek's sizes: sgl-flash-mla, flash-mla, or vLLM's build.

    What it returns for NaN and infinity has not been measured, so that is not declared.
    """

    interface_version = 2
    name = "FLASHMLA"
    packages = PACKAGES
    impl_cls = FlashMLAImpl
    builder_cls = FlashMLABuilder
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        requires=("triton>=3.6",),  # its kernel writes the cache without waiting for the device
        **LATENT_FIELDS,
        block_size=OneOf(64),
        lengths=OneOf(*LENGTHS),
        cuda_graph=OneOf(True, False),
    )
