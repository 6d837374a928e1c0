"""FLASH_ATTN: each provider's numbers, what is refused, and what must not reach a kernel.

Without a GPU the packages are stand-ins (flash_attn_standins.py) that check their arguments and
compute by their packages' conventions; the tests marked gpu call those that are installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import sys
from unittest import mock

import pytest
import torch
from flash_attn_standins import TILE, installed
from hypothesis import given
from steps import MEMORY, Case, Step, layer_spec
from strategies import cases

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch import libraries
from attn_dispatch.backends.cuda import flash_attn, flash_attn_providers
from attn_dispatch.backends.cuda.flash_attn import FlashAttnBackend, FlashAttnImpl
from attn_dispatch.backends.cuda.flash_attn_providers import (
    PROVIDERS,
    Provider,
    pick_provider,
    refusals,
)
from attn_dispatch.batch import AttentionBatch
from attn_dispatch.capability import ReasonCode
from attn_dispatch.device import KNOWN_DEVICES, detect_device, known_device
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface import AttentionType
from attn_dispatch.libraries import Library, library_name
from attn_dispatch.selector import explain, explained_device

BY_NAME = {provider.name: provider for provider in PROVIDERS}
VLLM_3, OWN_3, SGLANG_3, OWN_4, VLLM_4, OWN_2, VLLM_2 = BY_NAME
DTYPES = (torch.bfloat16, torch.float16)
each_provider = pytest.mark.parametrize("name", BY_NAME)
#: A stand-in for each way in which a call can differ.
each_kind = pytest.mark.parametrize("name", [VLLM_3, OWN_3, OWN_4, OWN_2, VLLM_2])


def profile_for(provider):
    """A device that a provider is for, with the libraries that it needs and no others."""
    device = next(device for device in KNOWN_DEVICES.values() if provider.runs_on(device))
    names = map(library_name, provider.capabilities.requires)
    return device.with_libraries(*(Library(name, "unknown") for name in names))


def on_device(profile):
    """Within, this is what the builder takes the device for."""
    return mock.patch.object(flash_attn, "detect_device", return_value=profile)


def alone(name):
    """Within, there is no other provider: vLLM brings three."""
    return mock.patch.object(flash_attn_providers, "PROVIDERS", (BY_NAME[name],))


@contextlib.contextmanager
def provided(name):
    """This provider's stand-in is what is installed; what is called of it."""
    with alone(name), installed(name) as recorder, on_device(profile_for(BY_NAME[name])):
        yield recorder


#: What a refused field becomes, so that a request fits.
FITTING = {
    "head_size": 64,
    "head_size_v": None,
    "block_size": 16,
    "num_kv_heads": None,
    "alibi": False,
    "sinks": False,
    "kv_cache_dtype": "auto",
    "cuda_graph": False,
}


def fitted(spec, provider):
    """The spec with as few fields changed as it takes for the provider to serve it."""
    device = profile_for(provider)
    for _ in range(10):
        reasons = refusals(provider, spec, device)
        if not reasons:
            return spec
        changes = {reason.field: FITTING[reason.field] for reason in reasons}
        if "block_size" in changes and spec.block_size == 16:
            changes["block_size"] = 256
        if "num_kv_heads" in changes:
            changes["num_kv_heads"] = spec.num_heads
        spec = spec.replace(**changes)
    raise AssertionError(f"{spec} does not fit: {reasons}")


def check(step, returned, expected=None):
    """Assert that output and lse, if it is returned, are as expected: by default, REFERENCE's."""
    output, lse = returned if step.spec.returns_lse else (returned, None)
    wanted, wanted_lse = step.expected() if expected is None else expected
    step.check(output, wanted)
    if lse is not None:
        assert lse.dtype == torch.float32
        found = lse[: len(wanted_lse)].cpu()
        torch.testing.assert_close(found, wanted_lse.float(), rtol=3e-3, atol=3e-3)


def forward(step, metadata=None, **more):
    """What the backend returns over a copy of the cache."""
    impl = FlashAttnImpl(**step.impl_arguments())
    if metadata is None:
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
    cache = None if step.kv_cache is None else step.kv_cache.clone()
    return impl.forward(step.layer, step.query, step.key, step.value, cache, metadata, **more)


