"""TRITON_ATTN and batches: any kind, any order, the same bits in each; and where results go."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from attn_dispatch.backends.triton.impl import TritonImpl
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.quantization import store_output
from support.cases import INT8, Case, Step, layer_spec
from support.triton_cases import (
    DEVICE,
    DTYPES,
    MIXED,
    SMALL,
    builder_of,
    check,
    forward,
    in_words,
    mixed,
    needs_gpu,
    reordered,
    rows_of,
    run,
    same_bits,
    some,
)


@pytest.mark.parametrize("block_size", [None, 4])
def test_empty_batch_gives_empty_result(block_size):
    spec = layer_spec(dtype=torch.float32, returns_lse=True, block_size=block_size)
    step = Step(Case(spec=spec, query_lens=(), seq_lens=()), DEVICE)
    output, lse = run(step)
    assert output.shape == (0, 4, 8)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("lens", [((0,), (0,)), ((0, 0), (5, 0)), ((20,), (0,)), ((1,), (0,))])
@pytest.mark.parametrize("block_size", [None, 4])
def test_batches_with_nothing_to_compute(lens, block_size):
    spec = layer_spec(dtype=torch.float32, returns_lse=True, block_size=block_size)
    step = Step(Case(spec=spec, query_lens=lens[0], seq_lens=lens[1]), DEVICE)
    check(step, run(step, **SMALL))


@pytest.mark.parametrize("query_lens", [(3, 5), (20, 5), (20, 17)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"custom_mask": True, "returns_lse": True}, {"batch_invariant": True}],
    ids=in_words,
)
def test_paged_metadata_without_a_cache(query_lens, fields):
    """An engine that measures its memory has no cache yet; the keys are those of the call."""
    spec = layer_spec(dtype=torch.float32, **fields)
    step = Step(Case(spec=spec, query_lens=query_lens, seq_lens=query_lens), DEVICE)
    expected = step.expected()
    step.kv_cache = None
    metadata = builder_of(spec, **SMALL).build(step.batch)
    for _ in range(2):
        check(step, forward(step, metadata), expected)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2, 4)))[5::7], ids=str)
def test_order_of_requests(order):
    step = reordered(mixed(custom_mask=True, bidirectional_ranges=True, returns_lse=True), order)
    check(step, run(step, **SMALL))


INVARIANT = {
    "plain": {},
    "window": {"sliding_window": 20},
    "fp8": {"kv_cache_dtype": "fp8_e4m3", "kv_scales": "per_head"},
    "int8": {"kv_cache_dtype": INT8, "sinks": True},
    "several tiles of rows": {"num_heads": 20},
}


@pytest.mark.parametrize("fields", INVARIANT.values(), ids=INVARIANT)
def test_batch_invariance(fields):
    spec = layer_spec(
        **{"dtype": torch.float32, "num_kv_heads": 1} | fields,
        batch_invariant=True,
        returns_lse=True,
    )
    step = Step(Case(spec=spec, **MIXED), DEVICE)
    launch = SMALL | {"decode": SMALL["decode"] | {"max_rows": 16}}
    together = run(step, **launch)
    check(step, together)
    for order in ([0], [1], [4, 5], [5, 4, 2, 1, 0]):
        other = reordered(step, order)
        returned = run(other, **launch | {"num_sms": 1 + len(order)})
        for place, request in enumerate(order):
            rows, its = rows_of(step, request), rows_of(other, place)
            alone = tuple(tensor[its] for tensor in returned)
            assert same_bits(alone, tuple(tensor[rows] for tensor in together)), (order, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "query", [pytest.param(query, marks=needs_gpu) for query in (1, 2, 17, 100)]
)
def test_batch_invariance_of_every_length(dtype, query):
    spec = layer_spec(
        dtype=dtype, num_heads=8, num_kv_heads=2, head_size=64, block_size=16, batch_invariant=True
    )
    lens = list(range(query, 701, 23))
    step = Step(Case(spec=spec, query_lens=(query,) * len(lens), seq_lens=tuple(lens)), DEVICE)
    together = run(step)
    for request in range(len(lens)):
        alone = run(reordered(step, [request]))
        assert torch.equal(alone, together[rows_of(step, request)]), lens[request]


# Where the result goes.

OUTPUTS = {
    "contiguous": lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=DEVICE),
    "wider rows": lambda *shape, dtype: torch.empty(
        (shape[0], shape[1] + 2, shape[2] + 16), dtype=dtype, device=DEVICE
    )[:, 1:-1, : shape[2]],
    "transposed": lambda t, h, d, dtype: torch.empty(h, t, d, dtype=dtype, device=DEVICE).transpose(
        0, 1
    ),
    "every other element": lambda t, h, d, dtype: torch.empty(
        t, h, 2 * d, dtype=dtype, device=DEVICE
    )[..., ::2],
}


@pytest.mark.parametrize(("where", "head_size_v"), some(4, OUTPUTS, [8, 1]))
def test_result_is_written_to_given_output(where, head_size_v):
    step = mixed(returns_lse=True, num_kv_heads=1, head_size_v=head_size_v)
    output = OUTPUTS[where](len(step.query), 4, head_size_v, dtype=torch.float32)
    returned = forward(step, builder_of(step.spec, **SMALL).build(step.batch), output=output)
    assert returned[0] is output
    check(step, returned)
    assert same_bits(returned, run(step, **SMALL))


@pytest.mark.parametrize(
    ("where", "dtype"), some(4, OUTPUTS, [torch.float8_e4m3fn, torch.float8_e5m2]), ids=in_words
)
def test_static_output_quantization(where, dtype):
    step = mixed(sinks=True, num_kv_heads=1)
    metadata = builder_of(step.spec, **SMALL).build(step.batch)
    plain = forward(step, metadata)
    scale = torch.tensor(0.0371 if dtype == torch.float8_e5m2 else 0.0043, device=DEVICE)
    output, expected = (OUTPUTS[each](*plain.shape, dtype=dtype) for each in (where, "contiguous"))
    assert forward(step, metadata, output=output, output_scale=scale) is output
    store_output(plain, expected, scale, None)
    tokens = step.batch.num_tokens
    assert torch.equal(output[:tokens].view(torch.uint8), expected[:tokens].view(torch.uint8))


@pytest.mark.parametrize(
    ("head_size_v", "where", "scales"),
    some(
        3,
        [128, 256, 512],
        ["contiguous", "wider rows", "every other element"],
        ["contiguous", "transposed"],
    ),
)
def test_output_quantization_by_groups(head_size_v, where, scales):
    spec = layer_spec(dtype=torch.float32, head_size_v=head_size_v, num_heads=2, num_kv_heads=1)
    lens = {"query_lens": (1, 20, 2, 1), "seq_lens": (90, 20, 33, 0)}
    step = Step(Case(spec=spec, **lens), DEVICE)
    metadata = builder_of(spec, **SMALL).build(step.batch)
    plain = forward(step, metadata)
    shape = (len(plain), 2 * head_size_v // 128)
    block_scale, expected_scale = (torch.empty(shape, device=DEVICE) for _ in range(2))
    if scales == "transposed":
        block_scale = torch.empty(shape[::-1], device=DEVICE).T
    output, expected = (
        OUTPUTS[each](*plain.shape, dtype=torch.float8_e4m3fn) for each in (where, "contiguous")
    )
    forward(step, metadata, output=output, output_block_scale=block_scale)
    store_output(plain, expected, None, expected_scale)
    if DEVICE == "cpu":
        assert torch.equal(block_scale, expected_scale)
        assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8))
        return
    # Two kernels that were compiled for different outputs differ by an ulp of float32.
    torch.testing.assert_close(block_scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.float(), expected.float(), rtol=2**-3, atol=2**-9)


# What is refused.


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("seq_lens", lambda t: t.long()),
        ("query_start_loc", lambda t: t.long()),
        ("block_table", lambda t: t.long()),
        ("block_table", lambda t: t.T.contiguous().T),
    ],
)
def test_batch_of_other_integers_is_rejected(name, wrong):
    step = mixed()
    batch = dataclasses.replace(step.batch, **{name: wrong(getattr(step.batch, name))})
    with pytest.raises(InvalidInputError, match=f"{name} is .* must be contiguous torch.int32"):
        builder_of(step.spec).build(batch)


def test_strided_block_table_is_not_copied():
    """An engine passes the first columns of a larger table."""
    step = mixed(num_kv_heads=1)
    wide = torch.full((len(step._table), 64), -1, dtype=torch.int32)
    wide[:, : step._table.shape[1]] = step._table
    expected = run(step, **SMALL)
    table = wide.to(DEVICE)[:, : step._table.shape[1]]
    step.batch = dataclasses.replace(step.batch, block_table=table)
    assert same_bits(run(step, **SMALL), expected)


def test_new_cache_at_the_same_address_is_detected():
    """The last cache is kept by a weak reference."""
    step = mixed(num_kv_heads=1)
    impl = TritonImpl(**step.impl_arguments())
    metadata = builder_of(step.spec, **SMALL).build(step.batch)
    expected = forward(step, metadata)
    for _ in range(2):
        cache = step.kv_cache.clone()
        arguments = (step.layer, step.query, step.key, step.value, cache, metadata)
        assert same_bits(impl.forward(*arguments), expected)
        del cache, arguments


def test_cache_with_strided_heads_is_rejected_before_writing():
    step = mixed()
    shape = (*step.kv_cache.shape, 2)
    cache = torch.zeros(shape, dtype=step.kv_cache.dtype, device=DEVICE)[..., 0]
    impl = TritonImpl(**step.impl_arguments())
    metadata = builder_of(step.spec, **SMALL).build(step.batch)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"contiguous.*allocate_kv_cache"):
            impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)
    assert not cache.any()
