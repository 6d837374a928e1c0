"""Prefill and decode on different backends: what is split, and that the results are the same."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import (
    AttentionBatch,
    AttentionType,
    InvalidInputError,
    Phase,
    UnsupportedError,
    forward_context,
    register_backend,
)
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.interface import batch as batches
from attn_dispatch.interface.types import PlaceholderRange
from attn_dispatch.selection.registry import registry
from support.cases import Case, Step, call, layer_of, layer_spec

ROUTES = ["prefill=REFERENCE,decode=TORCH_SDPA", "prefill=TORCH_SDPA,decode=REFERENCE"]
E4M3 = torch.float8_e4m3fn

#: Requests whose phases alternate, so that neither phase's rows are a slice.
MIXED = {"query_lens": (1, 5, 1, 3), "seq_lens": (9, 5, 4, 8)}
#: Prompts first, as in the seed; decodes first, as in vLLM V1; and mixed.
ORDERS = {
    "prefills first": {"query_lens": (5, 3, 1, 1), "seq_lens": (5, 8, 9, 4)},
    "decodes first": {"query_lens": (1, 1, 5, 3), "seq_lens": (9, 4, 5, 8)},
    "mixed": MIXED,
    "only decodes": {"query_lens": (1, 1), "seq_lens": (9, 4)},
    "only prefills": {"query_lens": (5, 3), "seq_lens": (5, 8)},
    "nothing": {"query_lens": (), "seq_lens": ()},
}


@pytest.fixture
def twin():
    """A second backend that can do all that REFERENCE can, to route between the two."""

    @register_backend
    class Twin(ReferenceBackend):
        get_name = staticmethod(lambda: "TWIN")

    yield "prefill=REFERENCE,decode=TWIN"
    registry.unregister("TWIN")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 3},
        {"custom_mask": True},
        {"kv_cache_dtype": "fp8"},
        {"bidirectional_ranges": True},
        {"kv_sharing": True},
        {"block_size": None},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)
def test_a_split_batch_equals_a_whole_one(route, order, fields):
    spec = layer_spec(**fields)
    case = Case(spec=spec, **ORDERS[order], padding=2)
    if spec.bidirectional_ranges:
        lens = enumerate(case.seq_lens)
        case = case.replace(ranges=tuple((request, 1, n) for request, n in lens))
    step = Step(case)
    output = call(layer_of(step, backend=route), step)
    step.check(output)
    assert not output[sum(case.query_lens) :].any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("order", ORDERS)
def test_keys_may_be_unpadded_while_queries_are_padded(route, order):
    """The rows of a phase are found by the batch, and not by comparing the tensors' lengths."""
    step = Step(Case(spec=layer_spec(), **ORDERS[order], padding=3))
    tokens = step.batch.num_tokens
    step.key, step.value = step.key[:tokens], step.value[:tokens]
    step._slots = step._slots[:tokens]
    step.batch = step._make_batch()
    step.check(call(layer_of(step, backend=route), step))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reader", ["decode", "prefill"])
def test_a_request_reads_a_prefix_written_in_the_same_step(route, reader):
    """Prefix caching: a block counts as cached from the step on that computes it."""
    # The writer's 4 tokens fill a block, which is also the first block of the reader.
    writer, reading = ((4, 4), (1, 5)) if reader == "decode" else ((1, 4), (3, 7))
    lens = (writer, reading)
    case = Case(
        spec=layer_spec(),
        query_lens=tuple(query for query, _ in lens),
        seq_lens=tuple(seq for _, seq in lens),
    )
    step = Step(case)
    table = step._table.clone()
    table[1, 0] = table[0, 0]
    step._table = table
    step.batch = step._make_batch()
    step.keys[1] = torch.cat([step.keys[0][:4], step.keys[1][4:]])
    step.values[1] = torch.cat([step.values[0][:4], step.values[1][4:]])
    step.check(call(layer_of(step, backend=route), step))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("new_lens", [(7, 5), (0, 5), None], ids=str)
