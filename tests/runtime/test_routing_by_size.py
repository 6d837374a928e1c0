"""One batch on the backend that was measured to be the fastest at its size, or on two of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_dispatch import (
    AttentionBatch,
    AttentionType,
    InvalidInputError,
    Phase,
    forward_context,
)
from attn_dispatch.interface.graphs import CommonAttentionState
from attn_dispatch.runtime.routing import RoutedImpl, Router
from attn_dispatch.selection.timings.table import BatchKind as Kind
from attn_dispatch.selection.timings.table import bucket_of
from support.cases import Case, Step, call, layer_of, layer_spec
from support.selection import make_backend, registered
from support.timing_tables import in_force, point

#: Requests whose phases alternate, so that neither phase's rows are a slice.
MIXED = {"query_lens": (1, 5, 1, 3), "seq_lens": (9, 5, 4, 8)}

#: Few requests are served by REFERENCE, many by TORCH_SDPA, which is the first in the order.
BY_SIZE = [
    point(step, requests, tokens, keys, REFERENCE=us, TORCH_SDPA=15)
    for step, tokens, keys in (("decode", 1, 8), ("verify", 2, 8), ("prefill", 4, 4))
    for requests, us in ((1, 10), (4, 20))
]
WHOLE, SPLIT = [("REFERENCE", None)], [("REFERENCE", "prefill"), ("TORCH_SDPA", "decode")]
SIZES = {
    "one decode": ((1,), (7,), [("REFERENCE", None)]),
    "four decodes": ((1,) * 4, (7, 9, 5, 8), [("TORCH_SDPA", None)]),
    "a size that was not measured": ((1,) * 9, (7,) * 9, [("TORCH_SDPA", None)]),
    "a length that was not measured": ((1,), (70,), [("TORCH_SDPA", None)]),
    "one prompt": ((4,), (4,), [("REFERENCE", None)]),
    "four prompts": ((4, 3, 4, 4), (4, 3, 4, 4), [("TORCH_SDPA", None)]),
    "a prompt and a decode": ((1, 4), (7, 4), WHOLE),
    "a prompt and four decodes": ((1, 1, 4, 1, 1), (7, 8, 4, 9, 6), SPLIT),
    "four prompts and decodes": ((1,) * 4 + (4,) * 4, (7,) * 4 + (4,) * 4, [("TORCH_SDPA", None)]),
    "nothing": ((), (), []),
}  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that puts points in force for layers that are made later."""
    names = (tmp_path / f"table-{i}.json" for i in itertools.count())

    def put(points, *specs):
        in_force(monkeypatch, next(names), dict.fromkeys(specs or [layer_spec()], points))

    return put


def route_of(layer, step):
    metadata = layer.build_metadata(step.batch)
    return [
        (part.backend, None if part.phase is None else str(part.phase)) for part in metadata.parts
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"sliding_window": 3}, {"kv_cache_dtype": "fp8"}, {"kv_sharing": True}],
    ids=lambda fields: "+".join(fields) or "plain",
)
@pytest.mark.parametrize("size", SIZES)
def test_each_batch_goes_to_the_fastest_measured_backend(size, fields, measured):
    query_lens, seq_lens, expected = SIZES[size]
    spec = layer_spec(**fields)
    measured(BY_SIZE, spec)
    step = Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens, padding=2))
    layer = layer_of(step)
    assert route_of(layer, step) == expected
    output = call(layer, step)
    step.check(output)
    assert not output[sum(query_lens) :].any()


def test_drafts_go_to_the_fastest_backend_for_verify(measured):
    measured([*BY_SIZE, point("decode", 1, 1, 16, REFERENCE=20, TORCH_SDPA=15)])
    step = Step(Case(spec=layer_spec(), query_lens=(2,), seq_lens=(8,)))
    step.batch = AttentionBatch.create(
        (2,), (8,), block_table=step.batch.block_table, block_size=4, max_decode_query_len=2
    )
    layer = layer_of(step)
    assert route_of(layer, step) == [("REFERENCE", None)]
    step.check(call(layer, step))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"REFERENCE": 10, "TORCH_SDPA": 20, "REFERENCE__TORCH_SDPA": 30}, WHOLE),
        ({"REFERENCE": 30, "TORCH_SDPA": 20, "REFERENCE__TORCH_SDPA": 10}, SPLIT),
        ({"REFERENCE": 20, "TORCH_SDPA": 10, "REFERENCE__TORCH_SDPA": 20}, [("TORCH_SDPA", None)]),
        ({"REFERENCE": 10, "REFERENCE__TORCH_SDPA": 20}, SPLIT),  # nothing of the first: as above
    ],
    ids=str,
)
def test_a_mixed_batch_is_split_only_if_that_was_faster(times, expected, measured):
    query_lens, seq_lens, _ = SIZES["a prompt and four decodes"]
    measured([*BY_SIZE, point("mixed", 5, 2, 7, **times)])
    step = Step(Case(spec=layer_spec(), query_lens=query_lens, seq_lens=seq_lens, padding=2))
    layer = layer_of(step)
    assert route_of(layer, step) == expected
    step.check(call(layer, step))


