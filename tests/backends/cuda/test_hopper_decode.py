"""HOPPER_ATTN's decode kernel: by itself, next to a prefill, and in graphs; also interpreted."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dispatch.backends.cuda.hopper import backend as hopper_attn
from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend
from attn_dispatch.backends.cuda.hopper.launch import DECODES
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder
from attn_dispatch.backends.cuda.hopper.sm_partition import SMShares
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache
from support.cases import GARBAGE_BLOCKS, Case, Step, layer_spec
from support.hopper_cases import (
    CACHES,
    FEW,
    MANY,
    PORTABLE,
    PROMPTS,
    check,
    decode_launches,
    in_layout,
    interpreted_decodes,
    launched,
    lens,
    on_gpu,
    step_of,
)
from support.triton_cases import counters_are_zero, same_bits

ALL = {
    "sliding_window": 130,
    "logits_soft_cap": 5.0,
    "alibi": True,
    "sinks": True,
    "returns_lse": True,
}
HALF = {"dtype": torch.float16}
CROSS = {"attn_type": "encoder_decoder", "returns_lse": True}
SHORT = {"query_lens": (8, 3, 5, 2), "seq_lens": (3, 40, 0, 100), "new_lens": (0, 0, 0, 0)}

#: Changes to a layer with two KV heads of 128 in blocks of 16, and to the batch.
VARIANTS = {
    "many": ({}, lens(MANY)),
    "few": ({}, lens(FEW)),
    "2 tokens": ({}, lens(FEW, 2)),
    "4 tokens": ({"returns_lse": True}, lens(MANY, 4)),
    "8 tokens": ({}, lens(FEW, 8)),
    "one head": ({"num_heads": 2}, lens(MANY)),
    "seven heads": ({"num_heads": 14}, lens(MANY, 4)),
    "eight heads": ({"num_heads": 16}, lens(FEW)),
    "sixteen heads": ({"num_heads": 32}, lens(MANY, 2)),
    "heads of 64": ({"head_size": 64}, lens(MANY)),
    "heads of 64, few": ({"head_size": 64}, lens(FEW, 4)),
    "heads of 64, 8 tokens": ({"head_size": 64}, lens(FEW, 8)),
    "heads of 64, many, 8 tokens": ({"head_size": 64}, lens(MANY, 8)),
    "heads of 256": ({"head_size": 256}, lens(MANY)),
    "heads of 256, 8 tokens": ({"head_size": 256} | HALF, lens(FEW, 8)),
    "float16": (HALF, lens(MANY, 4)),
    "float16, heads of 64": ({"head_size": 64} | HALF, lens(FEW)),
    "blocks of 32": ({"block_size": 32}, lens(FEW)),
    "blocks of 48": ({"block_size": 48}, lens(MANY)),
    "blocks of 64": ({"block_size": 64}, lens(FEW)),
    "blocks of 128": ({"block_size": 128, "head_size": 64}, lens(FEW)),
    "heads first": ({"kv_cache_layout": "HND"}, lens(MANY)),
    "heads first, blocks of 48": ({"kv_cache_layout": "HND", "block_size": 48}, lens(MANY)),
    "one KV head": ({"num_heads": 4, "num_kv_heads": 1}, lens(MANY)),
    "window of one": ({"sliding_window": 1}, lens(FEW, 4)),
    "window": ({"sliding_window": 70}, lens(FEW, 4)),
    "window larger than all": ({"sliding_window": 10_000}, lens(FEW, 4)),
    "window both ways": ({"sliding_window": 70, "causal": False}, lens(FEW, 4)),
    "not causal": ({"causal": False}, lens(MANY, 4)),
    "soft cap": ({"logits_soft_cap": 5.0}, lens(MANY)),
    "ALiBi, lse": ({"alibi": True, "returns_lse": True}, lens(FEW, 4)),
    "sinks, lse": ({"sinks": True, "returns_lse": True}, lens(MANY)),
    "all": (ALL, lens(MANY, 4)),
    "all, not causal": (ALL | {"causal": False}, lens(FEW, 4)),
    "all, heads of 64": (ALL | {"head_size": 64, "num_heads": 14}, lens(MANY)),
    "all, heads of 256": (ALL | {"head_size": 256, "block_size": 48}, lens(FEW, 2)),
    "sharing": ({"kv_sharing": True}, lens(MANY)),
    "keys in the cache": ({}, lens(MANY) | {"brings_keys": False}),
    "fused qkv": ({}, lens(MANY) | {"memory": "fused", "padding": 3}),
    "more requests than lengths read at a time": ({}, lens([n * 7 % 41 for n in range(300)])),
    "one in many parts": ({}, lens((*(17,) * 20, 9000, *(17,) * 20))),
    "one in many parts, few": (ALL | {"sliding_window": 8000}, lens((9000, 1), 4)),
    "more queries than keys": (CROSS, SHORT),
    "more queries than keys, window": (CROSS | {"sliding_window": 2}, SHORT),
    "no request has keys": ({"returns_lse": True}, lens((0,) * 40)),
    "among prompts": ({}, lens(MANY, prompts=PROMPTS)),
    "few among prompts": ({}, lens(FEW, 8, PROMPTS)),
    "heads of 64, among prompts": ({"head_size": 64}, lens(MANY, prompts=PROMPTS)),
    "heads of 256, among prompts": ({"head_size": 256}, lens(MANY, prompts=PROMPTS)),
    "all, among prompts": (ALL, lens(MANY, 4, PROMPTS)),
    "more requests than that, among prompts": (
        {"kv_cache_layout": "HND"},
        lens([n * 7 % 41 for n in range(300)], prompts=PROMPTS),
    ),
}


def run(step, cache=None):
    """What forward returns over this cache, or a copy of the step's; and the impl."""
    impl = step.impl_of(HopperAttnBackend)
    cache = step.kv_cache.clone() if cache is None else cache
    return step.forward(HopperAttnBackend, cache, impl=impl), impl