def test_cross_attention_is_split(route, new_lens):
    spec = layer_spec(attn_type=AttentionType.ENCODER_DECODER)
    case = Case(
        spec=spec,
        query_lens=(3, 1),
        seq_lens=(7, 5),
        new_lens=new_lens,
        brings_keys=new_lens is not None,
        padding=8 if new_lens == (7, 5) else 1,
    )
    step = Step(case)
    step.check(call(layer_of(step, backend=route), step))


def test_cross_attention_keeps_all_keys_if_there_are_as_many_as_queries():
    spec = layer_spec(attn_type=AttentionType.ENCODER_DECODER)
    case = Case(spec=spec, query_lens=(3, 1), seq_lens=(4, 3), new_lens=(4, 3))
    step = Step(case)
    step.query = torch.cat([step.query, torch.zeros(3, 4, 8).double()])  # 7 rows, as the keys have
    step.check(call(layer_of(step, backend=ROUTES[0]), step))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_the_log_sum_exp_of_parts_is_assembled(twin, order, padding):
    step = Step(Case(spec=layer_spec(returns_lse=True), **ORDERS[order], padding=padding))
    output, lse = call(layer_of(step, backend=twin), step)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    tokens = len(expected)
    torch.testing.assert_close(lse[:tokens], expected_lse)
    assert bool((lse[tokens:] == -torch.inf).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("quant", ["fp8_e4m3", "fp8_e4m3_group128"])
def test_the_quantized_output_of_parts_is_assembled(twin, order, quant):
    spec = layer_spec(head_size_v=64, output_quant=quant)
    step = Step(Case(spec=spec, **ORDERS[order]))
    tokens, results = len(step.query), []
    for backend in (twin, "REFERENCE"):
        scales = {}
        if quant == "fp8_e4m3":
            scales["output_scale"] = torch.tensor(0.01)
        else:
            scales["output_block_scale"] = torch.zeros(tokens, 2)
        output = call(layer_of(step, backend=backend), step, **scales)
        results.append((output.view(torch.uint8), *scales.values()))
    for split, whole in zip(*results, strict=True):
        assert torch.equal(split, whole)


@pytest.mark.parametrize("route", ROUTES)
def test_the_parts_have_their_phase(route):
    step = Step(Case(spec=layer_spec(), **MIXED))
    layer = layer_of(step, backend=route)
    metadata = layer.build_metadata(step.batch)
    assert (metadata.num_prefills, metadata.num_prefill_tokens) == (2, 8)
    assert metadata.num_decode_tokens == 2
    assert metadata.prefill_metadata.batch.query_lens == [5, 3]
    assert metadata.decode_metadata.batch.query_lens == [1, 1]
    names = {phase: type(part).__name__ for phase, part in (
        (Phase.PREFILL, metadata.prefill_metadata), (Phase.DECODE, metadata.decode_metadata)
    )}  # fmt: skip
    wanted = {
        phase: selection.backend_cls.get_metadata_cls().__name__
        for phase, selection in layer.selections.items()
    }
    assert names == wanted


def test_adjacent_requests_are_not_gathered():
    for order, phases in (("prefills first", (0, 8)), ("decodes first", (0, 2))):
        batch = AttentionBatch.create(**ORDERS[order])
        rows = [part.tokens for part in batch.parts.values()]
        assert all(isinstance(tokens, slice) for tokens in rows), order
        assert any(tokens == slice(*phases) for tokens in rows)
    mixed = AttentionBatch.create(**MIXED).parts[Phase.DECODE].tokens
    assert mixed.tolist() == [0, 6]


@given(
    lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    longest_decode=st.integers(1, 3),
)
def test_the_parts_of_a_batch_cover_the_batch(lens, longest_decode):
    """Every request is in one part, with its tokens, slots, blocks, mask and ranges."""
    query_lens, seq_lens = [q for q, _ in lens], [q + past for q, past in lens]
    tokens, pairs = sum(query_lens), sum(q * s for q, s in zip(query_lens, seq_lens, strict=True))
    mask = torch.arange(pairs) % 3 == 0
    batch = AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=torch.arange(len(lens))[:, None] + 100,
        slot_mapping=torch.arange(tokens) * 7,
        custom_mask=mask,
        multi_modal_placeholder_index_maps={
            "image": [PlaceholderRange(request, 0, request + 1) for request in range(len(lens))]
        },
        max_decode_query_len=longest_decode,
        enable_kv_scales_calculation=True,
    )
    seen = []
    for phase, part in batch.parts.items():
        assert set(part.batch.phases) == {phase}
        assert part.batch.enable_kv_scales_calculation
        rows = torch.arange(tokens)[part.tokens].tolist()
        assert part.batch.slot_mapping.tolist() == [row * 7 for row in rows]
        ranges = part.batch.multi_modal_placeholder_index_maps["image"]
        for place, block in enumerate(part.batch.block_table[:, 0].tolist()):
            request = block - 100
            assert batch.phases[request] is phase
            assert part.batch.query_lens[place] == query_lens[request]
            assert part.batch.seq_lens_list[place] == seq_lens[request]
            assert torch.equal(part.batch.request_mask(place), batch.request_mask(request))
            assert ranges[place] == (place, 0, request + 1)
            own = range(batch.query_start_list[request], batch.query_start_list[request + 1])
            assert rows[: len(own)] == list(own)
            del rows[: len(own)]
            seen.append(request)
    assert sorted(seen) == list(range(len(lens)))