@given(
    lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    names=st.lists(st.sampled_from(["A", "B", "A+B", "B+A"]), min_size=16, max_size=16),
)
def test_a_router_serves_every_request_once(lens, names):
    batch = AttentionBatch.create([q for q, _ in lens], [q + past for q, past in lens])
    places = itertools.product(Kind, (0, 2), (0, 2), (0, 2))
    routes = {
        place: name if place[0] is Kind.MIXED else name[0]
        for place, name in zip(places, itertools.cycle(names))
    }
    router = Router({Phase.PREFILL: "A", Phase.DECODE: "B"}, routes)
    served = [phase for _, phase in router(batch)]
    if not lens:
        assert served == []
    elif served != [None]:
        assert served == [Phase.PREFILL, Phase.DECODE]
        assert set(batch.phases) == set(Phase)


@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), min_size=1, max_size=8),
    longest=st.integers(1, 3),
    together=st.booleans(),
    captured=st.booleans(),
)
def test_an_unmeasured_mixed_batch_is_split_by_phase(lens, longest, together, captured):
    """The totals of a phase are those of its requests, wherever they are in the batch."""
    lens = sorted(lens) if together else lens
    batch = AttentionBatch.create(
        [q for q, _ in lens], [q + past for q, past in lens], max_decode_query_len=longest
    )
    places = itertools.product(list(Kind)[:3], range(4), range(7), range(10))
    routes = {place: "-".join(map(str, place)).upper() for place in places}
    router = Router({Phase.PREFILL: "A", Phase.DECODE: "B"}, routes, captured)
    whole = {phase: router(part.batch) for phase, part in batch.parts.items()}
    if len(whole) == 1:
        assert [router(batch)] == list(whole.values())
    else:
        names = {phase: name for phase, ((name, _),) in whole.items()}
        assert router(batch) == tuple((names[phase], phase) for phase in Phase)


def test_without_a_measurement_there_is_no_router():
    layer = layer_of(Step(Case(spec=layer_spec(), **MIXED)))
    assert not isinstance(layer._binding.impl, RoutedImpl)


