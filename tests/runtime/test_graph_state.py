"""One graph state for a model: replays equal eager calls, for every kind of step and layer."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    InvalidInputError,
    UnsupportedError,
    forward_context,
    graph_state,
)
from support.graph_cases import (
    BACKEND,
    BLOCK_SIZE,
    DTYPE,
    HEADS,
    KINDS,
    MAX_SEQ_LEN,
    STEPS,
    Captured,
    Kind,
    Model,
    interpreted_backend,
    random_batch,
    same_tensors,
)  # fmt: skip
from support.triton_cases import DEVICE, HAS_GPU, counters_are_zero  # skips without Triton


@pytest.fixture(autouse=True)
def _backend():
    with interpreted_backend():
        yield


#: What the layers of a model are, by the kinds of steps that they can run.
LAYERS = {
    "decode": [{}, {"sliding_window": 30, "returns_lse": True}, {"logits_soft_cap": 5.0}],
    "verification": [{}, {"sliding_window": 30, "returns_lse": True}],
    "long verification": [{}, {"sliding_window": 30}],
    "chunks": [{}, {"sliding_window": 30, "returns_lse": True}],
    "chunks with drafts": [{}],
    "tree": [{"custom_mask": True}, {"custom_mask": True, "sliding_window": 50}],
    "tree of one": [{"custom_mask": True}],
    "masked chunks": [{"custom_mask": True}],
    "ranges": [{"bidirectional_ranges": True}, {"sliding_window": 30}],
    "chunks with ranges": [{"bidirectional_ranges": True, "sliding_window": 30}],
}


def caches_of(model):
    return [cache.clone() for cache in model.caches.values()]


def restore(model, caches):
    for cache, before in zip(model.caches.values(), caches, strict=True):
        cache.copy_(before)


def run_steps(model, kind, number, *, same_bits=True):
    """Random steps through one capture, next to eager calls of the same steps.

    The bits are the same where one kernel computes all requests, and same_bits is given.
    """
    rng = random.Random(0)
    captured = Captured(model, model.state(), kind)
    limits = captured.step.limits
    one_kernel = same_bits and limits.max_query_len <= 16
    for _ in range(number):
        batch, padded = random_batch(rng, kind, padded_to=limits)
        captured.fill(rng)
        before = caches_of(model)
        replayed = [each.clone() for each in captured.replay(batch)]
        written = caches_of(model)
        assert not any(each[batch.num_tokens :].any() for each in replayed if each.dim() == 3)
        assert all(
            bool((each[batch.num_tokens :] == -torch.inf).all())
            for each in replayed
            if each.dim() == 2
        )
        restore(model, before)
        again = model(captured.step, captured.rows)
        assert same_tensors(replayed, again)
        restore(model, before)
        eager = model(padded if one_kernel else batch, captured.rows)
        assert same_tensors(written, caches_of(model))
        if one_kernel:
            assert same_tensors(replayed, eager)
        else:
            for one, other in zip(replayed, eager, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    for part in captured.step._parts:
        for planned in part.planned.values():
            parts = getattr(planned.metadata, "parts", None)
            for each in [planned.metadata] if parts is None else [own.metadata for own in parts]:
                assert counters_are_zero(each)


#: Each has what a usual one has, and another one too.
_SLOW = ("tree of one", "chunks with drafts", "masked chunks", "chunks with ranges")
_USUAL_AND_SLOW = [pytest.param(n, marks=[pytest.mark.slow] * (n in _SLOW)) for n in KINDS]


@pytest.mark.parametrize("steps", [1, pytest.param(STEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _USUAL_AND_SLOW)
def test_replays_equal_eager_calls(name, steps):
    """Bit for bit, as an eager call of the batch padded to the graph's size.

    Where two kernels share the batch, the eager call may gather keys first, so there the same bits
    come from an eager call on the captured metadata only.
    """
    run_steps(
        Model(LAYERS[name]),
        KINDS[name],
        steps if name in ("verification", "tree") else min(steps, 6),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["decode", "verification", "long verification", "chunks"])
@pytest.mark.parametrize("size", [64, 128])
def test_replays_of_hopper_kernels_equal_eager_calls(name, size, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    heads = {"num_heads": 16, "num_kv_heads": 4, "head_size": size}
    fields = [{**each} for each in LAYERS[name]]
    monkeypatch.setattr("support.graph_cases.HEADS", tuple(heads.values()))
    model = Model(fields, backend="HOPPER_ATTN")
    run_steps(model, KINDS[name], 100 if name == "verification" else 20)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("backend", "name"),
    [("FLASH_ATTN", "decode"), ("FLASH_ATTN", "verification"), ("FLASHINFER", "decode")],
)
def test_replays_of_other_packages_agree_with_eager_calls(backend, name):
    try:
        model = Model([{}, {"sliding_window": 30}], backend=backend)
    except UnsupportedError as error:
        pytest.skip(str(error))
    kind, rng = KINDS[name], random.Random(6)
    captured = Captured(model, model.state(), kind, waits=backend == "FLASHINFER")
    for _ in range(10):
        batch = random_batch(rng, kind)
        captured.fill(rng)
        replayed = [each.clone() for each in captured.replay(batch)]
        assert not any(each[batch.num_tokens :].any() for each in replayed)
        eager = model(batch, [each[: batch.num_tokens] for each in captured.rows])
        for one, other in zip(replayed, eager, strict=True):
            torch.testing.assert_close(one[: batch.num_tokens], other, rtol=2e-2, atol=2e-2)
    with captured.state.graph_capture(), pytest.raises(UnsupportedError, match="one new token"):
        captured.state.graph_capture_get_metadata_for_batch(2, num_tokens=40)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["decode", "verification", "tree", "chunks"])
def test_replays_compile_nothing(name, monkeypatch):
    from triton import knobs

    model, kind, rng = Model(LAYERS[name]), KINDS[name], random.Random(1)
    captured, compiled = Captured(model, model.state(), kind), []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what)
    )
    for _ in range(50):
        captured.replay(random_batch(rng, kind))
    assert compiled == []


@pytest.mark.parametrize("name", ["decode", "verification"])
def test_steps_with_upper_bounds_have_the_results_of_exact_ones(name):
    rng, kind = random.Random(7), KINDS[name]
    model = Model([{"lengths": "upper_bound"}])
    captured = Captured(model, model.state(), kind)
    for _ in range(4):
        batch = random_batch(rng, kind)
        bounded = AttentionBatch.create(
            batch.query_lens,
            batch.seq_lens,
            lengths="upper_bound",
            seq_lens_upper_bound=[min(2 * n, MAX_SEQ_LEN) for n in batch.seq_lens_list],
            block_table=batch.block_table,
            slot_mapping=batch.slot_mapping,
            device=DEVICE,
        )
        captured.fill(rng)
        exact = [each.clone() for each in captured.replay(batch)]
        assert same_tensors(exact, captured.replay(bounded))


def test_layers_for_exact_lengths_reject_upper_bounds():
    model = Model([{}])
    captured = Captured(model, model.state(), KINDS["decode"])
    batch = AttentionBatch.create(
        [1],
        torch.tensor([5], dtype=torch.int32, device=DEVICE),
        lengths="upper_bound",
        seq_lens_upper_bound=[9],
        block_table=torch.ones(1, 1, dtype=torch.int32, device=DEVICE),
        block_size=BLOCK_SIZE,
        device=DEVICE,
    )
    with pytest.raises(InvalidInputError, match="upper bounds of its key counts"):
        captured.replay(batch)


def test_layers_with_key_positions_are_rejected():
    model = Model([{"key_positions": True, "returns_lse": True}])
    with pytest.raises(UnsupportedError, match="has key_positions"):
        model.state()


def test_a_wait_while_a_step_is_filled_is_an_error(monkeypatch):
    model = Model([{}])
    captured = Captured(model, model.state(), KINDS["decode"])
    batch, modes = random_batch(random.Random(8), KINDS["decode"]), []
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "sync")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    captured.state.prepare_graph_input_buffers(captured.step, batch)
    assert modes == ["error", "default"]


# Several graphs, several batches.


def test_graphs_of_one_state_do_not_disturb_each_other():
    """Steps of different kinds in turns, made before any of them is captured or run."""
    model, rng = Model(LAYERS["verification"]), random.Random(2)
    state = model.state()
    kinds = [KINDS["decode"], KINDS["verification"], KINDS["chunks"]]
    captured = [
        Captured(model, state, kind, size) for kind, size in zip(kinds, (2, 3, 1), strict=True)
    ]
    turns = list(zip(captured, kinds, strict=True)) * 2
    for each, kind in turns[:-1]:
        limits = each.step.limits
        batch, padded = random_batch(rng, kind, limits.num_reqs, padded_to=limits)
        each.fill(rng)
        before = caches_of(model)
        replayed = [out.clone() for out in each.replay(batch)]
        restore(model, before)
        eager = model(padded, each.rows)
        for one, other in zip(replayed, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_layers_of_equal_kind_share_metadata():
    model = Model([{}, {"sliding_window": 30}, {}])
    state = model.state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2)
    names = [layer.prefix for layer in model.layers]
    found = [
        step.metadata(name, layer._binding.metadata_key, lambda batch: None)
        for name, layer in zip(names, model.layers, strict=True)
    ]
    assert found[0] is found[2]
    assert found[0] is not found[1]
    tensors = {each.batch.seq_lens.data_ptr() for each in found}
    assert len(tensors) == 1
    assert (
        step._parts[0].static.batch.block_table.data_ptr() == found[0].batch.block_table.data_ptr()
    )


def test_layers_with_batches_of_their_own():
    """As in a model with two kinds of block tables."""
    model, kind, rng = Model([{}, {}]), KINDS["verification"], random.Random(3)
    names = [layer.prefix for layer in model.layers]
    state = model.state(batches=[names[:1], names[1:]])
    captured = Captured(model, state, kind)
    pairs = [random_batch(rng, kind, 2, padded_to=captured.step.limits) for _ in names]
    batch, padded = (dict(zip(names, each, strict=True)) for each in zip(*pairs, strict=True))
    captured.fill(rng)
    before = caches_of(model)
    replayed = [each.clone() for each in captured.replay(batch)]
    restore(model, before)
    assert same_tensors(replayed, model(padded, captured.rows))
    with pytest.raises(InvalidInputError, match="The step has one batch, and the layers need 2"):
        state.prepare_graph_input_buffers(captured.step, batch[names[0]])
    buffers = state.get_graph_input_buffers(captured.step)
    assert {"0.seq_lens", "1.seq_lens", "1.slot_mapping"} <= buffers.keys()


def test_cross_attention_has_a_batch_of_its_own_without_new_keys():
    cross = {"attn_type": "encoder_decoder"}
    model, rng = Model([{}, cross]), random.Random(4)
    state = model.state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2, is_encoder_decoder_model=True)
    buffers = state.get_graph_input_buffers(step)
    assert "0.slot_mapping" in buffers
    assert "1.slot_mapping" not in buffers
    batch = random_batch(rng, KINDS["decode"], 2)
    table = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32)
    encoded = AttentionBatch.create(
        [1, 1], [20, 7], key_lens=[0, 0], block_table=table, device=DEVICE
    )
    batches = {"layers.0": batch, "layers.1": encoded}
    state.prepare_graph_input_buffers(buffers, batches)
    heads, kv_heads, size = HEADS
    query, key = (torch.randn(2, n, size).to(DEVICE, DTYPE) for n in (heads, kv_heads))
    found = []
    for context in (step, batches):
        with torch.inference_mode(), forward_context(context):
            found.append([model.layers[0](query, key, key), model.layers[1](query)])
    assert same_tensors(*found)


def test_a_routed_layer_is_fixed_to_one_backend_at_capture(monkeypatch):
    """Prefills and decodes on different backends: a graph takes that of its kind of step."""
    from attn_dispatch import register_backend
    from attn_dispatch.selection.registry import registry

    cls = registry.candidates()[BACKEND].backend_cls

    @register_backend
    class Other(cls):
        name = "OTHER"

    try:
        fields = [{"backend": f"prefill=OTHER,decode={BACKEND}"}]
        for name, backend in (("verification", BACKEND), ("chunks", "OTHER")):
            model = Model(fields)
            captured = Captured(model, model.state(), KINDS[name])
            (planned,) = captured.step._parts[0].planned.values()
            assert [part.backend for part in planned.metadata.parts] == [backend]
            run_steps(model, KINDS[name], 1, same_bits=False)
    finally:
        registry.unregister("OTHER")


# What does not fit.


def batch_of(query_lens, seq_lens, **more):
    more = {
        "block_table": torch.zeros(len(query_lens), 5, dtype=torch.int32),
        "block_size": BLOCK_SIZE,
    } | more
    return AttentionBatch.create(query_lens, seq_lens, device=DEVICE, **more)


MASK = torch.ones(12, dtype=torch.bool)
BAD_BATCHES = {
    "more requests": ([1] * 4, [3] * 4, {}, "has 4 requests, and the graph takes up to 3"),
    "longer queries": ([3], [9], {}, "has 3 new tokens in a request, .* up to 2"),
    "more keys": ([1], [79], {}, "has 79 keys in a request, .* up to 70"),
    "an unexpected mask": ([2], [6], {"custom_mask": MASK}, "custom_mask, and .* without"),
    "scales to derive": ([1], [3], {"enable_kv_scales_calculation": True}, "derives the scales"),
    "a narrow block table": (
        [1],
        [33],
        {"block_table": torch.zeros(1, 2, dtype=torch.int32), "block_size": None},
        "block_table",
    ),
    "other blocks": ([1], [3], {"block_size": 32}, "blocks of 32 tokens"),
    "no slots": ([1], [3], {"block_size": None}, "has no slot_mapping"),
    "no block table": ([1], [3], {"block_table": None, "block_size": None}, "has no block_table"),
    "keys of an encoder": ([1], [3], {"key_lens": [3]}, "rows of key are not those"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_step_that_does_not_fit_is_rejected_before_anything_is_copied(name):
    query_lens, seq_lens, more, message = BAD_BATCHES[name]
    state = Model([{}]).state(max_num_seqs=3, max_seq_len=70)
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(3, max_query_len=2)
    buffers = state.get_graph_input_buffers(step)
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    batch = batch_of(query_lens, seq_lens, **more)
    with pytest.raises(InvalidInputError, match=message):
        state.prepare_graph_input_buffers(buffers, batch)
    assert step.mismatch(batch)
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)
    assert step.mismatch(batch_of([2, 1], [9, 4])) is None


def test_contents_are_checked_before_they_are_copied(monkeypatch):
    """On a GPU only under ATTN_DISPATCH_CHECK=1, as in an eager call."""
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "1")
    model = Model([{}])
    state = model.state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2)
    beyond = torch.full((1, 1), model.num_blocks, dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([-1], device=DEVICE)
    batch = batch_of([1], [3], block_table=beyond, slot_mapping=slots)
    with pytest.raises(InvalidInputError, match=f"names block {model.num_blocks}; the cache has"):
        state.prepare_graph_input_buffers(step, batch)
    assert state.get_graph_input_buffers(step)["seq_lens"].tolist() == [2, 2]


def test_a_compiled_model_reads_the_step_of_its_context():
    model, rng = Model([{}, {"sliding_window": 30}]), random.Random(7)
    state = model.state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(3)
    heads, kv_heads, size = HEADS
    rows = [torch.randn(3, n, size).to(DEVICE, DTYPE) for n in (heads, kv_heads, kv_heads)]

    def run(query, key, value):
        for layer in model.layers:
            query = layer(query, key, value)
        return query

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    state.prepare_graph_input_buffers(step, random_batch(rng, KINDS["decode"], 3))
    with torch.no_grad(), forward_context(step):
        assert same_tensors([compiled(*rows)], [run(*rows)])


def test_masks_and_ranges_beyond_the_capture_are_rejected():
    masked = Model([{"custom_mask": True, "bidirectional_ranges": True}])
    state = masked.state(max_mask_elements=10, max_ranges=1)
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2, max_query_len=2, custom_mask=True)
    kind = Kind({}, 2, ranges=True)
    for batch, message in (
        (batch_of([2], [6]), "has no custom_mask, and the graph was captured with one"),
        (batch_of([2], [6], custom_mask=MASK), "has 12 elements, and the graph takes up to 10"),
        (
            random_batch(random.Random(5), kind, 2),
            "bidirectional ranges, and the graph takes up to 1",
        ),
    ):
        assert message in step.mismatch(batch)


def test_one_token_requests_need_their_token():
    state = Model([{}]).state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(3)
    assert "without a new token" in step.mismatch(batch_of([1, 0], [3, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 17}, "batch_size is 17"),
        ({"batch_size": 2, "num_tokens": 401}, "is 401, and this state was made for up to 400"),
        (
            {"batch_size": 2, "max_query_len": 4, "num_tokens": 3},
            "does not fit 2 requests of up to 4",
        ),
        (
            {"batch_size": 2, "max_query_len": 1, "num_tokens": 5},
            "does not fit 2 requests of up to 1",
        ),
        ({"batch_size": 2, "max_query_len": 1001}, "max_query_len is 1001"),
        ({"batch_size": 2, "custom_mask": True}, "no layer was made with custom_mask=True"),
        ({"batch_size": 2, "is_encoder_decoder_model": True}, "no layer has attn_type"),
    ],
)
def test_captures_that_do_not_fit_the_state_are_rejected(arguments, message):
    state = Model([{}]).state(max_num_seqs=16, max_seq_len=1000)
    with pytest.raises(InvalidInputError, match=r"Enter .with state.graph_capture"):
        state.graph_capture_get_metadata_for_batch(1)
    with state.graph_capture(), pytest.raises(InvalidInputError, match=message):
        state.graph_capture_get_metadata_for_batch(**arguments)


def test_a_clone_is_for_smaller_batches_and_shares_the_buffers():
    state = Model([{}]).state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(3)
    clone = state.graph_clone(2)
    other = clone.graph_capture_get_metadata_for_batch(2)
    tables = [each._parts[0].static.batch.block_table.data_ptr() for each in (step, other)]
    assert tables[0] == tables[1]
    with pytest.raises(InvalidInputError, match="batch_size is 3"):
        clone.graph_capture_get_metadata_for_batch(3)


def test_steps_made_in_inference_mode_are_filled_outside_of_it():
    state = Model([{}]).state()
    with torch.inference_mode(), state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(3)
    state.prepare_graph_input_buffers(step, batch_of([1, 1], [9, 3]))
    assert state.get_graph_input_buffers(step)["seq_lens"].tolist() == [9, 3, 0]


def test_begin_forward_checks_the_size_of_any_step():
    state = Model([{}]).state(max_num_seqs=3, max_num_tokens=8, max_seq_len=70)
    state.begin_forward(batch_of([5, 1], [9, 3]))
    with pytest.raises(InvalidInputError, match="2 requests, 9 new tokens and up to 9 keys"):
        state.begin_forward(batch_of([8, 1], [9, 3]))


# Layers that cannot be captured.


def test_layers_made_without_cuda_graph_are_rejected():
    layer = Attention(4, 16, num_kv_heads=2, prefix="a", dtype=DTYPE, device=DEVICE)
    with pytest.raises(InvalidInputError, match="Make it with cuda_graph=True"):
        graph_state([layer], max_num_seqs=2, max_seq_len=16)
    with pytest.raises(InvalidInputError, match="no Attention layer with a cache"):
        graph_state(torch.nn.Linear(2, 2), max_num_seqs=2, max_seq_len=16)


def test_layers_without_a_cache_are_rejected():
    layer = Attention(
        4, 16, num_kv_heads=2, prefix="a", dtype=DTYPE, device=DEVICE, cuda_graph=True,
        backend=BACKEND,
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match="Call bind_kv_caches before"):
        graph_state([layer], max_num_seqs=2, max_seq_len=16)


def test_a_layer_outside_of_the_step_is_rejected():
    model = Model([{}, {}])
    state = graph_state(model.layers[:1], max_num_seqs=2, max_seq_len=16)
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2)
    heads, kv_heads, size = HEADS
    query, key = (torch.zeros(2, n, size, dtype=DTYPE, device=DEVICE) for n in (heads, kv_heads))
    with torch.inference_mode(), forward_context(step):
        model.layers[0](query, key, key)
        with pytest.raises(InvalidInputError, match=r"no batch for layer 'layers\.1'"):
            model.layers[1](query, key, key)


def test_layers_that_would_ignore_a_mask_do_not_share_its_batch():
    model = Model([{"custom_mask": True}, {}])
    with pytest.raises(InvalidInputError, match="some take a custom mask and some would ignore it"):
        model.state()
    names = [[layer.prefix] for layer in model.layers]
    assert model.state(batches=names)
    with pytest.raises(
        InvalidInputError, match=r"must name each layer once; see layer 'layers\.1'"
    ):
        model.state(batches=names[:1])


def test_batch_invariant_layers_are_captured_for_decodes_only():
    state = Model([{"batch_invariant": True}]).state()
    with state.graph_capture():
        state.graph_capture_get_metadata_for_batch(2)
        with pytest.raises(UnsupportedError, match="up to 4 new tokens per request"):
            state.graph_capture_get_metadata_for_batch(2, max_query_len=4)


def test_a_layer_that_moved_to_another_backend_is_rejected():
    model = Model([{}])
    state = model.state()
    with state.graph_capture():
        step = state.graph_capture_get_metadata_for_batch(2)
    layer = model.layers[0]
    layer._binding = dataclasses.replace(layer._binding, metadata_key=("other",))
    with pytest.raises(InvalidInputError, match="capture again"):
        model(
            step,
            [
                torch.zeros(2, n, HEADS[2], dtype=DTYPE, device=DEVICE)
                for n in (*HEADS[:2], HEADS[1])
            ],
        )


def test_other_backends_say_what_they_cannot_capture():
    """The default of a builder: one new token per request."""
    from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
    from attn_dispatch.interface.captured import GraphLimits, StaticBatch
    from support.cases import layer_spec

    builder = ReferenceBackend.make_builder(layer_spec(), torch.device("cpu"))
    table = torch.zeros(4, 2, dtype=torch.int32)
    for longest in (1, 2):
        limits = GraphLimits(num_reqs=3, num_tokens=6, max_query_len=longest, max_seq_len=9)
        static = StaticBatch.make(limits, torch.device("cpu"), block_table=table)
        if longest == 1:
            assert builder.build_for_graph(static.batch, limits).batch is static.batch
        else:
            with pytest.raises(UnsupportedError, match=r"REFERENCE captures .* one new token per"):
                builder.build_for_graph(static.batch, limits)
