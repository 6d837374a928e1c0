"""BlockPool: the blocks of a paged cache, shared between requests with the same prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["BlockPool", "BlockTables", "Prefix"]

#: What identifies a block's content: the block before it, and its own tokens. The token ids are
#: compared themselves, so that two contents are never taken for the same.
_Content = tuple[int, tuple[int, ...]]


@dataclass
class Prefix:
    """How much of a request's tokens is known to the pool.

    Attributes:
        num_blocks: full blocks, from the first on.
        serial: of the last of them; 0 if there is none.
    """

    num_blocks: int = 0
    serial: int = 0


class BlockPool:
    """Hands out blocks, and finds full blocks again by their tokens (prefix sharing).

    A block is in use by one or more requests, or free. A free block that has known content keeps it
    until the block is needed for something else; the one unused for longest is taken first.

    Args:
        num_blocks: of the cache.
        block_size: tokens per block.
        keeps_content: whether blocks are shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, keeps_content: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._keeps_content = keeps_content
        self._users = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[_Content, int] = {}
        self._content_of: dict[int, _Content] = {}
        self._serial_of: dict[int, int] = {}
        self._last_serial = 0

    @property
    def num_free(self) -> int:
        """Blocks that no request uses."""
        return len(self._free)

    def is_free(self, block: int) -> bool:
        """Whether no request uses the block."""
        return not self._users[block]

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Blocks for one user, without content; the caller has checked num_free."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._users[block] = 1
        return blocks

    def find(self, token_ids: Sequence[int], most: int) -> tuple[list[int], Prefix]:
        """The blocks that hold the first tokens, at most this many, and nothing is changed."""
        blocks, prefix = [], Prefix()
        for content in self._contents(token_ids, prefix, most):
            block = self._block_of.get((prefix.serial, content))
            if block is None:
                break
            blocks.append(block)
            prefix = Prefix(len(blocks), self._serial_of[block])
        return blocks, prefix

    def use(self, blocks: Sequence[int]) -> None:
        """Add a user to blocks that `find` returned."""
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user. Blocks without one become free, the last of a request's first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            self._free[block] = None
            if block not in self._content_of:
                self._free.move_to_end(block, last=False)

    def register(
        self, blocks: Sequence[int], token_ids: Sequence[int], num_tokens: int, prefix: Prefix
    ) -> Prefix:
        """Make a request's full blocks findable, which the next step or an earlier one computes.

        A step writes all new keys and values before it reads any, so other requests of the same
        step can use them too.

        Args:
            blocks: of the request.
            token_ids: of the request.
            num_tokens: this many of them are in the cache after the step.
            prefix: what an earlier call returned.
        """
        most = num_tokens // self.block_size
        for tokens in self._contents(token_ids, prefix, most):
            content = (prefix.serial, tokens)
            block = blocks[prefix.num_blocks]
            known = self._block_of.get(content)
            if known is None:
                known = block
                self._last_serial += 1
                self._block_of[content], self._content_of[block] = block, content
                self._serial_of[block] = self._last_serial
            prefix = Prefix(prefix.num_blocks + 1, self._serial_of[known])
        return prefix

    def _contents(
        self, token_ids: Sequence[int], prefix: Prefix, most: int
    ) -> Iterator[tuple[int, ...]]:
        if not self._keeps_content:
            return
        for index in range(prefix.num_blocks, most):
            yield tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _forget(self, block: int) -> None:
        content = self._content_of.pop(block, None)
        if content is not None:
            del self._block_of[content], self._serial_of[block]


class _HasBlocks(Protocol):
    """A request, as BlockTables reads it."""

    index: int
    blocks: list[int]


@dataclass
class _Row:
    """The blocks of a request as a tensor with room for more; `source` is the list they are of."""

    source: list[int]
    tensor: torch.Tensor
    length: int = 0


class BlockTables:
    """Block tables of steps, on the host.

    Making a tensor of many lists takes milliseconds. So each request's blocks are kept as a tensor,
    and only those that were appended since the last step are written.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    def of(self, requests: Sequence[_HasBlocks]) -> torch.Tensor:
        """(len(requests), most blocks of one) int32; rows are padded with any blocks."""
        columns = max(len(request.blocks) for request in requests)
        table = torch.zeros(len(requests), columns, dtype=torch.int32, device="cpu")
        for out, request in zip(table.unbind(), requests, strict=True):
            row = self._row(request)
            out[: row.length] = row.tensor[: row.length]
        return table

    def forget(self, index: int) -> None:
        """Drop what is kept of a request that is finished."""
        self._rows.pop(index, None)

    def _row(self, request: _HasBlocks) -> _Row:
        row, blocks = self._rows.get(request.index), request.blocks
        # The scheduler appends to a request's list, and a preempted request gets a new one.
        if row is None or row.source is not blocks:
            row = _Row(blocks, torch.empty(0, dtype=torch.int32, device="cpu"))
            self._rows[request.index] = row
        if len(blocks) > len(row.tensor):
            grown = torch.empty(2 * len(blocks), dtype=torch.int32, device="cpu")
            grown[: row.length] = row.tensor[: row.length]
            row.tensor = grown
        if len(blocks) > row.length:
            new = torch.tensor(blocks[row.length :], dtype=torch.int32)
            row.tensor[row.length : len(blocks)] = new
            row.length = len(blocks)
        return row