def test_one_fastest_backend_needs_no_router(measured):
    points = [
        point(each.step, each.requests, each.tokens // each.requests, 8, REFERENCE=1, TORCH_SDPA=2)
        for each in BY_SIZE
    ]
    measured(points)
    layer = layer_of(Step(Case(spec=layer_spec(), **MIXED)))
    assert not isinstance(layer._binding.impl, RoutedImpl)
    assert {selection.name for selection in layer.selections.values()} == {"REFERENCE"}


def test_required_backends_are_not_routed_by_size(measured):
    mixed = point("mixed", 5, 2, 7, REFERENCE=1, TORCH_SDPA=20, TORCH_SDPA__REFERENCE=2)
    measured([*BY_SIZE, mixed])
    query_lens, seq_lens, _ = SIZES["a prompt and four decodes"]
    step = Step(Case(spec=layer_spec(), query_lens=query_lens, seq_lens=seq_lens))
    assert not isinstance(layer_of(step, backend="TORCH_SDPA")._binding.impl, RoutedImpl)
    assert not isinstance(layer_of(step, backend="-REFERENCE")._binding.impl, RoutedImpl)
    # The prompts were demanded, the decodes were not.
    layer = layer_of(step, backend="prefill=TORCH_SDPA")
    assert route_of(layer, step) == [("TORCH_SDPA", "prefill"), ("REFERENCE", "decode")]
    one = Step(Case(spec=layer_spec(), query_lens=(4,), seq_lens=(4,)))
    assert route_of(layer, one) == [("TORCH_SDPA", None)]
    step.check(call(layer, step))


def test_batch_invariant_layers_are_not_routed_by_size(measured):
    measured(BY_SIZE)
    with registered(make_backend("ALWAYS")):
        spec = layer_spec(batch_invariant=True)
        assert not isinstance(layer_of(Step(Case(spec=spec, **MIXED)))._binding.impl, RoutedImpl)


def test_equal_layers_share_metadata_and_others_do_not(measured):
    measured(BY_SIZE)
    step = Step(Case(spec=layer_spec(), **MIXED))
    layers = [layer_of(step), layer_of(step)]
    layers += [copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
    measured([*BY_SIZE, point("decode", 1, 1, 8, REFERENCE=2, TORCH_SDPA=1)])
    layers.append(layer_of(step))
    with forward_context(step.batch) as context:
        for layer in layers:
            layer.kv_cache = step.kv_cache.clone()
            step.check(layer(step.query, step.key, step.value))
        assert len(context._metadata) == 2


def test_later_layers_follow_another_table_or_override(measured):
    """Decisions for a layer and a batch are not reused after their reasons change."""
    step = Step(Case(spec=layer_spec(), query_lens=(1,), seq_lens=(7,)))
    measured(BY_SIZE)
    before = layer_of(step)
    assert route_of(before, step) == [("REFERENCE", None)]
    turned = [point("decode", n, 1, 8, REFERENCE=us, TORCH_SDPA=15) for n, us in ((1, 20), (4, 10))]
    measured(turned)
    assert route_of(layer_of(step), step) == [("TORCH_SDPA", None)]
    many = Step(Case(spec=layer_spec(), query_lens=(1,) * 4, seq_lens=(7,) * 4))
    assert route_of(layer_of(many), many) == [("REFERENCE", None)]
    assert layer_of(many, backend="-REFERENCE").selections[Phase.DECODE].name == "TORCH_SDPA"
    assert not isinstance(layer_of(many, backend="-REFERENCE")._binding.impl, RoutedImpl)
    split = layer_of(many, backend="prefill=REFERENCE,decode=TORCH_SDPA")
    assert route_of(split, many) == [("TORCH_SDPA", None)]
    assert route_of(before, step) == [("REFERENCE", None)]  # a layer keeps what it was made with
    measured(BY_SIZE)
    assert route_of(layer_of(step), step) == [("REFERENCE", None)]


def test_metadata_of_a_layer_with_other_backends_is_rejected(measured):
    step = Step(Case(spec=layer_spec(), query_lens=(1,), seq_lens=(7,)))
    measured(BY_SIZE)
    metadata = layer_of(step).build_metadata(step.batch)
    with registered(make_backend("THIRD")):
        measured([point("decode", 4, 1, 8, THIRD=1, TORCH_SDPA=2)])
        points = [point("decode", 64, 1, 8, THIRD=1, TORCH_SDPA=2)]
        measured([*points, point("decode", 1, 1, 8, THIRD=3, TORCH_SDPA=2)])
        other = layer_of(step)
        assert isinstance(other._binding.impl, RoutedImpl)
        with pytest.raises(InvalidInputError, match="this layer has another backend there"):
            other(step.query, step.key, step.value, attn_metadata=metadata)


def test_metadata_of_a_whole_batch_has_both_phases(measured):
    mixed = point("mixed", 5, 2, 7, REFERENCE=1, TORCH_SDPA=2)
    measured([*BY_SIZE, mixed])
    query_lens, seq_lens, _ = SIZES["a prompt and four decodes"]
    step = Step(Case(spec=layer_spec(), query_lens=query_lens, seq_lens=seq_lens))
    metadata = layer_of(step).build_metadata(step.batch)
    assert metadata.prefill_metadata.batch.query_lens == [4]
    assert metadata.decode_metadata.batch.query_lens == [1] * 4
    decode = layer_of(step).build_metadata(AttentionBatch.create([1], [7]))
    assert decode.prefill_metadata is None
    assert decode.decode_metadata.batch.query_lens == [1]


def test_an_encoder_is_routed_by_size(measured):
    spec = layer_spec(attn_type=AttentionType.ENCODER_ONLY, block_size=None)
    measured(BY_SIZE, spec)
    for size in ("one prompt", "four prompts"):
        query_lens, seq_lens, expected = SIZES[size]
        step = Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens))
        layer = layer_of(step)
        assert route_of(layer, step) == expected
        step.check(call(layer, step))
    empty = Step(Case(spec=spec, query_lens=(3, 0), seq_lens=(3, 0)))
    empty.check(call(layer_of(empty), empty))


