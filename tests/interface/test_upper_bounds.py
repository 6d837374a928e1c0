"""Batches of which the host knows only upper bounds of the key counts."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import Attention, AttentionBatch, KeyPositions, forward_context, known_device
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import OneOf, compare
from attn_dispatch.interface.contents import check_batch_contents, with_exact_lengths
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.timings.table import layer_key
from support.cases import Case, Step, call, layer_of, layer_spec
from support.selection import layer, make_backend, registered

#: Decodes and prompts in turns, so that each phase is gathered.
LENS = {"query_lens": (1, 5, 1, 6), "seq_lens": (9, 5, 4, 11)}
BOUNDS = (19, 5, 8, 12)
TABLE = torch.arange(20, dtype=torch.int32).view(4, 5)


def bounded(**changes):
    arguments = {
        "query_lens": LENS["query_lens"],
        "seq_lens": torch.tensor(LENS["seq_lens"]),
        "lengths": "upper_bound",
        "seq_lens_upper_bound": BOUNDS,
        "block_table": TABLE,
        "block_size": 4,
    }
    return AttentionBatch.create(**arguments | changes)


def step_of(bounds=BOUNDS, **fields):
    spec = layer_spec(lengths="upper_bound", **fields)
    return Step(Case(spec=spec, **LENS, bounds=bounds))


def test_the_host_has_the_bounds_and_the_device_the_true_lengths():
    batch = bounded()
    assert batch.seq_lens.tolist() == list(LENS["seq_lens"])
    assert batch.seq_lens.dtype == torch.int32
    assert batch.seq_lens_list == list(BOUNDS)
    assert batch.max_seq_len == 19
    assert batch.totals.keys == sum(BOUNDS)


def test_the_phase_is_that_of_the_bound():
    """A prompt of one token is known to be one only by an exact bound."""
    prompts = {"query_lens": [1, 1], "seq_lens": torch.tensor([1, 1]), "block_table": TABLE[:2]}
    assert bounded(**prompts, seq_lens_upper_bound=[1, 2]).phases == [Phase.PREFILL, Phase.DECODE]


def test_derived_slots_follow_the_true_lengths():
    exact = bounded(seq_lens=LENS["seq_lens"], lengths="exact", seq_lens_upper_bound=None)
    assert torch.equal(bounded().slot_mapping, exact.slot_mapping)


def test_the_parts_have_the_true_lengths_on_the_device():
    parts = bounded().parts
    for phase, requests in ((Phase.DECODE, [0, 2]), (Phase.PREFILL, [1, 3])):
        part = parts[phase].batch
        assert part.lengths == "upper_bound"
        assert part.seq_lens.tolist() == [LENS["seq_lens"][i] for i in requests]
        assert part.seq_lens_list == [BOUNDS[i] for i in requests]


def test_lengths_that_change_on_the_device_are_those_of_the_call():
    """An asynchronous step: the batch and its metadata exist before the lengths are known."""
    step = step_of()
    true = step.batch.seq_lens.clone()
    step.batch.seq_lens.fill_(3)
    layer = layer_of(step, backend="REFERENCE")
    with forward_context(step.batch):
        step.batch.seq_lens.copy_(true)
        step.check(layer(step.query, step.key, step.value))


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA", "prefill=REFERENCE"])
@pytest.mark.parametrize("bounds", [LENS["seq_lens"], BOUNDS, (400, 5, 300, 9000)])
def test_a_layer_gives_the_same_as_with_exact_lengths(backend, bounds):
    """Whatever the bounds are: the block table has no room for the largest of these."""
    step = step_of(bounds)
    layer = layer_of(step, backend=backend)
    step.check(call(layer, step))
    exact = step_of(None)
    assert exact.batch.lengths == "exact"
    assert torch.equal(call(layer, exact), call(layer, step))


@pytest.mark.parametrize("value", [None, 19, 500])
def test_max_seq_len_may_be_a_bound_with_exact_lengths_too(value):
    step = Step(Case(spec=layer_spec(), **LENS))
    batch = AttentionBatch.create(
        *LENS.values(),
        block_table=step._table,
        slot_mapping=step._slots,
        max_seq_len=value,
    )
    assert batch.max_seq_len == (value or 11)
    step.batch = batch
    step.check(call(layer_of(step), step))


REJECTED = {
    "lengths": ({"lengths": "bound"}, "lengths='bound' is not one of: exact, upper_bound"),
    "no bounds": ({"seq_lens_upper_bound": None}, "go together"),
    "not asked for": ({"lengths": "exact"}, "go together"),
    "a list": ({"seq_lens": [9, 5, 4, 11]}, "seq_lens is a list; it must be a tensor"),
    "floats": ({"seq_lens": torch.ones(4)}, "torch.float32"),
    "requests": ({"seq_lens": torch.ones(3).int()}, r"\(4,\) int32"),
    "new tokens": ({"seq_lens_upper_bound": (19, 4, 8, 12)}, "Request 1 brings 5 keys, and has at"),
    "negative": ({"seq_lens_upper_bound": (19, -5, 8, 12)}, "holds -5"),
    "max_seq_len": ({"max_seq_len": 18}, "max_seq_len=18 is not an integer of 19 or more"),
    "mask": ({"custom_mask": torch.ones(9).bool()}, "Give exact seq_lens to steps with a mask"),
    "no table": ({"block_table": None}, "Without a block_table"),
    "no room": ({"seq_lens": torch.tensor([9, 5, 4, 40])}, "Give it 10 columns"),
    "fewer than new": ({"seq_lens": torch.tensor([9, 5, 4, 3])}, "has 6 new tokens and 3 keys"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_an_invalid_argument_is_rejected(name):
    changes, message = REJECTED[name]
    with pytest.raises(InvalidInputError, match=message):
        bounded(**changes)


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        ([20, 5, 4, 11], "Request 0 has 20 keys, and its bound is 19"),
        ([9, 4, 4, 11], "Request 1 brings 5 keys, and has 4"),
    ],
)
@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_wrong_true_lengths_are_rejected_before_anything_is_written(lens, message, backend):
    step = step_of()
    step.batch.seq_lens.copy_(torch.tensor(lens))
    layer = layer_of(step, backend=backend)
    before = layer.kv_cache.clone()
    with pytest.raises(InvalidInputError, match=message):
        call(layer, step)
    assert torch.equal(layer.kv_cache.nan_to_num(9), before.nan_to_num(9))
    with pytest.raises(InvalidInputError, match=message):
        check_batch_contents(step.batch, layer.kv_cache)


def test_true_lengths_beyond_the_block_table_are_found():
    batch = bounded(slot_mapping=torch.arange(13), seq_lens_upper_bound=(19, 5, 8, 40))
    batch.seq_lens[3] = 40
    with pytest.raises(InvalidInputError, match="Give it 10 columns"):
        check_batch_contents(batch, torch.zeros(20, 2, 4, 2, 8))


def test_key_positions_need_exact_lengths():
    positions = KeyPositions.create([40, 40, 40, 40], offset=0, step=2)
    with pytest.raises(InvalidInputError, match="Give exact seq_lens to steps with key_positions"):
        bounded(key_positions=positions, slot_mapping=torch.full((13,), -1))


def test_blocks_are_checked_by_the_window_of_the_true_lengths():
    """The window of a bound begins later, so that a block of the true one could go unchecked."""
    table = TABLE.clone()
    table[0, 1] = 99  # keys 4 to 7; the only query is at 8 by the true length, at 18 by the bound
    batch = bounded(block_table=table, slot_mapping=torch.full((13,), -1))
    check_batch_contents(batch, torch.zeros(20, 2, 4, 1, 8), Reach(left=0))
    with pytest.raises(InvalidInputError, match="request 0 names block 99"):
        check_batch_contents(batch, torch.zeros(20, 2, 4, 1, 8), Reach(left=2))


def test_a_request_that_pads_the_batch_may_have_no_keys():
    lens = {"query_lens": (1, 1), "seq_lens": (9, 0)}
    step = Step(Case(spec=layer_spec(lengths="upper_bound"), **lens, bounds=(9, 7)))
    step.check(call(layer_of(step), step))


def test_a_layer_for_exact_lengths_rejects_bounds():
    step = step_of()
    exact = layer_of(Step(Case(spec=layer_spec(), **LENS)))
    for how in (lambda: call(exact, step), lambda: exact.build_metadata(step.batch)):
        with pytest.raises(InvalidInputError, match="Make the layer with lengths='upper_bound'"):
            how()


def test_a_backend_that_does_not_declare_bounds_is_not_picked():
    backend = make_backend("EXACT", lengths=OneOf("exact"))
    arguments = {"num_heads": 4, "head_size": 8, "dtype": torch.float64}
    with registered(backend):
        with pytest.raises(UnsupportedError, match="lengths=upper_bound is not supported"):
            Attention(**arguments, lengths="upper_bound", backend="EXACT")
        Attention(**arguments, backend="EXACT")


@pytest.mark.parametrize("name", ["FLASHINFER", "TORCH_VARLEN", "TORCH_SDPA"])
def test_backends_that_plan_by_lengths_on_the_host_do_not_declare_bounds(name):
    capabilities = registry.candidates()[name].backend_cls.capabilities
    for lengths, is_refused in (("upper_bound", True), ("exact", False)):
        reasons = compare(layer(lengths=lengths), capabilities, known_device("sm90"))
        assert ("lengths" in [reason.field for reason in reasons]) is is_refused


def test_measured_times_hold_for_both():
    assert layer_key(layer(lengths="upper_bound")) == layer_key(layer())


def test_exact_lengths_are_read_once():
    batch = bounded()
    spec = layer_spec(lengths="upper_bound")
    exact = with_exact_lengths(batch, spec)
    assert (exact.lengths, exact.seq_lens_list) == ("exact", list(LENS["seq_lens"]))
    assert with_exact_lengths(exact, spec) is exact


def test_the_reference_takes_metadata_only_of_exact_lengths():
    """Its metadata has the lengths of the moment at which it was built."""
    step = step_of()
    metadata = ReferenceBackend.make_builder(step.spec, step.device).build(step.batch)
    assert metadata.batch.lengths == "exact"
