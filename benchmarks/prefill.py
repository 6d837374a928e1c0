"""Prefills of HOPPER_ATTN and TRITON_ATTN next to FlashAttention 3, each checked against float64.

    python benchmarks/prefill.py [--filter NAME] [--jobs 14] [--budget 0.06] [--json FILE]

Cases are prompts, ragged prompts (lognormal lengths; --seed), chunks over a past, other head sizes,
caches that TMA cannot read, windows, sinks and soft caps. FlashAttention 3 counts by its faster
form (over pages, or over the new rows). With --jobs, kernels are first compiled in that many
processes, for short batches of the same layers. Heads of 192 with values of 128 are compared
without a cache.
Exits with 1 if a backend's result is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from attn_dispatch import Attention, AttentionBatch
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.peers.flash_attention import FlashAttention3
from attn_dispatch.bench.runner import Bench, CaseResult
from attn_dispatch.bench.timing import Timing, clock_for, host_time_us, measure
from attn_dispatch.platforms.detect import detect_device

BACKENDS = ("HOPPER_ATTN", "TRITON_ATTN")
#: Llama 3 8B.
LAYER: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}


def _case(name: str, lens: Sequence[tuple[int, int]], **fields: Any) -> Case:
    query_lens, seq_lens = zip(*lens, strict=True)
    return Case(name=name, query_lens=query_lens, seq_lens=seq_lens, **(LAYER | fields))


def lengths(
    number: int, middle: int, rng: random.Random, least: int = 60, most: int = 5000
) -> list[int]:
    """Lognormal lengths."""
    return [min(most, max(least, round(middle * rng.lognormvariate(0, 1)))) for _ in range(number)]


def cases(seed: int) -> list[Case]:
    """All cases of a seed."""
    rng = random.Random(seed)
    prompts = {number: [(n, n) for n in lengths(number, 800, rng)] for number in (6, 32)}
    chunks = [(n, n + past) for n, past in zip(
        lengths(12, 600, rng, most=2048), lengths(12, 6000, rng, most=32768), strict=True
    )]  # fmt: skip
    random_batches = []
    for i in range(10):
        number = rng.choice((3, 6, 12, 24))
        pasts = lengths(number, 2000, rng, 1, 16000) if i % 2 else [0] * number
        pairs = zip(lengths(number, 700, rng), pasts, strict=True)
        random_batches.append([(n, n + past) for n, past in pairs])
    chunk, past_8k = [(2048, 16384)], [(512, 8704)] * 8
    return [
        _case("4k", [(4096, 4096)]),
        _case("16k", [(16384, 16384)]),
        _case("32k", [(32768, 32768)]),
        _case("8 x 2k", [(2048, 2048)] * 8),
        _case("32 x 128", [(128, 128)] * 32),
        _case("ragged 6", prompts[6]),
        _case("ragged 32", prompts[32]),
        _case("ragged chunks", chunks),
        _case("8 x 512 over 8k", past_8k),
        _case("2k over 16k", chunk),
        _case("2k over 16k, pages of 64", chunk, block_size=64),
        _case("4 x 1k over 64k", [(1024, 66560)] * 4),
        _case("64 x 1k over 64k", [(1024, 66560)] * 64),
        _case("4k, heads of 64", [(4096, 4096)], head_size=64),
        _case("ragged 32, heads of 64", prompts[32], head_size=64),
        _case("2k over 16k, heads of 64", chunk, head_size=64),
        _case("4k, heads of 96", [(4096, 4096)], head_size=96, num_kv_heads=32),
        _case("ragged 6, heads of 96", prompts[6], head_size=96, num_kv_heads=32),
        _case("2k over 16k, heads of 96", chunk, head_size=96, num_kv_heads=32),
        _case("decode 64 x 4k, heads of 96", [(1, 4096)] * 64, head_size=96, num_kv_heads=32),
        _case("4k, heads of 256", [(4096, 4096)], head_size=256, num_heads=16),
        _case("2k over 16k, heads of 256", chunk, head_size=256, num_heads=16),
        _case("8k, soft cap", [(8192, 8192)], logits_soft_cap=50.0),
        _case("8k, soft cap, heads of 256", [(8192, 8192)], logits_soft_cap=50.0, head_size=256),
        _case("8k, window of 1k", [(8192, 8192)], sliding_window=1024),
        _case("2k over 16k, window of 1001", chunk, sliding_window=1001),
        _case("8k, sinks, window of 128", [(8192, 8192)], sinks=True, sliding_window=128,
              head_size=64, num_heads=64),
        _case("2k over 16k, fp8", chunk, kv_cache_dtype="fp8_e4m3"),
        _case("8 x 512 over 8k, fp8", past_8k, kv_cache_dtype="fp8_e4m3"),
        _case("64 x 1k over 64k, fp8", [(1024, 66560)] * 64, kv_cache_dtype="fp8_e4m3"),
        _case("2k over 16k, fp8, heads of 256", chunk, kv_cache_dtype="fp8_e4m3", head_size=256),
        _case("2k over 16k, int8", chunk, kv_cache_dtype="int8_per_token_head"),
        _case("2k over 16k, pages of 1", chunk, block_size=1),
        _case("8 x 512 over 8k, pages of 8", past_8k, block_size=8),
        *(_case(f"random {i}", each) for i, each in enumerate(random_batches)),
    ]  # fmt: skip


# Compiling ----------------------------------------------------------------------------------------


def _shortened(case: Case) -> Case:
    """A short batch whose kernels are the same."""
    pairs = dict.fromkeys(
        (min(q, 300), min(q, 300) + min(s - q, 64)) if s - q else (min(q, 300),) * 2
        for q, s in zip(case.query_lens, case.seq_lens, strict=True)
    )
    query_lens, seq_lens = zip(*list(pairs)[:4], strict=True)
    return replace(case, query_lens=query_lens, seq_lens=seq_lens)


def _compile(task: tuple[Case, str, Sequence[str]]) -> str:
    case, device, backends = task
    torch.set_num_threads(1)
    try:
        bench = Bench(torch.device(device), backends=backends, rounds=1)
        (result,) = bench.run([_shortened(case)])
    except Exception as error:
        return f"{case.name}: {type(error).__name__}: {error}"
    bad = [f"{row.name} {row.status}: {row.detail}" for row in result.failed]
    return f"{case.name}: " + ("; ".join(bad) or result.skipped or "compiled")


def compile_all(
    chosen: Sequence[Case], jobs: int, device: torch.device, backends: Sequence[str]
) -> None:
    """Run a short batch of each layer, in several processes, so that kernels are in the cache."""
    start = time.monotonic()
    first = {}
    for case in chosen:
        short = _shortened(case)
        has_past = any(q != s for q, s in zip(short.query_lens, short.seq_lens, strict=True))
        has_fresh = any(q == s for q, s in zip(short.query_lens, short.seq_lens, strict=True))
        first.setdefault((case.spec(), has_past, has_fresh, case.kind), case)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=4) as pool:
        tasks = [(case, str(device), backends) for case in first.values()]
        for text in pool.imap_unordered(_compile, tasks):
            print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)


# Heads of 192 with values of 128 ------------------------------------------------------------------


def _mla_prefill(
    lens: Sequence[int], budget: float, device: torch.device, backends: Sequence[str]
) -> dict[str, Any]:
    """Times and errors of expanded latent attention: 16 heads, without a cache."""
    clock = clock_for(device)
    torch.manual_seed(0)
    total, heads = sum(lens), 16
    q, k = (torch.randn(total, heads, 192, device=device, dtype=torch.bfloat16) for _ in "qk")
    v = torch.randn(total, heads, 128, device=device, dtype=torch.bfloat16)
    scale = 192**-0.5
    batch = AttentionBatch.create(lens, lens, device=device)
    calls: dict[str, Any] = {}
    for name in backends:
        layer = Attention(
            num_heads=heads, head_size=192, head_size_v=128, num_kv_heads=heads, scale=scale,
            backend=name, dtype=torch.bfloat16, device=device, block_size=None,
        )  # fmt: skip
        metadata = layer.build_metadata(batch)
        calls[name] = lambda layer=layer, metadata=metadata: layer(q, k, v, None, metadata)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        starts = batch.query_start_loc
        calls["FlashAttention 3"] = lambda: flash_attn_varlen_func(
            q, k, v, max_seqlen_q=max(lens), cu_seqlens_q=starts, max_seqlen_k=max(lens),
            cu_seqlens_k=starts, softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip
    except ImportError as error:
        print(f"192/128: no FlashAttention 3: {error}")
    found: dict[str, Any] = {}
    for name, call in list(calls.items()):
        try:
            out = call().reshape(total, heads, 128)
            found[name] = {"error": _error(out, q, k, v, lens, scale)}
        except Exception as error:
            print(f"192/128: {name}: {type(error).__name__}: {error}")
            del calls[name]
    host = {name: host_time_us(call, clock) for name, call in calls.items()}
    for name, timing in measure(calls, clock, budget_s=budget, host_us=host).items():
        if isinstance(timing, Timing):
            found[name] |= {"median_us": timing.median_us, "host_us": host[name]}
    return found


def _error(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: Sequence[int],
    scale: float,
) -> float:  # fmt: skip
    """The largest difference from float64, on some rows of each request."""
    worst, start = 0.0, 0
    for n in lens:
        rows = torch.linspace(0, n - 1, min(n, 200), device=q.device).round().long()
        mine = q[start + rows].double()
        scores = torch.einsum("qhd,khd->hqk", mine, k[start : start + n].double()) * scale
        hidden = torch.arange(n, device=q.device)[None, :] > rows[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        exact = torch.einsum("hqk,khd->qhd", weights, v[start : start + n].double())
        worst = max(worst, float((out[start + rows].double() - exact).abs().max()))
        start += n
    return worst


# Running ------------------------------------------------------------------------------------------


def _line(result: CaseResult, backends: Sequence[str]) -> str:
    if result.skipped:
        return f"{result.case.name:32} skipped: {result.skipped}"
    words = [f"{result.case.name:32}"]
    peer = result.best(FlashAttention3.name)
    for name in backends:
        row = result.best(name)
        if row is None or row.timing is None:
            words.append(f"{name} {row.status if row else ''} {row.detail if row else ''}"[:150])
            continue
        ratio = f" {peer.median_us / row.median_us:5.3f}" if peer and peer.timing else ""
        host = f"{row.host_us:.0f}" if row.host_us else "-"
        words.append(f"{name} {row.median_us:9.1f}{ratio} (host {host}, error {row.error:.2g})")
    if peer is not None:
        own = [r for r in result.rows if r.name == peer.name]
        words += [f"{r.name} {r.variant} {r.median_us:.1f} {r.detail}"[:60] for r in own]
    picked = result.best(result.picked_row)
    if picked is not None and picked.timing is not None:
        regret = picked.median_us / result.fastest_us
        words.append(f"picked {result.picked_row} regret {regret:.3f}")
    return "  ".join(words)


def main() -> int:
    """Compile, run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", help="only cases with this in their name")
    parser.add_argument("--skip", default="", help="no cases with one of these, after commas")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile first")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="after commas")
    parser.add_argument("--budget", type=float, default=0.06, help="seconds for each to time")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after these")
    parser.add_argument("--seed", type=int, default=16, help="of the ragged batches")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args()
    start = time.monotonic()
    skipped = [each for each in args.skip.split(",") if each]
    chosen = [
        case
        for case in cases(args.seed)
        if args.filter in case.name and not any(each in case.name for each in skipped)
    ]
    device, backends = torch.device(args.device), args.backends.split(",")
    if args.jobs:
        compile_all(chosen, args.jobs, device, backends)
    print(f"seed {args.seed}; {detect_device(device).name}; µs; FlashAttention 3's time / ours")
    peers = []
    peer = FlashAttention3()
    try:
        peer.load()
        peers.append(peer)
    except Exception as error:
        print(f"no FlashAttention 3: {error}")
    bench = Bench(device, backends=backends, peers=peers, budget_s=args.budget)
    results, is_wrong = [], False
    for case in chosen:
        if time.monotonic() - start > args.seconds:
            print(f"not begun: {case.name} and what follows")
            break
        (result,) = bench.run([case])
        results.append({"name": case.name, "rows": [asdict(row) for row in result.rows]})
        results[-1] |= {"skipped": result.skipped, "picked": result.picked_row}
        is_wrong = is_wrong or bool(result.failed)
        print(f"{time.monotonic() - start:5.0f} s  {_line(result, backends)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, default=str, indent=1), encoding="utf-8")
    if args.filter in "192/128":
        for lens in ([4096], [16384], [100, 700, 1500, 333, 3000]):
            found = _mla_prefill(lens, args.budget, device, backends)
            print(f"192/128, prompts of {lens}: {json.dumps(found)}", flush=True)
            results.append({"name": f"192/128 {lens}", "rows": found})
        if args.json:
            args.json.write_text(json.dumps(results, default=str, indent=1), encoding="utf-8")
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
