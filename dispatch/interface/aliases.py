"""Which caches share memory, from their addresses, shapes and strides.

Caches can be one tensor under two names (KV sharing), views of each other, or parts of a larger
block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.overlap import reaches

__all__ = ["groups_of"]


class _Place(NamedTuple):
    """A cache's place in memory, in bytes."""

    device: torch.device
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: int

    @property
    def end(self) -> int:
        """The address after the last element."""
        steps = zip(self.strides, self.shape, strict=True)
        return self.address + sum((size - 1) * stride for stride, size in steps) + self.element


def groups_of(caches: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """The caches whose blocks to move, by index, without duplicates of the same memory.

    In a group, each block of one cache overlaps only the same block of another, so the whole group
    must be read before it is written. Groups are independent of each other.

    Raises:
        InvalidInputError: a block of one cache overlaps another block of another cache.
    """
    indices = [index for index, cache in enumerate(caches) if cache.numel()]
    groups = _groups(tuple(_place_of(caches[index]) for index in indices))
    return tuple(tuple(indices[i] for i in group) for group in groups)


def _place_of(cache: torch.Tensor) -> _Place:
    size, shape = cache.element_size(), tuple(cache.shape)
    strides = tuple(stride * size for stride in cache.stride())
    return _Place(cache.device, cache.data_ptr(), shape, strides, size)


@functools.lru_cache(maxsize=32)
def _groups(places: tuple[_Place, ...]) -> tuple[tuple[int, ...], ...]:
    first = {place: index for index, place in reversed(list(enumerate(places)))}
    group_of = {index: {index} for index in first.values()}
    ordered = sorted(group_of, key=lambda i: (str(places[i].device), places[i].address))
    for position, one in enumerate(ordered):
        for other in ordered[position + 1 :]:
            if places[other].device != places[one].device or (
                places[other].address >= places[one].end
            ):
                break
            if group_of[one] is group_of[other] or not _overlap(places[one], places[other]):
                continue
            merged = group_of[one] | group_of[other]
            group_of.update(dict.fromkeys(merged, merged))
    return tuple(tuple(sorted(group)) for index, group in group_of.items() if index == min(group))


def _overlap(one: _Place, other: _Place) -> bool:
    """Whether any byte of one cache is in the same block of the other.

    Raises:
        InvalidInputError: a byte is in different blocks of the two.
    """
    distance = other.address - one.address
    inner = _bytes_of(one, other)
    blocks, other_blocks = one.shape[0], other.shape[0]
    step, other_step = one.strides[0], other.strides[0]
    if blocks == 1:
        step = other_step  # the stride of a single block has no meaning
    if other_blocks == 1:
        other_step = step
    if step != other_step:
        if reaches([(step, 0, blocks - 1), (other_step, 1 - other_blocks, 0), *inner], distance):
            raise _conflict(one, other)
        return False
    # Only the difference of the two block numbers matters.
    for least, most in ((1, blocks - 1), (1 - other_blocks, -1)):
        if least <= most and reaches([(step, least, most), *inner], distance):
            raise _conflict(one, other)
    return reaches(inner, distance)


def _conflict(one: _Place, other: _Place) -> InvalidInputError:
    return InvalidInputError(
        f"Two of the caches share memory, {one.shape} and {other.shape}, and a block of one "
        "overlaps another block of the other. Give caches of one plan."
    )


def _bytes_of(one: _Place, other: _Place) -> list[tuple[int, int, int]]:
    """(stride, least, most) of the differences between the bytes in a block of each."""
    inner = [(1, 1 - other.element, one.element - 1)]
    for stride, size in zip(one.strides[1:], one.shape[1:], strict=True):
        inner.append((stride, 0, size - 1))
    for stride, size in zip(other.strides[1:], other.shape[1:], strict=True):
        inner.append((stride, 1 - size, 0))
    return inner
