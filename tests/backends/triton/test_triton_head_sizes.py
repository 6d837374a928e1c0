"""TRITON_ATTN with every pair of head sizes, by both ways of loading, against float64. On a GPU.

    export CUDA_LAUNCH_BLOCKING=1
    pytest tests/backends/triton/test_triton_head_sizes.py -m gpu -k part0 &   # to part7

An illegal access ends a process, so parts run in processes of their own.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_dispatch.backends.triton import operands
from attn_dispatch.interface.types import AttentionType
from support.cases import Case, Step, layer_spec
from support.triton_cases import builder_of, check, forward, needs_gpu

SIZES = (16, 32, 64, 80, 96, 128, 192, 256, 512)
#: Also sizes that fill no tile.
ODD = ((40, 7), (7, 40), (72, 20), (160, 24), (256, 1), (1, 256), (257, 16), (512, 17))
PAIRS = (*itertools.product(SIZES, SIZES), *ODD)
PARTS = 8

PLAIN = {
    "causal": {},
    "encoder": {"attn_type": AttentionType.ENCODER_ONLY, "block_size": None},
}
RICH = {
    "all features": {"alibi": True, "sinks": True, "logits_soft_cap": 20.0, "sliding_window": 40},
    "encoder, ranges": {
        "attn_type": AttentionType.ENCODER_ONLY,
        "block_size": None,
        "bidirectional_ranges": True,
        "alibi": True,
        "sinks": True,
    },
    "encoder over a cache": {
        "causal": False,
        "bidirectional_ranges": True,
        "alibi": True,
        "sinks": True,
        "batch_invariant": False,
    },
    "mask": {"custom_mask": True},
}
LENS = {"few": ((1, 1), (32, 32)), "many": ((70, 3, 150), (70, 130, 150))}


#: Each pair, in one of the parts.
PARAMS = [
    pytest.param(sizes, id=f"part{i % PARTS}-{sizes[0]}-{sizes[1]}")
    for i, sizes in enumerate(PAIRS)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("fields", [*PLAIN, *RICH])
@pytest.mark.parametrize("sizes", PARAMS)
def test_a_pair_of_head_sizes(sizes, fields, descriptors, dtype):
    more = {**PLAIN, **RICH}[fields]
    head_size, head_size_v = sizes
    spec = layer_spec(
        dtype=dtype, head_size=head_size, head_size_v=head_size_v, returns_lse=True, **more
    )
    for query_lens, seq_lens in LENS.values():
        has_pages = spec.block_size is not None
        lens = query_lens if has_pages or fields == "encoder over a cache" else seq_lens
        ranges = ((0, 2, 20), (1, 5, 31)) if spec.bidirectional_ranges else ()
        for new, total in ((lens, seq_lens), (seq_lens, seq_lens)):
            case = Case(spec=spec, query_lens=new, seq_lens=total, ranges=ranges)
            if not has_pages:
                case = case.replace(new_lens=total)
            step = Step(case, "cuda")
            for gather_from in (0, 10**9):
                table = {"descriptors": descriptors, "gather_from": gather_from}
                builder = builder_of(spec, device=step.device, table=table)
                for kind in (None, "prefill"):
                    if kind == "prefill":  # what the decode kernel would take too
                        builder._few_tokens = lambda batch: [False] * batch.num_reqs
                    check(step, forward(step, builder.build(step.batch)))
    torch.cuda.synchronize()


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("sizes", [(256, 16), (512, 16), (128, 16), (256, 32)], ids=str)
def test_part0_values_much_narrower_than_keys(sizes, descriptors):
    """The step that was an illegal access: queries of one token, an encoder's, with ranges."""
    spec = layer_spec(
        dtype=torch.bfloat16,
        head_size=sizes[0],
        head_size_v=sizes[1],
        attn_type=AttentionType.ENCODER_ONLY,
        block_size=None,
        bidirectional_ranges=True,
        alibi=True,
        sinks=True,
    )
    for new in ((1, 1), (32, 32)):
        case = Case(
            spec=spec, query_lens=new, seq_lens=(32, 32), new_lens=(32, 32), ranges=((0, 2, 20),)
        )
        step = Step(case, "cuda")
        builder = builder_of(spec, device=step.device, table={"descriptors": descriptors})
        check(step, forward(step, builder.build(step.batch)))
        torch.cuda.synchronize()


for mark in needs_gpu:
    test_a_pair_of_head_sizes = mark(test_a_pair_of_head_sizes)
    test_part0_values_much_narrower_than_keys = mark(test_part0_values_much_narrower_than_keys)


def test_tiles_of_values_contain_their_heads():
    for head_size, head_size_v in PAIRS:
        block, block_v = operands.blocks_of(head_size, head_size_v)
        assert block >= head_size
        assert block_v >= head_size_v
        assert block_v >= min(block, operands.NARROWEST_VALUES)
        assert (block & (block - 1), block_v & (block_v - 1)) == (0, 0)
