"""Copies from the host to a device that do not wait for the device.

A copy from pageable memory waits. So values go through pinned memory, and the small ones of a batch
through one piece of it, because each copy takes the host several microseconds.
"""

from __future__ import annotations

import torch

__all__ = ["pack_to_device", "to_device"]

#: Kernels load vectors of up to 16 bytes.
_ALIGNMENT_BYTES = 16


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on a device; itself if it is there and has the dtype.

    The caller may overwrite a tensor on the host as soon as this returns, also a pinned one.
    """
    dtype = dtype or tensor.dtype
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    staged = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=True)
    return staged.copy_(tensor).to(device, non_blocking=True)


def pack_to_device(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one dimension and one dtype on a device, by a single copy from the host.

    Each begins at a multiple of 16 bytes. On the host they are returned as they are.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    unit = _ALIGNMENT_BYTES // tensors[0].element_size()
    rooms = [-(-len(tensor) // unit) * unit for tensor in tensors]
    staged = torch.empty(sum(rooms), dtype=tensors[0].dtype, device="cpu", pin_memory=True)
    for room, tensor in zip(staged.split(rooms), tensors, strict=True):
        room[: len(tensor)] = tensor
    pieces = staged.to(device, non_blocking=True).split(rooms)
    return [piece[: len(tensor)] for piece, tensor in zip(pieces, tensors, strict=True)]
