"""Merging parts of attention in one launch, where PyTorch's operators take thirty."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.backends.triton.launcher import Launchers
from attn_dispatch.backends.triton.operands import block_of, on_tensor_device
from attn_dispatch.errors import summary_of
from attn_dispatch.log import logger
from attn_dispatch.platforms.device_errors import is_device_lost, is_out_of_memory
from attn_dispatch.platforms.libraries import import_library

__all__ = ["MergeKernels", "merge_kernels"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Elements of a tile: rows times the width of a head.
_TILE = 2048


class MergeKernels:
    """The kernels that merge parts and pack them into messages, compiled at their first use.

    After a failure that is not of the device, `take` is False: PyTorch's operators merge then.
    """

    def __init__(self) -> None:
        self._launchers = Launchers()
        self._is_broken = False

    def take(self, outs: torch.Tensor, lses: torch.Tensor) -> bool:
        """Whether the kernels take parts like these: outputs (..., size), and LSE (...)."""
        return (
            not self._is_broken
            and self._runs_on(outs)
            and outs.dtype in _DTYPES
            and lses.dtype == torch.float32
            and outs.stride(-1) == 1
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad))
        )

    @staticmethod
    def _runs_on(tensor: torch.Tensor) -> bool:
        return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cuda

    def merge(
        self,
        first: tuple[torch.Tensor, torch.Tensor],
        rest: tuple[torch.Tensor, torch.Tensor],
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor | None:
        """Merge parts as `merge_states` does, computing in float32.

        Args:
            first: (tokens, heads, size) and its LSE, (tokens, heads) float32; the heads may be two
                dimensions, the KV head and the head of its group.
            rest: (parts, tokens, heads, size) and their LSE, (parts, tokens, heads) float32, with
                the heads of the first; the dtype may differ.
            sinks: (heads,), or None.
            out: (tokens, heads, size), written in its dtype; it may be the first part.

        Returns:
            The merged LSE, (tokens, heads) float32, without the sinks; None if the kernel failed
            before anything was written.
        """
        lse: torch.Tensor | None = self._run(self._merge, *first, *rest, sinks, out)
        return lse

    def pack(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        outs: torch.Tensor,
        lses: torch.Tensor,
        flags: torch.Tensor,
        failed: bool,
    ) -> bool:
        """Copy a part into messages, each with an equal range of its heads.

        Args:
            out: (tokens, heads, size).
            lse: (tokens, heads) float32.
            outs: (pieces, tokens, heads / pieces, size), written; each piece is contiguous.
            lses: (pieces, tokens, heads / pieces) float32, written; each piece is contiguous.
            flags: (pieces,) float32, written: 1 if this rank failed, else 0.
            failed: if so, the LSE is NaN in the messages.

        Returns:
            Whether the kernel ran.
        """
        return self._run(self._pack, out, lse, outs, lses, flags, failed) is not None

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # a compiler may raise anything
            if is_out_of_memory(error) or is_device_lost(error):
                raise
            self._is_broken = True
            logger.warning(
                "The kernels that merge parts of attention fail here, so PyTorch's operators "
                "replace them: %s",
                summary_of(error),
            )
            return None

    @on_tensor_device
    def _merge(
        self,
        first: torch.Tensor,
        first_lse: torch.Tensor,
        rest: torch.Tensor,
        rest_lse: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        tokens, heads, size = out.shape
        group = first.shape[2] if first.dim() == 4 else 1
        strides: list[int] = []  # of parts, tokens, KV heads and heads of a group
        for part, size_dims in ((first, 1), (first_lse, 0), (rest, 1), (rest_lse, 0)):
            strides += part.stride()[: part.dim() - size_dims]
            strides += [0] * (first.dim() == 3)
        merged_lse = torch.empty((tokens, heads), dtype=torch.float32, device=first.device)
        if not tokens:
            return merged_lse
        rows, block, num_rows = _tile_of(size), block_of(size), tokens * heads
        sinks = None if sinks is None else sinks.contiguous()
        sinks_dtype = None if sinks is None else sinks.dtype
        launch = self._launchers.find(
            (
                ("merge", first.dtype, rest.dtype, out.dtype, sinks_dtype),
                (heads, group, size, len(rest)),
            ),
            self._kernels().merge_kernel,
            lambda: {
                "NUM_HEADS": heads,
                "GROUP": group,
                "SIZE": size,
                "BLOCK_D": block,
                "ROWS": rows,
                "REST": len(rest),
                "SINKS": sinks is not None,
            },
        )
        launch(
            (-(-num_rows // rows), 1, 1),
            first, first_lse, rest, rest_lse, first_lse if sinks is None else sinks, out,
            merged_lse, num_rows, *strides, *out.stride()[:2],
        )  # fmt: skip
        return merged_lse

    @on_tensor_device
    def _pack(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        outs: torch.Tensor,
        lses: torch.Tensor,
        flags: torch.Tensor,
        failed: bool,
    ) -> bool:
        tokens, heads, size = out.shape
        rows, num_rows, pieces = _tile_of(size), tokens * heads, len(outs)
        launch = self._launchers.find(
            ("pack", out.dtype, heads, size, pieces),
            self._kernels().pack_kernel,
            lambda: {
                "NUM_HEADS": heads,
                "PIECES": pieces,
                "SIZE": size,
                "BLOCK_D": block_of(size),
                "ROWS": rows,
            },
        )
        launch(
            (max(1, -(-num_rows // rows)), 1, 1),
            out, lse, outs, lses, flags, num_rows, int(failed), *out.stride()[:2], *lse.stride(),
            outs.stride(0), lses.stride(0), flags.stride(0),
        )  # fmt: skip
        return True

    @staticmethod
    def _kernels() -> Any:
        import_library("triton")
        from attn_dispatch.backends.triton.kernels import merge

        return merge


def _tile_of(size: int) -> int:
    """Rows of a tile."""
    return max(1, _TILE // block_of(size))


#: All layers share them, as the launchers depend on dtypes and sizes only.
merge_kernels = MergeKernels()
