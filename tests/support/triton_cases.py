"""Shared by the tests of TRITON_ATTN: the device, and steps with other launches.

Without a GPU the kernels run in Triton's interpreter, where a launch takes tenths of a second and
bfloat16 is wrong; so shapes are small there, and tiles are made small enough that they too are cut.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random

import pytest
import torch

from attn_dispatch.backends.triton import plan as triton_plan
from support.cases import Case, Step, layer_spec

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.interface.types import AttentionType

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
#: float32 comes first: the tests that need no other take that.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else []))

#: Tiles so small that a few dozen tokens fill several.
SMALL = {
    "decode": {"block_n": 16, "min_tiles": 1, "programs_per_sm": 1},
    "prefill": {"block_m": 32, "block_n": 16},
    "num_sms": 5,
}


def some(number, *axes):
    """Combinations of the axes' values: all on a GPU, else about `number`, with each value."""
    every = list(itertools.product(*(list(enumerate(axis)) for axis in axes)))
    if not HAS_GPU:
        random.Random(0).shuffle(every)
        missing = {(i, j) for i, axis in enumerate(axes) for j, _ in enumerate(axis)}
        chosen = []
        for new in range(len(axes), 0, -1):  # those first that show the most new values
            for combination in every:
                places = {(i, j) for i, (j, _) in enumerate(combination)}
                if len(places & missing) >= new:
                    missing -= places
                    chosen.append(combination)
        left = [combination for combination in every if combination not in chosen]
        every = chosen + left[: max(0, number - len(chosen))]
    return [tuple(value for _, value in combination) for combination in every]


def in_words(value):
    """A readable id of a parameter."""
    return "+".join(value) or "plain" if isinstance(value, dict) else str(value)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]


#: Two decodes, drafts to verify, a prompt, a chunk of one, nothing.
MIXED = {"query_lens": (1, 24, 3, 0, 18, 1), "seq_lens": (39, 24, 21, 0, 50, 4)}
RANGES = ((1, 3, 17), (1, 19, 24), (4, 30, 47), (2, 15, 21), (0, 2, 39))


def mixed(dtype=torch.float32, **fields):
    spec = layer_spec(dtype=dtype, **fields)
    case = Case(spec=spec, **MIXED, ranges=RANGES if spec.bidirectional_ranges else ())
    if spec.attn_type == AttentionType.ENCODER_DECODER:
        case = case.replace(new_lens=(0, 24, 0, 0, 50, 0))
    return Step(case if spec.block_size else case.replace(new_lens=case.seq_lens), DEVICE)


def builder_of(spec, *, device=DEVICE, table=None, decode=None, prefill=None, num_sms=None):
    """The backend's builder, with some fields of the launch table replaced."""
    builder = TritonAttnBackend.get_builder_cls()(spec, torch.device(device))
    launches = builder.launches
    decode_row = dataclasses.replace(launches.decode, **decode) if decode else launches.decode
    builder.launches = dataclasses.replace(
        launches,
        table=dataclasses.replace(launches.table, **table or {}),
        decode=decode_row,
        decode_few=decode_row if decode else launches.decode_few,
        prefill=dataclasses.replace(launches.prefill, **prefill or {}),
        num_sms=num_sms or launches.num_sms,
    )
    return builder


def forward(step, metadata, **more):
    """The output, or (output, lse), of a step over a copy of its cache."""
    impl = TritonAttnBackend.get_impl_cls()(**step.impl_arguments())
    cache = None if step.kv_cache is None else step.kv_cache.clone()
    return impl.forward(step.layer, step.query, step.key, step.value, cache, metadata, **more)


def run(step, **launch):
    """The same, launched as `builder_of` says."""
    return forward(step, builder_of(step.spec, device=step.device, **launch).build(step.batch))


def check(step, returned, expected=None):
    """Assert that output and lse, if it is returned, are the reference's."""
    output, lse = returned if step.spec.returns_lse else (returned, None)
    wanted, wanted_lse = step.expected() if expected is None else expected
    step.check(output, wanted)
    if lse is not None:
        assert lse.dtype == torch.float32
        rounding = 1e-5 if step.spec.dtype == torch.float32 else 2e-3
        found = lse[: len(wanted_lse)].cpu()
        torch.testing.assert_close(found, wanted_lse.float(), rtol=rounding, atol=rounding)


def same_bits(one, other):
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


def _tensors(returned):
    return returned if isinstance(returned, tuple) else (returned,)


def reordered(step, order):
    """The step with only these requests, in this order, over the same cache."""
    case, pick = step.case, lambda values: tuple(values[i] for i in order)
    other = copy.copy(step)
    other.case = case.replace(
        query_lens=pick(case.query_lens),
        seq_lens=pick(case.seq_lens),
        ranges=tuple((order.index(r), *span) for r, *span in case.ranges if r in order),
        padding=0,
    )
    other.new_lens = pick(step.new_lens)
    other.query = step.query[_rows(case.query_lens, order)]
    keys = _rows(step.new_lens, order)
    if step.key is not None:
        other.key, other.value = step.key[keys], step.value[keys]
    if step._table is not None:
        other._table, other._slots = step._table[list(order)], step._slots[keys]
    for name in ("queries", "keys", "values", "masks"):
        values = getattr(step, name)
        setattr(other, name, None if values is None else [values[i] for i in order])
    other.batch = other._make_batch()
    return other


def rows_of(step, request):
    """The rows of query and output of a request."""
    return _rows(step.case.query_lens, [request])


def _rows(lengths, order):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0]
    rows = [row for i in order for row in range(starts[i], starts[i + 1])]
    return torch.tensor(rows, dtype=torch.int64)


def counters_are_zero(metadata):
    return metadata.decode is None or not bool(metadata.decode.counters.any())


def poison(metadata):
    """Fill the memory that kernels write before they read it with NaN."""
    if metadata.decode is not None:
        metadata.decode.part_out.fill_(torch.nan)
        metadata.decode.part_lse.fill_(torch.nan)
    prefill = metadata.prefill
    for plan in () if prefill is None else prefill.parts or (prefill,):
        if plan.gathered_start_loc is not None:
            spec = metadata.builder.spec
            sizes = (spec.num_kv_heads, spec.head_size, spec.head_size_v)
            for gathered in plan.room_for(*sizes):
                gathered.fill_(torch.nan)


__all__ = [
    "DEVICE",
    "DTYPES",
    "HAS_GPU",
    "MIXED",
    "SMALL",
    "builder_of",
    "check",
    "counters_are_zero",
    "forward",
    "in_words",
    "mixed",
    "needs_gpu",
    "poison",
    "reordered",
    "rows_of",
    "run",
    "same_bits",
    "some",
    "triton_plan",
]
