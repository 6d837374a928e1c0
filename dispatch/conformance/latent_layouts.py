"""Checks of caches of latents that are views: right, or rejected before anything is written.

An engine may allocate the caches of all layers as one tensor, so that the blocks of a layer are
apart, or have gaps after each entry. No field of the request states the strides of such a cache. So
a backend checks them at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from attn_dispatch.conformance.check import BackendUnderTest, Check, same_bits
from attn_dispatch.conformance.tolerance import ErrorBound, require
from attn_dispatch.conformance.unchanged import memory_of
from attn_dispatch.errors import InvalidInputError, UnsupportedError

__all__ = ["latent_layouts"]

#: What the memory around the cache holds: NaN in every type that has one of these bits.
_UNUSED = 0xFF

#: How a cache is a view of a larger one: a shape of (num_blocks, block_size, width) -> that of the
#: memory, and the view of it.
_View = Callable[[torch.Tensor], torch.Tensor]
_VIEWS: dict[str, tuple[Callable[[int, int, int], tuple[int, ...]], _View]] = {
    "blocks of two layers in turn": (
        lambda blocks, size, width: (blocks, 2, size, width),
        lambda memory: memory[:, 1],
    ),
    "a gap after each entry": (
        lambda blocks, size, width: (blocks, size, width + 64),
        lambda memory: memory[..., :-64],
    ),
    "entries of a block apart": (
        lambda blocks, size, width: (size, blocks, width),
        lambda memory: memory.transpose(0, 1),
    ),
    "elements apart": (
        lambda blocks, size, width: (blocks, size, width, 2),
        lambda memory: memory[..., 0],
    ),
    "at an odd place": (
        lambda blocks, size, width: (blocks * size * width + 1,),
        lambda memory: memory[1:],
    ),
}


def latent_layouts(target: BackendUnderTest) -> Iterator[Check]:
    """Each way in which a cache of latents may be a view."""
    shows = (
        "Over such a cache the result is right and nothing around it is written, or it is rejected "
        "before anything is written."
    )
    for name in _VIEWS:
        yield Check(name, shows, target.base, partial(_right_or_rejected, target, name))


def _right_or_rejected(target: BackendUnderTest, name: str) -> ErrorBound | None:
    step = target.step(target.base)
    contents, (shape_of, view) = step.kv_cache, _VIEWS[name]

    def laid(content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The view with this content, and all bytes of its memory."""
        memory = content.new_empty(shape_of(*content.shape))
        if memory.untyped_storage().nbytes() < step.min_cache_bytes:
            memory.untyped_storage().resize_(step.min_cache_bytes)
        memory_of(memory).fill_(_UNUSED)
        cache = view(memory).view(content.shape) if memory.dim() == 1 else view(memory)
        cache.copy_(content)
        return cache, memory_of(memory)

    given, after = laid(contents)
    before = after.clone()
    try:
        done = target.forward(step, given)
    except (InvalidInputError, UnsupportedError):
        require(same_bits(before, after), "the cache was rejected after it was written")
        return None
    finding = target.judge(step, done)
    _, expected = laid(target.forward(step).cache)
    require(
        same_bits(after, expected),
        "other bytes are written than to a contiguous cache, or outside of the cache",
    )
    return finding
