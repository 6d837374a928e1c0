"""Whether tensors share memory, decided from addresses and strides on the host.

The answers are exact for the layouts that engines have: slices of one buffer and views with gaps.
For other layouts they may be True where the elements only interleave; never False where they
overlap.
"""

from __future__ import annotations

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = [
    "check_shared_memory",
    "may_share_memory",
    "overlap",
    "overlaps_itself",
    "raise_not_writable",
]


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor lie at the same address."""
    if tensor.numel() < 2:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether an element of one tensor lies at the address of an element of another."""
    if not one.numel() or not other.numel() or one.device != other.device:
        return False
    distance = other.data_ptr() - one.data_ptr()
    if distance >= _extent(one) or -distance >= _extent(other):
        return False
    # Rows of the same pitch: they overlap if they do within one pitch.
    pitch, length = _rows(one)
    other_pitch, other_length = _rows(other)
    if pitch != other_pitch or max(length, other_length) > pitch:
        return True
    offset = distance % pitch
    return offset < length or offset + other_length > pitch


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return (sum((size - 1) * stride for stride, size in steps) + 1) * tensor.element_size()


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    """The largest stride, and the extent of what lies within one step of it, in bytes."""
    dims = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    if not dims:
        return tensor.element_size(), tensor.element_size()
    pitch, size = max(dims)
    return pitch * tensor.element_size(), _extent(tensor) - (
        (size - 1) * pitch * tensor.element_size()
    )


def raise_not_writable(kv_cache: torch.Tensor | None, output: torch.Tensor | None) -> None:
    """Outside of inference mode, PyTorch refuses to write to tensors that were made inside.

    Raises:
        InvalidInputError: for the first of these that was.
    """
    for name, tensor in (("kv_cache", kv_cache), ("output", output)):
        if tensor is not None and tensor.is_inference():
            raise InvalidInputError(
                f"{name} was created under torch.inference_mode(), and this call is outside of "
                "it, where such a tensor cannot be written. Make the call under "
                f"torch.inference_mode(), or create {name} outside."
            )


def may_share_memory(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    output: torch.Tensor | None,
) -> bool:
    """Whether `check_shared_memory` has to be asked; on a GPU every layer's call waits for this.

    There only the storages of the output and the other tensors are compared: two storages over
    the same memory come only from foreign code.
    """
    if not query.is_cuda:
        return True
    if output is None:
        return False
    storage = output.untyped_storage().data_ptr()
    return (
        query.untyped_storage().data_ptr() == storage
        or (key is not None and key.untyped_storage().data_ptr() == storage)
        or (value is not None and value.untyped_storage().data_ptr() == storage)
        or (kv_cache is not None and kv_cache.untyped_storage().data_ptr() == storage)
    )


def check_shared_memory(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    output: torch.Tensor | None,
) -> None:
    """Check that nothing is written to memory that is still to be read.

    Raises:
        InvalidInputError: it names the two tensors that share memory.
    """
    reads = [("query", query), ("key", key), ("value", value)]
    writes = [("output", output), ("kv_cache", None if key is None else kv_cache)]
    if output is not None and kv_cache is not None and overlap(output, kv_cache):
        raise InvalidInputError("output shares memory with kv_cache. Give it memory of its own.")
    for name, written in writes:
        for read_name, read in reads:
            if written is not None and read is not None and overlap(written, read):
                raise InvalidInputError(
                    f"{name} shares memory with {read_name}, which is read while {name} is "
                    f"written. Give {name} memory of its own."
                )