#: Two decodes, drafts to verify, a prompt, a chunk of one, nothing, more queries than fit a page.
MIXED = {"query_lens": (1, 1, 3, 24, 18, 0, 40), "seq_lens": (39, 4, 21, 24, 50, 0, 40)}
DECODES = {"query_lens": (1, 1, 1, 1), "seq_lens": (39, 1, 300, 17)}
FEATURES = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"sliding_window": 7},
    "window of one": {"sliding_window": 1},
    "window both ways": {"causal": False, "sliding_window": 7},
    "endless window": {"sliding_window": 2**40},
    "soft cap": {"logits_soft_cap": 1.5},
    "alibi": {"alibi": True},
    "alibi, soft cap, window": {"alibi": True, "logits_soft_cap": 1.5, "sliding_window": 20},
    "sinks": {"sinks": True, "sliding_window": 9},
    "lse": {"returns_lse": True},
    "heads of their own": {"num_kv_heads": 4},
    "one head for all": {"num_kv_heads": 1},
    "heads first": {"kv_cache_layout": "HND"},
    "sharing": {"kv_sharing": True},
    "192 and 128": {"head_size": 192, "head_size_v": 128},
    "64 and 256": {"head_size": 64, "head_size_v": 256},
    "no cache": {"block_size": None, "returns_lse": True},
    "captured": {"cuda_graph": True, "sliding_window": 20},
}


def spec_of(name, dtype=torch.bfloat16, **fields):
    """A layer's spec with blocks that the provider takes."""
    block_size = 256 if name == OWN_2 else 16
    sizes = {"head_size": 64, "block_size": block_size, "dtype": dtype}
    return layer_spec(**(sizes | fields))


def step_of(name, fields, lengths, device="cpu", **more):
    spec = spec_of(name, **fields)
    case = Case(spec=spec, **lengths, **more)
    if spec.block_size is None:
        case = case.replace(seq_lens=case.query_lens, new_lens=None)
    return Step(case, device)


def supported(name, spec):
    """Skip what the provider refuses: test_limits says that it does."""
    reasons = refusals(BY_NAME[name], spec, profile_for(BY_NAME[name]))
    if reasons:
        pytest.skip(str(reasons[0]))


# --- Numbers ----------------------------------------------------------------------------------


@each_provider
@given(case=cases("FLASH_ATTN", dtypes=DTYPES))
def test_any_step_agrees_with_the_reference(name, case):
    spec = fitted(case.spec, BY_NAME[name])
    with provided(name):
        step = Step(case.replace(spec=spec))
        check(step, forward(step))


@each_kind
@given(case=cases("FLASH_ATTN", dtypes=DTYPES))
def test_any_step_agrees_however_it_is_cut(name, case):
    """Prompts of four tokens on go alone, and many calls are allowed."""
    spec = fitted(case.spec, BY_NAME[name])
    cut = mock.patch.multiple(flash_attn, _ALONE_FROM=4, _MOST_CALLS=100)
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
def test_a_feature_agrees_with_one_score_at_a_time(name, feature):
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
        step.spec = spec_of(name)
        step.slopes = step.sinks = None
        assert not torch.allclose(output[:5], forward(step)[:5], atol=0.02)


@each_provider
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block_size", [16, None])
def test_tensors_may_lie_in_memory_as_they_like(name, memory, block_size):
    with provided(name):
        fields = {} if block_size and name == OWN_2 else {"block_size": block_size}
        step = step_of(name, fields, MIXED, memory=memory, padding=3)
        check(step, forward(step))


@each_kind
@pytest.mark.parametrize("strided", [False, True])
def test_the_output_goes_where_it_is_wanted(name, strided):
    with provided(name):
        step = step_of(name, {}, MIXED)
        shape = (len(step.query), step.spec.num_heads, 2 * step.spec.head_size)
        output = torch.full(shape, torch.nan, dtype=step.spec.dtype)
        output = output[..., ::2] if strided else output[..., : step.spec.head_size]
        assert forward(step, output=output) is output
        step.check(output)


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
def test_more_queries_than_keys_leave_the_first_queries_blind(name, causal, window, block_size):
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


