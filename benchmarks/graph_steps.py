"""Host time of a replayed step of many layers, next to eager calls and to FlashAttention 3.

    python benchmarks/graph_steps.py [--layers 32] [--backend NAME] [--rounds N]

Needs an NVIDIA GPU. A step is a batch of 64 requests with 1,000 to 8,000 keys each, for layers of
32 query heads and 8 KV heads of size 128: one new token per request, or four (verification of
drafts). Times are the host's, from the batch's lengths until everything is queued:

  eager     AttentionBatch.create, and the layers in forward_context
  replayed  AttentionBatch.create, state.prepare_graph_input_buffers, graph.replay
  of these: batch, prepare, replay
            these three, as parts of the line above
  FlashAttention 3
            lengths copied to the GPU, and one call for each layer, if it is installed

The last one is the device's time of a replayed step, which shows whether host or device decides.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    bind_kv_caches,
    forward_context,
    graph_state,
    plan_kv_cache,
)

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
NUM_REQS, MAX_SEQ_LEN = 64, 8192


class _Step:
    """Layers over one cache memory, and the tensors of a step."""

    def __init__(self, num_layers: int, query_len: int, backend: str | None) -> None:
        self.query_len = query_len
        self.layers = [
            Attention(
                NUM_HEADS,
                HEAD_SIZE,
                num_kv_heads=NUM_KV_HEADS,
                prefix=f"layers.{index}",
                dtype=torch.bfloat16,
                device="cuda",
                block_size=BLOCK_SIZE,
                cuda_graph=True,
                backend=backend,
            )
            for index in range(num_layers)
        ]
        specs = {"layers.0": self.layers[0].spec}
        plan = plan_kv_cache(specs, torch.device("cuda"), backend=backend)
        self.columns = MAX_SEQ_LEN // BLOCK_SIZE
        # One cache for all layers: host times do not depend on it, and 32 would not fit.
        cache = plan.allocate(NUM_REQS * self.columns, "cuda")["layers.0"].normal_()
        self.cache = cache
        bind_kv_caches(self.layers, dict.fromkeys((each.prefix for each in self.layers), cache))
        tokens = NUM_REQS * query_len
        self.rows = [
            torch.randn(tokens, heads, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        ]
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randperm(NUM_REQS * self.columns, generator=generator)
        self.table = self.table.view(NUM_REQS, self.columns).int()
        self.seq_lens = torch.randint(1000, 8000, (NUM_REQS,), generator=generator).tolist()
        self.device_table = self.table.cuda()

    def batch(self) -> AttentionBatch:
        """The step's batch. The block table is on the device, as engines keep it."""
        return AttentionBatch.create(
            [self.query_len] * NUM_REQS,
            self.seq_lens,
            block_table=self.device_table,
            block_size=BLOCK_SIZE,
            max_decode_query_len=self.query_len,
            device="cuda",
        )

    def run(self, context: Any) -> None:
        """All layers."""
        with torch.inference_mode(), forward_context(context):
            for layer in self.layers:
                layer(*self.rows)


def _captured(step: _Step) -> tuple[Callable[[], list[float]], torch.cuda.CUDAGraph]:
    """A replay of a new batch, which returns the seconds of its parts; and the graph."""
    state = graph_state(
        step.layers,
        max_num_seqs=NUM_REQS,
        max_num_tokens=NUM_REQS * step.query_len,
        max_seq_len=MAX_SEQ_LEN,
    )
    with state.graph_capture():
        captured = state.graph_capture_get_metadata_for_batch(
            NUM_REQS, max_query_len=step.query_len
        )
        step.run(captured)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run(captured)

    def replay() -> list[float]:
        times = [time.perf_counter()]
        batch = step.batch()
        times.append(time.perf_counter())
        state.prepare_graph_input_buffers(captured, batch)
        times.append(time.perf_counter())
        graph.replay()
        times.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(times)]

    return replay, graph


def _flash_attention_3(step: _Step) -> Callable[[], None] | None:
    """As many calls as there are layers, with what a caller prepares once per step."""
    views = step.cache.unbind(1)
    starts = torch.arange(0, NUM_REQS + 1, dtype=torch.int32) * step.query_len
    try:
        function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
        query = step.rows[0].view(NUM_REQS, step.query_len, NUM_HEADS, HEAD_SIZE)

        def call(lengths: torch.Tensor, _: torch.Tensor) -> None:
            table = step.device_table
            function(query, *views, cache_seqlens=lengths, page_table=table, causal=True)

    except ImportError:
        try:
            function = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
        except ImportError:
            return None

        def call(lengths: torch.Tensor, starts: torch.Tensor) -> None:
            function(
                q=step.rows[0],
                k=views[0],
                v=views[1],
                cu_seqlens_q=starts,
                max_seqlen_q=step.query_len,
                seqused_k=lengths,
                max_seqlen_k=MAX_SEQ_LEN,
                block_table=step.device_table,
                causal=True,
                fa_version=3,
            )

    def run() -> None:
        lengths = torch.tensor(step.seq_lens, dtype=torch.int32).cuda(non_blocking=True)
        of_queries = starts.cuda(non_blocking=True)
        for _ in step.layers:
            call(lengths, of_queries)

    return run


def _host_us(function: Callable[[], Any], rounds: int) -> tuple[float, list[float]]:
    """The median time until a call returns, and of the parts that it returns, if it does.

    The device is idle at the start of each call.
    """
    times, parts = [], []
    for _ in range(rounds + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = function()
        times.append((time.perf_counter() - start) * 1e6)
        parts.append([each * 1e6 for each in found or ()])
    torch.cuda.synchronize()
    return statistics.median(times[5:]), list(map(statistics.median, zip(*parts[5:], strict=True)))


def _device_us(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """The median time of a replay on the device."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(num_layers: int, backend: str | None, rounds: int) -> dict[str, dict[str, float]]:
    """The times in µs, by the kind of step."""
    found = {}
    for name, query_len in (("decode", 1), ("verification, 4 tokens", 4)):
        step = _Step(num_layers, query_len, backend)
        step.run(step.batch())
        replay, graph = _captured(step)
        replayed, parts = _host_us(replay, rounds)
        times = {
            "eager": _host_us(lambda step=step: step.run(step.batch()), rounds)[0],
            "replayed": replayed,
            **dict(zip(("of these: batch", "prepare", "replay"), parts, strict=True)),
        }
        flash = _flash_attention_3(step)
        if flash is not None:
            times["FlashAttention 3"] = _host_us(flash, rounds)[0]
        times["on the device"] = _device_us(graph, rounds)
        found[name] = times
        del step, replay, graph, flash
        torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--backend", default=None, help="an override of the selected backends")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU.", file=sys.stderr)
        return 1
    result = measure(options.layers, options.backend, options.rounds)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "us": result}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
