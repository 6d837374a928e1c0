"""A whole vLLM with the plug-in, on a CPU, in an environment of its own: see `vllm_process`.

Usage: python serve_vllm.py CASES.json RESULTS.json. A case has the folder of a model, the arguments
of vLLM's `LLM`, prompts and the number of new tokens. Nothing of the tests is imported here.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# vLLM reads these when it is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine's core in this process
    VLLM_USE_V2_MODEL_RUNNER="0",  # the second runner needs a GPU
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def honour_the_flag() -> None:
    """Let vLLM's platform for CPUs use --attention-backend, as its platform for CUDA does.

    It has one backend of its own, and ignores the flag.
    """
    from vllm.platforms.cpu import CpuPlatform

    def get_attn_backend_cls(
        selected_backend: Any, attn_selector_config: Any, num_heads: Any = None, **_: Any
    ) -> str:
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Selected backend {selected_backend} is not valid: {reasons}")
        return selected_backend.get_path()

    CpuPlatform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


def layers_of(runner: Any) -> dict[str, Any]:
    """What executed the attention layers: their modules, and whose memory the caches are."""
    from attn_dispatch import Attention

    layers = runner.compilation_config.static_forward_context
    theirs = {each.untyped_storage().data_ptr() for each in runner.kv_caches}
    gc.unfreeze()  # vLLM freezes what it has made: it would not be listed
    caches = [each.kv_cache for each in gc.get_objects() if isinstance(each, Attention)]
    ours = {each.untyped_storage().data_ptr() for each in caches if each is not None}
    return {
        "impls": sorted({type(each.impl).__module__ for each in layers.values()}),
        "num_layers": len(layers),
        "caches": sorted({str(each.dtype) for each in runner.kv_caches}),
        "zero_copy": theirs <= ours,  # also layers of engines before can be there
    }


def runner_of(engine: Any) -> Any:
    """The object that executes the model."""
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def generate(case: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The greedy tokens of a decoder, and what vLLM counted."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments, disable_log_stats=False)
    prompts = [{"prompt_token_ids": each} for each in case["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=case["new_tokens"], detokenize=False, ignore_eos=True
    )
    found: dict[str, Any] = {"tokens": [], "cached": []}
    for _ in range(case["turns"]):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found["tokens"].append([list(each.outputs[0].token_ids) for each in outputs])
        found["cached"].append([each.num_cached_tokens for each in outputs])
    metrics = {each.name: each.value for each in llm.get_metrics() if hasattr(each, "value")}
    for name in ("num_preemptions", "spec_decode_num_accepted_tokens"):
        found[name] = metrics.get(f"vllm:{name}")
    return {**found, **layers_of(runner_of(llm.llm_engine))}


def embed(case: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The vectors of an encoder. `LLM` needs a tokenizer for such models, its engine does not."""
    from vllm import PoolingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    for index, prompt in enumerate(case["prompts"]):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, PoolingParams(task="embed"))
    vectors = {}
    while engine.has_unfinished_requests():
        for each in engine.step():
            vectors[int(each.request_id)] = each.outputs.data.tolist()
    return {
        "vectors": [vectors[index] for index in sorted(vectors)],
        **layers_of(runner_of(engine)),
    }


def serve(case: dict[str, Any]) -> dict[str, Any]:
    """The results of one model."""
    arguments = {
        "model": case["folder"],
        "attention_backend": case["backend"],
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "seed": 0,
        **case["arguments"],
    }
    run = embed if arguments.get("runner") == "pooling" else generate
    return run(case, arguments)


def clean_up() -> None:
    """Let go of an engine, so that the process can start another."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


def main(cases: str, results: str) -> None:
    """Serve each case; an error becomes the case's result."""
    honour_the_flag()
    version = importlib.import_module("vllm").__version__
    found = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        try:
            found[name] = serve(case)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        clean_up()
    found["version"] = version
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
