"""SGLang's attention layers as layers of this library: each field is mapped or rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_layouts import kv_cache_from_sglang
from attn_dispatch.interface.kv_view import KVCacheView
from attn_dispatch.runtime.layer import Attention

__all__ = ["attention_of", "cache_of", "check_runner", "radix_layers"]

#: The pool of keys and values whose slots this plug-in reads, and the one that has two of them.
PLAIN_POOL, POOL_OF_TWO = "MHATokenToKVPool", "SWAKVPool"

#: Where models keep the sinks of their layers: an attribute of the module that has the layer.
SINKS = ("sinks", "attention_sink_bias")

#: Element types of a cache that differ from the model's.
CACHE_DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2: "fp8_e5m2",
    torch.float8_e5m2fnuz: "fp8_e5m2fnuz",
}

_USE_ANOTHER = "Run SGLang with another --attention-backend."


def check_runner(runner: Any, engine: Any) -> None:
    """Reject models and options of the server that this plug-in does not serve.

    Raises:
        UnsupportedError: with every reason.
    """
    parallel = engine.get_parallel()
    reasons = [
        reason
        for is_so, reason in (
            (runner.use_mla_backend, "the model has latent attention (MLA)"),
            (
                runner.model_config.is_encoder_decoder,
                "the model has cross-attention, whose block tables begin inside of SGLang's pages",
            ),
            (
                not runner.spec_algorithm.is_none(),
                "speculative decoding is on, whose tree masks and draft steps are not read",
            ),
            (
                runner.kv_index_translator.is_translating,
                "the server has a unified memory pool, whose slots are virtual",
            ),
            (
                hasattr(runner.model, "prepare_attn_masks"),
                "tokens of an image see each other both ways in the model, which gives its masks "
                "to some backends of SGLang only",
            ),
            (runner.prefill_aware_swa, "windows of the model depend on the length of the prompt"),
            (parallel.dcp_enabled, "decode context parallelism is on"),
            (parallel.enable_prefill_cp, "prefill context parallelism is on"),
        )
        if is_so
    ]
    pool = runner.token_to_kv_pool
    is_pair = type(pool).__name__ == POOL_OF_TWO
    for each in (pool.full_kv_pool, pool.swa_kv_pool) if is_pair else (pool,):
        if (kind := type(each).__name__) != PLAIN_POOL:
            reasons.append(f"the KV cache is a {kind}; the plug-in reads {PLAIN_POOL}")
        elif each.is_quantized_kv_cache:  # what it hands over is a copy
            reasons.append("the KV cache is quantized in blocks")
    if runner.kv_cache_dtype not in (runner.dtype, *CACHE_DTYPES):
        reasons.append(f"the KV cache has elements of {runner.kv_cache_dtype}")
    if reasons:
        raise UnsupportedError(
            f"attn-dispatch does not serve this SGLang server: {'; '.join(reasons)}. {_USE_ANOTHER}"
        )


def radix_layers(model: nn.Module, engine: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, RadixAttention, its sinks or None) of each attention layer of a model."""
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, engine.RadixAttention):
            parent = modules[name.rpartition(".")[0]]
            found = (getattr(parent, each, None) for each in SINKS)
            yield name, layer, next((s for s in found if isinstance(s, torch.Tensor)), None)


def attention_of(
    name: str, layer: Any, runner: Any, *, sinks: torch.Tensor | None, cuda_graph: bool
) -> Attention:
    """The layer of this library that computes what a RadixAttention does.

    Args:
        name: of the layer in the model.
        layer: the RadixAttention.
        runner: SGLang's ModelRunner.
        sinks: (num_heads,), or None.
        cuda_graph: make it for CUDA graphs.

    Raises:
        UnsupportedError: the layer has what this library, or every backend, lacks.
    """
    kind = layer.attn_type.value
    reasons = [
        reason
        for is_so, reason in (
            (layer.is_cross_attention, "it is cross-attention"),
            (
                kind not in ("decoder", "encoder_only"),
                f"attn_type={kind!r}: the ranges that see each other both ways are not read",
            ),
            (
                layer.pos_encoding_mode != "NONE",
                f"pos_encoding_mode={layer.pos_encoding_mode!r}",
            ),
            (
                layer.logit_cap > 0 and layer.logit_capping_method != "tanh",
                f"logit_capping_method={layer.logit_capping_method!r}",
            ),
            (
                layer.xai_temperature_len > 0,
                f"xai_temperature_len={layer.xai_temperature_len}",
            ),
        )
        if is_so
    ]
    if reasons:
        raise UnsupportedError(
            f"attn-dispatch does not compute SGLang's layer {name!r}: {'; '.join(reasons)}. "
            f"{_USE_ANOTHER}"
        )
    window, is_decoder = layer.sliding_window_size, kind == "decoder"
    cache_dtype = "auto"
    if is_decoder and runner.kv_cache_dtype != runner.dtype:
        cache_dtype = CACHE_DTYPES[runner.kv_cache_dtype]
    key, _ = runner.token_to_kv_pool.get_kv_buffer(layer.layer_id)
    try:
        attention = Attention(
            num_heads=layer.tp_q_head_num,
            num_kv_heads=layer.tp_k_head_num,
            head_size=layer.qk_head_dim,
            head_size_v=layer.v_head_dim,
            scale=layer.scaling,
            dtype=runner.dtype,
            kv_cache_dtype=cache_dtype,
            block_size=runner.page_size if is_decoder else None,
            attn_type=kind,
            # SGLang counts the tokens before the query's own.
            sliding_window=window + 1 if window is not None and window > -1 else None,
            attention_chunk=runner.attention_chunk_size if layer.use_irope else None,
            logits_soft_cap=layer.logit_cap if layer.logit_cap > 0 else None,
            sinks=sinks,
            prefix=name,
            device=key.device,
            cuda_graph=cuda_graph and is_decoder,
        )
    except UnsupportedError as error:
        raise UnsupportedError(
            f"No backend of attn-dispatch computes SGLang's layer {name!r}: {error}", error.report
        ) from error
    scales = (layer.k_scale_float, layer.v_scale_float)
    if cache_dtype.startswith("fp8") and scales != (None, None):
        if None in scales:
            raise InvalidInputError(f"SGLang's layer {name!r} has only one of k_scale and v_scale.")
        attention.set_kv_scales(*scales)
    return attention


def cache_of(layer: Any, runner: Any) -> KVCacheView:
    """A layer's keys and values in SGLang's pool, without a copy.

    Where the server restores caches layer by layer, this waits for the layer's.
    """
    key, value = runner.token_to_kv_pool.get_kv_buffer(layer.layer_id)
    return kv_cache_from_sglang(key, value, runner.page_size)
