"""Many requests of one length: their prefill, and decode steps of all of them, against bounds.

What `benchmarks/serving.py --fill` and `--fill --theirs` run.
"""

from __future__ import annotations

import itertools
import math
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from attn_dispatch import AttentionBatch, forward_context
from attn_dispatch.serving import Engine, Request, Sampling

#: The config of Llama-3.1-8B.
LLAMA_3_1_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}

#: Tokens of transformers' generate_batch that are this close are of one step.
_SAME_STEP_S = 2e-3
#: Kernels of a profile that are listed.
_LISTED = 14


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The median time of a call that is queued several times, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            call()
        synchronize(device)
        times.append((time.perf_counter() - begin) / 4)
    return statistics.median(times)


def rates(engine: Engine, rows: int, length: int) -> dict[str, float]:
    """What this device reaches in this run, on the model's own shapes.

    Returns:
        read_bytes: per second, of a sum over a large tensor. matmul: operations per second of a
        layer's linear modules with this many rows; square_matmul: of a large square product.
        attention: operations per second of prompts of this length on the engine's layer;
        sdpa_attention: on PyTorch's.
    """
    paged: Any = engine.model
    device, dtype = engine.device, paged.model.get_input_embeddings().weight.dtype
    is_gpu = device.type == "cuda"
    data = torch.zeros(1 << (30 if is_gpu else 24), dtype=torch.float32, device=device)
    read = data.nbytes / seconds(data.sum, device)
    del data
    width = 8192 if is_gpu else 512
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    square = 2 * width**3 / seconds(lambda: a @ b, device)
    linears = layer_linears(paged.model)
    inputs = {n: torch.randn(rows, n, dtype=dtype, device=device) for n in widths(linears)}

    def products() -> None:
        for each in linears:
            functional.linear(inputs[each.weight.shape[1]], each.weight)

    with torch.inference_mode():
        weights = sum(each.weight.numel() for each in linears)
        matmul = 2 * rows * weights / seconds(products, device)
    return {
        "read_bytes": read,
        "square_matmul": square,
        "matmul": matmul,
        **attention_rates(engine, max(1, rows // length), length, dtype),
    }


def layer_linears(model: Any, count: int = 4) -> list[nn.Linear]:
    """The linear modules of the first layers."""
    layers = list(model.get_decoder().layers)[:count]
    return [each for layer in layers for each in layer.modules() if isinstance(each, nn.Linear)]


def widths(linears: Sequence[nn.Linear]) -> set[int]:
    """The numbers of their inputs."""
    return {each.weight.shape[1] for each in linears}


def causal_operations(engine: Engine, count: int, length: int) -> float:
    """Operations of a layer's scores and values over prompts."""
    spec = engine.layers[0].spec
    sizes = spec.head_size + (spec.head_size_v or spec.head_size)
    return 2 * sizes * spec.num_heads * count * length * (length + 1) / 2


def attention_rates(
    engine: Engine, count: int, length: int, dtype: torch.dtype
) -> dict[str, float]:
    """Operations per second of a prefill of some prompts; the cache's content is overwritten."""
    layer, device, size = engine.layers[0], engine.device, engine.block_size
    spec = layer.spec
    blocks = -(-length // size)
    batch = AttentionBatch.create(
        [length] * count,
        [length] * count,
        block_table=torch.arange(count * blocks).view(count, blocks),
        block_size=size,
        device=device,
    )
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    query, key, value = (
        torch.randn(count * length, each, spec.head_size, dtype=dtype, device=device)
        for each in heads
    )
    operations = causal_operations(engine, count, length)
    parts = [
        each.view(count, length, -1, spec.head_size).transpose(1, 2) for each in (query, key, value)
    ]
    sdpa = functional.scaled_dot_product_attention
    with torch.inference_mode(), forward_context(batch):
        own = operations / seconds(lambda: layer(query, key, value), device)
        torchs = operations / seconds(lambda: sdpa(*parts, is_causal=True, enable_gqa=True), device)
    return {"attention": own, "sdpa_attention": torchs}


def bounds(engine: Engine, count: int, length: int, rate: dict[str, float]) -> dict[str, float]:
    """The least seconds of a decode step and of the prefill at these rates.

    A decode step reads all weights but the table of embeddings, and all keys and values. The
    prefill multiplies with all weights but that table and the last one, whose products are only
    needed once for each request; and it computes the scores.
    """
    paged: Any = engine.model
    parameters = list(paged.model.parameters())  # tied ones occur once
    table = paged.model.get_input_embeddings().weight
    head = paged.model.get_output_embeddings().weight
    tied = head is table
    weights = sum(each.nbytes for each in parameters) - (0 if tied else table.nbytes)
    limits = engine.limits
    assert limits.cache_bytes is not None
    assert limits.num_blocks is not None
    per_token = limits.cache_bytes / limits.num_blocks / engine.block_size
    used = sum(each.numel() for each in parameters) - table.numel() - (0 if tied else head.numel())
    scores = len(engine.layers) * causal_operations(engine, count, length)
    attention = max(rate["attention"], rate["sdpa_attention"])
    products = 2 * used * count * length
    return {
        "weight_bytes": float(weights),
        "cache_bytes": count * length * per_token,
        "decode": (weights + count * length * per_token) / rate["read_bytes"],
        "prefill": products / rate["matmul"] + scores / attention,
        "prefill_matmul": products / rate["matmul"],
        "prefill_attention": scores / attention,
        "prefill_by_square_matmul": products / rate["square_matmul"] + scores / attention,
    }


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocab_size) for _ in range(length)] for _ in range(count)]


