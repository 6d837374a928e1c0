"""The memory that kernels use besides the cache and the outputs, and its limit."""

from __future__ import annotations

import torch

__all__ = ["MAX_SCRATCH_BYTES", "GatherBuffers"]

#: What gathered keys and values and the parts of split requests take, for a batch and all layers of
#: a kind. Keys that do not fit are gathered in groups of requests, or read from their pages.
MAX_SCRATCH_BYTES = 64 << 20


class GatherBuffers:
    """Memory for gathered keys and values, which all layers and all plans of a batch share.

    It is made at its first use, and made again if a plan needs more.

    Args:
        least_rows: rows that the largest plan is known to need.
    """

    def __init__(self, least_rows: int = 0) -> None:
        self._least_rows = least_rows
        self._memory: torch.Tensor | None = None
        self._views: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(
        self,
        rows: int,
        num_kv_heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers of this dtype for keys and values, (rows, num_kv_heads, width)."""
        sizes = [rows * num_kv_heads * width for width in widths]
        memory = self._memory
        if memory is None or len(memory) < sum(sizes):
            self._views.clear()
            self._memory = memory = None  # freed before more is taken
            count = max(rows, self._least_rows) * num_kv_heads * sum(widths)
            self._memory = memory = torch.empty(count, dtype=dtype, device=device)
        key = (rows, num_kv_heads, *widths)
        found = self._views.get(key)
        if found is None:
            keys, values, _ = memory.split((*sizes, len(memory) - sum(sizes)))
            found = (
                keys.view(rows, num_kv_heads, widths[0]),
                values.view(rows, num_kv_heads, widths[1]),
            )
            self._views[key] = found
        return found
