"""Static buffers for graphs, and metadata as an engine sees it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import AttentionBatch, AttentionType, InvalidInputError
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.interface.types import Phase, PlaceholderRange
from attn_dispatch.selection.registry import registry
from support.cases import Case, Step, layer_of, layer_spec

BACKENDS = ["REFERENCE", "TORCH_SDPA"]


def builder_of(backend, spec):
    cls = registry.candidates()[backend].backend_cls
    return cls.get_builder_cls()(spec, torch.device("cpu"))


def state_of(backend="TORCH_SDPA", spec=None, max_batch_size=None, **limits):
    """A state, captured up to max_batch_size if that is given."""
    runner = SimpleNamespace(
        metadata_builder=builder_of(backend, spec or layer_spec()),
        device=torch.device("cpu"),
        max_blocks_per_request=limits.get("blocks", 5),
        max_seq_len=limits.get("max_seq_len", 16),
    )
    state = registry.candidates()[backend].backend_cls.get_state_cls()(runner)
    if max_batch_size is not None:
        with state.graph_capture(max_batch_size):
            pass
    return state


def decode_step(seq_lens=(9, 4, 13), **spec):
    return Step(Case(spec=layer_spec(**spec), query_lens=(1,) * len(seq_lens), seq_lens=seq_lens))


def run(step, backend, metadata, query):
    """The impl over a step's cache, which is written."""
    impl = registry.candidates()[backend].backend_cls.get_impl_cls()(**step.impl_arguments())
    key, value = (torch.zeros(len(query), 2, 8, dtype=torch.float64) for _ in range(2))
    key[: len(step.key)], value[: len(step.value)] = step.key, step.value
    return impl.forward(step.layer, query, key, value, step.kv_cache, metadata)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 4, 8])
def test_a_padded_graph_computes_what_eager_computes(backend, size):
    """Metadata over the static buffers, once a smaller step's was copied there."""
    step = decode_step()
    expected = step.expected()[0]
    state = state_of(backend, max_batch_size=8)
    captured = state.graph_capture_get_metadata_for_batch(size)
    buffers = state.get_graph_input_buffers(captured)
    for tensor in buffers.values():  # what an earlier, larger step left behind
        if tensor is not buffers["query_start_loc"]:
            tensor.fill_(3)
    state.prepare_graph_input_buffers(buffers, builder_of(backend, step.spec).build(step.batch))
    replayed = state.graph_capture_get_metadata_for_batch(size)
    query = torch.ones(size, 4, 8, dtype=torch.float64)
    query[:3] = step.query
    eager_cache = decode_step().kv_cache
    written = step.kv_cache
    output = run(step, backend, replayed, query)
    step.check(output[:3], expected)
    assert not output[3:].any()
    changed = (eager_cache.nan_to_num(7) != written.nan_to_num(7)).any(-1).any(-1)
    assert int(changed.sum()) == 2 * 3  # a key and a value for each real token


def test_the_buffers_are_those_that_the_metadata_reads():
    state = state_of(max_batch_size=4)
    metadata = state.graph_capture_get_metadata_for_batch(2)
    buffers = state.get_graph_input_buffers(metadata)
    assert buffers.keys() == {"query_start_loc", "seq_lens", "block_table", "slot_mapping"}
    for name, tensor in buffers.items():
        assert getattr(metadata.batch, name).data_ptr() == tensor.data_ptr()
    again = state.get_graph_input_buffers(state.graph_capture_get_metadata_for_batch(4))
    assert again["seq_lens"].data_ptr() == buffers["seq_lens"].data_ptr()


def test_captured_requests_are_decodes():
    metadata = state_of(max_batch_size=4).graph_capture_get_metadata_for_batch(3)
    assert metadata.batch.phases == [Phase.DECODE] * 3
    assert (metadata.num_prefills, metadata.num_decode_tokens) == (0, 3)
    assert metadata.prefill_metadata is None
    assert metadata.decode_metadata is metadata
    assert metadata.batch.max_query_len == 1
    assert metadata.batch.max_seq_len == 16


def test_padding_is_a_decode_too():
    step, state = decode_step(), state_of(max_batch_size=5)
    buffers = state.get_graph_input_buffers(state.graph_capture_get_metadata_for_batch(5))
    state.prepare_graph_input_buffers(
        buffers, builder_of("TORCH_SDPA", step.spec).build(step.batch)
    )
    metadata = state.graph_capture_get_metadata_for_batch(5)
    assert metadata.batch.seq_lens_list == [9, 4, 13, 0, 0]
    assert metadata.batch.slot_mapping[3:].tolist() == [-1, -1]
    assert metadata.num_prefills == 0


