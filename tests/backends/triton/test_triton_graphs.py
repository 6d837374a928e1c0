"""Launching TRITON_ATTN's kernels: what is compiled again, what a graph replays, large caches."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from attn_dispatch.backends.triton import launcher, operands, scratch
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.impl import TritonImpl
from attn_dispatch.backends.triton.kv_writer import KVCacheWriter
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache
from support.cases import INT8, Case, Step, layer_spec
from support.triton_cases import (
    DEVICE,
    DTYPES,
    SMALL,
    builder_of,
    check,
    counters_are_zero,
    forward,
)
from support.triton_cases import needs_gpu as gpu

needs_gpu = lambda test: gpu[0](gpu[1](test))
BLOCKS, LONGEST = 40, 640


def state_of(spec, max_batch_size, **launch):
    runner = SimpleNamespace(
        metadata_builder=builder_of(spec, **launch),
        device=torch.device(DEVICE),
        max_blocks_per_request=BLOCKS,
        max_seq_len=LONGEST,
    )
    state = TritonAttnBackend.get_state_cls()(runner)
    with state.graph_capture(max_batch_size):
        pass
    return state


# Graphs.


def test_captured_decodes_in_turn_agree_with_direct_run(monkeypatch):
    """With batch_invariant, where the parts of all requests of a graph exceed the limit."""
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", 30_000)
    captured = check_static_buffers({"batch_invariant": True}, 8)
    assert [each.num_reqs for each in captured.decode.in_turn] == [3, 3, 2]


@pytest.mark.parametrize("fields", [{}, {"batch_invariant": True}, {"sliding_window": 9}])
@pytest.mark.parametrize("size", [4, 8])
def test_static_buffers_agree_with_direct_run(fields, size):
    assert not check_static_buffers(fields, size).decode.in_turn


def check_static_buffers(fields, size):
    """What a graph would replay, run without one: a smaller step after a larger one."""
    spec = layer_spec(dtype=torch.float32, num_kv_heads=1, block_size=16, cuda_graph=True, **fields)
    state = state_of(spec, 8, **SMALL)
    captured = state.graph_capture_get_metadata_for_batch(size)
    assert captured.prefill is None
    buffers = state.get_graph_input_buffers(captured)
    for seq_lens in ((70, 3, 16, 33), (9, 40, 1)):
        step = Step(Case(spec=spec, query_lens=(1,) * len(seq_lens), seq_lens=seq_lens), DEVICE)
        metadata = builder_of(spec, **SMALL).build(step.batch)
        state.prepare_graph_input_buffers(buffers, metadata)
        expected, count = step.expected(), len(seq_lens)
        for name in ("query", "key", "value"):
            rows = getattr(step, name)
            padded = torch.full((size, *rows.shape[1:]), 3.0, device=DEVICE)
            padded[:count] = rows
            setattr(step, name, padded)
        output = forward(step, captured)
        check(step, output[:count], expected)
        assert not output[count:].any()
        assert counters_are_zero(captured)
    return captured


@needs_gpu
@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize(
    "fields",
    [{}, {"kv_cache_dtype": "fp8_e4m3"}, {"sliding_window": 99, "sinks": True, "alibi": True}],
    ids=str,
)
def test_graph_replay_agrees_with_eager(size, fields):
    """Captured once, replayed for other lengths and fewer requests, writing the cache as well."""
    dtype = torch.bfloat16
    spec = layer_spec(
        dtype=dtype, num_heads=8, head_size=64, block_size=16, cuda_graph=True, **fields
    )
    one = Step(Case(spec=spec, query_lens=(1,), seq_lens=(5,)), DEVICE)
    impl = TritonImpl(**one.impl_arguments())
    cache = torch.randn(size * BLOCKS + 1, 2, 16, 2, 64, device=DEVICE).to(one.kv_cache.dtype)
    state = state_of(spec, 32)
    metadata = state.graph_capture_get_metadata_for_batch(size)
    buffers = state.get_graph_input_buffers(metadata)
    query, key, value = (torch.zeros(size, n, 64, dtype=dtype, device=DEVICE) for n in (8, 2, 2))
    arguments = (one.layer, query, key, value, cache, metadata)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        impl.forward(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = impl.forward(*arguments)
    table = torch.randperm(size * BLOCKS).view(size, BLOCKS).int()
    for round_ in range(6):
        count = size if round_ % 2 else max(1, size - round_)
        seq_lens = torch.randint(1, LONGEST, (count,))
        batch = AttentionBatch.create(
            [1] * count, seq_lens, block_table=table[:count], block_size=16, device=DEVICE
        )
        eager = builder_of(spec).build(batch)
        for tensor in (query, key, value):
            tensor.normal_()
        state.prepare_graph_input_buffers(buffers, eager)
        before = cache.clone()
        graph.replay()
        rows = (query[:count], key[:count], value[:count])
        expected = impl.forward(one.layer, *rows, before, eager)
        assert torch.equal(before.view(torch.uint8), cache.view(torch.uint8))
        torch.testing.assert_close(replayed[:count], expected, rtol=2e-2, atol=2e-2)
        assert not replayed[count:].any()
        assert counters_are_zero(metadata)


# What is compiled.


@needs_gpu
@pytest.mark.parametrize("fields", [{}, {"kv_cache_dtype": "fp8_e4m3", "sliding_window": 300}])
def test_lengths_and_batches_compile_nothing_new(fields, monkeypatch):
    """Once each kind of batch was seen: by rows in a tile, and by whether both kernels run."""
    from triton import knobs

    compiled = []

    def count(**what):
        compiled.append(what["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", count)
    spec = layer_spec(dtype=torch.bfloat16, num_heads=8, head_size=64, block_size=16, **fields)
    one = Step(Case(spec=spec, query_lens=(1,), seq_lens=(5,)), DEVICE)
    impl, builder = TritonImpl(**one.impl_arguments()), builder_of(spec)
    cache = torch.zeros(130 * 80, 2, 16, 2, 64, device=DEVICE).to(one.kv_cache.dtype)
    chance = random.Random(0)

    def step(query_lens, seq_lens):
        table = torch.randperm(len(cache))[: len(query_lens) * 80].view(-1, 80)
        batch = AttentionBatch.create(
            query_lens, seq_lens, block_table=table, block_size=16, device=DEVICE
        )
        rows = (torch.randn(sum(query_lens), n, 64, device=DEVICE).bfloat16() for n in (8, 2, 2))
        assert bool(impl.forward(one.layer, *rows, cache, builder.build(batch)).isfinite().all())

    for longest in (1, 5, 9, 16):
        for company in (1, 120):  # a few KV heads, and more than there are SMs
            others, their_keys = [1] * company, [50] * company
            step([longest, *others], [40, *their_keys])
            step([longest, *others, 40], [40, *their_keys, 40])  # prompts as they came
            step([longest, *others, 40], [40, *their_keys, 90])  # few queries for each key
            step([longest, *others, 600], [40, *their_keys, 700])  # many
    assert compiled
    compiled.clear()
    for _ in range(200):
        query_lens = [
            chance.choice([1, chance.randint(2, 16), chance.randint(17, 700)])
            for _ in range(chance.choice([3, 40, 120]))
        ]
        step(query_lens, [n + chance.choice([0, chance.randint(0, 500)]) for n in query_lens])
    assert compiled == []


class FakeKernel:
    """Counts lookups or compilations, and direct calls."""

    arg_names = ("x", "lse_ptr", "n", "window", "COUNT")
    do_not_specialize = ("window",)
    do_not_specialize_on_alignment = ("lse_ptr",)

    def __init__(self):
        self.compiled, self.called = 0, []
        self.function = self.packed_metadata = None

    def __getitem__(self, grid):
        def launch(*args, **constants):
            if constants:
                self.compiled += 1
                return self
            self.called.append(args)
            return None

        return launch

    def run(self, *args):
        self.called.append(args[9:])


@pytest.fixture
def launches(monkeypatch):
    """How often each launch was compiled, one by one."""
    kernel = FakeKernel()
    monkeypatch.setattr(launcher, "_HAS_GPU", True)
    monkeypatch.setattr(launcher, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: kernel.device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    kernel.device = 0
    launch = launcher.Launcher(kernel, {"COUNT": 3}, {"num_warps": 2})

    def compiled_by(*args):
        before = kernel.compiled
        launch((1, 1, 1), *args)
        return kernel.compiled - before

    compiled_by.kernel = kernel
    return compiled_by


ROWS = torch.zeros(64)


def test_repeated_launch_calls_the_compiled_kernel(launches):
    arguments = (ROWS, ROWS, 32, 5)
    assert launches(*arguments) == 1
    assert launches(*arguments) == 0
    assert [len(args) for args in launches.kernel.called] == [5]
    assert launches.kernel.called[0][-1] == 3


@pytest.mark.parametrize(
    "other",
    [
        (ROWS[1:], ROWS, 32, 5),  # 4 bytes off
        (ROWS[2:], ROWS, 32, 5),
        (ROWS, ROWS, 1, 5),
        (ROWS, ROWS, 33, 5),
        (ROWS, ROWS, 0, 5),
        (ROWS, ROWS, 2**31, 5),
    ],
)
def test_specialized_arguments_are_compiled_separately(launches, other):
    launches(ROWS, ROWS, 32, 5)
    assert launches(*other) == 1
    assert launches(*other) == 0
    assert launches(ROWS, ROWS, 32, 5) == 0


@pytest.mark.parametrize(
    "other",
    [
        (ROWS[4:], ROWS, 32, 5),  # 16 bytes off
        (ROWS, ROWS[1:], 32, 5),  # its alignment is not specialized on
        (ROWS, ROWS, 48, 5),
        (ROWS, ROWS, 2**31 - 16, 5),
        (ROWS, ROWS, 32, 1),
        (ROWS, ROWS, 32, 16),
    ],
)
def test_other_arguments_share_compiled_code(launches, other):
    launches(ROWS, ROWS, 32, 5)
    assert launches(*other) == 0


def test_each_device_has_its_own_compiled_code(launches):
    launches(ROWS, ROWS, 32, 5)
    launches.kernel.device = 1
    assert launches(ROWS, ROWS, 32, 5) == 1


def test_unspecialized_parameters_exist():
    """A misspelt name would be specialized on, or ignored."""
    from attn_dispatch.backends.cuda.hopper import decode as hopper_decode
    from attn_dispatch.backends.cuda.hopper import prefill as hopper_prefill
    from attn_dispatch.backends.triton.kernels import decode, gather, kv_write, prefill

    kernels = (
        decode.decode_kernel,
        gather.gather_kv_kernel,
        kv_write.write_kv_kernel,
        prefill.prefill_kernel,
        hopper_prefill.hopper_prefill_kernel,
        hopper_decode.hopper_decode_kernel,
    )
    names = set()
    for kernel in kernels:
        assert set(getattr(kernel, "do_not_specialize", None) or ()) <= set(kernel.arg_names)
        names |= set(kernel.arg_names)
    assert set(launcher.METADATA) <= names


@pytest.mark.parametrize("query_len", [1, 20])
def test_impl_supports_changing_dtypes(query_len):
    """Compiled code is kept by the layer, and depends on the dtype."""
    impls = {}
    for dtype in (*DTYPES, *DTYPES):
        spec = layer_spec(dtype=dtype, num_kv_heads=1)
        step = Step(Case(spec=spec, query_lens=(query_len,), seq_lens=(40,)), DEVICE)
        impl = impls.setdefault("one", TritonImpl(**step.impl_arguments()))
        metadata = builder_of(spec.replace(dtype=torch.float32)).build(step.batch)
        arguments = (step.layer, step.query, step.key, step.value, step.kv_cache.clone())
        check(step, impl.forward(*arguments, metadata))


@pytest.mark.parametrize("query_len", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_means_the_dtype_of_the_cache(query_len, dtype):
    """The dtype of the cache decides; compiled code depends on it."""
    sizes = {"num_kv_heads": 1, "head_size": 16, "dtype": dtype}
    impls = {}
    for kv_cache_dtype in ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3"):
        spec = layer_spec(kv_cache_dtype=kv_cache_dtype, **sizes)
        step = Step(Case(spec=spec, query_lens=(query_len,), seq_lens=(40,)), DEVICE)
        arguments = step.impl_arguments() | {"kv_cache_dtype": "fp8"}
        impl = impls.setdefault("one", TritonImpl(**arguments))
        metadata = builder_of(spec.replace(kv_cache_dtype="fp8")).build(step.batch)
        arguments = (step.layer, step.query, step.key, step.value, step.kv_cache.clone())
        check(step, impl.forward(*arguments, metadata))


# How far offsets go.


@needs_gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", INT8])
def test_caches_beyond_2_to_the_31_elements(layout, kv_cache_dtype):
    """Decode, a chunk and a prompt, all in the last blocks."""
    spec = layer_spec(
        dtype=torch.bfloat16, num_heads=8, num_kv_heads=8, head_size=128, block_size=16,
        kv_cache_layout=layout, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    lens = {"query_lens": (1, 40, 100, 700), "seq_lens": (300, 333, 100, 900)}
    step = Step(Case(spec=spec, **lens), DEVICE)
    expected = step.expected()
    small, per_block = step.kv_cache, step.kv_cache[0].numel()
    num_blocks = 2**31 // per_block + 2 * len(small)
    if torch.cuda.mem_get_info()[0] < 3 * num_blocks * per_block * small.element_size():
        pytest.skip("there is too little memory")
    shape = (num_blocks, *small.shape[1:])
    big = allocate_kv_cache(shape, STRIDE_ORDERS[layout], small.dtype, DEVICE)
    first = num_blocks - len(small)
    big[first:] = small
    used = step.batch.block_table.clamp(0, len(small) - 1)
    batch = dataclasses.replace(
        step.batch,
        block_table=(used + first).int(),
        slot_mapping=step.batch.slot_mapping + first * spec.block_size,
    )
    impl = TritonImpl(**step.impl_arguments())
    metadata = builder_of(spec).build(batch)
    check(step, impl.forward(step.layer, step.query, step.key, step.value, big, metadata), expected)
    written = small.clone()
    metadata = builder_of(spec).build(step.batch)
    impl.forward(step.layer, step.query, step.key, step.value, written, metadata)
    assert torch.equal(big[first:].nan_to_num(7), written.nan_to_num(7))


# Devices.


@pytest.mark.parametrize(("index", "entered"), [(None, []), (0, []), (1, [1])])
def test_kernels_are_launched_on_the_tensors_device(monkeypatch, index, entered):
    """Triton launches on the current device."""
    seen = []

    @contextlib.contextmanager
    def device(wanted):
        seen.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)

    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(index=index)

    query = Elsewhere()
    method = operands.on_tensor_device(lambda *args, **options: (len(args), list(options)))
    assert method(None, None, query, 3) == (4, [])
    assert method(None, layer=None, query=query) == (1, ["layer", "query"])
    assert seen == 2 * entered


def test_impl_uses_the_tensors_device():
    assert TritonImpl.forward.__wrapped__
    assert KVCacheWriter.write.__wrapped__


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_agrees_with_the_first():
    spec = layer_spec(dtype=torch.float16, head_size=64, block_size=16)
    step = Step(Case(spec=spec, query_lens=(1, 20), seq_lens=(70, 40)), "cuda:1")
    assert torch.cuda.current_device() == 0
    step.check(step.run("TRITON_ATTN"))
