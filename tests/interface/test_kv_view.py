"""KVCacheView: what it accepts, what it says about its memory, and what it rejects."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    InvalidInputError,
    KVCacheView,
    attention,
    copy_blocks,
    kv_strides_of,
    swap_blocks,
    write_kv_cache,
)
from attn_dispatch.interface.kv_view import as_kv_cache, fits_heads, form_of

#: (num_blocks, block_size, num_kv_heads, head_size)
SHAPE = (6, 4, 2, 8)


def pair(shape=SHAPE, dtype=torch.float32, **more):
    """Keys and values, each with memory of its own."""
    return torch.zeros(shape, dtype=dtype, **more), torch.zeros(shape, dtype=dtype, **more)


# What it is.


def test_it_is_over_the_memory_of_its_tensors():
    key, value = pair()
    view = KVCacheView(key, value)
    assert view.key is key
    assert view.value is value
    assert view.shape == (6, 2, 4, 2, 8)
    assert (view.dtype, view.device, len(view)) == (torch.float32, torch.device("cpu"), 6)


def test_its_shape_has_the_larger_head():
    view = KVCacheView(torch.zeros(6, 4, 2, 8), torch.zeros(6, 4, 2, 24))
    assert view.shape == (6, 2, 4, 2, 24)
    assert [fits_heads(view, *sizes) for sizes in ((8, 24), (24, 24), (8, 8))] == [
        True,
        False,
        False,
    ]


def test_one_tensor_and_a_view_of_it_are_told_apart_by_their_form():
    cache = torch.zeros(6, 2, 4, 2, 8)
    halves = KVCacheView(*cache.unbind(1))
    forms = [form_of(each) for each in (cache, halves, KVCacheView(*pair()))]
    assert len(set(forms)) == 3


@pytest.mark.parametrize("as_type", [tuple, list])
def test_a_pair_becomes_a_view(as_type):
    view = as_kv_cache(as_type(pair()))
    assert isinstance(view, KVCacheView)
    assert as_kv_cache(view) is view


def test_a_view_on_the_meta_device_has_strides():
    strides = kv_strides_of(KVCacheView(*pair(device="meta")))
    assert (strides.key, strides.alignment, strides.separate) == ((256, 64, 32), 16, True)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 4, 2, 8), (0, 64, 32)), ((6, 1, 2, 8), (64, 0, 32)), ((6, 4, 1, 8), (128, 32, 0))],
)
def test_a_stride_of_a_single_block_token_or_head_is_0(shape, expected):
    assert kv_strides_of(KVCacheView(*pair(shape))).key == expected


@pytest.mark.parametrize(("first", "alignment"), [(0, 16), (4, 16), (2, 8), (1, 4)])
def test_alignment_is_that_of_both_addresses(first, alignment):
    memory = torch.zeros(1000)
    key, value = memory[:384].view(SHAPE), memory[400 + first : 784 + first].view(SHAPE)
    strides = kv_strides_of(KVCacheView(key, value))
    assert (strides.alignment, strides.is_aligned) == (alignment, alignment == 16)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(6, 2, 4, 2, 8),
        torch.zeros(6, 2, 2, 4, 8).transpose(2, 3),
        torch.zeros(6, 3, 2, 4, 2, 8)[:, 1],
        torch.zeros(0, 2, 4, 2, 8),
    ],
    ids=["NHD", "HND", "blocks apart", "no blocks"],
)
def test_a_tensor_whose_blocks_are_dense_has_no_strides(cache):
    assert kv_strides_of(cache) is None


# What it rejects.

_KEY, _VALUE = pair()
_MEMORY = torch.zeros(1000)
INVALID = {
    "three tensors": ((_KEY, _VALUE, _KEY), "has 3 members; give one tensor, or the pair"),
    "one tensor": ((_KEY,), "has 1 members; give one tensor, or the pair"),
    "another type": ((_KEY, None), "The value of a KVCacheView is a NoneType"),
    "sparse": ((_KEY.to_sparse(), _VALUE), "The key of a KVCacheView is sparse, nested or on"),
    "five dimensions": ((_KEY[None], _VALUE), "num_blocks, block_size, num_kv_heads, head_size"),
    "elements apart": (
        (torch.zeros(6, 4, 2, 16)[..., ::2], _VALUE),
        "The key of a KVCacheView has strides .*; the elements of a head must be contiguous",
    ),
    "overlapping strides": (
        (_KEY, torch.zeros(400).as_strided(SHAPE, (64, 15, 8, 1))),
        "The value of a KVCacheView overlaps itself: shape .* Each slot needs memory",
    ),
    "expanded": ((_KEY, torch.zeros(6, 4, 1, 8).expand(SHAPE)), "value .* overlaps itself"),
    "dtypes": ((_KEY, _VALUE.bfloat16()), "torch.float32 .* torch.bfloat16 .* the same blocks"),
    "blocks": ((_KEY, torch.zeros(5, 4, 2, 8)), "Both need the same blocks, block size, heads"),
    "block sizes": ((_KEY, torch.zeros(6, 5, 2, 8)), "Both need the same blocks, block size"),
    "heads": ((_KEY, torch.zeros(6, 4, 3, 8)), "Both need the same blocks, block size, heads"),
    "devices": ((_KEY, torch.zeros(SHAPE, device="meta")), "on cpu, and its value .* on meta"),
    "the same tensor": ((_KEY, _KEY), "The key and the value of a KVCacheView share memory"),
    "shared memory": (
        (_MEMORY[:384].view(SHAPE), _MEMORY[380:764].view(SHAPE)),
        "share memory. Give views of disjoint parts",
    ),
}


@pytest.mark.parametrize("what", INVALID)
def test_a_pair_that_is_no_cache_is_rejected(what):
    parts, message = INVALID[what]
    with pytest.raises(InvalidInputError, match=message):
        as_kv_cache(parts)


#: What takes a cache -> a call with this one.
CALLS = {
    "attention": lambda cache: attention(
        torch.ones(1, 2, 8),
        torch.ones(1, 2, 8),
        torch.ones(1, 2, 8),
        seq_lens=[1],
        query_lens=[1],
        kv_cache=cache,
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
    ),
    "write_kv_cache": lambda cache: write_kv_cache(
        torch.ones(1, 2, 8), torch.ones(1, 2, 8), cache, torch.zeros(1, dtype=torch.int64)
    ),
    "copy_blocks": lambda cache: copy_blocks([cache], torch.tensor([[0, 1]])),
    "swap_blocks": lambda cache: swap_blocks(pair(), cache, torch.tensor([[0, 1]])),
}


@pytest.mark.parametrize("what", [name for name in INVALID if "tensor" not in name])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_written_to_a_pair_that_is_no_cache(call, what):
    parts, message = INVALID[what]
    before = [None if part is None or part.is_meta else part.clone() for part in parts]
    with pytest.raises(InvalidInputError, match=message):
        CALLS[call](parts)
    for part, old in zip(parts, before, strict=True):
        assert old is None or torch.equal(part.to_dense(), old.to_dense())


@pytest.mark.parametrize("call", ["attention", "write_kv_cache", "copy_blocks"])
def test_a_view_without_data_is_rejected(call):
    with pytest.raises(InvalidInputError, match=r"\bmeta\b"):
        CALLS[call](KVCacheView(*pair(device="meta")))


@pytest.mark.parametrize("call", CALLS)
def test_a_pair_is_written(call):
    parts = pair()
    for part in parts:
        part[0] = 1.0
    given = pair() if call == "swap_blocks" else parts
    if call == "swap_blocks":
        swap_blocks(parts, given, torch.tensor([[0, 1]]))
    else:
        CALLS[call](parts)
    written = 1 if call in ("copy_blocks", "swap_blocks") else 0
    for part in given:
        assert part[written].any()
        assert not part[2:].any()