def test_cross_attention_has_no_new_keys():
    spec = layer_spec(attn_type=AttentionType.ENCODER_DECODER)
    state = state_of(spec=spec, max_batch_size=4)
    metadata = state.graph_capture_get_metadata_for_batch(2, is_encoder_decoder_model=True)
    assert metadata.slot_mapping is None
    buffers = state.get_graph_input_buffers(metadata, is_encoder_decoder_model=True)
    assert "slot_mapping" not in buffers
    step = Step(Case(spec=spec, query_lens=(1, 1), seq_lens=(7, 5), brings_keys=False))
    built = builder_of("TORCH_SDPA", spec).build(step.batch)
    state.prepare_graph_input_buffers(buffers, built, is_encoder_decoder_model=True)
    replayed = state.graph_capture_get_metadata_for_batch(2, is_encoder_decoder_model=True)
    layer = layer_of(step)
    step.check(layer(step.query, kv_cache=step.kv_cache, attn_metadata=replayed))


def test_a_clone_shares_the_buffers():
    state = state_of(max_batch_size=8)
    clone = state.graph_clone(4)
    assert type(clone) is type(state) is CommonAttentionState
    mine, its = (
        s.get_graph_input_buffers(s.graph_capture_get_metadata_for_batch(4)) for s in (state, clone)
    )
    assert all(mine[name].data_ptr() == its[name].data_ptr() for name in mine)


def test_sizes_without_a_capture_are_rejected():
    for state, largest in ((state_of(), 0), (state_of(max_batch_size=4), 4)):
        for method in (state.graph_clone, state.graph_capture_get_metadata_for_batch):
            with pytest.raises(InvalidInputError, match=f"up to {largest} requests, not 5"):
                method(5)


