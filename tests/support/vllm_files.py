"""vLLM's own files as an `engine` of `vllm_cases`: its attention layer drives our adapter."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from support import fake_vllm, vllm_cases, vllm_mla_cases
from support.engine_files import imported, unpacked

#: The releases that are checked.
VERSIONS = ("0.24.0", "0.33.0")

_LAYERS = "vllm.model_executor.layers"
#: Modules that are vLLM's own files; the others are stubs.
OWN = (
    f"{_LAYERS}.attention_layer_base",
    f"{_LAYERS}.quantization.utils.quant_utils",
    f"{_LAYERS}.attention.attention",
    f"{_LAYERS}.attention.chunked_local_attention",
    f"{_LAYERS}.attention.encoder_only_attention",
    f"{_LAYERS}.attention.mla_attention",
    "vllm.scalar_type",
    "vllm.utils.import_utils",
    "vllm.utils.math_utils",
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends.registry",
    "vllm.v1.attention.backends.utils",
    "vllm.v1.attention.ops.pcp",
    "vllm.v1.attention.selector",
    "vllm.v1.kv_cache_interface",
    "vllm.v1.kv_cache_layout",
    "vllm.v1.kv_cache_spec_registry",
)


def _no_group() -> Any:
    """What vLLM does without distributed groups."""
    raise AssertionError("no group")


def _cache_dtype(name: str, model_config: Any) -> torch.dtype:
    return torch.float32 if name == "auto" else torch.uint8


def _on_host(data: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.as_tensor(data, dtype=dtype)


def _stubs(config: Any, context: Any) -> dict[str, dict[str, Any]]:
    """What the stubs have, for the modules that are its own files."""
    return {
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_KV_CACHE_LAYOUT": None,
            **dict.fromkeys(("Q_SCALE_CONSTANT", "K_SCALE_CONSTANT", "V_SCALE_CONSTANT"), 200),
        },
        "vllm.config": {
            "get_current_vllm_config": lambda: config,
            "get_current_vllm_config_or_none": lambda: config,
        },
        "vllm.config.cache": {"get_kv_cache_dtype_handler": lambda name: None},
        "vllm.distributed.parallel_state": {
            "get_dcp_world_size_and_rank": lambda enabled: (1, 0),
            "get_dcp_group": _no_group,
            "get_pcp_group": _no_group,
        },
        "vllm.forward_context": {"get_forward_context": lambda: context},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(
                opaque_attention_op=lambda: False,
                dispatch_key="CPU",
                fp8_dtype=lambda: torch.float8_e4m3fn,
                is_cuda=lambda: False,
                is_rocm=lambda: False,
            )
        },
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
        "vllm.utils.torch_utils": {
            "kv_cache_dtype_str_to_dtype": _cache_dtype,
            "async_tensor_h2d": _on_host,
            "is_quantized_kv_cache": lambda name: name.startswith("fp8"),
            "np_to_pinned_tensor": torch.from_numpy,
            "PIN_MEMORY": False,
            "get_dtype_size": lambda dtype: dtype.itemsize,
            "_resolve_layer_name": lambda name: name,
            "_encode_layer_name": lambda name: name,
        },
    }


@contextlib.contextmanager
def vllm_engine(version: str, monkeypatch: Any) -> Iterator[Any]:
    """The engine of this version."""
    config = SimpleNamespace(
        speculative_config=None,
        model_config=SimpleNamespace(use_mla=False, max_model_len=48, is_mm_prefix_lm=False),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pcp_shard_decode_requests=False,
        ),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    context = SimpleNamespace(attn_metadata=None, slot_mapping={}, no_compile_layers={})
    with imported(unpacked("vllm", version), "vllm", OWN, _stubs(config, context)):
        fake_vllm.forget_ours(monkeypatch)
        ours = importlib.import_module(fake_vllm.OURS)
        mla = importlib.import_module(fake_vllm.OUR_MLA)
        latents = importlib.import_module(f"{_LAYERS}.attention.mla_attention")
        layers = importlib.import_module(f"{_LAYERS}.attention.attention")
        encoders = importlib.import_module(f"{_LAYERS}.attention.encoder_only_attention")
        chunked = importlib.import_module(f"{_LAYERS}.attention.chunked_local_attention")
        theirs = importlib.import_module("vllm.v1.attention.backend")
        quantizations = importlib.import_module(f"{_LAYERS}.quantization.utils.quant_utils")
        registry = importlib.import_module("vllm.v1.attention.backends.registry")
        registry.register_backend(registry.AttentionBackendEnum.CUSTOM, "some.other.Class")

        def layer(name, scale=vllm_cases.SIZE**-0.5, kv_cache_dtype="auto", **arguments):
            importlib.import_module("attn_dispatch.integrations.vllm").register()
            config.compilation_config.static_forward_context.pop(name, None)
            names = config.compilation_config.static_forward_context
            target = arguments.get("kv_sharing_target_layer_name")
            monkeypatch.setattr(layers, "validate_kv_sharing_target", lambda *given: None)
            assert target is None or target in names
            cache = SimpleNamespace(
                cache_dtype=kv_cache_dtype,
                sliding_window=None,
                kv_cache_dtype_skip_layers=None,
                calculate_kv_scales=False,
                enable_prefix_caching=False,
            )
            made = layers.Attention(
                vllm_cases.HEADS,
                vllm_cases.SIZE,
                scale,
                vllm_cases.KV_HEADS,
                cache_config=cache,
                prefix=name,
                attn_backend=ours.AttnDispatchBackend,
                **arguments,
            )
            context.no_compile_layers[name] = made
            return made

        def mla_layer(name, kv_b_proj, kv_cache_dtype="auto", **arguments):
            config.compilation_config.static_forward_context.pop(name, None)
            case = vllm_mla_cases
            made = latents.MLAAttention(
                *(case.HEADS, case.SCALE, case.NOPE, case.ROPE, case.VALUES, None, case.LATENT),
                kv_b_proj,
                cache_config=SimpleNamespace(
                    cache_dtype=kv_cache_dtype,
                    calculate_kv_scales=False,
                    enable_prefix_caching=False,
                    kv_cache_dtype_skip_layers=None,
                ),
                prefix=name,
                attn_backend=mla.AttnDispatchMLABackend,
                **arguments,
            )
            made._chunked_prefill_workspace_size = 1  # else of the model's configuration
            context.no_compile_layers[name] = made
            return made

        def run_mla(layer, query, kv_c_normed, k_pe, metadata, output):
            context.attn_metadata = None if metadata is None else {layer.layer_name: metadata}
            given = (kv_c_normed, k_pe, layer.layer_name, layer.kv_cache_dtype, layer._k_scale)
            context.slot_mapping = {layer.layer_name: torch.empty(0)} if metadata else {}
            latents.unified_mla_kv_cache_update(*given)
            latents.unified_mla_attention_with_output(
                query, kv_c_normed, k_pe, output, layer.layer_name
            )

        def run(layer, query, key, value, metadata, output, output_scale=None):
            context.attn_metadata = None if metadata is None else {layer.layer_name: metadata}
            layers.unified_attention_with_output(
                query, key, value, output, layer.layer_name, output_scale=output_scale
            )

        yield SimpleNamespace(
            version=version,
            ours=ours,
            common=theirs.CommonAttentionMetadata,
            config=config,
            fp8_static=quantizations.kFp8StaticTensorSym,
            fp8_blocks=quantizations.kFp8Dynamic128Sym,
            layer=layer,
            run=run,
            mla=mla,
            mla_layer=mla_layer,
            run_mla=run_mla,
            latents=latents,
            path_of=lambda name: registry.AttentionBackendEnum[name].get_path(),
            layers=layers,
            chunked=chunked,
            encoders=encoders,
            theirs=theirs,
            context=context,
        )