# --- What belongs to nobody -------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("graph", [False, True])
def test_blocks_that_the_window_has_passed_may_hold_anything(name, graph):
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
@pytest.mark.parametrize("alone_from", [8, 10_000])
def test_a_neighbour_that_is_nan_is_nan_alone(name, alone_from):
    """Prompts read as rows: what stands behind them is another's, or padding."""
    lengths = {"query_lens": (30, 1, 20, 7), "seq_lens": (30, 40, 20, 7)}
    for fields in ({}, {"block_size": None}):
        cut = mock.patch.object(flash_attn, "_ALONE_FROM", alone_from)
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


#: Lengths of an encoder's requests, which are called for together where that keeps them apart.
APART = {
    "even": (20, 20, 20),
    "ragged": (30, 1, 20, 7),
    "a tile, even": (TILE, TILE),
    "a tile, ragged": (TILE, 5, 2 * TILE),
    "with one of nothing": (9, 0, 9),
}


@each_kind
@pytest.mark.parametrize("lengths", APART)
@pytest.mark.parametrize("causal", [True, False])
def test_an_encoders_request_that_is_nan_is_nan_alone(name, lengths, causal):
    fields = {"block_size": None, "causal": causal}
    for victim in range(len(APART[lengths])):
        with provided(name):
            step = nan_step(name, fields, APART[lengths], victim)
            check_all_but(step, forward(step), victim)


def nan_step(name, fields, lengths, victim, device="cpu"):
    """A step of one request that is NaN, with what it should give were it not."""
    step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths}, device, padding=5)
    step.wanted = step.expected()[0]
    rows = rows_of(step, victim)
    for tensor in (step.query, step.key, step.value):
        tensor[rows] = torch.nan
        tensor[sum(lengths) :] = torch.nan  # padding
    return step


def rows_of(step, request):
    starts = step.batch.query_starts
    return slice(starts[request], starts[request + 1])


def check_all_but(step, output, victim):
    """Assert that the other requests have what they should."""
    kept = torch.ones(len(step.wanted), dtype=torch.bool)
    kept[rows_of(step, victim)] = False
    found = output[: len(kept)].double().cpu()[kept]
    torch.testing.assert_close(found, step.wanted[kept], rtol=0, atol=0.02)


@pytest.mark.parametrize("generation", [3, 4])
def test_the_stand_in_reads_past_a_requests_rows(generation):
    """Or the tests above could not fail: one call over all rows lets NaN through."""
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


# --- How a batch is cut -----------------------------------------------------------------------


def calls_of(recorder):
    return [call for name, call in recorder.calls if name != "get_scheduler_metadata"]


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
def test_an_encoder_takes_as_few_calls_as_keep_its_requests_apart(name, lengths, queries):
    """FlashAttention 4 of even ones, the others of all; long ones alone where that is faster."""
    fields = {"block_size": None, "causal": False, "returns_lse": True}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_ALONE_FROM", 50):
        step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths})
        check(step, forward(step))
    assert [len(call["q"]) for call in calls_of(recorder)] == queries


def test_what_layers_have_in_common_is_made_once():
    lengths = {"query_lens": (1, 1, 9), "seq_lens": (5, 40, 20)}
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {"sliding_window": 9}, lengths)
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
        for _ in range(3):
            step.check(forward(step, metadata))
    tables = [call["block_table"].data_ptr() for call in calls_of(recorder)]
    assert len(tables) == 3 * len(set(tables)) == 6


@each_kind
def test_flash_attention_4_runs_with_the_tensors_device_as_the_current_one(name):
    """The functions of the others see to it themselves."""
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


def test_a_cache_is_remembered_until_another_comes():
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


