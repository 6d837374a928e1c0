"""HOPPER_MLA: TRITON_MLA with a Gluon kernel for Hopper, `mla_decode.py`.

The portable Triton kernel does what it does not support.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.hopper.launch import MLA_COUNTERS, MLAConfig
from attn_dispatch.backends.cuda.hopper.paged_tma import (
    PageMatrix,
    column_blocks,
    page_problem,
    tma_descriptor,
)
from attn_dispatch.backends.triton.mla import TritonMLABackend, TritonMLAImpl
from attn_dispatch.backends.triton.mla_plan import TritonMLABuilder, TritonMLAMetadata
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import Capabilities
from attn_dispatch.interface.impl import AttentionLayer
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = ["HopperMLABackend", "HopperMLABuilder", "HopperMLAImpl", "HopperMLAMetadata"]

#: The sizes of the kernel: kv_lora_rank and qk_rope_head_dim, rows and keys of a tile.
_LATENT, _ROTATED, _ROWS, _KEYS = 512, 64, 64, 32
#: A program that works has at least this many key tiles.
_MIN_TILES = 2


#: With up to this many rows for each of this many requests the portable kernel is faster: two of
#: its programs share an SM, so that one loads while the other begins or ends a request.
_FEW_ROWS, _MANY_REQUESTS = 16, 32


@dataclass(frozen=True)
class _Room:
    """Buffers for parts of work units, see `hopper_mla_kernel`."""

    out: torch.Tensor
    lse: torch.Tensor
    counters: torch.Tensor


@dataclass
class HopperMLAMetadata(TritonMLAMetadata):
    """The batch, and its layout for either kernel.

    Attributes:
        room: for the Hopper kernel; None if the portable one computes the batch.
    """

    room: _Room | None = None


class HopperMLABuilder(TritonMLABuilder):
    """Makes room for the Hopper kernel's parts; the kernel lays out the batch itself."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self._is_portable = bool(_problem(spec, detect_device(device)))
        self._num_heads = spec.num_heads

    def build(self, batch: AttentionBatch) -> TritonMLAMetadata:
        """See AttentionMetadataBuilder.build."""
        few_rows = batch.max_query_len * self._num_heads <= _FEW_ROWS
        if self._is_portable or (few_rows and batch.num_reqs >= _MANY_REQUESTS):
            return super().build(batch)
        self._check(batch)
        metadata: HopperMLAMetadata = HopperMLAMetadata.of(
            batch, self, launches=self.launches, decode=None, prefill=None
        )
        slots = 2 * self.launches.num_sms
        floats = torch.empty(slots * _ROWS * (_LATENT + 2), dtype=torch.float32, device=self.device)
        metadata.room = _Room(
            out=floats[: slots * _ROWS * _LATENT],
            lse=floats[slots * _ROWS * _LATENT :],
            counters=torch.zeros(
                MLA_COUNTERS * self.launches.num_sms, dtype=torch.int32, device=self.device
            ),
        )
        return metadata


