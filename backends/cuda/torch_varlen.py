"""TORCH_VARLEN: PyTorch's own `torch.nn.attention.varlen` on CUDA; it needs no other package.

A prompt's keys and values are read as the step brings them; where a request has a past, the keys
of all are first gathered from their pages into rows. From PyTorch 2.13 on its kernel reads pages
itself, of multiples of 256 tokens; that way has been tested by its signature, and not on a GPU.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend, refuse_spec
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import (
    ANY,
    Capabilities,
    MultipleOf,
    OneOf,
    Reason,
    ReasonCode,
    SameAs,
)
from attn_dispatch.interface.impl import (
    AttentionImpl,
    AttentionLayer,
    refuse_features,
    store_new_kv,
)
from attn_dispatch.interface.kv_access import read_kv_cache
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "LARGEST_WINDOW",
    "SMALLEST_SCALE",
    "TorchVarlenBackend",
    "TorchVarlenBuilder",
    "TorchVarlenImpl",
    "TorchVarlenMetadata",
    "first_visible_keys",
    "is_loadable",
    "loadable",
    "spread",
]

#: Its kernel reads pages of multiples of this many tokens.
_PAGE_TOKENS = 256
#: Scores of −inf times a scale of 0 would be NaN; this is as good as 0.
SMALLEST_SCALE = 1e-30
#: A larger window is as good as this one, and positions plus this are still an int32.
LARGEST_WINDOW = 1 << 30


def first_visible_keys(batch: AttentionBatch, sliding_window: int | None) -> list[int]:
    """The first key of each request that one of its queries sees through the window."""
    if sliding_window is None:
        return [0] * batch.num_reqs
    lens = zip(batch.query_lens, batch.seq_lens_list, strict=True)
    return [max(0, seq - query - sliding_window + 1) for query, seq in lens]


def spread(
    firsts: Sequence[int], counts: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of integers, one for each request: firsts[i], firsts[i] + 1, ..., counts[i] of them.

    Made on the device without waiting for it: its size is known on the host.

    Returns:
        (sum(counts),) int64, of which request each is; and the integers, the same shape.
    """
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    rows = torch.tensor([list(firsts), list(counts), starts[:-1]], dtype=torch.int64, device="cpu")
    first, count, start = rows.to(device, non_blocking=True)
    requests = torch.repeat_interleave(
        torch.arange(len(counts), device=device), count, output_size=starts[-1]
    )
    index = torch.arange(starts[-1], device=device)
    return requests, index + (first - start)[requests]


