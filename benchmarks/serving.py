"""The serving engine next to transformers' own generate, in one run.

    python benchmarks/serving.py                      # SmolLM2 on this machine
    python benchmarks/serving.py --fill 64 4096       # Llama-3.1-8B's config, on a GPU
    python benchmarks/serving.py --fill 64 4096 --compile
    python benchmarks/serving.py --fill 64 4096 --theirs

Prints tokens per second and ratios for

- one stream: one request, as transformers' generate with sdpa runs it too;
- many: requests with prompts and answers of drawn lengths. transformers' generate gets them as one
  batch, padded on the left, which runs until the longest answer is finished.

With --fill N LENGTH: N requests of LENGTH tokens are prefilled, and then decode together, with CUDA
graphs and without. Times are compared with what the device reaches in this run: the decode step
with reading weights and keys once, and the prefill with the products of the model's own shapes and
the attention of such prompts. The longest kernels are listed. With --theirs, transformers' own
continuous batching (generate_batch) gets the same prompts instead.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from serving_fill import LLAMA_3_1_8B, fill, synchronize, theirs

from attn_dispatch.platforms.detect import usable_device
from attn_dispatch.serving import Engine, Limits, Sampling, load_engine
from attn_dispatch.serving.smollm2 import model_path

#: Ranges of prompts and answers, in tokens.
PROMPT, ANSWER = (16, 512), (16, 128)


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


def picks(engine: Engine) -> list[str]:
    """The backends of all layers."""
    found = {
        f"{phase.value}={each.name}"
        for layer in engine.layers
        for phase, each in layer.selections.items()
    }
    return sorted(found)


def folder_of(given: argparse.Namespace, temporary: Path) -> Path:
    """The model's folder or file; with --fill by default that of Llama-3.1-8B, a config only."""
    if given.model is not None:
        return Path(given.model)
    if not given.fill:
        return model_path()
    (temporary / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    return temporary


def run_theirs(given: argparse.Namespace, path: Path, device: torch.device) -> dict[str, Any]:
    """transformers' own continuous batching of what --fill says, on random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    dtype = getattr(torch, given.dtype) if given.dtype else config.dtype
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    options = (given.new_tokens, given.max_tokens or 8192, given.most_seconds)
    return theirs(model, *given.fill, *options)


def run(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What the command line asks for."""
    device = usable_device(given.device)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if given.theirs:
        return about | {"generate_batch": run_theirs(given, path, device)}
    longest = given.fill[1] + 128 if given.fill else PROMPT[1] + ANSWER[1]
    requests = given.fill[0] if given.fill else given.requests
    begin = time.perf_counter()
    engine = load_engine(
        path,
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        device=device,
        random_weights=given.random_weights or (bool(given.fill) and given.model is None),
        limits=Limits(max_requests=requests, max_tokens=given.max_tokens, max_seq_len=longest),
        compile_layers=given.compile,
    )
    synchronize(engine.device)
    about |= {
        "start_s": time.perf_counter() - begin,
        "compiled": given.compile,
        "max_tokens": engine.limits.max_tokens,
        "block_size": engine.block_size,
        "backends": picks(engine),
    }
    if given.fill:
        result = about | fill(engine, *given.fill)
    else:
        result = about | compare(engine, requests, given.seed, given.rounds)
    return result | {"backends": picks(engine)}  # with those of layers that fell back


def main() -> None:
    """Run what the command line asks for, and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: SmolLM2")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, help="new tokens of a step")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--fill", type=int, nargs=2, metavar=("N", "LENGTH"))
    parser.add_argument(
        "--theirs", action="store_true", help="with --fill: only transformers' generate_batch"
    )
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer, with --theirs")
    parser.add_argument("--most-seconds", type=int, default=60, help="of a run, with --theirs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    given = parser.parse_args()
    if given.theirs and not given.fill:
        parser.error("--theirs needs --fill")
    with tempfile.TemporaryDirectory() as temporary:
        result = run(given, folder_of(given, Path(temporary)))
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
