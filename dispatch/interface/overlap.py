"""Whether tensors share memory, decided from addresses, shapes and strides on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_dispatch.errors import InvalidInputError

__all__ = [
    "check_no_inference",
    "overlap",
    "overlaps_itself",
    "reaches",
]

#: After this many steps of a search two tensors count as overlapping. Tensors made by slicing,
#: transposing and reshaping one piece of memory need a few steps for each dimension.
_MAX_STEPS = 20_000


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may have the same address.

    Exact for sliced and transposed tensors; other strides may count as overlapping.
    """
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
    """Whether an element of one tensor has the address of an element of another."""
    if not one.numel() or not other.numel() or one.device != other.device:
        return False
    storage, other_storage = one.untyped_storage(), other.untyped_storage()
    start, other_start = storage.data_ptr(), other_storage.data_ptr()
    if start + storage.nbytes() <= other_start or other_start + other_storage.nbytes() <= start:
        return False
    distance = other.data_ptr() - one.data_ptr()
    if distance >= _extent(one) or -distance >= _extent(other):
        return False
    size, other_size = one.element_size(), other.element_size()
    terms = [(1, 1 - other_size, size - 1)]
    terms += [(s * size, 0, n - 1) for s, n in zip(one.stride(), one.shape, strict=True)]
    terms += [(s * other_size, 1 - n, 0) for s, n in zip(other.stride(), other.shape, strict=True)]
    return reaches(terms, distance)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return (sum((size - 1) * stride for stride, size in steps) + 1) * tensor.element_size()


def reaches(terms: list[tuple[int, int, int]], target: int) -> bool:
    """Whether the sum of stride * x is the target for some x within each term's bounds.

    A search from the largest stride to the smallest, as in numpy.shares_memory. The strides of a
    tensor are nearly multiples of each other, so few x are possible for each.
    """
    by_stride: dict[int, tuple[int, int]] = {}
    for stride, least, most in terms:
        before = by_stride.get(stride, (0, 0))
        by_stride[stride] = (before[0] + least, before[1] + most)
    by_stride.pop(0, None)
    ordered = sorted(by_stride, reverse=True)
    lows, highs = [0], [0]  # of the sums of the later terms
    for stride in reversed(ordered):
        lows.append(lows[-1] + stride * by_stride[stride][0])
        highs.append(highs[-1] + stride * by_stride[stride][1])
    lows.reverse()
    highs.reverse()

    def candidates(index: int, left: int) -> Iterator[int]:
        stride = ordered[index]
        least, most = by_stride[stride]
        first = max(least, -((highs[index + 1] - left) // stride))
        last = min(most, (left - lows[index + 1]) // stride)
        return (left - stride * x for x in range(first, last + 1))

    steps, seen = 0, set()
    stack = [(0, target)]
    while stack:
        index, left = stack.pop()
        if index == len(ordered):
            if left == 0:
                return True
            continue
        for rest in candidates(index, left):
            steps += 1
            if steps > _MAX_STEPS:
                return True
            if (index + 1, rest) not in seen:
                seen.add((index + 1, rest))
                stack.append((index + 1, rest))
    return False


def check_no_inference(**tensors: torch.Tensor | None) -> None:
    """Check that PyTorch lets these be written: one made in inference mode only inside of it.

    Raises:
        InvalidInputError: names the first that cannot be written here.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise InvalidInputError(
                f"{name} was created under torch.inference_mode(), and this call is outside of "
                "it, where such a tensor cannot be written. Call under torch.inference_mode(), or "
                f"create {name} outside."
            )