@on_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_decodes_agree_with_the_reference(variant):
    step = step_of(*VARIANTS[variant], "cuda")
    returned, impl = run(step)
    check(step, returned)
    assert "hopper_decode" in launched(impl)
    assert "decode" not in launched(impl)


#: The interpreter takes a second or more for each.
INTERPRETED = (
    *("few", "8 tokens", "heads of 64, few", "heads of 256, 8 tokens", "float16, heads of 64"),
    *("window both ways", "ALiBi, lse", "all, not causal", "all, heads of 256", "eight heads"),
    *("more queries than keys, window", "no request has keys", "blocks of 64"),
)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v not in INTERPRETED)) for v in VARIANTS],
)
def test_interpreted_decodes_agree_with_the_reference(variant):
    """On the CPU, in an order and with delays that differ by variant; also two in a block."""
    step = step_of(*VARIANTS[variant], "cpu")
    seed = list(VARIANTS).index(variant)
    row = (None, "many", "mixed")[seed // 3 % 3]
    returned = interpreted_decodes(step, num_sms=2, row=row, seed=seed, lateness=seed % 3 / 2)
    check(step, returned)


@on_gpu
@settings(max_examples=40)
@given(st.data())
def test_any_batch_agrees_with_the_reference(data):
    """Of one layer, so that there are five kernels: few, many, among prompts, next to a prefill."""
    decode = st.tuples(st.integers(1, 2), st.integers(0, 300))
    prompt = st.tuples(st.integers(17, 200), st.integers(0, 200))
    requests = data.draw(st.lists(decode, max_size=40)) + data.draw(st.lists(prompt, max_size=2))
    requests = data.draw(st.permutations(requests))
    query_lens = tuple(q for q, _ in requests)
    # Some have no keys; they pad the batch.
    seq_lens = tuple(0 if q == 1 and past % 9 == 0 else q + past for q, past in requests)
    shares = data.draw(st.sampled_from([None, SMShares(100, 32), SMShares(131, 1)]))
    step = step_of(
        {"sliding_window": 250, "returns_lse": True},
        {"query_lens": query_lens, "seq_lens": seq_lens, "seed": data.draw(st.integers(0, 99))},
        "cuda",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_attn, "share_sms", lambda *_: shares)
        check(step, run(step)[0])


@on_gpu
@pytest.mark.parametrize("drafts", [1, 4])
def test_blocks_before_the_window_are_not_read(drafts):
    window, size = 70, 16
    step = step_of({"sliding_window": window}, lens((700, 90, 333, 70), drafts), "cuda")
    num_passed = 0
    for request, (query_len, seq_len) in enumerate(
        zip(step.case.query_lens, step.case.seq_lens, strict=True)
    ):
        for column in range(max(0, seq_len - query_len - window + 1) // size):
            step.kv_cache[step.batch.block_table[request, column]] = torch.nan
            garbage = GARBAGE_BLOCKS[column % len(GARBAGE_BLOCKS)]
            step.batch.block_table[request, column] = garbage
            num_passed += 1
    assert num_passed > 50
    check(step, run(step)[0])


@on_gpu
@pytest.mark.parametrize(
    ("batch", "shares"),
    [
        (lens(MANY), None),
        (lens((9000, *MANY)), None),
        (lens((9000, 1), 4), None),
        (lens(MANY, prompts=PROMPTS), None),
        (lens((9000, *MANY), prompts=PROMPTS), SMShares(100, 32)),
    ],
    ids=["many", "one in parts", "few", "before prompts", "next to prompts"],
)
def test_the_same_call_gives_the_same_bits(batch, shares, monkeypatch):
    """Parts of a split arrive in any order; no warp reads data before it is there."""
    monkeypatch.setattr(hopper_attn, "share_sms", lambda *_: shares)
    step = step_of({"returns_lse": True}, batch, "cuda")
    impl, metadata = step.impl_of(HopperAttnBackend), step.metadata_of(HopperAttnBackend)
    arguments = (step.layer, step.query, step.key, step.value, step.kv_cache, metadata)
    first = impl.forward(*arguments)
    for _ in range(50):
        assert same_bits(impl.forward(*arguments), first)
    assert counters_are_zero(metadata)


# Cases of the portable kernel.


@on_gpu
@pytest.mark.parametrize("shares", [None, SMShares(100, 32)], ids=["in turn", "concurrent"])
@pytest.mark.parametrize("variant", PORTABLE)
def test_the_portable_kernel_runs_unsupported_decodes(variant, shares, monkeypatch):
    monkeypatch.setattr(hopper_attn, "share_sms", lambda *_: shares)
    fields, batch = PORTABLE[variant]
    if shares is not None:
        batch = {name: (*lengths, 300) for name, lengths in batch.items()}
    step = step_of(fields, batch, "cuda")
    returned, impl = run(step)
    check(step, returned)
    assert "decode" in launched(impl)
    assert "hopper_decode" not in launched(impl)
    assert ("hopper_prefill" in launched(impl)) is (shares is not None)


@on_gpu
@pytest.mark.parametrize("layout", [name for name in CACHES if name != "elements apart"])
def test_a_cache_may_have_any_layout(layout):
    step = step_of({}, lens(MANY), "cuda")
    returned, impl = run(step, in_layout(step.kv_cache, layout))
    check(step, returned)
    assert ("hopper_decode" in launched(impl)) is CACHES[layout][2]


@on_gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_caches_beyond_2_to_the_31_elements(layout):
    """Decodes, and a chunk whose keys are gathered, all in the last blocks."""
    fields = {"num_heads": 8, "num_kv_heads": 8, "kv_cache_layout": layout}
    step = step_of(fields, lens((300, 700, 90), prompts=((40, 333),)), "cuda")
    small, per_block = step.kv_cache, step.kv_cache[0].numel()
    num_blocks = 2**31 // per_block + 2 * len(small)
    if torch.cuda.mem_get_info()[0] < 2 * num_blocks * per_block * small.element_size():
        pytest.skip("not enough memory")
    shape = (num_blocks, *small.shape[1:])
    big = allocate_kv_cache(shape, STRIDE_ORDERS[layout], small.dtype, "cuda")
    first = num_blocks - len(small)
    big[first:] = small
    for request, seq_len in enumerate(step.case.seq_lens):
        step.batch.block_table[request, : -(-seq_len // 16)] += first
    step.batch.slot_mapping.add_(first * 16)
    returned, impl = run(step, big)
    check(step, returned)
    assert "hopper_decode" in launched(impl)


# Next to a prefill.

MIXED = {
    "plain": ({}, lens(MANY, prompts=PROMPTS)),
    "new keys": ({}, lens(MANY, 4, PROMPTS[:1])),
    "new keys, fused": ({}, lens(MANY, prompts=PROMPTS[:1]) | {"memory": "fused", "padding": 3}),
    "few": ({}, lens(FEW, 8, PROMPTS)),
    "heads of 64": ({"head_size": 64}, lens(MANY, 8, PROMPTS)),
    "heads of 256": ({"head_size": 256} | HALF, lens(MANY, 4, PROMPTS)),
    "heads first, blocks of 48": (
        {"kv_cache_layout": "HND", "block_size": 48},
        lens(MANY, 1, PROMPTS),
    ),
    "all": (ALL, lens(MANY, 4, PROMPTS)),
    "all, heads of 64": (ALL | {"head_size": 64}, lens(MANY, prompts=PROMPTS)),
}


@on_gpu
@pytest.mark.parametrize("variant", MIXED)
def test_decodes_next_to_a_prefill_agree_with_the_reference(variant, monkeypatch):
    monkeypatch.setattr(hopper_attn, "share_sms", lambda *_: SMShares(100, 32))
    step = step_of(*MIXED[variant], "cuda")
    own = torch.cuda.Stream()  # the engine's
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        returned, impl = run(step)
    torch.cuda.synchronize()
    check(step, returned)
    assert decode_launches(impl) == [DECODES[step.spec.head_size].mixed]
    assert {"hopper_prefill", "hopper_decode"} <= launched(impl)
    assert ("gather_kv" in launched(impl)) is (not variant.startswith("new keys"))


# In a graph.


def captured(forward):
    """A graph of a call, which runs once before, and what the call returns in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = forward()
    return graph, returned


@on_gpu
@pytest.mark.parametrize("variant", ["plain", "new keys", "all"])
def test_a_graph_replays_decodes_next_to_a_prefill(variant, monkeypatch):
    monkeypatch.setattr(hopper_attn, "share_sms", lambda *_: SMShares(100, 32))
    step = step_of(*MIXED[variant], "cuda")
    impl, metadata = step.impl_of(HopperAttnBackend), step.metadata_of(HopperAttnBackend)
    arguments = (step.layer, step.query, step.key, step.value, step.kv_cache, metadata)
    graph, returned = captured(lambda: impl.forward(*arguments))
    for _ in range(3):
        step.query.neg_()
        step.queries = [-query for query in step.queries]
        graph.replay()
        check(step, returned)
    assert counters_are_zero(metadata)


@on_gpu
@pytest.mark.parametrize("fields", [{}, ALL | {"returns_lse": False}], ids=["plain", "all"])
@pytest.mark.parametrize("size", [4, 40])
def test_a_graph_replays_other_lengths_and_fewer_requests(size, fields):
    """With the results of the portable kernel."""
    blocks, longest, device = 40, 640, torch.device("cuda")
    spec = layer_spec(
        num_heads=8, head_size=128, block_size=16, dtype=torch.bfloat16, cuda_graph=True, **fields
    )
    one = Step(Case(spec=spec, query_lens=(1,), seq_lens=(5,)), device)
    impl, portable = one.impl_of(HopperAttnBackend), one.impl_of(TritonAttnBackend)
    cache = torch.randn(size * blocks, 2, 16, 2, 128, device=device).bfloat16()
    runner = SimpleNamespace(
        metadata_builder=HopperBuilder(spec, device),
        device=device,
        max_blocks_per_request=blocks,
        max_seq_len=longest,
    )
    state = HopperAttnBackend.get_state_cls()(runner)
    with state.graph_capture(size):
        pass
    metadata = state.graph_capture_get_metadata_for_batch(size)
    buffers = state.get_graph_input_buffers(metadata)
    rows = [torch.randn(size, n, 128, device=device).bfloat16() for n in (8, 2, 2)]
    graph, replayed = captured(lambda: impl.forward(one.layer, *rows, cache, metadata))
    assert "hopper_decode" in launched(impl)
    table = torch.randperm(size * blocks).view(size, blocks).int()
    builder = TritonAttnBackend.get_builder_cls()(spec, device)
    for count, scale in itertools.product((size, size // 2, 1), (longest, 20)):
        batch = AttentionBatch.create(
            [1] * count,
            torch.randint(1, scale, (count,)),
            block_table=table[:count],
            block_size=16,
            device=device,
        )
        eager = builder.build(batch)
        state.prepare_graph_input_buffers(buffers, eager)
        before = cache.clone()
        graph.replay()
        new = [tensor[:count] for tensor in rows]
        expected = portable.forward(one.layer, *new, before, eager)
        torch.testing.assert_close(replayed[:count], expected, rtol=2e-2, atol=2e-2)
        assert not replayed[count:].any()
        assert counters_are_zero(metadata)
