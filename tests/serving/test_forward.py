"""The steps that warm a model up, for any limits."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest

from attn_dispatch.serving.forward import Forward
from attn_dispatch.serving.limits import Limits


class NoLayers:
    """All that is asked of a model whose steps are not run."""

    states = None
    layers: ClassVar = {}


@pytest.fixture
def steps(monkeypatch):
    """The chunks of each step that would run."""
    seen = []
    monkeypatch.setattr(Forward, "run", lambda self, chunks: seen.append(list(chunks)))
    return seen


@pytest.mark.parametrize("block_size", [4, 16])
def test_steps_that_warm_up_fit_the_limits(block_size, steps):
    cases = itertools.product((1, 2, 100, 8192), (2, 33, 4224), (1, 3, 4000), (1, 2, 64))
    for max_tokens, max_seq_len, num_blocks, max_requests in cases:
        steps.clear()
        limits = Limits(
            max_requests=min(max_requests, max_tokens),
            max_tokens=max_tokens,
            max_seq_len=max(2, min(max_seq_len, num_blocks * block_size)),
            num_blocks=num_blocks,
        )
        Forward(NoLayers(), block_size)._warm_up(limits)
        for chunks in steps:
            assert 0 < len(chunks) <= limits.max_requests
            assert sum(chunk.end - chunk.start for chunk in chunks) <= max_tokens
            blocks = [block for chunk in chunks for block in chunk.request.blocks]
            assert len(set(blocks)) == len(blocks)
            assert max(blocks) < num_blocks
            for chunk in chunks:
                assert chunk.end <= limits.max_seq_len
                assert len(chunk.request.blocks) * block_size >= chunk.end


def test_the_first_step_is_as_large_as_steps_are(steps):
    limits = Limits(max_requests=64, max_tokens=8192, max_seq_len=4224, num_blocks=16896)
    Forward(NoLayers(), 16)._warm_up(limits)
    assert [[chunk.end - chunk.start for chunk in each] for each in steps] == [[4096] * 2, [1] * 2]
