"""What several backends share: alignment, windows and offsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from attn_dispatch.interface.batch import AttentionBatch

__all__ = [
    "MAX_WINDOW",
    "SMALLEST_SCALE",
    "aligned",
    "first_visible_keys",
    "index_runs",
    "is_aligned",
    "on_device",
    "start_offsets",
    "window_sides",
]

#: A larger window computes the same as this one, and a position plus this still fits int32.
MAX_WINDOW = 1 << 30
#: Computes the same as a scale of 0, for kernels that would multiply −inf by it.
SMALLEST_SCALE = 1e-30


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


def on_device(
    values: Sequence[float] | torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers, or a tensor, as a tensor on a device, without waiting for it."""
    if not isinstance(values, torch.Tensor):
        values = torch.tensor(values, dtype=dtype, device="cpu")
    return values.to(device, dtype, non_blocking=True)


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
