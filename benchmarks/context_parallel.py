"""Attention over several GPUs, compared with one GPU that has all keys; and shared prefixes.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py [--only decode,ring] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --only capture

It runs over NCCL with a GPU for each process, and over gloo on CPUs with `--tiny`. Parts:

  collectives  the times of the collectives of a step, by their size
  decode       one layer, keys split over the ranks, with both ways to exchange parts (a2a, ag_rs)
  ring         a prompt by ring attention, of which each rank has a part
  cascade      on each GPU by itself: requests that share a prefix, read once or by each request
  capture      a decode with its collectives captured in a CUDA graph. It is not among the parts
               that run by default: give it a time limit, since a captured collective may hang.

Each result is compared with float64 on a sample of rows before it is timed. A time on the device
is a median over calls that all devices begin together; the pace is the time of a step when steps
follow one another, so that the host counts too. Speed-ups compare with one GPU of the same run,
which computes all heads over all keys. Rank 0 prints; the exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from attn_dispatch import Attention, AttentionBatch, attention, ring_attention, zigzag_rows
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.split_steps import (
    SplitStep,
    aligned_clock,
    measure_on_ranks,
    pace_us,
)
from attn_dispatch.bench.timing import Clock
from attn_dispatch.conformance.oracle import attention_of_request, sdpa_of_request, sees
from attn_dispatch.conformance.tolerance import allowance, distance
from attn_dispatch.distributed.advice import ONE_RANK
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime import cascade as shared_prefix
from attn_dispatch.runtime.cascade import pays_off

#: Query heads, KV heads and head size of the dense layers.
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
#: DeepSeek-V2's latents: kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
MLA = (512, 128, 64, 128)

#: Name -> requests, keys of each, and the speed-up that is the goal.
DECODES = {
    "16 x 64k": (16, 1 << 16, 1.7),
    "1 x 128k": (1, 1 << 17, 1.3),
    "64 x 4k": (64, 1 << 12, None),
    "MLA, 16 heads, 64 x 4k": (64, 1 << 12, None),
}
RING = {"1 x 64k": ([1 << 16], 1.7), "4 x 8k": ([1 << 13] * 4, None)}
#: Name -> requests, keys that they share, and keys of each.
CASCADES = {
    "64 x 18k, 16k shared": (64, 1 << 14, 18 << 10, 3.0),
    "64 x 4k, 2k shared": (64, 1 << 11, 1 << 12, None),
    "64 x 1.3k, 256 shared": (64, 256, 1280, None),
    "8 x 18k, 16k shared": (8, 1 << 14, 18 << 10, None),
    "8 x 3k, 1k shared": (8, 1 << 10, 3 << 10, None),
    "2 x 18k, 16k shared": (2, 1 << 14, 18 << 10, None),
}
SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23)

Result = dict[str, Any]


class Run:
    """What all parts need: the ranks, this rank's device, the sizes and how often to measure."""

    def __init__(self, ranks: Ranks, device: torch.device, *, tiny: bool, rounds: int) -> None:
        self.ranks, self.device, self.tiny, self.rounds = ranks, device, tiny, rounds
        self.clock: Clock = aligned_clock(device, ranks)
        on_gpu = device.type == "cuda"
        self.dtype = "bfloat16" if on_gpu else "float32"
        self.torch_dtype: torch.dtype = getattr(torch, self.dtype)
        self.heads, self.kv_heads, self.size = (4, 2, 16) if tiny else (HEADS, KV_HEADS, HEAD_SIZE)
        self.failed = False

    def shorter(self, length: int) -> int:
        """A length, or a small one in its place."""
        return max(4, length >> 9) if self.tiny else length

    def random(self, rows: int, heads: int, seed: int) -> torch.Tensor:
        """(rows, heads, head size), the same on every rank."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (rows, heads, self.size)
        return torch.randn(shape, generator=generator, dtype=self.torch_dtype, device=self.device)

    def times(self, calls: dict[str, Callable[[], object]], rounds: int = 0) -> Result:
        """Of each call the time on the device, and the pace, in microseconds."""
        timings = measure_on_ranks(calls, self.clock, self.ranks, rounds or self.rounds)
        return {
            name: {
                "us": round(timings[name].timing.median_us, 1),
                "low_us": round(timings[name].timing.low_us, 1),
                "high_us": round(timings[name].timing.high_us, 1),
                "host_us": round(timings[name].host_us, 1),
                "pace_us": round(pace_us(call, self.clock, self.ranks, rounds or self.rounds), 1),
            }
            for name, call in calls.items()
        }

    def report(self, what: str, result: Result) -> Result:
        """Print a result."""
        if self.ranks.rank == 0:
            print(f"{what}: {json.dumps(result)}", flush=True)
        return {"name": what, **result}


def speed_ups(times: Result, base: str, goal: float | None) -> Result:
    """How many times as fast as the base the other calls are, by both kinds of time."""
    rest = [name for name in times if name != base]
    found: Result = {
        kind: {name: round(times[base][kind] / times[name][kind], 2) for name in rest}
        for kind in ("us", "pace_us")
    }
    if goal is not None:
        found["goal"] = goal
        found["reached"] = max(found["us"].values()) >= goal
    return found


def collectives(run: Run) -> Iterator[Result]:
    ranks = run.ranks
    for size in SIZES[: 1 if run.tiny else None]:
        message = torch.zeros(ranks.size, size // ranks.size, dtype=torch.uint8, device=run.device)
        floats = message.view(torch.float32)
        calls: dict[str, Callable[[], object]] = {
            "all_to_all": lambda message=message: ranks.all_to_all(message),
            "all_gather": lambda message=message: ranks.all_gather(message),
            "reduce_scatter": lambda floats=floats: ranks.reduce_scatter(floats),
            "all_reduce": lambda floats=floats: ranks.all_reduce(floats),
        }
        yield run.report(f"collectives of {size} bytes on each rank", run.times(calls))


def decode_case(run: Run, name: str) -> Case:
    requests, keys, _ = DECODES[name]
    requests = min(requests, 4) if run.tiny else requests
    fields: dict[str, Any] = {
        "num_heads": run.heads, "num_kv_heads": run.kv_heads, "head_size": run.size
    }  # fmt: skip
    if name.startswith("MLA"):
        sizes = (16, 8, 8, 8) if run.tiny else MLA
        heads = run.heads if run.tiny else 16
        fields = {"num_heads": heads, "num_kv_heads": 1, "head_size": sizes[0] + sizes[2],
                  "mla": sizes}  # fmt: skip
    lens = (1,) * requests, (run.shorter(keys),) * requests
    return Case(name=name, query_lens=lens[0], seq_lens=lens[1], dtype=run.dtype, **fields)


def decode(run: Run) -> Iterator[Result]:
    for name, (_, _, goal) in DECODES.items():
        step = SplitStep(decode_case(run, name), run.device, run.ranks)
        errors = step.check()
        times = run.times(dict(step.calls))
        speed = speed_ups(times, ONE_RANK, goal)
        yield run.report(
            f"decode of {name}", {"times": times, "speed_up": speed, "errors": dict(errors)}
        )
        del step


def sampled(length: int, count: int = 4) -> torch.Tensor:
    return torch.linspace(0, length - 1, count).long()


def ring(run: Run) -> Iterator[Result]:
    ranks = run.ranks
    for name, (given, goal) in RING.items():
        lengths = [run.shorter(each) for each in given]
        total = sum(lengths)
        query, key, value = (
            run.random(total, heads, seed)
            for seed, heads in enumerate((run.heads, run.kv_heads, run.kv_heads))
        )
        rows = zigzag_rows(lengths, ranks.rank, ranks.size).to(run.device)
        own = [each[rows].contiguous() for each in (query, key, value)]

        def one() -> torch.Tensor:
            with torch.inference_mode():
                return attention(query, key, value, query_lens=lengths)  # noqa: B023

        def ringed() -> torch.Tensor:
            with torch.inference_mode():
                return ring_attention(*own, lengths, ranks.group)  # noqa: B023

        chosen = sampled(len(rows), 8)
        errors = dict.fromkeys((ONE_RANK, "RING"), 0.0)
        found = {ONE_RANK: one()[rows[chosen]], "RING": ringed()[chosen]}
        allowed = 0.0
        for index, row in enumerate(rows[chosen].tolist()):
            start = 0
            for length in lengths:
                if row < start + length:
                    break
                start += length
            position = torch.tensor([row - start], device=run.device)
            keys = slice(start, row + 1)
            seen = sees(position, row + 1 - start, causal=True)
            scale = run.size**-0.5
            parts = (query[row : row + 1], key[keys], value[keys])
            exact, _ = attention_of_request(*parts, scale=scale, seen=seen, positions=position)
            own_error = distance(
                sdpa_of_request(*parts, scale=scale, seen=seen).double(), exact, cancelled=0.0
            )
            allowed = max(allowed, allowance(run.torch_dtype, own_error, units=2))
            for which, output in found.items():
                error = distance(output[index : index + 1].double(), exact, cancelled=0.0)
                errors[which] = max(errors[which], error)
        run.failed |= any(ranks.gather_objects(not max(errors.values()) <= allowed))
        times = run.times({ONE_RANK: one, "RING": ringed}, 3 if run.tiny else 10)
        yield run.report(
            f"prefill of {name}",
            {
                "times": times,
                "speed_up": speed_ups(times, ONE_RANK, goal),
                "errors": errors,
                "allowed": allowed,
            },
        )


def cascade(run: Run) -> Iterator[Result]:
    block = 16 if not run.tiny else 4
    for name, (requests, shared, keys, goal) in CASCADES.items():
        if run.tiny:
            requests, shared, keys = min(requests, 4), 8 * block, 10 * block  # noqa: PLW2901
        own = (keys - shared) // block
        blocks = shared // block + requests * own
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).int()
        first, rest = order[: shared // block], order[shared // block :]
        table = torch.cat([first.expand(requests, -1), rest.view(requests, own)], 1)
        table = table.to(run.device)
        shape = (blocks, 2, block, run.kv_heads, run.size)
        random = torch.Generator(run.device).manual_seed(1)
        cache = torch.empty(shape, dtype=run.torch_dtype, device=run.device)
        cache.normal_(generator=random)
        query = run.random(requests, run.heads, 2)
        new = (run.random(requests, run.kv_heads, 3), run.random(requests, run.kv_heads, 4))
        calls: dict[str, Callable[[], torch.Tensor]] = {}
        for which, shares in (("plain", False), ("cascade", True)):
            layer = Attention(
                run.heads,
                run.size,
                num_kv_heads=run.kv_heads,
                dtype=run.torch_dtype,
                device=run.device,
                block_size=block,
                shared_prefix=shares,
                prefix=name,
            )
            batch = AttentionBatch.create(
                [1] * requests,
                [keys] * requests,
                block_table=table,
                block_size=block,
                shared_prefix_len=shared,
                device=run.device,
            )
            is_used = pays_off(batch, layer.spec, detect_device(run.device))
            with mock.patch.object(shared_prefix, "pays_off", return_value=True):
                metadata = layer.build_metadata(batch)  # measured in any case

            def call(layer: Attention = layer, metadata: Any = metadata) -> torch.Tensor:
                with torch.inference_mode():
                    return layer(query, *new, kv_cache=cache, attn_metadata=metadata)  # noqa: B023

            calls[which] = call
        found = {which: call() for which, call in calls.items()}
        errors, allowed = dict.fromkeys(found, 0.0), 0.0
        for request in sampled(requests).unique().tolist():
            places = cache[table[request].long()]
            parts = (query[request : request + 1], *(places[:, i].flatten(0, 1) for i in (0, 1)))
            seen = torch.ones(1, keys, dtype=torch.bool, device=run.device)
            scale = run.size**-0.5
            exact, _ = attention_of_request(*parts, scale=scale, seen=seen)
            own_error = distance(
                sdpa_of_request(*parts, scale=scale, seen=seen).double(), exact, cancelled=0.0
            )
            allowed = max(allowed, allowance(run.torch_dtype, own_error, units=2))
            for which, output in found.items():
                error = distance(output[request : request + 1].double(), exact, cancelled=0.0)
                errors[which] = max(errors[which], error)
        run.failed |= any(run.ranks.gather_objects(not max(errors.values()) <= allowed))
        times = run.times(dict(calls))
        yield run.report(
            f"decode of {name}",
            {
                "times": times,
                "speed_up": speed_ups(times, "plain", goal),
                "errors": errors,
                "allowed": allowed,
                "used_by_default": is_used,
            },
        )


def capture(run: Run) -> Iterator[Result]:
    """One decode after another: eager, then captured, compared and timed."""
    if run.device.type != "cuda":
        return
    for name in ("1 x 128k", "16 x 64k"):
        step = SplitStep(decode_case(run, name), run.device, run.ranks, ("A2A",))
        call, rank = step.calls["A2A"], run.ranks.rank
        stream = torch.cuda.Stream(run.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # communicators and kernels are made before the capture
            for _ in range(3):
                eager = call()
        torch.cuda.synchronize()
        dist.barrier()
        print(f"rank {rank}: capture of {name} begins", flush=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = call()
        print(f"rank {rank}: captured", flush=True)
        with torch.inference_mode():
            out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        print(f"rank {rank}: replayed", flush=True)
        same = run.ranks.gather_objects(bool(torch.equal(out, eager)))
        run.failed |= not all(same)
        times = run.times({ONE_RANK: step.calls[ONE_RANK], "eager": call, "replayed": graph.replay})
        yield run.report(
            f"captured decode of {name}",
            {"same_bits": all(same), "times": times, "speed_up": speed_ups(times, ONE_RANK, None)},
        )


PARTS: dict[str, Callable[[Run], Iterator[Result]]] = {
    "collectives": collectives,
    "decode": decode,
    "ring": ring,
    "cascade": cascade,
    "capture": capture,
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ",".join(name for name in PARTS if name != "capture")
    parser.add_argument("--only", default=default, help=f"parts, with commas; default: {default}")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each that are timed")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write the results of rank 0")
    found = parser.parse_args(arguments)
    found.parts = found.only.split(",")
    if unknown := set(found.parts) - PARTS.keys():
        parser.error(f"--only names {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if "RANK" not in os.environ:
        sys.exit("Start it by torchrun, which sets the ranks; see --help.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if has_gpus else "gloo",
        timeout=datetime.timedelta(seconds=60),
        device_id=device if has_gpus else None,
    )
    run = Run(Ranks(), device, tiny=options.tiny, rounds=options.rounds)
    results: list[Result] = []
    start = time.monotonic()
    for part in options.parts:
        for result in PARTS[part](run):
            results.append({"part": part, "at_s": round(time.monotonic() - start, 1), **result})
            if options.json and run.ranks.rank == 0:  # what is known so far, if a later part fails
                document = {
                    "device": torch.cuda.get_device_name(device) if has_gpus else "cpu",
                    "ranks": run.ranks.size,
                    "torch": torch.__version__,
                    "results": results,
                }
                with open(options.json, "w", encoding="utf-8") as file:
                    json.dump(document, file, indent=1)
        if has_gpus:
            torch.cuda.empty_cache()
    dist.barrier()
    return int(run.failed)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A captured graph keeps its communicator: destroying the group may wait for it forever.
    os._exit(status)
