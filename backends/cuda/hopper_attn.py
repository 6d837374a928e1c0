"""HOPPER_ATTN: TRITON_ATTN with a prefill kernel of Hopper's own, in Gluon (`hopper.py`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.triton_arguments import Out, Source, fills_tiles
from attn_dispatch.backends.triton_attn import TritonAttnBackend, TritonImpl
from attn_dispatch.backends.triton_plan import (
    PrefillPlan,
    TritonBuilder,
    TritonMetadata,
    plan_rows,
)
from attn_dispatch.batch import AttentionBatch
from attn_dispatch.capability import Capabilities, OneOf, SameAs
from attn_dispatch.device import DeviceMatch, detect_device
from attn_dispatch.interface import AttentionLayer, refuse_spec
from attn_dispatch.libraries import import_library
from attn_dispatch.spec import AttentionSpec

__all__ = ["HopperAttnBackend", "HopperBuilder", "HopperImpl", "HopperPlan"]


#: Query tokens in a tile, half of them for each warp group.
_BLOCK_M = 128
#: Head size -> keys in a tile: what two stages of keys and values leave room for.
_BLOCK_N = {64: 128, 128: 128, 256: 64}
#: Stages of the ring; registers of each thread that computes.
_STAGES, _REGISTERS = 2, 240


@dataclass
class HopperPlan(PrefillPlan):
    """A plan whose tiles are this kernel's: tokens of one query head.

    Attributes:
        fresh_end: where the rows of `key` end that are these requests'.
        descriptors: of gathered keys and values, which stay where they are for all layers.
    """

    fresh_end: int = 0
    descriptors: tuple[Any, Any] | None = None

    def described(self, source: Source, describe: Any, block_n: int) -> tuple[Any, Any]:
        """Descriptors of keys and values."""
        is_gathered = self.gathered is not None and source.k is self.gathered[0]
        if is_gathered and self.descriptors is not None:
            return self.descriptors
        end = self.gathered_rows if is_gathered else self.fresh_end
        k, v = (_as_matrix(rows[:end]) for rows in (source.k, source.v))
        made = describe(k, block_n), describe(v, block_n)
        if is_gathered:
            self.descriptors = made
        return made


class HopperBuilder(TritonBuilder):
    """Lays out prefills for this kernel, unless their keys are too many to be gathered."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        refuse_spec(HopperAttnBackend, spec, detect_device(device))

    def _prefill(self, batch: AttentionBatch, chosen: list[int]) -> PrefillPlan:
        block_n = _BLOCK_N[self.spec.head_size]
        rows = plan_rows(batch, chosen, block_n)
        has_pages = batch.block_table is not None
        # The last tile of a request's new keys must not reach into those of the next: times a
        # weight of zero NaN is NaN. Behind the last request's TMA finds zeros.
        ends = [batch.key_starts[i + 1] - batch.key_starts[i] for i in chosen[:-1]]
        ends_with_tile = not any(length % block_n for length in ends)
        if not (self._has_room(rows) if has_pages else ends_with_tile):
            return super()._prefill(batch, chosen)
        pieces = _pieces(batch, self._tiles(rows, _BLOCK_M, 1))
        plan = self._plan(batch, rows, pieces, has_pages, HopperPlan)
        assert isinstance(plan, HopperPlan)
        plan.is_fresh = plan.is_fresh and ends_with_tile
        plan.fresh_end = batch.key_starts[chosen[-1] + 1]
        return plan


def _pieces(batch: AttentionBatch, tiles: torch.Tensor) -> torch.Tensor:
    """(num_tiles, 8) int32 on the host: what hopper.py wants to know of each tile."""
    requests, first_tokens = tiles.long().unbind(1)
    starts = batch.query_start_loc_cpu
    queries = starts[1:] - starts[:-1]
    pieces = torch.zeros(len(tiles), 8, dtype=torch.int32, device="cpu")
    columns = (starts[requests], queries[requests], first_tokens, batch.seq_lens_cpu[requests])
    for place, column in enumerate((*columns, requests)):
        pieces[:, place] = column
    return pieces