def test_phases_in_any_order_are_one_call_and_not_many():
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
def test_a_long_prompt_is_alone_over_rows_where_that_is_faster(name, past, brings_keys, reads):
    lengths = {"query_lens": (50, 3), "seq_lens": (50 + past, 30)}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_ALONE_FROM", 50):
        step = step_of(name, {"sliding_window": 70}, lengths, brings_keys=brings_keys)
        check(step, forward(step))
    tables = [call.get("block_table", call.get("page_table")) for call in calls_of(recorder)]
    assert ["rows" if table is None else "pages" for table in tables] == reads


@pytest.mark.parametrize("name", [VLLM_3, OWN_3])
def test_long_prompts_of_equal_length_are_one_call_over_rows(name):
    lengths = {"query_lens": (50, 50, 50, 60, 3), "seq_lens": (50, 50, 50, 60, 30)}
    with provided(name) as recorder, mock.patch.object(flash_attn, "_ALONE_FROM", 50):
        step = step_of(name, {}, lengths)
        expected = step.expected()[0]
        step.key[50:100], step.value[50:100] = torch.nan, torch.nan  # the second's own affair
        output = forward(step)
    kept = torch.tensor([*range(50), *range(100, 213)])
    torch.testing.assert_close(output[kept].double(), expected[kept], rtol=0, atol=0.02)
    tables = [call.get("block_table", call.get("page_table")) for call in calls_of(recorder)]
    assert ["rows" if table is None else "pages" for table in tables] == ["rows", "rows", "pages"]


def test_rows_that_do_not_fit_stay_in_their_pages():
    lengths = {"query_lens": (50,), "seq_lens": (150,)}
    cut = mock.patch.multiple(flash_attn, _ALONE_FROM=50, MAX_GATHERED_BYTES=1000)
    with provided(VLLM_3) as recorder, cut:
        forward(step_of(VLLM_3, {}, lengths))
    assert calls_of(recorder)[0]["block_table"] is not None


def test_a_gathered_window_copies_only_the_blocks_that_it_reaches():
    lengths = {"query_lens": (50,), "seq_lens": (450,)}
    with provided(VLLM_3) as recorder, mock.patch.object(flash_attn, "_ALONE_FROM", 50):
        forward(step_of(VLLM_3, {"sliding_window": 20}, lengths))
    assert len(calls_of(recorder)[0]["k"]) < 50 + 20 + 16


@pytest.mark.parametrize("name", [VLLM_3, OWN_3])
def test_flash_attention_3s_schedule_is_made_once_a_batch_for_all_layers(name):
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


def test_flash_attention_2_splits_decodes_by_the_function_for_them():
    with provided(OWN_2) as recorder:
        forward(step_of(OWN_2, {}, DECODES))
    assert recorder.names() == ["flash_attn_with_kvcache"]


@pytest.mark.parametrize("name", [OWN_2, VLLM_2])
@pytest.mark.parametrize("block_size", [256, None])
def test_flash_attention_2_does_not_count_on_a_token_where_there_is_none(name, block_size):
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
def test_metadata_of_a_graph_serves_what_its_buffers_hold_later(name, fields):
    """What is captured derives everything from the buffers, also from one that pads the batch."""
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
        check(step, forward(step, metadata))
    assert "get_scheduler_metadata" not in recorder.names()


# --- Who serves what --------------------------------------------------------------------------


def all_on(arch):
    return explained_device(arch)


@pytest.mark.parametrize(
    ("arch", "fields", "picked"),
    [
        ("sm90", {}, VLLM_3),
        ("sm90", {"block_size": 8}, OWN_3),
        ("sm90", {"block_size": 256}, OWN_2),
        ("sm90", {"block_size": 64}, VLLM_2),
        ("sm90", {"alibi": True}, VLLM_2),
        ("sm90", {"sinks": True}, VLLM_3),
        ("sm90", {"sinks": True, "num_heads": 128, "num_kv_heads": 8}, OWN_4),
        ("sm90", {"head_size": 256}, VLLM_3),
        ("sm90", {"head_size": 192, "head_size_v": 128}, VLLM_3),
        ("sm100", {}, OWN_4),
        ("sm100", {"head_size": 256}, VLLM_2),
        ("sm100", {"cuda_graph": True}, VLLM_2),
        ("sm80", {}, VLLM_2),
        ("sm120", {"block_size": 512}, OWN_2),
        ("sm80", {"block_size": None}, OWN_2),
    ],
)
def test_the_first_that_can_is_picked(arch, fields, picked):
    provider = pick_provider(spec_of(VLLM_3, **fields), all_on(arch))
    assert isinstance(provider, Provider)
    assert provider.name == picked