@pytest.mark.parametrize(
    ("query_len", "seq_len", "longest", "phase"),
    [
        (1, 9, 1, Phase.DECODE),
        (1, 1, 1, Phase.PREFILL),  # a prompt of one token
        (2, 9, 1, Phase.PREFILL),
        (2, 9, 2, Phase.DECODE),  # speculative decoding
        (2, 2, 2, Phase.PREFILL),
        (1, 0, 1, Phase.DECODE),  # pads a graph's batch
        (0, 4, 1, Phase.DECODE),
    ],
)
def test_the_phase_of_a_request(query_len, seq_len, longest, phase):
    batch = AttentionBatch.create([query_len], [seq_len], max_decode_query_len=longest)
    assert batch.phases == [phase]


def test_a_backend_that_rejects_a_phase_is_named():
    with pytest.raises(UnsupportedError, match="TORCH_SDPA"):
        layer_of(Step(Case(spec=layer_spec(sinks=True), **MIXED)), backend=ROUTES[0])


@pytest.mark.parametrize("order", ["prefills first", "only decodes"])
def test_a_contradictory_batch_is_an_invalid_input(order):
    """It is rejected before a backend gets it, and no failure is recorded."""
    step = Step(Case(spec=layer_spec(), **ORDERS[order]))
    layer = layer_of(step, backend=ROUTES[0])
    short = dataclasses.replace(step.batch, seq_lens_cpu=step.batch.seq_lens_cpu[:1])
    falling = dataclasses.replace(
        step.batch, query_start_loc_cpu=step.batch.query_start_loc_cpu.flip(0)
    )
    for wrong in (short, falling):
        for _ in range(2):  # it is rejected again
            with pytest.raises(InvalidInputError, match=r"for [24] requests it takes"):
                layer.build_metadata(wrong)
    assert {phase: s.name for phase, s in layer.selections.items()} == {
        Phase.PREFILL: "REFERENCE",
        Phase.DECODE: "TORCH_SDPA",
    }


def test_all_layers_of_a_model_share_the_split(monkeypatch):
    split, original = [], batches.select

    def select(batch, chosen):
        split.append(batch.phases[chosen[0]])
        return original(batch, chosen)

    monkeypatch.setattr(batches, "select", select)
    step = Step(Case(spec=layer_spec(), **MIXED))
    layers = [layer_of(step, backend=route) for route in itertools.chain(ROUTES, ROUTES)]
    with forward_context(step.batch):
        for layer in layers:
            step.check(layer(step.query, step.key, step.value))
    assert split == [Phase.PREFILL, Phase.DECODE]
