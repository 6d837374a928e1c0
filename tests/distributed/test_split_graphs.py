"""Captured decodes of layers whose keys are split over ranks: over gloo only their buffers."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    ContextParallel,
    UnsupportedError,
    bind_kv_caches,
    forward_context,
    graph_state,
    plan_kv_cache,
)
from support.ranks import run_on_ranks

pytest.importorskip("triton")

HEADS, KV_HEADS, MAX_SEQS, MAX_SEQ_LEN = 4, 2, 3, 70
SIZE = 64 if torch.cuda.is_available() else 16


def layers_of(**more):
    from support.graph_cases import BACKEND, DEVICE, DTYPE

    fields = {"backend": BACKEND, "dtype": DTYPE, "device": DEVICE, "cuda_graph": True}
    return [
        Attention(
            HEADS, SIZE, num_kv_heads=KV_HEADS, block_size=16, prefix=f"layers.{index}",
            context_parallel=ContextParallel(), **fields | more,
        )
        for index in range(1 + torch.cuda.is_available())
    ]  # fmt: skip


def check_steps(rank, world):
    """Steps of several sizes through one capture, next to eager calls."""
    from support.graph_cases import interpreted_backend

    with interpreted_backend():
        with pytest.raises(UnsupportedError, match="steps with sliding_window are not captured"):
            layers_of(sliding_window=9)
        layers = layers_of(returns_lse=True)
        plan = plan_kv_cache(layers)
        columns = -(-MAX_SEQ_LEN // plan.tokens_per_block)
        caches = plan.allocate(MAX_SEQS * columns + 1, layers[0]._device)
        for cache in caches.values():
            cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(rank)))
        bind_kv_caches(layers, caches)
        device, dtype = layers[0]._device, layers[0].spec.dtype
        rows = [
            torch.zeros(MAX_SEQS, heads, SIZE, device=device, dtype=dtype)
            for heads in (HEADS // world, KV_HEADS, KV_HEADS)
        ]

        def run(context, number=MAX_SEQS):
            with torch.inference_mode(), forward_context(context):
                return [layer(*(each[:number] for each in rows)) for layer in layers]

        state = graph_state(layers, max_num_seqs=MAX_SEQS, max_seq_len=MAX_SEQ_LEN)
        with state.graph_capture():
            step = state.graph_capture_get_metadata_for_batch(MAX_SEQS)
            with pytest.raises(UnsupportedError, match="decodes with one new token"):
                state.graph_capture_get_metadata_for_batch(1, max_query_len=2)
            replay = captured(lambda: run(step)) if device.type == "cuda" else lambda: run(step)
        errors = []
        for lens in ([70, 1, 33], [2, 34]):
            table = 1 + torch.arange(len(lens) * columns).view(len(lens), columns)
            batch = AttentionBatch.create(
                [1] * len(lens), lens, block_table=table, block_size=plan.tokens_per_block,
                device=device,
            )  # fmt: skip
            for index, each in enumerate(rows):  # keys are the same on all ranks
                seed = torch.Generator().manual_seed(10 * len(lens) + index + (index == 0) * rank)
                each.copy_(torch.randn(each.shape, generator=seed))
            state.prepare_graph_input_buffers(step, batch)
            found = [tuple(part.clone() for part in each) for each in replay()]
            errors.append(error_of(found, run(batch, len(lens)), len(lens)))
        return errors


def captured(run):
    """A replay of what a graph captures, which returns the tensors of the capture."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = run()

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def error_of(replayed, eager, number):
    error = 0.0
    for (found, lse), (wanted, wanted_lse) in zip(replayed, eager, strict=True):
        assert not found[number:].any()
        assert (lse[number:] == -torch.inf).all()
        assert wanted.any()
        pairs = (found[:number], wanted), (lse[:number], wanted_lse)
        error = max(error, *(float((a.float() - b.float()).abs().max()) for a, b in pairs))
    return error


def test_a_captured_step_reads_this_ranks_part_of_the_next_batch():
    if torch.cuda.is_available():
        pytest.skip("test_decodes_are_captured_with_their_collectives runs it as a graph")
    errors = run_on_ranks(2, check_steps)
    assert max(max(each) for each in errors) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_decodes_are_captured_with_their_collectives():
    errors = run_on_ranks(2, check_steps, backend="nccl", limit_s=40)
    assert max(max(each) for each in errors) <= 1e-2
