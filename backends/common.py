"""What several backends share: the frame of `forward`, alignment, windows and offsets."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output

__all__ = [
    "MAX_WINDOW",
    "ForwardArgs",
    "SMALLEST_SCALE",
    "UnquantizedImpl",
    "aligned",
    "first_visible_keys",
    "index_runs",
    "is_aligned",
    "start_offsets",
    "window_sides",
]

#: A larger window computes the same as this one, and a position plus this still fits int32.
MAX_WINDOW = 1 << 30
#: Computes the same as a scale of 0, for kernels that would multiply −inf by it.
SMALLEST_SCALE = 1e-30

M = TypeVar("M", bound=BatchMetadata)


@dataclass(slots=True, eq=False)
class ForwardArgs(Generic[M]):
    """The arguments of AttentionImpl.forward that an impl reads."""

    layer: AttentionLayer
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    kv_cache: torch.Tensor | None
    metadata: M


class UnquantizedImpl(AttentionImpl[M]):
    """An impl whose output has the query's dtype: `forward` checks the call, `_attend` computes."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: M | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, self.backend_cls.get_metadata_cls())
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(
                f"{self.backend_cls.get_name()} does not quantize its output; TRITON_ATTN and "
                "REFERENCE do."
            )
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        args = ForwardArgs(layer, query, key, value, kv_cache, attn_metadata)
        self._check_call(args)
        if kv_cache is not None and key is not None and value is not None:
            self.write_kv(layer, key, value, kv_cache, batch)
        shape, lse = (query.shape[0], self.num_heads, self.head_size_v), None
        if output is None:
            output = query.new_empty(shape)
        if self.returns_lse:
            lse = query.new_empty(shape[:2], dtype=torch.float32)
        if shape[0] > batch.num_tokens:  # padding rows
            output[batch.num_tokens :] = 0
            if lse is not None:
                lse[batch.num_tokens :] = -torch.inf
        self._attend(args, output, lse)
        return output if lse is None else (output, lse)

    def _check_call(self, args: ForwardArgs[M]) -> None:
        """Reject what this backend cannot read. Nothing has been written yet."""

    @abstractmethod
    def _attend(self, args: ForwardArgs[M], output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Fill the rows of the batch's tokens in output and lse. The cache holds the new keys."""


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a kernel can load the rows 16 bytes at a time.

    PyTorch checks the strides but not the address, which differs for a slice of a fused tensor.
    """
    steps = (step * tensor.element_size() for step in tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and not any(s % 16 for s in (tensor.data_ptr(), *steps))


def aligned(
    tensor: torch.Tensor, suits: Callable[[torch.Tensor], bool] = is_aligned
) -> torch.Tensor:
    """The tensor, or a contiguous copy if it does not suit the kernel."""
    # Not contiguous(): that keeps the stride of a dimension of size 1.
    return tensor if suits(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def window_sides(
    causal: bool, sliding_window: int | None, largest: int = MAX_WINDOW
) -> tuple[int, int]:
    """(left, right): how many keys the window shows before and after a query's own; −1 for all."""
    if sliding_window is None:
        return -1, -1
    left = min(sliding_window - 1, largest)
    return left, 0 if causal else left


def first_visible_keys(batch: AttentionBatch, sliding_window: int | None) -> list[int]:
    """For each request the first key that one of its queries sees through the window."""
    if sliding_window is None:
        return [0] * batch.num_reqs
    lens = zip(batch.query_lens, batch.seq_lens_list, strict=True)
    return [max(0, seq - query - sliding_window + 1) for query, seq in lens]


def start_offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """(len(lengths) + 1,) int32: where each of these runs starts, and where the last one ends."""
    starts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


def index_runs(
    firsts: Sequence[int], counts: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """One run of integers for each request: firsts[i], firsts[i] + 1, ..., counts[i] of them.

    Made on the device without waiting for it, because the size is known on the host.

    Returns:
        (sum(counts),) int64, the request of each integer; and the integers, the same shape.
    """
    starts = [0, *itertools.accumulate(counts)]
    rows = torch.tensor([list(firsts), list(counts), starts[:-1]], dtype=torch.int64, device="cpu")
    first, count, start = rows.to(device, non_blocking=True)
    requests = torch.repeat_interleave(
        torch.arange(len(counts), device=device), count, output_size=starts[-1]
    )
    index = torch.arange(starts[-1], device=device)
    return requests, index + (first - start)[requests]
