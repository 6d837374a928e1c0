"""Caches that share memory: each pair of blocks is applied once to each piece of memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attn_dispatch as ad
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.aliases import groups_of
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.overlap import overlap

CHAIN = [[0, 1], [1, 2], [2, 3]]


def numbered(layout="NHD", blocks=6, dtype=torch.float32):
    """A cache in which every element is the number of its block."""
    kv_cache = ad.allocate_kv_cache(kv_cache_shape(blocks, 4, 2, 16), STRIDE_ORDERS[layout], dtype)
    for block in range(blocks):
        kv_cache[block] = block
    return kv_cache


def side_by_side():
    """Two layers in one buffer, block by block."""
    buffer = torch.zeros(6, 2, 2, 4, 2, 8)
    for block in range(6):
        buffer[block] = block
    return [buffer[:, 0], buffer[:, 1]]


def same_storage_twice():
    """What two packages see of one buffer: different storages at the same address."""
    kv_cache = numbered()
    return [kv_cache, torch.from_dlpack(kv_cache.detach())]


ALIASES = {
    "the same tensor": lambda: [numbered()] * 3,
    "views of it": lambda: [(c := numbered()), c[:], c.view(c.shape)],
    "a view of another dtype": lambda: [(c := numbered()), c.view(torch.int32)],
    "a view of another shape": lambda: [(c := numbered()), c.flatten(1)],
    "keys and values of one cache": lambda: [(c := numbered())[:, 0], c[:, 1]],
    "a cache and its keys": lambda: [(c := numbered()), c[:, 0]],
    "its keys and the cache": lambda: [(c := numbered())[:, 0], c],
    "some heads": lambda: [(c := numbered("HND")), c[:, :, :, :1]],
    "fewer blocks": lambda: [(c := numbered()), c[:4]],
    "layers side by side in a block": side_by_side,
    "two storages at one address": same_storage_twice,
    "caches apart": lambda: [numbered(), numbered("HND")],
    "fp8": lambda: [numbered(dtype=torch.float8_e4m3fn)] * 2,
    "latents": lambda: [(c := numbered().flatten(3)[:, 0]), c],
}


def firsts(kv_cache):
    """The number that fills each block."""
    blocks = kv_cache.view(torch.float32) if kv_cache.dtype == torch.int32 else kv_cache
    found = [set(block.float().flatten().tolist()) for block in blocks]
    assert all(len(each) == 1 for each in found), found
    return [int(each.pop()) for each in found]


@pytest.mark.parametrize("kind", ALIASES)
def test_a_chain_of_pairs_is_applied_once(kind):
    caches = ALIASES[kind]()
    ad.copy_blocks(caches, torch.tensor(CHAIN))
    for kv_cache in caches:
        assert firsts(kv_cache) == [0, 0, 1, 2, 4, 5][: len(kv_cache)]


@pytest.mark.parametrize("kind", ALIASES)
def test_blocks_are_exchanged_once(kind):
    caches = ALIASES[kind]()
    ad.AttentionBackend.copy_blocks(caches, torch.tensor([[0, 3], [3, 0]], dtype=torch.int32))
    for kv_cache in caches:
        assert firsts(kv_cache) == [3, 1, 2, 0, 4, 5][: len(kv_cache)]


OVERLAPS = {
    "shifted by a block": lambda: [(c := numbered()), c[1:]],
    "shifted by half a block": lambda: [
        (c := numbered()),
        c.flatten()[128:-128].view(5, 2, 4, 2, 16),
    ],
    "blocks of another size": lambda: [(c := numbered()), c.view(12, 1, 4, 2, 16)],
    "every other block": lambda: [(c := numbered()), c[::2]],
    "a cache that overlaps itself": lambda: [torch.zeros(1, 2, 4, 2, 8).expand(6, 2, 4, 2, 8)],
}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_blocks_that_overlap_other_blocks_are_rejected(kind):
    caches = OVERLAPS[kind]()
    before = [kv_cache.clone() for kv_cache in caches]
    with pytest.raises(InvalidInputError, match="overlaps"):
        ad.copy_blocks(caches, torch.tensor([[0, 1]]))
    for kv_cache, old in zip(caches, before, strict=True):
        assert torch.equal(kv_cache, old)


@pytest.mark.parametrize("alias", [lambda c: c, lambda c: c[:], lambda c: c.view(c.shape)])
def test_a_swap_within_one_cache_reads_before_it_writes(alias):
    kv_cache = numbered()
    ad.swap_blocks(kv_cache, alias(kv_cache), torch.tensor([*CHAIN, [3, 0]]))
    assert firsts(kv_cache) == [3, 0, 1, 2, 4, 5]


def test_layers_that_share_a_cache_are_forked_once():
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = {name: ad.AttentionSpec(**shape, kv_sharing=name != "a") for name in "abc"}
    plan = ad.plan_kv_cache(specs, "cpu", shared={"b": "a", "c": "a"})
    caches = plan.allocate(num_blocks=4, device="cpu")
    for block in range(4):
        caches["a"][block] = block
    ad.copy_blocks(caches.values(), torch.tensor(CHAIN))
    assert firsts(caches["b"]) == [0, 0, 1, 2]


VIEWS = st.tuples(
    st.integers(0, 6),  # first element
    st.integers(1, 4),  # blocks
    st.integers(1, 9),  # from block to block
    st.integers(1, 3),  # elements of a block
    st.integers(1, 4),  # from element to element
)


@given(VIEWS, VIEWS)
def test_overlaps_are_found_exactly(one, other):
    memory = torch.zeros(64)
    views, addresses = [], []
    for first, blocks, step, size, inner in (one, other):
        view = memory.as_strided((blocks, size), (step, inner), first)
        views.append(view)
        places = itertools.product(range(blocks), range(size))
        addresses.append({(first + b * step + i * inner, b) for b, i in places})
    shared = [(b, c) for (a, b), (d, c) in itertools.product(*addresses) if a == d]
    same_strides = one[2] == other[2] or 1 in (one[1], other[1])
    first, second = ((v.data_ptr(), v.shape, v.stride()) for v in views)
    if first == second:
        assert len(groups_of(views)) == 1
        return
    if any(b != c for b, c in shared) or (shared and not same_strides):
        with pytest.raises(InvalidInputError, match="overlaps another block"):
            groups_of(views)
        return
    assert len(groups_of(views)) == (1 if shared else 2)


@given(st.data())
def test_overlap_agrees_with_numpy(data):
    buffer = torch.zeros(60)

    def view():
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        start = data.draw(st.integers(0, max(0, 60 - extent)))
        return buffer.as_strided(shape, strides, start) if start + extent <= 60 else buffer[:1]

    one, other = view(), view()
    assert overlap(one, other) == np.shares_memory(one.numpy(), other.numpy())