def vocabulary(engine: Engine) -> int:
    """The number of the model's tokens."""
    paged: Any = engine.model
    return int(paged.model.config.get_text_config().vocab_size)


def add(engine: Engine, given: list[list[int]], new_tokens: int) -> list[Request]:
    """Queue prompts with answers of a fixed length."""
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    return [engine.add(prompt, sampling) for prompt in given]


def timed_steps(engine: Engine, count: int) -> list[float]:
    """Seconds of some steps; each ends when its tokens are on the host."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return times


def fill(engine: Engine, count: int, length: int, steps: int = 24) -> dict[str, Any]:
    """Prefill requests of this length, then time decode steps of all of them.

    The prompts are served twice: first for one token, which is the prefill that is timed, and then
    their keys are found again in the cache.
    """
    vocab_size = vocabulary(engine)
    own = prompts(count, length, vocab_size)
    begin = time.perf_counter()
    for seed in (1, 2):  # compiles, and shows each kernel its shapes
        add(engine, prompts(2, length, vocab_size, seed), 1)
        while engine.has_work:
            engine.step()
    result: dict[str, Any] = {"warm_up_s": time.perf_counter() - begin}

    add(engine, own, 1)
    synchronize(engine.device)
    begin, before = time.perf_counter(), engine.stats.steps
    while engine.has_work:
        engine.step()
    synchronize(engine.device)
    prefill = time.perf_counter() - begin
    result["prefill_steps"] = engine.stats.steps - before

    requests = add(engine, own, 4 * steps)
    while not all(request.num_new_tokens for request in requests):
        engine.step()
    timed_steps(engine, 3)
    before = engine.stats.replayed_steps
    captured = timed_steps(engine, steps)
    replayed = engine.stats.replayed_steps - before
    runs_ahead, engine._runs_ahead = engine._runs_ahead, False
    timed_steps(engine, 2)
    waiting = timed_steps(engine, steps // 2)
    engine._runs_ahead = runs_ahead
    result["decode_kernels"] = profile(engine, 3)
    replay = replay_seconds(engine, count)
    forward = engine._forward
    graphs, forward.graphs = forward.graphs, None
    timed_steps(engine, 2)
    eager = timed_steps(engine, steps // 2)
    forward.graphs = graphs
    for request in requests:
        engine.cancel(request)

    add(engine, prompts(2, length, vocab_size, 3), 1)
    result["prefill_kernels"] = profile(engine, 1)
    while engine.has_work:
        engine.step()
    rate = rates(engine, engine.limits.max_tokens or count, length)
    bound = bounds(engine, count, length, rate)
    step = statistics.median(captured)
    busy = replay or result["decode_kernels"]["device_ms"] / 1e3
    result |= {
        "decode_step_ms": 1e3 * step,
        "decode_step_ms_not_ahead": 1e3 * statistics.median(waiting),
        "decode_step_ms_without_graphs": 1e3 * statistics.median(eager),
        "decode_bound_ms": 1e3 * bound["decode"],
        "decode_over_bound": step / bound["decode"],
        "decode_device_ms": 1e3 * busy,
        "decode_host_share": max(0.0, 1 - busy / step),
        "decode_tokens_per_s": count / step,
        "replayed": f"{replayed} of {steps} timed steps",
        "steps_ahead": f"{engine.stats.steps_ahead} of {engine.stats.steps}",
        "prefill_s": prefill,
        "prefill_tokens_per_s": count * length / prefill,
        "prefill_bound_s": bound["prefill"],
        "prefill_share_of_bound": bound["prefill"] / prefill,
        "prefill_share_by_square_matmul": bound["prefill_by_square_matmul"] / prefill,
        "bounds": bound,
        "rates": rate,
    }
    if engine.device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated(engine.device) / 1e9
    return result


def replay_seconds(engine: Engine, count: int) -> float:
    """The time of a captured decode step on the device; 0 if there is none."""
    graphs = engine._forward.graphs
    captured = [] if graphs is None else graphs._captured
    for each in captured:
        if each._graph is not None and each.step.limits.num_reqs == count:
            # The last step again: it writes the same keys to the same places.
            return seconds(each._graph.replay, engine.device)
    return 0.0


def profile(engine: Engine, steps: int) -> dict[str, Any]:
    """The time of kernels in some steps: in all, and of the longest by name, in ms of a step."""
    if engine.device.type != "cuda":
        timed_steps(engine, steps)
        return {"device_ms": 0.0}
    from torch.profiler import ProfilerActivity

    runs_ahead, engine._runs_ahead = engine._runs_ahead, False
    if engine._ahead is not None:
        engine.step()  # so that the profile has whole steps
    synchronize(engine.device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        timed_steps(engine, steps)
        synchronize(engine.device)
    engine._runs_ahead = runs_ahead
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in found.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:90]] += event.device_time_total / 1e3 / steps
            calls[event.name[:90]] += 1
    listed = {name: [round(ms, 4), calls[name] // steps] for name, ms in times.most_common(_LISTED)}
    return {
        "device_ms": sum(times.values()),
        "kernels": sum(calls.values()) // steps,
        "ms_and_calls_of_a_step": listed,
    }


def theirs(
    model: Any, count: int, length: int, new_tokens: int, max_tokens: int, most_s: int
) -> dict[str, Any]:
    """transformers' own continuous batching of the same prompts, with fewer new tokens.

    Args:
        model: of transformers.
        count: requests.
        length: tokens of each.
        new_tokens: of each answer. With more than the prefill has steps, all requests decode
            together in the last ones.
        max_tokens: of a step.
        most_s: seconds after which it is stopped.

    Returns:
        Tokens per second of the prefill and of the decode by the times of its tokens; or an error.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished after {most_s} s")

    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    given = prompts(count, length, model.config.vocab_size)
    result: dict[str, Any] = {}
    signal.signal(signal.SIGALRM, stop)
    for to_flash in (True, False):  # FlashAttention may be named by a package that cannot load it
        result = {"attention": model.config._attn_implementation}
        signal.alarm(most_s)
        try:
            begin = time.perf_counter()
            found = model.generate_batch(
                inputs=given,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    max_batch_tokens=max_tokens,
                    allow_block_sharing=False,
                    auto_switch_to_flash=to_flash,
                ),
                record_timestamps=True,
            )
            result["attention"] = model.config._attn_implementation
            result |= of_timestamps([each.timestamps for each in found.values()], begin, length)
            result["finished"] = sum(each.is_finished() for each in found.values())
            return result
        except TimeoutError as error:
            result["error"] = str(error)
            return result
        except Exception as error:  # any: it is another library's, and the report shows it
            result["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        finally:
            signal.alarm(0)
    return result


def of_timestamps(
    stamps: Sequence[Sequence[float] | None], begin: float, length: int
) -> dict[str, Any]:
    """What the times of the tokens of all requests say about steps."""
    kept = [each for each in stamps if each]
    if not kept:
        return {"error": "no request has a token"}
    first, last_first = min(each[0] for each in kept), max(each[0] for each in kept)
    stamps_after = sorted(stamp for each in kept for stamp in each if stamp >= last_first)
    # The tokens of a step have nearly the same time.
    ends = [b for b, c in itertools.pairwise([*stamps_after, math.inf]) if c - b > _SAME_STEP_S]
    between = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "first_token_s_with_its_warm_up": first - begin,
        "first_to_last_first_token_s": last_first - first,
        "total_s": max(each[-1] for each in kept) - begin,
        "decode_steps_of_all": len(between),
        "decode_step_ms": 1e3 * statistics.median(between) if between else None,
        "prompt_tokens": len(kept) * length,
    }
