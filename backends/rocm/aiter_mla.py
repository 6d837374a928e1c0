"""ROCM_AITER_MLA: TRITON_MLA with AITER's decode, on AMD Instinct GPUs from MI300 on.

This has not run on an AMD GPU here. It is written from the sources of AITER as of 2026-11, and
tested with a fake that checks each argument and computes by AITER's conventions. AITER compiles or
loads a kernel on its first call.

Requests of one query token are one call of `mla_decode_fwd`, with pages of one token: the list of
pages names each key's entry in the cache, so any block size works. TRITON_MLA writes the cache and
computes every other request.

Not used of AITER:
- several query tokens: which numbers of them have a kernel differs between GPUs and releases;
- its log-sum-exp: some paths return memory that no kernel wrote;
- fp8 latents: its kernels for them take fp8 queries;
- its persistent mode, whose arguments change between releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.common import index_runs, start_offsets
from attn_dispatch.backends.mla_calls import LATENT_FIELDS, check_has_pages, other_cache_dtype
from attn_dispatch.backends.reference.semantics import split_scale
from attn_dispatch.backends.triton.mla import TritonMLABackend, TritonMLAImpl
from attn_dispatch.backends.triton.mla_plan import TritonMLABuilder, TritonMLAMetadata
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_checks import rows_of
from attn_dispatch.interface.capability import NOT_NONE, Capabilities, OneOf, Reason
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["AiterMLAImpl", "RocmAiterMLABackend"]


@dataclass(eq=False)
class _Decodes:
    """Requests of one query token, in the form of AITER's arguments.

    Attributes:
        tokens: (num_reqs,) their rows of query and output; or a slice.
        query_starts: (num_reqs + 1,) int32: 0, 1, 2 and so on.
        key_starts: (num_reqs + 1,) int32, where each request's keys start in `slots`.
        slots: (key_starts[-1],) int32, the entry of each key, counted over all blocks.
        last_page_lens: (num_reqs,) int32: 1, as a page has one token.
    """

    tokens: slice | torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    slots: torch.Tensor
    last_page_lens: torch.Tensor

    @classmethod
    def of(cls, batch: AttentionBatch, chosen: list[int], block_size: int) -> _Decodes:
        """Those of these requests, made without waiting for the device."""
        device, table = batch.seq_lens.device, batch.block_table
        assert table is not None  # by the builder
        lens = [batch.seq_lens_list[i] for i in chosen]
        if len(chosen) == chosen[-1] - chosen[0] + 1:
            requests: torch.Tensor = torch.arange(chosen[0], chosen[-1] + 1, device=device)
            start = batch.query_start_list[chosen[0]]
            tokens: slice | torch.Tensor = slice(start, start + len(chosen))
        else:
            requests = torch.tensor(chosen, device="cpu").to(device, non_blocking=True)
            tokens = rows_of(chosen, batch.query_start_list, device)[0]
        places, positions = index_runs([0] * len(chosen), lens, device)
        blocks = table[requests[places], positions // block_size]
        return cls(
            tokens=tokens,
            query_starts=torch.arange(len(chosen) + 1, dtype=torch.int32, device=device),
            key_starts=start_offsets(lens, device),
            slots=blocks * block_size + (positions % block_size).to(torch.int32),
            last_page_lens=torch.ones(len(chosen), dtype=torch.int32, device=device),
        )


@dataclass
class AiterMLAMetadata(TritonMLAMetadata):
    """TRITON_MLA's for the other requests, and the decodes.

    Attributes:
        decodes: None if there are none.
    """

    decodes: _Decodes | None = None


class AiterMLABuilder(TritonMLABuilder):
    """Gives AITER the requests of one query token, and TRITON_MLA the others."""

    def build(self, batch: AttentionBatch) -> AiterMLAMetadata:
        """See AttentionMetadataBuilder.build."""
        check_has_pages(batch)
        lens = list(zip(batch.query_lens, batch.seq_lens_list, strict=True))
        decodes = [i for i, (query_len, seq_len) in enumerate(lens) if query_len == 1 and seq_len]
        others = [i for i in range(batch.num_reqs) if i not in set(decodes) and lens[i][0]]
        metadata: AiterMLAMetadata = AiterMLAMetadata.of(
            batch, self, launches=self.launches, decode=None, prefill=None
        )
        if others:
            longest = max(lens[i][0] for i in others)
            metadata.decode = self._plan(others, len(others), longest, parts=0)
        if decodes:
            assert self.spec.block_size is not None  # the backend declares it as required
            metadata.decodes = _Decodes.of(batch, decodes, self.spec.block_size)
        return metadata


class AiterMLAImpl(TritonMLAImpl):
    """Decodes by aiter.

    Raises:
        UnsupportedError: an argument asks for a feature that the backend does not declare.
        BackendFailure: aiter is broken.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decode = import_library("aiter.mla").mla_decode_fwd
        self._kernel_scale = split_scale(self.scale)[1]

    def _check_latents(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMLAMetadata,
    ) -> None:
        """Check that the cache is what was planned for, and can be read as pages of one token."""
        block_size = metadata.builder.spec.block_size
        if kv_cache.shape[1] != block_size or not kv_cache.is_contiguous():
            raise InvalidInputError(
                f"kv_cache has shape {tuple(kv_cache.shape)} and strides {kv_cache.stride()}; "
                f"ROCM_AITER_MLA needs contiguous blocks of {block_size} tokens, as the layer was "
                "described. Make the cache by allocate_kv_cache."
            )

    def _attend_latents(
        self,
        layer: AttentionLayer,
        absorbed: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMLAMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See AbsorbedMLAImpl."""
        mixed, lse = super()._attend_latents(layer, absorbed, kv_cache, metadata)
        assert isinstance(metadata, AiterMLAMetadata)
        decodes = metadata.decodes
        if decodes is None:
            return mixed, lse
        query = absorbed[decodes.tokens]
        output = query.new_empty(*query.shape[:2], self.mla.kv_lora_rank)
        self._decode(
            query,
            kv_cache.view(-1, 1, 1, self.head_size),
            output,
            decodes.query_starts,
            decodes.key_starts,
            decodes.slots,
            decodes.last_page_lens,
            1,
            sm_scale=self._kernel_scale,
        )
        mixed[decodes.tokens] = output
        return mixed, lse


class RocmAiterMLABackend(TritonMLABackend):
    """TRITON_MLA with AITER's decode, on AMD Instinct GPUs from MI300 on."""

    interface_version = 2
    name = "ROCM_AITER_MLA"
    impl_cls = AiterMLAImpl
    builder_cls = AiterMLABuilder
    metadata_cls = AiterMLAMetadata
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="amd", archs=("gfx942", "gfx950")),),
        requires=("triton>=3.6", "aiter>=0.1.10,<0.2"),
        **{
            **LATENT_FIELDS,
            "num_heads": OneOf(16, 128),
            "dtype": OneOf(torch.bfloat16),
            "kv_cache_dtype": OneOf("auto", "bfloat16"),
            "returns_lse": OneOf(False),
        },
        block_size=NOT_NONE,
    )

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """The cache must have the layer's dtype."""
        return super().check_combination(spec, device) + other_cache_dtype(spec)