class HopperMLAImpl(TritonMLAImpl):
    """Launches the Hopper kernel, or the portable one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda.hopper import mla_decode

        self._hopper_kernel = mla_decode.hopper_mla_kernel
        self._last_pages: tuple[torch.Tensor, tuple[Any, Any, int]] | None = None

    def _check_latents(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMLAMetadata,
    ) -> None:
        """See AbsorbedMLAImpl."""
        super()._check_latents(layer, query, kv_cache, metadata)
        if isinstance(metadata, HopperMLAMetadata) and metadata.room is not None:
            self._pages(kv_cache)

    def _attend_latents(
        self,
        layer: AttentionLayer,
        absorbed: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMLAMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See AbsorbedMLAImpl."""
        room = metadata.room if isinstance(metadata, HopperMLAMetadata) else None
        if room is None:
            return super()._attend_latents(layer, absorbed, kv_cache, metadata)
        *pages, block_rows = self._pages(kv_cache)
        batch, num_sms = metadata.batch, metadata.launches.num_sms
        table = batch.block_table
        assert table is not None
        tokens = len(absorbed)
        out = absorbed.new_empty(tokens, self.num_heads, _LATENT)
        lse = out
        if self.returns_lse:
            lse = torch.empty(tokens, self.num_heads, dtype=torch.float32, device=absorbed.device)
        if not tokens:  # TMA has no empty matrices
            return out, lse if self.returns_lse else None
        rows = absorbed.flatten(0, 1)
        most_rows = batch.max_query_len * self.num_heads  # of a request
        q_rows = next((rows for rows in (16, 32) if rows >= most_rows), _ROWS)
        window, *scales = self._attention.numbers
        queries = tma_descriptor(rows, rows.shape, rows.stride(0), (q_rows, 64))
        launch = self._launchers.find(
            ("hopper", absorbed.dtype, kv_cache.shape[1], q_rows),
            self._hopper_kernel,
            lambda: {
                "CONFIG": MLAConfig(
                    NUM_HEADS=self.num_heads,
                    NUM_KV_HEADS=1,
                    GROUP=self.num_heads,
                    D=_LATENT,
                    CAUSAL=self.causal,
                    WINDOW=self.sliding_window is not None,
                    CAP=self.logits_soft_cap is not None,
                    ALIBI=False,
                    SINKS=False,
                    LSE=self.returns_lse,
                    ROWS=_ROWS,
                    KEYS=_KEYS,
                    BLOCK_SIZE=kv_cache.shape[1],
                    STAGES=128 // _KEYS,
                    PROGRAMS=1,
                    MIN_TILES=_MIN_TILES,
                    HAS_REQUEST_LIST=False,
                    BLOCK_N=_KEYS,
                    Q_ROWS=q_rows,
                )
            },
            {"num_warps": 4, "launch_cooperative_grid": True},
        )
        launch(
            (num_sms, 1, 1),
            column_blocks(queries, _LATENT // 64), queries, *pages, out, lse, room.out, room.lse,
            room.counters, batch.query_start_loc, batch.seq_lens, table,
            block_rows, *out.stride()[:2], batch.num_reqs, batch.seq_lens.shape[0], tokens,
            table.stride(0), window, _team(batch, self.num_heads, num_sms), *scales,
        )  # fmt: skip
        return out, lse if self.returns_lse else None

    def _pages(self, kv_cache: torch.Tensor) -> tuple[Any, Any, int]:
        """The cache as TMA reads it: latents, the matrix, and its rows from block to block.

        The last result is kept.
        """
        if self._last_pages is None or self._last_pages[0] is not kv_cache:
            pages = PageMatrix.of(kv_cache[:, :, None], _KEYS)
            if pages is None:
                raise InvalidInputError(
                    "HOPPER_MLA reads the kv_cache by TMA: it must begin at a multiple of 16 bytes "
                    "and have fewer than 2 ** 31 tokens. Align the cache, or use TRITON_MLA."
                )
            matrix = pages.descriptor
            latents = column_blocks(matrix, _LATENT // 64)
            self._last_pages = kv_cache, (latents, matrix, pages.block_rows)
        return self._last_pages[1]


def _team(batch: AttentionBatch, num_heads: int, num_sms: int) -> int:
    """How many programs share key ranges: the row tiles of each request, or of its tokens."""
    tokens = 1
    if batch.num_tokens == batch.num_reqs * batch.max_query_len:  # as many for each request
        tokens = batch.max_query_len
    return min(-(-tokens * num_heads // _ROWS), num_sms)


def _problem(spec: AttentionSpec, device: DeviceProfile) -> str:
    """What keeps the Hopper kernel from a layer, as a sentence; "" if it computes it."""
    assert spec.mla is not None
    assert spec.block_size is not None
    if (spec.mla.kv_lora_rank, spec.mla.qk_rope_head_dim) != (_LATENT, _ROTATED):
        sizes = f"{spec.mla.kv_lora_rank} + {spec.mla.qk_rope_head_dim}"
        return f"its latents have {_LATENT} + {_ROTATED} elements, and these have {sizes}"
    dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, device.arch)
    if dtype != spec.dtype or dtype.itemsize != 2:
        stored, own = (str(each).removeprefix("torch.") for each in (dtype, spec.dtype))
        return (
            f"it reads float16 or bfloat16 in a cache of the layer's own dtype; the layer is {own} "
            f"and the cache {stored}"
        )
    for field in ("batch_invariant", "key_positions"):
        if getattr(spec, field):
            return f"it has no {field}"
    row = spec.head_size * dtype.itemsize
    return page_problem(
        spec.block_size, 1, row, dtype.itemsize, (spec.block_size * row, row, 0), 16
    )


class HopperMLABackend(TritonMLABackend):
    """TRITON_MLA with a kernel for Hopper: wgmma, TMA and specialized warps, in Gluon."""

    interface_version = 2
    name = "HOPPER_MLA"
    impl_cls = HopperMLAImpl
    builder_cls = HopperMLABuilder
    metadata_cls = TritonMLAMetadata
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        requires=("triton>=3.6,<3.10",),
        **TritonMLABackend.capabilities.fields,
    )

    @classmethod
    def kernel_notes(
        cls, spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
    ) -> tuple[str, ...]:
        """Why a layer runs on TRITON_MLA's kernel, if it does."""
        if spec.mla is None or spec.block_size is None:
            return ()
        problem = _problem(spec, device)
        if not problem:
            return ()
        return (f"it runs on TRITON_MLA's kernel, not on the one for Hopper: {problem}",)
