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
    """Where a request's blocks are in the matrix; `source` is the list that they are of."""

    number: int
    source: list[int]
    length: int = 0


class BlockTables:
    """Block tables of steps, on the host.

    Making a tensor of many lists takes milliseconds. So the blocks of all requests are kept in a
    matrix, and only those that were appended since the last step are written to it.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._unused: list[int] = []
        self._matrix = torch.zeros(0, 0, dtype=torch.int32, device="cpu")

    def of(self, requests: Sequence[_HasBlocks]) -> torch.Tensor:
        """(len(requests), most blocks of one) int32; rows are padded with any blocks."""
        columns = max(len(request.blocks) for request in requests)
        if columns > self._matrix.shape[1]:
            self._grow(self._matrix.shape[0], 2 * columns)
        rows = torch.tensor([self._row(request) for request in requests], device="cpu")
        return self._matrix[:, :columns].index_select(0, rows)

    def forget(self, index: int) -> None:
        """Drop what is kept of a request that is finished."""
        row = self._rows.pop(index, None)
        if row is not None:
            self._unused.append(row.number)

    def _row(self, request: _HasBlocks) -> int:
        """The number of the request's row, with all of its blocks."""
        row, blocks = self._rows.get(request.index), request.blocks
        # The scheduler appends to a request's list, and a preempted request gets a new one.
        if row is None or row.source is not blocks:
            self.forget(request.index)
            if not self._unused:
                count = len(self._matrix)
                self._unused = list(range(count, 2 * count + 8))
                self._grow(2 * count + 8, self._matrix.shape[1])
            row = self._rows[request.index] = _Row(self._unused.pop(), blocks)
        if len(blocks) > row.length:
            new = torch.tensor(blocks[row.length :], dtype=torch.int32, device="cpu")
            self._matrix[row.number, row.length : len(blocks)] = new
            row.length = len(blocks)
        return row.number

    def _grow(self, rows: int, columns: int) -> None:
        grown = self._matrix.new_zeros(rows, columns)
        grown[: self._matrix.shape[0], : self._matrix.shape[1]] = self._matrix
        self._matrix = grown
