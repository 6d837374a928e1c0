"""BlockPool: no block has two owners with different content, whatever happens."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attn_dispatch.serving.blocks import BlockPool, BlockTables, Prefix
from attn_dispatch.serving.requests import Request

SIZE = 2
NUM_BLOCKS = 7


class Pool(RuleBasedStateMachine):
    """Requests that begin, grow and end; `content` is what a cache would hold in each block."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.requests = []
        self.content = {}

    # Few different tokens, so that prefixes are often equal.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS * SIZE))
    def begin(self, tokens):
        found, prefix = self.pool.find(tokens, len(tokens) // SIZE)
        for index, block in enumerate(found):
            assert self.content[block] == tokens[: (index + 1) * SIZE]
        needed = self.pool.blocks_for(len(tokens)) - len(found)
        if sum(map(self.pool.is_free, found)) + needed > self.pool.num_free:
            return
        self.pool.use(found)
        blocks = [*found, *self.pool.allocate(needed)]
        for index, block in enumerate(blocks[len(found) :], len(found)):
            self.content[block] = tokens[: (index + 1) * SIZE]
        self.pool.register(blocks, tokens, len(tokens), prefix)
        self.requests.append((tokens, blocks))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data):
        _, blocks = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pool.release(blocks)

    @invariant()
    def requests_keep_their_content(self):
        for tokens, blocks in self.requests:
            for index, block in enumerate(blocks):
                assert self.content[block] == tokens[: (index + 1) * SIZE]

    @invariant()
    def blocks_are_free_or_used(self):
        used = {block for _, blocks in self.requests for block in blocks}
        assert self.pool.num_free == NUM_BLOCKS - len(used)
        assert all(self.pool.is_free(block) != (block in used) for block in range(NUM_BLOCKS))


TestPool = Pool.TestCase


def test_the_block_that_was_unused_for_longest_loses_its_content_first():
    pool = BlockPool(2, 1)
    for token in (5, 6):
        blocks = pool.allocate(1)
        pool.register(blocks, [token], 1, Prefix())
        pool.release(blocks)
    pool.allocate(1)
    assert pool.find([5], 1)[0] == []
    assert len(pool.find([6], 1)[0]) == 1


def test_equal_content_of_two_requests_is_found_once():
    pool = BlockPool(4, 1)
    one, two = pool.allocate(2), pool.allocate(2)
    assert pool.register(one, [5, 6], 2, Prefix()) == pool.register(two, [5, 6], 2, Prefix())
    assert pool.find([5, 6], 2)[0] == one
    pool.release(two)
    assert pool.find([5, 6], 2)[0] == one


def test_a_pool_without_content_shares_nothing():
    pool = BlockPool(2, 1, keeps_content=False)
    blocks = pool.allocate(1)
    assert pool.register(blocks, [5], 1, Prefix()) == Prefix()
    assert pool.find([5], 1) == ([], Prefix())


def test_tables_follow_the_blocks_of_requests():
    """A request's list grows while it runs, and is another one after a preemption."""
    rng = random.Random(2)
    tables, requests = BlockTables(), [Request(index, [0], 1) for index in range(5)]
    for _ in range(200):
        for request in rng.sample(requests, 3):
            match rng.randrange(8):
                case 0:
                    request.blocks = [rng.randrange(99) for _ in range(rng.randint(1, 4))]
                case 1:
                    tables.forget(request.index)
                case _:
                    request.blocks += [rng.randrange(99) for _ in range(rng.randint(0, 3))]
        step = rng.sample([each for each in requests if each.blocks] or requests, 1)
        step += [each for each in requests if each not in step and each.blocks]
        table = tables.of(step)
        assert table.dtype == torch.int32
        assert table.shape == (len(step), max(len(each.blocks) for each in step))
        for row, request in zip(table.tolist(), step, strict=True):
            assert row[: len(request.blocks)] == request.blocks