#: (provider, what it refuses, the sentence)
LIMITS = [
    (OWN_2, {"block_size": 16}, "block_size=16 .* multiples of 256"),
    (VLLM_2, {"block_size": 8}, "block_size=8 .* multiples of 16"),
    (VLLM_3, {"block_size": 64}, "block_size=64 .* up to 48"),
    (OWN_3, {"block_size": 128}, "block_size=128 .* 1 to 63"),
    (VLLM_2, {"head_size": 264}, "head_size=264 .* up to 256"),
    (VLLM_2, {"head_size": 36}, "head_size=36 .* multiples of 8"),
    (VLLM_2, {"head_size_v": 32}, "head_size_v=32 .* the same as head_size"),
    (VLLM_3, {"head_size": 128, "head_size_v": 64}, "head_size_v: head_size=128 with"),
    (OWN_4, {"head_size": 128, "head_size_v": 64}, "head_size_v: .* 192 with 128"),
    (OWN_4, {"head_size": 256}, "head_size=256"),
    (OWN_4, {"head_size": 80, "causal": False}, "head_size=80 with causal=False over pages"),
    (OWN_4, {"num_heads": 6}, "num_kv_heads: 6 query heads over 2 .* divides 128"),
    (VLLM_2, {"dtype": torch.float32}, "dtype=float32"),
    (VLLM_2, {"kv_cache_dtype": "float16"}, "float16 with dtype=torch.bfloat16 .* layer's dtype"),
    (VLLM_3, {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
    (VLLM_2, {"alibi": True, "causal": False}, "alibi: causal=False"),
    (VLLM_2, {"alibi": True, "returns_lse": True}, "alibi with returns_lse"),
    (VLLM_3, {"alibi": True}, "alibi=True"),
    (OWN_4, {"alibi": True}, "alibi=True"),
    (VLLM_2, {"sinks": True}, "sinks=True"),
    (OWN_3, {"sinks": True}, "sinks=True"),
    (VLLM_3, {"sinks": True, "returns_lse": True}, "sinks with returns_lse"),
    (VLLM_3, {"sinks": True, "dtype": torch.float16}, "sinks with dtype=torch.float16"),
    (VLLM_3, {"sinks": True, "num_heads": 66}, "num_heads=66.*up to 64 query heads"),
    (OWN_4, {"cuda_graph": True}, "cuda_graph=True"),
    (VLLM_3, {"custom_mask": True}, "custom_mask=True"),
    (VLLM_3, {"bidirectional_ranges": True}, "bidirectional_ranges=True"),
    (VLLM_3, {"output_quant": "fp8_e4m3"}, "output_quant=fp8_e4m3"),
    (VLLM_3, {"batch_invariant": True}, "batch_invariant=True"),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), LIMITS)
def test_limits(name, fields, sentence):
    """By selection, and by the builder of those who do without one."""
    spec = spec_of(name, **fields)
    with provided(name), pytest.raises(UnsupportedError, match=sentence):
        FlashAttnBackend.get_builder_cls()(spec, torch.device("cpu"))
    with alone(name):
        device = profile_for(BY_NAME[name]).with_libraries(Library("triton", "3.6"))
        verdicts = explain(spec, device)[0].verdicts
    assert next(verdict for verdict in verdicts if verdict.name == "FLASH_ATTN").reasons


def test_an_installation_that_would_help_is_named():
    device = known_device("H200")
    reasons = pick_provider(spec_of(VLLM_3), device)
    assert {reason.code for reason in reasons} == {ReasonCode.LIBRARY}
    assert "needs vllm>=0.11 for vLLM's FlashAttention 3: vllm is not installed" in str(reasons[0])
    only = pick_provider(spec_of(VLLM_3, alibi=True), device)
    assert {reason.field for reason in only} == {"vllm"}  # flash_attn's pages are larger


def test_what_is_installed_and_cannot_is_told_by_name():
    device = known_device("H200").with_libraries(Library("flash_attn", "2.8.3"))
    reasons = pick_provider(spec_of(VLLM_3), device)
    assert "block_size=16 with FlashAttention 2 is not supported" in " ".join(map(str, reasons))


@pytest.mark.parametrize(("version", "picked"), [("2.8.3", OWN_2), ("2.5", None), ("4.0", None)])
def test_versions_count(version, picked):
    device = known_device("A100").with_libraries(Library("flash_attn", version))
    found = pick_provider(spec_of(OWN_2), device)
    assert (found.name if isinstance(found, Provider) else None) == picked


def test_selection_imports_nothing():
    spec = spec_of(VLLM_3)
    names = {name for provider in PROVIDERS for name in provider.imports}
    with mock.patch.dict(sys.modules):
        for name in names:
            sys.modules.pop(name, None)
        assert isinstance(pick_provider(spec, all_on("sm90")), Provider)
        verdicts = explain(spec, "H200")[0].verdicts
        assert next(v for v in verdicts if v.name == "FLASH_ATTN").reasons == ()
        assert names.isdisjoint(sys.modules)


def test_a_package_that_is_there_and_broken_is_told_of():
    spec, device = spec_of(VLLM_3), torch.device("cpu")
    profile = profile_for(BY_NAME[OWN_3])
    with (
        mock.patch.object(libraries, "_broken", {}),
        mock.patch.dict(sys.modules, {"flash_attn_interface": None}),
        on_device(profile),
    ):
        with pytest.raises(BackendFailure, match="cannot be imported here"):
            FlashAttnBackend.get_builder_cls()(spec, device)
        assert list(libraries._broken) == ["flash_attn_interface"]


def test_one_generation_that_was_not_built_leaves_the_others():
    """vLLM's package has all three, each with kernels of its own."""
    kernels = "vllm.vllm_flash_attn._vllm_fa2_C"
    device = torch.device("cpu")
    with (
        installed(VLLM_2),
        mock.patch.object(libraries, "_broken", {}),
        mock.patch.dict(sys.modules, {kernels: None}),
        on_device(explained_device("sm90").with_libraries(Library("flash_attn"))),
    ):
        build = FlashAttnBackend.get_builder_cls()
        with pytest.raises(BackendFailure, match="_vllm_fa2_C cannot be imported here"):
            build(spec_of(VLLM_2, alibi=True), device)
        assert list(libraries._broken) == [VLLM_2]
        with pytest.raises(UnsupportedError, match=f"needs {kernels} .* is broken: "):
            build(spec_of(VLLM_2, alibi=True), device)
        build(spec_of(VLLM_3), device)


def test_vllm_is_told_of_as_many_keys_as_its_schedule_was_made_for():
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {"sliding_window": 5}, {"query_lens": (1, 1), "seq_lens": (5, 60)})
        forward(step)
    (call,) = calls_of(recorder)
    assert call["scheduler_metadata"] is not None
    assert call["max_seqlen_k"] == 16 * call["block_table"].shape[1]


