"""How HOPPER_ATTN launches its decode kernel: on which caches, when, and on how many SMs.

No GPU is needed. benchmarks/compile_matrix.py checks the compiled kernels.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend
from attn_dispatch.backends.cuda.hopper.launch import (
    BLOCK_N,
    DECODES,
    HEAD_SIZES,
    Q_STAGES,
    ROWS,
    WARP_GROUPS,
)
from attn_dispatch.backends.cuda.hopper.paged_tma import PagedTma, PageMatrix
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder
from attn_dispatch.backends.cuda.hopper.sm_partition import share_sms
from attn_dispatch.backends.triton.configs.nvidia import HOPPER
from attn_dispatch.backends.triton.operands import KVSource
from attn_dispatch.backends.triton.plan import Launches
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_layout_table import KV_LAYOUTS, with_kv_layout
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.kv_view import KVCacheView, keys_and_values, kv_strides_of
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from support.cases import layer_spec
from support.hopper_cases import (
    CACHES,
    FEW,
    PORTABLE,
    decode_launches,
    in_layout,
    launched,
    lens,
    on_an_h200,
    step_of,
)
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
matrix = importlib.import_module("compile_matrix")
cases = importlib.import_module("compile_cases")
SM = matrix.UNITS["sm90"]
DEVICE = KNOWN_DEVICES["sm90"]

# The cache as a matrix.


def matrices_of(cache):
    return PagedTma.of(KVSource.of_pages(cache))


def assert_reads(cache, pages):
    """The rows and columns of both matrices are the keys and values of the cache, and no others."""
    assert pages.block_size == cache.shape[2]
    for part, matrix in zip(keys_and_values(cache), (pages.keys, pages.values), strict=True):
        rows, columns = matrix.descriptor.block_shape
        assert (rows, columns) == (math.gcd(cache.shape[2], 64), 64)
        assert matrix.descriptor.base.data_ptr() == part.data_ptr()
        # Each element's place in memory instead of its value.
        places = torch.arange(part.untyped_storage().nbytes() // part.element_size())
        first = part.storage_offset()
        cells = places.as_strided(matrix.descriptor.shape, matrix.descriptor.strides, first)
        expected = places.as_strided(part.shape, part.stride(), first)
        blocks, tokens, heads, elements = (torch.arange(n) for n in part.shape)
        row = blocks[:, None, None] * matrix.block_rows + tokens[:, None] + heads * matrix.head_rows
        column = (heads * matrix.head_columns)[:, None] + elements
        assert torch.equal(cells[row[..., None], column.expand(*row.shape, -1)], expected)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
@pytest.mark.parametrize("layout", ["plain", *CACHES])
def test_matrix_rows_are_the_tokens_of_the_cache(layout, block_size, heads, size):
    cache = torch.zeros(5, 2, block_size, heads, size, dtype=torch.bfloat16)
    if layout != "plain":
        cache = in_layout(cache, layout)
        if not CACHES[layout][2]:
            assert matrices_of(cache) is None
            return
    assert_reads(cache, matrices_of(cache))


@settings(max_examples=200)
@given(st.data())
def test_a_matrix_has_the_elements_of_its_cache(data):
    """For any gaps between tokens, heads, values and blocks, and any order of them."""
    sizes = [data.draw(st.integers(1, 3)), 2, 16, data.draw(st.integers(1, 3)), 64]
    strides, step = [0, 0, 0, 0, 1], 64
    for dim in data.draw(st.permutations(range(4))):
        gap = data.draw(st.sampled_from([0, 0, 0, 64, 192, 8, 4]))
        strides[dim] = step + gap
        step = strides[dim] * sizes[dim]
    first = data.draw(st.sampled_from([0, 0, 4, 8]))
    cache = torch.zeros(first + step, dtype=torch.float16).as_strided(sizes, strides, first)
    pages = matrices_of(cache)
    if pages is not None:
        assert_reads(cache, pages)
    spec = layer_spec(
        num_heads=sizes[3],
        num_kv_heads=sizes[3],
        head_size=64,
        block_size=16,
        dtype=torch.float16,
        kv_strides=kv_strides_of(KVCacheView(*cache.unbind(1))),
    )
    notes = HopperAttnBackend.kernel_notes(spec, DEVICE, Phase.DECODE)
    assert len(notes) == (pages is None)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_the_decode_kernel_reads_the_layouts_of_engines(name, block_size, heads):
    sizes = {"num_heads": heads, "num_kv_heads": heads, "head_size": 128, "block_size": block_size}
    spec = layer_spec(dtype=torch.bfloat16, **sizes)
    cache = KV_LAYOUTS[name].allocate(spec, 3)
    assert_reads(cache, matrices_of(cache))
    spec = spec.replace(kv_strides=kv_strides_of(cache))
    assert HopperAttnBackend.kernel_notes(spec, DEVICE, None) == ()


#: Changes of a layer over vLLM's cache -> why the portable kernel decodes it.
NOTES = {
    "fp8 cache": ({"kv_cache_dtype": "fp8_e4m3"}, "dtype, bfloat16, and this one is float8_e4m3fn"),
    "int8 cache": ({"kv_cache_dtype": "int8_per_token_head"}, "and this one is int8"),
    "another dtype": ({"kv_cache_dtype": "float16"}, "and this one is float16"),
    "blocks of 8": ({"block_size": 8}, "blocks of a multiple of 16 tokens, and these have 8"),
    "blocks of 24": ({"block_size": 24}, "blocks of a multiple of 16 tokens, and these have 24"),
    "slots": ({"block_size": 1}, "blocks of a multiple of 16 tokens, and these have 1"),
    "heads of 96": ({"head_size": 96}, "heads of 64, 128, 256, and the layer's have 96"),
    "many query heads": ({"num_heads": 66}, "up to 32 query heads of a KV head, .* has 33"),
    "unaligned": ({"head_size": 64, "kv_strides": (2120, 264, 132)}, "at multiples of 16 bytes"),
    "blocks between tokens": (
        {"head_size": 64, "kv_strides": (2112, 256, 128)},
        "multiple of the stride of tokens apart: 2112 is none of 256 bytes",
    ),
    "heads between tokens": (
        {"head_size": 64, "kv_strides": (4096, 256, 192)}, "2 heads, 192 bytes apart, do not fit"
    ),
}  # fmt: skip


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("what", NOTES)
def test_a_note_says_why_another_kernel_decodes(what, ours):
    fields, reason = NOTES[what]
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "block_size": 16}
    fields = {**sizes, "dtype": torch.bfloat16, **fields}
    if (steps := fields.pop("kv_strides", None)) is not None:
        fields["kv_strides"] = KVStrides(key=steps, value=steps, alignment=16, separate=True)
    spec = layer_spec(**fields)
    if not ours and steps is None:
        spec = with_kv_layout(spec, "vllm")
    (note,) = HopperAttnBackend.kernel_notes(spec, DEVICE, Phase.DECODE)
    assert note.startswith("decodes run on TRITON_ATTN's kernel, not on the one for Hopper: it ")
    assert re.search(reason, note)
    assert HopperAttnBackend.kernel_notes(spec, DEVICE, Phase.PREFILL) == ()


def test_a_layer_without_a_cache_has_no_notes():
    spec = layer_spec(block_size=None, dtype=torch.bfloat16)
    assert HopperAttnBackend.kernel_notes(spec, DEVICE, None) == ()


@pytest.mark.parametrize(
    ("block_size", "dtype", "first"),
    [
        (1, torch.bfloat16, 0),
        (8, torch.bfloat16, 0),
        (24, torch.bfloat16, 0),
        (16, torch.float32, 0),
        (16, torch.float8_e4m3fn, 0),
        (16, torch.int8, 0),
        (16, torch.bfloat16, 1),
        (16, torch.bfloat16, 4),
    ],
)
def test_a_cache_that_tma_cannot_read_has_no_matrix(block_size, dtype, first):
    shape = (3, 2, block_size, 2, 64)
    cache = torch.zeros(first + math.prod(shape), dtype=dtype)[first:].view(shape)
    assert matrices_of(cache) is None


def test_a_cache_of_2_to_the_31_rows_has_no_matrix():
    """Blocks far apart; the memory is not allocated."""
    strides = (2 * 16 * 2 * 64, 64, 16 * 64, 1)
    for blocks, is_matrix in ((1 << 21, True), (1 << 26, False)):
        part = mock.Mock(shape=(blocks, 16, 2, 64), dtype=torch.bfloat16)
        part.stride.side_effect = lambda dim=None: strides if dim is None else strides[dim]
        part.element_size.return_value, part.data_ptr.return_value = 2, 0
        assert (PageMatrix.of(part) is not None) is is_matrix


def test_an_empty_cache_has_no_matrix():
    assert matrices_of(torch.zeros(0, 2, 16, 2, 64, dtype=torch.bfloat16)) is None


# What is launched.


@pytest.mark.parametrize("variant", PORTABLE)
def test_the_portable_kernel_runs_unsupported_decodes(variant):
    step = step_of(*PORTABLE[variant], "cpu")
    _, impl = on_an_h200(step, step.kv_cache)
    assert "decode" in launched(impl)
    assert "hopper_decode" not in launched(impl)


FEW_AND_MANY = [(1, "few"), (16, "few"), (17, "many"), (200, "many")]


@pytest.mark.parametrize(("number", "which"), FEW_AND_MANY)
def test_few_requests_have_their_own_launch(number, which):
    step = step_of({}, lens((20,) * number), "cpu")
    _, impl = on_an_h200(step, step.kv_cache)
    assert decode_launches(impl) == [getattr(DECODES[128], which)]


def test_each_cache_has_its_own_matrix():
    step = step_of({"kv_sharing": True}, lens(FEW), "cpu")
    caches = [step.kv_cache.clone() for _ in range(2)]
    launches, _ = on_an_h200(step, *caches, *caches, caches[1])
    described = [launch.args[1].base.data_ptr() for launch in launches]
    first, second = (cache.data_ptr() for cache in caches)
    assert described == [first, second, first, second, second]


# Room on an SM, and how kernels share the SMs.

#: Each launch of the decode kernel: head size, launch, rows of a tile.
LAUNCHES = [
    pytest.param(size, row, rows, id=f"{size}-{name}-{rows}")
    for size, table in DECODES.items()
    for name, row in zip(("many", "few", "mixed"), table, strict=True)
    for rows in (8, 16, 32)
]


def shared_bytes(size, row, rows):
    """Of the kernel: its rings, queries, weights, the transposed output, barriers."""
    stages = row.stages_for(rows)
    ring = 2 * stages * row.keys * size * 2
    return row.programs * (ring + rows * size * 2 + 2 * rows * row.keys * 2 + rows * size * 4 + 256)


@pytest.mark.parametrize(("size", "row", "rows"), LAUNCHES)
def test_an_sm_has_room_for_the_blocks_of_a_launch(size, row, rows):
    each = SM.shared_bytes // row.blocks - SM.reserved_bytes
    assert row.stages_for(rows) >= 2
    assert shared_bytes(size, row, rows) <= each


@pytest.mark.parametrize("size", BLOCK_N)
def test_an_sm_has_room_for_the_prefill_kernel(size):
    """Queries, two stages of keys and of values, and barriers."""
    keys = BLOCK_N[size] * 2 * 2
    queries = Q_STAGES[size] * ROWS * WARP_GROUPS[size] * size * 2
    tiles = queries + keys * (size + HEAD_SIZES[size])
    assert tiles + 1024 <= SM.shared_bytes - SM.reserved_bytes


def test_the_compile_matrix_reports_an_sm_without_room():
    report = matrix.Report(case="", arch="sm90", kernel="hopper_decode", programs=3)
    assert matrix.judged(report, has_matrix=False, at_once=3).problems == ()
    (problem,) = matrix.judged(report, has_matrix=False, at_once=4).problems
    assert problem == "an SM holds 3 programs of 4"


def test_the_compile_matrix_has_every_launch():
    found = {}
    for case in (case for case in cases.HOPPER if case.decode_row is not None):
        (launch,) = cases.launches_of(case, KNOWN_DEVICES["sm90"])
        size, row = case.fields["head_size"], case.decode_row
        found.setdefault((size, row), set()).add(launch.constants["CONFIG"].ROWS)
        assert launch.programs == 132 * row.blocks
        assert row.keys == launch.constants["CONFIG"].KEYS
    every = {(size, row) for size, table in DECODES.items() for row in table}
    assert found == {launch: {8, 32} for launch in every}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Hopper, 64, many", "Hopper, 128, mixed, all features"])
def test_the_compiled_kernel_uses_that_much_shared_memory(name):
    (case,) = (case for case in cases.HOPPER if case.name == name)
    (launch,) = cases.launches_of(case, KNOWN_DEVICES["sm90"])
    with mock.patch.dict(os.environ):  # undoes the changes of `run`
        (report,) = matrix.run([cases.Compilation(case, "sm90", "")], 1)
    assert report.problems == ()
    most = shared_bytes(case.fields["head_size"], case.decode_row, launch.constants["CONFIG"].ROWS)
    assert 0 <= most - report.shared_bytes < 512


@pytest.mark.parametrize(("size", "row", "rows"), LAUNCHES)
def test_a_plan_has_room_for_the_parts_of_every_launch(size, row, rows):
    """The plan allocates them for the portable kernel."""
    portable = [HOPPER.decode_for(size, 2, is_few) for is_few in (False, True)]
    assert row.blocks * row.programs <= min(each.programs_per_sm for each in portable)
    assert rows <= min(each.max_rows for each in portable)


def shared(num_decodes, size=128, keys=4096, prompt=(2048, 8192), **fields):
    """How a chunk and this many decodes, of 4 query heads for a KV head, share 132 SMs."""
    spec = AttentionSpec(
        num_heads=32,
        num_kv_heads=8,
        head_size=size,
        block_size=16,
        dtype=torch.bfloat16,
        **fields,
    )
    requests = [prompt] * bool(prompt) + [(1, keys)] * num_decodes
    query_lens, seq_lens = zip(*requests, strict=True)
    is_decode = [query_len == 1 for query_len in query_lens]
    num_tiles = -(-prompt[0] // 128) * 32 if prompt else 0
    return share_sms(spec, AttentionBatch.create(query_lens, seq_lens), is_decode, num_tiles, 132)


def test_a_mixed_batch_of_the_benchmarks_shares_the_sms():
    lines = (ROOT / "benchmarks" / "cases.json").read_text().splitlines()
    (case,) = (json.loads(line.rstrip(",")) for line in lines if "mixed/1x2k+63-decode" in line)
    spec = AttentionSpec(
        num_heads=case["num_heads"],
        num_kv_heads=case["num_kv_heads"],
        head_size=case["head_size"],
        block_size=case["block_size"],
        dtype=torch.bfloat16,
    )
    builder = HopperBuilder(spec, torch.device("cpu"))
    builder.launches = Launches.of(spec, KNOWN_DEVICES["sm90"])
    table = torch.zeros(64, 512, dtype=torch.int32)
    batch = AttentionBatch.create(case["query_lens"], case["seq_lens"], block_table=table)
    shares = builder.build(batch).prefill.shares
    assert shares is not None
    assert shares.prefill + shares.decode == 132
    assert shares.prefill > shares.decode


@pytest.mark.parametrize("size", [64, 128, 256])
def test_more_decodes_get_no_fewer_sms(size):
    found = [shared(number, size) for number in range(8, 600, 8)]
    assert found[0] is None  # there is nothing to gain
    taken = [shares.decode for shares in found if shares is not None]
    assert len(taken) > 50
    assert taken == sorted(taken)
    assert taken[-1] > taken[0]


def test_batches_of_one_kind_or_little_work_do_not_share():
    assert shared(63) is not None
    assert shared(63, prompt=()) is None
    assert shared(0) is None
    assert shared(63, keys=0) is None
    assert shared(63, keys=40, prompt=(100, 100)) is None


def test_a_window_leaves_less_to_read():
    assert shared(63, sliding_window=128) is None
    assert shared(63, sliding_window=8192) == shared(63)
    # With long decodes and a short prompt, the window cuts only what the decodes read.
    some, all_ = (
        shared(200, prompt=(2048, 2048), sliding_window=window) for window in (2048, None)
    )
    assert some.decode < all_.decode


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 100_000)), max_size=40),
    st.integers(1, 5000),
    st.integers(1, 200),
    st.sampled_from([None, 1, 1000]),
    st.booleans(),
    st.sampled_from([64, 128, 256]),
)
def test_shares_add_up_to_all_sms(requests, num_tiles, sms, window, causal, size):
    spec = AttentionSpec(
        num_heads=8,
        num_kv_heads=2,
        head_size=size,
        block_size=16,
        dtype=torch.float16,
        sliding_window=window,
        causal=causal,
    )
    batch = AttentionBatch.create([q for q, _ in requests], [keys for _, keys in requests])
    shares = share_sms(spec, batch, [q <= 16 for q, _ in requests], num_tiles, sms)
    if shares is not None:
        assert min(shares.prefill, shares.decode) >= 1
        assert shares.prefill + shares.decode == sms