def is_loadable(tensor: torch.Tensor) -> bool:
    """Whether a kernel can load the rows 16 bytes at a time.

    PyTorch looks at the strides and not at the address, which a slice of a fused tensor moves.
    """
    steps = (step * tensor.element_size() for step in tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and not any(s % 16 for s in (tensor.data_ptr(), *steps))


def loadable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where a kernel can load it 16 bytes at a time: itself, or a copy."""
    if is_loadable(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass
class TorchVarlenMetadata(BatchMetadata):
    """The batch, and where the keys of its requests stand once they are rows.

    Attributes:
        is_fresh: no request has a past: the rows of key and value that the step brings are all.
        first_keys: of each request, the first key that is read from the cache.
        key_lens: of each request, how many are read from there.
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
        return own.to(self.batch.seq_lens.device, torch.int32)

    @functools.cached_property
    def gathered_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32, where each request's rows start once they are gathered."""
        lengths = torch.tensor([0, *self.key_lens], device="cpu")
        starts = lengths.cumsum(0).to(torch.int32)
        return starts.to(self.batch.seq_lens.device, non_blocking=True)

    @functools.cached_property
    def _entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        return spread(self.first_keys, self.key_lens, self.batch.seq_lens.device)

    def places(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum(key_lens),) int64: the block of each gathered row, and its place in the block."""
        assert self.batch.block_table is not None  # check_forward saw to it
        requests, positions = self._entries
        blocks = self.batch.block_table[requests, positions // block_size].long()
        return blocks, positions % block_size


class TorchVarlenBuilder(AttentionMetadataBuilder[TorchVarlenMetadata]):
    """Works out which keys each request reads.

    Raises:
        UnsupportedError: the layers are not what the backend declares.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        refuse_spec(TorchVarlenBackend, spec, detect_device(device))

    def build(self, batch: AttentionBatch) -> TorchVarlenMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        firsts = first_visible_keys(batch, self.spec.sliding_window)
        starts, seq_lens = batch.key_starts, batch.seq_lens_list
        brought = [end - start for start, end in itertools.pairwise(starts)]
        metadata: TorchVarlenMetadata = TorchVarlenMetadata.of(
            batch,
            self,
            is_fresh=brought == seq_lens,
            first_keys=firsts,
            key_lens=[seq - first for seq, first in zip(seq_lens, firsts, strict=True)],
        )
        return metadata


class TorchVarlenImpl(AttentionImpl[TorchVarlenMetadata]):
    """Calls PyTorch once for the whole batch.

    Raises:
        BackendFailure: this PyTorch has no varlen_attn.
        UnsupportedError: it is constructed with a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(self, "TORCH_VARLEN", "alibi_slopes", "sinks", "logits_soft_cap")
        module = import_library("torch.nn.attention.varlen")
        self._attend = module.varlen_attn
        known = inspect.signature(self._attend).parameters
        self._reads_pages = "block_table" in known
        shares_heads = self.num_heads != self.num_kv_heads
        #: How often each KV head is repeated, where PyTorch wants one for each query head.
        self._copies = 1
        self._options: dict[str, Any] = {"scale": max(abs(self.scale), SMALLEST_SCALE)}
        if shares_heads and "enable_gqa" in known:
            self._options["enable_gqa"] = True
        elif shares_heads:
            self._copies = self.num_heads // self.num_kv_heads
        if self.returns_lse:
            self._options["return_aux"] = module.AuxRequest(lse=True)
        left = -1 if self.sliding_window is None else min(self.sliding_window - 1, LARGEST_WINDOW)
        #: How many keys are seen on each side of the query's own place, −1 for all.
        self._window = (left, 0 if self.causal else left)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: TorchVarlenMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, TorchVarlenMetadata)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("TORCH_VARLEN does not quantize its output; TRITON_ATTN does.")
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        if kv_cache is not None and kv_cache.dtype != query.dtype:
            raise UnsupportedError(
                f"TORCH_VARLEN reads a cache of the query's dtype, {query.dtype}, and this one is "
                f"{kv_cache.dtype}; TRITON_ATTN reads it."
            )
        if kv_cache is not None and key is not None and value is not None:
            store_new_kv(self, layer, key, value, kv_cache, batch)
        num_tokens = batch.num_tokens
        if output is None:
            output = query.new_empty(query.shape[0], self.num_heads, self.head_size_v)
        lse = None
        if self.returns_lse:
            lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
        if output.shape[0] > num_tokens:  # rows that are no request's
            output[num_tokens:] = 0
        if not num_tokens or not max(batch.seq_lens_list):
            output[:num_tokens] = 0
        else:
            # A negative scale would make the smallest score the largest in the kernel's softmax.
            rows = loadable(query[:num_tokens] if self.scale >= 0 else -query[:num_tokens])
            keys, values, where = self._keys(attn_metadata, key, value, kv_cache)
            found = self._attend(
                rows,
                keys,
                values,
                cu_seq_q=batch.query_start_loc,
                max_q=max(batch.query_lens),
                window_size=self._window,
                **where,
                **self._options,
            )
            if lse is not None:
                found, by_head = found
                # Rows without keys are +inf in FlashAttention 2.
                lse[:num_tokens] = by_head.t().masked_fill(by_head.t() == torch.inf, -torch.inf)
            output[:num_tokens] = found
        return output if lse is None else (output, lse)

    def _keys(
        self,
        metadata: TorchVarlenMetadata,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Keys, values, and what says where each request's are."""
        batch = metadata.batch
        own = metadata.is_fresh and self.kv_sharing_target_layer_name is None
        if key is not None and value is not None and (own or kv_cache is None):
            rows = batch.key_starts[-1]
            where = {"cu_seq_k": metadata.fresh_start_loc, "max_k": max(batch.seq_lens_list)}
            return self._expanded(key[:rows]), self._expanded(value[:rows]), where
        assert kv_cache is not None  # check_forward saw to it
        block_size = kv_cache.shape[2]
        keys, values = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
        if self._reads_pages and block_size % _PAGE_TOKENS == 0 and is_loadable(keys):
            where = {
                "cu_seq_k": None,
                "max_k": max(batch.seq_lens_list),
                "seqused_k": batch.seq_lens,
                "block_table": batch.block_table,
            }
            return keys, values, where
        places = metadata.places(block_size)
        where = {"cu_seq_k": metadata.gathered_start_loc, "max_k": max(metadata.key_lens)}
        keys, values = (read_kv_cache(rows, *places) for rows in (keys, values))
        return self._expanded(keys), self._expanded(values), where

    def _expanded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of keys or values with a head for each query head, if PyTorch must have that."""
        if self._copies > 1:
            return rows.repeat_interleave(self._copies, dim=1)
        return loadable(rows)


class TorchVarlenBackend(AttentionBackend):
    """PyTorch's variable-length FlashAttention for NVIDIA's GPUs.

    A row that sees a NaN among its scores has NaN as its output, and the log-sum-exp of a row that
    sees no key; scores that are all −inf can give 0. Measured with PyTorch 2.11.
    """

    interface_version = 2
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
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        kv_sharing=OneOf(True, False),
        returns_lse=OneOf(True, False),
    )

    @staticmethod
    def get_name() -> str:
        """TORCH_VARLEN."""
        return "TORCH_VARLEN"

    @staticmethod
    def get_impl_cls() -> type[TorchVarlenImpl]:
        """TorchVarlenImpl."""
        return TorchVarlenImpl

    @staticmethod
    def get_metadata_cls() -> type[TorchVarlenMetadata]:
        """TorchVarlenMetadata."""
        return TorchVarlenMetadata

    @staticmethod
    def get_builder_cls() -> type[TorchVarlenBuilder]:
        """TorchVarlenBuilder."""
        return TorchVarlenBuilder

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