def test_a_package_without_its_function_is_told_of():
    with provided(OWN_3):
        del sys.modules["flash_attn_interface"].flash_attn_with_kvcache
        with pytest.raises(BackendFailure, match="has no flash_attn_with_kvcache"):
            FlashAttnBackend.get_builder_cls()(spec_of(OWN_3), torch.device("cpu"))


# --- Arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [False, True])
def test_a_cache_of_other_blocks_is_refused(is_known):
    """Also one that the layer has been computed from."""
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        build = FlashAttnBackend.get_builder_cls()
        table = step.batch.block_table.repeat(1, 2)
        batch = dataclasses.replace(step.batch, block_table=table)
        metadata = build(step.spec.replace(block_size=32), step.device).build(batch)
        impl = FlashAttnImpl(**step.impl_arguments())
        arguments = (step.layer, step.query, step.key, step.value, step.kv_cache)
        if is_known:
            impl.forward(*arguments, build(step.spec, step.device).build(step.batch))
        with pytest.raises(InvalidInputError, match=r"blocks of 16 tokens, .* block_size=32"):
            impl.forward(*arguments, metadata)


def test_a_cache_that_is_not_aligned_is_refused():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        memory = torch.zeros(step.kv_cache.numel() + 1, dtype=step.spec.dtype)
        cache = memory[1:].view(step.kv_cache.shape)
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
        impl = FlashAttnImpl(**step.impl_arguments())
        with pytest.raises(InvalidInputError, match="multiples of 16 bytes"):
            impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)


