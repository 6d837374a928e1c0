"""TRITON_MLA computes what float64 does, for every size, phase and feature that it declares.

Without a GPU the kernels run in Triton's interpreter, so sizes are small there.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_dispatch import AttentionBatch, InvalidInputError, MLADims, UnsupportedError, resolve
from attn_dispatch.backends.triton import scratch
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.resolve import explained_device
from support.cases import FP8
from support.mla_cases import MLAStep
from support.selection import DEEPSEEK, mla_layer

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.triton.mla import TritonMLABackend
from support.triton_cases import DEVICE, DTYPES, HAS_GPU, same_bits

DIMS = MLADims(kv_lora_rank=64, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)
#: Decodes, drafts to verify, a prompt, a chunk of one, nothing, no keys.
QUERY_LENS, SEQ_LENS = (1, 4, 20, 0, 3, 1, 0), (70, 33, 20, 9, 19, 1, 0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def step_of(query_lens=QUERY_LENS, seq_lens=SEQ_LENS, seed=0, padding=2, **more):
    more = {"dims": DIMS, "dtype": torch.float32, "block_size": 16} | more
    return MLAStep(
        query_lens, seq_lens, seed, padding, backend=TritonMLABackend, device=DEVICE, **more
    )


def with_launch(step, programs=3, **row):
    """Metadata for few programs, so that requests are split, and for small tiles."""
    builder = step.builder()
    table = builder.launches.table
    launches = {
        rank: {rows: dataclasses.replace(each, **row) for rows, each in by_rows.items()}
        for rank, by_rows in table.latents.items()
    }
    builder.launches = dataclasses.replace(
        builder.launches, table=dataclasses.replace(table, latents=launches), num_sms=programs
    )
    return builder.build(step.batch)


SMALL = {"block_n": 16, "min_tiles": 1, "programs_per_sm": 1}


def check(step, returned):
    output, lse = returned if step.spec.returns_lse else (returned, None)
    expected, expected_lse = step.expected()
    assert not output[sum(step.query_lens) :].any()
    step.check(output, expected)
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"returns_lse": True, "causal": False},
        {"sliding_window": 7},
        {"sliding_window": 7, "causal": False, "returns_lse": True},
        {"logits_soft_cap": 1.5, "returns_lse": True},
        {"batch_invariant": True, "returns_lse": True},
        *({"kv_cache_dtype": name} for name in FP8),
        {"kv_cache_dtype": "float16", "dtype": torch.float32},
        *({"dtype": dtype} for dtype in DTYPES if dtype != torch.float32),
        {"dtype": torch.float16, "kv_cache_dtype": "fp8"},
    ],
    ids=lambda fields: "+".join(map(str, fields.values())) or "plain",
)
@pytest.mark.parametrize("programs", [1, 5])
def test_every_phase_agrees_with_float64(fields, programs):
    step = step_of(**fields)
    check(step, step.run(metadata=with_launch(step, programs, **SMALL)))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_any_block_size(block_size, kv_cache_dtype):
    step = step_of(block_size=block_size, kv_cache_dtype=kv_cache_dtype)
    check(step, step.run(metadata=with_launch(step, **SMALL)))


@pytest.mark.parametrize("heads", [1, 3, 16, 40, 128])
def test_any_number_of_heads(heads):
    """A tile may hold several tokens, or a part of one."""
    step = step_of((1, 3), (37, 21), heads=heads)
    check(step, step.run(metadata=with_launch(step, **SMALL)))


@pytest.mark.parametrize("rank", [64, 128, 256, 512])
@pytest.mark.parametrize("rope", [16, 32, 64, 128])
def test_sizes_of_latents(rank, rope):
    dims = MLADims(kv_lora_rank=rank, qk_nope_head_dim=24, qk_rope_head_dim=rope, v_head_dim=40)
    step = step_of((1, 2), (20, 18), dims=dims)
    check(step, step.run())


@given(
    lens=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 60)), min_size=0, max_size=5),
    seed=st.integers(0, 50),
    padding=st.integers(0, 2),
    programs=st.integers(1, 9),
    fields=st.sampled_from([{}, {"batch_invariant": True}, {"kv_cache_dtype": "fp8"}]),
)
@settings(max_examples=200 if HAS_GPU else 12, suppress_health_check=[HealthCheck.too_slow])
def test_any_step_agrees_with_float64(lens, seed, padding, programs, fields):
    query_lens = tuple(query for query, _ in lens)
    seq_lens = tuple(query + past for query, past in lens)
    step = step_of(query_lens, seq_lens, seed, padding, returns_lse=True, **fields)
    check(step, step.run(metadata=with_launch(step, programs, **SMALL)))


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("part", ["latents", "rotated"])
def test_a_nan_makes_the_rows_that_see_it_nan(part, programs):
    step = step_of((1, 3), (40, 20), returns_lse=True, padding=0)
    getattr(step, part)[2, 5] = math.nan  # of the second new token of the second request
    output, lse = step.run(metadata=with_launch(step, programs, **SMALL))
    expected, expected_lse = step.expected()
    # A hidden key has weight 0, and 0 times a latent's NaN is NaN, also in the token before.
    right = 1 if part == "latents" else 2
    assert output[2:].isnan().all()
    assert lse[2:].isnan().all()
    step.check(output[:right], expected[:right])
    torch.testing.assert_close(lse[:2].double(), expected_lse[:2], rtol=1e-5, atol=1e-5)


def test_invariant_decodes_in_turn_have_the_bits_of_one_launch():
    """The parts of five requests do not fit into memory at once; those of two do."""
    step = step_of((1,) * 5, (60, 33, 7, 21, 40), batch_invariant=True, returns_lse=True)
    at_once = with_launch(step, **SMALL)
    limit = at_once.decode.scratch_bytes * 2 // 5
    with mock.patch.object(scratch, "MAX_SCRATCH_BYTES", limit):
        in_turn = with_launch(step, **SMALL)
    assert [each.num_reqs for each in in_turn.decode.in_turn] == [2, 2, 1]
    assert in_turn.decode.scratch_bytes <= limit
    expected = step.run(metadata=at_once)
    check(step, expected)
    assert same_bits(step.run(metadata=in_turn), expected)


def test_batch_invariant_gives_the_same_bits_alone():
    step = step_of((1, 1, 5), (60, 33, 21), batch_invariant=True, returns_lse=True, padding=0)
    alone = step_of((1,), (60,), batch_invariant=True, returns_lse=True, padding=0)
    for name in ("query", "latents", "rotated"):
        setattr(alone, name, getattr(step, name)[:1])
    alone.weight, alone.cache = step.weight, step.cache.clone()
    batch = step.batch
    alone.batch = dataclasses.replace(
        alone.batch, block_table=batch.block_table[:1], slot_mapping=batch.slot_mapping[:1]
    )
    together = step.run(metadata=with_launch(step, **SMALL))
    by_itself = alone.run(metadata=with_launch(alone, **SMALL))
    assert same_bits(tuple(each[:1] for each in together), by_itself)


@pytest.mark.parametrize("fields", [{}, {"batch_invariant": True}], ids=["plain", "invariant"])
def test_upper_bounds_of_key_counts_change_no_bit(fields):
    step, exact = step_of(lengths="upper_bound", **fields), step_of(**fields)
    step.batch = AttentionBatch.create(
        QUERY_LENS,
        step.batch.seq_lens,
        seq_lens_upper_bound=[length + 9 for length in SEQ_LENS],
        lengths="upper_bound",
        block_table=step.batch.block_table,
        slot_mapping=step.batch.slot_mapping,
        device=DEVICE,
    )
    returned = step.run(metadata=with_launch(step, **SMALL))
    assert same_bits(returned, exact.run(metadata=with_launch(exact, **SMALL)))


@pytest.mark.skipif(HAS_GPU, reason="a GPU has an order of its own")
@pytest.mark.parametrize("order", ["first to last", "last to first", "from both ends"])
def test_many_parts_are_merged_in_groups_in_any_order_of_programs(order, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    set_grid_idx = interpreter_builder.set_grid_idx
    place = {
        "first to last": lambda i, n: i,
        "last to first": lambda i, n: n - 1 - i,
        "from both ends": lambda i, n: i // 2 if i % 2 == 0 else n - 1 - i // 2,
    }[order]

    def elsewhere(x, y, z):
        set_grid_idx(place(x, interpreter_builder.grid_dim[0]), y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", elsewhere)
    step = step_of((1, 2, 1), (500, 300, 17), heads=20, returns_lse=True)
    metadata = with_launch(step, 70, **SMALL)  # 32, 19 and 2 parts
    metadata.decode.part_out.fill_(math.nan)
    metadata.decode.part_lse.fill_(math.nan)
    check(step, step.run(metadata=metadata))
    assert not metadata.decode.counters.any()


def test_counters_are_zero_again_and_metadata_may_be_used_again():
    step = step_of()
    metadata = with_launch(step, 7, **SMALL)
    first = step.run(metadata=metadata)
    assert not metadata.decode.counters.any()
    metadata.decode.part_out.fill_(math.nan)
    metadata.decode.part_lse.fill_(math.nan)
    assert same_bits(step.run(metadata=metadata), first)


def test_the_cache_is_written_as_the_reference_writes_it():
    for name in ("auto", *FP8):
        step, reference = step_of(kv_cache_dtype=name), step_of(kv_cache_dtype=name)
        reference.backend = type(MLAStep().backend())
        step.run()
        reference.run()
        assert torch.equal(step.cache.view(torch.uint8), reference.cache.view(torch.uint8)), name


def test_a_layer_that_shares_a_cache_does_not_write_it():
    step, other = step_of(kv_sharing=True), step_of()
    expected = other.run()
    step.cache = other.cache.clone()
    step.latents = step.latents * 9
    before = step.cache.clone()
    torch.testing.assert_close(step.run(), expected)
    assert torch.equal(step.cache.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("fields", [{}, {"batch_invariant": True}], ids=["plain", "invariant"])
def test_the_output_may_be_given_or_quantized(fields):
    step = step_of(**fields)
    wanted = step.run()
    rows = len(step.query)
    wide = torch.full((rows, 3, 16), math.nan, device=DEVICE)
    given = wide[..., ::2]
    assert step.run(output=given) is given
    check(step, given)
    quantized = torch.empty(rows, 3, 8, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.tensor(0.05, device=DEVICE)
    step.run(output=quantized, output_scale=scale)
    expected = (wanted / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_extreme_scale(scale):
    step = step_of((1, 2), (20, 18))
    step.scale, step.query = scale, step.query / scale * step.scale
    check(step, step.run())


def test_autocast_changes_nothing():
    step = step_of()
    expected = step.run()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert same_bits(step.run(), expected)


class Runner:
    """What an AttentionState reads of an engine."""

    def __init__(self, step):
        self.metadata_builder, self.device = step.builder(), step.device
        self.max_blocks_per_request, self.max_seq_len = step.batch.block_table.shape[1], 64


def test_static_buffers_of_a_graph_serve_any_lengths():
    """A plan for four requests over static buffers, used for three of other lengths."""
    step = step_of((1, 1, 1), (50, 7, 33), padding=1, cuda_graph=True)
    state = CommonAttentionState(Runner(step))
    with state.graph_capture(4):
        metadata = state.graph_capture_get_metadata_for_batch(4)
    buffers = state.get_graph_input_buffers(metadata)
    real = step.builder().build(
        dataclasses.replace(step.batch, slot_mapping=step.batch.slot_mapping[:3])
    )
    state.prepare_graph_input_buffers(buffers, real)
    query = step.query.nan_to_num()  # the graph's fourth request has no keys
    output = step.run(query=query, metadata=metadata)
    step.check(output, step.expected()[0])


# --- What is rejected ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mla": dataclasses.replace(DEEPSEEK, kv_lora_rank=96)}, "head_size_v=96"),
        ({"mla": dataclasses.replace(DEEPSEEK, qk_rope_head_dim=48)}, "qk_rope_head_dim=48"),
        ({"sinks": True}, "sinks=True"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "int8"),
        ({"mla": None}, "mla"),
    ],
    ids=["latents", "rotated parts", "sinks", "int8", "no latents"],
)
def test_what_is_not_declared_is_rejected(fields, reason):
    spec = mla_layer()
    if fields.get("mla", spec.mla) is None:
        spec = dataclasses.replace(spec, mla=None)
    else:
        spec = mla_layer(**fields)
    with pytest.raises(UnsupportedError, match=reason):
        resolve(spec, explained_device("H200"), backend="TRITON_MLA")


@pytest.mark.parametrize("device", ["A100", "MI300X", "gfx1100"])
def test_it_is_selected_for_latents_on_gpus(device):
    """Where no other package is installed."""
    profile = KNOWN_DEVICES[explained_device(device).arch].with_libraries(Library("triton", "3.6"))
    for spec in (mla_layer(), mla_layer(num_heads=128, kv_cache_dtype="fp8_e4m3")):
        assert resolve(spec, profile).name == "TRITON_MLA"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "cache", s.cache[..., :-1]), "kv_cache has shape"),
        (lambda s: setattr(s, "query", s.query[..., :-1]), "query has shape"),
        (lambda s: setattr(s, "latents", s.latents.double()), "kv_c_normed is torch.float64"),
        (lambda s: setattr(s.layer, "_k_scale", torch.ones(3)), "scale is per head"),
        (
            lambda s: setattr(s, "cache", s.cache.transpose(1, 2).contiguous().transpose(1, 2)),
            "contiguous",
        ),
    ],
    ids=["cache", "query", "latents", "scale", "strides"],
)
def test_invalid_arguments_are_rejected_before_anything_is_written(change, message):
    step = step_of()
    impl = step.impl()
    change(step)
    before, output = step.cache.clone(), torch.full((len(step.query), 3, 8), 7.0, device=DEVICE)
    with pytest.raises(InvalidInputError, match=message):
        step.run(impl, output=output)
    assert torch.equal(step.cache.nan_to_num(7), before.nan_to_num(7))
    assert bool((output == 7).all())


def test_a_batch_without_pages_is_rejected():
    step = step_of()
    batch = dataclasses.replace(step.batch, block_table=None)
    with pytest.raises(InvalidInputError, match="needs a block_table"):
        step.builder().build(batch)
