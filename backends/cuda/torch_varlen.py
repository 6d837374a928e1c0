"""TORCH_VARLEN: PyTorch's own `torch.nn.attention.varlen` on CUDA; it needs no other package.

Prompts without a past read the given rows of key and value. If any request has a past, the keys of
all requests are first gathered from their pages into rows. From PyTorch 2.13 on its kernel reads
pages directly, of multiples of 256 tokens; that path has been tested by its signature, and not on a
GPU.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.common import (
    SMALLEST_SCALE,
    aligned,
    first_visible_keys,
    index_runs,
    is_aligned,
    start_offsets,
    window_sides,
)
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import (
    ANY,
    Capabilities,
    MultipleOf,
    OneOf,
    Reason,
    ReasonCode,
    SameAs,
    Strides,
)
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.kv_access import read_kv_cache
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.interface.unquantized import ForwardArgs, UnquantizedImpl
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library, requirement_problem

__all__ = ["TorchVarlenBackend", "TorchVarlenBuilder", "TorchVarlenImpl", "TorchVarlenMetadata"]

#: Its kernel reads pages of multiples of this many tokens.
_PAGE_TOKENS = 256
#: The first release whose kernel does.
_READS_PAGES = "torch>=2.13"


@dataclass
class TorchVarlenMetadata(BatchMetadata):
    """The batch, and where the keys of its requests are.

    Attributes:
        is_fresh: no request has a past, so the rows of key and value hold all keys.
        first_keys: for each request, the first key that is read from the cache.
        key_lens: for each request, how many keys are read from there.
    """

    is_fresh: bool
    first_keys: list[int]
    key_lens: list[int]

    @functools.cached_property
    def fresh_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32, where each request's rows of key and value start."""
        own = self.batch.key_start_loc_cpu
        if own is None:
            return self.batch.query_start_loc
        return to_device(own, self.batch.seq_lens.device, torch.int32)

    @functools.cached_property
    def gathered_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32, where each request's gathered rows start."""
        return start_offsets(self.key_lens, self.batch.seq_lens.device)

    @functools.cached_property
    def _entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        return index_runs(self.first_keys, self.key_lens, self.batch.seq_lens.device)

    def slots(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum(key_lens),) int64: the block of each gathered row, and its offset in the block."""
        assert self.batch.block_table is not None  # by check_forward
        requests, positions = self._entries
        blocks = self.batch.block_table[requests, positions // block_size].long()
        return blocks, positions % block_size


class TorchVarlenBuilder(AttentionMetadataBuilder[TorchVarlenMetadata]):
    """Computes which keys each request reads.

    Raises:
        UnsupportedError: the backend does not declare the layers.
    """

    def build(self, batch: AttentionBatch) -> TorchVarlenMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        firsts, seq_lens = first_visible_keys(batch, self.spec.sliding_window), batch.seq_lens_list
        new_lens = [end - start for start, end in itertools.pairwise(batch.key_starts)]
        metadata: TorchVarlenMetadata = TorchVarlenMetadata.of(
            batch,
            self,
            is_fresh=new_lens == seq_lens,
            first_keys=firsts,
            key_lens=[seq - first for seq, first in zip(seq_lens, firsts, strict=True)],
        )
        return metadata


class TorchVarlenImpl(UnquantizedImpl[TorchVarlenMetadata]):
    """Calls PyTorch once for the whole batch.

    Raises:
        BackendFailure: this PyTorch has no varlen_attn.
        UnsupportedError: an argument asks for a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        module = import_library("torch.nn.attention.varlen")
        self._varlen_attn = module.varlen_attn
        known = inspect.signature(self._varlen_attn).parameters
        self._reads_pages = "block_table" in known
        shares_heads = self.num_heads != self.num_kv_heads
        left, _ = window_sides(self.causal, self.sliding_window)
        #: How often each KV head is repeated, if PyTorch needs one for each query head.
        self._copies = 1
        self._options: dict[str, Any] = {
            "scale": max(abs(self.scale), SMALLEST_SCALE),
            "window_size": (left, 0 if self.causal else left),  # there is no flag for causality
        }
        if shares_heads and "enable_gqa" in known:
            self._options["enable_gqa"] = True
        elif shares_heads:
            self._copies = self.num_heads // self.num_kv_heads
        if self.returns_lse:
            self._options["return_aux"] = module.AuxRequest(lse=True)

    def _check_call(self, args: ForwardArgs[TorchVarlenMetadata]) -> None:
        if args.kv_cache is not None and args.kv_cache.dtype != args.query.dtype:
            raise UnsupportedError(
                f"TORCH_VARLEN reads a cache of the query's dtype, {args.query.dtype}, and this "
                f"one is {args.kv_cache.dtype}; TRITON_ATTN reads it."
            )

    def _attend(
        self, args: ForwardArgs[TorchVarlenMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        batch, tokens = args.metadata.batch, slice(args.metadata.batch.num_tokens)
        if not batch.num_tokens or not max(batch.seq_lens_list):
            output[tokens] = 0
            if lse is not None:
                lse[tokens] = -torch.inf
            return
        # A negative scale would make the kernel's softmax take the wrong maximum.
        rows = aligned(args.query[tokens] if self.scale >= 0 else -args.query[tokens])
        keys, values, where = self._keys(args)
        found = self._varlen_attn(
            rows,
            keys,
            values,
            cu_seq_q=batch.query_start_loc,
            max_q=max(batch.query_lens),
            **where,
            **self._options,
        )
        if lse is not None:
            found, by_head = found
            # FlashAttention 2 returns +inf for rows without keys.
            lse[tokens] = by_head.t().masked_fill(by_head.t() == torch.inf, -torch.inf)
        output[tokens] = found

    def _keys(
        self, args: ForwardArgs[TorchVarlenMetadata]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Keys, values, and the arguments that locate each request's."""
        metadata, key, value, kv_cache = args.metadata, args.key, args.value, args.kv_cache
        batch, max_k = metadata.batch, max(metadata.batch.seq_lens_list)
        is_fresh = metadata.is_fresh and self.kv_sharing_target_layer_name is None
        if key is not None and value is not None and (is_fresh or kv_cache is None):
            rows = slice(batch.key_starts[-1])
            where: dict[str, Any] = {"cu_seq_k": metadata.fresh_start_loc, "max_k": max_k}
            return self._with_query_heads(key[rows]), self._with_query_heads(value[rows]), where
        assert kv_cache is not None  # by check_forward
        block_size = kv_cache.shape[2]
        keys, values = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
        is_whole = block_size % _PAGE_TOKENS == 0
        if self._reads_pages and is_whole and is_aligned(keys) and is_aligned(values):
            pages = {"seqused_k": batch.seq_lens, "block_table": batch.block_table}
            return keys, values, {"cu_seq_k": None, "max_k": max_k, **pages}
        slots = metadata.slots(block_size)
        keys, values = (self._with_query_heads(read_kv_cache(t, *slots)) for t in (keys, values))
        where = {"cu_seq_k": metadata.gathered_start_loc, "max_k": max(metadata.key_lens)}
        return keys, values, where

    def _with_query_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of keys or values with a head for each query head, if PyTorch needs that."""
        return rows.repeat_interleave(self._copies, dim=1) if self._copies > 1 else aligned(rows)


class TorchVarlenBackend(AttentionBackend):
    """PyTorch's variable-length FlashAttention for NVIDIA GPUs.

    A row with a NaN among its scores has NaN as its output, and the log-sum-exp of a row that sees
    no key. Scores that are all −inf can give 0. Measured with PyTorch 2.11.
    """

    interface_version = 2
    name = "TORCH_VARLEN"
    impl_cls = TorchVarlenImpl
    builder_cls = TorchVarlenBuilder
    metadata_cls = TorchVarlenMetadata
    propagates_nan = False
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="nvidia", min_capability=(8, 0)),),
        requires=("torch>=2.11",),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=MultipleOf(8, largest=256),
        head_size_v=SameAs("head_size"),
        dtype=OneOf(torch.bfloat16, torch.float16),
        kv_cache_dtype=OneOf("auto", "bfloat16", "float16"),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        kv_strides=Strides(),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        kv_sharing=OneOf(True, False),
        returns_lse=OneOf(True, False),
    )

    @classmethod
    def kernel_notes(
        cls, spec: AttentionSpec, device: DeviceProfile, phase: Phase | None
    ) -> tuple[str, ...]:
        """Why keys are gathered from their pages, if they are."""
        if spec.block_size is None:
            return ()
        problem = requirement_problem(_READS_PAGES, device.library("torch"))
        if problem:
            why = f"PyTorch reads pages from {_READS_PAGES.removeprefix('torch>=')} on"
        elif spec.block_size % _PAGE_TOKENS:
            why = f"PyTorch reads pages of a multiple of {_PAGE_TOKENS} tokens, and these have "
            why += str(spec.block_size)
        elif spec.kv_strides is not None and not spec.kv_strides.is_aligned:
            why = "PyTorch reads pages whose heads begin at multiples of 16 bytes"
        else:
            return ()
        return (f"keys of requests with a past are copied from their pages first: {why}",)

    @classmethod
    def check_combination(cls, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
        """The cache has the layer's dtype."""
        if kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype) == spec.dtype:
            return []
        dtype = str(spec.dtype).removeprefix("torch.")
        return [
            Reason(
                code=ReasonCode.COMBINATION,
                field="kv_cache_dtype",
                asked=f"{spec.kv_cache_dtype} with dtype={dtype}",
                allowed="the layer's own dtype",
            )
        ]
