"""The serving engine next to transformers' own generate, in one run.

    python benchmarks/serving.py                      # SmolLM2 on this machine
    python benchmarks/serving.py --model DIR --random-weights --dtype bfloat16 --fill 64 4096

Prints tokens per second and ratios for

- one stream: one request, as transformers' generate with sdpa runs it too;
- many: requests with prompts and answers of drawn lengths. transformers' generate gets them as one
  batch, padded on the left, which runs until the longest answer is finished.

With --fill N LENGTH: N requests of LENGTH tokens are prefilled, and then decode together. Times are
compared with what reading weights and cache once takes at the bandwidth of a copy in this run, and
for the prefill with the matrix multiplications of this run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.serving import Engine, Limits, Sampling, load_engine
from attn_dispatch.serving.smollm2 import model_path

#: Ranges of prompts and answers, in tokens.
PROMPT, ANSWER = (16, 512), (16, 128)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def workload(count: int, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """Random prompts, and the lengths of their answers."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(10, vocab_size) for _ in range(rng.randint(*PROMPT))], rng.randint(*ANSWER))
        for _ in range(count)
    ]


def by_engine(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Seconds to answer the requests."""
    samplings = [Sampling(max_new_tokens=count, ignore_eos=True) for _, count in requests]
    begin = time.perf_counter()
    engine.generate([prompt for prompt, _ in requests], samplings)
    synchronize(engine.device)
    return time.perf_counter() - begin


def by_generate(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Seconds that transformers takes for the same, as one padded batch."""
    longest = max(len(prompt) for prompt, _ in requests)
    most = max(count for _, count in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(requests):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    paged: Any = engine.model
    with paged.attention_of("sdpa") as model, torch.inference_mode():
        begin = time.perf_counter()
        model.generate(
            ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )
        synchronize(engine.device)
        return time.perf_counter() - begin


def compare(engine: Engine, count: int, seed: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratios of times, per round."""
    paged: Any = engine.model
    vocab_size = paged.model.config.get_text_config().vocab_size
    one = [(workload(1, vocab_size, seed)[0][0][:32], 64)]
    many = workload(count, vocab_size, seed)
    results: dict[str, Any] = {}
    for name, requests in (("one stream", one), (f"{count} requests", many)):
        new = sum(length for _, length in requests)
        ours, theirs = [], []
        for turn in range(rounds + 1):
            times = by_engine(engine, requests), by_generate(engine, requests)
            if turn:  # the first warms up
                ours.append(times[0])
                theirs.append(times[1])
        results[name] = {
            "engine_tokens_per_s": new / statistics.median(ours),
            "generate_tokens_per_s": new / statistics.median(theirs),
            "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        }
    return results


def fill(engine: Engine, count: int, length: int, steps: int = 32) -> dict[str, Any]:
    """Prefill requests of this length, then time decode steps of all of them."""
    paged: Any = engine.model
    vocab_size = paged.model.config.get_text_config().vocab_size
    rng = random.Random(0)
    sampling = Sampling(max_new_tokens=steps + 8, ignore_eos=True)
    requests = [
        engine.add([rng.randrange(10, vocab_size) for _ in range(length)], sampling)
        for _ in range(count)
    ]
    synchronize(engine.device)
    begin = time.perf_counter()
    while not all(request.num_new_tokens for request in requests):
        engine.step()
    prefill = time.perf_counter() - begin
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    step = statistics.median(times)
    for request in requests:
        engine.cancel(request)
    parameters = sum(p.numel() for p in paged.model.parameters())
    embedding = paged.model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in paged.model.parameters()) - embedding.nbytes
    assert engine.limits.cache_bytes is not None
    assert engine.limits.num_blocks is not None
    per_token = engine.limits.cache_bytes / engine.limits.num_blocks / engine.block_size
    cache = count * length * per_token
    bandwidth, rate = measured(engine.device, embedding.dtype)
    text = paged.model.config.get_text_config()
    pairs = count * length * length / 2 * text.num_hidden_layers
    layer = engine.layers[0].spec
    scores = 4 * pairs * layer.num_heads * layer.head_size
    products = 2 * (parameters - 2 * embedding.numel()) * count * length + scores
    return {
        "decode_step_ms": 1e3 * step,
        "decode_bound_ms": 1e3 * (weights + cache) / bandwidth,
        "decode_ratio": step * bandwidth / (weights + cache),
        "prefill_s": prefill,
        "prefill_share_of_matmul_rate": products / rate / prefill,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "matmul_tflops": rate / 1e12,
        "replayed_steps": engine.stats.replayed_steps,
    }


def measured(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes read per second by a sum of a large tensor, and operations per second of a matmul."""
    size = 1 << (32 if device.type == "cuda" else 28)
    data = torch.zeros(size // 4, dtype=torch.float32, device=device)
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    rates = []
    for call, amount in ((data.sum, data.nbytes), (lambda: a @ b, 2 * width**3)):
        call()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(10):
            call()
        synchronize(device)
        rates.append(10 * amount / (time.perf_counter() - begin))
    return rates[0], rates[1]


def main() -> None:
    """Run what the command line asks for, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: SmolLM2")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fill", type=int, nargs=2, metavar=("N", "LENGTH"))
    given = parser.parse_args()
    longest = given.fill[1] + 64 if given.fill else PROMPT[1] + ANSWER[1]
    requests = given.fill[0] if given.fill else given.requests
    engine = load_engine(
        given.model or model_path(),
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        device=given.device,
        random_weights=given.random_weights,
        limits=Limits(max_requests=requests, max_tokens=max(requests, 4096), max_seq_len=longest),
    )
    print(f"device {engine.device}, {torch.get_num_threads()} threads, seed {given.seed}")
    picks = {s.name for layer in engine.layers for s in layer.selections.values()}
    print(f"backends {', '.join(sorted(picks))}")
    if given.fill:
        print(json.dumps(fill(engine, *given.fill), indent=1))
    else:
        print(json.dumps(compare(engine, requests, given.seed, given.rounds), indent=1))


if __name__ == "__main__":
    main()
