"""The backends for latents on a GPU, with the installed packages."""

from __future__ import annotations

import importlib
import math
import random

import pytest
import torch

from attn_dispatch import AttentionBatch, MLADims
from attn_dispatch.interface.capability import compare
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.platforms.detect import detect_device
from support.mla_cases import MLAStep

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.cuda.flash_attn.mla import FlashAttnMLABackend
from attn_dispatch.backends.cuda.flashinfer.mla import FlashInferMLABackend
from attn_dispatch.backends.cuda.flashmla.backend import FlashMLABackend
from attn_dispatch.backends.cuda.hopper.mla import HopperMLABackend
from attn_dispatch.backends.triton.mla import TritonMLABackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DIMS = MLADims(kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64, v_head_dim=16)
#: (backend, the package that it is to use, or the module of one that has no choice)
PACKAGES = [
    *((cls, each) for cls in (FlashAttnMLABackend, FlashMLABackend) for each in cls.packages),
    (FlashInferMLABackend, "flashinfer.mla"),
    (HopperMLABackend, "triton.experimental.gluon.language.nvidia.hopper"),
    (TritonMLABackend, "triton"),
]


@pytest.fixture(params=PACKAGES, ids=lambda pair: getattr(pair[1], "name", pair[0].name))
def backend(request, monkeypatch):
    """A backend with only this package, which must be installed here."""
    cls, package = request.param
    if not any(match.matches(detect_device("cuda")) for match in cls.capabilities.devices):
        pytest.skip("it is not for this GPU")
    has_choice = not isinstance(package, str)
    for module in package.imports if has_choice else (package,):
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            pytest.skip(f"{module}: {error}")
    if has_choice:
        monkeypatch.setattr(cls, "packages", (package,))
    return cls


def step_of(backend, query_lens, seq_lens, seed=0, padding=0, **more):
    fields = {"dims": DIMS, "dtype": torch.bfloat16, "block_size": 64, "heads": 16}
    fields |= {"backend": backend, "device": "cuda", "returns_lse": True} | more
    return MLAStep(query_lens, seq_lens, seed, padding, **fields)


def check(step, returned, rows=slice(None)):
    wanted, wanted_lse = step.expected()
    output, lse = (each[rows] for each in returned)
    limit = 0.02 * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(output.double(), wanted, atol=limit, rtol=0)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=0.02, rtol=0)


FEATURES = {
    "plain": {},
    "not causal": {"causal": False},
    "float16": {"dtype": torch.float16},
    "captured": {"cuda_graph": True},
    "upper bounds": {"lengths": "upper_bound"},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
}


@pytest.mark.parametrize("heads", [1, 16, 20, 128])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_agrees_with_float64(backend, feature, heads):
    lens = (1, 4, 0, 70, 1, 4), (900, 64, 9, 70, 1, 333)
    step = step_of(backend, *lens, padding=2, heads=heads, **FEATURES[feature])
    device = detect_device("cuda")
    if compare(step.spec, backend.capabilities, device) or backend.check_combination(
        step.spec, device
    ):
        pytest.skip("it is not declared")
    if step.spec.lengths == "upper_bound":
        batch = step.batch
        step.batch = AttentionBatch.create(
            lens[0],
            batch.seq_lens,
            seq_lens_upper_bound=[n + 40 for n in lens[1]],
            lengths="upper_bound",
            block_table=torch.nn.functional.pad(batch.block_table, (0, 1), value=2**31 - 1),
            slot_mapping=batch.slot_mapping,
            device="cuda",
        )
    check(step, step.run())


@pytest.mark.parametrize("block_size", [1, 16, 32, 48, 80, 128])
def test_block_sizes(backend, block_size):
    step = step_of(backend, (1, 4, 70), (900, 64, 90), block_size=block_size, heads=128)
    if compare(step.spec, backend.capabilities, detect_device("cuda")):
        pytest.skip("it is not declared")
    check(step, step.run())


@pytest.mark.parametrize("seed", range(6))
def test_random_steps_agree_with_float64(backend, seed):
    draw = random.Random(seed)
    lens = [(draw.choice([0, 1, 1, 3, 16, 100]), draw.randint(0, 900)) for _ in range(8)]
    query_lens = tuple(query for query, _ in lens)
    seq_lens = tuple(query + past for query, past in lens)
    heads = draw.choice([1, 2, 8, 32, 64, 128])
    step = step_of(backend, query_lens, seq_lens, seed, draw.randint(0, 2), heads=heads)
    check(step, step.run())


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("seed", range(2))
def test_ragged_batches_of_real_sizes_agree_with_float64(backend, seed, heads, block_size):
    """200,000 keys and more: each program asks for the blocks of its keys repeatedly."""
    draw = random.Random(seed)
    seq_lens = (30000, *(draw.randint(1000, 9000) for _ in range(40)))
    query_lens = tuple(draw.choice([1, 1, 1, 2, 4]) for _ in seq_lens)
    step = step_of(backend, query_lens, seq_lens, seed, heads=heads, block_size=block_size)
    if compare(step.spec, backend.capabilities, detect_device("cuda")):
        pytest.skip("it is not declared")
    check(step, step.run())


def test_replays_agree_with_float64(backend):
    """Two graphs of two layers over the same static batch, for steps of other lengths."""
    size, longest = 4, 1024
    first = step_of(backend, (1,) * size, (100,) * size, cuda_graph=True)
    if compare(first.spec, backend.capabilities, detect_device("cuda")):
        pytest.skip("it is not declared")
    limits = GraphLimits(num_reqs=size, num_tokens=size, max_query_len=1, max_seq_len=longest)
    table = torch.zeros(size, longest // 64, dtype=torch.int32, device="cuda")
    static = StaticBatch.make(limits, first.device, block_table=table)
    builder = first.builder()
    metadata = builder.build_for_graph(static.batch, limits)
    inputs = [tensor.clone() for tensor in (first.query, first.latents, first.rotated)]
    cache = torch.full((100, 64, 576), math.nan, dtype=torch.bfloat16, device="cuda")
    impls = [first.impl(), first.impl()]

    def layers():
        return [impl.forward(first.layer, *inputs, cache, metadata) for impl in impls]

    static.fill(first.batch)
    cache[: len(first.cache)] = first.cache
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers()
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, layers()))
    for seed, lens in enumerate([(1, 1000, 7, 64), (1024, 3), (65,)]):
        for graph, results in graphs:
            step = step_of(backend, (1,) * len(lens), lens, seed + 1, cuda_graph=True)
            step.weight = first.weight
            cache.fill_(math.nan)
            cache[: len(step.cache)] = step.cache
            static.fill(step.batch)
            builder.update_for_graph(metadata, step.batch)
            given = (step.query, step.latents, step.rotated)
            for tensor, values in zip(inputs, given, strict=True):
                tensor[: len(lens)] = values
            graph.replay()
            for output, lse in results:
                check(step, (output, lse), slice(len(lens)))
                assert not output[len(lens) :].any()
                assert bool((lse[len(lens) :] == -math.inf).all())


def test_a_step_does_not_wait_for_the_device(backend):
    step = step_of(backend, (1, 1, 5, 70), (300, 900, 64, 80))
    impl, builder = step.impl(), step.builder()
    for _ in range(2):
        step.run(impl, metadata=builder.build(step.batch))
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # half a second
    torch.cuda.set_sync_debug_mode("error")
    try:
        returned = step.run(impl, metadata=builder.build(step.batch))
        done.record()
        assert not done.query(), "the host was held up until the device had finished"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(step, returned)