def test_a_quantized_output_is_refused():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        output = torch.empty(step.query.shape, dtype=torch.float8_e4m3fn)
        with pytest.raises(UnsupportedError, match="TRITON_ATTN does"):
            forward(step, output=output, output_scale=torch.ones(()))


def test_indices_of_64_bits_are_refused():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        batch = dataclasses.replace(step.batch, block_table=step.batch.block_table.long())
        builder = FlashAttnBackend.get_builder_cls()(step.spec, step.device)
        with pytest.raises(InvalidInputError, match=r"block_table is torch\.int64"):
            builder.build(batch)


@each_kind
def test_a_batch_of_nothing(name):
    with provided(name) as recorder:
        step = step_of(name, {"returns_lse": True}, {"query_lens": (), "seq_lens": ()})
        output, lse = forward(step)
        assert output.shape == (0, 4, 64)
        assert lse.shape == (0, 4)
    assert recorder.calls == []


def test_new_keys_are_written_once_and_shared_caches_never():
    for fields in ({}, {"kv_sharing": True}):
        with provided(VLLM_3):
            step = step_of(VLLM_3, fields, MIXED)
            metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
            before, cache = step.kv_cache.clone(), step.kv_cache
            impl = FlashAttnImpl(**step.impl_arguments())
            impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)
            changed = (before.nan_to_num(9.0) != cache.nan_to_num(9.0)).any((1, 3, 4)).sum()
            written = 0 if step.spec.kv_sharing else sum(step.case.query_lens)
            assert int(changed) == written


# --- On a GPU, with what is installed ---------------------------------------------------------


@contextlib.contextmanager
def real(name):
    """The provider as it is installed, on this GPU; else the test is skipped."""
    provider = BY_NAME[name]
    profile = detect_device("cuda")
    if not provider.runs_on(profile):
        pytest.skip(f"{name} is not for {profile.arch}")
    for module in provider.imports:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            pytest.skip(f"{module}: {error}")
    needed = (library_name(each) for each in provider.capabilities.requires)
    here = profile.with_libraries(*(Library(each, "unknown") for each in needed))
    with alone(name), on_device(here):
        yield


@pytest.fixture(scope="module")  # hypothesis refuses one that is made for each test
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


