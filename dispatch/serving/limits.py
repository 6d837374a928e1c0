"""Limits: sizes of an engine's cache and of its steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from attn_dispatch.arguments import as_int
from attn_dispatch.errors import InvalidInputError

__all__ = ["Limits", "sized"]

#: The part of a GPU's free memory that the cache takes by default, and the cache's size elsewhere.
_PART_OF_MEMORY, _CACHE_BYTES = 0.85, 1 << 30
_HOST_BYTES = 1 << 30
#: New tokens of a step. A GPU's matrix products reach their rate at several thousand rows.
_MAX_TOKENS = {"cuda": 8192}
_MAX_TOKENS_ELSEWHERE = 2048


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of the cache, and limits of a step.

    Attributes:
        max_requests: requests of a step.
        max_tokens: new tokens of a step; longer prompts are computed in chunks. None for 8,192 on a
            GPU and 2,048 on a CPU, or max_requests if that is more.
        max_seq_len: tokens of a request, prompt and answer; None for the model's own limit.
        cache_bytes: memory of the cache; None for 85 % of what is free on a GPU, and 1 GiB on a
            CPU. It is never larger than max_requests requests of max_seq_len tokens need.
        num_blocks: blocks of the cache; None for what fits into cache_bytes.
        host_bytes: memory on the host for requests that are swapped out.
    """

    max_requests: int = 64
    max_tokens: int | None = None
    max_seq_len: int | None = None
    cache_bytes: int | None = None
    num_blocks: int | None = None
    host_bytes: int = _HOST_BYTES

    def __post_init__(self) -> None:
        as_int("max_requests", self.max_requests, 1)
        if self.max_tokens is not None:
            as_int("max_tokens", self.max_tokens, self.max_requests)
        as_int("host_bytes", self.host_bytes, 0)
        for name, least in (("max_seq_len", 2), ("cache_bytes", 1), ("num_blocks", 1)):
            value = getattr(self, name)
            if value is not None:
                as_int(name, value, least)


def sized(
    limits: Limits,
    model_limit: int | None,
    step_limit: int | None,
    block_size: int,
    bytes_per_block: int,
    device: torch.device,
) -> tuple[Limits, int]:
    """The limits with numbers where they have None, and the number of blocks on the host.

    Args:
        limits: as they were given.
        model_limit: the most tokens of a request that the model was made for, or None.
        step_limit: the most new tokens of a step with this model, or None.
        block_size: tokens per block.
        bytes_per_block: over all layers.
        device: of the cache.

    Raises:
        InvalidInputError: max_seq_len is larger than the model's limit, or the memory too small.
    """
    max_tokens = limits.max_tokens
    if max_tokens is None:
        usual = _MAX_TOKENS.get(device.type, _MAX_TOKENS_ELSEWHERE)
        max_tokens = max(usual, limits.max_requests)
    longest = limits.max_seq_len or model_limit or max_tokens
    if model_limit is not None and longest > model_limit:
        raise InvalidInputError(
            f"max_seq_len={longest}, and the model was made for {model_limit} tokens."
        )
    num_blocks = limits.num_blocks
    if num_blocks is None:
        memory = limits.cache_bytes or _free_bytes(device)
        needed = -(-longest // block_size) * limits.max_requests
        num_blocks = min(memory // bytes_per_block, needed)
        if num_blocks < 1:
            raise InvalidInputError(
                f"A block of {block_size} tokens takes {bytes_per_block} bytes over all layers, "
                f"and the cache has {memory}. Raise cache_bytes."
            )
    filled = dataclasses.replace(
        limits,
        max_requests=min(limits.max_requests, step_limit or limits.max_requests),
        max_tokens=min(max_tokens, step_limit or max_tokens),
        max_seq_len=min(longest, num_blocks * block_size),
        cache_bytes=num_blocks * bytes_per_block,
        num_blocks=num_blocks,
    )
    return filled, min(limits.host_bytes // bytes_per_block, num_blocks)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CACHE_BYTES
    free: int = torch.cuda.mem_get_info(device)[0]
    return int(free * _PART_OF_MEMORY)