class HopperImpl(TritonImpl):
    """Launches Hopper's kernel for prefills, and the portable ones for the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_library("triton.experimental.gluon.language.nvidia.hopper")
        from attn_dispatch.backends.cuda import hopper

        self._hopper_kernel = hopper.hopper_prefill_kernel

    def _prefill(
        self,
        layer: AttentionLayer,
        metadata: TritonMetadata,
        plan: PrefillPlan,
        query: torch.Tensor,
        source: Source,
        out: Out,
    ) -> None:
        if not isinstance(plan, HopperPlan):
            super()._prefill(layer, metadata, plan, query, source, out)
            return
        if not len(plan.tiles):
            return
        block_n, num_pieces = _BLOCK_N[self.head_size], len(plan.tiles) * self.num_heads
        slopes, sinks = self._per_head(query)
        describe = _descriptors(self.head_size, query.dtype)
        launch = self._launcher(
            ("hopper", query.dtype, sinks.dtype),
            self._hopper_kernel,
            lambda: {
                "NUM_HEADS": self.num_heads,
                "GROUP": self.num_heads // self.num_kv_heads,
                "D": self.head_size,
                "BLOCK_N": block_n,
                "STAGES": _STAGES,
                "REGISTERS": _REGISTERS,
                "CAUSAL": self.causal,
                "WINDOW": self.sliding_window is not None,
                "CAP": self.logits_soft_cap is not None,
                "ALIBI": self.alibi_slopes is not None,
                "SINKS": self.sinks is not None,
                "LSE": self.returns_lse,
            },
            {"num_warps": 4},
        )
        assert source.starts is not None
        launch(
            (min(num_pieces, metadata.launches.num_sms), 1, 1),
            describe(_as_matrix(query), _BLOCK_M // 2),
            *plan.described(source, describe, block_n),
            out.values, out.lse, plan.tiles, source.starts, slopes, sinks, num_pieces,
            *out.values.stride()[:2], *self._numbers,
        )  # fmt: skip


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, size) as (tokens, heads * size), copied where TMA could not read it."""
    if not fills_tiles(tensor, tensor.shape[2]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.flatten(1)


@functools.cache
def _descriptors(head_size: int, dtype: torch.dtype) -> Any:
    """Makes a descriptor with blocks of so many rows by one head."""
    gluon = import_library("triton.experimental.gluon.language")
    hopper = import_library("triton.experimental.gluon.nvidia.hopper")
    element = {torch.bfloat16: gluon.bfloat16, torch.float16: gluon.float16}[dtype]

    @functools.cache
    def layout(rows: int) -> Any:
        return gluon.NVMMASharedLayout.get_default_for([rows, head_size], element)

    def describe(matrix: torch.Tensor, rows: int) -> Any:
        return hopper.TensorDescriptor.from_tensor(matrix, [rows, head_size], layout(rows))

    return describe


class HopperAttnBackend(TritonAttnBackend):
    """TRITON_ATTN with a prefill kernel for Hopper: wgmma, TMA and specialized warps, in Gluon."""

    interface_version = 1
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),),
        # Gluon changes between releases; of these 3.6, 3.7 and 3.9 were compiled.
        requires=("triton>=3.6,<3.10",),
        **{
            **TritonAttnBackend.capabilities.fields,
            "head_size": OneOf(*_BLOCK_N),
            "head_size_v": SameAs("head_size"),
            "dtype": OneOf(torch.bfloat16, torch.float16),
            "custom_mask": OneOf(False),
            "bidirectional_ranges": OneOf(False),
            "output_quant": OneOf(None),
            "batch_invariant": OneOf(False),
        },
    )

    @staticmethod
    def get_name() -> str:
        """HOPPER_ATTN."""
        return "HOPPER_ATTN"

    @staticmethod
    def get_impl_cls() -> type[HopperImpl]:
        """HopperImpl."""
        return HopperImpl

    @staticmethod
    def get_builder_cls() -> type[HopperBuilder]:
        """HopperBuilder."""
        return HopperBuilder