GPU_MIXED = {
    "query_lens": (1, 1, 3, 700, 300, 0, 129, 5),
    "seq_lens": (1000, 1, 70, 700, 1300, 0, 600, 3),
}
#: Prompts that are called for alone where that is faster, one with a past to be gathered.
GPU_LONG = {"query_lens": (2100, 1, 2060), "seq_lens": (2100, 900, 2500)}
GPU_DECODES = {"query_lens": (1,) * 6, "seq_lens": (3000, 1, 300, 17, 4097, 128)}
GPU_FEATURES = {
    **FEATURES,
    "window": {"sliding_window": 70},
    "window both ways": {"causal": False, "sliding_window": 70},
    "soft cap": {"logits_soft_cap": 5.0},
    "alibi, soft cap, window": {"alibi": True, "logits_soft_cap": 5.0, "sliding_window": 200},
    "sinks": {"sinks": True, "sliding_window": 130},
    "heads of 128": {"head_size": 128, "returns_lse": True},
    "heads of 256": {"head_size": 256, "returns_lse": True},
    "heads of 80": {"head_size": 80},
}


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [GPU_MIXED, GPU_DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("feature", GPU_FEATURES)
def test_the_installed_package_agrees(cuda, name, feature, lengths, dtype):
    with real(name):
        fields = GPU_FEATURES[feature] | {"dtype": dtype}
        spec = spec_of(name, **fields)
        supported(name, spec)
        step = step_of(name, fields, lengths, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("feature", ["plain", "not causal", "window", "soft cap", "lse"])
def test_long_prompts_of_the_installed_package_agree(cuda, name, feature):
    with real(name):
        step = step_of(name, GPU_FEATURES[feature], GPU_LONG, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@given(case=cases("FLASH_ATTN", dtypes=DTYPES, max_query=200, max_past=300))
def test_any_step_of_the_installed_package_agrees(cuda, name, case):
    with real(name):
        step = Step(case.replace(spec=fitted(case.spec, BY_NAME[name])), cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("block_size", [None, 16])
def test_nan_stays_out_of_what_the_installed_package_returns(cuda, name, block_size):
    with real(name):
        fields = {"block_size": None} if block_size is None else {}
        lengths = {"query_lens": (2100, 1, 300, 7), "seq_lens": (2100, 40, 300, 7)}
        step = step_of(name, fields, lengths, cuda, padding=50)
        expected = step.expected()[0]
        step.key[2401:], step.value[2401:] = torch.nan, torch.nan
        step.key[2100], step.value[2100] = torch.nan, torch.nan
        output = forward(step).double().cpu()
        kept = torch.tensor([*range(2100), *range(2101, 2401)])
        torch.testing.assert_close(output[kept], expected[kept], rtol=0, atol=0.02)


#: Lengths as above, for tiles of 64 to 192 keys.
GPU_APART = {
    "even": (500,) * 5,
    "even tiles": (384,) * 4,
    "ragged": (500, 3, 700, 1, 129, 384, 20),
    "long": (2100, 300, 2060, 9, 31),
}


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("lengths", GPU_APART)
@pytest.mark.parametrize("feature", ["plain", "not causal", "window both ways", "lse"])
def test_an_encoder_of_the_installed_package_agrees(cuda, name, feature, lengths):
    with real(name):
        fields = GPU_FEATURES[feature] | {"block_size": None, "head_size": 128}
        lengths = GPU_APART[lengths]
        step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths}, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("lengths", GPU_APART)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_a_request_that_is_nan_is_nan_alone_in_the_installed_package(
    cuda, name, causal, head_size, lengths
):
    with real(name):
        fields = {"block_size": None, "causal": causal, "head_size": head_size}
        supported(name, spec_of(name, **fields))
        for victim in range(len(GPU_APART[lengths])):
            step = nan_step(name, fields, GPU_APART[lengths], victim, cuda)
            check_all_but(step, forward(step), victim)


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("window", [None, 70])
def test_a_graph_of_the_installed_package_serves_later_steps(cuda, name, window):
    with real(name):
        fields = {"cuda_graph": True, "sliding_window": window}
        supported(name, spec_of(name, **fields))
        lengths = {"query_lens": (1,) * 4, "seq_lens": (2000, 0, 90, 17)}
        step = step_of(name, fields, lengths, cuda)
        table = step.batch.block_table.clone()
        batch = AttentionBatch(
            query_start_loc=step.batch.query_start_loc.clone(),
            seq_lens=torch.full_like(step.batch.seq_lens, 2),
            query_start_loc_cpu=step.batch.query_start_loc_cpu,
            seq_lens_cpu=torch.full_like(step.batch.seq_lens_cpu, 2),
            max_query_len=1,
            max_seq_len=table.shape[1] * step.spec.block_size,
            block_table=torch.zeros_like(table),
            slot_mapping=torch.full_like(step.batch.slot_mapping, -1),
        )
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, cuda).build(batch)
        impl, cache = FlashAttnImpl(**step.impl_arguments()), step.kv_cache
        arguments = (step.layer, step.query, step.key, step.value, cache, metadata)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            impl.forward(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = impl.forward(*arguments)
        batch.seq_lens.copy_(step.batch.seq_lens)
        batch.block_table.copy_(table)
        batch.slot_mapping.copy_(step.batch.slot_mapping)
        graph.replay()
        step.check(output)