def test_graphs_are_routed_by_size_only_and_replay_equals_eager(measured):
    """A graph that is captured for a size serves every step up to that size, of any lengths."""
    spec = layer_spec(cuda_graph=True)
    first, second = make_backend("FIRST"), make_backend("SECOND")
    points = [
        point("decode", 1, 1, 8, FIRST=20, SECOND=10),
        point("decode", 4, 1, 8, FIRST=20, SECOND=10),
        point("decode", 4, 1, 4096, FIRST=20, SECOND=30),
    ]
    with registered(first, second):
        measured(points, spec)
        step = Step(Case(spec=spec, query_lens=(1,) * 3, seq_lens=(7, 9, 5)))
        layer = layer_of(step)
        runner = SimpleNamespace(
            metadata_builder=layer._binding.builder,
            device=torch.device("cpu"),
            max_blocks_per_request=5,
            max_seq_len=16,
        )
        state = CommonAttentionState(runner)
        with state.graph_capture(4):
            captured = {n: state.graph_capture_get_metadata_for_batch(n) for n in (1, 4)}
        served = {n: [part.backend for part in each.parts] for n, each in captured.items()}
        assert served == {1: ["SECOND"], 4: ["FIRST"]}
        eager = layer.build_metadata(step.batch)
        assert [part.backend for part in eager.parts] == served[4]
        # The step is copied into the buffers, and the captured metadata is run as it was captured.
        buffers = state.get_graph_input_buffers(captured[4])
        step.batch = AttentionBatch.create(
            (1,) * 3, (7, 9, 5), block_table=step.batch.block_table[:, :5], slot_mapping=step._slots
        )
        state.prepare_graph_input_buffers(buffers, layer.build_metadata(step.batch))
        lengths = captured[4].batch.seq_lens.tolist()
        assert lengths == [7, 9, 5, 0]
        padded = [
            torch.cat([t, torch.zeros_like(t[:1])]) for t in (step.query, step.key, step.value)
        ]
        replayed = captured[4].parts[0].metadata.batch
        assert replayed.seq_lens.data_ptr() == captured[4].batch.seq_lens.data_ptr()
        # On a CPU nothing is captured: the host's copies of the lengths follow by hand.
        for batch in {id(b): b for b in (captured[4].batch, replayed)}.values():
            batch.seq_lens_cpu.copy_(batch.seq_lens)
            batch.__dict__.pop("seq_lens_list", None)
        output = layer(*padded, attn_metadata=captured[4])
        step.check(output[:3])


def test_graphs_do_not_route_to_a_backend_with_another_state_class(measured):
    class OwnState(CommonAttentionState):
        """Buffers of a backend's own."""

    spec = layer_spec(cuda_graph=True)
    first, second = make_backend("FIRST"), make_backend("SECOND")
    measured([point("decode", 1, 1, 8, FIRST=20, SECOND=10)], spec)
    case = Case(spec=spec, query_lens=(1,), seq_lens=(7,))
    for owner in (first, second):
        with registered(first, second), pytest.MonkeyPatch.context() as world:
            world.setattr(owner, "get_state_cls", staticmethod(lambda: OwnState), raising=False)
            layer = layer_of(Step(case))
            assert {s.name for s in layer.selections.values()} == {"FIRST"}
            assert not isinstance(layer._binding.impl, RoutedImpl)
    with registered(first, second):
        assert layer_of(Step(case)).selections[Phase.DECODE].name == "SECOND"


def test_a_compiled_layer_is_routed_batch_by_batch(measured):
    measured(BY_SIZE)
    torch._dynamo.reset()
    for size in ("one decode", "four decodes", "a prompt and four decodes"):
        query_lens, seq_lens, _ = SIZES[size]
        step = Step(Case(spec=layer_spec(), query_lens=query_lens, seq_lens=seq_lens))
        layer = layer_of(step)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        with torch.inference_mode(), forward_context(step.batch):
            step.check(compiled(step.query, step.key, step.value))


def test_a_batch_and_its_point_have_the_same_bucket():
    """Measured and served batches are described by the same numbers."""
    batch = AttentionBatch.create([1, 1, 4], [9, 9, 4])
    router = Router(
        {Phase.PREFILL: "A", Phase.DECODE: "A"},
        {bucket_of(Kind.MIXED, 3, 6, 22, captured=False): "B"},
    )
    assert router(batch) == (("B", None),)
