"""FLASH_ATTN over fakes: its results, how batches are split into calls, and NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given

from attn_dispatch.backends.cuda.flash_attn import backend as flash_attn
from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend, FlashAttnImpl
from attn_dispatch.backends.triton import scratch
from attn_dispatch.conformance.kv_layouts import engine_cache_of, memories_of
from attn_dispatch.interface import unquantized
from attn_dispatch.interface.kv_layout_table import KV_LAYOUTS
from attn_dispatch.interface.types import AttentionType
from support.cases import MEMORY, Case, Step
from support.fake_flash_attn import TILE, installed
from support.flash_attn_cases import (
    BY_NAME,
    DECODES,
    DTYPES,
    FEATURES,
    MIXED,
    OWN_2,
    OWN_3,
    OWN_4,
    SGLANG_3,
    VLLM_2,
    VLLM_3,
    VLLM_4,
    calls_of,
    check,
    check_all_but,
    each_kind,
    each_provider,
    fitted,
    forward,
    nan_step,
    provided,
    spec_of,
    step_of,
    supported,
)
from support.strategies import cases

# --- Results ----------------------------------------------------------------------------------


@each_provider
@given(case=cases("FLASH_ATTN", dtypes=DTYPES))
def test_any_step_agrees_with_the_reference(name, case):
    spec = fitted(case.spec, BY_NAME[name])
    with provided(name):
        step = Step(case.replace(spec=spec))
        check(step, forward(step))


@each_kind
@given(case=cases("FLASH_ATTN", dtypes=DTYPES))
def test_any_step_agrees_with_many_calls(name, case):
    """Prompts of four tokens or more get their own calls, and many calls are allowed."""
    spec = fitted(case.spec, BY_NAME[name])
    cut = mock.patch.multiple(flash_attn, _OWN_CALL_QUERY_LEN=4, _MAX_CALLS=100)
    with provided(name), cut:
        step = Step(case.replace(spec=spec))
        check(step, forward(step))


@each_provider
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_agrees(name, feature, lengths):
    with provided(name):
        step = step_of(name, FEATURES[feature], lengths)
        supported(name, step.spec)
        check(step, forward(step))


@pytest.mark.parametrize("name", [VLLM_3, VLLM_2])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_agrees_with_the_scalar_oracle(name, feature):
    lengths = {"query_lens": (1, 5, 0, 3, 4), "seq_lens": (9, 5, 4, 18, 2)}
    with provided(name):
        step = step_of(name, {"head_size": 16} | FEATURES[feature], lengths)
        supported(name, step.spec)
        check(step, forward(step), step.naive())


@each_provider
@pytest.mark.parametrize("feature", ["sinks", "alibi", "soft cap", "window"])
def test_a_feature_has_an_effect(name, feature):
    with provided(name):
        step = step_of(name, FEATURES[feature], MIXED)
        supported(name, step.spec)
        output = forward(step)
        step.case = step.case.replace(spec=spec_of(name))
        step.slopes = step.sinks = None
        assert not torch.allclose(output[:5], forward(step)[:5], atol=0.02)


@each_provider
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block_size", [16, None])
def test_any_memory_layout_is_read(name, memory, block_size):
    with provided(name):
        fields = {} if block_size and name == OWN_2 else {"block_size": block_size}
        step = step_of(name, fields, MIXED, memory=memory, padding=3)
        check(step, forward(step))


@each_kind
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_the_layout_of_an_engine_is_read(name, layout):
    """It is written in place, and nothing around it is."""
    with provided(name):
        step = step_of(name, {}, MIXED)
        own = step.kv_cache.clone()
        cache = engine_cache_of(KV_LAYOUTS[layout], step, own)
        check(step, step.forward(FlashAttnBackend, cache))
        step.forward(FlashAttnBackend, own)
        written = engine_cache_of(KV_LAYOUTS[layout], step, own)
        for found, expected in zip(memories_of(cache), memories_of(written), strict=True):
            assert torch.equal(found, expected)


@each_kind
@pytest.mark.parametrize("strided", [False, True])
def test_the_given_output_is_filled(name, strided):
    with provided(name):
        step = step_of(name, {}, MIXED)
        shape = (len(step.query), step.spec.num_heads, 2 * step.spec.head_size)
        output = torch.full(shape, torch.nan, dtype=step.spec.dtype)
        output = output[..., ::2] if strided else output[..., : step.spec.head_size]
        assert forward(step, output=output) is output
        step.check(output)


@each_provider
@pytest.mark.parametrize("block_size", [16, None])
@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("lengths", [MIXED, {"query_lens": (0, 0), "seq_lens": (0, 0)}])
def test_padding_rows_are_zero(name, block_size, is_given, lengths):
    """Rows of no request are 0 with an lse of −inf, whatever output held before."""
    block_size = 256 if block_size and name == OWN_2 else block_size
    with provided(name):
        fields = {"block_size": block_size, "returns_lse": True}
        step = step_of(name, fields, lengths, padding=5)
        output = None
        if is_given:
            shape = (len(step.query), step.spec.num_heads, step.spec.head_size_v)
            output = torch.full(shape, torch.nan, dtype=step.spec.dtype)
        found, lse = forward(step, output=output)
    assert output is None or found is output
    num_tokens = step.batch.num_tokens
    assert len(found) == num_tokens + 5
    assert (found[num_tokens:] == 0).all()
    assert (lse[num_tokens:] == -torch.inf).all()


@each_kind
@pytest.mark.parametrize("factor", [0.0, -1.5])
def test_a_scale_may_be_zero_or_negative(name, factor):
    with provided(name):
        step = step_of(name, {"logits_soft_cap": 1.5, "returns_lse": True}, MIXED)
        step.scale *= factor
        check(step, forward(step))


@each_kind
@pytest.mark.parametrize(
    ("causal", "window", "block_size"),
    list(itertools.product([True, False], [None, 1, 7, 36, 10_000], [16, None])),
)
def test_queries_before_the_first_key_are_zero(name, causal, window, block_size):
    spec = spec_of(name, causal=causal, sliding_window=window, returns_lse=True)
    spec = spec if block_size else spec.replace(block_size=None)
    case = Case(spec=spec, query_lens=(5, 50, 3, 20), seq_lens=(3, 33, 0, 0))
    with provided(name):
        step = Step(case)
        check(step, forward(step))


@each_kind
@pytest.mark.parametrize("brings_keys", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_cross_attention(name, brings_keys, window):
    spec = spec_of(name, attn_type=AttentionType.ENCODER_DECODER, sliding_window=window)
    case = Case(
        spec=spec,
        query_lens=(30, 1, 2, 20, 18),
        seq_lens=(7, 50, 0, 66, 0),
        new_lens=(7, 0, 0, 66, 0) if brings_keys else None,
        brings_keys=brings_keys,
    )
    with provided(name):
        step = Step(case)
        check(step, forward(step))


def test_metadata_of_pages_serves_a_call_without_a_cache():
    lengths = {"query_lens": (9, 4), "seq_lens": (9, 4)}
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {}, lengths)
        step.kv_cache = None
        check(step, forward(step))
    assert [call["k"].data_ptr() for call in calls_of(recorder)] == [step.key.data_ptr()]


# --- NaN of other requests and freed blocks ----------------------------------------------------


@each_kind
@pytest.mark.parametrize("graph", [False, True])
def test_nan_before_the_window_does_not_reach_the_output(name, graph):
    fields = {"sliding_window": 20, "cuda_graph": graph}
    with provided(name):
        spec = spec_of(name, **fields)
        supported(name, spec)
        block = spec.block_size
        lengths = {"query_lens": (1, 5, 2), "seq_lens": (3 * block + 4, 2 * block + 30, 9)}
        step = step_of(name, fields, lengths)
        expected = step.expected()[0]
        step.kv_cache[step.batch.block_table[0, :2].long()] = torch.nan
        step.kv_cache[step.batch.block_table[1, :2].long()] = torch.nan
        step.check(forward(step), expected)


@each_kind
@pytest.mark.parametrize("own_call_query_len", [8, 10_000])
def test_nan_stays_in_its_request(name, own_call_query_len):
    """Prompts read as rows are followed by rows of another request, or padding."""
    lengths = {"query_lens": (30, 1, 20, 7), "seq_lens": (30, 40, 20, 7)}
    for fields in ({}, {"block_size": None}):
        cut = mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", own_call_query_len)
        with provided(name), cut:
            step = step_of(name, fields, lengths, padding=50)
            expected = step.expected()[0]
            step.key[51:], step.value[51:] = torch.nan, torch.nan  # the last request and padding
            step.query[51:] = torch.nan
            step.key[30], step.value[30] = torch.nan, torch.nan  # a decode's new token
            output = forward(step)
            kept = torch.tensor([*range(30), *range(31, 51)])
            torch.testing.assert_close(
                output[kept].double(), expected[kept], rtol=0, atol=0.02, msg=str(fields)
            )


#: Lengths of an encoder's requests, which share a call if that keeps them separate.
APART = {
    "even": (20, 20, 20),
    "ragged": (30, 1, 20, 7),
    "a tile, even": (TILE, TILE),
    "a tile, ragged": (TILE, 5, 2 * TILE),
    "with an empty one": (9, 0, 9),
}


@each_kind
@pytest.mark.parametrize("lengths", APART)
@pytest.mark.parametrize("causal", [True, False])
def test_nan_stays_in_its_request_without_a_cache(name, lengths, causal):
    fields = {"block_size": None, "causal": causal}
    for victim in range(len(APART[lengths])):
        with provided(name):
            step = nan_step(name, fields, APART[lengths], victim)
            check_all_but(step, forward(step), victim)


@pytest.mark.parametrize("generation", [3, 4])
def test_the_fake_reads_past_a_requests_rows(generation):
    """Otherwise the tests above could not fail: one call over all rows lets NaN through."""
    name = {3: VLLM_3, 4: VLLM_4}[generation]
    starts = torch.tensor([0, 8, 16], dtype=torch.int32)
    rows = torch.ones(16, 2, 64, dtype=torch.bfloat16)
    values = rows.clone()
    values[8:] = torch.nan
    with installed(name):
        function = sys.modules["vllm.vllm_flash_attn"].flash_attn_varlen_func
        common = {"softmax_scale": 1.0, "window_size": [-1, -1], "fa_version": generation}
        together = function(rows, rows, values, 8, starts, 8, cu_seqlens_k=starts, **common)
        apart = function(
            rows,
            *(tensor.view(2, 8, 2, 64) for tensor in (rows, values)),
            8,
            starts,
            8,
            seqused_k=starts.diff(),
            **common,
        )
    assert together.isnan().all()
    assert not apart[:8].isnan().any()
    assert apart[8:].isnan().all()


# --- How a batch is split into calls -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lengths", "queries"),
    [
        (VLLM_3, (9, 9, 9), [27]),
        (VLLM_3, (9, 8, 9), [26]),
        (VLLM_3, (50, 50), [100]),
        (VLLM_3, (50, 9, 8, 60, 7), [50, 17, 60, 7]),
        (VLLM_3, (9, 60) * 10, [690]),
        (OWN_3, (9, 8, 9), [26]),
        (OWN_4, (9, 9, 9), [27]),
        (OWN_4, (9, 9, 8, 8, 8, 50), [18, 24, 50]),
        (OWN_4, (9, 8) * 10, [9, 8] * 10),
        (VLLM_2, (9, 8, 50), [67]),
        (OWN_2, (9, 8, 50), [67]),
    ],
)
def test_an_encoder_makes_few_calls_that_separate_its_requests(name, lengths, queries):
    """FlashAttention 4 joins equal lengths, the others any. Long prompts may get their own."""
    fields = {"block_size": None, "causal": False, "returns_lse": True}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", 50):
        step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths})
        check(step, forward(step))
    assert [len(call["q"]) for call in calls_of(recorder)] == queries


def test_layers_share_the_arguments_of_a_batch():
    lengths = {"query_lens": (1, 1, 9), "seq_lens": (5, 40, 20)}
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {"sliding_window": 9}, lengths)
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
        for _ in range(3):
            step.check(forward(step, metadata))
    tables = [call["block_table"].data_ptr() for call in calls_of(recorder)]
    assert len(tables) == 3 * len(set(tables)) == 6


@each_kind
def test_flash_attention_4_runs_on_the_tensors_device(name):
    """The other packages select the device themselves."""
    inside = []

    @contextlib.contextmanager
    def device_of(tensor):
        before = len(recorder.calls)
        yield
        inside.append((tensor, len(recorder.calls) - before))

    with provided(name) as recorder, mock.patch.object(torch.cuda, "device_of", device_of):
        step = step_of(name, {}, {"query_lens": (3,), "seq_lens": (3,)})
        forward(step)
    assert [calls for _, calls in inside] == ([1] if BY_NAME[name].generation == 4 else [])
    assert all(len(tensor) == 3 for tensor, _ in inside)


def test_another_cache_replaces_the_remembered_one():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {"kv_sharing": True}, MIXED)
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
        impl = FlashAttnImpl(**step.impl_arguments())
        nothing = torch.zeros_like(step.expected()[0])
        for cache, wanted in [
            (step.kv_cache, None),
            (torch.zeros_like(step.kv_cache), nothing),
            (step.kv_cache, None),
        ]:
            step.check(impl.forward(step.layer, step.query, None, None, cache, metadata), wanted)


def test_decodes_and_prompts_are_two_calls():
    lengths = {"query_lens": (1, 1, 1, 9, 7), "seq_lens": (5, 40, 9, 20, 7)}
    with provided(VLLM_3) as recorder:
        forward(step_of(VLLM_3, {}, lengths))
    assert [call["max_seqlen_q"] for call in calls_of(recorder)] == [1, 9]


def test_alternating_phases_are_one_call():
    lengths = {"query_lens": (1, 9) * 5, "seq_lens": (20, 20) * 5}
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {}, lengths)
        check(step, forward(step))
    assert len(calls_of(recorder)) == 1


@pytest.mark.parametrize(
    ("name", "past", "brings_keys", "reads"),
    [
        (VLLM_3, 0, True, ["rows", "pages"]),
        (VLLM_3, 0, False, ["rows", "pages"]),
        (VLLM_3, 100, True, ["rows", "pages"]),
        (OWN_3, 100, True, ["rows", "pages"]),
        (OWN_4, 100, True, ["pages"]),
        (OWN_2, 100, True, ["pages"]),
    ],
)
def test_a_long_prompt_gets_its_own_call_over_rows_where_that_is_faster(
    name, past, brings_keys, reads
):
    lengths = {"query_lens": (50, 3), "seq_lens": (50 + past, 30)}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", 50):
        step = step_of(name, {"sliding_window": 70}, lengths, brings_keys=brings_keys)
        check(step, forward(step))
    tables = [call.get("block_table", call.get("page_table")) for call in calls_of(recorder)]
    assert ["rows" if table is None else "pages" for table in tables] == reads


@pytest.mark.parametrize("name", [VLLM_3, OWN_3])
def test_long_prompts_of_equal_length_are_one_call_over_rows(name):
    lengths = {"query_lens": (50, 50, 50, 60, 3), "seq_lens": (50, 50, 50, 60, 30)}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", 50):
        step = step_of(name, {}, lengths)
        expected = step.expected()[0]
        step.key[50:100], step.value[50:100] = torch.nan, torch.nan  # the second request's own
        output = forward(step)
    kept = torch.tensor([*range(50), *range(100, 213)])
    torch.testing.assert_close(output[kept].double(), expected[kept], rtol=0, atol=0.02)
    tables = [call.get("block_table", call.get("page_table")) for call in calls_of(recorder)]
    assert ["rows" if table is None else "pages" for table in tables] == ["rows", "rows", "pages"]


def test_prompts_too_large_to_gather_read_pages():
    lengths = {"query_lens": (50,), "seq_lens": (150,)}
    own_call = mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", 50)
    limit = mock.patch.object(scratch, "MAX_SCRATCH_BYTES", 1000)
    with provided(VLLM_3) as recorder, own_call, limit:
        forward(step_of(VLLM_3, {}, lengths))
    assert calls_of(recorder)[0]["block_table"] is not None


def test_gathering_copies_only_the_blocks_in_the_window():
    lengths = {"query_lens": (50,), "seq_lens": (450,)}
    with provided(VLLM_3) as recorder, mock.patch.object(flash_attn, "_OWN_CALL_QUERY_LEN", 50):
        forward(step_of(VLLM_3, {"sliding_window": 20}, lengths))
    assert len(calls_of(recorder)[0]["k"]) < 50 + 20 + 16


@pytest.mark.parametrize("name", [VLLM_3, OWN_3])
def test_flash_attention_3_makes_one_schedule_per_batch(name):
    with provided(name) as recorder:
        step = step_of(name, {"logits_soft_cap": 5.0, "sliding_window": 9}, MIXED)
        builder = FlashAttnBackend.get_builder_cls()(step.spec, step.device)
        metadata = builder.build(step.batch)
        made = recorder.names().count("get_scheduler_metadata")
        for _ in range(3):
            step.check(forward(step, metadata))
    assert 0 < made == recorder.names().count("get_scheduler_metadata")
    used = [call["scheduler_metadata"] for call in calls_of(recorder)]
    assert sum(schedule is not None for schedule in used) == 3 * made


def test_flash_attention_2_decodes_by_the_kvcache_function():
    with provided(OWN_2) as recorder:
        forward(step_of(OWN_2, {}, DECODES))
    assert recorder.names() == ["flash_attn_with_kvcache"]


@pytest.mark.parametrize("name", [OWN_2, VLLM_2])
@pytest.mark.parametrize("block_size", [256, None])
def test_flash_attention_2_computes_requests_without_tokens(name, block_size):
    lengths = {"query_lens": (1, 0, 1), "seq_lens": (30, 9, 20)}
    with provided(name):
        step = step_of(name, {"block_size": block_size}, lengths)
        check(step, forward(step))


@each_kind
def test_without_keys_nothing_is_called(name):
    lengths = {"query_lens": (4, 1), "seq_lens": (0, 0)}
    with provided(name) as recorder:
        step = step_of(name, {"returns_lse": True}, lengths)
        check(step, forward(step))
    assert recorder.calls == []


# --- Graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VLLM_3, OWN_3, SGLANG_3, OWN_2, VLLM_2])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 20}], ids=["plain", "window"])
def test_graph_metadata_reads_the_current_buffers(name, fields):
    """The captured call derives everything from the buffers, also for padding requests."""
    fields = fields | {"cuda_graph": True}
    with provided(name) as recorder:
        captured = step_of(name, fields, {"query_lens": (1,) * 4, "seq_lens": (1,) * 4})
        table = torch.zeros(4, 2 if name == OWN_2 else 20, dtype=torch.int32)
        captured.batch = dataclasses.replace(
            captured.batch, block_table=table, max_seq_len=table.shape[1] * captured.spec.block_size
        )
        metadata = FlashAttnBackend.get_builder_cls()(captured.spec, captured.device).build(
            captured.batch
        )
        step = step_of(name, fields, {"query_lens": (1,) * 4, "seq_lens": (300, 0, 90, 17)})
        columns = min(table.shape[1], step.batch.block_table.shape[1])
        table[:, :columns].copy_(step.batch.block_table[:, :columns])
        captured.batch.seq_lens.copy_(step.batch.seq_lens)
        captured.batch.slot_mapping.copy_(step.batch.slot_mapping)
        with mock.patch.object(unquantized, "check_forward"):  # a replay checks nothing
            check(step, forward(step, metadata))
    assert "get_scheduler_metadata" not in recorder.names()
