"""vLLM's throughput and greedy tokens with its own attention backend and with this plug-in.

    python benchmarks/vllm_engine.py                                    # on a GPU, with vLLM 0.24
    python benchmarks/vllm_engine.py --backends FLASH_ATTN ATTN_DISPATCH     # with later versions
    python benchmarks/vllm_engine.py --layers 8 --requests 64 --graphs --json out.json

A model of Llama-3.1-8B's sizes with fewer layers and random weights is served. Each backend runs in
a process of its own, all of them --rounds times in turns, with the same prompts and weights. For
each process, the best of --repeats warm runs is printed:

- prefill: tokens of prompts per second, when each request asks for one token;
- decode: new tokens per second in the rest of the time, when each asks for --output tokens.

Greedy tokens are compared with those of the first backend. Different backends round differently,
and after one different token a request goes on differently: so the margin between the two best
tokens, where requests part, is printed in logits. A large one is an error of a backend.
--graphs compiles the model and captures CUDA graphs, as vLLM does by default; without it, all is
eager.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Llama-3.1-8B's, without the number of layers.
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: The same shape at a size that a CPU computes, to try this script.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def set_weights(model: Any) -> int:
    """Normal weights of deviation 0.02, and norms of one: vLLM's dummy weights are nearly zero."""
    import torch

    count = 0
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1)
                continue
            torch.manual_seed(index)
            parameter.normal_(0, 0.02)
            count += parameter.numel()
    return count


def serve(asked: dict[str, Any]) -> dict[str, Any]:
    """Times and tokens of one backend, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=asked["folder"],
        attention_backend=asked["backend"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=asked["dtype"],
        enforce_eager=not asked["graphs"],
        max_model_len=asked["input"] + asked["output"],
        max_num_seqs=asked["requests"],
        enable_prefix_caching=False,
        block_size=asked["block_size"],
        gpu_memory_utilization=0.8,
        seed=0,
    )
    num_weights = llm.apply_model(set_weights)[0]
    prompts = [{"prompt_token_ids": each} for each in asked["prompts"]]

    def run(count: int, logprobs: int | None = None) -> tuple[float, Any]:
        sampling = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    _, outputs = run(asked["output"], 2)  # also warms up
    run(asked["output"])
    prefill = min(run(1)[0] for _ in range(asked["repeats"]))
    whole = min(run(asked["output"])[0] for _ in range(asked["repeats"]))
    answers = [each.outputs[0] for each in outputs]
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    return {
        "impls": sorted({type(each.impl).__name__ for each in layers}),
        "num_weights": num_weights,
        "prefill_s": prefill,
        "decode_s": whole - prefill,
        "tokens": [list(each.token_ids) for each in answers],
        "margins": [[margin(each) for each in answer.logprobs] for answer in answers],
    }


def margin(logprobs: Any) -> float:
    """How far the best token lies above the second."""
    best, second = sorted((each.logprob for each in logprobs.values()), reverse=True)[:2]
    return best - second


def in_a_process(asked: dict[str, Any]) -> dict[str, Any]:
    """`serve`, in a fresh process with the engine's core in it."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "given.json", Path(folder) / "results.json"
        given.write_text(json.dumps(asked))
        command = [sys.executable, __file__, "--serve", str(given), str(results)]
        done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise SystemExit(f"{asked['backend']}: the process ended with {done.returncode}")
        return json.loads(results.read_text())


def compare(first: dict[str, Any], other: dict[str, Any]) -> tuple[int, float]:
    """How many requests part, and the largest margin where one does."""
    parted, largest = 0, 0.0
    for index, (wanted, found) in enumerate(zip(first["tokens"], other["tokens"], strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b), None)
        if at is not None:
            parted += 1
            largest = max(largest, first["margins"][index][at])
    return parted, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["FLASH_ATTN", "CUSTOM"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input", type=int, default=1024, help="tokens of the longest prompt")
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        given, results = args.serve
        results.write_text(json.dumps(serve(json.loads(given.read_text()))))
        return

    sizes = {**SIZES, **(SMALL if args.small else {}), "num_hidden_layers": args.layers}
    numbers = random.Random(0)
    lengths = [numbers.randint(args.input // 2, args.input) for _ in range(args.requests)]
    prompts = [[numbers.randrange(2, sizes["vocab_size"]) for _ in range(n)] for n in lengths]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes))
        for turn in range(args.rounds):
            for backend in args.backends:
                asked = {
                    **{key: getattr(args, key) for key in ("dtype", "graphs", "block_size")},
                    **{key: getattr(args, key) for key in ("input", "output", "requests")},
                    "repeats": args.repeats,
                    "folder": folder,
                    "backend": backend,
                    "prompts": prompts,
                }
                result = {"backend": backend, "round": turn, **in_a_process(asked)}
                found.append(result)
                parted, largest = compare(found[0], result)
                prefill = sum(lengths) / result["prefill_s"]
                decode = args.requests * (args.output - 1) / result["decode_s"]
                print(
                    f"{backend:14} round {turn}: prefill {prefill:9.0f} tokens/s, "
                    f"decode {decode:9.0f} tokens/s; {parted} of {args.requests} requests "
                    f"part from the first run's, largest margin there {largest:.3f}; "
                    f"{', '.join(result['impls'])}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "runs": found}))


if __name__ == "__main__":
    main()