BAD_STEPS = {
    "more requests": ((1, 1, 1), (3, 3, 3), {}, "captured for 2 requests of one token.* has 3"),
    "longer queries": ((1, 2), (3, 3), {}, r"has 2 with \[1, 2\]"),
    "a request without a token": ((1, 0), (3, 3), {}, r"has 2 with \[1, 0\]"),
    "more blocks than the runner said": (
        (1, 1),
        (3, 3),
        {"block_table": torch.zeros(2, 6).int()},
        "The batch has 6 blocks per request",
    ),
    "more keys than the runner said": (
        (1, 1),
        (3, 17),
        {"block_table": torch.zeros(2, 4).int()},
        "up to 17 keys; this state was made for 5 and 16",
    ),
    "scales to derive": ((1, 1), (3, 3), {"enable_kv_scales_calculation": True}, "Run it eagerly"),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_step_that_does_not_fit_the_graph_is_rejected(what):
    query_lens, seq_lens, more, message = BAD_STEPS[what]
    state = state_of(max_batch_size=2)
    buffers = state.get_graph_input_buffers(state.graph_capture_get_metadata_for_batch(2))
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    batch = AttentionBatch.create(query_lens, seq_lens, **more)
    with pytest.raises(InvalidInputError, match=message):
        state.prepare_graph_input_buffers(
            buffers, builder_of("TORCH_SDPA", layer_spec()).build(batch)
        )
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_a_graph_takes_no_mask():
    spec = layer_spec(custom_mask=True)
    state = state_of(spec=spec, max_batch_size=2)
    buffers = state.get_graph_input_buffers(state.graph_capture_get_metadata_for_batch(2))
    batch = AttentionBatch.create([1], [3], custom_mask=torch.ones(3).bool())
    with pytest.raises(InvalidInputError, match="has a custom_mask"):
        state.prepare_graph_input_buffers(buffers, builder_of("TORCH_SDPA", spec).build(batch))


def test_a_graph_takes_no_ranges():
    """Only of layers that would otherwise see them; others ignore a batch's."""
    maps = {"image": [PlaceholderRange(0, 1, 3)]}
    batch = AttentionBatch.create([1], [3], multi_modal_placeholder_index_maps=maps)
    for has_ranges in (False, True):
        spec = layer_spec(bidirectional_ranges=has_ranges)
        state = state_of(spec=spec, max_batch_size=2)
        buffers = state.get_graph_input_buffers(state.graph_capture_get_metadata_for_batch(2))
        metadata = builder_of("TORCH_SDPA", spec).build(batch)
        if has_ranges:
            with pytest.raises(InvalidInputError, match="bidirectional ranges"):
                state.prepare_graph_input_buffers(buffers, metadata)
        else:
            state.prepare_graph_input_buffers(buffers, metadata)


def test_the_default_device_and_dtype_are_ignored(misleading_defaults):
    with misleading_defaults():
        metadata = state_of(max_batch_size=4).graph_capture_get_metadata_for_batch(3)
    assert metadata.batch.block_table.device.type == "cpu"


# Metadata.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fields_come_by_name_without_a_copy(backend):
    step = decode_step()
    metadata = builder_of(backend, step.spec).build(step.batch)
    fields = metadata.asdict_zerocopy()
    assert fields.keys() == {field.name for field in dataclasses.fields(metadata)}
    assert fields["slot_mapping"] is metadata.slot_mapping
    assert fields["batch"] is step.batch
    assert "slot_mapping" not in metadata.asdict_zerocopy({"slot_mapping"})


def test_metadata_can_be_made_from_its_fields():
    """The seed's make_metadata."""
    step, cls = decode_step(), registry.candidates()["REFERENCE"].backend_cls
    metadata = builder_of("REFERENCE", step.spec).build(step.batch)
    assert cls.make_metadata(**metadata.asdict_zerocopy()) == metadata


@pytest.mark.parametrize("backend", BACKENDS)
@given(lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6))
def test_the_phases_partition_the_batch(backend, lens):
    query_lens, seq_lens = [q for q, _ in lens], [q + past for q, past in lens]
    batch = AttentionBatch.create(query_lens, seq_lens, slot_mapping=torch.arange(sum(query_lens)))
    metadata = builder_of(backend, layer_spec()).build(batch)
    prefill, decode = metadata.prefill_metadata, metadata.decode_metadata
    parts = [part for part in (prefill, decode) if part is not None]
    assert {type(part) for part in parts} <= {type(metadata)}
    assert metadata.num_prefills == (prefill.num_prefills if prefill else 0)
    assert metadata.num_prefill_tokens == (prefill.num_prefill_tokens if prefill else 0)
    assert metadata.num_decode_tokens == (decode.num_decode_tokens if decode else 0)
    assert (decode.num_prefills if decode else 0) == 0
    assert sum(part.batch.num_reqs for part in parts) == batch.num_reqs
    slots = [slot for part in parts for slot in part.slot_mapping.tolist()]
    assert sorted(slots) == list(range(sum(query_lens)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_metadata_of_a_phase_computes_its_rows(backend):
    step = Step(Case(spec=layer_spec(), query_lens=(1, 5, 1, 3), seq_lens=(9, 5, 4, 7)))
    expected = step.expected()[0]
    metadata = builder_of(backend, step.spec).build(step.batch)
    impl = registry.candidates()[backend].backend_cls.get_impl_cls()(**step.impl_arguments())
    shares = (
        (metadata.prefill_metadata, [*range(1, 6), 7, 8, 9]),
        (metadata.decode_metadata, [0, 6]),
    )
    for part, rows in shares:
        arguments = (step.query[rows], step.key[rows], step.value[rows])
        output = impl.forward(step.layer, *arguments, step.kv_cache, part)
        step.check(output, expected[rows])


def test_derived_slots_are_the_last_positions_of_each_request():
    """Of a request without keys there are none: it pads the batch."""
    table = torch.tensor([[4, 2], [7, 9], [1, 1]])
    batch = AttentionBatch.create([2, 1, 3], [5, 0, 3], block_table=table, block_size=4)
    assert batch.slot_mapping.tolist() == [4 * 4 + 3, 2 * 4, -1, 4, 5, 6]


def test_metadata_has_the_values_of_the_engine():
    maps = {"image": [PlaceholderRange(0, 1, 3)]}
    batch = AttentionBatch.create(
        [5], [5], multi_modal_placeholder_index_maps=maps, enable_kv_scales_calculation=True
    )
    metadata = builder_of("REFERENCE", layer_spec()).build(batch)
    assert metadata.multi_modal_placeholder_index_maps is maps
    assert metadata.enable_kv_scales_calculation is True
    assert metadata.ranges_of(0) == []  # the layer was not described as one that knows them
